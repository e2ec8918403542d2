"""The server's side of a fork server: its launch, the workers it forks, their exits, and its own end.

A fork server is launched once and never restarted; `runtime.process.pool` launches the next one.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
    Ready,
    launch_command,
    launch_environment,
)

MAX_LINES = 64
STDERR_BYTES = 16 * 2**10
READ_BYTES = 2**20
"""The largest capacity that a process without privileges can give its pipe: one read empties it."""
BYTES_PER_S = 4 * 2**20
"""Bytes of one pipe: reading them takes the loop about a millisecond. ONNX Runtime's lines about ten thousand
failed inferences are less. A process that writes more waits."""

FORK = msgspec.msgpack.encode(Fork())


class StderrTail:
    """Reads a pipe on the running loop and closes it at its end; keeps the last 64 lines, at most 16 KiB.

    Of a flood, at most `BYTES_PER_S` is read.
    """

    def __init__(self, descriptor: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor: int | None = descriptor
        self._kept = bytearray()
        self._note = ""
        self._second_bytes = 0
        self._second_ends_at = 0.0
        self._pause: asyncio.TimerHandle | None = None
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    def lines(self) -> list[str]:
        """Return the last lines, oldest first, and the note; bytes that are not UTF-8 are replaced."""
        note = self.note_lines()
        text = self._kept.decode("utf-8", "replace").encode()  # a replacement character takes three bytes
        printed = text[-STDERR_BYTES + len("".join(note).encode()) :].decode("utf-8", "ignore").splitlines()
        return [*printed[-MAX_LINES + len(note) :], *note]

    def note_lines(self) -> list[str]:
        return [self._note] if self._note else []

    def note(self, line: str) -> None:
        """Note why the server ends the process; only the first reason is kept."""
        self._note = self._note or " ".join(line.split())

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
            self._kept += data[-STDERR_BYTES:]
            del self._kept[:-STDERR_BYTES]
            if data:
                self._count(len(data))
            else:
                self._close()

    def _count(self, bytes_: int) -> None:
        """Count bytes that were read; beyond the limit of a second, stop reading until the second is over."""
        now = self._loop.time()
        if now >= self._second_ends_at:
            self._second_bytes, self._second_ends_at = 0, now + 1.0
        self._second_bytes += bytes_
        if self._second_bytes >= BYTES_PER_S and self._descriptor is not None and self._pause is None:
            self._loop.remove_reader(self._descriptor)
            self._pause = self._loop.call_at(self._second_ends_at, self._resume, self._descriptor)

    def _resume(self, descriptor: int) -> None:
        self._pause = None
        self._loop.add_reader(descriptor, self._read)

    def _close(self) -> None:
        if self._descriptor is not None:
            if self._pause is not None:
                self._pause.cancel()
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


class Process:
    """A forked process, held by its pidfd, so that no signal can reach another process with its pid.

    The process is no child of the server. The owner of the object calls `close`.

    Attributes:
        end: set when the fork server has reaped the process; None twice when the fork server itself has
            ended. It must not be cancelled.
        orphaned: whether the process ended with the fork server; known when closed. A missing exit report
            does not prove that: a process could stop the fork server and then end.
    """

    def __init__(self, pid: int, pidfd: int, end: asyncio.Future[Exit]) -> None:
        self.pid = pid
        self.end = end
        self.orphaned = False
        self._pidfd = pidfd
        self._closed = False

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` once, on the loop, when the process has ended, whatever the fork server does."""
        loop = asyncio.get_running_loop()

        def note_gone() -> None:
            loop.remove_reader(self._pidfd)
            on_gone()

        loop.add_reader(self._pidfd, note_gone)

    def has_ended(self) -> bool:
        if self._closed:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; SIGKILL ends even a stopped process. An ended process gets none."""
        if not self._closed:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> Exit:
        """Close the pidfd; returns how the process ended, as far as known."""
        end = self.end.result() if self.end.done() else Exit(None, None)
        self.orphaned = self.end.done() and end == Exit(None, None)
        if end == Exit(None, None):
            end = _reap(self._pidfd)
        close_watched(self._pidfd)
        self._closed = True
        return end


class ForkServer:
    """A running fork server, which `launch` starts; once ended, it is never started again.

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
        self._requests: deque[asyncio.Future[Process]] = deque()
        self._children: dict[int, asyncio.Future[Exit]] = {}
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_end)
        self._loop.add_reader(
            self._connection.fileno(), self._on_readable
        )  # at the end: closing the socket undoes add_reader

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
        return self._process.pid

    def fork(self, descriptors: Sequence[int]) -> asyncio.Future[Process]:
        """Request a worker with these descriptors, which the caller may close at once.

        The returned future must not be cancelled: the child that it brings needs an owner.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`, by the future.
        """
        answer: asyncio.Future[Process] = self._loop.create_future()
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
        """Read one message; returns whether there may be more."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._connection, MESSAGE_BYTES, 1)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            message, descriptors = b"", []
        self._at_end = not message or not self._on_message(message, descriptors)
        return not self._at_end

    def _on_message(self, message: bytes, descriptors: list[int]) -> bool:
        """Handle a message; returns False for an unexpected one, which violates the protocol.

        Each message settles a pending request, so their number is bounded.
        """
        try:
            match FROM_FORK_SERVER.decode(message):
                case Ready():
                    self.ready.set_result(None)
                case Forked(pid):
                    self._on_forked(pid, self._requests.popleft(), descriptors)
                case ForkFailed(text):
                    self._requests.popleft().set_exception(ForkServerUnavailable(text))
                case Exited(pid, exit_code, number):
                    self._children.pop(pid).set_result(Exit(exit_code, number))
                case other:
                    assert_never(other)
        except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, asyncio.InvalidStateError):
            self._stderr.note("killed by the server: it sent a message that nothing asked for")
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _on_forked(self, pid: int, answer: asyncio.Future[Process], descriptors: list[int]) -> None:
        end = self._children[pid] = self._loop.create_future()
        if descriptors:
            answer.set_result(Process(pid, descriptors.pop(), end))
        else:  # the kernel drops descriptors that no number is free for; the child ends with its channels
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
            self.ready.exception()  # mark it as retrieved: there may be no caller
        self._children.clear()
        self._requests.clear()
        self.ended.set_result(None)


def _reap(pidfd: int) -> Exit:
    """Reap an orphaned worker and return how it ended.

    When the fork server dies first, the next reaper above it adopts its children. In a container that reaper
    may be this very process, and then nobody else reaps them.
    """
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except OSError:
        return Exit(None, None)
    if info is None:
        return Exit(None, None)
    exited = info.si_code == os.CLD_EXITED
    return Exit(info.si_status, None) if exited else Exit(None, info.si_status)


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
        launch_command("runtime.process.forkserver", str(os.getpid()), str(connection)),
        env=launch_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[connection],
        start_new_session=True,
    )
