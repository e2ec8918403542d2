"""The interface of a source's module to the fetch process, `Origin`, and the errors that end a fetch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from runtime.errors import RuntimeProblem
from runtime.fetch.messages import Resolved

Pieces = AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Download:
    """A file that is being read.

    Attributes:
        offset: of its first piece.
        bytes: of the whole file, if that is known.
        pieces: up to `PIECE_BYTES` each.
    """

    offset: int
    bytes: int | None
    pieces: Pieces


class Origin(Protocol):
    """A source, made from `(source: SourceName, order: Order)`, which reads tokens but does not connect."""

    @property
    def client(self) -> AbstractAsyncContextManager[object]:
        """A `Web`, or what is in its place; entered before `resolve`, left at the end."""

    async def resolve(self) -> Resolved:
        """Return what the source's name means now."""

    def open(self, index: int, offset: int) -> AbstractAsyncContextManager[Download]:
        """Open a file of `Resolved.files`, from `offset` on, which is 0 unless its SHA-256 is known."""


class SourceProblem(RuntimeProblem):
    """A source did not give what it should; if that is transient, the same request may succeed soon."""

    code = "source_unreachable"

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


class SourceUnreachable(SourceProblem):
    """There is no connection, or the server fails."""


class SourceNotFound(SourceProblem):
    """The source has no such file."""

    code = "source_not_found"


class SourceDenied(SourceProblem):
    """The source wants other credentials."""

    code = "source_denied"


class SourceTimeout(SourceProblem):
    """The source does not answer, or too slowly."""

    code = "source_timeout"


class SourceChanged(SourceProblem):
    """The file is another one than at the beginning."""

    code = "source_changed"


class SourceInvalid(SourceProblem):
    """The source's answer makes no sense, or is not taken."""

    code = "source_invalid"
