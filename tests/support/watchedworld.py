"""A world that holds each decision against what no decision may be."""

from events.clock import add_seconds, seconds_between
from events.jobs import Job, JobKind, JobStatus
from events.models import RELOADS, LoadedModel, Model, ModelState
from events.types import Cause, LoadRequested, ModelLoaded, ModelUnloaded, UnloadRequested
from runtime.scheduler.actions import (
    Action,
    CompleteLoad,
    EstimateMemory,
    FailLoad,
    FailModel,
    FinishUnload,
    KillWorkers,
    PrepareModel,
    RecordDeath,
    RequestReload,
    ReuseWorkers,
    StartLoad,
    StopPreparation,
    UnloadAutomatically,
    UnloadForReplacement,
)
from runtime.scheduler.scheduler import MAX_INCIDENTS
from runtime.scheduler.view import Phase
from support.worlds import World

UNFORCED = (
    StartLoad,
    CompleteLoad,
    FailLoad,
    RequestReload,
    FailModel,
    RecordDeath,
    EstimateMemory,
    UnloadForReplacement,
    UnloadAutomatically,
    ReuseWorkers,
)
"""What is not done to a model before its forced unload has ended."""

URGENT = (Cause.RECOVERY, Cause.SWAP)
"""Of these one may load beside as many as may at once."""

NEVER_OVERTAKING_LIMIT_S = 120
"""Who has waited that long is overtaken by nobody who came later."""

PRESSURE_LIMIT_S = 60
"""Who has waited that long waits for the machine's pressure no longer."""


