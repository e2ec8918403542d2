"""Whether stored files are still the ones that were hashed: by identity, else by content.

Only the server writes to the store, and never to a file that is there. So a file with its recorded device,
inode, size and time has its recorded content; a data directory that was copied, restored or mounted anew is
hashed once.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from runtime.store.copying import IsCancelled, hash_descriptor
from runtime.store.folder import walk_files
from runtime.store.manifest import StoredFile


def is_never() -> bool:
    """Return False: this work is not cancelled."""
    return False


def hash_file(folder: Path, path: str, is_cancelled: IsCancelled = is_never) -> StoredFile:
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
        sha256 = hash_descriptor(descriptor, is_cancelled)
    finally:
        os.close(descriptor)
    return StoredFile(path, seen.st_size, sha256, seen.st_dev, seen.st_ino, seen.st_mtime_ns)


def hash_files(folder: Path, is_cancelled: IsCancelled = is_never) -> tuple[StoredFile, ...]:
    """Return all files beneath a folder with their hashes, in order of their paths.

    Raises:
        CopyCancelled: `copy_cancelled`.
        OSError: a file cannot be read, or is no regular file.
    """
    return tuple(hash_file(folder, path, is_cancelled) for path in walk_files(folder)[0])


def rehash_files(
    folder: Path, files: Sequence[StoredFile], is_cancelled: IsCancelled = is_never
) -> tuple[StoredFile, ...] | None:
    """Return the files with their present identities; None if the folder has others, or other contents.

    Raises:
        CopyCancelled: `copy_cancelled`.
        OSError: a file cannot be read.
    """
    if walk_files(folder)[0] != [file.path for file in files]:
        return None
    found = hash_files(folder, is_cancelled)
    same = [file.sha256 for file in found] == [file.sha256 for file in files]
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
