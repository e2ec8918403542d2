"""The fork server as a process: what it and its children inherit, its death, and start without resources."""

import asyncio
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import models
from support.history import child
from support.workers import (
    LIMIT_S,
    Serve,
    answer,
    ask,
    computing,
    descriptors,
    descriptors_left,
    floats,
    fork_server_of,
    freeze,
    load,
    order_of,
    resume,
    running_pool,
    threads,
    trips,
    until,
    wait_gone,
    waits_for_its_order,
)

from runtime.errors import Exit, ForkServerUnavailable
from runtime.memory import list_descendants
from runtime.process import pool as pool_module
from runtime.process import worker as workers_module
from runtime.process.forkclient import ForkServer
from runtime.process.forkserver import ADDED, launch_command, launch_environment
from runtime.process.pool import WorkerPool

ENDED = Exit(0, None)
FORK_SERVER = "runtime.process.forkserver"

SERVER = """
import asyncio, ctypes, os
from support.workers import fork_server_of, running_pool, waits_for_its_order

PR_SET_CHILD_SUBREAPER = 36  # what process 1 of a container is by nature: orphans become its children
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

async def main():
    async with running_pool() as pool:
        orphan = await pool.start("orphan")
        await waits_for_its_order(orphan.pid)
        fork_server_of(pool).kill()
        print(await asyncio.shield(orphan.ended), os.path.exists(f"/proc/{orphan.pid}"), flush=True)
        worker = await pool.start("w")
        await waits_for_its_order(worker.pid)
        print(fork_server_of(pool).pid, worker.pid, flush=True)
        await worker.ended

asyncio.run(main())
"""


async def start_and_stop(pool: WorkerPool) -> Exit:
    return await (await pool.start("next")).stop(LIMIT_S)


# What processes have


