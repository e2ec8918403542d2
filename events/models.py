"""The `Models` projection: what is loaded, by whom, from which bytes. A pure fold, one entity at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from events.clock import seconds_between
from events.jobs import Failure, Job, JobKind, JobStatus, LoadParameters
from events.types import (
    CancelRequested,
    Cause,
    Data,
    Event,
    JobCancelled,
    LoadedFile,
    LoadFailed,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    Prepared,
    ServerStarted,
    ServerStopped,
    Unknown,
    UnloadFailed,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)

CRASH_LOOP = "crash_loop"
"""The code of a load that is not tried any more, because it kept dying."""

FORK_SERVER_DIED = "fork_server_died"
"""The code of a load whose worker ended with the fork server, which says nothing against the model."""

INSUFFICIENT_MEMORY = "insufficient_memory"
"""The code of a load for which the memory budget has no room, and will have none."""

TOO_MANY_LOADED = "too_many_loaded"
"""The code of a load of more models than may be loaded, after a start of the server."""

TIMEOUT = "timeout"
"""The code of a load that had not ended by its deadline."""

RELOADS = (Cause.RECOVERY, Cause.RESTART, Cause.SWAP)
"""Why the system loads a model again of its own accord."""


class ModelState(StrEnum):
    """What a model is; `lost` is: was loaded when its worker or the server died, and is wanted back."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"
    LOST = "lost"


class Serving(Struct, frozen=True, gc=False):
    """The load that a model serves from, is being unloaded from, or lost.

    `worker_ids` are those left. `degraded_at` is when the incident began in which some died; null as long as
    all are left. `kept_as_is` says that the load which was to make it whole was cancelled, or has no room.
    """

    load_job_id: str
    version: int
    position: int
    loaded_at: str
    loaded_by: str
    worker_ids: tuple[str, ...]
    files: tuple[LoadedFile, ...]
    memory_bytes: int
    peak_memory_bytes: int
    parameters: LoadParameters
    degraded_at: str | None = None
    kept_as_is: bool = False
    prepared: Prepared | None = None


class Footprint(Struct, frozen=True, gc=False):
    """What one worker took at most while it loaded these files, since they are what they are.

    `form` is the prepared form that it loaded instead; null is none.
    """

    version: int
    files: tuple[LoadedFile, ...]
    peak_memory_bytes: int
    form: str | None = None


class PendingLoad(Struct, frozen=True, gc=False):
    """A load of this model that has not ended."""

    job_id: str
    version: int
    started: bool = False


class Model(Struct, frozen=True, gc=False):
    """One model. `phase` is its state as far as what serves goes: never `loading`, see `state`.

    `previous` is the load that was ended so that another version can come in its place, until that one is
    there; should it not come, the model is `lost` and `previous` wanted back. `footprints` are of the
    versions loaded last, the latest at the end.
    """

    id: str
    phase: ModelState = ModelState.UNLOADED
    serving: Serving | None = None
    rank: int | None = None
    loads: tuple[PendingLoad, ...] = ()
    unloads: tuple[str, ...] = ()
    error: Failure | None = None
    last_version: int | None = None
    lost_by: Cause | None = None
    lost_at: str | None = None
    incidents: tuple[str, ...] = ()
    previous: Serving | None = None
    footprints: tuple[Footprint, ...] = ()

    @property
    def state(self) -> ModelState:
        """The model's state: a model that serves stays `loaded` while another version of it is loading."""
        if self.previous is not None:
            return ModelState.LOADING
        if self.phase in (ModelState.LOADED, ModelState.UNLOADING) or self.under_way is None:
            return self.phase
        return ModelState.LOADING

    @property
    def under_way(self) -> PendingLoad | None:
        """The load that has begun and not ended."""
        return next((load for load in self.loads if load.started), None)

    @property
    def degraded(self) -> bool:
        """Whether the model serves with fewer workers than it was loaded in."""
        serving = self.serving
        return self.phase is ModelState.LOADED and serving is not None and serving.degraded_at is not None

    @property
    def version(self) -> int | None:
        """The version that serves, else the one that is loading, else the last that was tried."""
        if self.serving is not None:
            return self.serving.version
        return self.under_way.version if self.under_way is not None else self.last_version

    @property
    def next_version(self) -> int | None:
        """The version that will take the place of the one that serves."""
        return self.under_way.version if self.phase is ModelState.LOADED and self.under_way else None


