"""Limits and loss of privileges of a process that confines itself: resources, addresses, capabilities."""

import ctypes
import mmap
import resource
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38
"""linux/prctl.h"""
CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)
"""linux/capability.h: `_LINUX_CAPABILITY_VERSION_3`, of this thread."""
NO_CAPABILITIES = bytes(24)
"""No effective, permitted and inheritable capabilities, in two words each."""
SYS_MSEAL = 462
"""The number of mseal(2), on all architectures; since Linux 6.10."""
M_ARENA_MAX = -8
"""malloc.h"""
MAPS = Path("/proc/self/maps")
OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
NO_MEMORY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000 | 0x100000
"""With MAP_NORESERVE and MAP_FIXED_NOREPLACE (asm-generic/mman-common.h): it replaces no other mapping."""
FIRST_ADDRESS = 2**20
"""More than `vm.mmap_min_addr`, below which nothing may be mapped."""
ADDRESS_BITS = (56, 52, 48, 47, 42, 39)
"""Widths of a process's addresses: 56 or 47 on x86_64; the others on aarch64, depending on the kernel."""
STACK_ROOM_BYTES = 2**26
"""Space below the first stack: its possible growth, usually 8 MiB, and the kernel's gap of 1 MiB."""

LIBC = ctypes.CDLL(None)
"""Made once: each object makes a class, whose place on the heap keeps malloc from returning freed memory."""
_map = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_ssize_t
)(("mmap", LIBC))
_seal = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, *3 * [ctypes.c_size_t])(("syscall", LIBC))


def limit_resource(kind: int, limit: int) -> None:
    """Limit a resource of this process, for good; a lower limit stays."""
    _, hard = resource.getrlimit(kind)
    allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (allowed, allowed))


def prefer_as_victim() -> None:
    """Let the kernel kill this process before the server if memory runs out (proc_pid_oom_score_adj(5)).

    Raising the value needs no privilege. Where /proc cannot be written, the kernel chooses by size alone.
    """
    with suppress(OSError):
        OOM_SCORE_ADJ.write_text("1000", encoding="ascii")


def limit_heaps(count: int) -> None:
    """Limit the heaps of malloc, which makes one for each thread, otherwise up to eight for each core."""
    LIBC.mallopt(M_ARENA_MAX, count)


def seal_addresses(room_bytes: int) -> None:
    """Make free addresses unusable for good, except `room_bytes` for the heap and as many for mappings.

    RLIMIT_AS counts mapped pages, but a page that is alone in its GiB has 8 KiB of page tables. Sealed
    addresses cannot be mapped, so page tables take at most 1/512 of the free ones. Sealed addresses count as
    mapped. Without mseal(2), before Linux 6.10, nothing is sealed.
    """
    if _seal(SYS_MSEAL, 0, 0, 0) == 0:
        for first, end in list(_find_unneeded(room_bytes)):
            if end > first and _map(first, end - first, 0, NO_MEMORY, -1, 0) == first:
                _seal(SYS_MSEAL, first, end - first, 0)


def _find_unneeded(room_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the free addresses before, between and after all mappings, except the room (proc_pid_maps(5)).

    Each range is its first address and the one after its last; a range smaller than the room has its end
    before its beginning. The heap grows up, and mappings grow down from the lowest library above it.
    """
    room_bytes -= room_bytes % -mmap.PAGESIZE  # whole pages
    first = FIRST_ADDRESS
    for line in MAPS.read_bytes().splitlines():
        begin, end = (int(each, 16) for each in line.split(maxsplit=1)[0].split(b"-"))
        if end >= 2**63:  # the kernel's own page
            break
        if first == FIRST_ADDRESS:  # below the program
            room_below = 0
        else:
            room_below = STACK_ROOM_BYTES if line.endswith(b"[stack]") else room_bytes
        yield first, begin - room_below
        first = end + (room_bytes if line.endswith(b"[heap]") else 0)
    for bits in ADDRESS_BITS:  # missing and already mapped addresses cannot be mapped
        yield first, 2**bits - mmap.PAGESIZE


def drop_privileges() -> None:
    """Give up all capabilities for good; a server that runs as root has them.

    Raises:
        OSError: the kernel refuses.
    """
    if (
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or LIBC.capset(CAPABILITY_HEADER, NO_CAPABILITIES) != 0
    ):
        raise OSError("the kernel keeps a process from giving up privileges")
