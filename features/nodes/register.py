"""The fold of nodes, the servers that share one ledger. An embedded ledger has none.

A node's epoch is one membership of it: from `NodeJoined` to `NodeLeft` or `NodeLost`. Facts of an epoch that
is over are refused. `find_placer` names the node that does the work that belongs to no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from events.clock import Timestamp, add_seconds
from events.presence import SERVER, ServerState, Transition
from events.types import Event
from features.nodes.facts import (
    NodeData,
    NodeDraining,
    NodeJoined,
    NodeLeft,
    NodeLost,
    NodeState,
    join_statement,
)

KEY_DIGITS = 32
"""Of the hash of a node's key in the name of an epoch: no two nodes that share a repository have the same."""

KEPT_S = 30 * 86_400
"""A node is remembered for a month after its end, so that operators can find a missing one."""


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
        epoch: the number of its latest membership.
        position: the position of its latest event.
        joined_at: when this epoch began.
        ended_at: when it ended, or None.
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
        """The statement that the signature of its join signs."""
        return join_statement(self.id, self.epoch, self.address, self.public_key, self.after)

    @property
    def key_digest(self) -> str:
        return hashlib.sha256((self.public_key or "").encode()).hexdigest()[:KEY_DIGITS]

    @property
    def epoch_name(self) -> str:
        """The name of its present epoch, or of its last one; a server of another key never has it."""
        return f"{self.key_digest}-{self.epoch}"

    @property
    def is_present(self) -> bool:
        """Whether its epoch has not ended: it may append facts."""
        return self.phase in (NodePhase.JOINED, NodePhase.DRAINING)

    @property
    def takes_loads(self) -> bool:
        return self.phase is NodePhase.JOINED


def evolve_nodes(
    nodes: Mapping[str, Node], event: Event, data: NodeData, read_owners: Callable[[], Collection[str]]
) -> Mapping[str, Node | None]:
    """Return the nodes that an event changed; None for those that are forgotten at a join.

    Args:
        nodes: those before.
        event: about a node.
        data: the event's data.
        read_owners: returns the nodes that own a model or a job.
    """
    before, now = nodes.get(data.node_id), event.recorded_at
    after = _evolve_node(before, event, data)
    if after is None or after is before:
        return {}
    changed: dict[str, Node | None] = {after.id: after}
    if isinstance(data, NodeJoined):
        until = add_seconds(now, -KEPT_S)
        long_ended = {each.id for each in nodes.values() if each.ended_at and each.ended_at < until}
        changed |= dict.fromkeys((long_ended - {after.id}).difference(read_owners() if long_ended else ()))
    return changed


def _evolve_node(node: Node | None, event: Event, data: NodeData) -> Node | None:
    """Return a node after an event about it; an event about another epoch changes nothing."""
    if isinstance(data, NodeJoined):
        return Node(
            data.node_id,
            data.epoch,
            NodePhase.JOINED,
            event.position,
            event.recorded_at,
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
    if isinstance(data, NodeDraining):
        return replace(node, phase=NodePhase.DRAINING, position=event.position)
    phase = NodePhase.LEFT if isinstance(data, NodeLeft) else NodePhase.LOST
    return replace(node, phase=phase, position=event.position, ended_at=event.recorded_at)


def describe_node(name: str) -> str:
    return f"the node {name!r}"


def list_node_transitions(
    event: Event, data: NodeData, before: Mapping[str, Node], changed: Mapping[str, Node | None]
) -> tuple[Transition, ...]:
    """Return the transitions of nodes at an event about one, and those of the server: any node is it.

    Args:
        event: about a node.
        data: the event's data.
        before: the nodes before it.
        changed: the nodes that it changed; None for forgotten ones.
    """
    position, at, after = event.position, event.recorded_at, changed.get(data.node_id)
    if after is None:
        return ()
    forgotten = [Transition(position, node_id, None, at) for node_id, node in changed.items() if node is None]
    old, was_there = before.get(after.id), any_present(before.values())
    is_there = any_present(node for node in {**before, **changed}.values() if node is not None)
    seen_at = none_since = None
    if isinstance(data, NodeLost):
        seen_at = data.last_renewed_at
    elif isinstance(data, NodeJoined):
        seen_at = data.last_seen_at if old is not None and old.is_present else None
        none_since = data.no_node_since if was_there else None
    of_node = Transition(position, after.id, NodeState(after.phase), at, seen_at)
    if is_there == was_there and none_since is None:
        return (*forgotten, of_node)
    state = ServerState.RUNNING if is_there else ServerState.STOPPED
    return (*forgotten, of_node, Transition(position, SERVER, state, at, none_since))


def is_epoch_over(nodes: Mapping[str, Node], name: str) -> bool:
    """Whether this names an epoch of one of the nodes that is over: no event of it can come any more."""
    key, _, number = name.rpartition("-")
    node = next((each for each in nodes.values() if each.key_digest == key), None)
    if node is None or not number.isdecimal():
        return False
    return int(number) < node.epoch or (int(number) == node.epoch and not node.is_present)


def any_present(nodes: Iterable[Node]) -> bool:
    return any(node.is_present for node in nodes)


def find_placer(nodes: Mapping[str, Node], untrusted: Collection[str] = ()) -> str | None:
    """Return the placer: the first present node by name, but `untrusted` ones; one that drains if all do.

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
        hints: its last hints, as JSON.
        instance: the process that joined.
    """

    node_id: str
    epoch: int
    ended: bool
    is_late: bool
    renewed_at: Timestamp
    hints: str
    instance: str = ""
