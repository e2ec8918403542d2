"""What the kernel keeps of a process, by prctl(2): its name, and the signal at its parent's end."""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
"""linux/prctl.h"""
NAME_BYTES = 15
"""Of a process's short name (`ps -o comm`): prctl(2) cuts a longer one."""


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it ends.

    SIGKILL ends even a stopped process. If this process has another parent by now, that one has ended
    already, and so does this process.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def name_process(name: str) -> None:
    """Show what this process is for in lists of processes, in its short name and in its command line.

    The kernel reads the command line from where the process was given its arguments (proc_pid_stat(5),
    `arg_start` and `arg_end`), so that is written over.
    """
    short = name if len(name) <= NAME_BYTES else name[: NAME_BYTES - 7] + ".." + name[-5:]
    ctypes.CDLL(None).prctl(PR_SET_NAME, short.encode(), 0, 0, 0)
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    start, size = int(fields[45]), int(fields[46]) - int(fields[45])
    if start and size > 0:  # else the kernel does not tell
        shown = "\0".join((sys.executable, "loadledger", name, "of", "server", *sys.argv[2:3])).encode()
        ctypes.memmove(start, shown[: size - 1].ljust(size, b"\0"), size)
