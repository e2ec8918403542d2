"""The live side of a load: its workers, and the two effects on them. Reports by waking the consumer."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from events.clock import uuid7
from events.jobs import Failure, Job, LoadParameters
from events.models import FORK_SERVER_DIED
from runtime.errors import ForkServerUnavailable, LoadRefused, RuntimeProblem, WorkerDied
from runtime.pool import WorkerPool
from runtime.repository import Repository
from runtime.scheduler import Phase, Running
from runtime.statistics import Statistics
from runtime.wire import LoadedFile
from runtime.workers import LoadOrder, LoadReport, Worker

_log = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""A fork server that has to be replaced is no reason for a load to fail; one that cannot fork is."""
MEASURE_LIMIT_S = 1.0
"""For a measurement before the end. The kernel gives it when the process's mappings are free, which a worker
can put off; it is then still to be ended."""
START_PAUSE_S = 0.1
"""Between them: by then it is known that the fork server has ended, and the next one is waited for."""
INSTANCES_AT_ONCE = len(os.sched_getaffinity(0))
"""Workers of one load that load side by side, after the first: each takes a core and its peak of memory."""


@dataclass(slots=True)
class LiveLoad:
    """What runs for one load job. Written by the consumer and the effects below, on the loop only.

    Attributes:
        worker_id: the first worker's, which may not be there yet.
        workers: those that were started, dead or alive.
        report: the first worker's, once all have loaded; inputs and outputs are the same in all.
        reports: of the workers that have loaded, by id.
        draining: no more requests are routed to it.
        unloading: `run_unload` has begun.
        told: ids of the workers whose end is no surprise: they were told to, or refused to load.
        killed: all are ended by force.
        recorded: ids of the workers whose death was recorded.
    """

    job_id: str
    model_id: str
    version: int
    parameters: LoadParameters
    worker_id: str
    wake: Callable[[], None]
    workers: list[Worker] = field(default_factory=list)
    report: LoadReport | None = None
    reports: dict[str, LoadReport] = field(default_factory=dict)
    failure: Failure | None = None
    stage: str | None = None
    starting_us: int = 0
    draining: bool = False
    unloading: bool = False
    told: set[str] = field(default_factory=set)
    killed: bool = False
    recorded: set[str] = field(default_factory=set)
    requests_at_drain: int = 0
    aborted_requests: int = 0
    freed_bytes: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def worker(self) -> Worker | None:
        """The first worker that is left, else the first that there was."""
        return next(iter([*self.left, *self.workers]), None)

    @property
    def only_worker_id(self) -> str | None:
        """The worker that a fact about the whole load is about, if there is but one."""
        return self.worker_id if self.parameters.instances == 1 else None

    @property
    def left(self) -> list[Worker]:
        """The workers whose processes have not ended."""
        return [worker for worker in self.workers if not worker.ended.done()]

    @property
    def gone(self) -> bool:
        """Whether there were processes and all have ended."""
        return bool(self.workers) and not self.left

    @property
    def serving(self) -> tuple[Worker, ...]:
        """The workers that can be asked: loaded, alive, and not being ended."""
        if self.report is None or self.draining:
            return ()
        return tuple(worker for worker in self.workers if not worker.dying)

    @property
    def dead(self) -> list[Worker]:
        """The workers that have ended and nobody had asked."""
        return [
            worker for worker in self.workers if worker.ended.done() and worker.worker_id not in self.told
        ]

    @property
    def over(self) -> bool:
        """Whether nothing of this load is left to run: no process, no task."""
        return not self.tasks and not self.left

    @property
    def drained_requests(self) -> int:
        """Requests that were running when the drain began, and were answered."""
        return max(0, self.requests_at_drain - self.aborted_requests)

    @property
    def reason(self) -> Failure:
        """Why this is not going to be loaded."""
        if self.failure is not None:
            return self.failure
        code = FORK_SERVER_DIED if any(worker.orphaned for worker in self.dead) else "worker_died"
        return Failure(code, "the worker died right after it had loaded the model")

    def view(self, job: Job | None) -> Running:
        """Return what the scheduler sees, where `job` is the load's job as long as it has not ended."""
        dead = tuple(worker.worker_id for worker in self.dead)
        return Running(self.job_id, self.model_id, self._phase(job), self.killed, dead)

    def _phase(self, job: Job | None) -> Phase:
        if job is not None:
            if self.failure is not None or len(self.left) < len(self.workers):
                return Phase.FAILED
            return Phase.LOADING if self.report is None else Phase.LOADED
        if self.gone:
            return Phase.GONE
        return Phase.DRAINING if self.unloading or self.killed else Phase.SERVING

    def spawn(self, effect: asyncio.Task[None]) -> None:
        """Keep an effect until it ends, then wake the consumer."""
        self.tasks.add(effect)
        effect.add_done_callback(self._effect_ended)

    def _effect_ended(self, effect: asyncio.Task[None]) -> None:
        self.tasks.discard(effect)
        if not effect.cancelled() and effect.exception() is not None:
            _log.error("an effect on %s failed", self.model_id, exc_info=effect.exception())
            self.failure = self.failure or Failure(
                "internal", "the load failed within the server; see its log"
            )
            self.kill()
        self.wake()

    def kill(self) -> None:
        """End all processes now, however they are stuck; counts what that aborts."""
        self.killed = True
        if self.report is None:  # more would be started; and who waits for one may meet a stuck fork server
            for effect in self.tasks:
                effect.cancel()
        self.kill_workers()

    def kill_workers(self) -> None:
        """End the processes that there are."""
        for worker in self.left:
            report = self.reports.get(worker.worker_id)
            self.note_end(worker, report.memory_bytes if report is not None else 0)
            worker.kill()

    def note_end(self, worker: Worker, memory_bytes: int) -> None:
        """Take down, right before a worker's end, what it aborts and how many bytes it gives back."""
        if worker.worker_id not in self.told:
            self.told.add(worker.worker_id)
            self.aborted_requests += worker.in_flight
            self.freed_bytes += memory_bytes


