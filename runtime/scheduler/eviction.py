"""Which models the server unloads: victims of a load that needs room, and automatic unloads.

Victims are the fewest idle models that release enough, least recently used first. Automatic unloads are idle
timeouts, workers that outgrew the budget, and lost models that are not restored.
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
from runtime.scheduler.actions import Decision, UnloadAutomatically
from runtime.scheduler.view import LoadView, SchedulerView

IDLE_POLL_S = 0.25
"""How often to check whether a busy model is idle. A notification would cost time in each inference."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A model that may be evicted: the bytes that this releases, and its last use."""

    model: LoadedModel
    memory_bytes: int
    used_at: str


class Eviction:
    """The models that may be evicted now, and when there may be more."""

    def __init__(self, view: SchedulerView) -> None:
        self._view = view
        self._resident_since = view.earlier_by(view.policy.min_residency_s)

    @cached_property
    def victims(self) -> list[Victim]:
        """The models that may be evicted now, least recently used first.

        Not those that are busy, pinned, or loaded less than the minimum residency ago: so two models that do
        not fit together take turns instead of evicting each other all the time.
        """
        found = [
            Victim(model, run.memory_bytes, self._view.used_at(model, run))
            for model, run in self._candidates
            if not run.busy and self._view.loaded_at(model) <= self._resident_since
        ]
        return sorted(found, key=lambda victim: (victim.used_at, victim.model.id))

    @cached_property
    def next_at(self) -> str | None:
        """When to look for victims again; None if there will be none."""
        loaded_at = (self._view.loaded_at(model) for model, _ in self._candidates)
        oldest = min((at for at in loaded_at if at > self._resident_since), default=None)
        times = [add_seconds(oldest, self._view.policy.min_residency_s)] if oldest is not None else []
        busy = (model for model, run in self._candidates if run.busy)
        if any(self._view.loaded_at(model) <= self._resident_since for model in busy):
            times.append(add_seconds(self._view.now, IDLE_POLL_S))
        return min(times, default=None)

    def choose(self, missing_bytes: int, missing_models: int = 0) -> tuple[Victim, ...] | None:
        """Return the fewest victims that release enough; None if all of them do not."""
        if missing_bytes > self._all_bytes or missing_models > len(self.victims):
            return None
        return choose_fewest(self.victims, missing_bytes, missing_models)

    @cached_property
    def _all_bytes(self) -> int:
        return sum(victim.memory_bytes for victim in self.victims)

    @cached_property
    def _candidates(self) -> list[tuple[LoadedModel, LoadView]]:
        settled_models = self._view.settled_models
        return [(model, run) for model, run in settled_models if not model.serving.parameters.pinned]


def choose_fewest(
    candidates: Sequence[Victim], missing_bytes: int, missing_models: int = 0
) -> tuple[Victim, ...] | None:
    """Return the fewest of `candidates` that release enough; None if all of them do not.

    Args:
        candidates: least recently used first. Of two choices of the same size, the one with the least
            recently used model that the other lacks is taken.
        missing_bytes: bytes that they have to release together.
        missing_models: how many they have to be at least.
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
        still_missing = number - len(chosen) - 1
        largest = rest[len(rest) - still_missing :]
        if len(largest) == still_missing and candidate.memory_bytes + sum(largest) >= missing_bytes:
            chosen.append(candidate)
            missing_bytes -= candidate.memory_bytes
    return tuple(chosen)


def find_automatic_unload(view: SchedulerView, eviction: Eviction) -> Decision:
    """Decide the next automatic unload: not restored, idle, or over budget."""
    models = (model for model in view.own.models.values() if _is_not_restored(view, model))
    not_restored = next((loaded for model in models if (loaded := model.loaded) is not None), None)
    if not_restored is not None:
        return Decision(UnloadAutomatically(not_restored, Cause.RESTART))
    times: list[str] = []
    for model, ends_at in _next_idle_timeouts(view):
        if ends_at <= view.now:
            return Decision(UnloadAutomatically(model, Cause.IDLE))
        times.append(ends_at)
    missing = _over_budget_bytes(view)
    if missing > 0:
        victims = eviction.choose(missing) or eviction.victims
        if victims:
            return Decision(UnloadAutomatically(victims[0].model, Cause.EVICTION))
        times += filter(None, [eviction.next_at])
    return Decision(wake_at=min(times, default=None))


def _is_not_restored(view: SchedulerView, model: Model) -> bool:
    """Whether a model was lost with the server and is not restored."""
    lost = model.phase is ModelState.LOST and model.lost_by is Cause.RESTART
    return lost and not view.policy.restores and not model.loads and not model.unloads


def _next_idle_timeouts(view: SchedulerView) -> Iterator[tuple[LoadedModel, str]]:
    """Yield, per length of idle timeout, the model whose timeout ends first, and when.

    For a busy model that is the earliest time at which it can have been idle for long enough.
    """
    first: dict[float, tuple[str, LoadedModel]] = {}
    for model, run in view.settled_models:
        timeout_s = _idle_timeout_s(view, model, run)
        if timeout_s is not None:
            since = view.now if run.busy else max(run.last_used_at or "", view.loaded_at(model))
            if timeout_s not in first or since < first[timeout_s][0]:
                first[timeout_s] = since, model
    for timeout_s, (since, model) in first.items():
        yield model, add_seconds(since, timeout_s)


def _idle_timeout_s(view: SchedulerView, model: LoadedModel, run: LoadView) -> float | None:
    """Return after how many idle seconds a model is unloaded; None is never.

    A model without an inference yet stays at least for the minimum residency.
    """
    keep_alive_s = model.serving.parameters.keep_alive_s
    if keep_alive_s is None or keep_alive_s < 0 or model.serving.parameters.pinned:
        return None
    if run.busy:
        return max(keep_alive_s, IDLE_POLL_S)
    return keep_alive_s if run.last_used_at is not None else max(keep_alive_s, view.policy.min_residency_s)


def _over_budget_bytes(view: SchedulerView) -> int:
    """Return by how many bytes the workers outgrew the budget, if eviction is on."""
    if view.free_bytes is None or not view.policy.evicts:
        return 0
    return -view.free_bytes - view.exiting_bytes
