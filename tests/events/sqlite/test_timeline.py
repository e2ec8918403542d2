"""The timeline: what a lane says of a time is what the fold of the events by then says."""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import FEWER, History, at, with_own_ids
from support.ledgers import ledger_of
from support.strategies import copied_histories, histories

from answers.timeline import MarkKind, Timeline
from events.clock import add_seconds
from events.errors import LogUnavailable
from events.models import ModelState
from events.presence import ServerState
from events.sqlite import timeline
from events.sqlite.timeline import TimelineQuery, read_timeline
from events.sqlite.timetravel import InvalidMoment
from events.state import State
from events.types import Cause, Event, ServerStopped
from features.nodes.facts import NodeLost


def spans(segments: Iterable[Any]) -> list[tuple[str, str, str]]:
    return [(each.state, each.begin, each.end) for each in segments]


def read_of(events: list[Event], query: TimelineQuery) -> Timeline:
    with ledger_of(events) as connection:
        return read_timeline(connection, query)


def times_in(segment: Any, times: list[str]) -> set[str]:
    return {segment.begin, *(each for each in times if segment.begin <= each < segment.end)}


@FEWER
@given(histories() | copied_histories(), st.integers(0, 40), st.integers(1, 40))
def test_lane_is_what_the_fold_gives(history: History, begin: int, last: int) -> None:
    facts = list(with_own_ids(history.facts))
    if not facts:
        return
    found = read_of(facts, TimelineQuery(now=at(100), begin=at(begin), end=at(begin + last)))
    times, states = [event.recorded_at for event in facts], [State()]
    for number in range(1, len(facts) + 1):
        states.append(state := State())
        for event in facts[:number]:
            state.apply(event)
    for lane in found.lanes:
        for segment in lane.segments:
            assert segment.begin < segment.end
            for time in times_in(segment, times):
                model = states[bisect_right(times, time)].models[lane.model_id]
                assert (segment.state, segment.version) == (model.state, model.version)
        for node_id, copy in ((copies.node_id, each) for copies in lane.copies for each in copies.segments):
            for time in times_in(copy, times):
                model = states[bisect_right(times, time)].models[lane.model_id]
                own = [each for each in model.servings if each.server == node_id]
                shown = [] if copy.load_job_id is None else [(copy.load_job_id, copy.version)]
                assert [(each.load_job_id, each.version) for each in own] == shown


def test_model_with_copies_has_a_lane_for_each_node() -> None:
    history = History()
    history.join("a")
    history.join("b")  # at 2 s
    history.load_at("a", "A", copies=2)  # loaded at 6 s
    history.load_at("b", "B", copies=2, cause=Cause.COPY)  # at 10 s
    history.load_at("b", "B2", version=2, copies=2)  # at 14 s
    history.ask_unload("U", "A", cause=Cause.SWAP, node_id="a")  # at 15 s
    history.load_at("a", "A2", version=2, copies=2, cause=Cause.COPY)  # at 19 s
    query = TimelineQuery(now=at(30), begin=at(8), end=at(20))
    [lane] = read_of(history.facts, query).lanes
    shown = {
        each.node_id: [(part.version, part.load_job_id, part.begin, part.end) for part in each.segments]
        for each in lane.copies
    }
    assert shown == {
        "a": [(1, "A", at(8), at(15)), (None, None, at(15), at(19)), (2, "A2", at(19), at(20))],
        "b": [(None, None, at(8), at(10)), (1, "B", at(10), at(14)), (2, "B2", at(14), at(20))],
    }
    [before] = read_of(history.facts, TimelineQuery(now=at(30), begin=at(2), end=at(8))).lanes
    assert before.copies == ()


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
        if step == "join" or node in history.state.registers.nodes:
            NODE_STEPS[step](history, node)
    query = TimelineQuery(now=at(100), begin=at(begin), end=at(begin + last))
    found = read_of(history.facts, query)
    state, events = State(), list(history.facts)
    lanes = {lane.node_id: lane.segments for lane in found.nodes}
    for second in range(begin + last):
        while events and events[0].recorded_at <= at(second):
            state.apply(events.pop(0))
        present = {node.id for node in state.registers.nodes.values() if node.is_present}
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
            expected = state.registers.nodes[node_id].phase.value
            assert phase == expected or (phase == "unknown" and node_id in present)
        assert lanes.keys() & state.registers.nodes.keys() == shown.keys()
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
    found = read_of(history.facts, TimelineQuery(now=at(30), begin=at(2)))
    assert {lane.node_id: spans(lane.segments) for lane in found.nodes} == {
        "n1": [("joined", at(2), at(21)), ("draining", at(21), at(22)), ("left", at(22), at(30))],
        "n2": [("joined", at(2), at(10)), ("unknown", at(10), at(20)), ("lost", at(20), at(30))],
    }
    assert spans(found.server) == [("running", at(2), at(22)), ("stopped", at(22), at(30))]
    assert read_of(history.facts, TimelineQuery(now=at(60), begin=at(40))).nodes == ()
    between = read_of(history.facts, TimelineQuery(now=at(60), begin=at(2), end=at(15)))
    [_, of_n2] = between.nodes  # its end was recorded after the range
    assert spans(of_n2.segments) == [("joined", at(2), at(10)), ("unknown", at(10), at(15))]


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
    found = read_of(history.facts, TimelineQuery(now=at(60)))
    lane, other = found.lanes
    assert [(mark.kind, mark.version, mark.code) for mark in lane.marks] == [
        (MarkKind.SWAPPED, 2, None),
        (MarkKind.LOST, 2, "worker_died"),
        (MarkKind.EXITED, 1, "signal 9"),
        (MarkKind.FAILED, 1, "invalid_model"),
    ]
    assert [(each.state, each.by, each.is_waiting) for each in other.segments] == [
        ("unloaded", "alice", True),
        *((state, "alice", False) for state in ("loading", "loaded", "unloading", "unloaded")),
    ]
    assert other.segments[-1].end == found.end == at(60)


