"""The store of model versions: take, settle, find, sweep.

One process writes: the server that holds the data directory. A version gets its name when its contents are
known, and its manifest when all files are on the disk. If the process dies, the next `open` removes incoming
folders and versions without a manifest. Files of the store are never written to, so a worker keeps the files
that it has mapped, even after their removal.

All methods block: call them in threads, as many as you like.
"""

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from events.files import sync
from events.types import Contents, digest_of
from runtime.errors import DiskFull, LoadRefused, RepositoryUnreadable, RuntimeProblem
from runtime.memory import free_disk_bytes
from runtime.repository import FoundFile, VersionFolder
from runtime.store.folder import (
    FILES,
    MANIFEST,
    NO_ROOM,
    OnPiece,
    SourceRecord,
    StoredFile,
    StoredVersion,
    StoreFolder,
    copy_file,
    encode_record,
    explain_os_errors,
    has_identity,
    hash_file,
    have_identities,
    on_no_piece,
    read_record,
    read_version,
    rehash_files,
    remove,
    walk_files,
)

FREE_SHARE = 10
"""Without a limit, the store sweeps unneeded versions to leave a tenth of the file system free."""
_NO_LINKS = frozenset({errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})

FindNeeded = Callable[["Store"], Collection[str]]
FindKept = Callable[[], Collection[str]]

_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """The contents of a repository's version, and the identities of the files by which they are known."""

    contents: Contents
    files: tuple[FoundFile, ...]


