"""Times and durations as people type them: `10m` (ago), yesterday, 14:02, in the user's or a given zone."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta, tzinfo

from loadledger.cli.output import print_note

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGO = re.compile(r"now|\d{1,9}[smhdw]", re.ASCII)
_DAYS_AGO = {"today": 0, "yesterday": 1}
_FIRST, _LAST = datetime(1, 1, 2), datetime(9999, 12, 30)  # noqa: DTZ001 - in any zone
"""Earlier and later times become these, which are within the years of UTC in each zone."""
ACCEPTED = (
    "Must be 10m, 2h or 3d (ago), now, today, yesterday, 14:02, 2026-11-20, '2026-11-20 14:02', a time with"
    " its zone like 2026-01-31T14:02:00Z, or a position."
)


def parse_duration(text: str) -> int:
    """Return the seconds of a duration like 12h; a ValueError describes valid ones."""
    length_s = int(text[:-1]) * _UNITS_S[text[-1]] if text != "now" and _AGO.fullmatch(text) else 0
    if not length_s:
        raise ValueError("Must be a duration like 90s, 30m, 12h, 7d or 2w.")
    return length_s


def read_moment(text: str) -> str:
    """Return a position or time in the server's form; print how a time without a zone was read."""
    moment, local = parse_moment(text, datetime.now(UTC))
    if local is not None:
        print_note(f"{text} is {local} ({moment[:19]}Z)")
    return moment


def parse_moment(text: str, now: datetime, zone: tzinfo | None = None) -> tuple[str, str | None]:
    """Return a position unchanged, or a time in UTC; for a time without a zone also the local time.

    A local time that a change of the clocks skips is moved forward; of two equal local times, the first one
    is meant. Local times are in `zone`; None is the system's.

    Raises:
        ValueError: the text is neither; the message names what is accepted.
    """
    if text.isascii() and text.isdecimal():
        return text, None
    plain = text.strip().lower()
    try:
        found = _find_time(plain, now, zone)
    except ValueError:
        raise ValueError(ACCEPTED) from None
    except OverflowError:  # too long ago
        found = _FIRST
    local = min(max(found.replace(tzinfo=None), _FIRST), _LAST).replace(tzinfo=found.tzinfo or zone)
    # `astimezone` would move a skipped time backward in the system's zone.
    utc = local.astimezone(UTC) if local.tzinfo else datetime.fromtimestamp(local.timestamp(), UTC)
    moment = f"{utc.replace(tzinfo=None).isoformat()}Z"
    if found.tzinfo is not None and not _AGO.fullmatch(plain):
        return moment, None
    shown = utc.astimezone(zone).isoformat(sep=" ", timespec="seconds")
    return moment, f"{shown[:19]} {shown[19:]}"


def _find_time(text: str, now: datetime, zone: tzinfo | None) -> datetime:
    """Return a local time of the zone, a time with its own zone, or the time a duration before now."""
    if _AGO.fullmatch(text):
        return now - timedelta(seconds=0 if text == "now" else parse_duration(text))
    here = now.astimezone(zone)
    if text in _DAYS_AGO:
        return datetime.combine(here - timedelta(days=_DAYS_AGO[text]), time())
    text = text.upper() if text[1:2] != ":" else f"0{text.upper()}"
    if text[2:3] != ":":
        return datetime.fromisoformat(text)
    clock = time.fromisoformat(text)
    return datetime.combine(here if clock.tzinfo is None else now.astimezone(clock.tzinfo), clock)
