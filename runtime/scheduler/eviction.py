"""Which idle models make room: the fewest that are enough, and of those the least recently used. Pure.

What the system unloads by itself: idle models, what outgrew the budget, what is not restored. Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from events.clock import add_seconds
from events.models import LoadedModel, Model, ModelState
from events.types import Cause
from runtime.scheduler.actions import UnloadAutomatically
from runtime.scheduler.view import LoadView, SchedulerView

LOOK_S = 0.25
"""How often to look whether a busy model has become idle: nobody tells, as that would cost each inference."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A model that may be unloaded now: how many bytes that gives back, and when it was used last."""

    model: LoadedModel
    memory_bytes: int
    used_at: str


class Eviction:
    """The idle models that may be evicted now, and when there may be more."""

    def __init__(self, sight: SchedulerView) -> None:
        self._sight = sight
        self._resident_since = sight.ago(sight.policy.min_residency_s)

    @cached_property
    def victims(self) -> list[Victim]:
        """Return the models that may be evicted now, least recently used first.

        None that is busy or waited for, that loads or unloads, that is pinned, or that was loaded just now:
        two models that do not fit together take turns, rather than throw each other out all the time.
        """
        found = [
            Victim(model, run.memory_bytes, self._sight.used_at(model, run))
            for model, run in self._candidates
            if not run.busy and model.serving.loaded_at <= self._resident_since
        ]
        return sorted(found, key=lambda victim: (victim.used_at, victim.model.id))

    @cached_property
    def next_at(self) -> str | None:
        """When to look again for victims that cannot be had now, if there are any."""
        stamps = (model.serving.loaded_at for model, _ in self._candidates)
        oldest = min((stamp for stamp in stamps if stamp > self._resident_since), default=None)
        times = [add_seconds(oldest, self._sight.policy.min_residency_s)] if oldest is not None else []
        busy = (model for model, run in self._candidates if run.busy)
        if any(model.serving.loaded_at <= self._resident_since for model in busy):
            times.append(add_seconds(self._sight.now, LOOK_S))
        return min(times, default=None)

    def fewest(self, missing_bytes: int, missing_models: int = 0) -> tuple[Victim, ...] | None:
        """Return the fewest victims that give back enough; None if all of them do not."""
        if missing_bytes > self._all_bytes or missing_models > len(self.victims):
            return None
        return choose_fewest(self.victims, missing_bytes, missing_models)

    @cached_property
    def _all_bytes(self) -> int:
        return sum(victim.memory_bytes for victim in self.victims)

    @cached_property
    def _candidates(self) -> list[tuple[LoadedModel, LoadView]]:
        at_rest = self._sight.at_rest
        return [(model, run) for model, run in at_rest if not model.serving.parameters.pinned]


def choose_fewest(
    candidates: Sequence[Victim], missing_bytes: int, missing_models: int = 0
) -> tuple[Victim, ...] | None:
    """Return the fewest of `candidates` that give back enough; None if all of them do not.

    Args:
        candidates: least recently used first. Of two choices of equally many, the one is taken that has the
            least recently used in it that the other has not.
        missing_bytes: what they have to give back together.
        missing_models: how many of them there have to be at least.
    """
    rest = sorted(candidate.memory_bytes for candidate in candidates)
    sums = list(accumulate(reversed(rest), initial=0))
    number = max(bisect_left(sums, missing_bytes), missing_models)
    if number > len(candidates):
        return None
    chosen: list[Victim] = []
    for candidate in candidates:
        if len(chosen) == number:
            break
        del rest[bisect_left(rest, candidate.memory_bytes)]
        wanted = number - len(chosen) - 1
        largest = rest[len(rest) - wanted :]
        if len(largest) == wanted and candidate.memory_bytes + sum(largest) >= missing_bytes:
            chosen.append(candidate)
            missing_bytes -= candidate.memory_bytes
    return tuple(chosen)


@dataclass(frozen=True, slots=True)
class AutomaticUnload:
    """The next end to be requested; else when to look again, if ever."""

    action: UnloadAutomatically | None = None
    wake_at: str | None = None


def find_automatic_unload(sight: SchedulerView, eviction: Eviction) -> AutomaticUnload:
    """Find what is to be unloaded though nobody asks for it."""
    models = (model for model in sight.state.models.values() if _is_let_go(sight, model))
    let_go = next((loaded for model in models if (loaded := model.loaded) is not None), None)
    if let_go is not None:
        return AutomaticUnload(UnloadAutomatically(let_go, Cause.RESTART))
    times: list[str] = []
    for model, ends_at in _idle_ends(sight):
        if ends_at <= sight.now:
            return AutomaticUnload(UnloadAutomatically(model, Cause.IDLE))
        times.append(ends_at)
    missing = _outgrown(sight)
    if missing > 0:
        victims = eviction.fewest(missing) or eviction.victims
        if victims:
            return AutomaticUnload(UnloadAutomatically(victims[0].model, Cause.EVICTION))
        times += filter(None, [eviction.next_at])
    return AutomaticUnload(wake_at=min(times, default=None))


def _is_let_go(sight: SchedulerView, model: Model) -> bool:
    """Whether a model was lost with the server, and is not to come back."""
    lost = model.phase is ModelState.LOST and model.lost_by is Cause.RESTART
    return lost and not sight.policy.restores and not model.loads and not model.unloads


def _idle_ends(sight: SchedulerView) -> Iterator[tuple[LoadedModel, str]]:
    """Yield of the models that are unloaded when they are idle those that are first, and when that is.

    A busy one is looked at again when it can have been idle for long enough at the soonest.
    """
    first: dict[float, tuple[str, LoadedModel]] = {}
    for model, run in sight.at_rest:
        stays_s = _stays_s(sight, model, run)
        if stays_s is not None:
            since = sight.now if run.busy else max(run.last_used_at or "", model.serving.loaded_at)
            if stays_s not in first or since < first[stays_s][0]:
                first[stays_s] = since, model
    for stays_s, (since, model) in first.items():
        yield model, add_seconds(since, stays_s)


def _stays_s(sight: SchedulerView, model: LoadedModel, run: LoadView) -> float | None:
    """Return for how long a model stays without a request, from the end of the last; null is for ever.

    One that was not asked yet has at least the time that any model has: it was loaded for something.
    """
    keep_alive_s = model.serving.parameters.keep_alive_s
    if keep_alive_s is None or keep_alive_s < 0 or model.serving.parameters.pinned:
        return None
    if run.busy:
        return max(keep_alive_s, LOOK_S)
    return keep_alive_s if run.last_used_at is not None else max(keep_alive_s, sight.policy.min_residency_s)


def _outgrown(sight: SchedulerView) -> int:
    """Return by how many bytes the workers outgrew the budget, if idle ones are to make up for it."""
    if sight.free_bytes is None or not sight.policy.evicts:
        return 0
    return -sight.free_bytes - sight.coming_bytes