INCIDENT_WINDOW_S = 600
"""Deaths and failed recoveries count for ten minutes (DESIGN.md, "Crash")."""

MAX_FOOTPRINTS = 8
"""How often it is remembered what a version of a model took: the one that serves, the next, and two to go
back to, each as it is and from a prepared form."""

_NOT_RETRIED = (CRASH_LOOP, INSUFFICIENT_MEMORY, TOO_MANY_LOADED)

_UNTRIED = (TIMEOUT, INSUFFICIENT_MEMORY)
"""What says nothing against a model, where a load that somebody asked for had not begun."""

_ASKED_FOR = (Cause.REQUEST, Cause.DEMAND)


def evolve_model(model: Model | None, event: Event, job: Job | None) -> Model | None:
    """Return the model after `event`, where `job` is the event's job as it was before the event."""
    kind = type(event.data)
    if kind is ServerStarted:
        return None if model is None else _restarted(model, event)
    if event.model_id is None or (model is not None and event.model_id != model.id):
        return model
    evolve = STEPS.get(kind)
    if evolve is None:
        return model  # nor does it make one
    return evolve(model or Model(event.model_id), event, event.data, job)


def _restarted(model: Model, event: Event) -> Model:
    """No process of before is there any more: what was loaded is lost, what was loading has not begun."""
    gone = model.phase in (ModelState.LOADED, ModelState.UNLOADING)
    after = replace(
        model,
        phase=ModelState.LOST if gone else model.phase,
        lost_by=Cause.RESTART if gone or model.phase is ModelState.LOST else model.lost_by,
        lost_at=event.recorded_at if gone else model.lost_at,
        loads=tuple(replace(load, started=False) for load in model.loads),
    )
    return model if after == model else after  # most of thousands may be unloaded


def _load_requested(model: Model, event: Event, _: LoadRequested, job: Job | None) -> Model:
    if job is not None or event.version is None or event.job_id != event.id:
        return model
    return replace(model, loads=(*model.loads, PendingLoad(event.id, event.version)))


def _load_started(model: Model, event: Event, _: LoadStarted, __: Job | None) -> Model:
    if not _waits_for(model, event):
        return model
    loads = tuple(
        [replace(load, started=True) if load.job_id == event.job_id else load for load in model.loads]
    )
    return replace(model, loads=loads, last_version=event.version)


def _loaded(model: Model, event: Event, data: ModelLoaded, job: Job | None) -> Model:
    if job is None or job.load is None or event.version is None:
        return model
    by_system = job.cause not in _ASKED_FOR
    serving = Serving(
        load_job_id=job.id,
        version=event.version,
        position=event.position,
        loaded_at=event.recorded_at,
        loaded_by=job.requested_by,
        worker_ids=data.worker_ids,
        files=data.files,
        memory_bytes=data.memory_bytes,
        peak_memory_bytes=data.peak_memory_bytes,
        parameters=job.load,
        prepared=data.prepared,
    )
    form = data.prepared.form if data.prepared is not None else None
    return replace(
        model,
        loads=_loads_but(model, job.id),
        unloads=_unloads_but(model, job.id),
        phase=ModelState.LOADED,
        serving=serving,
        rank=model.rank if by_system and model.rank is not None else event.position,
        error=None,
        last_version=event.version,
        lost_by=None,
        lost_at=None,
        incidents=model.incidents if by_system else (),
        previous=None,
        footprints=_footprints(model, Footprint(event.version, data.files, _peak_of_one(data), form)),
    )


def _footprints(model: Model, latest: Footprint) -> tuple[Footprint, ...]:
    """Return the footprints with the latest: of the same files the highest counts, as peaks are sampled.

    Those of other files of the version are forgotten, in whatever form they were loaded.
    """
    others = []
    for known in model.footprints:
        is_of_others = known.version != latest.version
        if is_of_others or (known.files == latest.files and known.form != latest.form):
            others.append(known)
        elif known.files == latest.files and known.peak_memory_bytes > latest.peak_memory_bytes:
            latest = known
    return (*others, latest)[-MAX_FOOTPRINTS:]


