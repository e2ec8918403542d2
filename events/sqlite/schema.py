"""The ledger's schema: opening the database for writing, migrations, and comparison with their result."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

from events.errors import DEVELOPMENT, ForeignDatabase, FutureSchema
from events.sqlite.queries import transaction
from events.sqlite.writing import VIEWS
from migrations import read_migrations

APPLICATION_ID = 0x4C4C4631
"""SQLite's application_id of a ledger: "LLF1", LoadLedger's format 1."""

_OF_DEVELOPMENT = 0x4C4C6467
"""The application_id of ledgers before format 1, whose events meant other things."""

BUSY_S = 5.0
"""Limit of a connection's wait for another one's lock; a longer read of a stopped ledger keeps a server from
starting."""

CHECKPOINT_PAGES = 4_000
"""Pages (4 KiB) of the write-ahead log before a checkpoint writes them into the database. Each group writes
the same pages of stored projections: SQLite's default of 1,000 would copy them four times as often."""

WAL_LIMIT_BYTES = 32 * 2**20
"""A write-ahead log that grew during a long read is cut to this afterwards: twice `CHECKPOINT_PAGES`."""


Connection: TypeAlias = sqlite3.Connection
"""A connection to a ledger's file, which other packages only pass to functions of this one."""


class SchemaRow(NamedTuple):
    """A table, index or trigger as SQLite stores it; `sql` is None for the index of a key."""

    type: bytes
    name: bytes
    tbl_name: bytes
    sql: bytes | None


def connect(path: Path, *, is_replica: bool = False) -> sqlite3.Connection:
    """Open the ledger for durable writing; create and migrate it where needed.

    The connection may be used from any thread, by one at a time. A replica may lose its last commits in a
    power failure, since they can be read again elsewhere; the file stays intact.

    Raises:
        FutureSchema: `future_schema`, a newer release wrote it.
        ForeignDatabase: `foreign_database`, another program wrote it.
        sqlite3.Error: the file cannot be opened, or is not a database.
    """
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        refuse_foreign(connection)
        connection.executescript(writer_sql(is_replica=is_replica))
        migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def writer_sql(*, is_replica: bool) -> str:
    """Return the statements that a connection needs before it writes."""
    return f"""
PRAGMA journal_mode = WAL;
PRAGMA synchronous = {"NORMAL" if is_replica else "FULL"};
PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES};
PRAGMA journal_size_limit = {WAL_LIMIT_BYTES};
{VIEWS}"""


def begin_reading(connection: sqlite3.Connection) -> None:
    """Begin a read transaction: all following reads have the same head."""
    connection.execute("BEGIN")


def migrate(connection: sqlite3.Connection) -> None:
    """Apply the missing migrations, each in one transaction. Raises as `check_readable` does."""
    done = check_readable(connection)
    known = read_migrations()
    for number, script in known[done:]:
        with transaction(connection):
            if _pragma(connection, "user_version") < number:
                _apply(connection, number, script)


def check_readable(connection: sqlite3.Connection) -> int:
    """Return how many migrations the database has.

    Raises:
        FutureSchema: `future_schema`, the database has more migrations than this release.
    """
    done, known = _pragma(connection, "user_version"), len(read_migrations())
    if done > known:
        raise FutureSchema(
            f"the ledger has schema {done}, this loadledger knows {known}: use the release that wrote it, "
            "or a later one"
        )
    return done


def schema_of(connection: sqlite3.Connection) -> frozenset[SchemaRow]:
    """Return the tables, indexes and triggers of a database with their SQL."""
    columns = ", ".join(f"CAST({column} AS BLOB)" for column in SchemaRow._fields)
    rows = connection.execute(f"SELECT {columns} FROM sqlite_schema")  # noqa: S608 - literals
    return frozenset(SchemaRow(*row) for row in rows)


@cache
def schema_after(migrations: int) -> frozenset[SchemaRow]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for number, script in read_migrations()[:migrations]:
            _apply(connection, number, script)
        return schema_of(connection)


def _apply(connection: sqlite3.Connection, number: int, script: str) -> None:
    for statement in _statements(script):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {number}")


def refuse_foreign(connection: sqlite3.Connection) -> None:
    """Refuse a database that is neither a ledger nor empty.

    Raises:
        ForeignDatabase: `foreign_database`.
    """
    owner = _pragma(connection, "application_id")
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if owner == _OF_DEVELOPMENT:
        raise ForeignDatabase(DEVELOPMENT)
    if owner != APPLICATION_ID and (tables or owner or _pragma(connection, "user_version")):
        raise ForeignDatabase


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return int(value)


def _statements(script: str) -> Iterator[str]:
    """Yield single statements; `executescript` would commit before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement


def schema_difference(connection: sqlite3.Connection) -> str | None:
    """Return the first difference between the schema and the ledger's migrations, in words.

    Plain tables of other programs, such as SQLite's statistics or a replication tool's, are ignored: the
    ledger does not read them, and they change nothing in it.
    """
    stored, made = schema_of(connection), schema_after(check_readable(connection))
    tables = {row.tbl_name for row in made}
    for row in sorted(made - stored, key=_name):
        what = "was changed" if _name(row) in set(map(_name, stored)) else "is missing"
        return f"the {_format_row(row)} {what}"
    for row in sorted(stored - made, key=_name):
        if row.tbl_name in tables or not _is_plain_table(row):
            return f"the {_format_row(row)} is not of a ledger"
    return None


def _is_plain_table(row: SchemaRow) -> bool:
    """Whether a row is a table, or the index of its key; SQLite judges by the SQL, not by the type."""
    return row.sql is None if row.type == b"index" else (row.sql or b"").startswith(b"CREATE TABLE ")


def _name(row: SchemaRow) -> tuple[bytes, bytes]:
    return row.type, row.name


def _format_row(row: SchemaRow) -> str:
    return f"{row.type.decode(errors='replace')} {row.name.decode(errors='replace')!r}"
