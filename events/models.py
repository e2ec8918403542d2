"""The `Models` projection: what is loaded, by whom, from which bytes. A pure fold, one model at a time.

`TRANSITIONS` is the life of a model. `evolve_model` finds the step of an event's type in `STEPS`, which
fires a trigger of that table; a step that changes nothing returns the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.clock import Timestamp, seconds_between
from events.jobs import (
    BYTES_GONE,
    INCIDENT_WINDOW_S,
    INSUFFICIENT_MEMORY,
    Consequence,
    Failure,
    Footprint,
    Job,
    JobKind,
    JobStatus,
    PendingLoad,
    Retries,
    add_footprint,
    consequence_of,
    count_retry,
    describe_exit,
    footprint_of,
    recent_incidents,
)
from events.serving import AdmittedBytes, Serving, make_serving
from events.types import (
    ALLOW,
    BY_CLIENTS,
    ENDS_OF_PROCESSES,
    REPLACEMENTS,
    Cause,
    Data,
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
    Unknown,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
    contents_of,
)
from events.values import ProcessEnd
from features.facts import STORED_NAMES, LoadEvidence, remember_evidence
from features.folds import Servings

RELOADS = (Cause.RECOVERY, Cause.RESTART, Cause.SWAP, Cause.DRAIN, Cause.COPY)
"""Causes of reloads: loads by the system that bring a model or an instance back, or to another server."""


class ModelState(StrEnum):
    """The state of a model. A `lost` one is to be reloaded: its worker or the server died."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"
    LOST = "lost"


_UNLOADED, _LOADING, _LOADED = ModelState.UNLOADED, ModelState.LOADING, ModelState.LOADED
_UNLOADING, _FAILED, _LOST = ModelState.UNLOADING, ModelState.FAILED, ModelState.LOST
"""Looked up in the class, they take as long as the rest of `Model.state` (measured)."""


class Trigger(StrEnum):
    """The triggers that move a model from one state to another."""

    LOAD_STARTED = "LoadStarted"
    LOADED = "ModelLoaded"
    FAILED = "LoadFailed"
    UNLOAD_STARTED = "UnloadStarted"
    UNLOADED = "ModelUnloaded"
    UNLOAD_CANCELLED = "the started unload is cancelled"
    ENDED = "the last worker or the server ends"
    TO_RELOAD = "the reload failed, and is tried again"
    RELOADS_CANCELLED = "a client cancels the reload"
    REPLACED = "unloaded for replacement"
    NOT_REPLACED = "what was to replace it is not loaded"


TRANSITIONS: Mapping[Trigger, Mapping[ModelState, ModelState]] = {
    Trigger.LOAD_STARTED: {_UNLOADED: _LOADING, _FAILED: _LOADING, _LOST: _LOADING},
    Trigger.LOADED: dict.fromkeys(ModelState, _LOADED),
    Trigger.FAILED: {_UNLOADED: _FAILED, _LOADING: _FAILED, _FAILED: _FAILED, _LOST: _FAILED},
    Trigger.UNLOAD_STARTED: {_LOADED: _UNLOADING},
    Trigger.UNLOADED: dict.fromkeys(ModelState, _UNLOADED),
    Trigger.UNLOAD_CANCELLED: {_UNLOADING: _LOADED},
    Trigger.ENDED: {_LOADED: _LOST, _UNLOADING: _LOST},
    Trigger.TO_RELOAD: {_LOADING: _LOST, _LOST: _LOST},
    Trigger.RELOADS_CANCELLED: {_LOST: _UNLOADED},
    Trigger.REPLACED: {_LOADED: _UNLOADED, _UNLOADING: _UNLOADED, _LOST: _UNLOADED},
    Trigger.NOT_REPLACED: {_UNLOADED: _LOST},
}
"""The life of a model: by trigger, the state before and after. `docs/images/states.svg` draws it.

A model is `loading` while its load runs that began in another state, its phase; if that load ends without
effect, the model returns to the phase. In the phases `loaded` and `unloading`, a load runs beside.
"""


class Choice(Struct, frozen=True, gc=False):
    """The last load or unload of a model by a person, which loads for inferences follow.

    Attributes:
        job_id: its job, or the job of an inference's load with which the person's load was answered.
        by: the person.
        at: when it took effect.
        position: of the event by which it took effect.
        version: None if the person unloaded the model: it is out of service until a person loads it.
        parameters: the load's parameters; None with `version`.
        files: those that were loaded; empty with no `version`.
    """

    job_id: str
    by: str
    at: Timestamp
    position: int
    version: int | None = None
    parameters: LoadParameters | None = None
    files: tuple[LoadedFile, ...] = ()


