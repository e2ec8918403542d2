"""The pool of workers: cancelled starts, and either event loop."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from support import models
from support.workers import (
    LIMIT_S,
    Serve,
    ask,
    floats,
    fork_server_of,
    freeze,
    load,
    order_of,
    resume,
    running_pool,
    until,
)

from runtime.errors import Exit
from runtime.memory import list_descendants
from runtime.process import pool as pool_module
from runtime.process.pool import WorkerPool, complete

# Start


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_pool_works_on_either_loop_in_any_thread(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    models.save(models.add(), tmp_path, "m")
    ends: list[Exit] = []

    async def main() -> None:
        async with running_pool() as pool:
            worker, _ = await load(pool, order_of(tmp_path))
            (result,) = await ask(worker, [floats("x", 1, 2)])
            assert bytes(result.data) == bytes(floats("y", 2, 3).data)
            ends.append(await worker.stop(LIMIT_S))

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
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


def shown(pid: int) -> tuple[str, list[bytes]]:
    """Return what `ps` shows of a process: its short name, and its command line."""
    folder = Path(f"/proc/{pid}")
    return (folder / "comm").read_text().strip(), (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")


async def test_processes_say_what_they_serve(serve: Serve, pool: WorkerPool) -> None:
    worker = await serve(models.add(), "a-model-with-a-long-name")
    short, told = shown(worker.pid)
    assert short == "a-model-..ame/1"
    assert told[1:] == [b"loadledger", b"a-model-with-a-long-name/1", b"of", b"server", b"%d" % os.getpid()]
    assert shown(fork_server_of(pool).pid)[0] == "fork server"


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
