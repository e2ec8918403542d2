"""Which pending load starts next, what the others wait for, and how room is made.

Loads start by priority, then age. Each minute of waiting raises a load by one priority, so after two minutes
no later load comes before it. A load that waits for room may be overtaken for a while by loads that fit; then
room is reserved for it. Before all others come reloads, and loads whose old version was unloaded for them.

A load slot is kept for files that loaded before: when all slots are taken, and by loads of other files only,
one more may start. So loads that never end delay only models that never loaded.

What a load will need is estimated before (`runtime.scheduler.estimates`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from events.clock import add_seconds
from events.jobs import CRASH_LOOP, INSUFFICIENT_MEMORY, TOO_MANY_LOADED, Failure, Job, JobKind
from events.models import RELOADS, ModelState, Serving
from events.state import State
from events.types import Cause
from runtime.scheduler import actions
from runtime.scheduler.actions import Action
from runtime.scheduler.eviction import Eviction
from runtime.scheduler.view import LoadView, SchedulerView

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
_RESERVES_NOTHING = (Cause.RECOVERY, Cause.RESTART, Cause.DRAIN, Cause.COPY)
"""Loads that are repeated when they fail, or that use free memory only: no other load waits for them."""
_BEFORE_ALL = -1

_MB = 1_000_000
_SMALL_MB = 10


@dataclass(frozen=True, slots=True)
class Waiting:
    """The reason why a load does not start now, when to look again, and whether room is reserved for it.

    It `lacks_room` if none is being released that is enough.
    """

    reason: str
    wake_at: str | None = None
    reserves_room: bool = False
    reserves_later: bool = False
    lacks_room: bool = False


@dataclass(frozen=True, slots=True)
class Reservations:
    """Room that is reserved for waiting loads: first what is being released, then what is free."""

    bytes: int = 0
    models: int = 0
    first: Job | None = None


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
    """The next action of the pending loads; without one, what each waits for, and when to look again.

    `unestimated` are those whose memory is to be estimated first, `without_room` those that lack room.
    """

    action: Action | None = None
    waiting_for: dict[str, str] = field(default_factory=dict)
    wake_at: list[str] = field(default_factory=list)
    unestimated: list[Job] = field(default_factory=list)
    without_room: list[Job] = field(default_factory=list)


def admit(view: SchedulerView, eviction: Eviction) -> Admission:
    """Decide the pending loads in their order, until one of them leads to an action.

    Args:
        view: of the decision.
        eviction: of the same view.
    """
    admission = Admission()
    pending = (
        _PendingLoad(view, job, eviction)
        for job in view.unended
        if job.kind is JobKind.LOAD
        and job.id not in view.running
        and job.id not in view.share.held
        and view.is_first_in_queue(job)
    )
    queue = sorted(pending, key=lambda load: (load.rank, load.job.queued_position))
    reservations = Reservations()
    estimating: Job | None = None
    overtaken_since = list[str]()
    for load in queue:
        load.reservations = reservations
        decision = load.decide(estimating)
        if not isinstance(decision, Waiting):
            admission.action = decision
            return admission
        admission.waiting_for[load.job.id] = decision.reason
        admission.wake_at += filter(None, [decision.wake_at])
        if decision.lacks_room:
            admission.without_room.append(load.job)
        if decision.reserves_later and load is not queue[-1]:  # a load behind it may have to act then
            overtaken_since.append(view.queued_at(load.job))
        if decision.reserves_room:
            reservations = load.reserve()
        is_new = load.job.id not in view.observations.estimates
        if is_new:
            admission.unestimated.append(load.job)
        if estimating is None and (is_new or load.job.id in view.observations.estimating):
            estimating = load.job
    if overtaken_since:
        admission.wake_at.append(add_seconds(min(overtaken_since), OVERTAKING_LIMIT_S))
    if reservations.first is not None:
        admission.wake_at += _next_agings(view, queue)
    return admission


def _next_agings(view: SchedulerView, queue: Sequence[_PendingLoad]) -> Iterator[str]:
    """Yield when loads rise in priority next, which may end a reservation."""
    for aging_s in (PRIORITY_AGING_S, 2 * PRIORITY_AGING_S):
        since = view.earlier_by(aging_s)
        queued = (view.queued_at(load.job) for load in queue if load.rank > 0)
        oldest = min((queued_at for queued_at in queued if queued_at > since), default=None)
        if oldest is not None:
            yield add_seconds(oldest, aging_s)


class _PendingLoad:
    """A pending load that is first in its model's queue, and the decision on it.

    Attributes:
        rank: the load with the lowest starts first.
        reservations: room that is reserved for the loads before it.
    """

    def __init__(self, view: SchedulerView, job: Job, eviction: Eviction) -> None:
        self.job = job
        self.reservations = Reservations()
        self._view = view
        self._eviction = eviction
        self._model = view.state.models.get(job.model_id)
        _, self._parameters = job.load_order
        self.rank = self._rank()

    def _rank(self) -> int:
        is_between = self._model is not None and self._model.previous is not None
        if self.job.cause in RELOADS or is_between or self._is_being_replaced:
            return _BEFORE_ALL
        queued_at = self._view.queued_at(self.job)
        steps = sum(queued_at <= self._view.earlier_by(n * PRIORITY_AGING_S) for n in (1, 2))
        return max(0, _PRIORITIES.get(self._parameters.priority, 1) - steps)

    @property
    def _is_being_replaced(self) -> bool:
        return self._model is not None and self._view.is_being_replaced(self._model)

    @cached_property
    def _serving(self) -> LoadView | None:
        return self._view.find_serving(self.job.model_id)

    @property
    def _strategy(self) -> str:
        """The swap strategy. A repair keeps what still serves; while a copy is replaced, others serve."""
        of_cause = {Cause.RECOVERY: "beside", Cause.COPY: "auto"}
        return of_cause.get(self.job.cause, self._parameters.strategy)

    @property
    def _estimate(self) -> int:
        estimate = self._view.find_estimate(self.job)
        return 0 if estimate is None else estimate.bytes

    @property
    def _is_guess(self) -> bool:
        estimate = self._view.find_estimate(self.job)
        return estimate is not None and estimate.is_guess

    @property
    def _may_evict(self) -> bool:
        """Whether it may evict; a reload after a start of the server, and a copy, use free memory only."""
        return self._view.policy.evicts and self.job.cause not in (Cause.RESTART, Cause.COPY)

    @property
    def _may_exceed_slots(self) -> bool:
        """Whether it may run as one more than usual: past slow loads, and past those that may never end."""
        view, job = self._view, self.job
        return job.cause in _URGENT or (view.is_proven(job) and not view.proven_load_runs)

    def reserve(self) -> Reservations:
        view, before = self._view, self.reservations
        is_another = self.job.model_id not in view.models_with_process - view.exiting_models
        return Reservations(
            before.bytes + self._estimate, before.models + is_another, before.first or self.job
        )

    def decide(self, estimating: Job | None) -> Action | Waiting:
        """Decide this load; `estimating` is an earlier one whose estimate will be known in a moment."""
        view, job = self._view, self.job
        settled = self._change_settings() or self._refuse()
        if settled is not None:
            return settled
        if self._is_being_replaced:
            reason = "the unload of the version that it replaces"
            return Waiting(reason, reserves_room=view.policy.budget_bytes is not None)
        if estimating is not None:
            return Waiting(f"the memory estimate of {estimating.model_id!r}, which comes first")
        if not view.observations.fork_server_up:
            return Waiting("the fork server, which is being started again")
        if view.free_load_slots + self._may_exceed_slots <= 0:
            return Waiting(f"a free load slot: at most {view.policy.loads_at_once} may run at once")
        if view.observations.under_pressure and self.rank == _LOWEST_PRIORITY:
            aging_at = add_seconds(view.queued_at(job), PRIORITY_AGING_S)
            wake_at = min(aging_at, add_seconds(view.now, PRESSURE_POLL_S))
            return Waiting("the machine, which is under pressure", wake_at)
        return self._start_or_make_room()

    def _change_settings(self) -> Action | None:
        """Change only settings if the model is loaded from the same bytes into such workers meanwhile."""
        serving = find_same_workers(self._view.state, self.job)
        estimate = self._view.find_estimate(self.job)
        if serving is None or estimate is None or self._serving is None:
            return None
        if estimate.same_as != serving.load_job_id:
            return None
        return actions.ChangeSettings(self.job, serving.load_job_id)

    def _refuse(self) -> Action | Waiting | None:
        """Refuse a load that can never run; one whose memory is not known yet waits."""
        job, estimates = self.job, self._view.observations.estimates
        if job.server_deaths >= MAX_SERVER_DEATHS:
            reason = f"the server died {job.server_deaths} times while this load was in progress"
            return actions.FailLoad(job, CRASH_LOOP, reason)
        estimate = estimates.get(job.id)
        if isinstance(estimate, Failure):
            return actions.FailLoad(job, estimate.code, estimate.message)
        if estimate is None:
            return Waiting("the estimate of its memory")
        misfit = self._explain_misfit()
        return None if misfit is None else actions.FailLoad(job, INSUFFICIENT_MEMORY, misfit)

    def _explain_misfit(self) -> str | None:
        budget, replaced = self._view.policy.budget_bytes, self._serving
        beside_bytes = replaced.memory_bytes if replaced is not None and self._strategy == "beside" else 0
        if budget is None or self._estimate + beside_bytes <= budget:
            return None
        limit = "; set memory_limit_bytes if it takes less" if self._is_guess else ""
        needs, in_all = f"it needs {self._estimate_text} of memory", f"{format_megabytes(budget)} in all"
        if self._estimate > budget:
            return f"{needs}, and the budget is {in_all}{limit}"
        is_repair = self.job.cause is Cause.RECOVERY
        in_place = "" if is_repair else "; with strategy auto or in_place it replaces that version"
        beside = f"beside the {format_megabytes(beside_bytes)} of what it replaces"
        return f"{needs} {beside}, and the budget is {in_all}{in_place}{limit}"

    def _start_or_make_room(self) -> Action | Waiting:
        """Start a load that only room can delay, make room for it, or wait."""
        view, replaced, missing = self._view, self._serving, self._shortage_now()
        if replaced is not None and self._strategy == "auto" and missing.bytes > 0:
            is_released = view.observations.optimising_bytes > 0 and self._shortage_after_exits(0).is_none
            if is_released:  # to wait for that is better than a gap
                return Waiting(f"{self._describe_shortage()}; it is being released", reserves_room=True)
        is_auto_in_place = self._strategy == "auto" and not missing.is_none
        if replaced is None or not (self._strategy == "in_place" or is_auto_in_place):
            return actions.StartLoad(self.job) if missing.is_none else self._make_room(0)
        if self._shortage_now(replaced.memory_bytes).is_none:
            return actions.UnloadForReplacement(self.job, replaced.load_job_id)
        return self._make_room(replaced.memory_bytes)

    def _shortage_now(self, replaced_bytes: int = 0, *, reserved: Reservations | None = None) -> _Shortage:
        """Return what the load lacks now, beside the reservations, or others.

        A model whose processes are exiting still has its slot and uses it if no reservation needs it.
        """
        view, reserved = self._view, reserved or self.reservations
        reserved_bytes = max(0, reserved.bytes - view.exiting_bytes)
        left_models = len(view.exiting_models) - reserved.models
        has_one = self.job.model_id in view.exiting_models
        more_models = left_models if has_one else min(0, left_models)
        return self._shortage(replaced_bytes - reserved_bytes, more_models)

    def _shortage_after_exits(self, replaced_bytes: int) -> _Shortage:
        """Return what the load will lack when exiting processes have exited."""
        view, reserved = self._view, self.reservations
        exiting_bytes = replaced_bytes + view.exiting_bytes - reserved.bytes
        return self._shortage(exiting_bytes, len(view.exiting_models) - reserved.models)

    def _shortage(self, more_bytes: int, more_models: int) -> _Shortage:
        """Return what the load lacks if this much more were free."""
        view, free, most = self._view, self._view.free_bytes, self._view.policy.max_loaded
        has_slot = most is None or self.job.model_id in view.models_with_process - view.exiting_models
        return _Shortage(
            0 if free is None else self._estimate - free - more_bytes,
            0 if most is None or has_slot else len(view.models_with_process) + 1 - most - more_models,
        )

    def _make_room(self, replaced_bytes: int) -> Action | Waiting:
        """Wait for exiting processes; else evict the fewest.

        Room that becomes free while it waits is reserved for it if it goes before all, or has waited; what
        exiting processes release is reserved in any case if it is enough.
        """
        view, job, first = self._view, self.job, self.reservations.first
        missing, shortage_text = self._shortage_after_exits(replaced_bytes), self._describe_shortage()
        if missing.is_none:
            return Waiting(f"{shortage_text}; it is being released", reserves_room=True)
        if self._may_evict and (chosen := self._eviction.choose(missing.bytes, missing.models)):
            return actions.UnloadAutomatically(chosen[0].model, Cause.EVICTION, job.id)
        # A reload after the server's start evicts nothing, so it would wait for ever, if only here is room.
        if job.cause is Cause.RESTART and not view.will_free_more and view.share.is_whole:
            code = INSUFFICIENT_MEMORY if missing.bytes > 0 else TOO_MANY_LOADED
            reason = f"not reloaded after the server's start: it needs {shortage_text}"
            return actions.FailLoad(job, code, reason)
        has_priority = self.rank == _BEFORE_ALL or view.queued_at(job) <= view.earlier_by(OVERTAKING_LIMIT_S)
        may_reserve = job.cause not in _RESERVES_NOTHING
        wake_at = self._eviction.next_at if self._may_evict else None
        reason = f"{shortage_text}; {self._advise()}"
        if first is not None and self._shortage_now(replaced_bytes, reserved=Reservations()).is_none:
            reason = f"room, which is reserved for job {first.id}, before it"
        return Waiting(
            reason,
            wake_at,
            reserves_room=may_reserve and has_priority,
            reserves_later=may_reserve and not has_priority,
            lacks_room=True,
        )

    def _describe_shortage(self) -> str:
        first, policy, free = self.reservations.first, self._view.policy, self._view.free_bytes
        kept = f", some reserved for job {first.id}, before it" if first is not None else ""
        if policy.budget_bytes is None or free is None or self._shortage_now().bytes <= 0:
            return f"a place among the {policy.max_loaded} models that may be loaded{kept}"
        return (
            f"{self._estimate_text} of memory, and of the budget of {format_megabytes(policy.budget_bytes)}"
            f" {format_megabytes(max(0, free))} are free{kept}"
        )

    @property
    def _estimate_text(self) -> str:
        """The estimate, and whether it rests on file sizes only."""
        return f"{format_megabytes(self._estimate)}{' (estimated from its files)' if self._is_guess else ''}"

    def _advise(self) -> str:
        if not self._view.policy.evicts:
            return "unload a model, or use --evict idle"
        if not self._may_evict:
            return "a copy, or a reload after a start of the server, evicts no model"
        return "the idle models are not enough: the others are busy, pinned, or were loaded just now"


def find_same_workers(state: State, job: Job) -> Serving | None:
    """Return what a model serves from if a load asks for such workers of the same version.

    If its files have the same bytes, too, the load only changes settings.
    """
    model = state.models.get(job.model_id)
    loaded = model.loaded if model is not None and model.phase is ModelState.LOADED else None
    if loaded is None or loaded.model.degraded or job.cause is not Cause.REQUEST:
        return None
    version, parameters = job.load_order
    serving = loaded.serving
    is_same = serving.version == version and serving.parameters.has_same_workers(parameters)
    return serving if is_same else None


def format_megabytes(number: int) -> str:
    """Return a number of bytes in megabytes, for people."""
    digits = 0 if number >= _SMALL_MB * _MB else 1
    return f"{number / _MB:,.{digits}f} MB"
