"""The event types, with all their fields. Bodies are hashed for ever: add fields, never change or remove one.

`TYPE` is the stable name of a type in the log; it never comes from a Python path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter
from typing import Any, ClassVar

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict, replace

from events.clock import Timestamp
from events.values import Confinement, Credential, FileHash, PlannedMemory, ProcessEnd
from features.facts import (
    ENDS_OF_SERVERS,
    SETTINGS_OF_FEATURES,
    STORED_NAMES,
    FactAtServer,
    FeatureData,
    ParametersOfFeatures,
    RecordedEvidence,
    SignedFact,
    TargetUse,
)
from features.rules import LoadPolicy


class Cause(StrEnum):
    """Why a load or an unload was requested."""

    REQUEST = "request"
    DEMAND = "demand"
    SWAP = "swap"
    EVICTION = "eviction"
    IDLE = "idle"
    RECOVERY = "recovery"
    RESTART = "restart"
    DRAIN = "drain"
    COPY = "copy"


_IN_SWAP = "is part of a swap; to go back, load version {version}"

REPLACEMENTS = {
    Cause.SWAP: _IN_SWAP,
    Cause.DRAIN: _IN_SWAP,
    Cause.COPY: "ends a copy; to have more, load the model with more copies",
}
"""Causes of unloads of loads that another load of the model replaces, or is a copy of: what such an unload
does, and what to do instead of cancelling it."""


BY_CLIENTS = (Cause.REQUEST, Cause.DEMAND)
"""Causes of loads that persons and inferences ask for."""

SYSTEM = "system"
"""The actor of what the server does by itself; no token may have it as its subject."""


class Idempotency(Struct, frozen=True, gc=False):
    """The hash of an idempotency key and the fingerprint of its request (hex SHA-256 each)."""

    key_hash: str
    fingerprint: str


class LoadedFile(Struct, frozen=True, gc=False):
    """One file of a loaded version as it was read; `path` is relative to the version's folder."""

    # A struct beside `FileHash` and `AddedFile`, since the fields of each are hashed for ever.

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


Contents = tuple[tuple[str, str], ...]
"""Path and SHA-256 of each file of a version, in order of their paths."""


def contents_of(files: Iterable[LoadedFile | AddedFile]) -> Contents:
    return tuple(sorted((file.path, file.sha256) for file in files))


def hashes_of(contents: Contents) -> tuple[FileHash, ...]:
    return tuple(FileHash(path, sha256) for path, sha256 in contents)


def digest_of(contents: Iterable[tuple[str, str]]) -> str:
    """Return the digest of a version: SHA-256 over a line "<sha256> <path>" per file, ordered by path.

    Args:
        contents: path and SHA-256 of each file. Backslashes and line breaks in a path are escaped as
            `sha256sum` does, so that no other list of files has the same lines.
    """
    lines = (f"{sha256} {_escape(path)}\n" for path, sha256 in sorted(contents))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace("\n", "\\n")


class Durations(Struct, frozen=True, gc=False):
    """How long the stages of a load took; None where a stage did not take place.

    Of several instances each stage is that of the slowest, so the stages need not add up to the total.
    """

    waiting_us: int
    starting_us: int
    loading_us: int
    hashing_us: int
    warming_up_us: int | None
    measuring_us: int
    total_us: int
    copying_us: int | None = None


class Justification(SignedFact, frozen=True, gc=False):
    """The reasons that a person gives for a load.

    Attributes:
        credential: of the person.
        reason: as it was given.
        emergency: why it must not wait for others; None if it may.
        digest: of an emergency, of the files that it is for; UNSET where no rule asks for it.
    """

    credential: Credential
    reason: str | None = None
    emergency: str | None = None
    digest: str | UnsetType = UNSET


NEVER = -1
"""The `keep_alive_s` of a model that is never unloaded for being idle; None says the same."""


