"""Registers: what is folded from events that concern no model, by id: issued tokens, nodes, and policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Never

from msgspec import Struct

from events.jobs import Job
from events.models import Model
from events.nodes import Node, evolve_nodes
from events.policy.rules import LoadPolicy
from events.presence import Transition, list_transitions
from events.tokens import Token, evolve_tokens
from events.types import OF_NODES, OF_TOKENS, Event, PolicyInForce


class RecordedPolicy(Struct, frozen=True, gc=False):
    """The policy for loads that is in force at a node; of a server alone the id is empty."""

    id: str
    policy: LoadPolicy


RegisterEntry = Token | Node | RecordedPolicy
RegisterMap = Mapping[str, Token] | Mapping[str, Node] | Mapping[str, RecordedPolicy]
RegisterChanges = Mapping[str, Mapping[str, RegisterEntry | None]]
"""The entries that changed, by the register's name and their ids; None for those that went."""

NOTHING: Mapping[str, Never] = MappingProxyType({})

OF_REGISTERS = frozenset({*OF_TOKENS, *OF_NODES, PolicyInForce})
"""The events that change a register."""


@dataclass(slots=True)
class Registers:
    """The registers of a state.

    Attributes:
        tokens: issued and revoked ones, by their ids; a map is changed in place, unless it is shared.
        nodes: the servers that share the ledger, by their names; a map is never changed.
        policies: in force at the nodes, by their names; a map is never changed.
        shares_tokens: whether the map of tokens is that of other registers, too.
    """

    tokens: dict[str, Token] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    policies: dict[str, RecordedPolicy] = field(default_factory=dict)
    shares_tokens: bool = field(default=False, compare=False, repr=False)

    def items(self) -> Iterable[tuple[str, RegisterMap]]:
        return ("tokens", self.tokens), ("nodes", self.nodes), ("policies", self.policies)

    def find_policy(self, node_id: str | None) -> LoadPolicy:
        """Return the policy in force at a node, or of a server alone; an empty one without any."""
        found = self.policies.get(node_id or "")
        return LoadPolicy() if found is None else found.policy

    def apply(
        self, event: Event, models: Mapping[str, Model], unended: Callable[[], Iterable[Job]]
    ) -> tuple[RegisterChanges, Sequence[Transition]]:
        """Return what an event changes; `models` and `unended` say which entries have to stay."""
        data, position, recorded_at = event.data, event.position, event.recorded_at
        if isinstance(data, OF_TOKENS):
            if self.shares_tokens:
                self.tokens, self.shares_tokens = dict(self.tokens), False
            tokens = evolve_tokens(
                self.tokens, data, position=position, recorded_at=recorded_at, actor=event.actor
            )
            return {"tokens": tokens}, ()
        if isinstance(data, PolicyInForce):
            recorded = RecordedPolicy(data.node_id or "", data.policy)
            self.policies = self.policies | {recorded.id: recorded}
            return {"policies": {recorded.id: recorded}}, ()
        if not isinstance(data, OF_NODES):
            return NOTHING, list_transitions(event, self.nodes, NOTHING)
        before, self.nodes = self.nodes, dict(self.nodes)
        owners = partial(_list_owners, models, unended)
        nodes = evolve_nodes(self.nodes, data, position=position, recorded_at=recorded_at, read_owners=owners)
        gone = [key for key in self.policies if nodes.get(key, before) is None]
        self.policies = {key: each for key, each in self.policies.items() if key not in gone}
        changes: RegisterChanges = {"nodes": nodes, **({"policies": dict.fromkeys(gone)} if gone else {})}
        return changes, list_transitions(event, before, nodes)


def _list_owners(models: Mapping[str, Model], unended: Callable[[], Iterable[Job]]) -> set[str]:
    """Return the nodes that own a model or a job."""
    owners = {each.node_id for model in models.values() for each in model.servings}
    return {each for each in (*owners, *(job.node_id for job in unended())) if each is not None}
