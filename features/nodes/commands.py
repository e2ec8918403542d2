"""Commands about nodes, and the decisions on them; what has to hold of a node when a command is decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from events.clock import Timestamp
from events.commands import (
    REFUSED_AS_OUTDATED,
    Accepted,
    Command,
    Condition,
    Decision,
    DecisionInput,
    Existing,
    Refused,
)
from events.state import State
from events.types import SYSTEM, Draft
from events.values import Confinement
from features.nodes.facts import NodeDraining, NodeJoined, NodeLeft, NodeLost
from features.nodes.register import Node, NodePhase


class NodeCurrent(Condition, frozen=True, gc=False):
    """This epoch of the node has not ended: nothing is appended by a node that was lost."""

    node_id: str
    epoch: int

    def holds(self, state: State) -> bool:
        return _is_present(state, self.node_id, self.epoch)


class NodeUnchanged(Condition, frozen=True, gc=False):
    """No event changed this node: it has not left, and is not being drained since then."""

    node: Node

    def holds(self, state: State) -> bool:
        return state.registers.nodes.get(self.node.id) == self.node


@dataclass(frozen=True, slots=True)
class JoinNode(Command):
    """Begin the next epoch of a node, and end the one before if that has not ended.

    The epoch is in the state then: the node there has the position of the receipt, unless another process
    joined as the same node since. The attributes are those of `NodeJoined`, what signs its statement with a
    key that the nodes share, and the epoch in the node's lease: the state may have forgotten it.
    """

    node_id: str
    address: str
    attributes: tuple[str, ...] = ()
    budget_bytes: int | None = None
    release: str = ""
    public_key: str | None = None
    last_seen_at: Timestamp | None = None
    no_node_since: Timestamp | None = None
    confinement: Confinement | None = None
    instance: str = ""
    sign: Callable[[bytes], str] | None = None
    last_epoch: int = 0

    def decide(self, at: DecisionInput) -> Decision:
        """Join. An event is proof that a server was there when it was recorded."""
        before, since = at.state.registers.nodes.get(self.node_id), self.no_node_since
        joined = NodeJoined(
            self.node_id,
            max(0 if before is None else before.epoch, self.last_epoch) + 1,
            self.address,
            self.attributes,
            self.budget_bytes,
            self.release,
            self.public_key,
            unclean=before is not None and before.phase is not NodePhase.LEFT,
            last_seen_at=self.last_seen_at,
            no_node_since=None if since is None else min(at.now, max(since, at.state.recorded_at)),
            confinement=self.confinement,
            instance=self.instance,
        )
        if self.sign is not None:
            joined = replace(joined, after=at.previous.hex())
            joined = replace(joined, signature=self.sign(joined.statement))
        return Accepted((Draft(at.new_id(), joined, SYSTEM),))


@dataclass(frozen=True, slots=True)
class DrainNode(Command):
    """Drain a node: its models move to other nodes, and it takes no more loads."""

    node_id: str
    actor: str

    def decide(self, at: DecisionInput) -> Decision:
        node = at.state.registers.nodes.get(self.node_id)
        if node is None:
            return Refused("unknown_node", f"no node {self.node_id[:64]!r} ever joined this ledger")
        if not node.is_present:
            end = "left" if node.phase is NodePhase.LEFT else "was lost"
            return Refused("node_ended", f"node {node.id!r} {end} at {node.ended_at}, so nothing is to drain")
        if node.phase is NodePhase.DRAINING:
            return Existing(None)
        return Accepted((Draft(at.new_id(), NodeDraining(node.id, node.epoch), self.actor),))


@dataclass(frozen=True, slots=True)
class EndNode(Command):
    """End an epoch of a node: in order, when its workers have ended, or since it did not renew its lease."""

    ended: NodeLeft | NodeLost

    def decide(self, at: DecisionInput) -> Decision:
        if not _is_present(at.state, self.ended.node_id, self.ended.epoch):
            return REFUSED_AS_OUTDATED
        return Accepted((Draft(at.new_id(), self.ended, SYSTEM),))


def _is_present(state: State, node_id: str, epoch: int) -> bool:
    """Whether this epoch of a node has not ended: it ends once."""
    node = state.registers.nodes.get(node_id)
    return node is not None and node.is_present and node.epoch == epoch
