"""Timestamps, UUIDs and the steady clock."""

import re
import time
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN, at

from events.clock import (
    SteadyClock,
    add_seconds,
    format_timestamp,
    parse_timestamp,
    seconds_between,
    utc_now,
    uuid7,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
MOMENTS = st.datetimes(timezones=st.just(UTC))


@PLAIN
@given(MOMENTS, MOMENTS)
def test_timestamps_read_back_and_sort_by_time(one: datetime, other: datetime) -> None:
    assert parse_timestamp(format_timestamp(one)) == one
    assert (format_timestamp(one) < format_timestamp(other)) == (one < other)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05.000000Z"),
        (datetime(1, 1, 1, tzinfo=UTC), "0001-01-01T00:00:00.000000Z"),
        (datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=2))), "2025-12-31T23:00:00.000000Z"),
    ],
)
def test_timestamp_has_six_digits_and_is_utc(when: datetime, expected: str) -> None:
    assert format_timestamp(when) == expected


@PLAIN
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_later_and_seconds_between_are_inverse(since: int, seconds: int) -> None:
    start = at(since)
    assert seconds_between(start, add_seconds(start, seconds)) == seconds
    assert add_seconds(add_seconds(start, seconds), -seconds) == start


@pytest.mark.parametrize("seconds", [10**12, 2**63 - 1])
def test_time_beyond_calendar_is_last_moment(seconds: int) -> None:
    assert add_seconds("2026-01-01T00:00:00.000000Z", seconds) == "9999-12-31T23:59:59.999999Z"


def test_utc_now_is_now() -> None:
    assert utc_now().tzinfo is UTC
    assert abs(utc_now().timestamp() - time.time()) < 60


def test_uuid7_sorts_by_time_and_is_unique() -> None:
    before_ms = time.time_ns() // 1_000_000
    found: list[str] = []
    while len({each[:13] for each in found}) < 5:
        found.append(uuid7())
    assert before_ms <= uuid.UUID(found[0]).int >> 80 <= time.time_ns() // 1_000_000
    assert len(set(found)) == len(found)
    assert [each[:13] for each in found] == sorted(each[:13] for each in found)
    for text in found:
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text)


def test_steady_clock_never_goes_back() -> None:
    wall, passed = [START], [0.0]
    clock = SteadyClock(lambda: wall[0], lambda: passed[0])
    wall[0], passed[0] = START - timedelta(days=1), 5.0
    assert clock() == START + timedelta(seconds=5)
    passed[0] = 7.5
    assert clock() == START + timedelta(seconds=7.5)
    wall[0] = START + timedelta(hours=1)
    assert clock() == START + timedelta(hours=1)
    clock.start_after(START + timedelta(days=1))
    clock.start_after(START)
    assert clock() == START + timedelta(days=1)
