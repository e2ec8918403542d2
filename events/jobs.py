"""The `Jobs` projection: status and outcome of accepted loads and unloads. A pure fold, one at a time.

`REQUESTS` make a job of the event with its id; `STEPS` change it until it has ended. `CONSEQUENCES` says what
a failed load means for a model that the server reloads: give a new code a row there. A load leaves a
footprint: its peak memory, from which later loads of the model are estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, StrEnum, auto
from typing import Any

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.clock import Timestamp, add_seconds, seconds_between
from events.types import (
    ENDS_OF_PROCESSES,
    REPLACEMENTS,
    CancelRequested,
    Cause,
    Data,
    Event,
    JobCancelled,
    Justification,
    LoadedFile,
    LoadFailed,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelSettingsChanged,
    ModelUnloaded,
    ServerStarted,
    ServerStopped,
    Unknown,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)
from events.values import ProcessEnd
from features.facts import PLACEMENTS, STORED_NAMES
from features.rules import POLICY_CODES


class JobKind(StrEnum):
    """The kind of a job."""

    LOAD = "load"
    UNLOAD = "unload"


class JobStatus(StrEnum):
    """The status of a job."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


_UNENDED = (JobStatus.PENDING, JobStatus.IN_PROGRESS)


CRASH_LOOP = "crash_loop"
"""Error code of a load that the scheduler gave up, because its workers kept dying."""

FORK_SERVER_DIED = "fork_server_died"
"""Error code of a load whose worker ended with the fork server: no fault of the model."""

INSUFFICIENT_MEMORY = "insufficient_memory"
"""Error code of a load that never fits into the memory budget, or of a restore that does not fit now."""

TOO_MANY_LOADED = "too_many_loaded"
"""Error code of a restore beyond `--max-loaded`."""

TIMEOUT = "timeout"
"""Error code of a load that missed its deadline."""

NO_PROGRESS = "no_progress"
"""Error code of a load that made no progress for its `progress_timeout_s`."""

BYTES_GONE = "bytes_gone"
"""Error code of a load that brings back recorded bytes which neither the store nor the repository has."""


POLICY_DIFFERS = "policy_differs"
"""Error code of a load that was accepted under other rules than those in force."""


class Consequence(Enum):
    """The consequence of a failed reload for its model."""

    INCIDENT = auto()
    """It speaks against the model: enough of these within ten minutes, and the model is given up."""

    RETRY = auto()
    """The circumstances were to blame: the back-off grows up to its limit, and reloads go on."""

    END = auto()
    """Another attempt would end likewise: the model is given up at once."""


CONSEQUENCES: Mapping[str, Consequence] = {
    # The worker died, or the model does not load by itself, or never ends to load.
    "worker_died": Consequence.INCIDENT,
    "invalid_model": Consequence.INCIDENT,
    "warm_up_failed": Consequence.INCIDENT,
    "rows_depend": Consequence.INCIDENT,
    NO_PROGRESS: Consequence.INCIDENT,
    "not_encodable": Consequence.INCIDENT,
    # No process, no hardware, no memory, no disk, no time.
    FORK_SERVER_DIED: Consequence.RETRY,
    "device_unavailable": Consequence.RETRY,
    "fork_server_unavailable": Consequence.RETRY,
    "out_of_memory": Consequence.RETRY,
    "disk_full": Consequence.RETRY,
    "store_full": Consequence.RETRY,
    "store_unavailable": Consequence.RETRY,
    TIMEOUT: Consequence.RETRY,
    # The repository, as it is at the moment.
    "unknown_model": Consequence.RETRY,
    "unknown_version": Consequence.RETRY,
    "unsafe_file": Consequence.RETRY,
    "model_changed": Consequence.RETRY,
    "invalid_defaults": Consequence.RETRY,
    "repository_unreadable": Consequence.RETRY,
    "repository_busy": Consequence.RETRY,
    # The rules for the model changed since the reload was requested: it is requested anew.
    POLICY_DIFFERS: Consequence.RETRY,
    # The server itself; its log has the reason.
    "internal": Consequence.RETRY,
    # Decided by the scheduler, or by a comparison of hashes; or an execution provider has been replaced.
    "fallback_refused": Consequence.END,
    CRASH_LOOP: Consequence.END,
    INSUFFICIENT_MEMORY: Consequence.END,
    TOO_MANY_LOADED: Consequence.END,
    BYTES_GONE: Consequence.END,
    **dict.fromkeys(POLICY_CODES, Consequence.END),
}


def consequence_of(code: str) -> Consequence:
    return CONSEQUENCES.get(code, Consequence.INCIDENT)


class Failure(Struct, frozen=True, gc=False):
    """Why a job or a model failed: a stable code, and a message for people."""

    code: str
    message: str


