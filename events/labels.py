"""Labels, which are names for versions of a model: commands that set and remove them. Pure.

A load that was asked for with a label sets it in the append of its outcome (`draft_label`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import UNSET
from msgspec.structs import replace

from events.commands import Accepted, Decision, DecisionInput, Existing, Refused, RegisterCommand
from events.models import Model
from events.state import State
from events.types import Draft, LabelRemoved, LabelSet

LABEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
"""A name begins with a letter, since a number is a version."""

MAX_LABELS = 64
"""Of a model: more than anybody tells apart, and few enough for each row of its history."""


@dataclass(frozen=True, slots=True)
class SetLabel(RegisterCommand):
    """Let a label name a version, which its caller has found in the repository."""

    model_id: str
    label: str
    version: int
    actor: str

    def decide(self, at: DecisionInput) -> Decision:
        model = at.state.models.get(self.model_id)
        if model is not None and self.version in model.removed:
            return Refused("unknown_version", f"version {self.version} of model '{model.id}' was removed")
        if names_version(model, self.label, self.version):
            return Existing(None)
        refusal = find_label_refusal(at.state, self.model_id, self.label)
        if refusal is not None:
            return refusal
        data = LabelSet(self.label)
        return Accepted((Draft(at.new_id(), data, self.actor, None, self.model_id, self.version),))


@dataclass(frozen=True, slots=True)
class RemoveLabel(RegisterCommand):
    """Remove a label."""

    model_id: str
    label: str
    actor: str

    def decide(self, at: DecisionInput) -> Decision:
        model = at.state.models.get(self.model_id)
        label = None if model is None else model.find_label(self.label)
        if label is None:
            return Refused("unknown_label", describe_unknown(self.model_id, self.label))
        data = LabelRemoved(self.label)
        return Accepted((Draft(at.new_id(), data, self.actor, None, self.model_id, label.version),))


def describe_unknown(model_id: str, label: str) -> str:
    return f"model '{model_id}' has no label '{label}'; GET /api/v1/models/{model_id} shows those that it has"


def names_version(model: Model | None, label: str, version: int | None) -> bool:
    found = None if model is None else model.find_label(label)
    return found is not None and found.version == version


def find_label_refusal(state: State, model_id: str, label: str) -> Refused | None:
    """Return why a model takes no further label, besides those that pending loads set; None if it does."""
    model = state.models.get(model_id)
    taken = {each.name for each in (() if model is None else model.labels or ())}
    taken |= {job.label for job in state.unended(model_id) if job.label is not UNSET}
    if label in taken or len(taken) < MAX_LABELS:
        return None
    what = f"model '{model_id}' has {MAX_LABELS} labels, with those that its pending loads set"
    return Refused("too_many_labels", f"{what}: remove one, or move one of them")


def draft_label(outcome: Draft, label: str, actor: str, new_id: Callable[[], str]) -> Draft:
    """Return what sets the label of a load's request, for the append of the load's outcome.

    `actor` has asked for the load.
    """
    return replace(outcome, id=new_id(), data=LabelSet(label, outcome.id), actor=actor, worker_id=None)
