"""Trace context as the W3C has it: what is malformed is as if it had not come."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from server.logs.context import sane_id
from server.logs.tracing import MAX_MEMBERS, given_state, given_trace, new_trace

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
USUAL = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.mark.parametrize(
    ("parent", "sampled"),
    [
        (USUAL, True),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", False),
        (f"00-{TRACE_ID}-{SPAN_ID}-03", True),  # the second flag is of a later level
        (f"00-{TRACE_ID}-{SPAN_ID}-fe", False),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01", True),  # a later version, as far as it is known
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what the future has", True),
        (f" \t{USUAL} ", True),
    ],
)
def test_a_trace_that_is_named_is_taken(parent: str, sampled: bool) -> None:  # noqa: FBT001
    trace = given_trace([parent], [])
    assert trace is not None
    assert (trace.trace_id, trace.span_id, trace.sampled, trace.remote) == (TRACE_ID, SPAN_ID, sampled, True)


@pytest.mark.parametrize(
    "parent",
    [
        "", "-", USUAL.upper(), USUAL[:-1], f"{USUAL}0", f"{USUAL}-", f"{USUAL}-more", f"{USUAL},{USUAL}",
        f"ff-{TRACE_ID}-{SPAN_ID}-01", f"00-{'0' * 32}-{SPAN_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01",
        f"0x-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-0x", f"00-{TRACE_ID[:-1]}g-{SPAN_ID}-01",
        f"00_{TRACE_ID}_{SPAN_ID}_01", f"cc-{TRACE_ID}-{SPAN_ID}-01.", f"cc-{TRACE_ID}-{SPAN_ID}-011",
        f"00-{TRACE_ID}-{SPAN_ID}-01\n", f"00-{TRACE_ID}-{SPAN_ID}-\u0660\u0661", f"{USUAL}\x00",
    ],
)  # fmt: skip
def test_a_malformed_trace_is_none(parent: str) -> None:
    assert given_trace([parent], ["a=1"]) is None


def test_two_traces_are_none_and_so_is_a_state_alone() -> None:
    assert given_trace([USUAL, USUAL], []) is None
    assert given_trace([], ["a=1"]) is None


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], ""), (["a=1"], "a=1"), (["a=1", "b=2"], "a=1,b=2"), (["a=1 ,\tb=2,,"], "a=1,b=2"), ([""], ""),
        (["0t@system=x=y"], ""), (["0t@system=xy"], "0t@system=xy"), (["a_-*/9=!~ x"], "a_-*/9=!~ x"),
        (["a=1,a=2"], ""), (["A=1"], ""), (["9=1"], ""), (["a=\u00e9"], ""), (["a="], ""), (["=1"], ""),
        (["a"], ""), (["a=1,b"], ""), ([f"{'a' * 256}={'v' * 256}"], f"{'a' * 256}={'v' * 256}"),
        ([f"{'a' * 257}=1"], ""), ([f"a={'v' * 257}"], ""), (["a@b@c=1"], ""), (["a=\x01"], ""),
        ([",".join(f"k{number}=1" for number in range(MAX_MEMBERS + 1))], ""),
        ([f"k{number}={'v' * 200}" for number in range(MAX_MEMBERS)], ""),
    ],
)  # fmt: skip
def test_the_state_is_passed_on_or_left_out_as_a_whole(states: list[str], expected: str) -> None:
    assert given_state(states) == expected
    trace = given_trace([USUAL], states)
    assert trace is not None
    assert trace.state == expected


@PLAIN
@given(st.lists(st.text(max_size=80), max_size=3), st.lists(st.text(max_size=80), max_size=3))
def test_whatever_comes_is_a_well_formed_trace_or_none(parents: list[str], states: list[str]) -> None:
    trace = given_trace(parents, states)
    assert trace is None or re.fullmatch("[0-9a-f]{32}", trace.trace_id)


@PLAIN
@given(st.text(max_size=200))
def test_a_state_that_is_passed_on_is_passed_on_the_same_again(state: str) -> None:
    assert given_state([given_state([state])]) == given_state([state])


def test_a_new_trace_is_one_that_others_take() -> None:
    trace = new_trace()
    taken = given_trace([f"00-{trace.trace_id}-{trace.span_id}-00"], [])
    assert taken is not None
    assert taken.trace_id == trace.trace_id != new_trace().trace_id


@pytest.mark.parametrize("name", ["a", "01a1faa9-a6ec-7310-b1d2-61fc5f2ba464", "x" * 128, '"{}'])
def test_a_requests_name_is_taken_if_it_is_short_and_printable(name: str) -> None:
    assert sane_id([name]) == name


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a\n", "\u00e9", "a\x1b[31m", "\u2028"])
def test_another_is_made_for_what_is_no_name(name: str) -> None:
    assert sane_id([name]) is None
    assert sane_id(["a", "b"]) is None
