"""The memory that request bodies take, all together: bounded, whoever sends them."""

from __future__ import annotations

from server.errors import ServerProblem

MAX_BODIES_BYTES = 2**30
"""Sixteen of the largest. Their models' processes have as much again while they read."""


class BodiesFull(ServerProblem):
    """Too many large requests are being served at once; try again."""

    code = "bodies_full"


class Bodies:
    """How many bytes of bodies are in memory.

    Args:
        max_bytes: how many may be.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.taken_bytes = 0

    def share(self) -> Share:
        """Return what one request holds; nothing yet."""
        return Share(self)

    def take(self, count: int) -> None:
        """Count bytes that have come.

        Raises:
            BodiesFull: `bodies_full`; these are not counted.
        """
        if self.taken_bytes + count > self._max_bytes:
            raise BodiesFull
        self.taken_bytes += count


class Share:
    """The bytes of one request's body, until it is answered."""

    __slots__ = ("_bodies", "_count")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._count = 0

    def take(self, count: int) -> None:
        """Count bytes that have come.

        Raises:
            BodiesFull: `bodies_full`.
        """
        self._bodies.take(count)
        self._count += count

    def give_back(self) -> None:
        """Let others have them."""
        self._bodies.taken_bytes -= self._count
        self._count = 0
