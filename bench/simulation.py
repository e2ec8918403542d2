"""Decisions of many nodes about many models with copies, on the real folds, without processes and a database.

Nodes die, are drained and come back. What a node starts is loaded at once, so that the time of a decision and
the number of loads are all that is measured.
"""

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from statistics import mean, median, quantiles

from bench.table import Row
from events.accept import accept
from events.clock import add_seconds
from events.commands import Accepted, Command, Record
from events.state import State
from events.types import (
    SYSTEM,
    Cause,
    Draft,
    Durations,
    LoadedFile,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    UnloadStarted,
    record_draft,
)
from features.nodes.commands import DrainNode, EndNode, JoinNode
from features.nodes.facts import LoadPlaced, NodeLost, NodeSignature
from features.nodes.register import find_placer
from nodes.decisions import NodePlacement
from nodes.placement import NodeHints
from runtime.rooms import MACHINE, Alternative
from runtime.scheduler import actions
from runtime.scheduler.actions import build_request, draft_fact, draft_load_start, list_conditions
from runtime.scheduler.view import LoadView, MemoryEstimate, Observations, Phase, Policy, SchedulerView

DECISION_GOAL_MS = 5.0
"""For the median decision of the placer: each event costs it one."""
NODES, MODELS, MOST_COPIES = 100, 1000, 5
MODEL_BYTES = 2**30
NEEDS = {MACHINE: MODEL_BYTES}
BUDGET_BYTES = 64 * MODEL_BYTES
"""Of a node: with 1,000 models of 3 copies on the average at 100 nodes, half of it is taken."""
BEGIN = "2026-01-01T00:00:00.000000Z"


