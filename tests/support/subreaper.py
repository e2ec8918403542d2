"""Runs a command, and kills all that it has started, wherever that has gone, when the command ends.

`subreaper.py COMMAND…` exits as the command does. SIGTERM ends the command first; it also comes when the
starter ends. This is a program of its own, so it imports nothing of ours.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""linux/prctl.h. A subreaper is the parent of each descendant whose own parent has ended."""


def main() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, interrupt)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    try:
        code = subprocess.run(sys.argv[1:], check=False).returncode
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kill_children()
    sys.exit(code if code >= 0 else 128 - code)


def interrupt(*_: object) -> None:
    raise InterruptedError("SIGTERM")


def kill_children() -> None:
    """Kill the children, and then theirs, which become ours, until there are none."""
    with suppress(ChildProcessError):
        while True:
            for pid in list(children()):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def children() -> Iterator[int]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - names
        with suppress(OSError):  # it has ended
            if name.isdigit() and parent_of(name) == os.getpid():
                yield int(name)


def parent_of(pid: str) -> int:
    return int(Path("/proc", pid, "stat").read_bytes().rpartition(b")")[2].split()[1])  # proc_pid_stat(5)


if __name__ == "__main__":
    main()
