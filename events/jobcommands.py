"""Commands that a job answers, and the decisions on them: load, unload, cancel. Pure.

Duplicates and the choice of the active model are decided here only, so two handlers cannot race. Jobs of one
model run in the order of their acceptance, so a duplicate is compared with the last pending job of the model.
An actor who is answered with a job of another request is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from events.commands import (
    MAX_QUEUE,
    REFUSED_AS_OUTDATED,
    Accepted,
    CauseRules,
    Command,
    Condition,
    Decision,
    DecisionInput,
    Existing,
    Refused,
)
from events.jobs import Job, JobKind, JobStatus
from events.models import Model, ModelState
from events.serving import Serving
from events.state import Join, State
from events.statements import Sign, emergency_statement
from events.tokens import add_issuers
from events.types import (
    NEVER,
    REPLACEMENTS,
    SETTINGS,
    SYSTEM,
    WORKER_PARAMETERS,
    CancelRequested,
    Cause,
    Contents,
    Draft,
    Idempotency,
    JobCancelled,
    Justification,
    LoadJoined,
    LoadParameters,
    LoadRequested,
    ModelSettingsChanged,
    ModelUnloaded,
    UnloadJoined,
    UnloadRequested,
    contents_of,
)
from events.versions import ModelVersions
from features.commands import RULES_OF_CAUSES, draft_name

RULES: Mapping[Cause, CauseRules] = {
    **dict.fromkeys(Cause, CauseRules()),
    Cause.REQUEST: CauseRules(most_unended=MAX_QUEUE),
    **RULES_OF_CAUSES,
}
"""By the cause of a load."""

NO_BATCHING = "max_queue_delay_us takes a max_batch_size of at least 1: without one there are no batches"
"""Message of `invalid_body`, for a queue delay without batches."""
NO_LEVEL = "default_priority_level must be one of the priority_levels: from 1, or 0 for the lowest"
"""Message of `invalid_body`, for a level that the model does not have."""

SUPERSEDED = "superseded"
"""Reason of a cancelled load by the system whose place a person's load took."""


@dataclass(frozen=True, slots=True)
class RequestLoad(Command):
    """Load a version of a model.

    Attributes:
        contents: path and SHA-256 of the version's files, in order of their paths, if the repository still
            has the files loaded last; None if they are unknown.
        asked: the names of the parameters that the request itself gave. A request that gives none accepts a
            loaded model as it is.
        conditions: conditions of a reload by the system.
        policy: digest of the model's rules where it was asked; UNSET without any.
        is_checked: whether the bytes must pass rules each time that a person or an inference asks for them.
        justification: the person's; UNSET without rules or reasons.
        sign: signs an emergency for this server; None if it is alone.
        version_name: of the version from when that is loaded; UNSET for none.
        passed_over: why the highest version could not be served; UNSET if it could, or was not asked for.
    """

    model_id: str
    version: int
    contents: Contents | None
    actor: str
    parameters: LoadParameters = field(default_factory=LoadParameters)
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    asked: frozenset[str] = frozenset()
    idempotency: Idempotency | None = None
    conditions: tuple[Condition, ...] = ()
    policy: str | UnsetType = UNSET
    is_checked: bool = False
    justification: Justification | UnsetType = UNSET
    sign: Sign | None = None
    version_name: str | UnsetType = UNSET
    passed_over: str | UnsetType = UNSET

    @property
    def is_emergency(self) -> bool:
        return self.justification is not UNSET and self.justification.emergency is not None

    def list_joinable(self, state: State) -> Iterator[tuple[str, str]]:
        if self.cause is Cause.REQUEST:
            model = state.models.get(self.model_id)
            if model is not None and model.serving is not None:
                yield model.serving.load_job_id, self.actor
            yield from ((job.id, self.actor) for job in state.unended(self.model_id))

    def decide(self, at: DecisionInput) -> Decision:
        state, new_id = at.state, at.new_id
        queue, model = state.queue(self.model_id), state.models.get(self.model_id)
        versions = state.registers.find_versions(self.model_id)
        refusal = _find_version_refusal(model, versions, queue, self)
        if refusal is not None:
            return refusal
        if queue and _joins(self, queue[-1]):
            return _join_job(state, self, queue[-1], new_id)
        superseded = queue.pop() if queue and _supersedes(self, queue[-1]) else None
        parameters = _effective_parameters(model, queue, self)
        if parameters.max_queue_delay_us and not parameters.max_batch_size:
            return Refused("invalid_body", f"body: {NO_BATCHING}")
        if (parameters.default_priority_level or 0) > (parameters.priority_levels or 0):
            return Refused("invalid_body", f"body: {NO_LEVEL}")
        serving = _find_satisfying(model, self, parameters) if not queue else None
        name = self.version_name
        named = name is UNSET or versions.versions_by_name.get(name) == self.version
        if serving is not None and serving.parameters.has_same_settings(parameters) and named:
            return _join_load(state, self, serving, new_id)
        if serving is not None and (self.is_checked or _needs_persons(state, self.model_id, serving)):
            serving = None  # the job passes the rules first, even if it only changes settings
        if not RULES[self.cause].replaces and (other := _find_in_the_way(model, queue, self)) is not None:
            return Existing(other)
        most = RULES[self.cause].most_unended
        if serving is None and most is not None and state.backlog - (superseded is not None) >= most:
            return Refused("queue_full", f"{most} jobs have not ended yet; try again when some have")
        request = _load_requested(state, self, parameters, new_id())
        drafts = [request]
        if superseded is not None:
            drafts.append(_draft_fact(superseded, JobCancelled(SUPERSEDED, request.id), new_id()))
        if serving is not None:
            data = ModelSettingsChanged.of(serving.load_job_id, parameters)
            outcome = replace(request, id=new_id(), data=data, actor=SYSTEM)
            drafts.append(outcome)
            if name is not UNSET and not named:
                drafts.append(draft_name(outcome, name, self.actor, new_id))
        return Accepted(tuple(drafts), request.id)


