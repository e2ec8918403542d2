"""The timeline: what a lane says of a time is what the fold of the events by then says."""

import asyncio
from bisect import bisect_right
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import FEWER, STEPS, History, at
from support.ledgers import copy_of, store_events

from events.clock import seconds_between
from events.models import ModelState
from events.sqlite import timeline
from events.sqlite.lanes import (
    Mark,
    MarkKind,
    Segment,
    ServerSegment,
    merge_marks,
    merge_segments,
    server_segments,
)
from events.sqlite.liveness import ServerState, list_transitions
from events.sqlite.readonly import open_reader_thread
from events.sqlite.schema import connect
from events.sqlite.timeline import Timeline, TimelineQuery, TimelineReader
from events.sqlite.timetravel import InvalidMoment
from events.state import State
from events.types import Event, NodeLost


async def read(path: Path, query: TimelineQuery) -> Timeline:
    async with open_reader_thread(path, "timeline") as thread:
        return await TimelineReader(thread).page(query)


def read_of(
    events: list[Event], query: TimelineQuery, snapshots_at: frozenset[int] = frozenset()
) -> Timeline:
    with copy_of(b"") as path:
        with closing(connect(path)) as connection:
            store_events(connection, events, snapshots_at)
        return asyncio.run(read(path, query))


@st.composite
def histories(draw: st.DrawFn) -> History:
    history = History()
    for step in draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=25)):
        STEPS[step](history)
    return history


@FEWER
@given(
    histories(),
    st.frozensets(st.integers(1, 40), max_size=4),
    st.integers(0, 40),
    st.integers(1, 40),
    st.sampled_from([0, 3, 1_000]),
)
def test_lane_is_what_the_fold_gives(
    history: History, snapshots_at: frozenset[int], begin: int, last: int, folded: int
) -> None:
    facts = history.facts
    if not facts:
        return
    query = TimelineQuery(now=at(100), begin=at(begin), end=at(begin + last), resolution=2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "FOLDED", folded)
        found = read_of(facts, query, snapshots_at)
    times = [event.recorded_at for event in facts]
    states = [State()]
    for number in range(1, len(facts) + 1):
        state = State()
        for event in facts[:number]:
            state.apply(event)
        states.append(state)
    for lane in found.lanes:
        for segment in lane.segments:
            assert segment.begin < segment.end
            if segment.is_summary:
                continue
            for time in {segment.begin, *(each for each in times if segment.begin <= each < segment.end)}:
                model = states[bisect_right(times, time)].models[lane.model_id]
                assert (segment.state, segment.version) == (model.state, model.version)


NODE_STEPS = {
    "join": lambda history, node: history.join(node, unclean=True, last_seen_at=at(history.seconds)),
    "drain": History.drain,
    "leave": History.leave,
    "lose": History.lose,
}


@FEWER
@given(
    st.lists(st.tuples(st.sampled_from(sorted(NODE_STEPS)), st.sampled_from(["n1", "n2"])), max_size=20),
    st.integers(0, 20),
    st.integers(1, 20),
)
def test_node_lane_is_what_the_fold_gives(steps: list[tuple[str, str]], begin: int, last: int) -> None:
    history = History()
    for step, node in steps:
        if step == "join" or node in history.state.nodes:
            NODE_STEPS[step](history, node)
    query = TimelineQuery(now=at(100), begin=at(begin), end=at(begin + last), resolution=2000)
    found = read_of(history.facts, query)
    state, events = State(), list(history.facts)
    lanes = {lane.node_id: lane.segments for lane in found.nodes}
    for second in range(begin + last):
        while events and events[0].recorded_at <= at(second):
            state.apply(events.pop(0))
        present = {node.id for node in state.nodes.values() if node.is_present}
        if second < begin:
            continue
        assert present <= lanes.keys()
        shown = {
            node_id: segment.state
            for node_id, segments in lanes.items()
            for segment in segments
            if segment.begin <= at(second) < segment.end
        }
        for node_id, phase in shown.items():
            expected = state.nodes[node_id].phase.value
            assert phase.value == expected or (phase.value == "unknown" and node_id in present)
        assert lanes.keys() & state.nodes.keys() == shown.keys()
        for segment in found.server:
            if segment.begin <= at(second) < segment.end:
                assert (segment.state is ServerState.RUNNING) == bool(present)


def test_lost_node_is_unknown_from_its_last_renewal() -> None:
    history = History()
    history.join("n1")  # at 1 s
    history.join("n2")
    history.about_node(NodeLost("n2", 1, at(10)), after_s=18)  # at 20 s
    history.drain("n1")
    history.leave("n1")
    found = read_of(history.facts, TimelineQuery(now=at(30), begin=at(2), resolution=2000))
    shown = {
        lane.node_id: [(each.state.value, each.begin, each.end) for each in lane.segments]
        for lane in found.nodes
    }
    assert shown == {
        "n1": [("joined", at(2), at(21)), ("draining", at(21), at(22)), ("left", at(22), at(30))],
        "n2": [("joined", at(2), at(10)), ("unknown", at(10), at(20)), ("lost", at(20), at(30))],
    }
    assert [(each.state, each.begin, each.end) for each in found.server] == [
        (ServerState.RUNNING, at(2), at(22)),
        (ServerState.STOPPED, at(22), at(30)),
    ]
    later = read_of(history.facts, TimelineQuery(now=at(60), begin=at(40)))
    assert later.nodes == ()
    between = read_of(history.facts, TimelineQuery(now=at(60), begin=at(2), end=at(15)))
    [_, of_n2] = between.nodes  # its end was recorded after the range
    assert [(each.state.value, each.begin, each.end) for each in of_n2.segments] == [
        ("joined", at(2), at(10)),
        ("unknown", at(10), at(15)),
    ]


