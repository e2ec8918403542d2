"""How bytes get into the store: cloned, copied within the kernel, or read and written; and their hashes."""

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable

from runtime.errors import CopyCancelled

FICLONE = 0x40049409
"""linux/fs.h: the new file shares the old one's blocks until one of them is written to (btrfs, XFS)."""
PIECE_BYTES = 2**23
"""Between two checks for a cancellation: some milliseconds, and on a slow disk a tenth of a second."""
HASH_BLOCK_BYTES = 2**19
"""Fits into a core's own cache: the session beside it needs the shared one. hashlib releases the interpreter
for each."""

_CANNOT_CLONE = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
)
_CANNOT_COPY_RANGE = _CANNOT_CLONE | {errno.EBADF, errno.EIO}

IsCancelled = Callable[[], bool]
"""Asked between two pieces; may be called in any thread."""


def is_never() -> bool:
    return False


class FileCopier:
    """Copies files into one folder, in the fastest way that its file system and theirs allow.

    Args:
        before_copying: called once, before the first file that takes disk space of its own.
        is_cancelled: whether to stop.
    """

    def __init__(self, before_copying: Callable[[], None], is_cancelled: IsCancelled) -> None:
        self._before_copying = before_copying
        self._is_cancelled = is_cancelled
        self._clones = True
        self._copies_ranges = True
        self._began = False

    def copy(self, source: int, target: int, size: int) -> int:
        """Copy the first `size` bytes of an open file into an empty one; returns how many there were.

        Raises:
            CopyCancelled: `copy_cancelled`.
            OSError: a descriptor cannot be read or written.
        """
        check_cancelled(self._is_cancelled)
        if size and self._clone(source, target):
            return os.fstat(target).st_size
        if not self._began:
            self._before_copying()
            self._began = True
        copied = self._copy_ranges(source, target, size) if self._copies_ranges else 0
        return copied + self._read_and_write(source, target, size - copied)

    def _clone(self, source: int, target: int) -> bool:
        if self._clones:
            try:
                fcntl.ioctl(target, FICLONE, source)
            except OSError as error:
                if error.errno not in _CANNOT_CLONE:
                    raise
                self._clones = False
        return self._clones

    def _copy_ranges(self, source: int, target: int, size: int) -> int:
        copied = 0
        while copied < size:
            try:
                count = os.copy_file_range(source, target, min(PIECE_BYTES, size - copied))
            except OSError as error:
                if copied or error.errno not in _CANNOT_COPY_RANGE:
                    raise
                self._copies_ranges = False
                return 0
            if not count:  # the end; or a file system that cannot say so, which reading shows
                break
            copied += count
            check_cancelled(self._is_cancelled)
        return copied

    def _read_and_write(self, source: int, target: int, size: int) -> int:
        copied = 0
        while copied < size and (block := os.read(source, min(HASH_BLOCK_BYTES, size - copied))):
            written = 0
            while written < len(block):
                written += os.write(target, memoryview(block)[written:])
            copied += len(block)
            check_cancelled(self._is_cancelled)
        return copied


def hash_descriptor(descriptor: int, is_cancelled: IsCancelled) -> str:
    """Return the SHA-256 of an open file, from its beginning, in 64 hex digits.

    Raises:
        CopyCancelled: `copy_cancelled`.
        OSError: it cannot be read.
    """
    digest, position = hashlib.sha256(), 0
    # Mapped, since memory that a thread frees stays with its arena, and each load has threads of its own.
    with mmap.mmap(-1, HASH_BLOCK_BYTES) as mapped, memoryview(mapped) as block:
        while length := os.preadv(descriptor, [block], position):
            with block[:length] as read:
                digest.update(read)
            position += length
            check_cancelled(is_cancelled)
    return digest.hexdigest()


def check_cancelled(is_cancelled: IsCancelled) -> None:
    """Raise if the work was cancelled.

    Raises:
        CopyCancelled: `copy_cancelled`.
    """
    if is_cancelled():
        raise CopyCancelled
