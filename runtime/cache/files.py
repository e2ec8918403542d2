"""The cache's folder: drafts, entries and their manifests, files that can be trusted, and disk space.

An entry is a folder named by its key. It is written as a draft beside the others and then renamed, and it is
renamed to a draft before it is removed: no reader ever sees part of an entry. Each process locks its drafts,
so that the drafts of a killed process can be recognised.

A file is trusted by its identity, which changes when it is written to or replaced. If the identity differs,
because the data directory was copied, restored or mounted anew, the content decides. An invalid manifest
counts as none.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from events.audit.files import write_file
from events.errors import LedgerProblem
from events.types import LoadedFile as RecordedFile
from runtime.errors import RuntimeProblem
from runtime.wire import CachedCopy, Count, Form, HashedFile, Name, Sha256, SourceHash, Text

LAYOUT: Literal[1] = 1
"""Of these folders, and of how forms are made: with another number all that was prepared is made anew."""
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
"""The longest list of sources that is allowed, with paths as long as they may be, fits."""
_NO_FILE = frozenset({"", ".", "..", MANIFEST})

Figure = int | float | str
Figures = dict[Name, Figure]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was made for a key: a form, or none that is of use.

    Attributes:
        layout: `LAYOUT`.
        key: the folder's name, as `key_of` makes it.
        model_id: what it was made of, for people; others with the same files use it too.
        version: of that model.
        made_at: when.
        took_ms: what making and trying it took.
        form: None if no form is of use.
        sha256: of the form, as `form_sha256` makes it.
        files: the form's own, directly in the folder.
        sources: the repository's files that it was made of.
        needs_bytes: what a form takes that was left out because that is too much; else 0.
        figures: what was measured of it.
        tried: why each other form was left out.
        known_until: when all this is forgotten; None is never.
        untried_on: if nothing could be tried, the SHA-256 of the inputs that there were for it.
    """

    layout: Literal[1]
    key: Sha256
    model_id: Name
    version: Count
    made_at: Name
    took_ms: Count = 0
    form: Form | None = None
    sha256: Sha256 | None = None
    files: tuple[HashedFile, ...] = ()
    sources: tuple[SourceHash, ...] = ()
    needs_bytes: Count = 0
    figures: Annotated[Figures, msgspec.Meta(max_length=64)] = {}
    tried: dict[Form, Text] = {}
    known_until: Name | None = None
    untried_on: Sha256 | None = None

    @property
    def bytes(self) -> int:
        """What the form's files take."""
        return sum(file.bytes for file in self.files)

    @property
    def form_bytes(self) -> int | None:
        """What the form takes; None if there is none."""
        return None if self.form is None else self.bytes


def source_hashes(files: Iterable[HashedFile | RecordedFile]) -> tuple[SourceHash, ...]:
    """Return the content of files, in order of their paths."""
    return tuple(SourceHash(file.path, file.sha256) for file in sorted(files, key=lambda file: file.path))


def form_sha256(files: Iterable[HashedFile]) -> str:
    """Return the hash of a form: SHA-256 over a line "<sha256> <path>" for each file, in order of paths."""
    lines = (f"{file.sha256} {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe_cached(
    folder: Path, form: Form, files: Sequence[HashedFile], sources: Sequence[SourceHash]
) -> CachedCopy:
    """Describe a form, which may still be a draft, to a worker that is to load it."""
    own = tuple(sorted(files, key=lambda file: file.path))
    of = tuple(sorted(sources, key=lambda file: file.path))
    return CachedCopy(str(folder), form, form_sha256(own), own, of)


def read_manifest(folder: Path) -> tuple[Manifest, int] | None:
    """Read what a folder says it has, without a look at the files.

    Returns:
        The manifest and when it was used last, in nanoseconds since 1970; None if it has no manifest that
        could be of this folder.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return None
        with _opened(folder / MANIFEST) as file:
            seen = os.fstat(file.fileno())
            if seen.st_size > MAX_MANIFEST_BYTES:
                return None
            manifest = msgspec.json.decode(file.read(), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return (manifest, seen.st_mtime_ns) if manifest.key == folder.name and _is_sound(manifest) else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; it, and the names of all files in the folder, are then on the disk.

    Raises:
        OSError: it could not be written.
        WrongTarget: something in its place is no file.
    """
    with write_file(folder / MANIFEST, replace=True) as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def have_sizes(folder: Path, files: Iterable[HashedFile]) -> bool:
    """Tell whether the folder has these files, in their sizes, without reading them."""
    try:
        seen = [(file, (folder / file.path).lstat()) for file in files]
    except OSError:
        return False
    return all(stat.S_ISREG(found.st_mode) and found.st_size == file.bytes for file, found in seen)


