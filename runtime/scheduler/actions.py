"""What the scheduler can have done, one at a time: plain values that the consumer carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from events.jobs import Job
from events.models import LoadedModel
from events.types import Cause


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Record `LoadStarted`, then start the workers for this job."""

    job: Job


@dataclass(frozen=True, slots=True)
class ReuseWorkers:
    """Record `LoadStarted` and `ModelLoaded`: the workers of another load go on as those of this job."""

    job: Job
    load_job_id: str


@dataclass(frozen=True, slots=True)
class CompleteLoad:
    """Record `ModelLoaded`, and with it the request to end the load that it replaces, if any."""

    job: Job
    replaces: str | None


@dataclass(frozen=True, slots=True)
class FailLoad:
    """Record `LoadFailed`: for the reason the worker gave, where `code` is None; end its process."""

    job: Job
    code: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Record `JobCancelled`, of a load or of an unload that has not begun; end the load's process."""

    job: Job


@dataclass(frozen=True, slots=True)
class StartUnload:
    """Stop routing to this load, record `UnloadStarted`, then drain, without force, and end its process."""

    job: Job
    load_job_id: str


@dataclass(frozen=True, slots=True)
class KillWorkers:
    """End the process behind this load now."""

    load_job_id: str


@dataclass(frozen=True, slots=True)
class FinishUnload:
    """Record `ModelUnloaded` for these jobs: the process is gone, or there was none."""

    jobs: tuple[Job, ...]
    load_job_id: str


@dataclass(frozen=True, slots=True)
class RecordDeath:
    """Record `WorkerExited` of each of these workers, of a load that serves or was serving."""

    load_job_id: str
    worker_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestReload:
    """Request, for the system, the load of a model that is wanted back, or back at its full strength."""

    model: LoadedModel
    cause: Cause


@dataclass(frozen=True, slots=True)
class EstimateMemory:
    """Find out how much memory this load needs, and tell it from then on."""

    job: Job


@dataclass(frozen=True, slots=True)
class UnloadForReplacement:
    """Request the end of the load in whose place that of `job` is to come."""

    job: Job
    load_job_id: str


@dataclass(frozen=True, slots=True)
class UnloadAutomatically:
    """Request, for the system, the unload of a model; `cause_event_id` is what it is for, if of an event."""

    model: LoadedModel
    cause: Cause
    cause_event_id: str | None = None


@dataclass(frozen=True, slots=True)
class FailModel:
    """Record that a model is not tried any more."""

    model: LoadedModel
    message: str


@dataclass(frozen=True, slots=True)
class PrepareModel:
    """Begin to prepare the files of this load."""

    load_job_id: str


@dataclass(frozen=True, slots=True)
class StopPreparation:
    """End the processes that prepare something: what they take is wanted."""


Action = (
    StartLoad
    | ReuseWorkers
    | CompleteLoad
    | FailLoad
    | CancelJob
    | StartUnload
    | KillWorkers
    | FinishUnload
    | RecordDeath
    | RequestReload
    | EstimateMemory
    | UnloadForReplacement
    | UnloadAutomatically
    | FailModel
    | PrepareModel
    | StopPreparation
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The next action, if any; else when to ask again at the latest, and what each pending job waits for."""

    action: Action | None = None
    wake_at: str | None = None
    waiting_for: Mapping[str, str] = field(default_factory=dict)