async def run_load(
    load: LiveLoad,
    pool: WorkerPool,
    repository: Repository,
    known: tuple[LoadedFile, ...],
) -> None:
    """Load the model in as many workers as are asked for; the outcome stands in `report` or `failure`.

    The first loads alone and hashes, so that the bytes are read for that once. What fails one fails all.
    """
    began = time.monotonic_ns()
    load.stage = "starting"
    try:
        order = await _order(load, repository, known)
        first = await _load_instance(load, pool, order, load.worker_id, began)
        await _load_rest(load, pool, replace(order, known=first.files))
        load.report = first
    except RuntimeProblem as problem:
        load.failure = load.failure or Failure(problem.code, str(problem))
        load.kill_workers()


async def _order(load: LiveLoad, repository: Repository, known: tuple[LoadedFile, ...]) -> LoadOrder:
    found = await asyncio.to_thread(repository.resolve, load.model_id, load.version)
    return LoadOrder(
        root=repository.root,
        folder=found.folder,
        files=tuple(file.path for file in found.files),
        known=known,
        memory_limit_bytes=load.parameters.memory_limit_bytes,
        max_batch_size=load.parameters.max_batch_size,
        max_queue_delay_us=load.parameters.max_queue_delay_us,
    )


async def _load_rest(load: LiveLoad, pool: WorkerPool, order: LoadOrder) -> None:
    """Load the other instances, some at once; at the first that fails, the others are not waited for."""
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


def _contents(files: tuple[LoadedFile, ...]) -> list[tuple[str, str]]:
    return [(file.path, file.sha256) for file in files]


async def _load_instance(
    load: LiveLoad, pool: WorkerPool, order: LoadOrder, worker_id: str, began_ns: int
) -> LoadReport:
    """Start a worker and load the model in it. Why not, if so, is there before its end is noticed."""
    worker = await _start_worker(pool, worker_id)
    load.workers.append(worker)
    load.starting_us = max(load.starting_us, (time.monotonic_ns() - began_ns) // 1000)
    worker.ended.add_done_callback(lambda _: load.wake())
    try:
        report = await worker.load(order, lambda stage: setattr(load, "stage", stage))
    except WorkerDied as death:
        load.failure = load.failure or _death(worker, death)
        raise
    except RuntimeProblem as problem:
        load.told.add(worker_id)
        load.failure = load.failure or Failure(problem.code, str(problem))
        raise
    load.reports[worker_id] = report
    return report


async def _start_worker(pool: WorkerPool, worker_id: str) -> Worker:
    for _ in range(START_ATTEMPTS - 1):
        with suppress(ForkServerUnavailable):
            return await pool.start(worker_id)
        await asyncio.sleep(START_PAUSE_S)
    return await pool.start(worker_id)


def _death(worker: Worker, death: WorkerDied) -> Failure:
    """Say of what a load died, in the worker's own words too."""
    lines = "\n".join(worker.stderr_tail())
    said = f"; it said:\n{lines}" if lines else ""
    code = FORK_SERVER_DIED if worker.orphaned else death.code
    return Failure(code, f"{death} while it loaded the model{said}")


async def run_unload(load: LiveLoad, drain_timeout_s: float) -> None:
    """Wait for running requests, but not for ever, then end the processes."""
    workers = load.left
    load.requests_at_drain = sum(worker.in_flight for worker in workers)
    with suppress(TimeoutError):
        async with asyncio.timeout(drain_timeout_s):
            await asyncio.gather(*(worker.drained() for worker in workers))  # a dead worker is drained
    if load.left:
        load.stage = "stopping"
        await asyncio.gather(*(_stop(load, worker) for worker in load.left))


async def _stop(load: LiveLoad, worker: Worker) -> None:
    try:
        load.note_end(worker, await _measured(load, worker))
    except WorkerDied:
        return
    await worker.stop()


async def _measured(load: LiveLoad, worker: Worker) -> int:
    """Measure how many bytes the worker has; if that cannot be had in time, give what it had after its load.

    Raises:
        WorkerDied: `worker_died`.
    """
    try:
        async with asyncio.timeout(MEASURE_LIMIT_S):
            return await worker.measure()
    except OSError:  # no time left, or no descriptor to read with
        return load.reports[worker.worker_id].memory_bytes
