"""The SQL of the log: what the writer's thread runs, one function a statement group."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from events.canonical import GENESIS
from events.jobs import Job, JobStatus
from events.models import Model
from events.state import Changes, State


@dataclass(frozen=True, slots=True)
class Head:
    """The last event: position, hash (32 bytes), time, type; position 0 is the empty log."""

    position: int = 0
    hash: bytes = GENESIS
    recorded_at: str = ""
    type: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One event as it is stored."""

    position: int
    body: str
    hash: bytes


def read_head(connection: sqlite3.Connection) -> Head:
    """Return the head of the log."""
    row = connection.execute(
        "SELECT position, hash, recorded_at, type FROM events ORDER BY position DESC LIMIT 1",
    ).fetchone()
    if row is None:
        position, digest = connection.execute("SELECT position, hash FROM base").fetchone()
        return Head(position, digest)
    return Head(*row)


def read_state(connection: sqlite3.Connection) -> State:
    """Return the live state from the stored projections, which are always at the head."""
    (position,) = connection.execute("SELECT position FROM projected").fetchone()
    models = (as_model(body) for (body,) in connection.execute("SELECT body FROM models"))
    unended = connection.execute(
        "SELECT body FROM jobs WHERE status IN (?, ?)",
        (JobStatus.PENDING, JobStatus.IN_PROGRESS),
    )
    jobs = (as_job(body) for (body,) in unended)
    return State(
        position,
        read_head(connection).recorded_at,
        {model.id: model for model in models},
        {job.id: job for job in jobs},
    )


def write_group(connection: sqlite3.Connection, rows: Sequence[Row], changes: Changes) -> None:
    """Append `rows` and store what they changed: one transaction, durable on return."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(
            "INSERT INTO events (position, body, hash) VALUES (?, ?, ?)",
            [(row.position, row.body, row.hash) for row in rows],
        )
        write_projections(connection, changes.models.values(), changes.jobs.values(), rows[-1].position)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.rollback()
        raise


def probe(connection: sqlite3.Connection) -> None:
    """Make a commit that changes nothing, to see whether the next one can be made."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("UPDATE projected SET position = position")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.rollback()
        raise


def kind_of(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, or 0 for an error that is not SQLite's own."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def sync(connection: sqlite3.Connection) -> None:
    """Write all that is in the WAL to the database, synced, and begin the WAL anew.

    After a failed fsync the kernel takes the pages for clean, and the next fsync says nothing about them:
    what is read back need not be on the disk.

    Raises:
        sqlite3.Error: it cannot be written, or a reader's snapshot is in the way.
    """
    (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise sqlite3.OperationalError("a reader keeps the log from being synced")


def write_projections(
    connection: sqlite3.Connection,
    models: Iterable[Model],
    jobs: Iterable[Job],
    position: int,
) -> None:
    """Store these entities as they are after the event at `position`; the caller holds the transaction."""
    connection.executemany(
        "INSERT INTO models (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
        [(model.id, as_text(model)) for model in models],
    )
    connection.executemany(
        "INSERT INTO jobs (created_position, id, body) VALUES (?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET created_position = excluded.created_position, body = excluded.body",
        [(job.created_position, job.id, as_text(job)) for job in jobs],
    )
    connection.execute("UPDATE projected SET position = ?", (position,))


def as_text(entity: Job | Model) -> str:
    """Return an entity as it is stored."""
    return msgspec.json.encode(entity, order="sorted").decode()


def as_job(body: str) -> Job:
    """Return the job that `as_text` wrote."""
    return msgspec.convert(json.loads(body), Job)


def as_model(body: str) -> Model:
    """Return the model that `as_text` wrote."""
    return msgspec.convert(json.loads(body), Model)
