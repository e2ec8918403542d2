"""The condition of a load that is to set a label."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET

from events.commands import Condition, DecisionInput, Refused
from events.jobcommands import RequestLoad
from features.labels.commands import find_label_refusal


class LabelAllowed(Condition, frozen=True, gc=False):
    """The model takes this label, besides those that its pending loads set."""

    model_id: str
    label: str

    def find_refusal(self, at: DecisionInput) -> Refused | None:
        return find_label_refusal(at.state, self.model_id, self.label)


def list_conditions(command: RequestLoad, _: object) -> Iterator[Condition]:
    if command.version_name is not UNSET:
        yield LabelAllowed(command.model_id, command.version_name)
