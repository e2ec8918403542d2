"""Optimised models in the store, `<data>/store/forms/<key>/`: each complete or absent, evicted by last use.

One process writes: the server that holds the data directory. A worker writes to an incoming folder; when all
of it is on the disk, that takes the key as its name in one step, and a removed entry loses its name first. So
a killed process leaves only incoming folders, which the next `open` removes. Other processes may list and
clear meanwhile: to a reader, an entry that vanishes or is damaged was never there. Workers keep removed files
that they have mapped, since no file of an entry is ever written to.

All methods of the store block, so call them in threads, as many as you like.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from events.clock import format_timestamp
from events.files import sync
from events.types import digest_of
from runtime.errors import DiskFull, StoreUnavailable
from runtime.memory import free_disk_bytes
from runtime.onnxfile import MODEL_FILE
from runtime.optimised.key import LAYOUT
from runtime.store.folder import (
    FILES,
    MANIFEST,
    StoredFile,
    StoreFolder,
    encode_record,
    explain_os_errors,
    hash_files,
    have_identities,
    read_record,
    rehash_files,
    remove,
    walk_files,
)
from runtime.wire import Count, Name, OptimisedModel, ProviderNodes, Sha256, Text, Time, plain_text

BESIDE = re.compile(r"weights\.bin|model_\w{1,64}\.bin", re.ASCII)
"""Beside `MODEL_FILE`, the only file of an optimised model: of weights, or what a device's provider wrote."""
MAX_USELESS = 1_000
"""Limit of useless entries. Each takes a folder and a file; a forgotten one costs one more attempt."""
USELESS_KNOWN_S = 86_400
"""A day: how long a reason against an optimised model holds. Some are measured, and the machine was busy."""
STORE_PROBLEMS = (StoreUnavailable, DiskFull, OSError)
"""Errors of a full, broken or foreign disk; models load without optimised ones then."""
MAX_TIME_S = 250_000_000_000
"""In the year 9892: a file's time may be later, but has no timestamp then."""
_log = logging.getLogger(__name__)


class Useless(Exception):
    """An optimised model is of no use, or cannot be made or tried; the message is the reason."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The stored record of a key: an optimised model, or why it is useless.

    An invalid one counts as none, so that a damaged or foreign folder is never used.

    Attributes:
        key: the folder's name, made by `make_key`.
        model_id: the model that it was made of, for people; models with the same files share it.
        version: the version of that model.
        device: where it is loaded; not stored for the CPU.
        made_ns: when it was kept or found useless, in nanoseconds since 1970.
        took_ms: duration of making and trying it.
        files: those of the optimised model; none if it is useless.
        sha256: their hash, made by `digest_of`; None if it is useless.
        placed: of one for a device, as `OptimisedModel` has it.
        figures: measurements of the trial.
        reason: why it is useless, else None.
        used_ns: last use; when it is read, the time of the file.
    """

    layout: Literal[5] = LAYOUT
    key: Sha256
    model_id: Name
    version: Count
    device: Name | UnsetType = UNSET
    made_ns: Time = 0
    took_ms: Count = 0
    files: tuple[StoredFile, ...] = ()
    sha256: Sha256 | None = None
    placed: tuple[ProviderNodes, ...] | UnsetType = UNSET
    figures: Annotated[dict[Name, int], msgspec.Meta(max_length=64)] = {}
    reason: Text | None = None
    used_ns: Time = 0

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def made_at(self) -> str:
        return _timestamp_of(self.made_ns)

    @property
    def used_at(self) -> str:
        return _timestamp_of(self.used_ns)

    def optimised_model(self, folder: Path) -> OptimisedModel | None:
        """Return the optimised model whose files lie in a folder; None if it is useless."""
        if self.sha256 is None:
            return None
        placed = () if self.placed is UNSET else self.placed
        return OptimisedModel(self.key, self.sha256, str(folder), self.bytes, placed)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of an entry's folder, but not its files; None if there is no valid one."""
    manifest = read_record(folder / MANIFEST, Manifest)
    if manifest is None or manifest.key != folder.name or not _is_sound(manifest):
        return None
    try:
        return replace(manifest, used_ns=(folder / MANIFEST).lstat().st_mtime_ns)
    except OSError:
        return None


def _is_sound(manifest: Manifest) -> bool:
    if manifest.reason is not None:
        return manifest.sha256 is None and not manifest.files
    contents = [(file.path, file.sha256) for file in manifest.files]
    return _are_complete([path for path, _ in contents]) and digest_of(contents) == manifest.sha256


