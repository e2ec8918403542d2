"""The facts about nodes, the servers that share one ledger; like those of `events.types`, for ever."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from events.clock import Timestamp
from events.values import Confinement, FileHash, ProcessEnd

STORED_NAMES = {
    **dict.fromkeys(("at", "server"), "node_id"),
    "servers": "node_ids",
    "server_signature": "node_signature",
}
"""What JSON calls the name of a server that shares a ledger, where a load, a job or a version is; and what it
signed. They are not there at a server alone."""


class NodeState(StrEnum):
    """The state of a node: its phase, or `unknown` from when it was last seen to its end."""

    JOINED = "joined"
    DRAINING = "draining"
    LEFT = "left"
    LOST = "lost"
    UNKNOWN = "unknown"


PRESENT = (NodeState.JOINED, NodeState.DRAINING)


class NodeParameters:
    """Parameters of a load at nodes.

    Attributes:
        node_attributes: attributes that its node must have, in order; not stored without any.
        copies: at how many nodes the model is to be loaded; not stored where none is named, which is 1.
    """

    __slots__ = ()
    node_attributes: tuple[str, ...] | UnsetType
    copies: int | UnsetType

    @property
    def wanted_copies(self) -> int:
        """At how many nodes the model is to be loaded."""
        return self.copies or 1


SETTINGS = ("copies",)
"""Those of them that change without new workers."""


class FactAtNode(Struct, frozen=True, gc=False, kw_only=True, rename=STORED_NAMES):
    """A fact about a load, a worker or a policy at one node, or a version in the node's own repository.

    It names the node; a ledger of one server has none, and neither has a version that all share.
    """

    server: str | UnsetType = UNSET


class NodeSignature(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """The signature of a fact by the key of a node, which its join names.

    Attributes:
        node_id: the node.
        signature: of the fact's statement, in base64.
    """

    server: str
    signature: str


class SignedFact(Struct, frozen=True, gc=False, kw_only=True, rename=STORED_NAMES):
    """A fact about what a person said, signed by the node that has seen the person's role."""

    server_signature: NodeSignature | UnsetType = UNSET


class NodeJoined(Struct, frozen=True, gc=False):
    """A node joined: it takes loads from here on. This ends its epoch before, if nothing else did.

    Attributes:
        epoch: the number of this membership of the node, from 1.
        address: the URL at which the other nodes reach it.
        attributes: `name=value` each, in the order of their names; loads may require some.
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
    attributes: tuple[str, ...]
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
    def end(self) -> ProcessEnd:
        """The end of its epoch before; what runs at a server alone, as before there were nodes, ends, too."""
        return ProcessEnd((self.node_id, None), self.no_node_since, self.unclean)

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

    @property
    def end(self) -> ProcessEnd:
        return ProcessEnd((self.node_id,))


class NodeLost(Struct, frozen=True, gc=False):
    """A node did not renew its lease: its epoch is over, and its models are loaded at other nodes.

    `last_renewed_at` is when it renewed the lease last.
    """

    TYPE: ClassVar[str] = "NodeLost"
    node_id: str
    epoch: int
    last_renewed_at: Timestamp

    @property
    def end(self) -> ProcessEnd:
        return ProcessEnd((self.node_id,), is_death=True)


class LoadPlaced(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """The load runs at this node, unless it is placed anew before it has started.

    Attributes:
        node_epoch: of the node.
        reason: `serves` if the model is or was loaded there, `files` if the node has the files, `room` if it
            has the memory, `queue` if the load has to wait there, as at any other node.
        files: that a reload needs; empty for a load of what the repository has.
    """

    TYPE: ClassVar[str] = "LoadPlaced"
    server: str
    node_epoch: int
    reason: str
    files: tuple[FileHash, ...] = ()


NodeData = NodeJoined | NodeDraining | NodeLeft | NodeLost
"""Data of the events that change a node."""

OF_NODES = (NodeJoined, NodeDraining, NodeLeft, NodeLost)

ENDS_OF_NODES = (NodeJoined, NodeLeft, NodeLost)
"""The events that end the processes of a node, and so concern all of its models and jobs."""
