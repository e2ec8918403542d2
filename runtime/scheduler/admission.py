"""Which pending load starts next, what the others wait for, and how room is made.

Loads start by priority, then age. Each minute of waiting raises a load by one priority, so after two minutes
no later load comes before it. A load that waits for room may be overtaken for a while by loads that fit; then
room is reserved for it. Before all others come reloads, and loads whose old version was unloaded for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from events.clock import add_seconds
from events.jobs import Job, JobKind
from events.models import CRASH_LOOP, INSUFFICIENT_MEMORY, RELOADS, TOO_MANY_LOADED, Model
from events.types import Cause
from runtime.scheduler import actions
from runtime.scheduler.actions import Action
from runtime.scheduler.eviction import Eviction
from runtime.scheduler.view import SchedulerView

MAX_SERVER_DEATHS = 3
"""Unclean ends of the server during the same load after which that load counts as their cause."""

PRIORITY_AGING_S = 60.0
"""Priority aging: a waiting load rises by one priority. So pressure delays low priority this long at most."""

OVERTAKING_LIMIT_S = 30.0
"""How long loads that fit may overtake one that waits for room."""

PRESSURE_POLL_S = 1.0
"""How often to check the pressure on the machine, a mean of ten seconds, while a load waits for it."""

_PRIORITIES = {"high": 0, "normal": 1, "low": 2}
_LOWEST_PRIORITY = 2
_URGENT = (Cause.RECOVERY, Cause.SWAP)
"""Loads of models that served until just now: one may run beyond the limit, past slow loads."""
_RESERVES_NOTHING = (Cause.RECOVERY, Cause.RESTART)
"""Loads that are repeated when they fail, or that use free memory only: no other load waits for them."""
_BEFORE_ALL = -1

_MB = 1_000_000
_SMALL_MB = 10


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a load does not start now, when to look again, and whether room is reserved for it."""

    reason: str
    wake_at: str | None = None
    reserves_room: bool = False


@dataclass(frozen=True, slots=True)
class Reservations:
    """Room that is reserved for waiting loads: first what is being released, then what is free."""

    bytes: int = 0
    models: int = 0
    first: Job | None = None

    def add(self, view: SchedulerView, job: Job) -> Reservations:
        """Return these and the reservation of one more load."""
        models = self.models + (job.model_id not in view.models_with_process - view.exiting_models)
        return Reservations(self.bytes + _estimate(view, job), models, self.first or job)


@dataclass(frozen=True, slots=True)
class _Shortage:
    """Bytes and model slots that a load lacks."""

    bytes: int
    models: int

    @property
    def is_none(self) -> bool:
        return self.bytes <= 0 and self.models <= 0


@dataclass(slots=True)
class Admission:
    """The next action of the pending loads; without one, what each waits for, and when to look again."""

    action: Action | None = None
    waiting_for: dict[str, str] = field(default_factory=dict)
    wake_at: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _QueuedLoad:
    """A pending load that is first in its model's queue; the lowest `rank` starts first."""

    rank: int
    job: Job
    model: Model | None


def admit(view: SchedulerView, eviction: Eviction) -> Admission:
    """Decide the pending loads in their order, until one of them leads to an action."""
    admission = Admission()
    queue = _order_loads(view)
    reservations = Reservations()
    estimating: Job | None = None
    for queued in queue:
        decision = _decide_load(view, queued, reservations, eviction, estimating)
        if not isinstance(decision, Waiting):
            admission.action = decision
            return admission
        admission.waiting_for[queued.job.id] = decision.reason
        admission.wake_at += filter(None, [decision.wake_at])
        if decision.reserves_room:
            reservations = reservations.add(view, queued.job)
        if estimating is None and queued.job.id in view.observations.estimating:
            estimating = queued.job
    if reservations.first is not None:
        admission.wake_at += _next_agings(view, queue)
    return admission


