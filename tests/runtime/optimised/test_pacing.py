"""When a preparation computes: its workers are stopped while others compute, and continued in gaps."""

import asyncio
import time
from pathlib import Path

import pytest
from support import models
from support.workers import FOR_EVER_S, computing, is_stopped, order_of, trips, until

from runtime.optimised import pacing
from runtime.optimised.pacing import Pacer
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker

TRIPS = 500_000
"""Of a loop: a fifth of a second or so, and much longer in the background of a busy machine."""
PAUSE_S = 0.5
"""Duration of a stop, which the clock of the stopped process does not count."""


async def test_workers_are_stopped_while_others_compute(pool: WorkerPool) -> None:
    is_busy = True
    pacer = Pacer(pool, lambda: is_busy)
    running = asyncio.create_task(pacer.run())
    async with pacer.worker() as first:
        await until(lambda: is_stopped(first.pid))
        async with pacer.worker() as second:
            await until(lambda: is_stopped(second.pid))
            is_busy = False
            await until(lambda: not is_stopped(first.pid) and not is_stopped(second.pid))
            is_busy = True
            await until(lambda: is_stopped(second.pid))
        assert second.ended.done()  # although it was stopped
        running.cancel()
        await asyncio.wait([running])
        await until(lambda: not is_stopped(first.pid))


async def test_workers_have_their_turns_without_any_gap(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they hold their memory for minutes at most."""
    monkeypatch.setattr(pacing, "STOPPED_S", 0.1)
    pacer = Pacer(pool, lambda: True)
    running = asyncio.create_task(pacer.run())
    async with pacer.worker() as worker:
        for expected in (True, False) * 3:
            await until(lambda expected=expected: is_stopped(worker.pid) is expected)  # type: ignore[misc]
    running.cancel()
    await asyncio.wait([running])


def name_of(worker: Worker) -> str:
    return Path(f"/proc/{worker.pid}/comm").read_text().strip()


async def test_worker_is_stopped_only_when_it_ends_with_its_parent(pool: WorkerPool) -> None:
    pacer = Pacer(pool, lambda: True)
    running = asyncio.create_task(pacer.run())
    for _ in range(20):
        async with pacer.worker() as worker:
            await until(lambda: is_stopped(worker.pid))
            assert name_of(worker) == "no model yet"  # which it has after that
    running.cancel()
    await asyncio.wait([running])


async def test_run_in_the_background_is_timed_without_its_stops(pool: WorkerPool, tmp_path: Path) -> None:
    models.save(models.counting_loop(), tmp_path, "m")
    worker = await pool.start("w")
    await worker.load(order_of(tmp_path, warm_up=False, background=True), lambda _: None)
    began_ns, has_computed = time.monotonic_ns(), computing(worker.pid)
    run = asyncio.ensure_future(worker.infer([trips(TRIPS)], timeout_s=FOR_EVER_S))
    await until(has_computed)
    worker.suspend()
    await until(lambda: is_stopped(worker.pid))
    assert not run.done()
    await asyncio.sleep(PAUSE_S)
    worker.resume()
    outcome, _ = await run
    assert 0 < outcome.infer_ns <= time.monotonic_ns() - began_ns - PAUSE_S * 1e9
