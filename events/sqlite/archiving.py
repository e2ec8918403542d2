"""Removal of archived events from a ledger, in one transaction; `events.audit.archive` decides and proves."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path

from events.clock import Timestamp
from events.errors import LogUnavailable
from events.sqlite import storage, timetravel
from events.sqlite.bases import suspended_triggers
from events.sqlite.proof import LogReader, ProofReader, prove
from events.sqlite.schema import connect, transaction
from events.sqlite.snapshots import base_state_digest, write_base_state
from events.storage import StorageError
from events.types import LogBase


class ArchivingLedger(LogReader):
    """A ledger without a server, opened to remove its oldest events."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        super().__init__(connection)
        self._path = path

    def last_before(self, time: Timestamp) -> int:
        (last,) = self._connection.execute(
            "SELECT coalesce(max(position), 0) FROM events WHERE recorded_at < ?", (time,)
        ).fetchone()
        return int(last)

    def first_key(self, until: int, since: Timestamp) -> int | None:
        (position,) = self._connection.execute(
            "SELECT min(position) FROM events WHERE idempotency_key IS NOT NULL AND position <= ?"
            " AND recorded_at > ?",
            (until, since),
        ).fetchone()
        return None if position is None else int(position)

    def transaction(self) -> AbstractContextManager[None]:
        return transaction(self._connection)

    def prove(self) -> AbstractContextManager[ProofReader]:
        return prove(self._connection, self._path)

    def remove(self, end: LogBase, file: str, sha256: bytes, now: Timestamp) -> int:
        """Remove the events up to and with `end`, and list their archive; the caller holds the transaction.

        Args:
            end: the new base.
            file: the archive's name.
            sha256: of the archive.
            now: when it is archived.

        Returns:
            The number of removed ended jobs.
        """
        connection, base = self._connection, self.base()
        before = self.archives()
        folds = storage.FOLDS if not before or before[-1].folds == storage.FOLDS else before[-1].folds
        state = timetravel.state_at(connection, end.position, from_base=True)
        with suspended_triggers(connection):
            jobs = write_base_state(connection, state)
            connection.execute("DELETE FROM events WHERE position <= ?", (end.position,))
            connection.execute("UPDATE base SET position = ?, hash = ?", (end.position, end.hash))
        state_sha256 = base_state_digest(connection, end.position)
        connection.execute(
            "INSERT INTO archives"
            " (last_position, first_position, hash, archived_at, file, sha256, state_sha256, folds)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (end.position, base.position + 1, end.hash, now, file, sha256, state_sha256, folds),
        )
        return jobs

    def shrink(self) -> None:
        """Return the free space to the disk if there is room for that, and leave one complete file."""
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA journal_mode = DELETE")
            self._connection.execute("VACUUM")


@contextmanager
def open_to_archive(path: Path) -> Iterator[ArchivingLedger]:
    """Open a ledger whose projections are current, for writing; leave one complete file at the end.

    Raises:
        LogUnavailable: `log_unavailable`, here or in the block, it cannot be read or written.
    """
    try:
        with closing(connect(path)) as connection:
            try:
                if not storage.is_current(connection):
                    storage.rebuild(connection)
                yield ArchivingLedger(connection, path)
            finally:
                storage.leave_complete_file(connection)
    except (sqlite3.Error, StorageError) as error:
        raise LogUnavailable(f"the ledger {path.name} cannot be archived: {error}") from error
