"""The executor: each action of the scheduler becomes facts in the log and tasks on workers.

Every outcome is recorded here and nowhere else, so a job ends once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from events.clock import uuid7
from events.commands import Condition, NodeCurrent, Record
from events.errors import LedgerProblem, NotEncodable
from events.jobs import Failure, Job, JobStatus
from events.log import Log
from events.models import RELOADS
from events.state import State
from events.types import (
    Draft,
    JobCancelled,
    LoadFailed,
    ModelUnloaded,
    UnloadStarted,
)
from runtime.cache.preparer import Candidate, FormFailure, Preparer
from runtime.cache.store import ModelCache
from runtime.consumer.drafts import (
    build_request,
    describe_loaded,
    draft_crash_loop,
    draft_exit,
    draft_fact,
    draft_load_start,
    draft_moved_unload,
    draft_placement,
    draft_replacement_unload,
    draft_settings_change,
    hide_paths,
    name_node,
)
from runtime.consumer.loadfiles import PendingFiles
from runtime.consumer.loads import RunningLoad, build_order, run_load, run_unload
from runtime.consumer.usage import InferenceTotals
from runtime.errors import CODE_FOLDERS, RuntimeProblem
from runtime.estimates import MemoryEstimates, find_expected
from runtime.memory import MAX_BYTES
from runtime.process.pool import WorkerPool, start_task
from runtime.process.worker import Worker
from runtime.scheduler import actions
from runtime.scheduler.actions import Action
from runtime.scheduler.scheduler import is_load_current
from runtime.scheduler.view import load_allowance
from runtime.store.contents import ModelContents
from runtime.timeouts import PROGRESS_TIMEOUT_S
from runtime.wire import plain_text

_log = logging.getLogger(__name__)

FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT})
"""Signals that a process causes by itself; others were sent to it."""
Conditions = tuple[Condition, ...]


def log_stderr(load: RunningLoad, worker: Worker) -> None:
    """Log the last lines of a worker, each in a line, for the operator: the ledger does not have them."""
    for line in worker.stderr_tail():
        _log.warning("worker %s of %s printed: %s", worker.worker_id, load.model_id, line)


class Executor:
    """Executes one action after the other; without a `store`, nothing is prepared.

    Attributes:
        loads: the running loads, by job id.
        files: the files of pending loads.
        estimates: the memory that pending loads need.
        preparer: prepares models.
        totals: the inferences of the loads that have ended.
        syncs: loaded versions that are being synced to the disk.
    """

    def __init__(
        self,
        log: Log,
        pool: WorkerPool,
        contents: ModelContents,
        wake: Callable[[], None],
        *,
        drain_timeout_s: float,
        progress_timeout_s: int = PROGRESS_TIMEOUT_S,
        budget_bytes: Callable[[], int | None] = lambda: None,
        node: Callable[[], NodeCurrent | None] = lambda: None,
        store: ModelCache | None = None,
    ) -> None:
        self._log = log
        self._node = node
        self._budget_bytes = budget_bytes
        self._pool = pool
        self._contents = contents
        self._wake = wake
        self.loads: dict[str, RunningLoad] = {}
        self.totals = InferenceTotals(log.tally.names)
        self.preparer = Preparer(
            store, pool, contents, wake, lambda: any(load.is_computing for load in self.loads.values())
        )
        self.files = PendingFiles(contents, wake)
        self.estimates = MemoryEstimates(
            contents.repository, wake, self.preparer.form_of, threads=pool.threads
        )
        self._drain_timeout_s = drain_timeout_s
        self._progress_timeout_s = progress_timeout_s
        self.syncs: set[asyncio.Task[None]] = set()

    def note_recorded_exits(self, state: State) -> None:
        """Note which exits are recorded, also by an append that raised after it was durable."""
        for load in self.loads.values():
            model = state.models.get(load.model_id)
            serving = model.serving if model is not None else None
            if serving is not None and serving.load_job_id == load.job_id:
                exited = {worker.worker_id for worker in load.unexpected_exits}
                load.recorded_exits.update(exited.difference(serving.worker_ids))

    def reap_loads(self, state: State) -> None:
        """Kill loads that the ledger has no use for; forget ended ones."""
        for key, load in list(self.loads.items()):
            if not is_load_current(state, key, load.model_id):
                if not load.killed:
                    load.kill()
                if load.run.is_finished:
                    self.totals.end(load)
                    load.files.close()
                    del self.loads[key]

    async def execute(self, action: Action) -> None:  # noqa: PLR0912 - a table of all actions
        """Execute an action that was decided on the present state.

        Raises:
            RequestRefused: `outdated`, the state changed before the action was recorded; nothing follows.
            LogUnavailable: it could not be recorded, so nothing follows from it.
        """
        conditions = actions.list_conditions(action, self._log.state, self._node())
        match action:
            case actions.StartLoad():
                await self._start_load(action, conditions)
            case actions.PlaceLoad():
                await self._record(draft_placement(action), conditions=conditions)
            case actions.ChangeSettings(job, load_job_id):
                await self._record(draft_settings_change(job, load_job_id), conditions=conditions)
            case actions.CompleteLoad(job, replaces):
                await self._complete_load(job, replaces, conditions)
            case actions.FailLoad(job, code, message):
                reason = Failure(code, message) if code is not None else None
                await self._fail_load(job, reason, conditions)
            case actions.EstimateMemory(job):
                self.estimates.start_estimate(job, self._log.state.models.get(job.model_id))
                if all(load.report is not None for load in self.loads.values()):  # else it may have to wait
                    self._pool.prefork()
            case actions.CompareFiles(job):
                model = self._log.state.models.get(job.model_id)
                if model is not None and model.serving is not None:
                    self.files.compare(job, model.serving)
            case actions.PrepareModel(load_job_id):
                self.preparer.begin(load_job_id)
            case actions.StopPreparation():
                self.preparer.stop()
            case actions.CancelJob(job):
                await self._end_load(job, draft_fact(job, JobCancelled()), conditions)
            case actions.StartUnload(job, load_job_id):
                await self._start_unload(job, load_job_id, conditions)
            case actions.KillWorkers(load_job_id):
                self.loads[load_job_id].kill()
            case actions.RestartBare(load_job_id):
                self._restart_bare(load_job_id)
            case actions.EstimateAnew(load_job_id):
                self._restart_outdated(load_job_id)
            case actions.FinishUnload(jobs, load_job_id):
                await self._finish_unload(jobs, load_job_id, conditions)
            case actions.RecordExits(load_job_id, _, worker_ids):
                load = self.loads[load_job_id]
                dead = [each for each in load.workers if each.worker_id in worker_ids]
                await self._record_with_exits(load, dead, conditions=conditions)
            case actions.UnloadForReplacement(job, load_job_id):
                unload = draft_replacement_unload(self.loads[load_job_id], job.id)
                await self._record(unload, conditions=conditions)
            case actions.RequestReload() | actions.MoveModel() | actions.UnloadAutomatically():
                await self._log.submit(build_request(action, conditions, self._progress_timeout_s))
            case actions.FailModel(model, message):
                await self._record(*draft_crash_loop(model, message), conditions=conditions)

    async def _start_load(self, action: actions.StartLoad, conditions: Conditions) -> None:
        job, placement = action.job, action.placement
        version, parameters = job.load_order
        load = RunningLoad(
            job.id,
            job.model_id,
            version,
            parameters,
            worker_id=uuid7(),
            files=self.files.take(job),
            wake=self._wake,
            progress_timeout_s=parameters.progress_timeout_s or self._progress_timeout_s,
            is_reload=job.cause in RELOADS,
            estimate=self.estimates.find(job.id),
            budget_bytes=self._budget_bytes(),
        )
        load.allowance = partial(self._allowance, load)
        model = self._log.state.models.get(job.model_id)
        expected = find_expected(job, model)
        find_form = self.preparer.find_form if self.estimates.may_use_form(job.id) else None
        repository = self._contents.repository
        ordered = start_task(
            build_order(load, self._pool, repository, find_form, expected), "obtaining a model"
        )
        try:  # its files are read while the log writes
            started = draft_load_start(job, is_restarted=self.estimates.is_restarted(job.id))
            started = replace(started, worker_id=load.worker_id)
            placed = [draft_placement(placement)] if placement is not None else []
            await self._record(*placed, started, conditions=conditions)
        except BaseException:
            ordered.cancel()
            load.files.close()
            raise
        self.loads[job.id] = load
        load.track(asyncio.create_task(run_load(load, self._pool, ordered)))

    def _allowance(self, load: RunningLoad) -> int | None:
        """Return how many bytes the workers of a load may take now; None without a budget."""
        budget_bytes = self._budget_bytes()
        if budget_bytes is None:
            return None
        preparation = self.preparer.preparation
        others = sum(each.memory_bytes for each in self.loads.values() if each is not load)
        others += preparation.memory_bytes if preparation is not None else 0
        return load_allowance(budget_bytes, others, load.reserved_bytes)

    def _restart_bare(self, load_job_id: str) -> None:
        """Forget an attempt whose workers have exited; the job is estimated and admitted without its form."""
        load = self._forget_attempt(load_job_id)
        self.estimates.restart_bare(load_job_id)
        if load.prepared is not None and load.form_failure is not None:
            self.preparer.fail_form(load.prepared, load.form_failure)

    def _restart_outdated(self, load_job_id: str) -> None:
        """Forget an attempt that found other files; the job is estimated and admitted for those."""
        self._forget_attempt(load_job_id)
        self.estimates.restart_outdated(load_job_id)

    def _forget_attempt(self, load_job_id: str) -> RunningLoad:
        load = self.loads.pop(load_job_id)
        self.totals.end(load)
        load.files.close()
        return load

    async def _complete_load(self, job: Job, replaces: str | None, conditions: Conditions) -> None:
        load = self.loads[job.id]
        loaded = draft_fact(job, describe_loaded(job, load, self._log.now(), self._pool), load)
        swapped_out = self._draft_swapped_out(job, replaces, loaded.id)
        try:
            await self._record(loaded, *swapped_out, conditions=conditions)
        except NotEncodable as error:  # the load fails then, and not the consumer
            load.fail(error.code, f"what was loaded cannot be recorded: {error}")
            return
        finally:  # also if an append raised after it was durable
            self._make_durable(load)
        self._offer_for_preparation(load)

    def _draft_swapped_out(self, job: Job, replaces: str | None, loaded_id: str) -> list[Draft]:
        """Return the unload request of the load that a job replaces: here, or at another node."""
        old = self.loads.get(replaces) if replaces is not None else None
        if old is not None:
            return [draft_replacement_unload(old, loaded_id)]
        model = self._log.state.models.get(job.model_id)
        serving = model.loaded if model is not None else None
        if serving is None or serving.serving.load_job_id != replaces or serving.serving.node_id is None:
            return []
        return [draft_moved_unload(serving, job, loaded_id, uuid7)]

    def _make_durable(self, load: RunningLoad) -> None:
        """Sync the files of a load beside all else; without that, the next start copies them again."""

        async def sync() -> None:
            try:
                await load.files.make_durable()
            except RuntimeProblem as problem:
                _log.warning("version %d of %s is not kept: %s", load.version, load.model_id, problem)

        task = start_task(sync(), "syncing a model")
        self.syncs.add(task)
        task.add_done_callback(self.syncs.discard)

    def _offer_for_preparation(self, load: RunningLoad) -> None:
        if load.prepared is not None:
            return
        files = load.files.version_files.loaded_files
        peak_bytes = max(each.peak_memory_bytes for each in load.loaded_memory)
        self.preparer.offer(Candidate(load.job_id, load.model_id, load.version, files, peak_bytes))

    async def _fail_load(self, job: Job, reason: Failure | None, conditions: Conditions) -> None:
        reason = reason or self.loads[job.id].failure_reason
        failed = LoadFailed(reason.code, plain_text(reason.message))
        await self._end_load(job, draft_fact(job, failed, self.loads.get(job.id)), conditions)

    async def _end_load(self, job: Job, end: Draft, conditions: Conditions) -> None:
        """Record the end of a load that did not complete, after the exits of its workers."""
        load = self.loads.get(job.id)
        dead = load.unexpected_exits if load is not None else ()
        await self._record_with_exits(load, dead, end, conditions=conditions)

    async def _start_unload(self, job: Job, load_job_id: str, conditions: Conditions) -> None:
        load = self.loads.get(load_job_id)
        if load is not None:
            load.draining = True  # routing stops before the fact is recorded
            load.stage = "draining"
        if job.status is JobStatus.PENDING:  # else an append recorded it, though that raised
            try:
                await self._record(draft_fact(job, UnloadStarted(), load), conditions=conditions)
            except LedgerProblem:
                if load is not None:  # the unload can be cancelled until it is recorded
                    load.draining, load.stage = False, None
                raise
        if load is not None and not job.forced and not load.unloading:
            load.unloading = True
            load.track(asyncio.create_task(run_unload(load, self._drain_timeout_s)))

    async def _finish_unload(self, jobs: tuple[Job, ...], load_job_id: str, conditions: Conditions) -> None:
        load = self.loads.get(load_job_id)
        unloaded = ModelUnloaded(0, 0, 0)
        if load is not None:
            unloaded = ModelUnloaded(
                min(load.freed_bytes, MAX_BYTES), load.drained_requests, load.aborted_requests
            )
        ends = [draft_fact(job, unloaded, load) for job in jobs]
        dead = load.unexpected_exits if load is not None else ()
        await self._record_with_exits(load, dead, *ends, conditions=conditions)

    async def _record_with_exits(
        self, load: RunningLoad | None, dead: Sequence[Worker], *drafts: Draft, conditions: Conditions
    ) -> None:
        """Record the exits of these workers, each once, and the facts that follow from them."""
        if load is None:
            await self._record(*drafts, conditions=conditions)
            return
        new = [worker for worker in dead if worker.worker_id not in load.recorded_exits]
        self._drop_crashing_copy(load, new)
        exits = (draft_exit(load, worker) for worker in new)
        await self._record(*exits, *drafts, conditions=conditions)
        load.recorded_exits.update(worker.worker_id for worker in new)
        for worker in new:
            if not worker.records_stderr:
                log_stderr(load, worker)

    def _drop_crashing_copy(self, load: RunningLoad, dead: Sequence[Worker]) -> None:
        """Drop a prepared form with which a worker crashed: the model is reloaded without it."""
        if load.prepared is None or load.report is None:
            return
        crashed = (worker.ended.result() for worker in dead if not worker.orphaned)
        if end := next((end for end in crashed if end.signal in FAULTS), None):
            failure = FormFailure(f"a worker that served from it {end}", has_outside_cause=False)
            self.preparer.fail_form(load.prepared, failure)

    async def _record(self, *drafts: Draft, conditions: Conditions) -> None:
        folders, node = self._contents.folders | CODE_FOLDERS, self._node()
        shown = [hide_paths(draft, folders) for draft in drafts]
        if node is not None:
            shown = [name_node(draft, node.node_id) for draft in shown]
        await self._log.submit(Record(tuple(shown), conditions))
