"""The `Jobs` projection: status and outcome of accepted loads and unloads. A pure fold, one at a time.

`REQUESTS` make a job of the event with its id; `STEPS` change it until it has ended. `CONSEQUENCES` says what
a failed load means for a model that the server reloads: give a new code a row there. A load leaves a
footprint: its peak memory, from which later loads of the model are estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, StrEnum, auto
from typing import Any

from msgspec import UNSET, Struct, UnsetType, field
from msgspec.structs import replace

from events.clock import Timestamp, add_seconds, seconds_between
from events.nodes import ends_processes
from events.types import (
    ENDS_OF_PROCESSES,
    REPLACEMENTS,
    ApprovalAsked,
    ApprovalBypassed,
    ApprovalExpired,
    CancelRequested,
    Cause,
    Contents,
    Data,
    Event,
    JobCancelled,
    Justification,
    LoadApproved,
    LoadedFile,
    LoadFailed,
    LoadJoined,
    LoadParameters,
    LoadPlaced,
    LoadRejected,
    LoadRequested,
    LoadSignature,
    LoadStarted,
    ModelLoaded,
    ModelSettingsChanged,
    ModelUnloaded,
    NodeJoined,
    NodeLeft,
    NodeLost,
    NodeSignature,
    ServerStarted,
    ServerStopped,
    Unknown,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)


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
"""Error code of a reload whose recorded bytes neither the store nor a readable repository has."""


APPROVAL_EXPIRED = "approval_expired"
"""Error code of a load that too few persons approved in time."""

APPROVAL_VOID = "approval_void"
"""Error code of a load whose bytes, or those that its model serves, changed after approval was asked."""

REJECTED = "rejected"
"""Error code of a load that a person rejected."""

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
    # No process, no device, no memory, no disk, no time.
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
    # Decided by the scheduler, or by a comparison of hashes; or the device's provider has been replaced.
    "fallback_refused": Consequence.END,
    CRASH_LOOP: Consequence.END,
    INSUFFICIENT_MEMORY: Consequence.END,
    TOO_MANY_LOADED: Consequence.END,
    BYTES_GONE: Consequence.END,
    "signature_missing": Consequence.END,
    "signature_invalid": Consequence.END,
    "signature_untrusted": Consequence.END,
    "signature_mismatch": Consequence.END,
    "signature_unsupported": Consequence.END,
    "approval_required": Consequence.END,
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


class JobPlacement(Struct, frozen=True, gc=False):
    """The node of a job, and how often the job was placed since a node that had it ended."""

    node_id: str
    times: int = 0


class ApprovalAnswer(Struct, frozen=True, gc=False):
    """One approval of a load, or its bypass, with the signature of the node that took it.

    Attributes:
        by: the person.
        reason: as it was given.
        jti, issuer, issued_by: of the person's token, as in `Credential`.
        node_signature: UNSET at a server alone.
    """

    by: str
    reason: str
    jti: str | None = None
    issuer: str | None = None
    node_signature: NodeSignature | UnsetType = UNSET
    issued_by: tuple[str, ...] = ()


class ApprovalState(Struct, frozen=True, gc=False):
    """How far the approval of a load is; the fields are those of `ApprovalAsked`.

    Attributes:
        files: until they are approved.
        asked_position: of `ApprovalAsked`; None if a person passed by the role `emergency`.
        answers: of those who approved so far, or of the one who passed without.
        given_at, given_position: of the last approval that was needed; None while it waits.
    """

    digest: str
    rule: str
    asked_position: int | None = None
    approvals: int = 0
    expires_at: Timestamp = ""
    files: Contents = ()
    signature: LoadSignature | None = None
    served_version: int | None = None
    served_digest: str | None = None
    answers: tuple[ApprovalAnswer, ...] = ()
    given_at: Timestamp | None = None
    given_position: int | None = None

    @property
    def is_bypassed(self) -> bool:
        return self.asked_position is None

    @property
    def approved_by(self) -> tuple[str, ...]:
        return () if self.is_bypassed else tuple(answer.by for answer in self.answers)

    @property
    def is_given(self) -> bool:
        return self.is_bypassed or self.given_position is not None


class JobPolicy(Struct, frozen=True, gc=False):
    """The rules that a load has to pass, and what persons say of it.

    Attributes:
        digest: of the model's rules, as `LoadRequested.policy`; None without rules.
        justification: of who requested it; None for the system.
        joined_by: other persons who asked for the same.
        approval: None until it is asked for or bypassed.
    """

    digest: str | None = None
    justification: Justification | None = None
    joined_by: tuple[str, ...] = ()
    approval: ApprovalState | None = None


class Job(Struct, frozen=True, gc=False):
    """One accepted load or unload; times are timestamps.

    Attributes:
        load: the parameters of a load; None for others.
        unload: the parameters of an unload; None for others.
        deadline_at: of a load; None for an unload.
        attempt: 0 until the job starts, then one more for each start.
        server_deaths: unclean ends of the server while the job was in progress.
        cancel_requested: whether a client asked to cancel it; `cancelling` says whether that was in time.
        superseded_by: the person's load that took the place of this one by the system.
        placement: the node of a load, or of the load that an unload ends; without nodes it is not
            stored.
        policy: of a load; it is not stored without rules and reasons.
        label: that is set to the version of a load when that is loaded; not stored without.
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
    label: str | UnsetType = UNSET
    unreturned_bytes: int | UnsetType = UNSET
    passed_over: str | UnsetType = UNSET

    @property
    def approval(self) -> ApprovalState | None:
        """How far its approval is; None if it was not asked for."""
        return None if self.policy is UNSET else self.policy.approval

    @property
    def policy_digest(self) -> str | None:
        """The digest of the rules that it has to pass; None without any."""
        return None if self.policy is UNSET else self.policy.digest

    @property
    def waits_for_approval(self) -> bool:
        """Whether it is pending and does nothing until persons answer."""
        approval = self.approval
        return approval is not None and not approval.is_given and not self.ended

    @property
    def queued_position(self) -> int:
        """The position from which it waits its turn: of its request, or of its approval."""
        given = None if self.approval is None else self.approval.given_position
        return self.created_position if given is None else given

    @property
    def queued_at(self) -> Timestamp:
        """The time from which it waits its turn: what persons took to approve it is not the server's."""
        return (self.approval and self.approval.given_at) or self.created_at

    @property
    def node_id(self) -> str | None:
        return None if self.placement is UNSET else self.placement.node_id

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
        """Whether this is an unload by a person, which on-demand loads do not undo."""
        unload = self.unload
        return unload is not None and self.cause is Cause.REQUEST and not unload.until_asked

    @property
    def is_move_or_copy(self) -> bool:
        """Whether this brings a loaded model to another node: it moves off a drained one, or gets a copy."""
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


