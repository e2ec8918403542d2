"""Which load begins next, and what the others wait for: priority, age, places, memory. Pure.

Loads have their turn by priority, then age, and who has waited a minute rises by one priority: so after two
minutes nobody comes before a load that was not there before it. One that waits for room may be overtaken by
those that fit, for a while; from then on what it needs is kept for it, and others begin in what is left.
Before all come models that served, or were to, and do not: what is loaded again, and what made way for the
version that is next.

Whether there is room for a load, of memory and of places for models, and how it gets some. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from events.clock import add_seconds
from events.jobs import Job, JobKind
from events.models import CRASH_LOOP, INSUFFICIENT_MEMORY, RELOADS, TOO_MANY_LOADED, Model
from events.types import Cause
from runtime.scheduler.actions import (
    Action,
    EstimateMemory,
    FailLoad,
    ReuseWorkers,
    StartLoad,
    StopPreparation,
    UnloadAutomatically,
    UnloadForReplacement,
)
from runtime.scheduler.eviction import Eviction
from runtime.scheduler.view import LoadView, SchedulerView

_MB = 1_000_000
_SMALL_MB = 10


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a load does not begin now, and when to look again; whether what becomes free is kept for it."""

    reason: str
    wake_at: str | None = None
    keeps_room: bool = False


@dataclass(frozen=True, slots=True)
class Reservations:
    """The room that is kept for loads which come first: what is being given back, and what is free beside."""

    bytes: int = 0
    models: int = 0
    first: Job | None = None

    def and_of(self, sight: SchedulerView, job: Job) -> Reservations:
        """Return these with the claim of one more load."""
        models = self.models + (job.model_id not in sight.present - sight.departing)
        return Reservations(self.bytes + _need(sight, job), models, self.first or job)


@dataclass(frozen=True, slots=True)
class _Missing:
    """What a load would need beyond what it may have."""

    bytes: int
    models: int

    @property
    def nothing(self) -> bool:
        return self.bytes <= 0 and self.models <= 0


def never_fits(sight: SchedulerView, job: Job) -> str | None:
    """Say why a load will never fit, whatever else is unloaded; None if it may."""
    budget, need = sight.policy.budget_bytes, _need(sight, job)
    if budget is None:
        return None
    told, own = _needed(sight, job), _own(sight, job)
    limit = "; a memory_limit_bytes would say better" if job.id in sight.conditions.estimated else ""
    if need > budget:
        return f"it needs {told} of memory, and the budget is {format_megabytes(budget)} in all{limit}"
    if own is None or _strategy(job) != "beside" or need + own.memory_bytes <= budget:
        return None
    is_repair = job.cause is Cause.RECOVERY
    in_place = "" if is_repair else "; with strategy auto or in_place it takes its place"
    return (
        f"it needs {told} of memory beside the {format_megabytes(own.memory_bytes)} of what it replaces, and"
        f" the budget is {format_megabytes(budget)} in all{in_place}{limit}"
    )


def start_or_make_room(
    sight: SchedulerView, job: Job, claims: Reservations, eviction: Eviction, *, keeps_room: bool
) -> Action | Waiting:
    """Begin a load, or what goes before it, or wait.

    Args:
        sight: what there is.
        job: the load; nothing but room is in its way.
        claims: what is kept for loads that come before it.
        eviction: the models that may be evicted for it.
        keeps_room: whether what becomes free is kept for it while it waits; for what is on its way out, and
            is enough, it is kept in any case.
    """
    own, missing = _own(sight, job), _missing_now(sight, job, claims)
    if (
        own is not None and _strategy(job) == "auto" and missing.bytes > 0
    ):  # a gap is not for what can be stopped
        if sight.may_stop_preparing:
            return StopPreparation()
        if sight.conditions.preparation is not None and _missing_then(sight, job, claims, 0).nothing:
            return Waiting(f"{_wanted(sight, job, claims)}; it is being given back", keeps_room=True)
    is_in_place = own is not None and (
        _strategy(job) == "in_place" or (_strategy(job) == "auto" and not missing.nothing)
    )
    own_bytes = own.memory_bytes if own is not None and is_in_place else 0
    if not _missing_now(sight, job, claims, own_bytes).nothing:
        return _make_room(sight, job, claims, eviction, own_bytes=own_bytes, keeps_room=keeps_room)
    return UnloadForReplacement(job, own.load_job_id) if own is not None and is_in_place else StartLoad(job)


