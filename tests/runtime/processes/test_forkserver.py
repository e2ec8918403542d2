"""The fork server as a process: what it is, and what becomes of it and its children."""

import asyncio
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from support import models
from support.workers import (
    LIMIT_S,
    ask,
    computing,
    descriptors,
    descriptors_left,
    floats,
    freeze,
    load,
    loaded,
    running_pool,
    threads,
    trips,
    until,
    wait_gone,
)

from runtime.errors import Exit, ForkServerUnavailable
from runtime.memory import descendants
from runtime.processes import pool as pool_module
from runtime.processes import workers as workers_module
from runtime.processes.forkclient import ForkServer
from runtime.processes.forkserver import ADDED, launch_command, launch_environment
from runtime.processes.pool import WorkerPool

PARENT = """
import asyncio, sqlite3, sys
import aiohttp.web
from pathlib import Path
from support.workers import ask, loaded, running_pool, trips

async def main(root):
    async with running_pool() as pool:
        worker = await loaded(pool, root, "loop")
        running = asyncio.ensure_future(ask(worker, [trips(2**62)]))
        await asyncio.sleep(0)
        print(pool._fork_server.pid, worker.pid, flush=True)
        await running

asyncio.run(main(Path(sys.argv[1])))
"""

REAPER = """
import asyncio, ctypes, os
from support.workers import running_pool, threads, until

PR_SET_CHILD_SUBREAPER = 36  # what process 1 of a container is by nature: orphans become its children
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

async def main():
    async with running_pool() as pool:
        worker = await pool.start("w")
        await until(lambda: threads(worker.pid) == 2)
        pool._fork_server.kill()
        print(await asyncio.shield(worker.ended), os.path.exists(f"/proc/{worker.pid}"))

asyncio.run(main())
"""


def fork_server_of(pool: WorkerPool) -> ForkServer:
    assert pool._fork_server is not None
    return pool._fork_server


async def test_fork_server_has_one_thread_and_no_stray_descriptors() -> None:
    async with running_pool() as pool:
        pid = fork_server_of(pool).pid
        clean = ["/dev/null", "pipe", "pipe", "socket"]
        assert descriptors(pid) == clean
        workers = [await pool.start(str(number)) for number in range(3)]
        assert threads(pid) == 1
        assert descriptors(pid) == sorted([*clean, *3 * ["anon_inode"]])  # a pidfd for each
        for worker in workers:
            await worker.stop(LIMIT_S)
        await until(lambda: descriptors(pid) == clean)
        assert descendants(pid) == []


async def test_worker_has_its_channels_and_nothing_else_open() -> None:
    async with running_pool() as pool:
        await pool.start("first")
        worker = await pool.start("second")
        await until(lambda: threads(worker.pid) == 2)
        assert descriptors(worker.pid) == ["/dev/null", "pipe", "pipe", "socket", "socket"]


async def test_no_process_but_fork_server_and_workers() -> None:
    before = set(descendants(os.getpid()))
    async with running_pool() as pool:
        worker = await pool.start("w")
        assert set(descendants(os.getpid())) - before == {fork_server_of(pool).pid, worker.pid}
    assert set(descendants(os.getpid())) <= before


async def test_open_and_close_leave_no_descriptor_and_no_process() -> None:
    before = descriptors(os.getpid())
    async with running_pool() as pool:
        running = [await pool.start(str(number)) for number in range(3)]
        await running[0].stop(LIMIT_S)
        ends = [worker.ended for worker in running]
    assert descriptors(os.getpid()) == before
    assert [end.result() for end in ends] == [Exit(0, None), Exit(None, 9), Exit(None, 9)]
    with pytest.raises(ForkServerUnavailable):
        await pool.start("late")


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_environment_is_an_allow_list() -> None:
    seen = launch_environment(
        {"PATH": "/bin", "LC_ALL": "C", "TZ": "UTC", "HOME": "/root", "LOADLEDGER_X": "s", "TOKEN": "s"}
    )
    assert seen == {"PATH": "/bin", "LC_ALL": "C", "TZ": "UTC"} | ADDED


