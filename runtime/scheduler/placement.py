"""Which node runs a load: the pure choice among the nodes that are there.

`place` prefers, in this order: the node where the model is loaded, nodes where the load fits without an
eviction, those with a prepared model of its files, those with its files; then it spreads or packs. Equal
nodes are ordered by a rendezvous hash, so that a model tends to the same node. What is known of memory and
files is a hint: a load that finds no room at its node is placed anew by that node, a few times.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from events.jobs import Job, JobKind, JobStatus
from events.models import RELOADS, Model, Serving
from events.nodes import Node
from events.types import FileHash
from runtime.scheduler.actions import PlaceLoad
from runtime.scheduler.view import NodeHints, PlacementStrategy, SchedulerView

MAX_PLACEMENTS = 4
"""How often a load is placed until it stays where it is: hints may be wrong, but hardly more often."""


class PlacementReason(StrEnum):
    """The reason for a load's node: see `LoadPlaced`."""

    SERVES = "serves"
    PREPARED = "prepared"
    FILES = "files"
    ROOM = "room"
    QUEUE = "queue"


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """The demands of a load on its node.

    Attributes:
        model_id: of the load.
        need_bytes: of memory; None if it is unknown.
        files: SHA-256 of its files, as far as they are known.
        labels: that the node must have.
        home: the node where the model is or was loaded.
    """

    model_id: str
    need_bytes: int | None = None
    files: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    home: str | None = None


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """A node as the placement sees it.

    Attributes:
        node: as its events say.
        free_bytes: of its memory budget, less what was placed there since; None is no limit.
        free_models: how many more models it may have; None is no limit.
        models: that it has or will have.
        digests: SHA-256 of the files that it has.
        prepared: SHA-256 of the model files of which it has a prepared model.
    """

    node: Node
    free_bytes: int | None = None
    free_models: int | None = None
    models: int = 0
    digests: frozenset[str] = frozenset()
    prepared: frozenset[str] = frozenset()

    @property
    def free_percent(self) -> float:
        """Free memory in whole percents of the budget: hints are no more exact. Infinite without a budget."""
        budget = self.node.budget_bytes
        return round(100 * self.free_bytes / budget) if budget and self.free_bytes is not None else inf

    def fits(self, need_bytes: int | None) -> bool:
        has_slot = self.free_models is None or self.free_models > 0
        return has_slot and (self.free_bytes is None or (need_bytes or 0) <= self.free_bytes)

    def can_ever_fit(self, need_bytes: int | None) -> bool:
        """Whether a load fits if nothing else is loaded."""
        budget = self.node.budget_bytes
        return budget is None or need_bytes is None or need_bytes <= budget


@dataclass(frozen=True, slots=True)
class Placement:
    """The node that was chosen, and why."""

    node: Node
    reason: PlacementReason


def place(
    request: PlacementRequest,
    rooms: Iterable[NodeRoom],
    strategy: PlacementStrategy = PlacementStrategy.SPREAD,
) -> Placement | None:
    """Return the node for a load; None if there is none that takes loads and has the labels.

    A load that fits into no node's budget is placed all the same: the node says why it fails.
    """
    able = [each for each in rooms if each.node.takes_loads and request.labels <= set(each.node.labels)]
    able = [each for each in able if each.can_ever_fit(request.need_bytes)] or able
    home = next((each for each in able if each.node.id == request.home), None)
    if home is not None:
        return Placement(home.node, PlacementReason.SERVES)
    chosen = min(able, key=lambda each: _rank(request, each, strategy), default=None)
    return None if chosen is None else Placement(chosen.node, _explain(request, chosen))


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
    if not request.files or not request.files <= room.digests:
        return 0
    return 2 if request.files & room.prepared else 1


def _explain(request: PlacementRequest, room: NodeRoom) -> PlacementReason:
    if not room.fits(request.need_bytes):
        return PlacementReason.QUEUE
    return (PlacementReason.ROOM, PlacementReason.FILES, PlacementReason.PREPARED)[
        _count_at_hand(request, room)
    ]


def _hash(model_id: str, node_id: str) -> bytes:
    return hashlib.sha256(f"{model_id}\0{node_id}".encode(errors="surrogatepass")).digest()


def list_rooms(view: SchedulerView) -> list[NodeRoom]:
    """Return the trusted nodes that take loads, with what is known of them."""
    loads = defaultdict[str | None, list[Job]](list)
    for job in view.state.unended():
        if job.kind is JobKind.LOAD:
            loads[job.node_id].append(job)
    servings = defaultdict[str | None, dict[str, Serving]](dict)
    for model in view.state.models.values():
        if model.serving is not None:
            servings[model.serving.node_id][model.id] = model.serving
    takers = (node for node in view.state.nodes.values() if node.takes_loads)
    nodes = (node for node in takers if node.id not in view.observations.untrusted)
    return [_measure(view, node, loads[node.id], servings[node.id]) for node in nodes]