def _order_loads(view: SchedulerView) -> list[_QueuedLoad]:
    models = view.state.models
    queue = (
        _QueuedLoad(_rank(view, job, models.get(job.model_id)), job, models.get(job.model_id))
        for job in view.unended
        if job.kind is JobKind.LOAD and job.id not in view.running and view.is_first_in_queue(job)
    )
    return sorted(queue, key=lambda queued: (queued.rank, queued.job.created_position))


def _rank(view: SchedulerView, job: Job, model: Model | None) -> int:
    if job.cause in RELOADS or (model is not None and _is_replacing(view, model)):
        return _BEFORE_ALL
    steps = sum(job.created_at <= view.earlier_by(n * PRIORITY_AGING_S) for n in (1, 2))
    _, parameters = job.load_order
    return max(0, _PRIORITIES.get(parameters.priority, 1) - steps)


def _is_replacing(view: SchedulerView, model: Model) -> bool:
    return model.previous is not None or view.is_being_replaced(model)


def _next_agings(view: SchedulerView, queue: Sequence[_QueuedLoad]) -> Iterator[str]:
    """Yield when loads rise in priority next, which may end a reservation."""
    for aging_s in (PRIORITY_AGING_S, 2 * PRIORITY_AGING_S):
        since = view.earlier_by(aging_s)
        created = (queued.job.created_at for queued in queue if queued.rank > 0)
        oldest = min((created_at for created_at in created if created_at > since), default=None)
        if oldest is not None:
            yield add_seconds(oldest, aging_s)


def _decide_load(
    view: SchedulerView,
    queued: _QueuedLoad,
    reservations: Reservations,
    eviction: Eviction,
    estimating: Job | None,
) -> Action | Waiting:
    """Decide one load; `estimating` is an earlier one whose estimate will be known in a moment."""
    job, observations = queued.job, view.observations
    kept = view.find_serving(job.model_id)
    is_degraded = queued.model is not None and queued.model.degraded
    if kept is not None and kept.load_job_id == job.keeps and not is_degraded:
        return actions.ReuseWorkers(job, kept.load_job_id)
    unfit = _refuse_or_estimate(view, job)
    if unfit is not None:
        return unfit
    if queued.model is not None and view.is_being_replaced(queued.model):
        return Waiting(
            "the unload of the version that it replaces", reserves_room=view.policy.budget_bytes is not None
        )
    if estimating is not None:
        return Waiting(f"the memory estimate of {estimating.model_id!r}, which comes first")
    if not observations.fork_server_up:
        return Waiting("the fork server, which is being started again")
    if view.free_load_slots + (job.cause in _URGENT) <= 0:
        return Waiting(f"a free load slot: at most {view.policy.loads_at_once} may run at once")
    if observations.under_pressure and queued.rank == _LOWEST_PRIORITY:
        if view.can_stop_preparation:  # it may be the cause of the pressure
            return actions.StopPreparation()
        return Waiting(
            "the machine, which is under pressure",
            min(add_seconds(job.created_at, PRIORITY_AGING_S), add_seconds(view.now, PRESSURE_POLL_S)),
        )
    has_priority = queued.rank == _BEFORE_ALL or job.created_at <= view.earlier_by(OVERTAKING_LIMIT_S)
    reserves_room = has_priority and job.cause not in _RESERVES_NOTHING
    return _start_or_make_room(view, job, reservations, eviction, reserves_room=reserves_room)


def _refuse_or_estimate(view: SchedulerView, job: Job) -> Action | Waiting | None:
    """Refuse a load that can never run; estimate its memory if it is unknown."""
    if job.server_deaths >= MAX_SERVER_DEATHS:
        reason = f"the server died {job.server_deaths} times while this load was in progress"
        return actions.FailLoad(job, CRASH_LOOP, reason)
    estimates = view.observations.estimates
    if view.policy.budget_bytes is not None and estimates.get(job.id) is None:
        return Waiting("the estimate of its memory") if job.id in estimates else actions.EstimateMemory(job)
    misfit = explain_misfit(view, job)
    return actions.FailLoad(job, INSUFFICIENT_MEMORY, misfit) if misfit is not None else None


