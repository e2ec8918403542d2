"""Whether a body is in the canonical form: what has two readings, as a key that comes twice, is not."""

from __future__ import annotations

import json

import msgspec

from events.bodies import members_of
from events.canonical import canonical
from events.errors import NotEncodable
from events.types import Event, Unknown


def _no_floats(text: str) -> float:
    raise ValueError(text)


_DECODER = msgspec.json.Decoder(float_hook=_no_floats)
_ENCODER = msgspec.json.Encoder(order="sorted")
"""Writes the canonical form of nearly all bodies, much faster than the rule itself."""


class Exactness:
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
                _ENCODER.encode_into(members_of(event, data), self._buffer)
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
        return canonical(json.loads(body)).encode() == body
    except (NotEncodable, ValueError, RecursionError):
        return False
