"""Work that one node does for all: which one, and what the others know of it. Pure.

A node says in its hints which duties it has, each with what the next node has to know of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from features.nodes.register import Node
from nodes.placement import NodeHints


def find_node(
    duty: str, nodes: Iterable[Node], hints: Mapping[str, NodeHints], away: Collection[str]
) -> str | None:
    """Return the node that does the work of a duty: of those that have it, the one that joined first.

    A node that has not described itself yet counts as one that has it: for a moment nobody does the work,
    rather than two.

    Args:
        duty: its name.
        nodes: as the ledger has them.
        hints: of all nodes, as last read.
        away: nodes that do no work, as untrusted ones. A late one may renew its lease, and keeps its duties
            until it is declared lost.
    """
    present = [node for node in nodes if node.is_present and node.id not in away]
    for node in sorted(present, key=lambda node: (node.joined_at, node.id)):
        hint = hints.get(node.id)
        if hint is None or not hint.position or duty in hint.duties:
            return node.id
    return None
