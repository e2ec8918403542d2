"""Atomic files: a file gets its name when it is complete and on the disk, so a crash leaves no half of it.

A file is written under a temporary name beside its target: `.NAME.8 hex digits`, mode 0600, locked while it
is written.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from events.errors import WrongTarget

_TEMPORARY = re.compile(r"\.[0-9a-f]{8}(-journal|-wal|-shm)?", re.ASCII)
"""End of a temporary name, after the target's; SQLite's files beside such a file have a further suffix."""


@contextmanager
def open_temporary(target: Path) -> Iterator[Path]:
    """Create an empty temporary file (0600) of `target`, to write and publish; it is gone afterwards.

    The lock (`flock`) tells temporary files in use from those of killed processes, which the next call for
    the same target removes. Open the file without creating it, since a file that the block creates has
    neither the lock nor the mode.

    Raises:
        WrongTarget: `wrong_target`, the target is not a file that can be replaced.
        OSError: the file cannot be created.
    """
    refuse_irregular(target)
    _remove_stale(target)
    temporary, descriptor = _create_temporary(target)
    try:
        yield temporary
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):  # SQLite's files, if SQLite has failed
            with suppress(FileNotFoundError):
                temporary.with_name(temporary.name + suffix).unlink()
        os.close(descriptor)  # not earlier: SQLite's own locks on the file would end with it


def _create_temporary(target: Path) -> tuple[Path, int]:
    """Create a temporary file exclusively, and lock it; another process may remove it in between as stale."""
    while True:
        temporary = target.with_name(f"{_prefix(target)}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(target)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, descriptor
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _prefix(target: Path) -> str:
    return f".{target.name[:64]}"


def _remove_stale(target: Path) -> None:
    prefix = _prefix(target)
    names = list[Path]()
    with suppress(OSError):  # a folder that cannot be listed may still be written to
        names = list(target.parent.iterdir())
    for found in names:
        if found.name.startswith(prefix) and _TEMPORARY.fullmatch(found.name[len(prefix) :]):
            with suppress(OSError):  # another process writes it, or has removed it
                _remove_if_unlocked(found, found.with_name(found.name[: len(prefix) + 9]))


def _remove_if_unlocked(file: Path, temporary: Path) -> None:
    if not stat.S_ISREG(file.lstat().st_mode):
        return
    if not temporary.exists():  # SQLite's files without the file itself
        file.unlink()
        return
    descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()
    finally:
        os.close(descriptor)


@contextmanager
def write_file(target: Path, *, replace: bool) -> Iterator[BinaryIO]:
    """Write a file that gets its name, durably, at the end of the block.

    Raises:
        WrongTarget: `wrong_target`, the target is not a file that can be replaced.
        OSError: the file cannot be written, or exists and must not be replaced.
    """
    with open_temporary(target) as temporary:
        try:
            with temporary.open("r+b") as file:
                yield file
        except OSError as error:
            if error.filename is None and error.errno is not None:  # a failed write names no file
                raise type(error)(error.errno, error.strerror, str(target)) from None
            raise
        publish(temporary, target, replace=replace)


def publish(temporary: Path, target: Path, *, replace: bool) -> None:
    """Sync a temporary file to the disk, and give it its name.

    Raises:
        FileExistsError: the target exists, and must not be replaced.
        WrongTarget: `wrong_target`, the target is not a file that can be replaced.
    """
    sync(temporary)
    refuse_irregular(target)
    if replace:
        temporary.replace(target)
    else:
        os.link(temporary, target)  # unlike a rename, a link never replaces a file
        temporary.unlink()
    sync(target.parent)


def refuse_irregular(target: Path) -> None:
    """Refuse to replace a special file, a pipe, a folder or a link.

    Raises:
        WrongTarget: `wrong_target`, the target exists and is no regular file.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(target.lstat().st_mode):
            raise WrongTarget(f"{target} exists and is not a regular file: choose another name")


def printable_name(path: Path) -> str:
    """Return a file's name for messages; bytes that are not UTF-8 are replaced."""
    return os.fsencode(path.name).decode(errors="replace")


def is_stream(target: Path) -> bool:
    """Whether the target is a pipe or a terminal, which is written to and never replaced."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def refuse_own(target: Path, data: Path) -> None:
    """Refuse to write into the data directory, beside the ledger, its keys and its lock.

    Raises:
        WrongTarget: `wrong_target`, the target is in the data directory.
    """
    if target.resolve().is_relative_to(data.resolve()):
        raise WrongTarget(f"{target} is in the data directory {data}: choose a file that is not")


def sync(path: Path) -> None:
    """Write a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
