"""Landlock: the files that a worker may open, and no network, no signals to others.

landlock(7); linux/landlock.h. The kernel's version of Landlock ("ABI") says which accesses it can restrict,
and all of these are restricted.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Mapping

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""System calls, with the same numbers on all architectures."""
CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = (1 << bit for bit in range(4))
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
ACCESS_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
"""The number of kinds of access to files that an ABI knows; from ABI 5 on 16."""
NET_FROM, NET_ALL = 4, 0b11
"""The ABI that restricts bind and connect of TCP."""
SCOPE_FROM, SCOPE_ALL = 6, 0b11
"""The ABI that restricts connections to abstract sockets, and signals, to processes of the same domain."""
READS = READ_FILE | READ_DIR
DRIVES = READS | WRITE_FILE | TRUNCATE | IOCTL_DEV
"""Accesses to a driver's files in /dev, whose calls (ioctl) an ABI from 5 on restricts."""
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Accesses that can be allowed on a path that is no folder."""

_LIBC = ctypes.CDLL(None, use_errno=True)


def find_abi() -> int:
    """Return the version of the kernel's Landlock; 0 if it is missing or switched off."""
    try:
        return _call(CREATE_RULESET, 0, 0, CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict(accesses: Mapping[str, int]) -> None:
    """Restrict this thread, and threads that it starts, to these paths and all beneath them, for good.

    The process needs `no_new_privs` first.

    Args:
        accesses: `READS` or `DRIVES` by path; paths that do not exist are left out.

    Raises:
        OSError: the kernel has no Landlock, or refuses.
    """
    abi = find_abi()
    handled = (1 << ACCESS_FS_BITS.get(abi, 16)) - 1
    attributes = struct.pack(
        "=QQQ", handled, NET_ALL if abi >= NET_FROM else 0, SCOPE_ALL if abi >= SCOPE_FROM else 0
    )
    known = 8 if abi < NET_FROM else 16 if abi < SCOPE_FROM else 24
    ruleset = _call(CREATE_RULESET, attributes, known, 0)
    try:
        for path, access in accesses.items():
            _allow(ruleset, path, access & handled)
        _call(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            access &= OF_FILES
        _call(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", access, descriptor), 0)
    finally:
        os.close(descriptor)


def _call(number: int, *arguments: int | bytes) -> int:
    values = [each if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments]
    result = int(_LIBC.syscall(ctypes.c_long(number), *values))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