def explain_misfit(view: SchedulerView, job: Job) -> str | None:
    """Return why a load will never fit, whatever else is unloaded; None if it may."""
    budget, need = view.policy.budget_bytes, _estimate(view, job)
    if budget is None:
        return None
    estimate_text, replaced = _describe_estimate(view, job), view.find_serving(job.model_id)
    limit = "; set memory_limit_bytes if it takes less" if job.id in view.observations.from_file_sizes else ""
    if need > budget:
        return (
            f"it needs {estimate_text} of memory, and the budget is {format_megabytes(budget)} in all{limit}"
        )
    if replaced is None or _strategy(job) != "beside" or need + replaced.memory_bytes <= budget:
        return None
    is_repair = job.cause is Cause.RECOVERY
    in_place = "" if is_repair else "; with strategy auto or in_place it replaces that version"
    return (
        f"it needs {estimate_text} of memory beside the {format_megabytes(replaced.memory_bytes)} of what"
        f" it replaces, and the budget is {format_megabytes(budget)} in all{in_place}{limit}"
    )


def _start_or_make_room(
    view: SchedulerView, job: Job, reservations: Reservations, eviction: Eviction, *, reserves_room: bool
) -> Action | Waiting:
    """Start a load that only room can delay, make room for it, or wait.

    Args:
        view: the input of the decision.
        job: the load.
        reservations: room of the loads before it.
        eviction: models that may be evicted for it.
        reserves_room: whether room that becomes free is reserved for it while it waits. If exiting processes
            release enough, that is reserved in any case.
    """
    replaced, missing = view.find_serving(job.model_id), _shortage_now(view, job, reservations)
    if replaced is not None and _strategy(job) == "auto" and missing.bytes > 0:
        if view.can_stop_preparation:  # better than a gap
            return actions.StopPreparation()
        is_stopping = view.observations.preparation is not None
        if is_stopping and _shortage_after_exits(view, job, reservations, 0).is_none:
            reason = f"{_describe_shortage(view, job, reservations)}; it is being released"
            return Waiting(reason, reserves_room=True)
    is_in_place = replaced is not None and (
        _strategy(job) == "in_place" or (_strategy(job) == "auto" and not missing.is_none)
    )
    replaced_bytes = replaced.memory_bytes if replaced is not None and is_in_place else 0
    if not _shortage_now(view, job, reservations, replaced_bytes).is_none:
        return _make_room(
            view, job, reservations, eviction, replaced_bytes=replaced_bytes, reserves_room=reserves_room
        )
    if replaced is not None and is_in_place:
        return actions.UnloadForReplacement(job, replaced.load_job_id)
    return actions.StartLoad(job)


def _strategy(job: Job) -> str:
    """Return the swap strategy; a repair never unloads what still serves first."""
    _, parameters = job.load_order
    return "beside" if job.cause is Cause.RECOVERY else parameters.strategy


def _estimate(view: SchedulerView, job: Job) -> int:
    return view.observations.estimates.get(job.id) or 0


def _shortage_now(
    view: SchedulerView, job: Job, reservations: Reservations, replaced_bytes: int = 0
) -> _Shortage:
    """Return what a load lacks now, beside the reservations.

    A model whose processes are exiting still has its slot and uses it if no reservation needs it.
    """
    reserved_bytes = max(0, reservations.bytes - view.exiting_bytes)
    left_models = len(view.exiting_models) - reservations.models
    has_one = job.model_id in view.exiting_models
    return _shortage(
        view, job, replaced_bytes - reserved_bytes, left_models if has_one else min(0, left_models)
    )


def _shortage_after_exits(
    view: SchedulerView, job: Job, reservations: Reservations, replaced_bytes: int
) -> _Shortage:
    """Return what a load will lack when exiting processes have exited."""
    exiting_bytes = replaced_bytes + view.exiting_bytes - reservations.bytes
    return _shortage(view, job, exiting_bytes, len(view.exiting_models) - reservations.models)


