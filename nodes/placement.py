"""Which node runs a load, and each node's share of the work: the pure choice among the nodes that are there.

`place` prefers, in this order: the node where the model is loaded, nodes where the load fits without an
eviction, those that meet its demands best, those with its files, those with the most free memory.
Equal nodes are ordered by a rendezvous hash, so that a model tends to the same node. What is known of memory
and files is a hint: a load that finds no room at its node is placed anew by that node, a few times. Nothing
is known here of rooms beside the machine's memory.

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
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property, lru_cache
from itertools import chain
from math import inf

from events.clock import add_seconds
from events.jobs import POLICY_DIFFERS, Job, JobKind, JobStatus
from events.models import RELOADS, LoadedModel, Model, ModelState
from events.serving import Serving
from events.state import State, has_turn
from events.types import Cause
from events.values import FileHash
from features.nodes.commands import NodeUnchanged
from features.nodes.facts import LoadPlaced
from features.nodes.register import Node, find_placer
from features.rooms import Demand, list_demands
from features.rules import LoadPolicy
from nodes.spread import CopyFigures
from runtime.scheduler.actions import RecordFact
from runtime.scheduler.view import LoadView, SchedulerView, WorkShare

MAX_PLACEMENTS = 4
"""How often a load is placed until it stays where it is: hints may be wrong, but hardly more often."""

NO_POLICY = LoadPolicy()


class PlacementReason(StrEnum):
    """The reason for a load's node: see `LoadPlaced`."""

    SERVES = "serves"
    FILES = "files"
    ROOM = "room"
    QUEUE = "queue"