class LoadParameters(ParametersOfFeatures, frozen=True, gc=False):
    """The parameters of a load, from the HTTP schema to the consumer, which orders the workers.

    A new field needs a default, because earlier events lack it. Workers import nothing of `events`, so the
    `Load` message of the wire names the parameters that they need.

    Attributes:
        priority: `high`, `normal` or `low`.
        timeout_s: from acceptance to the end of the load, waiting included.
        keep_alive_s: how long the model may be idle; None, like NEVER, has no limit.
        memory_limit_bytes: of one instance beside the empty worker; None has no limit.
        strategy: how a loaded version is replaced: `beside`, `in_place` or `auto`.
        pinned: whether the model is exempt from automatic unloads.
        instances: how many workers serve the model.
        max_batch_size: requests run together; 0 turns batching off.
        max_queue_delay_us: how long a request may wait for its batch.
        progress_timeout_s: how long a started load may make no progress.
        threads: how many threads each worker computes with; None is the server's setting when it starts.
        dependent_rows: `allow` if rows of a batch may change each other's answers; not stored for `refuse`.
        max_queue: inferences that may be queued or running; UNSET is the server's limit.
        priority_levels: how many levels of priority its inferences have; UNSET is none.
        default_priority_level: of an inference that names none; UNSET is the lowest.
    """

    priority: str = "normal"
    timeout_s: int = 300
    keep_alive_s: int | None = None
    memory_limit_bytes: int | None = None
    strategy: str = "beside"
    pinned: bool = False
    instances: int = 1
    max_batch_size: int = 0
    max_queue_delay_us: int = 0
    progress_timeout_s: int | None = None
    threads: int | None = None
    dependent_rows: str | UnsetType = UNSET
    max_queue: int | UnsetType = UNSET
    priority_levels: int | UnsetType = UNSET
    default_priority_level: int | UnsetType = UNSET

    @property
    def wanted_copies(self) -> int:
        """At how many servers the model is to be loaded."""
        return self.copies or 1

    def give_settings(self, other: LoadParameters) -> LoadParameters:
        """Return other parameters with these settings."""
        return replace(other, **{name: getattr(self, name) for name in SETTINGS})

    def with_limits_from(self, timeout_s: int, progress_timeout_s: int) -> LoadParameters:
        """Return the parameters with these time limits where their own are shorter."""
        return replace(
            self,
            timeout_s=max(self.timeout_s, timeout_s),
            progress_timeout_s=max(self.progress_timeout_s or 0, progress_timeout_s),
        )

    def has_same_workers(self, other: LoadParameters) -> bool:
        return _workers_of(self) == _workers_of(other)

    def has_same_settings(self, other: LoadParameters) -> bool:
        """Whether a loaded model has the same settings with `other` parameters."""
        own, others = (NEVER if each is None else each for each in (self.keep_alive_s, other.keep_alive_s))
        is_same = own == others and self.pinned == other.pinned and self.max_queue == other.max_queue
        return is_same and self.wanted_copies == other.wanted_copies


ALLOW = "allow"
DEPENDENT_ROWS = ("refuse", ALLOW)
"""Values of `dependent_rows`."""

WORKER_PARAMETERS = (
    *("instances", "max_batch_size", "max_queue_delay_us", "memory_limit_bytes", "threads"),
    *("dependent_rows", "priority_levels", "default_priority_level"),
    *(name for name in ParametersOfFeatures.__struct_fields__ if name not in SETTINGS_OF_FEATURES),
)
"""Parameters of the workers: a change of them loads the model anew."""

_workers_of = attrgetter(*WORKER_PARAMETERS)

SETTINGS = ("pinned", "keep_alive_s", "max_queue", *SETTINGS_OF_FEATURES)
"""Parameters of a loaded model that change without new workers. The others only concern the load itself."""


# Loads, unloads, and the models that they concern.


class LoadRequested(LoadParameters, frozen=True, gc=False, kw_only=True, rename=STORED_NAMES):
    """A person or the system requested the load of a version. The event's id is the job's.

    The parameters are those that apply, whether the request, the loaded model, its loadledger.toml or the
    server chose them. `policy` is the digest of the rules for the model that the load has to pass; it is
    missing without any. `justification` is missing if no person gave one and there are no rules.
    `passed_over` says why the load is not of the highest version in the repository; it is missing if it is,
    and if the request named a version.
    """

    TYPE: ClassVar[str] = "LoadRequested"
    # Without defaults: a body that lacks one is no event.
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
    policy: str | UnsetType = UNSET
    justification: Justification | UnsetType = UNSET
    version_name: str | UnsetType = UNSET
    passed_over: str | UnsetType = UNSET

    @classmethod
    def of(cls, parameters: LoadParameters, cause: Cause, **rest: Any) -> LoadRequested:
        return cls(**asdict(parameters), cause=cause, **rest)

    @property
    def parameters(self) -> LoadParameters:
        """The parameters alone, without what the request records about itself."""
        return LoadParameters(**{name: getattr(self, name) for name in LoadParameters.__struct_fields__})


