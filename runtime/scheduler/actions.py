"""The actions that the scheduler decides, as plain values: their conditions, and the facts that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import UNSET

from events.clock import uuid7
from events.commands import Condition, JobUnchanged, ModelUnchanged, WorkerServes
from events.jobcommands import RequestLoad, RequestUnload
from events.jobs import CRASH_LOOP, Job, JobStatus
from events.models import LoadedModel
from events.state import State
from events.types import (
    SYSTEM,
    Cause,
    Data,
    Draft,
    LoadFailed,
    LoadRequested,
    LoadStarted,
    ModelSettingsChanged,
)
from features.commands import draft_name
from runtime.rooms import Alternative
from runtime.timeouts import PROGRESS_TIMEOUT_S
from runtime.wire import plain_text


@dataclass(frozen=True, slots=True)
class JobAction:
    """An action on a job."""

    job: Job


@dataclass(frozen=True, slots=True)
class RecordFact(JobAction):
    """Record a fact about a job, which rests on `conditions` too."""

    data: Data
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class StartLoad(JobAction):
    """Record `LoadStarted`, and start the workers; `before`, such as its placement, is in the same append.

    `chosen` is where the workers run, and the reservation there.
    """

    chosen: Alternative
    before: RecordFact | None = None


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
    """Record `ModelSettingsChanged`: the wanted workers are loaded, so only the job's settings apply."""


class UnloadForReplacement(JobLoadAction):
    """Request the unload of the version that the load of `job` replaces in place."""


class StartUnload(JobLoadAction):
    """Stop routing to a load, record `UnloadStarted`, then drain and stop its workers unless forced.

    Of a job in progress that is recorded, by an append that raised; only the effect is missing.
    """


class KillWorkers(JobLoadAction):
    """Kill the workers of a load now, for a forced unload."""


@dataclass(frozen=True, slots=True)
class FinishUnload:
    """Record `ModelUnloaded` for these jobs: the workers have exited, or there were none."""

    jobs: tuple[Job, ...]
    load_job_id: str


@dataclass(frozen=True, slots=True)
class RecordExits:
    """Record `WorkerExited` of each of these workers of the load from which the model serves."""

    load_job_id: str
    model_id: str
    worker_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestReload:
    """Request, as the system, that a lost, degraded or moving model is loaded again."""

    model: LoadedModel
    cause: Cause


@dataclass(frozen=True, slots=True)
class UnloadAutomatically:
    """Request, as the system, the unload of a model; `cause_event_id` is the load that it makes room for.

    With `Cause.COPY` only the load that `model` serves from is unloaded, and the others stay. `ends_turn`
    says whether busy models have to go for that load.
    """

    model: LoadedModel
    cause: Cause
    cause_event_id: str | None = None
    ends_turn: bool = False


@dataclass(frozen=True, slots=True)
class FailModel:
    """Record that a model is in a crash loop and is not reloaded."""

    model: LoadedModel
    message: str


Action = (
    StartLoad
    | RecordFact
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
    """The next action; without one, when to decide again at the latest, and why pending jobs wait.

    Attributes:
        unestimated: loads whose memory is to be estimated before more is decided on them.
        without_room: pending loads for which there is no room, and none is being released.
    """

    action: Action | None = None
    wake_at: str | None = None
    waiting_for: Mapping[str, str] = field(default_factory=dict)
    unestimated: tuple[Job, ...] = ()
    without_room: tuple[Job, ...] = ()


def list_conditions(action: Action, state: State) -> tuple[Condition, ...]:
    """Return the conditions under which the facts or the request of an action are appended.

    Requests and starts rest on the model: a client's command that was recorded first wins. Outcomes rest on
    their job alone, so no request for the model delays them.
    """
    match action:
        case RecordFact(job, _, conditions):
            return (unchanged(job), *_unchanged_model(job.model_id, state), *conditions)
        case StartLoad(_, _, RecordFact() as before):
            return list_conditions(before, state)
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


RELOAD_TIMEOUT_S = 300
"""Least timeout of a reload: the default of a person's load."""


def draft_fact(job: Job, data: Data, worker_id: str | None = None) -> Draft:
    """Return a draft of a fact about a job, and the worker of its load if it has only one."""
    return Draft(uuid7(), data, SYSTEM, job.id, job.model_id, job.version, worker_id)


def draft_settings_change(job: Job, load_job_id: str) -> tuple[Draft, ...]:
    """Return the outcome of a load whose workers another load has loaded, and its name."""
    _, parameters = job.load_order
    return draft_outcome(job, draft_fact(job, ModelSettingsChanged.of(load_job_id, parameters)))


def draft_outcome(job: Job, outcome: Draft) -> tuple[Draft, ...]:
    """Return the outcome of a load, and what sets its name for the version."""
    if job.version_name is UNSET:
        return (outcome,)
    return outcome, draft_name(outcome, job.version_name, job.requested_by, uuid7)


def draft_load_start(job: Job, *, is_restarted: bool) -> Draft:
    """Return `LoadStarted` of a job; a start after a new estimate is in the same attempt."""
    is_same_attempt = is_restarted and job.status is JobStatus.IN_PROGRESS
    return draft_fact(job, LoadStarted(job.attempt if is_same_attempt else job.attempt + 1))


def draft_crash_loop(model: LoadedModel, message: str) -> tuple[Draft, Draft]:
    """Return the request and the failure of a reload that a crash loop prevents."""
    serving = model.serving
    job_id, version = uuid7(), serving.version
    request = LoadRequested.of(serving.parameters, Cause.RECOVERY)
    failed = LoadFailed(CRASH_LOOP, plain_text(message))
    return (
        Draft(job_id, request, SYSTEM, job_id, model.id, version),
        Draft(uuid7(), failed, SYSTEM, job_id, model.id, version),
    )


def build_request(
    action: RequestReload | UnloadAutomatically,
    conditions: tuple[Condition, ...],
    progress_timeout_s: int = PROGRESS_TIMEOUT_S,
) -> RequestLoad | RequestUnload:
    """Return a request of the system; the limits of a reload are at least the server's."""
    match action:
        case RequestReload(model, cause):
            # Many may be requested at once: a short timeout was not meant for the queue after a restart.
            given = model.serving.parameters.with_limits_from(RELOAD_TIMEOUT_S, progress_timeout_s)
            return RequestLoad(
                model.id, model.serving.version, None, SYSTEM, given, cause, conditions=conditions
            )
        case UnloadAutomatically(model, cause, cause_event_id):
            copy = model.serving.load_job_id if cause is Cause.COPY else None
            return RequestUnload(
                model.id, SYSTEM, cause=cause, cause_event_id=cause_event_id, conditions=conditions, copy=copy
            )
