r"""Events as they are stored and hashed: the canonical JSON of the whole event, and back.

The canonical form: the one text, and so the one sequence of bytes, that an event is hashed as.

The rule, complete, so that anybody can write it again (test vectors: `tests/events/vectors.json`):

- JSON, no white space, UTF-8; object keys sorted by Unicode code point.
- Leaf values are integers from -2^63 to 2^63-1, strings, `true`, `false` and `null`. No floats.
- In strings only `"`, `\` and U+0000 to U+001F are escaped: `\"`, `\\`, `\b`, `\f`, `\n`, `\r`, `\t`,
  else `\u00xx` in lower-case hexadecimal. No lone surrogates.

It is not RFC 8785, whose numbers are IEEE doubles: integers stay exact here.
`hash = SHA-256(previous hash ‖ UTF-8 of the body)`; before the first event 32 zero bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import msgspec

from events.errors import NotEncodable
from events.types import (
    SCHEMA,
    TYPES,
    Cause,
    Data,
    Durations,
    Event,
    Idempotency,
    LoadedFile,
    Prepared,
    Unknown,
)

GENESIS = bytes(32)
"""The hash before the first event."""

_MAX = 2**63


def encode_canonical(value: object) -> str:
    """Return `value` in canonical form.

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
    """Return the hash of `body` after an event whose hash was `previous` (32 bytes each)."""
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
                if type(item) is not str:  # nearly all are, and their place need not be spelt out
                    _check(item, f"{where}.{key}")
        case list() | tuple():
            for index, item in enumerate(value):
                _check(item, f"{where}[{index}]")
        case _:
            raise NotEncodable(f"{where}: {type(value).__name__} has no canonical form")


def encode_event(event: Event) -> str:
    """Return the canonical JSON of the whole event, which is what is stored and hashed.

    Raises:
        NotEncodable: a value that the canonical form does not have.
    """
    quick = _quickly(event)
    return quick if quick is not None else encode_by_rule(event)


def encode_by_rule(event: Event) -> str:
    """Return what `encode_event` does, written by the rule itself.

    Raises:
        NotEncodable: a value that the canonical form does not have.
    """
    unknown = event.data if isinstance(event.data, Unknown) else None
    try:
        data = unknown.data if unknown else msgspec.to_builtins(event.data)
    except TypeError as error:
        raise NotEncodable(f"$.data: {error}") from None
    return encode_canonical(
        {
            "position": event.position,
            "id": event.id,
            "type": event.type,
            "schema": unknown.schema if unknown else SCHEMA,
            "job_id": event.job_id,
            "model_id": event.model_id,
            "version": event.version,
            "worker_id": event.worker_id,
            "actor": event.actor,
            "recorded_at": event.recorded_at,
            "data": data,
        },
    )


class EventBody(msgspec.Struct, gc=False):
    """What a body has; in the order of names, because that is sorted again each time."""

    actor: str
    data: Data
    id: str
    job_id: str | None
    model_id: str | None
    position: int
    recorded_at: str
    schema: int
    type: str
    version: int | None
    worker_id: str | None


def make_body(event: Event, data: Data) -> EventBody:
    """Return what the body of an event with these data has."""
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


_QUICK = msgspec.json.Encoder(order="sorted")
"""Writes the canonical form, five times as fast, of what `_is_plain`: a property test holds it to that."""


def _quickly(event: Event) -> str | None:
    """Return the body, or None where it takes the long way to write it, or to say why that cannot be."""
    data = event.data
    if isinstance(data, Unknown) or not all(map(_is_plain, (*_members(event), data))):
        return None
    try:
        return _QUICK.encode(make_body(event, data)).decode()
    except UnicodeEncodeError:  # a lone surrogate
        return None


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is int:
        return bool(-(2**63) <= value < 2**63)
    if kind is tuple:
        return all(map(_is_plain, value))
    values = _VALUES.get(kind)
    return values is not None and all(map(_is_plain, values(value)))


def _values_of(kind: type[Any]) -> Callable[[Any], tuple[object, ...]]:
    names = kind.__struct_fields__
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


_PLAIN = frozenset({str, bool, type(None), Cause})
_VALUES: Mapping[type[Any], Callable[[Any], tuple[object, ...]]] = {
    kind: _values_of(kind) for kind in (*TYPES.values(), Idempotency, LoadedFile, Prepared, Durations)
}
_members = attrgetter("position", "id", "actor", "recorded_at", "job_id", "model_id", "version", "worker_id")


def decode_event(body: str | bytes) -> Event:
    """Return the event whose body this is; what this release does not know becomes `Unknown`.

    Raises:
        msgspec.DecodeError: it is no event.
    """
    raw = _WHOLE.decode(body)
    return Event(
        raw.position,
        raw.id,
        _data(raw),
        raw.actor,
        raw.recorded_at,
        raw.job_id,
        raw.model_id,
        raw.version,
        raw.worker_id,
    )


class _Whole(msgspec.Struct, gc=False):
    """An event whose data nobody has looked at: what they are depends on the type, which stands behind."""

    position: int
    id: str
    type: str
    schema: int
    data: msgspec.Raw
    actor: str
    recorded_at: str
    job_id: str | None
    model_id: str | None
    version: int | None
    worker_id: str | None


_WHOLE = msgspec.json.Decoder(_Whole)
_KNOWN: Mapping[str, msgspec.json.Decoder[Data]] = {
    name: msgspec.json.Decoder(kind) for name, kind in TYPES.items()
}
_OBJECT = msgspec.json.Decoder(dict[str, Any])


def _data(raw: _Whole) -> Data | Unknown:
    known = _KNOWN.get(raw.type)
    if known is None or raw.schema != SCHEMA:
        return Unknown(raw.type, raw.schema, _OBJECT.decode(raw.data))
    return known.decode(raw.data)


def _no_floats(text: str) -> float:
    raise ValueError(text)


_DECODER = msgspec.json.Decoder(float_hook=_no_floats)
_ENCODER = msgspec.json.Encoder(order="sorted")
"""Writes the canonical form of nearly all bodies, much faster than the rule itself."""


class CanonicalCheck:
    """Whether bodies are in the canonical form, asked one after the other by one thread."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def holds(self, event: Event, body: bytes) -> bool:
        """Whether `body`, which was read as `event`, is in the canonical form.

        Bytes that come back when the event is written are. Others may still be: of a later release, or an
        earlier one, which had fewer members.
        """
        data = event.data
        if not isinstance(data, Unknown):
            try:
                _ENCODER.encode_into(make_body(event, data), self._buffer)
                if self._buffer == body:
                    return True
            except (ValueError, OverflowError):  # as by a release of msgspec that has no such integers
                pass
        return is_canonical(body)


def is_canonical(body: bytes) -> bool:
    """Whether these are the bytes that the canonical form has for what they say.

    Integers of more than 64 bits, which the form does not have, are let through: they have one reading.
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
