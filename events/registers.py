"""Registers: the projections beside models and jobs, by id.

Issued tokens, policies, the versions of models, and those of the features (`features.folds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Never

from msgspec import Struct

from events.jobs import Job
from events.models import Model
from events.presence import Transition, list_transitions
from events.tokens import Token, evolve_tokens
from events.types import OF_TOKENS, Event, PolicyInForce
from events.versions import OF_VERSIONS, ModelVersions, evolve_versions
from features.facts import OF_SERVERS
from features.folds import ENTRIES_OF_FEATURES, FeatureEntry, FeatureRegisters
from features.rules import LoadPolicy


class RecordedPolicy(Struct, frozen=True, gc=False):
    """The policy for loads that is in force at a server; of a server alone the id is empty."""

    id: str
    policy: LoadPolicy


RegisterEntry = Token | FeatureEntry | RecordedPolicy | ModelVersions
RegisterChanges = Mapping[str, Mapping[str, RegisterEntry | None]]
"""The changed entries, by the register's name and their ids; None for a removed one."""

NOTHING: Mapping[str, Never] = MappingProxyType({})

ENTRIES: Mapping[str, type[RegisterEntry]] = {
    "tokens": Token,
    **ENTRIES_OF_FEATURES,
    "policies": RecordedPolicy,
    "versions": ModelVersions,
}
"""The entries of each register; its name is that of its table."""

OF_REGISTERS = frozenset({*OF_TOKENS, *OF_SERVERS, PolicyInForce, *OF_VERSIONS})
"""The events that change a register."""


@dataclass(slots=True)
class Registers(FeatureRegisters):
    """The registers of a state.

    Attributes:
        tokens: issued and revoked ones, by their ids; a map is changed in place, unless it is shared.
        policies: in force at the servers, by their names; a map is never changed.
        versions: the versions of models, by model id; a map is changed in place, unless it is shared.
        shared: the names of the maps that are those of other registers, too.
    """

    tokens: dict[str, Token] = field(default_factory=dict)
    policies: dict[str, RecordedPolicy] = field(default_factory=dict)
    versions: dict[str, ModelVersions] = field(default_factory=dict)
    shared: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def items(self) -> Iterable[tuple[str, Mapping[str, RegisterEntry]]]:
        return ((name, getattr(self, name)) for name in ENTRIES)

    def share(self) -> Registers:
        """Return registers that change without these: a map becomes their own with its first change."""
        return replace(self, shared=frozenset({"tokens", "versions"}))

    def find_versions(self, model_id: str) -> ModelVersions:
        """Return the versions of a model; empty for an unknown model."""
        return self.versions.get(model_id) or ModelVersions(model_id)

    def find_policy(self, server: str | None) -> LoadPolicy:
        """Return the policy in force at a server, or of one alone; an empty one without any."""
        found = self.policies.get(server or "")
        return LoadPolicy() if found is None else found.policy

    def apply(
        self, event: Event, models: Mapping[str, Model], unended: Callable[[], Iterable[Job]]
    ) -> tuple[RegisterChanges, Sequence[Transition]]:
        """Return the changes by an event; `models` and `unended` say which entries have to stay."""
        data = event.data
        if isinstance(data, OF_TOKENS):
            if "tokens" in self.shared:
                self.tokens, self.shared = dict(self.tokens), self.shared - {"tokens"}
            return {"tokens": evolve_tokens(self.tokens, event, data)}, ()
        if isinstance(data, OF_VERSIONS):
            return self._apply_to_versions(event), ()
        if isinstance(data, PolicyInForce):
            recorded = RecordedPolicy(data.server or "", data.policy)
            self.policies = self.policies | {recorded.id: recorded}
            return {"policies": {recorded.id: recorded}}, ()
        owners = partial(_list_owners, models, unended, self.versions)
        changes, transitions = self.evolve_features(event, owners)
        gone = {key for entries in changes.values() for key, entry in entries.items() if entry is None}
        if isinstance(data, OF_SERVERS) and (gone := gone & self.policies.keys()):
            self.policies = {key: each for key, each in self.policies.items() if key not in gone}
            changes = {**changes, "policies": dict.fromkeys(gone)}
        return changes, transitions or list_transitions(event)

    def _apply_to_versions(self, event: Event) -> RegisterChanges:
        before = self.versions.get(event.model_id or "")
        after = evolve_versions(before, event)
        if after is None or after is before:
            return NOTHING
        if "versions" in self.shared:
            self.versions, self.shared = dict(self.versions), self.shared - {"versions"}
        self.versions[after.id] = after
        return {"versions": {after.id: after}}


def _list_owners(
    models: Mapping[str, Model], unended: Callable[[], Iterable[Job]], versions: Mapping[str, ModelVersions]
) -> set[str]:
    """Return the servers that own a model or a job, or have signed a person's valid statement."""
    owners = {each.server for model in models.values() for each in model.servings}
    signers = chain.from_iterable(each.list_signers() for each in versions.values())
    return {each for each in (*owners, *(job.server for job in unended()), *signers) if each is not None}
