"""Typed tensors of gRPC: each datatype to its raw form and back, with protobuf's library as the reference."""

import struct
import tracemalloc
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN
from tritonclient.utils import serialize_byte_tensor

from features.grpc.contents import (
    CHUNK_ELEMENTS,
    FIELDS,
    NAMES,
    InvalidContents,
    from_raw,
    raw_bytes,
    to_raw,
    typed_bytes,
)
from features.grpc.messages import message_class
from features.grpc.wireformat import CHUNK_BYTES, count_varints, decode_varints, encode_varint, field_head
from runtime.onnxfields import FIXED32, FIXED64, LENGTH, START_GROUP, VARINT, TooManyFields, Unparsable
from runtime.wire import DATATYPES

Contents = message_class("inference.InferTensorContents")
WIRE_TYPES = {6: FIXED32, 7: FIXED64, 8: LENGTH}
"""Of elements that are no varints."""


def elements_of(datatype: str) -> st.SearchStrategy[Any]:
    kind = np.dtype(DATATYPES[datatype].numpy)
    if kind.kind in "iu":
        lowest, highest = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
        return st.integers(lowest, highest) | st.sampled_from([lowest, highest])
    floats = st.floats(width=32 if datatype == "FP32" else 64, allow_nan=False) | st.just(float("nan"))
    return {"b": st.booleans(), "f": floats, "O": st.binary(max_size=300)}[kind.kind]


def encode(number: int, values: list[Any]) -> bytes:
    """Return the message of the library, with a packed list."""
    encoded: bytes = Contents(**{NAMES[number - 1]: values}).SerializeToString()
    return encoded


def packed(number: int, values: list[Any]) -> memoryview:
    """Return the content of a packed list."""
    encoded = encode(number, values)
    sizes = (size for size in range(len(encoded)) if len(field_head(number, size)) + size == len(encoded))
    return memoryview(encoded)[len(field_head(number, next(sizes, 0))) :]


def unpack(number: int, value: Any) -> bytes:
    """Return one element as a field, as parsers accept it."""
    wire = WIRE_TYPES.get(number, VARINT)
    content = encode(number, [value]) if wire == LENGTH else packed(number, [value])
    return bytes(content) if wire == LENGTH else bytes([number << 3 | wire, *content])


def raw_of(datatype: str, values: list[Any]) -> bytes:
    if datatype != "BYTES":
        return np.array(values, DATATYPES[datatype].numpy).tobytes()
    return bytes(serialize_byte_tensor(np.array(values, object)).item()) if values else b""


def convert(datatype: str, *messages: bytes) -> bytes:
    """Return the raw form, which must not be longer than the memory that is counted for it."""
    contents = [memoryview(message) for message in messages]
    raw = bytes(to_raw(datatype, contents))
    assert len(raw) <= raw_bytes(datatype, contents)
    return raw


# Protobuf's encoding


@pytest.mark.parametrize(
    ("number", "datatype"), [(1, "BOOL"), (2, "INT32"), (3, "INT64"), (4, "UINT32"), (5, "UINT64")]
)
@PLAIN
@given(data=st.data())
def test_varints_of_the_library_decode_to_its_numbers(
    number: int, datatype: str, data: st.DataObject
) -> None:
    values = data.draw(st.lists(elements_of(datatype), min_size=1))
    list_of = packed(number, values)
    assert np.concatenate([*decode_varints(list_of)]).tolist() == [value % 2**64 for value in values]
    assert count_varints(list_of) == len(values)


def test_varints_decode_across_chunks() -> None:
    values = [(-1) ** at * 2 ** (at % 63) for at in range(3 * CHUNK_BYTES // 5)]
    chunks = [*decode_varints(packed(3, values))]
    assert len(chunks) > 3
    assert np.concatenate(chunks).view(np.int64).tolist() == values


@pytest.mark.parametrize(
    "malformed",
    [
        b"\x80",
        b"\x01\x80",
        b"\xff" * 10 + b"\x01",
        b"\x80" * 2 * CHUNK_BYTES,
        b"\x01" * CHUNK_BYTES + b"\xff",
    ],
)
def test_varint_without_an_end_is_refused(malformed: bytes) -> None:
    with pytest.raises(Unparsable, match="without an end"):
        [*decode_varints(memoryview(malformed))]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 2**14 - 1, 2**14, 2**21])
def test_field_heads_equal_those_of_the_library(size: int) -> None:
    assert field_head(8, size) + bytes(size) == encode(8, [bytes(size)])
    backend = message_class("inference.ModelConfig")(backend="x" * size).SerializeToString()
    assert not size or field_head(17, size) + b"x" * size == backend


# Datatypes


@pytest.mark.parametrize("datatype", FIELDS)
@PLAIN
@given(data=st.data())
def test_typed_tensor_has_the_bytes_of_numpy(datatype: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(elements_of(datatype)))
    encoded, raw = encode(FIELDS[datatype], values), raw_of(datatype, values)
    assert convert(datatype, encoded) == raw
    written = bytes(from_raw(datatype, memoryview(raw)))
    assert len(written) <= typed_bytes(datatype, len(raw)) + 20  # the head of the field
    assert Contents.FromString(written).SerializeToString() == encoded
    assert convert(datatype, written) == raw


