"""Bringing the database's file up to its write-ahead log, so that a copy of the file alone shows its age."""

from __future__ import annotations

import sqlite3
from contextlib import suppress

from events import store
from events.copies import may_lack_events

_BUSY_MS = 5000
"""What the writer's connection waits for others otherwise (`events.schema.connect`)."""


def checkpoint(connection: sqlite3.Connection) -> bool:
    """Write all of the WAL into the database and begin the WAL anew; return False if a reader is in the way.

    It does not wait for one: whoever writes waits for this. The new WAL gets a commit that changes nothing,
    because an empty one is also what a reader makes of a file that was copied without.

    Raises:
        sqlite3.Error: it cannot be written.
    """
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    if not busy:
        store.probe(connection)
    return not busy


def leave_alone_complete(connection: sqlite3.Connection, *, lacked_wal: bool = False) -> None:
    """Leave one file that needs no other, to be read on any medium, before the connection is closed.

    Closing would write the WAL into the file and remove it, and the file would look like a copy that lacks
    it. Where it cannot be done, say because of a reader, the WAL stays beside the file.

    Args:
        connection: that has written.
        lacked_wal: whether the file had no WAL, as one that was copied without, before it was opened
            (`events.copies.lacks_wal`): then it goes on looking like that until its last event says that it
            is complete.
    """
    with suppress(sqlite3.Error):
        if lacked_wal and may_lack_events(connection):
            return
        connection.execute("PRAGMA busy_timeout = 0")
        connection.execute("PRAGMA journal_mode = DELETE")
