"""Readers for proofs: the log as plain values and rows, and all that `verify` compares with it.

These reads hold one snapshot for long, on purpose: `events.audit` proves a ledger as it is at one moment. An
error of SQLite becomes LogUnavailable where the ledger was opened; `storage_errors` converts it earlier.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, starmap
from pathlib import Path

from events.clock import Timestamp
from events.codec import GENESIS
from events.nodes import Node
from events.sqlite import queries, storage, timetravel
from events.sqlite.bases import read_stored_base
from events.sqlite.liveness import find_server_event, liveness_at, read_node_events
from events.sqlite.projections import StoredProjections
from events.sqlite.readonly import open_read_only, refuse_incomplete
from events.sqlite.schema import schema_difference
from events.sqlite.snapshots import is_base_state_whole, read_base_state
from events.sqlite.timetravel import Moment
from events.state import State
from events.storage import ArchivedRange, LogHead, RawRow, Row, StorageDamaged, StorageError, StoredBase
from events.types import Event, LogBase

_NOT_ABOUT_CONTENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
}
"""Errors of SQLite that are not about the content of the file."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Convert SQLite's errors in the block.

    Raises:
        StorageDamaged: the file is damaged.
        StorageError: it cannot be read for another reason.
    """
    try:
        yield
    except sqlite3.Error as error:
        kind = StorageDamaged if queries.kind_of(error) == sqlite3.SQLITE_CORRUPT else StorageError
        raise kind(str(error)) from error


class LogReader:
    """Reads a log for exports and replays: its base, events and archives, and past states."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def begin(self) -> None:
        """Begin a read transaction: all that is read from now on has one head."""
        self._connection.execute("BEGIN")

    def base(self) -> LogBase:
        """Return the base; a missing one reads as 0."""
        return queries.read_base(self._connection)

    def head(self) -> LogHead:
        return queries.read_head(self._connection)

    def bounds(self) -> tuple[int, int]:
        return timetravel.bounds(self._connection)

    def rows(self, after: int, until: int) -> Iterator[Row]:
        pages = queries.read_pages(self._connection, after, until)
        return starmap(Row, chain.from_iterable(pages))

    def hash_at(self, position: int) -> bytes:
        return queries.hash_at(self._connection, self.base(), position)

    def find_hash(self, position: int) -> bytes | None:
        return queries.find_hash(self._connection, position)

    def recorded_at(self, position: int) -> str:
        """Return when the event at a position was recorded; empty if the log has none there."""
        row = self._connection.execute(
            "SELECT recorded_at FROM events WHERE position = ?", (position,)
        ).fetchone()
        return "" if row is None else str(row[0])

    def archives(self) -> tuple[ArchivedRange, ...]:
        return queries.list_archives(self._connection)

    def stored_base(self) -> StoredBase:
        return read_stored_base(self._connection)

    def nodes(self) -> list[Node]:
        stored = self._connection.execute("SELECT body FROM nodes")
        return [queries.as_node(body) for (body,) in stored]

    def find_moment(self, until: str | None, now: Timestamp) -> Moment:
        """Return the moment of a position in digits or a time, with the state of the server.

        Without `until` it is now. Raises as `moment_at` does.
        """
        if until is None:
            moment = replace(timetravel.head_moment(self._connection), time=now)
        else:
            moment = timetravel.moment_at(self._connection, until)
        time = min(moment.time, now) if moment.time is not None else None
        return replace(moment, server=liveness_at(self._connection, moment.position, time))

    def state_at(self, moment: Moment) -> State:
        """Fold the log from its base, and return the live state at a moment. Raises as `state_at` does."""
        return timetravel.state_at(self._connection, moment.position, from_base=True)

    def fold_onto(self, state: State, until: int) -> None:
        """Fold into `state` the events after it, up to and with a position.

        Raises:
            LogUnavailable: an event cannot be folded.
        """
        for page in queries.read_pages(self._connection, state.position, until):
            timetravel.fold_page(state, page)

    def node_events(self) -> list[Event]:
        return read_node_events(self._connection)

    def first_server_event(self) -> Event | None:
        return find_server_event(self._connection, 0, after=True)


@contextmanager
def open_log_reader(path: Path, *, refuses_incomplete: bool = False) -> Iterator[LogReader]:
    with open_read_only(path, refuses_incomplete=refuses_incomplete) as connection:
        yield LogReader(connection)


class ProofReader:
    """Reads what `verify` proves and compares. Text is read as bytes, so that damaged text can be read."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def base(self) -> LogBase | None:
        """Return the base; None if it is missing, or has other types."""
        row = self._connection.execute("SELECT position, hash FROM base").fetchone()
        if row is None or not (isinstance(row[0], int) and isinstance(row[1], bytes)):
            return None
        return LogBase(*row)

    def rows(self) -> Iterator[RawRow]:
        return self._connection.execute("SELECT position, body, hash FROM events ORDER BY position")

    def hash_at(self, position: int) -> bytes:
        return queries.hash_at(self._connection, self.base() or LogBase(0, GENESIS), position)

    def is_current(self) -> bool:
        return storage.is_current(self._connection)

    def projections(self, base: LogBase) -> StoredProjections:
        return StoredProjections(self._connection, base.position)

    def base_state(self, base: LogBase) -> State:
        """Return the live state that is stored at the base; a damaged one may raise any exception."""
        return read_base_state(self._connection, base.position)

    def is_base_state_whole(self, base: LogBase) -> bool:
        return is_base_state_whole(self._connection, base.position)

    def archives(self) -> tuple[ArchivedRange, ...]:
        return queries.list_archives(self._connection)

    def is_cut_off(self) -> bool:
        """Whether the last page is not whole: SQLite reads it as zeros, and finds missing pages itself."""
        (page_size,) = self._connection.execute("PRAGMA page_size").fetchone()
        return self._path.stat().st_size % int(page_size) != 0

    def find_damage(self) -> str | None:
        """Return the first problem that SQLite's integrity check finds, or None."""
        try:
            (said,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if isinstance(error, sqlite3.Error) and queries.kind_of(error) in _NOT_ABOUT_CONTENT:
                raise
            return str(error)
        text = str(said, "utf-8", "replace")
        return None if text == "ok" else text

    def find_schema_difference(self) -> str | None:
        return schema_difference(self._connection)

    def refuse_incomplete(self) -> None:
        """Refuse the file, which lacks its write-ahead log, unless its last event says that it needs none.

        Raises:
            IncompleteCopy: `incomplete_copy`.
        """
        refuse_incomplete(self._connection, self._path)


@contextmanager
def prove(connection: sqlite3.Connection, path: Path) -> Iterator[ProofReader]:
    """Read through a connection, in its transaction, what proves the ledger."""
    connection.text_factory = bytes
    try:
        yield ProofReader(connection, path)
    finally:
        connection.text_factory = str


@contextmanager
def open_proof_reader(path: Path) -> Iterator[ProofReader]:
    """Open a ledger in one snapshot to prove it, beside a running server; raises as `open_read_only` does."""
    with open_read_only(path) as connection, prove(connection, path) as reader:
        connection.execute("BEGIN")
        yield reader
