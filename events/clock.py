"""Timestamps, ids and the steady clock of the ledger.

A timestamp is a string, `YYYY-MM-DDTHH:MM:SS.ffffffZ`: always six digits, always UTC, so text sorts as time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

Timestamp = str

_LAST = "9999-12-31T23:59:59.999999Z"


def format_timestamp(moment: datetime) -> Timestamp:
    """Return the timestamp of a moment."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def parse_timestamp(timestamp: Timestamp) -> datetime:
    """Return the moment of a timestamp."""
    return datetime.fromisoformat(timestamp)


def add_seconds(timestamp: Timestamp, seconds: float) -> Timestamp:
    """Return the timestamp so many seconds later; past the year 9999 the last one there is."""
    try:
        return format_timestamp(parse_timestamp(timestamp) + timedelta(seconds=seconds))
    except OverflowError:
        return _LAST


def seconds_between(earlier: Timestamp, later: Timestamp) -> float:
    """Return the seconds from one timestamp to another; negative if the second is earlier."""
    return (parse_timestamp(later) - parse_timestamp(earlier)).total_seconds()


class SteadyClock:
    """The wall clock, except that it advances by the monotonic clock when the wall clock is set back.

    So deadlines and back-offs pass, whatever happens to the machine's clock.
    """

    def __init__(self, wall: Callable[[], datetime], monotonic: Callable[[], float]) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._latest = wall()
        self._latest_s = monotonic()

    def __call__(self) -> datetime:
        """Return the present moment."""
        now_s = self._monotonic()
        passed = timedelta(seconds=now_s - self._latest_s)
        self._latest, self._latest_s = max(self._wall(), self._latest + passed), now_s
        return self._latest

    def start_after(self, moment_before: datetime) -> None:
        """Continue from `moment_before` if the clock is earlier: recorded events lie in the past."""
        self._latest = max(self._latest, moment_before)


def utc_now() -> datetime:
    """Return the present moment."""
    return datetime.now(UTC)


def uuid7() -> str:
    """Return a new UUID of version 7 (RFC 9562): 48 bits of milliseconds, then randomness.

    The standard library has one from Python 3.14 on.
    """
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