@dataclass(frozen=True, slots=True)
class RequestUnload(Command):
    """Unload a model from wherever it serves; None is the active model.

    Attributes:
        conditions: conditions of an automatic unload.
        copy: the load of the only copy to unload; None unloads all.
        takes_out_of_service: whether a model that is not loaded, too, is taken out of service.
        until_asked: whether the next inference may load the model again.
    """

    model_id: str | None
    actor: str
    force: bool = False
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    idempotency: Idempotency | None = None
    conditions: tuple[Condition, ...] = ()
    copy: str | None = None
    takes_out_of_service: bool = False
    until_asked: bool = False

    def list_joinable(self, state: State) -> Iterator[tuple[str, str]]:
        if self.cause is Cause.REQUEST:
            target = self.model_id or _model_to_unload(state, force=self.force)
            yield from ((job.id, self.actor) for job in state.queue(target or ""))

    def decide(self, at: DecisionInput) -> Decision:
        state, new_id = at.state, at.new_id
        model_id = self.model_id
        if model_id is None:
            model_id = _model_to_unload(state, force=self.force)
        if model_id is None:
            return Refused("nothing_loaded", "no model is loaded; GET /api/v1/models shows their states")
        model = state.models.get(model_id) or Model(model_id)
        if self.copy is not None and model.find_serving(self.copy) is None:
            return REFUSED_AS_OUTDATED
        queue = state.queue(model_id)
        if queue and self.copy is None and _will_unload(queue[-1], self):
            return _join_job(state, self, queue[-1], new_id)
        load_job_id = self.copy or _load_to_end(model, queue, self)
        # What is missed is known as such until somebody says that it is not to serve any more.
        may_change_choice = self.takes_out_of_service or model.is_missed
        if load_job_id is None and (queue or not may_change_choice):
            why = "is only loading; add ?force=true to end the load" if queue else "is not loaded"
            return Refused("not_loaded", f"model '{model_id}' {why}")
        if load_job_id is None and model.chosen and model.chosen.version is None:
            return Existing(model.chosen.job_id)
        version, server = _locate_load(model, queue, load_job_id)
        data = UnloadRequested(
            self.force,
            load_job_id,
            self.cause,
            self.cause_event_id,
            self.idempotency,
            server=UNSET if server is None else server,
            until_asked=self.until_asked or UNSET,
        )
        event_id = new_id()
        request = Draft(event_id, data, self.actor, event_id, model_id, version)
        if load_job_id is not None:
            return Accepted((request,), event_id)
        outcome = replace(request, id=new_id(), data=ModelUnloaded(0, 0, 0), actor=SYSTEM)
        return Accepted((request, outcome), event_id)


@dataclass(frozen=True, slots=True)
class RequestCancel(Command):
    """Cancel a job before it has its effect."""

    job_id: str
    actor: str
    idempotency: Idempotency | None = None

    def list_joinable(self, _: State) -> Iterator[tuple[str, str]]:
        yield self.job_id, self.actor

    def decide(self, at: DecisionInput) -> Decision:
        state, new_id = at.state, at.new_id
        job = state.unended_job(self.job_id)
        if job is None:
            shown = f"GET /api/v1/jobs/{self.job_id} shows how"
            return Refused("already_finished", f"job {self.job_id} has ended; {shown}")
        if not job.cancellable:
            return Refused("already_started", _why_not_cancelled(job))
        data = CancelRequested(self.idempotency)
        draft = Draft(new_id(), data, self.actor, job.id, job.model_id, job.version)
        if job.cancel_requested:
            return _record_once(state, self, draft, made_by=None)
        return Accepted((draft,), job.id)


