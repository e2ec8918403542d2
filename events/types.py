"""The event types, with all their fields. They are hashed for ever: add fields, never change or remove one.

`type` is a stable string that stands here once; it never comes from a Python path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from msgspec import Struct


class Cause(StrEnum):
    """Why a load or an unload was requested."""

    REQUEST = "request"
    DEMAND = "demand"
    SWAP = "swap"
    EVICTION = "eviction"
    IDLE = "idle"
    RECOVERY = "recovery"
    RESTART = "restart"


SYSTEM = "system"
"""The actor of what the server does of its own accord; no token may carry it as its subject."""


class Idempotency(Struct, frozen=True, gc=False):
    """The key of an idempotent request, hashed, and the fingerprint of what was asked (hex SHA-256 each)."""

    key_hash: str
    fingerprint: str


class LoadedFile(Struct, frozen=True, gc=False):
    """One file of a loaded version as it was read: path relative to the version's folder."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


class Prepared(Struct, frozen=True, gc=False):
    """The prepared form that a load used instead of the repository's file, and its hash."""

    form: str
    sha256: str


class Durations(Struct, frozen=True, gc=False):
    """How long the parts of a load took, in microseconds; null where a part did not take place.

    Of several instances, each part is as long as in the one that took longest for it, so that the parts need
    not add up to the whole.
    """

    waiting_us: int
    starting_us: int
    loading_us: int
    hashing_us: int
    warming_up_us: int | None
    measuring_us: int
    total_us: int


class LoadRequested(Struct, frozen=True, gc=False):
    """Somebody, or the system, asked for a version to be loaded. The event's id is the job's.

    What applies is here, whoever chose it: the request, the model's loadledger.toml or the server. With
    `keeps_load_job_id`, only what applies to a loaded model is to change, and its workers stay.
    """

    TYPE: ClassVar[str] = "LoadRequested"
    priority: str
    timeout_s: int
    keep_alive_s: int | None
    memory_limit_bytes: int | None
    strategy: str
    pinned: bool
    instances: int
    cause: Cause
    cause_event_id: str | None = None
    idempotency: Idempotency | None = None
    max_batch_size: int = 0
    max_queue_delay_us: int = 0
    keeps_load_job_id: str | None = None


class LoadStarted(Struct, frozen=True, gc=False):
    """The load began; `attempt` counts from 1, one more for each start of the server amid the load."""

    TYPE: ClassVar[str] = "LoadStarted"
    attempt: int


class ModelLoaded(Struct, frozen=True, gc=False):
    """The version can serve, and from here on does. The bytes are the sums of all workers'."""

    TYPE: ClassVar[str] = "ModelLoaded"
    files: tuple[LoadedFile, ...]
    worker_ids: tuple[str, ...]
    prepared: Prepared | None
    memory_bytes: int
    peak_memory_bytes: int
    durations: Durations


class LoadFailed(Struct, frozen=True, gc=False):
    """The load ended without a model that can serve."""

    TYPE: ClassVar[str] = "LoadFailed"
    code: str
    message: str


class UnloadRequested(Struct, frozen=True, gc=False):
    """Somebody, or the system, asked for the end of the load `load_job_id`. The event's id is the job's."""

    TYPE: ClassVar[str] = "UnloadRequested"
    force: bool
    load_job_id: str
    cause: Cause
    cause_event_id: str | None = None
    idempotency: Idempotency | None = None


class UnloadStarted(Struct, frozen=True, gc=False):
    """The model takes no more requests; those that run are waited for."""

    TYPE: ClassVar[str] = "UnloadStarted"


class ModelUnloaded(Struct, frozen=True, gc=False):
    """The process is gone, and all its memory with it."""

    TYPE: ClassVar[str] = "ModelUnloaded"
    freed_bytes: int
    drained_requests: int
    aborted_requests: int


class UnloadFailed(Struct, frozen=True, gc=False):
    """The unload ended and the model is still there."""

    TYPE: ClassVar[str] = "UnloadFailed"
    code: str
    message: str


class CancelRequested(Struct, frozen=True, gc=False):
    """Somebody asked for the job `job_id` of this event to be cancelled."""

    TYPE: ClassVar[str] = "CancelRequested"
    idempotency: Idempotency | None = None


class JobCancelled(Struct, frozen=True, gc=False):
    """The job ended before it did anything that lasts."""

    TYPE: ClassVar[str] = "JobCancelled"


class AccessDenied(Struct, frozen=True, gc=False):
    """`actor` was refused `action` for lack of a role, `count` times."""

    TYPE: ClassVar[str] = "AccessDenied"
    action: str
    count: int


class WorkerExited(Struct, frozen=True, gc=False):
    """A worker's process ended and nobody had asked; both numbers are null when nobody can know them."""

    TYPE: ClassVar[str] = "WorkerExited"
    exit_code: int | None
    signal: int | None
    stderr: tuple[str, ...]


class ServerStarted(Struct, frozen=True, gc=False):
    """The server started on this log, whose last event before, if any, was recorded at `down_since`.

    `unclean` says that the last one was not `ServerStopped`. The time between is not charged to any job.
    """

    TYPE: ClassVar[str] = "ServerStarted"
    unclean: bool
    down_since: str | None = None


class ServerStopped(Struct, frozen=True, gc=False):
    """The server stopped in order; nothing is appended per model."""

    TYPE: ClassVar[str] = "ServerStopped"


@dataclass(frozen=True, slots=True)
class Unknown:
    """An event of a type or schema version that this release does not know: kept, and skipped by folds."""

    type: str
    schema: int
    data: Mapping[str, Any] = field(hash=False)


Data = (
    LoadRequested
    | LoadStarted
    | ModelLoaded
    | LoadFailed
    | UnloadRequested
    | UnloadStarted
    | ModelUnloaded
    | UnloadFailed
    | CancelRequested
    | JobCancelled
    | AccessDenied
    | WorkerExited
    | ServerStarted
    | ServerStopped
)
"""Every type this release writes."""

TYPES: Mapping[str, type[Data]] = {kind.TYPE: kind for kind in Data.__args__}
SCHEMA = 1
"""The version of all types so far."""


class Draft(Struct, frozen=True, gc=False):
    """An event before the writer gave it its position and time."""

    id: str
    data: Data
    actor: str
    job_id: str | None = None
    model_id: str | None = None
    version: int | None = None
    worker_id: str | None = None


class Event(Struct, frozen=True, gc=False):
    """An immutable fact at its place in the log."""

    position: int
    id: str
    data: Data | Unknown
    actor: str
    recorded_at: str
    job_id: str | None = None
    model_id: str | None = None
    version: int | None = None
    worker_id: str | None = None

    @property
    def type(self) -> str:
        """The stable name of what happened."""
        return self.data.type if isinstance(self.data, Unknown) else self.data.TYPE


def recorded(draft: Draft, position: int, recorded_at: str) -> Event:
    """Return the event that `draft` becomes at `position`."""
    return Event(
        position=position,
        recorded_at=recorded_at,
        id=draft.id,
        data=draft.data,
        actor=draft.actor,
        job_id=draft.job_id,
        model_id=draft.model_id,
        version=draft.version,
        worker_id=draft.worker_id,
    )
