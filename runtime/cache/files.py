"""The cache's folder: drafts and entries, who may write to it, and files that can be trusted.

An entry is a folder named by its key. It is written as a draft beside the others and then renamed, and it is
renamed to a draft before it is removed: no reader ever sees part of an entry. Each process locks its drafts,
so that the drafts of a killed process can be recognised.

A file is trusted by its identity, which changes when it is written to or replaced. If the identity differs,
because the data directory was copied, restored or mounted anew, the content decides.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from events.errors import LedgerProblem
from runtime.errors import RuntimeProblem
from runtime.wire import HashedFile

_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DRAFT = re.compile(r"draft-[0-9a-f]{16}-[0-9a-f]{8}", re.ASCII)

_log = logging.getLogger(__name__)


def have_sizes(folder: Path, files: Iterable[HashedFile]) -> bool:
    """Return whether the folder has these files with these sizes; reads none of them."""
    try:
        seen = [(file, (folder / file.path).lstat()) for file in files]
    except OSError:
        return False
    return all(stat.S_ISREG(found.st_mode) and found.st_size == file.bytes for file, found in seen)


def verify_files(folder: Path, files: Iterable[HashedFile]) -> tuple[HashedFile, ...] | None:
    """Return the files with their present identities, ordered by path; None if the content of one differs.

    A file is read only if its identity has changed.
    """
    try:
        found = [_verify_file(folder, file) for file in sorted(files, key=lambda file: file.path)]
    except OSError:
        return None
    kept = tuple(file for file in found if file is not None)
    return kept if len(kept) == len(found) else None


def sync(path: Path) -> None:
    """Write a file's content, or the names in a folder, to the disk."""
    descriptor = _open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> bool:
    """Remove a file, folder or link, following no link; returns whether it is gone."""
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        pass
    return not os.path.lexists(path)


def remove_others(folder: Path, files: Iterable[HashedFile]) -> None:
    """Remove all other files of a cached model's folder."""
    names = {file.path for file in files}
    for found in list(folder.iterdir()):
        if found.name not in names:
            remove(found)


def _verify_file(folder: Path, file: HashedFile) -> HashedFile | None:
    with open_file(folder / file.path) as opened:
        found = _with_identity(opened, file)
        if found == file or found.bytes != file.bytes:
            return found if found == file else None
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return found if digest == file.sha256 and _with_identity(opened, file) == found else None


def _with_identity(opened: BufferedReader, file: HashedFile) -> HashedFile:
    seen = os.fstat(opened.fileno())
    if not stat.S_ISREG(seen.st_mode):
        raise OSError(f"{file.path} is not a regular file")
    return HashedFile(
        file.path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, file.sha256
    )


def open_file(path: Path) -> BufferedReader:
    """Open a file to read, following no link and waiting for no FIFO."""
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


class CacheUnavailable(RuntimeProblem):
    """The model cache cannot be used at the moment; models load without it."""

    code = "prepared_unavailable"