def _own(sight: SchedulerView, job: Job) -> LoadView | None:
    """Return what the load replaces, if that serves."""
    return sight.serving_run(sight.state.models.get(job.model_id))


def _strategy(job: Job) -> str:
    """What repairs a model that still serves must not end it first."""
    assert job.load is not None
    return "beside" if job.cause is Cause.RECOVERY else job.load.strategy


def _need(sight: SchedulerView, job: Job) -> int:
    return sight.conditions.needs.get(job.id) or 0


def _missing_now(sight: SchedulerView, job: Job, claims: Reservations, own_bytes: int = 0) -> _Missing:
    """Return what is missing of what is free, beside what claims take of that.

    A model that is leaving has a place yet, and takes that if no claim needs it.
    """
    kept_bytes = max(0, claims.bytes - sight.coming_bytes)
    left_models = len(sight.departing) - claims.models
    has_one = job.model_id in sight.departing
    return _missing(sight, job, own_bytes - kept_bytes, left_models if has_one else min(0, left_models))


def _missing_then(sight: SchedulerView, job: Job, claims: Reservations, own_bytes: int) -> _Missing:
    """Return what will still be missing when what is leaving has gone."""
    coming_bytes = own_bytes + sight.coming_bytes - claims.bytes
    return _missing(sight, job, coming_bytes, len(sight.departing) - claims.models)


def _missing(sight: SchedulerView, job: Job, more_bytes: int, more_models: int) -> _Missing:
    """Return what is missing if so much more than what is free could be had."""
    free, most = sight.free_bytes, sight.policy.max_loaded
    has_place = most is None or job.model_id in sight.present - sight.departing
    return _Missing(
        0 if free is None else _need(sight, job) - free - more_bytes,
        0 if most is None or has_place else len(sight.present) + 1 - most - more_models,
    )


def _make_room(
    sight: SchedulerView,
    job: Job,
    claims: Reservations,
    eviction: Eviction,
    *,
    own_bytes: int,
    keeps_room: bool,
) -> Action | Waiting:
    """Wait for what is on its way out, else send more that way: what prepares, then the fewest models."""
    if sight.may_stop_preparing and _missing_now(sight, job, claims, own_bytes).bytes > 0:
        return StopPreparation()
    missing = _missing_then(sight, job, claims, own_bytes)
    wanted = _wanted(sight, job, claims)
    if missing.nothing:
        return Waiting(f"{wanted}; it is being given back", keeps_room=True)
    if _may_evict(sight, job):
        chosen = eviction.fewest(missing.bytes, missing.models)
        if chosen:
            return UnloadAutomatically(chosen[0].model, Cause.EVICTION, job.id)
    if job.cause is Cause.RESTART and not sight.settles:
        return _not_restored(job, missing, wanted)
    wake_at = eviction.next_at if _may_evict(sight, job) else None
    if claims.first is not None and _missing_now(sight, job, Reservations(), own_bytes).nothing:
        return Waiting(
            f"room, which is kept for job {claims.first.id}, before it", wake_at, keeps_room=keeps_room
        )
    return Waiting(f"{wanted}; {_advice(sight, job)}", wake_at, keeps_room=keeps_room)


def _may_evict(sight: SchedulerView, job: Job) -> bool:
    """What comes back after a start of the server takes what is free: it was not asked for just now."""
    return sight.policy.evicts and job.cause is not Cause.RESTART


