"""A running load, and its two tasks: load the model in workers, and unload it.

The executor starts the tasks. They store their outcome in the `RunningLoad` and wake the consumer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from msgspec.structs import replace

from events.clock import add_seconds, uuid7
from events.jobs import Failure, Job
from events.models import FORK_SERVER_DIED
from events.types import LoadParameters
from runtime.errors import ForkServerUnavailable, LoadRefused, RuntimeProblem, WorkerDied
from runtime.limits import MEASURE_LIMIT_S, STOP_GRACE_S, time_limit
from runtime.modeldefaults import WarmUp, read_warm_up
from runtime.process.pool import WorkerPool
from runtime.process.sampling import WorkerMemory
from runtime.process.worker import Worker
from runtime.repository import FileStat, ModelVersion, Repository
from runtime.scheduler.view import LoadView, Phase
from runtime.statistics import Statistics
from runtime.wire import CachedCopy, HashedFile, Load, Loaded, Tensor

_log = logging.getLogger(__name__)


FindPrepared = Callable[[tuple[FileStat, ...]], CachedCopy | None]
"""Finds the prepared form of these files, if there is one; may read files."""

OUT_OF_MEMORY = "out_of_memory"
START_ATTEMPTS = 3
"""A load survives the replacement of the fork server, but not one that cannot fork."""
START_PAUSE_S = 0.1
"""Between attempts: by then the pool knows that the fork server has ended, and waits for the next one."""
INSTANCES_AT_ONCE = len(os.sched_getaffinity(0))
"""Workers of one load that load at once after the first: each takes a core and its peak of memory."""


@dataclass(slots=True)
class RunningLoad:
    """The live side of one load job. Only the consumer and its tasks change it, on the event loop.

    Attributes:
        worker_id: the first worker's id; that worker may not have started yet.
        workers: all workers that were started, exited or not.
        report: the first worker's, once all have loaded; inputs and outputs are the same in all workers.
        reports: those of the workers that have loaded, by worker id.
        prepared: the prepared form that its workers are given.
        prepared_failure: why the prepared form cannot be used.
        warm_up_inputs: inputs of the warm-up run; none are zeros.
        replaceable: ids of workers that load with the prepared form: the exit of one does not fail the load.
        draining: whether routing to it has stopped.
        unloading: whether `run_unload` has begun.
        expected_exits: ids of workers that the server stopped, or that refused to load.
        killed: whether its workers were killed.
        recorded_exits: ids of workers whose unexpected exit was recorded.
        reserved_bytes: reservation until `report` is set.
        unprepared_bytes: known peak without a prepared form; 0 if unknown.
        last_used_ns: when the last request ended (CLOCK_MONOTONIC); 0 is never.
    """

    job_id: str
    model_id: str
    version: int
    parameters: LoadParameters
    worker_id: str
    wake: Callable[[], None]
    workers: list[Worker] = field(default_factory=list)
    report: Loaded | None = None
    reports: dict[str, Loaded] = field(default_factory=dict)
    failure: Failure | None = None
    stage: str | None = None
    prepared: CachedCopy | None = None
    prepared_failure: str | None = None
    warm_up_inputs: tuple[Tensor, ...] = ()
    replaceable: set[str] = field(default_factory=set)
    starting_us: int = 0
    draining: bool = False
    unloading: bool = False
    expected_exits: set[str] = field(default_factory=set)
    killed: bool = False
    recorded_exits: set[str] = field(default_factory=set)
    requests_at_drain: int = 0
    aborted_requests: int = 0
    freed_bytes: int = 0
    reserved_bytes: int = 0
    unprepared_bytes: int = 0
    last_used_ns: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def only_worker_id(self) -> str | None:
        """The worker id for facts about the whole load, if it has one instance."""
        return self.worker_id if self.parameters.instances == 1 else None

    @property
    def alive_workers(self) -> list[Worker]:
        """The workers that have not exited."""
        return [worker for worker in self.workers if not worker.ended.done()]

    @property
    def has_exited(self) -> bool:
        """Whether there were workers and all have exited."""
        return bool(self.workers) and not (self.alive_workers or self.replaceable)

    @property
    def serving(self) -> tuple[Worker, ...]:
        """The workers that take inferences: loaded, alive, and not being ended."""
        if self.report is None or self.draining:
            return ()
        return tuple(worker for worker in self.workers if not worker.dying)

    @property
    def unexpected_exits(self) -> list[Worker]:
        """The workers that have exited unexpectedly."""
        known = self.expected_exits | self.replaceable
        return [worker for worker in self.workers if worker.ended.done() and worker.worker_id not in known]

    @property
    def is_finished(self) -> bool:
        """Whether neither a worker nor a task is left."""
        return not self.tasks and not self.alive_workers

    @property
    def drained_requests(self) -> int:
        """Requests that were running when the drain began, and were answered."""
        return max(0, self.requests_at_drain - self.aborted_requests)

    @property
    def finished_report(self) -> Loaded:
        """The first worker's report, of a load whose workers have all loaded.

        Raises:
            RuntimeError: they have not.
        """
        if self.report is None:
            raise RuntimeError(f"load {self.job_id} has no report yet")
        return self.report

    @property
    def failure_reason(self) -> Failure:
        """Why the load failed."""
        if self.failure is not None:
            return self.failure
        code = FORK_SERVER_DIED if any(worker.orphaned for worker in self.unexpected_exits) else "worker_died"
        return Failure(code, "the worker died right after it had loaded the model")

    @property
    def measured_bytes(self) -> int:
        """Private bytes of its workers at the last measurement, or sample of those that load."""
        return sum(worker.memory_bytes for worker in self.alive_workers)

    @property
    def memory_bytes(self) -> int:
        """Bytes that count against the budget, until the workers have exited."""
        if self.report is None:
            is_over = self.has_exited or (self.failure is not None and not self.alive_workers)
            return 0 if is_over else max(self.reserved_bytes, self.measured_bytes)
        return self.measured_bytes

    @property
    def loaded_memory(self) -> list[WorkerMemory]:
        """The memory of its workers right after each had loaded."""
        return [worker.loaded_memory for worker in self.workers if worker.loaded_memory is not None]

    @property
    def in_flight(self) -> int:
        """How many inferences are queued or running."""
        return sum(worker.in_flight for worker in self.alive_workers)

    def last_used_at(self, now: str) -> str | None:
        """Return the timestamp at which the last inference ended; None without one."""
        if not self.last_used_ns:
            return None
        return add_seconds(now, (self.last_used_ns - time.monotonic_ns()) / 1e9)

    def to_view(self, job: Job | None, now: str = "", *, is_demanded: bool = False) -> LoadView:
        """Return what the scheduler sees; `job` is the load's job until it has ended."""
        return LoadView(
            self.job_id,
            self.model_id,
            self._phase(job),
            self.killed,
            tuple(worker.worker_id for worker in self.unexpected_exits),
            self.memory_bytes,
            busy=is_demanded or self.in_flight > 0,
            last_used_at=self.last_used_at(now),
        )

    def _phase(self, job: Job | None) -> Phase:
        if job is not None:
            if self.failure is not None or self._lost_a_worker:
                return Phase.FAILED
            return Phase.LOADING if self.report is None else Phase.LOADED
        if self.has_exited:
            return Phase.GONE
        return Phase.DRAINING if self.unloading or self.killed else Phase.SERVING

    @property
    def prepared_form(self) -> CachedCopy | None:
        """The prepared form that at least one worker has loaded."""
        used = any(report.prepared is not None for report in self.reports.values())
        return self.prepared if used else None

    def uses_form(self, worker: Worker) -> bool:
        """Whether a worker has loaded the prepared form."""
        report = self.reports.get(worker.worker_id)
        return report is not None and report.prepared is not None

    @property
    def _lost_a_worker(self) -> bool:
        """Whether a worker has exited that had loaded, or whose task has ended; until then it stores why."""
        ended = (worker.worker_id for worker in self.workers if worker.ended.done())
        return any(worker_id in self.reports or not self.tasks for worker_id in ended)

    def track(self, effect: asyncio.Task[None]) -> None:
        """Keep a task until it ends, then wake the consumer."""
        self.tasks.add(effect)
        effect.add_done_callback(self._on_task_end)

    def _on_task_end(self, effect: asyncio.Task[None]) -> None:
        self.tasks.discard(effect)
        if not effect.cancelled() and effect.exception() is not None:
            _log.error("an effect on %s failed", self.model_id, exc_info=effect.exception())
            reason = "the load failed within the server; see its log"
            self.failure = self.failure or Failure("internal", reason)
            self.kill()
        self.wake()

    def fail(self, code: str, message: str) -> None:
        """End the workers of a load that has not been recorded as loaded; the first reason counts."""
        self.failure = self.failure or Failure(code, message)
        self.kill_workers()
        self.wake()

    def kill(self) -> None:
        """Kill all workers now, however stuck they are, and count what that aborts."""
        self.killed = True
        if self.report is None:  # more would be started; and who waits for one may meet a stuck fork server
            for effect in self.tasks:
                effect.cancel()
        self.kill_workers()

    def kill_workers(self) -> None:
        """Kill the workers that have not exited."""
        for worker in self.alive_workers:
            self.expect_exit(worker)
            worker.kill()

    def reserve_unprepared(self) -> None:
        """Raise the reservation to what the load takes without its prepared form."""
        self.reserved_bytes = max(self.reserved_bytes, self.unprepared_bytes)

    def discard_failed(self, dead: Worker, reason: str | None) -> bool:
        """Forget a worker that exited while it loaded a prepared form; `reason` is why that is used no more.

        Returns:
            Whether another worker is to load without the form.
        """
        if dead.orphaned or self.killed or self.failure or dead.worker_id not in self.replaceable:
            return False
        self.prepared_failure = self.prepared_failure or reason
        self.replaceable.discard(dead.worker_id)
        self.workers.remove(dead)
        return True

    def expect_exit(self, worker: Worker) -> None:
        """Note, right before a worker's end, what it aborts and how many bytes it releases."""
        if worker.worker_id not in self.expected_exits:
            self.expected_exits.add(worker.worker_id)
            self.aborted_requests += worker.in_flight
            self.freed_bytes += worker.memory_bytes if worker.loaded_memory is not None else 0