class Model(Servings, frozen=True, gc=False, rename=STORED_NAMES):
    """One model, with the loads that it serves from.

    Attributes:
        phase: the state of its serving load: never `loading`, see `state`.
        rank: the position of the latest load by a client; the active model has the highest.
        loads: the unended loads, in the order in which they run.
        unloads: ids of the jobs that end the present load, or one of `loads`.
        error: the last failure, until the model is loaded or unloaded.
        last_version: the version of the latest attempt.
        lost_by: the cause of the reload that is to come, in the phase `lost`; with a `previous` load, whether
            the server ended since that was unloaded, like `lost_at`.
        back_off_position: the last loss, death or failed reload, from whose time the back-off counts.
        incidents: times of deaths and of failed reloads that speak against the model; old ones are dropped
            with the next.
        retries: failed reloads that do not, since the model was loaded; None without any.
        previous: the load that was unloaded for replacement, until the new version is loaded. If that fails,
            the model is `lost` with this load.
        footprints: those of the versions loaded last, the latest at the end.
        known_evidence: names of evidence of its loads that the ledger has; not stored without any.
        chosen: the last choice of a person; not stored without one.
        joined_before: versions whose requests an earlier release joined in batches without a verdict on rows:
            their loads do not fail for it. Not stored without any.
    """

    id: str
    phase: ModelState = ModelState.UNLOADED
    rank: int | None = None
    loads: tuple[PendingLoad, ...] = ()
    unloads: tuple[str, ...] = ()
    error: Failure | None = None
    last_version: int | None = None
    lost_by: Cause | None = None
    lost_at: Timestamp | None = None
    back_off_position: int | None = None
    incidents: tuple[str, ...] = ()
    previous: Serving | None = None
    footprints: tuple[Footprint, ...] = ()
    retries: Retries | None = None
    known_evidence: tuple[str, ...] | UnsetType = UNSET
    chosen: Choice | UnsetType = UNSET
    joined_before: tuple[int, ...] | UnsetType = UNSET

    @property
    def held(self) -> tuple[Serving, ...]:
        """The loads that it serves from, or may return to."""
        return tuple(each for each in (*self.servings, self.target, self.previous) if each)

    def find_reloadable(self, version: int | None) -> Serving | None:
        """Return the load that a reload of a version brings back, or makes a copy of."""
        reloadable = (self.target, self.serving, self.previous)
        return next((each for each in reloadable if each and each.version == version), None)

    def has_chosen(self, serving: Serving) -> bool:
        """Whether the last choice of a person is a load: its version, its parameters and its bytes."""
        if self.chosen is UNSET:
            return False
        chosen = self.chosen
        same = (chosen.version, chosen.parameters) == (serving.version, serving.parameters)
        return same and contents_of(chosen.files) == contents_of(serving.files)

    def find_kept_files(self, version: int, added_at: int) -> tuple[LoadedFile, ...] | None:
        """Return the files with which an inference loads a version, or None for the present ones.

        A model that was away comes back with the bytes from before, whatever its folder has by now. The first
        that applies:
        1. A person has chosen this version: the files that were loaded then.
        2. A person has chosen otherwise: the present files, of a version that is none of the person's.
        3. The version was loaded since it was added last: the files of its last load.

        `added_at` is the position at which it was added last; 0 if it never was.
        """
        if self.chosen is not UNSET:
            return self.chosen.files if self.chosen.version == version else None
        last = next((seen for seen in reversed(self.footprints) if seen.version == version), None)
        return last.files if last is not None and last.position > added_at else None

    @property
    def differs_from_choice(self) -> bool:
        """Whether it is loaded with something else than a person chose last.

        An inference of an earlier release has loaded that: this one brings back what was chosen.
        """
        chosen, serving = self.chosen, self.serving
        if chosen is UNSET or chosen.version is None or serving is None:
            return False
        if self.phase is not ModelState.LOADED or self.others or self.target:
            return False
        has_bytes = contents_of(chosen.files) == contents_of(serving.files)
        return chosen.version != serving.version or not has_bytes

    @property
    def is_to_return(self) -> bool:
        """Whether inferences wait for what a person chose, which the first of them brings back.

        Once: not after a load that failed. Nor does it stop what a person asked for since.
        """
        if self.unloads or self.error is not None or not self.differs_from_choice:
            return False
        return all(self.chosen and load.version == self.chosen.version for load in self.loads)

    @property
    def is_missed(self) -> bool:
        """Whether it should serve and cannot: a person has to load it again, or to unload it."""
        is_chosen = self.chosen is not UNSET and self.chosen.version is not None
        is_gone = self.error is not None and self.error.code == BYTES_GONE
        return self.phase is ModelState.FAILED and (is_chosen or is_gone)

    def may_lose_batches(self, version: int) -> bool:
        """Whether a version is loaded without joined requests if its rows turn out to be dependent."""
        return self.joined_before is not UNSET and version in self.joined_before

    def list_admitted_bytes(self, digest: str) -> list[AdmittedBytes]:
        """Return the checked bytes with this digest, of the loads that the model serves from."""
        held = [each for each in self.held if each.digest == digest]
        return [each.earlier for each in held if each.earlier] + [each.passed for each in held]

    @property
    def state(self) -> ModelState:
        """The state of the model: it stays `loaded` while another version of it is loading beside."""
        if self.previous is not None:  # lost from an end of the server to the load's next attempt
            is_lost = self.lost_at is not None and self.started_load is None
            return ModelState.LOST if is_lost else ModelState.LOADING
        if not self.loads or self.started_load is None:
            return self.phase
        return TRANSITIONS[Trigger.LOAD_STARTED].get(self.phase, self.phase)

    @property
    def loaded(self) -> LoadedModel | None:
        """The model with its load, or None without a load."""
        return LoadedModel(self, self.serving) if self.serving is not None else None

    @property
    def started_load(self) -> PendingLoad | None:
        """The load that has started and not ended."""
        for load in self.loads:  # a generator takes three times as long (measured)
            if load.started:
                return load
        return None

    @property
    def degraded(self) -> bool:
        serving = self.serving
        return self.phase is ModelState.LOADED and serving is not None and serving.degraded_at is not None

    @property
    def version(self) -> int | None:
        """The serving version, or else the loading one, or else the one of the latest attempt."""
        if self.serving is not None:
            return self.serving.version
        if self.previous is not None and self.state is ModelState.LOST:
            return self.previous.version
        started = self.started_load
        return started.version if started is not None else self.last_version


