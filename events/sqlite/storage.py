"""The writer's storage: a connection of aiosqlite, and rebuilding of outdated projections.

Each call is one statement (`events.sqlite.writing`). After an error of SQLite the connection is closed, and
opened anew. Readers have connections of their own (`events.sqlite.readonly`).

`rebuild` folds the log anew where another release's folds made the stored projections.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import aiosqlite

from events.codec import decode_event
from events.errors import LogUnavailable
from events.registers import ENTRIES
from events.sqlite import queries
from events.sqlite.queries import Parameters, encode, fetch_all, release_cursors, transaction
from events.sqlite.readonly import NEWEST_TYPE, lacks_wal, may_lack_events, open_read_only
from events.sqlite.schema import BUSY_S, check_readable, connect, writer_sql
from events.sqlite.timetravel import fold_page
from events.sqlite.writing import FIND_JOINS, FIND_KEYS, PROBE, WRITE_GROUP, WRITE_NOTE, group_of, meaning_of
from events.state import Changes, Join, KnownRequests, State, read_key
from events.storage import LogHead, Row, StorageError, StoredLedger

FOLDS = 10
"""The version of the folds: add one with each change that makes other stored bodies of the same events."""

MAX_NAMED = 100
"""Differences that a rebuild names at most."""

_Key = str | bytes

_log = logging.getLogger(__name__)


def is_current(connection: sqlite3.Connection) -> bool:
    """Whether this release's folds made the stored projections; damaged ones are not outdated."""
    row: tuple[object] | None = connection.execute("SELECT folds FROM projected").fetchone()
    return row is None or bool(row[0] == FOLDS)


def rebuild(connection: sqlite3.Connection) -> None:
    """Fold the log, and store the result and its history, in one transaction.

    Memory grows with the models and the jobs that have not ended, not with the log.

    Raises:
        LogUnavailable: `log_unavailable`, an event cannot be folded; nothing was changed.
        sqlite3.Error: the ledger cannot be read or written; nothing was changed.
    """
    with transaction(connection):
        state = State()
        for table in ("jobs", "models", *ENTRIES, "model_history", "presence"):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - literals above
        connection.execute(
            "INSERT OR REPLACE INTO projected (one, position, folds) VALUES (1, 0, ?)", (FOLDS,)
        )
        for page in queries.read_pages(connection, 0):
            changes = fold_page(state, page)
            connection.execute(WRITE_GROUP, group_of((), changes, LogHead(state.position)))


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """The position that the projections had, and the rows in which they differed, in words."""

    position: int | None
    differences: list[str]


def rebuild_file(path: Path) -> RebuildResult:
    """Rebuild the stored projections of a ledger; the caller holds the lock of the data directory.

    A copy that lacks its write-ahead log stays refused.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, the file cannot be read, written or folded; nothing was changed.
    """
    if not path.exists():  # `connect` would create it
        raise LogUnavailable(f"the ledger {path.name} cannot be rebuilt: there is no such file")
    lacked_wal = lacks_wal(path)
    try:
        with closing(connect(path)) as connection:
            try:
                with open_read_only(path, problem="cannot be rebuilt") as before:
                    before.execute("BEGIN")
                    row = before.execute("SELECT position FROM projected").fetchone()  # begins its snapshot
                    rebuild(connection)
                    differences = list(islice(_differences(before, connection), MAX_NAMED))
                    return RebuildResult(row and row[0], differences)
            finally:
                leave_complete_file(connection, lacked_wal=lacked_wal)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # messages of SQLite quote damaged content
        raise LogUnavailable(f"the ledger {path.name} cannot be rebuilt: {error}") from error


