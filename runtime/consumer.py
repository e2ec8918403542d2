"""The consumer: the single coroutine that applies requested events against workers.

It asks the scheduler, does the one thing it says, and asks again; effects are tasks that report back by
waking it. Every outcome is recorded here and nowhere else, so a job ends once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from events.accept import Record, RequestLoad
from events.clock import seconds_between, uuid7
from events.errors import LogUnavailable
from events.jobs import Failure, Job, load_requested
from events.log import Log
from events.models import CRASH_LOOP, Model
from events.state import State
from events.types import (
    SYSTEM,
    Cause,
    Data,
    Draft,
    Durations,
    JobCancelled,
    LoadedFile,
    LoadFailed,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)
from runtime.errors import Exit
from runtime.live import LiveLoad, run_load, run_unload
from runtime.pool import WorkerPool
from runtime.repository import Repository
from runtime.scheduler import (
    Action,
    CancelLoad,
    CompleteLoad,
    Decision,
    FailLoad,
    FinishUnload,
    GiveUp,
    Kill,
    Policy,
    RecordDeath,
    RequestReload,
    StartLoad,
    StartUnload,
    decide,
    ended_by,
    is_wanted,
)
from runtime.wire import LoadedFile as HashedFile
from runtime.wire import plain_text
from runtime.workers import LoadReport, Worker

_log = logging.getLogger(__name__)

MAX_REMEMBERED_VERSIONS = 1000
"""Versions whose files' hashes are remembered by identity, so that the same bytes are not hashed again."""
RELOAD_TIMEOUT_S = 300
"""What a load that the system requests has at least: the default of those that people request."""
LOG_RETRY_S = 0.5
"""How long to wait before an outcome is recorded again, when the ledger could not be written."""