async def run_load(load: RunningLoad, pool: WorkerPool, ordered: Awaitable[Load]) -> None:
    """Load the model in each instance's worker; the outcome is `report` or `failure`.

    The first worker loads alone and hashes, so that the bytes are read for that once. A failure of one worker
    fails the load, unless it had a prepared form: then another worker loads the files of the repository.
    `ordered` is the result of `build_order`.
    """
    began = time.monotonic_ns()
    load.stage = "starting"
    try:
        order = await ordered
        first = await _load_instance(load, pool, order, load.worker_id, began)
        form = load.prepared if load.prepared_failure is None else None
        await _load_rest(load, pool, replace(order, known=first.files, prepared=form))
        load.report = first
    except RuntimeProblem as problem:
        load.failure = load.failure or Failure(problem.code, str(problem))
        load.kill_workers()


async def build_order(
    load: RunningLoad,
    pool: WorkerPool,
    repository: Repository,
    known: tuple[HashedFile, ...],
    prepared: FindPrepared,
) -> Load:
    """Resolve the version and build the message that loads it; `known` are files with known hashes.

    Raises:
        RuntimeProblem: the version is missing or invalid; the code says which.
    """

    def look_up() -> tuple[ModelVersion, WarmUp, CachedCopy | None]:
        found = repository.resolve(load.model_id, load.version)
        return found, read_warm_up(repository, load.model_id), prepared(found.files)

    found, warm_up, load.prepared = await asyncio.to_thread(look_up)
    if load.prepared is None:  # there may have been one when the memory was estimated
        load.reserve_unprepared()
    load.warm_up_inputs = warm_up.inputs
    message = pool.build_load(repository.root, found, load.parameters, warm_up)
    return replace(message, known=known, prepared=load.prepared)


