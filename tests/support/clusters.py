"""A simulation of several nodes around one log: each folds it by itself, and decides on its own part of it.

Nodes crash, pause, are cut off from the log, leave and are drained; their clocks differ; their appends are
lost, come late or twice. The checks of `ClusterLog` hold at each event.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from msgspec.structs import replace as change

from events.clock import add_seconds, seconds_between
from events.commands import Command, Decision, Record, Refused
from events.jobs import Job, JobKind, JobStatus
from events.models import Model, ModelState
from events.serving import Serving
from events.state import State
from events.types import (
    SYSTEM,
    Cause,
    Draft,
    LoadParameters,
    LoadStarted,
    ModelLoaded,
    PolicyInForce,
    UnloadRequested,
    WorkerExited,
    contents_of,
    digest_of,
)
from events.values import Credential
from events.versioncommands import AddVersion, RemoveVersion
from features.approvals.facts import VersionApproved
from features.nodes.commands import EndNode, JoinNode
from features.nodes.facts import LoadPlaced, NodeLeft, NodeLost, NodeSignature
from features.nodes.register import Node, find_placer
from features.rules import LoadPolicy
from nodes.decisions import NodePlacement
from nodes.placement import NodeHints, find_digest, find_share
from runtime.scheduler import actions
from runtime.scheduler.actions import Action, RecordFact
from runtime.scheduler.actions import Decision as Next
from runtime.scheduler.scheduler import is_crash_loop
from runtime.scheduler.view import MemoryEstimate, Policy
from support.history import at
from support.worlds import Ledger, Process, World, added_files

LEASE_S = 10.0
"""A node that did not renew for so long may be declared lost."""

UNAVAILABLE = Refused("log_unavailable", "the node is cut off from the log")
EPOCH_OVER = Refused("epoch_over", "the node was declared lost")


def placed_at(placement: RecordFact) -> str:
    """Return the node of a placement."""
    assert isinstance(placement.data, LoadPlaced)
    return placement.data.server


def has_attributes(node: Node, parameters: LoadParameters | None) -> bool:
    """Whether a node has the attributes that a load requires."""
    assert parameters is not None
    return set(parameters.node_attributes or ()) <= set(node.attributes)


def has_version(state: State, node_id: str, model_id: str | None, version: int | None) -> bool:
    """Whether a node has a version: all have one that was added to no node's own repository."""
    holders = state.registers.find_versions(model_id or "").find_holders(version or 0).servers
    return not holders or node_id in holders


def has_rules(state: State, node_id: str, job: Job) -> bool:
    """Whether the rules are in force at a node with which a load was accepted."""
    return find_digest(state.registers.find_policy(node_id), job.model_id) == job.policy_digest


class ClusterLog(Ledger):
    """The log of several nodes: what concerns a node is recorded by that node alone, while it is there.

    Attributes:
        is_fenced: whether it refuses what nodes append whose epoch is over; else their conditions have to.
    """

    def __init__(self, *, is_fenced: bool = True) -> None:
        super().__init__()
        self.is_fenced = is_fenced

    def submit(self, command: Command, now: str, by: World | None = None) -> Decision:
        if self.is_fenced and isinstance(by, ClusterNode) and not by.is_current_in(self.state):
            return EPOCH_OVER
        return super().submit(command, now, by)

    def check(self, draft: Draft, following: Sequence[Draft], by: World | None) -> None:
        if by is not None:
            assert isinstance(by, ClusterNode)
            assert by.is_current_in(self.state), "a fact of an epoch that is over"
        job = self.state.unended_job(draft.job_id)
        match draft.data:
            case LoadPlaced(node_id, epoch):
                assert job is not None
                assert job.status is JobStatus.PENDING
                node = self.state.registers.nodes[node_id]
                assert (node.takes_loads, node.epoch) == (True, epoch)
                assert has_attributes(node, job.load)
                assert has_rules(self.state, node_id, job)
                assert has_version(self.state, node_id, draft.model_id, draft.version)
            case LoadStarted(server=node_id) | ModelLoaded(server=node_id):
                assert by is not None
                assert job is not None
                assert node_id == by.name == job.server
                assert has_rules(self.state, by.name, job)
                assert has_attributes(self.state.registers.nodes[by.name], job.load)
                assert has_version(self.state, by.name, draft.model_id, draft.version)
                if isinstance(draft.data, ModelLoaded):
                    assert draft.data.server_signature
                    self._check_replaced(draft, following, job, by.name)
            case WorkerExited(server=node_id):
                assert by is not None
                assert node_id == by.name

    def _check_replaced(self, loaded: Draft, following: Sequence[Draft], job: Job, node_id: str) -> None:
        """A load has the loads unloaded that it replaces: all others, or with copies the one at its node."""
        model = self.state.models[loaded.model_id or ""]
        if model.phase is not ModelState.LOADED:
            return
        assert job.load is not None
        adds = job.cause is Cause.COPY or job.load.wanted_copies > 1
        replaced = {each.load_job_id: each.server for each in model.servings}
        if adds:
            replaced = {load: at_node for load, at_node in replaced.items() if at_node == node_id}
        requests = [draft.data for draft in following if isinstance(draft.data, UnloadRequested)]
        assert {each.load_job_id: each.server for each in requests} == replaced


