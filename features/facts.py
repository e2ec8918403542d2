"""The facts of the features, which `events.types` lists with its own."""

from __future__ import annotations

from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.labels.facts import LabelRemoved, LabelSet
from features.nodes.facts import ENDS_OF_NODES, OF_NODES, LoadPlaced, NodeData

FeatureData = NodeData | LoadPlaced | LabelSet | LabelRemoved | VersionApproved | ApprovalWithdrawn

OF_SERVERS = OF_NODES
"""The events about servers that share a ledger."""

ENDS_OF_SERVERS = ENDS_OF_NODES
"""Those of them that end the processes of a server: each has an `end`."""

PLACEMENTS = (LoadPlaced,)
"""The events that say at which server a job runs: each has a `server`."""