MAX_RETRIES = 6
"""Retries that are counted: the back-off doubles with each, and has reached its limit then."""


class Retries(Struct, frozen=True, gc=False):
    """Failed reloads in a row that speak against the circumstances only, and when the last failed."""

    count: int
    last_at: Timestamp


def count_retry(retries: Retries | None, failed_at: Timestamp) -> Retries:
    return Retries(min(MAX_RETRIES, 1 + (retries.count if retries is not None else 0)), failed_at)


INCIDENT_WINDOW_S = 600
"""How long deaths and failed recoveries count as incidents: with pauses that double to 30 s, a model that
crashes at each reload has five well within it, and one that crashes now and then never has."""


def recent_incidents(incidents: tuple[Timestamp, ...], now: Timestamp) -> tuple[Timestamp, ...]:
    return tuple(past for past in incidents if seconds_between(past, now) <= INCIDENT_WINDOW_S)


def describe_exit(data: WorkerExited) -> str:
    if data.signal is not None:
        return f"its worker was killed by signal {data.signal}"
    if data.exit_code is not None:
        return f"its worker ended with exit code {data.exit_code}"
    return "its worker ended with the fork server"


class UnloadParameters(Struct, frozen=True, gc=False):
    """The parameters of an unload, and the load that it ends; as `UnloadRequested` has them."""

    force: bool
    load_job_id: str | None
    until_asked: bool | UnsetType = UNSET


