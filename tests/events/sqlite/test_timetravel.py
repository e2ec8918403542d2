"""Time travel: jobs and states at a past position or time are what a fold up to there gives."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import FEWER, START, History, as_event, at, opened, write
from support.ledgers import copy_of, overwrite_pages, store_events
from support.strategies import drafts

from events.errors import Archived, LogUnavailable
from events.jobs import Job, JobStatus
from events.sqlite import storage
from events.sqlite.queries import JobQuery
from events.sqlite.schema import connect
from events.sqlite.snapshots import write_base_state
from events.sqlite.timetravel import (
    BeyondHead,
    InvalidMoment,
    Moment,
    job_at,
    jobs_at,
    moment_at,
    open_time_travel_reader,
    parse_time,
    state_at,
)
from events.state import State
from events.types import Event, LoadRequested, UnloadRequested

ALL = JobQuery()


@contextmanager
def ledger(events: list[Event], snapshots_at: frozenset[int] = frozenset()) -> Iterator[sqlite3.Connection]:
    with copy_of(b"") as path, closing(connect(path)) as connection:
        store_events(connection, events, snapshots_at)
        yield connection


def facts_of(state: State) -> tuple[object, ...]:
    return state.models, state.unended()


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Return histories in which each request has an id of its own, as the writer's have."""
    told = draw(st.lists(drafts(), max_size=30))
    asked, events = list[str](), []
    for number, draft in enumerate(told, 1):
        event_id = f"e{number}"
        if isinstance(draft.data, LoadRequested | UnloadRequested):
            job_id: str | None = event_id
            asked.append(event_id)
        else:
            job_id = draw(st.sampled_from([*asked, None]))
        events.append(as_event(replace(draft, id=event_id, job_id=job_id), number, number))
    return events


@FEWER
@given(histories(), st.frozensets(st.integers(1, 30), max_size=3))
def test_past_jobs_are_what_a_fold_gives(events: list[Event], snapshots_at: frozenset[int]) -> None:
    with ledger(events, snapshots_at) as connection:
        state, jobs = State(), dict[str, Job]()
        for event in [None, *events]:
            if event is not None:
                jobs.update(state.apply(event).jobs)
            then = sorted(jobs.values(), key=lambda job: -job.created_position)
            assert jobs_at(connection, state.position, ALL) == then
            for status in JobStatus:
                found = jobs_at(connection, state.position, JobQuery(status=status, model_id="m"))
                assert found == [job for job in then if job.status is status and job.model_id == "m"]
            for job_id in (each.id for each in events if each.id == each.job_id):
                assert job_at(connection, state.position, job_id) == jobs.get(job_id)


@pytest.mark.parametrize("status", [None, *JobStatus])
def test_page_of_past_jobs_begins_at_its_cursor(status: JobStatus | None) -> None:
    history = History()
    for number in range(4):
        history.load(f"L{number}", of=f"m{number}")
    for number in range(4, 8):
        history.ask_load(f"L{number}", of=f"m{number}")
    at_end = history.state.position
    history.restart()
    for number in range(4, 8):
        history.fail_load(f"L{number}", of=f"m{number}")
    for number in range(8, 11):
        history.ask_load(f"L{number}", of=f"m{number}")
    with ledger(history.facts) as connection:
        whole = jobs_at(connection, at_end, JobQuery(status=status))
        assert len(whole) == {None: 8, JobStatus.COMPLETED: 4, JobStatus.PENDING: 4}.get(status, 0)
        assert jobs_at(connection, at_end, JobQuery(status=status, limit=2)) == whole[:2]
        for cut in range(len(whole)):
            after_it = JobQuery(whole[cut].created_position, status=status, limit=2)
            assert jobs_at(connection, at_end, after_it) == whole[cut + 1 :][:2]


# Moments.


