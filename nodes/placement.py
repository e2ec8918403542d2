"""Which node runs a load, and each node's share of the work: the pure choice among the nodes that are there.

`place` prefers, in this order: the node where the model is loaded, nodes where the load fits without an
eviction, those with a prepared model of its files, those with its files; then it spreads or packs. Equal
nodes are ordered by a rendezvous hash, so that a model tends to the same node. What is known of memory and
files is a hint: a load that finds no room at its node is placed anew by that node, a few times.

A load goes only where the rules are in force with which it was accepted. While nodes have different policies,
as in a rolling change, each takes what was requested by the rules that it has: a person's load whose rules no
node has waits for such a node, and a reload fails, to be requested by the rules of a node that is there.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from copy import copy
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, lru_cache
from math import inf

from events.jobs import POLICY_DIFFERS, Job, JobKind, JobStatus
from events.models import RELOADS, LoadedModel, Model, Serving
from events.nodes import Node, find_placer
from events.policy.rules import LoadPolicy
from events.registercommands import NodeUnchanged
from events.state import State, has_turn
from events.types import FileHash, LoadPlaced, contents_of, digest_of
from runtime.scheduler.actions import RecordFact
from runtime.scheduler.view import SchedulerView, WorkShare

MAX_PLACEMENTS = 4
"""How often a load is placed until it stays where it is: hints may be wrong, but hardly more often."""

NO_POLICY = LoadPolicy()


class PlacementStrategy(StrEnum):
    """Among nodes that are as good otherwise: the one with the most free memory, or with the least."""

    SPREAD = "spread"
    PACK = "pack"


class PlacementReason(StrEnum):
    """The reason for a load's node: see `LoadPlaced`."""

    SERVES = "serves"
    PREPARED = "prepared"
    FILES = "files"
    ROOM = "room"
    QUEUE = "queue"


@dataclass(frozen=True, slots=True)
class NodeHints:
    """Capacity and files of a node, as it reported them; outdated hints cost time only.

    Attributes:
        position: of the log when it was measured: later placements are not in it.
        free_bytes: of its memory budget; None is no limit.
        free_models: how many more models may have a process there; None is no limit.
        digests: SHA-256 of the files that it has.
        prepared: SHA-256 of the model files of which it has a prepared model.
    """

    position: int
    free_bytes: int | None = None
    free_models: int | None = None
    digests: frozenset[str] = frozenset()
    prepared: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """The demands of a load on its node.

    Attributes:
        model_id: of the load.
        need_bytes: of memory; None if it is unknown.
        files: SHA-256 of its files, as far as they are known.
        labels: that the node must have.
        home: the node where the model is or was loaded.
        holders: the nodes that have the version; empty if all have.
        policy: digest of the rules with which it was accepted; None without any.
    """

    model_id: str
    need_bytes: int | None = None
    files: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    home: str | None = None
    holders: tuple[str, ...] = ()
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """A node as the placement sees it.

    Attributes:
        node: as its events say.
        hints: as it reported them, less what was placed there since.
        models: that it has or will have.
        policy: that is in force there.
    """

    node: Node
    hints: NodeHints
    models: int = 0
    policy: LoadPolicy = NO_POLICY

    @property
    def free_percent(self) -> float:
        """Free memory in whole percents of the budget: hints are no more exact. Infinite without a budget."""
        budget, free_bytes = self.node.budget_bytes, self.hints.free_bytes
        return round(100 * free_bytes / budget) if budget and free_bytes is not None else inf

    def fits(self, need_bytes: int | None) -> bool:
        free_bytes, free_models = self.hints.free_bytes, self.hints.free_models
        has_slot = free_models is None or free_models > 0
        return has_slot and (free_bytes is None or (need_bytes or 0) <= free_bytes)

    def can_ever_fit(self, need_bytes: int | None) -> bool:
        """Whether a load fits if nothing else is loaded."""
        budget = self.node.budget_bytes
        return budget is None or need_bytes is None or need_bytes <= budget


@dataclass(frozen=True, slots=True)
class ChosenNode:
    """The node that was chosen, and why."""

    node: Node
    reason: PlacementReason


def place(
    request: PlacementRequest,
    rooms: Iterable[NodeRoom],
    strategy: PlacementStrategy = PlacementStrategy.SPREAD,
) -> ChosenNode | None:
    """Return the node for a load; None if there is none that is able to run it by the same rules.

    A load that fits into no node's budget is placed all the same: the node says why it fails.
    """
    able = [each for each in rooms if can_run(request, each.node)]
    able = [each for each in able if find_digest(each.policy, request.model_id) == request.policy]
    able = [each for each in able if each.can_ever_fit(request.need_bytes)] or able
    home = next((each for each in able if each.node.id == request.home), None)
    if home is not None:
        return ChosenNode(home.node, PlacementReason.SERVES)
    chosen = min(able, key=lambda each: _rank(request, each, strategy), default=None)
    return None if chosen is None else ChosenNode(chosen.node, _explain(request, chosen))


