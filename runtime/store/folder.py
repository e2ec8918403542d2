"""The store's folder: its paths, who may write to it, and how names appear in it and vanish from it.

`blobs/<2 hex>/<sha256>` are files, `versions/<digest>` folders of hard links to them, `incoming/<16 hex>`
what is being taken or removed, `sources/<model>/<version>.json` what was taken from where, `forms/<key>`
optimised forms (`runtime.cache`). A name that is none of these is left alone.
"""

import errno
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from events.files import sync
from runtime.errors import DiskFull, StoreUnavailable
from runtime.memory import free_disk_bytes

STORE = "store"
"""The folder's name in the data directory."""
FILES = "files"
"""The folder of a version's files, beside its manifest."""

_BLOBS, _VERSIONS, _INCOMING, _SOURCES, _FORMS = "blobs", "versions", "incoming", "sources", "forms"
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PREFIX = re.compile(r"[0-9a-f]{2}", re.ASCII)
_RANDOM = re.compile(r"[0-9a-f]{16}", re.ASCII)

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers of errors for lack of disk space."""

_log = logging.getLogger(__name__)


class StoreFolder:
    """The paths of one store."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path.parent)) / path.name
        self._parts = (_BLOBS, _VERSIONS, _INCOMING, _SOURCES, _FORMS)

    def blob(self, sha256: str) -> Path:
        return self.path / _BLOBS / sha256[:2] / sha256

    def version(self, digest: str) -> Path:
        return self.path / _VERSIONS / digest

    def source(self, model_id: str, version: int) -> Path:
        return self.path / _SOURCES / model_id / f"{version}.json"

    def form(self, key: str) -> Path:
        return self.path / _FORMS / key

    def forms(self) -> list[Path]:
        return [path for path in self._list(_FORMS) if _HASH.fullmatch(path.name)]

    def versions(self) -> list[Path]:
        return [path for path in self._list(_VERSIONS) if _HASH.fullmatch(path.name)]

    def blobs(self) -> Iterator[Path]:
        for folder in self._list(_BLOBS):
            if _PREFIX.fullmatch(folder.name):
                yield from (path for path in _names(folder) if _HASH.fullmatch(path.name))

    def incoming(self) -> list[Path]:
        return [path for path in self._list(_INCOMING) if _RANDOM.fullmatch(path.name)]

    def sources(self) -> Iterator[Path]:
        for folder in self._list(_SOURCES):
            yield from (path for path in _names(folder) if path.suffix == ".json")

    def make(self) -> bool:
        """Create the folders, or make sure that only this user can write to them (0700).

        Returns:
            Whether only this user could write to what is there. If its group could, which some systems grant
            on all that is mounted, identities prove nothing; forms, whose names are not the hashes of what
            they hold, are removed.

        Raises:
            StoreUnavailable: `store_unavailable`, the path is no folder, a link, another user's, writable by
                everybody, or cannot be created.
        """
        with explain_os_errors(self.path):
            own = _make_private(self.path)
            for part in self._parts:
                own = _make_private(self.path / part) and own
            for path in () if own else self.forms():
                remove(path)
        return own

    def check(self) -> None:
        """Refuse a store that is a link or no folder; one that is missing is empty.

        Raises:
            StoreUnavailable: `store_unavailable`.
        """
        for path in (self.path, *(self.path / part for part in self._parts)):
            with suppress(FileNotFoundError):
                _refuse_irregular(path, path.lstat())

    def new_incoming(self) -> Path:
        path = self._new_name()
        try:
            path.mkdir(mode=0o700)
        except FileNotFoundError:  # somebody has removed the store meanwhile
            self.make()
            path.mkdir(mode=0o700)
        return path

    def write(self, path: Path, content: bytes, *, durably: bool) -> None:
        """Write a file that gets its name in one step, in place of an older one."""
        draft = self._new_name()
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                if durably:
                    os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        if durably:
            sync(path.parent)

    def link_over(self, existing: Path, path: Path) -> None:
        """Replace a file by a hard link to an existing one, in one step."""
        draft = self._new_name()
        os.link(existing, draft, follow_symlinks=False)
        try:
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)  # it stays if both were the same file already

    def move_away(self, path: Path) -> Path | None:
        """Take its name from a folder, which is then to be removed; None if it is gone."""
        away = self._new_name()
        try:
            path.rename(away)
        except FileNotFoundError:
            return None
        return away

    def _new_name(self) -> Path:
        return self.path / _INCOMING / secrets.token_hex(8)

    def _list(self, part: str) -> list[Path]:
        return _names(self.path / part)


@contextmanager
def explain_os_errors(folder: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn every refusal of the file system into `StoreUnavailable`, or `DiskFull` with what is missing."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(needed_bytes, free_disk_bytes(folder)) from error
        raise StoreUnavailable(f"the store in {folder} cannot be used: {error}") from error


def remove(path: Path) -> None:
    """Remove a file or folder, following no link; what cannot be removed is logged."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        _log.warning("%s could not be removed", path)


def walk_files(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the paths of all that lies beneath a folder and is no folder, sorted, and all folders.

    For folders that only the server writes to: a link is no folder and is not followed. `VersionFolder`
    walks those of others.
    """
    files, folders = list[str](), [folder]
    for within in folders:
        with os.scandir(within) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                else:
                    files.append(Path(entry.path).relative_to(folder).as_posix())
    return sorted(files), folders


def _names(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _make_private(path: Path) -> bool:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return _make_ours(path, path.lstat())
    return True


def _refuse_irregular(path: Path, seen: os.stat_result) -> None:
    if not stat.S_ISDIR(seen.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(seen.st_mode) else "no folder"
        raise StoreUnavailable(f"{path} is {what}: remove it, and a folder is created there")


def _make_ours(path: Path, seen: os.stat_result) -> bool:
    _refuse_irregular(path, seen)
    if seen.st_uid != os.geteuid():
        raise StoreUnavailable(
            f"{path} belongs to user {seen.st_uid}, and this process is user {os.geteuid()}: remove it, or"
            " change its owner to this user"
        )
    mode = stat.S_IMODE(seen.st_mode)
    if mode & stat.S_IWOTH:
        raise StoreUnavailable(f"everybody can write to {path}, so its content may be anybody's: remove it")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        path.chmod(0o700)
    return not mode & stat.S_IWGRP
