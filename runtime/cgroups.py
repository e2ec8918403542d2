"""The control groups of this process, v1 and v2: where their files are, and the CPUs that it may use.

A CPU quota limits the processor time of all threads together. With more threads than the quota has CPUs'
worth of time, all threads stand still until the next period; so the quota counts as CPUs, rounded down.

Control groups differ between machines and containers (cgroups(7), cgroup_namespaces(7); "Control Group v2"
and "CFS Bandwidth Control" in the kernel's documentation), so unreadable files are empty.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

MAX_FILE_CHARACTERS = 64 * 1024
"""More than the length of these files, a few kilobytes."""

_MICROSECONDS = re.compile(r"[1-9]\d{0,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CgroupFolders:
    """The folders of a process's cgroup and of its parents, up to the mount, nearest first.

    Attributes:
        unified: folders in the hierarchy of cgroup v2.
        v1: folders in the v1 hierarchy of one controller.
    """

    unified: Sequence[Path]
    v1: Sequence[Path]


def count_usable_cpus() -> int:
    """Return how many CPUs this process may use, at least 1: of its affinity, and within its CPU quotas.

    A cpuset restricts the affinity. A few small reads, less than a millisecond together.
    """
    cpus = len(os.sched_getaffinity(0))
    return min(cpus, find_cpu_quota() or cpus)


def find_cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the least CPU quota of this process's cgroups and their parents, in CPUs, or None."""
    folders = find_folders("cpu", proc, cgroups)
    texts = [read_text(folder / "cpu.max").partition(" ")[::2] for folder in folders.unified]
    texts += [
        (read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us"))
        for folder in folders.v1
    ]
    return min((cpus for text in texts if (cpus := parse_quota(*text)) is not None), default=None)


def parse_quota(quota: str, period: str) -> int | None:
    """Return the CPUs of a quota, rounded down and at least 1, or None without a valid quota.

    Args:
        quota: microseconds of processor time in each period; `max` (v2) and -1 (v1) are no limit.
        period: in microseconds.
    """
    found = [_MICROSECONDS.fullmatch(text.strip()) for text in (quota, period)]
    quota_us, period_us = (0 if each is None else int(each[0]) for each in found)
    return max(1, quota_us // period_us) if quota_us and period_us else None


def find_folders(controller: str, proc: Path, cgroups: Path) -> CgroupFolders:
    """Return the folders of this process's cgroups; files in them may be missing.

    Args:
        controller: the v1 hierarchy, which is mounted under its name: `memory` or `cpu`.
        proc: the mount of the proc file system.
        cgroups: the mount of cgroup v2, or the parent of the v1 hierarchies.
    """
    unified, v1 = parse_cgroups(read_text(proc / "self/cgroup"), controller)
    mount = _unified_mount(cgroups)
    return CgroupFolders(_list_parents(mount, unified), _list_parents(cgroups / controller, v1))


def parse_cgroups(text: str, controller: str) -> tuple[str, str]:
    """Read the text of /proc/self/cgroup: lines of `hierarchy:controllers:path`.

    Returns:
        The cgroups in the unified hierarchy and in the v1 hierarchy of a controller; `/` if unknown.
    """
    unified = v1 = "/"
    for line in text.split("\n"):
        match line.split(":", 2):
            case ["0", "", path]:
                unified = path
            case [_, controllers, path] if controller in controllers.split(","):
                v1 = path
    return unified, v1


def read_text(file: Path) -> str:
    """Read the beginning of a file; an unreadable file is empty (ValueError: a path with a NUL)."""
    try:
        with file.open(encoding="utf-8", errors="surrogateescape") as opened:
            return opened.read(MAX_FILE_CHARACTERS)
    except (OSError, ValueError):
        return ""


def _list_parents(mount: Path, own: str) -> Sequence[Path]:
    # A path with `..` is outside of what is mounted here (cgroup_namespaces(7)).
    parts = [part for part in own.split("/") if part]
    depth = 0 if ".." in parts else len(parts)
    return [mount.joinpath(*parts[:count]) for count in range(depth, -1, -1)]


def _unified_mount(cgroups: Path) -> Path:
    """Return the mount of cgroup v2: `cgroups`, or a folder in it (systemd's hybrid mode)."""
    return cgroups if read_text(cgroups / "cgroup.controllers") else cgroups / "unified"
