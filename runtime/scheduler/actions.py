"""The actions that the scheduler decides and the executor carries out, as plain values; their conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from events.commands import (
    Condition,
    JobUnchanged,
    ModelUnchanged,
    NodeCurrent,
    NodeUnchanged,
    WorkerServes,
)
from events.jobs import Job
from events.models import LoadedModel
from events.nodes import Node
from events.state import State
from events.types import Cause, FileHash


@dataclass(frozen=True, slots=True)
class JobAction:
    """An action on a job."""

    job: Job


@dataclass(frozen=True, slots=True)
class PlaceLoad(JobAction):
    """Record `LoadPlaced`: the load runs at this node."""

    node: Node
    reason: str
    files: tuple[FileHash, ...] = ()


@dataclass(frozen=True, slots=True)
class StartLoad(JobAction):
    """Record `LoadStarted`, after the placement at this node if it is chosen just now; start the workers."""

    placement: PlaceLoad | None = None


class EstimateMemory(JobAction):
    """Begin to estimate the memory that a load needs."""


class CompareFiles(JobAction):
    """Begin to compare the repository's files of this job with those of the model's present load."""


class CancelJob(JobAction):
    """Record `JobCancelled` of a load, or of an unload that has not begun, after the exits of its workers."""


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
    """Stop routing to a load, record `UnloadStarted`, then drain and stop its workers unless forced.

    Of a job in progress that is recorded, by an append that raised; only the effect is missing.
    """


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


class EstimateAnew(LoadAction):
    """End this attempt of a load, which found other files: its job is estimated and starts again for them."""


class PrepareModel(LoadAction):
    """Begin to prepare the files of this load."""


@dataclass(frozen=True, slots=True)
class RecordExits(LoadAction):
    """Record `WorkerExited` of each of these workers of the load from which the model serves."""

    model_id: str
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
class MoveModel:
    """Request, as the system, the load of a model of this node, which is being drained, at another one."""

    model: LoadedModel


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
    | PlaceLoad
    | ChangeSettings
    | CompleteLoad
    | FailLoad
    | CancelJob
    | StartUnload
    | KillWorkers
    | RestartBare
    | EstimateAnew
    | FinishUnload
    | RecordExits
    | RequestReload
    | MoveModel
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


def list_conditions(action: Action, state: State, own: NodeCurrent | None = None) -> tuple[Condition, ...]:
    """Return what must still be so when the facts or the request of an action are appended.

    Requests and starts rest on the model: a client's command that was recorded first wins. Outcomes rest on
    their job alone, so no request for the model delays them. What a node appends rests on its epoch, `own`.
    """
    conditions = _conditions_of(action, state)
    return conditions if own is None else (*conditions, own)


def _conditions_of(action: Action, state: State) -> tuple[Condition, ...]:
    match action:
        case PlaceLoad(job, node):
            return (_unchanged(job), *_unchanged_model(job.model_id, state), NodeUnchanged(node))
        case StartLoad(_, PlaceLoad() as placement):
            return _conditions_of(placement, state)
        case StartLoad(job) | ChangeSettings(job) | UnloadForReplacement(job) | StartUnload(job):
            return (_unchanged(job), *_unchanged_model(job.model_id, state))
        case CompleteLoad(job) | FailLoad(job) | CancelJob(job):
            return (_unchanged(job),)
        case FinishUnload(jobs):
            return tuple(map(_unchanged, jobs))
        case RecordExits(load_job_id, model_id, worker_ids):
            return tuple(WorkerServes(model_id, load_job_id, worker_id) for worker_id in worker_ids)
        case RequestReload(loaded) | FailModel(loaded) | MoveModel(loaded):
            return (ModelUnchanged(loaded.model),)
        case UnloadAutomatically(loaded, _, cause_event_id):
            job_with_need = state.unended_job(cause_event_id)
            return ModelUnchanged(loaded.model), *map(_unchanged, filter(None, [job_with_need]))
        case (
            KillWorkers()
            | RestartBare()
            | EstimateAnew()
            | EstimateMemory()
            | CompareFiles()
            | PrepareModel()
            | StopPreparation()
        ):
            return ()


def _unchanged(job: Job) -> JobUnchanged:
    return JobUnchanged(job.id, job.position)


def _unchanged_model(model_id: str, state: State) -> tuple[Condition, ...]:
    model = state.models.get(model_id)
    return () if model is None else (ModelUnchanged(model),)
