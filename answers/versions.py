"""Versions that were added, and uploads of them."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about, as_format


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