def _not_restored(job: Job, missing: _Missing, wanted: str) -> FailLoad:
    code = INSUFFICIENT_MEMORY if missing.bytes > 0 else TOO_MANY_LOADED
    return FailLoad(job, code, f"not loaded again after the server's start: it would need {wanted}")


def _wanted(sight: SchedulerView, job: Job, claims: Reservations) -> str:
    """Say what is missing, and how much."""
    kept = f", some kept for job {claims.first.id}, before it" if claims.first is not None else ""
    budget, free = sight.policy.budget_bytes, sight.free_bytes
    if budget is not None and free is not None and _missing_now(sight, job, claims).bytes > 0:
        return (
            f"{_needed(sight, job)} of memory, and of the budget of {format_megabytes(budget)}"
            f" {format_megabytes(max(0, free))} are free{kept}"
        )
    return f"a place among the {sight.policy.max_loaded} models that may be loaded{kept}"


def _needed(sight: SchedulerView, job: Job) -> str:
    """Say how much a load needs, and what that is worth."""
    told = format_megabytes(_need(sight, job))
    return f"{told} (estimated from its files)" if job.id in sight.conditions.estimated else told


def _advice(sight: SchedulerView, job: Job) -> str:
    if not sight.policy.evicts:
        return "unload a model, or have --evict idle do it"
    if not _may_evict(sight, job):
        return "for what was loaded before the server's start no model is evicted"
    return "the idle models are not enough: the others are busy, pinned, or were loaded just now"


def format_megabytes(number: int) -> str:
    """Write a number of bytes for people."""
    digits = 0 if number >= _SMALL_MB * _MB else 1
    return f"{number / _MB:,.{digits}f} MB"


MAX_SERVER_DEATHS = 3
"""Unclean ends of the server amid the same load after which that load is held to be their cause."""

RISE_S = 60.0
"""How long a load waits at one priority, and so how long one of low priority waits for pressure at most."""

OVERTAKEN_S = 30.0
"""How long a load that waits for room may be overtaken by others that fit."""

PRESSURE_LOOK_S = 1.0
"""How often to look at the machine's pressure while a load waits for that: it is a mean of ten seconds."""

_CLASSES = {"high": 0, "normal": 1, "low": 2}
_LOWEST = 2
_URGENT = (Cause.RECOVERY, Cause.SWAP)
"""Loads of what served until just now: slow ones, or some that never end, must not keep it away."""
_KEEPS_NOTHING = (Cause.RECOVERY, Cause.RESTART)
"""Loads that are requested again when they fail, or take what is free: others need not wait for them."""
_FIRST = -1


