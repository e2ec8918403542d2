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
    LAYOUT,
    MANIFEST,
    CacheFolder,
    CacheUnavailable,
    Manifest,
    are_plain_names,
    describe_cached,
    explain_os_errors,
    have_sizes,
    read_manifest,
    remove_others,
    sync,
    verify_files,
    write_manifest,
)
from runtime.cache.key import Cleared, Entry, FinishedForm, make_entry, timestamp_of
from runtime.memory import room
from runtime.wire import CachedCopy, Form, HashedFile, plain_text

MAX_WITHOUT_FORM = 1_000
"""Keys of which is only known that no form is of use. Each takes a folder and a file; one that is forgotten
and asked for again costs one more attempt to prepare."""


@dataclass(frozen=True, slots=True)
class Use:
    """When something was used last, in nanoseconds since 1970, and what its form takes; None is no form."""

    used_ns: int
    bytes: int | None


class UseOrder:
    """The last use of each key, within limits.

    Args:
        limit_bytes: what all forms may take together.
        max_without_form: how many keys without one are remembered.
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
        """How many forms there are, and the bytes of all."""
        return len(self._uses) - self._without_form, self._bytes

    def forms(self) -> list[tuple[str, int]]:
        """List the keys that have a form, with the bytes of each, the one used the longest ago first."""
        return [(key, use.bytes) for key, use in self._oldest_first() if use.bytes is not None]

    def put(self, key: str, use: Use) -> None:
        """Take what was found of a key, instead of what was known of it."""
        self.forget(key)
        self._uses[key] = use
        self._latest_ns = max(self._latest_ns, use.used_ns)
        self._count(use, 1)

    def use(self, key: str, bytes_: int | None, now_ns: int) -> int:
        """Note that a key is used now.

        Returns:
            The time to remember: later than all others, even if the clock was set back or has not moved.
        """
        used_ns = max(now_ns, self._latest_ns + 1)
        self.put(key, Use(used_ns, bytes_))
        return used_ns

    def forget(self, key: str) -> None:
        """Leave a key out, if it is there."""
        use = self._uses.pop(key, None)
        if use is not None:
            self._count(use, -1)

    def are_too_many(self) -> bool:
        """Tell whether something has to go."""
        return self._bytes > self._limit_bytes or self._without_form > self._max_without_form

    def next_to_go(self) -> Iterator[str]:
        """Give what has to go, each of which is to be forgotten before the next; the oldest goes first."""
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


FOLDER = "prepared"
"""In the data directory."""
USELESS_KNOWN_S = 86_400
"""For how long it is known that no form is of use, where trials say so and no load or inference did."""

_log = logging.getLogger(__name__)


class ModelCache:
    """What is prepared, in one folder.

    `find` and `use` never fail for what is in there. The others raise `CacheUnavailable`
    (`prepared_unavailable`) whenever the file system refuses, the disk being full included, and leave no
    draft behind.

    Args:
        folder: it is made by `open`, and must not be a link.
        limit_bytes: what all forms may take together. Drafts, and files that are removed while a worker has
            them mapped, are not counted.
        max_without_form: of how many keys is remembered that no form is of use.
        now_ns: gives the time, in nanoseconds since 1970.
        room: gives how many bytes may be taken where a folder is.

    Attributes:
        limit_bytes: as given.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        max_without_form: int = MAX_WITHOUT_FORM,
        now_ns: Callable[[], int] = time.time_ns,
        room: Callable[[Path], int] = room,
    ) -> None:
        self._folder = CacheFolder(folder)
        self.limit_bytes = limit_bytes
        self._now_ns = now_ns
        self._room = room
        self._uses = UseOrder(limit_bytes, max_without_form)

    @property
    def kept(self) -> tuple[int, int]:
        """How many forms there are, as far as this process knows, and the bytes of all."""
        return self._uses.kept

    def open(self) -> None:
        """Make the folder, and remove from it what is not whole, or too much; forget what no longer is.

        What has a name that we do not give is left alone, and told in the log. May be repeated: drafts that
        this store has given are left alone too.
        """
        self._folder.make()
        with self._folder.changing() as doomed:
            doomed.extend(self._folder.abandoned())
            for path in self._folder.entries():
                self._take_in(path, doomed)
            self._evict(doomed)
        strangers = self._folder.strangers()
        if strangers:
            names = ", ".join(map(repr, strangers[:8]))
            _log.warning("not ours, and left alone, in %s: %s", self._folder.path, names)

    def find(self, key: str) -> Entry | None:
        """Say what is known for a key; None is nothing, or no longer."""
        found = self._read(key)
        if found is None:
            return None
        until = found[0].known_until
        return make_entry(*found) if until is None or timestamp_of(self._now_ns()) <= until else None

    def use(self, key: str) -> CachedCopy | None:
        """Return the form to load for a key, and note that it is used; None if there is none of use.

        Where its files have another identity than when it was made, they are read, which may take seconds;
        a form whose content is another is removed.
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
            manifest = self._renewed(manifest, files)
        with suppress(CacheUnavailable), self._folder.changing():
            self._count_use(manifest)
        return (
            None if manifest.form is None else describe_cached(folder, manifest.form, files, manifest.sources)
        )

    def draft(self, key: str, expected_bytes: int = 0) -> Path:
        """Make an empty folder for a form of this key, which is the caller's to keep or discard.

        Args:
            key: of which.
            expected_bytes: what the form is likely to take. There is room for it twice, since it is written
                twice, and forms that were used the longest ago go for that.

        Raises:
            PreparedUnavailable: `prepared_unavailable`, there is no such room, for one.
        """
        if expected_bytes:
            self._make_room(2 * expected_bytes)
        return self._folder.draft(key)

    def discard(self, draft: Path) -> None:
        """Remove a draft, if it is there; without an error."""
        self._folder.discard(draft)

    def keep(self, key: str, draft: Path, made: FinishedForm) -> CachedCopy | None:
        """Have the form in a draft be what is used for a key, instead of what was, and make room for it.

        The draft is no longer there afterwards, however this ends.

        Returns:
            The form as it is to be loaded. None if it takes more than all forms may, or its files are not
            those that were made; then that is what is known for the key.
        """
        try:
            with explain_os_errors(self._folder.path):
                return self._keep(key, draft, made)
        finally:
            self.discard(draft)

    def settle_none(
        self,
        key: str,
        tried: Mapping[Form, str],
        *,
        model_id: str,
        version: int,
        took_ms: int = 0,
        untried_on: str | None = None,
    ) -> None:
        """Remember for a day that no form is of use, and why each is not: it may be as the machine was.

        Args:
            key: of what.
            tried: why not, for each form.
            model_id: whose files those are.
            version: of that model.
            took_ms: what making and trying it took.
            untried_on: if nothing could be tried, the SHA-256 of the inputs that there were for it.
        """
        manifest = self._manifest(key, model_id, version, took_ms, tried)
        until = add_seconds(manifest.made_at, USELESS_KNOWN_S)
        self._settle(msgspec.structs.replace(manifest, known_until=until, untried_on=untried_on))

    def drop(self, key: str, reason: str, used: CachedCopy | None = None) -> bool:
        """Remove the form of a key, and remember that it is of no use, and why.

        Args:
            key: of which.
            reason: what went wrong with it.
            used: what it went wrong with. If that is no longer what is there, nothing is done: it was
                evicted, cleared or made anew while it was loaded, and is not to blame.

        Returns:
            Whether it was removed.
        """
        found = read_manifest(self._folder.entry(key))
        if found is None or found[0].form is None or (used is not None and used.files != found[0].files):
            return False
        old, form = found[0], found[0].form
        tried: dict[Form, str] = {**old.tried, form: reason}
        self._settle(self._manifest(key, old.model_id, old.version, old.took_ms, tried))
        return True

    def entries(self) -> list[Entry]:
        """List all that is known, the last used first."""
        found = [found for path in self._folder.entries() if (found := read_manifest(path)) is not None]
        return [make_entry(*each) for each in sorted(found, key=lambda each: -each[1])]

    def clear(self, model_id: str | None = None) -> Cleared:
        """Remove all that was prepared, or what was made of one model; what is being made goes on.

        Another process than the server's may do this. It removes drafts that nobody works on, too.
        """
        entries = size = 0
        with self._folder.changing() as doomed:
            if model_id is None:
                doomed.extend(self._folder.leftovers())
            for path in self._folder.entries():
                found = read_manifest(path)
                if model_id is None or (found is not None and found[0].model_id == model_id):
                    entries, size = entries + 1, size + (found[0].bytes if found is not None else 0)
                    self._take_away(path, doomed)
        return Cleared(entries, size)

    def _keep(self, key: str, draft: Path, made: FinishedForm) -> CachedCopy | None:
        files = _checked(draft, made.files)
        manifest = self._manifest(key, made.model_id, made.version, made.took_ms, made.tried)
        if files is None:
            self._leave_out(manifest, made.form, "its files are not those that the worker wrote")
            return None
        size = sum(file.bytes for file in files)
        if size > self.limit_bytes:
            reason = f"it takes {size} bytes, and all forms together may take {self.limit_bytes}"
            self._leave_out(manifest, made.form, reason, size)
            return None
        remove_others(draft, files)
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
        return self.use(key)  # with the identities that the files have under their new name

    def _leave_out(self, manifest: Manifest, form: Form, reason: str, needs_bytes: int = 0) -> None:
        tried: dict[Form, str] = {**manifest.tried, form: reason}
        self._settle(msgspec.structs.replace(manifest, tried=tried, needs_bytes=needs_bytes))

    def _settle(self, manifest: Manifest) -> None:
        draft = self.draft(manifest.key)
        try:
            self._publish(draft, manifest)
        finally:
            self.discard(draft)

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
        with self._folder.changing() as doomed:
            self._folder.put(draft, manifest.key, doomed)
            self._count_use(manifest)
            self._evict(doomed)

    def _take_in(self, path: Path, doomed: list[Path]) -> None:
        found = read_manifest(path)
        if (
            found is None
            or not have_sizes(path, found[0].files)
            or 0 < found[0].needs_bytes <= self.limit_bytes  # it was too much, and no longer is
        ):
            self._take_away(path, doomed)
        else:
            manifest, used_ns = found
            self._uses.put(path.name, Use(used_ns, manifest.form_bytes))

    def _make_room(self, needed: int) -> None:
        """Have so much room on the disk, at the cost of forms; of none where all of them would not do."""
        self._folder.make()
        with self._folder.changing():
            there_is, oldest = self._room(self._folder.path), self._uses.forms()
        if there_is + sum(size for _, size in oldest) < needed:
            oldest.clear()
        while there_is < needed and oldest:
            key, size = oldest.pop(0)
            with self._folder.changing() as doomed:
                self._take_away(self._folder.entry(key), doomed)
            with explain_os_errors(self._folder.path):
                before, there_is = there_is, self._room(self._folder.path)
            if there_is - before < size // 2:  # workers have it mapped: not all are to go for nothing
                break
        if there_is < needed:
            raise CacheUnavailable(
                f"preparing needs {needed} bytes on the disk of {self._folder.path}, and"
                f" {max(0, there_is)} can be spared: free some there"
            )

    def _evict(self, doomed: list[Path]) -> None:
        if self._uses.are_too_many():
            for key in self._uses:  # another process may have cleared some
                if not os.path.lexists(self._folder.entry(key)):
                    self._uses.forget(key)
        for key in self._uses.next_to_go():
            self._take_away(self._folder.entry(key), doomed)

    def _take_away(self, path: Path, doomed: list[Path]) -> None:
        self._folder.take_away(path, doomed)
        self._uses.forget(path.name)

    def _forget(self, manifest: Manifest) -> None:
        path = self._folder.entry(manifest.key)
        with suppress(CacheUnavailable), self._folder.changing() as doomed:
            if _is_still(path, manifest):
                _log.warning("the files in %s are no longer those that were prepared", path)
                self._take_away(path, doomed)

    def _renewed(self, manifest: Manifest, files: tuple[HashedFile, ...]) -> Manifest:
        """Trust the files' present identities from now on; if that cannot be kept, they are read again."""
        renewed = msgspec.structs.replace(manifest, files=files)
        path = self._folder.entry(manifest.key)
        with suppress(CacheUnavailable), self._folder.changing():
            if _is_still(path, manifest):
                write_manifest(path, renewed)
        return renewed

    def _count_use(self, manifest: Manifest) -> None:
        used_ns = self._uses.use(manifest.key, manifest.form_bytes, self._now_ns())
        path = self._folder.entry(manifest.key) / MANIFEST
        with suppress(OSError):  # it is gone, or cannot be written to: it may then go before its time
            os.utime(path, ns=(used_ns, used_ns), follow_symlinks=False)

    def _read(self, key: str) -> tuple[Manifest, int] | None:
        folder = self._folder.entry(key)
        found = read_manifest(folder)
        return found if found is not None and have_sizes(folder, found[0].files) else None


def _checked(draft: Path, files: tuple[HashedFile, ...]) -> tuple[HashedFile, ...] | None:
    """Return a form's files, once they are on the disk; None if they are not those that were made."""
    if not draft.is_dir():
        raise CacheUnavailable(f"the draft {draft} is gone: something else has removed it")
    if not files or not are_plain_names(files) or not have_sizes(draft, files):
        return None
    for file in files:
        sync(draft / file.path)
    return verify_files(draft, files)


def _is_still(path: Path, manifest: Manifest) -> bool:
    found = read_manifest(path)
    return found is not None and found[0] == manifest
