"""The proc and cgroup file systems as files in a folder, and real cgroups with a limit of memory."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CGROUPS = Path("/sys/fs/cgroup")


class Files:
    """The two file systems, written where a test wants them."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.cgroups = folder / "cgroup"

    def write(self, **contents: str) -> None:
        """Write what is found under /proc: `self_cgroup`, `meminfo`, and so on, with `_` for `/`."""
        self._save(self.proc, {name.replace("_", "/"): text for name, text in contents.items()})

    def cgroup(self, contents: dict[str, str]) -> None:
        self._save(self.cgroups, contents)

    def unified(
        self, own: str, limits: dict[str, str], mount: str = "", *, limit: str = "memory.max"
    ) -> None:
        """Write a hierarchy of cgroup v2: this process's path, and what each folder's limit says."""
        self.write(self_cgroup=own)
        self.cgroup({f"{mount}cgroup.controllers": "cpuset cpu io memory pids\n"})
        self.cgroup({f"{mount}{folder}{limit}": text for folder, text in limits.items()})

    @staticmethod
    def _save(root: Path, contents: dict[str, str]) -> None:
        for path, text in contents.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)


@dataclass(frozen=True, slots=True)
class Container:
    """A real cgroup with a memory limit.

    Attributes:
        folder: its files.
        is_unified: whether it is one of cgroup v2, in which the kernel kills all processes together.
    """

    folder: Path
    is_unified: bool

    @property
    def entering(self) -> tuple[str, ...]:
        """The beginning of a command that runs in it."""
        return "sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh"

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed in it for lack of memory."""
        text = (self.folder / ("memory.events" if self.is_unified else "memory.oom_control")).read_text()
        return int(dict(map(str.split, text.splitlines()))["oom_kill"])

    @property
    def most_bytes(self) -> int:
        """The most that it has had in memory, the kernel's caches included."""
        name = "memory.peak" if self.is_unified else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())


@contextmanager
def container(limit_bytes: int) -> Iterator[Container]:
    """Make a cgroup; v2 kills its processes together. Where none can be made, the test is skipped."""
    controllers = CGROUPS / "cgroup.controllers"
    is_unified = controllers.exists() and "memory" in controllers.read_text().split()
    mount = CGROUPS if is_unified else CGROUPS / "memory"
    folder = mount / f"loadledger-{os.getpid()}-{time.monotonic_ns()}"
    limits = {"memory.limit_in_bytes": limit_bytes}
    if is_unified:
        limits = {"memory.max": limit_bytes, "memory.swap.max": 0, "memory.oom.group": 1}
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        try:
            for name, number in limits.items():
                if name != "memory.swap.max" or (folder / name).exists():
                    (folder / name).write_text(f"{number}\n")
        except OSError as error:
            pytest.skip(f"the memory of a cgroup cannot be limited here: {error}")
        yield Container(folder, is_unified)
    finally:
        while (folder / "cgroup.procs").read_text():  # the kernel still ends the processes
            time.sleep(0.01)
        folder.rmdir()