@dataclass(frozen=True, slots=True)
class NodeHints:
    """Capacity and files of a node, as it reported them; outdated hints cost time only.

    Attributes:
        position: the log's position at the measurement, which later placements are not part of.
        free_bytes: the rest of its memory budget; None is no limit.
        free_models: how many more models may have a process there; None is no limit.
        digests: SHA-256 of the files that it has.
        loads: how busy its copy of each model is that has copies.
        duties: the work that it does for all nodes, or would do if others were gone (`nodes.duties`).
    """

    position: int
    free_bytes: int | None = None
    free_models: int | None = None
    digests: frozenset[str] = frozenset()
    loads: Mapping[str, CopyFigures] = field(default_factory=dict)
    duties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """The demands of a load on its node.

    Attributes:
        model_id: the model.
        need_bytes: its need of memory; None if unknown.
        home: the node where the model is or was loaded, or which has the copy to replace.
        occupied: the nodes that a further copy does not go to.
        holders: the nodes that have the version; empty if all have.
        policy: digest of the rules at its acceptance; None without rules.
        demands: the demands of features.
    """

    model_id: str
    need_bytes: int | None = None
    files: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    home: str | None = None
    holders: tuple[str, ...] = ()
    policy: str | None = None
    occupied: frozenset[str] = frozenset()
    demands: tuple[Demand, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """A node as the placement sees it.

    Attributes:
        node: the node as recorded.
        hints: its last hints, less later placements.
        models: the models that it has or will have.
        policy: the digest of its rules in force.
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


def place(request: PlacementRequest, rooms: Iterable[NodeRoom]) -> ChosenNode | None:
    """Return the node for a load, or None if no node is able to run it by the same rules.

    A load that fits into no node's budget is placed all the same: the node says why it fails.
    """
    able = [each for each in rooms if can_run(request, each.node)]
    able = [each for each in able if find_digest(each.policy, request.model_id) == request.policy]
    able = [each for each in able if each.can_ever_fit(request.need_bytes)] or able
    home = next((each for each in able if each.node.id == request.home), None)
    if home is not None:
        return ChosenNode(home.node, PlacementReason.SERVES)
    chosen = min(able, key=lambda each: _rank(request, each), default=None)
    return None if chosen is None else ChosenNode(chosen.node, _explain(request, chosen))


def can_run(request: PlacementRequest, node: Node) -> bool:
    """Whether a node takes loads, has the version, meets the demands, and may get a copy if it is one."""
    has_version = not request.holders or node.id in request.holders
    is_free = node.takes_loads and node.id not in request.occupied
    has_attributes = request.attributes <= set(node.attributes)
    return is_free and has_version and has_attributes and meets(request.demands, node)


def meets(demands: Iterable[Demand], node: Node) -> bool:
    return all(each.is_met(node.attributes) for each in demands)


@lru_cache(1024)
def find_digest(policy: LoadPolicy, model_id: str) -> str | None:
    """Return the digest of the rules for a model, or None without rules."""
    rules = policy.of(model_id)
    return None if rules is None else rules.digest


def _rank(request: PlacementRequest, room: NodeRoom) -> tuple[bool, int, bool, float, int, bytes]:
    """Return the key by which nodes are ordered: the lowest is the best."""
    preference = sum(each.rank(room.node.attributes) for each in request.demands)
    fits = room.fits(request.need_bytes)
    order = (-room.free_percent, room.models, _hash(request.model_id, room.node.id))
    return (not fits, preference, not _has_files(request, room), *order)


def _has_files(request: PlacementRequest, room: NodeRoom) -> bool:
    return bool(request.files) and request.files <= room.hints.digests


def _explain(request: PlacementRequest, room: NodeRoom) -> PlacementReason:
    if not room.fits(request.need_bytes):
        return PlacementReason.QUEUE
    return PlacementReason.FILES if _has_files(request, room) else PlacementReason.ROOM


def _hash(model_id: str, node_id: str) -> bytes:
    return hashlib.sha256(f"{model_id}\0{node_id}".encode(errors="surrogatepass")).digest()


class NodeView(SchedulerView):
    """Input of one decision of a node; its share has all that it works on.

    Attributes:
        recorded: the state as it is recorded; in `state`, models with a copy here serve from that.
        node: this one.
        hints: the hints of all nodes, by their names.
        untrusted: nodes whose joins are not signed with a key that the nodes share: they do nothing.
    """

    def __init__(
        self, seen: SchedulerView, node: Node, hints: Mapping[str, NodeHints], untrusted: frozenset[str]
    ) -> None:
        own = find_share(seen.state, node.id, node.epoch, untrusted)
        share = WorkShare(own, is_whole=False)
        self.recorded = state = seen.state
        self.node, self.hints, self.untrusted = node, hints, untrusted
        running, copied = seen.running, [model for model in own.models.values() if model.copies]
        if copied:
            state = copy(state)
            state.models = {**state.models, **own.models}
            running = {**running, **dict(self._find_uses(copied, running, seen.now))}
        super().__init__(state, running, seen.policy, seen.now, seen.observations, share=share)

    def _find_uses(
        self, copied: Iterable[Model], running: Mapping[str, LoadView], now: str
    ) -> Iterator[tuple[str, LoadView]]:
        """Yield the loads here of models with copies, as used when any copy was."""
        for model in copied:
            run = None if model.serving is None else running.get(model.serving.load_job_id)
            hints = (self.hints.get(each.server or "") for each in model.others)
            uses = [hint.loads[model.id].idle_s for hint in hints if hint and model.id in hint.loads]
            if run is not None and uses:
                used_at = max(run.last_used_at or "", add_seconds(now, -min(uses)))
                yield run.load_job_id, replace(run, last_used_at=used_at)

    @cached_property
    def usable(self) -> frozenset[str]:
        """Names of the nodes that take loads, but for untrusted ones."""
        return find_usable(self.state, self.untrusted)

    @cached_property
    def rooms(self) -> list[NodeRoom]:
        """Return the nodes that take loads, without untrusted ones, with their hints."""
        loads = defaultdict[str | None, list[Job]](list)
        for job in self.state.unended():
            if job.kind is JobKind.LOAD:
                loads[job.server].append(job)
        servings = defaultdict[str | None, dict[str, Serving]](dict)
        for model in self.state.models.values():
            for serving in model.servings:
                servings[serving.server][model.id] = serving
        nodes = (node for node in self.state.registers.nodes.values() if node.id in self.usable)
        return [_measure(self, node, loads[node.id], servings[node.id]) for node in nodes]

    @cached_property
    def waiting(self) -> Mapping[str | None, AbstractSet[str]]:
        """The models whose loads wait to start, by node."""
        found = defaultdict[str | None, set[str]](set)
        for job in self.state.unended():
            if job.kind is JobKind.LOAD and job.status is JobStatus.PENDING:
                found[job.server].add(job.model_id)
        return found

    def hold(self, held: Mapping[str, str]) -> NodeView:
        """Return this view with other loads held."""
        view = copy(self)  # with the values that are cached, which do not depend on that
        view.share = replace(self.share, held=held)
        return view


def _measure(view: NodeView, node: Node, loads: list[Job], servings: dict[str, Serving]) -> NodeRoom:
    """Return a node's room: its hints, less later placements and loads."""
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
    model = view.recorded.models.get(job.model_id)
    held = (model.serving or model.previous) if model is not None else None
    request = PlacementRequest(
        job.model_id,
        estimate_need(view, job),
        _find_digests(model, held, version),
        frozenset(parameters.node_attributes or ()),
        held.server if held is not None else None,
        _find_holders(view.state, job.model_id, version),
        job.policy_digest,
        demands=list_demands(parameters),
    )
    template = None if model is None or model.phase is not ModelState.LOADED else model.template
    if model is None or template is None or job.cause is not Cause.COPY:
        return request
    return _beside_copies(view, request, LoadedModel(model, template))


def _beside_copies(
    view: NodeView, request: PlacementRequest, loaded: LoadedModel, *, at_once: bool = True
) -> PlacementRequest:
    """Return the request of one more copy: at a node without one, best where it replaces an older load.

    At once it goes to no node where another load waits, which may evict it.
    """
    waits = view.waiting.items() if at_once else ()
    waiting = (node_id for node_id, models in waits if models != {loaded.id})
    node_ids = chain((each.server for each in list_ready(view.usable, loaded)), waiting)
    occupied = frozenset(node_id for node_id in node_ids if node_id is not None)
    usable = (each.server for each in loaded.model.servings if each.server in view.usable)
    older = (node_id for node_id in usable if node_id not in occupied)
    return replace(request, home=next(older, None), occupied=occupied)


def list_ready(usable: AbstractSet[str], loaded: LoadedModel) -> list[Serving]:
    """Return the valid copies, the oldest first: loaded as requested, with all workers, at usable nodes."""
    first = loaded.serving
    found = [each for each in loaded.model.servings if each.at in usable]
    return [each for each in found if each is first or (each.degraded_at is None and each.is_copy_of(first))]


def find_usable(state: State, untrusted: AbstractSet[str]) -> frozenset[str]:
    """Return the names of the nodes that take loads, but for untrusted ones."""
    return frozenset(node.id for node in state.registers.nodes.values() if node.takes_loads) - untrusted


def _find_holders(state: State, model_id: str, version: int) -> tuple[str, ...]:
    return state.registers.find_versions(model_id).find_holders(version).servers


def _find_digests(model: Model | None, held: Serving | None, version: int) -> frozenset[str]:
    """Return the hashes of a version's files: those loaded now, else those loaded last."""
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
        chosen = place(build_request(view, job), rooms)
        if chosen is not None:
            yield job, chosen


def draft_placement(view: NodeView, job: Job, chosen: ChosenNode) -> RecordFact:
    node = chosen.node
    data = LoadPlaced(node.id, node.epoch, chosen.reason, _list_files(view, job))
    return RecordFact(job, data, (NodeUnchanged(node),))


def _has_no_node(job: Job, own: Node) -> bool:
    return job.kind is JobKind.LOAD and job.status is JobStatus.PENDING and job.server != own.id


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
    if job.kind is not JobKind.LOAD or job.status is not JobStatus.PENDING or job.server != view.node.id:
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
    able = (each for each in view.rooms if can_run(request, each.node))
    digests = (find_digest(each.policy, job.model_id) for each in able)  # lazy: the first is the one, mostly
    if next(digests, request.policy) != request.policy and request.policy not in digests:
        return f"{POLICY_DIFFERS}: a node with the rules by which it was accepted, {request.policy or 'none'}"
    return f"a node that takes loads{_describe_demands(request, job.version)}"


def _describe_demands(request: PlacementRequest, version: int | None) -> str:
    """Return the demands of a load on its node, as the end of a text."""
    attributes, holders = ", ".join(sorted(request.attributes)), ", ".join(request.holders)
    where = f", of {holders}, where version {version} was added" if holders else ""
    others = "".join(each.describe() for each in request.demands)
    return (f" and has the attributes {attributes}" if attributes else "") + others + where


def _request_of(
    state: State, loaded: LoadedModel, occupied: frozenset[str] = frozenset()
) -> PlacementRequest:
    """Return the request of a further load like the serving one."""
    model, serving = loaded.model, loaded.serving
    return PlacementRequest(
        model.id,
        _estimate_from_footprints(model, serving.version, serving.parameters.instances),
        _find_digests(model, serving, serving.version),
        frozenset(serving.parameters.node_attributes or ()),
        holders=_find_holders(state, model.id, serving.version),
        occupied=occupied,
        demands=list_demands(serving.parameters),
    )


def _list_able(state: State, untrusted: AbstractSet[str], request: PlacementRequest) -> list[str]:
    nodes = (node for node in state.registers.nodes.values() if node.id not in untrusted)
    return sorted(node.id for node in nodes if can_run(request, node))


def explain_lack(state: State, untrusted: AbstractSet[str], loaded: LoadedModel, ready: list[Serving]) -> str:
    """Return the reason that a further copy of a model waits: for a node, or for room at a node."""
    request = _request_of(state, loaded, frozenset(each.server or "" for each in ready))
    if able := _list_able(state, untrusted, request):
        return f"room at {' or '.join(able)}"
    return f"a further node that takes loads{_describe_demands(request, loaded.serving.version)}"


def find_reload_rules(
    state: State, node_id: str, untrusted: AbstractSet[str], loaded: LoadedModel
) -> str | None:
    """Return the digest of the rules by which a node requests a reload, so that some node has them.

    These are its own, if a node that is able to run the load has them; else those of the first one that is,
    which checks the load by them. Without such a node they are its own.
    """
    able = _list_able(state, untrusted, _request_of(state, loaded))
    policies = (state.registers.find_policy(each) for each in (node_id, *able))
    own, *others = (find_digest(policy, loaded.id) for policy in policies)
    return own if own in others or not others else others[0]


def _list_files(view: NodeView, job: Job) -> tuple[FileHash, ...]:
    """Return the files that a reload needs again; any other load takes those of the repository."""
    model = view.recorded.models.get(job.model_id)
    before = None if job.cause not in RELOADS or model is None else model.find_reloadable(job.version)
    return () if before is None else tuple(FileHash(file.path, file.sha256) for file in before.files)


def find_node_for_model(
    view: NodeView, loaded: LoadedModel, *, is_copy: bool = False, at_once: bool = True
) -> ChosenNode | None:
    """Return the node to which a model would move, or that would get a copy; None if there is none.

    Its budget is enough, and at once a copy fits beside what is loaded. It goes to a node with other rules
    only if the ledger knows what its files have passed.
    """
    policy = find_reload_rules(view.state, view.node.id, view.untrusted, loaded)
    own = find_digest(view.state.registers.find_policy(view.node.id), loaded.id)
    if policy != own and not (loaded.serving.earlier or loaded.serving.evidence):
        return None
    request = replace(_request_of(view.state, loaded), policy=policy)
    need_bytes = request.need_bytes
    rooms = [each for each in view.rooms if each.can_ever_fit(need_bytes)]
    if is_copy:
        request = _beside_copies(view, request, loaded, at_once=at_once)
        home = request.home
        rooms = [each for each in rooms if not at_once or each.fits(need_bytes) or each.node.id == home]
    return place(request, rooms)


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
    chosen = place(request, fitting)
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
    models = (model.view_at(node_id) for model in state.models.values() if model.serving is not None)
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
        if target is not None and target.server in present:
            return target.server
        if (node_id := _node_of_model(model, present)) is not None:
            return node_id
    return job.server if job.server in present else None


def _node_of_model(model: Model, present: AbstractSet[str]) -> str | None:
    node_id = model.serving.server if model.serving is not None else None
    return node_id if node_id in present else None