@dataclass
class SimulatedNode:
    """A node: its placement, its loads, and what it knows of the others.

    It is its own standing and signing.
    """

    name: str
    epoch: int | None = None
    peers: Mapping[str, NodeHints] = field(default_factory=dict)
    may_serve: bool = True
    late: Collection[str] = ()
    running: dict[str, LoadView] = field(default_factory=dict)
    estimates: dict[str, MemoryEstimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.placement = NodePlacement(self.name, self, self)

    def sign(self, statement: bytes) -> NodeSignature:
        return NodeSignature(self.name, statement.hex()[:64])

    def is_signed(self, statement: bytes, signature: NodeSignature, _: State) -> bool:
        return signature == self.sign(statement)


class Simulation:
    """Nodes over one state, which all of them have folded.

    Args:
        nodes: how many.
        models: how many; each has 1 to `MOST_COPIES` copies.
        random: which nodes have them.
    """

    def __init__(self, nodes: int, models: int, random: Random) -> None:
        self.state, self.now = State(), BEGIN
        self.loaded = Counter[str]()
        self.took_s: dict[bool, list[float]] = {True: [], False: []}
        self._ids = count(1)
        self._policy = Policy(loads_at_once=2, budget_bytes=BUDGET_BYTES)
        self.nodes = {name: SimulatedNode(name) for name in (f"node-{number:03}" for number in range(nodes))}
        for name in self.nodes:
            self.join(name)
        for number in range(models):
            self._load(
                f"model-{number:04}", random.sample(sorted(self.nodes), random.randint(1, MOST_COPIES))
            )
        self.share_hints()

    @property
    def placer(self) -> str | None:
        """Return the node that places."""
        return find_placer(self.state.registers.nodes)

    def append(self, command: Command) -> bool:
        """Decide a command and fold what it records; return whether it was accepted."""
        decision = accept(self.state, command, self._new_id, self.now)
        for draft in decision.drafts if isinstance(decision, Accepted) else ():
            self._fold(draft)
        return isinstance(decision, Accepted)

    def join(self, name: str) -> None:
        self.append(JoinNode(name, f"http://{name}", budget_bytes=BUDGET_BYTES))
        self.nodes[name] = SimulatedNode(name, self.state.registers.nodes[name].epoch)

    def held(self, names: Collection[str]) -> Counter[str]:
        """Return how many copies of each model nodes have."""
        servings = ((model.id, each) for model in self.state.models.values() for each in model.servings)
        return Counter(model_id for model_id, each in servings if each.server in names)

    def settle(self) -> None:
        """Let nodes decide until none has anything to do."""
        position = -1
        while position != self.state.position:
            position = self.state.position
            for name in sorted(self.nodes):
                if name == self.placer or self._has_work(name):
                    while self._step(self.nodes[name]):
                        pass
            self.now = add_seconds(self.now, 1)
            self.share_hints()

    def share_hints(self) -> None:
        """Let each node measure itself, and tell all others."""
        hints = dict[str, NodeHints]()
        for name, node in self.nodes.items():
            taken = sum(each.memory_bytes for each in node.running.values())
            hints[name] = NodeHints(self.state.position, BUDGET_BYTES - taken)
        for node in self.nodes.values():
            node.peers = hints

    def missing(self) -> int:
        """Return how many copies are wanted and not loaded, or loaded and not wanted."""
        models = self.state.models.values()
        wanted = {each.id: each.serving.parameters.wanted_copies if each.serving else 1 for each in models}
        return sum(abs(wanted[each.id] - len(each.servings)) for each in models)

    def _has_work(self, name: str) -> bool:
        jobs = self.state.unended()
        return not self.state.registers.nodes[name].takes_loads or any(job.server == name for job in jobs)

    def _new_id(self) -> str:
        return f"j{next(self._ids)}"

    def _fold(self, draft: Draft) -> None:
        event = record_draft(draft, self.state.position + 1, self.now)
        if isinstance(event.data, ModelLoaded) and event.model_id is not None:
            self.loaded[event.model_id] += 1
        self.state.forget_ended(self.state.apply(event).jobs.values())

    def _load(self, model_id: str, names: Sequence[str]) -> None:
        """Record the loads of a model at these nodes."""
        for name in names:
            job_id, node = self._new_id(), self.nodes[name]
            cause = Cause.REQUEST if name == names[0] else Cause.COPY
            request = LoadRequested.of(LoadParameters(copies=len(names)), cause)
            placed = LoadPlaced(name, node.epoch or 0, "room")
            self._fold(Draft(job_id, request, SYSTEM, job_id, model_id, 1))
            for data in (placed, LoadStarted(1, server=name), _describe_loaded(model_id, name)):
                self._fold(Draft(self._new_id(), data, SYSTEM, job_id, model_id, 1))
            node.running[job_id] = LoadView(job_id, model_id, Phase.SERVING, taken=NEEDS)

    def _step(self, node: SimulatedNode) -> bool:
        """Let a node decide once and do that; return whether there was anything."""
        observations = Observations(estimates=node.estimates)
        view = SchedulerView(self.state, node.running, self._policy, self.now, observations)
        begin = time.thread_time()
        decision = node.placement.decide(view)
        self.took_s[node.name == self.placer].append(time.thread_time() - begin)
        for job in decision.unestimated:
            node.estimates[job.id] = MemoryEstimate((Alternative(NEEDS),), is_proven=True)
        if decision.action is not None:
            self._act(node, decision.action)
        return decision.action is not None or bool(decision.unestimated)

    def _act(self, node: SimulatedNode, action: actions.Action) -> None:
        conditions = list_conditions(action, self.state)
        if isinstance(action, actions.RequestReload | actions.UnloadAutomatically):
            request = build_request(action, conditions)
            self.append(node.placement.complete(request, self.state))
            return
        match action:
            case actions.RecordFact(job, data):
                drafts = [draft_fact(job, data)]
            case actions.StartLoad(job, _, before):
                first = [draft_fact(job, before.data)] if before is not None else []
                drafts = [*first, draft_load_start(job, is_restarted=False)]
            case actions.StartUnload(job):
                drafts = [draft_fact(job, UnloadStarted())]
            case actions.FinishUnload(jobs):
                drafts = [draft_fact(job, ModelUnloaded(0, 0, 0)) for job in jobs]
            case _:
                raise SystemExit(f"the simulation knows no {action}")
        if self.append(node.placement.complete(Record(tuple(drafts), conditions), self.state)):
            self._follow_up(node, action)

    def _follow_up(self, node: SimulatedNode, action: actions.Action) -> None:
        """Load what has started, and end the workers of what is unloaded."""
        match action:
            case actions.StartLoad(job):
                node.estimates.pop(job.id, None)
                node.running[job.id] = LoadView(
                    job.id, job.model_id, Phase.SERVING, taken=NEEDS, has_outcome=True
                )
                loaded = draft_fact(job, _describe_loaded(job.model_id, node.name))
                self.append(node.placement.complete(Record((loaded,)), self.state))
            case actions.StartUnload(_, load_job_id):
                node.running.pop(load_job_id, None)


def _describe_loaded(model_id: str, node_id: str) -> ModelLoaded:
    files = (LoadedFile("model.onnx", 9, 1, model_id.encode().hex().rjust(64, "0")),)
    durations = Durations(1, 2, 3, 4, None, 5, 15)
    return ModelLoaded(files, ("w",), MODEL_BYTES, MODEL_BYTES, durations, server=node_id)


@dataclass(frozen=True, slots=True)
class Kind:
    """A change of so many nodes at once."""

    what: str
    nodes: int
    drains: bool = False


def measure(*, rounds: int) -> list[Row]:
    """Lose and drain nodes, and let them come back; measure decisions and count loads.

    Args:
        rounds: deaths of one node, drains of one, and deaths of a tenth of the nodes at once.
    """
    random = Random(1)  # noqa: S311 - the same nodes in every run
    simulation = Simulation(NODES, MODELS, random)
    simulation.settle()
    many = NODES // 10
    rows: list[Row] = []
    for kind in (Kind("death", 1), Kind("drain", 1, drains=True), Kind(f"death of {many} at once", many)):
        simulation.took_s = {True: [], False: []}
        names = [random.sample(sorted(simulation.nodes), kind.nodes) for _ in range(rounds)]
        lost, others = map(sum, zip(*(_replace(simulation, each, kind) for each in names), strict=True))
        what = f"simulation: {NODES} nodes, {MODELS:,} models, {kind.what}"
        rows.append(_decision_row(what, simulation.took_s))
        others += simulation.missing()
        what = f"{what}: loads of copies that were not lost, and copies that are missing; beside: those lost"
        rows.append(Row(what, str(others), f"{lost:,}", None, "0", others == 0))
    return rows


def _replace(simulation: Simulation, names: Sequence[str], kind: Kind) -> tuple[int, int]:
    """Let nodes end and come back; return the copies that they had, and how many other loads there were."""
    lost = simulation.held(names)
    simulation.loaded.clear()
    for name in names:
        epoch = simulation.nodes[name].epoch or 0
        end = EndNode(NodeLost(name, epoch, simulation.now))
        simulation.append(DrainNode(name, "bench") if kind.drains else end)
        if not kind.drains:
            del simulation.nodes[name]
    simulation.settle()
    for name in names:
        simulation.join(name)  # which ends the epoch before
    simulation.settle()
    return lost.total(), (simulation.loaded - lost).total()


def _decision_row(what: str, took_s: Mapping[bool, Sequence[float]]) -> Row:
    placer_ms, others_ms = ([1000 * each for each in took_s[is_placer]] for is_placer in (True, False))
    middle_ms, last_ms = median(placer_ms), quantiles(placer_ms, n=100)[-1]
    return Row(
        f"{what}: processor time of a decision of the placer; beside: of another node",
        f"p50 {middle_ms:.1f} ms, p99 {last_ms:.1f} ms, {1000 / mean(placer_ms):,.0f}/s",
        f"p50 {median(others_ms):.2f} ms" if others_ms else "",
        None,
        f"p50 ≤ {DECISION_GOAL_MS:g} ms",
        middle_ms <= DECISION_GOAL_MS,
    )