def verify_files(folder: Path, files: Iterable[HashedFile]) -> tuple[HashedFile, ...] | None:
    """Return the files as they are now, in order of paths; None if one has not the content that it had.

    A file is read only if its identity is another.
    """
    try:
        found = [_trusted(folder, file) for file in sorted(files, key=lambda file: file.path)]
    except OSError:
        return None
    kept = tuple(file for file in found if file is not None)
    return kept if len(kept) == len(found) else None


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk."""
    descriptor = _open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> bool:
    """Remove what has this name, whatever it is and following no link; tell whether it is gone."""
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        pass
    return not os.path.lexists(path)


def remove_others(folder: Path, files: Iterable[HashedFile]) -> None:
    """Remove what lies beside a form's files."""
    names = {file.path for file in files}
    for found in list(folder.iterdir()):
        if found.name not in names:
            remove(found)


def _is_sound(manifest: Manifest) -> bool:
    if manifest.form is None:
        return manifest.sha256 is None and not manifest.files
    return (
        bool(manifest.files)
        and are_plain_names(manifest.files)
        and form_sha256(manifest.files) == manifest.sha256
    )


def are_plain_names(files: Sequence[HashedFile]) -> bool:
    """Tell whether files that somebody named would lie directly in a folder, each once, beside a manifest."""
    names = {file.path for file in files}
    return len(names) == len(files) and not any(
        name in _NO_FILE or "/" in name or "\0" in name or name.startswith(f".{MANIFEST}") for name in names
    )


def _trusted(folder: Path, file: HashedFile) -> HashedFile | None:
    with _opened(folder / file.path) as opened:
        found = _seen(opened, file)
        if found == file or found.bytes != file.bytes:
            return found if found == file else None
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return found if digest == file.sha256 and _seen(opened, file) == found else None


def _seen(opened: BufferedReader, file: HashedFile) -> HashedFile:
    seen = os.fstat(opened.fileno())
    if not stat.S_ISREG(seen.st_mode):
        raise OSError(f"{file.path} is not a regular file")
    return HashedFile(
        file.path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, file.sha256
    )


