"""What waits for one coroutine: anybody puts something in, and it takes all that is there at once."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """A queue whose reader is woken once for whatever waits, which costs less than once for each."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._call = asyncio.Event()

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._items)

    def put(self, item: T) -> None:
        """Add something at the end."""
        self._items.append(item)
        self._call.set()

    def call(self) -> None:
        """Wake the reader, though nothing may be there."""
        self._call.set()

    async def wait(self) -> None:
        """Return when something is there, or the reader was called."""
        await self._call.wait()

    def take(self, limit: int | None = None) -> list[T]:
        """Return what is there, in order: at most `limit`."""
        number = len(self._items) if limit is None else min(limit, len(self._items))
        taken = [self._items.popleft() for _ in range(number)]
        if not self._items:
            self._call.clear()
        return taken
