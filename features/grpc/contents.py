"""Typed tensors (`InferTensorContents`): to the protocol's raw form, and back.

Floats have the same bytes in both forms. Integers are varints, which a thread decodes: 600 KB take
milliseconds. FP16 and BF16 have no typed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from features.grpc.messages import message_class
from features.grpc.wireformat import count_varints, decode_varints, encode_varint, field_head
from runtime.onnxfields import FIXED32, FIXED64, MAX_VARINT_BYTES, FieldReader, Unparsable
from runtime.wire import DATATYPES, Buffer
from runtime.wire import LENGTH as TEXT_LENGTH

NAMES = (
    *("bool_contents", "int_contents", "int64_contents", "uint_contents", "uint64_contents"),
    *("fp32_contents", "fp64_contents", "bytes_contents"),
)
"""The fields of InferTensorContents, which are numbered from 1."""
FIELDS = {
    "BOOL": 1,
    **dict.fromkeys(("INT8", "INT16", "INT32"), 2),
    "INT64": 3,
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), 4),
    "UINT64": 5,
    "FP32": 6,
    "FP64": 7,
    "BYTES": 8,
}
"""The number of the field that has a datatype's elements."""
INT32 = FIELDS["INT32"]
"""Negative numbers of this field are written with 64 bits, and read with 32 (protobuf's int32)."""
_FIXED_TAGS = {6: 6 << 3 | FIXED32, 7: 7 << 3 | FIXED64}
"""The byte before a float that is not packed."""
MAX_ELEMENTS = 1_000_000
"""Texts, or elements that are not packed: so many take a thread, and half of the gateway's time, 2 s."""
CHUNK_ELEMENTS = 8192
"""Elements of an answer that are Python's objects at a time."""

_CONTENTS = message_class("inference.InferTensorContents")


class InvalidContents(ValueError):
    """The typed contents of a tensor do not fit its datatype; the text says why and what to do."""


def to_raw(datatype: str, contents: Sequence[memoryview]) -> Buffer:
    """Return the elements of a tensor in raw form.

    Args:
        datatype: the tensor's.
        contents: the encoded InferTensorContents, of which a message may have several, to be merged.

    Raises:
        InvalidContents: a field of another datatype has elements, or a number is out of range.
        Unparsable, TooManyFields: the encoding is malformed, or has too many elements.
    """
    number = FIELDS.get(datatype)
    if number is None:
        hint = "send raw_input_contents" if datatype in DATATYPES else "no such datatype"
        raise InvalidContents(f"{datatype:.64} has no typed contents: {hint}")
    values, raw = _values(number, datatype, contents), bytearray()
    if datatype == "BYTES":
        for value in values:
            raw += TEXT_LENGTH.pack(len(value))
            raw += value
        return raw
    first, rest = next(values, b""), bytearray()
    for value in values:  # may be millions, each of a few bytes
        rest += value
    packed = memoryview(b"".join((first, rest)) if rest else first)
    if datatype in ("FP32", "FP64"):
        return packed
    kind = np.dtype(DATATYPES[datatype].numpy)
    for decoded in decode_varints(packed):
        numbers = decoded.astype(np.uint32).view(np.int32) if number == INT32 else decoded
        elements = numbers.astype(kind)
        if kind.kind != "b" and number != FIELDS["INT64"] and not np.array_equal(elements, numbers):
            raise InvalidContents(
                f"a number in {NAMES[number - 1]} is out of the range of {datatype}: send another"
            )
        raw += elements.tobytes()
    return raw


def raw_bytes(datatype: str, contents: Sequence[memoryview]) -> int:
    """Return the most bytes that the raw form takes beside the message."""
    sizes = sum(map(len, contents))
    kind = DATATYPES.get(datatype)
    if datatype in ("FP32", "FP64") or kind is None:
        return sizes
    return sum(map(count_varints, contents)) * kind.size if kind.size else 2 * sizes


def typed_bytes(datatype: str, count: int) -> int:
    """Return the most bytes that the typed form of a raw tensor of so many bytes takes beside it."""
    kind = DATATYPES[datatype]
    if datatype in ("FP32", "FP64", "BOOL") or not kind.size:
        return 2 * count
    return count // kind.size * MAX_VARINT_BYTES  # a negative number has all of them


def _values(number: int, datatype: str, contents: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the packed lists of a field, and its elements that are not packed, which parsers take, too."""
    for message in contents:
        at = 0
        for field in FieldReader(message, MAX_ELEMENTS, "a tensor").read_all(0, len(message)):
            if field.number != number:
                if field.number <= len(NAMES):
                    raise InvalidContents(
                        f"it is {datatype}, and has elements in {NAMES[field.number - 1]}:"
                        f" send them in {NAMES[number - 1]}"
                    )
            elif field.start >= 0:
                yield message[field.start : field.next]
            elif message[at] == _FIXED_TAGS.get(number):
                yield message[at + 1 : field.next]
            elif number < FIELDS["FP32"] and field.value >= 0:
                yield encode_varint(field.value)
            else:
                raise Unparsable(f"an element of {NAMES[number - 1]} of another type")
            at = field.next


def from_raw(datatype: str, raw: memoryview) -> Buffer:
    """Return the encoded InferTensorContents of a raw tensor."""
    number = FIELDS[datatype]
    if datatype == "BYTES":
        encoded = bytearray()
        for part in _split_texts(raw):
            encoded += part
        return encoded
    if datatype in ("FP32", "FP64", "BOOL"):  # a true or false is a varint of one byte
        return field_head(number, len(raw)) + raw
    elements, name = np.frombuffer(raw, DATATYPES[datatype].numpy), NAMES[number - 1]
    starts = range(0, len(elements), CHUNK_ELEMENTS)
    chunks = (elements[start : start + CHUNK_ELEMENTS].tolist() for start in starts)
    # Several packed lists of one field are one list.
    return b"".join(_CONTENTS(**{name: chunk}).SerializeToString() for chunk in chunks)


def _split_texts(raw: memoryview) -> Iterator[bytes | memoryview]:
    at = 0
    while at < len(raw):
        (size,) = TEXT_LENGTH.unpack_from(raw, at)
        at += TEXT_LENGTH.size
        yield field_head(FIELDS["BYTES"], size)
        yield raw[at : at + size]
        at += size
