r"""The stored form of an event: its canonical JSON, the decoder, and the hash chain.

The canonical form of a value is a single text, and so a single sequence of bytes. The complete rule (test
vectors: `tests/events/vectors.json`):

- JSON, no white space, UTF-8; object keys sorted by Unicode code point.
- Leaf values are integers from -2^63 to 2^63-1, strings, `true`, `false` and `null`. No floats.
- In strings only `"`, `\` and U+0000 to U+001F are escaped: `\"`, `\\`, `\b`, `\f`, `\n`, `\r`, `\t`,
  else `\u00xx` in lower-case hexadecimal. No lone surrogates.

It is not RFC 8785, whose numbers are IEEE doubles: here integers stay exact.
`hash = SHA-256(previous hash ‖ UTF-8 of the body)`; before the first event 32 zero bytes.

`encode_by_rule` writes bodies by the rule itself. `encode_event` is five times as fast; a property test holds
it to the rule. `CanonicalCheck` tells whether stored bytes are canonical.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UnsetType
from msgspec.structs import astuple

from events.errors import NotEncodable
from events.types import SCHEMA, TYPES, Cause, Data, Durations, Event, Idempotency, LoadedFile, Unknown
from events.values import FileHash

GENESIS = bytes(32)
"""The hash before the first event."""

_ENVELOPE = ("position", "id", "actor", "recorded_at", "job_id", "model_id", "version", "worker_id")
"""The members of a body that are fields of the event itself."""

_MAX = 2**63
"""Integers are from -_MAX to _MAX - 1: 64 bits with a sign, as in SQLite."""


def encode_canonical(value: object) -> str:
    """Return the canonical form of a value.

    Raises:
        NotEncodable: a float, an integer beyond 64 bits, a key that is not a string, a lone surrogate.
    """
    _check(value, "$")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotEncodable(f"text holds a lone surrogate at character {error.start}") from None
    return text


def hash_body(previous: bytes, body: str) -> bytes:
    """Return the hash (32 bytes) of a body that follows the event with the hash `previous`."""
    return hashlib.sha256(previous + body.encode()).digest()


def _check(value: object, where: str) -> None:
    match value:
        case None | bool() | str():
            return
        case int():
            if not -_MAX <= value < _MAX:
                raise NotEncodable(f"{where}: the integer does not fit into 64 bits")
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise NotEncodable(f"{where}: the key {key!r} is not a string")
                if type(item) is not str:  # nearly all are strings: skip formatting `where`
                    _check(item, f"{where}.{key}")
        case list() | tuple():
            for index, item in enumerate(value):
                _check(item, f"{where}[{index}]")
        case _:
            raise NotEncodable(f"{where}: {type(value).__name__} has no canonical form")


def encode_event(event: Event) -> str:
    """Return the canonical JSON of an event, its body.

    Raises:
        NotEncodable: `not_encodable`, a value has no canonical form.
    """
    body = _encode_fast(event)
    return body if body is not None else encode_by_rule(event)


def encode_by_rule(event: Event) -> str:
    """Return the body of an event, written by the rule itself.

    Raises:
        NotEncodable: `not_encodable`, a value has no canonical form.
    """
    unknown = event.data if isinstance(event.data, Unknown) else None
    try:
        data = unknown.data if unknown else msgspec.to_builtins(event.data)
    except TypeError as error:
        raise NotEncodable(f"$.data: {error}") from None
    members = {name: getattr(event, name) for name in _ENVELOPE}
    schema = unknown.schema if unknown else SCHEMA
    return encode_canonical({**members, "type": event.type, "schema": schema, "data": data})


D = TypeVar("D")


class EventBody(msgspec.Struct, Generic[D], gc=False):
    """The members of a body, in the order of their names, which saves time when they are sorted."""

    actor: str
    data: D
    id: str
    job_id: str | None
    model_id: str | None
    position: int
    recorded_at: str
    schema: int
    type: str
    version: int | None
    worker_id: str | None


def make_body(event: Event, data: Data) -> EventBody[Data]:
    """Return the members of the body of an event with these data."""
    return EventBody(
        event.actor,
        data,
        event.id,
        event.job_id,
        event.model_id,
        event.position,
        event.recorded_at,
        SCHEMA,
        data.TYPE,
        event.version,
        event.worker_id,
    )


_ENCODER = msgspec.json.Encoder(order="sorted")
"""Writes the canonical form of plain values."""


def _encode_fast(event: Event) -> str | None:
    """Return the body, or None for an event that only the rule can write or refuse."""
    data = event.data
    if isinstance(data, Unknown) or not _is_plain(event):
        return None
    try:
        return _ENCODER.encode(make_body(event, data)).decode()
    except UnicodeEncodeError:  # a lone surrogate
        return None


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is int:
        return bool(-_MAX <= value < _MAX)
    if kind is tuple:
        return all(map(_is_plain, value))
    return kind in _STRUCTS and all(map(_is_plain, astuple(value)))


_PLAIN = frozenset({str, bool, type(None), UnsetType, Cause})
_STRUCTS = frozenset({Event, *TYPES.values(), Idempotency, LoadedFile, FileHash, Durations})


def decode_event(body: str | bytes) -> Event:
    """Return the event of a body; data that this release does not know become `Unknown`.

    Raises:
        msgspec.DecodeError: the body is no event.
    """
    raw = _RAW.decode(body)
    return Event(
        raw.position,
        raw.id,
        _decode_data(raw),
        raw.actor,
        raw.recorded_at,
        raw.job_id,
        raw.model_id,
        raw.version,
        raw.worker_id,
    )


_RAW = msgspec.json.Decoder(EventBody[msgspec.Raw])
"""Leaves the data undecoded: their decoder depends on `type`, which follows them."""

_DATA: Mapping[str, msgspec.json.Decoder[Data]] = {
    name: msgspec.json.Decoder(kind) for name, kind in TYPES.items()
}
_OBJECT = msgspec.json.Decoder(dict[str, Any])


def _decode_data(raw: EventBody[msgspec.Raw]) -> Data | Unknown:
    decoder = _DATA.get(raw.type)
    if decoder is None or raw.schema != SCHEMA:
        return Unknown(raw.type, raw.schema, _OBJECT.decode(raw.data))
    return decoder.decode(raw.data)


def _refuse_float(text: str) -> float:
    raise ValueError(text)


_DECODER = msgspec.json.Decoder(float_hook=_refuse_float)


class CanonicalCheck:
    """Checks whether bodies are canonical, one after the other in one thread, with a reused buffer."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def holds(self, event: Event, body: bytes) -> bool:
        """Whether `body`, which was decoded as `event`, is canonical.

        `body` is canonical if encoding the event gives the same bytes. Otherwise it may be, too: a body of
        another release may have other members.
        """
        data = event.data
        if not isinstance(data, Unknown):
            try:
                _ENCODER.encode_into(make_body(event, data), self._buffer)
                if self._buffer == body:
                    return True
            except (ValueError, OverflowError):  # a release of msgspec without such integers
                pass
        return is_canonical(body)


def is_canonical(body: bytes) -> bool:
    """Whether bytes are the canonical form of the JSON that they hold.

    Integers beyond 64 bits pass, although they have no canonical form, because their spelling is unique.
    """
    try:
        if _ENCODER.encode(_DECODER.decode(body)) == body:
            return True
    except (ValueError, RecursionError):
        pass
    try:
        return encode_canonical(json.loads(body)).encode() == body
    except (NotEncodable, ValueError, RecursionError):
        return False
