"""Snapshots: the live state at some positions, for time travel, and the state at the base.

A snapshot is a cache, copied within SQLite from the stored projections right after their transaction
(`docs/decisions/0019`). Only the snapshot at the base is more: it replaces the archived events. So it is
complete: all models, all unended jobs, the ended loads that models serve from or return to, and all tokens
and nodes, which other snapshots do not have: no past state is asked for them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator

from events.jobs import JobStatus
from events.sqlite.queries import LAST, as_text, make_state, transaction
from events.state import State

_log = logging.getLogger(__name__)

EVERY = 4_000
"""Events between two snapshots at least: their fold takes 0.1 s, and the copies are a tenth of the log."""

_UNENDED = f"status IN ('{JobStatus.PENDING}', '{JobStatus.IN_PROGRESS}')"
_ENDED = f"NOT ({_UNENDED})"


def try_if_due(connection: sqlite3.Connection, position: int) -> int:
    """Write a snapshot if it is due, in a transaction of its own; log a failure.

    A failed snapshot must not fail the events: after an error of damage, SQLite refuses the rest of the
    transaction, with or without a savepoint (measured).

    Returns:
        The position from which on to try again.
    """
    try:
        with transaction(connection):
            return write_if_due(connection, position)
    except sqlite3.Error as error:
        _log.warning("no snapshot at position %d, so time travel is slower: %s", position, error)
        return position + EVERY


def write_if_due(connection: sqlite3.Connection, position: int) -> int:
    """Write a snapshot if it is due; the caller holds the transaction. Return where the next one is due.

    A snapshot reads each entity once: as many events between two mean at most one read for each event.
    """
    (entities,) = connection.execute(
        f"SELECT (SELECT count(*) FROM models) + (SELECT count(*) FROM jobs WHERE {_UNENDED})"  # noqa: S608 - literals
    ).fetchone()
    apart = max(EVERY, int(entities))
    due = (latest(connection, LAST) or 0) + apart
    if position < due:
        return due
    write(connection, position)
    return position + apart


def write(connection: sqlite3.Connection, position: int) -> None:
    """Copy the stored projections, which are at `position`; the caller holds the transaction."""
    connection.execute(
        "INSERT INTO model_snapshots (model_id, position, body) SELECT id, ?, body FROM models"
        " WHERE body IS NOT (SELECT earlier.body FROM model_snapshots AS earlier"
        "  WHERE earlier.model_id = models.id ORDER BY earlier.position DESC LIMIT 1)",
        (position,),
    )
    connection.execute(
        "INSERT INTO job_snapshots (position, created_position, body)"
        " SELECT ?, created_position, body FROM jobs WHERE status IN ('pending', 'in_progress')",
        (position,),
    )
    connection.execute("INSERT INTO snapshots (position) VALUES (?)", (position,))


def forget(connection: sqlite3.Connection, base: int) -> None:
    """Delete all snapshots except that at the base, which replaces archived events."""
    for table in ("snapshots", "model_snapshots", "job_snapshots"):
        connection.execute(f"DELETE FROM {table} WHERE position IS NOT nullif(?, 0)", (base,))  # noqa: S608 - literals above


def latest(connection: sqlite3.Connection, position: int) -> int | None:
    (found,) = connection.execute(
        "SELECT max(position) FROM snapshots WHERE position <= ?", (position,)
    ).fetchone()
    return None if found is None else int(found)


def models_of(connection: sqlite3.Connection, position: int) -> Iterator[tuple[str]]:
    """Yield the models of the snapshot at `position`, as they are stored."""
    found = connection.execute(
        "SELECT (SELECT copy.body FROM model_snapshots AS copy WHERE copy.model_id = models.id"
        "  AND copy.position <= ? ORDER BY copy.position DESC LIMIT 1) FROM models",
        (position,),
    )
    return (row for row in found if row != (None,))


def jobs_of(connection: sqlite3.Connection, position: int) -> Iterator[tuple[str]]:
    """Yield the unended jobs of the snapshot at `position`, oldest first, as they are stored."""
    return connection.execute(
        "SELECT body FROM job_snapshots WHERE position = ? ORDER BY created_position", (position,)
    )


def read_base_state(connection: sqlite3.Connection, base: int) -> State:
    """Return the live state at the base, from its snapshot alone.

    Raises:
        ValueError: the snapshot is damaged.
    """
    if base == 0:
        return State()
    models = connection.execute("SELECT body FROM model_snapshots WHERE position = ?", (base,))
    jobs = connection.execute("SELECT body FROM job_snapshots WHERE position = ?", (base,))
    tokens = connection.execute("SELECT body FROM base_tokens")
    nodes = connection.execute("SELECT body FROM base_nodes")
    return make_state(base, "", models, jobs, tokens=tokens, nodes=nodes)


def base_state_digest(connection: sqlite3.Connection, base: int) -> bytes:
    """Return the SHA-256 of the stored state at the base: each body, followed by a line feed."""
    found = connection.execute(
        "SELECT CAST(body AS BLOB) FROM (SELECT 1 AS kind, model_id AS key, body FROM model_snapshots"
        "  WHERE position = :base UNION ALL SELECT 2, created_position, body FROM job_snapshots"
        "  WHERE position = :base UNION ALL SELECT 3, id, body FROM base_tokens"
        "  UNION ALL SELECT 4, id, body FROM base_nodes) ORDER BY kind, key",
        {"base": base},
    )
    digest = hashlib.sha256()
    for (body,) in found:
        digest.update((body or b"") + b"\n")
    return digest.digest()


def is_base_state_unchanged(connection: sqlite3.Connection, base: int) -> bool:
    """Whether the stored state at the base is what archiving wrote."""
    if base == 0:
        return True
    row = connection.execute("SELECT state_sha256 FROM archives WHERE last_position = ?", (base,)).fetchone()
    return row is not None and bool(row[0] == base_state_digest(connection, base))


def write_base_state(connection: sqlite3.Connection, state: State) -> int:
    """Store the state at the new base, and delete the jobs that had ended; the caller holds the transaction.

    Returns:
        The number of deleted jobs.
    """
    _detach_next_snapshot(connection, state.position)
    for table in ("snapshots", "model_snapshots", "job_snapshots"):
        connection.execute(f"DELETE FROM {table} WHERE position <= ?", (state.position,))  # noqa: S608 - literals
    connection.execute("INSERT INTO snapshots (position) VALUES (?)", (state.position,))
    connection.executemany(
        "INSERT INTO model_snapshots (model_id, position, body) VALUES (?, ?, ?)",
        [(model.id, state.position, as_text(model)) for model in state.models.values()],
    )
    connection.executemany(
        "INSERT INTO job_snapshots (position, created_position, body) VALUES (?, ?, ?)",
        [
            (state.position, job.created_position, as_text(job))
            for job in state.jobs.values()
            if not job.ended
        ],
    )
    connection.execute("DELETE FROM base_tokens")
    connection.executemany(
        "INSERT INTO base_tokens (id, body) VALUES (?, ?)",
        [(token.id, as_text(token)) for token in state.tokens.values()],
    )
    connection.execute("DELETE FROM base_nodes")
    connection.executemany(
        "INSERT INTO base_nodes (id, body) VALUES (?, ?)",
        [(node.id, as_text(node)) for node in state.nodes.values()],
    )
    behind = json.dumps(sorted(jobs_behind(state)))
    connection.execute(
        "INSERT INTO job_snapshots (position, created_position, body)"  # noqa: S608 - literals
        f" SELECT ?, created_position, body FROM jobs WHERE {_ENDED}"
        " AND id IN (SELECT value FROM json_each(?))",
        (state.position, behind),
    )
    return connection.execute(
        f"DELETE FROM jobs WHERE {_ENDED} AND json_extract(body, '$.position') <= ?"  # noqa: S608 - literals
        " AND id NOT IN (SELECT value FROM json_each(?))",
        (state.position, behind),
    ).rowcount


def jobs_behind(state: State) -> set[str]:
    """Return the ids of the loads that models serve from or return to; repeated requests get these jobs."""
    servings = (each for model in state.models.values() for each in (model.serving, model.previous))
    return {serving.load_job_id for serving in servings if serving is not None}


def _detach_next_snapshot(connection: sqlite3.Connection, position: int) -> None:
    """Copy into the next snapshot after `position` the models that it leaves to earlier snapshots."""
    connection.execute(
        "INSERT OR IGNORE INTO model_snapshots (model_id, position, body)"
        " SELECT model_id, next.position, body FROM model_snapshots AS copy,"
        "  (SELECT min(position) AS position FROM snapshots WHERE position > :base) AS next"
        " WHERE copy.position = (SELECT max(position) FROM model_snapshots AS latest"
        "  WHERE latest.model_id = copy.model_id AND latest.position <= next.position)",
        {"base": position},
    )