def test_time_means_the_last_event_recorded_by_then() -> None:
    history = History()
    history.restart()  # at 1 s
    history.load("L")  # at 2, 3, 4 s
    history.add(history.facts[0].data, None, of=None, after_s=0)
    with ledger(history.facts) as connection:
        expected = {0.5: 0, 1: 1, 1.5: 1, 2: 2, 3.999999: 3, 4: 5, 100: 5}
        for seconds, position in expected.items():
            found = moment_at(connection, at(seconds))
            assert found.position == position, seconds
            assert found.recorded_at == (history.facts[position - 1].recorded_at if position else None)
        assert moment_at(connection, "0") == Moment(0, None)
        assert moment_at(connection, "0004") == Moment(4, at(4))
        with pytest.raises(BeyondHead):
            moment_at(connection, "6")


TIMES = {
    "2026-01-31T14:02:00Z": "2026-01-31T14:02:00.000000Z",
    "2026-01-31t14:02:00z": "2026-01-31T14:02:00.000000Z",
    "2026-01-31 14:02:00Z": "2026-01-31T14:02:00.000000Z",
    "2026-01-31T14:02:00.5Z": "2026-01-31T14:02:00.500000Z",
    "2026-01-31T14:02:00.1234569Z": "2026-01-31T14:02:00.123456Z",
    "2026-01-31T14:02:00+01:00": "2026-01-31T13:02:00.000000Z",
    "2026-01-31T14:02:00 01:00": "2026-01-31T13:02:00.000000Z",
    "2026-01-31T14:02:00-03:30": "2026-01-31T17:32:00.000000Z",
    "2026-01-31T14:02:00-00:00": "2026-01-31T14:02:00.000000Z",
}
NO_TIMES = (
    "", "noon", "2026-01-31", "2026-01-31T14:02:00", "2026-01-31T14:02Z", "2026-W05-6T14:02:00Z",
    "20260131T140200Z", "2026-02-30T00:00:00Z", "2026-01-31T25:00:00Z", "0001-01-01T00:00:00+10:00",
    "9999-12-31T23:59:59-10:00", "2026-01-31T14:02:00,5Z", "2026-01-31T14:02:00Z\n",
)  # fmt: skip


def test_times_of_rfc_3339_are_parsed() -> None:
    for text, expected in TIMES.items():
        assert parse_time(text) == expected, text
    for text in NO_TIMES:
        with pytest.raises(InvalidMoment):
            parse_time(text)


# What is archived.


def archive(connection: sqlite3.Connection, position: int) -> None:
    """Take away the events up to `position`, for which a snapshot stands from then on."""
    write_base_state(connection, state_at(connection, position))
    for trigger in ("base_never_changes", "events_never_go"):
        connection.execute(f"DROP TRIGGER {trigger}")
    connection.execute("UPDATE base SET position = ?", (position,))
    connection.execute("DELETE FROM events WHERE position <= ?", (position,))


def long_history() -> History:
    history = History()
    history.load("L")  # 1 to 3
    history.ask_load("L2", version=2)  # 4
    history.start_load("L2", version=2)  # 5
    history.load("O", of="other")  # 6 to 8
    history.end_load("L2", version=2)  # 9
    history.ask_unload("U", "L")  # 10
    return history


def test_rebuild_keeps_the_past_since_the_base_only() -> None:
    history = long_history()
    with ledger(history.facts, frozenset({3, 7})) as connection:
        before = [state_at(connection, position) for position in range(11)]
        listed = [jobs_at(connection, position, ALL) for position in range(11)]
        archive(connection, 5)
        for position in range(5, 11):
            for from_base in (True, False):
                after = state_at(connection, position, from_base=from_base)
                assert facts_of(after) == facts_of(before[position])
            assert jobs_at(connection, position, ALL) == listed[position]
        for asked in ("4", at(3), at(5)):
            with pytest.raises(Archived) as refused:
                moment_at(connection, asked)
            assert refused.value.problem_members == {"oldest": 5, "head": 10}
        assert moment_at(connection, "5") == Moment(5, None)
        assert moment_at(connection, at(6)) == Moment(6, at(6))
        assert moment_at(connection, "0") == Moment(0, None)
        storage.rebuild(connection)
        assert jobs_at(connection, 10, ALL) == listed[10]
        assert connection.execute("SELECT position FROM snapshots").fetchall() == [(5,)]
        assert state_at(connection, 10).models == before[10].models
        connection.execute("DELETE FROM snapshots")
        with pytest.raises(LogUnavailable, match=r"the snapshot at 5, .* is missing"):
            state_at(connection, 10)