class PendingLoad(Struct, frozen=True, gc=False):
    """A load of a model that has not ended; `node` is where it started."""

    job_id: str
    version: int
    started: bool = False
    node: str | UnsetType = field(default=UNSET, name="node_id")

    def interrupted(self, event: Event) -> PendingLoad:
        """Return the load after the start or end of a server or node."""
        is_ended = self.started and ends_processes(event.data, None if self.node is UNSET else self.node)
        return replace(self, started=False, node=UNSET) if is_ended else self


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
        placement=UNSET if unload is None or unload.node_id is UNSET else JobPlacement(unload.node_id),
        policy=UNSET if load is None else _find_policy(load),
        label=UNSET if load is None else load.label,
        passed_over=UNSET if load is None else load.passed_over,
    )


def _find_policy(load: LoadRequested) -> JobPolicy | UnsetType:
    if load.policy is UNSET and load.justification is UNSET:
        return UNSET
    return JobPolicy(load.policy or None, load.justification or None)


def _end_processes(job: Job, event: Event, data: Any) -> Job:
    """A server or a node started or ended: its jobs wait for their next attempt, at any node."""
    match data:
        case ServerStarted(unclean=unclean):
            return _interrupt_job(job, event, since=data.last_seen_at, is_death=unclean)
        case ServerStopped():
            is_interrupted = job.status is JobStatus.IN_PROGRESS
            return replace(job, status=JobStatus.PENDING, position=event.position) if is_interrupted else job
        case NodeJoined(unclean=unclean, no_node_since=since):
            if _is_at_ended_node(job, data):
                return _interrupt_job(job, event, since=since, is_death=unclean)
            if since is not None:
                return replace(job, deadline_at=_extend(job, since, event), position=event.position)
        case NodeLeft() | NodeLost() if _is_at_ended_node(job, data):
            return _interrupt_job(job, event, since=None, is_death=isinstance(data, NodeLost))
    return job


