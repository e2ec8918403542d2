"""The reader beside the writer: pages of events and jobs, cursors, filters, and walks along an index."""

import asyncio
import hashlib
import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import MODEL, PLAIN, facts, load_requested, opened, write
from support.ledgers import body_of, change_ledger

from events.commands import Record
from events.errors import LogUnavailable
from events.jobs import JobStatus
from events.log import Log
from events.sqlite import listing
from events.sqlite.listing import EventFilter, EventQuery, Page, Reader, StoredEvent, open_reader
from events.sqlite.queries import JobQuery
from events.sqlite.timetravel import BeyondHead
from events.types import AccessDenied, Data, Draft, LoadFailed, LoadRequested, LoadStarted, ServerStopped

ACTORS, MODELS, JOBS = ("alice", "bob", "é\U0001f600"), ("m", "n", None), ("i", "j", "k", None)
KINDS = (LoadStarted(1), AccessDenied("load", 2), ServerStopped())
NUMBER = 120


def some(*values: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from([*values, "nobody"]), max_size=3).map(tuple)


FILTERS = st.builds(
    EventFilter,
    types=some("LoadStarted", "AccessDenied", "ServerStopped"),
    models=some("m", "n"),
    jobs=some("i", "j", "k"),
    actors=some(*ACTORS),
)
POSITIONS = st.none() | st.integers(0, NUMBER)
ASKED = st.builds(
    EventQuery, FILTERS, POSITIONS, POSITIONS, POSITIONS, POSITIONS, st.booleans(), st.integers(1, 50)
)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log in which all values meet; it is only read."""
    path = tmp_path_factory.mktemp("filled") / "ledger.db"
    drafts = tuple(
        Draft(f"e{n}", KINDS[n % 3], ACTORS[n // 3 % 3], JOBS[n // 7 % 4], MODELS[n // 5 % 3])
        for n in range(NUMBER)
    )

    async def make() -> None:
        async with opened(path) as log:
            await log.submit(Record(drafts))

    asyncio.run(make())
    return path


async def everything(reader: Reader) -> list[StoredEvent]:
    return (await reader.event_page(EventQuery(limit=1000))).items


def fits(event: StoredEvent, asked: EventQuery) -> bool:
    low = max(asked.after or 0, (int(asked.since or 0) or 1) - 1)
    high = min(
        NUMBER if asked.before is None else asked.before - 1,
        NUMBER if asked.until is None else int(asked.until),
    )
    return low < event.position <= high and asked.wanted.matches(event)


async def walked(reader: Reader, asked: EventQuery) -> tuple[list[StoredEvent], int]:
    """Return the events of all pages, and up to where the last one has seen the log."""
    items = list[StoredEvent]()
    while True:
        page = await reader.event_page(asked)
        assert len(page.items) <= asked.limit
        items += page.items
        if page.next_cursor is None:
            return items, page.seen
        cursor = page.next_cursor
        asked = replace(asked, before=cursor) if asked.newest_first else replace(asked, after=cursor)


@PLAIN
@given(ASKED, st.integers(1, 40))
def test_all_event_pages_together_are_what_was_asked_for(filled: Path, asked: EventQuery, scan: int) -> None:
    async def run() -> None:
        async with open_reader(filled) as reader:
            right = [event for event in await everything(reader) if fits(event, asked)]
            found, seen = await walked(reader, asked)
            assert found == (right[::-1] if asked.newest_first else right)
            if not asked.newest_first and (asked.until, asked.before) == (None, None):
                assert seen == NUMBER

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "SCAN", scan)
        asyncio.run(run())


async def test_line_of_an_event_is_its_body_and_its_hash(filled: Path) -> None:
    async with open_reader(filled) as reader:
        before = bytes(32)
        for event in await everything(reader):
            before = hashlib.sha256(before + body_of(event.line)).digest()
            assert json.loads(event.line)["hash"] == before.hex()


def plan(connection: sqlite3.Connection, sql: str, wanted: EventFilter) -> list[str]:
    parameters = listing._parameters(wanted, listing._Span(1, 9, 9), 5)
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("number", [1, 2, 16])
@pytest.mark.parametrize("leading", sorted(listing.INDEXES))
def test_event_page_walks_an_index_and_never_sorts(
    filled: Path, leading: str, number: int, *, newest_first: bool
) -> None:
    several = tuple(f"v{each}" for each in range(number)) * 2
    wanted = EventFilter(several, several, several, several)
    with closing(sqlite3.connect(filled)) as connection:
        steps = plan(connection, listing.page_sql(wanted, leading, newest_first=newest_first), wanted)
        walks = [step for step in steps if step.startswith("SEARCH events")]
        index = f"USING INDEX {listing.INDEXES[leading]} ({leading}=? AND position>? AND position<?)"
        assert walks == [f"SEARCH events {index}"] * number
        asked = [step for step in steps if step.startswith("SEARCH other")]
        others = (
            [listing.INDEXES[column] for column in wanted.columns if column != leading] if number == 1 else []
        )
        assert [step.split("INDEX ")[1].split()[0] for step in asked] == others
        assert all("=? AND position=?" in step for step in asked)
        steps += plan(connection, listing.probe_sql(wanted, newest_first=newest_first), wanted)
        steps += plan(connection, listing.page_sql(wanted, None, newest_first=newest_first), wanted)
        assert not [step for step in steps if "TEMP B-TREE" in step or "SCAN events" in step], steps


async def test_damaged_event_is_not_returned_and_keeps_no_transaction(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 4)
        change_ledger(path, "UPDATE events SET body = json_set(body, '$.position', 'x') WHERE position = 2")
        with pytest.raises(LogUnavailable, match="verify") as caught:
            await reader.event_page(EventQuery())
        await write(log, 1, first=5)
        assert [event.position for event in await reader.events(4)] == [5]
        assert caught.value.__traceback__ is not None  # it keeps the frames of the query


# Jobs.


async def append(log: Log, job: str, data: Data, model_id: str = MODEL) -> None:
    """Append a fact about a job; its request has the job's id."""
    event_id = job if isinstance(data, LoadRequested) else f"{data.TYPE} of {job}"
    await log.submit(Record((Draft(event_id, data, "alice", job, model_id, 1),)))


