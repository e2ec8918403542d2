"""The facts of the features, which `events.types` lists with its own."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.devices import facts as devices
from features.labels import facts as labels
from features.nodes import facts as nodes

STORED_NAMES = {**nodes.STORED_NAMES, **devices.STORED_NAMES, **labels.STORED_NAMES}
"""What JSON calls the members of facts and folds that features have named there."""

FeatureData = (
    nodes.NodeData
    | nodes.LoadPlaced
    | labels.LabelSet
    | labels.LabelRemoved
    | VersionApproved
    | ApprovalWithdrawn
)

OF_SERVERS = nodes.OF_NODES
"""The events about servers that share a ledger."""

ENDS_OF_SERVERS = nodes.ENDS_OF_NODES
"""Those of them that end the processes of a server: each has an `end`."""

PLACEMENTS = (nodes.LoadPlaced,)
"""The events that say at which server a job runs: each has a `server`."""


class ParametersOfFeatures(devices.DeviceParameters, frozen=True, gc=False, kw_only=True):
    """Those of a load.

    Attributes:
        node_attributes: attributes that its node must have, in order; not stored without any.
        copies: at how many nodes the model is to be loaded; not stored where none is named, which is 1.
    """

    node_attributes: tuple[str, ...] | UnsetType = UNSET
    copies: int | UnsetType = UNSET


SETTINGS_OF_FEATURES = nodes.SETTINGS
"""Those of them that change without new workers."""

FactAtServer = nodes.FactAtNode
"""A fact about what is at one server: it has a `server`."""

ServerSignature = nodes.NodeSignature
SignedFact = nodes.SignedFact
"""What a server signed a fact with, and a fact that has it."""

SharingState = nodes.NodeState
PRESENT_SHARING = nodes.PRESENT
"""The states of one of several servers that share a ledger, and those in which it is there."""

TargetUse = devices.DeviceUse
"""What runs on one target of a load: on its `target`, with `memory_bytes` beside the machine's."""
