"""The metrics of several servers: the nodes by phase, and the copies of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from answers.nodes import NodeInfo
from events.history import describe_model
from events.state import State
from features.nodes.register import NodePhase

Gauge = tuple[str, str, Mapping[Any, float], str]
"""Name, text, values, and labels of a metric."""


def list_gauges(nodes: Sequence[NodeInfo], state: State, name_of: Callable[[str], str]) -> Sequence[Gauge]:
    """Return the metrics of nodes and copies; a server alone has no values."""
    phases = Counter(node.phase for node in nodes)
    by_phase = {phase.value: phases[phase.value] for phase in NodePhase} if phases else {}
    own = {(node.id, node.release): 1 for node in nodes if node.this}
    late = {node.id: float(node.late) for node in nodes if node.late is not None}
    return (
        (
            "model_copies",
            "Copies of a model that is to have several: wanted, and ready, as each node sees it.",
            count_copies(state, name_of),
            "model state",
        ),
        ("node_info", "1 for this node; none if the server is alone.", own, "node release"),
        ("nodes", "Nodes that ever joined, by phase; none if the server is alone.", by_phase, "phase"),
        ("node_late", "1 if a node that is there did not renew its lease in time, else 0.", late, "node"),
    )


def count_copies(state: State, name_of: Callable[[str], str]) -> Counter[tuple[str, str]]:
    """Return how many copies are wanted and ready of each model that is to have several, by its label."""
    counts = Counter[tuple[str, str]]()
    for model in state.models.values():
        if model.serving is not None and model.serving.parameters.wanted_copies > 1:
            name = name_of(model.id)
            counts[name, "wanted"] += model.serving.parameters.wanted_copies
            counts[name, "ready"] += describe_model(state, model.id).count_ready()
    return counts