async def test_no_secret_is_in_a_workers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADLEDGER_SECRET", "sesame")
    async with running_pool() as pool:
        worker = await pool.start("w")
        for pid in (worker.pid, fork_server_of(pool).pid):
            assert b"sesame" not in environment(pid)
            assert b"ORT_DISABLE_TELEMETRY=1" in environment(pid)


def test_no_http_stack_and_no_database_is_imported_in_a_worker() -> None:
    code = (
        "import runtime.worker.main, runtime.processes.forkserver, sys; "
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    output = subprocess.run(
        [sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True
    ).stdout
    imported = set(output.split())
    assert {"onnxruntime", "numpy", "msgspec", "runtime"} <= imported
    unwanted = {
        "aiohttp",
        "asyncio",
        "uvloop",
        "sqlite3",
        "aiosqlite",
        "ssl",
        "jwt",
        "multiprocessing",
        "server",
    }
    assert imported.isdisjoint(unwanted | {"events"})


def test_kill_9_of_the_server_leaves_no_process(tmp_path: Path) -> None:
    """Also: nothing of what the server's main module imported is in the worker."""
    with _parent(tmp_path) as parent:
        fork_server, worker = _pids(parent)
        mapped = Path(f"/proc/{worker}/maps").read_text()
        assert "onnxruntime" in mapped
        assert "aiohttp" not in mapped
        assert "sqlite" not in mapped
        pidfds = [os.pidfd_open(fork_server), os.pidfd_open(worker)]
        parent.kill()
        assert wait_gone(pidfds)


@pytest.mark.parametrize("stopped", [[0], [1], [0, 1]])
def test_kill_9_of_the_server_leaves_no_process_that_was_stopped(tmp_path: Path, stopped: list[int]) -> None:
    with _parent(tmp_path) as parent:
        pids = _pids(parent)
        pidfds = [os.pidfd_open(pid) for pid in pids]
        for index in stopped:
            os.kill(pids[index], signal.SIGSTOP)
        parent.kill()
        assert wait_gone(pidfds)


def _parent(root: Path) -> "subprocess.Popen[bytes]":
    models.save(models.counting_loop(), root, "loop")
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(root)], stdout=subprocess.PIPE, env=_with_support(), cwd=root
    )


def _with_support() -> dict[str, str]:
    root = Path(__file__).parents[3]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}


def _pids(parent: "subprocess.Popen[bytes]") -> list[int]:
    assert parent.stdout is not None
    return [int(word) for word in parent.stdout.readline().split()]


def test_orphans_are_reaped_where_nobody_else_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAPER], env=_with_support(), check=True, capture_output=True, text=True
    )
    assert done.stdout == "killed by signal 9 False\n"


def test_fork_server_whose_parent_is_another_ends_at_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = launch_command(os.getpid() + 1, theirs.fileno())
        done = subprocess.run(command, pass_fds=[theirs.fileno()], check=False, timeout=LIMIT_S)
    assert done.returncode == 0


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_pool_works_on_either_loop(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    models.save(models.add(), tmp_path, "add")

    async def main() -> Exit:
        async with running_pool() as pool:
            worker = await loaded(pool, tmp_path, "add")
            (result,) = await ask(worker, [floats("x", 1, 2)])
            assert bytes(result.data) == bytes(floats("y", 2, 3).data)
            return await worker.stop(LIMIT_S)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(main()) == Exit(0, None)


def test_pool_works_in_a_thread_that_is_not_the_main_one() -> None:
    ends: list[Exit] = []

    async def main() -> None:
        async with running_pool() as pool:
            ends.append(await (await pool.start("w")).stop(LIMIT_S))

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    thread.join()
    assert ends == [Exit(0, None)]


async def test_folder_with_a_long_name_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 200)
    deep.mkdir()
    monkeypatch.chdir(deep)
    monkeypatch.setenv("TMPDIR", str(deep))
    models.save(models.add(), deep, "add")
    async with running_pool() as pool:
        worker = await loaded(pool, deep, "add")
        assert len(await ask(worker, [floats("x", 1)])) == 1
    assert [entry.name for entry in deep.iterdir()] == ["add"]


async def test_path_of_relative_entries_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    async with running_pool() as pool:
        assert pool.healthy


