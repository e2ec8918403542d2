"""How the writer decides a command right before the insert: accept, join an existing job, or refuse. Pure.

Compare and append: a command of the system is refused as `outdated` unless its conditions hold, so nothing is
appended that was decided before a client's command, or before a commit that succeeded though it raised.
Duplicates, idempotency keys and the choice of the active model are decided here only, so two handlers cannot
race. Jobs of one model run in the order of their acceptance, so a duplicate is compared with the last pending
job of the model. Whoever is answered with a job of another request is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import UNSET
from msgspec.structs import replace

from events.clock import Timestamp
from events.commands import (
    REFUSED_AS_OUTDATED,
    Accepted,
    Command,
    Decision,
    DecisionInput,
    Existing,
    Record,
    Refused,
    RegisterCommand,
    RemoveVersion,
    RequestCancel,
    RequestLoad,
    RequestUnload,
    VersionCommand,
)
from events.jobs import Job, JobKind, JobStatus
from events.models import Model, ModelState
from events.serving import Serving
from events.state import Join, State
from events.statements import emergency_statement
from events.tokens import add_issuers
from events.types import (
    NEVER,
    REPLACEMENTS,
    SETTINGS,
    SYSTEM,
    WORKER_PARAMETERS,
    CancelRequested,
    Cause,
    Draft,
    Idempotency,
    JobCancelled,
    LoadJoined,
    LoadParameters,
    LoadRequested,
    ModelSettingsChanged,
    ModelUnloaded,
    UnloadJoined,
    UnloadRequested,
    VersionAdded,
    VersionRemoved,
    contents_of,
    digest_of,
)
from events.versions import ModelVersions
from features.labels.commands import draft_label, find_label_refusal
from features.ondemand.choice import demand_parameters, find_demand_refusal

MAX_QUEUE = 256
"""Unended jobs from which on loads by clients are refused: more than any machine loads within the longest
`timeout_s`, and few enough to decide on all of them in a millisecond."""

_MOST_UNENDED = {Cause.REQUEST: MAX_QUEUE, Cause.DEMAND: MAX_QUEUE // 2}
"""By cause: on-demand loads leave half of the queue to explicit ones; loads by the system have no limit."""

NO_BATCHING = "max_queue_delay_us takes a max_batch_size of at least 1: without one there are no batches"
"""Message of `invalid_body`, for a queue delay without batches."""

SUPERSEDED = "superseded"
"""Reason of a cancelled load by the system whose place a person's load took."""


def accept(
    state: State, command: Command, new_id: Callable[[], str], now: Timestamp, previous: bytes = b""
) -> Decision:
    """Decide `command` on `state`.

    Args:
        state: the live state, with the idempotency key of `command` if it is known, and with the joins of the
            jobs that `find_joinable` yields.
        command: the command to decide.
        new_id: returns the id of a new event.
        now: the ledger's time.
        previous: the hash of the event before.
    """
    if isinstance(command, RegisterCommand):
        return command.decide(DecisionInput(state, new_id, now, previous))
    if not all(condition.holds(state) for condition in command.conditions):
        return REFUSED_AS_OUTDATED
    if isinstance(command, VersionCommand):
        return _decide_version(state, command)
    if isinstance(command, Record):
        return Accepted(command.drafts)
    repeated = _find_repeated(state, command.idempotency, now)
    if repeated is not None:
        return repeated
    match command:
        case RequestLoad():
            return _decide_load(state, command, new_id)
        case RequestUnload():
            return _decide_unload(state, command, new_id)
        case RequestCancel():
            return _decide_cancel(state, command, new_id)


def _decide_version(state: State, command: VersionCommand) -> Accepted | Refused:
    """Accept what changes a repository; a version that a load uses cannot be removed.

    In the own repositories of several servers, a version has the same files.
    """
    if isinstance(command, RemoveVersion):
        use = find_use(state, command.model_id, command.version)
        if use is not None:
            return Refused("version_in_use", use)
        return Accepted((_draft_version(command, VersionRemoved(server=command.holder)),))
    held = state.registers.find_versions(command.model_id).find_holders(command.version)
    others = [each for each in held.servers if each != command.holder]
    if command.holder is not UNSET and others and held.digest != digest_of(contents_of(command.files)):
        what = f"version {command.version} of {command.model_id!r} has other files at {', '.join(others)}"
        return Refused("version_exists", f"{what}: add the same files here, or choose another number")
    data = VersionAdded(command.files, command.source, command.holder)
    return Accepted((_draft_version(command, data),))


def _draft_version(command: VersionCommand, data: VersionAdded | VersionRemoved) -> Draft:
    return Draft(command.event_id, data, command.actor, None, command.model_id, command.version)