def read_of(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


async def test_processes_have_only_their_own_descriptors_and_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOADLEDGER_SECRET", "sesame")
    before = descriptors(os.getpid()), set(list_descendants(os.getpid()))
    async with running_pool() as pool:
        pid = fork_server_of(pool).pid
        clean = ["/dev/null", "pipe", "pipe", "socket"]
        assert descriptors(pid) == clean
        workers = [await pool.start(str(number)) for number in range(3)]
        assert threads(pid) == 1
        assert descriptors(pid) == sorted([*clean, *3 * ["anon_inode"]])  # a pidfd for each
        last = workers[-1]
        await waits_for_its_order(last.pid)
        assert threads(last.pid) == 1  # until it is confined
        mapped = read_of(last.pid, "maps")
        assert [name in mapped for name in (b"onnxruntime", b"aiohttp", b"sqlite")] == [True, False, False]
        assert set(list_descendants(os.getpid())) - before[1] == {pid, *(worker.pid for worker in workers)}
        for each in (pid, last.pid):
            assert b"sesame" not in read_of(each, "environ")
            assert b"ORT_DISABLE_TELEMETRY=1" in read_of(each, "environ")
        assert await workers[0].stop(LIMIT_S) == ENDED
        await until(lambda: len(descriptors(pid)) == len(clean) + 2)
    assert [worker.ended.result() for worker in workers] == [ENDED, Exit(None, 9), Exit(None, 9)]
    assert descriptors(os.getpid()) == before[0]
    assert set(list_descendants(os.getpid())) <= before[1]
    with pytest.raises(ForkServerUnavailable):
        await pool.start("late")


def test_environment_is_an_allow_list() -> None:
    allowed = {"PATH": "/bin", "LC_ALL": "C", "TZ": "UTC"}
    assert launch_environment(allowed | {"HOME": "/root", "LOADLEDGER_X": "s", "TOKEN": "s"}) == (
        allowed | ADDED
    )


def test_worker_imports_no_http_stack_and_no_database() -> None:
    code = (
        "import runtime.worker.main, runtime.process.forkserver, sys; "
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    imported = set(ran.stdout.split())
    assert {"onnxruntime", "numpy", "msgspec", "runtime"} <= imported
    http = {"aiohttp", "asyncio", "uvloop", "ssl", "jwt", "server"}
    assert imported.isdisjoint(http | {"sqlite3", "aiosqlite", "multiprocessing", "events"})


async def test_fork_server_starts_in_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with a long path, whose files have the names of modules."""
    deep = tmp_path / ("d" * 200)
    deep.mkdir()
    monkeypatch.chdir(deep)
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.syspath_prepend("")
    (deep / "json.py").write_text("raise SystemExit('imported from the working directory')")
    models.save(models.add(), deep, "m")
    async with running_pool() as pool:
        worker, _ = await load(pool, order_of(deep))
        assert len(await ask(worker, [floats("x", 1)])) == 1
    assert {entry.name for entry in deep.iterdir()} == {"m", "json.py"}


# Death of the server, of the fork server, and signals


def test_server_reaps_orphans_and_its_kill_leaves_no_process() -> None:
    """Though the processes are stopped."""
    with subprocess.Popen(child(SERVER), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "was killed by signal 9 False\n"
        pids = [int(word) for word in server.stdout.readline().split()]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        server.kill()
        assert wait_gone(pidfds)


def test_fork_server_of_another_parent_ends_at_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = launch_command(FORK_SERVER, str(os.getpid() + 1), str(theirs.fileno()))
        done = subprocess.run(command, pass_fds=[theirs.fileno()], check=False, timeout=LIMIT_S)
    assert done.returncode == 0


def test_fork_server_ends_at_eof() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = launch_command(FORK_SERVER, str(os.getpid()), str(theirs.fileno()))
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=launch_environment(os.environ))
        theirs.close()
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        assert poll.poll(LIMIT_S * 1000)
        assert b"Ready" in ours.recv(100)
        ours.shutdown(socket.SHUT_RDWR)
        assert process.wait(LIMIT_S) == 0


async def test_killed_fork_server_ends_its_workers_and_is_replaced(pool: WorkerPool) -> None:
    workers = [await pool.start(str(number)) for number in range(3)]
    fork_server_of(pool).kill()
    await asyncio.shield(fork_server_of(pool).ended)
    assert not pool.healthy
    for worker in workers:
        assert await asyncio.shield(worker.ended) == Exit(None, None)
        assert worker.orphaned
    assert await start_and_stop(pool) == ENDED  # the start waits for the next fork server
    assert pool.healthy


async def test_stopped_fork_server_hides_no_death_and_is_replaced(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, orphan = await pool.start("killed"), await pool.start("orphan")
    first = fork_server_of(pool)
    await freeze(first.pid)
    with monkeypatch.context() as patch:
        patch.setattr(workers_module, "EXIT_WAIT_S", 0.1)
        killed.kill()
        assert await asyncio.shield(killed.ended) == Exit(None, None)
    assert not killed.orphaned  # or a worker could stop the fork server, end, and be held blameless
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "FORK_LIMIT_S", 0.1)
        with pytest.raises(ForkServerUnavailable, match="did not answer"):
            await pool.start("w")
    assert await asyncio.shield(orphan.ended) == Exit(None, None)
    assert await start_and_stop(pool) == ENDED
    assert fork_server_of(pool).pid != first.pid


async def test_fork_server_that_dies_during_a_start_fails_it(pool: WorkerPool) -> None:
    await freeze(fork_server_of(pool).pid)
    starting = asyncio.ensure_future(pool.start("w"))
    await asyncio.sleep(0)
    fork_server_of(pool).kill()
    with pytest.raises(ForkServerUnavailable, match="ended"):
        await starting
    await until(lambda: pool.healthy)


async def test_signals_to_processes_do_not_disturb_inference(serve: Serve, pool: WorkerPool) -> None:
    worker = await serve(models.counting_loop())
    running = asyncio.ensure_future(answer(worker, trips(100_000)))
    await until(computing(worker.pid))
    for pid in (worker.pid, fork_server_of(pool).pid):
        assert os.getsid(pid) == pid  # a signal to the server's process group does not come here at all
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
    assert await running == 100_000
    assert pool.healthy


# Start that fails


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [("path", [], "No module named"), ("executable", "/nowhere/python", "No such file")],
)
async def test_fork_server_that_cannot_start_says_why(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, words: str
) -> None:
    before = descriptors(os.getpid())
    monkeypatch.setattr(sys, attribute, value)
    pool = WorkerPool()
    with pytest.raises(ForkServerUnavailable, match=words):
        await pool.open()
    await pool.close()
    assert descriptors(os.getpid()) == before


async def test_launch_without_descriptors_leaves_nothing(subtests: pytest.Subtests) -> None:
    for left in range(7):
        with subtests.test(left=left):
            before = descriptors(os.getpid()), list_descendants(os.getpid())
            with descriptors_left(left), pytest.raises(ForkServerUnavailable, match="open files"):
                ForkServer.launch(os.environ)
            assert (descriptors(os.getpid()), list_descendants(os.getpid())) == before


async def test_failed_fork_keeps_the_fork_server(pool: WorkerPool) -> None:
    fork_server = fork_server_of(pool)
    limits = resource.prlimit(fork_server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(fork_server.pid, resource.RLIMIT_NOFILE, (5, limits[1]))
    with pytest.raises(ForkServerUnavailable, match="open files"):
        await pool.start("w")
    resource.prlimit(fork_server.pid, resource.RLIMIT_NOFILE, limits)
    assert await start_and_stop(pool) == ENDED
    assert fork_server_of(pool) is fork_server


async def test_start_without_descriptors_leaves_nothing(pool: WorkerPool, subtests: pytest.Subtests) -> None:
    worker = await pool.start("w")
    for left in range(6):
        with subtests.test(left=left):
            before = descriptors(os.getpid())
            with descriptors_left(left), pytest.raises(ForkServerUnavailable, match="open files"):
                await pool.start("one too many")
            assert descriptors(os.getpid()) == before
            assert list_descendants(fork_server_of(pool).pid) == [worker.pid]
            assert await start_and_stop(pool) == ENDED


async def test_pidfd_without_a_descriptor_fails_one_start_only(pool: WorkerPool) -> None:
    bystander = await pool.start("bystander")
    before = descriptors(os.getpid())
    fork_server = fork_server_of(pool)
    await freeze(fork_server.pid)
    starting = asyncio.ensure_future(pool.start("w"))
    await asyncio.sleep(0)  # the request is sent, and its descriptors are closed here
    with descriptors_left(0):
        resume(fork_server.pid)
        with pytest.raises(ForkServerUnavailable, match="no pidfd arrived"):
            await starting
    assert descriptors(os.getpid()) == before
    await until(lambda: list_descendants(fork_server.pid) == [bystander.pid])
    assert await start_and_stop(pool) == await bystander.stop(LIMIT_S) == ENDED
    assert fork_server_of(pool) is fork_server


async def test_fork_server_is_replaced_once_descriptors_are_free(pool: WorkerPool) -> None:
    with descriptors_left(0):
        fork_server_of(pool).kill()
        await asyncio.shield(fork_server_of(pool).ended)
        for _ in range(10):  # turns of the loop, of which the keeper takes three to try and fail
            await asyncio.sleep(0)
        assert not pool.healthy
        assert not pool.keeper.done()
    assert await start_and_stop(pool) == ENDED
    assert not pool.keeper.done()
