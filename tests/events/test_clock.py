"""Timestamps, UUIDs, the ledger's clock, and the time by which deadlines run."""

import re
import time
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN, at

from events import clock
from events.clock import (
    SETTLED_S,
    STEP_S,
    LedgerClock,
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


def test_timestamp_has_six_digits_and_is_utc() -> None:
    there = timezone(timedelta(hours=2))
    for when, expected in (
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05.000000Z"),
        (datetime(1, 1, 1, tzinfo=UTC), "0001-01-01T00:00:00.000000Z"),
        (datetime(2026, 1, 1, 1, tzinfo=there), "2025-12-31T23:00:00.000000Z"),
    ):
        assert format_timestamp(when) == expected
    assert abs(utc_now().timestamp() - time.time()) < 60
    assert utc_now().tzinfo is UTC


@PLAIN
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_later_and_seconds_between_are_inverse(since: int, seconds: int) -> None:
    start = at(since)
    assert seconds_between(start, add_seconds(start, seconds)) == seconds
    assert add_seconds(add_seconds(start, seconds), -seconds) == start
    for beyond in (10**12, 2**63 - 1):
        assert add_seconds(start, beyond) == "9999-12-31T23:59:59.999999Z"


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


# The ledger's clock.

DAY = 86_400
Reading = tuple[float, float]
"""What CLOCK_BOOTTIME shows, and the wall clock, in seconds since the start."""


def read(*readings: Reading) -> tuple[list[float], list[tuple[float, float, bool]]]:
    """Return what the ledger's clock shows at these readings, and the steps that it reports, in seconds."""
    present = [(0.0, 0.0)]
    clock = LedgerClock(lambda: START + timedelta(seconds=present[0][1]), lambda: present[0][0])
    shown = []
    for present[0] in readings:
        shown.append((clock.now() - START).total_seconds())
    return shown, [(since(step.begin), since(step.end), step.is_taken) for step in clock.steps]


def since(timestamp: str) -> float:
    return seconds_between(format_timestamp(START), timestamp)


CLOCKS: dict[str, tuple[list[Reading], list[float], list[tuple[float, float, bool]]]] = {
    "even": ([(1, 1), (50, 50), (DAY, DAY)], [1, 50, DAY], []),
    "slewed": ([(100, 130), (200, 170)], [130, 170], []),
    "suspended": ([(DAY, DAY), (9 * DAY, 9 * DAY)], [DAY, 9 * DAY], []),
    "a year ahead for a second": ([(10, 365 * DAY), (11, 11)], [10, 11], [(10, 365 * DAY, False)]),
    "set forward for good": (
        [(10, DAY), (69, DAY + 59), (70, DAY + 60), (71, DAY + 61)],
        [10, 69, DAY + 60, DAY + 61],
        [(70, DAY + 60, True)],
    ),
    "set forward twice": (
        [(10, DAY), (60, 9 * DAY), (100, 9 * DAY + 40), (120, 9 * DAY + 60)],
        [10, 60, 100, 9 * DAY + 60],
        [(10, DAY, False), (120, 9 * DAY + 60, True)],
    ),
    "set back": ([(10, -DAY), (11, 1 - DAY)], [-DAY, 1 - DAY], [(10, -DAY, True)]),
    "beyond the calendar": ([(1e15, 1)], [1], [(since("9999-12-31T23:59:59.999999Z"), 1, True)]),
}
"""Readings -> what the ledger's clock shows at each, and the steps that it reports."""


@pytest.mark.parametrize(("readings", "shown", "steps"), CLOCKS.values(), ids=CLOCKS)
def test_ledger_clock_follows_wall_clock_that_stands(
    readings: list[Reading], shown: list[float], steps: list[tuple[float, float, bool]]
) -> None:
    assert read(*readings) == (shown, steps)


def test_ledger_clock_reports_withdrawn_steps_once_a_minute() -> None:
    wrong = [(at_s, DAY if at_s % 2 else at_s) for at_s in range(1, 130)]
    shown, steps = read(*wrong)
    assert shown == [at_s for at_s, _ in wrong]
    assert len(steps) == 3


READINGS = st.lists(
    st.tuples(st.floats(0, 3_000), st.integers(-(10**9), 10**9) | st.just(0)), min_size=1, max_size=40
)
"""Seconds that pass by CLOCK_BOOTTIME, and by which the wall clock then differs from it."""


@PLAIN
@given(READINGS)
def test_ledger_clock_jumps_ahead_only_to_time_that_stood(readings: list[tuple[float, int]]) -> None:
    passed, walls = 0.0, []
    for seconds, wrong_s in readings:
        passed += seconds
        walls.append((passed, passed + wrong_s))
    shown, _ = read(*walls)
    for number, ((passed, wall), now) in enumerate(zip(walls, shown, strict=True)):
        before = (0.0, 0.0) if number == 0 else (walls[number - 1][0], shown[number - 1])
        jumped_s = now - before[1] - (passed - before[0])
        if jumped_s > STEP_S + 1e-5:
            assert now == pytest.approx(wall)
            stood = [
                each for each in walls[: number + 1] if abs(each[1] - wall - each[0] + passed) <= STEP_S + 1
            ]
            assert any(passed - each[0] >= SETTLED_S for each in stood)


@PLAIN
@given(st.lists(st.tuples(st.integers(0, 3_000), st.integers(-(10**6), 10**6)), min_size=1, max_size=30))
def test_deadline_passes_when_its_seconds_have_passed(groups: list[tuple[int, int]]) -> None:
    """Whatever the recorded times are: those of a clock that was set, or that stand."""
    passed = [0.0]
    ledger_clock = LedgerClock(lambda: START, lambda: passed[0])
    ledger_clock.start_monotonic(at(0))
    folded = []
    for position, (pause_s, recorded_s) in enumerate(groups, 1):
        passed[0] += pause_s
        ledger_clock.note(position, at(recorded_s))
        folded.append((position, passed[0], at(recorded_s)))
    for position, folded_s, recorded_at in folded:
        deadline_at = ledger_clock.to_monotonic(add_seconds(recorded_at, 300), position)
        left_s = seconds_between(ledger_clock.monotonic_now(), deadline_at)
        assert left_s == pytest.approx(folded_s + 300 - passed[0], abs=0.06)


def test_ledger_clock_keeps_latest_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_MAX_OFFSETS", 2_000)
    passed = [0.0]
    ledger_clock = LedgerClock(lambda: START, lambda: passed[0])
    ledger_clock.start_monotonic(at(0))
    for position in range(1, 2_010):
        passed[0] += 1
        ledger_clock.note(position, at(0))
    assert [ledger_clock.to_monotonic(at(0), position) for position in (2_009, 1_500, 1)] == [
        at(2_009), at(1_500), at(0),
    ]  # fmt: skip
