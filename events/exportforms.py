"""The forms of an export as they are read again: of each, where it begins, its events and its signed head."""

from __future__ import annotations

from typing import Annotated, Protocol, TypeVar

import msgspec

from events.cloudevents import HEAD_TYPE, from_source, source_of
from events.export import FORMAT, Lines, jsonl
from events.signing import Base, SignedHead, as_signed_head
from events.store import Row

_HASH_BYTES = 32
_POSITIONS = range(2**63)

T = TypeVar("T")


class ReadForm(Protocol):
    """A form whose lines are read.

    Attributes:
        after: where the export begins.
        begins_at_once: whether its first line is an event, or the head, already.
    """

    after: Base
    begins_at_once: bool

    def read(self, line: bytes) -> Row | SignedHead:
        """Return what a line says; what it is worth, others have to see.

        Raises:
            ValueError: it is no line of this form.
        """
        ...

    def written(self, found: Row | SignedHead, previous: bytes) -> bytes:
        """Return the one line that says this, after an event with the hash `previous`.

        Raises:
            KeyError, TypeError, ValueError: there is none.
        """
        ...


def form_of(first: bytes) -> ReadForm:
    """Return the form of an export that begins with this line.

    Raises:
        ValueError: it is no export.
    """
    if first.startswith(b"SQLite format 3"):
        raise ValueError("this is a database, no export: name the data directory of a ledger with --data")
    try:
        mark = _decoded(first, _Mark)
    except ValueError:
        raise ValueError(f"the first line does not say that this is a {FORMAT}") from None
    if mark.specversion is not None:
        return _CloudEvents(first)
    if mark.export != FORMAT:
        raise ValueError(f"the first line does not say that this is a {FORMAT}")
    return _JsonLines(first)


class _Mark(msgspec.Struct):
    export: str | None = None
    specversion: str | None = None


_Position = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _After(msgspec.Struct):
    position: _Position
    hash: str


class _Opening(msgspec.Struct):
    after: _After


class _JsonLine(msgspec.Struct, gc=False):
    position: _Position | None = None
    hash: str | None = None
    body: str | None = None
    head: msgspec.Raw = msgspec.Raw()


class _JsonLines:
    """`events.export.jsonl`."""

    begins_at_once = False

    def __init__(self, first: bytes) -> None:
        try:
            after = _decoded(first, _Opening).after
            self.after = _base(after.position, after.hash)
        except ValueError as error:
            raise ValueError(f"the first line does not say where this begins: {error}") from None
        self._lines = jsonl()
        if self._lines.first(self.after) != first:
            raise ValueError("the first line is not as it is written")

    def read(self, line: bytes) -> Row | SignedHead:
        members = _decoded(line, _JsonLine)
        if members.head:
            return as_signed_head(msgspec.json.decode(members.head))
        if members.position is None or members.hash is None or members.body is None:
            raise ValueError("it has no position, hash and body")
        return Row(members.position, members.body, bytes.fromhex(members.hash))

    def written(self, found: Row | SignedHead, previous: bytes) -> bytes:
        return _written(self._lines, found, previous)


class _Place(msgspec.Struct, gc=False):
    position: _Position


class _CloudEvent(msgspec.Struct, gc=False):
    type: str
    source: str
    data: msgspec.Raw
    ledgerhash: str
    ledgerprevious: str | None = None


class _CloudEvents:
    """`events.cloudevents`; who reads only the attributes of a line must not read something else."""

    begins_at_once = True

    def __init__(self, first: bytes) -> None:
        event = _decoded(first, _CloudEvent)
        self._source = event.source
        self._lines = from_source(event.source)
        position = _decoded(event.data, _Place).position
        if event.type == HEAD_TYPE:
            self.after = _base(position, event.ledgerhash)
        else:
            self.after = _base(position - 1, event.ledgerprevious or "")

    def read(self, line: bytes) -> Row | SignedHead:
        event = _decoded(line, _CloudEvent)
        if event.type == HEAD_TYPE:
            return as_signed_head(msgspec.json.decode(event.data))
        body = bytes(event.data)
        return Row(_decoded(body, _Place).position, body.decode(), bytes.fromhex(event.ledgerhash))

    def written(self, found: Row | SignedHead, previous: bytes) -> bytes:
        if isinstance(found, SignedHead) and source_of(found.public_key) != self._source:
            raise ValueError("the source is not the key that signed")
        return _written(self._lines, found, previous)


def _written(lines: Lines, found: Row | SignedHead, previous: bytes) -> bytes:
    return lines.last(found) if isinstance(found, SignedHead) else lines.event(found, previous)


def _base(position: int, digest: str) -> Base:
    base = Base(position, bytes.fromhex(digest))
    if position not in _POSITIONS or len(base.hash) != _HASH_BYTES:
        raise ValueError("that is no position with its hash")
    return base


def _decoded(text: bytes | msgspec.Raw, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
