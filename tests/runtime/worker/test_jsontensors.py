"""JSON tensors to arrays and back: every datatype that JSON allows, flat, nested, empty, and wrong."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from runtime.errors import InvalidInput, NotRepresentable
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Tensor
from runtime.worker.jsontensors import MAX_JSON_BYTES, check_json, decode_text, encode_text

INTEGERS = {
    f"{sign}INT{bits}": (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for sign in ("", "U")
    for bits in (8, 16, 32, 64)
}
ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.integers(low, high) for name, (low, high) in INTEGERS.items()},
    "BOOL": st.booleans(),
    "BYTES": st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
}
JSON_DATATYPES = sorted(DATATYPES.keys() - {"FP16", "BF16"})


def decode(datatype: str, shape: Sequence[int], data: object) -> Any:
    """Decode data given as a value, or as JSON text if it is bytes."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    decoded = decode_text(Tensor("x", datatype, tuple(shape), memoryview(text), text=True))
    assert decoded.shape == tuple(shape)
    assert decoded.dtype == np.dtype(DATATYPES[datatype].numpy)
    return decoded


def refusal(datatype: str, shape: Sequence[int], data: object) -> str:
    with pytest.raises(InvalidInput) as refused:
        decode(datatype, shape, data)
    assert refused.value.code == "invalid_input"
    assert "'x'" in str(refused.value)
    return str(refused.value)


def array_of(datatype: str, shape: Sequence[int], flat: list[Any]) -> Any:
    array = np.empty(len(flat), DATATYPES[datatype].numpy)
    array[:] = flat
    return array.reshape(shape)


def bits(datatype: str, array: Any) -> Any:
    """Give what two arrays must share to be the same bit for bit: -0.0 equals 0.0."""
    return array.ravel().tolist() if datatype == "BYTES" else array.tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, Any]:
    datatype = draw(st.sampled_from(JSON_DATATYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    count = math.prod(shape)
    flat = draw(st.lists(ELEMENTS[datatype], min_size=count, max_size=count))
    return datatype, array_of(datatype, shape, flat)


@PLAIN
@given(arrays(), st.sampled_from([None, 1]))
def test_what_is_encoded_and_decoded_again_is_the_same_bit_for_bit_flat_or_nested(
    drawn: tuple[str, Any], indent: int | None
) -> None:
    datatype, array = drawn
    flat = encode_text("y", datatype, array)
    nested = json.dumps(array.tolist() if array.ndim else [array.item()], indent=indent).encode()
    for text in (flat, nested):
        assert bits(datatype, decode(datatype, array.shape, text)) == bits(datatype, array)


def test_every_datatype_that_json_allows_is_tried_above() -> None:
    assert sorted(ELEMENTS) == JSON_DATATYPES


def test_what_lies_in_memory_in_another_order_is_encoded_row_major() -> None:
    assert encode_text("y", "INT64", np.arange(4).reshape(2, 2).T) == b"[0,2,1,3]"


@pytest.mark.parametrize("datatype", sorted(INTEGERS))
def test_integers_go_to_the_ends_of_their_range_and_not_beyond(datatype: str) -> None:
    low, high = INTEGERS[datatype]
    assert decode(datatype, [2], [low, high]).tolist() == [low, high]
    for beyond in (low - 1, high + 1, 2**64, -(2**63) - 1, 10**400):
        refusal(datatype, [1], [beyond])


@pytest.mark.parametrize("data", [[5], b"[5]", b" [\n5 ] "])
def test_a_scalar_is_a_list_of_one_and_has_no_dimensions(data: object) -> None:
    assert decode("INT64", [], data) == np.array(5)


@pytest.mark.parametrize("data", [b"5", [[5]], [], [5, 6]])
def test_what_is_no_list_of_one_is_no_scalar(data: object) -> None:
    refusal("INT64", [], data)


@pytest.mark.parametrize("datatype", JSON_DATATYPES)
@pytest.mark.parametrize(
    ("shape", "data"), [([0], []), ([0, 3], []), ([2, 0], [[], []]), ([2, 0], []), ([2, 0, 3], [[], []])]
)
def test_a_dimension_of_length_0_leaves_nothing(datatype: str, shape: list[int], data: object) -> None:
    assert decode(datatype, shape, data).size == 0


def test_floats_may_be_written_as_integers_and_integers_not_as_floats() -> None:
    assert decode("FP32", [2], [1, -2]).tolist() == [1.0, -2.0]
    assert decode("FP64", [1], [2**60]).tolist() == [float(2**60)]
    for text in (b"[1.0]", b"[1.5]", b"[1e2]", b"[-0.0]"):
        assert "Expected `int`" in refusal("INT32", [1], text)


LARGEST = float(np.finfo(np.float32).max)
JUST_ROUNDED_DOWN = math.nextafter(2.0**128 - 2.0**103, 0)


@pytest.mark.parametrize("padding", [0, 255, 1000])
def test_a_number_that_a_float_cannot_hold_is_refused_and_one_that_is_rounded_is_not(padding: int) -> None:
    zeros = [0.0] * padding
    shape = [padding + 1]
    assert decode("FP32", shape, [1e-60, *zeros])[0] == 0
    for sign in (1, -1):
        for number in (LARGEST, JUST_ROUNDED_DOWN):
            assert decode("FP32", shape, [*zeros, sign * number])[-1] == sign * LARGEST
        for number in (2.0**128 - 2.0**103, 1e39, 10**400):
            refusal("FP32", shape, [*zeros, sign * number])
            refusal("FP32", [1, *shape], [[*zeros, sign * number]])
    refusal("FP32", shape, b"[1e999]")
    refusal("FP64", shape, b"[1e999]")


@pytest.mark.parametrize(
    "text", [b"[NaN]", b"[Infinity]", b"[-Infinity]", b"[nan]", b"[.5]", b"[1.]", b"[01]", b"[1", b"[1]x"]
)
def test_what_json_has_no_number_for_is_refused(text: bytes) -> None:
    refusal("FP32", [1], text)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("FP32", ["1"]), ("FP32", [True]), ("FP32", [None]), ("FP32", [{}]), ("INT8", ["3"]),
        ("INT8", [True]), ("INT8", [None]), ("INT8", [1.5]), ("BOOL", [0]), ("BOOL", [1]),
        ("BOOL", ["true"]), ("BOOL", [None]), ("BYTES", [1]), ("BYTES", [None]), ("BYTES", [True]),
        ("BYTES", [{}]), ("BYTES", b'["\xff"]'), ("BYTES", rb'["\ud800"]'),
    ],
)  # fmt: skip
def test_an_element_of_another_kind_is_refused(datatype: str, data: object) -> None:
    assert f"is not {datatype}" in refusal(datatype, [1], data)


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BOOL", "BYTES"])
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ([3], "o,o"), ([1], "o,o"), ([2], ""), ([0], "o"), ([2, 2], "o,o,o"), ([2, 2], "o,o,o,o,o"),
        ([2, 2], "(o,o)"), ([2, 2], "(o,o),(o)"), ([2, 2], "(o),(o,o)"), ([2, 1], "(o),(o,o)"),
        ([2, 1], "(),(o)"), ([2, 2], "(o,o),(o,o),(o,o)"), ([3, 2], "(o,o,o),(o,o,o)"),
        ([2, 2], "(o,o),o,o"), ([2, 2], "o,o,(o,o)"), ([4], "(o,o),(o,o)"), ([2, 2], "((o,o),(o,o))"),
        ([1, 2, 2], "(o,o),(o,o)"), ([2, 0, 3], "()"), ([1, 2, 1], "((o),(o,o))"), ([0, 3], "()"),
        ([2, 2], "(),()"), ([2, 2], "(o,o),()"),
    ],
)  # fmt: skip
def test_data_of_another_shape_than_declared_is_refused(datatype: str, shape: list[int], form: str) -> None:
    element = {"FP32": "1.5", "INT64": "1", "BOOL": "true", "BYTES": '"a"'}[datatype]
    text = "[" + form.replace("(", "[").replace(")", "]").replace("o", element) + "]"
    assert isinstance(json.loads(text), list)
    refusal(datatype, shape, text.encode())


