"""A tail catches up and follows: it misses nothing, repeats nothing, and holds nothing up."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN, facts, opened, write

from events import tail as module
from events.log import Log
from events.sqlite.listing import EventFilter, StoredEvent, open_reader
from events.sqlite.timetravel import BeyondHead
from events.tail import Batch, Ring, Tail, Tails

LIMIT_S = 60
"""Only against hanging."""


@asynccontextmanager
async def tailing(log: Log, *, ring: Ring | None = None, readers: int = 2) -> AsyncIterator[Tails]:
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


async def follow(tails: Tails, after: int, last: int) -> list[int]:
    with tails.open(after) as tail:
        return await read_until(tail, last)


async def test_tail_catches_up_in_pages_then_follows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVENTS_PER_TURN", 3)
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 7)
        with tails.open(1) as tail, tails.open() as at_head:
            assert positions(await tail.read()) == [2, 3, 4]
            assert positions(await tail.read()) == [5, 6, 7]
            assert await tail.read() == Batch([], 7, 7, live=True)
            assert await at_head.read() == Batch([], 7, 7, live=True)
            await write(log, 1, first=8)
            assert await read_until(tail, 8) == await read_until(at_head, 8) == [8]
        with pytest.raises(BeyondHead), tails.open(9):
            pass
        assert not list(tails)
        await write(log, 5, first=9)  # while nobody follows
        with tails.open(7) as tail, tails.open() as at_head:
            assert await read_until(tail, 13) == [8, 9, 10, 11, 12, 13]
            await write(log, 1, first=14)
            assert await read_until(at_head, 14) == await read_until(tail, 14) == [14]


async def test_tail_keeps_head_at_its_start(path: Path) -> None:
    async with opened(path) as log, AsyncExitStack() as stack:
        await write(log, 3)
        readers = [await stack.enter_async_context(open_reader(path)) for _ in range(2)]
        tails = Tails(log, readers[0], readers[1:])  # nobody follows
        with tails.open():
            await write(log, 2, first=4)
            with tails.open(3) as tail:
                batch = await tail.read()
                assert (batch.upto, batch.live, tail.opened_at) == (3, True, 5)


async def test_reader_ahead_of_writer_waits_for_commit(path: Path) -> None:
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


@pytest.mark.parametrize("size", [1, 7, 4096])
async def test_tail_misses_and_repeats_nothing(path: Path, size: int) -> None:
    async with opened(path) as log, tailing(log, ring=Ring(max_events=size)) as tails:

        async def append(first: int) -> None:
            for command in facts(60, first=first):
                await log.submit(command)

        following = [asyncio.create_task(follow(tails, 0, 240)) for _ in range(4)]
        await asyncio.gather(*(append(1_000 * number) for number in range(4)))
        for found in await asyncio.gather(*following):
            assert found == list(range(1, 241))


async def test_tails_at_same_position_share_batches(path: Path) -> None:
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 5)
        following = [asyncio.create_task(follow(tails, number % 6, 60)) for number in range(100)]
        await write(log, 55, first=6)
        for number, found in enumerate(await asyncio.gather(*following)):
            assert found == list(range(number % 6 + 1, 61))
        assert not list(tails)
        with tails.open() as one, tails.open() as two:
            await write(log, 3, first=61)
            async with asyncio.timeout(LIMIT_S):
                await one.wakeup.wait()
            assert await one.read() is await two.read()


async def test_filtered_tail_still_moves_on(path: Path) -> None:
    async with opened(path) as log, tailing(log) as tails:
        await write(log, 4)
        nothing, everything = EventFilter(models=("other",)), EventFilter(jobs=("job",), actors=("system",))
        with tails.open(0, nothing) as none, tails.open(0, everything) as all_of_them:
            assert await none.read() == Batch([], 0, 4, live=False)
            assert await read_until(all_of_them, 4) == [1, 2, 3, 4]
            await write(log, 2, first=5)
            assert await read_until(none, 6) == []
            assert await read_until(all_of_them, 6) == [5, 6]


async def test_batch_is_limited_by_bytes_but_never_empty(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_slow_tail_reads_log_and_holds_no_snapshot(path: Path) -> None:
    async with opened(path) as log, tailing(log, ring=Ring(max_events=2)) as tails:
        with tails.open(0) as slow, tails.open(0) as quick:
            await write(log, 20)
            assert await read_until(quick, 20) == list(range(1, 21))
            with closing(sqlite3.connect(path)) as other:
                assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
            assert await read_until(slow, 20) == list(range(1, 21))


async def test_tails_share_readers_and_cancelled_read_returns_its_own(path: Path) -> None:
    async with opened(path) as log, tailing(log, readers=1) as tails:
        await write(log, 50)
        for _ in range(5):
            with tails.open(0) as tail:
                reading = asyncio.create_task(tail.read())
                await asyncio.sleep(0)
                reading.cancel()
                await asyncio.wait([reading])
        for found in await asyncio.gather(*(follow(tails, 0, 50) for _ in range(20))):
            assert found == list(range(1, 51))


async def test_close_wakes_all_tails(path: Path) -> None:
    async with opened(path) as log:
        async with tailing(log) as tails:
            with tails.open() as tail:
                assert (await tail.read()).live
                tails.close()
                async with asyncio.timeout(LIMIT_S):
                    await tail.wakeup.wait()
                assert tails.closed
        assert not log._wakeups


# The ring of latest events.


def event(position: int, size: int = 10) -> StoredEvent:
    return StoredEvent(position, "LoadStarted", None, None, "system", b"x" * size)


def ring_after(ring: Ring, after: int, limit: int) -> list[int] | None:
    found = ring.after(after, limit)
    return None if found is None else [each.position for each in found]


def test_ring_continues_after_restart_and_refuses_gaps() -> None:
    ring = Ring()
    ring.restart(4)
    assert (ring.base, ring.head) == (4, 4)
    ring.extend([event(5), event(6), event(7)])
    assert (ring.base, ring.head) == (4, 7)
    expected = {(3, 9): None, (4, 9): [5, 6, 7], (4, 2): [5, 6], (6, 2): [7], (7, 2): [], (99, 2): []}
    assert {key: ring_after(ring, *key) for key in expected} == expected
    for position in (7, 9):
        with pytest.raises(ValueError, match="does not follow 7"):
            ring.extend([event(position)])
    ring.restart(9)
    assert (ring.base, ring.head, ring._bytes) == (9, 9, 0)


@PLAIN
@given(
    sizes=st.lists(st.integers(1, 50), max_size=60),
    max_events=st.integers(1, 20),
    max_bytes=st.integers(1, 300),
    limit=st.integers(1, 9),
)
def test_ring_stays_within_bounds_and_in_order(
    sizes: list[int], max_events: int, max_bytes: int, limit: int
) -> None:
    ring = Ring(max_events, max_bytes)
    for number, size in enumerate(sizes, 1):
        ring.extend([event(number, size)])
        held = sizes[ring.base : ring.head]
        assert ring.head == number
        assert ring._bytes == sum(held) <= max_bytes
        assert len(held) <= max_events
        one_more = sizes[ring.base - 1 : ring.head] if ring.base else None
        assert (
            one_more is None or len(one_more) > max_events or sum(one_more) > max_bytes or ring.base == number
        )
        for after in range(number + 1):
            right = None if after < ring.base else list(range(after + 1, min(number, after + limit) + 1))
            assert ring_after(ring, after, limit) == right
