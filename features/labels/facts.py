"""The facts of labels."""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct

STORED_NAMES = {"version_name": "label"}
"""What JSON calls a load's name for its version, which `LabelSet` gives when that is loaded."""


class LabelSet(Struct, frozen=True, gc=False):
    """A label of the model names the version from here on, and no other one.

    A load that was asked for with the label sets it with its outcome, whose event is `cause_event_id`. It is
    null, and there is no job, if a person set the label alone.
    """

    TYPE: ClassVar[str] = "LabelSet"
    label: str
    cause_event_id: str | None = None


class LabelRemoved(Struct, frozen=True, gc=False):
    """A label of the model names no version any more; the event's version is the one that it named."""

    TYPE: ClassVar[str] = "LabelRemoved"
    label: str
