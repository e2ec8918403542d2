"""How much memory a process takes; read from /proc, in bytes.

A worker's own memory is its private dirty pages: what the machine gets back when the process ends, and not
before. Pages that it still shares with the fork server are not its own, nor those that are as their file has
them, as mapped weights are: the kernel takes these back whenever it needs them.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
