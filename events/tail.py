"""Tails of the log: each catches up from a position, then follows, with no gap and no repetition.

One follower reads new events into a ring that all tails share. A tail behind the ring reads the log through
one of a few readers. A wakeup carries no data; the tail then reads.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from events.errors import LedgerProblem
from events.log import Log
from events.sqlite.listing import EVERYTHING, EventFilter, EventQuery, Reader, StoredEvent, beyond_head

_log = logging.getLogger(__name__)

MAX_EVENTS = 4096
"""Events in the ring: some seconds of a busy log, enough for a client that pauses."""

RING_BYTES = 8 * 2**20
"""Bytes of the events' lines in the ring."""

EVENTS_PER_TURN = 100
"""Events that a tail takes at a time: read at once, written at once."""

MAX_BATCH_BYTES = 64 * 2**10
"""Bytes of lines in one batch, unless a single event has more: the memory that a stopped reader takes."""

MAX_SHARED = 16
"""Batches kept for tails at the same position: following tails are at one position for each filter."""

REACHED_S = 5.0
"""Time for the writer to learn of a commit that readers have seen; usually milliseconds."""

PACE_S = 0.1
"""Shortest pause between wakeups of tails: ten events in one write cost a tenth of ten writes (measured)."""

READ_RETRY_S = 1.0
"""Pause after the log could not be read."""


class Ring:
    """The latest events without a gap: those above `base`, up to `head`; the oldest are dropped."""

    def __init__(self, max_events: int = MAX_EVENTS, max_bytes: int = RING_BYTES) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events = deque[StoredEvent]()
        self._bytes = 0
        self.head = 0

    @property
    def base(self) -> int:
        return self.head - len(self._events)

    def restart(self, head: int) -> None:
        """Drop all events and continue after `head`."""
        self._events.clear()
        self._bytes = 0
        self.head = head

    def extend(self, events: Sequence[StoredEvent]) -> None:
        """Add events.

        Raises:
            ValueError: the events do not follow the head.
        """
        for event in events:
            if event.position != self.head + 1:
                raise ValueError(f"event {event.position} does not follow {self.head}")
            self._events.append(event)
            self._bytes += len(event.line)
            self.head = event.position
        while len(self._events) > self._max_events or self._bytes > self._max_bytes:
            self._bytes -= len(self._events.popleft().line)

    def after(self, position: int, limit: int) -> list[StoredEvent] | None:
        """Return at most `limit` events above `position`, in order, or None if the ring starts later.

        A reader at the head, or beyond it, gets an empty list.
        """
        if position < self.base:
            return None
        missing = self.head - position
        if missing <= 0:
            return []
        newest_first = islice(reversed(self._events), max(0, missing - limit), missing)
        return [*newest_first][::-1]


@dataclass(frozen=True, slots=True)
class Batch:
    """The next events of a tail.

    Attributes:
        events: the events that match its filter, in order.
        after: the tail's position before the batch.
        upto: the tail's position after it: the batch has all matching events up to here.
        live: whether the log has no further events yet; a wakeup announces the next ones.
        encoded: serialised forms by name, shared by the readers of this batch.
    """

    events: Sequence[StoredEvent]
    after: int
    upto: int
    live: bool
    encoded: dict[str, bytes] = field(default_factory=dict, compare=False)


class Tail:
    """One reader's position in the log. Wait for `wakeup` after `read` returned a live batch.

    Attributes:
        opened_at: the head of the log when the tail was opened; the ring may not have reached it yet.
    """

    def __init__(self, tails: Tails, after: int, event_filter: EventFilter) -> None:
        self._tails = tails
        self.opened_at = tails.head
        self.position = after
        self.event_filter = event_filter
        self.wakeup = asyncio.Event()

    async def read(self) -> Batch:
        """Return the next batch, without waiting for new events.

        Raises:
            LogUnavailable: `log_unavailable`, the log cannot be read.
        """
        batch = self._tails.from_ring(self.position, self.event_filter)
        if batch is None:
            batch = await self._tails.from_log(self.position, self.event_filter)
        self.position = batch.upto
        return batch


