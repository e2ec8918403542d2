"""The facts about files of recorded inferences."""

from __future__ import annotations

from typing import ClassVar

from events.clock import Timestamp
from features.nodes.facts import FactAtNode


class RecordsClosed(FactAtNode, frozen=True, gc=False, kw_only=True):
    """A file of records of the model is complete: it has these bytes from here on, until it is erased.

    The event's id is the file's name, `ID.jsonl` in the folder of the model.

    Attributes:
        records: how many inferences it has.
        lines: records, and lines about what is missing.
        dropped: how many inferences of the model were not recorded meanwhile, as its lines say.
        interrupted: whether the server died before it closed the file: up to a second of records is missing.
        bytes: its size.
        sha256: of all bytes.
        begin: when the file was opened.
        end: when it was closed.
    """

    TYPE: ClassVar[str] = "RecordsClosed"
    records: int
    lines: int
    dropped: int
    interrupted: bool
    bytes: int
    sha256: str
    begin: Timestamp
    end: Timestamp


class RecordsErased(FactAtNode, frozen=True, gc=False, kw_only=True):
    """A file of records is deleted; `RecordsClosed` with the id `file` says what it was.

    The actor is a person, or `system` for a file that was kept for long enough, or that others need room of.
    """

    TYPE: ClassVar[str] = "RecordsErased"
    file: str
    reason: str
