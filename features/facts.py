"""The facts of the features, which `events.types` lists with its own."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.devices import facts as devices
from features.devices.facts import DeviceParameters, DeviceUse
from features.labels import facts as labels
from features.labels.facts import LabelRemoved, LabelSet
from features.nodes import facts as nodes
from features.nodes.facts import (
    ENDS_OF_NODES,
    OF_NODES,
    FactAtNode,
    LoadPlaced,
    NodeData,
    NodeParameters,
    NodeSignature,
    NodeState,
    SignedFact,
)

STORED_NAMES = {**nodes.STORED_NAMES, **devices.STORED_NAMES, **labels.STORED_NAMES}
"""What JSON calls the members of facts and folds that features have named there."""

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


SETTINGS_OF_FEATURES = nodes.SETTINGS
"""Those of them that change without new workers."""

FactAtServer = FactAtNode
"""A fact about what is at one server: it has a `server`."""

ServerSignature = NodeSignature
"""What a server signed a fact with."""

SharingState = NodeState
PRESENT_SHARING = nodes.PRESENT
"""The states of one of several servers that share a ledger, and those in which it is there."""

TargetUse = DeviceUse
"""What runs on one target of a load: on its `target`, with `memory_bytes` beside the machine's."""

__all__ = ["SignedFact"]
