"""How much memory a process takes; read from /proc, in bytes.

A worker's own memory is its private dirty pages: what the machine gets back when the process ends, and not
before. Pages that it still shares with the fork server are not its own, nor those that are as their file has
them, as mapped weights are: the kernel takes these back whenever it needs them.

What this container or machine may use of memory, and whether it is under pressure.

Everything comes from the text files of /proc and of the cgroup file systems (cgroups(7), and "Control Group
v2" and "PSI" in the kernel's documentation). They differ from machine to machine, so a file that cannot be
read or has something else in it is passed over.

How much of a file system prepared forms may take: never what others there, the ledger first, will need.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

from runtime.errors import RuntimeProblem

PROC = Path("/proc")
_PAGE_BYTES = 4096
"""What /proc gives at once at most."""


@dataclass(frozen=True, slots=True)
class Resident:
    """What of a process is in memory: pages of no file, all pages, and the most that these ever were."""

    anonymous_bytes: int
    all_bytes: int
    peak_bytes: int


def private_bytes(pid: int | str = "self") -> int:
    """Measure what the machine gets back when this process ends.

    Args:
        pid: a process id, or "self".

    Returns:
        Bytes in pages that no other process maps and no file has.

    Raises:
        ProcessLookupError: the process is gone.
    """
    return parse_private(_read(f"{pid}/smaps_rollup"))


def descendants(pid: int) -> list[int]:
    """List the process ids of all descendants of a process, parents before children."""
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for thread in os.listdir(f"{PROC}/{pid}/task"):  # noqa: PTH208 - names
            children += map(int, _read(f"{pid}/task/{thread}/children").split())
    return [*children, *(each for child in children for each in descendants(child))]


def data_bytes(pid: int | str = "self") -> int:
    """Read the size that `RLIMIT_DATA` limits: private writable mappings, touched or not."""
    return parse_field(_read(f"{pid}/status"), "VmData")


def anonymous_bytes(pid: int | str = "self") -> int:
    """Read the size of the pages that are of no file: what the kernel counts, so it costs nothing to ask."""
    return parse_field(_read(f"{pid}/status"), "RssAnon")


def resident(pid: int | str = "self") -> Resident:
    """Read what the kernel counts of a process's pages, so it costs nothing to ask."""
    status = _read(f"{pid}/status")
    return Resident(*(parse_field(status, name) for name in ("RssAnon", "VmRSS", "VmHWM")))


def parse_private(smaps_rollup: str) -> int:
    """Sum the private pages that no file has (dirty, huge) in the text of a smaps_rollup file, in bytes."""
    return sum(parse_field(smaps_rollup, name) for name in ("Private_Dirty", "Private_Hugetlb"))


def parse_field(text: str, name: str) -> int:
    """Read one field that /proc gives in kB, in bytes; 0 when it is not there (a zombie has none)."""
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: str) -> str:
    try:
        descriptor = os.open(f"{PROC}/{path}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(f"/proc/{path}") from None
    try:  # a load waits for it, so with as little around it as can be
        parts = []
        while part := os.read(descriptor, _PAGE_BYTES):
            parts.append(part)
        return b"".join(parts).decode(errors="replace")
    finally:
        os.close(descriptor)


CGROUPS = Path("/sys/fs/cgroup")

Source = Literal["cgroup v2", "cgroup v1", "machine"]

V1_UNLIMITED_BYTES = 2**63 - 2**20
"""From here on a limit of cgroup v1 is none: the kernel says 2**63 - 1 rounded down to a page, and no page
that memory is counted in has more than a megabyte."""

MEMORY_PRESSURE_PERCENT = 10.0
"""Something waited for memory in so much of the last 10 s. With room to spare nothing ever does; at a tenth
of the time the kernel is reading back what it has just dropped, and one more model makes that worse."""
CPU_PRESSURE_PERCENT = 80.0
"""Something waited for a core in so much of the last 10 s. One runnable thread too many all the time is 100
and bursts stay well below; from 80 on, what a load computes is taken from inferences."""

MAX_FILE_CHARACTERS = 64 * 1024
"""These files have a few kilobytes at most."""

_COUNT = re.compile(r"[1-9]\d{0,18}", re.ASCII)
_AVERAGE = re.compile(r"^some avg10=(\d{1,3}(?:\.\d{1,9})?)\b", re.ASCII | re.MULTILINE)
_BYTES = re.compile(r"[1-9]\d{0,17}", re.ASCII)
"""Up to 18 digits, so that every budget fits into the ledger's 64 bits."""
_PERCENTAGE = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)%", re.ASCII)


class MemoryUnknown(RuntimeProblem):
    """Nothing says how much memory there is."""

    code = "memory_unknown"


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """How much memory may be used here.

    Attributes:
        bytes: More than 0.
        source: What says so, in words for people.
    """

    bytes: int
    source: Source


@dataclass(frozen=True, slots=True)
class Pressure:
    """In how much of the last 10 s, in per cent, something had to wait; None where that is not known."""

    memory_some_percent: float | None
    cpu_some_percent: float | None


@dataclass(frozen=True, slots=True)
class OwnCgroups:
    """Where this process is in the hierarchies that concern memory; `/` where that is not known."""

    unified: str = "/"
    v1_memory: str = "/"


def memory_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> MemoryLimit:
    """Find the least of what this process's cgroups allow, those above them included, and the machine has.

    Raises:
        MemoryUnknown: `memory_unknown`, nothing of that can be read.
    """
    own = parse_cgroups(_text(proc / "self/cgroup"))
    found = [
        *_machine_limits(proc),
        *_unified_limits(_unified_mount(cgroups), own.unified),
        *_v1_limits(cgroups / "memory", own.v1_memory),
    ]
    if not found:
        raise MemoryUnknown(
            f"neither {proc}/meminfo nor a cgroup in {cgroups} says how much memory there is;"
            " make one of them readable"
        )
    return min(found, key=lambda limit: limit.bytes)


