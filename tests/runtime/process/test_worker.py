"""The server's side of a worker: its death, cancelled inferences and stop."""

import asyncio
import os
import signal

import pytest
from support import models
from support.models import ENDLESS, LOWEST
from support.workers import (
    LIMIT_S,
    Serve,
    answer,
    ask,
    computing,
    floats,
    freeze,
    tensor,
    trips,
    until,
)

from runtime.errors import Exit, WorkerDied
from runtime.process.pool import WorkerPool

KILLED = Exit(None, signal.SIGKILL)


async def test_crash_at_inference_fails_all_in_flight(serve: Serve) -> None:
    worker = await serve(models.crash_on_run())
    inputs = [tensor("a", "INT64", [LOWEST]), tensor("b", "INT64", [-1])]
    results = await asyncio.gather(*(ask(worker, inputs) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == 3 * [WorkerDied]
    assert worker.in_flight == 0
    await worker.wait_until_drained()
    for again in (ask(worker, inputs), worker.measure()):
        with pytest.raises(WorkerDied):
            await again


async def test_death_of_one_worker_leaves_another_serving(serve: Serve) -> None:
    first, second = await serve(models.add()), await serve(models.add())
    first.kill()
    await asyncio.shield(first.ended)
    with pytest.raises(ProcessLookupError):  # it is reaped
        os.kill(first.pid, 0)
    assert await answer(second, floats("x", 1)) == [2]
    first.kill()  # again, to no effect
    assert await first.stop(LIMIT_S) == KILLED


async def test_stop_kills_a_stopped_worker_after_its_grace(pool: WorkerPool) -> None:
    worker = await pool.start("w")
    await freeze(worker.pid)
    assert await worker.stop(0.05) == KILLED


async def test_stop_ends_a_computing_worker(serve: Serve) -> None:
    worker = await serve(models.counting_loop())
    running = asyncio.ensure_future(ask(worker, [trips(ENDLESS)]))
    await until(computing(worker.pid))
    assert await worker.stop(LIMIT_S) == Exit(0, None)
    with pytest.raises(WorkerDied):
        await running


async def test_stop_returns_memory_and_frees_channel_buffers(serve: Serve, pool: WorkerPool) -> None:
    empty = await (await pool.start("empty")).measure()
    worker = await serve(models.weights(10))
    assert await worker.measure() - empty > 10_000_000
    assert await worker.stop(LIMIT_S) == Exit(0, None)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)
    assert [len(channel._reader._chunk) for channel in (worker._data, worker._control)] == [0, 0]


@pytest.mark.parametrize("channel", ["data", "control"])
async def test_malformed_frame_ends_this_worker_only(serve: Serve, channel: str) -> None:
    other, worker = await serve(models.add()), await serve(models.add())
    transport = {"data": worker._data, "control": worker._control}[channel]._transport
    assert transport is not None
    transport.write(b"GET / HTTP/1.1\r\n\r\n")
    assert await asyncio.shield(worker.ended) == Exit(76, None)
    assert any("malformed frame" in line for line in worker.stderr_tail())
    assert await answer(other, floats("x", 1)) == [2]
