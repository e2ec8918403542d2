"""The keeper of a folder with PostgreSQL servers: it leaves nothing behind, however the tests end.

`keeper.py watch FOLDER PID` waits until that process ends, or for SIGTERM; then it kills every process that
runs in the folder, and removes the folder. `keeper.py kill FOLDER` only kills. Both run as the folder's
owner: root in a container may not read where another user's processes run. It is a program of its own, so it
imports nothing of ours.
"""

import ctypes
import os
import pwd
import select
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PID_FILE = "postmaster.pid"
PORT, SOCKET_FOLDER, SEGMENT = 3, 4, 6
"""Lines of the file, counted from 0; the last has key and id of a shared memory segment."""

IPC_RMID = 0
"""linux/ipc.h"""


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "watch":
        _wait_for_owner(int(sys.argv[3]))
    _change_user(folder.stat().st_uid)
    kill_processes(folder)
    remove_remains(folder)
    while task == "watch" and folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_owner(pid: int) -> None:
    """Wait until the process ends or SIGTERM comes; the starter has blocked it until we are ready."""
    with suppress(ProcessLookupError, InterruptedError):
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pidfd = os.pidfd_open(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        select.select([pidfd], [], [])


def _interrupt(*_: object) -> None:
    raise InterruptedError


def _change_user(uid: int) -> None:
    if uid != os.geteuid():
        user = pwd.getpwuid(uid)
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(uid)


def kill_processes(folder: Path) -> None:
    """Kill all that runs in the folder, again until nothing does: a server forks meanwhile."""
    while pids := list(processes_in(folder)):
        for pid in sorted(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_in(folder: Path) -> Iterator[int]:
    """Yield the processes whose working directory is the folder or below it."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - names
        with suppress(OSError):  # it has ended, or it is another user's
            if name.isdigit() and Path(f"/proc/{name}/cwd").readlink().is_relative_to(folder):
                yield int(name)


def remove_remains(folder: Path) -> None:
    """Remove what killed servers leave: shared memory segments, and files that name their process.

    PostgreSQL does it at its next start, but not while the killed process is in the process table, where it
    stays until process 1 reaps it.
    """
    for path in [folder / PID_FILE, *folder.glob(f"*/{PID_FILE}")]:
        with suppress(FileNotFoundError):
            lines = path.read_text(encoding="utf-8").splitlines()
            if len(lines) > SEGMENT:
                ctypes.CDLL(None).shmctl(int(lines[SEGMENT].split()[1]), IPC_RMID, None)
                Path(lines[SOCKET_FOLDER], f".s.PGSQL.{lines[PORT]}.lock").unlink(missing_ok=True)
            path.unlink()


if __name__ == "__main__":
    main()
