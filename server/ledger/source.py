"""The events of a ledger's file, for the command `events`; a server may run beside it or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from events.listing import Asked
from events.reader import Reader, open_reader
from events.stored import EventFilter
from server.ledger.listing import place

PAGE = 500
POLL_S = 0.2
"""How often a file is looked at that is followed."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for.

    Attributes:
        since: as it was typed in: a position, or a time.
        until: likewise.
        tail: only from so many positions before the head on.
    """

    wanted: EventFilter
    after: int | None = None
    since: str | None = None
    until: str | None = None
    tail: int | None = None


class FileSource:
    """The ledger in a data directory; it gives events as lines, as they are stored."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def listed(self, wish: Wish) -> AsyncIterator[Sequence[bytes] | int]:
        """Yield pages of lines, and last the position up to which that is all."""
        asked = Asked(
            wish.wanted, after=wish.after, since=place(wish.since), until=place(wish.until), limit=PAGE
        )
        async with open_reader(self._path) as reader:
            if wish.tail is not None:
                asked = replace(asked, after=await _before_head(reader, wish.tail))
            async for page in _pages(reader, asked):
                yield page

    async def followed(self, wanted: EventFilter, after: int | None) -> AsyncIterator[Sequence[bytes]]:
        """Yield lines as they are appended, for ever; None is from the head on."""
        async with open_reader(self._path) as reader:
            if after is None:
                after = await _before_head(reader, 0)
            while True:
                page = await reader.event_page(Asked(wanted, after=after, limit=PAGE))
                after = page.seen
                if page.items:
                    yield [event.line for event in page.items]
                elif page.next_cursor is None:
                    await asyncio.sleep(POLL_S)


async def _before_head(reader: Reader, count: int) -> int:
    """Return the position so many before the head, or where the log begins."""
    page = await reader.event_page(Asked(limit=1))
    return max(page.as_of - count, page.base)


async def _pages(reader: Reader, asked: Asked) -> AsyncIterator[Sequence[bytes] | int]:
    while True:
        page = await reader.event_page(asked)
        yield [event.line for event in page.items]
        if page.next_cursor is None:
            yield page.as_of
            return
        asked = replace(asked, after=page.next_cursor)