def _is_at_ended_node(job: Job, data: NodeJoined | NodeLeft | NodeLost) -> bool:
    """Whether the job is placed at the node, or in progress at none, as before there were nodes."""
    is_somewhere = job.placement is not UNSET or job.status is JobStatus.IN_PROGRESS
    return is_somewhere and ends_processes(data, job.node_id)


def _interrupt_job(job: Job, event: Event, *, since: Timestamp | None, is_death: bool) -> Job:
    """Return the job pending for its next attempt.

    After an orderly stop no job is in progress, so a start interrupts one only after an unclean end.
    """
    return replace(
        job,
        status=JobStatus.PENDING,
        deadline_at=_extend(job, since, event),
        server_deaths=job.server_deaths + (is_death and job.status is JobStatus.IN_PROGRESS),
        position=event.position,
        placement=UNSET,
    )


def _extend(job: Job, since: Timestamp | None, event: Event) -> Timestamp | None:
    """Return the deadline of a job that is not charged for the time since then, when nothing ran."""
    if job.deadline_at is None or since is None:
        return job.deadline_at
    return add_seconds(job.deadline_at, max(0.0, seconds_between(since, event.recorded_at)))


def _place_job(job: Job, event: Event, data: LoadPlaced) -> Job:
    if job.kind is not JobKind.LOAD or job.status is not JobStatus.PENDING:
        return job
    times = 0 if job.placement is UNSET else job.placement.times
    return replace(job, placement=JobPlacement(data.node_id, times + 1), position=event.position)


def _start_job(job: Job, event: Event, data: LoadStarted | UnloadStarted) -> Job:
    attempt = job.attempt + 1 if isinstance(data, UnloadStarted) else data.attempt
    started = replace(
        job,
        status=JobStatus.IN_PROGRESS,
        attempt=attempt,
        started_at=event.recorded_at,
        position=event.position,
    )
    if isinstance(data, UnloadStarted) or data.node_id is UNSET or data.node_id == job.node_id:
        return started
    return replace(started, placement=JobPlacement(data.node_id))


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


def _join_load(job: Job, event: Event, _: LoadJoined) -> Job:
    if job.policy is UNSET or event.actor in (job.requested_by, *job.policy.joined_by):
        return job
    policy = replace(job.policy, joined_by=(*job.policy.joined_by, event.actor))
    return replace(job, policy=policy, position=event.position)


def _ask_approval(job: Job, event: Event, data: ApprovalAsked) -> Job:
    """The load is pending without a deadline until it is approved: a person may need longer than that."""
    if job.status is not JobStatus.PENDING:
        return job
    contents = tuple((file.path, file.sha256) for file in data.files)
    asked = ApprovalState(
        data.digest,
        data.rule,
        event.position,
        data.approvals,
        data.expires_at,
        contents,
        data.signature or None,
        data.served_version,
        data.served_digest,
    )
    return replace(_with_approval(job, event, asked), deadline_at=None)


