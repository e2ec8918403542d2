"""A ledger's file by itself: whether it lacks its write-ahead log, and bringing it up to that."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path

from events import store
from events.errors import IncompleteCopy
from events.types import ServerStopped

_READ_VERSION = 19
"""Offset of the byte of SQLite's header that says how the file is read."""

_WAL = 2
"""Its value for a file with a write-ahead log."""


def wants_wal(path: Path) -> bool:
    """Whether the file is one with a write-ahead log beside it."""
    with path.open("rb") as file:
        header = file.read(_READ_VERSION + 1)
    return header[_READ_VERSION:] == bytes([_WAL])


def lacks_wal(path: Path) -> bool:
    """Whether the file was written with a write-ahead log that is not there; a server's is never empty.

    It has to be asked before the file is opened, which makes an empty one.
    """
    wal = path.with_name(f"{path.name}-wal")
    return wants_wal(path) and not (wal.exists() and wal.stat().st_size > 0)


def may_lack_events(connection: sqlite3.Connection) -> bool:
    """Whether a ledger that lacks its write-ahead log does not say by its last event that it needs none."""
    last = connection.execute("SELECT type FROM events ORDER BY position DESC LIMIT 1").fetchone()
    return last is not None and last[0] not in (ServerStopped.TYPE, ServerStopped.TYPE.encode())


def refuse_incomplete(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a ledger that lacks its write-ahead log unless its last event says that it needs none.

    Raises:
        IncompleteCopy: `incomplete_copy`.
    """
    if may_lack_events(connection):
        raise IncompleteCopy(
            f"{path.name} may lack its newest events: {path.name}-wal is not there, and the last event is no "
            "ServerStopped. Copy the ledger of a running server with `loadledger backup`; start and stop the "
            "server where this is no copy; or have `loadledger verify --expect POSITION:HASH` say whether it "
            "has what it must have"
        )


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
