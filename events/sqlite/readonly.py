"""The one way to read a ledger: a read-only connection, beside the writer or without one.

Read in short pages: during a read transaction, the writer cannot begin its write-ahead log (WAL) anew. Fetch
all rows before you decode them: an exception would keep an unfinished cursor, and with it the transaction.
Only time travel (`events.sqlite.timetravel`) and the proof of a whole ledger (`events.audit`) hold one
snapshot for longer.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from events.errors import IncompleteCopy, LogUnavailable
from events.sqlite.queries import release_cursors
from events.sqlite.schema import BUSY_S, check_readable, refuse_foreign
from events.storage import StorageError
from events.types import ServerStopped

CACHE = "PRAGMA cache_size = -512"
"""KiB of pages cached by a server's reader: the ends of log and indexes; the kernel caches the rest."""

_READ_VERSION = 19
"""Offset of the header's byte that says how to read the file (SQLite file format, section 1.3.3)."""

_WAL = 2
"""Value of that byte for a file with a write-ahead log."""

_JOURNAL = "-journal"
"""Suffix of SQLite's rollback journal, which only a file without a write-ahead log has."""


T = TypeVar("T")


@contextmanager
def open_read_only(
    path: Path, *, problem: str = "cannot be read", refuses_incomplete: bool = False
) -> Iterator[sqlite3.Connection]:
    """Open a ledger to read it; the connection cannot write.

    If a process died while it wrote with a rollback journal, SQLite first undoes that write.

    Args:
        path: of the ledger.
        problem: completes "the ledger ledger.db …" for an error of SQLite, here or in the caller's block.
        refuses_incomplete: whether to refuse a copy that may lack its newest events.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        IncompleteCopy: `incomplete_copy`.
        LogUnavailable: `log_unavailable`, there is no ledger, or it cannot be opened or read.
    """
    without_wal = refuses_incomplete and lacks_wal(path)  # opening the file would create an empty WAL
    try:
        with closing(_connect(path)) as connection:
            if without_wal:
                refuse_incomplete(connection, path)
            yield connection
    except (sqlite3.Error, StorageError, UnicodeDecodeError) as error:  # messages quote damaged content
        raise LogUnavailable(f"the ledger {path.name} {problem}: {error}") from error


def copy_ledger(path: Path, draft: Path) -> None:
    """Copy a ledger at one moment into the existing file `draft`, as one complete file.

    Raises as `open_read_only` does; a copy that may lack its newest events is refused.
    """
    with (
        open_read_only(path, problem="cannot be copied", refuses_incomplete=True) as source,
        closing(sqlite3.connect(address_of(draft, "rw"), uri=True)) as copy,
    ):
        source.backup(copy)  # in one step: between steps, each commit of the server would restart the copy
        copy.execute("PRAGMA journal_mode = DELETE")


def _connect(path: Path) -> sqlite3.Connection:
    try:
        return _connect_as(path, "ro")
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
    _complete(path)
    return _connect_as(path, "ro")


def address_of(path: Path, mode: str) -> str:
    """Return the URI with which SQLite opens a file in a mode: `ro` or `rw`."""
    return f"{path.absolute().as_uri()}?mode={mode}"


def _connect_as(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        address_of(path, mode), timeout=BUSY_S, uri=True, isolation_level=None, check_same_thread=False
    )
    try:
        refuse_foreign(connection)
        check_readable(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _complete(path: Path) -> None:
    """Have SQLite undo the unfinished write of a process that died, and leave one complete file."""
    try:
        with closing(_connect_as(path, "rw")) as connection, suppress(sqlite3.Error):  # a reader blocks it
            connection.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        raise sqlite3.OperationalError(
            f"a process died while it wrote, and {path.name}{_JOURNAL} undoes that, which takes write access "
            f"to the file and its folder: {error}"
        ) from error


class Past:
    """Queries that fold while they read: one at a time, in a thread, on one read-only connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    async def run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a query in one transaction, so that all its statements see the same head.

        The next one waits until it has ended, also if its caller is cancelled.

        Raises:
            LogUnavailable: `log_unavailable`, the file cannot be read.
        """
        await self._turn.acquire()
        reading = asyncio.ensure_future(asyncio.to_thread(self._run, query))
        reading.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(reading)

    def _run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._connection.execute("BEGIN")
            try:
                return query(self._connection)
            except BaseException as error:
                release_cursors(error)
                raise
            finally:
                self._connection.rollback()
        except sqlite3.Error as error:
            raise LogUnavailable(f"the ledger cannot be read: {error}") from error


@asynccontextmanager
async def open_past(path: Path) -> AsyncIterator[Past]:
    """Open a ledger for a server. Raises as `open_read_only` does."""
    with open_read_only(path, problem="cannot be opened") as connection:
        connection.execute(CACHE)
        past = Past(connection)
        try:
            yield past
        finally:
            await past.run(lambda _: None)  # the queries before it have ended


def wants_wal(path: Path) -> bool:
    """Whether the file uses a write-ahead log that exists beside it; False without a file.

    Raises:
        LogUnavailable: `log_unavailable`, the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_READ_VERSION + 1)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise LogUnavailable(f"the ledger {path.name} cannot be read: {error.strerror}") from error
    return header[_READ_VERSION:] == bytes([_WAL])


def lacks_wal(path: Path) -> bool:
    """Whether the file was written with a write-ahead log that is missing; a server's is never empty.

    Call this before the file is opened, which creates an empty one. A file beside a rollback journal lacks
    nothing: SQLite had applied and removed the write-ahead log when a process died before the header said so.
    """
    if not wants_wal(path) or path.with_name(f"{path.name}{_JOURNAL}").exists():
        return False
    try:
        return path.with_name(f"{path.name}-wal").stat().st_size == 0
    except FileNotFoundError:  # a server removes it when it stops
        return True


NEWEST_TYPE = "SELECT CAST(type AS BLOB) FROM events ORDER BY position DESC LIMIT 1"
"""Selects the type of the last event, if there is one."""


def may_lack_events(newest: Sequence[tuple[bytes]]) -> bool:
    """Whether a ledger without its write-ahead log may lack events: its last event is no `ServerStopped`."""
    return newest not in ([], [(ServerStopped.TYPE.encode(),)])


def refuse_incomplete(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a ledger without its write-ahead log unless its last event says that the file is complete.

    Raises:
        IncompleteCopy: `incomplete_copy`.
    """
    if may_lack_events(connection.execute(NEWEST_TYPE).fetchall()):
        raise IncompleteCopy(
            f"{path.name} may lack its newest events: {path.name}-wal is missing, and the last event is not "
            "ServerStopped. Copy the ledger of a running server with `loadledger backup`. If this is not a "
            "copy, start and stop the server. `loadledger verify --expect POSITION:HASH` checks whether it "
            "has the event that it must have"
        )
