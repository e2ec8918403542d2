"""Nodes: their fold, what their ends do to models and jobs, and which node works on what."""

import dataclasses
import json
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.history import DIGEST, MODEL, START, History, at, given, ids, model_loaded, opened, steady
from support.ledgers import change_ledger

from events.accept import accept
from events.audit.verify import verify
from events.codec import encode_event
from events.commands import Accepted, Command, Decision, Existing, Record, Refused
from events.jobcommands import RequestUnload
from events.jobs import JobStatus
from events.models import ModelState
from events.registers import Registers
from events.sqlite import queries, storage
from events.sqlite.schema import connect
from events.state import Entities, State, Transaction
from events.types import SYSTEM, Cause, Draft, Event, LoadStarted, ServerStarted, UnloadRequested
from events.values import Credential
from features.approvals.facts import VersionApproved
from features.nodes.commands import DrainNode, EndNode, JoinNode, NodeCurrent, NodeUnchanged
from features.nodes.facts import NodeDraining, NodeJoined, NodeLeft, NodeLost, NodeSignature
from features.nodes.register import KEPT_S, Node, NodePhase, evolve_nodes, find_placer, is_epoch_over
from nodes.placement import find_share
from runtime.elsewhere import ALONE


def cluster(*nodes: str) -> History:
    history = History()
    for node in nodes:
        history.join(node)
    return history


def works_on(history: History, node: str) -> tuple[set[str], set[str]]:
    own = find_share(history.state, node, None, frozenset())
    return {job.id for job in own.unended()}, set(own.models)


# The fold of a node


def test_node_goes_through_its_phases() -> None:
    history, found = cluster("a"), list[tuple[NodePhase, int, str | None]]()
    first = Node("a", 1, NodePhase.JOINED, 1, at(1), "http://a", (), None, "1", None)
    assert history.state.registers.nodes["a"] == first
    for step in (history.drain, history.leave, partial(history.join, attributes=("zone=eu",)), history.lose):
        step("a")
        node = history.state.registers.nodes["a"]
        found.append((node.phase, node.epoch, node.ended_at))
    assert found == [
        (NodePhase.DRAINING, 1, None),
        (NodePhase.LEFT, 1, at(3)),
        (NodePhase.JOINED, 2, None),
        (NodePhase.LOST, 2, at(5)),
    ]
    assert history.state.registers.nodes["a"].attributes == ("zone=eu",)


@pytest.mark.parametrize("data", [NodeDraining("a", 1), NodeLeft("a", 1), NodeLost("a", 1, at(0))])
def test_event_of_another_epoch_changes_no_node(data: NodeDraining | NodeLeft | NodeLost) -> None:
    history = cluster("a", "a")
    before = history.state.registers.nodes["a"]
    history.about_node(data)
    assert history.state.registers.nodes["a"] is before
    history.about_node(replace(data, node_id="never"))
    assert set(history.state.registers.nodes) == {"a"}


@pytest.mark.parametrize(
    ("nodes", "steps", "placer"),
    [
        ("", "", None),
        ("b a", "", "a"),
        ("a b", "drain:a", "b"),
        ("a b", "drain:a drain:b", "a"),
        ("a b", "lose:a", "b"),
        ("a b", "leave:a leave:b", None),
    ],
)
def test_placer_is_lowest_node_that_takes_loads(nodes: str, steps: str, placer: str | None) -> None:
    history = cluster(*nodes.split())
    for step in steps.split():
        name, _, node = step.partition(":")
        getattr(history, name)(node)
    assert find_placer(history.state.registers.nodes) == placer


def test_node_that_ended_long_ago_is_forgotten_when_another_joins() -> None:
    history = cluster("a", "b", "c", "d")
    history.leave("b")
    history.lose("c")
    history.join("e", after_s=KEPT_S - 10)
    assert set(history.state.registers.nodes) == {*"abcde"}
    history.drain("a")
    changes = Transaction(State(registers=Registers(nodes=dict(history.state.registers.nodes))))
    history.join("e", after_s=20)
    changes.apply(history.facts[-1])
    assert set(history.state.registers.nodes) == {*"ade"}
    changed = changes.changes.registers["nodes"]
    assert {key: node is None for key, node in changed.items()} == {"e": False, "b": True, "c": True}
    folded = Entities()
    for event in history.facts:
        folded.apply(event)
    assert folded.registers.nodes == history.state.registers.nodes


