"""Memory of the gateway: the messages that its calls hold, and its part of the container's memory."""

from __future__ import annotations

from collections import Counter

from features.grpc.errors import CallRefused

PROCESS_BYTES = 96 * 2**20
"""The process itself: 62 MB at its start, 80 MB after 10,000 streams (measured)."""
MESSAGES_BYTES = 2**30
"""Most memory for messages."""
SHARE = 16
"""Messages have a sixteenth of a small limit, and room for two of the largest."""
COPIES = 2
"""Copies that exist for a moment while a message is received or made, for one message at a time."""


def messages_bytes(limit_bytes: int, largest_bytes: int) -> int:
    """Return the memory for messages.

    Args:
        limit_bytes: the memory of the container or machine.
        largest_bytes: the largest request.
    """
    return max(min(MESSAGES_BYTES, limit_bytes // SHARE), 2 * largest_bytes)


def gateway_bytes(limit_bytes: int, largest_bytes: int) -> int:
    """Return what the gateway takes of the container's memory at most. Arguments as `messages_bytes`."""
    return PROCESS_BYTES + messages_bytes(limit_bytes, largest_bytes) + COPIES * largest_bytes


class MessageRoom:
    """The memory for the messages of all calls; the calls from one address have half of it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._by_address = Counter[str]()
        self.taken_bytes = 0

    def take(self, address: str, count: int) -> None:
        """Count bytes.

        Raises:
            CallRefused: RESOURCE_EXHAUSTED; these bytes are not counted.
        """
        of_address = self._by_address[address] + count
        if self.taken_bytes + count > self._limit_bytes or of_address > self._limit_bytes // 2:
            raise CallRefused(
                "RESOURCE_EXHAUSTED",
                "too many large messages are in memory at once; try again",
                "bodies_full",
            )
        self.give_back(address, -count)

    def give_back(self, address: str, count: int) -> None:
        self.taken_bytes -= count
        self._by_address[address] -= count
        if not self._by_address[address]:
            del self._by_address[address]


class CallMemory:
    """The bytes of one call."""

    def __init__(self, room: MessageRoom, address: str) -> None:
        self._room = room
        self._address = address
        self._count = 0

    def take(self, count: int) -> None:
        """Count bytes; for errors see `MessageRoom.take`."""
        self._room.take(self._address, count)
        self._count += count

    def give_back(self) -> None:
        self._room.give_back(self._address, self._count)
        self._count = 0