def can_run(request: PlacementRequest, node: Node) -> bool:
    """Whether a node takes loads, and has the version and the labels."""
    has_version = not request.holders or node.id in request.holders
    return node.takes_loads and has_version and request.labels <= set(node.labels)


@lru_cache(1024)
def find_digest(policy: LoadPolicy, model_id: str) -> str | None:
    """Return the digest of the rules for a model; None without any."""
    rules = policy.of(model_id)
    return None if rules is None else rules.digest


def _rank(
    request: PlacementRequest, room: NodeRoom, strategy: PlacementStrategy
) -> tuple[bool, int, float, int, bytes]:
    """Return the key by which nodes are ordered: the lowest is the best."""
    fits = room.fits(request.need_bytes)
    packs = strategy is PlacementStrategy.PACK and fits  # where it has to wait, more is free sooner
    free = room.free_percent
    by_load = (free, -room.models) if packs else (-free, room.models)
    return (not fits, -_count_at_hand(request, room), *by_load, _hash(request.model_id, room.node.id))


def _count_at_hand(request: PlacementRequest, room: NodeRoom) -> int:
    """Return 2 if a node has the files and a prepared model of one, 1 if it has the files, else 0."""
    if not request.files or not request.files <= room.hints.digests:
        return 0
    return 2 if request.files & room.hints.prepared else 1


def _explain(request: PlacementRequest, room: NodeRoom) -> PlacementReason:
    if not room.fits(request.need_bytes):
        return PlacementReason.QUEUE
    return (PlacementReason.ROOM, PlacementReason.FILES, PlacementReason.PREPARED)[
        _count_at_hand(request, room)
    ]


def _hash(model_id: str, node_id: str) -> bytes:
    return hashlib.sha256(f"{model_id}\0{node_id}".encode(errors="surrogatepass")).digest()


class NodeView(SchedulerView):
    """Input of one decision of a node; its share has all that it works on.

    Attributes:
        node: this one.
        hints: of all nodes, by their names.
        untrusted: nodes whose joins are not signed with a key that the nodes share: they do nothing.
        strategy: how loads are distributed.
    """

    def __init__(
        self,
        seen: SchedulerView,
        node: Node,
        hints: Mapping[str, NodeHints],
        untrusted: frozenset[str],
        strategy: PlacementStrategy,
    ) -> None:
        own = find_share(seen.state, node.id, node.epoch, untrusted)
        share = WorkShare(own, is_whole=False)
        super().__init__(seen.state, seen.running, seen.policy, seen.now, seen.observations, share=share)
        self.node, self.hints, self.untrusted, self.strategy = node, hints, untrusted, strategy

    @cached_property
    def rooms(self) -> list[NodeRoom]:
        """Return the trusted nodes that take loads, with what is known of them."""
        loads = defaultdict[str | None, list[Job]](list)
        for job in self.state.unended():
            if job.kind is JobKind.LOAD and not job.waits_for_approval:
                loads[job.node_id].append(job)
        servings = defaultdict[str | None, dict[str, Serving]](dict)
        for model in self.state.models.values():
            if model.serving is not None:
                servings[model.serving.node_id][model.id] = model.serving
        takers = (node for node in self.state.registers.nodes.values() if node.takes_loads)
        nodes = (node for node in takers if node.id not in self.untrusted)
        return [_measure(self, node, loads[node.id], servings[node.id]) for node in nodes]

    def hold(self, held: Mapping[str, str]) -> NodeView:
        """Return this view with other loads held."""
        view = copy(self)  # with the values that are cached, which do not depend on that
        view.share = replace(self.share, held=held)
        return view


def _measure(view: NodeView, node: Node, loads: list[Job], servings: dict[str, Serving]) -> NodeRoom:
    """Return a node's room: what it said, less what was placed or loaded there since."""
    hints = view.hints.get(node.id) or NodeHints(0)
    # Without hints it has said nothing yet.
    free_bytes, free_models = hints.free_bytes, hints.free_models
    free_bytes = node.budget_bytes if free_bytes is None else free_bytes
    since = [job for job in loads if job.status is JobStatus.PENDING or job.position > hints.position]
    new = {model_id: each for model_id, each in servings.items() if each.position > hints.position}
    taken = sum(estimate_need(view, job) or 0 for job in since)
    taken += sum(each.memory_bytes for each in new.values())
    slots = len(new.keys() | {job.model_id for job in since if job.model_id not in servings})
    left = replace(
        hints,
        free_bytes=None if free_bytes is None else free_bytes - taken,
        free_models=None if free_models is None else free_models - slots,
    )
    policy = view.state.registers.find_policy(node.id)
    return NodeRoom(node, left, len(servings.keys() | {job.model_id for job in loads}), policy)


