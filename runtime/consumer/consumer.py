"""The consumer: the single coroutine that applies requested events to workers.

It asks the scheduler, executes the one action that it returns, and asks again. It starts a task for each load
and each unload, and is the only one that cancels them; they wake it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from msgspec import structs

from answers.resources import LoadUsage, WaitingJob
from events.clock import seconds_between, uuid7
from events.commands import OUTDATED, Condition
from events.errors import LedgerProblem, LogUnavailable, RequestRefused
from events.jobcommands import RequestLoad, RequestUnload
from events.jobs import TIMEOUT, Job, JobStatus
from events.log import Log
from events.state import State
from events.types import Cause, Draft, JobCancelled, LoadFailed, ModelUnloaded, UnloadStarted
from features.checks import CheckedVersion
from runtime.consumer.growth import GrowthLimits
from runtime.consumer.loads import (
    LOG_RETRY_S,
    Loader,
    Recorder,
    draft_exit,
    draft_replacement_unload,
    log_stderr,
    run_unload,
)
from runtime.consumer.running import RunningLoad
from runtime.consumer.usage import InferenceTotals, list_usage
from runtime.elsewhere import ALONE, Elsewhere
from runtime.errors import CODE_FOLDERS, WorkerDied
from runtime.memory import MAX_LEDGER_BYTES
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker
from runtime.rooms import Allocation, Alternative
from runtime.scheduler import actions
from runtime.scheduler.actions import (
    Action,
    Decision,
    FailLoad,
    RecordFact,
    build_request,
    draft_crash_loop,
    draft_fact,
    draft_load_start,
    draft_settings_change,
    list_conditions,
)
from runtime.scheduler.scheduler import is_load_current
from runtime.scheduler.view import (
    Observations,
    Policy,
    SchedulerView,
    find_started_job,
    find_unload_target,
    load_allowance,
    may_end,
)
from runtime.statistics import RequestRates
from runtime.store.versions import Versions
from runtime.timeouts import LAST_READ_S, MEASURE_LIMIT_S, PROGRESS_TIMEOUT_S, stall_detector
from runtime.wire import plain_text

_log = logging.getLogger(__name__)

MAX_SLEEP_S = 30.0
"""Timers do not count a suspend of the machine, deadlines do."""
MEASURE_EVERY_S = 5.0
"""How often workers are measured. One measurement takes a thread for about a millisecond."""
NOTE_EVERY = 2
"""Last uses are noted after so many measurements: every 10 s. A commit takes a fraction of a millisecond."""
Conditions = tuple[Condition, ...]


class Consumer:
    """Applies the requests of the log: decides, executes one action, and decides again.

    Args:
        log: open, with `ServerStarted` appended.
        pool: open.
        versions: has the files of versions.
        policy: the operator's settings.
        drain_timeout_s: how long an unload without force waits for running inferences.
        turn_drain_s: how long an eviction waits for them, which ends the turn of a busy model.
        progress_timeout_s: how long a load may make no progress, unless its request says otherwise.
        under_pressure: whether the machine is under pressure; called while a load of low
            priority waits.
        loads: the running loads, by job id; None makes a new dictionary.
        elsewhere: says which of the work is this server's.
        workers_bytes: the limit of all workers together, beyond which one of them ends; None is no limit.

    Attributes:
        demand: the inferences that wait for models.
        loads: the running loads, by job id.
        totals: the inferences of the loads that have ended.
    """

    def __init__(
        self,
        log: Log,
        pool: WorkerPool,
        versions: Versions,
        *,
        policy: Policy,
        drain_timeout_s: float,
        turn_drain_s: float | None = None,
        progress_timeout_s: int = PROGRESS_TIMEOUT_S,
        under_pressure: Callable[[], bool] = lambda: False,
        loads: dict[str, RunningLoad] | None = None,
        elsewhere: Elsewhere = ALONE,
        workers_bytes: int | None = None,
    ) -> None:
        self.policy = policy
        self._log = log
        self._pool = pool
        self._drain_timeout_s = drain_timeout_s
        self._turn_drain_s = drain_timeout_s if turn_drain_s is None else turn_drain_s
        self._progress_timeout_s = progress_timeout_s
        self._under_pressure = under_pressure
        self._elsewhere = elsewhere
        self._wakeup = asyncio.Event()
        self._stopping = False
        self._decision = Decision()
        wake = self._wakeup.set
        self.demand = PendingDemand(wake)
        self.totals = InferenceTotals(log.tally.names)
        self._rates = RequestRates()
        self._recorder = Recorder(log, versions.folders | CODE_FOLDERS, elsewhere)
        self.loads = {} if loads is None else loads
        self._loader = Loader(
            log,
            self._recorder,
            pool,
            versions,
            running=self.loads,
            wake=wake,
            elsewhere=elsewhere,
            policy=policy,
            progress_timeout_s=progress_timeout_s,
        )
        self._growth = GrowthLimits(self.loads, workers_bytes, policy.budget_bytes or 0)
        self._monitor = WorkerMonitor(log, self.loads, self._rates, wake, self._growth)

    async def run(self) -> None:
        """Work until `stop`; the server must exit if this ends before."""
        monitoring = asyncio.create_task(self._monitor.run(), name="upkeep")
        try:
            with self._log.subscribed(self._wakeup):
                while not self._stopping:
                    await self._step()
        finally:
            monitoring.cancel()
            self._growth.close()
            await self._cancel_effects()
            await asyncio.wait([monitoring])
            await self._monitor.note_uses()

    async def stop(self) -> None:
        """End `run` after its present action, and all tasks with it; nothing more is appended."""
        self._stopping = True
        self._wakeup.set()

    def stage(self, job: Job) -> str | None:
        """Return the stage of a job in progress: its worker's, or `draining` or `stopping` of an unload."""
        if job.unload is None:
            load = self.loads.get(job.id)
            return load.stage if load is not None and load.report is None else None
        target = self.loads.get(find_unload_target(self._log.state, job))
        return None if target is None or not target.draining else target.stage

    def waiting_for(self, job: Job) -> str | None:
        """Return why a pending job waits, as of the last decision."""
        return self._decision.waiting_for.get(job.id)

    def uses(self) -> list[LoadUsage]:
        return list_usage(self.loads.values(), self._log.state, self._log.now())

    async def check_version(self, model_id: str, version: int | None) -> CheckedVersion:
        """Check a version's present files against the rules in force here; for errors see `Loader`."""
        return await self._loader.check_version(model_id, version)

    def waits(self) -> list[WaitingJob]:
        """Return the waiting jobs, oldest first, as of the last decision."""
        found = list[WaitingJob]()
        for job in self._own().unended():
            if (waiting_for := self.waiting_for(job)) is not None:
                load = self._loader.active.get(job.id)
                needs_bytes = None if load is None else load.known_bytes
                found.append(
                    WaitingJob(
                        job_id=job.id, model_id=job.model_id, needs_bytes=needs_bytes, waiting_for=waiting_for
                    )
                )
        return found

    async def _step(self) -> None:
        self._wakeup.clear()
        state, own, now = self._log.state, self._own(), self._log.clock.monotonic_now()
        self._note_recorded_exits(own)
        self._reap_loads(own)
        running = {
            key: load.to_view(find_started_job(own, key), now, is_demanded=self._is_demanded(load))
            for key, load in self.loads.items()
        }
        view = SchedulerView(state, running, self.policy, now, self._observe(state))
        self._decision = self._elsewhere.decide(view)
        for job in self._decision.unestimated:
            self._loader.begin(job)
        action = self._decision.action
        if action is None:
            await self._sleep(self._decision.wake_at, now)
            return
        is_late = isinstance(action, FailLoad) and action.code == TIMEOUT
        if is_late and stall_detector().has_just_resumed():
            # Reports of its workers may still be unread in a socket.
            await asyncio.sleep(LAST_READ_S)
            return
        try:
            await self.execute(action)
        except RequestRefused as refusal:
            if refusal.code != OUTDATED:  # the next step decides anew, on the state after what came first
                raise
        except LogUnavailable:
            _log.warning("the ledger cannot be written; %s waits", type(action).__name__)
            self._wakeup.clear()
            await self._sleep(None, now, at_most_s=LOG_RETRY_S)

    def _is_demanded(self, load: RunningLoad) -> bool:
        return self.demand.has(load.model_id, load.last_used_ns)

    async def execute(self, action: Action) -> None:
        """Execute an action that was decided on the present state.

        Raises:
            RequestRefused: `outdated`, the state changed before the action was recorded; nothing follows.
            LogUnavailable: it could not be recorded, so nothing follows from it.
        """
        checked = self._loader.confirm(action)
        if checked is not None:
            await self._execute(action, (*list_conditions(action, self._log.state), *checked))

    async def _execute(self, action: Action, conditions: Conditions) -> None:
        record = self._recorder.record
        match action:
            case actions.StartLoad(job, chosen, before):
                await self._start_load(job, chosen, before, conditions)
            case actions.RecordFact(job, data):
                await record(draft_fact(job, data), conditions=conditions)
            case actions.ChangeSettings(job, load_job_id):
                await record(*draft_settings_change(job, load_job_id), conditions=conditions)
            case actions.FailLoad(job, code, message):
                failed = draft_fact(job, LoadFailed(code, plain_text(message)), self._only_worker_of(job.id))
                await self._record_end(job.id, [failed], conditions)
            case actions.CancelJob(job):
                await self._record_end(job.id, [draft_fact(job, JobCancelled())], conditions)
            case actions.StartUnload(job, load_job_id):
                await self._start_unload(job, load_job_id, conditions)
            case actions.KillWorkers(job, load_job_id):
                load = self.loads[load_job_id]
                load.unload = job
                load.kill()
            case actions.FinishUnload(jobs, load_job_id):
                await self._finish_unload(jobs, load_job_id, conditions)
            case actions.RecordExits(load_job_id, _, worker_ids):
                await self._record_end(load_job_id, [], conditions, worker_ids)
            case actions.UnloadForReplacement(job, load_job_id):
                unload = draft_replacement_unload(self.loads[load_job_id], job.id)
                await record(unload, conditions=conditions)
            case actions.RequestReload() | actions.UnloadAutomatically():
                await self._recorder.request(self._build_request(action, conditions))
            case actions.FailModel(model, message):
                await record(*draft_crash_loop(model, message), conditions=conditions)

    def _build_request(
        self, action: actions.RequestReload | actions.UnloadAutomatically, conditions: Conditions
    ) -> RequestLoad | RequestUnload:
        """Return a request of the system; a reload has to pass the rules that are in force here."""
        command = build_request(action, conditions, self._progress_timeout_s)
        rules = self.policy.loads.of(action.model.id)
        if rules is None or isinstance(command, RequestUnload):
            return command
        return replace(command, policy=rules.digest)

    async def _start_load(
        self, job: Job, chosen: Alternative, before: RecordFact | None, conditions: Conditions
    ) -> None:
        """Record `LoadStarted`, and grant the load its reservation."""
        load, target = self._loader.active[job.id], chosen.target
        limits = self.policy.rooms.get(target.name)
        load.worker_id, load.reserved_bytes = uuid7(), chosen.bytes
        load.budget_bytes, load.allowance = self.policy.budget_bytes, partial(self._allowance, load)
        load.allocation = target.allocate(
            chosen.needs, load.parameters, limits, self._pool, self._allocations
        )
        started = draft_load_start(job, is_restarted=load.outdated > 0)
        first = [draft_fact(job, before.data)] if before is not None else []
        await self._recorder.record(
            *first, structs.replace(started, worker_id=load.worker_id), conditions=conditions
        )
        self.loads[job.id] = load
        load.granted_ns = time.monotonic_ns()
        load.on_change = self._growth.on_loaded
        self._growth.on_load_start()
        load.granted.set()

    def _allocations(self) -> list[Allocation]:
        return [each.allocation for each in self.loads.values()]

    def _allowance(self, load: RunningLoad) -> int | None:
        """Return how many bytes the workers of a load may take now, or None without a budget."""
        if self.policy.budget_bytes is None:
            return None
        others = sum(each.memory_bytes for each in self.loads.values() if each is not load)
        return load_allowance(self.policy.budget_bytes, others, load.reserved_bytes)

    async def _start_unload(self, job: Job, load_job_id: str, conditions: Conditions) -> None:
        load = self.loads.get(load_job_id)
        if load is not None:
            load.draining, load.unload = True, job  # routing stops before the fact is recorded
            load.stage = "draining"
        if job.status is JobStatus.PENDING:  # otherwise an append recorded the start, although it raised
            started = draft_fact(job, UnloadStarted(), self._only_worker_of(load_job_id))
            try:
                await self._recorder.record(started, conditions=conditions)
            except LedgerProblem:
                if load is not None:  # the unload can be cancelled until it is recorded
                    load.draining, load.unload, load.stage = False, None, None
                raise
        if load is not None and not job.forced and not load.unloading:
            load.unloading = True
            drain_s = self._turn_drain_s if job.cause is Cause.EVICTION else self._drain_timeout_s
            load.track(asyncio.create_task(run_unload(load, drain_s)))

    async def _finish_unload(self, jobs: tuple[Job, ...], load_job_id: str, conditions: Conditions) -> None:
        load = self.loads.get(load_job_id)
        unloaded = ModelUnloaded(0, 0, 0)
        if load is not None:
            freed_bytes = min(load.freed_bytes, MAX_LEDGER_BYTES)
            unloaded = ModelUnloaded(freed_bytes, load.drained_requests, load.aborted_requests)
            unloaded = load.allocation.complete_unloaded(unloaded)
        worker_id = self._only_worker_of(load_job_id)
        ends = [draft_fact(job, unloaded, worker_id) for job in jobs]
        await self._record_end(load_job_id, ends, conditions)

    def _only_worker_of(self, load_job_id: str) -> str | None:
        load = self.loads.get(load_job_id)
        return None if load is None else load.only_worker_id

    async def _record_end(
        self,
        load_job_id: str,
        ends: Sequence[Draft],
        conditions: Conditions,
        worker_ids: Sequence[str] | None = None,
    ) -> None:
        """Record the unexpected exits of a load's workers, or of these, and the facts that follow."""
        load = self.loads.get(load_job_id)
        if load is None:
            await self._recorder.record(*ends, conditions=conditions)
            return
        dead = load.unexpected_exits
        if worker_ids is not None:
            dead = [worker for worker in load.workers if worker.worker_id in worker_ids]
        new = [worker for worker in dead if worker.worker_id not in load.recorded_exits]
        exits = [draft_exit(load, worker) for worker in new]
        await self._recorder.record(*exits, *ends, conditions=conditions)
        log_stderr(load, new)
        load.recorded_exits.update(worker.worker_id for worker in new)

    def _note_recorded_exits(self, own: State) -> None:
        """Note which exits are recorded, also by an append that raised after it was durable."""
        for load in self.loads.values():
            model = own.models.get(load.model_id)
            serving = model.serving if model is not None else None
            if serving is not None and serving.load_job_id == load.job_id:
                exited = {worker.worker_id for worker in load.unexpected_exits}
                load.recorded_exits.update(exited.difference(serving.worker_ids))

    def _reap_loads(self, own: State) -> None:
        """End loads that the ledger has no use for; forget those whose workers have exited.

        A load whose coroutine has ended without an outcome, since it was killed, is forgotten, too: it
        begins again, or fails if that was a defect.
        """
        active = self._loader.active
        for job_id, each in list(active.items()):
            if own.unended_job(job_id) is None:
                if each.task.done():
                    del active[job_id]
                elif not each.granted.is_set():
                    each.task.cancel()
        for key, load in list(self.loads.items()):
            is_current = is_load_current(own, key, load.model_id)
            if not is_current and (not load.killed or load.tasks):
                load.kill()
            job, is_running = find_started_job(own, key), key in active and not load.task.done()
            is_without_outcome = job is not None and not is_running and may_end(self._log.state, job)
            if load.is_finished and (is_without_outcome or not is_current):
                self._rates.add(load.model_id, load.take_new_requests())
                self.totals.end(load)
                del self.loads[key]

    def _own(self) -> State:
        """Return the part of the state that this server works on."""
        return self._elsewhere.share(self._log.state)

    def _observe(self, state: State) -> Observations:
        active = self._loader.active
        may_yield = any(job.load and job.load.priority == "low" for job in state.unended())
        return Observations(
            fork_server_up=self._pool.healthy,
            under_pressure=may_yield and self._under_pressure(),
            estimates={job_id: each.estimate for job_id, each in active.items()},
            estimating=[job_id for job_id, each in active.items() if each.is_new],
            pending_demand=self.demand.models,
            last_used=self._log.last_used,
            requests_per_s=self._rates.per_s,
            clock=self._log.clock,
        )

    async def _cancel_effects(self) -> None:
        effects = (load.tasks for load in self.loads.values())
        returns = [each.returning for each in self._allocations() if each.returning]
        tasks = {each.task for each in self._loader.active.values()}.union(returns, *effects)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._loader.syncs, return_exceptions=True)

    async def _sleep(self, until: str | None, now: str, at_most_s: float | None = None) -> None:
        seconds = at_most_s if until is None else min(MAX_SLEEP_S, max(0.0, seconds_between(now, until)))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wakeup.wait()


