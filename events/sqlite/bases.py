"""The base of a log as plain values: read out of one ledger, and stored in another that is empty.

A replica whose database has archived events begins in this way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from events.errors import LedgerDamaged
from events.sqlite.queries import make_state, read_base
from events.sqlite.snapshots import base_state_digest
from events.state import State
from events.storage import ArchiveRecord, BaseEntity, StoredBase

_LIFTED = ("events_never_go", "base_never_changes")
"""The triggers that have to be dropped to move the base, and created again."""

_JOB_KEY = "{:019d}"
"""The position at which a job was created, so that keys sort as positions do."""


@contextmanager
def suspended_triggers(connection: sqlite3.Connection) -> Iterator[None]:
    """Drop the triggers within the caller's transaction, so that no reader sees the log without them."""
    found = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND name IN (?, ?)", _LIFTED
    ).fetchall()
    for name, _ in found:
        connection.execute(f"DROP TRIGGER {name}")
    yield
    for _, sql in found:
        connection.execute(sql)


def read_stored_base(connection: sqlite3.Connection) -> StoredBase:
    base = read_base(connection)
    if base.position == 0:
        return StoredBase(base)
    return StoredBase(base, _read_archives(connection), tuple(_read_entities(connection, base.position)))


def _read_archives(connection: sqlite3.Connection) -> tuple[ArchiveRecord, ...]:
    found = connection.execute(
        "SELECT first_position, last_position, hash, archived_at, file, sha256, state_sha256, folds"
        " FROM archives ORDER BY last_position"
    )
    return tuple(ArchiveRecord(*row) for row in found)


def _read_entities(connection: sqlite3.Connection, base: int) -> Iterator[BaseEntity]:
    at = {"base": base}
    yield from (
        BaseEntity("model", key, body)
        for key, body in connection.execute(
            "SELECT model_id, body FROM model_snapshots WHERE position = :base ORDER BY 1", at
        )
    )
    yield from (
        BaseEntity("job", _JOB_KEY.format(position), body)
        for position, body in connection.execute(
            "SELECT created_position, body FROM job_snapshots WHERE position = :base ORDER BY 1", at
        )
    )
    tokens = connection.execute("SELECT id, body FROM base_tokens ORDER BY 1")
    yield from (BaseEntity("token", key, body) for key, body in tokens)
    nodes = connection.execute("SELECT id, body FROM base_nodes ORDER BY 1")
    yield from (BaseEntity("node", key, body) for key, body in nodes)


def state_at_base(stored: StoredBase) -> State:
    """Return the live state at a base; raise ValueError if a part of it is damaged."""
    return make_state(
        stored.base.position,
        "",
        stored.bodies("model"),
        stored.bodies("job"),
        tokens=stored.bodies("token"),
        nodes=stored.bodies("node"),
    )


def store_base(connection: sqlite3.Connection, stored: StoredBase) -> None:
    """Give an empty ledger a base; the caller holds the transaction, and folds the log from there.

    Raises:
        LedgerDamaged: `ledger_damaged`, the state is not what archiving wrote.
    """
    position = stored.base.position
    with suspended_triggers(connection):
        connection.execute("UPDATE base SET position = ?, hash = ?", (position, stored.base.hash))
    connection.executemany(
        f"INSERT INTO archives ({', '.join(ArchiveRecord._fields)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - literals
        stored.archives,
    )
    connection.execute("INSERT INTO snapshots (position) VALUES (?)", (position,))
    for kind, statement in (
        ("model", "INSERT INTO model_snapshots (position, model_id, body) VALUES (:position, :key, :body)"),
        ("job", "INSERT INTO job_snapshots VALUES (:position, CAST(:key AS INTEGER), :body)"),
        ("token", "INSERT INTO base_tokens (id, body) VALUES (:key, :body)"),
        ("node", "INSERT INTO base_nodes (id, body) VALUES (:key, :body)"),
    ):
        connection.executemany(
            statement,
            [{"position": position, **each._asdict()} for each in stored.entities if each.kind == kind],
        )
    if not stored.archives or base_state_digest(connection, position) != stored.archives[-1].state_sha256:
        raise LedgerDamaged(
            f"the state that the database has at its base, position {position}, is not the one that "
            "`loadledger archive` stored there: `loadledger verify --ledger` compares it with the archives"
        )
