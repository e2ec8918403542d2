"""The client: what a program needs to talk to a server of loadledger. The command is in `loadledger.cli`.

What is imported from here is loaded when it is used first, since the command begins with this package, too:
the names, for those who check types, stand in `__init__.pyi`.
"""

from typing import Any

_RECORDS = {"Event", "Head", "Health", "Job", "Model", "Resources"}
_PROBLEMS = {
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
}
_NAMES = {"AsyncClient", "Client", *_RECORDS, *_PROBLEMS}
__all__ = [*_NAMES]  # noqa: PLE0604 - what is loaded late is not found otherwise


def __getattr__(name: str) -> Any:
    if name == "Client":
        from loadledger.client import Client  # noqa: PLC0415

        return Client
    if name == "AsyncClient":
        from loadledger.aio import AsyncClient  # noqa: PLC0415

        return AsyncClient
    if name in _RECORDS:
        from loadledger import records  # noqa: PLC0415

        return getattr(records, name)
    if name in _PROBLEMS:
        from loadledger import problems  # noqa: PLC0415

        return getattr(problems, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
