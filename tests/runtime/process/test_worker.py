"""The server's side of workers: their death, cancelled inferences and stop; the pool that starts them."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest
import uvloop
from support import models
from support.models import ENDLESS, LOWEST
from support.workers import (
    LIMIT_S,
    Serve,
    answer,
    ask,
    computing,
    floats,
    fork_server_of,
    freeze,
    load,
    order_of,
    resume,
    running_pool,
    tensor,
    trips,
    until,
)

from runtime.errors import Exit, WorkerDied
from runtime.memory import list_descendants
from runtime.process import pool as pool_module
from runtime.process.pool import WorkerPool, complete

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
    assert empty < 8 * 2**20
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


# The pool: starts, cancelled ones too, on either event loop


def test_pool_works_on_the_servers_loop_in_any_thread(tmp_path: Path) -> None:
    """Other tests have asyncio's own loop."""
    models.save(models.add(), tmp_path, "m")
    ends: list[Exit] = []

    async def main() -> None:
        async with running_pool() as pool:
            worker, _ = await load(pool, order_of(tmp_path))
            (result,) = await ask(worker, [floats("x", 1, 2)])
            assert bytes(result.data) == bytes(floats("y", 2, 3).data)
            ends.append(await worker.stop(LIMIT_S))

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ends == [Exit(0, None)]


async def test_cancelled_start_leaves_no_process(pool: WorkerPool) -> None:
    fork_server = fork_server_of(pool)
    await freeze(fork_server.pid)
    starting = asyncio.ensure_future(pool.start("w"))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    resume(fork_server.pid)
    worker = await pool.start("next")
    await until(lambda: list_descendants(fork_server.pid) == [worker.pid])


@pytest.mark.parametrize("turns", range(3))
async def test_start_cancelled_while_connecting_ends_its_process(pool: WorkerPool, turns: int) -> None:
    starting = asyncio.ensure_future(pool.start("w"))
    while not pool._workers:  # noqa: ASYNC110 - each turn of the loop counts
        await asyncio.sleep(0)
    [worker] = pool._workers
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert worker.ended.done()


async def test_many_workers_start_at_once(pool: WorkerPool) -> None:
    workers = await asyncio.gather(*(pool.start(str(number)) for number in range(20)))
    assert len({worker.pid for worker in workers}) == 20
    assert set(await asyncio.gather(*(worker.stop(LIMIT_S) for worker in workers))) == {Exit(0, None)}


async def test_stopped_fork_server_with_workers_is_waited_for(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, first = await pool.start("serves"), fork_server_of(pool)
    await freeze(first.pid)
    monkeypatch.setattr(pool_module, "FORK_LIMIT_S", 0.1)
    monkeypatch.setattr(pool_module, "FORK_WAITS", 1000)
    starting = asyncio.ensure_future(pool.start("w"))
    await asyncio.wait([starting], timeout=0.3)  # more than twice the limit without workers
    resume(first.pid)
    assert (await starting).worker_id == "w"
    assert not worker.ended.done()
    assert fork_server_of(pool) is first


def read_names(pid: int) -> tuple[str, list[bytes]]:
    """Return what `ps` shows of a process: its short name, and its command line."""
    folder = Path(f"/proc/{pid}")
    return (folder / "comm").read_text().strip(), (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")


async def test_processes_say_what_they_serve(serve: Serve, pool: WorkerPool) -> None:
    worker = await serve(models.add(), "a-model-with-a-long-name")
    short, told = read_names(worker.pid)
    assert short == "a-model-..ame/1"
    assert told[1:] == [b"loadledger", b"a-model-with-a-long-name/1", b"of", b"server", b"%d" % os.getpid()]
    assert read_names(fork_server_of(pool).pid)[0] == "fork server"


# Work that a cancelled task completes


async def test_cancelled_task_waits_for_shielded_work() -> None:
    may_end, ended = threading.Event(), list[str]()

    def work() -> None:
        may_end.wait()
        ended.append("well")

    task = asyncio.create_task(complete(asyncio.to_thread(work)))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["well"]
    assert await complete(asyncio.to_thread(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        await complete(asyncio.to_thread(lambda: 1 // 0))
