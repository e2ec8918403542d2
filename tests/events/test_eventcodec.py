"""Canonical JSON and its chain, by rule and by the fast writer and check; types against committed bodies."""

import hashlib
import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import fields, replace
from support.history import PLAIN, load_requested, model_loaded
from support.ledgers import sample_history
from support.strategies import INTEGERS, TEXTS, any_data, drafts

from events.codec import (
    GENESIS,
    CanonicalCheck,
    _encode_fast,
    decode_event,
    encode_by_rule,
    encode_canonical,
    encode_event,
    hash_body,
    is_canonical,
)
from events.errors import NotEncodable
from events.types import (
    SCHEMA,
    TYPES,
    AccessDenied,
    Data,
    Draft,
    Event,
    LoadFailed,
    Unknown,
    WorkerExited,
    record_draft,
)

VECTORS: list[dict[str, str]] = json.loads(
    Path(__file__).with_name("vectors.json").read_text(encoding="ascii")
)["vectors"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_canonical_form_is_committed_vector(vector: dict[str, str]) -> None:
    text = encode_canonical(json.loads(vector["json"]))
    assert text == vector["canonical"]
    assert text.encode().hex() == vector["utf8"]


def test_committed_vectors_are_one_chain() -> None:
    previous = bytes(32)
    assert previous == GENESIS
    for vector in VECTORS:
        expected = hashlib.sha256(previous + bytes.fromhex(vector["utf8"])).digest()
        assert hash_body(previous, vector["canonical"]) == expected
        assert expected.hex() == vector["hash"]
        previous = expected


LEAVES = st.none() | st.booleans() | INTEGERS | st.text()
JSON = st.recursive(
    LEAVES,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


@PLAIN
@given(JSON)
@example([-(2**63), 2**63 - 1])
def test_canonical_form_reads_back_and_is_fixed_point(value: Any) -> None:
    text = encode_canonical(value)
    assert json.loads(text) == value
    assert encode_canonical(json.loads(text)) == text


@PLAIN
@given(st.dictionaries(st.text(), INTEGERS, max_size=6))
def test_key_order_and_tuples_do_not_matter(value: dict[str, int]) -> None:
    backwards = dict(reversed(value.items()))
    assert encode_canonical([value]) == encode_canonical((backwards,))
    assert list(json.loads(encode_canonical(backwards))) == sorted(value)


@PLAIN
@given(st.text())
def test_only_quotes_backslashes_and_controls_are_escaped(text: str) -> None:
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    written = "".join(
        short.get(character) or (f"\\u{ord(character):04x}" if character < " " else character)
        for character in text
    )
    assert encode_canonical(text) == f'"{written}"'


WITHOUT_FORM = [
    *(0.5, 1.0, float("nan"), float("inf"), 2**63, -(2**63) - 1, 10**5_000, 1j),
    *({1: "a"}, {None: "a"}, {True: "a"}, "\ud800", "\udfff\ud800", {"\ud800": 1}),
    *(b"bytes", bytearray(b"bytes"), {"a set"}, range(3), object()),
]


def test_value_without_canonical_form_is_refused() -> None:
    for holder in (each for value in WITHOUT_FORM for each in (value, [value], {"key": [{"deeper": value}]})):
        with pytest.raises(NotEncodable) as raised:
            encode_canonical(holder)
        assert raised.value.code == "not_encodable"
    with pytest.raises(NotEncodable, match=r"\$\.data\.files\[1\]\.bytes: float"):
        encode_canonical({"data": {"files": [{"bytes": 1}, {"bytes": 1.5}]}})


# The fast writer writes what the rule gives, and refuses what the rule refuses.

ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=10)
"""Lone surrogates, too."""


def event(data: Any, **envelope: Any) -> Event:
    plain = Event(7, "e", data, "alice", "2026-01-01T00:00:00.000000Z", "e", "m", 1)
    return replace(plain, **envelope)


def assert_written_by_the_rule(written: Event) -> None:
    def outcome(write: Any) -> str:
        try:
            return str(write(written))
        except NotEncodable as error:
            return f"refused: {error}"

    assert outcome(encode_event) == outcome(encode_by_rule)


@PLAIN
@given(any_data(), ANY_TEXT, ANY_TEXT | st.none(), st.integers(-(2**70), 2**70))
@example(
    LoadFailed("".join(map(chr, range(0x250))), "\u2028\u2029\ufeff\uffff\U0001f600/<>&"), "\x7f", "", 2**63
)
@example(LoadFailed("x", "\ud800"), "a", "b", 1)
@example(AccessDenied("x", 2**63), "a", "b", 1)
def test_body_is_written_by_the_rule(data: Any, actor: str, model_id: str | None, position: int) -> None:
    assert_written_by_the_rule(event(data, actor=actor, model_id=model_id, position=position))


class Word(StrEnum):
    ONE = "one"


class Text(str):
    __slots__ = ()


ODD: list[Any] = [
    *(1.0, 1.5, float("nan"), 2**63, -(2**63) - 1, 2**64, 10**400, True),
    *(b"x", Word.ONE, Text("x"), datetime(2026, 1, 1, tzinfo=UTC), Ellipsis),
    *([1], ["x", 1.0], {"a": 1}, {1: 2}, {"x"}, ("x", ("y", 2**63))),
]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_value_of_wrong_type_is_written_or_refused_by_the_rule(odd: Any) -> None:
    for data in (
        AccessDenied("x", odd),
        LoadFailed(odd, "x"),
        WorkerExited(1, None, odd),
        replace(load_requested(), cause=odd),
        replace(model_loaded(), files=(odd,)),
    ):
        assert_written_by_the_rule(event(data))
    assert_written_by_the_rule(event(load_requested(), version=odd))


def test_fast_writer_takes_integers_of_64_bits() -> None:
    for number, fits in ((-(2**63), True), (2**63 - 1, True), (-(2**63) - 1, False), (2**63, False)):
        written = event(AccessDenied("x", number))
        assert (_encode_fast(written) is not None) == fits
        assert_written_by_the_rule(written)


def test_history_is_written_by_the_rule_and_reads_back() -> None:
    for each in sample_history():
        assert encode_event(each) == encode_by_rule(each)
        assert decode_event(encode_event(each)) == decode_event(encode_event(each).encode()) == each


# The fast check of a body's form says what the rule says.


EXACTNESS = CanonicalCheck()
"""One for all, as a verification has."""

STYLES = st.fixed_dictionaries(
    {
        "sort_keys": st.booleans(),
        "ensure_ascii": st.booleans(),
        "separators": st.sampled_from([(",", ":"), (", ", ":"), (",", ": ")]),
        "indent": st.sampled_from([None, None, 0]),
    }
)


@PLAIN
@given(any_data(), STYLES)
def test_only_canonical_bytes_pass_the_check(data: Any, style: dict[str, Any]) -> None:
    expected = encode_event(event(data)).encode()
    assert is_canonical(expected)
    assert EXACTNESS.holds(decode_event(expected), expected)
    body = json.dumps(json.loads(expected), **style).encode()
    assert EXACTNESS.holds(decode_event(body), body) == is_canonical(body) == (body == expected)


CHANGES = [
    # a part of a body, what stands there instead, and whether that is canonical
    ('"timeout_s":300', '"timeout_s":-9223372036854775808', True),
    ('"timeout_s":300', '"timeout_s":18446744073709551615', True),
    ('"timeout_s":300', '"timeout_s":1000000000000000000000000', True),
    ('"worker_id":null', '"worker_id":null,"z":1', True),
    (',"max_batch_size":0', "", True),
    ('"LoadRequested"', '"LoadRequested2"', True),
    ('"schema":1', '"schema":2', True),
    ('"position":7', '"position":7.0', False),
    ('"position":7', '"position":7e0', False),
    ('"position":7', '"position":-0', False),
    ('"position":7', '"position":7,"position":7', False),
    ('"worker_id":null', '"worker_id":null,"z":1.5', False),
    ('"worker_id":null', '"worker_id":null,"a":1', False),
    ('"alice"', '"\\u0061lice"', False),
    ('"alice"', '"\\/"', False),
]


@pytest.mark.parametrize(("old", "new", "holds"), CHANGES)
def test_check_of_changed_body(old: str, new: str, holds: bool) -> None:  # noqa: FBT001
    written = encode_event(event(load_requested()))
    assert old in written
    body = written.replace(old, new).encode()
    assert is_canonical(body) == holds
    try:
        read = decode_event(body)
    except ValueError:
        assert not holds
    else:
        assert EXACTNESS.holds(read, body) == holds


# Event types: every release reads and writes the same bytes.

BODIES: dict[str, str] = json.loads(Path(__file__).with_name("bodies.json").read_text(encoding="ascii"))


def change(body: str, **changes: Any) -> str:
    return encode_canonical(json.loads(body) | changes)


def data_of(body: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(body)["data"]
    return data


@pytest.mark.parametrize("name", sorted(TYPES))
def test_committed_body_reads_and_writes_as_ever(name: str) -> None:
    body, read = BODIES[name], decode_event(BODIES[name])
    assert type(read.data) is TYPES[name]
    at = "2026-01-01T00:00:00.000001Z"
    assert read == Event(7, "e7", read.data, "alice", at, "j1", "digits", 2, "w1")
    assert encode_canonical(json.loads(body)) == body
    assert encode_event(read) == body
    later = change(body, data=data_of(body) | {"added_later": {"deep": [1]}}, also_added="yes")
    assert decode_event(later) == read
    for field in fields(TYPES[name]):
        if field.required:
            lacking = {key: value for key, value in data_of(body).items() if key != field.encode_name}
            with pytest.raises(
                msgspec.ValidationError, match=f"missing required field `{field.encode_name}`"
            ):
                decode_event(change(body, data=lacking))


@PLAIN
@given(drafts(), any_data(), INTEGERS, TEXTS)
def test_event_reads_back_and_has_the_same_keys(
    draft: Draft, data: Data, position: int, recorded_at: str
) -> None:
    written = record_draft(replace(draft, data=data), position, recorded_at)
    read = decode_event(encode_event(written))
    assert read == written
    assert hash(read) == hash(written)
    assert (type(read.data), read.type) == (type(data), data.TYPE)
    raw = json.loads(encode_event(written))
    assert sorted(raw) == [
        *("actor", "data", "id", "job_id", "model_id", "position", "recorded_at"),
        *("schema", "type", "version", "worker_id"),
    ]
    assert (raw["schema"], raw["type"]) == (SCHEMA, data.TYPE)
    given = {each.encode_name for each in fields(data) if getattr(data, each.name) is not UNSET}
    assert raw["data"].keys() == given


@pytest.mark.parametrize("changes", [{"type": "ModelMoved"}, {"schema": 2}, {"type": "X", "schema": 0}])
def test_unknown_type_or_schema_is_kept_exactly(changes: dict[str, Any]) -> None:
    body = change(BODIES["ModelLoaded"], **changes)
    read = decode_event(body)
    assert isinstance(read.data, Unknown)
    assert read.data.data == data_of(body)
    assert read.type == json.loads(body)["type"]
    assert encode_event(read) == body
