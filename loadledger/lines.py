"""The lines of a stream of events: cut out of what arrives, and what each says."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from loadledger.problems import BadAnswer
from loadledger.records import Event

MAX_LINE_BYTES = 16 * 2**20
"""Of an event; what is longer is none."""


class Lines:
    """Cuts lines out of chunks, wherever those end.

    Args:
        most: bytes that a line may have.
    """

    def __init__(self, most: int = MAX_LINE_BYTES) -> None:
        self._most = most
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that a chunk completes, without their ends; what is left waits for the next.

        Raises:
            BadAnswer: a line is too long.
        """
        end = chunk.rfind(b"\n")
        if end < 0:
            self._rest += chunk
            self._check(len(self._rest))
            return []
        lines = bytes(self._rest + chunk[:end]).split(b"\n")
        self._rest = bytearray(chunk[end + 1 :])
        self._check(max(map(len, lines)))
        return lines

    def _check(self, length: int) -> None:
        if length > self._most:
            raise BadAnswer(
                f"what the server sends is no stream of events: a line has {length} bytes or more"
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream is, though no event of it has that position."""

    position: int


def message(line: bytes) -> Event | Place | None:
    """Return what a line of a stream says; None if it is nothing that matters here.

    Raises:
        BadAnswer: it is no line of such a stream.
    """
    if not line.strip():
        return None
    try:
        notice = msgspec.json.decode(line, type=_Notice)
    except _NOT_JSON:
        raise _no_event(line) from None
    if notice.stream is None:
        return event(line)
    if notice.stream == "bookmark" and notice.position is not None:
        return Place(notice.position)
    return None


def event(line: bytes) -> Event:
    """Return the event that a line is.

    Raises:
        BadAnswer: it is none.
    """
    try:
        return Event.read(line)
    except _NOT_JSON:
        raise _no_event(line) from None


class _Notice(msgspec.Struct):
    stream: str | None = None
    position: int | None = None


_NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)


def _no_event(line: bytes) -> BadAnswer:
    return BadAnswer(f"the server sent a line of {len(line)} bytes that is no event")
