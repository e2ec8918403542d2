"""The interface of a source's module, `Origin`, and texts of its library's errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from loadledger.errors import printable
from loadledger.sources.downloads import Download, Downloads

MAX_ERROR_CHARACTERS = 400
"""Length of a library's error, which may quote a whole answer."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a resolved source.

    Attributes:
        path: in the version's folder, as given by the source, unchecked; for an archive, a name for messages.
        bytes: its length, if known.
        sha256: in hexadecimal digits, if known from the source or the caller.
        is_needed: whether the version must have it; else it is fetched if the model or a signature names it.
        is_archive: whether it is a tar archive, plain or gzip, of files of the version.
        key: the source's own name of it.
    """

    path: str
    bytes: int | None = None
    sha256: str | None = None
    is_needed: bool = True
    is_archive: bool = False
    key: str = ""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The present meaning of a source's name.

    Attributes:
        name: a name for the same bytes for ever; None if only the received bytes identify them.
        files: the version's files.
    """

    name: str | None
    files: tuple[RemoteFile, ...]


class Origin(Protocol):
    """A source, made from `(source: SourceName, digest: str | None)`; its methods raise `SourceProblem`.

    The digest, in hexadecimal digits, is that of the source's file or of a registry's manifest.
    """

    def resolve(self) -> Resolved:
        """Return the present meaning of the source's name."""

    def fetch(self, file: RemoteFile, downloads: Downloads) -> Download:
        """Return a file of `resolve` once it is downloaded."""


def quote_error(text: str) -> str:
    """Return a library's error as one short line, without queries of URLs, which may have a signature."""
    words = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", " ".join(text.split()))
    return printable(words, MAX_ERROR_CHARACTERS)
