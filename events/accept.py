"""What the writer decides immediately before it inserts: accept, answer with what exists, or refuse. Pure.

Joining of duplicates and the choice of the active model are decided here and only here, so that two
handlers cannot race. Jobs of one model are carried out in the order of their acceptance, so what counts
for a duplicate is the last of them that has not ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from events.jobs import Job, JobKind, LoadParameters, load_requested
from events.models import Model, ModelState
from events.state import State
from events.types import Cause, Draft, LoadedFile, UnloadRequested

MAX_QUEUE = 256
"""Jobs that may be unended before requests by people are refused (DESIGN.md, "Defaults")."""

_SHAPING = frozenset({"instances", "max_batch_size", "max_queue_delay_us"})
"""Parameters that say what a loaded model is like; the others only say how it is to be loaded."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file of a version as the repository has it now; relative path, bytes, nanoseconds."""

    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """Load this version; `files` are what the repository holds for it now.

    `asked` are the names of those `parameters` that the request itself gave: who asks a model that is loaded
    for nothing in particular is content with how it is.
    """

    model_id: str
    version: int
    files: tuple[FileStat, ...]
    actor: str
    parameters: LoadParameters = field(default_factory=LoadParameters)
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    asked: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RequestUnload:
    """Unload this model, or the active one where no model is named."""

    model_id: str | None
    actor: str
    force: bool = False
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """Facts to append as they are, in this order, in one transaction."""

    drafts: tuple[Draft, ...]


Command = RequestLoad | RequestUnload | Record


@dataclass(frozen=True, slots=True)
class Accepted:
    """Append these."""

    drafts: tuple[Draft, ...]
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class Existing:
    """Nothing to append: this job stands behind the present state, or already does what is asked."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The present state does not allow it."""

    code: str
    message: str


Decision = Accepted | Existing | Refused


def accept(state: State, command: Command, new_id: Callable[[], str]) -> Decision:
    """Decide `command` on `state`; `new_id` gives the ids of new events."""
    match command:
        case Record(drafts):
            return Accepted(drafts)
        case RequestLoad():
            return _load(state, command, new_id)
        case RequestUnload():
            return _unload(state, command, new_id)


def _load(state: State, command: RequestLoad, new_id: Callable[[], str]) -> Decision:
    unended = state.queue(command.model_id)
    last = unended[-1] if unended else None
    if last is not None and last.version == command.version and _fits(last.load, command):
        return Existing(last.id)
    model = state.models.get(command.model_id)
    if last is None and model is not None and _serves(model, command):
        assert model.serving is not None
        return Existing(model.serving.load_job_id)
    if _is_limited(command.cause) and len(state.unended()) >= MAX_QUEUE:
        return Refused("queue_full", f"{MAX_QUEUE} jobs have not ended yet; try again when some have")
    event_id = new_id()
    data = load_requested(_to_record(model, command), command.cause, command.cause_event_id)
    draft = Draft(event_id, data, command.actor, event_id, command.model_id, command.version)
    return Accepted((draft,), event_id)


def _serves(model: Model, command: RequestLoad) -> bool:
    """Whether the model is as it is asked for; one that lost an instance is not, and a load repairs it."""
    serving = model.serving
    if serving is None or model.phase is not ModelState.LOADED or serving.version != command.version:
        return False
    if model.degraded or not _fits(serving.parameters, command):
        return False
    return sorted(map(_stat, serving.files), key=_path) == sorted(command.files, key=_path)


def _to_record(model: Model | None, command: RequestLoad) -> LoadParameters:
    """Return what applies: a load that repairs a model makes it what it was, but for what is asked."""
    serving = model.serving if model is not None and model.degraded else None
    if serving is None or serving.version != command.version:
        return command.parameters
    names = _SHAPING - command.asked
    if "max_batch_size" in command.asked:
        names -= {"max_queue_delay_us"}  # which is that of a batch, and may be none any more
    return replace(command.parameters, **{name: getattr(serving.parameters, name) for name in names})


def _fits(parameters: LoadParameters | None, command: RequestLoad) -> bool:
    """Whether this is a load, and one that comes to what is asked for."""
    return parameters is not None and all(
        getattr(parameters, name) == getattr(command.parameters, name) for name in _SHAPING & command.asked
    )


def _stat(file: LoadedFile) -> FileStat:
    return FileStat(file.path, file.bytes, file.mtime_ns)


def _path(file: FileStat) -> str:
    return file.path


def _is_limited(cause: Cause) -> bool:
    """What the system does to restore what was promised is never refused for lack of room."""
    return cause in (Cause.REQUEST, Cause.DEMAND)


def _unload(state: State, command: RequestUnload, new_id: Callable[[], str]) -> Decision:
    model_id = command.model_id
    if model_id is None:
        model_id = _model_to_unload(state, force=command.force)
    if model_id is None:
        return Refused("nothing_loaded", "no model is loaded; GET /api/v1/models shows their states")
    unended = state.queue(model_id)
    last = unended[-1] if unended else None
    if last is not None and last.kind is JobKind.UNLOAD and (last.forced or not command.force):
        return Existing(last.id)
    load_job_id = _load_to_end(state.models.get(model_id), unended, command)
    if load_job_id is None:
        return Refused("not_loaded", _why_not_loaded(model_id, unended))
    event_id = new_id()
    data = UnloadRequested(command.force, load_job_id, command.cause, command.cause_event_id)
    version = _version_of(state.models.get(model_id), unended, load_job_id)
    draft = Draft(event_id, data, command.actor, event_id, model_id, version)
    return Accepted((draft,), event_id)


def _model_to_unload(state: State, *, force: bool) -> str | None:
    active = state.active()
    if active is not None:
        return active.id
    if not force:
        return None
    return next((job.model_id for job in state.unended() if job.kind is JobKind.LOAD), None)


def _load_to_end(model: Model | None, unended: list[Job], command: RequestUnload) -> str | None:
    """Return the load that this unload ends: what serves, or, without force, what will by then."""
    serving = model.serving if model is not None else None
    loads = [job for job in unended if job.kind is JobKind.LOAD]
    if serving is not None:
        waits_for = loads[-1].id if loads and not command.force else None
        return waits_for or serving.load_job_id
    return loads[0].id if loads and command.force else None


def _version_of(model: Model | None, unended: list[Job], load_job_id: str) -> int | None:
    if model is not None and model.serving is not None and model.serving.load_job_id == load_job_id:
        return model.serving.version
    return next((job.version for job in unended if job.id == load_job_id), None)


def _why_not_loaded(model_id: str, unended: list[Job]) -> str:
    if unended:
        return f"model '{model_id}' is only loading; add ?force=true to end the load"
    return f"model '{model_id}' is not loaded"
