"""A server that was stalled for longer than its timeouts judges no process by what it has not read yet."""

import asyncio
import errno
import time
from pathlib import Path

import pytest
import uvloop
from support import models
from support.models import ENDLESS
from support.workers import LIMIT_S, answer, fork_server_of, freeze, load, order_of, resume, trips

from runtime.errors import InferenceTimeout
from runtime.process import pool as pool_module
from runtime.process.pool import WorkerPool
from runtime.timeouts import Timeout, TimeoutExpired, timeout

SHORT_S = 0.3
"""The limits of these tests. What must end within them takes some milliseconds once it may run."""
STALLS_S = (0.5, 1.1)
"""Longer than all of them: one is too short to be counted as a stall."""


def stall(seconds: float) -> None:
    """Keep the loop from turning."""
    time.sleep(seconds)


async def cancel_inference(pool: WorkerPool, folder: Path, stall_s: float) -> None:
    """A cancelled inference stops during the stall; its worker serves on."""
    models.save(models.counting_loop(), folder, "m")
    worker, _ = await load(pool, order_of(folder))
    await freeze(worker.pid)
    with pytest.raises(InferenceTimeout):
        await worker.infer([trips(ENDLESS)], timeout_s=0.0)
    resume(worker.pid)
    stall(stall_s)
    await worker.wait_until_drained()
    assert await answer(worker, trips(5)) == 5


async def expire_inference(pool: WorkerPool, folder: Path, stall_s: float) -> None:
    """An inference ends during the stall, after its deadline; it is answered."""
    models.save(models.add(), folder, "m")
    worker, _ = await load(pool, order_of(folder))
    await freeze(worker.pid)
    asked = asyncio.ensure_future(worker.infer([], timeout_s=SHORT_S))
    await asyncio.sleep(0)
    resume(worker.pid)
    stall(stall_s)
    with pytest.raises(Exception, match="input"):  # the worker's answer
        await asked


async def fork_worker(pool: WorkerPool, _: Path, stall_s: float) -> None:
    """A fork is answered during the stall; the fork server stays."""
    fork_server = fork_server_of(pool)
    await freeze(fork_server.pid)
    starting = asyncio.ensure_future(pool.start("w"))
    await asyncio.sleep(0)
    resume(fork_server.pid)
    stall(stall_s)
    await starting
    assert fork_server_of(pool) is fork_server


async def load_model(pool: WorkerPool, folder: Path, stall_s: float) -> None:
    """A load reaches its next stage during the stall; it goes on."""
    models.save(models.add(), folder, "m")
    worker, stages = await pool.start("w"), list[str]()
    await freeze(worker.pid)
    loading = asyncio.ensure_future(worker.load(order_of(folder), stages.append))
    async with timeout(SHORT_S, lambda: len(stages)):
        await asyncio.sleep(0)
        resume(worker.pid)
        stall(stall_s)
        await loading
    assert stages[-1] == "measuring"


@pytest.mark.parametrize("stall_s", STALLS_S)
def test_stalled_server_judges_no_process(
    stall_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    monkeypatch.setattr(pool_module, "FORK_LIMIT_S", SHORT_S)

    async def main() -> None:
        pool = WorkerPool(patience_s=SHORT_S)
        await pool.open()
        try:
            for step in (cancel_inference, expire_inference, fork_worker, load_model):
                with subtests.test(step.__name__):
                    await step(pool, tmp_path / step.__name__, stall_s)
        finally:
            await pool.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# Timeouts without a stall


async def test_timeout_without_progress_expires() -> None:
    with pytest.raises(TimeoutExpired):
        async with timeout(SHORT_S, lambda: 0):
            await asyncio.Event().wait()


async def test_timeout_begins_anew_with_progress() -> None:
    began_s, ended = time.monotonic(), asyncio.Event()

    def progress() -> float:
        now_s = time.monotonic()
        if now_s - began_s > 2 * SHORT_S:  # later than the timeout passes without progress
            ended.set()
        return now_s

    async with asyncio.timeout(LIMIT_S), timeout(SHORT_S, progress):
        await ended.wait()


async def test_timeout_error_of_the_work_is_raised_as_it_is() -> None:
    with pytest.raises(TimeoutError, match="of the file system") as raised:
        async with timeout(LIMIT_S):
            raise TimeoutError(errno.ETIMEDOUT, "of the file system")
    assert not isinstance(raised.value, TimeoutExpired)


async def test_cancelled_timeout_does_not_call_back() -> None:
    passed, later = asyncio.Event(), asyncio.Event()
    cancelled = Timeout(0, passed.set)
    Timeout(SHORT_S, later.set)
    cancelled.cancel()
    await later.wait()
    assert not passed.is_set()