async def test_killed_fork_server_ends_its_workers_and_is_replaced() -> None:
    async with running_pool() as pool:
        workers = [await pool.start(str(number)) for number in range(3)]
        fork_server_of(pool).kill()
        for worker in workers:
            assert await asyncio.shield(worker.ended) == Exit(None, None)
            assert worker.orphaned
        await until(lambda: pool.healthy)
        assert (await (await pool.start("next")).stop(LIMIT_S)) == Exit(0, None)


async def test_start_waits_for_the_next_fork_server() -> None:
    async with running_pool() as pool:
        fork_server_of(pool).kill()
        await asyncio.shield(fork_server_of(pool).ended)
        assert not pool.healthy
        worker = await pool.start("w")
        assert await worker.stop(LIMIT_S) == Exit(0, None)


async def test_stopped_fork_server_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_pool() as pool:
        before = await pool.start("before")
        first = fork_server_of(pool)
        await freeze(first.pid)
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "FORK_LIMIT_S", 0.2)
            with pytest.raises(ForkServerUnavailable, match="did not answer"):
                await pool.start("w")
        assert await asyncio.shield(before.ended) == Exit(None, None)
        worker = await pool.start("after")
        assert fork_server_of(pool).pid != first.pid
        assert await worker.stop(LIMIT_S) == Exit(0, None)


async def test_death_is_noticed_while_the_fork_server_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_pool() as pool:
        worker = await pool.start("w")
        await freeze(fork_server_of(pool).pid)
        with monkeypatch.context() as patch:
            patch.setattr(workers_module, "LAST_WORDS_S", 0.2)
            worker.kill()
            assert await asyncio.shield(worker.ended) == Exit(None, None)
        assert not worker.orphaned  # or a worker could stop the fork server, end, and be held blameless


async def test_fork_server_that_dies_while_it_is_asked_says_so() -> None:
    async with running_pool() as pool:
        await freeze(fork_server_of(pool).pid)
        starting = asyncio.ensure_future(pool.start("w"))
        await asyncio.sleep(0)
        fork_server_of(pool).kill()
        with pytest.raises(ForkServerUnavailable, match="ended"):
            await starting


async def test_cancelled_start_leaves_no_process() -> None:
    async with running_pool() as pool:
        fork_server = fork_server_of(pool)
        await freeze(fork_server.pid)
        starting = asyncio.ensure_future(pool.start("w"))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        os.kill(fork_server.pid, signal.SIGCONT)
        worker = await pool.start("next")
        await until(lambda: descendants(fork_server.pid) == [worker.pid])


@pytest.mark.parametrize("turns", range(3))
async def test_start_that_is_cancelled_while_it_connects_ends_with_its_process(turns: int) -> None:
    async with running_pool() as pool:
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


async def test_many_starts_at_once() -> None:
    async with running_pool() as pool:
        workers = await asyncio.gather(*(pool.start(str(number)) for number in range(20)))
        assert len({worker.pid for worker in workers}) == 20
        assert set(await asyncio.gather(*(worker.stop(LIMIT_S) for worker in workers))) == {Exit(0, None)}


async def test_fork_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    pool = WorkerPool()
    with pytest.raises(ForkServerUnavailable, match="No module named"):
        await pool.open()
    await pool.close()


async def test_interpreter_that_is_not_there_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors(os.getpid())
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pool = WorkerPool()
    with pytest.raises(ForkServerUnavailable, match="No such file"):
        await pool.open()
    await pool.close()
    assert descriptors(os.getpid()) == before


