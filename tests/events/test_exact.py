"""The quick look at a body's form says what the rule says."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, PLAIN, any_data, load_requested

from events.bodies import Exactness, from_body, is_canonical, to_body
from events.types import Event

EXACTNESS = Exactness()
"""One for all, as a verification has."""


def event(data: Any) -> Event:
    return Event(7, "e", data, "alice", "2026-01-01T00:00:00.000000Z", "e", "m", 1)


@FEWER
@given(any_data())
def test_what_is_written_is_in_the_canonical_form(data: Any) -> None:
    written = event(data)
    body = to_body(written).encode()
    assert is_canonical(body)
    assert EXACTNESS.holds(from_body(body), body)


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
def test_other_words_for_the_same_are_not(data: Any, style: dict[str, Any]) -> None:
    canonical = to_body(event(data)).encode()
    body = json.dumps(json.loads(canonical), **style).encode()
    assert EXACTNESS.holds(from_body(body), body) == is_canonical(body) == (body == canonical)


def changed(old: str, new: str) -> bytes:
    written = to_body(event(load_requested()))
    assert old in written
    return written.replace(old, new).encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"timeout_s":300', '"timeout_s":-9223372036854775808'),
        ('"timeout_s":300', '"timeout_s":18446744073709551615'),
        ('"timeout_s":300', '"timeout_s":1000000000000000000000000'),
        ('"worker_id":null', '"worker_id":null,"z":1'),
        (',"max_batch_size":0', ""),
        ('"LoadRequested"', '"LoadRequested2"'),
        ('"schema":1', '"schema":2'),
    ],
)
def test_what_the_quick_look_does_not_know_may_be_canonical(old: str, new: str) -> None:
    body = changed(old, new)
    assert is_canonical(body)
    assert EXACTNESS.holds(from_body(body), body)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"position":7', '"position":7.0'),
        ('"position":7', '"position":7e0'),
        ('"position":7', '"position":-0'),
        ('"position":7', '"position":7,"position":7'),
        ('"worker_id":null', '"worker_id":null,"z":1.5'),
        ('"worker_id":null', '"worker_id":null,"a":1'),
        ('"alice"', '"\\u0061lice"'),
        ('"alice"', '"\\/"'),
    ],
)
def test_the_quick_look_is_not_fooled(old: str, new: str) -> None:
    body = changed(old, new)
    assert not is_canonical(body)
    try:
        read = from_body(body)
    except ValueError:
        return
    assert not EXACTNESS.holds(read, body)