def _needs_persons(state: State, model_id: str, serving: Serving) -> bool:
    """Whether the rules where a load is served ask for other persons, whatever they are elsewhere."""
    return state.registers.find_policy(serving.server).count_persons(model_id) > 0


def _find_version_refusal(
    model: Model | None, versions: ModelVersions, queue: list[Job], command: RequestLoad
) -> Refused | None:
    """Return why the version may not be loaded: it was removed, or its cause has rules."""
    if command.version in versions.removed:
        name = f"version {command.version} of model '{command.model_id}'"
        return Refused("unknown_version", f"{name} was removed; it loads once it has been added again")
    is_loaded = model is not None and model.phase is ModelState.LOADED
    return None if queue or is_loaded else RULES[command.cause].find_refusal(model, versions, command.version)


def _join_job(
    state: State, command: RequestLoad | RequestUnload, job: Job, new_id: Callable[[], str]
) -> Accepted | Existing:
    """Answer with a job that has not ended."""
    kind = LoadJoined if job.kind is JobKind.LOAD else UnloadJoined
    draft = Draft(new_id(), kind(command.idempotency), command.actor, job.id, job.model_id, job.version)
    return _record_once(state, command, draft, made_by=job.requested_by)


def _join_load(
    state: State, command: RequestLoad, serving: Serving, new_id: Callable[[], str]
) -> Accepted | Existing:
    """Answer with the load that the model serves from."""
    data, job_id = LoadJoined(command.idempotency), serving.load_job_id
    draft = Draft(new_id(), data, command.actor, job_id, command.model_id, serving.version)
    is_chosen = state.models[command.model_id].has_chosen(serving)
    return _record_once(state, command, draft, made_by=serving.loaded_by if is_chosen else None)


def _record_once(
    state: State, command: RequestLoad | RequestUnload | RequestCancel, draft: Draft, *, made_by: str | None
) -> Accepted | Existing:
    """Record that an actor joins a job, once for each actor and key; the system joins without a record."""
    job_id = draft.job_id or ""
    is_known = made_by == draft.actor or Join(job_id, draft.actor, draft.data.TYPE) in state.joins
    is_by_system = not isinstance(command, RequestCancel) and command.cause is not Cause.REQUEST
    if is_by_system or (is_known and command.idempotency is None):
        return Existing(job_id)
    return Accepted((draft,), job_id, is_join=True)


def _load_requested(state: State, command: RequestLoad, parameters: LoadParameters, event_id: str) -> Draft:
    said = command.justification
    if said is not UNSET:
        said = replace(said, credential=add_issuers(said.credential, state.registers.tokens))
        if said.emergency is not None and command.sign is not None:
            what = event_id, command.model_id, command.version, command.actor
            said = replace(said, server_signature=command.sign(emergency_statement(*what, said)))
    data = LoadRequested.of(
        parameters,
        command.cause,
        cause_event_id=command.cause_event_id,
        idempotency=command.idempotency,
        policy=command.policy,
        justification=said,
        version_name=command.version_name,
        passed_over=command.passed_over,
    )
    return Draft(event_id, data, command.actor, event_id, command.model_id, command.version)


def _draft_fact(job: Job, data: JobCancelled, event_id: str) -> Draft:
    return Draft(event_id, data, SYSTEM, job.id, job.model_id, job.version)


def _joins(command: RequestLoad, job: Job) -> bool:
    """Whether a pending job does what the command asks; one that is being cancelled does not.

    A person's request needs a person's load, which no end of a demand cancels and which may evict, and every
    parameter that it names has to be the load's.
    """
    if job.load is None or job.version != command.version or job.cancelling or command.is_emergency:
        return False
    if job.policy_digest != (command.policy or None):
        return False
    if command.version_name is not UNSET and command.version_name != job.version_name:
        return False
    if command.cause is Cause.REQUEST and job.cause is not Cause.REQUEST:
        return False
    return all(_value(job.load, name) == _value(command.parameters, name) for name in command.asked)


