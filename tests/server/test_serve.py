"""`serve` around the application: messages to the service manager, standard streams."""

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from server.serve import MAX_THREADS, Notifier, _fill_standard_streams, _start_threads

LIMIT_S = 30.0


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(LIMIT_S)
        yield listening


def test_notifier_sends_ready_and_stopping(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready("http://127.0.0.1:8080")
    assert manager.recv(4096) == b"READY=1\nSTATUS=ready at http://127.0.0.1:8080"
    notifier.stopping()
    assert manager.recv(4096).startswith(b"STOPPING=1\n")


def test_notifier_reaches_abstract_socket(tmp_path: Path) -> None:
    name = f"loadledger-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(LIMIT_S)
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).stopping()
        assert listening.recv(4096).startswith(b"STOPPING=1")


async def test_notifier_without_manager_sends_nothing() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000"})
    notifier.ready("http://127.0.0.1:8080")
    await notifier.notify_watchdog()


@pytest.mark.parametrize("where", ["none", "n" * 200, "full"])
def test_unreachable_manager_is_logged_once(
    manager: socket.socket, tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = manager.getsockname() if where == "full" else str(tmp_path / where)
    if where == "full":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filling, suppress(BlockingIOError):
            filling.setblocking(False)
            while True:
                filling.sendto(b"x", path)
    notifier = Notifier({"NOTIFY_SOCKET": path})
    notifier.ready("http://127.0.0.1:8080")
    notifier.stopping()
    assert caplog.text.count("cannot notify") == 1
    assert "READY=1" in caplog.text


async def test_watchdog_is_notified_twice_a_period(manager: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "20000"}
    living = asyncio.create_task(Notifier(environment | {"WATCHDOG_PID": str(os.getpid())}).notify_watchdog())
    manager.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(LIMIT_S):
        for _ in range(3):
            assert await loop.sock_recv(manager, 4096) == b"WATCHDOG=1"
    living.cancel()


@pytest.mark.parametrize(
    "watchdog",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}],
    ids=["unset", "zero", "no number", "of another process"],
)
async def test_watchdog_of_another_process_is_not_notified(
    manager: socket.socket, watchdog: dict[str, str]
) -> None:
    await Notifier({"NOTIFY_SOCKET": manager.getsockname()} | watchdog).notify_watchdog()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)


def test_closed_standard_streams_are_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    kept = [os.dup(number) for number in range(3)]
    try:
        for number in (0, 2):
            os.close(number)
        _fill_standard_streams()
        opened = [os.path.sameopenfile(number, kept[1]) for number in range(3)]
        devices = [os.fstat(number).st_rdev for number in (0, 2)]
        sys.stdout.flush()
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)
    assert opened[1]
    assert devices == [Path(os.devnull).stat().st_rdev] * 2


def test_threads_of_the_loop_are_all_started() -> None:
    with _start_threads() as threads:
        assert 4 < len(threads._threads) == threads._max_workers <= MAX_THREADS
