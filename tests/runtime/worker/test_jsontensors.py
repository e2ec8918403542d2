"""JSON tensors to arrays and back: every datatype that JSON allows, flat and nested, and what is refused."""

import json
import math
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from runtime.errors import InvalidInput, NotRepresentable
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Tensor
from runtime.worker.inference import MAX_JSON_BYTES, check_json, decode_text, encode_text

INTEGERS = {
    f"{sign}INT{bits}": (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for sign in ("", "U")
    for bits in (8, 16, 32, 64)
}
ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.integers(low, high) for name, (low, high) in INTEGERS.items()},
    "BOOL": st.booleans(),
    "BYTES": st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    "FP32": st.floats(width=32, allow_nan=False),
    "FP64": st.floats(allow_nan=False),
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
    """Return what two arrays must share to be bit-equal: -0.0 equals 0.0."""
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
def test_flat_and_nested_json_round_trip_bit_equal(drawn: tuple[str, Any], indent: int | None) -> None:
    assert sorted(ELEMENTS) == JSON_DATATYPES
    datatype, array = drawn
    flat = b"".join(encode_text("y", datatype, array))
    nested = json.dumps(array.tolist() if array.ndim else [array.item()], indent=indent).encode()
    for text in (flat, nested):
        assert bits(datatype, decode(datatype, array.shape, text)) == bits(datatype, array)


@pytest.mark.parametrize("datatype", sorted(INTEGERS))
def test_integer_range_is_accepted_and_no_more(datatype: str) -> None:
    low, high = INTEGERS[datatype]
    assert decode(datatype, [2], [low, high]).tolist() == [low, high]
    for beyond in (low - 1, high + 1, 2**64, -(2**63) - 1, 10**400):
        refusal(datatype, [1], [beyond])


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "value"),
    [
        ("INT64", [1] * MAX_DIMENSIONS, np.full([1] * MAX_DIMENSIONS, 7).tolist(), 7),
        ("FP32", [1], [-2], -2.0),
        ("FP64", [1], [2**60], float(2**60)),
    ],
    ids=["deep", "integer as FP32", "integer as FP64"],
)
def test_valid_data_is_decoded(datatype: str, shape: list[int], data: object, value: float) -> None:
    assert decode(datatype, shape, data).item() == value


LARGEST = float(np.finfo(np.float32).max)
JUST_ROUNDED_DOWN = math.nextafter(2.0**128 - 2.0**103, 0)


@pytest.mark.parametrize("padding", [0, 255, 1000, 2000])
def test_number_beyond_float_range_is_refused_and_others_rounded(padding: int) -> None:
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


SPECIAL = [math.nan, math.inf, -math.inf, 1.5, 0.0, math.nan, math.inf, -math.inf]
WORDS = ["NaN", "Infinity", "-Infinity", "1.5", "0e0", "-NaN", "Inf", "-Inf"]


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
@PLAIN
@given(st.lists(st.sampled_from(WORDS), min_size=1), st.sampled_from([",", ", ", " ,\n"]))
def test_nan_and_infinities_are_numbers(datatype: str, words: list[str], comma: str) -> None:
    expected = [SPECIAL[WORDS.index(word)] for word in words]
    flat, rows = f"[{comma.join(words)}]", comma.join(f"[ {word} ]" for word in words)
    np.testing.assert_equal(decode(datatype, [len(words)], flat.encode()).tolist(), expected)
    array = decode(datatype, [len(words), 1], f"[{rows}]".encode())
    np.testing.assert_equal(array.reshape(-1).tolist(), expected)
    [text] = encode_text("y", datatype, array)
    np.testing.assert_equal(json.loads(bytes(text)), expected)


WRONG = '[1NaN] [NaN1] [+NaN] [--Infinity] ["NaN"] [Infinityinity] [1-Infinity] [Infinity1] [eNaN]'


@pytest.mark.parametrize("text", WRONG.split())
def test_nan_within_something_else_is_refused(text: str) -> None:
    refusal("FP64", [1], text.encode())
    refusal("FP64", [2], b"[NaN," + text[1:].encode())


@pytest.mark.parametrize("datatype", ["INT64", "BOOL"])
def test_what_has_no_nan_says_so(datatype: str) -> None:
    for word in (b"NaN", b"-Infinity"):
        assert "it has no NaN and no Infinity" in refusal(datatype, [1], b"[" + word + b"]")


