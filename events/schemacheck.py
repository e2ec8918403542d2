"""The schema of a ledger, which says what columns have and triggers refuse, beside what migrations make."""

from __future__ import annotations

import sqlite3

from events.schema import SchemaRow, check_readable, schema_after, schema_of


def schema_difference(connection: sqlite3.Connection) -> str | None:
    """Return in words what the schema has otherwise than the migrations that the ledger says it has.

    Plain tables of others, as SQLite's statistics and tools for replication keep them, are left alone:
    nothing of ours is read from them, or changed by them.
    """
    stored, made = schema_of(connection), schema_after(check_readable(connection))
    tables = {row.tbl_name for row in made}
    for row in sorted(made - stored, key=_name):
        what = "is not as it was made" if _name(row) in set(map(_name, stored)) else "is missing"
        return f"the {_shown(row)} {what}"
    for row in sorted(stored - made, key=_name):
        if row.tbl_name in tables or not _is_plain_table(row):
            return f"the {_shown(row)} is none of a ledger's"
    return None


def _is_plain_table(row: SchemaRow) -> bool:
    """Whether it is a table, or the index of its key; SQLite goes by the SQL, whatever the type says."""
    return row.sql is None if row.type == b"index" else (row.sql or b"").startswith(b"CREATE TABLE ")


def _name(row: SchemaRow) -> tuple[bytes, bytes]:
    return row.type, row.name


def _shown(row: SchemaRow) -> str:
    return f"{row.type.decode(errors='replace')} {row.name.decode(errors='replace')!r}"
