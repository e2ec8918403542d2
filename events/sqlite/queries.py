"""The SQL of the log: statements and transactions, heads, pages, projections."""

from __future__ import annotations

import sqlite3
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, starmap
from typing import Any, TypeAlias

import aiosqlite
import msgspec

from events.codec import GENESIS
from events.jobs import Job, JobStatus
from events.models import Model
from events.registers import ENTRIES, RegisterEntry, Registers
from events.state import State
from events.storage import LogHead, Row
from events.types import OF_SERVER, Data
from features.facts import OF_SERVERS

EVENTS_PER_READ = 500
"""Events read at once: what is held in memory beside a fold."""

LAST = 2**63 - 1
"""No position is above this."""


Parameters: TypeAlias = Sequence[object] | Mapping[str, object]
"""Values of a statement's parameters, by number or by name."""


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block in one transaction, which is rolled back if it raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.rollback()
        raise


async def fetch_all(connection: aiosqlite.Connection, sql: str, parameters: Parameters = ()) -> list[Any]:
    """Run one statement, a transaction of its own, and return its rows.

    It ends also if its caller is cancelled.

    Raises:
        sqlite3.Error: no cursor is left open.
    """
    try:
        return list(await connection.execute_fetchall(sql, parameters))
    except BaseException as error:
        release_cursors(error)
        raise


def release_cursors(error: BaseException) -> None:
    """Close the cursors in the frames of an error, which a caller may keep.

    An unfinished cursor keeps its snapshot even after a rollback, and even after its connection is closed
    (measured); no checkpoint and no sync gets past a snapshot.
    """
    traceback.clear_frames(error.__traceback__)


def types_sql(kinds: Iterable[type[Data]]) -> str:
    """Return the types of events for `type IN (…)`."""
    return ", ".join(f"'{kind.TYPE}'" for kind in kinds)


def read_head(connection: sqlite3.Connection) -> LogHead:
    row = connection.execute(
        "SELECT position, hash, recorded_at, type FROM events ORDER BY position DESC LIMIT 1"
    ).fetchone()
    return LogHead() if row is None else LogHead(*row)


def find_hash(connection: sqlite3.Connection, position: int) -> bytes | None:
    """Return the hash at a position of the log; None beyond its head."""
    if position == 0:
        return GENESIS
    row = connection.execute("SELECT hash FROM events WHERE position = ?", (position,)).fetchone()
    return None if row is None else bytes(row[0])


def recorded_at(connection: sqlite3.Connection, position: int) -> str:
    """Return when the event at a position was recorded; empty if the log has none there."""
    row = connection.execute("SELECT recorded_at FROM events WHERE position = ?", (position,)).fetchone()
    return "" if row is None else str(row[0])


def read_rows(connection: sqlite3.Connection, after: int, until: int) -> Iterator[Row]:
    """Yield the events after one position up to and with another."""
    return starmap(Row, chain.from_iterable(read_pages(connection, after, until)))


def read_starts_and_ends(connection: sqlite3.Connection, after: int) -> list[Row]:
    """Return the events after a position that are about a server."""
    among = f"type IN ({types_sql([*OF_SERVER, *OF_SERVERS])}) AND position > ?"
    sql = f"SELECT position, body, hash FROM events WHERE {among} ORDER BY position"  # noqa: S608 - literals
    return list(starmap(Row, connection.execute(sql, (after,))))


def read_register(connection: sqlite3.Connection, name: str) -> dict[str, Any]:
    """Return the stored entries of a register by their ids. Raises ValueError if one is damaged."""
    decode = msgspec.json.Decoder(ENTRIES[name]).decode
    entries = (decode(body) for (body,) in connection.execute(f"SELECT body FROM {name}"))  # noqa: S608 - a register's name
    return {entry.id: entry for entry in entries}


def read_pages(
    connection: sqlite3.Connection, after: int, until: int = LAST
) -> Iterator[list[tuple[int, str, bytes]]]:
    """Yield positions, bodies and hashes of the events above `after` up to `until`, in pages.

    No cursor stays open between two pages, so the writer can begin its write-ahead log anew.
    """
    while page := connection.execute(
        "SELECT position, body, hash FROM events WHERE position > ? AND position <= ?"
        " ORDER BY position LIMIT ?",
        (after, until, EVENTS_PER_READ),
    ).fetchall():
        yield page
        after = page[-1][0]


