"""Times and durations as people type them."""

import re
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clients import run_command

from events.sqlite.timetravel import parse_time
from loadledger.cli.times import ACCEPTED, parse_duration, parse_moment

BERLIN, NEW_YORK, KATHMANDU = map(ZoneInfo, ("Europe/Berlin", "America/New_York", "Asia/Kathmandu"))
SANTIAGO = ZoneInfo("America/Santiago")
ZONES = [BERLIN, NEW_YORK, KATHMANDU, SANTIAGO, UTC]
NOW = datetime(2026, 11, 20, 13, 2, 3, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

READ: list[tuple[str, tzinfo, str, str | None]] = [
    # text, zone, in UTC, local time of the note
    ("8", BERLIN, "8", None),
    ("0004", BERLIN, "0004", None),
    ("10m", BERLIN, "2026-11-20T12:52:03Z", "2026-11-20 13:52:03 +01:00"),
    ("2H", BERLIN, "2026-11-20T11:02:03Z", "2026-11-20 12:02:03 +01:00"),
    ("3d", KATHMANDU, "2026-11-17T13:02:03Z", "2026-11-17 18:47:03 +05:45"),
    ("30d", BERLIN, "2026-10-21T13:02:03Z", "2026-10-21 15:02:03 +02:00"),
    ("now", BERLIN, "2026-11-20T13:02:03Z", "2026-11-20 14:02:03 +01:00"),
    ("today", BERLIN, "2026-11-19T23:00:00Z", "2026-11-20 00:00:00 +01:00"),
    ("Yesterday", NEW_YORK, "2026-11-19T05:00:00Z", "2026-11-19 00:00:00 -05:00"),
    ("14:02", BERLIN, "2026-11-20T13:02:00Z", "2026-11-20 14:02:00 +01:00"),
    ("9:05", BERLIN, "2026-11-20T08:05:00Z", "2026-11-20 09:05:00 +01:00"),
    ("23:30-11:00", BERLIN, "2026-11-21T10:30:00Z", None),
    ("2026-11-20", NEW_YORK, "2026-11-20T05:00:00Z", "2026-11-20 00:00:00 -05:00"),
    ("2026-11-20 14:02", BERLIN, "2026-11-20T13:02:00Z", "2026-11-20 14:02:00 +01:00"),
    ("2026-11-20T14:02", KATHMANDU, "2026-11-20T08:17:00Z", "2026-11-20 14:02:00 +05:45"),
    ("2026-11-20T14:02:00.25", UTC, "2026-11-20T14:02:00.250000Z", "2026-11-20 14:02:00 +00:00"),
    ("2026-11-20 14:02Z", BERLIN, "2026-11-20T14:02:00Z", None),
    ("2026-11-20t14:02:00z", BERLIN, "2026-11-20T14:02:00Z", None),
    ("2026-11-20T14:02:00.1234569+01:00", BERLIN, "2026-11-20T13:02:00.123456Z", None),
    # the clocks go forward: 2:30 does not exist, nor that midnight
    ("2026-03-29 02:30", BERLIN, "2026-03-29T01:30:00Z", "2026-03-29 03:30:00 +02:00"),
    ("2026-09-06", SANTIAGO, "2026-09-06T04:00:00Z", "2026-09-06 01:00:00 -03:00"),
    # the clocks go back: 2:30 comes twice
    ("2026-10-25 02:30", BERLIN, "2026-10-25T00:30:00Z", "2026-10-25 02:30:00 +02:00"),
    # the ends of the calendar
    ("0001-01-01", BERLIN, "0001-01-01T23:06:32Z", "0001-01-02 00:00:00 +00:53:28"),
    ("0001-01-01T00:00:00+10:00", BERLIN, "0001-01-01T14:00:00Z", None),
    ("9999-12-31 23:59", NEW_YORK, "9999-12-30T05:00:00Z", "9999-12-30 00:00:00 -05:00"),
    ("9999-12-31T23:59:59Z", NEW_YORK, "9999-12-30T00:00:00Z", None),
    ("999999999w", UTC, "0001-01-02T00:00:00Z", "0001-01-02 00:00:00 +00:00"),
]
NO_TIMES = (
    "",
    "last tuesday",
    "noon",
    "-5",
    "0m",
    "10 m",
    "2026-13-01",
    "2026-02-30",
    "25:00",
    "14:2",
    "1e3",
)


@pytest.mark.parametrize(("text", "zone", "moment", "local"), READ)
def test_time_as_people_say_it_is_read_in_zone(
    text: str, zone: tzinfo, moment: str, local: str | None
) -> None:
    assert parse_moment(text, NOW, zone) == (moment, local)


@pytest.mark.parametrize("text", NO_TIMES)
def test_text_that_is_no_time_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"Must be 10m, 2h or 3d \(ago\), now, .*, or a position"):
        parse_moment(text, NOW, BERLIN)


@given(st.text(max_size=20) | st.from_regex(r"[0-9:TZ+ .wdhms-]{1,30}", fullmatch=True))
def test_any_text_is_a_moment_or_refused(text: str) -> None:
    try:
        moment, _ = parse_moment(text, NOW, BERLIN)
    except ValueError as refusal:
        assert str(refusal) == ACCEPTED  # noqa: PT017 - most texts raise nothing else
    else:
        assert moment == text or parse_time(f"{moment[:19]}Z")


@given(
    st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)),  # noqa: DTZ001 - local
    st.sampled_from(ZONES),
)
def test_local_time_is_the_same_in_utc(local: datetime, zone: tzinfo) -> None:
    moment, shown = parse_moment(local.isoformat(), NOW, zone)
    assert datetime.fromisoformat(moment) - EPOCH == local.replace(tzinfo=zone, fold=0) - EPOCH
    assert shown is not None


@pytest.mark.parametrize("name", ["Europe/Berlin", "America/New_York", "Asia/Kathmandu", "UTC"])
def test_zone_of_the_system_reads_as_the_same_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", name)
    time.tzset()
    try:
        for text in [text for text, *_ in READ if text[:4] not in {"0001", "9999"}]:
            assert parse_moment(text, NOW) == parse_moment(text, NOW, ZoneInfo(name)), text
        for text in ("0001-01-01", "9999-12-31 23:59", "9999999d"):
            assert parse_time(f"{parse_moment(text, NOW)[0][:19]}Z")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_durations_are_seconds_of_each_unit() -> None:
    expected = {"1s": 1, "90s": 90, "30m": 1800, "12h": 43_200, "7d": 604_800, "2w": 1_209_600}
    assert {text: parse_duration(text) for text in expected} == expected
    for text in ("", "0h", "12", "1 week", "h", "1.5h", "-1d", "1y", "1h30m", " 1h", "now", "\u0661h"):
        with pytest.raises(ValueError, match="Must be a duration like 90s, 30m, 12h"):
            parse_duration(text)


def test_note_says_once_how_a_time_was_read(data: Path) -> None:
    until = "2099-01-01T00:00:00Z"
    listed = run_command("events", "--data", data, "--since", "10m", "--until", until, TZ="Europe/Berlin")
    assert listed.exit_code == 0
    [note] = listed.stderr.splitlines()
    assert re.fullmatch(r"loadledger: 10m is \d{4}-\d\d-\d\d [\d:]{8} [+-][\d:]+ \([\dT:-]+Z\)", note)
    then = datetime.fromisoformat(note.partition("(")[2].rstrip(")"))
    assert timedelta(minutes=9) < datetime.now(UTC) - then < timedelta(minutes=11)