def pressure(proc: Path = PROC, cgroups: Path = CGROUPS) -> Pressure | None:
    """Read how long was waited for memory and cores: by this process's cgroup, else on the whole machine.

    A few small reads, less than a millisecond together, so the event loop may do it each second.

    Returns:
        None when the kernel does not say, which it need not.
    """
    own, mount = parse_cgroups(_text(proc / "self/cgroup")).unified, _unified_mount(cgroups)
    # In a container the path may be the host's, and the container's cgroup is what is mounted.
    folders = dict.fromkeys((_below(mount, own), mount))
    memory, cpu = (
        _some_percent([*(folder / f"{name}.pressure" for folder in folders), proc / "pressure" / name])
        for name in ("memory", "cpu")
    )
    return None if memory is None and cpu is None else Pressure(memory, cpu)


def is_under_pressure(found: Pressure | None) -> bool:
    """Say whether what can wait should; what is not known is no pressure."""
    if found is None:
        return False
    memory, cpu = found.memory_some_percent or 0.0, found.cpu_some_percent or 0.0
    return memory >= MEMORY_PRESSURE_PERCENT or cpu >= CPU_PRESSURE_PERCENT


def budget_bytes(setting: str, limit_bytes: int) -> int:
    """Return how many bytes the workers may take together.

    Args:
        setting: bytes, a positive integer, which are taken as they are even where they are more than the
            limit (there may be swap); or a percentage of the limit, more than 0 and at most 100.
        limit_bytes: what this container or machine may use.

    Returns:
        At least 1.

    Raises:
        ValueError: the setting is neither; its text says what it must be.
    """
    if _BYTES.fullmatch(setting):
        return int(setting)
    found = _PERCENTAGE.fullmatch(setting)
    if found is None or not 0 < (percent := Decimal(found[1])) <= 100:  # noqa: PLR2004 - it is per cent
        raise ValueError(
            "Must be bytes, like 8589934592, or a percentage of more than 0 and at most 100, like 80%."
        )
    return max(1, int(limit_bytes * percent / 100))


def parse_cgroups(text: str) -> OwnCgroups:
    """Read the text of /proc/self/cgroup: lines of `hierarchy:controllers:path`."""
    own = OwnCgroups()
    for line in text.split("\n"):
        match line.split(":", 2):
            case ["0", "", path]:
                own = OwnCgroups(path, own.v1_memory)
            case [_, controllers, path] if "memory" in controllers.split(","):
                own = OwnCgroups(own.unified, path)
    return own


def parse_limit(text: str) -> int | None:
    """Read one limit in bytes, of cgroup v2 or v1; None is no limit, or nothing that can be understood."""
    found = _COUNT.fullmatch(text.strip())
    limit = None if found is None else int(found[0])
    return limit if limit is not None and limit < V1_UNLIMITED_BYTES else None


def parse_some_percent(text: str) -> float | None:
    """Read the 10 s average of `some` in the text of a PSI file; None when it is not there."""
    found = _AVERAGE.search(text)
    return None if found is None else float(found[1])


def _machine_limits(proc: Path) -> Iterator[MemoryLimit]:
    try:
        total = parse_field(_text(proc / "meminfo"), "MemTotal")
    except (ValueError, IndexError):
        return
    if total > 0:
        yield MemoryLimit(total, "machine")


def _unified_limits(mount: Path, own: str) -> Iterator[MemoryLimit]:
    for folder in _folders(mount, own):
        if (limit := parse_limit(_text(folder / "memory.max"))) is not None:
            yield MemoryLimit(limit, "cgroup v2")


def _v1_limits(mount: Path, own: str) -> Iterator[MemoryLimit]:
    for folder in _folders(mount, own):
        if (limit := parse_limit(_text(folder / "memory.limit_in_bytes"))) is not None:
            yield MemoryLimit(limit, "cgroup v1")


def _unified_mount(cgroups: Path) -> Path:
    """Where cgroup v2 is: here, or beside the hierarchies of v1 (systemd calls that hybrid)."""
    return cgroups if _text(cgroups / "cgroup.controllers") else cgroups / "unified"


def _folders(mount: Path, own: str) -> Iterator[Path]:
    """A cgroup's folder and those above it, up to the mount."""
    folder = _below(mount, own)
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _below(mount: Path, own: str) -> Path:
    # A path with `..` is outside of what is mounted here (cgroup_namespaces(7)).
    parts = own.strip("/").split("/")
    return mount if ".." in parts else mount.joinpath(*parts)


def _some_percent(files: list[Path]) -> float | None:
    return next((value for file in files if (value := parse_some_percent(_text(file))) is not None), None)


def _text(file: Path) -> str:
    """Read a file's beginning; one that cannot be read is empty (ValueError is a path with a NUL in it)."""
    try:
        with file.open(encoding="utf-8", errors="surrogateescape") as opened:
            return opened.read(MAX_FILE_CHARACTERS)
    except (OSError, ValueError):
        return ""


RESERVE_BYTES = 2**30
RESERVE_SHARE = 20
"""What is never taken: `RESERVE_BYTES`, of a small file system its twentieth part. A ledger grows by some
hundred bytes with each event, so that there is time to notice."""


def room(folder: Path) -> int:
    """Return the bytes that may be taken where this folder is; less than none where it is too full already.

    Raises:
        OSError: it cannot be asked.
    """
    seen = os.statvfs(folder)
    reserve = min(RESERVE_BYTES, seen.f_blocks * seen.f_frsize // RESERVE_SHARE)
    return seen.f_bavail * seen.f_frsize - reserve