def _approve(job: Job, event: Event, data: LoadApproved) -> Job:
    """Count an approval of the bytes that were asked for; the time limit begins with the last one."""
    asked = job.approval
    if asked is None or asked.is_given or (asked.digest, asked.rule) != (data.digest, data.rule):
        return job
    if event.actor in asked.approved_by:
        return job
    token = data.credential
    answer = ApprovalAnswer(
        event.actor, data.reason, token.jti, token.issuer, data.node_signature, token.issued_by
    )
    approved = replace(asked, answers=(*asked.answers, answer))
    if len(approved.answers) < asked.approvals or job.load is None:
        return _with_approval(job, event, approved)
    given = replace(approved, given_at=event.recorded_at, given_position=event.position, files=())
    after = _with_approval(job, event, given)
    return replace(after, deadline_at=add_seconds(event.recorded_at, job.load.timeout_s))


def _bypass_approval(job: Job, event: Event, data: ApprovalBypassed) -> Job:
    answer = ApprovalAnswer(event.actor, data.reason, node_signature=data.node_signature)
    return _with_approval(job, event, ApprovalState(data.digest, data.rule, answers=(answer,)))


def _with_approval(job: Job, event: Event, approval: ApprovalState) -> Job:
    policy = JobPolicy() if job.policy is UNSET else job.policy
    return replace(job, policy=replace(policy, approval=approval), position=event.position)


def _reject(job: Job, event: Event, data: LoadRejected) -> Job:
    failure = Failure(REJECTED, f"rejected by {event.actor}: {data.reason}")
    return _end_job(job, event, JobStatus.FAILED, failure)


def _expire_approval(job: Job, event: Event, _: ApprovalExpired) -> Job:
    failure = Failure(APPROVAL_EXPIRED, "it was not approved in time; load it again to ask once more")
    return _end_job(job, event, JobStatus.FAILED, failure)


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
    LoadPlaced: _place_job,
    LoadJoined: _join_load,
    ApprovalAsked: _ask_approval,
    LoadApproved: _approve,
    LoadRejected: _reject,
    ApprovalExpired: _expire_approval,
    ApprovalBypassed: _bypass_approval,
}
"""The step of each event type that concerns one unended job; ends of processes concern all.

A table, because a `match` of so many classes takes as long as the rest of a step (measured).
"""


MAX_FOOTPRINTS = 4
"""Footprints kept of a model: the version that serves, the next, and two to go back to. A model that is
loaded with several numbers of threads, or on several devices, has fewer versions among them."""


class Footprint(Struct, frozen=True, gc=False):
    """The peak memory of one worker that loaded these files.

    `threads` is how many it computed with. `device` is where it ran if not on the CPU, and `device_bytes`
    what it took there of the device's own memory.
    """

    version: int
    files: tuple[LoadedFile, ...]
    peak_memory_bytes: int
    threads: int | None = None
    device: str | UnsetType = UNSET
    device_bytes: int | UnsetType = UNSET

    @property
    def conditions(self) -> tuple[object, ...]:
        """The conditions of the load, beside its files, on which the peak depends."""
        return self.threads, self.device


def footprint_of(version: int, loaded: ModelLoaded) -> Footprint:
    """Return the footprint of one worker of a load: its share of the peak, rounded up."""
    workers = max(1, len(loaded.worker_ids))
    peak_bytes = -(-loaded.peak_memory_bytes // workers)
    seen = Footprint(version, loaded.files, peak_bytes, loaded.threads)
    if not loaded.devices:
        return seen
    use = loaded.devices[0]
    device_bytes = UNSET if use.memory_bytes is None else -(-use.memory_bytes // workers)
    return replace(seen, device=use.device, device_bytes=device_bytes)


def add_footprint(footprints: tuple[Footprint, ...], latest: Footprint) -> tuple[Footprint, ...]:
    """Return the footprints with the latest one added.

    Of the same files, threads and device the highest peak counts, because peaks are sampled;
    of the device's own memory, the last measurement, but not none or 0: the driver did not answer, or another
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
                device_bytes=latest.device_bytes or known.device_bytes,
            )
    return (*others, latest)[-MAX_FOOTPRINTS:]
