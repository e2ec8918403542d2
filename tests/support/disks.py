"""Small disks: a tmpfs in a user and mount namespace of its own, so that nobody needs to be root."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from server.config import Config

FREEZABLE_BYTES = 300 * 2**20
"""Room for a replica and the store of a node; the file has only what was written."""

MOUNT = 'mount -t tmpfs -o size={size},mode=700 small "$1" && echo mounted && exec cat'


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A mounted tmpfs.

    Attributes:
        folder: where this process, and those started with `prefix`, see it.
        prefix: the command line that starts a process where the disk is mounted.
    """

    folder: Path
    prefix: Sequence[str]

    def fill(self, free_bytes: int = 0) -> None:
        """Take all space but so much, with a file beside what is there."""
        self.drain()
        while not self._try_fill(free_bytes):  # somebody else took some of it meanwhile
            pass

    def _try_fill(self, free_bytes: int) -> bool:
        seen = os.statvfs(self.folder)
        size = max(1, seen.f_bavail * seen.f_frsize - free_bytes)
        with self._ballast.open("wb") as ballast, suppress(OSError):
            os.posix_fallocate(ballast.fileno(), 0, size)
            return True
        return seen.f_bavail == 0

    def drain(self) -> None:
        """Give the space back."""
        self._ballast.unlink(missing_ok=True)

    def copy_ledger(self, config: Config) -> Config:
        """Copy the ledger of a server that has ended to where its path means the same for everybody."""
        data = Path(os.path.realpath(self.folder)).with_name("copy")
        data.mkdir()
        for path in self.folder.glob("ledger.db*"):
            shutil.copy(path, data)
        return replace(config, data=data)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@dataclass(frozen=True, slots=True)
class FreezableDisk:
    """A disk of a file, whose writes hang while it is frozen."""

    folder: Path

    def freeze(self) -> None:
        """Let all writes hang."""
        subprocess.run(("fsfreeze", "--freeze", str(self.folder)), check=True)

    def thaw(self) -> None:
        """Let them go on, if it is frozen."""
        subprocess.run(("fsfreeze", "--unfreeze", str(self.folder)), check=False, stderr=subprocess.DEVNULL)


@contextmanager
def freezable_disk(folder: Path) -> Iterator[FreezableDisk]:
    """Mount a disk on a new folder while the block runs; the test is skipped where that is not allowed."""
    if missing := [name for name in ("mkfs.ext4", "fsfreeze") if shutil.which(name) is None]:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    image = folder.with_suffix(".img")
    folder.mkdir(mode=0o700)
    with image.open("wb") as file:
        file.truncate(FREEZABLE_BYTES)
    mount = ("mount", "-o", "loop", str(image), str(folder))
    for step in (("mkfs.ext4", "-q", str(image)), mount):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    folder.chmod(0o700)
    disk = FreezableDisk(folder)
    try:
        yield disk
    finally:
        disk.thaw()
        subprocess.run(("umount", "-l", str(folder)), check=True)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Mount a small disk on a folder while the block runs; the test is skipped where that is not allowed."""
    if missing := [name for name in ("unshare", "nsenter") if shutil.which(name) is None]:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    folder.mkdir()
    apart = ("unshare", "--user", "--map-root-user", "--mount")
    with subprocess.Popen(
        [*apart, "sh", "-c", MOUNT.format(size=size_bytes), "sh", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            if holder.stdout.readline() != "mounted\n":
                pytest.skip(f"no mounts in a user namespace here: {holder.stderr.read().strip()}")
            enter = ("nsenter", f"--target={holder.pid}", "--user", "--preserve-credentials", "--mount")
            yield SmallDisk(Path(f"/proc/{holder.pid}/root{folder}"), enter)
        finally:
            holder.stdin.close()