class LoadedModel(Struct, frozen=True, gc=False):
    """A model that has a load: it serves from it, is being unloaded from it, or lost it."""

    model: Model
    serving: Serving

    @property
    def id(self) -> str:
        return self.model.id


def evolve_model(model: Model | None, event: Event, job: Job | None) -> Model | None:
    """Return the model after an event.

    Args:
        model: the model before the event; None if it is the first one.
        event: an event of any model or of none.
        job: the event's job as it was before the event.
    """
    if type(event.data) in ENDS_OF_PROCESSES:
        return None if model is None else _end_processes(model, event, event.data)
    if event.model_id is None or (model is not None and event.model_id != model.id):
        return model
    evolve = STEPS.get(type(event.data))
    if evolve is None:
        return model
    before = model or Model(event.model_id)
    after = evolve(before, event, event.data, job)
    return model if after is before else after


def _end_processes(model: Model, event: Event, data: Any) -> Model:
    """A server ended, in order or not: a model loaded there is lost, and a load will start again."""
    end: ProcessEnd = data.end
    loads = tuple([load.interrupted(end) for load in model.loads])
    ended = [each.load_job_id for each in model.servings if end.is_at(each.server)]
    left, previous = model.without(ended) if ended else model, model.previous
    if left.serving is not None or (previous is not None and not end.is_at(previous.server)):
        return model if left is model and loads == model.loads else replace(left, loads=loads)
    ends = TRANSITIONS[Trigger.ENDED]
    lost = model.phase in ends or (previous is not None and model.lost_at is None)
    after = replace(
        model.without_servers(),
        phase=ends.get(model.phase, model.phase),
        previous=previous and previous.without_server(),
        lost_by=Cause.RESTART if lost or model.phase is ModelState.LOST else model.lost_by,
        lost_at=event.recorded_at if lost else model.lost_at,
        loads=loads,
        retries=None,  # the last server's obstacle need not be the next one's
    )
    return model if after == model else after  # most models may be unloaded


def _load_requested(model: Model, event: Event, _: LoadRequested, job: Job | None) -> Model:
    if job is not None or event.version is None or event.job_id != event.id:
        return model
    return replace(model, loads=(*model.loads, PendingLoad(event.id, event.version)))


