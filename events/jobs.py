"""The `Jobs` projection: what became of each accepted load and unload. A pure fold, one entity at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from events.clock import later, seconds_between
from events.types import (
    CancelRequested,
    Cause,
    Data,
    Event,
    Idempotency,
    JobCancelled,
    LoadFailed,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    ServerStarted,
    Unknown,
    UnloadFailed,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)

NEVER = -1
"""The `keep_alive_s` of a model that is not unloaded for being idle; null says the same."""


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


_UNENDED = (JobStatus.PENDING, JobStatus.IN_PROGRESS)


class Failure(Struct, frozen=True, gc=False):
    """Why a job, or a model, failed: a stable code, and words for people."""

    code: str
    message: str


class LoadParameters(Struct, frozen=True, gc=False):
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


class UnloadParameters(Struct, frozen=True, gc=False):
    """What an unload was asked for with, and the load that it ends."""

    force: bool
    load_job_id: str


class Job(Struct, frozen=True, gc=False):
    """One accepted load or unload. `deadline_at` is null for an unload; times are stamps.

    `cancel_requested` says what somebody asked for; whether that was in time is said by `cancelling`. A load
    that `keeps` another one goes on with its workers, if they are still there when it has its turn.
    """

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
    cancel_requested: bool = False
    keeps: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to this job."""
        return self.status not in _UNENDED

    @property
    def forced(self) -> bool:
        """Whether this is an unload that does not wait for running requests."""
        return self.unload is not None and self.unload.force

    @property
    def cancellable(self) -> bool:
        """Whether it can still end without its effect: a load until it ended, an unload until it began.

        An unload of cause `swap` is only the second half of a swap that has taken place.
        """
        if self.kind is JobKind.LOAD:
            return not self.ended
        return self.status is JobStatus.PENDING and self.attempt == 0 and self.cause is not Cause.SWAP

    @property
    def cancelling(self) -> bool:
        """Whether this job is to end as cancelled: somebody asked for it in time."""
        return self.cancel_requested and self.cancellable


def evolve_job(job: Job | None, event: Event) -> Job | None:
    """Return the job after `event`; an event that cannot concern it changes nothing."""
    data = event.data
    if job is None:
        request = REQUESTS.get(type(data))
        is_one = request is not None and event.model_id is not None and event.job_id == event.id
        return request(event, data) if request is not None and is_one else None
    if job.status not in _UNENDED:
        return job
    if type(data) is ServerStarted:
        return _restarted(job, event, data)
    step = STEPS.get(type(data))
    return job if step is None or event.job_id != job.id else step(job, event, data)


def _load_requested(event: Event, data: LoadRequested) -> Job:
    assert event.model_id is not None
    return Job(
        id=event.id,
        kind=JobKind.LOAD,
        model_id=event.model_id,
        version=event.version,
        status=JobStatus.PENDING,
        created_at=event.recorded_at,
        created_position=event.position,
        position=event.position,
        requested_by=event.actor,
        cause=data.cause,
        load=load_parameters(data),
        deadline_at=later(event.recorded_at, data.timeout_s),
        keeps=data.keeps_load_job_id,
    )


def _unload_requested(event: Event, data: UnloadRequested) -> Job:
    assert event.model_id is not None
    return Job(
        id=event.id,
        kind=JobKind.UNLOAD,
        model_id=event.model_id,
        version=event.version,
        status=JobStatus.PENDING,
        created_at=event.recorded_at,
        created_position=event.position,
        position=event.position,
        requested_by=event.actor,
        cause=data.cause,
        unload=UnloadParameters(data.force, data.load_job_id),
    )


REQUESTS: Mapping[type[Data | Unknown], Callable[[Event, Any], Job]] = {
    LoadRequested: _load_requested,
    UnloadRequested: _unload_requested,
}
"""What makes a job of the events that are one's request."""


def load_requested(
    parameters: LoadParameters,
    cause: Cause,
    cause_event_id: str | None = None,
    idempotency: Idempotency | None = None,
    keeps_load_job_id: str | None = None,
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
        idempotency=idempotency,
        max_batch_size=parameters.max_batch_size,
        max_queue_delay_us=parameters.max_queue_delay_us,
        keeps_load_job_id=keeps_load_job_id,
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


def _load_started(job: Job, event: Event, data: LoadStarted) -> Job:
    return _started(job, event, data.attempt)


def _unload_started(job: Job, event: Event, _: UnloadStarted) -> Job:
    return _started(job, event, job.attempt + 1)


def _started(job: Job, event: Event, attempt: int) -> Job:
    return replace(
        job,
        status=JobStatus.IN_PROGRESS,
        attempt=attempt,
        started_at=event.recorded_at,
        position=event.position,
    )


def _completed(job: Job, event: Event, _: ModelLoaded | ModelUnloaded) -> Job:
    return _ended(job, event, JobStatus.COMPLETED, None)


def _failed(job: Job, event: Event, data: LoadFailed | UnloadFailed) -> Job:
    return _ended(job, event, JobStatus.FAILED, Failure(data.code, data.message))


def _cancelled(job: Job, event: Event, _: JobCancelled) -> Job:
    return _ended(job, event, JobStatus.CANCELLED, None)


def _ended(job: Job, event: Event, status: JobStatus, error: Failure | None) -> Job:
    return replace(job, status=status, error=error, finished_at=event.recorded_at, position=event.position)


def _cancel_requested(job: Job, event: Event, _: CancelRequested) -> Job:
    return replace(job, cancel_requested=True, position=event.position)


def _worker_exited(job: Job, event: Event, _: WorkerExited) -> Job:
    return replace(job, position=event.position)


STEPS: Mapping[type[Data | Unknown], Callable[[Job, Event, Any], Job]] = {
    LoadStarted: _load_started,
    UnloadStarted: _unload_started,
    ModelLoaded: _completed,
    ModelUnloaded: _completed,
    LoadFailed: _failed,
    UnloadFailed: _failed,
    JobCancelled: _cancelled,
    CancelRequested: _cancel_requested,
    WorkerExited: _worker_exited,
}
"""What events of each type make of their unended job, but for `ServerStarted`; others leave it as it is.

A `match` of so many classes takes as long as all the rest of a step (measured).
"""
