"""The state in which the log begins: nothing, or what archived events came to, as a snapshot at the base.

It is all that replay, rebuild and verification have of those events, so it is complete by itself: all models,
every job that had not ended, and the ended loads that models serve from, or are wanted back from.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3

from events.audit.signing import Base
from events.jobs import JobStatus
from events.sqlite.queries import as_job, as_model, as_text
from events.state import State

_ENDED = f"status NOT IN ('{JobStatus.PENDING}', '{JobStatus.IN_PROGRESS}')"


def read_base(connection: sqlite3.Connection) -> Base:
    """Return where the log begins; where that is missing, verification has said so."""
    row = connection.execute("SELECT position, hash FROM base").fetchone()
    return Base(0, bytes(32)) if row is None else Base(*row)


def hash_at(connection: sqlite3.Connection, base: Base, position: int) -> bytes:
    """Return the hash at a position that the log has, its base included."""
    if position == base.position:
        return base.hash
    (digest,) = connection.execute("SELECT hash FROM events WHERE position = ?", (position,)).fetchone()
    return bytes(digest)


def read_base_state(connection: sqlite3.Connection, base: int) -> State:
    """Return the live state at the base; it does not matter what the stored projections say.

    Raises:
        ValueError, msgspec.ValidationError: what is stored is damaged.
    """
    if base == 0:
        return State()
    models = connection.execute("SELECT body FROM model_snapshots WHERE position = ?", (base,))
    found = [as_model(body) for (body,) in models]
    jobs = connection.execute("SELECT body FROM job_snapshots WHERE position = ?", (base,))
    unended = [as_job(body) for (body,) in jobs]
    return State(base, "", {model.id: model for model in found}, {job.id: job for job in unended})


def base_state_digest(connection: sqlite3.Connection, base: int) -> bytes:
    """Return the SHA-256 of what is stored of the state at the base: each text, and a line's end."""
    found = connection.execute(
        "SELECT CAST(body AS BLOB) FROM (SELECT 1 AS kind, model_id AS key, body FROM model_snapshots"
        "  WHERE position = :base UNION ALL SELECT 2, created_position, body FROM job_snapshots"
        "  WHERE position = :base) ORDER BY kind, key",
        {"base": base},
    )
    digest = hashlib.sha256()
    for (body,) in found:
        digest.update((body or b"") + b"\n")
    return digest.digest()


def is_base_state_whole(connection: sqlite3.Connection, base: int) -> bool:
    """Whether what is stored of the state at the base is what archiving wrote."""
    if base == 0:
        return True
    row = connection.execute("SELECT state_sha256 FROM archives WHERE last_position = ?", (base,)).fetchone()
    return row is not None and bool(row[0] == base_state_digest(connection, base))


def write_base_state(connection: sqlite3.Connection, state: State) -> int:
    """Store the state at the new base, and forget what had ended by then; the caller holds the transaction.

    Returns:
        How many ended jobs were forgotten.
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
    """Return the ids of the loads that answer for models: their requests are answered with them."""
    servings = (each for model in state.models.values() for each in (model.serving, model.previous))
    return {serving.load_job_id for serving in servings if serving is not None}


def _detach_next_snapshot(connection: sqlite3.Connection, position: int) -> None:
    """Have the next snapshot after `position` say of all its models what it leaves to earlier ones."""
    connection.execute(
        "INSERT OR IGNORE INTO model_snapshots (model_id, position, body)"
        " SELECT model_id, next.position, body FROM model_snapshots AS copy,"
        "  (SELECT min(position) AS position FROM snapshots WHERE position > :base) AS next"
        " WHERE copy.position = (SELECT max(position) FROM model_snapshots AS latest"
        "  WHERE latest.model_id = copy.model_id AND latest.position <= next.position)",
        {"base": position},
    )