async def test_fork_that_fails_is_told_of_and_the_fork_server_lives_on() -> None:
    async with running_pool() as pool:
        fork_server = fork_server_of(pool)
        limits = resource.prlimit(fork_server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(fork_server.pid, resource.RLIMIT_NOFILE, (5, limits[1]))
        with pytest.raises(ForkServerUnavailable, match="open files"):
            await pool.start("w")
        resource.prlimit(fork_server.pid, resource.RLIMIT_NOFILE, limits)
        assert await (await pool.start("w")).stop(LIMIT_S) == Exit(0, None)
        assert fork_server_of(pool) is fork_server


@pytest.mark.parametrize("left", range(7))
async def test_launch_without_descriptors_is_refused_and_leaves_nothing(left: int) -> None:
    before = descriptors(os.getpid()), descendants(os.getpid())
    with descriptors_left(left), pytest.raises(ForkServerUnavailable, match="open files"):
        ForkServer.launch(os.environ)
    assert (descriptors(os.getpid()), descendants(os.getpid())) == before


@pytest.mark.parametrize("left", range(6))
async def test_start_without_descriptors_is_refused_and_leaves_nothing(left: int) -> None:
    async with running_pool() as pool:
        worker = await pool.start("w")
        before = descriptors(os.getpid())
        with descriptors_left(left), pytest.raises(ForkServerUnavailable, match="open files"):
            await pool.start("one too many")
        assert descriptors(os.getpid()) == before
        assert descendants(fork_server_of(pool).pid) == [worker.pid]
        assert await (await pool.start("next")).stop(LIMIT_S) == Exit(0, None)


async def test_pidfd_for_which_there_is_no_descriptor_fails_one_start_only() -> None:
    async with running_pool() as pool:
        bystander = await pool.start("bystander")
        before = descriptors(os.getpid())
        fork_server = fork_server_of(pool)
        await freeze(fork_server.pid)
        starting = asyncio.ensure_future(pool.start("w"))
        await asyncio.sleep(0)  # it has asked, and closed what it sent
        with descriptors_left(0):
            os.kill(fork_server.pid, signal.SIGCONT)
            with pytest.raises(ForkServerUnavailable, match="no pidfd arrived"):
                await starting
        assert descriptors(os.getpid()) == before
        await until(lambda: descendants(fork_server.pid) == [bystander.pid])
        assert await (await pool.start("next")).stop(LIMIT_S) == Exit(0, None)
        assert await bystander.stop(LIMIT_S) == Exit(0, None)
        assert fork_server_of(pool) is fork_server


async def test_fork_server_is_replaced_when_there_are_descriptors_again() -> None:
    async with running_pool() as pool:
        with descriptors_left(0):
            fork_server_of(pool).kill()
            await asyncio.shield(fork_server_of(pool).ended)
            for _ in range(10):  # turns of the loop, of which the keeper takes three to try and fail
                await asyncio.sleep(0)
            assert not pool.healthy
            assert not pool.keeper.done()
        await until(lambda: pool.healthy)
        assert await (await pool.start("w")).stop(LIMIT_S) == Exit(0, None)
        assert not pool.keeper.done()
    assert pool.keeper.cancelled()


async def test_signals_to_all_processes_during_an_inference_do_nothing(tmp_path: Path) -> None:
    models.save(models.counting_loop(), tmp_path, "loop")
    async with running_pool() as pool:
        worker = await loaded(pool, tmp_path, "loop")
        running = asyncio.ensure_future(ask(worker, [trips(300_000)]))
        await until(computing(worker.pid))
        for pid in (worker.pid, fork_server_of(pool).pid):
            assert os.getsid(pid) == pid  # a signal to the server's process group does not come here at all
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(pid, number)
        (count,) = await running
        assert int.from_bytes(count.data, "little") == 300_000
        assert pool.healthy


def test_eof_ends_the_fork_server() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = launch_command(os.getpid(), theirs.fileno())
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=launch_environment(os.environ))
        theirs.close()
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        assert poll.poll(LIMIT_S * 1000)
        assert b"Ready" in ours.recv(100)
        ours.shutdown(socket.SHUT_RDWR)
        assert process.wait(LIMIT_S) == 0


async def test_worker_that_ends_is_reaped() -> None:
    async with running_pool() as pool:
        worker = await pool.start("w")
        worker.kill()
        assert await asyncio.shield(worker.ended) == Exit(None, signal.SIGKILL)
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)


async def test_empty_worker_takes_little_memory(tmp_path: Path) -> None:
    models.save(models.add(), tmp_path, "add")
    async with running_pool() as pool:
        worker = await pool.start("w")
        assert await worker.measure() < 8 * 2**20
        report = await load(worker, tmp_path, "add")
        assert report.memory_bytes < 12 * 2**20
