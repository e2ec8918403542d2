"""What the store records: a version's manifest, and from which files of the repository it was taken.

Both are JSON files. One that cannot be read, or does not agree with its own name, counts as none.

Stored files are still the ones that were hashed if they have their recorded identities. Only the server
writes to the store, and never to a file that is there; so a file with its recorded device, inode, size and
time has its recorded content. A data directory that was copied, restored or mounted anew is hashed once.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import msgspec

from events.types import Contents
from runtime.repository import FoundFile
from runtime.store.copying import OnPiece, hash_descriptor, on_no_piece
from runtime.store.folder import walk_files
from runtime.wire import Count, FileNumber, Name, Sha256, Time

R = TypeVar("R", bound=msgspec.Struct)

MANIFEST = "manifest.json"
MAX_BYTES = 64 * 2**20
"""The longest allowed list of files with the longest paths fits."""


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a stored version: its content, and the identity of our copy.

    The identity has no ctime: linking a shared blob changes that.
    """

    path: Name
    bytes: Count
    sha256: Sha256
    dev: FileNumber
    inode: FileNumber
    mtime_ns: Time


class StoredVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version in the store, with its files in order of their paths.

    It is written as the version's manifest when everything else is on the disk.
    """

    digest: Sha256
    files: tuple[StoredFile, ...]
    layout: Literal[1] = 1

    @property
    def contents(self) -> Contents:
        return tuple((file.path, file.sha256) for file in self.files)


class SourceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The digest that a version of the repository had, and the files that it was taken from."""

    digest: Sha256
    files: tuple[FoundFile, ...]


def digest_of(contents: Iterable[tuple[str, str]]) -> str:
    """Return the digest of a version: SHA-256 over a line "<sha256> <path>" per file, ordered by path.

    Args:
        contents: path and SHA-256 of each file. Backslashes and line breaks in a path are escaped as
            `sha256sum` does, so that no other list of files has the same lines.
    """
    lines = (f"{sha256} {_escape(path)}\n" for path, sha256 in sorted(contents))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace("\n", "\\n")


def read_version(folder: Path) -> StoredVersion | None:
    """Read the manifest of a version's folder, but none of its files; None if there is no valid one."""
    version = read_record(folder / MANIFEST, StoredVersion)
    return version if version is not None and _is_sound(version, folder.name) else None


def encode_record(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def read_record(path: Path, kind: type[R]) -> R | None:
    """Read a record from its file; None if there is no valid one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            seen = os.fstat(descriptor)
            if not stat.S_ISREG(seen.st_mode) or seen.st_size > MAX_BYTES:
                return None
            return msgspec.json.decode(file.read(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _is_sound(version: StoredVersion, name: str) -> bool:
    """Whether a manifest is of the folder of this name, and all its paths lie within."""
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
        OSError: it cannot be read, or is no regular file.
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
    """Return the files with their present identities; None if the folder has others, or other contents.

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
    """Return whether this is a regular file with the recorded identity."""
    identity = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
    return stat.S_ISREG(seen.st_mode) and identity == (file.dev, file.inode, file.bytes, file.mtime_ns)
