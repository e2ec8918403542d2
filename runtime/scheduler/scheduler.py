"""The scheduler: given what is recorded and what runs, says the next thing to do. Pure, and the only judge.

`decide` is asked again after each action, event, outcome, death and timer, so it holds no memory of its own
and returns the one most urgent action. Jobs of one model are carried out in the order of their acceptance;
a forced unload goes before everything else. The end of a swapped-out load holds nothing up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from events.clock import add_seconds
from events.jobs import Job, JobKind, JobStatus
from events.models import RELOADS, TIMEOUT, LoadedModel, Model, ModelState
from events.state import State
from events.types import Cause
from runtime.scheduler.actions import (
    Action,
    CancelJob,
    CompleteLoad,
    Decision,
    FailLoad,
    FailModel,
    FinishUnload,
    KillWorkers,
    PrepareModel,
    RecordDeath,
    RequestReload,
    StartUnload,
    StopPreparation,
)
from runtime.scheduler.admission import Admission, admit
from runtime.scheduler.eviction import AutomaticUnload, Eviction, find_automatic_unload
from runtime.scheduler.view import LoadView, Observations, Phase, Policy, SchedulerView, find_unload_target

MAX_INCIDENTS = 5
"""Incidents within ten minutes, deaths or failed recoveries, after which a model is not tried any more.

