"""Mounts that never answer: real ones, of FUSE without anybody behind it."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MNT_DETACH = 2
"""umount2(2)"""


@contextmanager
def hanging_mounts(*folders: Path) -> Iterator[None]:
    """Mount file systems on folders that hang whoever looks into them, until the block ends.

    The test is skipped where this process may not mount.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptors = list[int]()
    mounted = list[bytes]()
    try:
        for folder in folders:
            try:
                descriptors.append(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                pytest.skip(f"there is no FUSE here: {error.strerror}")
            options = f"fd={descriptors[-1]},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
            if libc.mount(b"nobody", bytes(folder), b"fuse", 0, options.encode()):
                pytest.skip(f"mounts are not allowed here: {os.strerror(ctypes.get_errno())}")
            mounted.append(bytes(folder))
        yield
    finally:
        for descriptor in descriptors:  # who hangs is told that nobody is behind it
            os.close(descriptor)
        for path in mounted:
            libc.umount2(path, MNT_DETACH)
