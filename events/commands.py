"""Commands to the writer of the log, and idempotency keys. `events.accept` decides a command."""

from __future__ import annotations

from dataclasses import dataclass, field

from events.clock import Timestamp, add_seconds
from events.types import (
    CancelRequested,
    Cause,
    Draft,
    Event,
    Idempotency,
    LoadParameters,
    LoadRequested,
    UnloadRequested,
)

KEY_LIFETIME_S = 24 * 3_600
"""How long an idempotency key stands for its first request: clients retry within a day."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file of a version as the repository holds it now; `path` is relative to the version's folder."""

    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """Load a version of a model.

    Attributes:
        files: of the version, as the repository holds them now.
        asked: the names of the parameters that the request itself gave. A request that gives none accepts a
            loaded model as it is.
    """

    model_id: str
    version: int
    files: tuple[FileIdentity, ...]
    actor: str
    parameters: LoadParameters = field(default_factory=LoadParameters)
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    asked: frozenset[str] = frozenset()
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class RequestUnload:
    """Unload a model; None is the active model.

    Attributes:
        load_job_id: for an automatic unload, the load that the scheduler chose. The unload is refused if the
            model serves from another load, or has a pending job.
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
    """Cancel a job before it has its effect."""

    job_id: str
    actor: str
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """Append these facts unchanged, in this order, in one transaction."""

    drafts: tuple[Draft, ...]


Command = RequestLoad | RequestUnload | RequestCancel | Record


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A used idempotency key: the fingerprint of its request, the job that answers, and the time of use."""

    fingerprint: str
    job_id: str
    recorded_at: Timestamp

    def holds(self, now: Timestamp) -> bool:
        """Whether the key still stands for its request at `now`."""
        return now < add_seconds(self.recorded_at, KEY_LIFETIME_S)


def read_key(event: Event) -> tuple[str, KnownKey] | None:
    """Return the hash of the event's idempotency key and what it stands for, if it has one."""
    data = event.data
    if not isinstance(data, _REQUESTS) or data.idempotency is None or event.job_id is None:
        return None
    given = data.idempotency
    return given.key_hash, KnownKey(given.fingerprint, event.job_id, event.recorded_at)


_REQUESTS = (LoadRequested, UnloadRequested, CancelRequested)
"""The events that can carry an idempotency key."""
