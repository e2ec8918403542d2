"""Time travel: jobs and states at a past position or time are what a fold up to there gives."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import FEWER, START, History, as_event, at, opened, write
from support.ledgers import ledger_of
from support.strategies import drafts

from events.errors import LogUnavailable
from events.jobs import Job, JobStatus
from events.sqlite import storage
from events.sqlite.queries import JobQuery
from events.sqlite.readonly import open_reader_thread
from events.sqlite.timetravel import (
    BeforeFirst,
    BeyondHead,
    InvalidMoment,
    Moment,
    job_at,
    jobs_at,
    models_at,
    moment_at,
    parse_time,
    read_moment,
)
from events.state import State
from events.types import Event, LoadRequested, UnloadRequested

T = TypeVar("T")

ALL = JobQuery()
PENDING = JobQuery(status=JobStatus.PENDING)


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
@given(histories())
def test_past_jobs_are_what_a_fold_gives(events: list[Event]) -> None:
    with ledger_of(events) as connection:
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
    with ledger_of(history.facts) as connection:
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
    with ledger_of(history.facts) as connection:
        expected = {1: 1, 1.5: 1, 2: 2, 3.999999: 3, 4: 5, 100: 5}
        for seconds, position in expected.items():
            found = moment_at(connection, at(seconds))
            assert found.position == position, seconds
            assert found.recorded_at == history.facts[position - 1].recorded_at
        assert moment_at(connection, "0") == Moment(0, None)
        assert moment_at(connection, "0004") == Moment(4, at(4))
        with pytest.raises(BeyondHead):
            moment_at(connection, "6")
        with pytest.raises(BeforeFirst, match=rf"{at(0)[:19]}Z is before the first event, .* {at(1)}"):
            moment_at(connection, at(0.5))
    with ledger_of([]) as connection:
        assert moment_at(connection, at(1)) == Moment(0, None)


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


# Damage.


def long_history() -> History:
    history = History()
    history.load("L")  # 1 to 3
    history.ask_load("L2", version=2)  # 4
    history.start_load("L2", version=2)  # 5
    history.load("O", of="other")  # 6 to 8
    history.end_load("L2", version=2)  # 9
    history.ask_unload("U", "L")  # 10
    return history


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("UPDATE model_history SET body = substr(body, 9) WHERE position = 3", "history of 'digits' is dam"),
        ("UPDATE model_history SET body = '5' WHERE position = 3", "history of 'digits' is damaged"),
        ("UPDATE model_history SET body = replace(body, '3', '2') WHERE position = 3", "is not its load"),
        ("UPDATE model_history SET body = replace(body, '3', '99') WHERE position = 3", "99 is not its load"),
    ],
)
def test_damaged_history_is_named_and_rebuilt(damage: str, problem: str) -> None:
    history = long_history()
    with ledger_of(history.facts) as connection:
        before = models_at(connection, 3)
        assert connection.execute(damage).rowcount == 1
        with pytest.raises(LogUnavailable, match=problem):
            models_at(connection, 3)
        storage.rebuild(connection)
        assert models_at(connection, 3) == before


# Beside the writer.


async def test_past_is_read_beside_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with (
        opened(path, now=lambda: START, boottime=float) as log,
        open_reader_thread(path, "past") as past,
    ):

        async def read(at: str, query: Callable[[sqlite3.Connection, int], T]) -> tuple[Moment, T]:
            return await past.run(partial(read_moment, at=at, query=query))

        await write(log, 3)
        asked = [read(str(position), models_at) for position in (1, 2, 3)]
        assert [moment.position for moment, _ in await asyncio.gather(*asked)] == [1, 2, 3]
        await write(log, 1, first=4)
        assert (await read("4", models_at))[0] == Moment(4, log.head.recorded_at)
        assert (await read("0", partial(jobs_at, query=ALL)))[1] == []
        assert await read("4", partial(job_at, job_id="none")) == (Moment(4, log.head.recorded_at), None)


async def test_locked_ledger_is_unavailable_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with ledger_of(long_history().facts) as connection:
        connection.execute("VACUUM INTO ?", (str(path),))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        async with open_reader_thread(path, "past") as past:
            other.execute("BEGIN EXCLUSIVE")
            past._connection.execute("PRAGMA busy_timeout = 0")
            with pytest.raises(LogUnavailable, match="locked"):
                await past.run(partial(read_moment, at="10", query=models_at))
