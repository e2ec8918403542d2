"""Which node runs a load: the choice among nodes, and the decisions of the placer and of a full node."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st
from msgspec import UNSET
from support.clusters import KnownSigning, KnownStanding
from support.decisions import Scene, describe, processes, read_table
from support.history import CONTENTS, MODEL, PLAIN, at

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
from nodes.placement import NodeHints, NodeRoom, PlacementReason, PlacementRequest, place
from nodes.spread import CopyFigures
from runtime.process.pool import WorkerPool
from runtime.rooms import MACHINE
from runtime.scheduler.actions import Decision, RequestReload, StartLoad, UnloadAutomatically
from runtime.scheduler.view import Policy, SchedulerView
from server.config import NODE_ATTRIBUTE

FILES = frozenset({"f1", "f2"})


def node(
    name: str, *, budget: int | None = 100, attributes: Iterable[str] = (), phase: str = "joined"
) -> Node:
    return Node(name, 1, NodePhase(phase), 1, at(0), f"http://{name}", tuple(attributes), budget, "1", None)


def read_words(text: str) -> tuple[list[str], dict[str, Any]]:
    """Return the words without `=`, and the options: several values are separated by commas."""
    plain = [word for word in text.split() if "=" not in word]
    options = (word.partition("=") for word in text.split() if "=" in word)
    return plain, {name: value.split(",") for name, _, value in options}


def read_request(text: str) -> PlacementRequest:
    """Read the bytes that a load of `m` needs, and what else it asks; it has the files f1 and f2."""
    plain, options = read_words(text)
    return PlacementRequest(
        "m",
        int(plain[0]) if plain else None,
        FILES,
        frozenset(options.get("attributes", ())),
        "".join(options.get("home", ())) or None,
        tuple(options.get("holders", ())),
        demands=(DeviceDemand(tuple(options["devices"])),) if "devices" in options else (),
    )


def read_room(text: str) -> NodeRoom:
    """Read a node, its free bytes, and what else is known of it."""
    (name, free), options = read_words(text)
    one = {key: int(options[key][0]) for key in ("budget", "slots", "models") if key in options}
    about = node(
        name,
        budget=one.get("budget", 100),
        attributes=options.get("attributes", ()),
        phase="".join(options.get("phase", ["joined"])),
    )
    hints = NodeHints(
        0,
        None if free == "unlimited" else int(free),
        one.get("slots"),
        frozenset(options.get("files", ())),
    )
    return NodeRoom(about, hints, one.get("models", 0))


def chosen(request: PlacementRequest, rooms: Iterable[NodeRoom]) -> str:
    """Return the node and the reason, as tables write them."""
    found = place(request, rooms)
    return "none" if found is None else f"{found.node.id} {found.reason}"


PLACES = """
no node | 10 | - | none
none takes loads | 10 | a 90 phase=draining; b 90 phase=lost | none
most free memory | 10 | a 20; b 90; c 80 | b room
no limit is the most | 10 | a 90; b unlimited | b room
fewest models | 10 | a unlimited models=3; b unlimited models=1 | b room
fewest models for the same percent | 10 | a 10000 budget=10000 models=2; b 9960 budget=10000 models=1 | b room
files | 10 | a 90; b 20 files=f1,f2 | b files
some files do not count | 10 | a 90; b 20 files=f1 | a room
room before files | 10 | a 20; b 5 files=f1,f2 | a room
a slot before files | 10 | a 20; b 50 files=f1,f2 slots=0 | a room
none has room | 10 | a 2; b 5; c -4 files=f1,f2 | c queue
can never fit | 10 | a 5 budget=50; b 9 budget=9 | a queue
fits exactly | 10 | a 9 budget=9; b 10 budget=10 | b room
fits nowhere ever | 10 | a 4 budget=5; b 9 budget=9 | b queue
unknown need | - | a 5; b 9 | b room
home | 10 home=b | a 90; b 5 | b serves
home drains | 10 home=b | a 90; b 95 phase=draining | a room
home is too small | 10 home=b | a 90; b 5 budget=5 | a room
attributes | - attributes=gpu=a,zone=x | a 90 attributes=gpu=a; b 9 attributes=gpu=a,os=l,zone=x | b room
no node has the attributes | - attributes=gpu=a home=a | a 90 | none
device | - devices=cuda:1,rocm:*
  | a 90 attributes=device=cuda,device.cuda=0; b 9 attributes=device.rocm=0 | b room
