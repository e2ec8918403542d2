"""A simulation around the real `accept`, folds and `decide`: log, clock, processes, memory, requests."""

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import pytest
from msgspec import UNSET
from msgspec.structs import asdict
from msgspec.structs import replace as change

from events.accept import accept
from events.clock import add_seconds
from events.commands import Accepted, Command, Condition, Decision, Record
from events.jobcommands import RequestCancel, RequestLoad, RequestUnload
from events.jobs import FORK_SERVER_DIED, NO_PROGRESS, Failure, Job, JobStatus
from events.models import RELOADS, Model, ModelState
from events.state import State
from events.statements import Sign
from events.types import (
    SYSTEM,
    AddedFile,
    Cause,
    Contents,
    Draft,
    Event,
    JobCancelled,
    LoadedFile,
    LoadFailed,
    LoadJoined,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelSettingsChanged,
    ModelUnloaded,
    ServerStarted,
    ServerStopped,
    UnloadRequested,
    UnloadStarted,
    VersionAdded,
    WorkerExited,
    contents_of,
    digest_of,
    record_draft,
)
from events.values import Credential
from events.versioncommands import AddVersion
from events.versions import ModelVersions
from features.approvals.commands import ApproveVersion, WithdrawApproval
from features.approvals.facts import ApprovalResult, LoadApproval, VersionApproved
from features.beforeload import CheckedLoad, CheckInput, NotLoadable
from features.checks import check_load
from features.devices.names import CPU, find_matching
from features.rules import ModelRules
from runtime.consumer.loads import find_expected
from runtime.consumer.running import RunningLoad
from runtime.elsewhere import ALONE, Elsewhere, SystemCommand
from runtime.rooms import Allocation, Alternative
from runtime.scheduler import actions
from runtime.scheduler.actions import (
    Action,
    build_request,
    draft_crash_loop,
    draft_fact,
    draft_load_start,
    draft_settings_change,
    unchanged,
)
from runtime.scheduler.actions import Decision as Next
from runtime.scheduler.admission import find_same_workers
from runtime.scheduler.scheduler import is_load_current
from runtime.scheduler.view import (
    LoadView,
    MemoryEstimate,
    Observations,
    Phase,
    Policy,
    SchedulerView,
    find_started_job,
    may_end,
)
from runtime.timeouts import PROGRESS_TIMEOUT_S
from support.decisions import SimulatedWorker, live_load, need
from support.history import at, model_loaded

MODEL_BYTES = {
    ("a", 1): 20, ("a", 2): 60, ("b", 1): 45, ("b", 2): 70, ("c", 1): 55, ("c", 2): 120, ("d", 1): 30,
    ("e", 1): 30,
}  # fmt: skip
"""Bytes that one instance takes at most, by model and version; those of 120 fit in no budget."""


CHANGED_BYTES = 15
"""Additional bytes of an instance of files that changed between the estimate and the copy."""

HOST_BYTES = 5
"""Bytes of the machine's memory of an instance on a device with memory of its own."""

OUTCOMES = (ModelLoaded, ModelSettingsChanged, LoadFailed, ModelUnloaded, JobCancelled)

_ALONE = (Cause.IDLE, Cause.EVICTION, Cause.RESTART)
"""Causes of unloads by the system of models that nobody asked anything of."""


def estimate_of(job: Job, *, changed: bool = False) -> int:
    """Return the memory estimate of a load."""
    version, parameters = job.load_order
    return (MODEL_BYTES[job.model_id, version] + changed * CHANGED_BYTES) * parameters.instances


def estimate_devices(
    job: Job, policy: Policy, default: tuple[str, ...], needed_bytes: int
) -> tuple[Alternative, ...]:
    """Return what a load needs on each device that it names, or else of the default, of those there are.

    Raises:
        LookupError: there is none of them.
    """
    _, parameters = job.load_order
    names = find_matching(parameters.devices or default, (CPU, *policy.rooms))
    if not names:
        raise LookupError
    host_bytes = HOST_BYTES * parameters.instances
    return tuple(
        need(host_bytes if has_memory(policy, name) else needed_bytes, name, there=needed_bytes)
        for name in names
    )


def has_memory(policy: Policy, name: str) -> bool:
    """Whether a target is a device with memory of its own."""
    return name in policy.rooms and policy.rooms[name].is_measured


def is_unchanged(job: Job) -> bool:
    """Return whether the files of a load are those loaded before: of two loads those of one."""
    return job.created_position % 2 == 0


def files_of(model_id: str, version: int, change: int) -> tuple[LoadedFile, ...]:
    """Return the files of a version after so many changes."""
    about = f"{model_id} {version} {change}".encode()
    return (LoadedFile("model.onnx", 9, 1, hashlib.sha256(about).hexdigest()),)


def added_files(files: Iterable[LoadedFile]) -> tuple[AddedFile, ...]:
    return tuple(AddedFile(each.path, each.bytes, each.sha256) for each in files)


