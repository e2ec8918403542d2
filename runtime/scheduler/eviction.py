"""Which models the server unloads: victims of a load that needs room, and automatic unloads.

Victims are idle models, those first whose stay saves the least time of loads. Where inferences bring models
back, a load that has waited for a turn also evicts busy models whose own turn is over. Automatic unloads are
idle timeouts, workers that outgrew the budget, and lost models that are not restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import floor, log2

from events.clock import add_seconds, seconds_between
from events.models import LoadedModel, Model, ModelState
from events.types import Cause
from runtime.rooms import MACHINE
from runtime.scheduler.actions import Decision, UnloadAutomatically
from runtime.scheduler.view import Amount, LoadRoom, LoadView, SchedulerView, rank_of

IDLE_POLL_S = 0.25
"""How often to check whether a busy model is idle. A notification would cost time in each inference."""

TURN_S = 10.0
"""Shortest turn of a busy model, and how long a load waits before one gives way to it. With shorter turns
clients would wait less, but each change costs a load."""

LOADS_PER_TURN = 2
"""Shortest turn of a busy model in lengths of its load: so at most a third of the time goes into loads."""

_SHORTEST_S = 0.001
"""Least duration of a load, and time until the next use, for the value of a model."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A model that may be evicted, and the bytes that this releases."""

    model: LoadedModel
    memory_bytes: int


class Eviction:
    """The models that may be evicted now, and when there may be more.

    Attributes:
        turn_s: the shortest turn of a busy model, and how long a load waits for the end of one.
    """

    def __init__(self, view: SchedulerView) -> None:
        self._view = view
        self._idle: dict[tuple[LoadRoom, bool], list[Victim]] = {}
        self._busy: dict[tuple[LoadRoom, int], list[Victim]] = {}
        self._all_bytes: dict[tuple[LoadRoom, int | None], int] = {}
        self._resident_since = view.earlier_by(view.policy.min_residency_s)
        self.turn_s = max(TURN_S, view.policy.min_residency_s)

    def idle_in(self, room: LoadRoom, *, by_bytes: bool = True) -> list[Victim]:
        """Return the idle models that may be evicted now from a room, those of the least value first.

        Not those that are pinned, or loaded less than the minimum residency ago.

        Args:
            room: the room.
            by_bytes: whether the room lacks bytes, so that a model of more bytes has less value.
        """
        if (room, by_bytes) not in self._idle:
            found = [
                (self._value_of(model, run, room.bytes_of(run) if by_bytes else 1), model, run)
                for model, run in self._candidates
                if room.name in run.taken
                and not run.busy
                and self._view.loaded_at(model) <= self._resident_since
            ]
            found.sort(key=lambda each: (each[0], -each[1].serving.position))
            self._idle[room, by_bytes] = [Victim(model, room.bytes_of(run)) for _, model, run in found]
        return self._idle[room, by_bytes]

    def _value_of(self, model: LoadedModel, run: LoadView, size: int) -> int:
        view = self._view
        idle_s = seconds_between(view.used_at(model, run), view.now)
        stay_s = max(seconds_between(view.loaded_at(model), view.now), _SHORTEST_S)
        usual_per_s = view.observations.requests_per_s.get(model.id, 0.0)
        return value_step(run.load_s, idle_s, max(usual_per_s, (run.requests - 1) / stay_s), size)

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

    def _busy_in(self, room: LoadRoom, rank: int) -> list[Victim]:
        """Return the busy models in a room whose turn is over, the longest turn first.

        Not those whose next load would start before a load of this rank, and take its room again.
        """
        if (room, rank) not in self._busy:
            found = [
                (self._view.loaded_at(model), model.serving.position, Victim(model, room.bytes_of(run)))
                for model, run in self._candidates
                if room.name in run.taken
                and run.busy
                and rank <= rank_of(model.serving.parameters)
                and self._is_turn_over(model, run)
            ]
            self._busy[room, rank] = [victim for *_, victim in sorted(found, key=lambda each: each[:2])]
        return self._busy[room, rank]

    def _is_turn_over(self, model: LoadedModel, run: LoadView) -> bool:
        turn_s = max(self.turn_s, LOADS_PER_TURN * run.load_s)
        return self._view.loaded_at(model) <= self._view.earlier_by(turn_s)

    def choose(self, missing: Mapping[LoadRoom, Amount], rank: int | None = None) -> list[Victim] | None:
        """Return victims that release enough in each room, or None if all do not.

        Those in one room count for the next. `rank` is that of a load which has waited for a turn: then busy
        models whose turn is over are victims after the idle ones.
        """
        chosen: list[Victim] = []
        for room, amount in missing.items():
            victims = self.idle_in(room, by_bytes=amount.bytes > 0)
            if rank is not None:
                victims = [*victims, *self._busy_in(room, rank)]
            if (room, rank) not in self._all_bytes:
                self._all_bytes[room, rank] = sum(victim.memory_bytes for victim in victims)
            if amount.bytes > self._all_bytes[room, rank] or amount.models > len(victims):
                return None  # many loads may wait
            names = {victim.model.id for victim in chosen}
            released = [victim.memory_bytes for victim in victims if victim.model.id in names]
            rest = [victim for victim in victims if victim.model.id not in names]
            more = choose_enough(rest, amount.bytes - sum(released), amount.models - len(released))
            if more is None:
                return None
            chosen += more
        return chosen

    @cached_property
    def _candidates(self) -> list[tuple[LoadedModel, LoadView]]:
        settled_models = self._view.settled_models
        return [(model, run) for model, run in settled_models if not model.serving.parameters.pinned]


def value_step(load_s: float, idle_s: float, requests_per_s: float, size: int) -> int:
    """Return the value of a model in memory: the loads that it saves per second, per byte, as a power of two.

    The time until its next use is expected to be that between requests, or that since the last one if this is
    longer. Models whose values differ by less than two are equal: of those the one that was loaded last goes
    first, so that of models in rotation most stay. docs/decisions/0084 compares other orders.

    Args:
        load_s: seconds that its load took.
        idle_s: seconds since its last use.
        requests_per_s: its rate of requests, 0 if unknown: the decayed one, or that since its load if this is
            higher, so that a model which is new, or in a burst, does not go first.
        size: the bytes that it takes, or 1 if only places are missing.
    """
    expected_s = max(idle_s, 1 / requests_per_s if requests_per_s else 0.0, _SHORTEST_S)
    return floor(log2(max(load_s, _SHORTEST_S) / expected_s / max(size, 1)))


def choose_enough(
    candidates: Iterable[Victim], missing_bytes: int, missing_models: int = 0
) -> list[Victim] | None:
    """Return the first candidates that release enough, without superfluous ones, or None if all do not.

    Args:
        candidates: those of the least value first.
        missing_bytes: bytes that they have to release together.
        missing_models: how many they have to be at least.
    """
    chosen: list[Victim] = []
    for candidate in candidates:
        if missing_bytes <= 0 and missing_models <= 0:
            break
        chosen.append(candidate)
        missing_bytes -= candidate.memory_bytes
        missing_models -= 1
    if missing_bytes > 0 or missing_models > 0:
        return None
    for candidate in chosen[::-1]:
        if missing_bytes + candidate.memory_bytes <= 0 and missing_models < 0:
            chosen.remove(candidate)
            missing_bytes += candidate.memory_bytes
            missing_models += 1
    return chosen


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
        victims = eviction.choose({room: missing}) or eviction.idle_in(room)
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
