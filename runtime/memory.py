"""Memory of processes, limits and pressure of the container or machine, and free disk space; all in bytes.

A worker's own memory is its private dirty pages: the machine gets them back when the process ends. Pages that
the worker shares with the fork server are not its own, nor unchanged pages of a file, such as mapped weights,
which the kernel can drop at any time.

Limits and pressure come from /proc and the cgroup file systems (`runtime.cgroups`; "PSI" in the kernel's
documentation). They differ between machines, so unreadable files are skipped.
"""

import ctypes
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from runtime.cgroups import CGROUPS, find_folders, read_text
from runtime.errors import RuntimeProblem

PROC = Path("/proc")
_PAGE_BYTES = 4096
"""The length of one read of /proc."""
RESERVE_BYTES = 2**30
RESERVE_SHARE = 20
"""Disk space that stored versions leave free: `RESERVE_BYTES`, or a twentieth of a small file system. A
ledger grows by some hundred bytes per event, so there is time to notice."""

THREAD_HEAP_BYTES = 256 * 2**10
"""At least malloc's first mapping for a thread (132 KiB), and what libraries keep per thread."""
UNLIMITED_STACK_BYTES = 8 * 2**20
"""At least the stack of a thread if stacks have no limit: 2 MiB, on some machines 4 (pthread_create(3))."""

Source = Literal["cgroup v2", "cgroup v1", "machine"]

V1_UNLIMITED_BYTES = 2**63 - 2**20
"""A cgroup v1 limit from here on means no limit: the kernel shows 2**63 - 1 rounded down to a page, and
no page is larger than a megabyte."""

MEMORY_PRESSURE_PERCENT = 10.0
"""Share of the last 10 s in which a task waited for memory. With free memory it is 0; at a tenth the kernel
reads back pages that it has just dropped, and another model increases that."""
CPU_PRESSURE_PERCENT = 80.0
"""Share of the last 10 s in which a task waited for a core. One runnable thread too many all the time is
100, and bursts stay well below; from 80 on, a load takes its computing time from inferences."""

_RESIDENT = re.compile(rb"^VmHWM:\s+(\d+) kB\nVmRSS:\s+(\d+) kB\nRssAnon:\s+(\d+) kB$", re.MULTILINE)
_REST = re.compile(rb"^Vm(?:PTE|Swap):\s+(\d+) kB$", re.MULTILINE)
MAX_LEDGER_BYTES = 2**63 - 1
"""The largest integer of the ledger, which has 64 bits."""

_malloc_trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
"""Another C library than glibc has no such function."""

_MB = 1_000_000
_SMALL_MB = 10

_COUNT = re.compile(r"[1-9]\d{0,18}", re.ASCII)
_AVERAGE = re.compile(r"^some avg10=(\d{1,3}(?:\.\d{1,9})?)\b", re.ASCII | re.MULTILINE)
"""Up to 18 digits, so that every budget fits into the ledger's 64 bits."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory of a process: resident anonymous pages, all resident pages, their peak, and other memory.

    The other memory is in no resident page: swapped pages, and page tables, which reading alone makes.
    """

    anonymous_bytes: int
    all_bytes: int
    peak_bytes: int
    rest_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """Pages of files, shared or not."""
        return self.all_bytes - self.anonymous_bytes

    @property
    def taken_bytes(self) -> int:
        """All memory that the kernel keeps for the process alone, without pages shared with its parent."""
        return self.anonymous_bytes + self.rest_bytes


def private_bytes(pid: int | str = "self") -> int:
    """Measure the bytes in pages that no other process maps and no file backs.

    Raises:
        ProcessLookupError: the process has exited.
    """
    return parse_private(_read(f"{pid}/smaps_rollup"))


def total_bytes(sizes: Iterable[int]) -> int:
    """Return the sum of sizes, at most `MAX_LEDGER_BYTES`."""
    return min(sum(sizes), MAX_LEDGER_BYTES)


def format_megabytes(number: int) -> str:
    """Return a number of bytes in megabytes, for people."""
    digits = 0 if number >= _SMALL_MB * _MB else 1
    return f"{number / _MB:,.{digits}f} MB"