def _are_complete(paths: list[str]) -> bool:
    model, beside = paths[:1], "/".join(paths[1:])  # several match nothing
    return model == [MODEL_FILE] and (not beside or BESIDE.fullmatch(beside) is not None)


def _timestamp_of(time_ns: int) -> str:
    return format_timestamp(datetime.fromtimestamp(min(max(time_ns / 1e9, 0), MAX_TIME_S), UTC))


class OptimisedStore:
    """The optimised models in the folder of a store.

    `find` and `use` never fail because of the folder's content. The other methods raise `StoreUnavailable` or
    `DiskFull` for every refusal of the file system.

    Args:
        folder: the store's folder, which `open` creates; it must not be a link.
        limit_bytes: the size of all of them together. Drafts, and removed files that a worker has mapped, are
            not counted.
        now_ns: the time in nanoseconds since 1970.

    Attributes:
        kept: their number and size, as of the last change by this process.
    """

    def __init__(self, folder: Path, limit_bytes: int, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._folder = StoreFolder(folder)
        self._lock = threading.Lock()
        self.limit_bytes = limit_bytes
        self._now_ns = now_ns
        self._latest_ns = 0
        self.kept = (0, 0)

    def open(self) -> None:
        """Create the folder; remove drafts, damaged entries, and what exceeds the limits."""
        self._folder.make()
        with self._changing():
            for path in self._folder.incoming():
                remove(path)
            for path in self._folder.forms():
                if read_manifest(path) is None:
                    self._folder.take_out(path)

    def find(self, key: str) -> Manifest | None:
        """Return the entry of a key; None if there is none, or it is useless and a day old."""
        found = read_manifest(self._folder.form(key))
        if found is None or found.reason is None:
            return found
        return found if self._now_ns() <= found.made_ns + USELESS_KNOWN_S * 10**9 else None

    def use(self, key: str) -> OptimisedModel | None:
        """Return the optimised model to load for a key, and record its use; None without one.

        Files whose identity has changed are hashed, which may take seconds; those with other content are
        removed.
        """
        path = self._folder.form(key)
        manifest = read_manifest(path)
        if manifest is not None and manifest.files and not have_identities(path / FILES, manifest.files):
            manifest = self._rehash(path, manifest)
        if manifest is None:
            return None
        with self._lock:
            self._touch(path)
        return manifest.optimised_model(path / FILES)

    def draft(self, expected_bytes: int = 0) -> Path:
        """Create a draft, whose files go to the returned folder; the caller keeps or discards it.

        Args:
            expected_bytes: the likely size. The least recently used optimised models are evicted until the
                disk has room for it.
        """
        if expected_bytes:
            self._make_room(expected_bytes)
        with explain_os_errors(self._folder.path):
            folder = self._folder.new_incoming() / FILES
            folder.mkdir(mode=0o700)
        return folder

    def discard(self, draft: Path) -> None:
        """Remove a draft, if it exists; a failure is logged."""
        remove(draft.parent)

    def seal(self, manifest: Manifest, draft: Path) -> tuple[Manifest, OptimisedModel]:
        """Hash the files of a draft, which nobody writes to any more; returns the manifest with them, too.

        Raises:
            Useless: they are others than expected, or too large.
        """
        with explain_os_errors(self._folder.path):
            if not _are_complete(walk_files(draft)[0]):
                raise Useless("its files are not those of an optimised model")
            files = hash_files(draft)
        sha256 = digest_of((file.path, file.sha256) for file in files)
        sealed = replace(manifest, files=files, sha256=sha256)
        if sealed.bytes > self.limit_bytes:
            limit = f"all prepared models together may take {self.limit_bytes}"
            raise Useless(f"it takes {sealed.bytes} bytes, and {limit}")
        return sealed, OptimisedModel(sealed.key, sha256, str(draft), sealed.bytes)

    def keep(self, manifest: Manifest, draft: Path) -> None:
        """Turn a sealed draft into the entry of its key, replacing an older one; this may evict others."""
        path = self._folder.form(manifest.key)
        with explain_os_errors(self._folder.path):
            for file in manifest.files:
                sync(draft / file.path)
            sync(draft)
            self._write(draft.parent, replace(manifest, made_ns=self._now_ns()))
        with self._changing():
            self._folder.take_out(path)
            draft.parent.rename(path)
            sync(path.parent)
            self._touch(path)

    def record_useless(self, manifest: Manifest, reason: str) -> None:
        """Record for a day why the optimised model of a key is useless, in place of its entry."""
        nothing = replace(manifest, files=(), sha256=None, placed=UNSET, figures={})
        useless = replace(nothing, reason=plain_text(reason))
        draft = self.draft()
        try:
            self.keep(useless, draft)
        finally:
            self.discard(draft)

    def drop(self, used: OptimisedModel, reason: str) -> bool:
        """Remove an optimised model, and record for a day why it is useless.

        Returns:
            Whether it was removed; not if the entry has another one by now.
        """
        path = self._folder.form(used.key)
        found = read_manifest(path)
        if found is None or found.sha256 != used.sha256:
            return False
        with self._changing():
            self._folder.take_out(path)  # also where the reason cannot be written
        self.record_useless(found, reason)
        return True

    def entries(self) -> list[Manifest]:
        """List all entries, the last used first."""
        with explain_os_errors(self._folder.path):
            self._folder.check()
            found = [read_manifest(path) for path in self._folder.forms()]
        return sorted((entry for entry in found if entry is not None), key=lambda entry: -entry.used_ns)

    def clear(self, model_id: str | None = None) -> tuple[int, int]:
        """Remove all entries, or those of one model; any process may, and an attempt to make one goes on.

        Returns:
            The number of removed entries, and the size of their files.
        """
        entries = size = 0
        with explain_os_errors(self._folder.path), self._lock:
            self._folder.check()
            for path in self._folder.forms():
                found = read_manifest(path)
                if model_id is None or (found is not None and found.model_id == model_id):
                    entries, size = entries + 1, size + (found.bytes if found is not None else 0)
                    self._folder.take_out(path)
        return entries, size

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock, then evict the least recently used entries that exceed a limit."""
        with explain_os_errors(self._folder.path), self._lock:
            yield
            entries = self.entries()
            self._latest_ns = max([self._latest_ns, *(each.used_ns for each in entries)])
            useless = [each for each in entries if each.reason is not None]
            models = [each for each in entries if each.reason is None]
            size = sum(each.bytes for each in models)
            evicted = useless[MAX_USELESS:]
            while size > self.limit_bytes:
                evicted.append(models.pop())
                size -= evicted[-1].bytes
            for each in evicted:
                self._folder.take_out(self._folder.form(each.key))
            self.kept = len(models), size

    def _write(self, folder: Path, manifest: Manifest) -> None:
        self._folder.write(folder / MANIFEST, encode_record(manifest), durably=True)

    def _touch(self, path: Path) -> None:
        """Set the time of the last use: later than all others, even if the clock was set back."""
        self._latest_ns = used_ns = max(self._now_ns(), self._latest_ns + 1)
        with suppress(OSError):  # removed or not writable: it may be evicted too early
            os.utime(path / MANIFEST, ns=(used_ns, used_ns), follow_symlinks=False)

    def _rehash(self, path: Path, manifest: Manifest) -> Manifest | None:
        """Hash an entry's files; returns its manifest with their identities, or removes it."""
        try:
            files = rehash_files(path / FILES, manifest.files)
        except OSError:
            files = None
        with suppress(StoreUnavailable, DiskFull), self._changing():
            is_current = (found := read_manifest(path)) is not None and found.files == manifest.files
            if files is None and is_current:
                _log.warning("the files in %s have changed since they were prepared: removed", path)
                self._folder.take_out(path)
            elif files is not None and is_current:  # if that fails, the next use hashes them again
                self._write(path, replace(manifest, files=files))
        return None if files is None else replace(manifest, files=files)

    def _make_room(self, needed_bytes: int) -> None:
        """Evict optimised models until the disk has this much room; none if all would not suffice."""
        with self._changing():
            self._folder.make()
            free_bytes = free_disk_bytes(self._folder.path)
            models = [each for each in self.entries() if each.reason is None]
            if free_bytes + sum(each.bytes for each in models) < needed_bytes:
                models.clear()
            while models and free_bytes < needed_bytes:
                evicted, before = models.pop(), free_bytes
                self._folder.take_out(self._folder.form(evicted.key))
                free_bytes = free_disk_bytes(self._folder.path)
                if free_bytes - before < evicted.bytes // 2:  # workers have it mapped, and may others
                    break
        if free_bytes < needed_bytes:
            raise DiskFull(needed_bytes, free_bytes)
