"""How large the store may become, and which versions are swept for another one."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.memory import free_disk_bytes
from runtime.store.manifest import StoredFile
from runtime.store.problems import DiskFull, StoreFull

FREE_SHARE = 10
"""Without a limit, the store sweeps what nothing needs to leave a tenth of the file system free."""


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """A version as the bounds see it."""

    digest: str
    used_ns: int
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class KeptVersions:
    """The versions that a store keeps at the moment.

    Attributes:
        versions: all of them.
        is_needed: whether the version of a digest must not be swept.
        sweep: removes the version of a digest.
    """

    versions: Sequence[KeptVersion]
    is_needed: Callable[[str], bool]
    sweep: Callable[[str], None]

    def unneeded(self) -> list[KeptVersion]:
        """Return the versions that may be swept, least recently used first."""
        unneeded = [version for version in self.versions if not self.is_needed(version.digest)]
        return sorted(unneeded, key=lambda version: (version.used_ns, version.digest))


class StoreBounds:
    """Chooses the versions to sweep; those with a file in common share its blob.

    Args:
        folder: the store's folder, on the disk that is meant.
        limit_bytes: of all blobs together; None sweeps what is needed to leave a tenth of the disk free.
    """

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self._folder = folder
        self.limit_bytes = limit_bytes

    def make_room(self, needed_bytes: int, kept: KeptVersions) -> None:
        """Sweep versions for this many bytes within the limit; does nothing without a limit.

        Raises:
            StoreFull: `store_full`; nothing was swept.
        """
        if self.limit_bytes is None:
            return
        blobs = _Blobs(version.files for version in kept.versions)
        if blobs.bytes + needed_bytes <= self.limit_bytes:
            return
        for_good = _Blobs(each.files for each in kept.versions if kept.is_needed(each.digest)).bytes
        if for_good + needed_bytes > self.limit_bytes:
            raise StoreFull(needed_bytes, for_good, self.limit_bytes)
        for version in kept.unneeded():
            if blobs.bytes + needed_bytes <= self.limit_bytes:
                break
            kept.sweep(version.digest)
            blobs.drop(version.files)

    def make_disk_room(self, needed_bytes: int, kept: KeptVersions) -> None:
        """Sweep versions until the disk has room, and without a limit until a tenth of it stays free.

        Raises:
            DiskFull: `disk_full`, saying how much is missing.
            OSError: the file system cannot be queried.
        """
        if self._has_room(needed_bytes):
            return
        for version in kept.unneeded():
            kept.sweep(version.digest)
            if self._has_room(needed_bytes):
                return
        free_bytes = free_disk_bytes(self._folder)
        if free_bytes < needed_bytes:
            raise DiskFull(needed_bytes, free_bytes)

    def _has_room(self, needed_bytes: int) -> bool:
        if free_disk_bytes(self._folder) < needed_bytes:
            return False
        if self.limit_bytes is not None:
            return True
        seen = os.statvfs(self._folder)
        return (seen.f_bavail - seen.f_blocks // FREE_SHARE) * seen.f_frsize >= needed_bytes


class _Blobs:
    """The blobs of some versions, each counted once."""

    def __init__(self, versions: Iterable[Collection[StoredFile]]) -> None:
        self._links = Counter[str]()
        self._sizes = dict[str, int]()
        for files in versions:
            for file in files:
                self._links[file.sha256] += 1
                self._sizes[file.sha256] = file.bytes
        self.bytes = sum(self._sizes.values())

    def drop(self, files: Iterable[StoredFile]) -> None:
        for file in files:
            self._links[file.sha256] -= 1
            if not self._links[file.sha256]:
                self.bytes -= self._sizes[file.sha256]