def test_node_that_signed_a_standing_approval_is_not_forgotten() -> None:
    history = cluster("a", "b")
    signed = VersionApproved(DIGEST, (), "fine", Credential(), server_signature=NodeSignature("b", "c2ln"))
    history.add(signed, by="carol")
    history.leave("b")
    history.join("c", after_s=KEPT_S + 20)
    assert set(history.state.registers.nodes) == {*"abc"}
    history.withdraw()
    history.join("d")
    assert set(history.state.registers.nodes) == {*"acd"}


def test_node_that_owns_something_or_joins_again_is_remembered() -> None:
    history = cluster("a", "b", "c", "d")
    for node in "abc":
        history.leave(node)
    joined = NodeJoined("a", 2, "http://a", (), None, "1", None, unclean=False)
    event = Event(9, "e", joined, SYSTEM, at(history.seconds + KEPT_S + 9))
    changed = evolve_nodes(history.state.registers.nodes, event, joined, lambda: {"b"})
    assert {key: node is None for key, node in changed.items()} == {"a": False, "c": True}


# What the end of a node does

ENDS = {
    "leaves": lambda history: history.leave("b"),
    "is lost": lambda history: history.lose("b"),
    "joins again": lambda history: history.join("b", unclean=True),
}


@pytest.mark.parametrize("end", ENDS)
def test_end_of_node_ends_all_that_is_there_alone(end: str) -> None:
    history = cluster("a", "b")
    history.load_at("a", "A", of="at_a")
    history.load_at("b", "B", of="at_b")
    history.ask_load("W", of="waits")
    history.place("W", "b", of="waits")
    history.ask_load("L")
    history.start_at("b", "L")
    before = history.model("at_a")
    assert (history.job("L").server, history.model().state) == ("b", ModelState.LOADING)
    ENDS[end](history)
    lost = history.model("at_b")
    assert history.model("at_a") is before
    assert (lost.phase, lost.lost_by, lost.lost_at) == (ModelState.LOST, Cause.RESTART, at(history.seconds))
    assert history.serving("at_b").server is None
    started, waiting = history.job("L"), history.job("W")
    deaths = 0 if end == "leaves" else 1
    assert (started.status, started.server, started.attempt) == (JobStatus.PENDING, None, 1)
    assert (started.server_deaths, history.model().state) == (deaths, ModelState.UNLOADED)
    assert (waiting.server, waiting.server_deaths, waiting.position) == (None, 0, history.state.position)
    history.start_at("a", "L")
    assert (history.job("L").attempt, history.job("L").server) == (2, "a")


def test_end_of_node_keeps_load_at_another() -> None:
    history = cluster("a", "b")
    history.load_at("b", "B")
    history.ask_load("L")
    history.start_at("a", "L")
    history.lose("b")
    assert (history.model().phase, history.job("L").status) == (ModelState.LOST, JobStatus.IN_PROGRESS)
    assert [load.started for load in history.model().loads] == [True]
    history.add(replace(model_loaded("w"), server="a"), "L")
    assert (history.serving().server, history.model().phase) == ("a", ModelState.LOADED)


def test_dead_worker_keeps_model_at_its_node() -> None:
    history = cluster("a", "b")
    history.load_at("b", "B")
    history.kill_worker("w-B")
    assert works_on(history, "b")[1] == {MODEL}
    history.lose("b")
    assert works_on(history, "a")[1] == {MODEL}
    assert history.model().lost_by is Cause.RESTART


