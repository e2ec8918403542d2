"""Recorded inferences, and the files that have them."""

from __future__ import annotations

from typing import Annotated, Any

from answers.answer import AS_OF, AnswerBody, about, one_of


class RecordList(AnswerBody, frozen=True, kw_only=True):
    """One page of the lines of this server's files, by model and time."""

    records: Annotated[list[dict[str, Any]], about("As docs/how-to/record-inferences.md describes them.")]
    as_of: Annotated[int, AS_OF]
    next_cursor: Annotated[
        str | None, about("`cursor` of the next page, which may have none; null on the last page.")
    ]

    @property
    def values(self) -> list[dict[str, Any]]:
        return self.records


class RecordFileInfo(AnswerBody, frozen=True, kw_only=True):
    """A file of records on this server, and what the ledger says of it."""

    file: Annotated[str, about("Its name, which is also the id of its `RecordsClosed`.")]
    model_id: str
    state: Annotated[str, one_of("open", "closed")]
    bytes: int
    written_at: Annotated[str, about("When it was last written.")]
    position: Annotated[int | None, about("Of its `RecordsClosed`; null until then.")]
    records: Annotated[int | None, about("Inferences in it, as the ledger says.")]
    dropped: Annotated[int | None, about("Inferences that it lacks, as the ledger says.")]
    sha256: Annotated[str | None, about("Of the file, as the ledger says.")]


class RecordFileList(AnswerBody, frozen=True, kw_only=True):
    """One page of the files of this server, by model and age."""

    files: list[RecordFileInfo]
    as_of: Annotated[int, AS_OF]
    next_cursor: str | None

    @property
    def values(self) -> list[RecordFileInfo]:
        return self.files