def _measure(view: SchedulerView, node: Node, loads: list[Job], servings: dict[str, Serving]) -> NodeRoom:
    """Return a node's room: what it said, less what was placed or loaded there since."""
    hints = view.observations.nodes.get(node.id) or NodeHints(0)
    free_bytes = (
        node.budget_bytes if hints.free_bytes is None else hints.free_bytes
    )  # it has said nothing yet
    since = [job for job in loads if job.status is JobStatus.PENDING or job.position > hints.position]
    new = {model_id: each for model_id, each in servings.items() if each.position > hints.position}
    taken = sum(estimate_need(view, job) or 0 for job in since)
    taken += sum(each.memory_bytes for each in new.values())
    slots = len(new.keys() | {job.model_id for job in since if job.model_id not in servings})
    return NodeRoom(
        node,
        None if free_bytes is None else free_bytes - taken,
        None if hints.free_models is None else hints.free_models - slots,
        len(servings.keys() | {job.model_id for job in loads}),
        hints.digests,
        hints.prepared,
    )


def estimate_need(view: SchedulerView, job: Job) -> int | None:
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


def build_request(view: SchedulerView, job: Job) -> PlacementRequest:
    version, parameters = job.load_order
    model = view.state.models.get(job.model_id)
    held = (model.serving or model.previous) if model is not None else None
    return PlacementRequest(
        job.model_id,
        estimate_need(view, job),
        _find_digests(model, held, version),
        frozenset(parameters.node_labels or ()),
        held.node_id if held is not None else None,
    )


def _find_digests(model: Model | None, held: Serving | None, version: int) -> frozenset[str]:
    """Return the hashes of the files of a version: those that are loaded, else those that were."""
    if held is not None and held.version == version:
        return frozenset(file.sha256 for file in held.files)
    latest = [each for each in model.footprints if each.version == version][-1:] if model is not None else []
    return frozenset(file.sha256 for each in latest for file in each.files)


def place_loads(view: SchedulerView) -> Iterator[PlaceLoad]:
    """Place the loads that have no node, if this is the placer, and those that leave it, since it drains."""
    loads = [
        job
        for job in view.unended
        if not job.cancelling and (is_unplaced(view, job) or _leaves_draining_node(view, job))
    ]
    rooms = list_rooms(view) if loads else []
    for job in loads:
        chosen = place(build_request(view, job), rooms, view.policy.placing)
        if chosen is not None:
            yield PlaceLoad(job, chosen.node, chosen.reason, _list_files(view, job))


def is_unplaced(view: SchedulerView, job: Job) -> bool:
    """Whether a load of this node is next in its queue and has no node."""
    is_waiting = job.kind is JobKind.LOAD and job.status is JobStatus.PENDING
    return is_waiting and not view.is_placed(job) and view.is_first_in_queue(job)


def _leaves_draining_node(view: SchedulerView, job: Job) -> bool:
    """Whether a load that has not started was placed at this node, which is being drained since."""
    is_waiting = job.kind is JobKind.LOAD and job.status is JobStatus.PENDING
    if view.node is None or view.node.takes_loads or not is_waiting or not job.placement:
        return False
    return view.is_first_in_queue(job) and job.placement.times < MAX_PLACEMENTS


def explain_unplaced(view: SchedulerView, job: Job) -> str:
    if job.id in view.observations.estimating:
        return "the estimate of its memory"
    _, parameters = job.load_order
    labels = ", ".join(parameters.node_labels or ())
    return "a node that takes loads" + (f" and has the labels {labels}" if labels else "")


def _list_files(view: SchedulerView, job: Job) -> tuple[FileHash, ...]:
    """Return the files that a reload needs again; any other load takes what the repository has."""
    model = view.state.models.get(job.model_id)
    serving = model.serving if model is not None else None
    if serving is None or job.cause not in RELOADS or serving.version != job.version:
        return ()
    return tuple(FileHash(file.path, file.sha256) for file in serving.files)


def find_node_for_model(view: SchedulerView, model: Model, serving: Serving) -> Placement | None:
    """Return the node to which a model of this one would move; None if it fits into no budget."""
    need_bytes = _estimate_from_footprints(model, serving.version, serving.parameters.instances)
    request = PlacementRequest(
        model.id,
        need_bytes,
        _find_digests(model, serving, serving.version),
        frozenset(serving.parameters.node_labels or ()),
    )
    rooms = [each for each in list_rooms(view) if each.can_ever_fit(need_bytes)]
    return place(request, rooms, view.policy.placing)


def place_elsewhere(view: SchedulerView, job: Job, *, needs_budget_only: bool = False) -> PlaceLoad | None:
    """Return the placement of a load that finds no room at this node at one where it fits, if there is one.

    Args:
        view: of the node at which it is placed.
        job: which has not started.
        needs_budget_only: whether it fits where the budget is enough, since it is not here.
    """
    if view.policy.node_id is None or job.status is not JobStatus.PENDING or not job.placement:
        return None
    if job.placement.times >= MAX_PLACEMENTS:
        return None
    request, need_bytes = build_request(view, job), estimate_need(view, job)
    others = [each for each in list_rooms(view) if each.node.id != view.policy.node_id]
    fitting: Sequence[NodeRoom] = [each for each in others if each.can_ever_fit(need_bytes)]
    if not needs_budget_only:
        fitting = [each for each in fitting if each.fits(need_bytes)]
    chosen = place(request, fitting, view.policy.placing)
    return None if chosen is None else PlaceLoad(job, chosen.node, chosen.reason, _list_files(view, job))
