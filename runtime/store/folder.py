"""The store's folder: its names, its access rights, and its records of versions and their files.

`blobs/<2 hex>/<sha256>` are files, `versions/<digest>` folders of hard links to them, `incoming/<16 hex>`
additions and removals in progress, `sources/<model>/<version>.json` the source record of a version of the
repository. Other names are left alone.

Records are JSON files; a record that cannot be read, or does not agree with its own name, is ignored. A
stored file with its recorded identity is still the file that was hashed: only the server writes to the store,
and never to an existing file. A data directory that was copied, restored or mounted anew is hashed once.
"""

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import msgspec

from events.files import sync
from events.types import Contents, digest_of
from runtime.errors import DiskFull, StoreUnavailable
from runtime.memory import free_disk_bytes
from runtime.repository import FoundFile
from runtime.wire import Count, FileNumber, Name, Sha256, Time

STORE = "store"
"""The folder's name in the data directory."""
FILES = "files"
"""The folder of a version's files, beside its manifest."""

_BLOBS, _VERSIONS, _INCOMING, _SOURCES = "blobs", "versions", "incoming", "sources"
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
        self._parts = (_BLOBS, _VERSIONS, _INCOMING, _SOURCES)

    def blob(self, sha256: str) -> Path:
        return self.path / _BLOBS / sha256[:2] / sha256

    def version(self, digest: str) -> Path:
        return self.path / _VERSIONS / digest

    def source(self, model_id: str, version: int) -> Path:
        return self.path / _SOURCES / model_id / f"{version}.json"

    def versions(self) -> list[Path]:
        return [path for path in _names(self.path / _VERSIONS) if _HASH.fullmatch(path.name)]

    def blobs(self) -> Iterator[Path]:
        for folder in _names(self.path / _BLOBS):
            if _PREFIX.fullmatch(folder.name):
                yield from (path for path in _names(folder) if _HASH.fullmatch(path.name))

    def incoming(self) -> list[Path]:
        return [path for path in _names(self.path / _INCOMING) if _RANDOM.fullmatch(path.name)]

    def sources(self) -> Iterator[Path]:
        for folder in _names(self.path / _SOURCES):
            yield from (path for path in _names(folder) if path.suffix == ".json")

    def make(self) -> bool:
        """Create the folders, or make sure that only this user can write to them (0700).

        Returns:
            Whether only this user could write to the folders. If the group could, which some systems grant on
            all mounted folders, identities prove nothing.

        Raises:
            StoreUnavailable: `store_unavailable`, the path is no folder, a link, another user's, writable by
                everybody, or cannot be created.
        """
        with explain_os_errors(self.path):
            own = _make_private(self.path)
            for part in self._parts:
                own = _make_private(self.path / part) and own
        return own

    def check(self) -> None:
        """Refuse a store that is a link or no folder; a missing store is empty.

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
        """Write a file that gets its name in one step, replacing an older file."""
        temporary = self._new_name()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                if durably:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durably:
            sync(path.parent)

    def link_over(self, existing: Path, path: Path) -> None:
        """Replace a file by a hard link to an existing one, in one step."""
        temporary = self._new_name()
        os.link(existing, temporary, follow_symlinks=False)
        try:
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # it stays if both were the same file already

    def take_out(self, path: Path) -> None:
        """Rename a file or folder in one step to a name for removal, and remove it, if it still exists."""
        away = self._new_name()
        with suppress(FileNotFoundError):
            path.rename(away)
            remove(away)

    def _new_name(self) -> Path:
        return self.path / _INCOMING / secrets.token_hex(8)


@contextmanager
def explain_os_errors(folder: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn an error of the file system into `StoreUnavailable`, or `DiskFull` with the missing bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(needed_bytes, free_disk_bytes(folder)) from error
        raise StoreUnavailable(f"the store in {folder} cannot be used: {error}") from error


def remove(path: Path) -> None:
    """Remove a file or folder, following no link; a failure is logged."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        _log.warning("%s could not be removed", path)


def walk_files(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the paths of all files and links beneath a folder, sorted, and all folders.

    For folders that only the server writes to; links are not followed. `VersionFolder` walks those of others.
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


FICLONE = 0x40049409
"""linux/fs.h: the new file shares the old one's blocks until one of them is written to (btrfs, XFS)."""
PIECE_BYTES = 2**23
"""Bytes between two checks for a cancellation: some milliseconds, on a slow disk a tenth of a second."""
HASH_BLOCK_BYTES = 2**19
"""Fits into a core's own cache: the session beside it needs the shared cache. hashlib releases the
interpreter for each block."""

_CANNOT_CLONE = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
)
_CANNOT_COPY_RANGE = _CANNOT_CLONE | {errno.EBADF, errno.EIO}

OnPiece = Callable[[], None]
"""Called between two pieces, in any thread; ends the work by raising `CopyCancelled`."""


def on_no_piece() -> None:
    """Let the work go on."""


def copy_file(
    source: int, target: int, size: int, before_copying: Callable[[], None], on_piece: OnPiece
) -> int:
    """Copy the first `size` bytes of an open file into an empty one, in the fastest way that works.

    Returns the number of bytes. `before_copying` is called before the copy takes disk space of its own.

    Raises:
        CopyCancelled: `copy_cancelled`.
        OSError: a descriptor cannot be read or written.
    """
    on_piece()
    if not size:
        return 0
    if clone(source, target):
        return os.fstat(target).st_size
    before_copying()
    copied = copy_ranges(source, target, size, on_piece)
    return copied + read_and_write(source, target, size - copied, on_piece)