def test_server_that_ended_is_unknown_until_it_starts() -> None:
    history = History()
    history.restart()  # at 1 s
    history.load("L")
    history.restart(down_s=100)  # last seen at 4 s
    history.stop()
    found = read_of(history.facts, TimelineQuery(now=at(200)))
    assert spans(found.server) == [
        ("running", at(1), at(4)),
        ("unknown", at(4), at(104)),
        ("running", at(104), at(105)),
        ("stopped", at(105), at(200)),
    ]
    [lane] = found.lanes
    assert lane.segments[-1].state is ModelState.LOST


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE model_history SET body = '{'",
        "UPDATE presence SET state = 'nowhere' WHERE position = 1",
        "UPDATE jobs SET body = json_set(body, '$.status', 'lost')",
    ],
)
def test_timeline_of_damaged_rows_is_unavailable(damage: str) -> None:
    history = History()
    history.restart()
    history.load("L")
    with ledger_of(history.facts) as connection:
        connection.execute(damage)
        with pytest.raises(LogUnavailable, match="verify"):
            read_timeline(connection, TimelineQuery(now=at(60)))


def test_range_with_too_many_rows_has_their_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_ROWS", 6)
    history = History()
    history.restart()  # at 1 s
    history.load("A", of="a")  # to 4 s
    history.load("B", of="b")  # to 7 s
    whole = read_of(history.facts, TimelineQuery(now=at(60)))
    assert (whole.rows, whole.max_rows, whole.lanes, whole.server) == (7, 6, [], ())
    for query in (TimelineQuery(now=at(60), begin=at(4)), TimelineQuery(now=at(60), find="a")):
        found = read_of(history.facts, query)
        assert found.rows == 4
        assert [lane.segments[-1].state for lane in found.lanes] == ["loaded"] * len(found.lanes)
        assert [each.state for each in found.server] == [ServerState.RUNNING]


def test_active_models_have_events_or_a_load() -> None:
    history = History()
    history.load("G", of="gone")
    history.unload("U", "G", of="gone")
    history.load("L", of="loaded")
    history.ask_load("S", of="loading")
    history.start_load("S", of="loading")
    history.ask_load("W", of="waiting")
    history.add(ServerStopped(), of=None, after_s=100)
    query = TimelineQuery(now=at(200), begin=at(50))
    found = read_of(history.facts, query)
    assert [lane.model_id for lane in found.lanes] == ["loaded", "loading", "waiting"]


def test_marks_at_the_beginning_of_the_range_are_shown() -> None:
    history = History()
    history.load("L")
    history.load("L2", version=2)
    history.kill_worker("w-L2")
    shown = []
    for begin in (at(6), at(7)):  # of the swap, and of the loss
        [lane] = read_of(history.facts, TimelineQuery(now=at(60), begin=begin)).lanes
        shown.append([(mark.kind, mark.at) for mark in lane.marks])
    assert shown == [
        [("swapped", at(6)), ("lost", at(7)), ("exited", at(7))],
        [("lost", at(7)), ("exited", at(7))],
    ]


def test_first_segment_is_by_who_began_its_state() -> None:
    history = History()
    history.load("L")
    history.kill_worker("w-L")
    history.load("R", cause=Cause.RECOVERY)
    history.unload("U", "R")
    shown = []
    for fact in history.facts[:-1]:  # after the last one the model is not active
        query = TimelineQuery(now=at(60), begin=add_seconds(fact.recorded_at, 0.5))
        segment = read_of(history.facts, query).lanes[0].segments[0]
        shown.append((segment.state, segment.by))
    assert shown == [
        ("unloaded", "alice"), ("loading", "alice"), ("loaded", "alice"), ("lost", "system"),
        ("lost", "system"), ("loading", "system"), ("loaded", "system"), ("loaded", "system"),
        ("unloading", None),
    ]  # fmt: skip


def test_page_of_lanes_begins_at_its_cursor_and_filter() -> None:
    history = History()
    for number in range(5):
        history.load(f"L{number}", of=f"Model-{number}")
    first = read_of(history.facts, TimelineQuery(now=at(60), limit=2, find="mODEL"))
    assert [lane.model_id for lane in first.lanes] == ["Model-0", "Model-1"]
    assert first.next_cursor == "Model-1"
    last = read_of(history.facts, TimelineQuery(now=at(60), limit=2, cursor="Model-3"))
    assert ([lane.model_id for lane in last.lanes], last.next_cursor) == (["Model-4"], None)
    with pytest.raises(InvalidMoment):
        read_of(history.facts, TimelineQuery(now=at(60), begin=at(3), end=at(3)))
