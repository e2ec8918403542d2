"""How bytes get into the store: cloned, copied within the kernel, or read and written; and their hashes."""

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable

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

OnPiece = Callable[[], None]
"""Called between two pieces, in any thread; ends the work by raising `CopyCancelled`."""


def on_no_piece() -> None:
    """Let the work go on."""


def copy_file(
    source: int, target: int, size: int, before_copying: Callable[[], None], on_piece: OnPiece
) -> int:
    """Copy the first `size` bytes of an open file into an empty one, in the fastest way that works.

    Returns how many bytes there were. `before_copying` is called before they take disk space of their own.

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
    """Copy within the kernel, as far as the file systems allow; returns how many bytes."""
    copied = 0
    while copied < size:
        try:
            count = os.copy_file_range(source, target, min(PIECE_BYTES, size - copied))
        except OSError as error:
            if copied or error.errno not in _CANNOT_COPY_RANGE:
                raise
            return 0
        if not count:  # the end; or a file system that cannot say so, which reading shows
            break
        copied += count
        on_piece()
    return copied


def read_and_write(source: int, target: int, size: int, on_piece: OnPiece) -> int:
    """Copy from where both descriptors are; returns how many bytes."""
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
        OSError: it cannot be read.
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