def list_descendants(pid: int) -> list[int]:
    """Return the process ids of all descendants of a process, parents before children."""
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # the process has ended
        for thread in os.listdir(f"{PROC}/{pid}/task"):  # noqa: PTH208 - names
            children += map(int, _read(f"{pid}/task/{thread}/children").split())
    return [*children, *(each for child in children for each in list_descendants(child))]


def tree_bytes(pid: int) -> int:
    """Measure the anonymous memory of a process and its descendants; pages that they share count once.

    The sum has no mapped files, because a process's share of a file changes with each other process that maps
    it: a process that imports ONNX Runtime changed the sum by 9 MB (measured).
    """
    return sum(map(_anonymous_bytes, (pid, *list_descendants(pid))))


def _anonymous_bytes(pid: int) -> int:
    try:
        return parse_field(_read(f"{pid}/smaps_rollup"), "Pss_Anon")
    except (FileNotFoundError, ProcessLookupError):  # the process has ended
        return 0


def taken_bytes(pid: int) -> int:
    """Read `Resident.taken_bytes` of a process, in 0.02 ms; 0 if the process has ended."""
    resident = parse_resident(_read(f"{pid}/status").encode())
    return 0 if resident is None else resident.taken_bytes


def resident_bytes() -> int:
    """Read the anonymous memory of this process, shared or not. Takes 0.02 ms."""
    resident = parse_resident(_read("self/status").encode())
    return 0 if resident is None else resident.anonymous_bytes


def data_bytes(pid: int | str = "self") -> int:
    """Read the size that `RLIMIT_DATA` limits: private writable mappings, touched or not.

    Raises:
        ProcessLookupError: the process has exited.
    """
    return parse_field(_read(f"{pid}/status"), "VmData")


def size_bytes() -> int:
    """Read the size that `RLIMIT_AS` limits: all mappings."""
    return parse_field(_read("self/status"), "VmSize")


def thread_bytes() -> int:
    """Return what `RLIMIT_DATA` counts for a library's thread: mostly its stack, touched or not.

    A session of ONNX Runtime (1.32) that cannot start one of its threads is never created (measured).
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return THREAD_HEAP_BYTES + (UNLIMITED_STACK_BYTES if soft == resource.RLIM_INFINITY else soft)


def return_free_memory() -> None:
    """Return freed memory from malloc to the kernel, in 2 ms; mapped memory could not have it."""
    _malloc_trim(0)


def parse_private(smaps_rollup: str) -> int:
    """Sum the private dirty and huge pages in the text of a smaps_rollup file, in bytes."""
    return sum(parse_field(smaps_rollup, name) for name in ("Private_Dirty", "Private_Hugetlb"))


def parse_resident(status: bytes) -> Resident | None:
    """Parse the resident memory in the text of a status file; a zombie has none, so it gives None."""
    found = _RESIDENT.search(status)
    if found is None:
        return None
    peak, all_, anonymous = (int(kilobytes) * 1024 for kilobytes in found.groups())
    return Resident(anonymous, all_, peak, sum(int(each) * 1024 for each in _REST.findall(status)))


def parse_field(text: str, name: str) -> int:
    """Read one field that /proc gives in kB, in bytes; a missing field, as of a zombie, is 0."""
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: str) -> str:
    try:
        descriptor = os.open(f"{PROC}/{path}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(f"/proc/{path}") from None
    try:  # without a file object, which costs time of a load
        parts = []
        while part := os.read(descriptor, _PAGE_BYTES):
            parts.append(part)
        return b"".join(parts).decode(errors="replace")
    finally:
        os.close(descriptor)


class MemoryUnknown(RuntimeProblem):
    """The size of the memory cannot be found out."""

    code = "memory_unknown"


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The memory that this container or machine may use.

    Attributes:
        bytes: more than 0.
        source: where the limit stands.
        kills_together: whether the kernel kills all processes of the container when one passes the limit
            (`memory.oom.group`, which Kubernetes sets); with cgroup v1 it never does.
    """

    bytes: int
    source: Source
    kills_together: bool = False