def _differences(before: sqlite3.Connection, after: sqlite3.Connection) -> Iterator[str]:
    """Walk both connections' tables in the order of their keys, and yield each difference in words.

    Of the history, only the first difference is yielded.
    """
    for table in ("model_history", "presence"):
        walk = f"SELECT * FROM {table} ORDER BY 1, 2"  # noqa: S608 - literals above
        for rows in zip_longest(before.execute(walk), after.execute(walk)):
            if rows[0] != rows[1]:
                yield f"the stored {table} differed at position {min(row[0] for row in rows if row)}"
                break
    for table, columns in (
        ("models", "id, body"),
        ("jobs", "id, body, landmark"),
        *((table, "id, body") for table in ENTRIES),
    ):
        walk = f"SELECT {columns} FROM {table} ORDER BY 1"  # noqa: S608 - literals above
        old, new = before.execute(walk), after.execute(walk)
        one, other = old.fetchone(), new.fetchone()
        while one is not None or other is not None:
            if other is None or (one is not None and _sort_key(one[0]) < _sort_key(other[0])):
                yield f"the stored {table} had, and the log does not give, {one[0]!r}"
                one = old.fetchone()
            elif one is None or _sort_key(other[0]) < _sort_key(one[0]):
                yield f"the stored {table} lacked {other[0]!r}"
                other = new.fetchone()
            else:
                if one != other:
                    yield f"the stored {table} differed at {one[0]!r}"
                one, other = old.fetchone(), new.fetchone()


def _sort_key(key: _Key) -> tuple[bool, _Key]:
    """Return a key that sorts as SQLite does: texts, then bytes, which only tampering stores."""
    return isinstance(key, bytes), key


class Database:
    """The writer's connection: `Storage` in one file, which has no other writer.

    Args:
        path: of the ledger.
        is_replica: whether the file repeats a ledger stored elsewhere, so that its last commits may be lost.

    Attributes:
        is_open: whether the connection is open, and so usable.
    """

    _connection: aiosqlite.Connection

    def __init__(self, path: Path, *, is_replica: bool = False) -> None:
        self._path = path
        self._is_replica = is_replica
        self.is_open = False
        self._was_open = False
        self._lacked_wal = False
        self._unsynced = False

    async def open(self) -> StoredLedger:
        try:
            prepared, stored = await asyncio.to_thread(self._prepare)
            with closing(prepared):  # the last connection to be closed would remove the write-ahead log
                self._connection = await aiosqlite.connect(self._path, timeout=BUSY_S, isolation_level=None)
                self.is_open = True
                await self._connection.executescript(writer_sql(is_replica=self._is_replica))
        except (sqlite3.Error, StorageError, OSError, ValueError) as error:  # stored content may be damaged
            await self.close_after_error()
            raise LogUnavailable(f"the ledger {self._path.name} cannot be opened: {error}") from error
        self._was_open, self._unsynced = True, False
        return stored

    async def append(self, rows: Sequence[Row], changes: Changes, after: LogHead) -> None:
        try:
            await self._run(WRITE_GROUP, group_of(rows, changes, after))
        except StorageError as error:
            raise meaning_of(error, after) from error.__cause__

    async def contains(self, head: LogHead) -> bool:
        found = await self._run("SELECT hash FROM events WHERE position = ?", [head.position])
        return found == [(head.hash,)]

    async def read_requests(
        self, hashes: AbstractSet[str], joinable: AbstractSet[tuple[str, str]]
    ) -> KnownRequests:
        try:  # usually there is nothing to look for
            keyed = await self._run(FIND_KEYS, [encode([*hashes])]) if hashes else ()
            joins = await self._run(FIND_JOINS, [encode([*joinable])]) if joinable else ()
        except StorageError as error:
            _log.error("the ledger cannot be read, and requests are refused: %s", error)
            await self.close_after_error()
            raise LogUnavailable(f"the ledger cannot be read: {error}; {error.cure}") from error
        keys = (read_key(decode_event(body)) for body, _ in keyed)
        return KnownRequests(dict(filter(None, keys)), {Join(*row) for row in joins})

    async def note_last_use(self, used: Mapping[str, str], seen_at: str) -> None:
        await self._run(WRITE_NOTE, [encode(used), seen_at])

    async def probe(self) -> None:
        await self._run(PROBE)

    async def checkpoint(self) -> bool:
        """Copy the whole WAL into the database; return False if a reader, or a later write, prevents that.

        It does not wait for the reader, since writers wait for this call. The WAL keeps its content: an empty
        one would look like the one that a reader leaves beside a file copied without its WAL.
        """
        if not self.is_open:
            return False
        try:
            [(busy, frames, copied)] = await self._run("PRAGMA wal_checkpoint(PASSIVE)")
        except StorageError as error:
            _log.warning("the ledger's file could not be brought up to date yet: %s", error)
            return False
        return not busy and bool(frames == copied)

    async def close_after_error(self, error: StorageError | None = None) -> None:
        """Close the connection after an error; after a disk error, the next `open` syncs the database."""
        if error is not None and error.is_disk_error:
            self._unsynced = True
        if self.is_open:
            self.is_open = False
            with suppress(sqlite3.Error):
                await self._connection.close()

    async def close(self) -> None:
        if self.is_open:
            with suppress(StorageError):
                if not (self._lacked_wal and may_lack_events(await self._run(NEWEST_TYPE))):
                    for statement in LEAVE_COMPLETE_FILE:
                        await self._run(statement)
            await self.close_after_error()

    async def _run(self, sql: str, parameters: Parameters = ()) -> list[Any]:
        """Run one statement, and return its rows.

        Raises:
            StorageError: SQLite raised an error.
        """
        try:
            return await fetch_all(self._connection, sql, parameters)
        except sqlite3.Error as error:
            kind = queries.kind_of(error)
            is_disk_error, cure = kind == sqlite3.SQLITE_IOERR, queries.cure_of(kind)
            raise StorageError(str(error), is_disk_error=is_disk_error, cure=cure) from error

    def _prepare(self) -> tuple[sqlite3.Connection, StoredLedger]:
        """Make the file ready for the writer; return what it holds, and the connection that has read it."""
        if not self._was_open and self._path.exists():
            self._lacked_wal = not self._is_replica and lacks_wal(self._path)
            _check_readable_state(self._path)
        connection = connect(self._path, is_replica=self._is_replica)
        try:
            if self._unsynced:
                queries.sync(connection)
            return connection, _read_stored(connection)
        except BaseException as error:
            release_cursors(error)
            if not self._was_open:
                leave_complete_file(connection, lacked_wal=self._lacked_wal)
            connection.close()
            raise