@pytest.mark.parametrize("datatype", FIELDS)
def test_long_tensor_survives_both_ways(datatype: str) -> None:
    count = 2 * CHUNK_ELEMENTS + 1
    if datatype == "BYTES":
        raw = raw_of(datatype, [b"x" * (number % 200) for number in range(count)])
    else:
        numbers = np.arange(count) - count // 2
        raw = numbers.astype(DATATYPES[datatype].numpy).tobytes()
    assert convert(datatype, bytes(from_raw(datatype, memoryview(raw)))) == raw


@pytest.mark.parametrize("datatype", FIELDS)
@PLAIN
@given(data=st.data())
def test_parts_of_a_tensor_are_merged_in_order(datatype: str, data: st.DataObject) -> None:
    """Packed lists and single elements alternate, in several messages, as protobuf allows."""
    number = FIELDS[datatype]
    values = data.draw(st.lists(elements_of(datatype), max_size=12))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(values)))) | {0, len(values)})
    messages = [b""]
    for start, end in pairwise(cuts):
        messages += [b""] * data.draw(st.integers(0, 1))
        single = b"".join(unpack(number, value) for value in values[start:end])
        messages[-1] += data.draw(st.sampled_from([single, encode(number, values[start:end])]))
    assert convert(datatype, *messages) == raw_of(datatype, values)


@pytest.mark.parametrize(
    ("datatype", "varint", "raw"),
    [
        ("INT32", 2**32 + 5, b"\x05\0\0\0"),  # protobuf's int32 is the lower half
        ("INT8", 2**64 - 1, b"\xff"),
        ("INT8", 2**32 - 1, b"\xff"),
        ("BOOL", 2, b"\x01"),
        ("INT64", 2**64 - 2, b"\xfe" + b"\xff" * 7),
    ],
)
def test_varint_is_read_as_by_the_library(datatype: str, varint: int, raw: bytes) -> None:
    number = FIELDS[datatype]
    encoded = bytes([number << 3 | VARINT]) + encode_varint(varint)
    assert raw_of(datatype, getattr(Contents.FromString(encoded), NAMES[number - 1])) == raw
    assert convert(datatype, encoded) == raw


def test_unknown_fields_of_contents_are_skipped() -> None:
    assert convert("INT8", field_head(9, 3) + b"abc" + encode(2, [-1]) + b"\x50\x01") == b"\xff"


# Refusals


@pytest.mark.parametrize(
    ("datatype", "number", "value", "text"),
    [
        ("INT8", 2, 300, "a number in int_contents is out of the range of INT8"),
        ("INT8", 2, -129, "out of the range of INT8"),
        ("INT16", 2, 2**15, "out of the range of INT16"),
        ("UINT8", 4, 256, "a number in uint_contents is out of the range of UINT8"),
        ("UINT16", 4, 2**16, "out of the range of UINT16"),
        ("FP32", 7, 1.5, "it is FP32, and has elements in fp64_contents: send them in fp32_contents"),
        ("INT64", 2, 1, "send them in int64_contents"),
        ("UINT8", 2, 1, "send them in uint_contents"),
        ("BYTES", 1, True, "send them in bytes_contents"),
        ("FP16", 6, 1.5, "FP16 has no typed contents: send raw_input_contents"),
        ("BF16", 6, 1.5, "BF16 has no typed contents: send raw_input_contents"),
        ("FLOAT", 6, 1.5, "FLOAT has no typed contents: no such datatype"),
    ],
)
def test_contents_of_another_datatype_are_refused(datatype: str, number: int, value: Any, text: str) -> None:
    with pytest.raises(InvalidContents, match=text):
        to_raw(datatype, [memoryview(encode(number, [value]))])


CONTENT = {VARINT: b"\x01", FIXED32: bytes(4), FIXED64: bytes(8)}


@pytest.mark.parametrize("before", [b"", bytes(40)], ids=["alone", "after others"])
@pytest.mark.parametrize("datatype", ["BOOL", "INT32", "UINT64", "FP32", "FP64", "BYTES"])
def test_element_of_another_wire_type_is_refused(datatype: str, before: bytes) -> None:
    number = FIELDS[datatype]
    others = field_head(number, len(before)) + before if before else b""
    group = bytes([number << 3 | START_GROUP, 9 << 3, 1, number << 3 | 4])
    wrong = [bytes([number << 3 | wire]) + content for wire, content in CONTENT.items()]
    own = WIRE_TYPES.get(number, VARINT)
    for element in (group, *(each for each in wrong if each[0] & 7 != own)):
        with pytest.raises(Unparsable, match="of another type"):
            to_raw(datatype, [memoryview(others + element)])


@PLAIN
@given(datatype=st.sampled_from(sorted(DATATYPES)), encoded=st.binary(max_size=60))
def test_random_contents_are_converted_or_refused(datatype: str, encoded: bytes) -> None:
    with suppress(InvalidContents, Unparsable, TooManyFields):
        convert(datatype, encoded)


@pytest.mark.parametrize(
    ("datatype", "element"),
    [("BYTES", b"\x42\0"), ("FP32", struct.pack("<Bf", 0x35, 1))],
)
def test_short_elements_take_no_memory_of_their_own(datatype: str, element: bytes) -> None:
    contents = [memoryview(element * 50_000)]
    tracemalloc.start()
    raw = to_raw(datatype, contents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(raw) == 4 * 50_000
    assert peak < 3 * len(raw)
