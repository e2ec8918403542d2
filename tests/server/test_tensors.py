"""JSON tensors to raw bytes and back: every datatype that JSON allows, flat, nested, empty, and wrong."""

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from runtime.errors import InvalidInput
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Tensor
from server.tensors import MAX_JSON_BYTES, NotRepresentable, decode_tensor, encode_data

INTEGERS = {
    f"{sign}INT{bits}": (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for sign in ("", "U")
    for bits in (8, 16, 32, 64)
}
ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.integers(low, high) for name, (low, high) in INTEGERS.items()},
    "BOOL": st.booleans(),
    "BYTES": st.text(max_size=5),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
}
JSON_DATATYPES = sorted(DATATYPES.keys() - {"FP16", "BF16"})


def decode(datatype: str, shape: Sequence[int], data: object) -> Tensor:
    """Decode data given as a value, or as JSON text if it is bytes."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return decode_tensor("x", datatype, shape, msgspec.Raw(text))


def refusal(datatype: str, shape: Sequence[int], data: object) -> str:
    with pytest.raises(InvalidInput) as refused:
        decode(datatype, shape, data)
    assert refused.value.code == "invalid_input"
    assert "'x'" in str(refused.value)
    return str(refused.value)


def nested(flat: list[Any], shape: Sequence[int]) -> Any:
    """Nest a flat list as deep as its shape, as numpy's `tolist` does."""
    array = np.empty(len(flat), object)
    array[:] = flat
    return array.reshape(shape).tolist()


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, list[int], list[Any]]:
    datatype = draw(st.sampled_from(JSON_DATATYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    count = math.prod(shape)
    return datatype, shape, draw(st.lists(ELEMENTS[datatype], min_size=count, max_size=count))


@PLAIN
@given(tensors())
def test_what_is_decoded_and_encoded_again_is_the_same_flat_or_nested(
    drawn: tuple[str, list[int], list[Any]],
) -> None:
    datatype, shape, flat = drawn
    for data in (flat, nested(flat, shape) if shape else flat):
        tensor = decode(datatype, shape, data)
        assert tensor.shape == tuple(shape)
        assert encode_data(tensor) == flat
        if datatype != "BYTES":
            assert len(tensor.data) == math.prod(shape) * DATATYPES[datatype].size


def test_every_datatype_that_json_allows_is_tried_above() -> None:
    assert sorted(ELEMENTS) == JSON_DATATYPES


@pytest.mark.parametrize("datatype", sorted(INTEGERS))
def test_integers_go_to_the_ends_of_their_range_and_not_beyond(datatype: str) -> None:
    low, high = INTEGERS[datatype]
    tensor = decode(datatype, [2], [low, high])
    assert np.frombuffer(tensor.data, DATATYPES[datatype].numpy).tolist() == [low, high]
    for beyond in (low - 1, high + 1, 2**64, -(2**63) - 1, 10**400):
        refusal(datatype, [1], [beyond])


def test_the_elements_lie_in_row_major_order_and_little_endian() -> None:
    assert decode("UINT16", [2, 2], [[1, 2], [3, 4]]).data == bytes([1, 0, 2, 0, 3, 0, 4, 0])
    assert decode("FP32", [1], [1.5]).data == struct.pack("<f", 1.5)
    assert decode("BOOL", [2], [True, False]).data == b"\1\0"
    assert decode("BYTES", [2], ["é", ""]).data == b"\2\0\0\0\xc3\xa9\0\0\0\0"


@pytest.mark.parametrize("data", [[5], b"[5]", b" [\n5 ] "])
def test_a_scalar_is_a_list_of_one_and_has_no_dimensions(data: object) -> None:
    assert decode("INT64", [], data) == Tensor("x", "INT64", (), struct.pack("<q", 5))


@pytest.mark.parametrize("data", [b"5", [[5]], [], [5, 6]])
def test_what_is_no_list_of_one_is_no_scalar(data: object) -> None:
    refusal("INT64", [], data)


@pytest.mark.parametrize("datatype", JSON_DATATYPES)
@pytest.mark.parametrize(
    ("shape", "data"), [([0], []), ([0, 3], []), ([2, 0], [[], []]), ([2, 0], []), ([2, 0, 3], [[], []])]
)
def test_a_dimension_of_length_0_leaves_nothing(datatype: str, shape: list[int], data: object) -> None:
    assert decode(datatype, shape, data) == Tensor("x", datatype, tuple(shape), b"")


def test_floats_may_be_written_as_integers_and_integers_not_as_floats() -> None:
    assert encode_data(decode("FP32", [2], [1, -2])) == [1.0, -2.0]
    assert encode_data(decode("FP64", [1], [2**60])) == [float(2**60)]
    for text in (b"[1.0]", b"[1.5]", b"[1e2]", b"[-0.0]"):
        assert "Expected `int`" in refusal("INT32", [1], text)


def test_a_number_that_a_float_cannot_hold_is_refused_and_one_that_is_rounded_is_not() -> None:
    assert encode_data(decode("FP32", [1], [1e-60])) == [0.0]
    for data in (b"[1e39]", b"[-1e39]", b"[1e999]", b"[" + b"9" * 400 + b"]"):
        refusal("FP32", [1], data)
    refusal("FP64", [1], b"[1e999]")


@pytest.mark.parametrize(
    "text", [b"[NaN]", b"[Infinity]", b"[-Infinity]", b"[nan]", b"[.5]", b"[1.]", b"[01]"]
)
def test_what_json_has_no_number_for_is_refused(text: bytes) -> None:
    refusal("FP32", [1], text)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("FP32", ["1"]), ("FP32", [True]), ("FP32", [None]), ("FP32", [{}]), ("INT8", ["1"]),
        ("INT8", [True]), ("INT8", [None]), ("BOOL", [0]), ("BOOL", ["true"]), ("BOOL", [None]),
        ("BYTES", [1]), ("BYTES", [None]), ("BYTES", [True]), ("BYTES", [{}]),
    ],
)  # fmt: skip
def test_an_element_of_another_kind_is_refused(datatype: str, data: list[object]) -> None:
    assert f"is not {datatype}" in refusal(datatype, [1], data)


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BOOL", "BYTES"])
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ([3], "oo"), ([1], "oo"), ([2], ""), ([0], "o"), ([2, 2], "ooo"), ([2, 2], "ooooo"),
        ([2, 2], "(oo)"), ([2, 2], "(oo)(o)"), ([2, 2], "(o)(oo)"), ([2, 1], "(o)(oo)"), ([2, 1], "()(o)"),
        ([2, 2], "(oo)(oo)(oo)"), ([3, 2], "(ooo)(ooo)"), ([2, 2], "(oo)oo"), ([2, 2], "oo(oo)"),
        ([4], "(oo)(oo)"), ([2, 2], "((oo)(oo))"), ([1, 2, 2], "(oo)(oo)"), ([2, 0, 3], "()"),
        ([1, 2, 1], "((o)(oo))"), ([0, 3], "()"),
    ],
)  # fmt: skip
def test_data_of_another_shape_than_declared_is_refused(datatype: str, shape: list[int], form: str) -> None:
    element = {"FP32": "1.5", "INT64": "1", "BOOL": "true", "BYTES": '"a"'}[datatype]
    text = form.replace("(", "[").replace(")", "]").replace("o", element)
    text = text.replace("][", "],[").replace(element + element, f"{element},{element}")
    text = text.replace(element + element, f"{element},{element}").replace(f"]{element}", f"],{element}")
    text = text.replace(f"{element}[", f"{element},[")
    assert json.loads(f"[{text}]") is not None
    refusal(datatype, shape, f"[{text}]".encode())


