"""The metrics of the features."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import Metric

from features.nodes import metrics as nodes
from server.cluster import Cluster

Snapshot = Callable[[Cluster], Callable[[], Iterator[Metric]]]
"""Takes all values that must be consistent; what it returns may run in a thread."""

SNAPSHOTS: tuple[Snapshot, ...] = (nodes.take_snapshot,)