NUMBERS = (b"[nan]", b"[.5]", b"[1.]", b"[01]", b"[1", b"[1]x")
NO_LISTS = (b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b"{}", b'"x"', b"null", b"", b"[", b"x")
OTHER_KINDS: dict[str, list[object]] = {
    "FP32": [["1"], [True], [None], [{}]],
    "INT8": [["3"], [True], [None], [1.5]],
    "BOOL": [[0], [1], ["true"], [None]],
    "BYTES": [[1], [None], [True], [{}], b'["\xff"]', b"[NaN]"],
}
HALVES = (rb'["\ud800"]', rb'["\udc00"]', rb'["\ud83d\\ude00"]', b'["\xed\xa0\x80"]')


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        *(("INT64", [], data, "") for data in (b"5", [[5]], [], [5, 6])),
        *(("FP32", [1], data, "") for data in (*NUMBERS, *NO_LISTS)),
        *(("INT32", [1], data, "Expected `int`") for data in (b"[1.0]", b"[1.5]", b"[1e2]", b"[-0.0]")),
        *(("FP32", [2], data, "is not FP32") for data in (b"[NaN, null]", b"[true, NaN]", b"[1e999, NaN]")),
        ("FP32", [2], b"[1e39, NaN]", "out of the range"),
        *(("BYTES", [1], data, "unpaired surrogate") for data in HALVES),
        *((kind, [1], data, f"is not {kind}") for kind in OTHER_KINDS for data in OTHER_KINDS[kind]),
        *(("FP32", shape, [1], "") for shape in ([2**63 - 1], [2**30] * 32, [0, 2**62, 2**62])),
        *(("FP32", shape, b"[[[]]]", "") for shape in ([2**63 - 1], [2**30] * 32, [0, 2**62, 2**62])),
        ("FP32", [0, 2**62, 2**62], [], "is not a shape"),
    ],
    ids=lambda case: repr(case)[:40],
)
def test_invalid_data_is_refused(datatype: str, shape: list[int], data: object, words: str) -> None:
    assert words in refusal(datatype, shape, data)


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
def test_data_of_another_shape_is_refused(datatype: str, shape: list[int], form: str) -> None:
    element = {"FP32": "1.5", "INT64": "1", "BOOL": "true", "BYTES": '"a"'}[datatype]
    text = "[" + form.replace("(", "[").replace(")", "]").replace("o", element) + "]"
    assert isinstance(json.loads(text), list)
    refusal(datatype, shape, text.encode())


@pytest.mark.parametrize("unit", [b"[],", b"0,"], ids=["arrays", "zeros"])
def test_other_number_of_elements_is_refused_without_taking_memory(unit: bytes) -> None:
    text = b"[" + unit * 2**18 + unit[:-1] + b"]"
    tracemalloc.start()
    try:
        assert "has 262145 elements, declared is [1, 4]" in refusal("FP32", [1, 4], text)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json_form(datatype: str) -> None:
    words = f"input 'x': {datatype} cannot be sent as JSON; use the binary data form"
    assert refusal(datatype, [1], [1]) == words
    with pytest.raises(NotRepresentable, match=f"output 'y'.*{datatype} cannot be sent as JSON") as refused:
        check_json("y", datatype)
    assert refused.value.code == "not_representable"


TOO_LARGE = "'y' is 67108866 bytes; as JSON at most 67108864"
UNSENDABLE: list[tuple[str, Any, str]] = [
    ("FP16", np.zeros(1, np.float16), "cannot be sent as JSON"),
    ("UINT8", np.zeros(MAX_JSON_BYTES + 2, np.uint8), TOO_LARGE),
    # 4 bytes of length, 2 for each character
    ("BYTES", np.array(["ä" * (MAX_JSON_BYTES // 2 - 1)], object), TOO_LARGE),
]


@pytest.mark.parametrize(("datatype", "array", "words"), UNSENDABLE, ids=lambda case: str(case)[:8])
def test_output_without_a_json_form_is_refused(datatype: str, array: Any, words: str) -> None:
    with pytest.raises(NotRepresentable, match=words):
        encode_text("y", datatype, array)


def test_text_null_is_no_nan_and_columns_become_rows() -> None:
    assert b"".join(encode_text("y", "BYTES", np.array(["null"], object))) == b'["null"]'
    assert b"".join(encode_text("y", "INT64", np.arange(4).reshape(2, 2).T)) == b"[0,2,1,3]"
