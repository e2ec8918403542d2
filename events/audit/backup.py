"""Backup: a verified copy of the ledger at one moment, made beside a running server."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from events.audit.audit import Audit, audit
from events.errors import DataInUse, LedgerDamaged, WrongTarget
from events.files import open_temporary, publish
from events.sqlite.readonly import copy_ledger


def back_up(path: Path, target: Path) -> Audit:
    """Copy the ledger at `path` to `target` (0600), replace an earlier copy there, and return its audit.

    The copy is one complete file (`journal_mode=DELETE`) without the keys. It gets its name when it is
    verified and on the disk.

    Raises:
        WrongTarget: `wrong_target`, `target` cannot be replaced, or another database's files are beside it.
        DataInUse: `data_in_use`, a server runs on the folder of `target`.
        IncompleteCopy: `incomplete_copy`, the ledger is itself a copy that may lack its newest events.
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LedgerDamaged: `ledger_damaged`, the copy does not verify, and is removed.
        LogUnavailable: `log_unavailable`, the ledger cannot be read, or the copy cannot be written.
        OSError: the file cannot be created.
    """
    _refuse_leftovers(target)
    with _lock_folder(target.parent), open_temporary(target) as temporary:
        copy_ledger(path, temporary)
        found = audit(temporary)
        if found.finding is not None:
            raise LedgerDamaged(
                f"the copy does not verify, and was removed: position {found.finding.position}, "
                f"{found.finding.problem}"
            )
        _refuse_leftovers(target)
        publish(temporary, target, replace=True)
        return found


def _refuse_leftovers(target: Path) -> None:
    """Refuse a target beside another database's WAL or journal, which SQLite would write into the copy."""
    for suffix in ("-wal", "-journal", "-shm"):
        beside = target.with_name(target.name + suffix)
        if os.path.lexists(beside):
            raise WrongTarget(
                f"{beside} exists, and SQLite would read it as a part of the copy: move it away, with "
                f"{target.name} if that exists, or choose another file"
            )


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Keep servers from starting on the folder, if it is a data directory, until the block ends."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no data directory
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataInUse(f"a server is running on {folder}: choose a file in another folder") from None
        yield
    finally:
        os.close(descriptor)
