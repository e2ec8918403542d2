"""The client: what a program needs to talk to a server of loadledger. The command is in `loadledger.cli`.

What is imported from here is loaded when it is used first, since the command begins with this package, too:
the names, for those who check types, stand in `__init__.pyi`.
"""

from typing import Any

_MODULES = {
    "aio": ("AsyncClient",),
    "client": ("Client",),
    "problems": (
        "Archived",
        "BadAnswer",
        "Busy",
        "ClientProblem",
        "JobFailed",
        "JobUnfinished",
        "NotAllowed",
        "NotFound",
        "ServerError",
        "ServerUnreachable",
    ),
    "records": ("Event", "Head", "Health", "Job", "Model", "Resources"),
}
_PLACES = {name: f"loadledger.{module}:{name}" for module, names in _MODULES.items() for name in names}
__all__ = [*_PLACES]  # noqa: PLE0604 - what is loaded late is not found otherwise


def __getattr__(name: str) -> Any:
    from pkgutil import resolve_name  # noqa: PLC0415

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_name(_PLACES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