def _peak_of_one(data: ModelLoaded) -> int:
    """Return the peak of one worker, rounded up; the event has the sum of all."""
    return -(-data.peak_memory_bytes // max(1, len(data.worker_ids)))


def _load_failed(model: Model, event: Event, data: LoadFailed, job: Job | None) -> Model:
    """What serves goes on serving, and what is wanted back stays wanted, until it kept dying."""
    if not _waits_for(model, event):
        return model
    error = Failure(data.code, data.message)
    model = replace(_without(model, event.job_id), error=error, last_version=event.version)
    if model.previous is not None:
        return _back_to_previous(model, event)
    if model.degraded and job is not None and job.cause in RELOADS and error.code != FORK_SERVER_DIED:
        return _wish_ended(model) if error.code == INSUFFICIENT_MEMORY else _with_incident(model, event)
    if model.phase in (ModelState.LOADED, ModelState.UNLOADING):
        return model
    if model.phase is ModelState.LOST:
        if error.code == FORK_SERVER_DIED:
            return _lost(model, event)
        if job is not None and job.cause in RELOADS and error.code not in _NOT_RETRIED:
            return _with_incident(_lost(model, event), event)
        if model.serving is not None and model.serving.version != event.version:
            return model
        if error.code in _UNTRIED and _is_untried_request(job):
            return model
    return replace(model, phase=ModelState.FAILED, serving=None, rank=None, lost_by=None, lost_at=None)


def _is_untried_request(job: Job | None) -> bool:
    return job is not None and job.cause in _ASKED_FOR and job.status is JobStatus.PENDING


def _unload_requested(model: Model, event: Event, data: UnloadRequested, job: Job | None) -> Model:
    """An unload is this model's own only if it ends its present load, or one that it waits for."""
    if job is not None or event.job_id != event.id:
        return model
    present = [load.job_id for load in model.loads]
    if model.serving is not None:
        present.append(model.serving.load_job_id)
    return replace(model, unloads=(*model.unloads, event.id)) if data.load_job_id in present else model


def _unload_started(model: Model, event: Event, _: UnloadStarted, __: Job | None) -> Model:
    is_own = event.job_id in model.unloads and model.phase is ModelState.LOADED
    return replace(model, phase=ModelState.UNLOADING) if is_own else model


def _unloaded(model: Model, event: Event, _: ModelUnloaded, job: Job | None) -> Model:
    if event.job_id not in model.unloads:
        return model
    if job is not None and job.cause is Cause.SWAP:
        return _made_way(_without(model, event.job_id), event, job)
    return _wanted_no_more(_without(model, event.job_id))


def _wanted_no_more(model: Model) -> Model:
    return replace(
        model,
        phase=ModelState.UNLOADED,
        serving=None,
        rank=None,
        error=None,
        lost_by=None,
        lost_at=None,
        incidents=(),
        previous=None,
    )


def _made_way(model: Model, event: Event, job: Job) -> Model:
    """What served is gone, for a version that takes its place; if none is to come any more, it is missed."""
    serving = model.serving
    if serving is None or job.unload is None or job.unload.load_job_id != serving.load_job_id:
        return model
    away = replace(
        model, phase=ModelState.UNLOADED, serving=None, previous=serving, lost_by=None, lost_at=None
    )
    return _back_to_previous(away, event)


def _back_to_previous(model: Model, event: Event) -> Model:
    """Want back what made way, once no load is left that could take its place."""
    if model.previous is None or model.loads:
        return model
    return replace(
        model,
        phase=ModelState.LOST,
        serving=model.previous,
        previous=None,
        lost_by=Cause.SWAP,
        lost_at=event.recorded_at,
    )


def _given_up(model: Model, event: Event, _: UnloadFailed | JobCancelled, job: Job | None) -> Model:
    """A job that ended without its effect; the model whose unload had begun is loaded again.

    Somebody who cancels the reload of a model that is wanted back, whole or at all, ends the wish.
    """
    if job is not None and job.cancelling and _is_reload(job):
        return _wish_ended(_without(model, job.id))
    begun = job is not None and job.status is JobStatus.IN_PROGRESS and event.job_id in model.unloads
    back = begun and model.phase is ModelState.UNLOADING
    phase = ModelState.LOADED if back else model.phase
    after = replace(_without(model, event.job_id), phase=phase)
    return _back_to_previous(after, event)


def _is_reload(job: Job) -> bool:
    return job.kind is JobKind.LOAD and job.cause in RELOADS


def _wish_ended(model: Model) -> Model:
    if model.phase is ModelState.LOST:
        return _wanted_no_more(model)
    if model.serving is None or not model.degraded:
        return model
    return replace(model, serving=replace(model.serving, kept_as_is=True))


def _worker_exited(model: Model, event: Event, data: WorkerExited, _: Job | None) -> Model:
    serving = model.serving
    if serving is None or event.worker_id not in serving.worker_ids or model.phase is not ModelState.LOADED:
        return model
    left = tuple(worker for worker in serving.worker_ids if worker != event.worker_id)
    of = f"; {len(left)} of {serving.parameters.instances} are left" if left else ""
    is_new = _is_new_incident(serving, event)
    unknown = data.exit_code is None and data.signal is None  # the fork server's end, not this model's
    incidents = (
        _recent(model, event) if unknown or not is_new else (*_recent(model, event), event.recorded_at)
    )
    after = replace(model, error=Failure("worker_died", _end(data) + of), incidents=incidents)
    if not left:
        return _lost(after, event)
    degraded_at = event.recorded_at if is_new else serving.degraded_at
    return replace(after, serving=replace(serving, worker_ids=left, degraded_at=degraded_at))


def _is_new_incident(serving: Serving, event: Event) -> bool:
    """Whether a death is not of the same incident as those before it.

    What is bounded is how often a model is loaded again. So one load is one incident, however many of its
    workers die, until that incident is forgotten.
    """
    began = serving.degraded_at
    return began is None or seconds_between(began, event.recorded_at) > INCIDENT_WINDOW_S


def _end(data: WorkerExited) -> str:
    if data.signal is not None:
        return f"its worker was killed by signal {data.signal}"
    code = data.exit_code
    return (
        f"its worker ended with exit code {code}"
        if code is not None
        else "its worker ended with the fork server"
    )


def _lost(model: Model, event: Event) -> Model:
    return replace(model, phase=ModelState.LOST, lost_by=Cause.RECOVERY, lost_at=event.recorded_at)


def _with_incident(model: Model, event: Event) -> Model:
    return replace(model, incidents=(*_recent(model, event), event.recorded_at))


def _recent(model: Model, event: Event) -> tuple[str, ...]:
    """Return the model's incidents that are not forgotten at `event`."""
    now = event.recorded_at
    return tuple(past for past in model.incidents if seconds_between(past, now) <= INCIDENT_WINDOW_S)


def _waits_for(model: Model, event: Event) -> bool:
    """Whether the event is of a load of this model that has not ended."""
    return event.job_id in [load.job_id for load in model.loads]


def _without(model: Model, job_id: str | None) -> Model:
    """Return the model that does not wait for a job which has ended."""
    return replace(model, loads=_loads_but(model, job_id), unloads=_unloads_but(model, job_id))


def _loads_but(model: Model, job_id: str | None) -> tuple[PendingLoad, ...]:
    return tuple([load for load in model.loads if load.job_id != job_id]) if model.loads else ()


def _unloads_but(model: Model, job_id: str | None) -> tuple[str, ...]:
    return tuple([unload for unload in model.unloads if unload != job_id]) if model.unloads else ()


def _unchanged(model: Model, _: Event, __: CancelRequested | ServerStopped, ___: Job | None) -> Model:
    return model


STEPS: Mapping[type[Data | Unknown], Callable[[Model, Event, Any, Job | None], Model]] = {
    LoadRequested: _load_requested,
    LoadStarted: _load_started,
    ModelLoaded: _loaded,
    LoadFailed: _load_failed,
    UnloadRequested: _unload_requested,
    UnloadStarted: _unload_started,
    ModelUnloaded: _unloaded,
    UnloadFailed: _given_up,
    JobCancelled: _given_up,
    WorkerExited: _worker_exited,
    CancelRequested: _unchanged,
    ServerStopped: _unchanged,
}
"""What events of each type make of their model, but for `ServerStarted`; others do not even make one.

A `match` of so many classes takes as long as all the rest of a step (measured).
"""