@pytest.mark.parametrize("shape", [[-1], [2, -1], [2**31], [2**64], [1] * 65, [2**30] * 32])
def test_a_shape_that_cannot_be_is_refused(shape: list[int]) -> None:
    refusal("FP32", shape, [1])


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b"{}", b'"x"', b"null", b""]
)
def test_data_that_is_no_list_or_nested_without_end_is_refused(data: bytes) -> None:
    assert "flat list, or nested" in refusal("FP32", [1], data)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json_form_in_either_direction(datatype: str) -> None:
    assert "cannot be sent as JSON" in refusal(datatype, [1], [1])
    with pytest.raises(NotRepresentable, match="cannot be sent as JSON") as refused:
        encode_data(Tensor("y", datatype, (1,), b"\0\0"))
    assert refused.value.code == "not_representable"


@pytest.mark.parametrize("datatype", ["fp32", "FLOAT", "", "FP32 ", "X" * 10_000])
def test_a_datatype_that_is_none_is_refused_and_not_echoed_at_length(datatype: str) -> None:
    assert len(refusal(datatype, [1], [1])) < 500


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_an_answer_that_json_cannot_carry_is_said_to_be_one(datatype: str, value: float) -> None:
    data = np.array([0, value], DATATYPES[datatype].numpy).tobytes()
    with pytest.raises(NotRepresentable, match="'y'"):
        encode_data(Tensor("y", datatype, (2,), data))


def test_an_answer_of_bytes_that_are_no_text_is_said_to_be_one() -> None:
    with pytest.raises(NotRepresentable, match="UTF-8"):
        encode_data(Tensor("y", "BYTES", (1,), b"\1\0\0\0\xff"))


@pytest.mark.parametrize("data", [b"\1\0", b"\5\0\0\0a"])
def test_an_answer_of_bytes_that_are_cut_off_is_said_to_be_one(data: bytes) -> None:
    with pytest.raises(NotRepresentable, match="'y': an element is longer than the data"):
        encode_data(Tensor("y", "BYTES", (1,), data))


@pytest.mark.parametrize("datatype", ["UINT8", "BYTES"])
def test_an_answer_that_is_too_large_for_json_names_both_sizes(datatype: str) -> None:
    data = bytes(MAX_JSON_BYTES + 1)
    with pytest.raises(NotRepresentable, match="'y' is 67108865 bytes; as JSON at most 67108864"):
        encode_data(Tensor("y", datatype, (len(data),), data))


def test_data_is_nested_as_deep_as_numpy_can() -> None:
    shape = [1] * MAX_DIMENSIONS
    assert decode("INT64", shape, nested([7], shape)).shape == tuple(shape)