def test_drained_and_replaced_load_is_unloaded_apart() -> None:
    history = cluster("a", "b")
    history.load_at("a", "A")
    history.load_at("b", "M", cause=Cause.DRAIN)
    unload = UnloadRequested(False, "A", Cause.DRAIN, server="a")
    history.add(unload, "U")
    assert (works_on(history, "a"), works_on(history, "b")) == (({"U"}, set()), (set(), {MODEL}))
    assert history.state.queue(MODEL) == []
    assert not history.job("U").cancellable
    moved = history.serving()
    assert (moved.server, moved.asked_by, moved.brought_back) == ("b", "alice", Cause.DRAIN)
    history.start_unload("U")
    history.lose("a")
    assert (history.job("U").status, works_on(history, "b")[0]) == (JobStatus.PENDING, {"U"})
    history.start_unload("U")
    history.end_unload("U")
    assert (history.model().phase, history.state.unended()) == (ModelState.LOADED, [])


@pytest.mark.parametrize("end", ["invalid_model", "insufficient_memory", "cancelled"])
@pytest.mark.parametrize("is_degraded", [False, True])
def test_failed_move_is_counted_and_model_serves_on(end: str, *, is_degraded: bool) -> None:
    history = cluster("a", "b")
    history.load_at("a", "A", instances=2)
    if is_degraded:
        history.kill_worker("w-A")
    incidents = history.model().incidents
    history.ask_load("M", cause=Cause.DRAIN)
    history.start_at("b", "M")
    if end == "cancelled":
        history.ask_cancel("M")
        history.end_cancelled("M")
    else:
        history.fail_load("M", end)
    model = history.model()
    assert (model.phase, model.incidents, model.degraded) == (ModelState.LOADED, incidents, is_degraded)
    assert not history.serving().kept_as_is  # the repair goes on
    assert model.retries is not None
    assert (model.retries.count, model.back_off_position) == (1, history.state.position)


def test_placement_is_counted_until_a_node_ends() -> None:
    history = cluster("a", "b")
    history.ask_load("L")
    for node in ("a", "b", "b"):
        history.place("L", node)
    placed = history.job("L").placement
    assert placed
    assert (placed.server, placed.times, history.job("L").position) == ("b", 3, history.state.position)
    history.lose("b")
    history.place("L", "a")
    assert history.job("L").placement != placed


def test_deadline_moves_by_time_without_any_node() -> None:
    history = cluster("a", "b")
    history.ask_load("L", timeout_s=10)
    history.ask_load("M", of="other", timeout_s=10)
    history.start_at("b", "M", of="other")
    deadlines = [history.job(job).deadline_at for job in ("L", "M")]
    assert deadlines == [at(13), at(14)]
    history.join("a", unclean=True, no_node_since=at(history.seconds - 2))
    assert [history.job(job).deadline_at for job in ("L", "M")] == [at(16), at(17)]
    assert (history.job("M").status, history.job("M").server) == (JobStatus.IN_PROGRESS, "b")
    history.join("a", unclean=True)
    assert history.job("L").deadline_at == at(16)


def test_first_node_ends_what_ran_without_nodes() -> None:
    history = given("load request_other start_other")
    assert ALONE.share(history.state) is history.state  # worked on whole
    assert find_share(history.state, "a", None, frozenset()).unended() == []
    history.join("a", unclean=True)
    assert history.model().phase is ModelState.LOST
    assert history.job("O").status is JobStatus.PENDING
    assert works_on(history, "a") == ({"O"}, {MODEL})


def test_server_without_nodes_takes_over_what_they_had() -> None:
    history = cluster("a", "b")
    history.load_at("a", "A")
    history.ask_load("L", of="other")
    history.place("L", "b", of="other")
    history.stop()
    assert history.job("L").server == "b"
    history.add(ServerStarted(True, last_seen_at=at(history.seconds)), None, of=None, version=None)
    assert (history.serving().server, history.model().phase) == (None, ModelState.LOST)
    assert history.job("L").server is None


# Which node works on what


def test_unplaced_and_lost_work_is_the_placers() -> None:
    history = cluster("a", "b")
    history.load_at("b", "B", of="lost")
    history.ask_load("L")
    history.lose("b")
    assert works_on(history, "a") == ({"L"}, {"lost"})
    assert works_on(history, "b") == (set(), set())
    history.join("b")
    assert works_on(history, "b") == (set(), set())
    history.drain("a")
    assert works_on(history, "b") == ({"L"}, {"lost"})
    assert works_on(history, "a") == (set(), set())


