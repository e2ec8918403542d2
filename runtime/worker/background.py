"""Giving way: a worker whose work can wait leaves processor and disk to whoever else wants them."""

import contextlib
import ctypes
import os
import platform

NICENESS = 10
"""A tenth of the share of a core that others have who want it. With 19, a sixtieth, what is prepared on a
busy machine takes memory for minutes, and its trial measures how it waited."""
SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
"""Its number by machine; the C library has no function for it."""
IOPRIO_WHO_PROCESS, IOPRIO_CLASS_IDLE, IOPRIO_CLASS_SHIFT = 1, 3, 13
"""linux/ioprio.h"""
AUTOGROUP = "/proc/self/autogroup"
"""Each session (setsid) may be scheduled as one, and processes in it then are nice to each other only."""


def give_way() -> None:
    """Put the calling thread, and those that it starts, behind others; for good.

    What the kernel refuses, or does not know, is left as it is.
    """
    for lower in (_nice, _batch, _idle_io, _autogroup):
        with contextlib.suppress(OSError):
            lower()


def _nice() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def _batch() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _idle_io() -> None:
    number = SYS_IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT)


def _autogroup() -> None:
    descriptor = os.open(AUTOGROUP, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"%d" % NICENESS)
    finally:
        os.close(descriptor)