def withdrawal_of(model_id: str, state: State) -> WithdrawApproval:
    """Return the withdrawal of the latest approval of a model."""
    given = state.registers.find_versions(model_id).approvals
    return WithdrawApproval(model_id, given[-1].version if given else 1, "dave", "it drifts", Credential())


def request_of(kind: str, model_id: str, state: State, load: RequestLoad) -> Command:
    """Return a client's command on a model; `cancel` its first job, `withdraw` its last approval."""
    match kind:
        case "load":
            return replace(load, model_id=model_id)
        case "cancel":
            queue = state.queue(model_id)
            return RequestCancel(queue[0].id if queue else "", "alice")
        case "withdraw":
            return withdrawal_of(model_id, state)
    return RequestUnload(model_id, "alice", force=kind == "force")


@dataclass
class Process(Allocation):
    """The workers of one load: `dead` exited unexpectedly, and if `ended` is set, so have all others."""

    model_id: str
    version: int
    workers: tuple[str, ...]
    reserved_bytes: int = 0
    measured_bytes: int = 0
    started: bool = False
    loaded: bool = False
    failure: str | None = None
    is_as_estimated: bool = True
    has_other_files: bool = False
    hangs_until: str | None = None
    dead: dict[str, WorkerExited] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    ended: bool = False
    unloading: bool = False
    killed: bool = False
    busy: bool = False
    last_used_at: str | None = None
    chosen: Alternative = field(default_factory=lambda: need(0))
    has_own_memory: bool = False
    keeps_percent: int = 100
    load_s: float = 0.0

    @property
    def run(self) -> RunningLoad:
        """Its workers now, to the product's own rules."""
        workers = self.workers if self.started else ()
        left = self.left
        sizes = dict.fromkeys(left[:1], self.measured_bytes)
        run = live_load(
            *(SimulatedWorker(each, each not in left, sizes.get(each, 0)) for each in workers),
            loaded=self.loaded,
            failed=self.failure is not None or bool(self.dead),
            tasks=not self.is_over,
            model=self.model_id,
            allocation=self,
        )
        run.expected_exits = set(workers).difference(self.dead)
        run.unloading, run.killed, run.reserved_bytes = self.unloading, self.killed, self.reserved_bytes
        return run

    def list_taken(self, memory_bytes: int) -> dict[str, int]:
        """Return what it reserved, or takes, of the machine, and of its device."""
        taken = dict.fromkeys(self.chosen.needs, memory_bytes)
        if self.has_own_memory:
            name = self.chosen.target.name
            taken[name] = self.chosen.needs[name] * self.keeps_percent // 100 if memory_bytes else 0
        return taken

    @property
    def is_over(self) -> bool:
        """Whether its coroutine knows how the load ends, or was cancelled."""
        return bool(
            self.loaded or self.failure or self.has_other_files or self.dead or self.ended or self.killed
        )

    def view(self, job: Job | None, load: str, *, demanded: bool = False) -> LoadView:
        run = self.run
        return replace(
            run.to_view(job),
            load_job_id=load,
            has_outcome=self.loaded or self.failure is not None or bool(self.dead),
            busy=self.busy or demanded,
            last_used_at=self.last_used_at,
            load_s=self.load_s,
        )

    @property
    def left(self) -> list[str]:
        """The workers that have started, and not exited."""
        workers = self.workers if self.started and not self.ended else ()
        return [worker for worker in workers if worker not in self.dead]

    def die(self, end: WorkerExited, *workers: str) -> None:
        self.dead.update({worker: end for worker in workers if worker in self.left})

    def answer(self, now: str) -> None:
        """Its last request ends."""
        if self.busy:
            self.busy, self.last_used_at = False, now

    def hang(self, now: str) -> None:
        """Its load makes no progress from now on."""
        self.started = True
        self.hangs_until = self.hangs_until or add_seconds(now, PROGRESS_TIMEOUT_S)

    def fail_without_progress(self) -> None:
        """Its load has made no progress for too long."""
        self.failure, self.killed = NO_PROGRESS, True

    def finish(self, outcome: str, keeps_percent: int = 80) -> None:
        """End its load: it is loaded, and keeps so much of what was reserved; refused; or a worker dies.

        One that hangs ends by its limit only, and one that finds other files begins again, once.
        """
        if self.hangs_until is not None or self.is_over:
            return
        if outcome == "other files" and self.is_as_estimated and not self.started:
            self.has_other_files = self.killed = True
            return
        self.started = True
        match outcome:
            case "loaded":
                self.loaded = True
                self.measured_bytes = self.reserved_bytes * keeps_percent // 100
                self.keeps_percent = keeps_percent
            case "refused":
                self.failure, self.killed = "invalid_model", True
            case "other files" | "dies":
                self.failure, self.killed = "worker_died", True
                self.die(WorkerExited(None, 9, ()), self.workers[-1])
            case _:
                pytest.fail(outcome)


