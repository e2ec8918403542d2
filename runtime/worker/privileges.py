"""Limits and loss of privileges of a process that confines itself: resources, capabilities, execve(2)."""

import ctypes
import resource
import struct

PR_SET_NO_NEW_PRIVS = 38
"""linux/prctl.h"""
CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)
"""linux/capability.h: `_LINUX_CAPABILITY_VERSION_3`, of this thread."""
NO_CAPABILITIES = bytes(24)
"""No effective, permitted and inheritable ones, in two words each."""

LIBC = ctypes.CDLL(None)
"""Made once: each makes a class, which on top of the heap keeps malloc from returning what is freed below."""


def limit_resource(kind: int, limit: int) -> None:
    """Limit a resource of this process, for good; a lower limit stays."""
    _, hard = resource.getrlimit(kind)
    allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (allowed, allowed))


def drop_privileges() -> None:
    """Give up all capabilities, which a server of root has, for good.

    Raises:
        OSError: the kernel keeps the process from it.
    """
    if (
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or LIBC.capset(CAPABILITY_HEADER, NO_CAPABILITIES) != 0
    ):
        raise OSError("the kernel keeps a process from giving up privileges")