async def test_jobs_are_paged_newest_first_by_filters(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        assert await reader.jobs(JobQuery()) == Page([], as_of=0, next_cursor=None)
        for number in range(1, 7):
            await append(log, f"j{number}", load_requested(), "odd" if number % 2 else "even")
        pending = await reader.job("j1")
        assert pending == log.state.jobs["j1"]
        await append(log, "j1", LoadFailed("x", "y"), "odd")
        await append(log, "j2", LoadFailed("x", "y"), "even")
        await append(log, "j3", LoadStarted(1), "odd")
        listed: list[tuple[dict[str, Any], list[str]]] = [
            ({}, ["j6", "j5", "j4", "j3", "j2", "j1"]),
            ({"model_id": "odd"}, ["j5", "j3", "j1"]),
            ({"status": JobStatus.FAILED}, ["j2", "j1"]),
            ({"status": JobStatus.PENDING}, ["j6", "j5", "j4"]),
            ({"status": JobStatus.IN_PROGRESS, "model_id": "odd"}, ["j3"]),
            ({"status": JobStatus.CANCELLED}, []),
            ({"model_id": "nobody's"}, []),
        ]
        for filters, job_ids in listed:
            for limit in (1, 2, 3, 6, 100):
                found, cursor = list[str](), None
                for first in range(0, max(1, len(job_ids)), limit):
                    page = await reader.jobs(JobQuery(cursor, limit=limit, **filters))
                    found += [job.id for job in page.items]
                    assert found == job_ids[: first + limit], (filters, limit)
                    cursor = page.next_cursor
                assert cursor is None
        newest = await reader.jobs(JobQuery(limit=2))
        await append(log, "j7", load_requested())  # does not shift what is behind the cursor
        older = await reader.jobs(JobQuery(newest.next_cursor, limit=4))
        assert [job.id for job in older.items] == ["j4", "j3", "j2", "j1"]
        assert (newest.as_of, older.as_of) == (9, 10)
        failed = await reader.job("j1")
        assert failed == older.items[-1]
        assert await reader.job("nobody's") is None
    for clause, index in (("model_id = 'm'", "jobs_by_model"), ("status = 'pending'", "jobs_by_status")):
        with closing(sqlite3.connect(path)) as connection:
            sql = f"SELECT body FROM jobs WHERE {clause} ORDER BY created_position DESC LIMIT 5"
            steps = str(connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall())
            assert index in steps
            assert "TEMP B-TREE" not in steps


# The file.


async def test_reader_sees_each_commit_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a?b#c%41 ü" / "ledger.db"  # characters that mean something in an address
    path.parent.mkdir()
    async with opened(path) as log, open_reader(path) as reader:
        for number, command in enumerate(facts(5), 1):
            await log.submit(command)
            assert len(await reader.events(0)) == number
        assert [event.position for event in await reader.events(2, 2)] == [3, 4]
        assert await reader.events(700) == []
        page = await reader.event_page(EventQuery(limit=3))
        await write(log, 5, first=6)
        assert ([event.position for event in page.items], page.as_of, page.next_cursor) == ([1, 2, 3], 5, 3)
        assert page.seen == 3
        assert (await reader.event_page(EventQuery(after=10))).items == []
        with pytest.raises(BeyondHead, match="position 10"):
            await reader.event_page(EventQuery(after=11))
        with pytest.raises(LogUnavailable, match="readonly"):
            await reader._select("DELETE FROM jobs", ())