def check_fact(
    event: Event, state: State, before: Sequence[Event], exited: set[str | None], outdated: Container[str]
) -> None:
    """Each fact is recorded once, and no request of the system undoes what a client asked for.

    Args:
        event: about to be recorded.
        state: before it.
        before: the events before it.
        exited: the workers whose exits are recorded, to which this one's is added.
        outdated: the loads that found other files: they start again in the same attempt.
    """
    job, data = state.unended_job(event.job_id), event.data
    if isinstance(data, OUTCOMES):
        assert job is not None
        assert not (isinstance(data, ModelLoaded) and job.cancelling)
        if isinstance(data, JobCancelled) and data.superseded_by is not None:
            check_superseded(job, data.superseded_by, before[-1])
    elif isinstance(data, LoadStarted):
        assert job is not None
        assert not job.cancelling
        begins_again = job.id in outdated and job.status is JobStatus.IN_PROGRESS
        assert data.attempt == job.attempt + (not begins_again)
    elif isinstance(data, UnloadStarted):
        assert job is not None
        assert not job.cancelling
        assert job.status is JobStatus.PENDING
    elif isinstance(data, WorkerExited):
        assert event.worker_id not in exited
        exited.add(event.worker_id)
    elif isinstance(data, LoadRequested) or (isinstance(data, UnloadRequested) and data.cause in _ALONE):
        assert event.actor != SYSTEM or state.queue(event.model_id or "") == []


def check_superseded(job: Job, by: str, request: Event) -> None:
    """A load of the system that has not started gives way to a client's load, requested with it."""
    assert job.cause is not Cause.REQUEST
    assert job.status is JobStatus.PENDING
    assert not job.cancelling
    assert isinstance(request.data, LoadRequested)
    assert (request.id, request.model_id, request.data.cause) == (by, job.model_id, Cause.REQUEST)


@dataclass(frozen=True)
class LoadStart:
    """What the ledger had of a model when a load of it started; the approvals are those that persons gave."""

    model: Model
    versions: ModelVersions


def check_approval(
    approval: LoadApproval, job: Job, rules: ModelRules, digest: str, start: LoadStart
) -> None:
    """A load of bytes under rules was approved by enough others, is a reload, or an emergency for them."""
    assert approval.rule == rules.approval_digest
    match approval.result:
        case ApprovalResult.APPROVED:
            given = [each for each in start.versions.approvals if each.position in approval.positions]
            adders = {each.by for each in start.versions.added if each.digest == digest}
            persons = {each.by for each in given}
            assert {each.digest for each in given} == {digest}
            assert len(persons) == len(approval.positions) == rules.persons
            assert persons == {*approval.by}
            assert not persons & {job.requested_by, *adders}
            assert adders or not rules.needs_adder
        case ApprovalResult.BYPASSED:
            said = None if job.policy is UNSET else job.policy.justification
            assert said is not None
            assert said.emergency
            assert said.digest == digest
            assert rules.allows_emergency
        case ApprovalResult.RELOAD:
            assert job.cause in RELOADS
            assert digest in {each.digest for each in start.model.held}


