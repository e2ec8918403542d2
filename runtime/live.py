"""The live side of a load: its worker, and the two effects on it. Reports by waking the consumer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from events.jobs import Failure, Job, LoadParameters
from events.models import FORK_SERVER_DIED
from runtime.errors import ForkServerUnavailable, RuntimeProblem, WorkerDied
from runtime.pool import WorkerPool
from runtime.repository import Repository
from runtime.scheduler import Phase, Running
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


@dataclass(slots=True)
class LiveLoad:
    """What runs for one load job. Written by the consumer and the effects below, on the loop only.

    Attributes:
        draining: no more requests are routed to it.
        unloading: `run_unload` has begun.
        ending: it ends by itself: it was told to, or it refused to load.
        killed: it is ended by force.
    """

    job_id: str
    model_id: str
    version: int
    parameters: LoadParameters
    worker_id: str
    wake: Callable[[], None]
    worker: Worker | None = None
    report: LoadReport | None = None
    failure: Failure | None = None
    stage: str | None = None
    starting_us: int = 0
    draining: bool = False
    unloading: bool = False
    ending: bool = False
    killed: bool = False
    requests_at_drain: int = 0
    aborted_requests: int = 0
    freed_bytes: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self.worker is not None and self.worker.ended.done()

    @property
    def serving(self) -> tuple[Worker, ...]:
        """The workers that can be asked: loaded, alive, and not being ended."""
        if self.worker is None or self.report is None or self.gone or self.draining:
            return ()
        return (self.worker,)

    @property
    def died(self) -> bool:
        """Whether the process has ended and nobody had asked."""
        return self.gone and not self.ending and not self.killed

    @property
    def over(self) -> bool:
        """Whether nothing of this load is left to run: no process, no task."""
        return not self.tasks and (self.worker is None or self.gone)

    @property
    def drained_requests(self) -> int:
        """Requests that were running when the drain began, and were answered."""
        return max(0, self.requests_at_drain - self.aborted_requests)

    @property
    def loaded_bytes(self) -> int:
        """The worker's private bytes as they were after the load; 0 before."""
        return self.report.memory_bytes if self.report is not None else 0

    def view(self, job: Job | None) -> Running:
        """Return what the scheduler sees, where `job` is the load's job as long as it has not ended."""
        return Running(self.job_id, self.model_id, self._phase(job), self.killed)

    def _phase(self, job: Job | None) -> Phase:
        if job is not None:
            if self.failure is not None or self.gone:
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
        """End the process now, however it is stuck; counts what that aborts."""
        self.killed = True
        if self.worker is None:  # it waits for one, and the fork server may be stuck
            for effect in self.tasks:
                effect.cancel()
        elif not self.gone:
            if not self.ending:
                self.note_end(self.worker, self.loaded_bytes)
            self.worker.kill()

    def note_end(self, worker: Worker, memory_bytes: int) -> None:
        """Take down, right before the end, what it aborts and how many bytes it gives back."""
        self.aborted_requests = worker.in_flight
        self.requests_at_drain = max(self.requests_at_drain, worker.in_flight)
        self.freed_bytes = memory_bytes


async def run_load(
    load: LiveLoad,
    pool: WorkerPool,
    repository: Repository,
    known: tuple[LoadedFile, ...],
) -> None:
    """Start a worker and load the model in it; the outcome stands in `report` or `failure`."""
    try:
        worker, order = await _prepare(load, pool, repository, known)
        load.report = await worker.load(order, lambda stage: setattr(load, "stage", stage))
    except WorkerDied as death:
        load.failure = _death(load, death)
    except RuntimeProblem as problem:
        load.ending = True
        load.failure = Failure(problem.code, str(problem))


async def _prepare(
    load: LiveLoad, pool: WorkerPool, repository: Repository, known: tuple[LoadedFile, ...]
) -> tuple[Worker, LoadOrder]:
    """Find what is to be loaded, and start the worker that is to load it."""
    began = time.monotonic_ns()
    load.stage = "starting"
    found = await asyncio.to_thread(repository.resolve, load.model_id, load.version)
    load.worker = worker = await _start_worker(load, pool)
    load.starting_us = (time.monotonic_ns() - began) // 1000
    worker.ended.add_done_callback(lambda _: load.wake())
    files = tuple(file.path for file in found.files)
    limit = load.parameters.memory_limit_bytes
    return worker, LoadOrder(repository.root, found.folder, files, known, limit)


async def _start_worker(load: LiveLoad, pool: WorkerPool) -> Worker:
    for _ in range(START_ATTEMPTS - 1):
        with suppress(ForkServerUnavailable):
            return await pool.start(load.worker_id)
        await asyncio.sleep(START_PAUSE_S)
    return await pool.start(load.worker_id)


def _death(load: LiveLoad, death: WorkerDied) -> Failure:
    """Say of what a load died, in the worker's own words too."""
    worker = load.worker
    assert worker is not None
    lines = "\n".join(worker.stderr_tail())
    said = f"; it said:\n{lines}" if lines else ""
    code = FORK_SERVER_DIED if worker.orphaned else death.code
    return Failure(code, f"{death} while it loaded the model{said}")


async def run_unload(load: LiveLoad, drain_timeout_s: float) -> None:
    """Wait for running requests, but not for ever, then end the process."""
    worker = load.worker
    if worker is None:
        return
    load.requests_at_drain = worker.in_flight
    with suppress(TimeoutError):
        async with asyncio.timeout(drain_timeout_s):
            await worker.drained()  # a dead worker is drained
    if load.gone:
        return
    load.stage = "stopping"
    try:
        load.note_end(worker, await _measured(load, worker))
    except WorkerDied:
        return
    load.ending = True
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
        return load.loaded_bytes
