"""The two tasks of a running load: load the model in workers, and unload it.

The executor starts the tasks. They store their outcome in the `RunningLoad` and wake the consumer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from msgspec.structs import replace

from events.clock import uuid7
from events.types import LoadedFile
from runtime.cache.manifest import CachedForm
from runtime.cgroups import count_usable_cpus
from runtime.consumer.loads import OUT_OF_MEMORY, FormUnusable, RunningLoad
from runtime.errors import ForkServerUnavailable, LoadRefused, NoProgress, RuntimeProblem, WorkerDied
from runtime.filesystem import LOAD_LIMIT_S, RepositoryBusy
from runtime.modeldefaults import NO_WARM_UP, WarmUp, read_reload_warm_up, read_warm_up
from runtime.process.pool import WorkerPool, start_task
from runtime.process.worker import Worker
from runtime.repository import Repository
from runtime.timeouts import MEASURE_LIMIT_S, STOP_GRACE_S, TimeoutExpired, timeout
from runtime.wire import Load, Loaded

FindForm = Callable[[Sequence[LoadedFile]], CachedForm | None]
"""Finds the prepared form of these files, if there is one; may read files."""

START_ATTEMPTS = 3
"""A load survives the replacement of the fork server, but not one that cannot fork."""
START_PAUSE_S = 0.1
"""Between attempts: by then the pool knows that the fork server has ended, and waits for the next one."""


async def run_load(load: RunningLoad, pool: WorkerPool, ordered: Awaitable[Load]) -> None:
    """Load the model in each instance's worker; the outcome is `report`, `form_failure` or `failure`.

    A failure of one worker ends this attempt, and so does the `progress_timeout_s`. `ordered` is the result
    of `build_order`.
    """
    try:
        load.report = await _load_in_time(load, pool, ordered)
    except RuntimeProblem as problem:
        load.store_failure(problem)
        load.files.cancel()
        load.kill_workers()


async def _load_in_time(load: RunningLoad, pool: WorkerPool, ordered: Awaitable[Load]) -> Loaded:
    """Return the first worker's report when all have loaded.

    Raises:
        NoProgress: `no_progress`.
        RuntimeProblem: one of them failed; the code says why.
    """
    try:
        async with timeout(load.progress_timeout_s, lambda: load.progress):
            return await _load_instances(load, pool, await ordered)
    except TimeoutExpired:
        raise NoProgress(
            f"the load made no progress for {load.progress_timeout_s:g} s: all that time its stage was"
            f" {load.stage!r}. If the model needs longer, as a very large one may, load it with a greater"
            " progress_timeout_s"
        ) from None


async def _load_instances(load: RunningLoad, pool: WorkerPool, order: Load) -> Loaded:
    """Load in the first worker while its files are hashed; the others load what was settled then."""
    load.reach_stage("starting")
    hashing = start_task(load.files.hash(), "hashing a model")
    first = await _load_instance(load, pool, order, load.worker_id, time.monotonic_ns())
    await hashing
    settled = await load.files.settle()
    await _load_rest(load, pool, replace(order, root=str(settled.root), folder=str(settled.folder)))
    return first


async def build_order(
    load: RunningLoad,
    pool: WorkerPool,
    repository: Repository,
    find_form: FindForm | None,
    expected: Sequence[LoadedFile] | None,
) -> Load:
    """Obtain the version's files and build the message that loads them; for `expected` see `LoadFiles`.

    Raises:
        FormUnusable: there is no form, and the load's reservation is for one.
        RuntimeProblem: the version is missing, invalid, or cannot be copied; the code says which.
    """
    load.reach_stage("copying")
    files = await load.files.obtain(expected)
    if load.needs_form:  # which is found by the hashes
        await load.files.hash()

    def look_up() -> tuple[WarmUp, CachedForm | None]:
        form = None
        if find_form is not None and files.sha256s is not None:
            form = find_form(files.loaded_files)
        read = read_reload_warm_up if load.is_reload else read_warm_up
        return read(repository, load.model_id), form

    try:
        warm_up, load.prepared = await repository.file_system.run(load.model_id, look_up, LOAD_LIMIT_S)
    except RepositoryBusy:
        if not load.is_reload:
            raise
        warm_up = NO_WARM_UP  # the store has all that a reload needs
    load.check_estimate(files.files)
    if load.needs_form and load.prepared is None:
        raise FormUnusable("it is gone")
    load.warm_up_inputs = warm_up.inputs
    form = load.prepared.copy if load.prepared is not None else None
    return replace(pool.build_load(files, load.parameters, warm_up), prepared=form)


async def _load_rest(load: RunningLoad, pool: WorkerPool, order: Load) -> None:
    """Load the other instances, some at once; the first failure cancels the rest.

    Each takes a CPU and its peak of memory while it loads.
    """
    places = asyncio.Semaphore(count_usable_cpus())

    async def load_one() -> None:
        async with places:
            await _load_instance(load, pool, order, uuid7(), time.monotonic_ns())

    others = [asyncio.create_task(load_one()) for _ in range(load.parameters.instances - 1)]
    try:
        await asyncio.gather(*others)
    finally:
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _load_instance(
    load: RunningLoad, pool: WorkerPool, order: Load, worker_id: str, began_ns: int
) -> Loaded:
    """Start a worker and load the model in it."""
    worker = await _start_worker(pool, worker_id)
    load.workers.append(worker)
    load.starting_us = max(load.starting_us, (time.monotonic_ns() - began_ns) // 1000)
    worker.ended.add_done_callback(lambda _: load.wake())
    try:
        report = await worker.load(
            load.limit_memory(order),
            lambda stage: load.reach_stage(stage, worker_id),
            load.warm_up_inputs,
            on_sample=lambda: load.check_allowance(worker),
        )
    except RuntimeProblem as problem:
        if not isinstance(problem, WorkerDied):
            load.expected_exits.add(worker_id)
        if problem.code == OUT_OF_MEMORY and load.allowance() is not None:
            problem = LoadRefused(OUT_OF_MEMORY, f"{problem}; {load.describe_allowance()}")
        load.store_failure(problem, worker)
        raise
    load.reports[worker_id] = report
    return report


async def _start_worker(pool: WorkerPool, worker_id: str) -> Worker:
    for _ in range(START_ATTEMPTS - 1):
        with suppress(ForkServerUnavailable):
            return await pool.start(worker_id)
        await asyncio.sleep(START_PAUSE_S)
    return await pool.start(worker_id)


async def run_unload(load: RunningLoad, drain_timeout_s: float) -> None:
    """Drain running inferences up to the drain timeout, then stop the workers."""
    workers = load.alive_workers
    load.requests_at_drain = sum(worker.in_flight for worker in workers)
    with suppress(TimeoutError):
        async with timeout(drain_timeout_s):
            await asyncio.gather(*(worker.wait_until_drained() for worker in workers))
    if load.alive_workers:
        load.stage = "stopping"
        await asyncio.gather(*(_stop(load, worker) for worker in load.alive_workers))


async def _stop(load: RunningLoad, worker: Worker) -> None:
    """Measure how many bytes a worker releases, and stop it."""
    try:
        async with timeout(MEASURE_LIMIT_S):
            await worker.measure()
    except WorkerDied:
        return
    except OSError:  # no time left, or no descriptor to read with: as much as at its last measurement
        pass
    load.expect_exit(worker)
    await worker.stop(STOP_GRACE_S)
