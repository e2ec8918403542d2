"""What became of preparing models since the server started: counted for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from events.series import Histogram
from runtime.wire import Form

KEPT = "kept"
LEFT_OUT = "left_out"
STOPPED = "stopped"
"""It may be tried again: a load wanted the memory, the machine was not well, or the server ended."""
TOOK_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
"""From a model of some kilobytes to the longest that preparing one may take."""


class PreparingCounts:
    """The forms that were tried, by form and by what became of them, and the time that it took.

    Attributes:
        tried: forms that were tried, by form and outcome.
        took_s: how long preparing a model took, with all forms that were tried for it.
        dropped: forms that a load, or a worker that served from it, could do nothing with.
    """

    def __init__(self) -> None:
        self.tried = Counter[tuple[str, str]]()
        self.took_s = Histogram(TOOK_S)
        self.dropped = 0

    def count(self, tried: Mapping[Form, str], took_s: float) -> None:
        """Count a preparation that has ended; one that tried nothing took nothing worth telling."""
        if tried:
            self.tried.update(tried.items())
            self.took_s.observe(took_s)
