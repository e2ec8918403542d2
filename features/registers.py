"""The registers of the features, which `events.registers` folds with its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from events.presence import Transition
from events.types import Event
from features.nodes.facts import OF_NODES
from features.nodes.register import Node, describe_node, evolve_nodes, list_node_transitions

FeatureEntry = Node

ENTRIES_OF_FEATURES: Mapping[str, type[FeatureEntry]] = {"nodes": Node}
"""The entries of each register; its name is that of its table."""

describe_server = describe_node
"""Names one of several servers in a sentence."""


@dataclass(slots=True, kw_only=True)
class FeatureRegisters:
    """The registers of the features.

    Attributes:
        nodes: the servers that share the ledger, by their names; a map is never changed.
    """

    nodes: Mapping[str, Node] = field(default_factory=dict)

    def evolve_features(
        self, event: Event, read_owners: Callable[[], Collection[str]]
    ) -> tuple[Mapping[str, Mapping[str, FeatureEntry | None]], Sequence[Transition]]:
        """Fold an event, and return the entries that changed, None for those that are forgotten.

        `read_owners` returns the servers that own a model or a job.
        """
        data, before = event.data, self.nodes
        if not isinstance(data, OF_NODES):
            return {}, ()
        changed = evolve_nodes(before, event, data, read_owners)
        left = {**before, **changed}
        self.nodes = {key: node for key, node in left.items() if node is not None}
        return {"nodes": changed}, list_node_transitions(event, data, before, changed)