class WatchedWorld(World):
    """A world whose every action is checked before it is done."""

    def act(self, action: Action) -> None:
        self._check_force(action)
        match action:
            case StartLoad(job):
                self._check_start(job)
            case UnloadForReplacement(job, load):
                self._check_way(job, load)
            case PrepareModel(load):
                self._check_spare(self.preparable[load])
            case UnloadAutomatically(model, cause, job_id):
                self._check_end(model, cause, self.state.unended_job(job_id))
            case CompleteLoad(job):
                assert not job.cancelling
            case FinishUnload(_, load) if load in self.live:
                assert self.live[load].gone
            case _:
                pass
        super().act(action)

    def _check_spare(self, need: int) -> None:
        """What is prepared is prepared alone, when nothing is asked for, in memory that nobody has."""
        assert not self.state.unended()
        assert not self.under_pressure
        assert self.preparation is None
        budget = self.policy.budget_bytes
        assert budget is None or self.used_bytes() + need <= budget

    def _check_force(self, action: Action) -> None:
        """Nothing else is done to a model before its forced unload has ended, with all its processes."""
        model, position = self._about(action)
        if model is None:
            return
        forced = [job.created_position for job in self.state.queue(model) if job.forced]
        if forced and isinstance(action, UNFORCED):
            assert isinstance(action, FailLoad)
            assert position > forced[-1]  # behind it one may be late
        if isinstance(action, FinishUnload) and any(job.forced for job in action.jobs):
            assert not [process for process in self.alive() if process.model_id == model]

    def _about(self, action: Action) -> tuple[str | None, int]:
        match action:
            case PrepareModel() | StopPreparation():
                return None, 0
            case KillWorkers(load) | RecordDeath(load):
                return self.live[load].model_id, 0
            case FinishUnload(jobs):
                return jobs[0].model_id, jobs[0].created_position
            case RequestReload(model) | FailModel(model) | UnloadAutomatically(model):
                return model.id, 0
            case _:
                return action.job.model_id, action.job.created_position

    def _check_start(self, job: Job) -> None:
        assert job.load is not None
        assert self.state.queue(job.model_id)[0].id == job.id
        assert not job.cancelling
        assert len(self.loading()) < self.policy.loads_at_once + (job.cause in URGENT)
        budget, most = self.policy.budget_bytes, self.policy.max_loaded
        assert budget is None or self.used_bytes() + (self.needs[job.id] or 0) <= budget
        assert most is None or job.model_id in self.present() or len(self.present()) < most
        if job.load.strategy == "in_place" and job.cause is not Cause.RECOVERY:
            assert job.model_id not in {process.model_id for process in self.serving()}
        yields = job.load.priority == "low" and job.cause not in RELOADS
        if self.under_pressure and yields and not self._made_way(job):
            assert self._waited_s(job) >= PRESSURE_LIMIT_S
        self._check_turn(job)

    def _check_way(self, job: Job, load: str) -> None:
        """What serves is ended for a load only if that can begin at once in its place."""
        assert job.load is not None
        assert job.load.strategy != "beside"
        assert job.cause is not Cause.RECOVERY
        model = self.state.models[job.model_id]
        assert model.serving is not None
        assert model.serving.load_job_id == load
        assert not self._swap_outs(model)
        budget, own = self.policy.budget_bytes, self.live[load]
        assert budget is None or self.used_bytes() - own.memory_bytes + (self.needs[job.id] or 0) <= budget
        self._check_turn(job)

    def _check_turn(self, job: Job) -> None:
        """No load takes room from one that came first and waits too long, also not by an eviction."""
        if self._made_way(job) or job.cause in RELOADS:
            return
        for other in self.state.unended():
            waits = other.kind is JobKind.LOAD and other.id not in self.live
            came_first = other.created_position < job.created_position and other.cause not in RELOADS
            if waits and came_first and self._is_ready(other) and not self._has_room_for(job, other):
                assert self._waited_s(other) < NEVER_OVERTAKING_LIMIT_S

    def _has_room_for(self, job: Job, other: Job) -> bool:
        """Whether both fit, when what is leaving has gone; a model that stays takes nobody's place.

        What is prepared is no reason why not: it is stopped for who lacks memory.
        """
        leaving = [process for process in self.alive() if process.killed or process.unloading]
        used = sum(process.memory_bytes for process in self.live.values() if process not in leaving)
        budget, most = self.policy.budget_bytes, self.policy.max_loaded
        staying = {process.model_id for process in self.alive() if process not in leaving}
        fits = budget is None or used + sum(self.needs[each.id] or 0 for each in (job, other)) <= budget
        has_place = job.model_id in staying or len(staying | {job.model_id, other.model_id}) <= (most or 0)
        return fits and (most is None or has_place)

    def _is_ready(self, job: Job) -> bool:
        """Whether only the others are in a load's way."""
        is_next = self.state.queue(job.model_id)[0].id == job.id
        is_known = self.policy.budget_bytes is None or self.needs.get(job.id) is not None
        model = self.state.models.get(job.model_id)
        makes_way = model is not None and bool(self._swap_outs(model))
        return is_next and is_known and not makes_way

    def _swap_outs(self, model: Model) -> list[Job]:
        """Return the unended jobs by which a model makes way for its next version."""
        unended = self.state.unended(model.id)
        return [job for job in unended if job.cause is Cause.SWAP and job.id in model.unloads]

    def _made_way(self, job: Job) -> bool:
        model = self.state.models.get(job.model_id)
        return job.cause is Cause.SWAP or (model is not None and model.previous is not None)

    def _waited_s(self, job: Job) -> float:
        return seconds_between(job.created_at, self.now)

    def _check_end(self, loaded: LoadedModel, cause: Cause, for_job: Job | None) -> None:
        """What the system unloads by itself is asked for by nobody, and had its time."""
        model, serving = loaded.model, loaded.serving
        assert not self.state.queue(model.id)
        if cause is Cause.RESTART:
            assert (model.phase, self.policy.restores) == (ModelState.LOST, False)
            return
        process = self.live[serving.load_job_id]
        assert process.view(None, "").phase is Phase.SERVING
        assert not process.busy
        assert model.id not in self.leased
        assert not serving.parameters.pinned
        if cause is Cause.IDLE:
            assert serving.parameters.keep_alive_s is not None
            idle_since = max(process.last_used_at or "", serving.loaded_at)
            assert add_seconds(idle_since, serving.parameters.keep_alive_s) <= self.now
        if cause is Cause.EVICTION:
            assert self.policy.evicts
            assert add_seconds(serving.loaded_at, self.policy.min_residency_s) <= self.now
            self._check_need_to_evict(for_job)

    def _check_need_to_evict(self, job: Job | None) -> None:
        budget, most, used = self.policy.budget_bytes, self.policy.max_loaded, self.used_bytes()
        if job is None:
            assert budget is not None
            assert used > budget
            return
        assert job.cause is not Cause.RESTART
        assert budget is None or self.preparation is None or self.preparation.stopping or most is not None
        over_budget = budget is not None and used + (self.needs[job.id] or 0) > budget
        is_one_more = job.model_id not in self.present()
        assert over_budget or (most is not None and is_one_more and len(self.present()) >= most)
        self._check_turn(job)

    def present(self) -> set[str]:
        running = self.running()
        return {process.model_id for load, process in self.live.items() if running[load].alive}

    def _loading_jobs(self) -> list[Job]:
        running = self.running()
        jobs = [self.state.unended_job(load) for load in self.live if running[load].phase is Phase.LOADING]
        return [job for job in jobs if job is not None]

    def check_operations(self) -> None:
        """Never are there two operations on one model, and never too many at once."""
        urgent = any(job.cause in URGENT for job in self._loading_jobs())
        assert len(self.loading()) <= self.policy.loads_at_once + urgent
        for name, model in self.state.models.items():
            unended = self.state.unended(name)
            own = [job for job in unended if job.kind is JobKind.LOAD or job.id in model.unloads]
            begun = [job for job in own if job.status is JobStatus.IN_PROGRESS]
            if any(job.kind is JobKind.LOAD for job in begun):
                assert len(begun) == 1
            assert len([process for process in self.loading() if process.model_id == name]) <= 1
            if model.previous is not None:
                assert (model.state, model.serving) == (ModelState.LOADING, None)
                assert model.loads

    def check_rest(self) -> None:
        """Every job has ended, and there is a process for each model that is loaded, and none else."""
        assert self.state.unended() == []
        models = self.state.models.values()
        loaded = [model for model in models if model.phase is ModelState.LOADED]
        assert {model.serving.load_job_id for model in loaded if model.serving} == self.live.keys()
        for model in loaded:
            assert model.serving is not None
            assert model.serving.worker_ids == tuple(self.live[model.serving.load_job_id].left)
            whole = len(model.serving.worker_ids) == model.serving.parameters.instances
            assert whole != model.degraded
            assert whole or len(model.incidents) >= MAX_INCIDENTS or model.serving.kept_as_is
        for model in models:
            assert model.phase is not ModelState.LOST
            assert model.previous is None
            if model.phase is ModelState.UNLOADED:
                self._check_unloaded(model)

    def _check_unloaded(self, model: Model) -> None:
        """A model that was loaded is so no more only because its end was asked for, or that of its reload."""
        own = [event for event in self.events if event.model_id == model.id]
        loaded = [number for number, event in enumerate(own) if isinstance(event.data, ModelLoaded)]
        since = own[loaded[-1] :] if loaded else []
        ended = {event.job_id for event in since if isinstance(event.data, ModelUnloaded)}
        unloads = {
            event.id
            for event in own
            if isinstance(event.data, UnloadRequested) and event.data.cause is not Cause.SWAP
        }
        reloads = {
            event.id for event in own if isinstance(event.data, LoadRequested) and event.data.cause in RELOADS
        }
        assert not since or unloads & ended or reloads & self.cancelled
