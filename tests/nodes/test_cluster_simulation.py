"""Nodes that crash, pause and are cut off: what is recorded stays right, and in the end everything ends."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec import UNSET
from support.clusters import LEASE_S, Cluster, ClusterNode
from support.fleet import of_both
from support.history import CONTENTS, PLAIN
from support.worlds import request_of, withdrawal_of

from events.commands import Command, Condition
from events.jobcommands import RequestCancel, RequestLoad, RequestUnload
from events.models import ModelState
from events.types import Cause, Justification, LoadParameters, LoadStarted, UnloadRequested, WorkerExited
from events.values import Credential
from features.approvals.commands import ApprovedBytes
from features.approvals.rules import ApprovalRule
from features.nodes.commands import DrainNode, NodeCurrent, NodeUnchanged
from features.nodes.facts import LoadPlaced
from features.rules import LoadPolicy
from nodes.placement import NodeHints
from runtime.elsewhere import SystemCommand
from runtime.scheduler.actions import Action, RecordFact, StartLoad
from runtime.scheduler.view import Policy

RULES = st.sampled_from(
    [
        LoadPolicy(),
        LoadPolicy(approval=(ApprovalRule(("b",)),)),
        LoadPolicy(approval=(ApprovalRule(("[bc]",), 2),)),
    ]
)

EMERGENCY = Justification(Credential(), "fire", "fire")

POLICIES = st.builds(
    Policy,
    loads_at_once=st.integers(1, 2),
    budget_bytes=st.sampled_from([100, 100, 150, None]),
    max_loaded=st.sampled_from([None, None, 1, 2]),
    evicts=st.booleans(),
    takes_turns=st.booleans(),
    min_residency_s=st.sampled_from([0.0, 10.0]),
    restores=st.just(True),
    loads=RULES,
)

USUAL, KEPT = LoadParameters(), ("instances", "node_attributes", "copies")
LOADS = st.builds(
    lambda name, version, parameters, asked, said: RequestLoad(
        name,
        version,
        CONTENTS,
        "alice",
        parameters,
        asked=frozenset(asked | {name for name in KEPT if getattr(parameters, name) != getattr(USUAL, name)}),
        justification=said,
    ),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from([1, 1, 2]),
    st.builds(
        LoadParameters,
        priority=st.sampled_from(["normal", "normal", "high", "low"]),
        timeout_s=st.sampled_from([5, 300, 300]),
        keep_alive_s=st.sampled_from([None, None, 20]),
        strategy=st.sampled_from(["beside", "in_place", "auto"]),
        instances=st.sampled_from([1, 1, 1, 2]),
        node_attributes=st.sampled_from([UNSET, UNSET, UNSET, ("gpu=a",)]),
        copies=st.sampled_from([UNSET, UNSET, 2, 2, 3]),
    ),
    st.sets(st.sampled_from(["keep_alive_s", "timeout_s", "strategy"])),
    st.sampled_from([UNSET, UNSET, UNSET, EMERGENCY]),
)

OWN = st.sampled_from([("b", 1), ("c", 1), ("c", 2)])
KINDS = st.sampled_from(["load", "unload", "force", "cancel", "withdraw", "withdraw"])
APPROVING = st.sampled_from([("bob", "carol"), ("bob", "carol"), ("alice", "carol"), ("alice",), ()])
WHICH = st.integers(0, 3)
TURNS = st.sampled_from([0, 1, 2, 3, 100])
OUTCOMES = st.sampled_from(["loaded", "loaded", "loaded", "refused", "dies"])


class ClusterSimulation(RuleBasedStateMachine):
    """Anything happens to the nodes in any order, and in the end everything ends."""

    cluster: Cluster
    own: Sequence[tuple[str, int]]
    """Versions that are in nodes' own repositories only."""

    @initialize(
        policies=st.lists(POLICIES, min_size=2, max_size=3),
        rules=st.none() | RULES,
        attributes=st.lists(st.sampled_from([(), (), ("gpu=a", "zone=x")]), min_size=3, max_size=3),
        skew_s=st.sampled_from([0.0, 3.0, -70.0]),
        is_fenced=st.booleans(),
        own=st.sets(st.tuples(WHICH, OWN)) | st.just(set()),
        loads=st.lists(LOADS, max_size=3),
    )
    def begin(
        self,
        policies: list[Policy],
        rules: LoadPolicy | None,
        attributes: list[tuple[str, ...]],
        skew_s: float,
        *,
        is_fenced: bool,
        own: set[tuple[int, tuple[str, int]]],
        loads: list[RequestLoad],
    ) -> None:
        if rules is not None:  # of all nodes, as mostly
            policies = [replace(policy, loads=rules) for policy in policies]
        skews_s = [number * skew_s for number in range(len(policies))]
        self.cluster = Cluster(policies, skews_s, attributes, is_fenced=is_fenced)
        self.own = sorted({version for _, version in own})
        for which, version in sorted(own):
            self.cluster.add_version(self.node(which), *version)
        for load in loads:
            self.somebody_loads_and_that_ends(load, "loaded", 3)

    def node(self, which: int) -> ClusterNode:
        return self.cluster.nodes[which % len(self.cluster.nodes)]

    def work(self, which: int, turns: int) -> None:
        self.cluster.work(self.node(which), turns)

    @rule(load=LOADS, which=WHICH, turns=TURNS)
    def somebody_loads(self, load: RequestLoad, which: int, turns: int) -> None:
        self.node(which).submit(load)
        self.work(which, turns)

    @rule(load=LOADS, outcome=OUTCOMES, times=st.integers(0, 3), approving=APPROVING)
    def somebody_loads_and_that_ends(
        self, load: RequestLoad, outcome: str, times: int, approving: Sequence[str] = ("bob", "carol")
    ) -> None:
        for number, by in enumerate(approving):
            self.node(number).approve(load.model_id, load.version, by)
        self.somebody_loads_and_that_begins(load)
        for _ in range(times):
            self.cluster.settle()
            self.cluster.progress(outcome)
            self.cluster.settle()

    @rule(load=LOADS)
    def somebody_loads_and_that_begins(self, load: RequestLoad) -> None:
        self.cluster.log.submit(self.cluster.nodes[0].with_rules(load), self.cluster.now)
        self.cluster.settle()

    @rule(
        does=st.sampled_from(["approve", "approve", "withdraw", "withdraw late", "add", "forge"]),
        load=LOADS,
        by=st.sampled_from(["alice", "bob", "bob", "carol"]),
        which=WHICH,
        turns=TURNS,
    )
    def somebody_approves_or_withdraws_or_adds_what_is_loaded(
        self, does: str, load: RequestLoad, by: str, which: int, turns: int
    ) -> None:
        node, version = self.node(which), (load.model_id, load.version)
        match does:
            case "approve":
                node.approve(*version, by)
            case "withdraw":
                node.submit(withdrawal_of(load.model_id, self.cluster.state))
            case "forge":
                self.cluster.forge_approval(node, *version, by)
            case "add":
                if version not in self.own:
                    node.add_version(*version, by)
            case _:
                self.come_first(node, load, "withdraw")
        node.submit(load)
        self.work(which, turns)

    @rule(version=OWN, which=WHICH, turns=TURNS)
    def files_change(self, version: tuple[str, int], which: int, turns: int) -> None:
        self.cluster.log.changes[version] ^= 1
        self.work(which, turns)

    @rule(
        kind=st.sampled_from(["unload", "force", "cancel"]),
        name=st.sampled_from(["a", "b", "c", None]),
        job=WHICH,
        which=WHICH,
        turns=TURNS,
    )
    def somebody_unloads_or_cancels(
        self, kind: str, name: str | None, job: int, which: int, turns: int
    ) -> None:
        unended = self.cluster.state.unended()
        if kind != "cancel":
            self.node(which).submit(RequestUnload(name, "alice", force=kind == "force"))
        elif unended:
            self.node(which).submit(RequestCancel(unended[job % len(unended)].id, "alice"))
        self.work(which, turns)

    @rule(load=LOADS, kind=KINDS, which=WHICH, turns=TURNS)
    def somebody_comes_first(self, load: RequestLoad, kind: str, which: int, turns: int) -> None:
        self.come_first(self.node(which), load, kind)
        self.work(which, turns)

    def come_first(self, node: ClusterNode, load: RequestLoad, kind: str) -> None:
        """Record a command on the model of what a node appends next, right before that."""

        def build_command(action: Action) -> Command:
            return request_of(kind, node.model_of(action), self.cluster.state, load)

        node.meanwhile.append(build_command)

    @rule(which=WHICH, others=st.booleans(), turns=st.integers(1, 3))
    def a_node_acts_on_an_old_state(self, which: int, turns: int, *, others: bool) -> None:
        node = self.node(which)
        for other in self.cluster.nodes if others else ():
            if other is not node:
                self.cluster.work(other, 100)
        self.cluster.work(node, turns, is_late=True)

    @rule()
    def all_nodes_work(self) -> None:
        self.cluster.settle()

    @rule(load=WHICH, outcome=OUTCOMES, keeps=st.sampled_from([50, 100, 130]), turns=TURNS)
    def a_load_ends(self, load: int, outcome: str, keeps: int, turns: int) -> None:
        loading = [(node, each) for node in self.cluster.nodes for each in node.loading() if node.is_up]
        if loading:
            node, process = loading[load % len(loading)]
            process.finish(outcome, keeps)
            self.cluster.work(node, turns)

    @rule(which=WHICH, load=WHICH, count=st.sampled_from([1, 1, 2]), turns=TURNS)
    def workers_die(self, which: int, load: int, count: int, turns: int) -> None:
        alive = [each for node in self.cluster.nodes for each in node.alive()]
        if alive:
            process = alive[load % len(alive)]
            process.die(WorkerExited(None, 9, ()), *process.left[:count])
        self.work(which, turns)

    @rule(which=WHICH, turns=TURNS)
    def what_was_killed_or_drained_is_gone(self, which: int, turns: int) -> None:
        self.node(which).end_all()
        self.work(which, turns)

    @rule(which=WHICH, turns=TURNS)
    def estimates_end_and_the_next_take_time(self, which: int, turns: int) -> None:
        self.node(which).finish_estimates()
        self.node(which).estimates_take_time = True
        self.work(which, turns)

    @rule(which=WHICH, fault=st.sampled_from(["lost", "unsure", "twice"]), turns=TURNS)
    def an_acknowledgement_is_lost_or_doubled(self, which: int, fault: str, turns: int) -> None:
        self.node(which).fault = fault
        self.work(which, turns)

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 11.0, 65.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.pass_time(seconds)

    @rule()
    def hints_are_shared(self) -> None:
        self.cluster.share_hints()

    @rule(which=WHICH, leaves=st.booleans())
    def a_node_leaves_or_crashes(self, which: int, *, leaves: bool) -> None:
        if leaves:
            self.cluster.leave(self.node(which))
        else:
            self.node(which).die()

    @rule(which=WHICH, rules=st.none() | RULES, turns=TURNS)
    def a_node_starts(self, which: int, rules: LoadPolicy | None, turns: int) -> None:
        self.cluster.start(self.node(which), rules)
        self.work(which, turns)

    @rule(which=WHICH, is_paused=st.booleans(), is_cut=st.booleans())
    def a_node_pauses_or_is_cut_off_or_is_back(self, which: int, *, is_paused: bool, is_cut: bool) -> None:
        self.node(which).is_paused, self.node(which).is_cut = is_paused, is_cut

    @rule(
        which=WHICH,
        how=st.sampled_from(["crashes", "pauses", "pauses", "is cut off"]),
        outcome=st.sampled_from(["loaded", "dies", "hangs", None]),
        load=LOADS | st.none(),
        others=TURNS,
        turns=st.integers(0, 3),
    )
    def a_node_is_lost(
        self, which: int, how: str, outcome: str | None, *, load: RequestLoad | None, others: int, turns: int
    ) -> None:
        """It may act on the state that it had, before it hears of that."""
        if load is not None:
            self.somebody_loads_and_that_begins(load)
        busy = [node for node in self.cluster.nodes if node.is_up and node.loading()]
        node = busy[which % len(busy)] if busy else self.node(which)
        if how == "crashes":
            node.die()
        node.is_paused, node.is_cut = how == "pauses", how == "is cut off"
        for process in node.loading() if outcome == "hangs" else ():
            process.hang(node.now)
        self.cluster.pass_time(LEASE_S + 1)
        self.cluster.work(node, turns)
        self.cluster.declare_lost(node.name)
        for other in self.cluster.nodes:
            if other is not node:
                self.cluster.work(other, others)
        if outcome in ("loaded", "dies"):
            node.progress(outcome)
        node.is_paused = node.is_cut = False
        self.cluster.work(node, turns, is_late=True)

    @rule(which=WHICH, turns=TURNS)
    def a_node_is_drained(self, which: int, turns: int) -> None:
        node = self.node(which)
        node.submit(DrainNode(node.name, "alice"))
        self.work(which, turns)

    @rule(which=WHICH, version=WHICH, is_added=st.booleans(), turns=TURNS)
    def a_version_is_added_or_removed(self, which: int, version: int, turns: int, *, is_added: bool) -> None:
        if self.own:
            change = self.cluster.add_version if is_added else self.cluster.remove_version
            change(self.node(which), *self.own[version % len(self.own)])
        self.work(which, turns)

    @rule()
    def all_is_calm_for_a_while(self) -> None:
        self.cluster.calm_down()

    @invariant()
    def each_thing_belongs_to_one_present_node(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check_now()

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.calm_down()


ClusterSimulation.TestCase.settings = settings(
    PLAIN, max_examples=of_both(short=60, long=3_000), stateful_step_count=40
)
TestClusterSimulation = ClusterSimulation.TestCase


class CarelessNode(ClusterNode):
    """A node that appends without the conditions of one kind."""

    without: type[Condition]

    def _send(self, command: SystemCommand, action: Action) -> bool:
        conditions = tuple(each for each in command.conditions if not isinstance(each, self.without))
        return super()._send(replace(command, conditions=conditions), action)


def small_cluster(without: type[Condition] | None = None) -> Cluster:
    """Return two nodes over a log that does not itself refuse ended epochs; the first may be careless."""
    cluster = Cluster([Policy(2)] * 2, [0.0] * 2, is_fenced=False)
    if without is not None:
        first = CarelessNode("a", cluster.log, Policy(2), skew_s=0.0, attributes=())
        first.without, cluster.nodes[0] = without, first
        first.join()
    for node in cluster.nodes:
        node.catch_up()
    return cluster


def place_after_being_lost(cluster: Cluster) -> None:
    """The placer stands still with an unplaced load that it has seen, and goes on after it was lost."""
    first = cluster.nodes[0]
    cluster.log.submit(RequestLoad("a", 1, CONTENTS, "alice"), cluster.now)
    first.catch_up()
    first.peers = {"a": NodeHints(99, free_models=0)}
    assert target_of(first) == "b"
    first.is_paused = True
    cluster.pass_time(LEASE_S + 1)
    cluster.declare_lost("a")
    first.is_paused = False
    cluster.work(first, 1, is_late=True)


def place_at_draining_node(cluster: Cluster) -> None:
    """A node begins to drain between the choice of it and the record of that."""
    first = cluster.nodes[0]
    cluster.log.submit(RequestLoad("a", 1, CONTENTS, "alice"), cluster.now)
    first.catch_up()
    first.meanwhile.append(lambda _: DrainNode(target_of(first), "alice"))
    cluster.work(first, 1)


def withdraw_before_start(cluster: Cluster) -> None:
    """An approval is withdrawn between the check of a load that rests on it and its start."""
    first, second = cluster.nodes
    cluster.leave(second)
    first.policy = replace(first.policy, loads=LoadPolicy(approval=(ApprovalRule(("a",)),)))
    first.join()
    first.approve("a", 1, "bob")
    first.submit(RequestLoad("a", 1, CONTENTS, "alice"))
    first.meanwhile.append(lambda _: withdrawal_of("a", cluster.state))
    cluster.work(first, 100)


def target_of(node: ClusterNode) -> str:
    """Return the node that a placer chooses next."""
    action = node.decision().action
    placement = action.before if isinstance(action, StartLoad) else action
    assert isinstance(placement, RecordFact)
    assert isinstance(placement.data, LoadPlaced)
    return placement.data.server


@pytest.mark.parametrize(
    ("happens", "condition"),
    [
        (place_after_being_lost, NodeCurrent),
        (place_at_draining_node, NodeUnchanged),
        (withdraw_before_start, ApprovedBytes),
    ],
)
def test_simulation_sees_facts_appended_without_a_condition(
    happens: Callable[[Cluster], None], condition: type[Condition]
) -> None:
    happens(small_cluster())
    careless = small_cluster(without=condition)
    with pytest.raises(AssertionError):
        happens(careless)


def test_lost_node_ends_its_workers_and_joins_anew() -> None:
    cluster = small_cluster()
    for name in ("a", "b", "c"):
        cluster.log.submit(RequestLoad(name, 1, CONTENTS, "alice"), cluster.now)
    cluster.settle()
    cluster.progress("loaded")
    cluster.settle()
    lost = next(node for node in cluster.nodes if node.live)
    kept = set(lost.live)
    lost.is_cut = True
    cluster.pass_time(LEASE_S + 1)
    cluster.work(lost, 100)
    assert not [process for process in lost.live.values() if process.killed]
    cluster.declare_lost(lost.name)
    cluster.settle()
    cluster.progress("loaded")
    cluster.settle()
    served = {model.serving.server for model in cluster.state.models.values() if model.serving is not None}
    assert served == {node.name for node in cluster.nodes if node is not lost}
    lost.is_cut = False
    cluster.work(lost, 1)
    assert {load for load, process in lost.live.items() if process.killed} == kept
    assert cluster.state.registers.nodes[lost.name].epoch == 2
    cluster.calm_down()


def test_stale_load_of_lost_node_is_not_recorded() -> None:
    cluster = small_cluster()
    first, second = cluster.nodes
    cluster.leave(second)
    cluster.log.submit(RequestLoad("a", 1, CONTENTS, "alice"), cluster.now)
    cluster.work(first, 100)
    (stale,) = first.live.values()
    stale.started = stale.loaded = True
    cluster.start(second)
    first.is_paused = True
    cluster.pass_time(LEASE_S + 1)
    cluster.declare_lost("a")
    cluster.leave(second)
    first.is_paused = False
    cluster.work(first, 100)
    assert stale.killed
    assert cluster.state.models["a"].phase is ModelState.UNLOADED
    first.end_all()
    cluster.work(first, 100)
    (again,) = first.live.values()
    assert again is not stale
    cluster.calm_down()
    started = [event.data for event in cluster.log.events if isinstance(event.data, LoadStarted)]
    assert [data.attempt for data in started] == [1, 2]


def test_drained_node_has_nothing_left() -> None:
    cluster = small_cluster()
    for name in ("a", "b", "c"):
        cluster.log.submit(RequestLoad(name, 1, CONTENTS, "alice"), cluster.now)
    cluster.settle()
    cluster.progress("loaded")
    cluster.settle()
    draining = next(node for node in cluster.nodes if node.live)
    cluster.log.submit(DrainNode(draining.name, "alice"), cluster.now)
    cluster.calm_down()
    assert draining.live == {}
    assert {model.phase for model in cluster.state.models.values()} == {ModelState.LOADED}
    causes = {event.data.cause for event in cluster.log.events if isinstance(event.data, UnloadRequested)}
    assert causes == {Cause.DRAIN}