the device that it names first | - devices=cuda:*,rocm:0,cpu
  | a 90; b 80 attributes=device.rocm=0; c 9 attributes=device.cuda=1 | c room
room before the first device | 10 devices=cuda:0,cpu | a 90; b 5 attributes=device.cuda=0 | a room
no node has the device | - devices=cuda:0 | a 90 attributes=device=cuda,device.cuda=1,cuda=0 | none
own repositories | 10 home=c holders=a,b | a 20; b 30; c 90 | b room
own repository of a node without room | 10 holders=a | a 5 budget=9; b 90 | a queue
own repositories of nodes that take no loads | 10 holders=a,z | a 90 phase=draining; b 90 | none
"""


@pytest.mark.parametrize(("_", "request_", "rooms", "expected"), read_table(PLACES))
def test_place_chooses_node(_: str, request_: str, rooms: str, expected: str) -> None:
    found = chosen(read_request(request_.removeprefix("-")), map(read_room, filter(None, rooms.split(";"))))
    assert found == expected


NAMES = st.sampled_from(["a", "b", "c", "d"])
ROOMS = st.lists(
    st.builds(
        NodeRoom,
        st.builds(
            node,
            NAMES,
            budget=st.none() | st.integers(0, 100),
            attributes=st.sampled_from([(), ("gpu=a",), ("gpu=a", "zone=x")]),
            phase=st.sampled_from(["joined", "joined", "joined", "draining", "left", "lost"]),
        ),
        st.builds(
            partial(NodeHints, 0),
            st.none() | st.integers(-50, 100),
            st.none() | st.integers(-1, 2),
            st.frozensets(st.sampled_from(["f1", "f2", "f3"])),
        ),
        st.integers(0, 3),
    ),
    unique_by=lambda room: room.node.id,
)
REQUESTS = st.builds(
    PlacementRequest,
    st.sampled_from(["m", "n", "o"]),
    st.none() | st.integers(0, 100),
    st.frozensets(st.sampled_from(["f1", "f2", "f3"])),
    st.frozensets(st.sampled_from(["gpu=a", "zone=x"]), max_size=1),
    st.none() | NAMES,
    st.just(()) | st.lists(NAMES, max_size=2, unique=True).map(tuple),
)


def is_able(request: PlacementRequest, each: NodeRoom) -> bool:
    has_version = not request.holders or each.node.id in request.holders
    return each.node.takes_loads and has_version and request.attributes <= set(each.node.attributes)


@PLAIN
@given_any(REQUESTS, ROOMS, st.randoms())
def test_place_finds_the_best_able_node_in_any_order(
    request: PlacementRequest, rooms: list[NodeRoom], dice: Any
) -> None:
    found, able = place(request, rooms), [each for each in rooms if is_able(request, each)]
    assert (found is None) == (not able)
    dice.shuffle(rooms)
    assert place(request, rooms) == found
    if found is None:
        return
    mine = next(each for each in able if each.node == found.node)
    for each in rooms:
        if each is not mine:  # the end of another node moves nothing
            left = place(request, [other for other in rooms if other is not each])
            assert left is not None
            assert left.node == found.node
    for each in able if found.reason is not PlacementReason.SERVES else ():
        if each.can_ever_fit(request.need_bytes):
            assert mine.can_ever_fit(request.need_bytes)
            assert mine.fits(request.need_bytes) or not each.fits(request.need_bytes)
            assert each.node.id != request.home


def test_attributes_of_devices_name_providers_and_each_device() -> None:
    pool = WorkerPool()
    names = ("openvino:cpu.1", "cuda:1", "cuda:0")
    pool.targets = Devices({name: FoundDevice(name, "1") for name in names})
    attributes = tuple(sorted(list_attributes(pool)))
    assert attributes == (
        *("device.cuda=0", "device.cuda=1", "device.openvino=cpu.1"),
        *("device=cuda", "device=openvino"),
    )
    assert all(map(NODE_ATTRIBUTE.fullmatch, attributes))
    devices = ("openvino:cpu.1", "cuda:*", "openvino:*", "cpu", "openvino:cpu", "rocm:*")
    assert [name for name in devices if DeviceDemand((name,)).is_met(attributes)] == list(devices[:4])


def test_equal_nodes_share_models() -> None:
    rooms = [NodeRoom(node(name), NodeHints(0)) for name in ("a", "b", "c")]
    found = [chosen(PlacementRequest(f"m{number}"), rooms) for number in range(60)]
    shares = dict.fromkeys(("a room", "b room", "c room"), True)
    assert {each: found.count(each) > 10 for each in found} == shares


# Decisions of nodes


def rules_of(persons: int) -> LoadPolicy:
    """Return the policy by which so many persons approve the model."""
    return LoadPolicy(approval=(ApprovalRule((MODEL,), persons),) if persons else ())


def digest_of(persons: int) -> str:
    rules = rules_of(persons).of(MODEL)
    assert rules is not None
    return rules.digest


class Cluster(Scene):
    """Nodes `a` and `b` with a budget; a script also has the steps of `History`.

    Attributes of nodes are written with a colon: `join c attributes=gpu:a,zone:x`.
    """

    def __init__(self, script: str = "", budget_bytes: int = 100) -> None:
        super().__init__()
        self.hints = dict[str, NodeHints]()
        for name in ("a", "b"):
            self.join(name, budget_bytes=budget_bytes)
        self.play(script)

    def __getattr__(self, step: str) -> Any:
        return getattr(self.history, step)

    def join(self, name: str, *, attributes: str = "", rules: int | None = None, **given: Any) -> None:
        """A node starts, perhaps with a policy of so many approvals."""
        self.history.join(name, attributes=read_attributes(attributes), **given)
        if rules is not None:
            self.change_rules(name, rules)

    def change_rules(self, name: str, persons: int) -> None:
        self.history.add(PolicyInForce(rules_of(persons), server=name), of=None, version=None)

    def hint(self, name: str, position: int, free_bytes: int | None = None, **given: Any) -> None:
        """A node says what is free."""
        self.hints[name] = NodeHints(position, free_bytes, **given)

    def ask(
        self, load: str, *, attributes: str = "", devices: str = "", rules: int = 0, **given: Any
    ) -> None:
        """A load is requested, by rules of so many approvals."""
        if attributes:
            given["node_attributes"] = read_attributes(attributes)
        if devices:
            given["devices"] = tuple(devices.split(","))
        if rules:
            given["policy"] = digest_of(rules)
        self.history.ask_load(load, **given)

    def serve(self, name: str, load: str, *, attributes: str = "", **given: Any) -> None:
        """A load ends well at a node."""
        if attributes:
            given["node_attributes"] = read_attributes(attributes)
        self.history.load_at(name, load, **given)

    def copy(self, name: str) -> None:
        """A further copy is loaded at a node."""
        self.serve(name, f"C{name}", cause=Cause.COPY, copies=2)

    def swap(self, name: str) -> None:
        """The next version is loaded at a node."""
        self.serve(name, "S", version=2, copies=2)

    def queue(self, name: str) -> None:
        """A load of another model waits at a node."""
        self.ask(f"O{name}", of=f"other-{name}")
        self.history.place(f"O{name}", name, of=f"other-{name}")

    def fail_copy(self, code: str) -> None:
        """The load of a copy fails."""
        self.ask("F", cause=Cause.COPY, version=self.history.model().version or 1, copies=2)
        self.history.fail_load("F", code)

    def at(self, name: str, *running: str, epoch: int = 0, **policy: Any) -> None:
        """Have a node decide that has these processes, by the usual policy but for this."""
        self.name, self.epoch = name, epoch or self.history.state.registers.nodes[name].epoch
        self.running = processes(" ".join(running))
        self.policy = Policy(**{"loads_at_once": 2, "budget_bytes": 100, **policy})

    @property
    def placement(self) -> NodePlacement:
        return NodePlacement(self.name, KnownStanding(self.epoch, self.hints), KnownSigning(self.name))

    def decision(self) -> Decision:
        now = at(self.history.seconds)
        view = SchedulerView(self.history.state, self.running, self.policy, now, self.observations)
        return self.placement.decide(view)

    def _expect(self, expected: str, part: str) -> None:
        load, waits, words = expected.partition(" waits for ")
        if waits:
            assert self.decision().waiting_for.get(load, "").partition(";")[0] == words, part
        super()._expect(expected, part)


def read_attributes(text: str) -> tuple[str, ...]:
    return tuple(text.replace(":", "=").split(",")) if text else ()


OF_VERSION = "a node that takes loads, of b, where version 1 was added"
OF_RULES = "policy_differs: a node with the rules by which it was accepted"
SCENES = {
    "placer alone places load": (
        "ask L; hint b 9 100; hint a 9 20; at b -> nothing; at a -> place L at b: room;"
        "place L b; at a -> nothing; at b -> estimate L;"
        "estimate L 40; at b -> start L; at b epoch=2 -> nothing"
    ),
    "loads placed since hint take room": (
        "hint a 0 60; hint b 0 70; ask L0 of=m0; ask L1 of=m1; ask L2 of=m2;"
        "estimate L0 40; estimate L1 40; estimate L2 40;"
        "at a -> place L0 at b: room; place L0 b of=m0;"
        "at a -> place L1 at a: room, and start it; place L1 a of=m1; at a -> place L2 at b: queue"
    ),
    "placer starts load that it places at itself": (
        "hint a 9 100; hint b 9 20; ask L; at a -> estimate L;"
        "estimate L none; at a -> place L at a: room;"  # since its files are slow to read
        "observe estimating=L+; at a -> L waits for the estimate of its memory;"
        "ask O of=other; hint b 9 100; estimate O 90; at a -> place O at b: room;"  # meanwhile
        "place O b of=other; estimate L 40; observe estimating=+; at a -> place L at a: room, and start it;"
        "at a O:loading loads_at_once=1 -> place L at a: room; place L a; at a -> start L"
    ),
    "node that has said nothing has its budget": (
        "hint a 0; hint b 9 100; ask L of=m0; place L a of=m0; estimate L 40;"
        "ask L1 of=m1; at a -> place L1 at b: room"
    ),
    "load waits for node with its attributes": (
        "ask L timeout_s=10 attributes=gpu:a,zone:x;"
        "at a -> L waits for a node that takes loads and has the attributes gpu=a, zone=x;"
        "at a -> wakes in 10;"
        "join c attributes=gpu:a,os:l,zone:x; at a -> place L at c: room;"
        "leave c; wait 8; at a -> fail L: timeout"
    ),
    "load waits for node with its device": (
        "ask L devices=cuda:*,rocm:0;"
        "at a -> L waits for a node that takes loads and has one of the devices cuda:*, rocm:0;"
        "join c attributes=device.cuda:1,device:cuda; at a -> place L at c: room"
    ),
    "load waits for node with its rules": (
        f"ask L rules=1; at a -> L waits for {OF_RULES}, {digest_of(1)};"
        "join b rules=1; at a -> place L at b: room; place L b;"
        "join b rules=1; at a -> place L at b: room;"  # anew
        "ask O of=other; place O b of=other; at b -> estimate O"
    ),
    "load leaves node that has other rules since": (
        "ask L; place L b; change_rules b 1; at b -> place L at a: room;"
        f"drain a; at b -> L waits for {OF_RULES}, none"
    ),
    "reload by rules of no node fails": (
        "serve b L; leave b; leave a; join a rules=2; ask R cause=restart rules=1;"
        "at a -> fail R: policy_differs; fail_load R policy_differs; wait 60; at a -> reload digits, restart"
    ),
    "model with attributes moves to node with them": (
        "join c attributes=gpu:a; serve c L attributes=gpu:a; drain c; at c L:serving -> nothing;"
        "join b attributes=gpu:a; at c L:serving -> move digits;"
        "lose c; ask R cause=restart attributes=gpu:a; at a -> place R at b: room"
    ),
    "load with attributes leaves node without them": (
        "serve b L; join c attributes=gpu:a; ask L2 attributes=gpu:a; at a -> place L2 at c: room;"
        "place L2 c; estimate L2 60;"
        "at c budget_bytes=50 -> fail L2: insufficient_memory"  # it would fit at `a`
    ),
    "load waits for node where version was added": (
        "join c attributes=gpu:a budget_bytes=50; add_version c; add_version b; hint b 99 0; hint c 99 0;"
        "ask L; at a -> place L at c: room; drain c; at a -> place L at b: room;"
        "leave b; at a -> L waits for a node that takes loads, of b, c, where version 1 was added;"
        "ask L2 of=other attributes=gpu:a; add_version b of=other; at a -> L2 waits for"
        " a node that takes loads and has the attributes gpu=a, of b, where version 1 was added;"
        "add_version a; at a -> estimate L"
    ),
    "lost model waits for node where version was added": (
        "add_version b; serve b L; lose b; at a -> reload digits, restart;"
        f"ask R cause=restart; at a -> R waits for {OF_VERSION};"
        "join b budget_bytes=5000; at a -> place R at b: room"
    ),
    "model moves to nodes where its version was added": (
        "add_version b; serve b L; drain b; join c; join d; at b L:serving -> nothing;"
        "add_version c; at b L:serving -> move digits; ask M cause=drain; at a -> place M at c: room"
    ),
    "load without room goes to another node with its version": (
        "add_version b; ask L; place L b; estimate L 101; join c budget_bytes=200;"
        "at b -> fail L: insufficient_memory; add_version c; at b -> place L at c: room"
    ),
    "next load goes where model is loaded": (
        "hint a 9 100; serve b L; ask L2 version=2; ask L3 version=3; at a -> place L2 at b: serves;"
        "drain b; at a -> estimate L2; estimate L2 40; at a -> place L2 at a: room, and start it"
    ),
    "load without room goes where it fits": (
        "serve b O of=other; ask L; place L b; estimate L 101;"
        "at b O:serving -> fail L: insufficient_memory;"
        "join c budget_bytes=200; hint c 99 0; at b O:serving -> place L at c: queue;"
        "estimate L 100; hint c 99 99; hint a 99 100; at b O:serving max_loaded=1 -> place L at a: room;"
        "hint a 99 100 free_models=0; at b O:serving max_loaded=1 -> nothing"
    ),
    "load is placed a few times only": (
        "hint a 99 100; hint b 99 100; ask L; estimate L 50; place L b; place L a; place L b;"
        "at b O:serving max_loaded=1 -> place L at a: room;"
        "place L b; at b O:serving max_loaded=1 -> nothing; at b max_loaded=1 -> start L"
    ),
    "reload without room waits for nodes": (
        "serve b L; lose b; ask R cause=restart; place R a; estimate R 50;"
        "at a O:serving max_loaded=1 -> R waits for a place among the 1 models that may be loaded: "
        "unload a model, or start with --evict idle"
    ),
    "draining node moves its models": (
        "serve b L; at b L:serving -> nothing;"
        "drain b; at b L:serving -> nothing;"  # it took more than the budget of `a`
        "join c; at b L:serving -> move digits; ask M cause=drain; at b L:serving -> nothing;"
        "estimate M 40; at a -> place M at c: room; start_at c M; fail_load M invalid_model;"
        "at b L:serving -> wakes in 1; wait 1; at b L:serving -> move digits"
    ),
    "waiting load leaves draining node": (
        "ask L; place L b; drain b; at b -> place L at a: room; leave a; at b -> estimate L"
    ),
    "last node keeps its models while it drains": "serve b L; drain b; leave a; at b L:serving -> nothing",
    "moved load is unloaded at its old node": (
        "serve b L; serve a M cause=drain; ask_unload U L cause=drain node_id=b; at a M:serving -> nothing;"
        "at b L:serving -> start U of L; start_unload U; at b L:draining -> nothing;"
        "at b L:gone -> finish U of L; lose b; at a M:serving -> start U of L"
    ),
    "work of ended epoch is left alone": (
        "ask L; start_at b L; lose b; at b L:loading -> nothing; join b; place L b; estimate L 40;"
        "at b L:loading! -> nothing; at b L:serving! -> nothing; at b -> start L"
    ),
    "force at one node cancels loads at another": (
        "serve b L; ask M cause=drain; start_at a M; ask_unload F L force=true node_id=b;"
        "at a M:loading -> nothing; at b L:serving -> cancel M"
    ),
    "unneeded demand is left to its timeout": (
        "ask D cause=demand; place D b; estimate D 1; at b -> start D"
    ),
}  # fmt: skip


@pytest.mark.parametrize("scene", SCENES)
def test_nodes_decide(scene: str) -> None:
    Cluster(SCENES[scene])


def test_reload_of_lost_model_names_its_files() -> None:
    cluster = Cluster("serve b L; lose b; at a -> reload digits, restart; ask R cause=restart; estimate R 40")
    cluster.at("a")
    action = cluster.decision().action
    assert isinstance(action, StartLoad)
    assert action.before is not None
    assert isinstance(action.before.data, LoadPlaced)
    assert [(file.path, file.sha256) for file in action.before.data.files] == list(CONTENTS)


@pytest.mark.parametrize(
    ("a", "b", "attributes", "persons"),
    [(1, 0, "", 1), (1, 2, "gpu:a", 2), (1, 0, "gpu:a", 0), (1, 2, "gpu:none", 1)],
)
def test_reload_is_requested_by_rules_that_node_has(a: int, b: int, attributes: str, persons: int) -> None:
    cluster = Cluster(f"join a rules={a}; join b rules={b} attributes=gpu:a; at a")
    cluster.serve("b", "L", attributes=attributes)
    reload = RequestLoad(MODEL, 1, None, SYSTEM, cause=Cause.RECOVERY)
    policy = cluster.placement.complete(reload, cluster.history.state).policy
    assert policy == (digest_of(persons) if persons else UNSET)


# Copies: two are wanted of a model, whose first copy L is at `b`.


def copied(script: str = "") -> Cluster:
    """Return nodes `a` to `c` with much room after a load of copies and these steps."""
    cluster = Cluster("join c budget_bytes=1000000000; serve b L copies=2", 10**9)
    cluster.play(script)
    return cluster


RELOAD, NOTHING = f"reload {MODEL}, copy", "nothing"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("", RELOAD),
        ("copy a", NOTHING),
        ("copy a; copy c", "end Cc"),
        ("copy a; lose b", RELOAD),
        ("copy a; lose a", RELOAD),
        ("copy a; kill_worker w-L", RELOAD),
        ("copy c; drain b", RELOAD),
        ("copy c; drain b; copy a", "end L"),
        ("copy c; drain b; drain a", "end L"),
        ("drain b; drain a; drain c", NOTHING),
        ("hint a 99 1; hint c 99 1", NOTHING),
        ("queue a; queue c", NOTHING),
        ("copy c; swap b", RELOAD),
        ("copy c; swap b; fail_copy timeout", "end Cc"),
        ("copy c; swap a", RELOAD),
        ("fail_copy timeout", RELOAD),
        ("fail_copy broken;" * 6, RELOAD),
        ("copy c; swap b; drain b; fail_copy timeout", RELOAD),
        ("copy c; swap b; queue c; hint a 99 1", NOTHING),
        ("copy c; swap b; lose b", RELOAD),
        ("copy c; swap b; lose b; copy a", RELOAD),
    ],
)
def test_placer_keeps_copies(steps: str, expected: str) -> None:
    cluster = copied(f"{steps}; wait 60")
    placer = find_placer(cluster.history.state.registers.nodes) or ""
    cluster.at(placer)
    match cluster.decision().action:
        case UnloadAutomatically(loaded, Cause.COPY):
            assert expected == f"end {loaded.serving.load_job_id}"
        case action:
            assert describe(action) == expected
    cluster.at("c" if placer == "a" else "a")
    assert not isinstance(cluster.decision().action, RequestReload | UnloadAutomatically)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            "copy c; swap b; ask C2 cause=copy version=2 copies=2;"
            "hint a 99 1000000000; hint b 99 100000000; hint c 99 100000000;"
            "at a -> place C2 at c: serves; drain c; at a -> estimate C2",  # to be placed here
            id="goes to a node without one or with an older version",
        ),
        pytest.param(
            "ask C cause=copy copies=2; kill_worker w-L; at a -> cancel C;"
            "end_cancelled C; wait 60; at b -> reload digits, recovery",
            id="gives way to reload",
        ),
        pytest.param("copy c; drain b; at b L:serving -> nothing", id="is not moved"),
    ],
)
def test_copy(script: str) -> None:
    copied(script)


def test_swap_goes_on_when_its_only_copy_is_lost() -> None:
    cluster = copied("copy c; swap b; lose b; wait 60; at a")
    history = cluster.history
    assert history.model().version == 1
    action = cluster.decision().action
    assert isinstance(action, RequestReload)
    assert action.model.serving.version == 2
    cluster.serve("a", "C2", version=2, cause=Cause.COPY, copies=2)
    assert [each.load_job_id for each in history.model().servings] == ["C2", "Cc"]
    assert history.model().target is UNSET
    cluster.play("serve c C3 version=2 cause=copy copies=2; at a -> nothing")


def test_eviction_ends_one_copy() -> None:
    cluster = copied(
        "copy a; queue a; hint b 99 1; hint c 99 1; estimate Oa 90; wait 60; at a Ca:serving evicts=true"
    )
    cluster.running["Ca"] = replace(cluster.running["Ca"], taken={MACHINE: 40})
    action = cluster.decision().action
    assert isinstance(action, UnloadAutomatically)
    assert (action.cause, action.cause_event_id) == (Cause.COPY, "Oa")
    assert action.model.serving.load_job_id == "Ca"


@pytest.mark.parametrize(
    ("idle_s", "expected"), [(0, "nothing"), (30, "nothing"), (90, f"unload {MODEL}, idle")]
)
def test_copied_model_is_idle_when_all_its_copies_are(idle_s: int, expected: str) -> None:
    cluster = Cluster(budget_bytes=10**9)
    for name, load, cause in (("a", "A", Cause.REQUEST), ("b", "B", Cause.COPY)):
        cluster.serve(name, load, cause=cause, copies=2, keep_alive_s=60)
    cluster.wait(90)
    cluster.hint("b", 9, 10**9, loads={MODEL: CopyFigures(idle_s=idle_s)})
    cluster.play(f"at a A:serving -> {expected}; at b B:serving -> nothing")
