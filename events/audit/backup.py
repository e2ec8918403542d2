"""A copy of the ledger as it is at one moment, made beside a running server, verified before it is there."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from events.audit.audit import Audit, audit
from events.audit.files import open_draft, publish
from events.errors import DataInUse, LedgerDamaged, WrongTarget
from events.sqlite.readonly import open_read_only


def back_up(path: Path, target: Path) -> Audit:
    """Copy the ledger at `path` to `target` (0600), which is replaced if it is there; return its audit.

    The copy is one file, complete by itself (`journal_mode=DELETE`). It takes its name only when it is on the
    disk and verified. The keys are not in it.

    Raises:
        WrongTarget: `wrong_target`, what is at `target` cannot be replaced, or a database's files are beside.
        DataInUse: `data_in_use`, a server runs on the folder of `target`.
        IncompleteCopy: `incomplete_copy`, the ledger itself is a copy that may lack its newest events.
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LedgerDamaged: `ledger_damaged`, the copy does not verify; none was left.
        LogUnavailable: `log_unavailable`, the ledger cannot be read, or the copy not be written.
        OSError: the file cannot be made there.
    """
    _refuse_leftovers(target)
    with _unserved(target.parent), open_draft(target) as draft:
        _copy(path, draft)
        found = audit(draft)
        if found.finding is not None:
            raise LedgerDamaged(
                f"the copy does not verify, and was not kept: position {found.finding.position}, "
                f"{found.finding.problem}"
            )
        _refuse_leftovers(target)
        publish(draft, target, replace=True)
        return found


def _copy(path: Path, draft: Path) -> None:
    with (
        open_read_only(path, problem="cannot be copied", refuses_incomplete=True) as source,
        closing(sqlite3.connect(draft)) as copy,
    ):
        source.backup(copy)  # in one step: in several, each commit of the server would begin it anew
        copy.execute("PRAGMA journal_mode = DELETE")


def _refuse_leftovers(target: Path) -> None:
    """Refuse where SQLite would take what another database left for the copy's own, and write it into it."""
    for suffix in ("-wal", "-journal", "-shm"):
        beside = target.with_name(target.name + suffix)
        if os.path.lexists(beside):
            raise WrongTarget(
                f"{beside} is there, and would be read as a part of the copy: move it away, with "
                f"{target.name} if that is there, or choose another file"
            )


@contextmanager
def _unserved(folder: Path) -> Iterator[None]:
    """Keep servers away from a folder that may be a data directory; what its lock says stays as it is."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # it is none, or nobody's whom we know
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
