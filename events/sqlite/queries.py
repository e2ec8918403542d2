"""The SQL of the log: transactions, heads, pages, projections, idempotency keys, joins; writing a group."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, starmap
from typing import Any

import msgspec

from events.codec import GENESIS, decode_event
from events.errors import ForeignHead
from events.history import find_landmark
from events.jobs import Job, JobStatus
from events.models import Model
from events.registers import ENTRIES, RegisterChanges, RegisterEntry, Registers
from events.sqlite import history
from events.state import Changes, Join, KnownKey, State, read_key
from events.storage import LogHead, Row, StorageError
from events.types import OF_SERVER
from features.facts import OF_SERVERS

EVENTS_PER_READ = 500
"""Events read at once: what is held in memory beside a fold."""

LAST = 2**63 - 1
"""No position is above this."""


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
    kinds = ", ".join(f"'{kind.TYPE}'" for kind in (*OF_SERVER, *OF_SERVERS))
    found = connection.execute(
        f"SELECT position, body, hash FROM events WHERE type IN ({kinds}) AND position > ? ORDER BY position",  # noqa: S608 - literals
        (after,),
    )
    return list(starmap(Row, found))


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


def select_jobs(connection: sqlite3.Connection, query: JobQuery, until: int | None = None) -> list[Job]:
    """Return the stored jobs of a query, and one more if there is a next page.

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
    rows = connection.execute(
        f"SELECT body FROM jobs WHERE {where} ORDER BY created_position DESC LIMIT :limit + 1",  # noqa: S608 - literals above
        {**asdict(query), "until": until},
    ).fetchall()
    return [as_job(body) for (body,) in rows]


def read_keys(connection: sqlite3.Connection, hashes: Iterable[str]) -> dict[str, KnownKey]:
    """Return the latest use of each of these idempotency keys, however long ago."""
    found = dict[str, KnownKey]()
    for key_hash in hashes:
        for (body,) in connection.execute(
            "SELECT body FROM events WHERE idempotency_key = ? ORDER BY position DESC", (key_hash,)
        ):
            known = read_key(decode_event(body))
            if known is not None:  # None for an event that this release does not know
                found.update([known])
                break
    return found


def read_joins(connection: sqlite3.Connection, joinable: Iterable[tuple[str, str]]) -> set[Join]:
    statement = (
        "SELECT DISTINCT type FROM events WHERE job_id = ? AND actor = ?"
        " AND type IN ('LoadJoined', 'UnloadJoined', 'CancelRequested')"  # as in the index `events_by_join`
    )
    return {
        Join(job_id, actor, kind)
        for job_id, actor in joinable
        for (kind,) in connection.execute(statement, (job_id, actor))
    }


