"""Nodes, the servers that share one ledger: their events, and their fold. An embedded ledger has none.

A node's epoch is one membership of it: from `NodeJoined` to `NodeLeft` or `NodeLost`. Facts of an epoch that
is over are refused. `find_placer` names the node that does the work that belongs to no other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import ClassVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from events.clock import Timestamp, add_seconds


class Confinement(Struct, frozen=True, gc=False):
    """Confinement of the workers, as a throw-away worker found it at the start of the server.

    Attributes:
        mode: `auto`, `require` or `off`, as set.
        landlock_abi: the version of Landlock that restricts files; 0 if nothing does.
        seccomp: whether a filter restricts system calls.
        not_prevented: the forbidden things that a worker could do: `read_files`, `write_files`,
            `use_network`, `start_processes`, `read_memory` (of the fork server).
    """

    mode: str
    landlock_abi: int
    seccomp: bool
    not_prevented: tuple[str, ...]


class NodeJoined(Struct, frozen=True, gc=False):
    """A node joined: it takes loads from here on. This ends its epoch before, if nothing else did.

    Attributes:
        epoch: the number of this membership of the node, from 1.
        address: the URL at which the other nodes reach it.
        labels: `name=value` each, in the order of their names; loads may require some.
        budget_bytes: memory budget of its workers; None is no limit.
        release: of its software.
        public_key: with which it signs; None without a key.
        unclean: whether its epoch before did not end with `NodeLeft`.
        last_seen_at: when it renewed its lease last in the epoch before; None in its first.
        no_node_since: since when no node was there; None if another one was. Jobs are not charged for the
            time since.
        confinement: of its workers.
        instance: id of the process that joined, random, so that two servers with one name are told apart.
        after: hash of the event before this one, in hexadecimal; None without a signature.
        signature: of `join_statement`, in base64, by a key that the nodes share.
    """

    TYPE: ClassVar[str] = "NodeJoined"
    node_id: str
    epoch: int
    address: str
    labels: tuple[str, ...]
    budget_bytes: int | None
    release: str
    public_key: str | None
    unclean: bool
    last_seen_at: Timestamp | None = None
    no_node_since: Timestamp | None = None
    confinement: Confinement | None = None
    instance: str = ""
    after: str | None = None
    signature: str | None = None

    @property
    def statement(self) -> bytes:
        return join_statement(self.node_id, self.epoch, self.address, self.public_key, self.after)


def join_statement(
    node_id: str, epoch: int, address: str, public_key: str | None, after: str | None
) -> bytes:
    """Return the bytes that a node signs when it joins: a JSON array of text and one number, in UTF-8.

    The hash before stands for the ledger with all its events, and the database appends a join after no other
    event: who reads a signature in the log cannot use it again.
    """
    return msgspec.json.encode(("loadledger-join-v1", node_id, epoch, address, public_key, after))


class NodeDraining(Struct, frozen=True, gc=False):
    """The actor drains a node: it takes no more loads, and its models are loaded at other nodes."""

    TYPE: ClassVar[str] = "NodeDraining"
    node_id: str
    epoch: int


class NodeLeft(Struct, frozen=True, gc=False):
    """A node stopped in order. No event per model follows: this ends its loads and workers."""

    TYPE: ClassVar[str] = "NodeLeft"
    node_id: str
    epoch: int


class NodeLost(Struct, frozen=True, gc=False):
    """A node did not renew its lease: its epoch is over, and its models are loaded at other nodes.

    `last_renewed_at` is when it renewed the lease last.
    """

    TYPE: ClassVar[str] = "NodeLost"
    node_id: str
    epoch: int
    last_renewed_at: Timestamp


class FileHash(Struct, frozen=True, gc=False):
    """A file of a version and its SHA-256 in hexadecimal; `path` is relative to the version's folder."""

    path: str
    sha256: str


class LoadPlaced(Struct, frozen=True, gc=False):
    """The load runs at this node, unless it is placed anew before it has started.

    Attributes:
        node_epoch: of the node.
        reason: `serves` if the model is or was loaded there, `prepared` if the node has a prepared form of
            the files, `files` if it has the files, `room` if it has the memory, `queue` if the load has to
            wait there, as at any other node.
        files: that a reload needs; empty for a load of what the repository has.
    """

    TYPE: ClassVar[str] = "LoadPlaced"
    node_id: str
    node_epoch: int
    reason: str
    files: tuple[FileHash, ...] = ()


NodeData = NodeJoined | NodeDraining | NodeLeft | NodeLost
"""Data of the events that change a node."""

OF_NODES = (NodeJoined, NodeDraining, NodeLeft, NodeLost)

ENDS_OF_NODES = (NodeJoined, NodeLeft, NodeLost)
"""The events that end the processes of a node, and so concern all of its models and jobs."""


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
    labels: tuple[str, ...]
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
            data.labels,
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
    nodes: Mapping[str, Node],
    data: NodeData,
    *,
    position: int,
    recorded_at: Timestamp,
    read_owners: Callable[[], Collection[str]],
) -> Mapping[str, Node | None]:
    """Return the nodes that an event changed; None for those that are forgotten, when another one joins.

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
    """Return the node that does what belongs to no node: the lowest one, of those that drain only at last.

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
