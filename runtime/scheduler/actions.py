"""The actions that the scheduler decides and the executor carries out, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from events.jobs import Job
from events.models import LoadedModel
from events.types import Cause


@dataclass(frozen=True, slots=True)
class JobAction:
    """An action on a job."""

    job: Job


class StartLoad(JobAction):
    """Record `LoadStarted`, then start the workers for this job."""


class EstimateMemory(JobAction):
    """Begin to estimate the memory that a load needs."""


class CompareFiles(JobAction):
    """Begin to compare the repository's files of this job with those of the model's present load."""


class CancelJob(JobAction):
    """Record `JobCancelled` of a load, or of an unload that has not begun; end the load's workers."""


@dataclass(frozen=True, slots=True)
class CompleteLoad(JobAction):
    """Record `ModelLoaded`, together with the unload request of the load that it replaces, if any."""

    replaces: str | None


@dataclass(frozen=True, slots=True)
class FailLoad(JobAction):
    """Record `LoadFailed` and end the workers; without a `code`, the worker's reason is recorded."""

    code: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class JobLoadAction(JobAction):
    """An action of a job on a running load."""

    load_job_id: str


class ChangeSettings(JobLoadAction):
    """Record `ModelSettingsChanged`: what this job loads is loaded, so only its settings apply."""


class UnloadForReplacement(JobLoadAction):
    """Request the unload of the version that the load of `job` replaces in place."""


class StartUnload(JobLoadAction):
    """Stop routing to a load, record `UnloadStarted`, then drain and stop its workers unless forced."""


@dataclass(frozen=True, slots=True)
class FinishUnload:
    """Record `ModelUnloaded` for these jobs: the workers have exited, or there were none."""

    jobs: tuple[Job, ...]
    load_job_id: str


@dataclass(frozen=True, slots=True)
class LoadAction:
    """An action on a running load."""

    load_job_id: str


class KillWorkers(LoadAction):
    """Kill the workers of a load now."""


class RestartBare(LoadAction):
    """End this attempt of a load, whose cached model failed: its job starts again without one."""


class PrepareModel(LoadAction):
    """Begin to prepare the files of this load."""


@dataclass(frozen=True, slots=True)
class RecordExits(LoadAction):
    """Record `WorkerExited` of each of these workers of a serving load."""

    worker_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StopPreparation:
    """Stop the running preparation: its memory is needed."""


@dataclass(frozen=True, slots=True)
class RequestReload:
    """Request, as the system, the reload of a lost model, or of one that lost an instance."""

    model: LoadedModel
    cause: Cause


@dataclass(frozen=True, slots=True)
class UnloadAutomatically:
    """Request, as the system, the unload of a model; `cause_event_id` is the load that it makes room for."""

    model: LoadedModel
    cause: Cause
    cause_event_id: str | None = None


@dataclass(frozen=True, slots=True)
class FailModel:
    """Record that a model is in a crash loop and is not reloaded."""

    model: LoadedModel
    message: str


Action = (
    StartLoad
    | ChangeSettings
    | CompleteLoad
    | FailLoad
    | CancelJob
    | StartUnload
    | KillWorkers
    | RestartBare
    | FinishUnload
    | RecordExits
    | RequestReload
    | EstimateMemory
    | CompareFiles
    | UnloadForReplacement
    | UnloadAutomatically
    | FailModel
    | PrepareModel
    | StopPreparation
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The next action; without one, when to decide again at the latest, and what pending jobs wait for."""

    action: Action | None = None
    wake_at: str | None = None
    waiting_for: Mapping[str, str] = field(default_factory=dict)
