"""The canonical form and the chain, against committed vectors that anybody can check by hand."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, INTEGERS, PLAIN

from events.canonical import GENESIS, canonical, chain
from events.errors import NotEncodable

VECTORS: list[dict[str, str]] = json.loads(
    Path(__file__).with_name("vectors.json").read_text(encoding="ascii"),
)["vectors"]

LEAVES = st.none() | st.booleans() | INTEGERS | st.text()
JSON = st.recursive(
    LEAVES,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_canonical_form_is_that_of_the_committed_vector(vector: dict[str, str]) -> None:
    text = canonical(json.loads(vector["json"]))
    assert text == vector["canonical"]
    assert text.encode().hex() == vector["utf8"]


def test_the_hashes_of_the_committed_vectors_are_one_chain() -> None:
    previous = bytes(32)
    for vector in VECTORS:
        expected = hashlib.sha256(previous + bytes.fromhex(vector["utf8"])).digest()
        assert chain(previous, vector["canonical"]) == expected
        assert expected.hex() == vector["hash"]
        previous = expected


def test_the_chain_begins_with_32_zero_bytes() -> None:
    assert bytes(32) == GENESIS


@PLAIN
@given(JSON)
def test_what_is_canonical_reads_back_as_what_it_was(value: Any) -> None:
    assert json.loads(canonical(value)) == value


@FEWER
@given(JSON)
def test_canonical_form_is_a_fixed_point(value: Any) -> None:
    text = canonical(value)
    assert canonical(json.loads(text)) == text


@PLAIN
@given(st.dictionaries(st.text(), INTEGERS, max_size=6))
def test_neither_order_nor_tuples_change_the_text(value: dict[str, int]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical([value]) == canonical((backwards,))
    assert list(json.loads(canonical(backwards))) == sorted(value)


@PLAIN
@given(st.text())
def test_only_quote_backslash_and_control_characters_are_escaped(text: str) -> None:
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    written = "".join(
        short.get(character) or (f"\\u{ord(character):04x}" if character < " " else character)
        for character in text
    )
    assert canonical(text) == f'"{written}"'


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        1.0,
        float("nan"),
        float("inf"),
        2**63,
        -(2**63) - 1,
        10**5_000,
        {1: "a"},
        {None: "a"},
        {True: "a"},
        "\ud800",
        "\udfff\ud800",
        {"\ud800": 1},
        b"bytes",
        bytearray(b"bytes"),
        {"a set"},
        range(3),
        object(),
        1j,
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else f"{value.bit_length()} bits",
)
def test_what_has_no_canonical_form_is_refused_wherever_it_stands(value: object) -> None:
    for holder in (value, [value], {"key": [{"deeper": value}]}):
        with pytest.raises(NotEncodable) as raised:
            canonical(holder)
        assert raised.value.code == "not_encodable"


def test_a_refusal_says_where_the_value_stands() -> None:
    with pytest.raises(NotEncodable, match=r"\$\.data\.files\[1\]\.bytes: float"):
        canonical({"data": {"files": [{"bytes": 1}, {"bytes": 1.5}]}})
