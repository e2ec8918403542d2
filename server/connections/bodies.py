"""The memory that long requests and answers take, all together: bounded, whoever does not read his."""

from __future__ import annotations

from collections import Counter

from server.errors import ServerProblem

MAX_BODIES_BYTES = 2**30
"""Sixteen of the largest. Their models' processes have as much again while they read."""


class BodiesFull(ServerProblem):
    """Too many large requests are being served at once; try again."""

    code = "bodies_full"


class Bodies:
    """How many bytes of bodies are in memory.

    Args:
        max_bytes: beyond so many no more are taken in; of one subject, beyond half.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_subject: Counter[str] = Counter()
        self.taken_bytes = 0

    def share(self, subject: str) -> Share:
        """Return what one request of this subject holds; nothing yet."""
        return Share(self, subject)

    def take(self, subject: str, count: int) -> None:
        """Count bytes of a request that have come.

        Raises:
            BodiesFull: `bodies_full`; these are not counted.
        """
        of_subject = self._by_subject[subject] + count
        if self.taken_bytes + count > self._max_bytes or of_subject > self._max_bytes // 2:
            raise BodiesFull
        self.take_always(subject, count)

    def take_always(self, subject: str, count: int) -> None:
        """Count bytes that are there already."""
        self.taken_bytes += count
        self._by_subject[subject] += count

    def give_back(self, subject: str, count: int) -> None:
        """Let others have them."""
        self.taken_bytes -= count
        self._by_subject[subject] -= count
        if not self._by_subject[subject]:
            del self._by_subject[subject]


class Share:
    """The bytes of one request, and after it those of its answer, until the client has that."""

    __slots__ = ("_bodies", "_count", "_subject")

    def __init__(self, bodies: Bodies, subject: str) -> None:
        self._bodies = bodies
        self._subject = subject
        self._count = 0

    def take(self, count: int) -> None:
        """Count bytes that have come.

        Raises:
            BodiesFull: `bodies_full`.
        """
        self._bodies.take(self._subject, count)
        self._count += count

    def become(self, count: int) -> None:
        """Give back the request's, and count those of the answer, which is there already."""
        self.give_back()
        self._bodies.take_always(self._subject, count)
        self._count = count

    def give_back(self) -> None:
        """Let others have them."""
        if self._count:
            self._bodies.give_back(self._subject, self._count)
            self._count = 0
