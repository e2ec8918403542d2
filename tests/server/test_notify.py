"""What the service manager is told, over a socket as its own."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from server.notify import Notifier

LIMIT_S = 30.0


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(LIMIT_S)
        yield listening


def test_it_is_told_when_the_server_is_ready_and_when_it_stops(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready("http://127.0.0.1:8080")
    assert manager.recv(4096) == b"READY=1\nSTATUS=ready at http://127.0.0.1:8080"
    notifier.stopping()
    assert manager.recv(4096).startswith(b"STOPPING=1\n")


def test_an_address_without_a_file_is_reached_too(tmp_path: Path) -> None:
    name = f"loadledger-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(LIMIT_S)
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).stopping()
        assert listening.recv(4096).startswith(b"STOPPING=1")


async def test_without_a_manager_nothing_is_said() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000"})
    notifier.ready("http://127.0.0.1:8080")
    await notifier.live()  # returns: there is nobody to tell


@pytest.mark.parametrize("where", ["none", "n" * 200, "full"])
def test_a_manager_that_cannot_be_told_stops_nothing_and_is_logged(
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
    assert caplog.text.count("could not be told") == 1
    assert "READY=1" in caplog.text


async def test_it_is_told_twice_a_period_that_the_loop_turns(manager: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "20000"}
    living = asyncio.create_task(Notifier(environment | {"WATCHDOG_PID": str(os.getpid())}).live())
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
async def test_where_no_watchdog_waits_for_us_nothing_is_said(
    manager: socket.socket, watchdog: dict[str, str]
) -> None:
    await Notifier({"NOTIFY_SOCKET": manager.getsockname()} | watchdog).live()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)
