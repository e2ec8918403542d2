"""Which node runs a load: the choice among nodes, and the decisions of the placer and of a full node."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume
from hypothesis import given as given_any
from hypothesis import strategies as st
from msgspec import UNSET
from support.clusters import KnownSigning, KnownStanding
from support.decisions import describe, describe_next, estimate, processes
from support.history import CONTENTS, MODEL, PLAIN, History, at

from events.jobcommands import RequestLoad
from events.types import SYSTEM, Cause, PolicyInForce
from features.approvals.rules import ApprovalRule
from features.devices.found import Devices
from features.devices.placement import DeviceDemand, list_attributes
from features.devices.wire import FoundDevice
from features.nodes.facts import LoadPlaced
from features.nodes.register import Node, NodePhase, find_placer
from features.rules import LoadPolicy
from nodes.decisions import NodePlacement
from nodes.placement import (
    MAX_PLACEMENTS,
    NodeHints,
    NodeRoom,
    PlacementReason,
    PlacementRequest,
    place,
)
from nodes.spread import CopyFigures
from runtime.process.pool import WorkerPool
from runtime.rooms import MACHINE
from runtime.scheduler.actions import Decision, RequestReload, StartLoad, UnloadAutomatically
from runtime.scheduler.view import LoadView, Observations, Policy, SchedulerView
from server.config import NODE_ATTRIBUTE

F, ONE_FILE = frozenset({"f1", "f2"}), frozenset({"f1"})


def node(name: str, *, budget: int = 100, attributes: str = "", phase: str = "joined") -> Node:
    return Node(
        name, 1, NodePhase(phase), 1, at(0), f"http://{name}", tuple(attributes.split()), budget, "1", None
    )


def room(name: str, free: int | None = None, models: int = 0, **given: Any) -> NodeRoom:
    about = {key: given.pop(key) for key in ("budget", "attributes", "phase") if key in given}
    return NodeRoom(node(name, **about), NodeHints(0, free, **given), models)


def chosen(request: PlacementRequest, rooms: list[NodeRoom]) -> str:
    """Return the node and the reason, as tables write them."""
    found = place(request, rooms)
    return "none" if found is None else f"{found.node.id} {found.reason}"


ONE = PlacementRequest("m", 10, F)

SAME_PERCENT = [room("a", 10_000, budget=10_000, models=2), room("b", 9_960, budget=10_000, models=1)]

CASES = [
    ("no node", ONE, [], "none"),
    (
        "none takes loads",
        ONE,
        [room("a", 90, phase="draining"), room("b", 90, phase="lost")],
        "none",
    ),
    ("most free memory", ONE, [room("a", 20), room("b", 90), room("c", 80)], "b room"),
    ("no limit is the most", ONE, [room("a", 90), room("b", None)], "b room"),
    ("fewest models", ONE, [room("a", None, models=3), room("b", None, models=1)], "b room"),
    ("fewest models for the same percent", ONE, SAME_PERCENT, "b room"),
    ("files", ONE, [room("a", 90), room("b", 20, digests=F)], "b files"),
    ("some files do not count", ONE, [room("a", 90), room("b", 20, digests=ONE_FILE)], "a room"),
    ("room before files", ONE, [room("a", 20), room("b", 5, digests=F)], "a room"),
    (
        "a slot before files",
        ONE,
        [room("a", 20), room("b", 50, digests=F, free_models=0)],
        "a room",
    ),
    ("none has room", ONE, [room("a", 2), room("b", 5), room("c", -4, digests=F)], "c queue"),
    ("can never fit", ONE, [room("a", 5, budget=50), room("b", 9, budget=9)], "a queue"),
    ("fits nowhere ever", ONE, [room("a", 4, budget=5), room("b", 9, budget=9)], "b queue"),
    ("unknown need", PlacementRequest("m"), [room("a", 5), room("b", 9)], "b room"),
    ("home", PlacementRequest("m", 10, home="b"), [room("a", 90), room("b", 5)], "b serves"),
    (
        "home drains",
        PlacementRequest("m", 10, home="b"),
        [room("a", 90), room("b", 95, phase="draining")],
        "a room",
    ),
    (
        "home is too small",
        PlacementRequest("m", 10, home="b"),
        [room("a", 90), room("b", 5, budget=5)],
        "a room",
    ),
    (
        "attributes",
        PlacementRequest("m", attributes=frozenset({"gpu=a", "zone=x"})),
        [room("a", 90, attributes="gpu=a"), room("b", 9, attributes="gpu=a os=l zone=x")],
        "b room",
    ),
    (
        "device",
        PlacementRequest("m", demands=(DeviceDemand(("cuda:1", "rocm:*")),)),
        [room("a", 90, attributes="device=cuda device.cuda=0"), room("b", 9, attributes="device.rocm=0")],
        "b room",
    ),
    (
        "the device that it names first",
        PlacementRequest("m", demands=(DeviceDemand(("cuda:*", "rocm:0", "cpu")),)),
        [room("a", 90), room("b", 80, attributes="device.rocm=0"), room("c", 9, attributes="device.cuda=1")],
        "c room",
    ),
    (
        "room before the first device",
        PlacementRequest("m", 10, demands=(DeviceDemand(("cuda:0", "cpu")),)),
        [room("a", 90), room("b", 5, attributes="device.cuda=0")],
        "a room",
    ),
    (
        "no node has the device",
        PlacementRequest("m", demands=(DeviceDemand(("cuda:0",)),)),
        [room("a", 90, attributes="device=cuda device.cuda=1 cuda=0")],
        "none",
    ),
    (
        "own repositories",
        PlacementRequest("m", 10, home="c", holders=("a", "b")),
        [room("a", 20), room("b", 30), room("c", 90)],
        "b room",
    ),
    (
        "own repository of a node without room",
        PlacementRequest("m", 10, holders=("a",)),
        [room("a", 5, budget=9), room("b", 90)],
        "a queue",
    ),
    (
        "own repositories of nodes that take no loads",
        PlacementRequest("m", 10, holders=("a", "z")),
        [room("a", 90, phase="draining"), room("b", 90)],
        "none",
    ),
    (
        "no node has the attributes",
        PlacementRequest("m", attributes=frozenset({"gpu=a"}), home="a"),
        [room("a", 90)],
        "none",
    ),
]


@pytest.mark.parametrize(
    ("request_", "rooms", "expected"),
    [pytest.param(*case[1:], id=f"{case[0]}, {case[3]}") for case in CASES],
)
def test_place_chooses_node(request_: PlacementRequest, rooms: list[NodeRoom], expected: str) -> None:
    assert chosen(request_, rooms) == expected


NAMES = st.sampled_from(["a", "b", "c", "d"])
DIGESTS = st.frozensets(st.sampled_from(["f1", "f2", "f3"]))
ROOMS = st.lists(
    st.builds(
        lambda name, phase, attributes, budget, free, slots, models, digests: NodeRoom(
            node(name, budget=budget, attributes=attributes, phase=phase),
            NodeHints(0, free, slots, digests),
            models,
        ),
        NAMES,
        st.sampled_from(["joined", "joined", "joined", "draining", "left", "lost"]),
        st.sampled_from(["", "gpu=a", "gpu=a zone=x"]),
        st.none() | st.integers(0, 100),
        st.none() | st.integers(-50, 100),
        st.none() | st.integers(-1, 2),
        st.integers(0, 3),
        DIGESTS,
    ),
    unique_by=lambda room: room.node.id,
)
REQUESTS = st.builds(
    PlacementRequest,
    st.sampled_from(["m", "n", "o"]),
    st.none() | st.integers(0, 100),
    DIGESTS,
    st.frozensets(st.sampled_from(["gpu=a", "zone=x"]), max_size=1),
    st.none() | NAMES,
    st.just(()) | st.lists(NAMES, max_size=2, unique=True).map(tuple),
)


def is_able(request: PlacementRequest, each: NodeRoom) -> bool:
    has_version = not request.holders or each.node.id in request.holders
    return each.node.takes_loads and has_version and request.attributes <= set(each.node.attributes)


@PLAIN
@given_any(REQUESTS, ROOMS, st.randoms())
def test_place_finds_able_node_in_any_order(
    request: PlacementRequest, rooms: list[NodeRoom], dice: Any
) -> None:
    found = place(request, rooms)
    able = [each for each in rooms if is_able(request, each)]
    assert (found is None) == (not able)
    assert found is None or found.node in [each.node for each in able]
    dice.shuffle(rooms)
    assert place(request, rooms) == found


@PLAIN
@given_any(REQUESTS, ROOMS)
def test_place_passes_no_better_node(request: PlacementRequest, rooms: list[NodeRoom]) -> None:
    found = place(request, rooms)
    assume(found is not None and found.reason is not PlacementReason.SERVES)
    assert found is not None
    mine = next(each for each in rooms if each.node == found.node)
    for each in rooms:
        if is_able(request, each) and each.can_ever_fit(request.need_bytes):
            assert mine.can_ever_fit(request.need_bytes)
            assert mine.fits(request.need_bytes) or not each.fits(request.need_bytes)
            assert each.node.id != request.home


@PLAIN
@given_any(REQUESTS, ROOMS, st.integers(0, 3))
def test_end_of_another_node_moves_no_placement(
    request: PlacementRequest, rooms: list[NodeRoom], which: int
) -> None:
    found = place(request, rooms)
    assume(found is not None and len(rooms) > 1)
    assert found is not None
    gone = [each for each in rooms if each.node != found.node][which % (len(rooms) - 1)]
    left = place(request, [each for each in rooms if each is not gone])
    assert left is not None
    assert left.node == found.node


def attributes_of(*devices: str) -> Iterable[str]:
    """Return the attributes of a node with these devices."""
    pool = WorkerPool()
    pool.targets = Devices({name: FoundDevice(name, "1") for name in devices})
    return list_attributes(pool)


def test_attributes_of_devices_name_providers_and_each_device() -> None:
    attributes = tuple(sorted(attributes_of("openvino:cpu.1", "cuda:1", "cuda:0")))
    assert attributes == (
        *("device.cuda=0", "device.cuda=1", "device.openvino=cpu.1"),
        *("device=cuda", "device=openvino"),
    )
    assert all(map(NODE_ATTRIBUTE.fullmatch, attributes))
    devices = ("openvino:cpu.1", "cuda:*", "openvino:*", "cpu", "openvino:cpu", "rocm:*")
    assert [name for name in devices if DeviceDemand((name,)).is_met(attributes)] == list(devices[:4])


def test_equal_nodes_share_models() -> None:
    rooms = [room(name) for name in ("a", "b", "c")]
    found = [chosen(PlacementRequest(f"m{number}"), rooms) for number in range(60)]
    assert {each: found.count(each) > 10 for each in found} == dict.fromkeys(
        ("a room", "b room", "c room"), True
    )


# Decisions of nodes


class Cluster:
    """Nodes `a` and `b` with budgets of 100 bytes; loads are estimated at 40."""

    def __init__(self, budget_bytes: int = 100) -> None:
        self.history = History()
        self.hints = dict[str, NodeHints]()
        self.estimates: dict[str, int | None] = {}
        self.estimating: Collection[str] = ()
        for name in ("a", "b"):
            self.history.join(name, budget_bytes=budget_bytes)

    def decide(
        self, name: str, running: str | dict[str, LoadView] = "", *, epoch: int | None = None, **policy: Any
    ) -> Decision:
        given: dict[str, Any] = {"loads_at_once": 2, "budget_bytes": 100, **policy}
        standing = KnownStanding(epoch or self.history.state.registers.nodes[name].epoch, self.hints)
        estimates = self.estimates.items()
        seen = Observations(
            estimates={load: None if needs is None else estimate(needs) for load, needs in estimates},
            estimating=self.estimating,
        )
        now = at(self.history.seconds)
        live = processes(running) if isinstance(running, str) else running
        view = SchedulerView(self.history.state, live, Policy(**given), now, seen)
        return NodePlacement(name, standing, KnownSigning(name)).decide(view)

    def set_policy(self, name: str, policy: LoadPolicy) -> None:
        """The node starts with a policy."""
        self.history.join(name, budget_bytes=100)
        self.history.add(PolicyInForce(policy, server=name), of=None, version=None)

    def next(self, name: str, running: str = "", **policy: Any) -> str:
        return describe_next(self.decide(name, running, **policy))


def test_placer_alone_places_load() -> None:
    cluster = Cluster()
    cluster.history.ask_load("L")
    cluster.hints["b"] = NodeHints(9, 100)
    cluster.hints["a"] = NodeHints(9, 20)
    assert cluster.next("b") == "nothing"
    assert cluster.next("a") == "place L at b: room"
    cluster.history.place("L", "b")
    assert cluster.next("a") == "nothing"
    assert cluster.next("b") == "estimate L"
    cluster.estimates["L"] = 40
    assert cluster.next("b") == "start L"
    assert cluster.decide("b", epoch=2) == Decision()


def test_loads_placed_since_hint_take_room() -> None:
    cluster = Cluster()
    cluster.hints = {"a": NodeHints(0, 60), "b": NodeHints(0, 70)}
    for number in range(3):
        cluster.history.ask_load(f"L{number}", of=f"m{number}")
        cluster.estimates[f"L{number}"] = 40
    places = []
    for number in range(3):
        places.append(cluster.next("a").removesuffix(", and start it"))
        cluster.history.place(f"L{number}", places[-1].split()[3].rstrip(":"), of=f"m{number}")
    assert places == ["place L0 at b: room", "place L1 at a: room", "place L2 at b: queue"]


def test_placer_starts_load_that_it_places_at_itself() -> None:
    cluster = Cluster()
    cluster.hints = {"a": NodeHints(9, 100), "b": NodeHints(9, 20)}
    cluster.history.ask_load("L")
    assert cluster.next("a") == "estimate L"
    cluster.estimates["L"] = None
    assert cluster.next("a") == "place L at a: room"  # since its files are slow to read
    cluster.estimating = {"L"}
    assert cluster.decide("a").waiting_for == {"L": "the estimate of its memory"}
    cluster.history.ask_load("O", of="other")
    cluster.hints["b"] = NodeHints(9, 100)
    cluster.estimates = {"L": None, "O": 90}
    assert cluster.next("a") == "place O at b: room"  # meanwhile
    cluster.history.place("O", "b", of="other")
    cluster.estimates["L"], cluster.estimating = 40, ()
    assert cluster.next("a") == "place L at a: room, and start it"
    assert cluster.next("a", "O:loading", loads_at_once=1) == "place L at a: room"
    cluster.history.place("L", "a")
    assert cluster.next("a") == "start L"


def test_node_that_has_said_nothing_has_its_budget() -> None:
    cluster = Cluster()
    cluster.hints = {"a": NodeHints(0), "b": NodeHints(9, 100)}  # its first renewal, before it knows more
    cluster.history.ask_load("L", of="m0")
    cluster.history.place("L", "a", of="m0")
    cluster.estimates["L"] = 40
    cluster.history.ask_load("L1", of="m1")
    assert cluster.next("a") == "place L1 at b: room"


def test_load_waits_for_node_with_its_attributes() -> None:
    cluster = Cluster()
    cluster.history.ask_load("L", timeout_s=10, node_attributes=("gpu=a", "zone=x"))
    decision = cluster.decide("a")
    assert decision.waiting_for == {"L": "a node that takes loads and has the attributes gpu=a, zone=x"}
    assert decision.wake_at == at(13)
    cluster.history.join("c", attributes=("gpu=a", "os=l", "zone=x"))
    assert cluster.next("a") == "place L at c: room"
    cluster.history.leave("c")
    cluster.history.seconds = 13
    assert cluster.next("a") == "fail L: timeout"


def test_load_waits_for_node_with_its_device() -> None:
    cluster = Cluster()
    cluster.history.ask_load("L", timeout_s=10, devices=("cuda:*", "rocm:0"))
    reason = "a node that takes loads and has one of the devices cuda:*, rocm:0"
    assert cluster.decide("a").waiting_for == {"L": reason}
    cluster.history.join("c", attributes=sorted(attributes_of("cuda:1")))
    assert cluster.next("a") == "place L at c: room"


ONE_APPROVAL, TWO_APPROVALS = (LoadPolicy(approval=(ApprovalRule((MODEL,), each),)) for each in (1, 2))


def digest_of_rules(policy: LoadPolicy) -> str:
    rules = policy.of(MODEL)
    assert rules is not None
    return rules.digest


def test_load_waits_for_node_with_its_rules() -> None:
    cluster = Cluster()
    history, digest = cluster.history, digest_of_rules(ONE_APPROVAL)
    history.ask_load("L", timeout_s=100, policy=digest)
    where = "a node with the rules by which it was accepted"
    assert cluster.decide("a").waiting_for == {"L": f"policy_differs: {where}, {digest}"}
    cluster.set_policy("b", ONE_APPROVAL)
    assert cluster.next("a") == "place L at b: room"
    history.place("L", "b")
    cluster.set_policy("b", ONE_APPROVAL)
    assert cluster.next("a") == "place L at b: room"  # anew
    history.ask_load("O", of="other")
    history.place("O", "b", of="other")
    assert cluster.next("b") == "estimate O"


def test_load_leaves_node_that_has_other_rules_since() -> None:
    cluster = Cluster()
    cluster.history.ask_load("L")
    cluster.history.place("L", "b")
    cluster.history.add(PolicyInForce(ONE_APPROVAL, server="b"), of=None, version=None)
    assert cluster.next("b") == "place L at a: room"
    cluster.history.drain("a")
    where = "a node with the rules by which it was accepted, none"
    assert cluster.decide("b").waiting_for == {"L": f"policy_differs: {where}"}


def test_reload_by_rules_of_no_node_fails() -> None:
    cluster = Cluster()
    cluster.history.load_at("b", "L")
    for name in ("b", "a"):
        cluster.history.leave(name)
    cluster.set_policy("a", TWO_APPROVALS)
    cluster.history.ask_load("R", cause=Cause.RESTART, policy=digest_of_rules(ONE_APPROVAL))
    assert cluster.next("a") == "fail R: policy_differs"
    cluster.history.fail_load("R", "policy_differs")
    cluster.history.seconds += 60
    assert cluster.next("a") == f"reload {MODEL}, restart"


@pytest.mark.parametrize(
    ("a", "b", "attributes", "policy"),
    [
        (ONE_APPROVAL, LoadPolicy(), (), ONE_APPROVAL),
        (ONE_APPROVAL, TWO_APPROVALS, ("gpu=a",), TWO_APPROVALS),
        (ONE_APPROVAL, LoadPolicy(), ("gpu=a",), None),
        (ONE_APPROVAL, TWO_APPROVALS, ("gpu=none",), ONE_APPROVAL),
    ],
)
def test_reload_is_requested_by_rules_that_node_has(
    a: LoadPolicy, b: LoadPolicy, attributes: tuple[str, ...], policy: LoadPolicy | None
) -> None:
    history = History()
    for name, rules, own in (("a", a, ()), ("b", b, ("gpu=a",))):
        history.join(name, attributes=own)
        history.add(PolicyInForce(rules, server=name), of=None, version=None)
    history.load_at("b", "L", node_attributes=attributes)
    reload = RequestLoad(MODEL, 1, None, SYSTEM, cause=Cause.RECOVERY)
    placement = NodePlacement("a", KnownStanding(1), KnownSigning("a"))
    digest = UNSET if policy is None else digest_of_rules(policy)
    assert placement.complete(reload, history.state).policy == digest


def test_model_with_attributes_moves_to_node_with_them() -> None:
    cluster = Cluster()
    history = cluster.history
    history.join("c", attributes=("gpu=a",))
    history.load_at("c", "L", node_attributes=("gpu=a",))
    history.drain("c")
    assert cluster.next("c", "L:serving") == "nothing"
    history.join("b", attributes=("gpu=a",))
    assert cluster.next("c", "L:serving") == f"move {MODEL}"
    history.lose("c")
    history.ask_load("R", cause=Cause.RESTART, node_attributes=("gpu=a",))
    assert cluster.next("a") == "place R at b: room"


def test_load_with_attributes_leaves_node_without_them() -> None:
    cluster = Cluster()
    cluster.history.load_at("b", "L")
    cluster.history.join("c", attributes=("gpu=a",))
    cluster.history.ask_load("L2", node_attributes=("gpu=a",))
    assert cluster.next("a") == "place L2 at c: room"
    cluster.history.place("L2", "c")
    cluster.estimates["L2"] = 60
    assert cluster.next("c", budget_bytes=50) == "fail L2: insufficient_memory"  # it would fit at `a`


def test_load_waits_for_node_where_version_was_added() -> None:
    cluster = Cluster()
    history = cluster.history
    history.join("c", attributes=("gpu=a",), budget_bytes=50)
    for name in ("c", "b"):
        history.add_version(name)
    cluster.hints = {"b": NodeHints(99, 0), "c": NodeHints(99, 0)}
    history.ask_load("L")
    assert cluster.next("a") == "place L at c: room"
    history.drain("c")
    assert cluster.next("a") == "place L at b: room"
    history.leave("b")
    where = "of b, c, where version 1 was added"
    assert cluster.decide("a").waiting_for == {"L": f"a node that takes loads, {where}"}
    history.ask_load("L2", of="other", node_attributes=("gpu=a",))
    history.add_version("b", of="other")
    attributes = "and has the attributes gpu=a, of b, where version 1 was added"
    assert cluster.decide("a").waiting_for["L2"] == f"a node that takes loads {attributes}"
    history.add_version("a")
    assert cluster.next("a") == "estimate L"


def test_lost_model_waits_for_node_where_version_was_added() -> None:
    cluster = Cluster()
    history = cluster.history
    history.add_version("b")
    history.load_at("b", "L")
    history.lose("b")
    assert cluster.next("a") == f"reload {MODEL}, restart"
    history.ask_load("R", cause=Cause.RESTART)
    assert cluster.next("a") == "nothing"
    assert cluster.decide("a").waiting_for == {
        "R": "a node that takes loads, of b, where version 1 was added"
    }
    history.join("b", budget_bytes=5_000)
    assert cluster.next("a") == "place R at b: room"


def test_model_moves_to_nodes_where_its_version_was_added() -> None:
    cluster = Cluster()
    history = cluster.history
    history.add_version("b")
    history.load_at("b", "L")
    history.drain("b")
    for name in ("c", "d"):
        history.join(name)
    assert cluster.next("b", "L:serving") == "nothing"
    history.add_version("c")
    assert cluster.next("b", "L:serving") == f"move {MODEL}"
    history.ask_load("M", cause=Cause.DRAIN)
    assert cluster.next("a") == "place M at c: room"


def test_load_without_room_goes_to_another_node_with_its_version() -> None:
    cluster = Cluster()
    history = cluster.history
    history.add_version("b")
    history.ask_load("L")
    history.place("L", "b")
    cluster.estimates["L"] = 101
    history.join("c", budget_bytes=200)
    assert cluster.next("b") == "fail L: insufficient_memory"
    history.add_version("c")
    assert cluster.next("b") == "place L at c: room"


def test_next_load_goes_where_model_is_loaded() -> None:
    cluster = Cluster()
    cluster.hints["a"] = NodeHints(9, 100)
    cluster.history.load_at("b", "L")
    cluster.history.ask_load("L2", version=2)
    cluster.history.ask_load("L3", version=3)
    assert cluster.next("a") == "place L2 at b: serves"
    cluster.history.drain("b")
    assert cluster.next("a") == "estimate L2"
    cluster.estimates["L2"] = 40
    assert cluster.next("a") == "place L2 at a: room, and start it"


def test_lost_models_are_reloaded_by_placer() -> None:
    cluster = Cluster()
    cluster.history.load_at("b", "L")
    cluster.history.lose("b")
    assert cluster.next("a") == f"reload {MODEL}, restart"
    cluster.history.ask_load("R", cause=Cause.RESTART)
    cluster.estimates["R"] = 40
    action = cluster.decide("a").action
    assert isinstance(action, StartLoad)
    assert action.before is not None
    assert isinstance(action.before.data, LoadPlaced)
    assert [(file.path, file.sha256) for file in action.before.data.files] == list(CONTENTS)


def test_load_without_room_goes_where_it_fits() -> None:
    cluster = Cluster()
    cluster.history.load_at("b", "O", of="other")
    cluster.history.ask_load("L")
    cluster.history.place("L", "b")
    cluster.estimates["L"] = 101
    assert cluster.next("b", "O:serving") == "fail L: insufficient_memory"
    cluster.history.join("c", budget_bytes=200)
    cluster.hints["c"] = NodeHints(99, 0)
    assert cluster.next("b", "O:serving") == "place L at c: queue"
    cluster.estimates["L"] = 100
    cluster.hints["c"] = NodeHints(99, 99)
    cluster.hints["a"] = NodeHints(99, 100)
    assert cluster.next("b", "O:serving", max_loaded=1) == "place L at a: room"
    cluster.hints["a"] = NodeHints(99, 100, free_models=0)
    assert cluster.next("b", "O:serving", max_loaded=1) == "nothing"


def test_load_is_placed_a_few_times_only() -> None:
    cluster = Cluster()
    cluster.hints = {"a": NodeHints(99, 100), "b": NodeHints(99, 100)}
    cluster.history.ask_load("L")
    for number in range(MAX_PLACEMENTS):
        cluster.history.place("L", "ab"[number % 2])
    cluster.estimates["L"] = 50
    assert cluster.next("b", "O:serving", max_loaded=1) == "nothing"
    assert cluster.next("b", max_loaded=1) == "start L"


def test_reload_without_room_waits_for_nodes() -> None:
    cluster = Cluster()
    cluster.history.load_at("b", "L")
    cluster.history.lose("b")
    cluster.history.ask_load("R", cause=Cause.RESTART)
    cluster.history.place("R", "a")
    cluster.estimates["R"] = 50
    decision = cluster.decide("a", "O:serving", max_loaded=1)
    assert (decision.action, list(decision.waiting_for)) == (None, ["R"])


def test_draining_node_moves_its_models() -> None:
    cluster = Cluster()
    history = cluster.history
    history.load_at("b", "L")
    assert cluster.next("b", "L:serving") == "nothing"
    history.drain("b")
    assert cluster.next("b", "L:serving") == "nothing"  # it took more than the budget of `a`
    history.join("c")
    assert cluster.next("b", "L:serving") == f"move {MODEL}"
    history.ask_load("M", cause=Cause.DRAIN)
    assert cluster.next("b", "L:serving") == "nothing"
    cluster.estimates["M"] = 40
    assert cluster.next("a") == "place M at c: room"
    history.start_at("c", "M")
    history.fail_load("M", "invalid_model")
    assert cluster.decide("b", "L:serving").wake_at == at(history.seconds + 1)
    history.seconds += 1
    assert cluster.next("b", "L:serving") == f"move {MODEL}"


def test_waiting_load_leaves_draining_node() -> None:
    cluster = Cluster()
    cluster.history.ask_load("L")
    cluster.history.place("L", "b")
    cluster.history.drain("b")
    assert cluster.next("b") == "place L at a: room"
    cluster.history.leave("a")
    assert cluster.next("b") == "estimate L"


def test_last_node_keeps_its_models_while_it_drains() -> None:
    cluster = Cluster()
    cluster.history.load_at("b", "L")
    cluster.history.drain("b")
    cluster.history.leave("a")
    assert cluster.next("b", "L:serving") == "nothing"


def test_moved_load_is_unloaded_at_its_old_node() -> None:
    cluster = Cluster()
    history = cluster.history
    history.load_at("b", "L")
    history.load_at("a", "M", cause=Cause.DRAIN)
    history.ask_unload("U", "L", cause=Cause.DRAIN, node_id="b")
    assert cluster.next("a", "M:serving") == "nothing"
    assert cluster.next("b", "L:serving") == "start U of L"
    history.start_unload("U")
    assert cluster.next("b", "L:draining") == "nothing"
    assert cluster.next("b", "L:gone") == "finish U of L"
    history.lose("b")
    assert cluster.next("a", "M:serving") == "start U of L"


def test_work_of_ended_epoch_is_left_alone() -> None:
    cluster = Cluster()
    cluster.history.ask_load("L")
    cluster.history.start_at("b", "L")
    cluster.history.lose("b")
    assert cluster.decide("b", "L:loading") == Decision()
    cluster.history.join("b")
    cluster.history.place("L", "b")
    cluster.estimates["L"] = 40
    assert cluster.next("b", "L:loading!") == "nothing"
    assert cluster.next("b", "L:serving!") == "nothing"
    assert cluster.next("b") == "start L"


def test_force_at_one_node_cancels_loads_at_another() -> None:
    cluster = Cluster()
    history = cluster.history
    history.load_at("b", "L")
    history.ask_load("M", cause=Cause.DRAIN)
    history.start_at("a", "M")
    history.ask_unload("F", "L", force=True, node_id="b")
    assert cluster.next("a", "M:loading") == "nothing"
    assert cluster.next("b", "L:serving") == "cancel M"


def test_unneeded_demand_is_left_to_its_timeout() -> None:
    cluster = Cluster()
    cluster.history.ask_load("D", cause=Cause.DEMAND)
    cluster.history.place("D", "b")
    cluster.estimates["D"] = 1
    assert cluster.next("b") == "start D"


# Copies: two are wanted of a model, whose first copy L is at `b`.


def copied(*steps: str, copies: int = 2) -> Cluster:
    """Return nodes `a` to `c` after a load of copies and these steps, each `<verb> <what>`."""
    cluster = Cluster(budget_bytes=10**9)
    history = cluster.history
    history.join("c", budget_bytes=10**9)
    history.load_at("b", "L", copies=copies)
    for step in steps:
        match step.split():
            case ["copy", node]:
                history.load_at(node, f"C{node}", cause=Cause.COPY, copies=copies)
            case ["swap", node]:
                history.load_at(node, "S", version=2, copies=copies)
            case ["drain", node]:
                history.drain(node)
            case ["lose", node]:
                history.lose(node)
            case ["kill", load]:
                history.kill_worker(f"w-{load}")
            case ["fill", node]:
                cluster.hints[node] = NodeHints(99, free_bytes=1)
            case ["wait", node]:
                history.ask_load(f"O{node}", of=f"other-{node}")
                history.place(f"O{node}", node, of=f"other-{node}")
            case ["fail", code]:
                history.ask_load("F", cause=Cause.COPY, version=history.model().version or 1, copies=copies)
                history.fail_load("F", code)
            case _:
                pytest.fail(step)
        history.seconds += 60
    return cluster


RELOAD, NOTHING = f"reload {MODEL}, copy", "nothing"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], RELOAD),
        (["copy a"], NOTHING),
        (["copy a", "copy c"], "end Cc"),
        (["copy a", "lose b"], RELOAD),
        (["copy a", "lose a"], RELOAD),
        (["copy a", "kill L"], RELOAD),
        (["copy c", "drain b"], RELOAD),
        (["copy c", "drain b", "copy a"], "end L"),
        (["copy c", "drain b", "drain a"], "end L"),
        (["drain b", "drain a", "drain c"], NOTHING),
        (["fill a", "fill c"], NOTHING),
        (["wait a", "wait c"], NOTHING),
        (["copy c", "swap b"], RELOAD),
        (["copy c", "swap b", "fail timeout"], "end Cc"),
        (["copy c", "swap a"], RELOAD),
        (["fail timeout"], RELOAD),
        (["fail broken"] * 6, RELOAD),
        (["copy c", "swap b", "drain b", "fail timeout"], RELOAD),
        (["copy c", "swap b", "wait c", "fill a"], NOTHING),
        (["copy c", "swap b", "lose b"], RELOAD),
        (["copy c", "swap b", "lose b", "copy a"], RELOAD),
    ],
)
def test_placer_keeps_copies(steps: list[str], expected: str) -> None:
    cluster = copied(*steps)
    placer = find_placer(cluster.history.state.registers.nodes) or ""
    action = cluster.decide(placer).action
    match action:
        case UnloadAutomatically(loaded, Cause.COPY):
            assert expected == f"end {loaded.serving.load_job_id}"
        case _:
            assert describe(action) == expected
    other = cluster.decide("c" if placer == "a" else "a").action
    assert not isinstance(other, RequestReload | UnloadAutomatically)


def test_copy_goes_to_node_without_one_or_with_older_version() -> None:
    cluster = copied("copy c", "swap b")
    cluster.history.ask_load("C2", cause=Cause.COPY, version=2, copies=2)
    cluster.hints = {name: NodeHints(99, 10**9 if name == "a" else 10**8) for name in "abc"}
    assert cluster.next("a") == "place C2 at c: serves"
    cluster.history.drain("c")
    assert cluster.next("a") == "estimate C2"  # its place is here


def test_swap_goes_on_when_its_only_copy_is_lost() -> None:
    cluster = copied("copy c", "swap b", "lose b")
    history = cluster.history
    assert history.model().version == 1
    action = cluster.decide("a").action
    assert isinstance(action, RequestReload)
    assert action.model.serving.version == 2
    history.load_at("a", "C2", version=2, cause=Cause.COPY, copies=2)
    assert [each.load_job_id for each in history.model().servings] == ["C2", "Cc"]
    assert history.model().target is UNSET
    history.load_at("c", "C3", version=2, cause=Cause.COPY, copies=2)
    assert cluster.next("a") == "nothing"


def test_pending_copy_gives_way_to_reload() -> None:
    cluster = copied()
    cluster.history.ask_load("C", cause=Cause.COPY, copies=2)
    cluster.history.kill_worker("w-L")
    assert cluster.next("a") == "cancel C"
    cluster.history.end_cancelled("C")
    cluster.history.seconds += 60
    assert cluster.next("b") == f"reload {MODEL}, recovery"


def test_drained_node_moves_no_model_with_copies() -> None:
    assert copied("copy c", "drain b").next("b", "L:serving") == "nothing"


def test_eviction_ends_one_copy() -> None:
    cluster = copied("copy a", "wait a", "fill b", "fill c")
    cluster.estimates["Oa"] = 90
    (run,) = processes("Ca:serving").values()
    decision = cluster.decide("a", {"Ca": replace(run, taken={MACHINE: 40})}, evicts=True)
    assert isinstance(decision.action, UnloadAutomatically)
    assert (decision.action.cause, decision.action.cause_event_id) == (Cause.COPY, "Oa")
    assert decision.action.model.serving.load_job_id == "Ca"


@pytest.mark.parametrize(
    ("idle_s", "expected"), [(0, "nothing"), (30, "nothing"), (90, f"unload {MODEL}, idle")]
)
def test_copied_model_is_idle_when_all_its_copies_are(idle_s: int, expected: str) -> None:
    cluster = Cluster(budget_bytes=10**9)
    for node, load, cause in (("a", "A", Cause.REQUEST), ("b", "B", Cause.COPY)):
        cluster.history.load_at(node, load, cause=cause, copies=2, keep_alive_s=60)
    cluster.history.seconds += 90
    cluster.hints["b"] = NodeHints(9, 10**9, loads={MODEL: CopyFigures(idle_s=idle_s)})
    assert cluster.next("a", "A:serving") == expected
    assert cluster.next("b", "B:serving") == "nothing"
