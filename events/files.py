"""Atomic files: a file gets its name when it is complete and on the disk, so a crash leaves no half of it.

A file is written as a draft beside its target: `.NAME.8 hex digits`, mode 0600, locked while it is written.
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

_DRAFT = re.compile(r"\.[0-9a-f]{8}(-journal|-wal|-shm)?", re.ASCII)
"""The end of a draft's name, after its target's; SQLite's files beside a draft have another suffix."""


@contextmanager
def open_draft(target: Path) -> Iterator[Path]:
    """Create an empty draft (0600) of `target` to be written and published; the draft is gone afterwards.

    The lock (`flock`) tells drafts that are being written from those of processes that were killed, which the
    next draft of the same target removes. Open the draft without creating it, since a file that the block
    creates has neither the lock nor the mode.

    Raises:
        WrongTarget: `wrong_target`, the target is not a file that can be replaced.
        OSError: the draft cannot be created.
    """
    refuse_irregular(target)
    _remove_stale_drafts(target)
    draft, descriptor = _create_draft(target)
    try:
        yield draft
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):  # SQLite's files, if SQLite has failed
            with suppress(FileNotFoundError):
                draft.with_name(draft.name + suffix).unlink()
        os.close(descriptor)  # not earlier: SQLite's own locks on the file would end with it


def _create_draft(target: Path) -> tuple[Path, int]:
    """Create a draft exclusively, and lock it; another process may remove it in between as a stale one."""
    while True:
        draft = target.with_name(f"{_draft_prefix(target)}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(target)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if draft.exists():
                return draft, descriptor
        except BaseException:
            draft.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _draft_prefix(target: Path) -> str:
    return f".{target.name[:64]}"


def _remove_stale_drafts(target: Path) -> None:
    prefix = _draft_prefix(target)
    names = list[Path]()
    with suppress(OSError):  # a folder that cannot be listed may still be written to
        names = list(target.parent.iterdir())
    for found in names:
        if found.name.startswith(prefix) and _DRAFT.fullmatch(found.name[len(prefix) :]):
            with suppress(OSError):  # another process writes it, or has removed it
                _remove_if_unlocked(found, found.with_name(found.name[: len(prefix) + 9]))


def _remove_if_unlocked(file: Path, draft: Path) -> None:
    if not stat.S_ISREG(file.lstat().st_mode):
        return
    if not draft.exists():  # SQLite's files without their draft
        file.unlink()
        return
    descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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
    with open_draft(target) as draft:
        try:
            with draft.open("r+b") as file:
                yield file
        except OSError as error:
            if error.filename is None and error.errno is not None:  # a failed write names no file
                raise type(error)(error.errno, error.strerror, str(target)) from None
            raise
        publish(draft, target, replace=replace)


def publish(draft: Path, target: Path, *, replace: bool) -> None:
    """Sync a draft to the disk, and give it its name.

    Raises:
        FileExistsError: the target exists, and must not be replaced.
        WrongTarget: `wrong_target`, the target is not a file that can be replaced.
    """
    sync(draft)
    refuse_irregular(target)
    if replace:
        draft.replace(target)
    else:
        os.link(draft, target)  # unlike a rename, a link never replaces a file
        draft.unlink()
    sync(target.parent)


def refuse_irregular(target: Path) -> None:
    """Refuse to replace a device, a pipe, a folder or a link.

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
    """Whether the target is a pipe, or a device like a terminal, which is written to and never replaced."""
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
