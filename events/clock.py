"""Timestamps, ids, and the ledger's clock.

A timestamp is a string, `YYYY-MM-DDTHH:MM:SS.ffffffZ`: always six digits, always UTC, so text sorts as time.
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_right
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

Timestamp = str

_LAST = "9999-12-31T23:59:59.999999Z"


def format_timestamp(moment: datetime) -> Timestamp:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def parse_timestamp(timestamp: Timestamp) -> datetime:
    return datetime.fromisoformat(timestamp)


def add_seconds(timestamp: Timestamp, seconds: float) -> Timestamp:
    """Return the timestamp so many seconds later, at most the last one of the year 9999."""
    try:
        return format_timestamp(parse_timestamp(timestamp) + timedelta(seconds=seconds))
    except OverflowError:
        return _LAST


def seconds_between(earlier: Timestamp, later: Timestamp) -> float:
    """Return the seconds from one timestamp to another; negative if the second is earlier."""
    return (parse_timestamp(later) - parse_timestamp(earlier)).total_seconds()


def boottime() -> float:
    """Return CLOCK_BOOTTIME in seconds: it never steps, and counts suspends."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def utc_now() -> datetime:
    """Return the present moment."""
    return datetime.now(UTC)


STEP_S = 60.0
"""A wall clock that moved by more than this against CLOCK_BOOTTIME was set; NTP slews by less."""

SETTLED_S = 60.0
"""Seconds for which the time after a step forward must stand before the ledger follows it."""


_MIN_OFFSET_S = 0.05
"""Smaller differences are the duration of writing a group."""

_MAX_OFFSETS = 200_000
"""Kept differences: while times stand, one each 0.05 s at most, for longer than any deadline of a load."""


class ClockStep(NamedTuple):
    """A step of the wall clock: the time before, the time after, and whether the ledger follows it."""

    begin: Timestamp
    end: Timestamp
    is_taken: bool


class LedgerClock:
    """The wall clock, as far as it is right, and a monotonic time for deadlines and back-offs.

    The ledger follows a step of the wall clock forward once the new time has stood for a minute. Until then
    the old time goes on by CLOCK_BOOTTIME, which counts suspends too. So a clock that is wrong for a moment
    leaves no future time in the ledger, for which all later events would have to wait. A step back is
    followed at once: the writer never records an earlier time than the last, and so repeats it until the
    clock catches up.

    The monotonic time begins with the ledger's and advances with CLOCK_BOOTTIME alone, without pauses and
    steps. Each group of events is noted with the difference to its recorded time. So a deadline that was
    computed from recorded times passes when its seconds have passed since its event was folded.

    Args:
        wall: the wall clock.
        boottime: CLOCK_BOOTTIME in seconds.

    Attributes:
        steps: the steps that were taken or withdrawn, to be recorded; at most one withdrawn step a minute.
    """

    def __init__(
        self, wall: Callable[[], datetime] = utc_now, boottime: Callable[[], float] = boottime
    ) -> None:
        self._wall = wall
        self._boottime = boottime
        self._trusted = self._start = wall(), boottime()
        self._doubted: tuple[datetime, float] | None = None
        self._withdrawn_s = float("-inf")
        self._offsets_s: list[tuple[int, float]] = []
        self.steps: list[ClockStep] = []

    def now(self) -> datetime:
        """Return the present moment, as the ledger records it."""
        wall, now_s = self._wall(), self._boottime()
        expected = _advance(self._trusted, now_s)
        ahead_s = (wall - expected).total_seconds()
        if self._doubted is not None:
            apart_s = abs((wall - _advance(self._doubted, now_s)).total_seconds())
            if ahead_s <= STEP_S or apart_s > STEP_S:
                self._withdraw(*self._doubted, now_s)
        if ahead_s > STEP_S:
            self._doubted = self._doubted or (wall, now_s)
            if now_s - self._doubted[1] < SETTLED_S:
                return expected
        if abs(ahead_s) > STEP_S:
            self.steps.append(ClockStep(format_timestamp(expected), format_timestamp(wall), is_taken=True))
        self._trusted, self._doubted = (wall, now_s), None
        return wall

    def start_monotonic(self, now: Timestamp) -> None:
        """Begin the monotonic time at the ledger's; earlier events have no difference."""
        self._start = parse_timestamp(now), self._boottime()

    def monotonic_now(self) -> Timestamp:
        """Return the present moment in monotonic time."""
        return format_timestamp(_advance(self._start, self._boottime()))

    def note(self, position: int, recorded_at: Timestamp) -> None:
        """Note that the events from `position` on, recorded at this time, were folded just now."""
        offset_s = seconds_between(recorded_at, self.monotonic_now())
        if abs(offset_s - self._offset_s(position)) > _MIN_OFFSET_S:
            self._offsets_s.append((position, offset_s))
        if len(self._offsets_s) > _MAX_OFFSETS:
            del self._offsets_s[: _MAX_OFFSETS // 2]

    def to_monotonic(self, recorded_at: Timestamp, position: int | None) -> Timestamp:
        """Return a time recorded at `position`, or computed from such a time, as a monotonic time."""
        offset_s = self._offset_s(position or 0)
        return add_seconds(recorded_at, offset_s) if offset_s else recorded_at

    def _offset_s(self, position: int) -> float:
        """Return how far monotonic time was ahead when the event at `position` was folded."""
        found = bisect_right(self._offsets_s, (position, math.inf))
        return self._offsets_s[found - 1][1] if found else 0.0

    def _withdraw(self, wall: datetime, since_s: float, now_s: float) -> None:
        """Forget a new time that stood for less than a minute, and report the step as withdrawn."""
        self._doubted = None
        if now_s - self._withdrawn_s >= SETTLED_S:
            begin = format_timestamp(_advance(self._trusted, since_s))
            self.steps.append(ClockStep(begin, format_timestamp(wall), is_taken=False))
            self._withdrawn_s = now_s


def _advance(reading: tuple[datetime, float], now_s: float) -> datetime:
    """Return the moment that an evenly running clock shows at `now_s`, after an earlier reading."""
    moment, at_s = reading
    try:
        return moment + timedelta(seconds=now_s - at_s)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def uuid7() -> str:
    """Return a new UUID of version 7 (RFC 9562): 48 bits of milliseconds, then randomness.

    The standard library has one from Python 3.14 on.
    """
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
