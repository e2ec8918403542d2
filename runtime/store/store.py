"""The store of model versions: take, hash, settle, find, sweep.

One process writes: the server that holds the data directory. A version gets its name only when its contents
are known, and its manifest when all of it is on the disk; a process that dies leaves incoming folders and
versions without a manifest, which the next `open` removes. Files of the store are never written to, so a
worker keeps what it has mapped, even when it is removed.

All methods block, so call them in threads, as many as you like.
"""

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from msgspec.structs import replace

from events.audit.files import sync
from runtime.repository import FoundFile
from runtime.store.bounds import KeptVersion, KeptVersions, StoreBounds
from runtime.store.copying import (
    FileCopier,
    IsCancelled,
    refuse_truncated,
)
from runtime.store.folder import FILES, NO_ROOM, StoreFolder, explain_os_errors, remove, walk_files
from runtime.store.identities import has_identity, hash_file, have_identities, is_never, rehash_files
from runtime.store.manifest import (
    MANIFEST,
    SourceRecord,
    StoredFile,
    StoredManifest,
    StoredVersion,
    describe_sources,
    digest_of,
    encode_record,
    read_source_record,
    read_version_manifest,
)
from runtime.store.problems import DiskFull, RepositoryUnreadable
from runtime.store.sources import SourceFolder, refuse_changed

_NO_LINKS = frozenset({errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})

FindNeeded = Callable[[], Collection[str]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TakenCopy:
    """A private copy that has no name yet: its folder, and the repository's files as they were copied."""

    path: Path
    sources: tuple[FoundFile, ...]

    @property
    def folder(self) -> Path:
        """The folder of the files, to load from."""
        return self.path / FILES

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.bytes for file in self.sources)


