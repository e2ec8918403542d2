"""Loads of models that nobody is to use: in a worker each, as a server would, to see whether they do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from events.clock import uuid7
from events.jobs import LoadParameters
from runtime.defaults import read_warm_up
from runtime.errors import RuntimeProblem
from runtime.processes.pool import WorkerPool
from runtime.processes.shielding import ended
from runtime.processes.workers import LoadOrder
from runtime.repository import ModelVersion, Repository


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What a load came to: the memory it took at most, or the code and the reason of why it failed."""

    peak_memory_bytes: int = 0
    code: str | None = None
    message: str = ""


@asynccontextmanager
async def rehearsing(*, threads: int, warm_up: bool, huge_pages: bool) -> AsyncIterator[WorkerPool]:
    """Open a pool of workers for it; in the end none is left.

    Raises:
        ForkServerUnavailable: `fork_server_unavailable`.
    """
    pool = WorkerPool(threads=threads, warm_up=warm_up, huge_pages=huge_pages)
    try:
        await pool.open()
        yield pool
    finally:
        await pool.close()


async def rehearse(
    pool: WorkerPool,
    repository: Repository,
    found: ModelVersion,
    parameters: LoadParameters,
    *,
    most_bytes: int,
    limit_s: float,
) -> Rehearsed:
    """Load a version, and end its worker.

    Args:
        pool: where the worker comes from.
        repository: where the version is.
        found: the version.
        parameters: with what it would be loaded.
        most_bytes: more memory is given to no model.
        limit_s: more time neither, whatever `timeout_s` it would have.
    """
    limit = min(most_bytes, parameters.memory_limit_bytes or most_bytes)
    limit_s = min(limit_s, parameters.timeout_s)
    try:
        order = await asyncio.to_thread(_order, pool, repository, found, parameters, limit)
        worker = await pool.start(uuid7())
        try:
            async with asyncio.timeout(limit_s):
                report = await worker.load(order, lambda _: None)
        finally:
            await ended(worker)
    except RuntimeProblem as problem:
        return Rehearsed(code=problem.code, message=str(problem))
    except TimeoutError:
        return Rehearsed(code="timeout", message=f"it was not loaded within {limit_s:g} s")
    return Rehearsed(report.peak_memory_bytes)


def _order(
    pool: WorkerPool,
    repository: Repository,
    found: ModelVersion,
    parameters: LoadParameters,
    memory_limit_bytes: int,
) -> LoadOrder:
    warm_up = read_warm_up(repository, found.model_id)
    return LoadOrder(
        root=repository.root,
        folder=found.folder,
        files=tuple(file.path for file in found.files),
        memory_limit_bytes=memory_limit_bytes,
        max_batch_size=parameters.max_batch_size,
        max_queue_delay_us=parameters.max_queue_delay_us,
        warm_up=pool.warm_up if warm_up.enabled is None else warm_up.enabled,
        warm_up_inputs=warm_up.inputs,
        huge_pages=pool.huge_pages,
    )
