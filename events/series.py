"""What is counted for the metrics: histograms of durations, and for which models apart from the others.

Nothing here is ever counted down, and nothing grows with what clients send.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

OTHERS = "_others"
"""The label of all models that have none of their own; no model can be called that."""

MAX_OWN = 1000
"""Models that are told apart, some 30 lines of text each. Those that come first stay: a counter that moved
from one label to another would go back."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A histogram as it was at one moment.

    Attributes:
        bounds: the upper bounds of its buckets, in seconds, without the last one's, which has none.
        counts: of each bucket alone, one more than there are bounds.
        total_s: the sum of all that was observed.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total_s: float


class Histogram:
    """How often something took how long. To observe is a bisection and two additions."""

    __slots__ = ("_bounds", "_counts", "_total_s")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one that took so long; what is exactly a bound is within it."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total_s += seconds

    def observed(self) -> Observed:
        """Return what was observed until now."""
        return Observed(self._bounds, tuple(self._counts), self._total_s)


@dataclass(slots=True)
class Names:
    """The models that are told apart; once one is, or is not, that stays so."""

    most: int = MAX_OWN
    _own: set[str] = field(default_factory=set)

    def of(self, model_id: str) -> str:
        """Return the label of a model: its id, or `OTHERS`."""
        if model_id not in self._own:
            if len(self._own) >= self.most:
                return OTHERS
            self._own.add(model_id)
        return model_id
