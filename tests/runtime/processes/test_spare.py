"""Workers that are forked ahead: one at most, taken by the next that is started, and gone if nobody comes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import models
from support.workers import LIMIT_S, freeze, load, running_pool, until

from runtime.processes import pool as pool_module
from runtime.processes.pool import WorkerPool


@pytest.fixture(autouse=True)
def _kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is forked ahead be kept, however long it takes until somebody comes."""
    monkeypatch.setattr(pool_module, "KEPT_S", LIMIT_S)


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with running_pool() as pool:
        yield pool


def pids(pool: WorkerPool) -> list[int]:
    return [worker.pid for worker in pool._workers]


async def forked_ahead(pool: WorkerPool) -> int:
    """Have a worker forked ahead, and return its process id."""
    pool.expect()
    await until(lambda: bool(pool._workers))
    return pids(pool)[0]


def fork_server(pool: WorkerPool) -> int:
    assert pool._fork_server is not None
    return pool._fork_server.pid


async def test_who_starts_a_worker_gets_the_one_that_was_forked_ahead(
    pool: WorkerPool, tmp_path: Path
) -> None:
    models.save(models.add(), tmp_path, "m")
    pid = await forked_ahead(pool)
    worker = await pool.start("w")
    assert (worker.pid, worker.worker_id) == (pid, "w")
    await load(worker, tmp_path, "m")
    assert (await pool.start("other")).pid != pid


async def test_one_that_is_not_there_yet_is_waited_for(pool: WorkerPool) -> None:
    pool.expect()
    worker = await pool.start("w")
    assert pids(pool) == [worker.pid]


async def test_however_many_are_expected_one_is_forked(pool: WorkerPool) -> None:
    for _ in range(100):
        pool.expect()
    await pool.start("w")
    await pool.start("other")
    assert len(pool._workers) == 2


async def test_one_that_nobody_takes_ends(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "KEPT_S", 0.0)
    pool.expect()
    await asyncio.sleep(0)
    await until(lambda: not pool._spare._tasks and not pool._workers)
    assert (await pool.start("w")).worker_id == "w"


async def test_one_that_died_meanwhile_is_taken_by_nobody(pool: WorkerPool) -> None:
    pid = await forked_ahead(pool)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not pool._workers)
    assert (await pool.start("w")).pid != pid


async def test_who_gives_up_while_it_comes_leaves_nothing(pool: WorkerPool) -> None:
    await freeze(fork_server(pool))
    pool.expect()
    start = asyncio.create_task(pool.start("w"))
    await asyncio.sleep(0)
    start.cancel()
    os.kill(fork_server(pool), signal.SIGCONT)
    await asyncio.wait({start})
    assert start.cancelled()
    await until(lambda: not pool._spare._tasks and not pool._workers)


async def test_the_end_of_the_fork_server_takes_it_along(pool: WorkerPool) -> None:
    await forked_ahead(pool)
    os.kill(fork_server(pool), signal.SIGKILL)
    await until(lambda: not pool._workers and pool.healthy)
    assert (await pool.start("w")).worker_id == "w"


@pytest.mark.parametrize("is_there", [False, True], ids=["coming", "there"])
async def test_a_pool_that_is_closed_leaves_none(*, is_there: bool) -> None:
    async with running_pool() as pool:
        if is_there:
            await forked_ahead(pool)
        else:
            pool.expect()
            await asyncio.sleep(0)
    assert not pool._workers
    pool.expect()
    assert not pool._spare._tasks
