"""The tails of a log: each catches up from a position, then follows, with no gap and nothing twice."""

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
from events.sqlite.reader import EVERYTHING, Asked, EventFilter, Reader, StoredEvent, beyond_head

MAX_EVENTS = 4096
"""Some seconds of a busy log: enough for a client that pauses; who is further behind reads the log."""

MAX_BYTES = 8 * 2**20
"""Of the events' lines."""


class Ring:
    """A run of events without a gap: those above `base`, up to `head`; the oldest make room for new ones."""

    def __init__(self, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BYTES) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events = deque[StoredEvent]()
        self._bytes = 0
        self._head = 0

    @property
    def head(self) -> int:
        """The position of the last event."""
        return self._head

    @property
    def base(self) -> int:
        """The position before the first event; who has seen all up to here can go on from the ring."""
        return self._head - len(self._events)

    @property
    def held_bytes(self) -> int:
        """What the events' lines take."""
        return self._bytes

    def restart(self, head: int) -> None:
        """Forget all events and go on after `head`."""
        self._events.clear()
        self._bytes = 0
        self._head = head

    def extend(self, events: Sequence[StoredEvent]) -> None:
        """Add events that follow the head.

        Raises:
            ValueError: they do not.
        """
        for event in events:
            if event.position != self._head + 1:
                raise ValueError(f"event {event.position} does not follow {self._head}")
            self._events.append(event)
            self._bytes += len(event.line)
            self._head = event.position
        while len(self._events) > self._max_events or self._bytes > self._max_bytes:
            self._bytes -= len(self._events.popleft().line)

    def after(self, position: int, limit: int) -> list[StoredEvent] | None:
        """Return at most `limit` events above `position`, in order, or None if the ring does not reach there.

        A reader at the head, or beyond it, gets an empty list.
        """
        if position < self.base:
            return None
        missing = self._head - position
        if missing <= 0:
            return []
        newest_first = islice(reversed(self._events), max(0, missing - limit), missing)
        return [*newest_first][::-1]


_log = logging.getLogger(__name__)

PAGE = 100
"""Events that a tail takes at a time: read at once, written at once."""

MAX_BATCH_BYTES = 64 * 2**10
"""Of their lines, unless a single one has more: what a reader that has stopped reading keeps in memory."""

MAX_SHARED = 16
"""Batches that are kept for tails at the same place: those that follow are at one place for each filter."""

REACHED_S = 5.0
"""How long the writer may take to hear of a commit that others have seen; it hears within milliseconds."""
PACE_S = 0.1
"""How often tails are woken at most: ten events in one write cost a tenth of ten writes (measured)."""

RETRY_S = 1.0
"""How long to wait before the log is read again when it could not be."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a tail gets next.

    Attributes:
        events: those that match, in order.
        after: where the tail was.
        upto: where it is now: all that matches up to here was given.
        live: whether that is all there is to read at the moment; the next ones come with a wakeup.
        made: what readers made of it, by a name of theirs, so that those at the same place make it once.
    """

    events: Sequence[StoredEvent]
    after: int
    upto: int
    live: bool
    made: dict[str, bytes] = field(default_factory=dict, compare=False)


class Tail:
    """One reader's place in the log. Wait for `wakeup` when `read` said that it is live.

    Attributes:
        opened_at: the head of the log when this began: what is shared may not have come as far yet.
    """

    def __init__(self, tails: Tails, after: int, wanted: EventFilter) -> None:
        self._tails = tails
        self.opened_at = tails.head
        self.position = after
        self.wanted = wanted
        self.wakeup = asyncio.Event()

    async def read(self) -> Batch:
        """Return what comes next, without waiting for it to happen.

        Raises:
            Archived: `archived`, it is not in the log any more.
            LogUnavailable: `log_unavailable`, the log cannot be read.
        """
        batch = self._tails.from_ring(self.position, self.wanted)
        if batch is None:
            batch = await self._tails.from_log(self.position, self.wanted)
        self.position = batch.upto
        return batch


