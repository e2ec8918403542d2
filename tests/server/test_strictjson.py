import json
import math
import re
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
def test_loads_reads_back_what_json_writes(value: Any, ascii_only: bool, indent: int | None) -> None:  # noqa: FBT001
    assert loads(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()) == value


@PLAIN
@given(st.binary() | st.text('[]{}":,\\u\n0N ').map(str.encode))
def test_loads_of_any_bytes_answers_or_refuses(body: bytes) -> None:
    try:
        value = loads(body)
    except InvalidJson:
        return
    assert value == json.loads(body)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": {"a": [{"a": 1}, {"a": 2}]}}', {"a": {"a": [{"a": 1}, {"a": 2}]}}),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)),
        (json.dumps("[{" * 1000).encode(), "[{" * 1000),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (str(2**63).encode(), 2**63),
        (repr(sys.float_info.max).encode(), sys.float_info.max),
    ],
)
def test_loads_strict_json_reads_it_exactly(body: bytes, value: Any) -> None:
    read = loads(body)
    assert math.isclose(read, value) if isinstance(value, float) else read == value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON: Expecting value at line 1 column 1"),
        (b'{"a": 1} x', "Extra data at line 1 column 10"),
        (b'{"a": 1}{', "Extra data"),
        (b"{'a': 1}", "line 1 column 2"),
        (b'{"a": 1,}', "line 1"),
        (b"[1,\n2", "line 2 column 2"),
        (b'"a\nb"', "control character"),
        (b"\x00", "line 1"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'"\\ud800"', "unpaired surrogate"),
        (b'{"\\udc00": 1}', "unpaired surrogate"),
        (b'{"a": 1,\n "\\u0061": 2}', 'the key "a" appears twice in one object'),
        (b'[{"a": {"b": 1, "b": 1}}]', 'the key "b" appears twice'),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"-1e999", '"-1e999" is out of range'),
        (b"1" * 5000, "an integer is out of range"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested deeper than 32"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "nested deeper than 32"),
        (b"[" * 500_000, "nested deeper than 32"),
        (b'{"a":' * 200_000, "nested deeper than 32"),
        (b"[" * 33 + b'"' + b'\\"' * 500_000, "Unterminated string"),
    ],
)
def test_loads_other_json_refuses_with_reason(body: bytes, message: str) -> None:
    with pytest.raises(InvalidJson, match=re.escape(message)):
        loads(body)
