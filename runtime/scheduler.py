"""The scheduler: given what is recorded and what runs, says the next thing to do. Pure, and the only judge.

`decide` is asked again after each action, event, outcome, death and timer, so it holds no memory of its own
and returns the one most urgent action. Jobs of one model are carried out in the order of their acceptance;
a forced unload goes before everything else. The end of a swapped-out load holds nothing up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from events.clock import later
from events.jobs import Job, JobKind, JobStatus
from events.models import CRASH_LOOP, Model, ModelState
from events.state import State, in_queue
from events.types import Cause

MAX_INCIDENTS = 5
"""Incidents within ten minutes, deaths or failed recoveries, after which a model is not tried any more.

One that still has an instance goes on with it, until somebody loads it."""

MAX_SERVER_DEATHS = 3
"""Unclean ends of the server amid the same load after which that load is held to be their cause."""

FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 30.0

FORK_SERVER_LOOK_S = 0.5
"""How often to look whether the fork server is back, while a load waits for it."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator chose: how many loads run at once."""

    loads_at_once: int


class Phase(StrEnum):
    """What the process behind a load is doing."""

    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    SERVING = "serving"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Running:
    """The live side of one load: `LOADED`, `FAILED` and `GONE` wait to be recorded.

    `killed` says that it was killed already. A `GONE` one was serving or draining before. `dead` are the
    workers that ended and nobody had asked, recorded or not.
    """

    load_job_id: str
    model_id: str
    phase: Phase
    killed: bool = False
    dead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Record `LoadStarted`, then start the workers for this job."""

    job: Job


@dataclass(frozen=True, slots=True)
class CompleteLoad:
    """Record `ModelLoaded`, and with it the request to end the load that it replaces, if any."""

    job: Job
    replaces: str | None


@dataclass(frozen=True, slots=True)
class FailLoad:
    """Record `LoadFailed`: for the reason the worker gave, where `code` is None; end its process."""

    job: Job
    code: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class CancelLoad:
    """Record `JobCancelled` and end the process."""

    job: Job


@dataclass(frozen=True, slots=True)
class StartUnload:
    """Stop routing to this load, record `UnloadStarted`, then drain, without force, and end its process."""

    job: Job
    load_job_id: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process behind this load now."""

    load_job_id: str


@dataclass(frozen=True, slots=True)
class FinishUnload:
    """Record `ModelUnloaded` for these jobs: the process is gone, or there was none."""

    jobs: tuple[Job, ...]
    load_job_id: str


@dataclass(frozen=True, slots=True)
class RecordDeath:
    """Record `WorkerExited` of each of these workers, of a load that serves or was serving."""

    load_job_id: str
    worker_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestReload:
    """Request, for the system, the load of a model that is wanted back, or back at its full strength."""

    model: Model
    cause: Cause


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Record that a model is not tried any more."""

    model: Model
    message: str


Action = (
    StartLoad
    | CompleteLoad
    | FailLoad
    | CancelLoad
    | StartUnload
    | Kill
    | FinishUnload
    | RecordDeath
    | RequestReload
    | GiveUp
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The next action, if any; else when to ask again at the latest, and what each pending job waits for."""

    action: Action | None = None
    wake_at: str | None = None
    waiting_for: Mapping[str, str] = field(default_factory=dict)


def decide(
    state: State,
    running: Mapping[str, Running],
    policy: Policy,
    now: str,
    *,
    fork_server_up: bool = True,
) -> Decision:
    """Decide on the recorded `state` and on what runs, keyed by load job id; `now` is a stamp."""
    sight = _Sight(state, running, policy, now, fork_server_up=fork_server_up)
    for actions in (_force, _outcomes, _unloads, _timeouts, _loads, _reloads):
        action = next(actions(sight), None)
        if action is not None:
            return Decision(action)
    return Decision(None, _wake_at(sight), _waiting_for(sight))


def ended_by(state: State, unload: Job) -> str:
    """Return the load that an unload ends now: what serves, if it does, else what the request named."""
    assert unload.unload is not None
    model = state.models.get(unload.model_id)
    if unload.cause is Cause.SWAP or model is None or model.serving is None:
        return unload.unload.load_job_id
    return model.serving.load_job_id


