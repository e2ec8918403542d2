"""Versions that were added, and uploads of them."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about, as_format
from answers.approvals import ApprovalInfo


class AddedFileInfo(AnswerBody, frozen=True, kw_only=True):
    """One file of an added version."""

    path: Annotated[str, about("Relative to the version's folder.")]
    bytes: int
    sha256: Annotated[str, about("Of its contents, in 64 hexadecimal digits.")]


class AddedVersionInfo(AnswerBody, frozen=True, kw_only=True):
    """A version that was added."""

    model_id: str
    version: int
    bytes: Annotated[int, about("Of all files together.")]
    files: list[AddedFileInfo]


class UploadInfo(AddedVersionInfo, frozen=True, kw_only=True):
    """An upload of a version, with the files that are complete."""

    id: Annotated[str, about("Names the node that has the upload, too, if there are nodes.")]
    expires_at: Annotated[str, about("Later, if a file is added before."), as_format("date-time")]


class VersionFileInfo(AnswerBody, frozen=True, kw_only=True):
    """One file of a version."""

    path: Annotated[str, about("Relative to the version's folder.")]
    bytes: int
    sha256: Annotated[
        str | None, about("Null if the server has not hashed this file: no load or check had it so far.")
    ]


class VersionInfo(AnswerBody, frozen=True, kw_only=True):
    """A version, and what the ledger has of it."""

    model_id: str
    version: int
    digest: Annotated[str | None, about("Of all files; null if one of them is not hashed.")]
    files: Annotated[
        list[VersionFileInfo],
        about("As the repository has them or, if it does not, as they are loaded or were chosen."),
    ]
    in_repository: bool
    loaded: Annotated[bool, about("Whether the model serves this version; its files may be older.")]
    labels: list[str]
    approvals: Annotated[list[ApprovalInfo], about("Those that stand for the digest.")]
    added_by: Annotated[str | None, about("Null if the ledger has nobody, as of a folder that was copied.")]
    added_at: str | None
    position: Annotated[int | None, about("Of its `VersionAdded`, which has the SHA-256 of each file.")]
    source: Annotated[str | None, about("Its name, as who added it gave it.")]
    resolved: Annotated[str | None, about("A name of what that meant then, which does not move.")]
