"""The consumer: the single coroutine that applies requested events to workers.

It asks the scheduler, does the one thing it says, and asks again; effects are tasks that report back by
waking it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from events.accept import OUTDATED
from events.clock import seconds_between
from events.commands import NodeCurrent
from events.errors import LedgerProblem, LogUnavailable, RequestRefused
from events.jobs import TIMEOUT, Job
from events.log import Log
from events.state import State
from runtime.cache.store import ModelCache
from runtime.consumer.executor import Executor
from runtime.consumer.loads import RunningLoad
from runtime.consumer.usage import JobWait, MemoryUse, PendingDemand, PreparationUsage, list_usage
from runtime.errors import WorkerDied
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker
from runtime.scheduler.actions import Decision, FailLoad
from runtime.scheduler.scheduler import decide
from runtime.scheduler.view import NodeHints, Observations, Policy, find_started_job, find_unload_target
from runtime.store.contents import ModelContents
from runtime.timeouts import LAST_READ_S, MEASURE_LIMIT_S, PROGRESS_TIMEOUT_S, stall_detector

_log = logging.getLogger(__name__)

LOG_RETRY_S = 0.5
"""Pause before an action is tried again after the ledger could not be written."""
NO_EPOCH = 0
"""Of a node between two epochs, which begin at 1: nothing is its own, also before the ledger says so."""
MAX_SLEEP_S = 30.0
"""Timers do not count a suspend of the machine, deadlines do."""
MEASURE_EVERY_S = 5.0
"""How often workers are measured. One measurement takes a thread for about a millisecond."""
NOTE_EVERY = 2
"""Last uses are noted after so many measurements: every 10 s. A commit takes a fraction of a millisecond."""


class Consumer:
    """Applies what the log requests: decides, executes one action, and decides again.

    Args:
        log: open, with `ServerStarted` appended.
        pool: open.
        contents: finds the files of versions.
        policy: the operator's settings.
        drain_timeout_s: how long an unload without force waits for running inferences.
        progress_timeout_s: how long a load may make no progress, unless its request says otherwise.
        demand: the inferences that wait for models.
        under_pressure: whether the machine is under pressure; called while a load of low
            priority waits, or a model can be prepared.
        store: the optimised model cache; None turns preparation off.
        hints: the hints of the nodes, by their ids; whoever changes them wakes the consumer.
        untrusted: returns the nodes whose joins are not signed with a key that the nodes share.
    """

    def __init__(
        self,
        log: Log,
        pool: WorkerPool,
        contents: ModelContents,
        *,
        policy: Policy,
        drain_timeout_s: float,
        progress_timeout_s: int = PROGRESS_TIMEOUT_S,
        demand: PendingDemand,
        under_pressure: Callable[[], bool] = lambda: False,
        store: ModelCache | None = None,
        hints: Callable[[], Mapping[str, NodeHints]] = dict,
        untrusted: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._untrusted = untrusted
        self._log = log
        self._pool = pool
        self._hints = hints
        self.policy = policy
        self._demand = demand
        self._under_pressure = under_pressure
        self._wakeup = asyncio.Event()
        self._demand.on_end = self._wakeup.set
        self._stopping = False
        self._decision = Decision()
        self._executor = Executor(
            log,
            pool,
            contents,
            self._wakeup.set,
            drain_timeout_s=drain_timeout_s,
            progress_timeout_s=progress_timeout_s,
            budget_bytes=lambda: self.policy.budget_bytes,
            node=self._node,
            store=store,
        )
        self.loads = self._executor.loads
        self.totals = self._executor.totals
        self.preparer = self._executor.preparer
        self._monitor = WorkerMonitor(log, self.loads, self._wakeup.set)

    async def run(self) -> None:
        """Work until `stop`; the server must exit if this ends before."""
        monitoring = asyncio.create_task(self._monitor.run(), name="upkeep")
        try:
            with self._log.subscribed(self._wakeup):
                while not self._stopping:
                    await self._step()
        finally:
            monitoring.cancel()
            await self._cancel_effects()
            await asyncio.wait([monitoring])
            await self.preparer.close()
            await self._monitor.note_uses()

    def set_node(self, node_id: str, epoch: int | None) -> None:
        """Work as this epoch of a node from now on, None between two; the hints may have changed, too."""
        self.policy = replace(self.policy, node_id=node_id, node_epoch=NO_EPOCH if epoch is None else epoch)
        self._wakeup.set()

    def end_workers(self) -> None:
        """Kill all workers; what follows is recorded once the log can be written."""
        for load in self.loads.values():
            load.kill()

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
        """Return what a pending job waits for, as of the last decision."""
        return self._decision.waiting_for.get(job.id)

    def uses(self) -> list[MemoryUse]:
        return list_usage(self.loads.values(), self._log.state, self._log.now())

    def preparation(self) -> PreparationUsage | None:
        candidate, preparation = self.preparer.candidate, self.preparer.preparation
        if candidate is None or preparation is None:
            return None
        return PreparationUsage(
            candidate.model_id, candidate.version, preparation.memory_bytes, preparation.stopping
        )

    def waits(self) -> list[JobWait]:
        """Return the waiting jobs, oldest first, as of the last decision."""
        found = list[JobWait]()
        for job in self._log.state.unended():
            if (waiting_for := self.waiting_for(job)) is not None:
                estimate = self._executor.estimates.find(job.id)
                needs_bytes = None if estimate is None else estimate.bytes
                found.append(JobWait(job.id, job.model_id, needs_bytes, waiting_for))
        return found

    async def _step(self) -> None:
        self._wakeup.clear()
        state, now = self._log.state, self._log.clock.monotonic_now()
        own = state.of(self.policy.node_id, self.policy.node_epoch, self._untrusted())
        self._executor.note_recorded_exits(own)
        self._executor.reap_loads(own)
        self._executor.estimates.forget_ended(own)
        self._executor.files.forget_ended(own)
        running = {
            key: load.to_view(find_started_job(own, key), now, is_demanded=self._demand.has(load.model_id))
            for key, load in self.loads.items()
        }
        self._decision = decide(state, running, self.policy, now, self._observe(state))
        action = self._decision.action
        if action is None:
            await self._sleep(self._decision.wake_at, now)
            return
        is_late = isinstance(action, FailLoad) and action.code == TIMEOUT
        if is_late and stall_detector().has_just_resumed():
            # Its workers may have reported, in a socket that is not read yet.
            await asyncio.sleep(LAST_READ_S)
            return
        try:
            await self._executor.execute(action)
        except RequestRefused as refusal:
            if refusal.code != OUTDATED:  # the next step decides anew, on the state after what came first
                raise
        except LogUnavailable:
            _log.warning("the ledger cannot be written; %s waits", type(action).__name__)
            self._wakeup.clear()
            await self._sleep(None, now, at_most_s=LOG_RETRY_S)

    def _node(self) -> NodeCurrent | None:
        """Return the epoch of this node, on which all that it appends rests; None without nodes."""
        node_id, epoch = self.policy.node_id, self.policy.node_epoch
        return None if node_id is None or epoch is None else NodeCurrent(node_id, epoch)

    def _observe(self, state: State) -> Observations:
        estimates, preparable = self._executor.estimates, self.preparer.preparable
        may_yield = preparable or any(job.load and job.load.priority == "low" for job in state.unended())
        return Observations(
            fork_server_up=self._pool.healthy,
            under_pressure=bool(may_yield) and self._under_pressure(),
            estimates=estimates.known,
            estimating=estimates.in_progress,
            unchanged=self._executor.files.unchanged,
            pending_demand=self._demand.models,
            last_used=self._log.last_used,
            preparable=preparable,
            preparation=self.preparer.preparation,
            clock=self._log.clock,
            nodes=self._hints(),
            untrusted=self._untrusted(),
        )

    async def _cancel_effects(self) -> None:
        effects = (load.tasks for load in self.loads.values())
        pending = [*self._executor.estimates.tasks, *self._executor.files.comparisons.values()]
        tasks = [*pending, *itertools.chain.from_iterable(effects)]
        for task in tasks:
            task.cancel()
        self._executor.files.close()
        for load in self.loads.values():
            load.files.cancel()
        await asyncio.gather(*tasks, *self._executor.syncs, return_exceptions=True)

    async def _sleep(self, until: str | None, now: str, at_most_s: float | None = None) -> None:
        seconds = at_most_s if until is None else min(MAX_SLEEP_S, max(0.0, seconds_between(now, until)))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wakeup.wait()


class WorkerMonitor:
    """Measures workers, wakes the consumer then, and notes last uses in the log, periodically."""

    def __init__(self, log: Log, loads: Mapping[str, RunningLoad], wake: Callable[[], None]) -> None:
        self._log = log
        self._loads = loads
        self._wake = wake
        self._noted_uses: dict[str, int] = {}
        self._measuring: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Run until cancelled; a failure is logged, since decisions can go on without measurements."""
        try:
            for turn in itertools.count(1):
                await asyncio.sleep(MEASURE_EVERY_S)
                try:
                    await self.measure()
                    if turn % NOTE_EVERY == 0:
                        await self.note_uses()
                except Exception:  # noqa: BLE001 - see above
                    _log.exception("the workers could not be measured, or their last uses not be noted")
        finally:
            for measuring in self._measuring.values():
                measuring.cancel()

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
