"""The scheduler's decision: from recorded state and running loads to the single next action. Pure.

The consumer calls `decide` again after each action, event, outcome, exit and timer, so the scheduler keeps no
memory of its own. Jobs of one model run in the order of their acceptance; a forced unload goes first. The
unload of a replaced version delays no other job.

What is decided is this server's share of the work (`view.WorkShare`): all of it, of a server alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from events.clock import add_seconds
from events.jobcommands import RULES
from events.jobs import TIMEOUT, Job, JobKind, JobStatus
from events.models import RELOADS, LoadedModel, Model, ModelState
from events.state import State, has_turn
from events.types import REPLACEMENTS, Cause
from runtime.scheduler import actions
from runtime.scheduler.actions import Action, Decision
from runtime.scheduler.admission import admit
from runtime.scheduler.eviction import Eviction, find_automatic_unload
from runtime.scheduler.view import LoadView, Phase, SchedulerView, find_started_job, find_unload_target

MAX_INCIDENTS = 5
"""Incidents within ten minutes that make a crash loop: unexpected exits, and failed reloads that speak
against the model (`events.jobs`).

A model that still has an instance serves on with it, until a person loads it."""

FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 30.0
"""A model that can recover is back half a minute after its cause has gone; one that cannot costs two loads a
minute."""

FORK_SERVER_POLL_S = 0.5
"""How often to check whether the fork server is back, while a load waits for it."""


def decide(view: SchedulerView) -> Decision:
    """Return the next action."""
    # First outcomes, and what ends processes: nothing of it needs memory.
    for concern in (_force_unloads, _cancel_jobs, _record_exits, _advance_unloads):
        action = next(concern(view), None)
        if action is not None:
            return Decision(action)
    eviction = Eviction(view)
    admission = admit(view, eviction)
    waiting_for = _waiting_for(view, admission)
    # Late loads fail first, so that nothing is evicted for them; reloads come before new loads.
    late = next(_fail_late_loads(view, waiting_for), None)
    reloads = _find_reloads(view)
    action = late or next(_request_reloads(view, reloads), None) or admission.action
    if action is not None:
        return Decision(action, unestimated=admission.unestimated)
    # No pending job can proceed now: automatic unloads.
    automatic = find_automatic_unload(view, eviction)
    wake_at = _wake_at(view, admission, automatic, [*map(partial(reload_at, view), reloads)])
    return replace(admission, action=automatic.action, wake_at=wake_at, waiting_for=waiting_for)


def is_load_current(state: State, load_job_id: str, model_id: str) -> bool:
    """Whether the ledger still has use for the workers of a load; otherwise they are to end.

    Only the state decides, so this holds even if it is unknown whether the last fact was recorded. `state` is
    that of the server's share.
    """
    model = state.models.get(model_id)
    phases = (ModelState.LOADED, ModelState.UNLOADING)
    serving = model.serving if model is not None and model.phase in phases else None
    is_serving = serving is not None and serving.load_job_id == load_job_id
    if is_serving or find_started_job(state, load_job_id) is not None:
        return True
    swapped_out = (job for job in state.unended(model_id) if job.unload and job.cause in REPLACEMENTS)
    return any(find_unload_target(state, job) == load_job_id for job in swapped_out)


def _force_unloads(view: SchedulerView) -> Iterator[Action]:
    """A forced unload cancels the loads before it, kills all workers, and ends the unloads before it."""
    for model_id, queue in view.queues.items():
        forced = [job for job in queue if job.forced]
        if not forced or view.own.unended_job(forced[-1].id) is None:
            continue
        last = forced[-1]
        before = queue[: queue.index(last) + 1]
        target = find_unload_target(view.state, last)
        yield from (actions.CancelJob(job) for job in before if job.kind is JobKind.LOAD or job.cancelling)
        yield from (actions.StartUnload(job, target) for job in before if job.status is JobStatus.PENDING)
        alive = [run for run in view.running.values() if run.model_id == model_id and run.alive]
        yield from (actions.KillWorkers(last, run.load_job_id) for run in alive if not run.killed)
        if not alive:
            yield actions.FinishUnload(tuple(before), target)


def _cancel_jobs(view: SchedulerView) -> Iterator[Action]:
    """Cancel jobs on request, and loads for inferences that have not begun and that no inference needs.

    Whether one needs it is only known where all inferences arrive. A copy that has not begun does not delay
    the reload of a lost or degraded model.
    """
    for job in view.unended:
        has_begun = job.status is not JobStatus.PENDING or job.id in view.running
        may_be_unneeded = RULES[job.cause].is_for_inferences and not has_begun and view.share.is_whole
        delays = not has_begun and _delays_repair(view, job)
        if job.cancelling or delays or (may_be_unneeded and not _is_needed(view, job)):
            yield actions.CancelJob(job)


def _delays_repair(view: SchedulerView, job: Job) -> bool:
    """Whether the reload of a lost or degraded model waits for this load of a copy."""
    model = view.state.models.get(job.model_id)
    is_copy = job.kind is JobKind.LOAD and job.cause is Cause.COPY
    return is_copy and model is not None and needs_repair(model)


def _is_needed(view: SchedulerView, load: Job) -> bool:
    """Whether an inference waits for the model, which is not loaded by now, or not in the chosen version."""
    model = view.state.models.get(load.model_id)
    is_loaded = view.is_first_in_queue(load) and view.find_serving(load.model_id) is not None
    is_other = is_loaded and model is not None and model.differs_from_choice
    return load.model_id in view.observations.pending_demand and (not is_loaded or is_other)


def _record_exits(view: SchedulerView) -> Iterator[Action]:
    for run in view.running.values():
        if (run.exited or run.phase is Phase.GONE) and (exited := _find_unrecorded_exits(view, run)):
            yield actions.RecordExits(run.load_job_id, run.model_id, exited)


def _find_unrecorded_exits(view: SchedulerView, run: LoadView) -> tuple[str, ...]:
    """Return the workers of the recorded serving load whose exit is not recorded yet."""
    loaded = view.find_loaded(run.model_id)
    if loaded is None or loaded.serving.load_job_id != run.load_job_id:
        return ()
    left = loaded.serving.worker_ids
    return left if run.phase is Phase.GONE else tuple(worker for worker in left if worker in run.exited)


def _advance_unloads(view: SchedulerView) -> Iterator[Action]:
    for job in view.unended:
        if job.kind is not JobKind.UNLOAD or (job.forced and has_turn(job)):
            continue
        if not view.is_first_in_queue(job):
            yield from _cancel_reloads_before(view, job)
            continue
        load_job_id = find_unload_target(view.state, job)
        run = view.running.get(load_job_id)
        is_serving = run is not None and run.phase is Phase.SERVING and not job.forced
        if job.status is JobStatus.PENDING or is_serving:
            yield actions.StartUnload(job, load_job_id)
        elif not view.alive(load_job_id):
            yield actions.FinishUnload((job,), load_job_id)
        elif job.forced and run is not None and not run.killed:
            yield actions.KillWorkers(job, load_job_id)


def _cancel_reloads_before(view: SchedulerView, unload: Job) -> Iterator[Action]:
    """Cancel further loads of a model that is to be unloaded, and its reloads if it is lost or degraded."""
    model = view.state.models.get(unload.model_id)
    has_reloads = model is not None and (model.phase is ModelState.LOST or model.degraded)
    causes = RELOADS if has_reloads else (Cause.COPY,)
    for job in view.queues[unload.model_id]:
        if job.id == unload.id:
            return
        if job.kind is JobKind.LOAD and job.cause in causes:
            yield actions.CancelJob(job)


def _fail_late_loads(view: SchedulerView, waiting_for: Mapping[str, str]) -> Iterator[Action]:
    for job in view.unended:
        deadline_at = view.deadline_at(job)
        if deadline_at is None or deadline_at > view.now:
            continue
        _, parameters = job.load_order
        is_pending = job.status is JobStatus.PENDING
        default = "its turn" if is_pending else "its worker, which had not finished loading"
        reason = waiting_for.get(job.id, default)
        yield actions.FailLoad(
            job, TIMEOUT, f"not loaded within {parameters.timeout_s} s; it waited for {reason}"
        )


def _request_reloads(view: SchedulerView, reloads: Sequence[LoadedModel]) -> Iterator[Action]:
    """Request reloads in their order; a model in a crash loop fails instead."""
    for loaded in reloads:
        model = loaded.model
        if model.lost_by in (Cause.RESTART, Cause.SWAP) and model.retries is None:
            yield actions.RequestReload(loaded, model.lost_by)
        elif is_crash_loop(model):
            reason = model.error.message if model.error else "its worker died"
            yield actions.FailModel(
                loaded, f"failed {len(model.incidents)} times within 10 minutes; at last: {reason}"
            )
        elif reload_at(view, loaded) <= view.now:
            is_restored = model.lost_by is Cause.RESTART  # which evicts nothing
            yield actions.RequestReload(loaded, Cause.RESTART if is_restored else Cause.RECOVERY)


def _find_reloads(view: SchedulerView) -> list[LoadedModel]:
    """Return lost and degraded models without a job: pinned ones first, then by last use, then by load."""

    def rank(model: LoadedModel) -> tuple[bool, str, int]:
        used_at = max(view.observations.last_used.get(model.id, ""), model.serving.loaded_at)
        return model.serving.parameters.pinned, used_at, model.serving.position

    models = (model for model in view.own.models.values() if _needs_reload(view, model))
    reloads = (loaded for model in models if (loaded := model.loaded) is not None)
    return sorted(reloads, key=rank, reverse=True)


def _needs_reload(view: SchedulerView, model: Model) -> bool:
    if model.serving is None or model.loads or model.unloads:
        return False
    if model.phase is ModelState.LOST:
        return view.policy.restores or model.lost_by is not Cause.RESTART
    return needs_repair(model)


def needs_repair(model: Model) -> bool:
    """Whether a model is to be reloaded before any further load: it is lost, or instances of it are."""
    if model.phase is ModelState.LOST:
        return True
    is_kept = model.serving is None or model.serving.kept_as_is
    return model.degraded and not is_kept and not is_crash_loop(model)


def is_crash_loop(model: Model) -> bool:
    return len(model.incidents) >= MAX_INCIDENTS


def back_off_s(failures: int) -> float:
    """Return the exponential back-off of a load after so many failures in a row beyond the first."""
    return min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2.0 ** min(failures, 10))


def reload_at(view: SchedulerView, loaded: LoadedModel) -> str:
    """Return when the back-off of a model's reloads ends."""
    model, retries = loaded.model, loaded.model.retries
    last_retry_at = retries.last_at if retries is not None else ""
    since = model.lost_at or max([loaded.serving.degraded_at or "", *model.incidents, last_retry_at])
    doublings = max(0, len(model.incidents) - 1) + (retries.count if retries is not None else 0)
    since = view.to_monotonic(since, model.back_off_position)
    return add_seconds(since, back_off_s(doublings))


def _wake_at(
    view: SchedulerView, admission: Decision, automatic: Decision, retries: Sequence[str]
) -> str | None:
    times = [at for job in view.unended if (at := view.deadline_at(job)) is not None]
    times += retries
    if times and not view.observations.fork_server_up:
        times.append(add_seconds(view.now, FORK_SERVER_POLL_S))
    return min(filter(None, [*times, admission.wake_at, automatic.wake_at]), default=None)


def _waiting_for(view: SchedulerView, admission: Decision) -> dict[str, str]:
    waiting = dict(admission.waiting_for)
    for job in view.unended:
        if job.status is JobStatus.PENDING and not view.is_first_in_queue(job):
            waiting[job.id] = f"the {view.queues[job.model_id][0].kind} of the same model, before it"
        elif job.id in view.share.held:
            waiting[job.id] = view.share.held[job.id]
    return waiting