class Ledger:
    """The one log: decides commands, records events, and checks that each may be recorded.

    Attributes:
        worlds: the consumers that append to it.
        changes: which of its contents a version has in the repository.
        forged: the positions of approvals that were not given as commands: no person gave them.
    """

    def __init__(self) -> None:
        self.state = State()
        self.events: list[Event] = []
        self.worlds: list[World] = []
        self.changes = Counter[tuple[str, int]]()
        self._exited: set[str | None] = set()
        self._chosen = dict[str, tuple[int, Contents] | None]()  # None: unloaded by a person
        self._kept = dict[tuple[str, int], Contents]()  # of versions that were loaded since they were added
        self.forged = set[int]()
        self._starts = dict[str, LoadStart]()
        self._ids = count(1)

    def new_id(self) -> str:
        return f"j{next(self._ids)}"

    def submit(self, command: Command, now: str, by: "World | None" = None) -> Decision:
        """Decide a command of a client, or of a consumer."""
        now = max(now, self.state.recorded_at)
        decision = accept(self.state, command, self.new_id, now)
        drafts = decision.drafts if isinstance(decision, Accepted) else ()
        for number, draft in enumerate(drafts):
            self.check(draft, drafts[number + 1 :], by)
            self._check_rules(draft, by)
            is_forged = isinstance(command, Record) and by is None
            self._check_choice(draft, draft.model_id or "", is_forged=is_forged)
            self._note_choice(draft, draft.model_id or "")
            if isinstance(draft.data, VersionApproved) and isinstance(command, Record):
                self.forged.add(self.state.position + 1)
            self._record(draft, now)
        return decision

    def check(self, draft: Draft, following: Sequence[Draft], by: "World | None") -> None:
        """Check a fact before it is recorded, with those that are recorded with it."""

    def _check_choice(self, draft: Draft, model_id: str, *, is_forged: bool) -> None:
        """An inference has only what a person chose last loaded, and nothing after a person's unload.

        What was forged, as an earlier release would have decided it, may have another version.
        """
        job, model = self.state.unended_job(draft.job_id), self.state.models.get(model_id)
        is_chosen, chosen, version = model_id in self._chosen, self._chosen.get(model_id), draft.version or 0
        match draft.data:
            case LoadRequested(cause=Cause.DEMAND) if not is_forged:
                assert not self.state.queue(model_id)
                assert not is_chosen or (chosen is not None and chosen[0] == version)
                assert model is None or model.phase is not ModelState.LOADED or model.is_to_return
            case ModelLoaded(files=files) if job is not None and job.cause is Cause.DEMAND:
                if not is_chosen:
                    expected = self._kept.get((model_id, version))
                else:
                    expected = chosen[1] if chosen is not None and chosen[0] == version else None
                assert expected is None or contents_of(files) == expected

    def _note_choice(self, draft: Draft, model_id: str) -> None:
        """Note what a person has loaded or unloaded by a fact, and the bytes of versions."""
        job, model = self.state.unended_job(draft.job_id), self.state.models.get(model_id)
        is_by_person, version = job is not None and job.cause is Cause.REQUEST, draft.version or 0
        match draft.data:
            case VersionAdded():
                self._kept.pop((model_id, version), None)
            case ModelLoaded(files=files):
                self._kept[model_id, version] = contents_of(files)
                if is_by_person:
                    self._chosen[model_id] = version, contents_of(files)
            case LoadJoined() | ModelSettingsChanged() if model is not None:
                load = (
                    draft.data.load_job_id if isinstance(draft.data, ModelSettingsChanged) else draft.job_id
                )
                serving = model.find_serving(load)
                if serving is not None and (is_by_person or isinstance(draft.data, LoadJoined)):
                    self._chosen[model_id] = serving.version, contents_of(serving.files)
            case ModelUnloaded() if job is not None and job.takes_out_of_service:
                self._chosen[model_id] = None

    def _check_rules(self, draft: Draft, by: "World | None") -> None:
        """A load passes the rules with which it was accepted, before anything changes for it."""
        match draft.data:
            case UnloadRequested(cause=Cause.SWAP, cause_event_id=str(job_id)):
                job = self.state.unended_job(job_id)
            case LoadStarted() | ModelLoaded() | ModelSettingsChanged():
                job = self.state.unended_job(draft.job_id)
            case _:
                return
        if job is None:
            return
        if by is None:  # a client's command
            assert job.policy_digest is None
            return
        rules = by.policy.loads.of(job.model_id)
        assert job.policy_digest == (None if rules is None else rules.digest)
        loaded = draft.data if isinstance(draft.data, ModelLoaded) else None
        if loaded is None:
            known = self.state.registers.find_versions(job.model_id)
            genuine = tuple(each for each in known.approvals if each.position not in self.forged)
            versions = change(known, approvals=genuine)
            self._starts[job.id] = LoadStart(self.state.models[job.model_id], versions)
        if rules is None:
            assert loaded is None or not loaded.evidence
            return
        files, checked = by.passed[job.id]
        assert loaded is None or (loaded.files, loaded.evidence) == (files, checked.evidence.evidence)
        approval, digest = checked.evidence.approval, digest_of(contents_of(files))
        assert approval is not UNSET
        check_approval(approval, job, rules, digest, self._starts[job.id])

    def _record(self, draft: Draft, now: str) -> None:
        event = record_draft(draft, self.state.position + 1, now)
        outdated = {job_id for world in self.worlds for job_id in world.outdated}
        check_fact(event, self.state, self.events, self._exited, outdated)
        self.events.append(event)
        fold_event(event, self.state)


def fold_event(event: Event, state: State) -> None:
    """Apply an event to a state, as the log and its readers do."""
    changes = state.apply(event)
    state.forget_ended(changes.jobs.values())


