"""The actions that the scheduler decides and the executor carries out, as plain values; their conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from events.commands import (
    Condition,
    JobUnchanged,
    ModelUnchanged,
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


class CancelJob(JobAction):
    """Record `JobCancelled` of a load, or of an unload that has not begun, after the exits of its workers."""


@dataclass(frozen=True, slots=True)
class FailLoad(JobAction):
    """Record `LoadFailed` of a load that cannot start, or has not ended in time, and end its workers."""

    code: str
    message: str


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


@dataclass(frozen=True, slots=True)
class RecordExits(LoadAction):
    """Record `WorkerExited` of each of these workers of the load from which the model serves."""

    model_id: str
    worker_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestReload:
    """Request, as the system, that a lost, degraded or moving model is loaded again."""

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
    | PlaceLoad
    | ChangeSettings
    | FailLoad
    | CancelJob
    | StartUnload
    | KillWorkers
    | FinishUnload
    | RecordExits
    | RequestReload
    | UnloadForReplacement
    | UnloadAutomatically
    | FailModel
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The next action; without one, when to decide again at the latest, and what pending jobs wait for.

    Attributes:
        unestimated: loads whose memory is to be estimated before more is decided on them.
        may_optimise: whether an optimised model may be made meanwhile.
    """

    action: Action | None = None
    wake_at: str | None = None
    waiting_for: Mapping[str, str] = field(default_factory=dict)
    unestimated: tuple[Job, ...] = ()
    may_optimise: bool = False


def list_conditions(action: Action, state: State) -> tuple[Condition, ...]:
    """Return what must still be so when the facts or the request of an action are appended.

    Requests and starts rest on the model: a client's command that was recorded first wins. Outcomes rest on
    their job alone, so no request for the model delays them.
    """
    match action:
        case PlaceLoad(job, node):
            return (unchanged(job), *_unchanged_model(job.model_id, state), NodeUnchanged(node))
        case StartLoad(_, PlaceLoad() as placement):
            return list_conditions(placement, state)
        case StartLoad(job) | ChangeSettings(job) | UnloadForReplacement(job) | StartUnload(job):
            return (unchanged(job), *_unchanged_model(job.model_id, state))
        case FailLoad(job) | CancelJob(job):
            return (unchanged(job),)
        case FinishUnload(jobs):
            return tuple(map(unchanged, jobs))
        case RecordExits(load_job_id, model_id, worker_ids):
            return tuple(WorkerServes(model_id, load_job_id, worker_id) for worker_id in worker_ids)
        case RequestReload(loaded) | FailModel(loaded):
            return (ModelUnchanged(loaded.model),)
        case UnloadAutomatically(loaded, _, cause_event_id):
            job_with_need = state.unended_job(cause_event_id)
            return ModelUnchanged(loaded.model), *map(unchanged, filter(None, [job_with_need]))
        case KillWorkers():
            return ()


def unchanged(job: Job) -> JobUnchanged:
    return JobUnchanged(job.id, job.position)


def _unchanged_model(model_id: str, state: State) -> tuple[Condition, ...]:
    model = state.models.get(model_id)
    return () if model is None else (ModelUnchanged(model),)
