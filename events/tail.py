"""The tail: catch up from a position, then follow, with no gap and nothing twice."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from events.log import Log
from events.reader import PAGE, Reader
from events.types import Event


async def tail(
    log: Log, reader: Reader, after: int, *, page: int = PAGE
) -> AsyncGenerator[list[Event], None]:
    """Yield events above `after` in order, in lists of at most `page`, for as long as it is iterated.

    An empty list says that the tail has caught up and now waits. The subscription begins before the first
    read, and the wake-up only says "look again", so an event cannot fall between the two. No cursor stays
    open while the caller is slow. Ends when the log is closed and all of it was read.
    """
    wakeup = log.subscribe()
    try:
        while True:
            wakeup.clear()
            events = await reader.events(after, page)
            while events:
                after = events[-1].position
                yield events
                events = await reader.events(after, page) if len(events) == page else []
            yield []
            if log.closed and after >= log.head.position:
                return
            await wakeup.wait()
    finally:
        log.unsubscribe(wakeup)