def _load_started(model: Model, event: Event, data: LoadStarted, _: Job | None) -> Model:
    if not _waits_for(model, event):
        return model
    started = [
        replace(load, started=True, at=data.server) if load.job_id == event.job_id else load
        for load in model.loads
    ]
    return replace(model, loads=tuple(started), last_version=event.version)


def _model_loaded(model: Model, event: Event, data: ModelLoaded, job: Job | None) -> Model:
    loaded = None if job is None else make_serving(event, data, job)
    if job is None or loaded is None:
        return model
    if job.cause is Cause.COPY and model.phase is ModelState.UNLOADING:
        return _without_job(model, job.id)  # the end of its server ends it
    by_system = job.cause not in BY_CLIENTS
    before = (model.serving or model.previous) if job.cause in RELOADS else None
    serving = loaded
    if before is not None:
        serving = replace(loaded, asked_by=before.asked_by or before.loaded_by, brought_back=job.cause)
        serving = replace(serving, earlier=_find_earlier(model, serving))
    after = model.with_load(serving, job.cause, is_loaded=model.phase is ModelState.LOADED)
    return _without_job(
        after,
        job.id,
        phase=_next(model, Trigger.LOADED),
        rank=model.rank if by_system and model.rank is not None else event.position,
        error=None,
        last_version=(after.serving or serving).version,
        lost_by=None,
        lost_at=None,
        back_off_position=None,
        incidents=model.incidents if by_system else (),
        retries=None,
        previous=None,
        footprints=add_footprint(model.footprints, footprint_of(serving.version, data, event.position)),
        known_evidence=remember_evidence(model.known_evidence, data),
        chosen=model.chosen
        if job.cause is not Cause.REQUEST
        else _choose(event, job.id, job.requested_by, loaded),
        joined_before=_remember_joined(model.joined_before, serving),
    )


def _remember_joined(before: tuple[int, ...] | UnsetType, loaded: Serving) -> tuple[int, ...] | UnsetType:
    """Add the version of a load that an earlier release batched, though nobody allowed dependent rows."""
    was_joined = loaded.joins_requests and loaded.rows is UNSET
    if not was_joined or loaded.parameters.dependent_rows == ALLOW:
        return before
    return tuple(sorted({*(before or ()), loaded.version}))


def _choose(event: Event, job_id: str, person: str, serving: Serving) -> Choice:
    return Choice(
        *(job_id, person, event.recorded_at, event.position),
        *(serving.version, serving.parameters, serving.files),
    )


def _load_joined(model: Model, event: Event, _: LoadJoined, __: Job | None) -> Model:
    """A person's load that was answered with the present one, if by an inference, chooses that, too."""
    serving = model.serving
    if serving is None or serving.load_job_id != event.job_id or model.has_chosen(serving):
        return model
    return replace(model, chosen=_choose(event, serving.load_job_id, event.actor, serving))


def _find_earlier(model: Model, reload: Serving) -> AdmittedBytes | UnsetType:
    """Return what the bytes of a reload passed under more rules, which the next one may need again."""
    if (reload.evidence or LoadEvidence()).is_enforced:
        return UNSET
    passed = (each for each in model.list_admitted_bytes(reload.digest) if each.evidence.is_enforced)
    return next(passed, UNSET)


def _settings_changed(model: Model, event: Event, data: ModelSettingsChanged, job: Job | None) -> Model:
    """The present load goes on with other settings; one that is not the named one keeps its own."""
    serving, is_own = model.serving, _waits_for(model, event)
    if is_own and serving is not None and model.find_serving(data.load_job_id) is not None:
        serving = replace(serving, parameters=data.change(serving.parameters))
        model = replace(model, serving=serving)
        if job is not None and job.cause is Cause.REQUEST:
            model = replace(model, chosen=_choose(event, job.id, job.requested_by, serving))
    return _lose_previous(_without_job(model, event.job_id), event) if is_own else model