@dataclass(frozen=True, slots=True)
class Pressure:
    """Percent of the last 10 s in which a task waited for memory or a core (PSI); None if unknown."""

    memory_some_percent: float | None
    cpu_some_percent: float | None


def find_memory_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> MemoryLimit:
    """Return the lowest memory limit of this process's cgroups, their parents and the machine.

    Raises:
        MemoryUnknown: `memory_unknown`, no limit can be read.
    """
    folders = find_folders("memory", proc, cgroups)
    found = [
        *_machine_limits(proc),
        *_cgroup_limits(folders.unified, "memory.max", "cgroup v2"),
        *_cgroup_limits(folders.v1, "memory.limit_in_bytes", "cgroup v1"),
    ]
    if not found:
        raise MemoryUnknown(
            f"neither {proc}/meminfo nor a cgroup in {cgroups} says how much memory there is;"
            " make one of them readable"
        )
    least = min(found, key=lambda limit: limit.bytes)
    if least.source != "cgroup v2":
        return least
    # A folder below the limit's may say it, too: the kernel takes the highest that does.
    grouped = any(read_text(folder / "memory.oom.group").strip() == "1" for folder in folders.unified)
    return replace(least, kills_together=grouped)


def read_pressure(proc: Path = PROC, cgroups: Path = CGROUPS) -> Pressure | None:
    """Read the pressure of this process's cgroup, else of the whole machine.

    A few small reads, less than a millisecond together, so the event loop may do it each second.

    Returns:
        None if the kernel does not provide PSI.
    """
    above = find_folders("memory", proc, cgroups).unified
    # In a container the path may be the host's, while the container's cgroup is the one mounted.
    folders = dict.fromkeys((above[0], above[-1]))
    memory, cpu = (
        _some_percent([*(folder / f"{name}.pressure" for folder in folders), proc / "pressure" / name])
        for name in ("memory", "cpu")
    )
    return None if memory is None and cpu is None else Pressure(memory, cpu)


def is_under_pressure(found: Pressure | None) -> bool:
    """Whether low-priority work should wait; unknown pressure counts as none."""
    if found is None:
        return False
    memory, cpu = found.memory_some_percent or 0.0, found.cpu_some_percent or 0.0
    return memory >= MEMORY_PRESSURE_PERCENT or cpu >= CPU_PRESSURE_PERCENT


def parse_limit(text: str) -> int | None:
    """Parse a cgroup limit in bytes; None without a valid limit."""
    found = _COUNT.fullmatch(text.strip())
    limit = None if found is None else int(found[0])
    return limit if limit is not None and limit < V1_UNLIMITED_BYTES else None


def parse_some_percent(text: str) -> float | None:
    """Read the 10 s average of `some` in the text of a PSI file; None if missing."""
    found = _AVERAGE.search(text)
    return None if found is None else float(found[1])


def _machine_limits(proc: Path) -> Iterator[MemoryLimit]:
    try:
        total = parse_field(read_text(proc / "meminfo"), "MemTotal")
    except (ValueError, IndexError):
        return
    if total > 0:
        yield MemoryLimit(total, "machine")


def _cgroup_limits(folders: Iterable[Path], file: str, source: Source) -> Iterator[MemoryLimit]:
    for folder in folders:
        if (limit := parse_limit(read_text(folder / file))) is not None:
            yield MemoryLimit(limit, source)


def _some_percent(files: list[Path]) -> float | None:
    return next((value for file in files if (value := parse_some_percent(read_text(file))) is not None), None)


def free_disk_bytes(folder: Path) -> int:
    """Return the disk space beyond the reserve in this folder's file system; negative below the reserve.

    Raises:
        OSError: the file system cannot be queried.
    """
    seen = os.statvfs(folder)
    reserve = min(RESERVE_BYTES, seen.f_blocks * seen.f_frsize // RESERVE_SHARE)
    return seen.f_bavail * seen.f_frsize - reserve
