"""Trial loads: a version is loaded in a worker of its own, as a server would, to see whether it can be."""

from __future__ import annotations

import asyncio

from events.clock import uuid7
from events.jobs import LoadParameters
from runtime.defaults import read_warm_up
from runtime.errors import RuntimeProblem
from runtime.processes.pool import WorkerPool
from runtime.processes.shielding import ended
from runtime.repository import ModelVersion, Repository
from runtime.wire import Load, Tensor


class TrialTimeout(RuntimeProblem):
    """The version was not loaded in time."""

    code = "timeout"


async def try_load(
    pool: WorkerPool,
    repository: Repository,
    found: ModelVersion,
    parameters: LoadParameters,
    *,
    budget_bytes: int,
    limit_s: float,
) -> None:
    """Load a version, and end its worker.

    Args:
        pool: where the worker comes from.
        repository: where the version is.
        found: the version.
        parameters: with what it would be loaded.
        budget_bytes: the memory that it may take, if its own limit is not less.
        limit_s: the time that it may take, if its own `timeout_s` is not less.

    Raises:
        RuntimeProblem: it cannot be loaded.
    """
    limit_s = min(limit_s, parameters.timeout_s)
    order, inputs = await asyncio.to_thread(_order, pool, repository, found, parameters, budget_bytes)
    worker = await pool.start(uuid7())
    try:
        async with asyncio.timeout(limit_s):
            await worker.load(order, lambda _: None, inputs)
    except TimeoutError:
        raise TrialTimeout(f"it was not loaded within {limit_s:g} s") from None
    finally:
        await ended(worker)


def _order(
    pool: WorkerPool,
    repository: Repository,
    found: ModelVersion,
    parameters: LoadParameters,
    budget_bytes: int,
) -> tuple[Load, tuple[Tensor, ...]]:
    warm_up = read_warm_up(repository, found.model_id)
    order = Load(
        root=str(repository.root),
        folder=str(found.folder),
        files=tuple(file.path for file in found.files),
        threads=pool.threads,
        memory_limit_bytes=min(budget_bytes, parameters.memory_limit_bytes or budget_bytes),
        max_batch_size=parameters.max_batch_size,
        max_queue_delay_us=parameters.max_queue_delay_us,
        warm_up=pool.warm_up if warm_up.enabled is None else warm_up.enabled,
        huge_pages=pool.huge_pages,
    )
    return order, warm_up.inputs