def estimate_need(view: NodeView, job: Job) -> int | None:
    """Return the memory that a load needs, as far as it is known: from its files, or from earlier loads."""
    estimate = view.find_estimate(job)
    if estimate is not None:
        return estimate.bytes
    version, parameters = job.load_order
    model = view.state.models.get(job.model_id)
    return _estimate_from_footprints(model, version, parameters.instances)


def _estimate_from_footprints(model: Model | None, version: int, instances: int) -> int | None:
    peaks = [each.peak_memory_bytes for each in model.footprints if each.version == version] if model else []
    return max(peaks) * instances if peaks else None


def build_request(view: NodeView, job: Job) -> PlacementRequest:
    version, parameters = job.load_order
    model = view.state.models.get(job.model_id)
    held = (model.serving or model.previous) if model is not None else None
    return PlacementRequest(
        job.model_id,
        estimate_need(view, job),
        _find_digests(model, held, version),
        frozenset(parameters.node_labels or ()),
        held.node_id if held is not None else None,
        _find_holders(model, version),
        job.policy_digest,
    )


def _find_holders(model: Model | None, version: int) -> tuple[str, ...]:
    return () if model is None else model.find_holders(version).node_ids


def _find_digests(model: Model | None, held: Serving | None, version: int) -> frozenset[str]:
    """Return the hashes of the files of a version: those that are loaded, else those that were."""
    if held is not None and held.version == version:
        return frozenset(file.sha256 for file in held.files)
    latest = [each for each in model.footprints if each.version == version][-1:] if model is not None else []
    return frozenset(file.sha256 for each in latest for file in each.files)


def place_loads(view: NodeView) -> Iterator[tuple[Job, ChosenNode]]:
    """Choose nodes for the loads without one, if this is the placer, and for those that leave this one.

    It is lazy: after the loss of a node many loads may be without one, and one decision places one.
    """
    loads = [
        job
        for job in view.unended
        if not job.cancelling
        and (_has_no_node(job, view.node) or _leaves(view, job))
        and view.is_first_in_queue(job)
    ]
    rooms = view.rooms if loads else []
    for job in loads:
        chosen = place(build_request(view, job), rooms, view.strategy)
        if chosen is not None:
            yield job, chosen


def draft_placement(view: NodeView, job: Job, chosen: ChosenNode) -> RecordFact:
    node = chosen.node
    data = LoadPlaced(node.id, node.epoch, chosen.reason, _list_files(view, job))
    return RecordFact(job, data, (NodeUnchanged(node),))


def _has_no_node(job: Job, own: Node) -> bool:
    return job.kind is JobKind.LOAD and job.status is JobStatus.PENDING and job.node_id != own.id


def _may_move(job: Job) -> bool:
    """Whether a load that has a node, and has not started, may be placed once more."""
    if job.status is not JobStatus.PENDING or not job.placement:
        return False
    return job.placement.times < MAX_PLACEMENTS


def _leaves(view: NodeView, job: Job) -> bool:
    """Whether a load that was placed at this node, and has not started, has to be placed anew."""
    is_drained = job.kind is JobKind.LOAD and _may_move(job) and not view.node.takes_loads
    return is_drained or _lacks_rules(view, job)


def _lacks_rules(view: NodeView, job: Job) -> bool:
    """Whether a load was placed at this node before that started with other rules."""
    if job.kind is not JobKind.LOAD or job.status is not JobStatus.PENDING or job.node_id != view.node.id:
        return False
    return find_digest(view.state.registers.find_policy(view.node.id), job.model_id) != job.policy_digest


def list_held(view: NodeView) -> dict[str, str]:
    """Return the loads that may not start here, as they have no node or leave this one, and why."""
    leaving = set() if view.node.takes_loads else {job.id for job, _ in place_loads(view)}
    return {
        job.id: _explain_unplaced(view, job)
        for job in view.unended
        if _has_no_node(job, view.node) or job.id in leaving or _lacks_rules(view, job)
    }


def _explain_unplaced(view: NodeView, job: Job) -> str:
    if job.id in view.observations.estimating:
        return "the estimate of its memory"
    request = build_request(view, job)
    able = [each for each in view.rooms if can_run(request, each.node)]
    if able and not any(find_digest(each.policy, job.model_id) == request.policy for each in able):
        return f"{POLICY_DIFFERS}: a node with the rules by which it was accepted, {request.policy or 'none'}"
    labels, holders = ", ".join(sorted(request.labels)), ", ".join(request.holders)
    where = f", of {holders}, where version {job.version} was added" if holders else ""
    return "a node that takes loads" + (f" and has the labels {labels}" if labels else "") + where


