"""The live side of a load: its worker, and the two effects on it. Reports by waking the consumer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from events.jobs import Failure, Job, LoadParameters
from runtime.errors import RuntimeProblem, WorkerDied
from runtime.pool import WorkerPool
from runtime.repository import Repository
from runtime.scheduler import Phase, Running
from runtime.wire import LoadedFile
from runtime.workers import LoadOrder, LoadReport, Worker

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class LiveLoad:
    """What runs for one load job. Written by the consumer and the effects below, on the loop only."""

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
    killed: bool = False
    draining: bool = False
    discarded: bool = False
    requests_at_drain: int = 0
    aborted_requests: int = 0
    freed_bytes: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self.worker is not None and self.worker.ended.done()

    @property
    def over(self) -> bool:
        """Whether nothing of this load is left to run: no process, no task."""
        return not self.tasks and (self.worker is None or self.gone)

    @property
    def drained_requests(self) -> int:
        """Requests that were running when the drain began, and were answered."""
        return max(0, self.requests_at_drain - self.aborted_requests)

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
        return Phase.DRAINING if self.draining or self.killed else Phase.SERVING

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
        if self.worker is not None and not self.gone:
            self.note_end(self.worker, self.report.memory_bytes if self.report is not None else 0)
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
    began = time.monotonic_ns()
    try:
        load.stage = "starting"
        found = await asyncio.to_thread(repository.resolve, load.model_id, load.version)
        worker = await pool.start(load.worker_id)
        load.starting_us = (time.monotonic_ns() - began) // 1000
        load.worker = worker
        worker.ended.add_done_callback(lambda _: load.wake())
        if load.killed:
            worker.kill()
        order = LoadOrder(
            root=repository.root,
            folder=found.folder,
            memory_limit_bytes=load.parameters.memory_limit_bytes,
            known=known,
        )
        load.report = await worker.load(order, lambda stage: setattr(load, "stage", stage))
    except WorkerDied as death:
        lines = "\n".join(load.worker.stderr_tail()) if load.worker is not None else ""
        said = f"; it said:\n{lines}" if lines else ""
        load.failure = Failure(death.code, f"the worker was {death.end} while it loaded the model{said}")
    except RuntimeProblem as problem:
        load.failure = Failure(problem.code, str(problem))


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
        load.note_end(worker, await worker.measure())
    except WorkerDied:
        return
    load.killed = True
    await worker.stop()
