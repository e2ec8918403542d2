"""The interface of a source's module, `Origin`, and the words of its library's errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from loadledger.errors import printable
from loadledger.sources.downloads import Download, Downloads

MAX_ERROR_CHARACTERS = 400
"""Of a library's error, which may quote a whole answer."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a resolved source.

    Attributes:
        path: in the version's folder, as the source says, unchecked; of an archive, a name for messages.
        bytes: its length, if the source says it.
        sha256: in hexadecimal digits, if the source or the caller names it.
        is_needed: whether the version must have it; others are taken if the model or a signature names them.
        is_archive: whether it is a tar archive, plain or gzip, of files of the version.
        key: what the source itself calls it.
    """

    path: str
    bytes: int | None = None
    sha256: str | None = None
    is_needed: bool = True
    is_archive: bool = False
    key: str = ""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The meaning of a source's name now.

    Attributes:
        name: one that names the same bytes for ever; None if the bytes that arrive say it.
        files: of the version.
    """

    name: str | None
    files: tuple[RemoteFile, ...]


class Origin(Protocol):
    """A source, made from `(source: SourceName, digest: str | None)`; all three raise `SourceProblem`.

    The digest, in hexadecimal digits, is that of the source's file or, of a registry, of its manifest.
    """

    def resolve(self) -> Resolved:
        """Return what the source's name means now."""

    def fetch(self, file: RemoteFile, downloads: Downloads) -> Download:
        """Return a file of `resolve` once it is here."""


def quote_error(text: str) -> str:
    """Return a library's error as one short line, without queries of URLs, which may have a signature."""
    words = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", " ".join(text.split()))
    return printable(words, MAX_ERROR_CHARACTERS)
