"""The base of a log: moved by archiving, and as plain values.

Archiving removes the events before it (`events.audit.archive` decides and proves). A replica whose database
has archived events begins with the values of a base.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from events.clock import Timestamp
from events.errors import LedgerDamaged
from events.sqlite.queries import list_archives, make_state, read_base
from events.sqlite.snapshots import base_state_digest, write_base_state
from events.sqlite.timetravel import state_at
from events.state import State
from events.storage import ArchiveRecord, BaseEntity, StoredBase
from events.types import Anchor

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


def last_before(connection: sqlite3.Connection, time: Timestamp) -> int:
    """Return the position of the last event that was recorded before a time, or 0."""
    (last,) = connection.execute(
        "SELECT coalesce(max(position), 0) FROM events WHERE recorded_at < ?", (time,)
    ).fetchone()
    return int(last)


def first_key(connection: sqlite3.Connection, until: int, since: Timestamp) -> int | None:
    """Return the first position up to `until` with an idempotency key recorded after `since`, or None."""
    (position,) = connection.execute(
        "SELECT min(position) FROM events WHERE idempotency_key IS NOT NULL AND position <= ?"
        " AND recorded_at > ?",
        (until, since),
    ).fetchone()
    return None if position is None else int(position)


def remove_events(
    connection: sqlite3.Connection, end: Anchor, file: str, sha256: bytes, now: Timestamp, *, folds: int
) -> int:
    """Remove the events up to and with `end`, and list their archive; the caller holds the transaction.

    Args:
        connection: of `events.sqlite.storage.open_to_archive`.
        end: the new base.
        file: the archive's name.
        sha256: of the archive.
        now: when it is archived.
        folds: the version of the folds that made the state; that of archives before it stays.

    Returns:
        The number of removed ended jobs.
    """
    base, before = read_base(connection), list_archives(connection)
    folds = before[-1].folds if before else folds
    state = state_at(connection, end.position, from_base=True)
    with suspended_triggers(connection):
        jobs = write_base_state(connection, state)
        connection.execute("DELETE FROM events WHERE position <= ?", (end.position,))
        connection.execute("UPDATE base SET position = ?, hash = ?", (end.position, end.hash))
    state_sha256 = base_state_digest(connection, end.position)
    connection.execute(
        "INSERT INTO archives"
        " (last_position, first_position, hash, archived_at, file, sha256, state_sha256, folds)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (end.position, base.position + 1, end.hash, now, file, sha256, state_sha256, folds),
    )
    return jobs


def shrink(connection: sqlite3.Connection) -> None:
    """Return the free space to the disk if there is room for that, and leave one complete file."""
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")


def read_stored_base(connection: sqlite3.Connection) -> StoredBase:
    base = read_base(connection)
    if base.position == 0:
        return StoredBase(base)
    return StoredBase(base, list_archives(connection), tuple(_read_entities(connection, base.position)))


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