def _supersedes(command: RequestLoad, job: Job) -> bool:
    """Whether a person's load takes the place of a load by the system, which has not started."""
    is_by_system = job.kind is JobKind.LOAD and job.cause is not Cause.REQUEST
    is_waiting = job.status is JobStatus.PENDING and not job.cancelling
    return command.cause is Cause.REQUEST and is_by_system and is_waiting


def _find_satisfying(model: Model | None, command: RequestLoad, parameters: LoadParameters) -> Serving | None:
    """Return the present load if its workers do; a degraded model needs a repair instead."""
    serving = model.serving if model is not None and model.phase is ModelState.LOADED else None
    if model is None or serving is None or serving.version != command.version or model.degraded:
        return None
    same = command.contents == contents_of(serving.files)
    return serving if same and serving.parameters.has_same_workers(parameters) else None


def _find_in_the_way(model: Model | None, queue: list[Job], command: RequestLoad) -> str | None:
    """Return the job that an inference has, or has to wait for; None if its load may begin.

    The first that applies:
    1. A job is pending, which may be an unload whose end forbids the load: the last one.
    2. The model is loaded with something else than a person chose, and returns to that: none.
    3. The model is loaded, in whatever version: its load.
    """
    if queue:
        return queue[-1].id
    if model is None or model.serving is None or model.phase is not ModelState.LOADED:
        return None
    returns = model.is_to_return and model.chosen and model.chosen.version == command.version
    return None if returns else model.serving.load_job_id


def _effective_parameters(model: Model | None, ahead: list[Job], command: RequestLoad) -> LoadParameters:
    """Return the parameters to record: what is not named stays, unless another version is loaded before."""
    before = _parameters_before(model, ahead, command.version)
    if before is None:
        return RULES[command.cause].choose_parameters(model, command.version, command.parameters)
    kept = {
        name: getattr(before, name) for name in (*WORKER_PARAMETERS, *SETTINGS) if name not in command.asked
    }
    parameters = replace(command.parameters, **kept)
    if parameters.max_batch_size or "max_queue_delay_us" in command.asked:
        return parameters
    return replace(parameters, max_queue_delay_us=0)  # batching is turned off, and the delay is part of it


def _parameters_before(model: Model | None, ahead: list[Job], version: int) -> LoadParameters | None:
    """Return the parameters of what is loaded when the turn comes, if it is this version."""
    last = next((job for job in reversed(ahead) if not job.cancelling), None)
    if last is not None:
        return last.load if last.version == version else None
    serving = model.serving if model is not None else None
    return serving.parameters if serving is not None and serving.version == version else None


def _value(parameters: LoadParameters, name: str) -> object:
    value = getattr(parameters, name)
    return NEVER if name == "keep_alive_s" and value is None else value


def _will_unload(job: Job, command: RequestUnload) -> bool:
    """Whether a pending job does what the command asks; a job that is being cancelled does not.

    Where inferences load models, a person's unload needs a person's, which they do not undo.
    """
    if job.kind is not JobKind.UNLOAD or job.cancelling or (command.force and not job.forced):
        return False
    return job.takes_out_of_service or command.until_asked or not command.takes_out_of_service


def _model_to_unload(state: State, *, force: bool) -> str | None:
    """Return the active model, or with force, if none is loaded, the one that has been loading longest."""
    active = state.active()
    if active is not None:
        return active.id
    if not force:
        return None
    loads = (job for job in state.unended() if job.kind is JobKind.LOAD)
    return next((job.model_id for job in loads), None)


def _load_to_end(model: Model | None, queue: list[Job], command: RequestUnload) -> str | None:
    """Return the load that the unload ends: the present one or, without force, the last pending one."""
    serving = model.serving if model is not None else None
    loads = [job for job in queue if job.kind is JobKind.LOAD]
    if serving is None and model is not None and not command.force:
        serving = model.previous  # unloaded for replacement by one of the loads
    if serving is not None:
        waits_for = loads[-1].id if loads and not command.force else None
        return waits_for or serving.load_job_id
    return loads[0].id if loads and command.force else None


def _locate_load(
    model: Model | None, queue: list[Job], load_job_id: str | None
) -> tuple[int | None, str | None]:
    """Return the version of a load that is to end, and its server."""
    serving = None if model is None else model.find_serving(load_job_id)
    if serving is not None:
        return serving.version, serving.server
    return next(((job.version, job.server) for job in queue if job.id == load_job_id), (None, None))


def _why_not_cancelled(job: Job) -> str:
    if job.cause in REPLACEMENTS:
        return f"job {job.id} {REPLACEMENTS[job.cause].format(version=job.version)}"
    return f"unload {job.id} has started and cannot be cancelled; load model '{job.model_id}' again"