def is_wanted(state: State, load_job_id: str, model_id: str) -> bool:
    """Whether anything is recorded, or still to be, of the process behind this load; else it is to end.

    Told by the state alone, so that it holds also when nobody knows whether the last fact was recorded.
    """
    model = state.models.get(model_id)
    has_process = model is not None and model.phase in (ModelState.LOADED, ModelState.UNLOADING)
    serving = model.serving if model is not None and has_process else None
    if serving is not None and serving.load_job_id == load_job_id:
        return True
    if state.unended_job(load_job_id) is not None:
        return True
    swapped_out = (job for job in state.unended(model_id) if job.unload and job.cause is Cause.SWAP)
    return any(ended_by(state, job) == load_job_id for job in swapped_out)


class _Sight:
    """One look at everything, with the queues of the models made once."""

    def __init__(
        self,
        state: State,
        running: Mapping[str, Running],
        policy: Policy,
        now: str,
        *,
        fork_server_up: bool,
    ) -> None:
        self.state, self.running, self.policy, self.now = state, running, policy, now
        self.fork_server_up = fork_server_up
        self.unended = state.unended()
        self.queues: dict[str, list[Job]] = {}
        for job in self.unended:
            if in_queue(job):
                self.queues.setdefault(job.model_id, []).append(job)
        loading = sum(run.phase is Phase.LOADING for run in running.values())
        self.free = policy.loads_at_once - loading if fork_server_up else 0

    def is_next(self, job: Job) -> bool:
        """Whether no earlier job of its model has to end before this one."""
        return not in_queue(job) or self.queues[job.model_id][0].id == job.id

    def alive(self, load_job_id: str) -> bool:
        """Whether there is a process behind this load."""
        run = self.running.get(load_job_id)
        return run is not None and run.phase is not Phase.GONE


def _force(sight: _Sight) -> Iterator[Action]:
    """A forced unload cancels the loads before it, kills what serves, and ends the unloads before it."""
    for model_id, queue in sight.queues.items():
        forced = [index for index, job in enumerate(queue) if job.forced]
        if not forced:
            continue
        before = queue[: forced[-1] + 1]
        target = ended_by(sight.state, before[-1])
        yield from (CancelLoad(job) for job in before if job.kind is JobKind.LOAD)
        yield from (StartUnload(job, target) for job in before if job.status is JobStatus.PENDING)
        for run in sight.running.values():
            if run.model_id == model_id and run.phase is not Phase.GONE and not run.killed:
                yield Kill(run.load_job_id)
        if not sight.alive(target):
            yield FinishUnload(tuple(before), target)


def _outcomes(sight: _Sight) -> Iterator[Action]:
    """What a worker reported becomes a fact."""
    for run in sight.running.values():
        job = sight.state.unended_job(run.load_job_id)
        if run.phase is Phase.LOADED and job is not None:
            yield CompleteLoad(job, _replaced_by(sight, job))
        elif run.phase is Phase.FAILED and job is not None:
            yield FailLoad(job)
        elif dead := _unrecorded_deaths(sight, run):
            yield RecordDeath(run.load_job_id, dead)


def _replaced_by(sight: _Sight, job: Job) -> str | None:
    model = sight.state.models.get(job.model_id)
    if model is None or model.phase is not ModelState.LOADED or model.serving is None:
        return None
    return model.serving.load_job_id


def _unrecorded_deaths(sight: _Sight, run: Running) -> tuple[str, ...]:
    """Return the workers of a load that is recorded as serving whose end is not recorded."""
    model = sight.state.models.get(run.model_id)
    if model is None or model.serving is None or model.phase is not ModelState.LOADED:
        return ()
    if model.serving.load_job_id != run.load_job_id:
        return ()
    left = model.serving.worker_ids
    return left if run.phase is Phase.GONE else tuple(worker for worker in left if worker in run.dead)


def _unloads(sight: _Sight) -> Iterator[Action]:
    for job in sight.unended:
        if job.kind is not JobKind.UNLOAD or job.forced:
            continue
        if not sight.is_next(job):
            yield from _cancel_reloads_before(sight, job)
            continue
        load_job_id = ended_by(sight.state, job)
        run = sight.running.get(load_job_id)
        if job.status is JobStatus.PENDING or (run is not None and run.phase is Phase.SERVING):
            yield StartUnload(job, load_job_id)
        elif not sight.alive(load_job_id):
            yield FinishUnload((job,), load_job_id)