def _load_failed(model: Model, event: Event, data: LoadFailed, job: Job | None) -> Model:
    """A failed load leaves a loaded model loaded, and a lost one lost unless it speaks against the model.

    A model that has no load is `failed`; so is a lost one that is given up, or whose own version a client
    could not load, for no fault of the circumstances.
    """
    if not _waits_for(model, event):
        return model
    error = Failure(data.code, data.message)
    model = _without_job(model, event.job_id, error=error, last_version=event.version)
    if model.previous is not None:
        return _lose_previous(model, event)
    consequence = consequence_of(error.code)
    is_reload = job is not None and job.cause in RELOADS
    if job is not None and job.is_move_or_copy and model.phase is ModelState.LOADED:
        return _count_failure(model, event, Consequence.RETRY)
    if model.degraded and is_reload:
        is_over = consequence is Consequence.END
        return _end_reloads(model) if is_over else _count_failure(model, event, consequence)
    if model.phase not in TRANSITIONS[Trigger.FAILED]:
        return model
    if model.phase is ModelState.LOST:
        if job is not None and is_reload and consequence is not Consequence.END:
            is_restored = job.cause is Cause.RESTART and consequence is Consequence.RETRY
            lost = _lose_model(
                model, event, Trigger.TO_RELOAD, Cause.RESTART if is_restored else Cause.RECOVERY
            )
            return _count_failure(lost, event, consequence)
        if model.serving is not None and model.serving.version != event.version:
            return model
        if not is_reload and (consequence is Consequence.RETRY or error.code == INSUFFICIENT_MEMORY):
            return model
    phase = _next(model, Trigger.FAILED)
    return replace(model, phase=phase, serving=None, rank=None, lost_by=None, lost_at=None, retries=None)


def _count_failure(model: Model, event: Event, consequence: Consequence) -> Model:
    """Return the model with a failed reload counted: as an incident, or only for the back-off."""
    if consequence is Consequence.INCIDENT:
        incidents = (*recent_incidents(model.incidents, event.recorded_at), event.recorded_at)
        return replace(model, incidents=incidents, back_off_position=event.position)
    retries = count_retry(model.retries, event.recorded_at)
    return replace(model, retries=retries, back_off_position=event.position)


def _unload_requested(model: Model, event: Event, data: UnloadRequested, job: Job | None) -> Model:
    """An unload belongs to the model only if it ends its present load, one of its pending loads, or none.

    One that ends a copy, or what a copy replaces, takes it from the model: nothing is routed there any more.
    """
    if job is not None or event.job_id != event.id:
        return model
    is_one = data.cause in REPLACEMENTS and model.others
    if is_one and model.find_serving(data.load_job_id) is not None:
        return model.without([data.load_job_id])
    present: list[str | None] = [None, *(load.job_id for load in model.loads)]
    if model.serving is not None:
        present.append(model.serving.load_job_id)
    return replace(model, unloads=(*model.unloads, event.id)) if data.load_job_id in present else model


def _unload_started(model: Model, event: Event, _: UnloadStarted, __: Job | None) -> Model:
    is_own = event.job_id in model.unloads and model.phase in TRANSITIONS[Trigger.UNLOAD_STARTED]
    return replace(model, phase=_next(model, Trigger.UNLOAD_STARTED)) if is_own else model


def _model_unloaded(model: Model, event: Event, _: ModelUnloaded, job: Job | None) -> Model:
    if event.job_id not in model.unloads:
        return model
    if job is not None and job.cause is Cause.SWAP:
        return _replaced_model_unloaded(_without_job(model, event.job_id), event, job)
    after = _reset(_without_job(model, event.job_id), Trigger.UNLOADED)
    if job is None or not job.takes_out_of_service:
        return after
    return replace(after, chosen=Choice(job.id, job.requested_by, event.recorded_at, event.position))


def _reset(model: Model, trigger: Trigger) -> Model:
    """Return the model as unloaded, with its pending jobs."""
    return Model(
        model.id,
        _next(model, trigger),
        loads=model.loads,
        unloads=model.unloads,
        last_version=model.last_version,
        footprints=model.footprints,
        known_evidence=model.known_evidence,
        chosen=model.chosen,
        joined_before=model.joined_before,
    )


def _replaced_model_unloaded(model: Model, event: Event, job: Job) -> Model:
    """The old version is unloaded before the new one loads; without a new one to come, the model is lost."""
    serving = model.serving
    if serving is None or job.unload is None or job.unload.load_job_id != serving.load_job_id:
        return model
    phase = _next(model, Trigger.REPLACED)
    gone = replace(model, phase=phase, serving=None, previous=serving, lost_by=None, lost_at=None)
    return _lose_previous(gone, event)