def test_unload_is_worked_on_where_its_load_is() -> None:
    history = cluster("a", "b")
    history.load_at("b", "B")
    history.ask_unload("U", "B")
    assert works_on(history, "b")[0] == {"U"}
    (request,) = facts(decide(history.state, RequestUnload(MODEL, "alice", force=True)))
    assert isinstance(request, UnloadRequested)
    assert (request.load_job_id, request.server) == ("B", "b")
    history.ask_load("L", of="other")
    history.ask_unload("V", "L", of="other", force=True)
    assert works_on(history, "a")[0] == {"L", "V"}
    history.place("L", "b", of="other")
    assert works_on(history, "b")[0] == {"U", "L", "V"}


def test_untrusted_node_owns_nothing_and_places_nothing() -> None:
    history = cluster("a", "b")
    history.load_at("a", "L")
    assert find_placer(history.state.registers.nodes, {"a"}) == "b"
    for node, untrusted, models in (("b", "", set()), ("b", "a", {MODEL}), ("a", "a", set())):
        assert find_share(history.state, node, 1, frozenset(untrusted)).models.keys() == models


def test_epoch_that_is_over_works_on_nothing() -> None:
    history = cluster("a")
    history.ask_load("L")
    assert [job.id for job in find_share(history.state, "a", 1, frozenset()).unended()] == ["L"]
    history.join("a", unclean=True)
    assert find_share(history.state, "a", 1, frozenset()).unended() == []
    assert [job.id for job in find_share(history.state, "a", 2, frozenset()).unended()] == ["L"]


# Commands


def decide(state: State, command: Command, *, now: str = at(100)) -> Decision:
    return accept(state, command, ids("n"), now)


def facts(decision: Decision) -> list[object]:
    assert isinstance(decision, Accepted), decision
    return [draft.data for draft in decision.drafts]


def node_joined(epoch: int, *, unclean: bool = True, since: str | None = None) -> NodeJoined:
    return NodeJoined("a", epoch, "http://a", ("zone=eu",), 5, "1.2", "key", unclean, at(3), since)


JOIN = JoinNode("a", "http://a", ("zone=eu",), 5, "1.2", "key", last_seen_at=at(3))


@pytest.mark.parametrize(
    ("steps", "command", "expected"),
    [
        # A join begins the next epoch, after that of the state and of the lease.
        ("", JOIN, [node_joined(1, unclean=False)]),
        ("join", JOIN, [node_joined(2)]),
        ("join leave", JOIN, [node_joined(2, unclean=False)]),
        ("join lose", JOIN, [node_joined(2)]),
        ("join drain leave join", JOIN, [node_joined(3)]),
        ("join join", dataclasses.replace(JOIN, last_epoch=2), [node_joined(3)]),
        ("join join", dataclasses.replace(JOIN, last_epoch=7), [node_joined(8)]),
        (
            "join join",
            dataclasses.replace(JOIN, no_node_since=at(0)),
            [node_joined(3, since=at(2))],
        ),  # that of the last event
        # The present epoch ends once.
        ("join join", EndNode(NodeLeft("a", 2)), [NodeLeft("a", 2)]),
        ("join join", EndNode(NodeLost("a", 2, at(1))), [NodeLost("a", 2, at(1))]),
        ("join join", EndNode(NodeLeft("a", 1)), "outdated"),
        ("join join", EndNode(NodeLost("a", 1, at(1))), "outdated"),
        ("join", EndNode(NodeLost("b", 1, at(1))), "outdated"),
        ("join leave", EndNode(NodeLost("a", 1, at(1))), "outdated"),
        # A present node is drained once.
        ("join", DrainNode("a", "alice"), [NodeDraining("a", 1)]),
        ("join drain", DrainNode("a", "alice"), Existing(None)),
        ("", DrainNode("a", "alice"), "unknown_node"),
        ("join leave", DrainNode("a", "alice"), "node_ended"),
        ("join lose", DrainNode("a", "alice"), "node_ended"),
    ],
)
def test_command_about_node_is_decided(steps: str, command: Command, expected: object) -> None:
    history = History()
    for step in steps.split():
        getattr(history, step)("a")
    match decide(history.state, command):
        case Accepted(drafts, None):
            assert [draft.data for draft in drafts] == expected
            assert {draft.actor for draft in drafts} == {getattr(command, "actor", SYSTEM)}
        case Refused(code):
            assert code == expected
        case other:
            assert other == expected