class Store:
    """The store in one folder.

    `find` and `settle` hold a version until `release`, so that it is not swept while it is being used.

    Args:
        folder: the folder, which `open` creates; it must not be a link.
        limit_bytes: of all blobs together; None is what leaves a tenth of the file system free.
        now_ns: the time in nanoseconds since 1970.
    """

    def __init__(
        self, folder: Path, limit_bytes: int | None = None, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._folder = StoreFolder(folder)
        self._bounds = StoreBounds(self._folder.path, limit_bytes)
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._versions = dict[str, StoredManifest]()
        self._used_ns = dict[str, int]()
        self._held = Counter[str]()
        self._incoming_bytes = dict[Path, int]()

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._folder.path

    @property
    def bytes(self) -> int:
        """The size of all blobs together."""
        manifests = list(self._versions.values())
        return sum({file.sha256: file.bytes for manifest in manifests for file in manifest.files}.values())

    def open(self) -> None:
        """Create the folder, read the manifests, and remove what a process that died has left.

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
                record = read_source_record(path) if only_ours else None
                if record is None or record.digest not in self._versions:
                    path.unlink(missing_ok=True)
            for path in self._folder.foreign_names():
                _log.warning("%s is nothing of the store's: left alone", path)

    def take(
        self,
        sources: SourceFolder,
        files: tuple[FoundFile, ...],
        find_needed: FindNeeded = frozenset,
        is_cancelled: IsCancelled = is_never,
    ) -> TakenCopy:
        """Copy a version of the repository into an incoming folder.

        Args:
            sources: the version's open folder.
            files: what a look at it found; see `open_version`.
            find_needed: returns digests that are not swept for it, beside those held; asked if one must be.
            is_cancelled: asked between pieces.

        Returns:
            The copy, to `settle` or `discard`.

        Raises:
            LoadRefused: `unsafe_file`; `model_changed`, a file vanished or was written to while it was
                copied.
            DiskFull: `disk_full`, with what is missing.
            StoreFull: `store_full`, with both figures.
            RepositoryUnreadable: `repository_unreadable`.
            StoreUnavailable: `store_unavailable`.
            CopyCancelled: `copy_cancelled`.
        """
        size = sum(file.bytes for file in files)
        with explain_os_errors(self.path), self._lock:
            path = self._folder.new_incoming()
            self._incoming_bytes[path] = size
        try:
            self._make_room(find_needed)
            copier = FileCopier(lambda: self._make_disk_room(size, find_needed), is_cancelled)
            with explain_os_errors(self.path, size):
                (path / FILES).mkdir(mode=0o700)
                for file in files:
                    _copy_file(copier, sources, file, path / FILES / file.path)
            refuse_changed(files, sources.stat_files())
        except BaseException:
            self._drop_incoming(path)
            raise
        return TakenCopy(path, files)

    def hash_copy(self, taken: TakenCopy, is_cancelled: IsCancelled = is_never) -> tuple[StoredFile, ...]:
        """Hash the files of a private copy, in order of their paths.

        Raises:
            StoreUnavailable: `store_unavailable`, the copy cannot be read.
            CopyCancelled: `copy_cancelled`.
        """
        with explain_os_errors(self.path):
            return tuple(hash_file(taken.folder, file.path, is_cancelled) for file in taken.sources)

    def settle(self, taken: TakenCopy, files: tuple[StoredFile, ...]) -> StoredVersion:
        """Give a hashed copy its name, the digest, and hold it; files that are stored already are shared.

        The copy's folder is gone afterwards. What has it open keeps it.

        Raises:
            StoreUnavailable: `store_unavailable`; the copy is then discarded.
        """
        manifest = StoredManifest(digest_of((file.path, file.sha256) for file in files), files)
        try:
            with explain_os_errors(self.path), self._lock:
                known = self._versions.get(manifest.digest)
                if known is None or not self._is_unchanged(known):
                    known = self._settle(taken, manifest)
                self._use(known.digest)
                return self._describe(known)
        finally:
            self._drop_incoming(taken.path)

    def make_durable(self, digest: str) -> None:
        """Sync a settled version to the disk, and write its manifest; it may serve meanwhile.

        Raises:
            StoreUnavailable: `store_unavailable`; the next start does not find the version.
        """
        manifest = self._versions.get(digest)
        folder = self._folder.version(digest)
        if manifest is None or (folder / MANIFEST).exists():
            return
        with explain_os_errors(self.path):
            _, folders = walk_files(folder / FILES)
            for file in manifest.files:
                sync(folder / FILES / file.path)
            blobs = {self._folder.blob(file.sha256).parent for file in manifest.files}
            for path in (*folders, folder, folder.parent, *(blob for blob in blobs if blob.exists())):
                sync(path)
            self._folder.write(folder / MANIFEST, encode_record(manifest), durably=True)

    def discard(self, taken: TakenCopy) -> None:
        """Remove a copy that is not settled."""
        self._drop_incoming(taken.path)

    def find(
        self, digest: str, is_cancelled: IsCancelled = is_never, *, rehashes: bool = True
    ) -> StoredVersion | None:
        """Return a stored version, and hold it; None if it is not there.

        Files whose identity has changed, as after a restored backup, are hashed before, or count as not there
        if nothing is to be hashed. With another content the version is removed.

        Raises:
            CopyCancelled: `copy_cancelled`.
        """
        with self._lock:
            manifest = self._versions.get(digest)
            if manifest is None:
                return None
            self._use(digest)
        try:
            usable = self._verify_for_use(manifest, is_cancelled, rehashes=rehashes)
        except BaseException:
            self.release(digest)
            raise
        if usable is None:
            self.release(digest)
            return None
        return self._describe(usable)

    def release(self, digest: str) -> None:
        """End the hold of one `find` or `settle`."""
        with self._lock:
            self._held[digest] -= 1
            if self._held[digest] <= 0:
                del self._held[digest]

    def record_source(self, model_id: str, version: int, sources: Sequence[FoundFile], digest: str) -> None:
        """Record from which files of the repository a settled version was taken; a failure costs a copy."""
        path = self._folder.source(model_id, version)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            record = SourceRecord(digest, describe_sources(sources))
            self._folder.write(path, encode_record(record), durably=False)
        except OSError as error:
            _log.warning("%s could not be written: %s", path, error)

    def read_source(self, model_id: str, version: int) -> SourceRecord | None:
        """Return what was taken last from a version of the repository, if it is still stored."""
        record = read_source_record(self._folder.source(model_id, version))
        return record if record is not None and record.digest in self._versions else None

    def find_source(self, model_id: str, version: int, files: Sequence[FoundFile]) -> str | None:
        """Return the digest that was taken from these very files; None if they changed, or it is gone."""
        record = self.read_source(model_id, version)
        return record.digest if record is not None and record.is_of(files) else None

    def contents(self, digest: str) -> tuple[tuple[str, str], ...] | None:
        """Return path and SHA-256 of each file of a stored version; None if it is not there."""
        manifest = self._versions.get(digest)
        return None if manifest is None else tuple((file.path, file.sha256) for file in manifest.files)

    def _open_version(self, path: Path, *, only_ours: bool) -> None:
        manifest = read_version_manifest(path)
        if manifest is None:
            remove(path)
            return
        if not only_ours:  # identities prove nothing then: all is hashed before its next use
            manifest = replace(manifest, files=tuple(replace(file, inode=0) for file in manifest.files))
        self._versions[manifest.digest] = manifest
        with suppress(OSError):
            self._used_ns[manifest.digest] = (path / MANIFEST).stat().st_mtime_ns

    def _make_room(self, find_needed: FindNeeded) -> None:
        with self._lock:
            self._bounds.make_room(sum(self._incoming_bytes.values()), self._kept(find_needed))

    def _make_disk_room(self, size: int, find_needed: FindNeeded) -> None:
        """Sweep versions, then evict optimised forms, which are only a cache, until the disk has room."""
        with self._lock, explain_os_errors(self.path):
            forms = sorted(self._folder.forms(), key=_last_use)
            while True:
                try:
                    return self._bounds.make_disk_room(size, self._kept(find_needed))
                except DiskFull:
                    if not forms:
                        raise
                    self._remove(forms.pop(0))

    def _kept(self, find_needed: FindNeeded) -> KeptVersions:
        needed = cache(find_needed)  # found once, if at all
        versions = [
            KeptVersion(digest, self._used_ns.get(digest, 0), manifest.files)
            for digest, manifest in self._versions.items()
        ]
        return KeptVersions(
            versions, lambda digest: digest in self._held or digest in needed(), self._remove_version
        )

    def _settle(self, taken: TakenCopy, manifest: StoredManifest) -> StoredManifest:
        """Share blobs, and rename the incoming folder; returns the manifest with the files' identities."""
        blobs = self._known_blobs()
        files = tuple(self._share(taken.folder / file.path, file, blobs) for file in manifest.files)
        path = self._folder.version(manifest.digest)
        if os.path.lexists(path):
            self._remove_version(manifest.digest)
        taken.path.rename(path)
        settled = replace(manifest, files=files)
        self._versions[manifest.digest] = settled
        return settled

    def stored_versions(self) -> dict[str, tuple[str, ...]]:
        """Return the SHA-256 of the files of each version, by the version's digest."""
        return {
            manifest.digest: tuple(file.sha256 for file in manifest.files)
            for manifest in list(self._versions.values())
        }

    def _known_blobs(self) -> dict[str, StoredFile]:
        return {file.sha256: file for manifest in self._versions.values() for file in manifest.files}

    def _share(self, path: Path, file: StoredFile, known: dict[str, StoredFile]) -> StoredFile:
        """Make a file and its blob one; a blob that is not as it was recorded is replaced."""
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
                raise  # where there are no more links, or none at all, the version keeps a file of its own
        return file

    def _verify_for_use(
        self, manifest: StoredManifest, is_cancelled: IsCancelled, *, rehashes: bool
    ) -> StoredManifest | None:
        if self._is_unchanged(manifest):
            return manifest
        if not rehashes:
            return None
        folder = self._folder.version(manifest.digest) / FILES
        try:
            files = rehash_files(folder, manifest.files, is_cancelled)
        except OSError as error:
            _log.warning("%s cannot be read: %s", folder, error)
            files = None
        with self._lock:
            if files is None:
                if self._versions.get(manifest.digest) is manifest:
                    _log.warning("%s is not what was stored there: removed", folder)
                    self._remove_version(manifest.digest)
                return None
            renewed = replace(manifest, files=files)
            self._versions[manifest.digest] = renewed
            if (folder.parent / MANIFEST).exists():
                with suppress(OSError):  # then the next start hashes it again
                    self._folder.write(folder.parent / MANIFEST, encode_record(renewed), durably=True)
        return renewed

    def _is_unchanged(self, manifest: StoredManifest) -> bool:
        return have_identities(self._folder.version(manifest.digest) / FILES, manifest.files)

    def _remove_version(self, digest: str) -> None:
        """Remove a version and the blobs that no other has; the caller holds the lock."""
        manifest = self._versions.pop(digest, None)
        self._used_ns.pop(digest, None)
        self._remove(self._folder.version(digest))
        for file in manifest.files if manifest is not None else ():
            _remove_unreferenced(self._folder.blob(file.sha256))

    def _remove(self, path: Path) -> None:
        away = self._folder.move_away(path)
        if away is not None:
            remove(away)

    def _drop_incoming(self, path: Path) -> None:
        if os.path.lexists(path):
            remove(path)
        with self._lock:
            self._incoming_bytes.pop(path, None)

    def _use(self, digest: str) -> None:
        """Count a use and a hold; the caller has the lock."""
        self._held[digest] += 1
        self._used_ns[digest] = used_ns = max(self._now_ns(), self._used_ns.get(digest, 0))
        with suppress(OSError):  # no manifest yet: then the time that it is written counts
            os.utime(self._folder.version(digest) / MANIFEST, ns=(used_ns, used_ns), follow_symlinks=False)

    def _describe(self, manifest: StoredManifest) -> StoredVersion:
        return StoredVersion(manifest.digest, self._folder.version(manifest.digest) / FILES, manifest.files)


def _copy_file(copier: FileCopier, sources: SourceFolder, file: FoundFile, target: Path) -> None:
    with sources.open_file(file) as source:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            copied = copier.copy(source, written, file.bytes)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise RepositoryUnreadable(f"{file.path!r} cannot be copied: {error.strerror}") from None
        finally:
            os.close(written)
        refuse_truncated(file.path, file.bytes, copied)


def _last_use(folder: Path) -> int:
    """Return when a form was last used, in nanoseconds since 1970; one without a manifest never was."""
    try:
        return (folder / MANIFEST).lstat().st_mtime_ns
    except OSError:
        return 0


def _remove_unreferenced(blob: Path) -> None:
    with suppress(FileNotFoundError):
        if blob.lstat().st_nlink == 1:
            remove(blob)