class Tails:
    """All tails of a log; `run` has to run for them to see anything new.

    Args:
        log: where the head is, and what wakes the follower.
        follower: the reader that fills the ring.
        readers: for those that are behind it; as many read at once.
        ring: what tails share.
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
        """Follow the log until cancelled; a defect ends all tails, so that nobody waits for nothing."""
        wakeup = self._log.subscribe()
        try:
            while True:
                await self._follow()
                await asyncio.sleep(self._pace_s)
                await wakeup.wait()
                wakeup.clear()
        finally:
            self._log.unsubscribe(wakeup)
            self.close()

    def close(self) -> None:
        """Wake all tails for the last time; their readers look at `closed`."""
        self.closed = True
        self.wake()

    def wake(self) -> None:
        """Wake all tails: there is something new, or something of their own to look at."""
        for tail in self._tails:
            tail.wakeup.set()

    def __iter__(self) -> Iterator[Tail]:
        """Return the tails that are open."""
        return iter(tuple(self._tails))

    def __len__(self) -> int:
        return len(self._tails)

    @property
    def head(self) -> int:
        """The position up to which there are events."""
        return self._log.head.position

    async def reaches(self, after: int) -> None:
        """Wait until the head is there, if the file has come as far.

        Readers see a commit a moment before its writer hears of it, and so may those who ask what follows.

        Raises:
            BeyondHead: `beyond_head`.
            LogUnavailable: `log_unavailable`, the log cannot be read.
        """
        if after <= self.head:
            return
        wakeup = self._log.subscribe()
        try:
            page = await self._follower.event_page(Asked(after=after, limit=1))
            async with asyncio.timeout(REACHED_S if page.as_of >= after else 0):
                while after > self.head:
                    wakeup.clear()
                    await wakeup.wait()
        except TimeoutError:
            raise beyond_head(after, self.head) from None
        finally:
            self._log.unsubscribe(wakeup)

    @contextmanager
    def open(self, after: int | None = None, wanted: EventFilter = EVERYTHING) -> Iterator[Tail]:
        """Begin a tail after a position, or at the head; it is registered before its first read.

        Raises:
            BeyondHead: `beyond_head`.
        """
        if after is None:
            after = self.head
        elif after > self.head:
            raise beyond_head(after, self.head)
        if not self._tails:  # nobody followed meanwhile
            self._ring.restart(self.head)
            self._shared.clear()
        tail = Tail(self, after, wanted)
        self._tails.add(tail)
        try:
            yield tail
        finally:
            self._tails.discard(tail)

    def from_ring(self, after: int, wanted: EventFilter) -> Batch | None:
        """Return what follows in the ring, or None if that does not reach back so far.

        Tails with the same place and filter share the answer, the same object.
        """
        known = self._shared.get((after, wanted))
        if known is not None:
            return known
        events = self._ring.after(after, PAGE)
        if events is None:
            return None
        upto = events[-1].position if events else max(after, self._ring.head)
        matching = [event for event in events if wanted.matches(event)] if wanted != EVERYTHING else events
        batch = _batch(matching, after, upto, live=upto >= self._ring.head)
        if len(self._shared) < MAX_SHARED:
            self._shared[after, wanted] = batch
        return batch

    async def from_log(self, after: int, wanted: EventFilter) -> Batch:
        """Return what follows in the log: waits for one of the readers.

        Raises:
            Archived: `archived`.
            LogUnavailable: `log_unavailable`.
        """
        reader = await self._readers.get()
        try:
            page = await reader.event_page(Asked(wanted, after=after, limit=PAGE))
        finally:
            self._readers.put_nowait(reader)
        return _batch(page.items, after, page.seen, live=False)

    async def _follow(self) -> None:
        """Bring the ring to the head, and wake the tails once."""
        while self._tails:
            after = self._ring.head
            try:
                page = await self._follower.event_page(Asked(after=after, limit=PAGE))
            except LedgerProblem as error:
                _log.warning("those who follow the ledger wait: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            if after != self._ring.head:  # all tails have ended meanwhile, and others begun
                continue
            self._ring.extend(page.items)
            self._shared.clear()
            if page.next_cursor is None:
                self.wake()
                return


def _batch(events: Sequence[StoredEvent], after: int, upto: int, *, live: bool) -> Batch:
    """Return as many of the events as may be held at once, at least one."""
    held = 0
    for number, event in enumerate(events):
        held += len(event.line)
        if held > MAX_BATCH_BYTES and number:
            return Batch(events[:number], after, events[number - 1].position, live=False)
    return Batch(events, after, upto, live)
