"""Pages of events: what is asked for and nothing else, by walks along an index that never sort."""

import asyncio
import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN, body_of, opened, write

from events import listing
from events.commands import Record
from events.errors import Archived, LogUnavailable
from events.history import BeyondHead
from events.listing import INDEXES, Asked, EventPage, page_sql, probe_sql
from events.log import Log
from events.reader import Reader, open_reader
from events.stored import EventFilter, StoredEvent, hash_of
from events.types import AccessDenied, Draft, LoadStarted, ServerStopped

ACTORS, MODELS, JOBS = ("alice", "bob", "é\U0001f600"), ("m", "n", None), ("i", "j", "k", None)
KINDS = (LoadStarted(1), AccessDenied("load", 2), ServerStopped())
NUMBER = 120


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


async def fill(log: Log) -> None:
    """Append events in which all values meet."""
    for number in range(NUMBER):
        draft = Draft(
            f"e{number}",
            KINDS[number % 3],
            ACTORS[number // 3 % 3],
            JOBS[number // 7 % 4],
            MODELS[number // 5 % 3],
        )
        await log.submit(Record((draft,)))


def some(values: tuple[str | None, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    known = [value for value in values if value is not None]
    return st.lists(st.sampled_from([*known, "nobody"]), max_size=3).map(tuple)


FILTERS = st.builds(
    EventFilter,
    types=some(("LoadStarted", "AccessDenied", "ServerStopped")),
    models=some(MODELS),
    jobs=some(JOBS),
    actors=some(ACTORS),
)
PLACES = st.none() | st.integers(0, NUMBER)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log that is only read."""
    path = tmp_path_factory.mktemp("filled") / "ledger.db"

    async def make() -> None:
        async with opened(path) as log:
            await fill(log)

    asyncio.run(make())
    return path


async def everything(reader: Reader) -> list[StoredEvent]:
    return (await reader.event_page(Asked(limit=1000))).items


def fits(event: StoredEvent, asked: Asked) -> bool:
    """Whether an event is asked for, said in another way."""
    low = max(asked.after or 0, (int(asked.since or 0) or 1) - 1)
    high = min(
        NUMBER if asked.before is None else asked.before - 1,
        NUMBER if asked.until is None else int(asked.until),
    )
    return low < event.position <= high and asked.wanted.matches(event)


async def walked(reader: Reader, asked: Asked) -> tuple[list[StoredEvent], list[EventPage]]:
    """Follow the cursor to the end."""
    items, pages = list[StoredEvent](), list[EventPage]()
    while True:
        page = await reader.event_page(asked)
        items += page.items
        pages.append(page)
        if page.next_cursor is None:
            return items, pages
        step = {"before" if asked.newest_first else "after": page.next_cursor}
        asked = Asked(**{**{name: getattr(asked, name) for name in asked.__slots__}, **step})


@PLAIN
@given(
    wanted=FILTERS, after=PLACES, before=PLACES, since=PLACES, until=PLACES, newest_first=st.booleans(),
    limit=st.integers(1, 50), scan=st.integers(1, 40),
)  # fmt: skip
def test_all_pages_together_are_what_is_asked_for_in_order_once(  # noqa: PLR0917
    filled: Path,
    wanted: EventFilter,
    after: int | None,
    before: int | None,
    since: int | None,
    until: int | None,
    newest_first: bool,  # noqa: FBT001
    limit: int,
    scan: int,
) -> None:
    asked = Asked(wanted, after, before, since, until, newest_first, limit)

    async def run() -> None:
        async with open_reader(filled) as reader:
            right = [event for event in await everything(reader) if fits(event, asked)]
            found, pages = await walked(reader, asked)
            assert found == (right[::-1] if newest_first else right)
            assert all(len(page.items) <= limit for page in pages)
            if not newest_first and (until, before) == (None, None):
                assert pages[-1].seen == NUMBER

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "SCAN", scan)
        asyncio.run(run())


async def test_the_line_of_an_event_is_its_text_and_its_hash(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await fill(log)
        before = bytes(32)
        for event in await everything(reader):
            before = hashlib.sha256(before + body_of(event.line)).digest()
            assert hash_of(event.line) == before
        assert before == log.head.hash


def plan(connection: sqlite3.Connection, sql: str, wanted: EventFilter) -> list[str]:
    values = {
        f"{column}_{number}": value
        for column, several in wanted.columns.items()
        for number, value in enumerate(several)
    }
    asked = {"low": 1, "high": 9, "limit": 5, **values}
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", asked)]


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("number", [1, 2, 16])
@pytest.mark.parametrize("leading", sorted(INDEXES))
def test_a_page_walks_an_index_and_never_sorts(
    filled: Path,
    leading: str,
    number: int,
    newest_first: bool,  # noqa: FBT001
) -> None:
    several = tuple(f"v{each}" for each in range(number)) * 2
    wanted = EventFilter(several, several, several, several)
    with closing(sqlite3.connect(filled)) as connection:
        steps = plan(connection, page_sql(wanted, leading, newest_first=newest_first), wanted)
        walks = [step for step in steps if step.startswith("SEARCH events")]
        index = f"USING INDEX {INDEXES[leading]} ({leading}=? AND position>? AND position<?)"
        assert walks == [f"SEARCH events {index}"] * number
        asked = [step for step in steps if step.startswith("SEARCH other")]
        others = [INDEXES[column] for column in wanted.columns if column != leading] if number == 1 else []
        assert [step.split("INDEX ")[1].split()[0] for step in asked] == others
        assert all("=? AND position=?" in step for step in asked)
        steps += plan(connection, probe_sql(wanted, newest_first=newest_first), wanted)
        steps += plan(connection, page_sql(wanted, None, newest_first=newest_first), wanted)
        assert not [step for step in steps if "TEMP B-TREE" in step or "SCAN events" in step], steps


async def test_a_page_is_consistent_while_others_append(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 5)
        page = await reader.event_page(Asked(limit=3))
        await write(log, 5, first=6)
        assert ([event.position for event in page.items], page.as_of, page.next_cursor) == ([1, 2, 3], 5, 3)
        assert page.seen == 3


async def test_an_archived_position_is_refused_and_says_from_where_there_are_events(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 6)
        first = (await everything(reader))[0]
        with closing(sqlite3.connect(path)) as connection:
            row = connection.execute(
                "SELECT hash, json_extract(body, '$.recorded_at') FROM events WHERE position = 4"
            ).fetchone()
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_schema WHERE type = 'trigger'"
            ).fetchall():
                connection.execute(f"DROP TRIGGER {name}")
            connection.execute("DELETE FROM events WHERE position <= 4")
            connection.execute("UPDATE base SET position = 4, hash = ?", (row[0],))
            connection.commit()
        assert [event.position for event in await everything(reader)] == [5, 6]
        assert (await reader.event_page(Asked(after=4))).base == 4
        newest = await reader.event_page(Asked(before=9, newest_first=True))
        assert ([event.position for event in newest.items], newest.next_cursor) == ([6, 5], None)
        early = "2001-01-01T00:00:00.000000Z"
        begins = (Asked(after=3), Asked(since=4), Asked(since=0), Asked(since=early))
        ends = (Asked(until=4), Asked(until=early), *(Asked(before=at, newest_first=True) for at in (3, 5)))
        for asked in (*begins, *ends):
            with pytest.raises(Archived, match="after=4") as caught:
                await reader.event_page(asked)
            assert caught.value.problem_members == {"oldest": 5, "head": 6}
        assert [event.position for event in (await reader.event_page(Asked(until=5))).items] == [5]
        assert (await reader.event_page(Asked(after=4, until=3))).items == []  # nothing is between these
        assert first.position == 1


async def test_a_position_beyond_the_head_is_refused(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 2)
        assert (await reader.event_page(Asked(after=2))).items == []
        with pytest.raises(BeyondHead, match="position 2"):
            await reader.event_page(Asked(after=3))


async def test_a_damaged_event_is_told_and_not_handed_on(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 2)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("DROP TRIGGER events_never_change")
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute(
                "UPDATE events SET body = json_set(body, '$.position', 'x') WHERE position = 2"
            )
            connection.commit()
        with pytest.raises(LogUnavailable, match="verify"):
            await reader.event_page(Asked())
