"""A tail catches up and follows, misses nothing, repeats nothing, and holds nothing up."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest
from support.events import facts, opened, write

from events import tail as module
from events.history import BeyondHead
from events.log import Log
from events.reader import open_reader
from events.stored import EventFilter
from events.tail import Batch, Ring, Tail, Tails

LIMIT_S = 60
"""Only against hanging."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@asynccontextmanager
async def tailing(log: Log, *, ring: Ring | None = None, readers: int = 2) -> AsyncIterator[Tails]:
    """Run the tails of a log."""
    async with AsyncExitStack() as stack:
        opened_readers = [await stack.enter_async_context(open_reader(log.path)) for _ in range(1 + readers)]
        tails = Tails(log, opened_readers[0], opened_readers[1:], ring=ring, pace_s=0)
        running = asyncio.create_task(tails.run())
        try:
            yield tails
        finally:
            running.cancel()
            await asyncio.wait([running])


def positions(batch: Batch) -> list[int]:
    return [event.position for event in batch.events]


async def read_until(tail: Tail, last: int) -> list[int]:
    """Return all positions that a tail gives, up to one that it has to come to."""
    found: list[int] = []
    async with asyncio.timeout(LIMIT_S):
        while tail.position < last:
            batch = await tail.read()
            assert batch.after <= batch.upto
            found += positions(batch)
            if batch.live and tail.position < last:
                await tail.wakeup.wait()
                tail.wakeup.clear()
    return found


async def test_a_tail_catches_up_in_pages_says_so_and_then_follows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 7)
        with tails.open(1) as tail:
            assert positions(await tail.read()) == [2, 3, 4]
            assert positions(await tail.read()) == [5, 6, 7]
            assert await tail.read() == Batch([], 7, 7, live=True)
            await write(log, 1, first=8)
            assert await read_until(tail, 8) == [8]


async def test_a_tail_that_begins_at_the_head_sees_only_what_is_new(path: Path) -> None:
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 3)
        with tails.open() as tail:
            assert await tail.read() == Batch([], 3, 3, live=True)
            await write(log, 2, first=4)
            assert await read_until(tail, 5) == [4, 5]


async def test_a_tail_knows_how_far_the_log_was_when_it_began_though_the_ring_is_behind(path: Path) -> None:
    async with opened(path) as log, AsyncExitStack() as stack:
        await write(log, 3)
        readers = [await stack.enter_async_context(open_reader(path)) for _ in range(2)]
        tails = Tails(log, readers[0], readers[1:])  # nobody follows
        with tails.open():
            await write(log, 2, first=4)
            with tails.open(3) as tail:
                batch = await tail.read()
                assert (batch.upto, batch.live, tail.opened_at) == (3, True, 5)


async def test_nobody_begins_beyond_the_head(path: Path) -> None:
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 3)
        with pytest.raises(BeyondHead), tails.open(4):
            pass
        assert not len(tails)


async def test_who_saw_an_event_before_the_writer_heard_of_its_commit_waits_for_that(path: Path) -> None:
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 2)
        known = log.head
        await write(log, 1, first=3)
        log.head, heard = known, log.head  # as it is in that moment
        waiting = asyncio.create_task(tails.reaches(3))
        with pytest.raises(BeyondHead):
            await tails.reaches(4)
        assert not waiting.done()
        log.head = heard
        log.notify()
        async with asyncio.timeout(LIMIT_S):
            await waiting
        await tails.reaches(3)


async def test_a_tail_that_begins_after_a_time_without_any_misses_nothing(path: Path) -> None:
    async with opened(path) as log, tailing(log) as tails:
        with tails.open(0) as tail:
            await write(log, 2)
            assert await read_until(tail, 2) == [1, 2]
        await write(log, 5, first=3)
        with tails.open(1) as tail, tails.open() as other:
            assert await read_until(tail, 7) == [2, 3, 4, 5, 6, 7]
            await write(log, 1, first=8)
            assert await read_until(other, 8) == [8]
            assert await read_until(tail, 8) == [8]


