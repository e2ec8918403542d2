"""The data directory: its ledger, which may be a replica, and two locks, which end with the process.

`lock_data` locks the directory, `lock_ledger` the file itself: two directories may hold the same file, by a
hard link or a bind mount, and each would have its own write-ahead log.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from events.errors import DataInUse, IsReplica, WrongTarget
from events.files import write_file

LEDGER = "ledger.db"
"""The log's file in the data directory."""

REPLICA = "ledger.replica"
"""Beside a ledger that is a replica: the address of the database of the ledger, without a password."""

_LOCKED_BYTE = 0x4000_0000 + 512
"""The first byte beyond SQLite's locked bytes (PENDING_BYTE and 511 more); it need not exist in the file."""


def mark_replica(data: Path, address: str) -> None:
    """Note durably that the ledger of a data directory is a replica; `address` has no password."""
    if not is_replica_of(data, address):
        with write_file(data / REPLICA, replace=True) as file:
            file.write(f"{address}\n".encode())


def is_replica_of(data: Path, address: str) -> bool:
    with suppress(FileNotFoundError):
        return (data / REPLICA).read_text(encoding="utf-8", errors="replace").strip() == address
    return False


def is_replica(data: Path) -> bool:
    return (data / REPLICA).exists()


def refuse_replica(data: Path) -> None:
    """Refuse to write a ledger that is a replica, since that would give it another history.

    Raises:
        IsReplica: `is_replica`, with the database's address.
    """
    with suppress(FileNotFoundError):
        address = (data / REPLICA).read_text(encoding="utf-8", errors="replace").strip()
        raise IsReplica(
            f"{data / LEDGER} is a replica of the ledger in {address}: give the server --ledger={address}, "
            f"and let a running server write; to make it a ledger of its own, remove {data / REPLICA}"
        )


@contextmanager
def lock_data(data: Path) -> Iterator[None]:
    """Lock the data directory `data`; the lock file holds the process id.

    Raises:
        DataInUse: `data_in_use`, with the process id of the holder.
        WrongTarget: `wrong_target`, the lock file is a symbolic link.
    """
    path = data / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise WrongTarget(
            f"{path} is a symbolic link, whose target would be overwritten: remove it"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "an unknown process"
            raise DataInUse(
                f"{data} is in use by process {holder}; stop it, or choose another --data"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_ledger(path: Path) -> Iterator[None]:
    """Lock a ledger's file, which is created if it is missing, against servers of other directories.

    Enter this before the ledger is opened, and leave it after: closing any descriptor of a file ends all
    POSIX locks of the process on it, including SQLite's. This lock is an open file description lock
    (fcntl(2), F_OFD_SETLK), which ends with its own descriptor only.

    Raises:
        DataInUse: `data_in_use`, another process has locked it.
        OSError: the file cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_BYTE, 1, 0)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise DataInUse(
                f"{path} is in use by another process, through another directory: it has a hard link, or its "
                "directory is mounted there too; stop that process, or choose another --data"
            ) from None
        yield
    finally:
        os.close(descriptor)
