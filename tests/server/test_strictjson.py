import json
import math
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from server.strictjson import MAX_DEPTH, InvalidJson, loads

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


@PLAIN
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_what_json_writes_is_read_back(value: Any, ascii_only: bool, indent: int | None) -> None:  # noqa: FBT001
    assert loads(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()) == value


@PLAIN
@given(st.binary() | st.text('[]{}":,\\u\n0N ').map(str.encode))
def test_no_bytes_do_more_than_be_refused(body: bytes) -> None:
    try:
        value = loads(body)
    except InvalidJson:
        return
    assert value == json.loads(body)


@PLAIN
@given(st.dictionaries(st.text('ab"\\{[:,é'), st.integers(), min_size=1), st.data())
def test_a_key_that_comes_twice_is_named(value: dict[str, int], data: st.DataObject) -> None:
    pairs = [*value.items()]
    key = data.draw(st.sampled_from(pairs))[0]
    inner = ", ".join(f"{json.dumps(name)}: {number}" for name, number in [*pairs, (key, 0)])
    with pytest.raises(InvalidJson, match="appears twice in one object, at line 1 column") as refused:
        loads(f'[{{"outer": {{{inner}}}}}]'.encode())
    column = int(str(refused.value).rpartition(" ")[2])
    assert column == f'[{{"outer": {{{inner}}}}}]'.rindex(json.dumps(key) + ": 0") + 1


def test_one_key_in_several_objects_is_no_duplicate() -> None:
    assert loads(b'{"a": {"a": [{"a": 1}, {"a": 2}]}}') == {"a": {"a": [{"a": 1}, {"a": 2}]}}


def test_a_key_is_the_same_however_it_is_written() -> None:
    with pytest.raises(InvalidJson, match='"a" appears twice in one object, at line 2 column 2'):
        loads(b'{"a": 1,\n "\\u0061": 2}')


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_has_a_limit(opening: str, closing: str) -> None:
    def nested(depth: int) -> bytes:
        return (opening * depth + "1" + closing * depth).encode()

    loads(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(InvalidJson, match="nested deeper than 32 at line 1 column"):
            loads(nested(depth))


def test_brackets_without_end_and_in_strings_are_not_mistaken() -> None:
    for body in (b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(InvalidJson):
            loads(body)
    text = '[{"' * 1000 + '\\"[[[['
    assert loads(json.dumps(text).encode()) == text


def test_strings_without_end_take_no_longer_than_others() -> None:
    with pytest.raises(InvalidJson):  # quadratic, this would take minutes
        loads(b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[" + b'"' + b'\\"' * 500_000)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000])
def test_numbers_that_are_none_are_refused_with_their_place(literal: str) -> None:
    with pytest.raises(InvalidJson, match="at line 2 column 7"):
        loads(f'{{"a": "{literal}",\n "b": {literal}}}'.encode())


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "Expecting value at line 1 column 1"),
        (b'{"a": 1} x', "Extra data at line 1 column 10"),
        (b'{"a": 1}{', "Extra data"),
        (b"{'a': 1}", "line 1 column 2"),
        (b'{"a": 1,}', "line 1"),
        (b"[1, 2", "line 1 column 6"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'"a\nb"', "control character"),
        (b'"\\ud800"', "unpaired surrogate"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"\x00", "line 1"),
    ],
)
def test_what_is_wrong_is_told(body: bytes, what: str) -> None:
    with pytest.raises(InvalidJson, match=what):
        loads(body)


def test_paired_surrogates_are_a_character() -> None:
    assert loads(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_integers_stay_exact_and_floats_finite() -> None:
    assert loads(str(2**63).encode()) == 2**63
    assert math.isclose(loads(repr(sys.float_info.max).encode()), sys.float_info.max)
