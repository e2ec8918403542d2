"""Protobuf's encoding of numbers and fields with a length (protobuf.dev/programming-guides/encoding).

The library would copy each tensor twice, and make an object of each element.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtime.onnxfields import LENGTH, MAX_VARINT_BYTES, Unparsable

_MORE, _BITS = 0x80, 7

CHUNK_BYTES = 64 * 2**10
"""Varints decoded at a time, which limits the memory for it."""


def encode_varint(value: int) -> bytes:
    """Return the encoding of a number that is not negative."""
    encoded = bytearray()
    while value >= _MORE:
        encoded.append(value & 0xFF | _MORE)
        value >>= _BITS
    encoded.append(value)
    return bytes(encoded)


def field_head(number: int, size: int) -> bytes:
    """Return what precedes the value of a field with a length: a text, message, or packed list."""
    return encode_varint(number << 3 | LENGTH) + encode_varint(size)


def decode_varints(encoded: memoryview) -> Iterator[NDArray[np.uint64]]:
    """Yield the numbers of a packed list, some thousands at a time; a negative one as its two's complement.

    Raises:
        Unparsable: a number is malformed, or the last one has no end.
    """
    at = 0
    while at < len(encoded):
        chunk = np.frombuffer(encoded[at : at + CHUNK_BYTES], np.uint8)
        ends = np.flatnonzero(chunk < _MORE)
        starts = np.concatenate(([0], ends[:-1] + 1))
        if not len(ends) or int((lengths := ends + 1 - starts).max()) > MAX_VARINT_BYTES:
            raise Unparsable("a number without an end")
        values = np.zeros(len(ends), np.uint64)
        for index in range(int(lengths.max())):
            reaches = lengths > index
            bits = (chunk[starts[reaches] + index] & (_MORE - 1)).astype(np.uint64)
            values[reaches] |= bits << np.uint64(_BITS * index)
        yield values
        at += int(ends[-1]) + 1


def count_varints(encoded: memoryview) -> int:
    """Return how many numbers a packed list has: as many as bytes without the bit for more."""
    return int(np.count_nonzero(np.frombuffer(encoded, np.uint8) < _MORE))