@dataclass
class KnownStanding:
    """The membership of a node of the simulation."""

    epoch: int | None = None
    peers: Mapping[str, NodeHints] = field(default_factory=dict)
    may_serve: bool = True
    late: Collection[str] = ()


@dataclass(frozen=True)
class KnownSigning:
    """The signatures of a node of the simulation: nobody forges them."""

    name: str

    def sign(self, statement: bytes) -> NodeSignature:
        return NodeSignature(self.name, hashlib.sha256(self.name.encode() + statement).hexdigest())

    def is_signed(self, statement: bytes, signature: NodeSignature, state: State) -> bool:
        is_known = signature.server in state.registers.nodes
        return is_known and signature == KnownSigning(signature.server).sign(statement)


class ClusterNode(World):
    """A node: a consumer with a copy of the state, which may be behind.

    Attributes:
        name: of the node.
        epoch: of this process; None before it has joined.
        is_cut: whether it reaches the log.
        is_paused: whether its process stands still.
        renewed_at: when it renewed its lease last, by the clock of the database.
        attributes: with which it joins.
    """

    def __init__(
        self,
        name: str,
        log: ClusterLog,
        policy: Policy,
        *,
        skew_s: float,
        attributes: tuple[str, ...],
    ) -> None:
        super().__init__(policy, log)
        self.name, self.attributes = name, attributes
        self.epoch: int | None = None
        self.peers: Mapping[str, NodeHints] = {}
        self.may_serve = True
        self.late: Collection[str] = ()
        self.elsewhere = NodePlacement(name, self, KnownSigning(name))
        self.sign = KnownSigning(name).sign
        self.is_paused = False
        self.renewed_at = self.clock = at(0)
        self.now = add_seconds(self.clock, skew_s)

    @property
    def is_up(self) -> bool:
        """Whether its process runs and has joined."""
        return self.epoch is not None and not self.is_paused

    @property
    def renews(self) -> bool:
        return self.is_up and not self.is_cut

    def is_current_in(self, state: State) -> bool:
        node = state.registers.nodes.get(self.name)
        return node is not None and node.is_present and node.epoch == self.epoch

    def pass_time(self, seconds: float) -> None:
        """Let time pass for the database and for the node, whose clock differs."""
        self.clock, self.now = add_seconds(self.clock, seconds), add_seconds(self.now, seconds)
        if self.renews:
            self.renewed_at = self.clock

    def catch_up(self) -> None:
        """Fold what the others have appended; a node that was lost joins anew."""
        if self.is_cut or self.epoch is None:
            return
        self._fold()
        if not self.is_current_in(self.state):
            self.join()

    def _fold(self) -> None:
        super().catch_up()
        assert self.state.models == self.log.state.models
        assert self.state.jobs == self.log.state.jobs
        assert self.state.registers.nodes == self.log.state.registers.nodes
        self.now = max(self.now, self.state.recorded_at)

    def join(self, no_node_since: str | None = None) -> None:
        """Begin the next epoch."""
        budget = self.policy.budget_bytes
        command = JoinNode(
            self.name,
            f"http://{self.name}",
            self.attributes,
            budget_bytes=budget,
            last_seen_at=self.renewed_at,
            no_node_since=no_node_since,
        )
        self.log.submit(command, self.now)
        if self.log.state.registers.find_policy(self.name) != self.policy.loads:
            data = PolicyInForce(self.policy.loads, server=self.name)
            self.log.submit(Record((Draft(self.log.new_id(), data, SYSTEM),)), self.now)
        self.epoch = self.log.state.registers.nodes[self.name].epoch
        self.renewed_at = self.clock
        self._fold()

    def die(self) -> None:
        """Its process is gone, with its workers and all that it knew."""
        self.live.clear()
        self.estimates.clear()
        self.passed.clear()
        self.outdated.clear()
        self.meanwhile.clear()
        self.fault, self.epoch, self.state = None, None, State()
        self.is_cut = self.is_paused = False

    def submit(self, command: Command) -> Decision:
        if self.is_cut:
            return UNAVAILABLE
        return self.log.submit(self.with_rules(command), self.now)

    def measure(self) -> NodeHints:
        """Return what the node says of itself."""
        budget, most = self.policy.budget_bytes, self.policy.max_loaded
        present = {process.model_id for process in self.live.values() if process.left or not process.started}
        return NodeHints(
            self.state.position,
            None if budget is None else budget - self.used_bytes(),
            None if most is None else most - len(present),
        )

    def step(self, *, is_late: bool = False) -> Next:
        """Take a turn, on the state that it had if it is late."""
        if not is_late:
            self.catch_up()
        return super().step()

    def act(self, action: Action) -> None:
        self._check(action)
        super().act(action)

    def _check(self, action: Action) -> None:
        """A load starts here if it was placed here, in its turn, and within the limits of the node."""
        match action:
            case actions.StartLoad(job, _, placement):
                if placement is not None:
                    self._check(placement)
                assert self.name == (job.server if placement is None else placed_at(placement))
                assert self.state.queue(job.model_id)[0].id == job.id
                assert len(self.loading()) <= self.policy.loads_at_once
                budget = self.policy.budget_bytes
                estimate = self.estimates[job.id]
                assert isinstance(estimate, MemoryEstimate)
                needed = self.used_bytes() + estimate.bytes
                assert budget is None or needed <= budget
            case actions.RecordFact(job, LoadPlaced()):
                assert job.server != placed_at(action)
                assert job.server == self.name or find_placer(self.state.registers.nodes) == self.name
            case actions.RequestReload(model, Cause.DRAIN):
                assert model.serving.server == self.name
            case _:
                pass

    def name_worker(self, job: Job, number: int) -> str:
        return f"w{number}-{job.id}-{self.name}{self.epoch}"

    def describe_loaded(self, load: str, process: Process) -> ModelLoaded:
        return change(
            super().describe_loaded(load, process),
            memory_bytes=process.measured_bytes,
            peak_memory_bytes=process.reserved_bytes,
        )


