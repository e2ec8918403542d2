"""The metrics of several servers: the nodes by phase, and the copies of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import Metric

from events.history import describe_model
from events.state import State
from features.nodes.register import NodePhase
from server.cluster import Cluster
from server.observability.families import gauge


def take_snapshot(cluster: Cluster) -> Callable[[], Iterator[Metric]]:
    nodes, copies = cluster.describe(), count_copies(cluster.log.state, cluster.log.tally.names.of)
    own = [(node.id, node.release) for node in nodes if node.this]
    phases = Counter(node.phase for node in nodes)
    late = {node.id: float(node.late) for node in nodes if node.late is not None}

    def families() -> Iterator[Metric]:
        yield gauge(
            "model_copies",
            "Copies of a model that is to have several: wanted, and ready, as each node sees it.",
            copies,
            "model state",
        )
        yield gauge(
            "node_info",
            "1 for this node; none if the server is alone.",
            dict.fromkeys(own, 1),
            "node release",
        )
        yield gauge(
            "nodes",
            "Nodes that ever joined, by phase; none if the server is alone.",
            {phase.value: phases[phase.value] for phase in NodePhase} if phases else {},
            "phase",
        )
        yield gauge(
            "node_late", "1 if a node that is there did not renew its lease in time, else 0.", late, "node"
        )

    return families


def count_copies(state: State, name_of: Callable[[str], str]) -> Counter[tuple[str, str]]:
    """Return how many copies are wanted and ready of each model that is to have several, by its label."""
    counts = Counter[tuple[str, str]]()
    for model in state.models.values():
        if model.serving is not None and model.serving.parameters.wanted_copies > 1:
            name = name_of(model.id)
            counts[name, "wanted"] += model.serving.parameters.wanted_copies
            counts[name, "ready"] += describe_model(state, model.id).count_ready()
    return counts
