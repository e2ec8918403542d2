"""The reader of `verify`: the log as raw values and rows, the data compared with it, and the ids seen.

These reads hold one snapshot for long, on purpose: `events.audit` proves a ledger at one moment. The function
that opens the ledger converts SQLite's errors to LogUnavailable; `storage_errors` converts them earlier.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from events.errors import LogUnavailable
from events.sqlite import queries
from events.sqlite.readonly import open_read_only, refuse_incomplete
from events.storage import RawRow, StorageDamaged, StorageError

_NOT_ABOUT_CONTENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
}
"""Errors of SQLite that do not concern the content of the file."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Convert SQLite's errors in the block.

    Raises:
        StorageDamaged: the file is damaged.
        StorageError: the file cannot be read for another reason.
    """
    try:
        yield
    except sqlite3.Error as error:
        kind = StorageDamaged if queries.kind_of(error) == sqlite3.SQLITE_CORRUPT else StorageError
        raise kind(str(error)) from error


class KnownIds:
    """The ids of the events seen: in a temporary file, so that memory does not grow with them."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._table.close)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("CREATE TABLE known (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._table.execute("BEGIN")

    def add(self, ids: Sequence[str]) -> int:
        """Add ids up to the first known one, and return the number of added ids.

        Raises:
            LogUnavailable: the temporary file cannot be written.
        """
        before = self._table.total_changes
        try:
            self._table.executemany("INSERT INTO known VALUES (?)", zip(ids, strict=True))
        except sqlite3.IntegrityError:
            pass
        except sqlite3.Error as error:
            raise LogUnavailable(
                f"the events' ids cannot be kept in a temporary file: {error}; make room in its folder, "
                "or name another one in the variable SQLITE_TMPDIR"
            ) from None
        return self._table.total_changes - before


class ProofReader:
    """Reads the data that `verify` proves and compares.

    Attributes:
        connection: returns text as bytes, so that damaged text can be read.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self._path = path

    def rows(self) -> Iterator[RawRow]:
        return self.connection.execute("SELECT position, body, hash FROM events ORDER BY position")

    def is_cut_off(self) -> bool:
        """Whether the last page is incomplete: SQLite reads it as zeros, but finds missing pages itself."""
        (page_size,) = self.connection.execute("PRAGMA page_size").fetchone()
        return self._path.stat().st_size % int(page_size) != 0

    def find_damage(self) -> str | None:
        """Return the first problem that SQLite's integrity check finds, or None."""
        try:
            (said,) = self.connection.execute("PRAGMA integrity_check(1)").fetchone()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if isinstance(error, sqlite3.Error) and queries.kind_of(error) in _NOT_ABOUT_CONTENT:
                raise
            return str(error)
        text = str(said, "utf-8", "replace")
        return None if text == "ok" else text

    def refuse_incomplete(self) -> None:
        """Refuse a file without its write-ahead log, unless its last event says that the file is complete.

        Raises:
            IncompleteCopy: `incomplete_copy`.
        """
        refuse_incomplete(self.connection, self._path)


@contextmanager
def open_proof_reader(path: Path) -> Iterator[ProofReader]:
    """Open a ledger in one snapshot to prove it, beside a running server; raises as `open_read_only` does."""
    with open_read_only(path) as connection:
        connection.text_factory = bytes
        connection.execute("BEGIN")
        yield ProofReader(connection, path)