def _lose_previous(model: Model, event: Event) -> Model:
    """Return the model as lost with its previous load, once no pending load is left to replace that."""
    if model.previous is None or model.loads:
        return model
    return replace(
        model,
        phase=_next(model, Trigger.NOT_REPLACED),
        serving=model.previous,
        previous=None,
        lost_by=Cause.SWAP,
        lost_at=event.recorded_at,
    )


def _ended_without_effect(model: Model, event: Event, _: JobCancelled, job: Job | None) -> Model:
    """A job was cancelled: a model that was unloading is loaded again.

    A client that cancels the reload of a lost or degraded model also ends further reloads.
    """
    if job is not None and job.is_move_or_copy and model.phase is ModelState.LOADED:
        return _count_failure(_without_job(model, job.id), event, Consequence.RETRY)
    if job is not None and job.kind is JobKind.LOAD and job.cancelling and job.cause in RELOADS:
        return _end_reloads(_without_job(model, job.id))
    begun = job is not None and job.status is JobStatus.IN_PROGRESS and event.job_id in model.unloads
    phase = TRANSITIONS[Trigger.UNLOAD_CANCELLED].get(model.phase, model.phase) if begun else model.phase
    return _lose_previous(_without_job(model, event.job_id, phase=phase), event)


def _end_reloads(model: Model) -> Model:
    if model.phase is ModelState.LOST:
        return _reset(model, Trigger.RELOADS_CANCELLED)
    if model.serving is None or not model.degraded:
        return model
    return replace(model, serving=replace(model.serving, kept_as_is=True))


def _worker_exited(model: Model, event: Event, data: WorkerExited, _: Job | None) -> Model:
    serving = next((each for each in model.servings if event.worker_id in each.worker_ids), None)
    if serving is None or model.phase is not ModelState.LOADED:
        return model
    left = tuple(worker for worker in serving.worker_ids if worker != event.worker_id)
    of = f"; {len(left)} of {serving.parameters.instances} are left" if left else ""
    is_new = _is_new_incident(serving, event)
    by_forkserver = data.exit_code is None and data.signal is None  # no fault of the model
    counts = is_new and not by_forkserver
    recent = recent_incidents(model.incidents, event.recorded_at)
    after = replace(
        model,
        back_off_position=event.position if is_new else model.back_off_position,
        error=Failure("worker_died", describe_exit(data) + of),
        incidents=(*recent, event.recorded_at) if counts else recent,
    )
    if not left:
        others = after.without([serving.load_job_id])
        return _lose_model(after, event, Trigger.ENDED) if others.serving is None else others
    degraded_at = event.recorded_at if is_new else serving.degraded_at
    return after.exchange(serving, replace(serving, worker_ids=left, degraded_at=degraded_at))


def _is_new_incident(serving: Serving, event: Event) -> bool:
    """Whether a death begins an incident, which limits reloads; all deaths of one load are one."""
    began = serving.degraded_at
    return began is None or seconds_between(began, event.recorded_at) > INCIDENT_WINDOW_S


def _lose_model(model: Model, event: Event, trigger: Trigger, by: Cause = Cause.RECOVERY) -> Model:
    phase, position = _next(model, trigger), event.position
    return replace(model, phase=phase, lost_by=by, lost_at=event.recorded_at, back_off_position=position)


def _next(model: Model, trigger: Trigger) -> ModelState:
    """Return the phase to which a trigger moves a model; each step asks here, so none makes another move."""
    return TRANSITIONS[trigger][model.phase]


def _waits_for(model: Model, event: Event) -> bool:
    return event.job_id in [load.job_id for load in model.loads]


def _without_job(model: Model, job_id: str | None, **changes: Any) -> Model:
    """Return the model without a job that has ended, and with other changes."""
    loads = tuple([load for load in model.loads if load.job_id != job_id])
    unloads = tuple([unload for unload in model.unloads if unload != job_id])
    return replace(model, loads=loads, unloads=unloads, **changes)


STEPS: Mapping[type[Data | Unknown], Callable[[Model, Event, Any, Job | None], Model]] = {
    LoadRequested: _load_requested,
    LoadStarted: _load_started,
    ModelLoaded: _model_loaded,
    ModelSettingsChanged: _settings_changed,
    LoadFailed: _load_failed,
    UnloadRequested: _unload_requested,
    UnloadStarted: _unload_started,
    ModelUnloaded: _model_unloaded,
    JobCancelled: _ended_without_effect,
    WorkerExited: _worker_exited,
    LoadJoined: _load_joined,
}
"""By type of event. A `match` of so many classes takes as long as the rest of a step (measured)."""