class JobPlacement(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """The server of a job, and how often the job was placed since a server that had it ended."""

    server: str
    times: int = 0


class JobPolicy(Struct, frozen=True, gc=False):
    """The rules that a load has to pass, and the reasons of who asked for it.

    Attributes:
        digest: of the model's rules, as `LoadRequested.policy`; None without rules.
        justification: of who requested it; None for the system.
    """

    digest: str | None = None
    justification: Justification | None = None


class Job(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """One accepted load or unload; times are timestamps.

    Attributes:
        load: the parameters of a load; None for others.
        unload: the parameters of an unload; None for others.
        deadline_at: of a load; None for an unload.
        attempt: 0 until the job starts, then one more for each start.
        server_deaths: unclean ends of the server while the job was in progress.
        cancel_requested: whether a client asked to cancel it; `cancelling` says whether that was in time.
        superseded_by: the person's load that took the place of this one by the system.
        placement: the server of a load, or of the load that an unload ends; not stored at a server alone.
        policy: of a load; it is not stored without rules and reasons.
        version_name: that a load gives to its version when that is loaded; not stored without.
        passed_over: of a load: why it does not have the highest version; not stored without.
        unreturned_bytes: of a completed unload, as `ModelUnloaded` has it; not stored without.
    """

    id: str
    kind: JobKind
    model_id: str
    version: int | None
    status: JobStatus
    created_at: Timestamp
    created_position: int
    position: int
    requested_by: str
    cause: Cause
    load: LoadParameters | None = None
    unload: UnloadParameters | None = None
    deadline_at: Timestamp | None = None
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    attempt: int = 0
    server_deaths: int = 0
    error: Failure | None = None
    cancel_requested: bool = False
    superseded_by: str | None = None
    placement: JobPlacement | UnsetType = UNSET
    policy: JobPolicy | UnsetType = UNSET
    version_name: str | UnsetType = UNSET
    unreturned_bytes: int | UnsetType = UNSET
    passed_over: str | UnsetType = UNSET

    @property
    def policy_digest(self) -> str | None:
        """The digest of the rules that it has to pass; None without any."""
        return None if self.policy is UNSET else self.policy.digest

    @property
    def server(self) -> str | None:
        """The server where it runs; None at a server alone."""
        return None if self.placement is UNSET else self.placement.server

    @property
    def load_order(self) -> tuple[int, LoadParameters]:
        """The version and the parameters of a load.

        Raises:
            RuntimeError: the job has none: it is an unload, or the stored job is damaged.
        """
        if self.version is None or self.load is None:
            raise RuntimeError(f"job {self.id} is no load of a version: the stored job is damaged")
        return self.version, self.load

    @property
    def ended(self) -> bool:
        return self.status not in _UNENDED

    @property
    def forced(self) -> bool:
        """Whether this is an unload that aborts running requests."""
        return self.unload is not None and self.unload.force

    @property
    def takes_out_of_service(self) -> bool:
        """Whether this is an unload by a person, which inferences do not undo."""
        unload = self.unload
        return unload is not None and self.cause is Cause.REQUEST and not unload.until_asked

    @property
    def is_move_or_copy(self) -> bool:
        """Whether this brings a loaded model to another server: off a drained one, or as a copy."""
        return self.kind is JobKind.LOAD and self.cause in (Cause.DRAIN, Cause.COPY)

    @property
    def cancellable(self) -> bool:
        """Whether the job can still be cancelled: an unload until it starts, others until they have ended.

        An unload of a replaced load cannot: the swap has taken place.
        """
        if self.kind is not JobKind.UNLOAD:
            return not self.ended
        is_replaced = self.cause in REPLACEMENTS
        return self.status is JobStatus.PENDING and self.attempt == 0 and not is_replaced

    @property
    def cancelling(self) -> bool:
        """Whether the job will end as cancelled: a client asked for it in time."""
        return self.cancel_requested and self.cancellable


class PendingLoad(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """A load of a model that has not ended; `at` is the server where it started."""

    job_id: str
    version: int
    started: bool = False
    at: str | UnsetType = UNSET

    def interrupted(self, end: ProcessEnd) -> PendingLoad:
        """Return the load after an end of processes."""
        is_ended = self.started and end.is_at(self.at or None)
        return replace(self, started=False, at=UNSET) if is_ended else self


def evolve_job(job: Job | None, event: Event) -> Job | None:
    """Return the job after `event`; one that does not concern the job changes nothing."""
    data = event.data
    if job is None:
        if not isinstance(data, REQUESTS) or event.model_id is None or event.job_id != event.id:
            return None
        return _create_job(event, event.model_id, data)
    if job.status not in _UNENDED:
        return job
    if type(data) in ENDS_OF_PROCESSES:
        return _end_processes(job, event, data)
    step = STEPS.get(type(data))
    return job if step is None or event.job_id != job.id else step(job, event, data)


REQUESTS = (LoadRequested, UnloadRequested)
"""The events that create a job."""


def _create_job(event: Event, model_id: str, data: LoadRequested | UnloadRequested) -> Job:
    load = data if isinstance(data, LoadRequested) else None
    unload = data if isinstance(data, UnloadRequested) else None
    return Job(
        id=event.id,
        kind=JobKind.LOAD if load else JobKind.UNLOAD,
        model_id=model_id,
        version=event.version,
        status=JobStatus.PENDING,
        created_at=event.recorded_at,
        created_position=event.position,
        position=event.position,
        requested_by=event.actor,
        cause=data.cause,
        load=load.parameters if load else None,
        unload=UnloadParameters(unload.force, unload.load_job_id, unload.until_asked) if unload else None,
        deadline_at=add_seconds(event.recorded_at, load.timeout_s) if load else None,
        placement=UNSET if unload is None or unload.server is UNSET else JobPlacement(unload.server),
        policy=UNSET if load is None else _find_policy(load),
        version_name=UNSET if load is None else load.version_name,
        passed_over=UNSET if load is None else load.passed_over,
    )


def _find_policy(load: LoadRequested) -> JobPolicy | UnsetType:
    if load.policy is UNSET and load.justification is UNSET:
        return UNSET
    return JobPolicy(load.policy or None, load.justification or None)


def _end_processes(job: Job, event: Event, data: Any) -> Job:
    """A server started or ended: its jobs wait for their next attempt, at any server.

    After an orderly stop no job is in progress, so a start interrupts one only after an unclean end; a stop
    leaves a job where it is placed.
    """
    end: ProcessEnd = data.end
    is_running = job.status is JobStatus.IN_PROGRESS
    placement = job.placement if isinstance(data, ServerStopped) else UNSET
    is_there = (is_running or job.placement is not placement) and end.is_at(job.server)
    is_interrupted = is_there or isinstance(data, ServerStarted)
    if not is_interrupted and end.since is None:
        return job
    job = replace(job, deadline_at=_extend(job, end.since, event), position=event.position)
    if not is_interrupted:
        return job
    deaths = job.server_deaths + (end.is_death and is_running)
    return replace(job, status=JobStatus.PENDING, server_deaths=deaths, placement=placement)


def _extend(job: Job, since: Timestamp | None, event: Event) -> Timestamp | None:
    """Return the deadline of a job that is not charged for the time since then, when nothing ran."""
    if job.deadline_at is None or since is None:
        return job.deadline_at
    return add_seconds(job.deadline_at, max(0.0, seconds_between(since, event.recorded_at)))


def _place_job(job: Job, event: Event, data: Any) -> Job:
    if job.kind is not JobKind.LOAD or job.status is not JobStatus.PENDING:
        return job
    times = 0 if job.placement is UNSET else job.placement.times
    return replace(job, placement=JobPlacement(data.server, times + 1), position=event.position)


def _start_job(job: Job, event: Event, data: LoadStarted | UnloadStarted) -> Job:
    attempt = job.attempt + 1 if isinstance(data, UnloadStarted) else data.attempt
    started = replace(
        job,
        status=JobStatus.IN_PROGRESS,
        attempt=attempt,
        started_at=event.recorded_at,
        position=event.position,
    )
    if isinstance(data, UnloadStarted) or data.server is UNSET or data.server == job.server:
        return started
    return replace(started, placement=JobPlacement(data.server))


def _complete_job(job: Job, event: Event, data: ModelLoaded | ModelSettingsChanged | ModelUnloaded) -> Job:
    ended = _end_job(job, event, JobStatus.COMPLETED)
    return (
        replace(ended, unreturned_bytes=data.unreturned_bytes) if isinstance(data, ModelUnloaded) else ended
    )


def _fail_job(job: Job, event: Event, data: LoadFailed) -> Job:
    return _end_job(job, event, JobStatus.FAILED, Failure(data.code, data.message))


def _cancel_job(job: Job, event: Event, data: JobCancelled) -> Job:
    return replace(_end_job(job, event, JobStatus.CANCELLED), superseded_by=data.superseded_by)


def _end_job(job: Job, event: Event, status: JobStatus, error: Failure | None = None) -> Job:
    return replace(job, status=status, error=error, finished_at=event.recorded_at, position=event.position)


def _cancel_requested(job: Job, event: Event, _: CancelRequested) -> Job:
    if job.cancel_requested:  # by somebody else as well, which changes nothing
        return job
    return replace(job, cancel_requested=True, position=event.position)


def _worker_exited(job: Job, event: Event, _: WorkerExited) -> Job:
    return replace(job, position=event.position)


STEPS: Mapping[type[Data | Unknown], Callable[[Job, Event, Any], Job]] = {
    LoadStarted: _start_job,
    UnloadStarted: _start_job,
    ModelLoaded: _complete_job,
    ModelSettingsChanged: _complete_job,
    ModelUnloaded: _complete_job,
    LoadFailed: _fail_job,
    JobCancelled: _cancel_job,
    CancelRequested: _cancel_requested,
    WorkerExited: _worker_exited,
    **dict.fromkeys(PLACEMENTS, _place_job),
}
"""The step of each event type that concerns one unended job; ends of processes concern all.

A table, because a `match` of so many classes takes as long as the rest of a step (measured).
"""


MAX_FOOTPRINTS = 4
"""Footprints kept of a model: the version that serves, the next, and two to go back to. A model that is
loaded with several numbers of threads, or on several targets, has fewer versions among them."""


class Footprint(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """The peak memory of one worker that loaded these files.

    `position` is that of the latest `ModelLoaded`. `threads` is how many it computed with. `target_name` is
    where it ran if not on the CPU, and `target_bytes` what it took there beside the machine's memory.
    """

    version: int
    files: tuple[LoadedFile, ...]
    peak_memory_bytes: int
    threads: int | None = None
    target_name: str | UnsetType = UNSET
    target_bytes: int | UnsetType = UNSET
    position: int = 0

    @property
    def target(self) -> str:
        """Where it ran; empty is the CPU."""
        return self.target_name or ""

    @property
    def conditions(self) -> tuple[object, ...]:
        """The conditions of the load, beside its files, on which the peak depends."""
        return self.threads, self.target_name


def footprint_of(version: int, loaded: ModelLoaded, position: int) -> Footprint:
    """Return the footprint of one worker of a load: its share of the peak, rounded up."""
    workers = max(1, len(loaded.worker_ids))
    peak_bytes = -(-loaded.peak_memory_bytes // workers)
    seen = Footprint(version, loaded.files, peak_bytes, loaded.threads, position=position)
    if not loaded.targets:
        return seen
    use = loaded.targets[0]
    target_bytes = UNSET if use.memory_bytes is None else -(-use.memory_bytes // workers)
    return replace(seen, target_name=use.target, target_bytes=target_bytes)


def add_footprint(footprints: tuple[Footprint, ...], latest: Footprint) -> tuple[Footprint, ...]:
    """Return the footprints with the latest one added.

    Of the same files, threads and target the highest peak counts, because peaks are sampled;
    of the target's own memory, the last measurement, but not none or 0: the driver did not answer, or another
    process returned as much meanwhile. Footprints of other files of the same version are dropped.
    """
    others = []
    for known in footprints:
        is_same_files = known.files == latest.files
        is_same_load = is_same_files and known.conditions == latest.conditions
        if known.version != latest.version or (is_same_files and not is_same_load):
            others.append(known)
        elif is_same_load:
            latest = replace(
                latest,
                peak_memory_bytes=max(known.peak_memory_bytes, latest.peak_memory_bytes),
                target_bytes=latest.target_bytes or known.target_bytes,
            )
    return (*others, latest)[-MAX_FOOTPRINTS:]