class CacheFolder:
    """The cache's folder, for the threads of one process; no link to it or in it is followed."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path.parent)) / path.name
        self._lock = threading.Lock()
        self._drafts = dict[Path, int]()

    def entry(self, key: str) -> Path:
        """Return the path of a key's entry, which may not exist."""
        if not _is_key(key):
            raise ValueError(f"{key!r} is no key")
        return self.path / key

    def entries(self) -> list[Path]:
        """List the entries; a missing folder has none.

        Raises:
            CacheUnavailable: `prepared_unavailable`, the path is no folder or cannot be listed.
        """
        return [path for path in self._list() if _is_key(path.name)]

    def unlocked_drafts(self) -> list[Path]:
        """List the drafts that no process has locked."""
        return [path for path in self._list() if _is_draft(path.name) and not _is_held(path)]

    def abandoned_drafts(self) -> list[Path]:
        """List the drafts that are not of this process."""
        return [path for path in self._list() if _is_draft(path.name) and path not in self._drafts]

    def foreign_names(self) -> list[str]:
        """List the names that are neither keys nor drafts."""
        return [path.name for path in self._list() if not _is_key(path.name) and not _is_draft(path.name)]

    def make(self) -> None:
        """Create the folder, or make sure that only this user can write to it (0700).

        A cached model is executed, in a way. If the folder's group could write to it, which some systems
        grant on all that is mounted, its content may be anybody's and is removed.

        Raises:
            CacheUnavailable: `prepared_unavailable`, the path is no folder, a link, another user's, writable
                by everybody, or cannot be created.
        """
        with explain_os_errors(self.path):
            try:
                self.path.mkdir(mode=0o700)
            except FileExistsError:
                self._make_ours(self.path.lstat())

    def draft(self, key: str) -> Path:
        """Create an empty draft for an entry of this key.

        Raises:
            CacheUnavailable: `prepared_unavailable`.
        """
        self.make()
        with self.lock():
            draft = self._new_name(self.entry(key))
            draft.mkdir(mode=0o700)
            self._drafts[draft] = _lock_draft(draft)
        return draft

    def discard(self, draft: Path) -> None:
        """Remove a draft, if it exists; a failure is logged, and other paths are left alone."""
        if draft.parent == self.path and _is_draft(draft.name):
            _remove(draft)
        descriptor = self._drafts.pop(draft, None)
        if descriptor is not None:
            os.close(descriptor)

    @contextmanager
    def lock(self) -> Iterator[list[Path]]:
        """Lock the folder in this process; paths added to the yielded list are removed afterwards.

        Raises:
            CacheUnavailable: `prepared_unavailable`, for every refusal of the file system.
        """
        doomed = list[Path]()
        try:
            with explain_os_errors(self.path), self._lock:
                yield doomed
        finally:
            for path in doomed:
                _remove(path)

    def put(self, draft: Path, key: str, doomed: list[Path]) -> None:
        """Rename a synced draft to the entry of a key, durably, in place of an older one."""
        path = self.entry(key)
        if os.path.lexists(path):
            self.unlink_entry(path, doomed)
        draft.rename(path)
        sync(self.path)

    def unlink_entry(self, path: Path, doomed: list[Path]) -> None:
        """Rename an entry to a draft, to be removed; another process may have been faster."""
        draft = self._new_name(path)
        with suppress(FileNotFoundError):
            path.rename(draft)
            doomed.append(draft)

    def _list(self) -> list[Path]:
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
                " it, or change its owner to this user"
            )
        if mode & stat.S_IWOTH:
            raise CacheUnavailable(
                f"everybody can write to {self.path}, so its content may be anybody's: remove it"
            )
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            self.path.chmod(0o700)
        if mode & stat.S_IWGRP:
            _log.warning("the group could write to %s: its prepared models are removed", self.path)
            for path in [*self.entries(), *self.abandoned_drafts()]:
                _remove(path)

    def _refuse_irregular(self, seen: os.stat_result) -> None:
        if not stat.S_ISDIR(seen.st_mode):
            what = "a symbolic link" if stat.S_ISLNK(seen.st_mode) else "no folder"
            raise CacheUnavailable(f"{self.path} is {what}: remove it, and a folder is created there")

    def _new_name(self, entry: Path) -> Path:
        return self.path / f"draft-{entry.name[:16]}-{secrets.token_hex(4)}"


@contextmanager
def explain_os_errors(folder: Path) -> Iterator[None]:
    """Turn every refusal of the file system into `CacheUnavailable`."""
    try:
        yield
    except (OSError, LedgerProblem) as error:
        raise CacheUnavailable(f"prepared models cannot be kept in {folder}: {error}") from error


def _is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


def _is_draft(name: str) -> bool:
    return _DRAFT.fullmatch(name) is not None


def _lock_draft(draft: Path) -> int:
    """Lock a draft until the descriptor is closed, where folders can be locked."""
    descriptor = _open_draft(draft)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_held(draft: Path) -> bool:
    """Return whether a process has locked a draft; a draft that cannot be locked counts as locked."""
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
