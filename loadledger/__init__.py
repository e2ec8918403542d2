"""The Python client of a loadledger server; `loadledger.cli` is the command.

`Client` blocks, `AsyncClient` is for event loops. Both (client.py) have the operations of operations.py,
written once as coroutines over one of the transports in transports/. An operation goes this way:

    operations.py    arguments -> request (paging, polling in jobs.py, events in stream.py)
    inference.py     arrays -> request and answer -> arrays, in binary; datatypes in tensors.py
    requests.py      request -> answer, with retries and back-off; answer -> struct or exception
    errors.py        the exceptions
    profiles.py      which server: variables and profiles

To add an operation, add a method to `Operations` and name it in `Client`. Public names are imported on first
use, since every run of the command imports this package; type checkers find them in `__init__.pyi`.
"""

from typing import Any

_MODULES = {
    "loadledger.client": ("AsyncClient", "Client"),
    "loadledger.errors": (
        "BadAnswer",
        "Busy",
        "ClientProblem",
        "JobFailed",
        "JobUnfinished",
        "NotAllowed",
        "NotFound",
        "ServerError",
        "ServerUnreachable",
        "SourceProblem",
    ),
    "loadledger.profiles": ("ProfileProblem",),
    "loadledger.inference": ("InferenceResult",),
    "answers.approvals": ("VersionApprovals",),
    "answers.signatures": ("VerifiedVersionInfo",),
    "answers.events": ("EventInfo", "Head"),
    "answers.health": ("Health",),
    "answers.inference": ("ModelMetadata",),
    "answers.jobs": ("JobInfo",),
    "answers.models": ("ModelInfo",),
    "answers.nodes": ("NodeInfo",),
    "answers.resources": ("Resources",),
    "answers.tensors": ("ModelTensor",),
    "answers.versions": ("AddedVersionInfo", "VersionInfo"),
}
_PATHS = {name: f"{module}:{name}" for module, names in _MODULES.items() for name in names}
__all__ = [*_PATHS]  # noqa: PLE0604 - names are imported on first use


def __getattr__(name: str) -> Any:
    from pkgutil import resolve_name

    if name not in _PATHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_name(_PATHS[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_PATHS})
