"""The facts of the features, which `events.types` lists with its own."""

from __future__ import annotations

from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.devices.facts import STORED_NAMES as STORED_NAMES_OF_TARGETS
from features.devices.facts import DeviceParameters, DeviceUse
from features.labels.facts import LabelRemoved, LabelSet
from features.nodes.facts import ENDS_OF_NODES, OF_NODES, LoadPlaced, NodeData

FeatureData = NodeData | LoadPlaced | LabelSet | LabelRemoved | VersionApproved | ApprovalWithdrawn

OF_SERVERS = OF_NODES
"""The events about servers that share a ledger."""

ENDS_OF_SERVERS = ENDS_OF_NODES
"""Those of them that end the processes of a server: each has an `end`."""

PLACEMENTS = (LoadPlaced,)
"""The events that say at which server a job runs: each has a `server`."""

ParametersOfFeatures = DeviceParameters
"""Those of a load."""

TargetUse = DeviceUse
"""What runs on one target of a load: on its `target`, with `memory_bytes` beside the machine's."""

__all__ = ["STORED_NAMES_OF_TARGETS"]
