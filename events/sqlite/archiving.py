"""Removal of archived events from a ledger, in one transaction; `events.audit.archive` decides and proves."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from events.clock import Timestamp
from events.errors import LogUnavailable
from events.sqlite import storage, timetravel
from events.sqlite.bases import suspended_triggers
from events.sqlite.queries import list_archives, read_base
from events.sqlite.schema import Connection, connect
from events.sqlite.snapshots import base_state_digest, write_base_state
from events.storage import StorageError
from events.types import LogBase


def last_before(connection: Connection, time: Timestamp) -> int:
    """Return the position of the last event that was recorded before a time, or 0."""
    (last,) = connection.execute(
        "SELECT coalesce(max(position), 0) FROM events WHERE recorded_at < ?", (time,)
    ).fetchone()
    return int(last)


def first_key(connection: Connection, until: int, since: Timestamp) -> int | None:
    """Return the first position up to `until` with an idempotency key recorded after `since`, or None."""
    (position,) = connection.execute(
        "SELECT min(position) FROM events WHERE idempotency_key IS NOT NULL AND position <= ?"
        " AND recorded_at > ?",
        (until, since),
    ).fetchone()
    return None if position is None else int(position)


def remove_events(connection: Connection, end: LogBase, file: str, sha256: bytes, now: Timestamp) -> int:
    """Remove the events up to and with `end`, and list their archive; the caller holds the transaction.

    Args:
        connection: of `open_to_archive`.
        end: the new base.
        file: the archive's name.
        sha256: of the archive.
        now: when it is archived.

    Returns:
        The number of removed ended jobs.
    """
    base, before = read_base(connection), list_archives(connection)
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


def shrink(connection: Connection) -> None:
    """Return the free space to the disk if there is room for that, and leave one complete file."""
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")


@contextmanager
def open_to_archive(path: Path) -> Iterator[Connection]:
    """Open a ledger whose projections are current, for writing; leave one complete file at the end.

    Raises:
        LogUnavailable: `log_unavailable`, here or in the block, it cannot be read or written.
    """
    try:
        with closing(connect(path)) as connection:
            try:
                if not storage.is_current(connection):
                    storage.rebuild(connection)
                yield connection
            finally:
                storage.leave_complete_file(connection)
    except (sqlite3.Error, StorageError) as error:
        raise LogUnavailable(f"the ledger {path.name} cannot be archived: {error}") from error
