"""The latest events in memory, for all tails together: bounded by number and by bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from events.stored import StoredEvent

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
