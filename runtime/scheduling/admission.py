"""Which load begins next, and what the others wait for: priority, age, places, memory. Pure.

Loads have their turn by priority, then age, and who has waited a minute rises by one priority: so after two
minutes nobody comes before a load that was not there before it. One that waits for room may be overtaken by
those that fit, for a while; from then on what it needs is kept for it, and others begin in what is left.
Before all come models that served, or were to, and do not: what is loaded again, and what made way for the
version that is next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from events.clock import later
from events.jobs import Job, JobKind
from events.models import CRASH_LOOP, INSUFFICIENT_MEMORY, RELOADS, Model
from events.types import Cause
from runtime.scheduling.actions import Action, FailLoad, SizeUp, StopPreparing, TakeOver
from runtime.scheduling.eviction import Eviction
from runtime.scheduling.room import Claims, Waits, never_fits, start_or_make_room
from runtime.scheduling.sight import Sight

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


def admit(sight: Sight, eviction: Eviction) -> Admission:
    """Go through the loads that are next of their models, in the order of their turn."""
    admission = Admission()
    turns = _turns(sight)
    claims = Claims()
    looked_at: Job | None = None
    for turn in turns:
        verdict = _verdict(sight, turn, claims, eviction, looked_at)
        if not isinstance(verdict, Waits):
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


def _turns(sight: Sight) -> list[_Turn]:
    models = sight.state.models
    turns = (
        _Turn(_rank(sight, job, models.get(job.model_id)), job, models.get(job.model_id))
        for job in sight.unended
        if job.kind is JobKind.LOAD and job.id not in sight.running and sight.is_next(job)
    )
    return sorted(turns, key=lambda turn: (turn.rank, turn.job.created_position))


def _rank(sight: Sight, job: Job, model: Model | None) -> int:
    assert job.load is not None
    if job.cause in RELOADS or (model is not None and _has_made_way(sight, model)):
        return _FIRST
    risen = (job.created_at <= sight.ago(RISE_S)) + (job.created_at <= sight.ago(2 * RISE_S))
    return max(0, _CLASSES.get(job.load.priority, 1) - risen)


def _has_made_way(sight: Sight, model: Model) -> bool:
    return model.previous is not None or sight.is_making_way(model)


def _next_rises(sight: Sight, turns: Sequence[_Turn]) -> Iterator[str]:
    """Yield when loads rise next: another may then be the first, and room be kept for no one any more."""
    for rise_s in (RISE_S, 2 * RISE_S):
        risen = sight.ago(rise_s)
        since = (turn.job.created_at for turn in turns if turn.rank > 0 and turn.job.created_at > risen)
        oldest = min(since, default=None)
        if oldest is not None:
            yield later(oldest, rise_s)


def _verdict(
    sight: Sight, turn: _Turn, claims: Claims, eviction: Eviction, looked_at: Job | None
) -> Action | Waits:
    """Decide about one load; `looked_at` is one before it whose need will be known in a moment."""
    job, conditions = turn.job, sight.conditions
    kept = sight.serving_run(turn.model)
    if kept is not None and kept.load_job_id == job.keeps and not _is_degraded(turn.model):
        return TakeOver(job, kept.load_job_id)
    unfit = _unfit(sight, job)
    if unfit is not None:
        return unfit
    if turn.model is not None and sight.is_making_way(turn.model):
        return Waits(
            "the end of the version whose place it takes", keeps_room=sight.policy.budget_bytes is not None
        )
    if looked_at is not None:
        return Waits(f"a look at the files of {looked_at.model_id!r}, which comes first")
    if not conditions.fork_server_up:
        return Waits("the fork server, which is being started again")
    if sight.free_places + (job.cause in _URGENT) <= 0:
        return Waits(f"a free place: of loads, {sight.policy.loads_at_once} may run at once")
    if conditions.under_pressure and turn.rank == _LOWEST:
        if sight.may_stop_preparing:  # it may be what the machine is under pressure of
            return StopPreparing()
        return Waits(
            "the machine, which is under pressure",
            min(later(job.created_at, RISE_S), later(sight.now, PRESSURE_LOOK_S)),
        )
    is_kept_for = turn.rank == _FIRST or job.created_at <= sight.ago(OVERTAKEN_S)
    keeps_room = is_kept_for and job.cause not in _KEEPS_NOTHING
    return start_or_make_room(sight, job, claims, eviction, keeps_room=keeps_room)


def _is_degraded(model: Model | None) -> bool:
    return model is not None and model.degraded


def _unfit(sight: Sight, job: Job) -> Action | Waits | None:
    """Return what is to be done about a load that will never run, or of which that is not known yet."""
    if job.server_deaths >= MAX_SERVER_DEATHS:
        reason = f"the server died {job.server_deaths} times while this load was in progress"
        return FailLoad(job, CRASH_LOOP, reason)
    needs = sight.conditions.needs
    if sight.policy.budget_bytes is not None and needs.get(job.id) is None:
        return Waits("a look at its files") if job.id in needs else SizeUp(job)
    reason_not = never_fits(sight, job)
    return FailLoad(job, INSUFFICIENT_MEMORY, reason_not) if reason_not is not None else None