def find_use(state: State, model_id: str, version: int) -> str | None:
    """Return why a version cannot be removed, and what to do; None if nothing uses it."""
    name = f"version {version} of model '{model_id}'"
    model = state.models.get(model_id)
    if model is not None and any(each.version == version for each in model.held):
        advice = "unload the model, or load another version, and remove it then"
        return f"{name} is loaded, or will be reloaded: {advice}"
    if any(job.kind is JobKind.LOAD and job.version == version for job in state.unended(model_id)):
        return f"{name} has a load that has not ended: cancel it, and remove the version then"
    labels = [f"'{label}'" for label in state.registers.find_versions(model_id).list_labels_of(version)]
    if labels:
        return f"{name} is named by the label {', '.join(labels)}: move or remove that first"
    return None


def find_end_of_use(
    state: State, model_id: str, version: int, actor: str
) -> RequestUnload | RequestCancel | None:
    """Return the next command that ends what uses a version; None if nothing does, or only a label."""
    model = state.models.get(model_id) or Model(model_id)
    held = [each.version for each in model.held]
    loads = [job for job in state.unended(model_id) if job.kind is JobKind.LOAD and job.version == version]
    if version in held or (loads and not held):
        return RequestUnload(model_id, actor, force=True)  # which inferences do not undo, as they do a cancel
    return RequestCancel(loads[0].id, actor) if loads else None


def _find_repeated(state: State, given: Idempotency | None, now: Timestamp) -> Existing | Refused | None:
    """Return the outcome of the first request with this key; only an accepted request uses its key."""
    known = state.keys.get(given.key_hash) if given is not None else None
    if given is None or known is None or not known.holds(now):
        return None
    if known.fingerprint == given.fingerprint:
        return Existing(known.job_id)
    return Refused(
        "idempotency_mismatch",
        f"this Idempotency-Key was used for another request, that of job {known.job_id}, at "
        f"{known.recorded_at}; repeat that one as it was, or use a new key for this one",
    )


def _decide_load(state: State, command: RequestLoad, new_id: Callable[[], str]) -> Decision:
    queue, model = state.queue(command.model_id), state.models.get(command.model_id)
    versions = state.registers.find_versions(command.model_id)
    refusal = _find_version_refusal(model, versions, queue, command)
    if refusal is not None:
        return refusal
    if queue and _joins(command, queue[-1]):
        return _join_job(state, command, queue[-1], new_id)
    superseded = queue.pop() if queue and _supersedes(command, queue[-1]) else None
    parameters = _effective_parameters(model, queue, command)
    if parameters.max_queue_delay_us and not parameters.max_batch_size:
        return Refused("invalid_body", f"body: {NO_BATCHING}")
    serving = _find_satisfying(model, command, parameters) if not queue else None
    label = command.label
    is_labelled = label is UNSET or versions.versions_by_label.get(label) == command.version
    if serving is not None and serving.parameters.has_same_settings(parameters) and is_labelled:
        return _join_load(state, command, serving, new_id)
    if serving is not None and (command.is_checked or _needs_persons(state, command.model_id, serving)):
        serving = None  # its job passes the rules first, also if it changes only settings
    if command.cause is Cause.DEMAND and (other := _find_other_version(model, queue, command)) is not None:
        return Existing(other)
    most = _MOST_UNENDED.get(command.cause)
    if serving is None and most is not None and state.backlog - (superseded is not None) >= most:
        return Refused("queue_full", f"{most} jobs have not ended yet; try again when some have")
    refusal = None if label is UNSET else find_label_refusal(state, command.model_id, label)
    if refusal is not None:
        return refusal
    request = _load_requested(state, command, parameters, new_id())
    drafts = [request]
    if superseded is not None:
        drafts.append(_draft_fact(superseded, JobCancelled(SUPERSEDED, request.id), new_id()))
    if serving is not None:
        data = ModelSettingsChanged.of(serving.load_job_id, parameters)
        outcome = replace(request, id=new_id(), data=data, actor=SYSTEM)
        drafts.append(outcome)
        if label is not UNSET and not is_labelled:
            drafts.append(draft_label(outcome, label, command.actor, new_id))
    return Accepted(tuple(drafts), request.id)


def _needs_persons(state: State, model_id: str, serving: Serving) -> bool:
    """Whether the rules where a load is served ask for other persons, whatever they are elsewhere."""
    return state.registers.find_policy(serving.server).count_persons(model_id) > 0


def _find_version_refusal(
    model: Model | None, versions: ModelVersions, queue: list[Job], command: RequestLoad
) -> Refused | None:
    """Return why the version may not be loaded: it was removed, or an inference may not choose it."""
    if command.version in versions.removed:
        name = f"version {command.version} of model '{command.model_id}'"
        return Refused("unknown_version", f"{name} was removed; it loads once it has been added again")
    is_loaded = model is not None and model.serving is not None
    asks = command.cause is Cause.DEMAND and not queue and not is_loaded
    return find_demand_refusal(model, versions, command.version) if asks else None


