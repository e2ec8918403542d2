"""The pending load that starts next, the reasons of the others' waits, and making room.

Loads start by priority, then age. Each minute of waiting raises a load by one priority, so after two minutes
no later load comes before it. A load that waits for room may be overtaken for a while by loads that fit; then
room is reserved for it. Before all others come reloads, and loads whose old version was unloaded for them.

A load slot is kept for files that loaded before: when all slots are taken, and by loads of other files only,
one more may start. So loads that never end delay only models that never loaded.

A load that has several alternatives takes the first that has room in each of its rooms; if none has, room is
made for the first for which that is possible. While another load is being measured in one of the rooms, the
load waits for it, unless an alternative of the same group has room, too: such alternatives are equal.

A load's need is estimated before (`runtime.scheduler.estimates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from events.clock import add_seconds
from events.jobs import CRASH_LOOP, INSUFFICIENT_MEMORY, TOO_MANY_LOADED, Failure, Job, JobKind
from events.models import RELOADS, ModelState
from events.serving import Serving
from events.state import State
from events.types import Cause
from runtime.memory import format_megabytes
from runtime.rooms import Alternative
from runtime.scheduler import actions
from runtime.scheduler.actions import Action, Decision
from runtime.scheduler.eviction import Eviction
from runtime.scheduler.view import Amount, LoadRoom, LoadView, SchedulerView, rank_of

MAX_SERVER_DEATHS = 3
"""Unclean ends of the server during the same load after which that load counts as their cause."""

PRIORITY_AGING_S = 60.0
"""Priority aging: a waiting load rises by one priority. So pressure delays low priority this long at most."""

OVERTAKING_LIMIT_S = 30.0
"""How long smaller loads may overtake a load that waits for room."""

PRESSURE_POLL_S = 1.0
"""How often to check the pressure on the machine, a mean of ten seconds, while a load waits for it."""

_LOWEST_PRIORITY = 2
_URGENT = (Cause.RECOVERY, Cause.SWAP)
"""Loads of models that served until just now: one may run beyond the limit, past slow loads."""
_RESERVES_NOTHING = (Cause.RECOVERY, Cause.RESTART, Cause.DRAIN, Cause.COPY)
"""Loads that are repeated when they fail, or that use free memory only: no other load waits for them."""
_STRATEGIES = {Cause.RECOVERY: "beside", Cause.COPY: "auto", Cause.DEMAND: "auto"}
"""A repair keeps the remaining workers; while one of several loads is replaced, the others serve. Inferences
wait for the load that brings back a choice, which therefore does not wait for memory that its model has."""
_BEFORE_ALL = -1

_NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class Waiting:
    """The reason why a load does not start now, when to look again, and whether room is reserved for it.

    Attributes:
        reason: or a function that returns it, since only that of the alternative which is chosen is read.
        lacks_room: whether no room is being released that is enough.
        follows: the action on it when the measurement of another load ends, if it waits for nothing else.
    """

    reason: str | Callable[[], str]
    wake_at: str | None = None
    reserves_room: bool = False
    reserves_later: bool = False
    lacks_room: bool = False
    follows: Action | None = None

    def describe(self) -> str:
        return self.reason if isinstance(self.reason, str) else self.reason()


@dataclass(slots=True)
class Reservations:
    """Room that is reserved for waiting loads: first the part being released, then the free part.

    All loads of a decision share one object, which grows from load to load: one for each would be slow.
    """

    rooms: dict[LoadRoom, Amount] = field(default_factory=dict)
    first: Job | None = None


@dataclass(slots=True)
class _Shortage:
    """The shortage of an alternative of a load.

    Attributes:
        replaced: the load whose room counts as free, since it ends first; None without one.
        rooms: the rooms that are too small, with the missing part.
        measured: a room in which another load is being measured, and that load.
    """

    alternative: Alternative
    replaced: LoadView | None
    rooms: Mapping[LoadRoom, Amount]
    measured: tuple[LoadRoom, LoadView] | None

    @property
    def is_none(self) -> bool:
        return self.measured is None and not self.rooms

    @property
    def lacks_room(self) -> bool:
        return bool(self.rooms)

    @property
    def lacks_bytes(self) -> bool:
        return any(missing.bytes > 0 for missing in self.rooms.values())


def admit(view: SchedulerView, eviction: Eviction) -> Decision:
    """Decide the pending loads in their order, until one of them leads to an action.

    Args:
        view: the decision's view.
        eviction: that of the same view.
    """
    waiting_for, wake_at = dict[str, str](), list[str]()
    unestimated, without_room = list[Job](), list[Job]()
    reservations = Reservations()
    pending = (
        _PendingLoad(view, job, eviction, reservations)
        for job in view.unended
        if job.kind is JobKind.LOAD
        and job.id not in view.running
        and job.id not in view.share.held
        and view.is_first_in_queue(job)
    )
    queue = sorted(pending, key=lambda load: (load.rank, load.job.created_position))
    estimating: Job | None = None
    overtaken_since = list[str]()
    for load in queue:
        decision = load.decide(estimating)
        if not isinstance(decision, Waiting):
            return Decision(decision, None, waiting_for, tuple(unestimated))
        waiting_for[load.job.id] = decision.describe()
        wake_at += filter(None, [decision.wake_at])
        if decision.lacks_room:
            without_room.append(load.job)
        if decision.reserves_later and load is not queue[-1]:  # a load behind it may have to act then
            overtaken_since.append(view.queued_at(load.job))
        if decision.reserves_room:
            load.reserve()
        is_new = load.job.id not in view.observations.estimates
        if is_new:
            unestimated.append(load.job)
        if estimating is None and (is_new or load.job.id in view.observations.estimating):
            estimating = load.job
    if overtaken_since:
        wake_at.append(add_seconds(min(overtaken_since), OVERTAKING_LIMIT_S))
    if reservations.first is not None:
        wake_at += _next_agings(view, queue)
    next_at = min(wake_at, default=None)
    return Decision(None, next_at, waiting_for, tuple(unestimated), tuple(without_room))


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
    """

    def __init__(self, view: SchedulerView, job: Job, eviction: Eviction, reservations: Reservations) -> None:
        self.job = job
        self._reservations = reservations
        self._view = view
        self._eviction = eviction
        self._model = view.state.models.get(job.model_id)
        _, self._parameters = job.load_order
        self._waits_for: Alternative | None = None
        self.rank = self._rank()

    def _rank(self) -> int:
        is_between = self._model is not None and self._model.previous is not None
        if self.job.cause in RELOADS or is_between or self._is_being_replaced:
            return _BEFORE_ALL
        queued_at = self._view.queued_at(self.job)
        steps = sum(queued_at <= self._view.earlier_by(n * PRIORITY_AGING_S) for n in (1, 2))
        return max(0, rank_of(self._parameters) - steps)

    @property
    def _is_being_replaced(self) -> bool:
        return self._model is not None and self._view.is_being_replaced(self._model)

    @cached_property
    def _serving(self) -> LoadView | None:
        return self._view.find_serving(self.job.model_id)

    @property
    def _strategy(self) -> str:
        """The swap strategy."""
        return _STRATEGIES.get(self.job.cause, self._parameters.strategy)

    @cached_property
    def _alternatives(self) -> Sequence[Alternative]:
        """The alternatives that can ever fit, the preferred one first."""
        estimate = self._view.find_estimate(self.job)
        alternatives = () if estimate is None else estimate.alternatives
        return [each for each in alternatives if self._explain_misfit(each) is None]

    @property
    def _may_evict(self) -> bool:
        """Whether it may evict; a reload after a start of the server, and a copy, use free memory only."""
        return self._view.policy.evicts and self.job.cause not in (Cause.RESTART, Cause.COPY)

    @property
    def _has_waited(self) -> bool:
        """Whether it has waited for a turn, so that busy models may give way to it."""
        view = self._view
        return view.policy.takes_turns and view.queued_at(self.job) <= view.earlier_by(self._eviction.turn_s)

    @property
    def _may_exceed_slots(self) -> bool:
        """Whether it may run as one more than usual: past slow loads, and past those that may never end."""
        view, job = self._view, self.job
        return job.cause in _URGENT or (view.is_proven(job) and not view.proven_load_runs)

    def reserve(self) -> None:
        """Reserve room for each of its alternatives, so that it is overtaken in none of them.

        For one of them that is being released is enough.
        """
        needed = dict[LoadRoom, int]()
        for alternative in self._alternatives if self._waits_for is None else [self._waits_for]:
            for room, needed_bytes in self._list_needs(alternative):
                needed[room] = max(needed_bytes, needed.get(room, 0))
        reserved = self._reservations.rooms
        for room, needed_bytes in needed.items():
            before, is_another = reserved.get(room, _NOTHING), not room.has_slot(self.job.model_id)
            reserved[room] = Amount(before.bytes + needed_bytes, before.models + is_another)
        self._reservations.first = self._reservations.first or self.job

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
        return self._choose_alternative()

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
        if self._alternatives:
            return None
        misfits = filter(None, map(self._explain_misfit, estimate.alternatives))
        return actions.FailLoad(job, INSUFFICIENT_MEMORY, "; ".join(misfits))

    def _list_needs(self, alternative: Alternative) -> list[tuple[LoadRoom, int]]:
        return [(self._view.find_room(name), needed) for name, needed in alternative.needs.items()]

    def _explain_misfit(self, alternative: Alternative) -> str | None:
        """Return why a load can never run in this way, or None if it can."""
        explained = (self._explain_misfit_in(room, alternative) for room, _ in self._list_needs(alternative))
        return next(filter(None, explained), None)

    def _explain_misfit_in(self, room: LoadRoom, alternative: Alternative) -> str | None:
        budget, needed_bytes = room.limits.budget_bytes, alternative.needs[room.name]
        beside_bytes = room.bytes_of(self._serving) if self._strategy == "beside" else 0
        if budget is None or needed_bytes + beside_bytes <= budget:
            return None
        is_limitable = alternative.is_guess and not room.limits.is_measured
        limit = "; set memory_limit_bytes if it takes less" if is_limitable else ""
        needs = f"it needs {_describe_need(room, alternative)}"
        in_all = f"{room.budget_name} is {format_megabytes(budget)} in all"
        if needed_bytes > budget:
            return f"{needs}, and {in_all}{limit}"
        is_repair = self.job.cause is Cause.RECOVERY
        in_place = "" if is_repair else "; with strategy auto or in_place it replaces that version"
        beside = f"beside the {format_megabytes(beside_bytes)} of what it replaces"
        return f"{needs} {beside}, and {in_all}{in_place}{limit}"

    def _choose_alternative(self) -> Action | Waiting:
        """Start the load in the first way for which there is room; else make room for one, or wait.

        Alternatives of one group are equal: the first for which no load is being measured is taken.
        """
        decisions = [(self._start_or_make_room(each), each) for each in self._alternatives]
        decision, chosen = min(decisions, key=lambda each: _effort_of(each[0]))
        if isinstance(decision, Waiting) and decision.follows is not None:
            effort, group = _effort_of(decision), chosen.target.group
            alike = (each for each in decisions if each[1].target.group == group)
            equal = [each for each in alike if _effort_of(each[0]) == effort]
            decision, chosen = min(equal, key=lambda each: isinstance(each[0], Waiting))
        if isinstance(decision, Waiting) and not decision.lacks_room:
            self._waits_for = chosen
        return decision

    def _start_or_make_room(self, alternative: Alternative) -> Action | Waiting:
        """Start a load, which only room can delay, make room for it, or wait."""
        missing = self._find_shortage(alternative)
        if self._serving is not None and self._replaces_in_place(missing):
            missing = self._find_shortage(alternative, self._serving)
        if missing.lacks_room:
            return self._make_room(missing)
        action: Action = actions.StartLoad(self.job, alternative)
        if missing.replaced is not None:
            action = actions.UnloadForReplacement(self.job, missing.replaced.load_job_id)
        return action if missing.is_none else self._make_room(missing, follows=action)

    def _replaces_in_place(self, missing: _Shortage) -> bool:
        """Whether the old version is unloaded before the load starts, which lacks that much beside it."""
        return self._strategy == "in_place" or (self._strategy == "auto" and missing.lacks_room)

    def _find_shortage(
        self,
        alternative: Alternative,
        replaced: LoadView | None = None,
        *,
        after_exits: bool = False,
        reserved: Mapping[LoadRoom, Amount] | None = None,
    ) -> _Shortage:
        """Return the shortage of a load; `reserved` replaces the present reservations."""
        reserved = self._reservations.rooms if reserved is None else reserved
        lacking, measured = {}, None
        for room, needed_bytes in self._list_needs(alternative):
            more_bytes = needed_bytes - room.bytes_of(replaced)
            before = reserved.get(room, _NOTHING)
            missing = room.shortage(self.job.model_id, more_bytes, before, after_exits=after_exits)
            if not missing.is_none:
                lacking[room] = missing
            if measured is None and (load := room.measured_load) is not None:
                measured = room, load
        return _Shortage(alternative, replaced, lacking, measured)

    def _make_room(self, missing_now: _Shortage, follows: Action | None = None) -> Action | Waiting:
        """Wait for exiting processes; else evict idle models, or end the turn of busy ones.

        Room that becomes free while it waits is reserved for it if it goes before all, or has waited; what
        exiting processes release is reserved in any case if it is enough.
        """
        view, job = self._view, self.job
        missing = self._find_shortage(missing_now.alternative, missing_now.replaced, after_exits=True)
        if missing.is_none:
            return Waiting(partial(self._describe_release, missing_now), reserves_room=True)
        may_evict = self._may_evict and missing.measured is None
        if may_evict and (chosen := self._eviction.choose(missing.rooms)):
            return actions.UnloadAutomatically(chosen[0].model, Cause.EVICTION, job.id)
        if may_evict and self._has_waited and (chosen := self._eviction.choose(missing.rooms, self.rank)):
            return actions.UnloadAutomatically(chosen[0].model, Cause.EVICTION, job.id, ends_turn=True)
        # A reload after the server's start evicts nothing, so it would wait for ever, if only here is room.
        if job.cause is Cause.RESTART and not view.will_free_more and view.share.is_whole:
            code = INSUFFICIENT_MEMORY if missing.lacks_bytes else TOO_MANY_LOADED
            lack = self._describe(missing_now)
            return actions.FailLoad(job, code, f"not reloaded after the server's start for want of {lack}")
        has_priority = self.rank == _BEFORE_ALL or view.queued_at(job) <= view.earlier_by(OVERTAKING_LIMIT_S)
        may_reserve = job.cause not in _RESERVES_NOTHING
        return Waiting(
            partial(self._describe_wait, missing_now),
            self._eviction.next_at if may_evict else None,
            reserves_room=may_reserve and has_priority,
            reserves_later=may_reserve and not has_priority,
            lacks_room=missing.lacks_room,
            follows=follows,
        )

    def _describe_release(self, missing: _Shortage) -> str:
        return f"{self._describe(missing)}; it is being released"

    def _describe_wait(self, missing: _Shortage) -> str:
        first, alternative = self._reservations.first, missing.alternative
        if first is not None and self._find_shortage(alternative, missing.replaced, reserved={}).is_none:
            return f"room, which is reserved for model {first.model_id!r}, before it"
        shortage_text = self._describe(missing)
        return f"{shortage_text}: {self._advise()}" if missing.measured is None else shortage_text

    def _describe(self, shortage: _Shortage) -> str:
        first = self._reservations.first
        if shortage.measured is not None:
            room, measured = shortage.measured
            is_gone = "whose memory is being released"
            is_loading = f"on which model {measured.model_id!r} is loading"
            return f"{room.limits.title}, {is_gone if measured.killed else is_loading}"
        kept = f", some reserved for model {first.model_id!r}, before it" if first is not None else ""
        room, missing = next(iter(shortage.rooms.items()))
        budget, free = room.limits.budget_bytes, room.free_bytes
        if budget is None or free is None or missing.bytes <= 0:
            return f"a place among the {room.max_loaded} models that may be loaded{kept}"
        needed, left = format_megabytes(shortage.alternative.needs[room.name]), format_megabytes(max(0, free))
        needs = f"memory{room.where}: needs {'about ' if shortage.alternative.is_guess else ''}{needed}"
        return f"{needs}, {left.removesuffix(' MB')} of {format_megabytes(budget)} are free{kept}"

    def _advise(self) -> str:
        if not self._view.policy.evicts:
            return "unload a model, or start with --evict idle"
        if not self._may_evict:
            return "a copy, or a reload after a start of the server, evicts no model"
        if self._view.policy.takes_turns:
            return "the idle models are not enough: the others are pinned, or their turn is not over"
        others = "the idle models are not enough: the others are busy, pinned, or were loaded just now"
        return f"{others} (busy ones take turns where inferences load models)"


def _effort_of(decision: Action | Waiting) -> int:
    """Return a lower number for the better of two decisions on alternatives of a load.

    To wait only for the end of a measurement is as good as the action that follows. Idle models go before
    busy ones.
    """
    match decision:
        case Waiting(follows=action) if action is not None:
            return _effort_of(action)
        case actions.StartLoad():
            return 0
        case actions.UnloadForReplacement():
            return 1
        case Waiting(lacks_room=False):
            return 2
        case actions.UnloadAutomatically(ends_turn=ends_turn):
            return 3 + ends_turn
        case Waiting():
            return 5
    return 6


def _describe_need(room: LoadRoom, alternative: Alternative) -> str:
    """Return a load's need of a room, and whether it rests on file sizes only."""
    guess = " (estimated from its files)" if alternative.is_guess else ""
    return f"{format_megabytes(alternative.needs[room.name])}{guess} of memory{room.where}"


def find_same_workers(state: State, job: Job) -> Serving | None:
    """Return the serving load if another load asks for the same workers of the same version.

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