class LoadJoined(Struct, frozen=True, gc=False):
    """A person's load was answered with this job: it loaded, or will load, what was requested.

    It is recorded once for each actor and job, and for each idempotency key.
    """

    TYPE: ClassVar[str] = "LoadJoined"
    idempotency: Idempotency | None = None


class LoadStarted(FactAtServer, frozen=True, gc=False):
    """The load started; `attempt` counts from 1 and grows when the server restarts during the load.

    It also grows if a start was recorded though its commit raised: no worker belongs to that start. It comes
    twice with the same attempt if the load found other files than its memory was estimated for: then the job
    starts again, with another estimate and worker.
    """

    TYPE: ClassVar[str] = "LoadStarted"
    attempt: int


class ModelLoaded(RecordedEvidence, frozen=True, gc=False, rename=STORED_NAMES):
    """The version serves from here on. Memory is the sum of all workers.

    `verified` says that the workers loaded a private copy, which the server hashed; without it, they loaded
    the repository's files, which may have changed in between. `threads` is how many each worker computes
    with.

    `rows` says whether rows of a batch change each other's answers: they are `independent` or `dependent`, or
    that is `unknown`. Requests of several clients are joined in batches only if rows are independent, or the
    load allows dependent ones. `rows_depend` is the reason for the other two, with the operator. `rows` is
    missing without batching, and in events of releases that ran the model instead of reading its graph: these
    joined requests, and `rows_depend` is what spoke against it.
    """

    TYPE: ClassVar[str] = "ModelLoaded"
    files: tuple[LoadedFile, ...]
    worker_ids: tuple[str, ...]
    memory_bytes: int
    peak_memory_bytes: int
    durations: Durations
    verified: bool = False
    confinement: Confinement | None = None
    threads: int | None = None
    targets: tuple[TargetUse, ...] | UnsetType = UNSET
    rows_depend: str | UnsetType = UNSET
    rows: str | UnsetType = UNSET


class ModelSettingsChanged(Struct, frozen=True, gc=False):
    """The outcome of a load of what is loaded already: these settings apply from here on.

    The load `load_job_id` stays the model's present one, with its workers.
    """

    TYPE: ClassVar[str] = "ModelSettingsChanged"
    load_job_id: str
    keep_alive_s: int | None
    pinned: bool
    copies: int | UnsetType = UNSET
    max_queue: int | UnsetType = UNSET

    @classmethod
    def of(cls, load_job_id: str, parameters: LoadParameters) -> ModelSettingsChanged:
        return cls(load_job_id, **{name: getattr(parameters, name) for name in SETTINGS})

    def change(self, parameters: LoadParameters) -> LoadParameters:
        """Return the parameters of the load with these settings."""
        return replace(parameters, **{name: getattr(self, name) for name in SETTINGS})


class LoadFailed(Struct, frozen=True, gc=False):
    """The load failed."""

    TYPE: ClassVar[str] = "LoadFailed"
    code: str
    message: str


class UnloadRequested(FactAtServer, frozen=True, gc=False):
    """A person or the system requested the end of the load `load_job_id`. The event's id is the job's.

    A person's unload of a model that is not loaded has null there. A demand does not undo a person's
    unload, unless that is `until_asked`.
    """

    TYPE: ClassVar[str] = "UnloadRequested"
    force: bool
    load_job_id: str | None
    cause: Cause
    cause_event_id: str | None = None
    idempotency: Idempotency | None = None
    until_asked: bool | UnsetType = UNSET


class UnloadJoined(Struct, frozen=True, gc=False):
    """A person's unload was answered with this job, which unloads what was requested; as `LoadJoined`."""

    TYPE: ClassVar[str] = "UnloadJoined"
    idempotency: Idempotency | None = None


class UnloadStarted(Struct, frozen=True, gc=False):
    """The model accepts no more requests; running ones are drained."""

    TYPE: ClassVar[str] = "UnloadStarted"


class ModelUnloaded(Struct, frozen=True, gc=False):
    """The workers have exited, and their memory is free.

    `unreturned_bytes` is memory beside the machine's that was not back some seconds later; it is missing if
    all is back.
    """

    TYPE: ClassVar[str] = "ModelUnloaded"
    freed_bytes: int
    drained_requests: int
    aborted_requests: int
    unreturned_bytes: int | UnsetType = UNSET


class CancelRequested(Struct, frozen=True, gc=False):
    """A client asked to cancel the job of this event; of further requests as `LoadJoined`."""

    TYPE: ClassVar[str] = "CancelRequested"
    idempotency: Idempotency | None = None


