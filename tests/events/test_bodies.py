"""The quick way to write a body gives what the canonical form's rule gives, and refuses what that refuses."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.events import PLAIN, History, any_data, load_requested, model_loaded

from events.bodies import canonical_body, from_body, to_body
from events.errors import NotEncodable
from events.types import AccessDenied, Event, LoadFailed, WorkerExited

ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=10)
"""Lone surrogates, too."""


def written(event: Event) -> str:
    try:
        return canonical_body(event)
    except NotEncodable as error:
        return f"refused: {error}"


def written_quickly(event: Event) -> str:
    try:
        return to_body(event)
    except NotEncodable as error:
        return f"refused: {error}"


@PLAIN
@given(any_data(), ANY_TEXT, ANY_TEXT | st.none(), st.integers(-(2**70), 2**70))
@example(
    LoadFailed("".join(map(chr, range(0x250))), "\u2028\u2029\ufeff\uffff\U0001f600/<>&"), "\x7f", "", 2**63
)
@example(LoadFailed("x", "\ud800"), "a", "b", 1)
@example(AccessDenied("x", 2**63), "a", "b", 1)
def test_a_body_is_written_by_the_rule(data: Any, actor: str, model_id: str | None, position: int) -> None:
    event = Event(position, "e", data, actor, "2026-01-01T00:00:00.000000Z", "j", model_id, 1, None)
    assert written_quickly(event) == written(event)


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
def test_what_no_field_should_hold_is_written_or_refused_by_the_rule(odd: Any) -> None:
    event = Event(1, "e", load_requested(), "a", "2026-01-01T00:00:00.000000Z")
    for data in (
        AccessDenied("x", odd),
        LoadFailed(odd, "x"),
        WorkerExited(1, None, odd),
        replace(load_requested(), cause=odd),
        replace(model_loaded(), files=(odd,)),
    ):
        assert written_quickly(replace(event, data=data)) == written(replace(event, data=data))
    assert written_quickly(replace(event, version=odd)) == written(replace(event, version=odd))


def test_a_story_is_written_by_the_rule_and_reads_back() -> None:
    history = History()
    history.restart()
    history.load_pair("L")
    history.kill_worker("L1")
    history.unload("U", "L")
    for event in history.facts:
        assert to_body(event) == canonical_body(event)
        assert from_body(to_body(event)) == from_body(to_body(event).encode()) == event