def _cancel_reloads_before(sight: _Sight, unload: Job) -> Iterator[Action]:
    """An unload ends the wish to have a model back, whole or at all, and so the reloads that it began."""
    model = sight.state.models.get(unload.model_id)
    if model is None or not (model.phase is ModelState.LOST or model.degraded):
        return
    for job in sight.queues[unload.model_id]:
        if job.id == unload.id:
            return
        if job.kind is JobKind.LOAD and job.cause in (Cause.RECOVERY, Cause.RESTART):
            yield CancelLoad(job)


def _timeouts(sight: _Sight) -> Iterator[Action]:
    late = [job for job in sight.unended if job.deadline_at is not None and job.deadline_at <= sight.now]
    waiting_for = _waiting_for(sight) if late else {}
    for job in late:
        assert job.load is not None
        is_pending = job.status is JobStatus.PENDING
        default = "its turn" if is_pending else "its worker, which had not finished loading"
        reason = waiting_for.get(job.id, default)
        yield FailLoad(job, "timeout", f"not loaded within {job.load.timeout_s} s; it waited for {reason}")


def _loads(sight: _Sight) -> Iterator[Action]:
    for job in sight.unended:
        if job.kind is not JobKind.LOAD or job.id in sight.running:
            continue
        if job.server_deaths >= MAX_SERVER_DEATHS:
            message = f"the server died {job.server_deaths} times while this load was in progress"
            yield FailLoad(job, CRASH_LOOP, message)
        elif sight.free > 0 and sight.is_next(job):
            yield StartLoad(job)


def _reloads(sight: _Sight) -> Iterator[Action]:
    """What was lost is requested again, last loaded first; a model that keeps dying is given up."""
    for model in _wanted_back(sight):
        if model.lost_by is Cause.RESTART:
            yield RequestReload(model, Cause.RESTART)
        elif _keeps_dying(model):
            reason = model.error.message if model.error else "its worker died"
            yield GiveUp(model, f"failed {len(model.incidents)} times within 10 minutes; at last: {reason}")
        elif _reload_at(model) <= sight.now:
            yield RequestReload(model, Cause.RECOVERY)


def _wanted_back(sight: _Sight) -> list[Model]:
    """Return the models that nobody is at and that are lost, or degraded and not to be left so."""
    wanted = (
        model
        for model in sight.state.models.values()
        if (model.phase is ModelState.LOST or (model.degraded and not _keeps_dying(model)))
        and not model.loads
        and not model.unloads
    )
    return sorted(wanted, key=lambda model: model.serving.position if model.serving else 0, reverse=True)


def _keeps_dying(model: Model) -> bool:
    return len(model.incidents) >= MAX_INCIDENTS


def _reload_at(model: Model) -> str:
    """Return when a model whose worker died is requested again: some time after the last that went wrong."""
    assert model.serving is not None
    since = model.lost_at or max([model.serving.degraded_at or "", *model.incidents])
    doublings = max(0, len(model.incidents) - 1)
    return later(since, min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2**doublings))


def _wake_at(sight: _Sight) -> str | None:
    times = [job.deadline_at for job in sight.unended if job.deadline_at is not None]
    times += [_reload_at(model) for model in _wanted_back(sight)]
    if times and not sight.fork_server_up:
        times.append(later(sight.now, FORK_SERVER_LOOK_S))
    return min(times, default=None)


def _waiting_for(sight: _Sight) -> dict[str, str]:
    waiting: dict[str, str] = {}
    for job in sight.unended:
        if job.status is not JobStatus.PENDING:
            continue
        if not sight.is_next(job):
            waiting[job.id] = f"job {sight.queues[job.model_id][0].id} of the same model"
        elif not sight.fork_server_up:
            waiting[job.id] = "the fork server, which is being started again"
        elif sight.free <= 0:
            waiting[job.id] = f"a free place: of loads, {sight.policy.loads_at_once} may run at once"
    return waiting
