"""What the store records: a version's manifest, and from which files of the repository it was taken.

Both are JSON files. One that cannot be read, or does not agree with its own name, counts as none.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import msgspec

from runtime.repository import FoundFile
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


class StoredManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A complete version in the store; it is written when everything else is on the disk."""

    digest: Sha256
    files: tuple[StoredFile, ...]
    layout: Literal[1] = 1


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The identity of a repository's file when it was copied."""

    path: Name
    dev: FileNumber
    inode: FileNumber
    bytes: Count
    mtime_ns: Time
    ctime_ns: Time


class SourceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The digest that a version of the repository had, and the files that it was taken from."""

    digest: Sha256
    files: tuple[SourceFile, ...]

    def is_of(self, files: Sequence[FoundFile]) -> bool:
        """Whether these are the files, unchanged."""
        return self.files == describe_sources(files)


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version in the store: the folder to load from, and its files in order of their paths."""

    digest: str
    folder: Path
    files: tuple[StoredFile, ...]

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def contents(self) -> tuple[tuple[str, str], ...]:
        """Path and SHA-256 of each file, in order of their paths."""
        return tuple((file.path, file.sha256) for file in self.files)


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


def describe_sources(files: Iterable[FoundFile]) -> tuple[SourceFile, ...]:
    """Return files of the repository as they are recorded."""
    return tuple(
        SourceFile(file.path, file.dev, file.inode, file.bytes, file.mtime_ns, file.ctime_ns)
        for file in files
    )


def read_version_manifest(folder: Path) -> StoredManifest | None:
    """Read the manifest of a version's folder, but none of its files; None if there is no valid one."""
    manifest = read_record(folder / MANIFEST, StoredManifest)
    return manifest if manifest is not None and _is_sound(manifest, folder.name) else None


def read_source_record(path: Path) -> SourceRecord | None:
    """Read a source record; None if there is no valid one."""
    return read_record(path, SourceRecord)


def encode_record(record: msgspec.Struct) -> bytes:
    """Return the content of a record's file."""
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


def _is_sound(manifest: StoredManifest, name: str) -> bool:
    """Whether a manifest is of the folder of this name, and all its paths lie within."""
    paths = [file.path for file in manifest.files]
    contents = [(file.path, file.sha256) for file in manifest.files]
    return (
        bool(paths)
        and paths == sorted(set(paths))
        and all(_is_within(path) for path in paths)
        and manifest.digest == name == digest_of(contents)
    )


def _is_within(path: str) -> bool:
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and "\0" not in path and str(pure) == path
