"""Whether there is room for a load, of memory and of places for models, and how it gets some. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from events.jobs import Job
from events.models import INSUFFICIENT_MEMORY, TOO_MANY_LOADED
from events.types import Cause
from runtime.scheduling.actions import Action, FailLoad, MakeWay, RequestEnd, StartLoad, StopPreparing
from runtime.scheduling.eviction import Eviction
from runtime.scheduling.sight import Running, Sight

_MB = 1_000_000
_SMALL_MB = 10


@dataclass(frozen=True, slots=True)
class Waits:
    """Why a load does not begin now, and when to look again; whether what becomes free is kept for it."""

    reason: str
    wake_at: str | None = None
    keeps_room: bool = False


@dataclass(frozen=True, slots=True)
class Claims:
    """The room that is kept for loads which come first: what is being given back, and what is free beside."""

    bytes: int = 0
    models: int = 0
    first: Job | None = None

    def and_of(self, sight: Sight, job: Job) -> Claims:
        """Return these with the claim of one more load."""
        models = self.models + (job.model_id not in sight.present - sight.departing)
        return Claims(self.bytes + _need(sight, job), models, self.first or job)


@dataclass(frozen=True, slots=True)
class _Missing:
    """What a load would need beyond what it may have."""

    bytes: int
    models: int

    @property
    def nothing(self) -> bool:
        return self.bytes <= 0 and self.models <= 0


def never_fits(sight: Sight, job: Job) -> str | None:
    """Say why a load will never fit, whatever else is unloaded; None if it may."""
    budget, need = sight.policy.budget_bytes, _need(sight, job)
    if budget is None:
        return None
    told, own = _needed(sight, job), _own(sight, job)
    limit = "; a memory_limit_bytes would say better" if job.id in sight.conditions.estimated else ""
    if need > budget:
        return f"it needs {told} of memory, and the budget is {megabytes(budget)} in all{limit}"
    if own is None or _strategy(job) != "beside" or need + own.memory_bytes <= budget:
        return None
    is_repair = job.cause is Cause.RECOVERY
    in_place = "" if is_repair else "; with strategy auto or in_place it takes its place"
    return (
        f"it needs {told} of memory beside the {megabytes(own.memory_bytes)} of what it replaces, and the"
        f" budget is {megabytes(budget)} in all{in_place}{limit}"
    )


def start_or_make_room(
    sight: Sight, job: Job, claims: Claims, eviction: Eviction, *, keeps_room: bool
) -> Action | Waits:
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
            return StopPreparing()
        if sight.conditions.preparation is not None and _missing_then(sight, job, claims, 0).nothing:
            return Waits(f"{_wanted(sight, job, claims)}; it is being given back", keeps_room=True)
    is_in_place = own is not None and (
        _strategy(job) == "in_place" or (_strategy(job) == "auto" and not missing.nothing)
    )
    own_bytes = own.memory_bytes if own is not None and is_in_place else 0
    if not _missing_now(sight, job, claims, own_bytes).nothing:
        return _make_room(sight, job, claims, eviction, own_bytes=own_bytes, keeps_room=keeps_room)
    return MakeWay(job, own.load_job_id) if own is not None and is_in_place else StartLoad(job)


def _own(sight: Sight, job: Job) -> Running | None:
    """Return what the load replaces, if that serves."""
    return sight.serving_run(sight.state.models.get(job.model_id))


def _strategy(job: Job) -> str:
    """What repairs a model that still serves must not end it first."""
    assert job.load is not None
    return "beside" if job.cause is Cause.RECOVERY else job.load.strategy


def _need(sight: Sight, job: Job) -> int:
    return sight.conditions.needs.get(job.id) or 0


def _missing_now(sight: Sight, job: Job, claims: Claims, own_bytes: int = 0) -> _Missing:
    """Return what is missing of what is free, beside what claims take of that.

    A model that is leaving has a place yet, and takes that if no claim needs it.
    """
    kept_bytes = max(0, claims.bytes - sight.coming_bytes)
    left_models = len(sight.departing) - claims.models
    has_one = job.model_id in sight.departing
    return _missing(sight, job, own_bytes - kept_bytes, left_models if has_one else min(0, left_models))


def _missing_then(sight: Sight, job: Job, claims: Claims, own_bytes: int) -> _Missing:
    """Return what will still be missing when what is leaving has gone."""
    coming_bytes = own_bytes + sight.coming_bytes - claims.bytes
    return _missing(sight, job, coming_bytes, len(sight.departing) - claims.models)


def _missing(sight: Sight, job: Job, more_bytes: int, more_models: int) -> _Missing:
    """Return what is missing if so much more than what is free could be had."""
    free, most = sight.free_bytes, sight.policy.max_loaded
    has_place = most is None or job.model_id in sight.present - sight.departing
    return _Missing(
        0 if free is None else _need(sight, job) - free - more_bytes,
        0 if most is None or has_place else len(sight.present) + 1 - most - more_models,
    )


def _make_room(
    sight: Sight, job: Job, claims: Claims, eviction: Eviction, *, own_bytes: int, keeps_room: bool
) -> Action | Waits:
    """Wait for what is on its way out, else send more that way: what prepares, then the fewest models."""
    if sight.may_stop_preparing and _missing_now(sight, job, claims, own_bytes).bytes > 0:
        return StopPreparing()
    missing = _missing_then(sight, job, claims, own_bytes)
    wanted = _wanted(sight, job, claims)
    if missing.nothing:
        return Waits(f"{wanted}; it is being given back", keeps_room=True)
    if _may_evict(sight, job):
        chosen = eviction.fewest(missing.bytes, missing.models)
        if chosen:
            return RequestEnd(chosen[0].model, Cause.EVICTION, job.id)
    if job.cause is Cause.RESTART and not sight.settles:
        return _not_restored(job, missing, wanted)
    wake_at = eviction.next_at if _may_evict(sight, job) else None
    if claims.first is not None and _missing_now(sight, job, Claims(), own_bytes).nothing:
        return Waits(
            f"room, which is kept for job {claims.first.id}, before it", wake_at, keeps_room=keeps_room
        )
    return Waits(f"{wanted}; {_advice(sight, job)}", wake_at, keeps_room=keeps_room)


def _may_evict(sight: Sight, job: Job) -> bool:
    """What comes back after a start of the server takes what is free: it was not asked for just now."""
    return sight.policy.evicts and job.cause is not Cause.RESTART


def _not_restored(job: Job, missing: _Missing, wanted: str) -> FailLoad:
    code = INSUFFICIENT_MEMORY if missing.bytes > 0 else TOO_MANY_LOADED
    return FailLoad(job, code, f"not loaded again after the server's start: it would need {wanted}")


def _wanted(sight: Sight, job: Job, claims: Claims) -> str:
    """Say what is missing, and how much."""
    kept = f", some kept for job {claims.first.id}, before it" if claims.first is not None else ""
    budget, free = sight.policy.budget_bytes, sight.free_bytes
    if budget is not None and free is not None and _missing_now(sight, job, claims).bytes > 0:
        return (
            f"{_needed(sight, job)} of memory, and of the budget of {megabytes(budget)}"
            f" {megabytes(max(0, free))} are free{kept}"
        )
    return f"a place among the {sight.policy.max_loaded} models that may be loaded{kept}"


def _needed(sight: Sight, job: Job) -> str:
    """Say how much a load needs, and what that is worth."""
    told = megabytes(_need(sight, job))
    return f"{told} (estimated from its files)" if job.id in sight.conditions.estimated else told


def _advice(sight: Sight, job: Job) -> str:
    if not sight.policy.evicts:
        return "unload a model, or have --evict idle do it"
    if not _may_evict(sight, job):
        return "for what was loaded before the server's start no model is evicted"
    return "the idle models are not enough: the others are busy, pinned, or were loaded just now"


def megabytes(number: int) -> str:
    """Write a number of bytes for people."""
    digits = 0 if number >= _SMALL_MB * _MB else 1
    return f"{number / _MB:,.{digits}f} MB"
