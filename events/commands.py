"""What the log's writer is asked: plain values that carry what needs I/O. `events.accept` decides them."""

from __future__ import annotations

from dataclasses import dataclass, field

from events.jobs import LoadParameters
from events.types import Cause, Draft, Idempotency


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file of a version as the repository has it now; relative path, bytes, nanoseconds."""

    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """Load this version; `files` are what the repository holds for it now.

    `asked` are the names of those `parameters` that the request itself gave: who asks a model that is loaded
    for nothing in particular is content with how it is.
    """

    model_id: str
    version: int
    files: tuple[FileStat, ...]
    actor: str
    parameters: LoadParameters = field(default_factory=LoadParameters)
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    asked: frozenset[str] = frozenset()
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class RequestUnload:
    """Unload this model, or the active one where no model is named.

    With `load_job_id`, only if the model serves from that load and nothing is asked of it already: so the
    system unloads what it has looked at, and nothing newer.
    """

    model_id: str | None
    actor: str
    force: bool = False
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    load_job_id: str | None = None
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class RequestCancel:
    """End this job before it has its effect."""

    job_id: str
    actor: str
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """Facts to append as they are, in this order, in one transaction."""

    drafts: tuple[Draft, ...]


Command = RequestLoad | RequestUnload | RequestCancel | Record
