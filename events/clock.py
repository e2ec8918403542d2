"""Times and ids as the ledger writes them. Only the two defaults at the end look at the world."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta

_LAST = "9999-12-31T23:59:59.999999Z"


def stamp(moment: datetime) -> str:
    """Return `YYYY-MM-DDTHH:MM:SS.ffffffZ`: always six digits, always UTC, so that text sorts as time."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def moment(text: str) -> datetime:
    """Return the moment that `stamp` wrote."""
    return datetime.fromisoformat(text)


def later(text: str, seconds: float) -> str:
    """Return the stamp `seconds` after the stamp `text`; past the year 9999 it is the last there is."""
    try:
        return stamp(moment(text) + timedelta(seconds=seconds))
    except OverflowError:
        return _LAST


def seconds_between(earlier: str, later_one: str) -> float:
    """Return the seconds from one stamp to another; negative if they are the other way round."""
    return (moment(later_one) - moment(earlier)).total_seconds()


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
