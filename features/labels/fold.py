"""The labels of a model, which name its versions. A pure fold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from events.types import Data, Event
from features.labels.facts import LabelRemoved, LabelSet

LABEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
"""A label begins with a letter, since a number is a version."""


class Label(Struct, frozen=True, gc=False):
    """A name for a version of a model; `position` is that of its latest `LabelSet`."""

    name: str
    version: int
    position: int


class LabelledVersions:
    """The labels of a model, in order of their names."""

    __slots__ = ()
    id: str
    labels: tuple[Label, ...]

    def find_label(self, name: str) -> Label | None:
        return next((each for each in self.labels if each.name == name), None)

    def describe_unknown(self, label: str) -> str:
        return (
            f"model '{self.id}' has no label '{label}'; GET /api/v1/models/{self.id} shows those that it has"
        )

    def describe_name(self, label: str) -> str:
        return f"label '{label}' of model '{self.id}' names version {self.versions_by_name[label]}"

    @property
    def versions_by_name(self) -> dict[str, int]:
        """The version that each label names."""
        return {label.name: label.version for label in self.labels}

    def list_names_of(self, version: int) -> list[str]:
        """Return the labels that name a version."""
        return [label.name for label in self.labels if label.version == version]


_V = TypeVar("_V", bound=Any)


def _label_set(versions: _V, event: Event, data: LabelSet) -> _V:
    if event.version is None:
        return versions
    return _replace_label(versions, data.label, Label(data.label, event.version, event.position))


def _label_removed(versions: _V, _: Event, data: LabelRemoved) -> _V:
    return versions if versions.find_label(data.label) is None else _replace_label(versions, data.label)


def _replace_label(versions: _V, name: str, *new: Label) -> _V:
    others = (each for each in versions.labels if each.name != name)
    return replace(versions, labels=tuple(sorted((*others, *new), key=lambda label: label.name)))


STEPS: Mapping[type[Data], Callable[[Any, Event, Any], Any]] = {
    LabelSet: _label_set,
    LabelRemoved: _label_removed,
}
