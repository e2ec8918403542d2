"""The two effects on a load: its workers load the model, and end. The consumer spawns them.

What they come to stands in the `LiveLoad`; they report by waking the consumer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from msgspec.structs import replace

from events.clock import uuid7
from events.jobs import Failure, LoadParameters
from events.models import FORK_SERVER_DIED
from runtime.defaults import WarmUp, read_warm_up
from runtime.errors import ForkServerUnavailable, LoadRefused, RuntimeProblem, WorkerDied
from runtime.live import MEASURE_LIMIT_S, LiveLoad
from runtime.processes.pool import WorkerPool
from runtime.processes.workers import LoadReport, Worker
from runtime.repository import FileStat, ModelVersion, Repository
from runtime.wire import Load, LoadedFile, Prepared

FindPrepared = Callable[[tuple[FileStat, ...]], Prepared | None]
"""Gives the prepared form of these files, if there is one; it may read files."""

OUT_OF_MEMORY = "out_of_memory"
START_ATTEMPTS = 3
"""A fork server that has to be replaced is no reason for a load to fail; one that cannot fork is."""
START_PAUSE_S = 0.1
"""Between them: by then it is known that the fork server has ended, and the next one is waited for."""
STOP_GRACE_S = 1.0
"""For a worker to end by itself once there is nobody to serve; then it is killed."""
INSTANCES_AT_ONCE = len(os.sched_getaffinity(0))
"""Workers of one load that load side by side, after the first: each takes a core and its peak of memory."""


async def run_load(load: LiveLoad, pool: WorkerPool, ordered: Awaitable[Load]) -> None:
    """Load the model in as many workers as are asked for; the outcome stands in `report` or `failure`.

    The first loads alone and hashes, so that the bytes are read for that once. What fails one fails all; but
    one that fails with a prepared form is given the files of the repository instead.

    Args:
        load: what is to be loaded.
        pool: where workers come from.
        ordered: `order_of` it.
    """
    began = time.monotonic_ns()
    load.stage = "starting"
    try:
        order = await ordered
        first = await _load_instance(load, pool, order, load.worker_id, began)
        await _load_rest(load, pool, replace(order, known=first.files, prepared=load.usable))
        load.report = first
    except RuntimeProblem as problem:
        load.failure = load.failure or Failure(problem.code, str(problem))
        load.kill_workers()


async def order_of(
    load: LiveLoad,
    pool: WorkerPool,
    repository: Repository,
    known: tuple[LoadedFile, ...],
    prepared: FindPrepared,
) -> Load:
    """Look at what is to be loaded, and say how.

    Args:
        load: what is to be loaded.
        pool: whose workers are to do it.
        repository: where the model is.
        known: files of which the hashes are known.
        prepared: finds the prepared form.

    Raises:
        RuntimeProblem: the model is not there, or not as it should be; its code says why.
    """

    def look_up() -> tuple[ModelVersion, WarmUp, Prepared | None]:
        found = repository.resolve(load.model_id, load.version)
        return found, read_warm_up(repository, load.model_id), prepared(found.files)

    found, warm_up, load.prepared = await asyncio.to_thread(look_up)
    if load.prepared is None:  # and there may have been one when the load's need was found out
        load.reserve_bare()
    load.warm_up_inputs = warm_up.inputs
    message = load_message(pool, repository, found, load.parameters, warm_up)
    return replace(message, known=known, prepared=load.prepared)


def load_message(
    pool: WorkerPool, repository: Repository, found: ModelVersion, parameters: LoadParameters, warm_up: WarmUp
) -> Load:
    """Return what a worker is told to load a version as its files are."""
    return Load(
        root=str(repository.root),
        folder=str(found.folder),
        files=tuple(file.path for file in found.files),
        threads=pool.threads,
        memory_limit_bytes=parameters.memory_limit_bytes,
        max_batch_size=parameters.max_batch_size,
        max_queue_delay_us=parameters.max_queue_delay_us,
        warm_up=pool.warm_up if warm_up.enabled is None else warm_up.enabled,
        huge_pages=pool.huge_pages,
    )


async def _load_rest(load: LiveLoad, pool: WorkerPool, order: Load) -> None:
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
    load: LiveLoad, pool: WorkerPool, order: Load, worker_id: str, began_ns: int
) -> LoadReport:
    """Start a worker and load the model in it. Why not, if so, is there before its end is noticed.

    If it dies of a prepared form, another goes on without that, and nobody but the log is to notice.
    """
    if order.prepared is not None:
        load.replaced_if_dead.add(worker_id)
    worker = await _start_worker(pool, worker_id)
    load.workers.append(worker)
    load.starting_us = max(load.starting_us, (time.monotonic_ns() - began_ns) // 1000)
    worker.ended.add_done_callback(lambda _: load.wake())
    try:
        report = await worker.load(order, lambda stage: setattr(load, "stage", stage), load.warm_up_inputs)
    except WorkerDied as death:
        is_killed = death.end.signal == signal.SIGKILL  # by somebody else
        if load.replace(worker, None if is_killed else f"{death} while it loaded that"):
            return await _load_bare(load, pool, order, worker_id)
        load.failure = load.failure or _death(worker, death, load.stage)
        raise
    except RuntimeProblem as problem:
        load.told.add(worker_id)
        if problem.code == OUT_OF_MEMORY and worker_id in load.replaced_if_dead:
            await asyncio.shield(worker.ended)  # to make a form's session can take more than a bare one does
            if load.replace(worker, None):
                return await _load_bare(load, pool, order, worker_id)
        load.failure = load.failure or Failure(problem.code, str(problem))
        raise
    finally:
        load.replaced_if_dead.discard(worker_id)
    if report.prepared_failure is not None:
        load.prepared_failure = report.prepared_failure
    load.reports[worker_id] = report
    load.measured_bytes.pop(worker_id, None)  # what it took while it loaded
    return report


async def _load_bare(load: LiveLoad, pool: WorkerPool, order: Load, worker_id: str) -> LoadReport:
    """Load in another worker what the first did not make of a prepared form."""
    load.reserve_bare()
    load.told.discard(worker_id)
    return await _load_instance(load, pool, replace(order, prepared=None), worker_id, time.monotonic_ns())


async def _start_worker(pool: WorkerPool, worker_id: str) -> Worker:
    for _ in range(START_ATTEMPTS - 1):
        with suppress(ForkServerUnavailable):
            return await pool.start(worker_id)
        await asyncio.sleep(START_PAUSE_S)
    return await pool.start(worker_id)


def _death(worker: Worker, death: WorkerDied, stage: str | None) -> Failure:
    """Say of what a load died, in the worker's own words too."""
    lines = "\n".join(worker.stderr_tail())
    said = f"; it said:\n{lines}" if lines else ""
    code = FORK_SERVER_DIED if worker.orphaned else death.code
    at = "warmed the model up" if stage == "warming_up" else "loaded the model"
    return Failure(code, f"{death} while it {at}{said}")


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
    await worker.stop(STOP_GRACE_S)


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