def _check_readable_state(path: Path) -> None:
    """Read the stored state before anything is written, so that an unusable file stays unchanged."""
    with open_read_only(path, problem="cannot be opened") as connection:
        if check_readable(connection) and is_current(connection):  # an empty file has no tables yet
            queries.read_state(connection)


def _read_stored(connection: sqlite3.Connection) -> StoredLedger:
    head = queries.read_head(connection)
    if not is_current(connection):
        if head.position:
            _log.info("%d events are folded anew: another release made the stored projections", head.position)
        rebuild(connection)
    return StoredLedger(
        head,
        queries.read_state(connection),
        queries.read_last_used(connection),
        queries.read_last_seen(connection),
    )


LEAVE_COMPLETE_FILE = ("PRAGMA busy_timeout = 0", "PRAGMA journal_mode = DELETE")
"""Leaves one complete file, which opens on read-only media, before the connection is closed.

Closing alone would remove the WAL, so that the file would look like a copy without it. If a reader prevents
this, the WAL stays beside the file.
"""


def leave_complete_file(connection: sqlite3.Connection, *, lacked_wal: bool) -> None:
    """Leave one complete file, if that is possible.

    Args:
        connection: the writer's.
        lacked_wal: whether the file lacked its WAL before it was opened (`events.sqlite.readonly.lacks_wal`):
            then it stays refused until its last event says that the file is complete.
    """
    with suppress(sqlite3.Error):
        if not (lacked_wal and may_lack_events(connection.execute(NEWEST_TYPE).fetchall())):
            for statement in LEAVE_COMPLETE_FILE:
                connection.execute(statement)
