"""The `Models` projection: what is loaded, by whom, from which bytes. A pure fold, one entity at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from events.clock import seconds_between
from events.jobs import Failure, Job, JobStatus, LoadParameters
from events.types import (
    AccessDenied,
    CancelRequested,
    Cause,
    Event,
    JobCancelled,
    LoadedFile,
    LoadFailed,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    ServerStarted,
    ServerStopped,
    Unknown,
    UnloadFailed,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)

INCIDENT_WINDOW_S = 600
"""Deaths and failed recoveries count for ten minutes (DESIGN.md, "Crash")."""

CRASH_LOOP = "crash_loop"
"""The code of a load that is not tried any more, because it kept dying."""

FORK_SERVER_DIED = "fork_server_died"
"""The code of a load whose worker ended with the fork server, which says nothing against the model."""

_RELOADS = (Cause.RECOVERY, Cause.RESTART)
_ASKED_FOR = (Cause.REQUEST, Cause.DEMAND)


class ModelState(StrEnum):
    """What a model is; `lost` is: was loaded when its worker or the server died, and is wanted back."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Serving:
    """The load that a model serves from, is being unloaded from, or lost.

    `worker_ids` are those left. `degraded_at` is when the incident began in which some died; null as long as
    all are left.
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


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """A load of this model that has not ended."""

    job_id: str
    version: int
    started: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """One model. `phase` is its state as far as what serves goes: never `loading`, see `state`."""

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

    @property
    def state(self) -> ModelState:
        """The model's state: a model that serves stays `loaded` while another version of it is loading."""
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


def evolve_model(model: Model | None, event: Event, job: Job | None) -> Model | None:
    """Return the model after `event`, where `job` is the event's job as it was before the event."""
    if isinstance(event.data, ServerStarted):
        return None if model is None else _restarted(model, event)
    if event.model_id is None or (model is not None and event.model_id != model.id):
        return model
    return _evolved(model or Model(event.model_id), event, job)


def _evolved(model: Model, event: Event, job: Job | None) -> Model:
    match event.data:
        case LoadRequested():
            return _load_requested(model, event) if job is None else model
        case LoadStarted():
            return _load_started(model, event)
        case ModelLoaded() as data:
            return _loaded(model, event, data, job)
        case LoadFailed(code=code, message=message):
            return _load_failed(model, event, Failure(code, message), job)
        case UnloadRequested() as data:
            return _unload_requested(model, event, data) if job is None else model
        case UnloadStarted():
            own = event.job_id in model.unloads and model.phase is ModelState.LOADED
            return replace(model, phase=ModelState.UNLOADING) if own else model
        case ModelUnloaded():
            return _unloaded(model, event) if event.job_id in model.unloads else model
        case UnloadFailed() | JobCancelled():
            return _given_up(model, event, job)
        case WorkerExited() as data:
            return _worker_exited(model, event, data)
        case CancelRequested() | AccessDenied() | ServerStarted() | ServerStopped() | Unknown():
            return model
        case _ as never:
            assert_never(never)


def _restarted(model: Model, event: Event) -> Model:
    """No process of before is there any more: what was loaded is lost, what was loading has not begun."""
    gone = model.phase in (ModelState.LOADED, ModelState.UNLOADING)
    return replace(
        model,
        phase=ModelState.LOST if gone else model.phase,
        lost_by=Cause.RESTART if gone or model.phase is ModelState.LOST else model.lost_by,
        lost_at=event.recorded_at if gone else model.lost_at,
        loads=tuple(replace(load, started=False) for load in model.loads),
    )


def _load_requested(model: Model, event: Event) -> Model:
    if event.version is None or event.job_id != event.id:
        return model
    return replace(model, loads=(*model.loads, PendingLoad(event.id, event.version)))


def _load_started(model: Model, event: Event) -> Model:
    if not _waits_for(model, event):
        return model
    loads = tuple(
        replace(load, started=True) if load.job_id == event.job_id else load for load in model.loads
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
    )
    return replace(
        _without(model, job.id),
        phase=ModelState.LOADED,
        serving=serving,
        rank=model.rank if by_system and model.rank is not None else event.position,
        error=None,
        last_version=event.version,
        lost_by=None,
        lost_at=None,
        incidents=model.incidents if by_system else (),
    )


def _load_failed(model: Model, event: Event, error: Failure, job: Job | None) -> Model:
    """What serves goes on serving, and what is wanted back stays wanted, until it kept dying."""
    if not _waits_for(model, event):
        return model
    model = replace(_without(model, event.job_id), error=error, last_version=event.version)
    if model.degraded and job is not None and job.cause in _RELOADS and error.code != FORK_SERVER_DIED:
        return _with_incident(model, event)
    if model.phase in (ModelState.LOADED, ModelState.UNLOADING):
        return model
    if model.phase is ModelState.LOST:
        if error.code == FORK_SERVER_DIED:
            return _lost(model, event)
        if job is not None and job.cause in _RELOADS and error.code != CRASH_LOOP:
            return _with_incident(_lost(model, event), event)
        if model.serving is not None and model.serving.version != event.version:
            return model
    return replace(model, phase=ModelState.FAILED, serving=None, rank=None, lost_by=None, lost_at=None)


def _unload_requested(model: Model, event: Event, data: UnloadRequested) -> Model:
    """An unload is this model's own only if it ends its present load, or one that it waits for."""
    if event.job_id != event.id:
        return model
    present = {load.job_id for load in model.loads}
    if model.serving is not None:
        present.add(model.serving.load_job_id)
    return replace(model, unloads=(*model.unloads, event.id)) if data.load_job_id in present else model


def _unloaded(model: Model, event: Event) -> Model:
    return replace(
        _without(model, event.job_id),
        phase=ModelState.UNLOADED,
        serving=None,
        rank=None,
        error=None,
        lost_by=None,
        lost_at=None,
        incidents=(),
    )


def _given_up(model: Model, event: Event, job: Job | None) -> Model:
    """A job that ended without its effect; the model whose unload had begun is loaded again."""
    begun = job is not None and job.status is JobStatus.IN_PROGRESS and event.job_id in model.unloads
    back = begun and model.phase is ModelState.UNLOADING
    return replace(_without(model, event.job_id), phase=ModelState.LOADED if back else model.phase)


def _worker_exited(model: Model, event: Event, data: WorkerExited) -> Model:
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
    return any(load.job_id == event.job_id for load in model.loads)


def _without(model: Model, job_id: str | None) -> Model:
    return replace(
        model,
        loads=tuple(load for load in model.loads if load.job_id != job_id),
        unloads=tuple(unload for unload in model.unloads if unload != job_id),
    )