class Tails:
    """All tails of a log; `run` must run for them to see new events.

    Args:
        log: knows the head and wakes the follower.
        follower: the reader that fills the ring.
        readers: for tails behind the ring, one for each tail that reads at the same time.
        ring: the events that tails share.
    """

    def __init__(
        self,
        log: Log,
        follower: Reader,
        readers: Sequence[Reader],
        *,
        ring: Ring | None = None,
        pace_s: float = PACE_S,
    ) -> None:
        self._log = log
        self._follower = follower
        self._readers = asyncio.Queue[Reader]()
        for reader in readers:
            self._readers.put_nowait(reader)
        self._ring = ring or Ring()
        self._pace_s = pace_s
        self._tails = set[Tail]()
        self._shared = dict[tuple[int, EventFilter], Batch]()
        self.closed = False

    async def run(self) -> None:
        """Follow the log until cancelled; a defect closes all tails, so that none waits for ever."""
        try:
            with self._log.subscribed() as wakeup:
                while True:
                    await self._follow()
                    await asyncio.sleep(self._pace_s)
                    await wakeup.wait()
                    wakeup.clear()
        finally:
            self.close()

    def close(self) -> None:
        """Wake all tails for the last time; their readers check `closed`."""
        self.closed = True
        self.wake()

    def wake(self) -> None:
        for tail in self._tails:
            tail.wakeup.set()

    def __iter__(self) -> Iterator[Tail]:
        return iter(tuple(self._tails))

    @property
    def head(self) -> int:
        return self._log.head.position

    async def reaches(self, after: int) -> None:
        """Wait until the writer's head reaches `after`, if the file has.

        Readers see a commit a moment before the writer, so a client may ask for the events after it.

        Raises:
            BeyondHead: `beyond_head`.
            LogUnavailable: `log_unavailable`, the log cannot be read.
        """
        await self._log.reach(after)
        if after <= self.head:
            return
        page = await self._follower.event_page(EventQuery(after=after, limit=1))
        limit_s = REACHED_S if page.as_of >= after else 0
        if not await self._log.wait_until(lambda: after <= self.head, limit_s):
            raise beyond_head(after, self.head)

    @contextmanager
    def open(self, after: int | None = None, event_filter: EventFilter = EVERYTHING) -> Iterator[Tail]:
        """Open a tail after a position, or at the head; it is registered before its first read.

        Raises:
            BeyondHead: `beyond_head`.
        """
        if after is None:
            after = self.head
        elif after > self.head:
            raise beyond_head(after, self.head)
        if not self._tails:  # without tails the ring is not kept up to date
            self._ring.restart(self.head)
            self._shared.clear()
        tail = Tail(self, after, event_filter)
        self._tails.add(tail)
        try:
            yield tail
        finally:
            self._tails.discard(tail)

    def from_ring(self, after: int, event_filter: EventFilter) -> Batch | None:
        """Return the next batch from the ring, or None if the ring starts later.

        Tails at the same position with the same filter share one object.
        """
        known = self._shared.get((after, event_filter))
        if known is not None:
            return known
        events = self._ring.after(after, EVENTS_PER_TURN)
        if events is None:
            return None
        upto = events[-1].position if events else max(after, self._ring.head)
        if event_filter != EVERYTHING:
            events = [event for event in events if event_filter.matches(event)]
        batch = _batch(events, after, upto, live=upto >= self._ring.head)
        if len(self._shared) < MAX_SHARED:
            self._shared[after, event_filter] = batch
        return batch

    async def from_log(self, after: int, event_filter: EventFilter) -> Batch:
        """Return the next batch from the log, once one of the readers is free.

        Raises:
            LogUnavailable: `log_unavailable`.
        """
        reader = await self._readers.get()
        try:
            page = await reader.event_page(EventQuery(event_filter, after=after, limit=EVENTS_PER_TURN))
        finally:
            self._readers.put_nowait(reader)
        return _batch(page.items, after, page.seen, live=False)

    async def _follow(self) -> None:
        """Read into the ring up to the head, and wake the tails once."""
        while self._tails:
            after = self._ring.head
            try:
                page = await self._follower.event_page(EventQuery(after=after, limit=EVENTS_PER_TURN))
            except LedgerProblem as error:
                _log.warning("clients that follow the ledger wait: %s", error)
                await asyncio.sleep(READ_RETRY_S)
                continue
            if after != self._ring.head:  # meanwhile all tails were closed, and others opened
                continue
            self._ring.extend(page.items)
            self._shared.clear()
            if page.next_cursor is None:
                self.wake()
                return


def _batch(events: Sequence[StoredEvent], after: int, upto: int, *, live: bool) -> Batch:
    """Return a batch of as many events as fit, at least one."""
    held = 0
    for number, event in enumerate(events):
        held += len(event.line)
        if held > MAX_BATCH_BYTES and number:
            return Batch(events[:number], after, events[number - 1].position, live=False)
    return Batch(events, after, upto, live)
