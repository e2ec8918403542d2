"""The pool of workers: cancelled starts, either event loop, and the pre-forked worker."""

import asyncio
import os
import signal
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
    has_run_smallest_model,
    load,
    order_of,
    resume,
    running_pool,
    threads,
    until,
)

from runtime.errors import Exit
from runtime.memory import list_descendants
from runtime.process import pool as pool_module
from runtime.process.pool import WorkerPool, complete


@pytest.fixture
def _only_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork no worker ahead after a start; only when asked to."""
    monkeypatch.setattr(pool_module, "FORK_AHEAD_S", LIMIT_S)


def pids(pool: WorkerPool) -> list[int]:
    return [worker.pid for worker in pool._workers]


async def forked_ahead(pool: WorkerPool) -> int:
    """Have the pool fork a worker ahead, and return its process id."""
    before = pids(pool)
    pool.prefork()
    await until(lambda: len(pool._workers) > len(before))
    return next(pid for pid in pids(pool) if pid not in before)


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


async def test_many_workers_start_at_once(pool: WorkerPool) -> None:
    workers = await asyncio.gather(*(pool.start(str(number)) for number in range(20)))
    assert len({worker.pid for worker in workers}) == 20
    assert set(await asyncio.gather(*(worker.stop(LIMIT_S) for worker in workers))) == {Exit(0, None)}


# Pre-forked worker


@pytest.mark.usefixtures("_only_asked")
async def test_start_takes_the_only_pre_forked_worker(serve: Serve, pool: WorkerPool) -> None:
    for _ in range(100):
        pool.prefork()
    worker = await pool.start("w")  # waits for it
    assert pids(pool) == [worker.pid]
    pid = await forked_ahead(pool)
    taken = await serve(models.add(), "m")
    assert (taken.pid, taken.worker_id) == (pid, "m")
    assert (await pool.start("other")).pid != pid


async def test_next_worker_is_forked_soon_after_a_start(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "FORK_AHEAD_S", 0.0)
    ahead = await forked_ahead(pool)
    assert [(await pool.start(name)).pid == ahead for name in ("first", "second")] == [True, False]
    await until(lambda: len(pool._workers) == 3)
    assert (await pool.start("third")).worker_id == "third"


async def test_pre_forked_worker_has_one_thread(pool: WorkerPool) -> None:
    pid = await forked_ahead(pool)
    await until(lambda: has_run_smallest_model(pid))
    assert threads(pid) == 1


@pytest.mark.usefixtures("_only_asked")
@pytest.mark.parametrize("killed", ["worker", "fork server"])
async def test_pre_forked_worker_that_died_is_not_taken(pool: WorkerPool, killed: str) -> None:
    pid = await forked_ahead(pool)
    os.kill(pid if killed == "worker" else fork_server_of(pool).pid, signal.SIGKILL)
    await until(lambda: not pool._workers)
    assert (await pool.start("w")).pid != pid


@pytest.mark.usefixtures("_only_asked")
async def test_pre_forked_worker_that_is_stopped_is_replaced(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = await forked_ahead(pool)
    await freeze(pid)
    monkeypatch.setattr(pool_module, "PING_LIMIT_S", 0.1)
    assert (await pool.start("w")).pid != pid
    await until(lambda: pid not in pids(pool))


async def test_stopped_fork_server_with_workers_is_waited_for(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, first = await pool.fork("serves"), fork_server_of(pool)
    await freeze(first.pid)
    monkeypatch.setattr(pool_module, "FORK_LIMIT_S", 0.1)
    monkeypatch.setattr(pool_module, "FORK_WAITS", 1000)
    starting = asyncio.ensure_future(pool.fork("w"))
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


@pytest.mark.parametrize("killed", ["worker", "fork server"])
async def test_pre_forked_worker_that_died_is_replaced(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    monkeypatch.setattr(pool_module, "FORK_AHEAD_S", 0.0)
    pid = await forked_ahead(pool)
    os.kill(pid if killed == "worker" else fork_server_of(pool).pid, signal.SIGKILL)
    await until(lambda: bool(pids(pool)) and pid not in pids(pool))


@pytest.mark.usefixtures("_only_asked")
async def test_start_cancelled_during_pre_fork_leaves_nothing(pool: WorkerPool) -> None:
    await freeze(fork_server_of(pool).pid)
    pool.prefork()
    start = asyncio.create_task(pool.start("w"))
    await asyncio.sleep(0)
    start.cancel()
    resume(fork_server_of(pool).pid)
    await asyncio.wait({start})
    assert start.cancelled()
    await until(lambda: not pool._preforked._tasks and not pool._workers)


@pytest.mark.usefixtures("_only_asked")
@pytest.mark.parametrize("is_there", [False, True], ids=["coming", "there"])
async def test_closed_pool_leaves_no_pre_forked_worker(*, is_there: bool) -> None:
    async with running_pool() as pool:
        if is_there:
            await forked_ahead(pool)
        else:
            pool.prefork()
            await asyncio.sleep(0)
    assert not pool._workers
    pool.prefork()
    assert not pool._preforked._tasks


@pytest.mark.usefixtures("_only_asked")
async def test_closed_pool_forks_nothing_later() -> None:
    timers: list[asyncio.TimerHandle | None] = []
    async with running_pool() as pool:
        for name in ("first", "second"):  # asked for before the pool would have by itself
            await forked_ahead(pool)
            await pool.start(name)
            timers.append(pool._preforked._timer)
    assert [timer is not None and timer.cancelled() for timer in timers] == [True, True]


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
