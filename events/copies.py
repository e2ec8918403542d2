"""Whether a ledger's file is all of it: a copy without its write-ahead log lacks the newest events."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from events.refusals import IncompleteCopy
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