DEMAND_KEPT_S = 30.0
"""How long the demand of an inference that gave up its wait counts: clients that repeat it do so within that
time, so that their load keeps its place, and the model stays until they are back."""


class PendingDemand:
    """Counts, by model, the inferences that wait for a load or are being answered after they waited.

    The demand of those that gave up counts for a while, or until an inference of the model has ended.

    Args:
        on_end: called when the demand for a model has ended.

    Attributes:
        kept_s: how long the demand of an inference that gave up counts.
    """

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self.kept_s = DEMAND_KEPT_S
        self._counts = Counter[str]()
        self._kept: dict[str, tuple[asyncio.TimerHandle, int]] = {}
        self._on_end = on_end

    @contextmanager
    def hold(self, model_id: str) -> Iterator[None]:
        """Protect a model from eviction and idle unload meanwhile, whether or not it is loaded yet."""
        self._counts[model_id] += 1
        try:
            yield
        finally:
            self._counts[model_id] -= 1
            if not self._counts[model_id]:
                del self._counts[model_id]
                self._on_end()

    def keep(self, model_id: str) -> None:
        """Keep the demand of an inference that gives up."""
        if model_id in self._kept:
            self._kept[model_id][0].cancel()
        ending = asyncio.get_running_loop().call_later(self.kept_s, self._expire, model_id)
        self._kept[model_id] = ending, time.monotonic_ns()

    def _expire(self, model_id: str) -> None:
        del self._kept[model_id]
        self._on_end()

    def has(self, model_id: str, last_used_ns: int = 0) -> bool:
        """Whether there is demand for a model whose last inference ended then (CLOCK_MONOTONIC)."""
        _, kept_ns = self._kept.get(model_id, (None, -1))
        return model_id in self._counts or kept_ns >= last_used_ns

    @property
    def models(self) -> Collection[str]:
        return self._counts.keys() | self._kept.keys()


