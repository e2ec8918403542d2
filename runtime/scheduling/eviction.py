"""Which idle models make room: the fewest that are enough, and of those the least recently used. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from events.clock import later
from events.models import Model
from runtime.scheduling.sight import Running, Sight

LOOK_S = 0.25
"""How often to look whether a busy model has become idle: nobody tells, as that would cost each inference."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A model that may be unloaded now: how many bytes that gives back, and when it was used last."""

    model: Model
    memory_bytes: int
    used_at: str


class Eviction:
    """The idle models that may be evicted now, and when there may be more."""

    def __init__(self, sight: Sight) -> None:
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
            if not run.busy and loaded_at(model) <= self._resident_since
        ]
        return sorted(found, key=lambda victim: (victim.used_at, victim.model.id))

    @cached_property
    def next_at(self) -> str | None:
        """When to look again for victims that cannot be had now, if there are any."""
        stamps = (loaded_at(model) for model, _ in self._candidates)
        oldest = min((stamp for stamp in stamps if stamp > self._resident_since), default=None)
        times = [later(oldest, self._sight.policy.min_residency_s)] if oldest is not None else []
        if any(run.busy and loaded_at(model) <= self._resident_since for model, run in self._candidates):
            times.append(later(self._sight.now, LOOK_S))
        return min(times, default=None)

    def fewest(self, missing_bytes: int, missing_models: int = 0) -> tuple[Victim, ...] | None:
        """Return the fewest victims that give back enough; None if all of them do not."""
        if missing_bytes > self._all_bytes or missing_models > len(self.victims):
            return None
        return fewest(self.victims, missing_bytes, missing_models)

    @cached_property
    def _all_bytes(self) -> int:
        return sum(victim.memory_bytes for victim in self.victims)

    @cached_property
    def _candidates(self) -> list[tuple[Model, Running]]:
        return [(model, run) for model, run in self._sight.at_rest if not _is_pinned(model)]


def fewest(
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


def loaded_at(model: Model) -> str:
    """Return when a model that serves was loaded, by whomever."""
    assert model.serving is not None
    return model.serving.loaded_at


def _is_pinned(model: Model) -> bool:
    assert model.serving is not None
    return model.serving.parameters.pinned
