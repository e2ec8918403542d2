"""Labels, which are names for versions of a model: commands that set and remove them. Pure.

A load that was asked for with a label sets it in the append of its outcome (`draft_labels`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from events.commands import Accepted, Command, Decision, DecisionInput, Existing, Refused
from events.state import State
from events.types import Draft
from features.labels.facts import LabelRemoved, LabelSet

MAX_VERSION_LABELS = 64
"""Of a model: more than anybody tells apart."""


@dataclass(frozen=True, slots=True)
class SetLabel(Command):
    """Let a label name a version, which its caller has found in the repository."""

    model_id: str
    label: str
    version: int
    actor: str

    def decide(self, at: DecisionInput) -> Decision:
        versions = at.state.registers.find_versions(self.model_id)
        if self.version in versions.removed:
            return Refused(
                "unknown_version", f"version {self.version} of model '{self.model_id}' was removed"
            )
        if versions.versions_by_name.get(self.label) == self.version:
            return Existing(None)
        refusal = find_label_refusal(at.state, self.model_id, self.label)
        if refusal is not None:
            return refusal
        data = LabelSet(self.label)
        return Accepted((Draft(at.new_id(), data, self.actor, None, self.model_id, self.version),))


@dataclass(frozen=True, slots=True)
class RemoveLabel(Command):
    """Remove a label."""

    model_id: str
    label: str
    actor: str

    def decide(self, at: DecisionInput) -> Decision:
        versions = at.state.registers.find_versions(self.model_id)
        label = versions.find_label(self.label)
        if label is None:
            return Refused("unknown_label", versions.describe_unknown(self.label))
        data = LabelRemoved(self.label)
        return Accepted((Draft(at.new_id(), data, self.actor, None, self.model_id, label.version),))


def is_labelled(state: State, model_id: str, version: int, label: str | UnsetType) -> bool:
    """Whether a label names the version already, or there is none to set."""
    return label is UNSET or state.registers.find_versions(model_id).versions_by_name.get(label) == version


def find_labelling(state: State, model_id: str, version: int) -> str | None:
    """Return which labels name a version and what to do to remove it; None without any."""
    labels = [f"'{label}'" for label in state.registers.find_versions(model_id).list_names_of(version)]
    return f"is named by the label {', '.join(labels)}: move or remove that first" if labels else None


def find_label_refusal(state: State, model_id: str, label: str) -> Refused | None:
    """Return why a model takes no further label, besides those that pending loads set; None if it does."""
    taken = {each.name for each in state.registers.find_versions(model_id).labels}
    taken |= {job.version_name for job in state.unended(model_id) if job.version_name is not UNSET}
    if label in taken or len(taken) < MAX_VERSION_LABELS:
        return None
    what = f"model '{model_id}' has {MAX_VERSION_LABELS} labels, with those that its pending loads set"
    return Refused("too_many_labels", f"{what}: remove one, or move one of them")


def draft_labels(
    outcome: Draft, label: str | UnsetType, actor: str, new_id: Callable[[], str]
) -> tuple[Draft, ...]:
    """Return what sets the label of a load's request, if any, for the append of the load's outcome.

    `actor` has asked for the load.
    """
    if label is UNSET:
        return ()
    draft = replace(outcome, id=new_id(), data=LabelSet(label, outcome.id), actor=actor, worker_id=None)
    return (draft,)
