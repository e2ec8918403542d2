"""The fold of nodes, the servers that share one ledger. An embedded ledger has none.

A node's epoch is one membership of it: from `NodeJoined` to `NodeLeft` or `NodeLost`. Facts of an epoch that
is over are refused. `find_placer` names the node that does the work that belongs to no other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from events.clock import Timestamp, add_seconds
from features.nodes.facts import NodeData, NodeDraining, NodeJoined, NodeLeft, NodeLost, join_statement

KEPT_S = 30 * 86_400
"""A node is remembered for a month after its end, so that an operator who misses it finds it."""


class NodePhase(StrEnum):
    """The phase of a node."""

    JOINED = "joined"
    DRAINING = "draining"
    LEFT = "left"
    LOST = "lost"


class Node(Struct, frozen=True, gc=False):
    """A node, as its events say.

    Attributes:
        id: its name.
        epoch: of its latest membership.
        position: of its latest event.
        joined_at: when this epoch began.
        ended_at: when it ended; None while it has not.
        after, signature: of its join, as `NodeJoined` has them.
    """

    id: str
    epoch: int
    phase: NodePhase
    position: int
    joined_at: Timestamp
    address: str
    attributes: tuple[str, ...]
    budget_bytes: int | None
    release: str
    public_key: str | None
    ended_at: Timestamp | None = None
    after: str | None = None
    signature: str | None = None

    @property
    def statement(self) -> bytes:
        """What the signature of its join is of."""
        return join_statement(self.id, self.epoch, self.address, self.public_key, self.after)

    @property
    def is_present(self) -> bool:
        """Whether its epoch has not ended: it may append facts."""
        return self.phase in (NodePhase.JOINED, NodePhase.DRAINING)

    @property
    def takes_loads(self) -> bool:
        return self.phase is NodePhase.JOINED


def evolve_node(node: Node | None, data: NodeData, *, position: int, recorded_at: Timestamp) -> Node | None:
    """Return a node after an event about it; what concerns another epoch changes nothing.

    Args:
        node: as it was before; None if there was no event about it.
        data: of the event.
        position: of the event.
        recorded_at: of the event.
    """
    if isinstance(data, NodeJoined):
        return Node(
            data.node_id,
            data.epoch,
            NodePhase.JOINED,
            position,
            recorded_at,
            data.address,
            data.attributes,
            data.budget_bytes,
            data.release,
            data.public_key,
            after=data.after,
            signature=data.signature,
        )
    if node is None or not node.is_present or node.epoch != data.epoch:
        return node
    match data:
        case NodeDraining():
            return replace(node, phase=NodePhase.DRAINING, position=position)
        case NodeLeft():
            return replace(node, phase=NodePhase.LEFT, position=position, ended_at=recorded_at)
        case NodeLost():
            return replace(node, phase=NodePhase.LOST, position=position, ended_at=recorded_at)


def evolve_nodes(
    nodes: dict[str, Node],
    data: NodeData,
    *,
    position: int,
    recorded_at: Timestamp,
    read_owners: Callable[[], Collection[str]],
) -> Mapping[str, Node | None]:
    """Fold an event into `nodes`, and return those that changed; None for those that are forgotten at a join.

    Args:
        nodes: those before.
        data: of the event.
        position: of the event.
        recorded_at: of the event.
        read_owners: returns the nodes that own a model or a job.
    """
    before = nodes.get(data.node_id)
    after = evolve_node(before, data, position=position, recorded_at=recorded_at)
    if after is None or after is before:
        return {}
    changed: dict[str, Node | None] = {after.id: after}
    if isinstance(data, NodeJoined):
        long_ended = {each.id for each in nodes.values() if is_forgotten(each.ended_at, recorded_at)}
        changed |= dict.fromkeys((long_ended - {after.id}).difference(read_owners() if long_ended else ()))
    for key, node in changed.items():
        if node is None:
            del nodes[key]
        else:
            nodes[key] = node
    return changed


def is_forgotten(ended_at: Timestamp | None, now: Timestamp) -> bool:
    return ended_at is not None and ended_at < add_seconds(now, -KEPT_S)


def ends_processes(data: object, node_id: str | None) -> bool:
    """Whether an event of a server or node ends the processes at a node; None is no node.

    A node ends its own alone. What is recorded as running at no node is of an embedded server that was there
    before: the first node that joins ends it.
    """
    match data:
        case NodeLeft(node_id=ended) | NodeLost(node_id=ended):
            return node_id == ended
        case NodeJoined(node_id=joined):
            return node_id is None or node_id == joined
    return True


def find_placer(nodes: Mapping[str, Node], untrusted: Collection[str] = ()) -> str | None:
    """Return the placer: the trusted, present node with the lowest name; one that drains only if all do.

    `untrusted` are nodes whose joins the nodes' keys have not signed: they do nothing.
    """
    present = [node for node in nodes.values() if node.is_present and node.id not in untrusted]
    takers = [node.id for node in present if node.takes_loads]
    return min(takers or [node.id for node in present], default=None)


class Lease(Struct, frozen=True, gc=False):
    """The lease of a node as the database has it, outside the log.

    Attributes:
        node_id: its name.
        epoch: its latest one.
        ended: whether that is over.
        is_late: whether it did not renew in time, by the database's clock.
        renewed_at: when it did last.
        hints: what it last said of itself, as JSON.
        instance: of the process that joined.
    """

    node_id: str
    epoch: int
    ended: bool
    is_late: bool
    renewed_at: Timestamp
    hints: str
    instance: str = ""
