"""The cached models in the store, `<data>/store/forms/<key>/`: each complete or absent, evicted by last use.

One process writes: the server that holds the data directory. A form is written to an incoming folder until
all of it is on the disk, and then takes its name in one step; a removed entry loses its name first. So a
killed process leaves only incoming folders, which the next `open` removes. Other processes may list and clear
meanwhile: to a reader, an entry that vanishes or is damaged was never there. Workers keep removed files that
they have mapped, since no file of an entry is ever written to.

All methods block, so call them in threads, as many as you like.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec.structs import replace

from events.clock import add_seconds
from events.files import sync
from runtime.cache.manifest import (
    CachedForm,
    Manifest,
    are_of_form,
    form_sha256,
    read_manifest,
    timestamp_of,
)
from runtime.errors import DiskFull, StoreUnavailable
from runtime.memory import free_disk_bytes
from runtime.store.folder import FILES, StoreFolder, explain_os_errors, remove, walk_files
from runtime.store.manifest import MANIFEST, encode_record, hash_files, have_identities, rehash_files
from runtime.wire import Form, plain_text

MAX_WITHOUT_FORM = 1_000
"""Limit of keys without a form. Each takes a folder and a file; a forgotten one costs one more attempt to
prepare."""
USELESS_KNOWN_S = 86_400
"""A day: how long reasons against all forms hold. Some are measured, and the machine was busy."""
CACHE_PROBLEMS = (StoreUnavailable, DiskFull, OSError)
"""Errors of a full, broken or foreign disk; models load without the cache then."""
_log = logging.getLogger(__name__)


class ModelCache:
    """The optimised model cache in the folder of a store.

    `find` and `use` never fail because of the folder's content. The other methods raise `StoreUnavailable` or
    `DiskFull` for every refusal of the file system, and leave no draft.

    Args:
        folder: the store's folder, which `open` creates; it must not be a link.
        limit_bytes: the size of all forms together. Drafts, and removed files that a worker has mapped, are
            not counted.
        max_without_form: number of keys for which the reasons against all forms are remembered.
        now_ns: the time in nanoseconds since 1970.
        free_disk_bytes: the bytes that may be taken on a folder's disk.

    Attributes:
        kept: the number of forms, and their size, as of the last change by this process.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        max_without_form: int = MAX_WITHOUT_FORM,
        now_ns: Callable[[], int] = time.time_ns,
        free_disk_bytes: Callable[[Path], int] = free_disk_bytes,
    ) -> None:
        self._folder = StoreFolder(folder)
        self._lock = threading.Lock()
        self.limit_bytes = limit_bytes
        self._max_without_form = max_without_form
        self._now_ns = now_ns
        self._free_disk_bytes = free_disk_bytes
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
                    self._remove(path)

    def find(self, key: str) -> Manifest | None:
        """Return the entry of a key; None if there is none or it has expired."""
        found = read_manifest(self._folder.form(key))
        until = None if found is None else found.known_until
        return found if until is None or timestamp_of(self._now_ns()) <= until else None

    def use(self, key: str) -> CachedForm | None:
        """Return the form to load for a key, and record its use; None if no form is of use.

        Files whose identity has changed are hashed, which may take seconds; a form whose content differs is
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
        return manifest.cached_form(path / FILES)

    def draft(self, expected_bytes: int = 0) -> Path:
        """Create a draft for a form, whose files go to the returned folder; the caller keeps or discards it.

        Args:
            expected_bytes: the likely size of the form. It is written twice, so the least recently used forms
                are evicted until the disk has room for twice that.

        Raises:
            DiskFull: `disk_full`, without that room.
            StoreUnavailable: `store_unavailable`.
        """
        if expected_bytes:
            self._make_room(2 * expected_bytes)
        with explain_os_errors(self._folder.path):
            folder = self._folder.new_incoming() / FILES
            folder.mkdir(mode=0o700)
        return folder

    def discard(self, draft: Path) -> None:
        """Remove a draft, if it exists; a failure is logged."""
        remove(draft.parent)

    def keep(self, manifest: Manifest, draft: Path) -> str | None:
        """Turn a draft into the form of a manifest, in place of an older entry, and evict others for it.

        The files are hashed here. The draft is gone afterwards, however this ends.

        Returns:
            Why the form is left out; None if it is kept.

        Raises:
            StoreUnavailable: `store_unavailable`.
            DiskFull: `disk_full`.
        """
        try:
            with explain_os_errors(self._folder.path):
                paths, folders = walk_files(draft)
                if not are_of_form(paths):
                    return "its files are not those of a form"
                files = hash_files(draft)
                size = sum(file.bytes for file in files)
                if size > self.limit_bytes:
                    return f"it takes {size} bytes, and all forms together may take {self.limit_bytes}"
                for path in (*(draft / each for each in paths), *folders):
                    sync(path)
            self._publish(draft.parent, replace(manifest, files=files, sha256=form_sha256(files)))
        finally:
            self.discard(draft)
        return None

    def record_useless(self, manifest: Manifest, tried: Mapping[Form, str]) -> None:
        """Record for a day why no form of this model is of use.

        Raises:
            StoreUnavailable: `store_unavailable`.
            DiskFull: `disk_full`.
        """
        until = add_seconds(timestamp_of(self._now_ns()), USELESS_KNOWN_S)
        reasons = {form: plain_text(reason) for form, reason in tried.items()}
        useless = replace(
            manifest, form=None, sha256=None, files=(), figures={}, tried=reasons, known_until=until
        )
        draft = self.draft()
        try:
            self._publish(draft.parent, useless)
        finally:
            self.discard(draft)

    def drop(self, used: CachedForm, reason: str) -> bool:
        """Remove a form, and record for a day why it is of no use.

        Returns:
            Whether it was removed; not if the entry has another form by now.

        Raises:
            StoreUnavailable: `store_unavailable`.
            DiskFull: `disk_full`.
        """
        found = read_manifest(self._folder.form(used.key))
        if found is None or found.sha256 != used.sha256:
            return False
        self.record_useless(found, {**found.tried, used.form: reason})
        return True

    def entries(self) -> list[Manifest]:
        """List all entries, the last used first."""
        return sorted(self._read_all(), key=lambda entry: -entry.used_ns)

    def clear(self, model_id: str | None = None) -> tuple[int, int]:
        """Remove all entries, or those of one model; any process may, and a preparation goes on.

        Returns:
            The number of removed entries, and the size of their forms.
        """
        entries = size = 0
        with explain_os_errors(self._folder.path), self._lock:
            self._folder.check()
            for path in self._folder.forms():
                found = read_manifest(path)
                if model_id is None or (found is not None and found.model_id == model_id):
                    entries, size = entries + 1, size + (found.bytes if found is not None else 0)
                    self._remove(path)
        return entries, size

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock, then evict what exceeds the limits."""
        with explain_os_errors(self._folder.path), self._lock:
            yield
            self._evict()

    def _publish(self, draft: Path, manifest: Manifest) -> None:
        """Rename a synced draft to its entry, durably, in place of an older one."""
        path = self._folder.form(manifest.key)
        made = replace(manifest, made_at=timestamp_of(self._now_ns()))
        with explain_os_errors(self._folder.path):
            self._write(draft, made)
        with self._changing():
            self._remove(path)
            draft.rename(path)
            sync(path.parent)
            self._touch(path)

    def _write(self, folder: Path, manifest: Manifest) -> None:
        self._folder.write(folder / MANIFEST, encode_record(manifest), durably=True)

    def _touch(self, path: Path) -> None:
        """Set the time of the last use: later than all others, even if the clock was set back."""
        self._latest_ns = used_ns = max(self._now_ns(), self._latest_ns + 1)
        with suppress(OSError):  # removed or not writable: it may be evicted too early
            os.utime(path / MANIFEST, ns=(used_ns, used_ns), follow_symlinks=False)

    def _rehash(self, path: Path, manifest: Manifest) -> Manifest | None:
        """Hash a form's files; returns its manifest with their identities, or removes it."""
        try:
            files = rehash_files(path / FILES, manifest.files)
        except OSError:
            files = None
        with suppress(StoreUnavailable, DiskFull), self._changing():
            is_current = (found := read_manifest(path)) is not None and found.files == manifest.files
            if files is None and is_current:
                _log.warning("the files in %s have changed since they were prepared: removed", path)
                self._remove(path)
            elif files is not None and is_current:  # if that fails, the next use hashes them again
                self._write(path, replace(manifest, files=files))
        return None if files is None else replace(manifest, files=files)

    def _read_all(self) -> list[Manifest]:
        with explain_os_errors(self._folder.path):
            self._folder.check()
            found = [read_manifest(path) for path in self._folder.forms()]
        return [entry for entry in found if entry is not None]

    def _evict(self) -> None:
        """Remove the least recently used entries that exceed a limit."""
        kept = sorted(self._read_all(), key=lambda each: (each.used_ns, each.key))
        self._latest_ns = max([self._latest_ns, *(each.used_ns for each in kept)])
        forms = [each for each in kept if each.form is not None]
        without = [each for each in kept if each.form is None]
        size = sum(each.bytes for each in forms)
        while size > self.limit_bytes:
            size -= forms[0].bytes
            self._remove(self._folder.form(forms.pop(0).key))
        for each in without[: max(0, len(without) - self._max_without_form)]:
            self._remove(self._folder.form(each.key))
        self.kept = len(forms), size

    def _make_room(self, needed_bytes: int) -> None:
        """Evict forms until the disk has this much room; none if even all of them would not suffice."""
        with self._changing():
            self._folder.make()
            free_bytes, path = self._free_disk_bytes(self._folder.path), self._folder.path
            forms = sorted(self._read_all(), key=lambda each: each.used_ns)
            if free_bytes + sum(each.bytes for each in forms) < needed_bytes:
                forms.clear()
            for each in forms:
                if free_bytes >= needed_bytes:
                    break
                self._remove(self._folder.form(each.key))
                before, free_bytes = free_bytes, self._free_disk_bytes(path)
                if free_bytes - before < each.bytes // 2:  # workers have it mapped
                    break
        if free_bytes < needed_bytes:
            raise DiskFull(needed_bytes, free_bytes)

    def _remove(self, path: Path) -> None:
        """Take an entry's name, and remove it; another process may have been faster."""
        away = self._folder.move_away(path)
        if away is not None:
            remove(away)
