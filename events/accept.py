"""What the writer decides immediately before it inserts: accept, answer with what exists, or refuse. Pure.

Joining of duplicates, idempotency keys and the choice of the active model are decided here and only here, so
that two handlers cannot race. Jobs of one model are carried out in the order of their acceptance, so what
counts for a duplicate is the last of them that has not ended.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from events.commands import Command, FileStat, Record, RequestCancel, RequestLoad, RequestUnload
from events.jobs import NEVER, Job, JobKind, LoadParameters, load_requested
from events.models import Model, ModelState, Serving
from events.state import State
from events.types import CancelRequested, Cause, Draft, Idempotency, LoadedFile, UnloadRequested

MAX_QUEUE = 256
"""Jobs that may be unended before requests by people are refused (DESIGN.md, "Defaults")."""

_MOST_UNENDED = {Cause.REQUEST: MAX_QUEUE, Cause.DEMAND: MAX_QUEUE // 2}
"""By cause. Inferences leave room for who manages; what the system does to restore what was promised is never
refused."""

_WITH_A_LOAD = (ModelState.LOADED, ModelState.LOST)
"""The phases in which a model has a load that nothing ends yet."""

_SHAPING = frozenset({"instances", "max_batch_size", "max_queue_delay_us", "memory_limit_bytes"})
"""Parameters that say what a loaded model is like: for others, it is loaded anew."""

_KEEPING = frozenset({"pinned", "keep_alive_s"})
"""Parameters that say how long a loaded model stays, and can change while it does. The others are about the
load alone."""


class Accepted(Struct, frozen=True, gc=False):
    """Append these."""

    drafts: tuple[Draft, ...]
    job_id: str | None = None


class Existing(Struct, frozen=True, gc=False):
    """Nothing to append: this job stands behind the present state, or already does what is asked."""

    job_id: str


class Refused(Struct, frozen=True, gc=False):
    """The present state does not allow it."""

    code: str
    message: str


Decision = Accepted | Existing | Refused


def accept(state: State, command: Command, new_id: Callable[[], str], now: str) -> Decision:
    """Decide `command` on `state`.

    Args:
        state: what is true, with those of the known idempotency keys that `command` names.
        command: what is asked for.
        new_id: gives the ids of new events.
        now: the ledger's time, as a stamp.
    """
    if isinstance(command, Record):
        return Accepted(command.drafts)
    repeated = _repeated(state, command.idempotency, now)
    if repeated is not None:
        return repeated
    match command:
        case RequestLoad():
            return _load(state, command, new_id)
        case RequestUnload():
            return _unload(state, command, new_id)
        case RequestCancel():
            return _cancel(state, command, new_id)


def _repeated(state: State, given: Idempotency | None, now: str) -> Existing | Refused | None:
    """Return what became of the first request with this key; only what was appended uses a key up."""
    known = state.keys.get(given.key_hash) if given is not None else None
    if given is None or known is None or not known.holds(now):
        return None
    if known.fingerprint == given.fingerprint:
        return Existing(known.job_id)
    return Refused(
        "idempotency_mismatch",
        f"this Idempotency-Key was used for another request, that of job {known.job_id}, at "
        f"{known.recorded_at}; repeat that one as it was, or use a new key for this one",
    )


def _load(state: State, command: RequestLoad, new_id: Callable[[], str]) -> Decision:
    unended = state.queue(command.model_id)
    last = unended[-1] if unended else None
    if last is not None and _is_for(last, command):
        return Existing(last.id)
    model = state.models.get(command.model_id)
    serving = _as_asked(model, command) if last is None else None
    if serving is not None and _agrees(serving.parameters, command, _KEEPING):
        return Existing(serving.load_job_id)
    if command.cause is Cause.DEMAND and (there := _instead(model, unended, command)) is not None:
        return Existing(there)
    most = _MOST_UNENDED.get(command.cause)
    if most is not None and state.backlog >= most:
        return Refused("queue_full", f"{most} jobs have not ended yet; try again when some have")
    event_id = new_id()
    kept = serving.load_job_id if serving is not None else None
    parameters = _to_record(model, command, is_kept=kept is not None)
    data = load_requested(parameters, command.cause, command.cause_event_id, command.idempotency, kept)
    draft = Draft(event_id, data, command.actor, event_id, command.model_id, command.version)
    return Accepted((draft,), event_id)


def _is_for(job: Job, command: RequestLoad) -> bool:
    """Whether the job will do what is asked; one that is being cancelled will not."""
    return job.version == command.version and _agrees(job.load, command, _SHAPING) and not job.cancelling


def _as_asked(model: Model | None, command: RequestLoad) -> Serving | None:
    """Return what serves if it is what is asked for; one that lost an instance is not, a load repairs it."""
    serving = model.serving if model is not None and model.phase is ModelState.LOADED else None
    if model is None or serving is None or serving.version != command.version or model.degraded:
        return None
    same = sorted(map(_stat, serving.files), key=_path) == sorted(command.files, key=_path)
    return serving if same and _agrees(serving.parameters, command, _SHAPING) else None


def _instead(model: Model | None, unended: list[Job], command: RequestLoad) -> str | None:
    """Return the load of another version that is there, or on its way: none is replaced on demand."""
    if unended:
        return unended[-1].id if unended[-1].kind is JobKind.LOAD else None
    serving = model.serving if model is not None and model.phase is ModelState.LOADED else None
    return serving.load_job_id if serving is not None and serving.version != command.version else None


def _to_record(model: Model | None, command: RequestLoad, *, is_kept: bool) -> LoadParameters:
    """Return what applies: what is kept or repaired stays what it was, but for what is asked."""
    serving = model.serving if model is not None and (model.degraded or is_kept) else None
    if serving is None or serving.version != command.version:
        return command.parameters
    names = (_SHAPING | _KEEPING) - command.asked
    if "max_batch_size" in command.asked:
        names -= {"max_queue_delay_us"}  # which is that of a batch, and may be none any more
    return replace(command.parameters, **{name: getattr(serving.parameters, name) for name in names})


def _agrees(parameters: LoadParameters | None, command: RequestLoad, names: frozenset[str]) -> bool:
    """Whether these are the parameters of a load, and those that are asked for, as far as `names` goes."""
    return parameters is not None and all(
        _value(parameters, name) == _value(command.parameters, name) for name in names & command.asked
    )


def _value(parameters: LoadParameters, name: str) -> object:
    value = getattr(parameters, name)
    return NEVER if name == "keep_alive_s" and value is None else value


def _stat(file: LoadedFile) -> FileStat:
    return FileStat(file.path, file.bytes, file.mtime_ns)


def _path(file: FileStat) -> str:
    return file.path


def _unload(state: State, command: RequestUnload, new_id: Callable[[], str]) -> Decision:
    model_id = command.model_id
    if model_id is None:
        model_id = _model_to_unload(state, force=command.force)
    if model_id is None:
        return Refused("nothing_loaded", "no model is loaded; GET /api/v1/models shows their states")
    unended = state.queue(model_id)
    if command.load_job_id is not None:
        return _unload_only(state, command, model_id, new_id)
    last = unended[-1] if unended else None
    if last is not None and _ends_it(last, command):
        return Existing(last.id)
    load_job_id = _load_to_end(state.models.get(model_id), unended, command)
    if load_job_id is None:
        return Refused("not_loaded", _why_not_loaded(model_id, unended))
    version = _version_of(state.models.get(model_id), unended, load_job_id)
    return _unload_requested(command, model_id, version, load_job_id, new_id())


def _unload_only(
    state: State, command: RequestUnload, model_id: str, new_id: Callable[[], str]
) -> Accepted | Refused:
    """Unload what serves from the load that is named; what is asked of the model meanwhile comes first."""
    model = state.models.get(model_id)
    serving = model.serving if model is not None and model.phase in _WITH_A_LOAD else None
    if serving is None or serving.load_job_id != command.load_job_id:
        why = f"model '{model_id}' does not serve from load {command.load_job_id} any more"
        return Refused("not_loaded", why)
    if state.queue(model_id):
        return Refused("not_loaded", f"something else is asked of model '{model_id}' already")
    return _unload_requested(command, model_id, serving.version, serving.load_job_id, new_id())


def _unload_requested(
    command: RequestUnload, model_id: str, version: int | None, load_job_id: str, event_id: str
) -> Accepted:
    data = UnloadRequested(
        command.force, load_job_id, command.cause, command.cause_event_id, command.idempotency
    )
    draft = Draft(event_id, data, command.actor, event_id, model_id, version)
    return Accepted((draft,), event_id)


def _ends_it(job: Job, command: RequestUnload) -> bool:
    """Whether the job will do what is asked; one that is being cancelled will not."""
    return job.kind is JobKind.UNLOAD and (job.forced or not command.force) and not job.cancelling


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
    if serving is None and model is not None and not command.force:
        serving = model.previous  # which made way for one of the loads
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


def _cancel(state: State, command: RequestCancel, new_id: Callable[[], str]) -> Decision:
    job = state.unended_job(command.job_id)
    if job is None:
        return Refused(
            "already_finished", f"job {command.job_id} has ended; GET /api/v1/jobs/{{id}} shows how"
        )
    if not job.cancellable:
        return Refused("already_started", _why_not_cancelled(job))
    if job.cancel_requested:
        return Existing(job.id)
    data = CancelRequested(command.idempotency)
    return Accepted((Draft(new_id(), data, command.actor, job.id, job.model_id, job.version),), job.id)


def _why_not_cancelled(job: Job) -> str:
    if job.cause is Cause.SWAP:
        return f"job {job.id} is a part of a swap; load version {job.version} to have that one again"
    return f"unload {job.id} has begun and cannot be taken back; load model '{job.model_id}' to have it again"