def test_facts_of_ended_epoch_are_refused() -> None:
    history = cluster("a", "b")
    node = history.state.registers.nodes["a"]
    draft = Draft("f", LoadStarted(1, server="a"), SYSTEM, "L", MODEL, 1)
    current, unchanged = Record((draft,), (NodeCurrent("a", 1),)), Record((draft,), (NodeUnchanged(node),))
    assert facts(decide(history.state, current)) == facts(decide(history.state, unchanged)) == [draft.data]
    history.drain("a")
    assert facts(decide(history.state, current)) == [draft.data]
    assert isinstance(decide(history.state, unchanged), Refused)
    history.lose("a")
    assert isinstance(decide(history.state, current), Refused)
    history.join("a")
    assert isinstance(decide(history.state, current), Refused)


# How they are stored


def test_bodies_without_nodes_do_not_mention_them() -> None:
    history = given("load request_v2 start_v2 request_unload")
    stored = [queries.as_text(model) for model in history.state.models.values()]
    stored += [queries.as_text(job) for job in history.state.jobs.values()]
    assert not any("node" in body for body in stored)
    assert not any("node" in encode_event(event) for event in history.facts)


def test_stored_entities_with_nodes_read_back() -> None:
    history = cluster("a")
    history.load_at("a", "A")
    history.ask_load("L", version=2)
    history.start_at("a", "L")
    [model], jobs = history.state.models.values(), history.state.jobs.values()
    assert queries.as_model(queries.as_text(model)) == model
    assert json.loads(queries.as_text(model))["serving"]["node_id"] == "a"
    assert [queries.as_job(queries.as_text(job)) for job in jobs] == [*jobs]


async def test_nodes_are_stored_rebuilt_and_verified(path: Path) -> None:
    async with opened(path, **steady(lambda: START)) as log:
        await log.submit(JoinNode("a", "http://a", ("zone=eu",)))
        await log.submit(JoinNode("b", "http://b"))
        await log.submit(DrainNode("a", "alice"))
        nodes = log.state.registers.nodes
    assert nodes["a"].phase is NodePhase.DRAINING
    with closing(connect(path)) as connection:
        storage.rebuild(connection)
        assert queries.read_state(connection).registers.nodes == nodes
    async with opened(path) as log:
        assert log.state.registers.nodes == nodes
    assert verify(path).verified
    change_ledger(path, "DELETE FROM nodes WHERE id = 'a'", keeps_triggers=True)
    finding = verify(path).finding
    assert finding is not None
    assert "the stored nodes lack 'a'" in finding.problem


@pytest.mark.parametrize(
    ("steps", "is_over"), [("", False), ("drain", False), ("leave", True), ("lose", True), ("join", True)]
)
def test_epoch_is_over_once_it_ended_or_the_node_joined_again(steps: str, is_over: bool) -> None:  # noqa: FBT001
    history = cluster("a")
    name = history.state.registers.nodes["a"].epoch_name
    for step in steps.split():
        getattr(history, step)("a")
    nodes = history.state.registers.nodes
    assert is_epoch_over(nodes, name) is is_over
    assert not any(is_epoch_over(nodes, other) for other in ("", "a-1", name.removesuffix("-1"), name + "x"))


def test_statement_of_join_names_all_that_is_checked() -> None:
    joined = NodeJoined("a", 1, "http://a", (), None, "1", "key", unclean=False, after="00")
    changes = ({"node_id": "b"}, {"epoch": 2}, {"address": "x"}, {"public_key": None}, {"after": "01"})
    said = {replace(joined, **change).statement for change in ({}, *changes)}
    assert len(said) == 6
    history = History()
    history.about_node(joined)
    assert history.state.registers.nodes["a"].statement == joined.statement
