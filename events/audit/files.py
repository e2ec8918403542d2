"""Files written as a whole: nobody, not even after a crash, sees one half-written under its name."""

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
"""How the name of a draft goes on after that of its target: SQLite's files have the draft's and more."""


@contextmanager
def open_draft(target: Path) -> Iterator[Path]:
    """Give a new, empty file (0600) beside `target` to be written and published; it is gone afterwards.

    It is locked meanwhile (`flock`), so that those which others left when they were killed can be told from
    those that are written now, and are removed.

    Raises:
        WrongTarget: `wrong_target`, what is there is no file that could be replaced.
        OSError: it cannot be made there.
    """
    refuse_irregular(target)
    remove_stale_drafts(target)
    draft = target.with_name(f"{_begin(target)}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield draft
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):  # SQLite's, should it have failed
            with suppress(FileNotFoundError):
                draft.with_name(draft.name + suffix).unlink()
        os.close(descriptor)  # not before: SQLite's own locks on the file would go with it


def _begin(target: Path) -> str:
    return f".{target.name[:64]}"


def remove_stale_drafts(target: Path) -> None:
    """Remove the drafts of `target` that nobody is writing any more."""
    begin = _begin(target)
    found_here = list[Path]()
    with suppress(OSError):  # what cannot be listed may still be written to
        found_here = list(target.parent.iterdir())
    for found in found_here:
        if found.name.startswith(begin) and _DRAFT.fullmatch(found.name[len(begin) :]):
            with suppress(OSError):  # somebody writes it, or was faster
                _forget_draft(found, found.with_name(found.name[: len(begin) + 9]))


def _forget_draft(file: Path, draft: Path) -> None:
    if not stat.S_ISREG(file.lstat().st_mode):
        return
    if not draft.exists():  # SQLite's files were left alone
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
    """Give a file to write; it takes its name, durably, when all of it was written.

    Raises:
        WrongTarget: `wrong_target`, what is there is no file that could be replaced.
        OSError: it cannot be written, or is there and not to be replaced.
    """
    with open_draft(target) as draft:
        with draft.open("wb") as file:
            yield file
        publish(draft, target, replace=replace)


def publish(draft: Path, target: Path, *, replace: bool) -> None:
    """Give a draft its name, once it is on the disk.

    Raises:
        FileExistsError: another file has it, and is not to be replaced.
        WrongTarget: `wrong_target`, what has it is no file that could be replaced.
    """
    _sync(draft, os.O_RDONLY)
    refuse_irregular(target)
    if replace:
        draft.replace(target)
    else:
        os.link(draft, target)  # unlike a rename, it refuses to replace
        draft.unlink()
    _sync(target.parent, os.O_RDONLY | os.O_DIRECTORY)


def make_durable(target: Path) -> None:
    """Have a file, and its name, on the disk, whoever wrote it."""
    _sync(target, os.O_RDONLY)
    _sync(target.parent, os.O_RDONLY | os.O_DIRECTORY)


def refuse_irregular(target: Path) -> None:
    """Keep devices, pipes, folders and links from being replaced by a file.

    Raises:
        WrongTarget: `wrong_target`, something is there, and is no regular file.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(target.lstat().st_mode):
            raise WrongTarget(f"{target} is there and is no regular file: choose another name")


def printable_name(path: Path) -> str:
    """Return a file's name as it can be printed: one that is not UTF-8 has other characters there."""
    return os.fsencode(path.name).decode(errors="replace")


def is_stream(target: Path) -> bool:
    """Whether what is there is written to, and never replaced: a pipe, or a device like a terminal."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def refuse_own(target: Path, data: Path) -> None:
    """Keep what is written away from the ledger, its keys and its lock.

    Raises:
        WrongTarget: `wrong_target`, the file would be in the data directory.
    """
    if target.resolve().is_relative_to(data.resolve()):
        raise WrongTarget(f"{target} is in the data directory {data}: choose a file that is not")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
