"""The cached models on disk, `<data>/prepared/<key>/`: each complete or absent, evicted by last use.

One process writes: the server that holds the data directory. A form is written to a draft until all of it is
on the disk, and then takes its name in one step; a removed entry loses its name first. So a killed process
leaves only drafts, which the next `open` removes. Other processes may list and clear meanwhile: to a reader,
an entry that vanishes or is damaged was never there. Workers keep removed files that they have mapped, since
no file of an entry is ever written to.

All methods block, so call them in threads, as many as you like.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from events.clock import add_seconds
from runtime.cache.files import (
    CacheFolder,
    CacheUnavailable,
    explain_os_errors,
    have_sizes,
    remove_others,
    sync,
    verify_files,
)
from runtime.cache.manifest import (
    LAYOUT,
    MANIFEST,
    Cleared,
    Entry,
    FinishedForm,
    Manifest,
    are_plain_names,
    describe_cached,
    make_entry,
    read_manifest,
    timestamp_of,
    write_manifest,
)
from runtime.memory import free_disk_bytes
from runtime.wire import CachedCopy, Form, HashedFile, plain_text

MAX_WITHOUT_FORM = 1_000
"""Limit of keys without a form. Each takes a folder and a file; a forgotten one costs one more attempt to
prepare."""


FOLDER = "prepared"
"""The folder's name in the data directory."""
USELESS_KNOWN_S = 86_400
"""A day: how long reasons against all forms hold. Some are measured, and the machine was busy."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Use:
    """The last use, in nanoseconds since 1970, and the size of the form; None is no form."""

    used_ns: int
    bytes: int | None


class UseOrder:
    """The order of use of all keys (LRU), within limits.

    Args:
        limit_bytes: the size of all forms together.
        max_without_form: the number of keys without a form.
    """

    def __init__(self, limit_bytes: int, max_without_form: int) -> None:
        self._limit_bytes = limit_bytes
        self._max_without_form = max_without_form
        self._uses = dict[str, Use]()
        self._bytes = 0
        self._without_form = 0
        self._latest_ns = 0

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._uses))

    @property
    def kept(self) -> tuple[int, int]:
        """The number of forms, and their size."""
        return len(self._uses) - self._without_form, self._bytes

    def forms(self) -> list[tuple[str, int]]:
        """List the keys that have a form with their sizes, the least recently used first."""
        return [(key, use.bytes) for key, use in self._oldest_first() if use.bytes is not None]

    def put(self, key: str, use: Use) -> None:
        """Set the last use of a key."""
        self.forget(key)
        self._uses[key] = use
        self._latest_ns = max(self._latest_ns, use.used_ns)
        self._count(use, 1)

    def use(self, key: str, bytes_: int | None, now_ns: int) -> int:
        """Record a use of a key now.

        Returns:
            Its time: later than all others, even if the clock was set back or has not moved.
        """
        used_ns = max(now_ns, self._latest_ns + 1)
        self.put(key, Use(used_ns, bytes_))
        return used_ns

    def forget(self, key: str) -> None:
        """Remove a key, if it is there."""
        use = self._uses.pop(key, None)
        if use is not None:
            self._count(use, -1)

    def exceeds_limits(self) -> bool:
        """Return whether a limit is exceeded."""
        return self._bytes > self._limit_bytes or self._without_form > self._max_without_form

    def next_victims(self) -> Iterator[str]:
        """Yield the keys to evict, the least recently used first; forget each before taking the next."""
        for key, use in self._oldest_first():
            too_many = (
                self._without_form > self._max_without_form
                if use.bytes is None
                else self._bytes > self._limit_bytes
            )
            if too_many:
                yield key

    def _oldest_first(self) -> list[tuple[str, Use]]:
        return sorted(self._uses.items(), key=lambda item: (item[1].used_ns, item[0]))

    def _count(self, use: Use, sign: int) -> None:
        if use.bytes is None:
            self._without_form += sign
        else:
            self._bytes += sign * use.bytes


class ModelCache:
    """The optimised model cache in one folder.

    `find` and `use` never fail because of the folder's content. The other methods raise `CacheUnavailable`
    (`prepared_unavailable`) for every refusal of the file system, a full disk included, and leave no draft.

    Args:
        folder: the folder, which `open` creates; it must not be a link.
        limit_bytes: the size of all forms together. Drafts, and removed files that a worker has mapped, are
            not counted.
        max_without_form: number of keys for which the reasons against all forms are remembered.
        now_ns: the time in nanoseconds since 1970.
        free_disk_bytes: the bytes that may be taken on a folder's disk.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        max_without_form: int = MAX_WITHOUT_FORM,
        now_ns: Callable[[], int] = time.time_ns,
        free_disk_bytes: Callable[[Path], int] = free_disk_bytes,
    ) -> None:
        self._folder = CacheFolder(folder)
        self.limit_bytes = limit_bytes
        self._now_ns = now_ns
        self._free_disk_bytes = free_disk_bytes
        self._uses = UseOrder(limit_bytes, max_without_form)

    @property
    def kept(self) -> tuple[int, int]:
        """The number of forms that this process knows of, and their size."""
        return self._uses.kept

    def open(self) -> None:
        """Create the folder; remove incomplete entries, abandoned drafts and what exceeds the limits.

        Foreign names are left alone and logged. May be repeated: drafts of this cache stay.
        """
        self._folder.make()
        with self._folder.lock() as doomed:
            doomed.extend(self._folder.abandoned_drafts())
            for path in self._folder.entries():
                self._load_entry(path, doomed)
            self._evict(doomed)
        foreign_names = self._folder.foreign_names()
        if foreign_names:
            names = ", ".join(map(repr, foreign_names[:8]))
            _log.warning("foreign files in %s are left alone: %s", self._folder.path, names)

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key; None if there is none or it has expired."""
        found = self._read(key)
        if found is None:
            return None
        until = found[0].known_until
        return make_entry(*found) if until is None or timestamp_of(self._now_ns()) <= until else None

    def use(self, key: str) -> CachedCopy | None:
        """Return the form to load for a key, and record its use; None if no form is of use.

        Files whose identity has changed are read, which may take seconds; a form whose content differs is
        removed.
        """
        found = self._read(key)
        if found is None:
            return None
        manifest, folder = found[0], self._folder.entry(key)
        files = verify_files(folder, manifest.files)
        if files is None:
            self._forget(manifest)
            return None
        if files != manifest.files:
            manifest = self._renew(manifest, files)
        with suppress(CacheUnavailable), self._folder.lock():
            self._count_use(manifest)
        return (
            None if manifest.form is None else describe_cached(folder, manifest.form, files, manifest.sources)
        )

    def draft(self, key: str, expected_bytes: int = 0) -> Path:
        """Create a draft for a form of this key; the caller keeps or discards it.

        Args:
            key: the key of the form.
            expected_bytes: the likely size of the form. It is written twice, so the least recently used forms
                are evicted until the disk has room for twice that.

        Raises:
            CacheUnavailable: `prepared_unavailable`, for example without that room.
        """
        if expected_bytes:
            self._make_room(2 * expected_bytes)
        return self._folder.draft(key)

    def discard(self, draft: Path) -> None:
        """Remove a draft, if it exists; a failure is logged."""
        self._folder.discard(draft)

    def keep(self, key: str, draft: Path, made: FinishedForm) -> CachedCopy | None:
        """Turn a draft into the entry of a key, in place of an older one, and evict others for it.

        The draft is gone afterwards, however this ends.

        Returns:
            The form to load. None if it is larger than the limit or its files are not the reported ones; the
            entry then has that reason.
        """
        try:
            with explain_os_errors(self._folder.path):
                return self._keep(key, draft, made)
        finally:
            self.discard(draft)

    def record_useless(
        self,
        key: str,
        tried: Mapping[Form, str],
        *,
        model_id: str,
        version: int,
        took_ms: int = 0,
    ) -> None:
        """Record for a day why no form is of use; for the arguments see `Manifest`."""
        manifest = self._manifest(key, model_id, version, took_ms, tried)
        until = add_seconds(manifest.made_at, USELESS_KNOWN_S)
        draft = self.draft(key)
        try:
            self._publish(draft, msgspec.structs.replace(manifest, known_until=until))
        finally:
            self.discard(draft)

    def drop(self, key: str, reason: str, used: CachedCopy | None = None) -> bool:
        """Remove the form of a key, and record for a day why it is of no use.

        Args:
            key: the key of the form.
            reason: what went wrong.
            used: the form with which it went wrong; nothing happens if the entry has another one by now,
                since it was evicted, cleared or replaced meanwhile.

        Returns:
            Whether it was removed.
        """
        found = read_manifest(self._folder.entry(key))
        if found is None or found[0].form is None or (used is not None and used.files != found[0].files):
            return False
        old, form = found[0], found[0].form
        tried: dict[Form, str] = {**old.tried, form: reason}
        self.record_useless(key, tried, model_id=old.model_id, version=old.version, took_ms=old.took_ms)
        return True

    def entries(self) -> list[Entry]:
        """List all entries, the last used first."""
        found = [found for path in self._folder.entries() if (found := read_manifest(path)) is not None]
        return [make_entry(*each) for each in sorted(found, key=lambda each: -each[1])]

    def clear(self, model_id: str | None = None) -> Cleared:
        """Remove all entries, or those of one model; a preparation under way goes on.

        Any process may call this. It also removes drafts that no process has locked.
        """
        entries = size = 0
        with self._folder.lock() as doomed:
            if model_id is None:
                doomed.extend(self._folder.unlocked_drafts())
            for path in self._folder.entries():
                found = read_manifest(path)
                if model_id is None or (found is not None and found[0].model_id == model_id):
                    entries, size = entries + 1, size + (found[0].bytes if found is not None else 0)
                    self._remove_entry(path, doomed)
        return Cleared(entries, size)

    def _keep(self, key: str, draft: Path, made: FinishedForm) -> CachedCopy | None:
        files = _verify_draft(draft, made.files)
        size = sum(file.bytes for file in files or ())
        if files is None or size > self.limit_bytes:
            reason = f"it takes {size} bytes, and all forms together may take {self.limit_bytes}"
            if files is None:
                reason = "its files are not those that the worker wrote"
            tried: dict[Form, str] = {**made.tried, made.form: reason}
            version, took_ms = made.version, made.took_ms
            self.record_useless(key, tried, model_id=made.model_id, version=version, took_ms=took_ms)
            return None
        remove_others(draft, files)
        manifest = self._manifest(key, made.model_id, made.version, made.took_ms, made.tried)
        prepared = describe_cached(self._folder.entry(key), made.form, files, made.sources)
        manifest = msgspec.structs.replace(
            manifest,
            form=made.form,
            sha256=prepared.sha256,
            files=prepared.files,
            sources=prepared.sources,
            figures=dict(made.figures),
        )
        self._publish(draft, manifest)
        return self.use(key)  # with the files' identities after the rename

    def _manifest(
        self, key: str, model_id: str, version: int, took_ms: int, tried: Mapping[Form, str]
    ) -> Manifest:
        return Manifest(
            layout=LAYOUT,
            key=key,
            model_id=model_id,
            version=version,
            made_at=timestamp_of(self._now_ns()),
            took_ms=took_ms,
            tried={form: plain_text(reason) for form, reason in tried.items()},
        )

    def _publish(self, draft: Path, manifest: Manifest) -> None:
        with explain_os_errors(self._folder.path):
            write_manifest(draft, manifest)
        with self._folder.lock() as doomed:
            self._folder.put(draft, manifest.key, doomed)
            self._count_use(manifest)
            self._evict(doomed)

    def _load_entry(self, path: Path, doomed: list[Path]) -> None:
        found = read_manifest(path)
        if found is None or not have_sizes(path, found[0].files):
            self._remove_entry(path, doomed)
        else:
            manifest, used_ns = found
            self._uses.put(path.name, Use(used_ns, manifest.form_bytes))

    def _make_room(self, needed: int) -> None:
        """Evict forms until the disk has this much room; none if even all of them would not suffice."""
        self._folder.make()
        with self._folder.lock():
            there_is, oldest = self._free_disk_bytes(self._folder.path), self._uses.forms()
        if there_is + sum(size for _, size in oldest) < needed:
            oldest.clear()
        while there_is < needed and oldest:
            key, size = oldest.pop(0)
            with self._folder.lock() as doomed:
                self._remove_entry(self._folder.entry(key), doomed)
            with explain_os_errors(self._folder.path):
                before, there_is = there_is, self._free_disk_bytes(self._folder.path)
            if there_is - before < size // 2:  # workers have it mapped: evicting more would free nothing
                break
        if there_is < needed:
            raise CacheUnavailable(
                f"preparing needs {needed} bytes on the disk of {self._folder.path}, and"
                f" {max(0, there_is)} can be spared: free some there"
            )

    def _evict(self, doomed: list[Path]) -> None:
        if self._uses.exceeds_limits():
            for key in self._uses:  # another process may have cleared some
                if not os.path.lexists(self._folder.entry(key)):
                    self._uses.forget(key)
        for key in self._uses.next_victims():
            self._remove_entry(self._folder.entry(key), doomed)

    def _remove_entry(self, path: Path, doomed: list[Path]) -> None:
        self._folder.unlink_entry(path, doomed)
        self._uses.forget(path.name)

    def _forget(self, manifest: Manifest) -> None:
        path = self._folder.entry(manifest.key)
        with suppress(CacheUnavailable), self._folder.lock() as doomed:
            if _is_current(path, manifest):
                _log.warning("the files in %s have changed since they were prepared: removed", path)
                self._remove_entry(path, doomed)

    def _renew(self, manifest: Manifest, files: tuple[HashedFile, ...]) -> Manifest:
        """Record the files' present identities; if that fails, the next use reads the files again."""
        renewed = msgspec.structs.replace(manifest, files=files)
        path = self._folder.entry(manifest.key)
        with suppress(CacheUnavailable), self._folder.lock():
            if _is_current(path, manifest):
                write_manifest(path, renewed)
        return renewed

    def _count_use(self, manifest: Manifest) -> None:
        used_ns = self._uses.use(manifest.key, manifest.form_bytes, self._now_ns())
        path = self._folder.entry(manifest.key) / MANIFEST
        with suppress(OSError):  # removed or not writable: it may be evicted too early
            os.utime(path, ns=(used_ns, used_ns), follow_symlinks=False)

    def _read(self, key: str) -> tuple[Manifest, int] | None:
        folder = self._folder.entry(key)
        found = read_manifest(folder)
        return found if found is not None and have_sizes(folder, found[0].files) else None


def _verify_draft(draft: Path, files: tuple[HashedFile, ...]) -> tuple[HashedFile, ...] | None:
    """Return a draft's files, synced to the disk; None if they are not the reported ones."""
    if not draft.is_dir():
        raise CacheUnavailable(f"the draft {draft} is gone: another process has removed it")
    if not files or not are_plain_names(files) or not have_sizes(draft, files):
        return None
    for file in files:
        sync(draft / file.path)
    return verify_files(draft, files)


def _is_current(path: Path, manifest: Manifest) -> bool:
    found = read_manifest(path)
    return found is not None and found[0] == manifest
