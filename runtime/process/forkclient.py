"""The server's side of a fork server: its launch, the workers it forks, their exits, and its own end.

A fork server is launched once and never restarted; `runtime.process.pool` launches the next one.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, assert_never

import msgspec

from runtime.errors import Exit, ForkServerUnavailable
from runtime.process.forkserver import (
    FROM_FORK_SERVER,
    MESSAGE_BYTES,
    Exited,
    Fork,
    Forked,
    ForkFailed,
    FromForkServer,
    Ready,
    launch_command,
    launch_environment,
)

MAX_LINES = 64
MAX_BYTES = 16 * 2**10
READ_BYTES = 64 * 2**10
"""The capacity of a pipe: one read empties it, and the loop turns before the next."""


FORK = msgspec.msgpack.encode(Fork())


class StderrTail:
    """Reads a pipe on the running loop and closes it at its end; keeps the last 64 lines, at most 16 KiB."""

    def __init__(self, descriptor: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor: int | None = descriptor
        self._kept = bytearray()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    def lines(self) -> list[str]:
        """Return the last lines, oldest first; bytes that are not UTF-8 are replaced."""
        text = self._kept.decode("utf-8", "replace").encode()[-MAX_BYTES:]  # a replaced byte takes three
        return text.decode("utf-8", "ignore").splitlines()[-MAX_LINES:]

    def note(self, line: str) -> None:
        """Add a line of the server that explains why the process ended."""
        self._keep(f"{line}\n".encode())

    def close(self) -> list[str]:
        """Read the rest of the pipe, close it, and return the last lines."""
        self._read()
        self._close()
        return self.lines()

    def _read(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._descriptor, READ_BYTES)
            self._keep(data)
            if not data:
                self._close()

    def _keep(self, data: bytes) -> None:
        self._kept += data[-MAX_BYTES:]
        del self._kept[:-MAX_BYTES]

    def _close(self) -> None:
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True, slots=True)
class Child:
    """A forked process: its id, a pidfd (the owner closes it) and its future exit.

    `end` is set when the fork server has reaped the process, or to nulls when the fork server itself has
    ended. It must not be cancelled.
    """

    pid: int
    pidfd: int
    end: asyncio.Future[Exit]


class ForkServer:
    """A running fork server, which `launch` starts; once ended it is never started again.

    Attributes:
        ready: set when everything is imported; ForkServerUnavailable if the process ended before.
        ended: set when the process is reaped and its descriptors are closed.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], pidfd: int, connection: socket.socket, stderr: int
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._connection = connection
        self._stderr = StderrTail(stderr)
        self._at_end = False
        self._pidfd = pidfd
        self._requests: deque[asyncio.Future[Child]] = deque()
        self._children: dict[int, asyncio.Future[Exit]] = {}
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_end)
        self._loop.add_reader(
            self._connection.fileno(), self._on_readable
        )  # last: closing the socket undoes it

    @classmethod
    def launch(cls, environment: Mapping[str, str]) -> Self:
        """Start the process; it can fork once `ready` is set.

        The kernel kills it when the calling thread ends, so call this in the thread that runs the loop.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`, there is no new process.
        """
        try:
            with contextlib.ExitStack() as undo:
                process, connection, stderr = _start_process(environment, undo)
                pidfd = os.pidfd_open(process.pid)
                undo.callback(close_watched, pidfd)
                fork_server = cls(process, pidfd, connection, stderr)
                undo.pop_all()
        except OSError as error:
            raise ForkServerUnavailable(f"cannot start the fork server: {error.strerror}") from None
        return fork_server

    @property
    def pid(self) -> int:
        """The fork server's process id."""
        return self._process.pid

    def fork(self, descriptors: Sequence[int]) -> asyncio.Future[Child]:
        """Request a worker with these descriptors, which the caller may close at once.

        The returned future must not be cancelled: somebody must own the child that it brings.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`, by the future.
        """
        answer: asyncio.Future[Child] = self._loop.create_future()
        try:
            socket.send_fds(self._connection, [FORK], descriptors)
        except OSError as error:
            answer.set_exception(
                ForkServerUnavailable(f"the fork server takes no requests: {error.strerror}")
            )
        else:
            self._requests.append(answer)
        return answer

    def kill(self) -> None:
        """Kill the fork server and with it all its children, stopped or not."""
        if not self.ended.done():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _on_readable(self) -> None:
        """Read one message; at the end of the socket, kill the process."""
        if not self._take() and self._at_end:
            self._loop.remove_reader(self._connection.fileno())
            self.kill()

    def _take(self) -> bool:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._connection, MESSAGE_BYTES, 1)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            message, descriptors = b"", []
        if message:
            self._on_message(FROM_FORK_SERVER.decode(message), descriptors)
        self._at_end = not message
        return not self._at_end

    def _on_message(self, message: FromForkServer, descriptors: list[int]) -> None:
        match message:
            case Ready():
                self.ready.set_result(None)
            case Forked(pid):
                self._on_forked(pid, descriptors)
            case ForkFailed(text):
                self._requests.popleft().set_exception(ForkServerUnavailable(text))
            case Exited(pid, exit_code, number):
                self._children.pop(pid).set_result(Exit(exit_code, number))
            case _:
                assert_never(message)

    def _on_forked(self, pid: int, descriptors: list[int]) -> None:
        end = self._children[pid] = self._loop.create_future()
        answer = self._requests.popleft()
        if descriptors:
            answer.set_result(Child(pid, descriptors[0], end))
        else:  # the kernel drops what there is no number for; the child ends when its channels are closed
            answer.set_exception(ForkServerUnavailable("no pidfd arrived: too many open files"))

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._connection.fileno())
        while self._take():
            pass
        self._process.wait()  # returns at once: the pidfd says that it has ended
        self._connection.close()
        os.close(self._pidfd)
        self._fail("\n".join(["the fork server ended", *self._stderr.close()]))

    def _fail(self, text: str) -> None:
        for end in self._children.values():
            end.set_result(Exit(None, None))
        for answer in self._requests:
            answer.set_exception(ForkServerUnavailable(text))
        if not self.ready.done():
            self.ready.set_exception(ForkServerUnavailable(text))
            self.ready.exception()  # retrieved, even if nobody awaits it
        self._children.clear()
        self._requests.clear()
        self.ended.set_result(None)


def close_watched(descriptor: int) -> None:
    """Close a descriptor that the running loop may watch."""
    asyncio.get_running_loop().remove_reader(descriptor)
    os.close(descriptor)


def _start_process(
    environment: Mapping[str, str], undo: contextlib.ExitStack
) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """Start a fork server; returns the process, its connection and the reading end of its stderr pipe."""
    with contextlib.ExitStack() as theirs:
        connection, their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(connection.close)
        theirs.callback(their_end.close)
        read, write = os.pipe2(os.O_CLOEXEC)
        undo.callback(close_watched, read)
        theirs.callback(os.close, write)
        connection.setblocking(False)
        process = _execute(environment, their_end.fileno(), write)
    undo.callback(process.wait)
    undo.callback(process.kill)
    return process, connection, read


def _execute(environment: Mapping[str, str], connection: int, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own interpreter
        launch_command(os.getpid(), connection),
        env=launch_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[connection],
        start_new_session=True,
    )