def _shortage(view: SchedulerView, job: Job, more_bytes: int, more_models: int) -> _Shortage:
    """Return what a load lacks if this much more were free."""
    free, most = view.free_bytes, view.policy.max_loaded
    has_slot = most is None or job.model_id in view.models_with_process - view.exiting_models
    return _Shortage(
        0 if free is None else _estimate(view, job) - free - more_bytes,
        0 if most is None or has_slot else len(view.models_with_process) + 1 - most - more_models,
    )


def _make_room(
    view: SchedulerView,
    job: Job,
    reservations: Reservations,
    eviction: Eviction,
    *,
    replaced_bytes: int,
    reserves_room: bool,
) -> Action | Waiting:
    """Wait for exiting processes; otherwise stop the preparation, then evict the fewest models."""
    if view.can_stop_preparation and _shortage_now(view, job, reservations, replaced_bytes).bytes > 0:
        return actions.StopPreparation()
    missing = _shortage_after_exits(view, job, reservations, replaced_bytes)
    shortage_text = _describe_shortage(view, job, reservations)
    if missing.is_none:
        return Waiting(f"{shortage_text}; it is being released", reserves_room=True)
    if _may_evict(view, job):
        chosen = eviction.choose(missing.bytes, missing.models)
        if chosen:
            return actions.UnloadAutomatically(chosen[0].model, Cause.EVICTION, job.id)
    if job.cause is Cause.RESTART and not view.will_free_more:
        code = INSUFFICIENT_MEMORY if missing.bytes > 0 else TOO_MANY_LOADED
        reason = f"not reloaded after the server's start: it needs {shortage_text}"
        return actions.FailLoad(job, code, reason)
    wake_at = eviction.next_at if _may_evict(view, job) else None
    if reservations.first is not None and _shortage_now(view, job, Reservations(), replaced_bytes).is_none:
        return Waiting(
            f"room, which is reserved for job {reservations.first.id}, before it",
            wake_at,
            reserves_room=reserves_room,
        )
    return Waiting(f"{shortage_text}; {_advise(view, job)}", wake_at, reserves_room=reserves_room)


def _may_evict(view: SchedulerView, job: Job) -> bool:
    """Whether a load may evict; a reload after a start of the server uses free memory only."""
    return view.policy.evicts and job.cause is not Cause.RESTART


def _describe_shortage(view: SchedulerView, job: Job, reservations: Reservations) -> str:
    """Return what a load waits for, with the numbers."""
    first = reservations.first
    kept = f", some reserved for job {first.id}, before it" if first is not None else ""
    budget, free = view.policy.budget_bytes, view.free_bytes
    if budget is not None and free is not None and _shortage_now(view, job, reservations).bytes > 0:
        return (
            f"{_describe_estimate(view, job)} of memory, and of the budget of {format_megabytes(budget)}"
            f" {format_megabytes(max(0, free))} are free{kept}"
        )
    return f"a place among the {view.policy.max_loaded} models that may be loaded{kept}"


def _describe_estimate(view: SchedulerView, job: Job) -> str:
    """Return the estimate of a load, and whether it rests on file sizes only."""
    basis = " (estimated from its files)" if job.id in view.observations.from_file_sizes else ""
    return f"{format_megabytes(_estimate(view, job))}{basis}"


def _advise(view: SchedulerView, job: Job) -> str:
    if not view.policy.evicts:
        return "unload a model, or use --evict idle"
    if not _may_evict(view, job):
        return "a reload after a start of the server evicts no model"
    return "the idle models are not enough: the others are busy, pinned, or were loaded just now"


def format_megabytes(number: int) -> str:
    """Return a number of bytes in megabytes, for people."""
    digits = 0 if number >= _SMALL_MB * _MB else 1
    return f"{number / _MB:,.{digits}f} MB"