class Consumer:
    """Applies what the log requests; give it the log, the workers and where models are.

    Args:
        log: open, with `ServerStarted` appended.
        pool: open.
        repository: where versions are resolved.
        policy: what the scheduler is told.
        drain_timeout_s: how long an unload without force waits for running requests.
    """

    def __init__(
        self,
        log: Log,
        pool: WorkerPool,
        repository: Repository,
        *,
        policy: Policy,
        drain_timeout_s: float,
    ) -> None:
        self._log = log
        self._pool = pool
        self._repository = repository
        self._policy = policy
        self._drain_timeout_s = drain_timeout_s
        self._wakeup = log.subscribe()
        self._stopping = False
        self._hashed: dict[tuple[str, int], tuple[HashedFile, ...]] = {}
        self._decision = Decision()
        self.live: dict[str, LiveLoad] = {}

    async def run(self) -> None:
        """Work until `stop`; that it ends before is a defect worth dying for."""
        try:
            while not self._stopping:
                await self._step()
        finally:
            self._log.unsubscribe(self._wakeup)
            await self._cancel_effects()

    async def stop(self) -> None:
        """Have `run` end after the action that it is at, and all effects with it; appends nothing more."""
        self._stopping = True
        self._wakeup.set()

    def stage(self, job: Job) -> str | None:
        """Return the live stage of a job: of a load where its worker is, of an unload what it waits for."""
        if job.unload is None:
            load = self.live.get(job.id)
            return load.stage if load is not None and load.report is None else None
        target = self.live.get(ended_by(self._log.state, job))
        return None if target is None or not target.draining else target.stage

    def waiting_for(self, job: Job) -> str | None:
        """Return what a pending job waits for, as of the last decision."""
        return self._decision.waiting_for.get(job.id)

    async def _step(self) -> None:
        self._wakeup.clear()
        state, now = self._log.state, self._log.now()
        self._sweep(state)
        running = {key: load.view(state.unended_job(key)) for key, load in self.live.items()}
        self._decision = decide(state, running, self._policy, now, fork_server_up=self._pool.healthy)
        if self._decision.action is None:
            await self._sleep(self._decision.wake_at, now)
            return
        try:
            await self._act(self._decision.action)
        except LogUnavailable:
            _log.warning("the ledger cannot be written; %s waits", type(self._decision.action).__name__)
            self._wakeup.clear()
            await self._sleep(None, now, at_most_s=LOG_RETRY_S)

    async def _cancel_effects(self) -> None:
        tasks = [task for load in self.live.values() for task in load.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sleep(self, until: str | None, now: str, at_most_s: float | None = None) -> None:
        seconds = at_most_s if until is None else max(0.0, seconds_between(now, until))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wakeup.wait()

    def _sweep(self, state: State) -> None:
        """End what nobody wants any more, and forget what has ended."""
        for key, load in list(self.live.items()):
            if not is_wanted(state, key, load.model_id):
                if not load.killed:
                    load.kill()
                if load.over:
                    del self.live[key]

    async def _act(self, action: Action) -> None:
        match action:
            case StartLoad(job):
                await self._start_load(job)
            case CompleteLoad(job, replaces):
                await self._complete_load(job, replaces)
            case FailLoad(job, code, message):
                await self._fail_load(job, Failure(code, message) if code is not None else None)
            case CancelLoad(job):
                await self._record(_draft(job, JobCancelled()))
            case StartUnload(job, load_job_id):
                await self._start_unload(job, load_job_id)
            case Kill(load_job_id):
                self.live[load_job_id].kill()
            case FinishUnload(jobs, load_job_id):
                await self._finish_unload(jobs, load_job_id)
            case RecordDeath(load_job_id, worker_ids):
                load = self.live[load_job_id]
                dead = [worker for worker in load.workers if worker.worker_id in worker_ids]
                await self._record_of(load, dead)
            case RequestReload(model, cause):
                await self._request_reload(model, cause)
            case GiveUp(model, message):
                await self._give_up(model, message)

    async def _start_load(self, job: Job) -> None:
        assert job.load is not None
        assert job.version is not None
        load = LiveLoad(job.id, job.model_id, job.version, job.load, uuid7(), self._wakeup.set)
        await self._record(_draft(job, LoadStarted(job.attempt + 1), load.worker_id))
        self.live[job.id] = load
        known = self._hashed.get((job.model_id, job.version), ())
        load.spawn(asyncio.create_task(run_load(load, self._pool, self._repository, known)))

    async def _complete_load(self, job: Job, replaces: str | None) -> None:
        load = self.live[job.id]
        assert load.report is not None
        self._remember(load, load.report)
        loaded = _draft(job, self._model_loaded(job, load), load.only_worker_id)
        old = self.live.get(replaces) if replaces is not None else None
        if old is None:
            await self._record(loaded)
            return
        request = UnloadRequested(
            force=False, load_job_id=old.job_id, cause=Cause.SWAP, cause_event_id=loaded.id
        )
        swap_id = uuid7()
        swap = Draft(swap_id, request, SYSTEM, swap_id, job.model_id, old.version, old.only_worker_id)
        await self._record(loaded, swap)

    def _model_loaded(self, job: Job, load: LiveLoad) -> ModelLoaded:
        assert job.started_at is not None
        assert load.report is not None
        total_s = seconds_between(job.created_at, self._log.now())
        reports = [load.reports[worker.worker_id] for worker in load.workers]
        return ModelLoaded(
            files=tuple(LoadedFile(f.path, f.bytes, f.mtime_ns, f.sha256) for f in load.report.files),
            worker_ids=tuple(worker.worker_id for worker in load.workers),
            prepared=None,
            memory_bytes=sum(report.memory_bytes for report in reports),
            peak_memory_bytes=sum(report.peak_memory_bytes for report in reports),
            durations=Durations(
                waiting_us=_us(seconds_between(job.created_at, job.started_at)),
                starting_us=load.starting_us,
                loading_us=max(report.loading_us for report in reports),
                hashing_us=max(report.hashing_us for report in reports),
                warming_up_us=None,
                measuring_us=max(report.measuring_us for report in reports),
                total_us=_us(total_s),
            ),
        )

    def _remember(self, load: LiveLoad, report: LoadReport) -> None:
        self._hashed[load.model_id, load.version] = report.files
        while len(self._hashed) > MAX_REMEMBERED_VERSIONS:
            del self._hashed[next(iter(self._hashed))]

    async def _fail_load(self, job: Job, reason: Failure | None) -> None:
        load = self.live.get(job.id)
        if reason is None:
            assert load is not None
            reason = load.reason
        failed = LoadFailed(reason.code, plain_text(reason.message))
        await self._record_of(load, load.dead if load else [], _draft(job, failed, _worker_id(load)))

    async def _start_unload(self, job: Job, load_job_id: str) -> None:
        load = self.live.get(load_job_id)
        if load is not None:
            load.draining = True  # routing stops before the fact is recorded
            load.stage = "draining"
        await self._record(_draft(job, UnloadStarted(), _worker_id(load)))
        if load is not None and not job.forced and not load.unloading:
            load.unloading = True
            load.spawn(asyncio.create_task(run_unload(load, self._drain_timeout_s)))

    async def _finish_unload(self, jobs: tuple[Job, ...], load_job_id: str) -> None:
        load = self.live.get(load_job_id)
        unloaded = ModelUnloaded(0, 0, 0)
        if load is not None:
            unloaded = ModelUnloaded(load.freed_bytes, load.drained_requests, load.aborted_requests)
        ends = [_draft(job, unloaded, _worker_id(load)) for job in jobs]
        await self._record_of(load, load.dead if load else [], *ends)

    async def _request_reload(self, model: Model, cause: Cause) -> None:
        serving = model.serving
        assert serving is not None
        # Many may be requested at once: who asked for little time did not mean the queue after a restart.
        timeout_s = max(serving.parameters.timeout_s, RELOAD_TIMEOUT_S)
        parameters = replace(serving.parameters, timeout_s=timeout_s)
        command = RequestLoad(model.id, serving.version, (), SYSTEM, parameters, cause)
        await self._log.submit(command)

    async def _give_up(self, model: Model, message: str) -> None:
        serving = model.serving
        assert serving is not None
        job_id = uuid7()
        request = load_requested(serving.parameters, Cause.RECOVERY)
        failed = LoadFailed(CRASH_LOOP, plain_text(message))
        await self._record(
            Draft(job_id, request, SYSTEM, job_id, model.id, serving.version),
            Draft(uuid7(), failed, SYSTEM, job_id, model.id, serving.version),
        )

    async def _record_of(self, load: LiveLoad | None, dead: Sequence[Worker], *drafts: Draft) -> None:
        """Record the deaths of these workers, each once, and what follows from them."""
        if load is None:
            await self._record(*drafts)
            return
        new = [worker for worker in dead if worker.worker_id not in load.recorded]
        await self._record(*(_death(load, worker) for worker in new), *drafts)
        load.recorded.update(worker.worker_id for worker in new)

    async def _record(self, *drafts: Draft) -> None:
        await self._log.submit(Record(drafts))


def _draft(job: Job, data: Data, worker_id: str | None = None) -> Draft:
    return Draft(uuid7(), data, SYSTEM, job.id, job.model_id, job.version, worker_id)


def _worker_id(load: LiveLoad | None) -> str | None:
    return load.only_worker_id if load is not None else None


def _death(load: LiveLoad, worker: Worker) -> Draft:
    # Ended with the fork server, by no doing of its own: the signal says nothing of the model.
    end = Exit(None, None) if worker.orphaned else worker.ended.result()
    data = WorkerExited(end.exit_code, end.signal, tuple(worker.stderr_tail()))
    return Draft(uuid7(), data, SYSTEM, load.job_id, load.model_id, load.version, worker.worker_id)


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1_000_000))
