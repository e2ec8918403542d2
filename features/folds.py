"""The folds of features, beside the kernel's: of models, of their versions, and of registers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from events.presence import Transition
from events.types import Data, Event
from features.approvals import fold as approvals
from features.labels import fold as labels
from features.nodes import copies
from features.nodes.facts import OF_NODES
from features.nodes.register import Node, describe_node, evolve_nodes, list_node_transitions

Servings = copies.Servings
"""The loads that a model of `events.models` serves from."""


class FeaturesOfVersions(
    labels.LabelledVersions,
    approvals.ApprovedVersions,
    Struct,
    frozen=True,
    gc=False,
    kw_only=True,
    omit_defaults=True,
):
    """The members that features give `ModelVersions`."""

    labels: tuple[labels.Label, ...] = ()
    approvals: tuple[approvals.Approval, ...] = ()


STEPS_OF_FEATURES: Mapping[type[Data], Callable[[Any, Event, Any], Any]] = {**labels.STEPS, **approvals.STEPS}
"""By type of event: the next versions of a model."""

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