async def _load_rest(load: RunningLoad, pool: WorkerPool, order: Load) -> None:
    """Load the other instances, some at once; the first failure cancels the rest."""
    places = asyncio.Semaphore(INSTANCES_AT_ONCE)

    async def load_one() -> None:
        async with places:
            report = await _load_instance(load, pool, order, uuid7(), time.monotonic_ns())
        if _contents(report.files) != _contents(order.known):
            raise LoadRefused("model_changed", "a file changed while the instances were loaded")

    others = [asyncio.create_task(load_one()) for _ in range(load.parameters.instances - 1)]
    try:
        await asyncio.gather(*others)
    finally:
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _contents(files: tuple[HashedFile, ...]) -> list[tuple[str, str]]:
    return [(file.path, file.sha256) for file in files]


async def _load_instance(
    load: RunningLoad, pool: WorkerPool, order: Load, worker_id: str, began_ns: int
) -> Loaded:
    """Start a worker and load the model in it; stores why it failed.

    If it dies while it loads a prepared form, another worker loads without that form.
    """
    if order.prepared is not None:
        load.replaceable.add(worker_id)
    worker = await _start_worker(pool, worker_id)
    load.workers.append(worker)
    load.starting_us = max(load.starting_us, (time.monotonic_ns() - began_ns) // 1000)
    worker.ended.add_done_callback(lambda _: load.wake())
    try:
        report = await worker.load(order, lambda stage: setattr(load, "stage", stage), load.warm_up_inputs)
    except WorkerDied as death:
        is_killed = death.end.signal == signal.SIGKILL  # not by the server
        if load.discard_failed(worker, None if is_killed else f"{death} while it loaded that"):
            return await _load_unprepared(load, pool, order, worker_id)
        load.failure = load.failure or _describe_death(worker, death, load.stage)
        raise
    except RuntimeProblem as problem:
        load.expected_exits.add(worker_id)
        if problem.code == OUT_OF_MEMORY and worker_id in load.replaceable:
            # A session of a prepared form can take more memory than one without.
            await asyncio.shield(worker.ended)
            if load.discard_failed(worker, None):
                return await _load_unprepared(load, pool, order, worker_id)
        load.failure = load.failure or Failure(problem.code, str(problem))
        raise
    finally:
        load.replaceable.discard(worker_id)
    if report.prepared_failure is not None:
        load.prepared_failure = report.prepared_failure
    load.reports[worker_id] = report
    return report


async def _load_unprepared(load: RunningLoad, pool: WorkerPool, order: Load, worker_id: str) -> Loaded:
    """Load in another worker without the prepared form with which the first one failed."""
    load.reserve_unprepared()
    load.expected_exits.discard(worker_id)
    return await _load_instance(load, pool, replace(order, prepared=None), worker_id, time.monotonic_ns())


async def _start_worker(pool: WorkerPool, worker_id: str) -> Worker:
    for _ in range(START_ATTEMPTS - 1):
        with suppress(ForkServerUnavailable):
            return await pool.start(worker_id)
        await asyncio.sleep(START_PAUSE_S)
    return await pool.start(worker_id)


def _describe_death(worker: Worker, death: WorkerDied, stage: str | None) -> Failure:
    """Return the failure of a load whose worker died, with the worker's last lines."""
    lines = "\n".join(worker.stderr_tail())
    said = f"; it said:\n{lines}" if lines else ""
    code = FORK_SERVER_DIED if worker.orphaned else death.code
    at = "warmed the model up" if stage == "warming_up" else "loaded the model"
    return Failure(code, f"{death} while it {at}{said}")


async def run_unload(load: RunningLoad, drain_timeout_s: float) -> None:
    """Drain running inferences up to the drain timeout, then stop the workers."""
    workers = load.alive_workers
    load.requests_at_drain = sum(worker.in_flight for worker in workers)
    with suppress(TimeoutError):
        async with time_limit(drain_timeout_s):
            await asyncio.gather(*(worker.wait_until_drained() for worker in workers))
    if load.alive_workers:
        load.stage = "stopping"
        await asyncio.gather(*(_stop(load, worker) for worker in load.alive_workers))


async def _stop(load: RunningLoad, worker: Worker) -> None:
    """Measure how many bytes a worker releases, and stop it."""
    try:
        async with time_limit(MEASURE_LIMIT_S):
            await worker.measure()
    except WorkerDied:
        return
    except OSError:  # no time left, or no descriptor to read with: as much as at its last measurement
        pass
    load.expect_exit(worker)
    await worker.stop(STOP_GRACE_S)