class JobCancelled(Struct, frozen=True, gc=False):
    """The job was cancelled before it had its effect.

    Attributes:
        reason: `superseded` if a person's load took the place of one by the system; else None.
        superseded_by: the job that took its place.
    """

    TYPE: ClassVar[str] = "JobCancelled"
    reason: str | None = None
    superseded_by: str | None = None


# The server.


class AccessDenied(Struct, frozen=True, gc=False):
    """`actor` was denied `action` for lack of a role, `count` times."""

    TYPE: ClassVar[str] = "AccessDenied"
    action: str
    count: int


class WorkerExited(FactAtServer, frozen=True, gc=False):
    """A worker ended unexpectedly; code and signal are None if it ended with the fork server.

    Attributes:
        stderr: its last lines, then why the server killed it; only the latter with `--ledger-stderr off`.
    """

    TYPE: ClassVar[str] = "WorkerExited"
    exit_code: int | None
    signal: int | None
    stderr: tuple[str, ...]


class ServerStarted(Struct, frozen=True, gc=False):
    """The server started on this log. Jobs are not charged for the time since the server was last seen.

    Attributes:
        unclean: whether the event before was not `ServerStopped`.
        last_event_at: when the event before was recorded; None in a new log.
        last_seen_at: until when the server before is known to have run: until that event, or after an unclean
            end until its last note; None in a new log.
        confinement: of the workers.
        memory: what models, requests and the server may take of its memory.
    """

    TYPE: ClassVar[str] = "ServerStarted"
    unclean: bool
    last_event_at: Timestamp | None = None
    last_seen_at: Timestamp | None = None
    confinement: Confinement | None = None
    memory: PlannedMemory | UnsetType = UNSET

    @property
    def end(self) -> ProcessEnd:
        return ProcessEnd(since=self.last_seen_at, is_death=self.unclean)


class ServerStopped(Struct, frozen=True, gc=False):
    """The server stopped in order. No event per model follows: this ends all loads and workers."""

    TYPE: ClassVar[str] = "ServerStopped"

    @property
    def end(self) -> ProcessEnd:
        return ProcessEnd()


class ClockStepped(Struct, frozen=True, gc=False, rename={"begin": "from", "end": "to"}):
    """The wall clock was set, by more than a minute.

    Attributes:
        begin: the time that it would have shown.
        end: the time that it showed instead.
        taken: whether the ledger's times follow. After a step back they stand until the clock catches up; one
            forward is followed when it has stood for a minute, and not if it was set back before.
    """

    TYPE: ClassVar[str] = "ClockStepped"
    begin: Timestamp
    end: Timestamp
    taken: bool


class PolicyInForce(FactAtServer, frozen=True, gc=False):
    """The server started with another policy for loads than before, with all its rules and their keys."""

    TYPE: ClassVar[str] = "PolicyInForce"
    policy: LoadPolicy


class RollbackAccepted(Struct, frozen=True, gc=False):
    """An operator accepted a ledger, an older or a new one, without the last head that the server signed.

    Attributes:
        kept_position: of that head; 0 if it could not be read.
        kept_hash: its hash in hexadecimal; empty if it could not be read.
        head_position: of the ledger's head as it was accepted.
        head_hash: its hash in hexadecimal.
    """

    TYPE: ClassVar[str] = "RollbackAccepted"
    kept_position: int
    kept_hash: str
    head_position: int
    head_hash: str


class EventsDiscarded(Struct, frozen=True, gc=False):
    """The ledger's owner removed the end of the log, which no server could read; this took its place.

    Attributes:
        first_position: of what was removed: the event that could not be read.
        last_position: of what was removed.
        hash: of the last event that was removed, in hexadecimal.
    """

    TYPE: ClassVar[str] = "EventsDiscarded"
    first_position: int
    last_position: int
    hash: str


# Versions of the repository.


class AddedFile(Struct, frozen=True, gc=False):
    """One file of an added version as it arrived; `path` is relative to the version's folder."""

    path: str
    bytes: int
    sha256: str


class Provenance(Struct, frozen=True, gc=False):
    """Where the actor says that a version came from: a name, and what that meant when it was downloaded."""

    uri: str
    resolved: str


class VersionAdded(FactAtServer, frozen=True, gc=False):
    """A caller put a version into the repository, where it is visible from the moment after this event.

    `files` have the digests that the server computed. `source` is what the actor says of where they came
    from, at which the server has not looked; it is missing if nothing was said.
    """

    TYPE: ClassVar[str] = "VersionAdded"
    files: tuple[AddedFile, ...]
    source: Provenance | UnsetType = UNSET


