"""The modes of files, which root can be made to obey like any user."""

import ctypes
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OVERRIDES = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root reads and writes whatever it likes."""


class _Capabilities(ctypes.Structure):  # capget(2), version 3
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def obey_modes() -> int:
    """Let this thread, and those that it starts, obey modes; return the capabilities that it had."""
    capabilities = _read_capabilities()
    before: int = capabilities[0].effective
    _set_effective(before & ~_OVERRIDES)
    return before


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """A file or folder is unreadable meanwhile, also for root in this thread and in those that it starts."""
    mode, before = stat.S_IMODE(path.stat().st_mode), obey_modes()
    path.chmod(0)
    try:
        yield
    finally:
        path.chmod(mode)
        _set_effective(before)


def _set_effective(effective: int) -> None:
    capabilities = _read_capabilities()
    capabilities[0].effective = effective
    assert ctypes.CDLL(None).capset(_header(), capabilities) == 0


def _read_capabilities() -> "ctypes.Array[_Capabilities]":
    capabilities = (_Capabilities * 2)()
    assert ctypes.CDLL(None).capget(_header(), capabilities) == 0
    return capabilities


def _header() -> "ctypes.Array[ctypes.c_uint32]":
    return (ctypes.c_uint32 * 2)(0x20080522, 0)