def clone(source: int, target: int) -> bool:
    """Let a file share the blocks of another; returns False if their file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno not in _CANNOT_CLONE:
            raise
        return False
    return True


def copy_ranges(source: int, target: int, size: int, on_piece: OnPiece) -> int:
    """Copy within the kernel, as far as the file systems allow; returns the number of bytes."""
    copied = 0
    while copied < size:
        try:
            count = os.copy_file_range(source, target, min(PIECE_BYTES, size - copied))
        except OSError as error:
            if copied or error.errno not in _CANNOT_COPY_RANGE:
                raise
            return 0
        if not count:  # the end, or a file system that reports 0 instead of an error: reading finds out
            break
        copied += count
        on_piece()
    return copied


def read_and_write(source: int, target: int, size: int, on_piece: OnPiece) -> int:
    """Copy from the descriptors' present positions; returns the number of bytes."""
    copied = 0
    while copied < size and (block := os.read(source, min(HASH_BLOCK_BYTES, size - copied))):
        written = 0
        while written < len(block):
            written += os.write(target, memoryview(block)[written:])
        copied += len(block)
        on_piece()
    return copied


def hash_descriptor(descriptor: int, on_piece: OnPiece) -> str:
    """Return the SHA-256 of an open file, from its beginning, in 64 hex digits.

    Raises:
        CopyCancelled: `copy_cancelled`.
        OSError: the file cannot be read.
    """
    digest, position = hashlib.sha256(), 0
    # Mapped, since memory that a thread frees stays with its arena, and each load has threads of its own.
    with mmap.mmap(-1, HASH_BLOCK_BYTES) as mapped, memoryview(mapped) as block:
        while length := os.preadv(descriptor, [block], position):
            with block[:length] as read:
                digest.update(read)
            position += length
            on_piece()
    return digest.hexdigest()


R = TypeVar("R", bound=msgspec.Struct)

MANIFEST = "manifest.json"
MAX_LIST_BYTES = 64 * 2**20
"""The longest allowed list of files with the longest paths fits."""


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a stored version: its content, and the identity of our copy.

    The identity has no ctime: linking a shared blob changes the ctime.
    """

    path: Name
    bytes: Count
    sha256: Sha256
    dev: FileNumber
    inode: FileNumber
    mtime_ns: Time


class StoredVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version in the store, with its files in order of their paths.

    Written as the version's manifest when all its files are on the disk.
    """

    digest: Sha256
    files: tuple[StoredFile, ...]
    layout: Literal[1] = 1

    @property
    def contents(self) -> Contents:
        return tuple((file.path, file.sha256) for file in self.files)


class SourceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The digest that a version of the repository had, and the files that were taken."""

    digest: Sha256
    files: tuple[FoundFile, ...]


def read_version(folder: Path) -> StoredVersion | None:
    """Return the manifest of a version's folder, or None without a valid one; the files are not read."""
    version = read_record(folder / MANIFEST, StoredVersion)
    return version if version is not None and _is_sound(version, folder.name) else None


def encode_record(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def read_record(path: Path, kind: type[R]) -> R | None:
    """Return the record in a file, or None if the file has no valid record."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            seen = os.fstat(descriptor)
            if not stat.S_ISREG(seen.st_mode) or seen.st_size > MAX_LIST_BYTES:
                return None
            return msgspec.json.decode(file.read(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _is_sound(version: StoredVersion, name: str) -> bool:
    """Whether a manifest belongs to the folder of this name, and all its paths lie within."""
    paths = [file.path for file in version.files]
    return (
        bool(paths)
        and paths == sorted(set(paths))
        and all(_is_within(path) for path in paths)
        and version.digest == name == digest_of(version.contents)
    )


def _is_within(path: str) -> bool:
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and "\0" not in path and str(pure) == path


def hash_file(folder: Path, path: str, on_piece: OnPiece = on_no_piece) -> StoredFile:
    """Return a file of the store with the hash of its content.

    Raises:
        CopyCancelled: `copy_cancelled`.
        OSError: the file cannot be read, or is no regular file.
    """
    descriptor = os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(folder / path))
        sha256 = hash_descriptor(descriptor, on_piece)
    finally:
        os.close(descriptor)
    return StoredFile(path, seen.st_size, sha256, seen.st_dev, seen.st_ino, seen.st_mtime_ns)


def hash_files(folder: Path, on_piece: OnPiece = on_no_piece) -> tuple[StoredFile, ...]:
    """Return all files beneath a folder with their hashes, in order of their paths.

    Raises:
        CopyCancelled: `copy_cancelled`.
        OSError: a file cannot be read, or is no regular file.
    """
    return tuple(hash_file(folder, path, on_piece) for path in walk_files(folder)[0])


def rehash_files(
    folder: Path, files: Sequence[StoredFile], on_piece: OnPiece = on_no_piece
) -> tuple[StoredFile, ...] | None:
    """Return the files with their present identities, or None if the folder's files or contents differ.

    Raises:
        CopyCancelled: `copy_cancelled`.
        OSError: a file cannot be read.
    """
    found = hash_files(folder, on_piece)
    same = [(file.path, file.sha256) for file in found] == [(file.path, file.sha256) for file in files]
    return found if same else None


def have_identities(folder: Path, files: Sequence[StoredFile]) -> bool:
    """Return whether a folder has exactly these files, each with its recorded identity."""
    try:
        if walk_files(folder)[0] != [file.path for file in files]:
            return False
        return all(has_identity((folder / file.path).lstat(), file) for file in files)
    except OSError:
        return False


def has_identity(seen: os.stat_result, file: StoredFile) -> bool:
    """Return whether a status is that of a regular file with the recorded identity."""
    identity = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
    return stat.S_ISREG(seen.st_mode) and identity == (file.dev, file.inode, file.bytes, file.mtime_ns)
