"""A tail catches up and follows, misses nothing, repeats nothing, and holds nothing up."""

import asyncio
import sqlite3
from contextlib import aclosing, closing
from pathlib import Path

import pytest
from support.events import facts, opened, write

from events.log import Log
from events.reader import Reader, open_reader
from events.tail import tail
from events.types import Event

LIMIT_S = 60
"""Only against hanging."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def positions(events: list[Event]) -> list[int]:
    return [event.position for event in events]


async def follow(
    log: Log, reader: Reader, until: int | None = None, *, after: int = 0, page: int = 500
) -> list[int]:
    """Return all positions that a tail yields, until one of them or its end."""
    found: list[int] = []
    async with asyncio.timeout(LIMIT_S), aclosing(tail(log, reader, after, page=page)) as pages:
        async for events in pages:
            found += positions(events)
            if until is not None and after + len(found) >= until:
                break
    return found


async def test_a_tail_catches_up_in_pages_says_so_and_then_follows(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 7)
        async with aclosing(tail(log, reader, 1, page=3)) as pages:
            assert positions(await anext(pages)) == [2, 3, 4]
            assert positions(await anext(pages)) == [5, 6, 7]
            assert await anext(pages) == []
            following = asyncio.ensure_future(anext(pages))
            await write(log, 1, first=8)
            assert positions(await following) == [8]
            assert await anext(pages) == []


async def test_a_tail_that_begins_at_the_head_sees_only_what_is_new(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 3)
        async with aclosing(tail(log, reader, log.head.position)) as pages:
            assert await anext(pages) == []
            await write(log, 1, first=4)
            assert positions(await anext(pages)) == [4]


async def test_events_are_what_was_written(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 3)
        async with aclosing(tail(log, reader, 0)) as pages:
            assert [event.id for event in await anext(pages)] == ["f1", "f2", "f3"]


@pytest.mark.parametrize("page", [1, 7, 500])
async def test_nothing_is_missed_or_repeated_while_others_append(path: Path, page: int) -> None:
    async with opened(path) as log, open_reader(path) as reader:

        async def append(first: int) -> None:
            for command in facts(60, first=first):
                await log.submit(command)

        tails = [asyncio.create_task(follow(log, reader, 240, page=page)) for _ in range(4)]
        await asyncio.gather(*(append(1_000 * number) for number in range(4)))
        for found in await asyncio.gather(*tails):
            assert found == list(range(1, 241))


async def test_a_hundred_tails_all_see_everything(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 5)
        tails = [asyncio.create_task(follow(log, reader, 60, after=number % 6)) for number in range(100)]
        await write(log, 55, first=6)
        for number, found in enumerate(await asyncio.gather(*tails)):
            assert found == list(range(number % 6 + 1, 61))
        assert not log._wakeups


async def test_a_tail_ends_when_the_log_is_closed_and_has_all_that_was_waiting(path: Path) -> None:
    log = Log(path)
    await log.open()
    async with open_reader(path) as reader, aclosing(tail(log, reader, 0)) as pages:
        assert await anext(pages) == []
        appending = [asyncio.create_task(log.submit(command)) for command in facts(700)]
        await asyncio.sleep(0)  # each has been handed over, and none is written
        closing_log = asyncio.create_task(log.close())
        async with asyncio.timeout(LIMIT_S):
            assert [position async for events in pages for position in positions(events)] == list(
                range(1, 701)
            )
        await closing_log
        assert [(await task).position for task in appending] == list(range(1, 701))


async def test_a_tail_of_a_closed_log_is_what_there_is(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 3)
    async with open_reader(path) as reader:
        assert await follow(log, reader) == [1, 2, 3]


async def test_a_wake_up_carries_no_data(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 2)
        async with aclosing(tail(log, reader, 0)) as pages:
            assert positions(await anext(pages)) == [1, 2]
            assert await anext(pages) == []
            log.notify()
            log.notify()
            assert await anext(pages) == []
            await write(log, 2, first=3)
            log.notify()
            assert positions(await anext(pages)) == [3, 4]


async def test_a_slow_tail_holds_no_snapshot(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 20)
        async with aclosing(tail(log, reader, 0, page=5)) as pages:
            assert positions(await anext(pages)) == [1, 2, 3, 4, 5]
            await write(log, 20, first=21)
            with closing(sqlite3.connect(path)) as other:
                assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
            assert positions(await anext(pages)) == [6, 7, 8, 9, 10]


async def test_a_tail_that_is_left_is_forgotten(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 1)
        async with aclosing(tail(log, reader, 0)) as pages:
            await anext(pages)
            assert len(log._wakeups) == 1
        assert not log._wakeups


async def test_a_tail_that_is_cancelled_while_it_waits_is_forgotten(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader, aclosing(tail(log, reader, 0)) as pages:
        assert await anext(pages) == []
        following = asyncio.ensure_future(anext(pages))
        await asyncio.sleep(0)  # it waits
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following
        assert not log._wakeups