def find_joinable(state: State, command: Command) -> Iterator[tuple[str, str]]:
    """Yield the jobs that may answer a person's command, each with its actor: their joins matter to it."""
    match command:
        case RequestCancel(job_id=job_id):
            yield job_id, command.actor
        case RequestLoad(model_id=model_id) if command.cause is Cause.REQUEST:
            model = state.models.get(model_id)
            if model is not None and model.serving is not None:
                yield model.serving.load_job_id, command.actor
            yield from ((job.id, command.actor) for job in state.unended(model_id))
        case RequestUnload(model_id=given) if command.cause is Cause.REQUEST:
            target = given if given is not None else _model_to_unload(state, force=command.force)
            yield from ((job.id, command.actor) for job in state.queue(target or ""))


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
    """Record who joins a job, once for each person and for each key; the system joins without a record."""
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
            said = replace(said, node_signature=command.sign(emergency_statement(*what, said)))
    data = LoadRequested.of(
        parameters,
        command.cause,
        cause_event_id=command.cause_event_id,
        idempotency=command.idempotency,
        policy=command.policy,
        justification=said,
        label=command.label,
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
    if command.label is not UNSET and command.label != job.label:
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


def _find_other_version(model: Model | None, queue: list[Job], command: RequestLoad) -> str | None:
    """Return the load of another version that serves or is pending: an on-demand load replaces none."""
    if queue:
        return queue[-1].id if queue[-1].kind is JobKind.LOAD else None
    serving = model.serving if model is not None and model.phase is ModelState.LOADED else None
    return serving.load_job_id if serving is not None and serving.version != command.version else None


def _effective_parameters(model: Model | None, ahead: list[Job], command: RequestLoad) -> LoadParameters:
    """Return the parameters to record: what is not named stays, unless another version is loaded before."""
    before = _parameters_before(model, ahead, command.version)
    if before is None and command.cause is Cause.DEMAND:
        return demand_parameters(model, command.version, command.parameters)
    if before is None:
        return command.parameters
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


def _decide_unload(state: State, command: RequestUnload, new_id: Callable[[], str]) -> Decision:
    model_id = command.model_id
    if model_id is None:
        model_id = _model_to_unload(state, force=command.force)
    if model_id is None:
        return Refused("nothing_loaded", "no model is loaded; GET /api/v1/models shows their states")
    model = state.models.get(model_id) or Model(model_id)
    if command.copy is not None and model.find_serving(command.copy) is None:
        return REFUSED_AS_OUTDATED
    queue = state.queue(model_id)
    if queue and command.copy is None and _will_unload(queue[-1], command):
        return _join_job(state, command, queue[-1], new_id)
    load_job_id = command.copy or _load_to_end(model, queue, command)
    if load_job_id is None and not (command.on_demand and not queue):
        why = "is only loading; add ?force=true to end the load" if queue else "is not loaded"
        return Refused("not_loaded", f"model '{model_id}' {why}")
    if load_job_id is None and model.chosen and model.chosen.version is None:
        return Existing(model.chosen.job_id)
    version, server = _locate_load(model, queue, load_job_id)
    data = UnloadRequested(
        command.force,
        load_job_id,
        command.cause,
        command.cause_event_id,
        command.idempotency,
        server=UNSET if server is None else server,
        until_asked=command.until_asked or UNSET,
    )
    event_id = new_id()
    request = Draft(event_id, data, command.actor, event_id, model_id, version)
    if load_job_id is not None:
        return Accepted((request,), event_id)
    outcome = replace(request, id=new_id(), data=ModelUnloaded(0, 0, 0), actor=SYSTEM)
    return Accepted((request, outcome), event_id)


def _will_unload(job: Job, command: RequestUnload) -> bool:
    """Whether a pending job does what the command asks; a job that is being cancelled does not.

    Where inferences load models, a person's unload needs a person's, which they do not undo.
    """
    if job.kind is not JobKind.UNLOAD or job.cancelling or (command.force and not job.forced):
        return False
    return job.takes_out_of_service or command.until_asked or not command.on_demand


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


def _decide_cancel(state: State, command: RequestCancel, new_id: Callable[[], str]) -> Decision:
    job = state.unended_job(command.job_id)
    if job is None:
        return Refused(
            "already_finished", f"job {command.job_id} has ended; GET /api/v1/jobs/{{id}} shows how"
        )
    if not job.cancellable:
        return Refused("already_started", _why_not_cancelled(job))
    data = CancelRequested(command.idempotency)
    draft = Draft(new_id(), data, command.actor, job.id, job.model_id, job.version)
    if job.cancel_requested:
        return _record_once(state, command, draft, made_by=None)
    return Accepted((draft,), job.id)


def _why_not_cancelled(job: Job) -> str:
    if job.cause in REPLACEMENTS:
        return f"job {job.id} {REPLACEMENTS[job.cause].format(version=job.version)}"
    return f"unload {job.id} has started and cannot be cancelled; load model '{job.model_id}' again"
