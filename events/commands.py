"""What the log's writer is asked, and idempotency keys; `events.accept` decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from events.clock import later
from events.jobs import LoadParameters
from events.types import CancelRequested, Cause, Draft, Event, Idempotency, LoadRequested, UnloadRequested


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


KEPT_S = 24 * 3_600
"""How long a key stands for its first request."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that was used: the fingerprint of the request, the job that answers it, and when that was."""

    fingerprint: str
    job_id: str
    recorded_at: str

    def holds(self, now: str) -> bool:
        """Whether the key still stands for its request at the stamp `now`."""
        return now < later(self.recorded_at, KEPT_S)


def key_of(event: Event) -> tuple[str, KnownKey] | None:
    """Return the key that the event was requested with, hashed, and what is to be known of it."""
    data = event.data
    if not isinstance(data, _REQUESTS) or data.idempotency is None or event.job_id is None:
        return None
    given = data.idempotency
    return given.key_hash, KnownKey(given.fingerprint, event.job_id, event.recorded_at)


_REQUESTS = (LoadRequested, UnloadRequested, CancelRequested)
"""The events that a key can be given with."""