class WorkerMonitor:
    """Measures workers and wakes the consumer then, and notes rates and last uses, periodically."""

    def __init__(
        self,
        log: Log,
        loads: Mapping[str, RunningLoad],
        rates: RequestRates,
        wake: Callable[[], None],
        growth: GrowthLimits,
    ) -> None:
        self._log = log
        self._loads = loads
        self._rates = rates
        self._wake = wake
        self._growth = growth
        self._noted_uses: dict[str, int] = {}
        self._measuring: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Run until cancelled; a failure is logged, since decisions can go on without measurements."""
        try:
            for turn in itertools.count(1):
                await asyncio.sleep(MEASURE_EVERY_S)
                self._update_rates()
                try:
                    await self.measure()
                    if turn % NOTE_EVERY == 0:
                        await self.note_uses()
                except Exception:  # noqa: BLE001 - see above
                    _log.exception("the workers could not be measured, or their last uses not be noted")
        finally:
            for measuring in self._measuring.values():
                measuring.cancel()

    def _update_rates(self) -> None:
        self._rates.decay(MEASURE_EVERY_S)
        for load in self._loads.values():
            self._rates.add(load.model_id, load.take_new_requests())

    async def measure(self) -> None:
        """Measure all workers that have loaded, one after the other; loading ones are sampled meanwhile.

        A stuck measurement delays the others only up to its limit, and is not repeated until it has ended,
        because each takes a thread.
        """
        alive = {worker for load in self._loads.values() for worker in load.alive_workers}
        workers = [worker for worker in alive if worker.loaded_memory is not None]
        for worker in workers:
            if worker.worker_id not in self._measuring:
                measuring = asyncio.create_task(self._measure(worker))
                self._measuring[worker.worker_id] = measuring
                await asyncio.wait({measuring}, timeout=MEASURE_LIMIT_S)
        if workers:
            self._growth.end_excess()
            self._growth.share()
            self._wake()

    async def note_uses(self) -> None:
        """Note in the ledger's file when models were last used."""
        now = self._log.now()
        seen = {load.job_id: load.last_used_ns for load in self._loads.values()}
        used: dict[str, str] = {}
        for load in self._loads.values():
            used_at = load.last_used_at(now)
            if used_at is not None and load.last_used_ns > self._noted_uses.get(load.job_id, 0):
                used[load.model_id] = max(used_at, used.get(load.model_id, ""))
        if used:
            try:
                await self._log.note_last_use(used)
            except LedgerProblem:  # next time, then; the writer has said what is wrong
                return
        self._noted_uses = seen

    async def _measure(self, worker: Worker) -> None:
        try:
            with suppress(WorkerDied, OSError):
                await worker.measure()
        finally:
            del self._measuring[worker.worker_id]
