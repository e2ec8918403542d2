"""The fork server: a small process that has ONNX Runtime imported, and forks itself into workers.

A forked worker is ready in a few milliseconds and shares the memory of everything imported. The fork server
must therefore stay as clean as at its start: one thread, no descriptors but its own, no secrets. It is a
program of its own (`launch_command`), because the standard library's fork server imports the server's main
module again in each child, needs a named socket and a resource tracker, and takes the server's environment.

It serves one SOCK_SEQPACKET socket that it inherits. `Fork` comes with five descriptors (the worker's end
of its data channel, of its control channel, and of its stderr pipe, and two of shared memory) and is
answered, in order, with `Forked` and a pidfd, taken before the child can be reaped, so that it can never mean
another process. When a child ends, `Exited` says how. When the socket ends, so does the fork server, and the
kernel ends its children.
"""

import array
import contextlib
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, NoReturn

import msgspec

from runtime.process.prctl import die_with, name_process

WORKER_FDS = 5
DATA, CONTROL, REQUESTS, ANSWERS = 3, 4, 5, 6
"""A worker's descriptors: channels, and memory that it maps; 0 is /dev/null, 1 and 2 are its stderr pipe."""
MESSAGE_BYTES = 4096
EX_SOFTWARE = 70
"""sysexits.h: the exit code of a worker that an unexpected exception ended."""

PASSED_ON = {"PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH"}
"""The variables that the fork server and its workers may see, besides LC_*.

HOME is left out because libraries leave caches there. LOADLEDGER_* and all others are left out, so that a
model that takes over its worker finds no secrets in its environment.
"""
ADDED = {
    "ORT_DISABLE_TELEMETRY": "1",  # else importing ONNX Runtime starts a thread and opens a database
    "OPENBLAS_NUM_THREADS": "1",  # else importing numpy starts threads
    "OMP_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages for malloc: sessions are created in 2/3 the time
}


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Fork a worker with the descriptors that come with this message."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first message: everything is imported."""


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Fork`; a pidfd comes with it."""

    pid: int


class ForkFailed(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Fork` when there is no new process."""

    message: str


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A child has ended; exactly one of the two is not None."""

    pid: int
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | None
    signal: Annotated[int, msgspec.Meta(ge=1, le=127)] | None


FromForkServer = Ready | Forked | ForkFailed | Exited
FROM_FORK_SERVER = msgspec.msgpack.Decoder(FromForkServer)


def launch_command(module: str, *arguments: str) -> list[str]:
    """Return the command line of a Python process that calls `main` of a module of the product.

    Isolated mode keeps PYTHON* variables and the working directory out. The import path of this process is
    the first argument; then come the id of this process, and a descriptor.
    """
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])  # noqa: PTH100 - "" is the working directory
    code = f"import json, sys; sys.path[:] = json.loads(sys.argv[1])\nfrom {module} import main; main()"
    return [sys.executable, "-I", "-c", code, path, *arguments]


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the fork server's environment: this process's allowed variables, and `ADDED`."""
    passed = {k: v for k, v in environment.items() if k in PASSED_ON or k.startswith("LC_")}
    return passed | ADDED


def main() -> NoReturn:
    """Run the fork server: `argv` holds the import path, the server's process id and the socket."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        die_with(int(sys.argv[2]))
        name_process("fork server")
        importlib.import_module("runtime.worker.main").prepare()
        gc.collect()
        gc.disable()
        gc.freeze()  # a collection would write to every object, and so copy the pages that children share
        _Server(socket.socket(fileno=int(sys.argv[3]))).serve()
    except BaseException:  # noqa: BLE001 - printed, then the process ends
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(EX_SOFTWARE)


class _Server:
    """A poll loop in one thread: requests on the socket, exits on a pidfd for each child."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._children: dict[int, int] = {}  # pidfd → pid

    def serve(self) -> None:
        self._send(Ready())
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._children:
                    self._reap(descriptor)
                else:
                    self._request()

    def _request(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self._connection, MESSAGE_BYTES, WORKER_FDS)
        if not message:  # the server has closed its end, or is gone
            os._exit(0)
        answer, pidfds = self._fork(descriptors)
        for descriptor in descriptors:  # at once: the other ends see no EOF while these are open here
            os.close(descriptor)
        self._send(answer, *pidfds)

    def _fork(self, descriptors: Sequence[int]) -> tuple[Forked | ForkFailed, Sequence[int]]:
        """Fork a worker; returns the answer and the pidfd to send with it."""
        if len(descriptors) != WORKER_FDS:
            return ForkFailed("the descriptors did not arrive: too many open files"), ()
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            return ForkFailed(f"fork: {error.strerror}"), ()
        if pid == 0:
            self._connection.detach()  # the number will soon be that of another descriptor
            _become_worker(parent, descriptors)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return ForkFailed(f"pidfd_open: {error.strerror}"), ()
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        return Forked(pid), (pidfd,)

    def _reap(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.close(pidfd)
        pid, status = os.waitpid(self._children.pop(pidfd), 0)
        code = os.waitstatus_to_exitcode(status)
        self._send(Exited(pid, code if code >= 0 else None, -code if code < 0 else None))

    def _send(self, message: FromForkServer, *descriptors: int) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        try:
            self._connection.sendmsg([msgspec.msgpack.encode(message)], [rights] if descriptors else [])
        except OSError:  # the server is gone
            os._exit(0)


def _become_worker(parent: int, descriptors: Sequence[int]) -> NoReturn:
    """Turn a fresh child into a worker, which never returns into the fork server's frames."""
    try:
        os.setsid()
        die_with(parent)
        name_process("starting")
        _arrange(descriptors)
        faulthandler.enable(all_threads=False)  # a dump of all threads may itself crash
        gc.enable()
        importlib.import_module("runtime.worker.main").main(DATA, CONTROL, REQUESTS, ANSWERS)
    except BaseException:  # noqa: BLE001 - printed, then the process ends
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(EX_SOFTWARE)


def _arrange(descriptors: Sequence[int]) -> None:
    """Leave only /dev/null, the stderr pipe twice, the channels and the shared memory open."""
    data, control, stderr, requests, answers = descriptors
    null = os.open(os.devnull, os.O_RDONLY)
    # First to high numbers: a descriptor may have arrived with the number that another one gets.
    sources = (null, stderr, stderr, data, control, requests, answers)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 2 * ANSWERS) for fd in sources]
    for number, descriptor in enumerate(moved):
        os.dup2(descriptor, number, inheritable=number < DATA)
    for descriptor in [int(entry.name) for entry in os.scandir("/proc/self/fd")]:
        if descriptor > ANSWERS:
            with contextlib.suppress(OSError):  # the listing's own descriptor is closed already
                os.close(descriptor)