class Store:
    """The store in one folder.

    `find` and `settle` hold a version until `release`; a held version is not swept.

    Args:
        folder: the folder, which `open` creates; it must not be a link.
        limit_bytes: of all blobs together; None leaves a tenth of the file system free.
        find_needed: returns digests of this store that are not swept, beside the held ones.
        find_kept: returns digests that are swept last: the repository may have other bytes by now.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int | None = None,
        find_needed: FindNeeded = lambda _: (),
        find_kept: FindKept = lambda: (),
    ) -> None:
        self._folder = StoreFolder(folder)
        self._limit_bytes = limit_bytes
        self._find_needed = find_needed
        self._find_kept = find_kept
        self._lock = threading.Lock()
        self._versions = dict[str, StoredVersion]()
        self._used_ns = dict[str, int]()
        self._held = Counter[str]()
        self._incoming_bytes = dict[Path, int]()

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def bytes(self) -> int:
        return _blob_bytes(list(self._versions.values()))

    def folder_of(self, digest: str) -> Path:
        """Return the path of a version's files, which need not exist."""
        return self._folder.version(digest) / FILES

    def open(self) -> None:
        """Create the folder, read the manifests, and remove the remains of a process that died.

        Raises:
            StoreUnavailable: `store_unavailable`.
        """
        only_ours = self._folder.make()
        with explain_os_errors(self.path):
            for path in self._folder.incoming():
                remove(path)
            for path in self._folder.versions():
                self._open_version(path, only_ours=only_ours)
            for path in list(self._folder.blobs()):
                _remove_unreferenced(path)
            for path in list(self._folder.sources()):
                record = read_record(path, SourceRecord) if only_ours else None
                if record is None or record.digest not in self._versions:
                    path.unlink(missing_ok=True)

    def take(
        self, sources: VersionFolder, files: tuple[FoundFile, ...], on_piece: OnPiece = on_no_piece
    ) -> Path:
        """Copy a version of the repository, and return the folder of its copy, to `settle` or `discard`.

        Args:
            sources: the version's open folder.
            files: of `Repository.open_version`.
            on_piece: called between pieces.

        Raises:
            LoadRefused: `unsafe_file`; `model_changed`, a file vanished or was written to meanwhile.
            DiskFull: `disk_full`, with the missing bytes.
            RuntimeProblem: `store_full`, with both figures.
            RepositoryUnreadable: `repository_unreadable`.
            StoreUnavailable: `store_unavailable`.
            CopyCancelled: `copy_cancelled`.
        """
        size = sum(file.bytes for file in files)
        with explain_os_errors(self.path), self._lock:
            copy = self._folder.new_incoming() / FILES
            self._incoming_bytes[copy] = size
        try:
            self._make_room()
            make_disk_room = cache(lambda: self._make_disk_room(size))  # once, and not for clones
            copy_bytes = partial(copy_file, before_copying=make_disk_room, on_piece=on_piece)
            with explain_os_errors(self.path, size):
                copy.mkdir(mode=0o700)
                for file in files:
                    _copy_file(sources, file, copy / file.path, copy_bytes)
            _refuse_changed(files, sources.stat_files())
        except BaseException:
            self.discard(copy)
            raise
        return copy

    def settle(self, copy: Path, files: tuple[StoredFile, ...]) -> StoredVersion:
        """Give a hashed copy its name, the digest, and hold it; files that are stored already are shared.

        The copy's folder is gone afterwards; open files stay open.

        Raises:
            StoreUnavailable: `store_unavailable`; the copy is then discarded.
        """
        version = StoredVersion(digest_of((file.path, file.sha256) for file in files), files)
        try:
            with explain_os_errors(self.path), self._lock:
                known = self._versions.get(version.digest)
                if known is None or not self._is_unchanged(known):
                    known = self._settle(copy, version)
                self._use(known.digest)
                return known
        finally:
            self.discard(copy)

    def discard(self, copy: Path) -> None:
        """Remove a copy, if it exists."""
        if os.path.lexists(copy.parent):
            remove(copy.parent)
        with self._lock:
            self._incoming_bytes.pop(copy, None)

    def make_durable(self, digest: str) -> None:
        """Sync a settled version to the disk, and write its manifest; loads may use the version meanwhile.

        Raises:
            StoreUnavailable: `store_unavailable`; the next start does not find the version.
        """
        version = self._versions.get(digest)
        folder = self._folder.version(digest)
        if version is None or (folder / MANIFEST).exists():
            return
        with explain_os_errors(self.path):
            _, folders = walk_files(folder / FILES)
            for file in version.files:
                sync(folder / FILES / file.path)
            blobs = {self._folder.blob(file.sha256).parent for file in version.files}
            for path in (*folders, folder, folder.parent, *(blob for blob in blobs if blob.exists())):
                sync(path)
            self._folder.write(folder / MANIFEST, encode_record(version), durably=True)

    def find(self, digest: str, on_piece: OnPiece = on_no_piece) -> StoredVersion | None:
        """Hold and return a stored version, or return None if the store has no such version.

        Files whose identity has changed, as after a restored backup, are hashed first. A version with other
        contents is removed.

        Raises:
            CopyCancelled: `copy_cancelled`.
        """
        with self._lock:
            version = self._versions.get(digest)
            if version is None:
                return None
            self._use(digest)
        usable = None
        try:
            usable = self._verify_for_use(version, on_piece)
        finally:
            if usable is None:
                self.release(digest)
        return usable

    def release(self, digest: str) -> None:
        """End one hold by `find` or `settle`."""
        with self._lock:
            self._held[digest] -= 1
            if self._held[digest] <= 0:
                del self._held[digest]

    def record_source(self, model_id: str, version: int, source: Source) -> None:
        """Record the stored bytes of a version of the repository; a failure costs a later copy."""
        record = SourceRecord(digest_of(source.contents), source.files)
        path = self._folder.source(model_id, version)
        if record.digest not in self._versions:
            return
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._folder.write(path, encode_record(record), durably=False)
        except OSError as error:
            _log.warning("%s could not be written: %s", path, error)

    def read_source(self, model_id: str, version: int) -> Source | None:
        """Return the latest record of a version of the repository, if its bytes are still stored."""
        record = read_record(self._folder.source(model_id, version), SourceRecord)
        stored = None if record is None else self._versions.get(record.digest)
        return None if record is None or stored is None else Source(stored.contents, record.files)

    def stored_versions(self) -> dict[str, tuple[str, ...]]:
        """Return the SHA-256 of the files of each version, by the version's digest."""
        return {
            version.digest: tuple(file.sha256 for file in version.files)
            for version in list(self._versions.values())
        }

    def _open_version(self, path: Path, *, only_ours: bool) -> None:
        version = read_version(path)
        if version is None:
            remove(path)
            return
        if not only_ours:  # identities prove nothing then: each version is hashed before its next use
            version = replace(version, files=tuple(replace(file, inode=0) for file in version.files))
        self._versions[version.digest] = version
        self._used_ns[version.digest] = _last_use(path)

    def _make_room(self) -> None:
        """Sweep versions to make room for the incoming files, within the limit.

        Raises:
            RuntimeProblem: `store_full`; nothing was swept.
        """
        if self._limit_bytes is None:
            return
        with self._lock:
            taken_bytes = sum(self._incoming_bytes.values())
            if self.bytes + taken_bytes <= self._limit_bytes:
                return
            unneeded = self._list_unneeded()
            kept_bytes = _blob_bytes(self._versions[each] for each in self._versions.keys() - set(unneeded))
            if kept_bytes + taken_bytes > self._limit_bytes:
                raise RuntimeProblem(
                    f"the version takes {taken_bytes} bytes, and the store may take {self._limit_bytes}, of"
                    f" which {kept_bytes} are needed by other models: raise --store-size, or unload some",
                    code="store_full",
                )
            for digest in unneeded:
                if self.bytes + taken_bytes > self._limit_bytes:
                    self._remove_version(digest)

    def _make_disk_room(self, size: int) -> None:
        """Sweep versions until the disk has room.

        Without a limit, versions are swept until a tenth of the disk stays free.

        Raises:
            DiskFull: `disk_full`, with the missing bytes.
        """
        with self._lock, explain_os_errors(self.path):
            if self._has_disk_room(size):
                return
            for digest in self._list_unneeded():
                self._remove_version(digest)
                if self._has_disk_room(size):
                    return
            if (free_bytes := free_disk_bytes(self.path)) < size:
                raise DiskFull(size, free_bytes)

    def _has_disk_room(self, size: int) -> bool:
        if free_disk_bytes(self.path) < size:
            return False
        if self._limit_bytes is not None:
            return True
        seen = os.statvfs(self.path)
        return (seen.f_bavail - seen.f_blocks // FREE_SHARE) * seen.f_frsize >= size

    def _list_unneeded(self) -> list[str]:
        """Return the digests of versions that may be swept, least recently used first, kept ones at last."""
        needed, kept = {*self._find_needed(self), *self._held}, frozenset(self._find_kept())
        rank = {each: (each in kept, self._used_ns.get(each, 0), each) for each in self._versions}
        return sorted(self._versions.keys() - needed, key=rank.__getitem__)

    def _settle(self, copy: Path, version: StoredVersion) -> StoredVersion:
        """Share blobs, and rename the incoming folder; returns the version with the files' identities."""
        blobs = {file.sha256: file for known in self._versions.values() for file in known.files}
        files = tuple(self._share(copy / file.path, file, blobs) for file in version.files)
        path = self._folder.version(version.digest)
        if os.path.lexists(path):
            self._remove_version(version.digest)
        copy.parent.rename(path)
        self._versions[version.digest] = settled = replace(version, files=files)
        return settled

    def _share(self, path: Path, file: StoredFile, known: dict[str, StoredFile]) -> StoredFile:
        """Make a file and its blob one; a blob that differs from its record is replaced."""
        blob = self._folder.blob(file.sha256)
        try:
            blob.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                os.link(path, blob, follow_symlinks=False)
            except FileExistsError:
                stored = known.get(file.sha256)
                if stored is None or not has_identity(blob.lstat(), stored):
                    self._folder.link_over(path, blob)
                else:
                    self._folder.link_over(blob, path)
                    return replace(stored, path=file.path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise  # on a file system without more links, the version keeps a file of its own
        return file

    def _verify_for_use(self, version: StoredVersion, on_piece: OnPiece) -> StoredVersion | None:
        if self._is_unchanged(version):
            return version
        folder = self.folder_of(version.digest)
        try:
            files = rehash_files(folder, version.files, on_piece)
        except OSError as error:
            _log.warning("%s cannot be read: %s", folder, error)
            files = None
        with self._lock:
            if files is None:
                if self._versions.get(version.digest) is version:
                    _log.warning("%s is not what was stored there: removed", folder)
                    self._remove_version(version.digest)
                return None
            renewed = replace(version, files=files)
            self._versions[version.digest] = renewed
            if (folder.parent / MANIFEST).exists():
                with suppress(OSError):  # after a failure the next start hashes the file again
                    self._folder.write(folder.parent / MANIFEST, encode_record(renewed), durably=True)
        return renewed

    def _is_unchanged(self, version: StoredVersion) -> bool:
        return have_identities(self.folder_of(version.digest), version.files)

    def _remove_version(self, digest: str) -> None:
        """Remove a version and the blobs that no other version has; the caller holds the lock."""
        version = self._versions.pop(digest, None)
        self._used_ns.pop(digest, None)
        self._folder.take_out(self._folder.version(digest))
        for file in version.files if version is not None else ():
            _remove_unreferenced(self._folder.blob(file.sha256))

    def _use(self, digest: str) -> None:
        """Count a use and a hold; the caller holds the lock."""
        self._held[digest] += 1
        self._used_ns[digest] = used_ns = max(time.time_ns(), self._used_ns.get(digest, 0))
        with suppress(OSError):  # no manifest yet: its later time of writing counts
            os.utime(self._folder.version(digest) / MANIFEST, ns=(used_ns, used_ns), follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class VerifiedVersion:
    """A version whose files were hashed; `findings` has a line for each defect."""

    digest: str
    bytes: int
    findings: tuple[str, ...]


def verify_store(folder: Path) -> Iterator[VerifiedVersion]:
    """Hash all versions of a store, even those with their recorded identities, and yield each.

    Reads only, so it may run beside the server. A version that is swept meanwhile, or whose manifest is still
    to be written, is left out.

    Raises:
        StoreUnavailable: `store_unavailable`, the folder cannot be listed.
    """
    store = StoreFolder(folder)
    with explain_os_errors(folder):
        paths = store.versions()
    for path in paths:
        if not os.path.lexists(path / MANIFEST):
            continue
        version = read_version(path)
        findings = ("its manifest is damaged",) if version is None else tuple(_verify(path / FILES, version))
        if os.path.lexists(path):
            size = 0 if version is None else sum(file.bytes for file in version.files)
            yield VerifiedVersion(path.name, size, findings)


def _verify(folder: Path, version: StoredVersion) -> Iterator[str]:
    try:
        found = set(walk_files(folder)[0])
    except OSError as error:
        yield f"its files cannot be listed: {error.strerror}"
        return
    for path, sha256 in version.contents:
        try:
            if path not in found:
                yield f"{path!r} is missing"
            elif (seen := hash_file(folder, path)).sha256 != sha256:
                yield f"{path!r} has SHA-256 {seen.sha256} instead of {sha256}"
        except OSError as error:
            yield f"{path!r} cannot be read: {error.strerror}"
    for path in sorted(found - dict(version.contents).keys()):
        yield f"{path!r} is not of this version"


def _blob_bytes(versions: Iterable[StoredVersion]) -> int:
    """Return the size of the versions' blobs, each counted once."""
    return sum({file.sha256: file.bytes for version in versions for file in version.files}.values())


def _copy_file(
    sources: VersionFolder, file: FoundFile, target: Path, copy_bytes: Callable[[int, int, int], int]
) -> None:
    with sources.open_file(file.path, file) as source:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            copied = copy_bytes(source, written, file.bytes)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise RepositoryUnreadable(f"{file.path!r} cannot be copied: {error.strerror}") from None
        finally:
            os.close(written)
    if copied != file.bytes:
        raise LoadRefused(
            "model_changed",
            f"{file.path!r} had {file.bytes} bytes and ended after {copied} when it was copied",
        )


def _refuse_changed(before: Iterable[FoundFile], now: Iterable[FoundFile]) -> None:
    """Refuse a mix of two versions: a file was replaced or written to while others were copied.

    Links and access rights may change meanwhile, and so the ctime.

    Raises:
        LoadRefused: `model_changed`.
    """
    if [replace(file, ctime_ns=0) for file in before] != [replace(file, ctime_ns=0) for file in now]:
        raise LoadRefused(
            "model_changed",
            "the model's files changed while they were copied: load it again when they are complete",
        )


def _last_use(folder: Path) -> int:
    """Return when a version or form was last used, in nanoseconds, or 0 without a manifest."""
    try:
        return (folder / MANIFEST).lstat().st_mtime_ns
    except OSError:
        return 0


def _remove_unreferenced(blob: Path) -> None:
    with suppress(FileNotFoundError):
        if blob.lstat().st_nlink == 1:
            remove(blob)