One that still has an instance goes on with it, until somebody loads it."""

FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 30.0

_UNDER_WAY = (Phase.LOADING, Phase.SERVING, Phase.DRAINING)

FORK_SERVER_LOOK_S = 0.5
"""How often to look whether the fork server is back, while a load waits for it."""

SPARE_LOOK_S = 10.0
"""How often to look whether a machine under pressure has time to prepare something."""


def decide(
    state: State,
    running: Mapping[str, LoadView],
    policy: Policy,
    now: str,
    conditions: Observations | None = None,
) -> Decision:
    """Decide on the recorded `state` and on what runs, keyed by load job id; `now` is a stamp."""
    sight = SchedulerView(state, running, policy, now, conditions or Observations())
    for actions in (_force, _cancels, _outcomes, _unloads, _outgrown):
        action = next(actions(sight), None)
        if action is not None:
            return Decision(action)
    eviction = Eviction(sight)
    admission = admit(sight, eviction)
    waiting_for = _waiting_for(sight, admission)
    late = next(_timeouts(sight, waiting_for), None)
    wanted_back = _wanted_back(sight)
    action = late or next(_reloads(wanted_back, sight.now), None) or admission.action
    if action is not None:
        return Decision(action)
    removal = find_automatic_unload(sight, eviction)
    if removal.action is not None:
        return Decision(removal.action)
    if (load_job_id := _to_prepare(sight)) is not None:
        return Decision(PrepareModel(load_job_id))
    return Decision(None, _wake_at(sight, admission, removal, wanted_back), waiting_for)


def is_load_current(state: State, load_job_id: str, model_id: str) -> bool:
    """Whether anything is recorded, or still to be, of the process behind this load; else it is to end.

    Told by the state alone, so that it holds also when nobody knows whether the last fact was recorded.
    """
    model = state.models.get(model_id)
    has_process = model is not None and model.phase in (ModelState.LOADED, ModelState.UNLOADING)
    serving = model.serving if model is not None and has_process else None
    if serving is not None and serving.load_job_id == load_job_id:
        return True
    if state.unended_job(load_job_id) is not None:
        return True
    swapped_out = (job for job in state.unended(model_id) if job.unload and job.cause is Cause.SWAP)
    return any(find_unload_target(state, job) == load_job_id for job in swapped_out)


def _force(sight: SchedulerView) -> Iterator[Action]:
    """A forced unload cancels the loads before it, kills what serves, and ends the unloads before it."""
    for model_id, queue in sight.queues.items():
        forced = [index for index, job in enumerate(queue) if job.forced]
        if not forced:
            continue
        before = queue[: forced[-1] + 1]
        target = find_unload_target(sight.state, before[-1])
        yield from (CancelJob(job) for job in before if job.kind is JobKind.LOAD)
        yield from (StartUnload(job, target) for job in before if job.status is JobStatus.PENDING)
        alive = [run for run in sight.running.values() if run.model_id == model_id and run.alive]
        yield from (KillWorkers(run.load_job_id) for run in alive if not run.killed)
        if not alive:
            yield FinishUnload(tuple(before), target)


def _cancels(sight: SchedulerView) -> Iterator[Action]:
    """Who asked for a job's end has it, unless the job has had its effect, or an unload has begun.

    So has a load that was wanted on demand, that has not begun, and that nobody waits for any more.
    """
    for job in sight.unended:
        if job.cancelling or (_is_on_demand(sight, job) and job.model_id not in sight.conditions.awaited):
            yield CancelJob(job)


def _is_on_demand(sight: SchedulerView, job: Job) -> bool:
    is_pending = job.status is JobStatus.PENDING and job.id not in sight.running
    return job.kind is JobKind.LOAD and job.cause is Cause.DEMAND and is_pending


def _outcomes(sight: SchedulerView) -> Iterator[Action]:
    """What a worker reported becomes a fact."""
    for run in sight.running.values():
        if run.phase in _UNDER_WAY and not run.dead:
            continue
        job = sight.state.unended_job(run.load_job_id)
        if run.phase is Phase.LOADED and job is not None:
            yield CompleteLoad(job, _replaced_by(sight, job))
        elif run.phase is Phase.FAILED and job is not None:
            yield FailLoad(job)
        elif dead := _unrecorded_deaths(sight, run):
            yield RecordDeath(run.load_job_id, dead)


def _replaced_by(sight: SchedulerView, job: Job) -> str | None:
    model = sight.state.models.get(job.model_id)
    if model is None or model.phase is not ModelState.LOADED or model.serving is None:
        return None
    return model.serving.load_job_id


def _unrecorded_deaths(sight: SchedulerView, run: LoadView) -> tuple[str, ...]:
    """Return the workers of a load that is recorded as serving whose end is not recorded."""
    model = sight.state.models.get(run.model_id)
    if model is None or model.serving is None or model.phase is not ModelState.LOADED:
        return ()
    if model.serving.load_job_id != run.load_job_id:
        return ()
    left = model.serving.worker_ids
    return left if run.phase is Phase.GONE else tuple(worker for worker in left if worker in run.dead)


def _unloads(sight: SchedulerView) -> Iterator[Action]:
    for job in sight.unended:
        if job.kind is not JobKind.UNLOAD or job.forced:
            continue
        if not sight.is_next(job):
            yield from _cancel_reloads_before(sight, job)
            continue
        load_job_id = find_unload_target(sight.state, job)
        run = sight.running.get(load_job_id)
        if job.status is JobStatus.PENDING or (run is not None and run.phase is Phase.SERVING):
            yield StartUnload(job, load_job_id)
        elif not sight.alive(load_job_id):
            yield FinishUnload((job,), load_job_id)


def _outgrown(sight: SchedulerView) -> Iterator[Action]:
    """What serves has grown beyond the budget: what is prepared goes first."""
    if sight.may_stop_preparing and sight.free_bytes is not None and sight.free_bytes < 0:
        yield StopPreparation()


def _cancel_reloads_before(sight: SchedulerView, unload: Job) -> Iterator[Action]:
    """An unload ends the wish to have a model back, whole or at all, and so the reloads that it began."""
    model = sight.state.models.get(unload.model_id)
    if model is None or not (model.phase is ModelState.LOST or model.degraded):
        return
    for job in sight.queues[unload.model_id]:
        if job.id == unload.id:
            return
        if job.kind is JobKind.LOAD and job.cause in RELOADS:
            yield CancelJob(job)


def _timeouts(sight: SchedulerView, waiting_for: Mapping[str, str]) -> Iterator[Action]:
    for job in sight.unended:
        if job.deadline_at is None or job.deadline_at > sight.now:
            continue
        assert job.load is not None
        is_pending = job.status is JobStatus.PENDING
        default = "its turn" if is_pending else "its worker, which had not finished loading"
        reason = waiting_for.get(job.id, default)
        yield FailLoad(job, TIMEOUT, f"not loaded within {job.load.timeout_s} s; it waited for {reason}")


def _reloads(wanted_back: Sequence[LoadedModel], now: str) -> Iterator[Action]:
    """What was lost is requested again, last loaded first; a model that keeps dying is given up."""
    for loaded in wanted_back:
        model = loaded.model
        if model.lost_by in (Cause.RESTART, Cause.SWAP):
            yield RequestReload(loaded, model.lost_by)
        elif _keeps_dying(model):
            reason = model.error.message if model.error else "its worker died"
            yield FailModel(
                loaded, f"failed {len(model.incidents)} times within 10 minutes; at last: {reason}"
            )
        elif _reload_at(loaded) <= now:
            yield RequestReload(loaded, Cause.RECOVERY)


def _wanted_back(sight: SchedulerView) -> list[LoadedModel]:
    """Return the models that are wanted back, whole or at all, and that nobody is at, in their order."""
    models = (model for model in sight.state.models.values() if _is_missed(sight, model))
    wanted = (loaded for model in models if (loaded := model.loaded) is not None)
    return sorted(wanted, key=lambda model: _importance(sight, model), reverse=True)


def _is_missed(sight: SchedulerView, model: Model) -> bool:
    if model.serving is None or model.loads or model.unloads:
        return False
    if model.phase is ModelState.LOST:
        return sight.policy.restores or model.lost_by is not Cause.RESTART
    return model.degraded and not model.serving.kept_as_is and not _keeps_dying(model)


def _importance(sight: SchedulerView, model: LoadedModel) -> tuple[bool, str, int]:
    """Return whether a model is pinned, when it was used last, and which of two was loaded later."""
    used_at = max(sight.conditions.last_used.get(model.id, ""), model.serving.loaded_at)
    return model.serving.parameters.pinned, used_at, model.serving.position


def _keeps_dying(model: Model) -> bool:
    return len(model.incidents) >= MAX_INCIDENTS


def _reload_at(loaded: LoadedModel) -> str:
    """Return when a model whose worker died is requested again: some time after the last that went wrong."""
    model = loaded.model
    since = model.lost_at or max([loaded.serving.degraded_at or "", *model.incidents])
    doublings = max(0, len(model.incidents) - 1)
    return add_seconds(since, min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2**doublings))


def _to_prepare(sight: SchedulerView) -> str | None:
    """Return the load whose files are prepared next: one at a time, in spare time and spare memory."""
    conditions, free = sight.conditions, sight.free_bytes
    is_spare = not (sight.unended or conditions.under_pressure or conditions.preparation)
    if not (is_spare and conditions.fork_server_up):
        return None
    return next((key for key, need in conditions.preparable.items() if free is None or need <= free), None)


def _wake_at(
    sight: SchedulerView, admission: Admission, removal: AutomaticUnload, wanted_back: Sequence[LoadedModel]
) -> str | None:
    times = [job.deadline_at for job in sight.unended if job.deadline_at is not None]
    times += [_reload_at(model) for model in wanted_back]
    if times and not sight.conditions.fork_server_up:
        times.append(add_seconds(sight.now, FORK_SERVER_LOOK_S))
    if sight.conditions.preparable and sight.conditions.under_pressure:
        times.append(add_seconds(sight.now, SPARE_LOOK_S))
    return min(filter(None, [*times, *admission.wake_at, removal.wake_at]), default=None)


def _waiting_for(sight: SchedulerView, admission: Admission) -> dict[str, str]:
    waiting = dict(admission.waiting_for)
    for job in sight.unended:
        if job.status is JobStatus.PENDING and not sight.is_next(job):
            waiting[job.id] = f"job {sight.queues[job.model_id][0].id} of the same model"
    return waiting
