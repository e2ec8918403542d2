"""The facts of the features, which `events.types` lists with its own."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.devices.facts import STORED_NAMES as STORED_NAMES_OF_TARGETS
from features.devices.facts import DeviceParameters, DeviceUse
from features.labels.facts import STORED_NAMES as STORED_NAMES_OF_LOADS
from features.labels.facts import LabelRemoved, LabelSet
from features.nodes.facts import (
    ENDS_OF_NODES,
    OF_NODES,
    FactAtNode,
    LoadPlaced,
    NodeData,
    NodeParameters,
    NodeSignature,
    SignedFact,
)
from features.nodes.facts import SETTINGS as SETTINGS_OF_FEATURES

FeatureData = NodeData | LoadPlaced | LabelSet | LabelRemoved | VersionApproved | ApprovalWithdrawn

OF_SERVERS = OF_NODES
"""The events about servers that share a ledger."""

ENDS_OF_SERVERS = ENDS_OF_NODES
"""Those of them that end the processes of a server: each has an `end`."""

PLACEMENTS = (LoadPlaced,)
"""The events that say at which server a job runs: each has a `server`."""


class ParametersOfFeatures(NodeParameters, DeviceParameters, frozen=True, gc=False, kw_only=True):
    """Those of a load."""

    node_attributes: tuple[str, ...] | UnsetType = UNSET
    copies: int | UnsetType = UNSET


FactAtServer = FactAtNode
"""A fact about what is at one server: it has a `server`."""

ServerSignature = NodeSignature
"""What a server signed a fact with."""

TargetUse = DeviceUse
"""What runs on one target of a load: on its `target`, with `memory_bytes` beside the machine's."""

__all__ = ["SETTINGS_OF_FEATURES", "STORED_NAMES_OF_LOADS", "STORED_NAMES_OF_TARGETS", "SignedFact"]