SECONDS = {ModelState.LOADING: 1, ModelState.LOADED: 10, ModelState.UNLOADED: 1}
MERGED: dict[str, tuple[list[ModelState], list[tuple[ModelState, int, bool]]]] = {
    "long ones stay": (
        [ModelState.LOADED, ModelState.LOADED],
        [(ModelState.LOADED, 10, False), (ModelState.LOADED, 10, False)],
    ),
    "a short one between long ones stays": (
        [ModelState.LOADED, ModelState.LOADING, ModelState.LOADED],
        [(ModelState.LOADED, 10, False), (ModelState.LOADING, 1, False), (ModelState.LOADED, 10, False)],
    ),
    "short ones become a summary with the last state": (
        [ModelState.LOADED, ModelState.LOADING, ModelState.UNLOADED],
        [(ModelState.LOADED, 10, False), (ModelState.UNLOADED, 2, True)],
    ),
    "a summary ends when it is as wide as a bucket": (
        [ModelState.LOADING, ModelState.UNLOADED] * 3,
        [(ModelState.UNLOADED, 4, True), (ModelState.UNLOADED, 2, True)],
    ),
}
"""By case: states that follow one another, for so long each, and segments with their durations."""


@pytest.mark.parametrize("case", MERGED)
def test_segments_shorter_than_a_bucket_are_merged(case: str) -> None:
    states, expected = MERGED[case]
    segments, now = list[Segment](), 0
    for state in states:
        segments.append(Segment(state, at(now), at(now + SECONDS[state]), events=2))
        now += SECONDS[state]
    merged = merge_segments(segments, width_s=4)
    durations = [int(seconds_between(each.begin, each.end)) for each in merged]
    assert [
        (each.state, took, each.is_summary) for each, took in zip(merged, durations, strict=True)
    ] == expected
    assert sum(each.events for each in merged) == 2 * len(states)


def test_marks_of_a_kind_in_one_bucket_are_one() -> None:
    def mark(kind: MarkKind, position: int) -> Mark:
        return Mark(kind, at(position), position)

    failed, lost = MarkKind.FAILED, MarkKind.LOST
    marks = [mark(failed, 1), mark(failed, 3), mark(lost, 2), mark(failed, 6)]
    merged = [(each.kind, each.position, each.count) for each in merge_marks(marks, width_s=4)]
    assert merged == [(failed, 3, 2), (lost, 2, 1), (failed, 6, 1)]


def test_swap_failure_and_loss_are_marked() -> None:
    history = History()
    history.restart()
    history.load("L")
    history.load("L2", version=2)
    history.kill_worker("w-L2")
    history.ask_load("F")
    history.fail_load("F", "invalid_model")
    history.load("O", of="other")
    history.unload("U", "O", of="other")
    found = read_of(history.facts, TimelineQuery(now=at(60), resolution=2000))
    lane, other = found.lanes
    kinds = [(mark.kind, mark.version, mark.code) for mark in lane.marks]
    assert kinds == [
        (MarkKind.SWAPPED, 2, None),
        (MarkKind.LOST, 2, "worker_died"),
        (MarkKind.EXITED, 1, "signal 9"),
        (MarkKind.FAILED, 1, "invalid_model"),
    ]
    assert [(load.version, load.loaded_by, load.files[0].sha256) for load in lane.loads] == [
        (version, "alice", "ab" * 32) for version in (1, 2)
    ]
    assert [each.state.value for each in other.segments] == [
        "unloaded", "loading", "loaded", "unloading", "unloaded"
    ]  # fmt: skip
    assert [each.by for each in other.segments] == ["alice"] * 5
    assert [each.is_waiting for each in other.segments] == [True, False, False, False, False]
    assert other.segments[-1].end == found.end == at(60)


def test_server_that_ended_is_unknown_until_it_starts() -> None:
    history = History()
    history.restart()  # at 1 s
    history.load("L")
    history.restart(down_s=100)  # last seen at 4 s
    history.stop()
    found = read_of(history.facts, TimelineQuery(now=at(200), resolution=2000))
    running, stopped, unknown = ServerState.RUNNING, ServerState.STOPPED, ServerState.UNKNOWN
    assert [(each.state, each.begin, each.end) for each in found.server] == [
        (running, at(1), at(4)), (unknown, at(4), at(104)),
        (running, at(104), at(105)), (stopped, at(105), at(200)),
    ]  # fmt: skip
    stopping = list_transitions((), history.facts[-2:])
    narrow = server_segments(stopping, running, at(0), at(20_000), width_s=1_000)
    assert narrow == [
        ServerSegment(unknown, at(0), at(105), None, 1),
        ServerSegment(stopped, at(105), at(20_000), 6),
    ]
    [lane] = found.lanes
    assert lane.segments[-1].state is ModelState.LOST


def test_page_of_lanes_begins_at_its_cursor_and_filter() -> None:
    history = History()
    for number in range(5):
        history.load(f"L{number}", of=f"Model-{number}")
    first = read_of(history.facts, TimelineQuery(now=at(60), limit=2, find="mODEL"))
    assert [lane.model_id for lane in first.lanes] == ["Model-0", "Model-1"]
    assert (first.next_cursor, first.models) == ("Model-1", 5)
    last = read_of(history.facts, TimelineQuery(now=at(60), limit=2, cursor="Model-3"))
    assert ([lane.model_id for lane in last.lanes], last.next_cursor) == (["Model-4"], None)
    with pytest.raises(InvalidMoment):
        read_of(history.facts, TimelineQuery(now=at(60), begin=at(3), end=at(3)))