def find_reload_rules(
    state: State, node_id: str, untrusted: AbstractSet[str], loaded: LoadedModel
) -> str | None:
    """Return the digest of the rules by which a node requests a reload, so that some node has them.

    These are its own, if a node that is able to run the load has them; else those of the first one that is,
    which checks the load by them. Without such a node they are its own.
    """
    serving = loaded.serving
    labels = frozenset(serving.parameters.node_labels or ())
    request = PlacementRequest(loaded.id, labels=labels, holders=_find_holders(loaded.model, serving.version))
    nodes = sorted(state.registers.nodes.values(), key=lambda node: node.id)
    able = [node.id for node in nodes if node.id not in untrusted and can_run(request, node)]
    policies = (state.registers.find_policy(each) for each in (node_id, *able))
    own, *others = (find_digest(policy, loaded.id) for policy in policies)
    return own if own in others or not others else others[0]


def _list_files(view: NodeView, job: Job) -> tuple[FileHash, ...]:
    """Return the files that a reload needs again; any other load takes what the repository has."""
    model = view.state.models.get(job.model_id)
    serving = model.serving if model is not None else None
    if serving is None or job.cause not in RELOADS or serving.version != job.version:
        return ()
    return tuple(FileHash(file.path, file.sha256) for file in serving.files)


def find_node_for_model(view: NodeView, model: Model, serving: Serving) -> ChosenNode | None:
    """Return the node to which a model of this one would move; None if it fits into no budget.

    It goes to a node with other rules only if the ledger knows what its files have passed.
    """
    need_bytes = _estimate_from_footprints(model, serving.version, serving.parameters.instances)
    request = PlacementRequest(
        model.id,
        need_bytes,
        _find_digests(model, serving, serving.version),
        frozenset(serving.parameters.node_labels or ()),
        holders=model.find_holders(serving.version).node_ids,
    )
    policy = find_reload_rules(view.state, view.node.id, view.untrusted, LoadedModel(model, serving))
    own = find_digest(view.state.registers.find_policy(view.node.id), model.id)
    if policy != own and model.find_admitted(digest_of(contents_of(serving.files))) is None:
        return None
    rooms = [each for each in view.rooms if each.can_ever_fit(need_bytes)]
    return place(replace(request, policy=policy), rooms, view.strategy)


def place_elsewhere(view: NodeView, job: Job, *, needs_budget_only: bool = False) -> RecordFact | None:
    """Return the placement of a load that finds no room at this node at one where it fits, if there is one.

    Args:
        view: of the node at which it is placed.
        job: which has not started.
        needs_budget_only: whether it fits where the budget is enough, since it is not here.
    """
    if not _may_move(job):
        return None
    request = build_request(view, job)
    others = [each for each in view.rooms if each.node.id != view.node.id]
    fitting: Sequence[NodeRoom] = [each for each in others if each.can_ever_fit(request.need_bytes)]
    if not needs_budget_only:
        fitting = [each for each in fitting if each.fits(request.need_bytes)]
    chosen = place(request, fitting, view.strategy)
    return None if chosen is None else draft_placement(view, job, chosen)


def find_share(state: State, node_id: str, epoch: int | None, untrusted: AbstractSet[str]) -> State:
    """Return the part of the state that a node works on.

    Each unended job, and each model that has or lost a load, belongs to one node: what belongs to none that
    is present, and not `untrusted`, is the placer's. Of a node whose epoch is over, or not `epoch`, nothing
    is left; None is any epoch.
    """
    node = state.registers.nodes.get(node_id)
    if node is None or not node.is_present or epoch not in (None, node.epoch):
        return State(state.position, state.recorded_at, registers=state.registers)
    placer = find_placer(state.registers.nodes, untrusted)
    present = {node.id for node in state.registers.nodes.values() if node.is_present} - untrusted
    models = (model for model in state.models.values() if model.serving is not None)
    return State(
        state.position,
        state.recorded_at,
        {model.id: model for model in models if (_node_of_model(model, present) or placer) == node_id},
        {
            job.id: job
            for queue in state.queues.values()
            for job in queue
            if (_node_of_job(job, state, present) or placer) == node_id
        },
        registers=state.registers,
    )


def _node_of_job(job: Job, state: State, present: AbstractSet[str]) -> str | None:
    """Return the present node of a job: where it is placed, or where the load is that it ends."""
    model = state.models.get(job.model_id)
    if job.unload is not None and has_turn(job) and model is not None:
        target = state.unended_job(job.unload.load_job_id) if model.serving is None else None
        if target is not None and target.node_id in present:
            return target.node_id
        if (node_id := _node_of_model(model, present)) is not None:
            return node_id
    return job.node_id if job.node_id in present else None


def _node_of_model(model: Model, present: AbstractSet[str]) -> str | None:
    node_id = model.serving.node_id if model.serving is not None else None
    return node_id if node_id in present else None