def test_page_of_jobs_from_archived_events_takes_one_fold() -> None:
    history = History()
    for number in range(20):
        history.ask_load(f"L{number}", of=f"m{number}")
    for number in range(20):
        history.ask_cancel(f"L{number}", of=f"m{number}")
    with ledger(history.facts) as connection:
        listed = jobs_at(connection, 30, ALL)
        archive(connection, 25)
        statements: list[str] = []
        connection.set_trace_callback(statements.append)
        assert jobs_at(connection, 30, ALL) == listed
        folds = [each for each in statements if each.startswith("SELECT position, body, hash FROM events")]
        assert len(folds) == 2  # a page, and that there is no other


# Beside the writer.


async def test_past_is_read_beside_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with opened(path, now=lambda: START, boottime=float) as log, open_time_travel_reader(path) as past:
        await write(log, 3)
        asked = [past.read(str(position), state_at) for position in (1, 2, 3)]
        assert [state.position for _, state in await asyncio.gather(*asked)] == [1, 2, 3]
        await write(log, 1, first=4)
        assert (await past.read("4", state_at))[0] == Moment(4, log.head.recorded_at)
        assert (await past.read("0", partial(jobs_at, query=ALL)))[1] == []
        assert await past.read("4", partial(job_at, job_id="none")) == (Moment(4, log.head.recorded_at), None)


DAMAGE = (
    "UPDATE model_snapshots SET body = substr(body, 9) WHERE position = 8",
    "UPDATE model_snapshots SET body = '' WHERE position = 8",
    "UPDATE model_snapshots SET body = '5' WHERE position = 8",
    "UPDATE model_snapshots SET body = '[' WHERE position = 8",
    "UPDATE model_snapshots SET body = x'ff' WHERE position = 8",
    "UPDATE model_snapshots SET body = CAST(x'ff' AS TEXT) WHERE position = 8",
    "UPDATE job_snapshots SET body = substr(body, 9) WHERE position = 8",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    with ledger(long_history().facts, frozenset({5, 8})) as connection:
        connection.execute("VACUUM INTO ?", (str(path),))
    return path


async def states(path: Path) -> dict[str, tuple[object, ...]]:
    async with open_time_travel_reader(path) as past:
        return {at: facts_of((await past.read(at, state_at))[1]) for at in ("7", "8", "10")}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damaged_snapshot_is_skipped_and_logged_once(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await states(path)
    with closing(connect(path)) as connection:
        assert connection.execute(damage).rowcount > 0
    assert await states(path) == expected
    [record] = caplog.records
    assert "the snapshot at position 8 is damaged" in record.message
    with closing(connect(path)) as connection:
        connection.execute(damage.replace("= 8", "= 5"))
        assert await states(path) == expected
        assert len(caplog.records) == 2
        storage.rebuild(connection)
        assert await states(path) == expected
    assert len(caplog.records) == 2


@pytest.mark.parametrize("table", ["snapshots", "model_snapshots", "job_snapshots"])
async def test_snapshot_on_damaged_pages_is_skipped(
    path: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await states(path)
    overwrite_pages(path, table)
    assert await states(path) == expected
    assert caplog.records


async def test_locked_ledger_is_unavailable_not_damaged(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        async with open_time_travel_reader(path) as past:
            other.execute("BEGIN EXCLUSIVE")
            past._thread._connection.execute("PRAGMA busy_timeout = 0")
            with pytest.raises(LogUnavailable, match="locked"):
                await past.read("10", state_at)
