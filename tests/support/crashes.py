"""Processes that are killed amid SQLite: before any one of the system calls with which it changes files.

SQLite's own interface for tests replaces the calls: https://sqlite.org/c3ref/vfs.html (`xSetSystemCall`).
"""

import _sqlite3
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

CALLS = {
    "open": (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "write": (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    "pwrite": (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64),
    "pwrite64": (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64),
    "ftruncate": (ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    "unlink": (ctypes.c_int, ctypes.c_char_p),
}
"""Result and parameters of those that change files, or create them."""

_NUMBERS = ("iVersion", "szOsFile", "mxPathname")
_POINTERS = (
    *("pNext", "zName", "pAppData", "xOpen", "xDelete", "xAccess", "xFullPathname", "xDlOpen", "xDlError"),
    *("xDlSym", "xDlClose", "xRandomness", "xSleep", "xCurrentTime", "xGetLastError", "xCurrentTimeInt64"),
)
_SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_GET = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


class _Vfs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("xSetSystemCall", _SET),
        ("xGetSystemCall", _GET),
    )


def run_counted(work: Callable[[], object], killed_at: int | None = None) -> int:
    """Do some work; return how many calls it took. This process is killed before the given one."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with _before_each_call(count):
        work()
    return calls


@contextmanager
def _before_each_call(before: Callable[[], None]) -> Iterator[None]:
    library = ctypes.CDLL(_sqlite3.__file__)  # its SQLite, linked or built in
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    vfs = library.sqlite3_vfs_find(None)
    kept = []

    def call(real: Callable[..., Any], *arguments: Any) -> Any:
        before()
        return real(*arguments)

    for name, types in CALLS.items():
        kind = ctypes.CFUNCTYPE(*types, use_errno=True)
        address = vfs.contents.xGetSystemCall(vfs, name.encode())
        if address is not None:  # else this build uses another one
            kept.append(kind(partial(call, kind(address))))
            vfs.contents.xSetSystemCall(vfs, name.encode(), kept[-1])
    try:
        yield
    finally:
        for name in CALLS:
            vfs.contents.xSetSystemCall(vfs, name.encode(), None)