@pytest.mark.parametrize("size", [1, 7, 4096])
async def test_nothing_is_missed_or_repeated_while_others_append(path: Path, size: int) -> None:
    async with opened(path) as log, tailing(log, ring=Ring(max_events=size)) as tails:

        async def append(first: int) -> None:
            for command in facts(60, first=first):
                await log.submit(command)

        async def follow() -> list[int]:
            with tails.open(0) as tail:
                return await read_until(tail, 240)

        following = [asyncio.create_task(follow()) for _ in range(4)]
        await asyncio.gather(*(append(1_000 * number) for number in range(4)))
        for found in await asyncio.gather(*following):
            assert found == list(range(1, 241))


async def test_a_hundred_tails_all_see_everything_and_share_what_they_see(path: Path) -> None:
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 5)

        async def follow(after: int) -> list[int]:
            with tails.open(after) as tail:
                return await read_until(tail, 60)

        following = [asyncio.create_task(follow(number % 6)) for number in range(100)]
        await write(log, 55, first=6)
        for number, found in enumerate(await asyncio.gather(*following)):
            assert found == list(range(number % 6 + 1, 61))
        assert not len(tails)
        with tails.open() as one, tails.open() as two:
            await write(log, 3, first=61)
            async with asyncio.timeout(LIMIT_S):
                await one.wakeup.wait()
            assert await one.read() is await two.read()


async def test_filters_choose_and_the_place_moves_on_all_the_same(path: Path) -> None:
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 4)
        nothing, everything = EventFilter(models=("other",)), EventFilter(jobs=("job",), actors=("system",))
        with tails.open(0, nothing) as none, tails.open(0, everything) as all_of_them:
            assert await none.read() == Batch([], 0, 4, live=False)
            assert await read_until(all_of_them, 4) == [1, 2, 3, 4]
            await write(log, 2, first=5)
            assert await read_until(none, 6) == []
            assert await read_until(all_of_them, 6) == [5, 6]


async def test_a_batch_is_bounded_by_bytes_and_has_one_event_at_least(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BATCH_BYTES", 1)
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 2)
        with tails.open(0) as tail:
            assert [positions(await tail.read()) for _ in range(3)] == [[1], [2], []]
            await write(log, 2, first=3)
            async with asyncio.timeout(LIMIT_S):
                while tails.from_ring(3, EventFilter()) in (None, Batch([], 3, 3, live=True)):
                    await tail.wakeup.wait()
                    tail.wakeup.clear()
            assert [positions(await tail.read()) for _ in range(3)] == [[3], [4], []]


async def test_who_lags_behind_the_ring_reads_the_log_and_holds_no_snapshot(path: Path) -> None:
    async with opened(path) as log, tailing(log, ring=Ring(max_events=2)) as tails:
        with tails.open(0) as slow, tails.open(0) as quick:
            await write(log, 20)
            assert await read_until(quick, 20) == list(range(1, 21))
            with closing(sqlite3.connect(path)) as other:
                assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
            assert await read_until(slow, 20) == list(range(1, 21))


async def test_more_tails_than_readers_wait_for_their_turn(path: Path) -> None:
    async with opened(path) as log, tailing(log, readers=1) as tails:
        await write(log, 50)

        async def follow() -> list[int]:
            with tails.open(0) as tail:
                return await read_until(tail, 50)

        for found in await asyncio.gather(*(follow() for _ in range(20))):
            assert found == list(range(1, 51))


async def test_a_tail_that_is_cancelled_amid_a_read_gives_its_reader_back(path: Path) -> None:
    async with opened(path) as log, tailing(log, readers=1) as tails:
        await write(log, 5)
        for _ in range(5):
            with tails.open(0) as tail:
                reading = asyncio.create_task(tail.read())
                await asyncio.sleep(0)
                reading.cancel()
                await asyncio.wait([reading])
        with tails.open(0) as tail:
            assert await read_until(tail, 5) == [1, 2, 3, 4, 5]


async def test_the_end_wakes_all_tails_for_the_last_time(path: Path) -> None:
    async with opened(path) as log:
        async with tailing(log) as tails:
            with tails.open() as tail:
                assert (await tail.read()).live
                tails.close()
                async with asyncio.timeout(LIMIT_S):
                    await tail.wakeup.wait()
                assert tails.closed
        assert not log._wakeups