class VersionRemoved(FactAtServer, frozen=True, gc=False):
    """A version leaves the repository: no load finds it from here on.

    `reason` is `not_placed` if an added version never became visible: another one had taken its place.
    """

    TYPE: ClassVar[str] = "VersionRemoved"
    reason: str | None = None


# Tokens. Their events may be appended while no server runs.


class TokenIssued(Struct, frozen=True, gc=False):
    """The actor issued a token for `subject`; the ledger never has the token itself, but its id, `jti`.

    `via` says how: over the `api`, over the `socket` in the data directory, by a sign-in `link`, or by
    the server for its own user (`serve`). `issued_with` is the id of the actor's token; None on the server's
    machine, which needs none.
    """

    TYPE: ClassVar[str] = "TokenIssued"
    jti: str
    subject: str
    roles: tuple[str, ...]
    expires_at: Timestamp
    via: str | None = None
    issued_with: str | None = None


class TokenRevoked(Struct, frozen=True, gc=False):
    """The actor revoked the token with the id `jti`: it is refused from here on.

    `expires_at` is when the token expires at the latest, if the ledger did not issue it.
    """

    TYPE: ClassVar[str] = "TokenRevoked"
    jti: str
    expires_at: Timestamp | None = None


class SignInLinkIssued(Struct, frozen=True, gc=False):
    """The actor asked for a link that signs a browser in once, within a minute. Its code is not kept."""

    TYPE: ClassVar[str] = "SignInLinkIssued"
    link_id: str


class SignInLinkUsed(Struct, frozen=True, gc=False):
    """The link was used. `TokenIssued` follows, with the actor and the roles of who asked for the link."""

    TYPE: ClassVar[str] = "SignInLinkUsed"
    link_id: str


# All types, and events as they are recorded.


@dataclass(frozen=True, slots=True)
class Unknown:
    """Data of a type or schema version that this release does not know: kept, and skipped by folds."""

    type: str
    schema: int
    data: Mapping[str, Any] = field(hash=False)


Data = (
    LoadRequested | LoadJoined | LoadStarted | ModelLoaded | ModelSettingsChanged | LoadFailed
    | UnloadRequested | UnloadJoined | UnloadStarted | ModelUnloaded | CancelRequested
    | JobCancelled | AccessDenied | WorkerExited | ServerStarted | ServerStopped | ClockStepped
    | RollbackAccepted | EventsDiscarded | VersionAdded | VersionRemoved | TokenIssued | TokenRevoked
    | SignInLinkIssued | SignInLinkUsed | FeatureData | PolicyInForce
)  # fmt: skip
"""The types that this release writes."""

TokenData = TokenIssued | TokenRevoked
"""Data of the events that change a token. Both may be appended while no server runs."""

OF_TOKENS = (TokenIssued, TokenRevoked)

OF_SERVER = (ServerStarted, ServerStopped)
"""The starts and stops of a server."""

ENDS_OF_PROCESSES: frozenset[type[Data]] = frozenset({*OF_SERVER, *ENDS_OF_SERVERS})
"""The events that end processes: they may concern all models and jobs, as their `end` says."""

TYPES: Mapping[str, type[Data]] = {kind.TYPE: kind for kind in Data.__args__}
SCHEMA = 1
"""The schema version of all types so far."""


class Draft(Struct, frozen=True, gc=False):
    """An event before the writer gives it a position and a time."""

    id: str
    data: Data
    actor: str
    job_id: str | None = None
    model_id: str | None = None
    version: int | None = None
    worker_id: str | None = None


class Event(Struct, frozen=True, gc=False):
    """An immutable fact at its position in the log."""

    position: int
    id: str
    data: Data | Unknown
    actor: str
    recorded_at: Timestamp
    job_id: str | None = None
    model_id: str | None = None
    version: int | None = None
    worker_id: str | None = None

    @property
    def type(self) -> str:
        return self.data.type if isinstance(self.data, Unknown) else self.data.TYPE


def record_draft(draft: Draft, position: int, recorded_at: Timestamp) -> Event:
    return Event(position=position, recorded_at=recorded_at, **asdict(draft))


class Anchor(Struct, frozen=True):
    """A position of the log and the hash there: 0 and 32 zero bytes before the first event."""

    position: int = 0
    hash: bytes = bytes(32)
