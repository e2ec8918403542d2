"""The body budget: memory for the bodies of all requests and responses, and turns to decode them.

One subject gets half of the budget, and one turn at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from server.errors import ServerProblem

MAX_BODIES_BYTES = 2**30
"""Sixteen of the largest bodies; their workers take as much again while they read."""


class BodiesFull(ServerProblem):
    """Too many large requests are in memory at once; try again."""

    code = "bodies_full"


class Bodies:
    """The body budget of all subjects: counts the bytes of bodies in memory; one subject has half of it.

    Attributes:
        max_json_bytes: of the JSON of an inference, after decompression.
    """

    def __init__(self, max_bytes: int, max_json_bytes: int) -> None:
        self.max_json_bytes = max_json_bytes
        self._max_bytes = max_bytes
        self._by_subject = Counter[str]()
        self._turns = WeakValueDictionary[str, asyncio.Lock]()
        self.taken_bytes = 0

    def share(self, subject: str) -> Share:
        """Return the share of a new request, still empty."""
        return Share(self, subject)

    def has_room(self, subject: str, count: int) -> bool:
        """Return whether the subject may take so many more bytes."""
        of_subject = self._by_subject[subject] + count
        return self.taken_bytes + count <= self._max_bytes and of_subject <= self._max_bytes // 2

    def add(self, subject: str, count: int) -> None:
        """Count bytes of a subject; a negative count gives them back."""
        self.taken_bytes += count
        self._by_subject[subject] += count
        if not self._by_subject[subject]:
            del self._by_subject[subject]

    @asynccontextmanager
    async def turn(self, subject: str) -> AsyncIterator[None]:
        """Wait for the subject's turn to block the event loop; its next one begins after as long a pause.

        So many long bodies of one subject leave half of the time to others, and no more than one of them is
        between any two requests of others.
        """
        turn = self._turns.setdefault(subject, asyncio.Lock())
        await turn.acquire()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            yield
        finally:
            loop.call_later(loop.time() - began_s, turn.release)


class Share:
    """The bytes of one request, then those of its response, until the client has received it."""

    __slots__ = ("_bodies", "_count", "_subject")

    def __init__(self, bodies: Bodies, subject: str) -> None:
        self._bodies = bodies
        self._subject = subject
        self._count = 0

    def take(self, count: int) -> None:
        """Count bytes that have arrived.

        Raises:
            BodiesFull: `bodies_full`; these bytes are not counted.
        """
        if not self._bodies.has_room(self._subject, count):
            raise BodiesFull
        self._add(count)

    @contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Count bytes meanwhile; for errors see `take`."""
        self.take(count)
        try:
            yield
        finally:
            self._add(-count)

    def replace(self, count: int) -> None:
        """Give back the request's bytes, and count those of the response, which exists already."""
        self.give_back()
        self._add(count)

    def give_back(self) -> None:
        """Give the bytes back to the budget."""
        if self._count:
            self._add(-self._count)

    def _add(self, count: int) -> None:
        self._bodies.add(self._subject, count)
        self._count += count
