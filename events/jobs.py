"""The `Jobs` projection: what became of each accepted load and unload. A pure fold, one entity at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from events.clock import later, seconds_between
from events.types import (
    AccessDenied,
    CancelRequested,
    Cause,
    Event,
    JobCancelled,
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


class JobKind(StrEnum):
    """What a job does."""

    LOAD = "load"
    UNLOAD = "unload"


class JobStatus(StrEnum):
    """How far a job is."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job, or a model, failed: a stable code, and words for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class LoadParameters:
    """What a load was asked for with; bytes and seconds as named. A `max_batch_size` of 0 is no batching."""

    priority: str = "normal"
    timeout_s: int = 300
    keep_alive_s: int | None = None
    memory_limit_bytes: int | None = None
    strategy: str = "beside"
    pinned: bool = False
    instances: int = 1
    max_batch_size: int = 0
    max_queue_delay_us: int = 0


@dataclass(frozen=True, slots=True)
class UnloadParameters:
    """What an unload was asked for with, and the load that it ends."""

    force: bool
    load_job_id: str


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted load or unload. `deadline_at` is null for an unload; times are stamps."""

    id: str
    kind: JobKind
    model_id: str
    version: int | None
    status: JobStatus
    created_at: str
    created_position: int
    position: int
    requested_by: str
    cause: Cause
    load: LoadParameters | None = None
    unload: UnloadParameters | None = None
    deadline_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    attempt: int = 0
    server_deaths: int = 0
    error: Failure | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to this job."""
        return self.status not in (JobStatus.PENDING, JobStatus.IN_PROGRESS)

    @property
    def forced(self) -> bool:
        """Whether this is an unload that does not wait for running requests."""
        return self.unload is not None and self.unload.force


def evolve_job(job: Job | None, event: Event) -> Job | None:
    """Return the job after `event`; an event that cannot concern it changes nothing."""
    match event.data:
        case LoadRequested() | UnloadRequested() as data if job is None:
            return _requested(event, data)
        case ServerStarted() as data if job is not None and not job.ended:
            return _restarted(job, event, data)
    if job is None or job.ended or event.job_id != job.id:
        return job
    return _progressed(job, event)


def _requested(event: Event, data: LoadRequested | UnloadRequested) -> Job | None:
    if event.model_id is None or event.job_id != event.id:
        return None
    is_load = isinstance(data, LoadRequested)
    return Job(
        id=event.id,
        kind=JobKind.LOAD if is_load else JobKind.UNLOAD,
        model_id=event.model_id,
        version=event.version,
        status=JobStatus.PENDING,
        created_at=event.recorded_at,
        created_position=event.position,
        position=event.position,
        requested_by=event.actor,
        cause=data.cause,
        load=load_parameters(data) if isinstance(data, LoadRequested) else None,
        unload=None if isinstance(data, LoadRequested) else UnloadParameters(data.force, data.load_job_id),
        deadline_at=later(event.recorded_at, data.timeout_s) if isinstance(data, LoadRequested) else None,
    )


def load_requested(
    parameters: LoadParameters, cause: Cause, cause_event_id: str | None = None
) -> LoadRequested:
    """Return the request of a load with these parameters."""
    return LoadRequested(
        priority=parameters.priority,
        timeout_s=parameters.timeout_s,
        keep_alive_s=parameters.keep_alive_s,
        memory_limit_bytes=parameters.memory_limit_bytes,
        strategy=parameters.strategy,
        pinned=parameters.pinned,
        instances=parameters.instances,
        cause=cause,
        cause_event_id=cause_event_id,
        max_batch_size=parameters.max_batch_size,
        max_queue_delay_us=parameters.max_queue_delay_us,
    )


def load_parameters(data: LoadRequested) -> LoadParameters:
    """Return the parameters of a load's request, without what only accounts for it."""
    return LoadParameters(
        priority=data.priority,
        timeout_s=data.timeout_s,
        keep_alive_s=data.keep_alive_s,
        memory_limit_bytes=data.memory_limit_bytes,
        strategy=data.strategy,
        pinned=data.pinned,
        instances=data.instances,
        max_batch_size=data.max_batch_size,
        max_queue_delay_us=data.max_queue_delay_us,
    )


def _restarted(job: Job, event: Event, data: ServerStarted) -> Job:
    """Return the job for its next attempt; the time that the server was down is not the job's."""
    interrupted = job.status is JobStatus.IN_PROGRESS
    deadline_at = job.deadline_at
    if deadline_at is not None and data.down_since is not None:
        deadline_at = later(deadline_at, max(0.0, seconds_between(data.down_since, event.recorded_at)))
    return replace(
        job,
        status=JobStatus.PENDING,
        deadline_at=deadline_at,
        server_deaths=job.server_deaths + (1 if interrupted and data.unclean else 0),
        position=event.position,
    )


def _progressed(job: Job, event: Event) -> Job:
    match event.data:
        case LoadStarted(attempt=attempt):
            return _started(job, event, attempt)
        case UnloadStarted():
            return _started(job, event, job.attempt + 1)
        case ModelLoaded() | ModelUnloaded():
            return _ended(job, event, JobStatus.COMPLETED, None)
        case LoadFailed(code=code, message=message) | UnloadFailed(code=code, message=message):
            return _ended(job, event, JobStatus.FAILED, Failure(code, message))
        case JobCancelled():
            return _ended(job, event, JobStatus.CANCELLED, None)
        case CancelRequested() | WorkerExited():
            return replace(job, position=event.position)
        case (
            LoadRequested()
            | UnloadRequested()
            | ServerStarted()
            | ServerStopped()
            | AccessDenied()
            | Unknown()
        ):
            return job
        case _ as never:
            assert_never(never)


def _started(job: Job, event: Event, attempt: int) -> Job:
    return replace(
        job,
        status=JobStatus.IN_PROGRESS,
        attempt=attempt,
        started_at=event.recorded_at,
        position=event.position,
    )


def _ended(job: Job, event: Event, status: JobStatus, error: Failure | None) -> Job:
    return replace(job, status=status, error=error, finished_at=event.recorded_at, position=event.position)