class Cluster:
    """Nodes `a`, `b`, `c`, … over one log, with the clock of its database."""

    def __init__(
        self,
        policies: Sequence[Policy],
        skews_s: Sequence[float],
        attributes: Sequence[tuple[str, ...]] | None = None,
        *,
        is_fenced: bool,
    ) -> None:
        self.log = ClusterLog(is_fenced=is_fenced)
        self.now = at(0)
        about = zip("abcdef", policies, skews_s, attributes or [()] * len(policies), strict=False)
        self.nodes = [
            ClusterNode(name, self.log, policy, skew_s=skew_s, attributes=attributes)
            for name, policy, skew_s, attributes in about
        ]
        for node in self.nodes:
            node.join()
        self._changes = count(1)

    @property
    def state(self) -> State:
        return self.log.state

    def add_version(self, node: ClusterNode, model_id: str, version: int) -> Decision:
        """Add a version to a node's own repository."""
        files = added_files(node.files_in_repository(model_id, version))
        event_id = f"v{next(self._changes)}"
        return node.submit(AddVersion(model_id, version, "alice", files, event_id, holder=node.name))

    def remove_version(self, node: ClusterNode, model_id: str, version: int) -> Decision:
        """Remove a version from a node's own repository."""
        event_id = f"v{next(self._changes)}"
        return node.submit(RemoveVersion(model_id, version, "alice", event_id, holder=node.name))

    def forge_approval(self, node: ClusterNode, model_id: str, version: int, by: str) -> None:
        """Append an approval as the database's role: a person's last one once more, or one of its own."""
        digest = digest_of(contents_of(node.files_in_repository(model_id, version)))
        data = VersionApproved(digest, (), "seen", Credential())
        for event in self.log.events:
            is_same = (event.actor, event.model_id, event.version) == (by, model_id, version)
            if is_same and isinstance(event.data, VersionApproved):
                data = event.data
        draft = Draft(f"v{next(self._changes)}", data, by, None, model_id, version)
        self.log.submit(Record((draft,)), self.now)

    def pass_time(self, seconds: float) -> None:
        self.now = add_seconds(self.now, seconds)
        for node in self.nodes:
            node.pass_time(seconds)

    def share_hints(self) -> None:
        """All nodes say what they have, and those that are not cut off hear it."""
        hints = {node.name: node.measure() for node in self.nodes if node.renews}
        for node in self.nodes:
            if node.renews:
                node.peers = {**node.peers, **hints}

    def start(self, node: ClusterNode, rules: LoadPolicy | None = None) -> None:
        """Start the process of a node that died or left, with other rules if they are given."""
        if node.epoch is not None:
            return
        if rules is not None:
            node.policy = replace(node.policy, loads=rules)
        renewed_at = max(each.renewed_at for each in self.nodes)
        is_empty = seconds_between(renewed_at, self.now) > LEASE_S
        node.join(renewed_at if is_empty else None)

    def leave(self, node: ClusterNode) -> None:
        """Stop a node in order: its workers end, and it says so."""
        if node.renews:
            node.catch_up()
            self.log.submit(EndNode(NodeLeft(node.name, node.epoch or 0)), node.now)
            node.die()

    def declare_lost(self, name: str) -> None:
        """A node that is there declares another lost, if that is late."""
        late = next(node for node in self.nodes if node.name == name)
        judges = [node for node in self.nodes if node.renews and node is not late]
        node = self.state.registers.nodes[name]
        is_late = not late.renews and seconds_between(late.renewed_at, self.now) > LEASE_S
        if judges and is_late and node.is_present:
            self.log.submit(EndNode(NodeLost(name, node.epoch, late.renewed_at)), judges[0].now)

    def work(self, node: ClusterNode, turns: int, *, is_late: bool = False) -> None:
        """Let a node take turns; a late one begins on the state that it had."""
        if not node.is_up:
            return
        for turn in range(turns):
            if node.step(is_late=is_late and not turn).action is None:
                return

    def settle(self) -> list[Next]:
        """Let all nodes take turns until none has anything to do, which has to be soon."""
        for _ in range(50):
            position = self.state.position
            decisions = [node.settle() for node in self.nodes if node.renews]
            if self.state.position == position:
                hints = {node.name: node.peers for node in self.nodes}
                self.share_hints()
                if hints == {node.name: node.peers for node in self.nodes}:
                    return decisions
        pytest.fail(f"busy without end: {self.tell()}")

    def bring_back(self) -> None:
        """All nodes are there, reach the log and see it; for what each could load, one takes loads."""
        for node in self.nodes:
            node.is_cut = node.is_paused = False
            node._end_troubles()
            node.meanwhile.clear()
            node.estimates_take_time = False
            if node.epoch is None:
                self.start(node)
            for process in node.live.values():
                process.answer(node.now)
        self.pass_time(0)
        for node in self.nodes:
            node.catch_up()
        for node in self.nodes:
            takers = [each for each in self.state.registers.nodes.values() if each.takes_loads]
            if not any(self._can_replace(each, node) for each in takers):
                self.leave(node)
                self.start(node)

    def _can_replace(self, taker: Node, node: ClusterNode) -> bool:
        """Whether a node has all attributes and versions of another."""
        known = self.state.registers.versions.values()
        held = [(versions.id, each) for versions in known for each in versions.holders]
        own = [(model_id, each.version) for model_id, each in held if node.name in each.servers]
        has_all = all(has_version(self.state, taker.id, *version) for version in own)
        return has_all and set(node.attributes) <= set(taker.attributes)

    def calm_down(self) -> None:
        """Be fair for long enough: every job ends; and with memory for all, nothing is left to do."""
        self.bring_back()
        jobs = {job.id for job in self.state.unended()}
        self._go_on(jobs)
        given = [node.policy for node in self.nodes]
        for node in self.nodes:
            node.policy = replace(node.policy, budget_bytes=None, max_loaded=None)
        self._go_on(None)
        self.check_rest()
        for node, policy in zip(self.nodes, given, strict=True):
            node.policy = policy

    def _go_on(self, jobs: set[str] | None) -> None:
        for _ in range(200 + 20 * len(self.state.jobs)):
            decisions = self.settle()
            if jobs is not None and all(self.state.unended_job(job) is None for job in jobs):
                return
            if not self.progress("loaded"):
                wake_at = min(filter(None, (each.wake_at for each in decisions)), default=None)
                if wake_at is None:
                    return
                # Clocks differ: wait for the last of those that may want to be woken then.
                self.pass_time(max(0.5, seconds_between(self.now, wake_at)))
        pytest.fail(f"never at rest: {self.tell()}")

    def progress(self, outcome: str) -> bool:
        """Let what runs come to its end; return whether anything did."""
        has_changed = False
        for node in self.nodes:
            ending = [each for each in node.live.values() if each.killed or each.unloading]
            has_changed = has_changed or bool(node.loading() or ending or None in node.estimates.values())
            node.progress(outcome)
            node.finish_estimates()
        return has_changed

    def check_rest(self) -> None:
        """Every job has ended, and each model that is loaded has a process, at its node alone."""
        assert self.state.unended() == []
        assert [event.position for event in self.log.events] == list(range(1, len(self.log.events) + 1))
        at_nodes: dict[str | None, set[str]] = {node.name: set() for node in self.nodes}
        for model in self.state.models.values():
            assert model.phase is not ModelState.LOST
            assert model.previous is None
            for serving in model.servings if model.phase is ModelState.LOADED else ():
                at_nodes[serving.server].add(serving.load_job_id)
        assert {node.name: set(node.live) for node in self.nodes} == at_nodes
        for model in self.state.models.values():
            if model.phase is ModelState.LOADED and model.serving is not None:
                self._check_drained(model, model.serving)
                self._check_copies(model, model.serving)

    def _need_of(self, model: Model, serving: Serving) -> int:
        peaks = [each.peak_memory_bytes for each in model.footprints if each.version == serving.version]
        return max(peaks) * serving.parameters.instances

    def _check_copies(self, model: Model, first: Serving) -> None:
        """Each copy is of the same version and settings, at nodes that take loads, as many as can be."""
        nodes = self.state.registers.nodes
        assert len(model.servings) <= first.parameters.wanted_copies
        if not model.copies and first.parameters.wanted_copies == 1:
            return
        assert all(each.version == first.version for each in model.servings)
        usable = [nodes[each.server or ""].takes_loads for each in model.servings]
        assert all(usable) or not any(usable)
        rules = {find_digest(self.state.registers.find_policy(name), model.id) for name in nodes}
        if len(rules) > 1 or is_crash_loop(model):
            return
        able = [
            node
            for node in nodes.values()
            if node.takes_loads and has_attributes(node, first.parameters)
            if node.budget_bytes is None or self._need_of(model, first) <= node.budget_bytes
            if has_version(self.state, node.id, model.id, first.version)
        ]
        assert not (model.target and able), "a swap was not completed"
        here = {each.server for each in model.servings} - {node.id for node in able}
        assert len(model.servings) - len(here) == min(first.parameters.wanted_copies, len(able))
        assert not here or not able

    def _check_drained(self, model: Model, serving: Serving) -> None:
        """A drained node has nothing left but models that no other has budget, attributes or files for."""
        if not self.state.registers.nodes[serving.server or ""].takes_loads:
            need = self._need_of(model, serving)
            takers = [node for node in self.state.registers.nodes.values() if node.takes_loads]
            able = [node for node in takers if has_version(self.state, node.id, model.id, serving.version)]
            is_known = bool(serving.earlier or serving.evidence)
            here = self.state.registers.find_policy(serving.server)
            budgets = [
                node.budget_bytes
                for node in able
                if has_attributes(node, serving.parameters)
                and (is_known or self.state.registers.find_policy(node.id) == here)
            ]
            assert all(budget is not None and budget < need for budget in budgets)

    def check_now(self) -> None:
        """What holds at any time."""
        placed = [job for job in self.state.unended() if job.server is not None]
        for job in placed:
            assert job.kind is JobKind.UNLOAD or self.state.registers.nodes[job.server or ""].is_present
        for model in self.state.models.values():
            started = [load for load in model.loads if load.started]
            assert len(started) <= 1
            if model.phase in (ModelState.LOADED, ModelState.UNLOADING):
                serving: Serving | None = model.serving
                assert serving is not None
                assert self.state.registers.nodes[serving.server or ""].is_present
                assert has_attributes(self.state.registers.nodes[serving.server or ""], serving.parameters)
                assert has_version(self.state, serving.server or "", model.id, serving.version)
            at_nodes = [each.server for each in model.servings]
            assert len(at_nodes) == len(set(at_nodes)), "two copies at one node"
            assert not model.copies or (model.phase is ModelState.LOADED and model.previous is None)
            assert all(
                self.state.registers.nodes[each.server or ""].is_present for each in model.copies or ()
            )
        owners = [
            {job.id for job in find_share(self.state, name, None, frozenset()).unended()}
            for name, node in self.state.registers.nodes.items()
            if node.is_present
        ]
        every = {job.id for job in self.state.unended()}
        assert not owners or set().union(*owners) == every
        assert sum(map(len, owners)) == (len(every) if owners else 0), "each job belongs to one node"

    def tell(self) -> str:
        """Return what happened last, for the message of a failure."""
        return "\n".join(
            f"{event.position} {event.recorded_at[14:21]} {event.job_id} {event.model_id} {event.data}"
            for event in self.log.events[-20:]
        )