@pytest.mark.parametrize("shape", [[2**63 - 1], [2**30] * 32, [0, 2**62, 2**62]])
def test_a_shape_that_cannot_be_is_refused(shape: list[int]) -> None:
    refusal("FP32", shape, [1])
    refusal("FP32", shape, b"[[[]]]")


def test_a_shape_with_a_zero_that_numpy_has_no_array_for_is_refused() -> None:
    assert "is not a shape" in refusal("FP32", [0, 2**62, 2**62], [])


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b"{}", b'"x"', b"null", b"", b"[", b"x"]
)
def test_data_that_is_no_list_or_nested_without_end_is_refused(data: bytes) -> None:
    refusal("FP32", [1], data)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json_form_in_either_direction(datatype: str) -> None:
    words = f"input 'x': {datatype} cannot be sent as JSON; use the binary data form"
    assert refusal(datatype, [1], [1]) == words
    with pytest.raises(NotRepresentable, match=r"output 'y'.* cannot be sent as JSON") as refused:
        check_json("y", datatype)
    assert refused.value.code == "not_representable"
    with pytest.raises(NotRepresentable):
        encode_text("y", datatype, np.zeros(1, DATATYPES[datatype].numpy))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_an_answer_that_json_cannot_carry_is_said_to_be_one(datatype: str, value: float) -> None:
    with pytest.raises(NotRepresentable, match="'y'"):
        encode_text("y", datatype, np.array([0, value], DATATYPES[datatype].numpy))


def test_the_word_null_in_a_text_is_no_nan() -> None:
    assert encode_text("y", "BYTES", np.array(["null"], object)) == b'["null"]'


@pytest.mark.parametrize("datatype", ["UINT8", "BYTES"])
def test_an_answer_that_is_too_large_for_json_names_both_sizes(datatype: str) -> None:
    one = np.array(["ä" * (MAX_JSON_BYTES // 2 - 1)], object)  # 4 bytes of length, 2 for each character
    array = one if datatype == "BYTES" else np.zeros(MAX_JSON_BYTES + 2, np.uint8)
    with pytest.raises(NotRepresentable, match="'y' is 67108866 bytes; as JSON at most 67108864"):
        encode_text("y", datatype, array)


def test_data_is_nested_as_deep_as_numpy_can() -> None:
    shape = [1] * MAX_DIMENSIONS
    assert decode("INT64", shape, np.full(shape, 7).tolist()).item() == 7