@dataclass(slots=True)
class Admission:
    """The next thing to do about the loads that have not begun; else what each waits for, and until when."""

    action: Action | None = None
    waiting_for: dict[str, str] = field(default_factory=dict)
    wake_at: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A load that is next of its model; `rank` is its class by now, lower is sooner."""

    rank: int
    job: Job
    model: Model | None


def admit(sight: SchedulerView, eviction: Eviction) -> Admission:
    """Go through the loads that are next of their models, in the order of their turn."""
    admission = Admission()
    turns = _turns(sight)
    claims = Reservations()
    looked_at: Job | None = None
    for turn in turns:
        verdict = _verdict(sight, turn, claims, eviction, looked_at)
        if not isinstance(verdict, Waiting):
            admission.action = verdict
            return admission
        admission.waiting_for[turn.job.id] = verdict.reason
        admission.wake_at += filter(None, [verdict.wake_at])
        if verdict.keeps_room:
            claims = claims.and_of(sight, turn.job)
        if looked_at is None and turn.job.id in sight.conditions.looked_at:
            looked_at = turn.job
    if claims.first is not None:
        admission.wake_at += _next_rises(sight, turns)
    return admission


def _turns(sight: SchedulerView) -> list[_Turn]:
    models = sight.state.models
    turns = (
        _Turn(_rank(sight, job, models.get(job.model_id)), job, models.get(job.model_id))
        for job in sight.unended
        if job.kind is JobKind.LOAD and job.id not in sight.running and sight.is_next(job)
    )
    return sorted(turns, key=lambda turn: (turn.rank, turn.job.created_position))


def _rank(sight: SchedulerView, job: Job, model: Model | None) -> int:
    assert job.load is not None
    if job.cause in RELOADS or (model is not None and _has_made_way(sight, model)):
        return _FIRST
    risen = (job.created_at <= sight.ago(RISE_S)) + (job.created_at <= sight.ago(2 * RISE_S))
    return max(0, _CLASSES.get(job.load.priority, 1) - risen)


def _has_made_way(sight: SchedulerView, model: Model) -> bool:
    return model.previous is not None or sight.is_making_way(model)


def _next_rises(sight: SchedulerView, turns: Sequence[_Turn]) -> Iterator[str]:
    """Yield when loads rise next: another may then be the first, and room be kept for no one any more."""
    for rise_s in (RISE_S, 2 * RISE_S):
        risen = sight.ago(rise_s)
        since = (turn.job.created_at for turn in turns if turn.rank > 0 and turn.job.created_at > risen)
        oldest = min(since, default=None)
        if oldest is not None:
            yield add_seconds(oldest, rise_s)


def _verdict(
    sight: SchedulerView, turn: _Turn, claims: Reservations, eviction: Eviction, looked_at: Job | None
) -> Action | Waiting:
    """Decide about one load; `looked_at` is one before it whose need will be known in a moment."""
    job, conditions = turn.job, sight.conditions
    kept = sight.serving_run(turn.model)
    if kept is not None and kept.load_job_id == job.keeps and not _is_degraded(turn.model):
        return ReuseWorkers(job, kept.load_job_id)
    unfit = _unfit(sight, job)
    if unfit is not None:
        return unfit
    if turn.model is not None and sight.is_making_way(turn.model):
        return Waiting(
            "the end of the version whose place it takes", keeps_room=sight.policy.budget_bytes is not None
        )
    if looked_at is not None:
        return Waiting(f"a look at the files of {looked_at.model_id!r}, which comes first")
    if not conditions.fork_server_up:
        return Waiting("the fork server, which is being started again")
    if sight.free_places + (job.cause in _URGENT) <= 0:
        return Waiting(f"a free place: of loads, {sight.policy.loads_at_once} may run at once")
    if conditions.under_pressure and turn.rank == _LOWEST:
        if sight.may_stop_preparing:  # it may be what the machine is under pressure of
            return StopPreparation()
        return Waiting(
            "the machine, which is under pressure",
            min(add_seconds(job.created_at, RISE_S), add_seconds(sight.now, PRESSURE_LOOK_S)),
        )
    is_kept_for = turn.rank == _FIRST or job.created_at <= sight.ago(OVERTAKEN_S)
    keeps_room = is_kept_for and job.cause not in _KEEPS_NOTHING
    return start_or_make_room(sight, job, claims, eviction, keeps_room=keeps_room)


def _is_degraded(model: Model | None) -> bool:
    return model is not None and model.degraded


def _unfit(sight: SchedulerView, job: Job) -> Action | Waiting | None:
    """Return what is to be done about a load that will never run, or of which that is not known yet."""
    if job.server_deaths >= MAX_SERVER_DEATHS:
        reason = f"the server died {job.server_deaths} times while this load was in progress"
        return FailLoad(job, CRASH_LOOP, reason)
    needs = sight.conditions.needs
    if sight.policy.budget_bytes is not None and needs.get(job.id) is None:
        return Waiting("a look at its files") if job.id in needs else EstimateMemory(job)
    reason_not = never_fits(sight, job)
    return FailLoad(job, INSUFFICIENT_MEMORY, reason_not) if reason_not is not None else None