def read_last_used(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT model_id, used_at FROM last_used"))


def read_last_seen(connection: sqlite3.Connection) -> str:
    """Return the time of the server's last note that it was alive; empty without a note."""
    row = connection.execute("SELECT seen_at FROM last_seen").fetchone()
    return "" if row is None else str(row[0])


def write_note(connection: sqlite3.Connection, used: Mapping[str, str], seen_at: str) -> None:
    """Store models' times of last use and the server's note in one transaction; later stored times stay."""
    with transaction(connection):
        connection.execute(
            "INSERT INTO last_seen (one, seen_at) VALUES (1, ?)"
            " ON CONFLICT (one) DO UPDATE SET seen_at = max(seen_at, excluded.seen_at)",
            (seen_at,),
        )
        connection.executemany(
            "INSERT INTO last_used (model_id, used_at) VALUES (?, ?)"
            " ON CONFLICT (model_id) DO UPDATE SET used_at = max(used_at, excluded.used_at)",
            list(used.items()),
        )


def write_group(
    connection: sqlite3.Connection, rows: Sequence[Row], changes: Changes, after: LogHead | None = None
) -> None:
    """Append one or more events, and store the entities that they changed, in one durable transaction.

    Raises:
        ForeignHead: the log's head is not the one that the events follow.
        sqlite3.Error: nothing was written, unless COMMIT failed.
    """
    with transaction(connection):
        if after is not None:
            _refuse_other_head(connection, after)
        _insert(connection, rows)
        write_projections(connection, changes.models.values(), changes.jobs.values(), rows[-1].position)
        history.write_steps(connection, changes.steps)
        store_registers(connection, changes.registers)


def _refuse_other_head(connection: sqlite3.Connection, expected: LogHead) -> None:
    tip = "SELECT position, hash FROM events ORDER BY position DESC LIMIT 1"
    found = connection.execute(tip).fetchone() or (0, GENESIS)
    if found != (expected.position, expected.hash):
        raise ForeignHead(
            f"the ledger's head is at {found[0]}, and the last event that this server wrote is at "
            f"{expected.position}: another process has written into its file"
        )


def _insert(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Insert consecutive events; one statement takes a quarter less time than one for each.

    A body has no U+0000, which the canonical form escapes and SQLite would read as the end of the text.

    Raises:
        StorageError: an event has the id of an earlier one: a replica stops there.
        sqlite3.Error: the events were not inserted.
    """
    try:
        connection.execute(
            "INSERT INTO events (position, body, hash)"
            " SELECT :first + key, value, substr(:hashes, 1 + 32 * key, 32) FROM json_each(:bodies)",
            {
                "first": rows[0].position,
                "bodies": _ENCODER.encode([row.body for row in rows]).decode(),
                "hashes": b"".join([row.hash for row in rows]),
            },
        )
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
            raise
        raise StorageError(
            f"an event after position {rows[0].position - 1} has the id of an earlier one, and no release "
            "writes that: `loadledger verify --ledger` names it"
        ) from error


def probe(connection: sqlite3.Connection) -> None:
    """Commit a transaction that changes nothing, to see whether the ledger can be written."""
    with transaction(connection):
        for _ in range(2):  # SQLite writes nothing for an UPDATE that leaves a row unchanged (measured)
            connection.execute("UPDATE projected SET position = -1 - position")


def kind_of(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, or 0 for an error of the Python module."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


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


def write_projections(
    connection: sqlite3.Connection, models: Iterable[Model], jobs: Iterable[Job], position: int
) -> None:
    """Store models and jobs as they are after the event at `position`; the caller holds the transaction."""
    _store_models(connection, [(as_text(model), model.id) for model in models])
    new, changed = list[_JobRow](), list[_JobRow]()
    for job in jobs:
        row = as_text(job), find_landmark(job), job.created_position, job.id
        (new if job.position == job.created_position else changed).append(row)
    _store_jobs(connection, new, changed)
    connection.execute("UPDATE projected SET position = ?", (position,))


_JobRow = tuple[str, int | None, int, str]
"""The body of a job, its landmark, the position at which it was created, and its id."""


def _store_models(connection: sqlite3.Connection, rows: Sequence[tuple[str, str]]) -> None:
    """Store models; most of them exist, and an UPDATE takes half the time of an INSERT."""
    if connection.executemany("UPDATE models SET body = ? WHERE id = ?", rows).rowcount < len(rows):
        connection.executemany(
            "INSERT INTO models (body, id) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            rows,
        )


def _store_jobs(connection: sqlite3.Connection, new: Sequence[_JobRow], changed: Sequence[_JobRow]) -> None:
    """Store new jobs and changed ones; a changed job exists unless it began in the same group."""
    updated = connection.executemany(
        "UPDATE jobs SET body = ?, landmark = ? WHERE created_position = ? AND id = ?", changed
    ).rowcount
    connection.executemany(
        "INSERT INTO jobs (body, landmark, created_position, id) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET body = excluded.body, landmark = excluded.landmark,"
        " created_position = excluded.created_position",
        new if updated == len(changed) else [*new, *changed],
    )


def store_registers(connection: sqlite3.Connection, registers: RegisterChanges) -> None:
    """Store entries of registers by id, and delete those that are None; the caller holds the transaction."""
    for table, entries in registers.items():
        connection.executemany(
            f"DELETE FROM {table} WHERE id = ?",  # noqa: S608 - a register's name
            [(key,) for key, entry in entries.items() if entry is None],
        )
        connection.executemany(
            f"INSERT INTO {table} (id, body) VALUES (?, ?)"  # noqa: S608 - a register's name
            " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            [(key, as_text(entry)) for key, entry in entries.items() if entry is not None],
        )


def as_text(entity: Job | Model | RegisterEntry) -> str:
    return as_bytes(entity).decode()


def as_bytes(entity: Job | Model | RegisterEntry) -> bytes:
    return _ENCODER.encode(entity)


# These read texts written by `as_text`; they raise ValueError for a damaged one.
as_job = msgspec.json.Decoder(Job).decode
as_model = msgspec.json.Decoder(Model).decode

_ENCODER = msgspec.json.Encoder(order="sorted")
