"""The inferences of each model since the server started, over all its loads: what the metrics count.

The statistics of a load begin at nothing with it. When it ends they are added to those of the model's earlier
loads, so that no count goes back when a model is unloaded or swapped.
"""

from __future__ import annotations

from collections.abc import Iterable

from events.series import Names
from runtime.live import LiveLoad
from runtime.statistics import Statistics


class Totals:
    """What became of the inferences of all loads that have ended.

    Args:
        names: which models are told apart.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._ended: dict[str, Statistics] = {}

    def end(self, load: LiveLoad) -> None:
        """Add a load that is over; what a request still has to say of it is added, too. May be repeated."""
        sum_ = self._ended.setdefault(self._names.of(load.model_id), Statistics())
        if load.statistics is not sum_:
            sum_.add(load.statistics)
            load.statistics = sum_

    def with_live(self, live: Iterable[LiveLoad]) -> dict[str, Statistics]:
        """Return the sums by label, of the loads that have ended and of these, each given once."""
        sums = {name: ended.copy() for name, ended in self._ended.items()}
        for load in live:
            name = self._names.of(load.model_id)
            if load.statistics is not self._ended.get(name):
                sums.setdefault(name, Statistics()).add(load.statistics)
        return sums