def read_state(connection: sqlite3.Connection) -> State:
    """Return the live state from the stored projections, which are always at the head.

    Raises:
        ValueError: a stored projection is damaged.
    """
    row = connection.execute("SELECT position FROM projected").fetchone()
    if row is None:
        raise ValueError("the position of the stored projections is missing")
    (position,) = row
    jobs = connection.execute(
        "SELECT body FROM jobs WHERE status IN (?, ?)", (JobStatus.PENDING, JobStatus.IN_PROGRESS)
    )
    stored_models = [as_model(body) for (body,) in connection.execute("SELECT body FROM models")]
    stored_jobs = [as_job(body) for (body,) in jobs]
    registers: dict[str, Any] = {name: read_register(connection, name) for name in ENTRIES}
    return State(
        position,
        read_head(connection).recorded_at,
        {model.id: model for model in stored_models},
        {job.id: job for job in stored_jobs},
        registers=Registers(**registers),
    )


def read_job(connection: sqlite3.Connection, job_id: str) -> Job | None:
    row = connection.execute("SELECT body FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return None if row is None else as_job(row[0])


@dataclass(frozen=True, slots=True)
class JobQuery:
    """A query for a page of jobs, newest first.

    Attributes:
        before: only jobs that were created at positions below this cursor.
        model_id: only jobs of this model.
        status: only jobs with this status.
        limit: jobs in the page at most.
    """

    before: int | None = None
    model_id: str | None = None
    status: JobStatus | None = None
    limit: int = 100


def jobs_sql(query: JobQuery, until: int | None = None) -> tuple[str, dict[str, object]]:
    """Return the statement, and its parameters, of the stored jobs of a query, and one more for a next page.

    With `until`, only jobs that were created up to this position and had the status then.
    """
    clauses = {
        "created_position <= :until": until,
        "created_position < :before": query.before,
        "model_id = :model_id": query.model_id,
        "status = :status": query.status,
        "json_extract(body, '$.position') <= :until": None if query.status is None else until,
    }  # only the conditions of this query, so that SQLite uses their index
    where = " AND ".join(clause for clause, value in clauses.items() if value is not None) or "TRUE"
    sql = f"SELECT created_position, body FROM jobs WHERE {where}"  # noqa: S608 - literals above
    return f"{sql} ORDER BY created_position DESC LIMIT :limit + 1", {**asdict(query), "until": until}


def read_last_used(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT model_id, used_at FROM last_used"))


def read_last_seen(connection: sqlite3.Connection) -> str:
    """Return the time of the server's last note that it was alive; empty without a note."""
    row = connection.execute("SELECT seen_at FROM last_seen").fetchone()
    return "" if row is None else str(row[0])


def kind_of(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, or 0 for an error of the Python module."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def cure_of(kind: int) -> str:
    """Return what an operator can do about an error of the ledger's file, by its primary result code."""
    match kind:
        case sqlite3.SQLITE_FULL:
            return "free space on the disk of the data directory"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return "make the data directory writable for the server's user: its disk may be mounted read-only"
        case sqlite3.SQLITE_IOERR:
            return "check the disk of the data directory: the machine's log has its errors"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "end the other program that holds the ledger's file"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:  # CORRUPT also where the disk fails a read
            return "check the disk, run `loadledger verify`, and restore a backup if that finds damage"
    return "see the server's log"


def sync(connection: sqlite3.Connection) -> None:
    """Checkpoint and sync the whole WAL, and begin the WAL anew; wait for a reader that blocks this.

    After a failed fsync the kernel marks the pages as clean, and the next fsync does not report them:
    readable pages need not be on the disk.

    Raises:
        sqlite3.Error: the database cannot be written, or a reader's snapshot blocks the checkpoint too long.
    """
    (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise sqlite3.OperationalError("a reader keeps the log from being synced")


def as_text(entity: Job | Model | RegisterEntry) -> str:
    return as_bytes(entity).decode()


def as_bytes(entity: Job | Model | RegisterEntry) -> bytes:
    return _ENCODER.encode(entity)


def encode(value: object) -> str:
    """Return JSON for SQLite's functions, which take text."""
    return _ENCODER.encode(value).decode()


# These read texts written by `as_text`; they raise ValueError for a damaged one.
as_job = msgspec.json.Decoder(Job).decode
as_model = msgspec.json.Decoder(Model).decode

_ENCODER = msgspec.json.Encoder(order="sorted")
