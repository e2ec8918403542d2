"""How much memory a process, or a tree of them, takes; read from /proc, in bytes.

A worker's own memory is its private dirty pages: what the machine gets back when the process ends, and not
before. Pages that it still shares with the fork server are not its own, nor those that are as their file has
them, as mapped weights are: the kernel takes these back whenever it needs them. Of a whole tree the
proportional size (PSS) is summed, so that what is shared counts once.
"""

import os
from collections.abc import Iterator
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


def tree_bytes(pid: int) -> int:
    """Measure a process with all its descendants: the sum of their proportional set sizes.

    A descendant that ends while this reads counts as nothing; of the root that is an error.

    Raises:
        ProcessLookupError: the process is gone.
    """
    total = parse_pss(_read(f"{pid}/smaps_rollup"))
    for child in descendants(pid):
        try:
            total += parse_pss(_read(f"{child}/smaps_rollup"))
        except ProcessLookupError:
            continue
    return total


def descendants(pid: int) -> list[int]:
    """List the process ids of all descendants of a process, parents before children."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found = list(children.get(pid, ()))
    for child in found:  # grows while it is walked: breadth first
        found.extend(children.get(child, ()))
    return found


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


def parse_pss(smaps_rollup: str) -> int:
    """Read the proportional set size in the text of a smaps_rollup file, in bytes."""
    return parse_field(smaps_rollup, "Pss")


def parse_field(text: str, name: str) -> int:
    """Read one field that /proc gives in kB, in bytes; 0 when it is not there (a zombie has none)."""
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return _kilobytes(line) * 1024
    return 0


def parse_parent(stat: str) -> int:
    """Read the parent's process id in the text of a stat file, whatever the command is called.

    The name stands in brackets and may itself hold spaces and brackets; after the last one come the state
    and the parent (proc_pid_stat(5)).
    """
    return int(stat[stat.rindex(")") + 1 :].split()[1])


def _parents() -> Iterator[tuple[int, int]]:
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            try:
                yield int(entry.name), parse_parent(_read(f"{entry.name}/stat"))
            except ProcessLookupError:
                continue


def _kilobytes(line: str) -> int:
    return int(line.split()[1])


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