def _opened(path: Path) -> BufferedReader:
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    """Open what may be a link or a FIFO, which is not followed or waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


_log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DRAFT = re.compile(r"draft-[0-9a-f]{16}-[0-9a-f]{8}", re.ASCII)


class CacheUnavailable(RuntimeProblem):
    """Prepared forms of models cannot be kept at the moment; models load without."""

    code = "prepared_unavailable"


class CacheFolder:
    """The folder, for the threads of one process.

    Args:
        path: of it; neither it nor what is in it is followed as a link.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path.parent)) / path.name
        self._lock = threading.Lock()
        self._drafts = dict[Path, int]()

    def entry(self, key: str) -> Path:
        """Return where the entry of a key is, if it is there."""
        if not _is_key(key):
            raise ValueError(f"{key!r} is no key")
        return self.path / key

    def entries(self) -> list[Path]:
        """List the entries; a folder that is not there has none.

        Raises:
            PreparedUnavailable: `prepared_unavailable`, it is no folder, or cannot be listed.
        """
        return [path for path in self._listed() if _is_key(path.name)]

    def leftovers(self) -> list[Path]:
        """List the drafts that no process works on, as far as locks say."""
        return [path for path in self._listed() if _is_draft(path.name) and not _is_held(path)]

    def abandoned(self) -> list[Path]:
        """List the drafts that this process does not work on."""
        return [path for path in self._listed() if _is_draft(path.name) and path not in self._drafts]

    def strangers(self) -> list[str]:
        """List the names that we do not give."""
        return [path.name for path in self._listed() if not _is_key(path.name) and not _is_draft(path.name)]

    def make(self) -> None:
        """Make the folder, or see to it that nobody else can put something there (0700).

        What is there is executed, in a way. If its group could write to it, which some systems give to all
        that is mounted, what is there may be anybody's and is removed.

        Raises:
            PreparedUnavailable: `prepared_unavailable`, it is no folder, a link, another user's, open to
                everybody's writing, or it cannot be made.
        """
        with explain_os_errors(self.path):
            try:
                self.path.mkdir(mode=0o700)
            except FileExistsError:
                self._make_ours(self.path.lstat())

    def draft(self, key: str) -> Path:
        """Make an empty folder for an entry of this key.

        Raises:
            PreparedUnavailable: `prepared_unavailable`.
        """
        self.make()
        with self.changing():
            draft = self._new_name(self.entry(key))
            draft.mkdir(mode=0o700)
            self._drafts[draft] = _held(draft)
        return draft

    def discard(self, draft: Path) -> None:
        """Remove a draft if it is there, or tell the log; what is no draft is left alone."""
        if draft.parent == self.path and _is_draft(draft.name):
            _remove(draft)
        descriptor = self._drafts.pop(draft, None)
        if descriptor is not None:
            os.close(descriptor)

    @contextmanager
    def changing(self) -> Iterator[list[Path]]:
        """Change what is there, alone in this process; what is added to the list is removed after that.

        Raises:
            PreparedUnavailable: `prepared_unavailable`, for whatever the file system refuses.
        """
        doomed = list[Path]()
        try:
            with explain_os_errors(self.path), self._lock:
                yield doomed
        finally:
            for path in doomed:
                _remove(path)

    def put(self, draft: Path, key: str, doomed: list[Path]) -> None:
        """Have a draft, which is on the disk, be the entry of a key instead of what was, durably."""
        path = self.entry(key)
        if os.path.lexists(path):
            self.take_away(path, doomed)
        draft.rename(path)
        sync(self.path)

    def take_away(self, path: Path, doomed: list[Path]) -> None:
        """Take an entry's name from it, if another process was not faster."""
        draft = self._new_name(path)
        with suppress(FileNotFoundError):
            path.rename(draft)
            doomed.append(draft)

    def _listed(self) -> list[Path]:
        with explain_os_errors(self.path):
            try:
                self._refuse_irregular(self.path.lstat())
                return sorted(self.path.iterdir(), key=lambda path: path.name)
            except FileNotFoundError:
                return []

    def _make_ours(self, seen: os.stat_result) -> None:
        self._refuse_irregular(seen)
        mode = stat.S_IMODE(seen.st_mode)
        if seen.st_uid != os.geteuid():
            raise CacheUnavailable(
                f"{self.path} belongs to user {seen.st_uid}, and this process is user {os.geteuid()}: remove"
                " it, or give it to this user"
            )
        if mode & stat.S_IWOTH:
            raise CacheUnavailable(
                f"everybody can write to {self.path}, so what is in it may be anybody's: remove it"
            )
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            self.path.chmod(0o700)
        if mode & stat.S_IWGRP:
            _log.warning("the group could write to %s: what was prepared is removed", self.path)
            for path in [*self.entries(), *self.abandoned()]:
                _remove(path)

    def _refuse_irregular(self, seen: os.stat_result) -> None:
        if not stat.S_ISDIR(seen.st_mode):
            what = "a symbolic link" if stat.S_ISLNK(seen.st_mode) else "no folder"
            raise CacheUnavailable(f"{self.path} is {what}: remove it, and a folder is made there")

    def _new_name(self, entry: Path) -> Path:
        return self.path / f"draft-{entry.name[:16]}-{secrets.token_hex(4)}"


@contextmanager
def explain_os_errors(folder: Path) -> Iterator[None]:
    """Say of all that the file system refuses what it means."""
    try:
        yield
    except (OSError, LedgerProblem) as error:
        raise CacheUnavailable(f"prepared models cannot be kept in {folder}: {error}") from error


def _is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


def _is_draft(name: str) -> bool:
    return _DRAFT.fullmatch(name) is not None


def _held(draft: Path) -> int:
    """Lock a draft until the descriptor is closed, where folders can be locked."""
    descriptor = _open_draft(draft)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_held(draft: Path) -> bool:
    """Tell whether a process works on a draft; what cannot be locked may be worked on."""
    try:
        descriptor = _open_draft(draft)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open_draft(draft: Path) -> int:
    return os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove(path: Path) -> None:
    if not remove(path):
        _log.warning("%s could not be removed", path)
