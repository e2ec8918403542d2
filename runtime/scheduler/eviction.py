"""Which models the server unloads: victims of a load that needs room, and automatic unloads.

Victims are the fewest idle models that release enough, least recently used first. Automatic unloads are idle
timeouts, workers that outgrew the budget, and lost models that are not restored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from events.clock import add_seconds
from events.models import LoadedModel, Model, ModelState
from events.types import Cause
from runtime.rooms import MACHINE
from runtime.scheduler.actions import Decision, UnloadAutomatically
from runtime.scheduler.view import Amount, LoadRoom, LoadView, SchedulerView

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
        self._victims: dict[LoadRoom, list[Victim]] = {}
        self._all_bytes: dict[LoadRoom, int] = {}
        self._resident_since = view.earlier_by(view.policy.min_residency_s)

    def victims_in(self, room: LoadRoom) -> list[Victim]:
        """Return the models that may be evicted now from a room, least recently used first.

        Not those that are busy, pinned, or loaded less than the minimum residency ago: so two models that do
        not fit together take turns instead of evicting each other all the time.
        """
        if room not in self._victims:
            found = [
                Victim(model, room.bytes_of(run), self._view.used_at(model, run))
                for model, run in self._candidates
                if room.name in run.taken
                and not run.busy
                and self._view.loaded_at(model) <= self._resident_since
            ]
            self._victims[room] = sorted(found, key=lambda victim: (victim.used_at, victim.model.id))
        return self._victims[room]

    @cached_property
    def next_at(self) -> str | None:
        """When to look for victims again, or None if there will be no others."""
        loaded_at = (self._view.loaded_at(model) for model, _ in self._candidates)
        oldest = min((at for at in loaded_at if at > self._resident_since), default=None)
        times = [add_seconds(oldest, self._view.policy.min_residency_s)] if oldest is not None else []
        busy = (model for model, run in self._candidates if run.busy)
        if any(self._view.loaded_at(model) <= self._resident_since for model in busy):
            times.append(add_seconds(self._view.now, IDLE_POLL_S))
        return min(times, default=None)

    def choose(self, missing: Mapping[LoadRoom, Amount]) -> tuple[Victim, ...] | None:
        """Return the fewest victims that release enough in each room, or None if all do not.

        Those in one room count for the next.
        """
        chosen: tuple[Victim, ...] = ()
        for room, amount in missing.items():
            more = self._choose_in(room, amount, {victim.model.id for victim in chosen})
            if more is None:
                return None
            chosen += more
        return chosen

    def _choose_in(
        self, room: LoadRoom, missing: Amount, chosen: Collection[str]
    ) -> tuple[Victim, ...] | None:
        victims = self.victims_in(room)
        if room not in self._all_bytes:
            self._all_bytes[room] = sum(victim.memory_bytes for victim in victims)
        if missing.bytes > self._all_bytes[room] or missing.models > len(victims):
            return None
        released = [victim.memory_bytes for victim in victims if victim.model.id in chosen]
        rest = [victim for victim in victims if victim.model.id not in chosen]
        return choose_fewest(rest, missing.bytes - sum(released), missing.models - len(released))

    @cached_property
    def _candidates(self) -> list[tuple[LoadedModel, LoadView]]:
        settled_models = self._view.settled_models
        return [(model, run) for model, run in settled_models if not model.serving.parameters.pinned]


def choose_fewest(
    candidates: Sequence[Victim], missing_bytes: int, missing_models: int = 0
) -> tuple[Victim, ...] | None:
    """Return the fewest of `candidates` that release enough, or None if all do not.

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
    for room, missing in _rooms_over_budget(view):
        victims = eviction.choose({room: missing}) or eviction.victims_in(room)
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
    """Return after how many idle seconds a model is unloaded, or None for never.

    A model without an inference yet stays at least for the minimum residency.
    """
    keep_alive_s = model.serving.parameters.keep_alive_s
    if keep_alive_s is None or keep_alive_s < 0 or model.serving.parameters.pinned:
        return None
    if run.busy:
        return max(keep_alive_s, IDLE_POLL_S)
    return keep_alive_s if run.last_used_at is not None else max(keep_alive_s, view.policy.min_residency_s)


def _rooms_over_budget(view: SchedulerView) -> Iterator[tuple[LoadRoom, Amount]]:
    """Yield the rooms whose workers outgrew the budget, and by how much, if eviction is on.

    Not while a load is measured in a room: nothing is to be released there meanwhile.
    """
    for room in map(view.find_room, (MACHINE, *view.policy.rooms)) if view.policy.evicts else ():
        if room.free_bytes is not None and room.measured_load is None:
            missing = Amount(-room.free_bytes - room.exiting_bytes)
            if not missing.is_none:
                yield room, missing