class World:
    """A consumer on a log, with a clock and processes, around the real `accept`, folds and `decide`.

    It decides on the state that it has folded, and appends in a second step; what `meanwhile` has is recorded
    between, given the action. The coroutines of loads append how these end before it decides or, once, after
    that (`concludes_late`); or not until they can (`outcomes_wait`).

    `fault` happens to the next fact: `lost`, not recorded; `unsure`, recorded though its commit raised, and
    not folded by the consumer until the log is read again; `twice`, appended again, which must be refused.
    """

    elsewhere: Elsewhere = ALONE

    def __init__(self, policy: Policy | None = None, log: Ledger | None = None) -> None:
        self.log = log or Ledger()
        self.log.worlds.append(self)
        self.state = State()
        self.is_cut = False
        self.sign: Sign | None = None
        self.meanwhile: list[Callable[[Action], Command]] = []
        self.policy = policy or Policy(loads_at_once=2)
        self.default_devices: tuple[str, ...] = (CPU,)
        self.live: dict[str, Process] = {}
        self.now = at(0)
        self.fork_server_up = True
        self.under_pressure = False
        self.demanded: set[str] = set()
        self.estimates: dict[str, MemoryEstimate | Failure | None] = {}
        self.passed: dict[str, tuple[tuple[LoadedFile, ...], CheckedLoad]] = {}
        self.outdated: set[str] = set()
        self.estimates_take_time = False
        self.concludes_late = False
        self.outcomes_wait = False
        self.fault: str | None = None
        self.cancelled: set[str] = set()

    @property
    def events(self) -> list[Event]:
        """All that is recorded."""
        return self.log.events

    @property
    def own(self) -> State:
        """The part of the state that this server works on."""
        return self.elsewhere.share(self.state)

    def submit(self, command: Command) -> Decision:
        """Decide a command of a client."""
        decision = self.log.submit(self.with_rules(command), self.now)
        self.catch_up()
        return decision

    def with_rules(self, command: Command) -> Command:
        """Return a load with the rules that are in force here, and with the files that are there."""
        if not isinstance(command, RequestLoad):
            return command
        present = contents_of(self.files_in_repository(command.model_id, command.version))
        rules = self.policy.loads.of(command.model_id)
        if rules is None:
            return replace(command, contents=command.contents and present)
        said = command.justification
        return replace(
            command,
            policy=rules.digest,
            contents=command.contents and present,
            is_checked=command.cause not in RELOADS,
            justification=said and change(said, digest=digest_of(present)),
            sign=self.sign,
        )

    def approve(self, model_id: str, version: int, by: str) -> Decision:
        """A person approves the present files of a version."""
        contents = contents_of(self.files_in_repository(model_id, version))
        about = digest_of(contents), contents, by, "seen", Credential()
        return self.submit(ApproveVersion(model_id, version, *about, self.sign))

    def add_version(self, model_id: str, version: int, by: str) -> Decision:
        """Record that a person added the present files of a version."""
        files = added_files(self.files_in_repository(model_id, version))
        return self.submit(AddVersion(model_id, version, by, files, self.log.new_id()))

    def files_in_repository(self, model_id: str, version: int) -> tuple[LoadedFile, ...]:
        """Return the files of a version as they are now."""
        return files_of(model_id, version, self.log.changes[model_id, version])

    def load_as_before(self, model_id: str, version: int) -> None:
        """Record the load of an inference of an earlier release, whatever a person chose."""
        model = self.log.state.models.get(model_id)
        is_unloaded = model is None or model.phase is ModelState.UNLOADED
        if is_unloaded and not self.log.state.queue(model_id):
            job_id, data = self.log.new_id(), LoadRequested.of(LoadParameters(), Cause.DEMAND)
            rules = self.policy.loads.of(model_id)
            data = data if rules is None else change(data, policy=rules.digest)
            self.submit(Record((Draft(job_id, data, "pia", job_id, model_id, version),)))

    def catch_up(self) -> None:
        """Fold what was recorded since."""
        for event in self.log.events[self.state.position :]:
            fold_event(event, self.state)

    def running(self) -> dict[str, LoadView]:
        own = self.own
        return {
            load: process.view(find_started_job(own, load), load, demanded=process.model_id in self.demanded)
            for load, process in self.live.items()
        }

    def decision(self, now: str | None = None) -> Next:
        proven = self.proven()
        observations = Observations(
            self.fork_server_up,
            self.under_pressure,
            {
                load: replace(each, is_proven=load in proven) if isinstance(each, MemoryEstimate) else each
                for load, each in self.estimates.items()
            },
            pending_demand=self.demanded,
        )
        return self.elsewhere.decide(
            SchedulerView(self.state, self.running(), self.policy, now or self.now, observations)
        )

    def proven(self) -> set[str]:
        """Return the loads whose files loaded before, as far as they were looked at."""
        jobs = (job for job in self.state.unended() if self.estimates.get(job.id) is not None)
        footprints = {
            (model.id, seen.version) for model in self.state.models.values() for seen in model.footprints
        }
        return {job.id for job in jobs if (job.model_id, job.version) in footprints}

    def step(self) -> Next:
        """Do what the consumer does in one turn."""
        own = self.own
        for load, process in list(self.live.items()):
            model = own.models.get(process.model_id)
            if model is not None and model.serving is not None and model.serving.load_job_id == load:
                process.recorded |= process.dead.keys() - set(model.serving.worker_ids)
            if not is_load_current(own, load, process.model_id):
                process.killed = True
                if process.run.is_finished:
                    del self.live[load]
        for process in self.loading():
            if process.hangs_until is not None and process.hangs_until <= self.now:
                process.fail_without_progress()
        for job_id in self.estimates.keys() - {job.id for job in own.unended()}:
            del self.estimates[job_id]
            self.passed.pop(job_id, None)
        if not self.concludes_late:
            self.conclude_loads()
        decision = self.decision()
        assert decision == self.decision()
        decided_at = self.state.position
        self._begin_loads(decision.unestimated)
        if self.state.position > decided_at:  # what their files say is recorded: decide anew
            return self.step()
        if decision.action is not None:
            self.act(decision.action)
        elif decision.unestimated or (self.concludes_late and self.conclude_loads()):
            return self.step()
        else:
            self.check_pause(decision)
        return decision

    def _begin_loads(self, jobs: Iterable[Job]) -> None:
        """Begin to look at the files of loads, which may take time."""
        for job in jobs:
            self.estimates[job.id] = None
            if not self.estimates_take_time:
                self.look_at_files(job)

    def conclude_loads(self) -> bool:
        """Let the coroutines of loads that are over record it, or give the grant back; whether any did."""
        self.concludes_late, concluded = False, False
        if self.outcomes_wait:
            return False
        for load, process in list(self.live.items()):
            job = find_started_job(self.own, load)
            if job is None or not may_end(self.state, job):
                continue
            if process.has_other_files and process.failure is None:
                del self.live[load], self.estimates[load]
                self.outdated.add(load)
                concluded = True
            elif process.loaded and not process.dead:
                concluded = True
                loaded = draft_fact(job, self.describe_loaded(load, process))
                self._conclude(job, [loaded, *self._swapped_out(job)])
            elif process.failure is not None or process.dead:
                process.killed = concluded = True
                failed = LoadFailed(process.failure or "worker_died", "because")
                self._conclude(job, [*self._deaths(load), draft_fact(job, failed)])
        return concluded

    def _conclude(self, job: Job, facts: Sequence[Draft]) -> None:
        command = Record(tuple(facts), (unchanged(job),))
        self._send(self.elsewhere.complete(command, self.state), actions.CancelJob(job))

    def check_pause(self, decision: Next) -> None:
        """Nothing is late, and nothing will be to do before the scheduler wants to be asked again."""
        late = [job for job in self.own.unended() if job.deadline_at and job.deadline_at <= self.now]
        # What is not approved fails at once; nothing else waits for it.
        refused = {job for job, found in self.estimates.items() if isinstance(found, Failure)}
        assert not refused & {job.id for job in self.own.unended()}
        assert not [reason for reason in decision.waiting_for.values() if "approv" in reason]
        running = self.running()
        assert not [job for job in late if job.id not in running or not running[job.id].has_outcome]
        until = decision.wake_at or add_seconds(self.now, 1_000_000)  # as good as never
        assert until > self.now
        assert self.decision(add_seconds(until, -0.000_001)).action is None

    def settle(self) -> Next:
        """Take turns until there is nothing to do, which has to be soon."""
        limit = 20 + 8 * (len(self.state.jobs) + len(self.live) + len(self.state.models))
        for _ in range(limit):
            decision = self.step()
            if decision.action is None:
                return decision
        pytest.fail("busy without end")

    def work(self, turns: int) -> None:
        for _ in range(turns):
            if self.step().action is None:
                return

    def act(self, action: Action) -> None:
        match action:
            case actions.KillWorkers(_, load):
                self.live[load].killed = True
            case actions.StartUnload(job) if job.status is JobStatus.IN_PROGRESS:
                self._follow_up(action)
            case _:
                if self._confirm(action) and self._send(self._command(action), action):
                    self._follow_up(action)

    def _confirm(self, action: Action) -> bool:
        """Whether what a load has passed still holds; else it is checked anew, as the consumer does it."""
        if all(each.holds(self.state) for each in self._list_checked(action)):
            return True
        assert isinstance(action, actions.JobAction)
        del self.passed[action.job.id], self.estimates[action.job.id]
        self.outdated.discard(action.job.id)
        return False

    def _list_checked(self, action: Action) -> tuple[Condition, ...]:
        """Return the conditions of what a load has passed that goes on with an action."""
        match action:
            case actions.StartLoad(job) | actions.ChangeSettings(job) | actions.UnloadForReplacement(job):
                return self.passed[job.id][1].conditions if job.id in self.passed else ()
        return ()

    def look_at_files(self, job: Job) -> None:
        """Check the files of a load, and estimate it, as its coroutine does."""
        rules = self.policy.loads.of(job.model_id)
        if job.id not in self.passed and (rules is not None or job.policy_digest is not None):
            try:
                self.passed[job.id] = self._check_files(job, rules or ModelRules())
            except NotLoadable as refused:
                self.estimates[job.id] = refused.failure
                return
        self.estimates[job.id] = self.estimated(job)

    def _check_files(self, job: Job, rules: ModelRules) -> tuple[tuple[LoadedFile, ...], CheckedLoad]:
        model = self.state.models.get(job.model_id) or Model(job.model_id)
        versions, expected = self.state.registers.find_versions(job.model_id), find_expected(job, self.state)
        files = expected or self.files_in_repository(job.model_id, job.version or 0)
        is_signed = partial(self.elsewhere.is_signed, state=self.state)
        about = rules, model, versions, contents_of(files), lambda *_: b"", self.now
        is_reload = job.cause in RELOADS and expected is not None
        return files, check_load(CheckInput(*about, is_reload, is_signed), job)

    def estimated(self, job: Job) -> MemoryEstimate | Failure:
        """Return the estimate of a load; one that found other files takes more."""
        serving, passed = find_same_workers(self.state, job), self.passed.get(job.id)
        is_same = is_unchanged(job)
        if passed is not None and serving is not None:
            is_same = contents_of(passed[0]) == contents_of(serving.files)
        same_as = serving.load_job_id if serving is not None and is_same else None
        needed_bytes = estimate_of(job, changed=job.id in self.outdated)
        try:
            needs = estimate_devices(job, self.policy, self.default_devices, needed_bytes)
        except LookupError:
            return Failure("device_unavailable", "it is not there")
        return MemoryEstimate(needs, same_as=same_as)

    def _send(self, command: SystemCommand, action: Action) -> bool:
        """Append what was decided; whether it is folded, which what comes first may prevent."""
        fault, self.fault = self.fault, None
        decided_at = self.state.position
        while self.meanwhile:
            self.log.submit(self.with_rules(self.meanwhile.pop()(action)), self.now)
        if self.concludes_late:
            self.conclude_loads()
        if fault == "lost" or self.is_cut:
            self.catch_up()
            return False
        decision = self.log.submit(command, self.now, by=self)
        is_recorded = isinstance(decision, Accepted)
        if is_recorded and isinstance(action, actions.CancelJob) and action.job.cancelling:
            self.cancelled.add(action.job.id)
        if fault == "twice":
            assert not isinstance(self.log.submit(command, self.now, by=self), Accepted)
        if fault == "unsure":
            return False
        self.catch_up()
        # What was decided on this very state must change it, or it would be decided again for ever.
        assert is_recorded or self.log.state.position > decided_at, (action, decision)
        return is_recorded

    def _follow_up(self, action: Action) -> None:
        """Begin the effect of what is recorded, and remember whose death is."""
        match action:
            case actions.StartLoad(job, chosen):
                version, parameters = job.load_order
                workers = tuple(self.name_worker(job, number) for number in range(parameters.instances))
                self.live[job.id] = Process(
                    *(job.model_id, version, workers, chosen.bytes),
                    is_as_estimated=job.id not in self.outdated,
                    chosen=chosen,
                    has_own_memory=has_memory(self.policy, chosen.target.name),
                )
            case actions.StartUnload(job, load) if load in self.live and not job.forced:
                self.live[load].unloading = True
            case (
                actions.FailLoad(Job(id=load))
                | actions.FinishUnload(_, load)
                | actions.CancelJob(Job(id=load))
            ):
                if load in self.live:
                    self.live[load].recorded.update(self.live[load].dead)
            case actions.RecordExits(load, _, workers):
                self.live[load].recorded.update(workers)
            case _:
                pass

    def name_worker(self, job: Job, number: int) -> str:
        """Return the id of a worker of a load."""
        return f"w{number}-{job.id}"

    def model_of(self, action: Action) -> str:
        """Return the model of an action."""
        match action:
            case actions.KillWorkers(_, load) | actions.RecordExits(load):
                return self.live[load].model_id
            case actions.FinishUnload(jobs):
                return jobs[0].model_id
            case actions.RequestReload(model) | actions.FailModel(model) | actions.UnloadAutomatically(model):
                return model.id
            case actions.JobAction(job):
                return job.model_id
            case _:
                pytest.fail(f"{action} is about no model")

    def list_conditions(self, action: Action) -> tuple[Condition, ...]:
        """Return the conditions of what an action appends."""
        return (*actions.list_conditions(action, self.state), *self._list_checked(action))

    def _command(self, action: Action) -> Record | RequestLoad | RequestUnload:
        conditions = self.list_conditions(action)
        match action:
            case actions.RequestReload() | actions.UnloadAutomatically():
                request = self.with_rules(build_request(action, conditions))
                assert isinstance(request, RequestLoad | RequestUnload)
                return self.elsewhere.complete(request, self.state)
            case _:
                return self.elsewhere.complete(Record(tuple(self._facts(action)), conditions), self.state)

    def _facts(self, action: Action) -> Iterable[Draft]:
        match action:
            case actions.RecordFact(job, data):
                return [draft_fact(job, data)]
            case actions.StartLoad(job, _, before):
                first = [draft_fact(job, before.data)] if before is not None else []
                return [*first, draft_load_start(job, is_restarted=job.id in self.outdated)]
            case actions.ChangeSettings(job, load):
                return draft_settings_change(job, load)
            case actions.UnloadForReplacement(job):
                return self._swapped_out(job)
            case actions.FailLoad(job, code):
                return [*self._deaths(job.id), draft_fact(job, LoadFailed(code, "because"))]
            case actions.CancelJob(job):
                return [*self._deaths(job.id), draft_fact(job, JobCancelled())]
            case actions.StartUnload(job):
                return [draft_fact(job, UnloadStarted())]
            case actions.FinishUnload(jobs, load):
                ends = (draft_fact(job, ModelUnloaded(0, 0, 0)) for job in jobs)
                return [*self._deaths(load), *ends]
            case actions.RecordExits(load, _, workers):
                assert set(workers) <= self.live[load].dead.keys()
                return self._deaths(load, workers)
            case actions.FailModel(model, message):
                return draft_crash_loop(model, message)
            case _:
                pytest.fail(f"{action} is never recorded")

    def describe_loaded(self, load: str, process: Process) -> ModelLoaded:
        """Return the outcome of a load."""
        loaded, job = model_loaded(*process.workers), self.state.unended_job(load)
        if load not in self.passed:
            assert job is not None
            present = self.files_in_repository(process.model_id, process.version)
            return change(loaded, files=find_expected(job, self.state) or present)
        files, checked = self.passed[load]
        return change(loaded, files=files, verified=True, **asdict(checked.evidence))

    def _swapped_out(self, job: Job) -> tuple[Draft, ...]:
        """Return the unload request of the load from which the model serves, which a job replaces."""
        model = self.state.models.get(job.model_id)
        servings = model.servings if model is not None and model.phase is ModelState.LOADED else ()
        load = next((each.load_job_id for each in servings if each.load_job_id in self.live), None)
        if load is None:
            return ()
        swap, old = self.log.new_id(), self.live[load]
        data = UnloadRequested(force=False, load_job_id=load, cause=Cause.SWAP, cause_event_id=job.id)
        return (Draft(swap, data, SYSTEM, swap, job.model_id, old.version),)

    def _deaths(self, load: str, workers: tuple[str, ...] | None = None) -> tuple[Draft, ...]:
        process = self.live.get(load)
        if process is None:
            return ()
        new = [worker for worker in workers or process.dead if worker not in process.recorded]
        about = (SYSTEM, load, process.model_id, process.version)
        return tuple(Draft(self.log.new_id(), process.dead[worker], *about, worker) for worker in new)

    def loading(self) -> list[Process]:
        """Return the loads whose end is open."""
        return [process for process in self._in_phase(Phase.LOADING) if not process.is_over]

    def serving(self) -> list[Process]:
        return self._in_phase(Phase.SERVING)

    def _in_phase(self, phase: Phase) -> list[Process]:
        running = self.running()
        return [process for load, process in self.live.items() if running[load].phase is phase]

    def alive(self) -> list[Process]:
        return [process for process in self.live.values() if process.left]

    def used_bytes(self) -> int:
        return sum(process.run.memory_bytes for process in self.live.values())

    def finish_estimates(self) -> None:
        """What is being found out of pending loads is known."""
        for job_id, known in list(self.estimates.items()):
            job = self.state.unended_job(job_id)
            if known is None and job is not None:
                self.look_at_files(job)

    def end_all(self) -> None:
        """What was killed, or has drained, is gone."""
        for process in self.alive():
            if process.killed or process.unloading:
                process.ended, process.busy = True, False

    def lose_fork_server(self) -> None:
        self.fork_server_up = False
        for process in self.alive():
            process.die(WorkerExited(None, None, ()), *process.left)
            process.failure, process.killed = process.failure or FORK_SERVER_DIED, True

    def fail_fork(self) -> None:
        for process in self.loading()[:1]:
            process.failure, process.killed = "fork_server_unavailable", True

    def progress(self, outcome: str) -> None:
        """Let all that runs come to its end: what loads has this outcome, what is to end ends."""
        self.now = max(self.now, *(process.hangs_until or "" for process in self.loading()), "")
        for process in self.loading():
            process.finish(outcome)
            if process.hangs_until is not None:
                process.fail_without_progress()
        self.end_all()

    def let_loads_end(self, turns: int) -> None:
        """Let what is to be loaded be loaded, then go on for so many turns."""
        for _ in range(4):
            self.settle()
            self.progress("loaded")
        self.work(turns)

    def restart(self, *, unclean: bool) -> None:
        if not unclean:
            self.submit(Record((Draft(self.log.new_id(), ServerStopped(), SYSTEM),)))
        self.catch_up()
        last_at = self.state.recorded_at or None
        self.meanwhile.clear()
        self.live.clear()
        self.estimates.clear()
        self.passed.clear()
        self.outdated.clear()
        self._end_troubles()
        started = ServerStarted(unclean, last_event_at=last_at, last_seen_at=last_at)
        self.submit(Record((Draft(self.log.new_id(), started, SYSTEM),)))

    def _end_troubles(self) -> None:
        self.fault, self.fork_server_up, self.under_pressure = None, True, False
        self.concludes_late = self.outcomes_wait = False
        self.demanded.clear()

    def calm_down(self, outcome: str) -> None:
        """Be fair for long enough: every job ends; and with memory for all, nothing is left to do."""
        self._end_troubles()
        self.catch_up()
        self.meanwhile.clear()
        self.estimates_take_time = False
        for process in self.live.values():
            process.answer(self.now)
        jobs = {job.id for job in self.state.unended()}
        self._go_on(outcome, lambda: all(self.state.unended_job(job) is None for job in jobs))
        given, rooms = self.policy, self.policy.rooms.items()
        unlimited = {name: replace(limits, budget_bytes=None) for name, limits in rooms}
        self.policy = replace(given, budget_bytes=None, max_loaded=None, rooms=unlimited)
        self._go_on(outcome, lambda: False)
        self.policy = given

    def _go_on(self, outcome: str, is_enough: Callable[[], bool]) -> None:
        for _ in range(100 + 10 * len(self.state.jobs)):
            decision = self.settle()
            if is_enough():
                return
            if self.loading() or any(process.killed or process.unloading for process in self.live.values()):
                self.progress(outcome)
            elif None in self.estimates.values():
                self.finish_estimates()
            elif decision.wake_at is not None:
                self.now = decision.wake_at
            else:
                return
        pytest.fail("never at rest")
