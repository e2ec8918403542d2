"""Proof by recomputation: the chain, the gaps, and the stored projections against a fold of the log."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from events import rebuild, store
from events.basestate import is_base_state_whole, read_base_state
from events.canonical import GENESIS
from events.checkedfold import CheckedFold
from events.errors import LogUnavailable
from events.findings import Bad, Finding, Kind, Verification
from events.schema import check_readable, connect_read_only, refuse_foreign
from events.snapshotcheck import StoredSnapshots
from events.storedjobs import StoredJobs

__all__ = ["Finding", "Kind", "Verification", "verify", "verify_connection"]

_ARCHIVES_SINCE = 4
"""The schema from which on archives are told of."""


def verify(path: Path) -> Verification:
    """Verify the ledger at `path`, reading only; works beside a running server.

    All reads are one snapshot. Memory grows with the models and unended jobs, not with the log.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, the file cannot be read, or is no database.
    """
    try:
        with closing(connect_read_only(path)) as connection:
            refuse_foreign(connection)
            check_readable(connection)
            connection.text_factory = bytes
            connection.execute("BEGIN")
            return verify_connection(connection, path)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's messages quote what is damaged
        raise LogUnavailable(f"the ledger {path.name} cannot be read: {error}") from error


def verify_connection(connection: sqlite3.Connection, path: Path) -> Verification:
    """Verify as `verify` does, in the transaction of a connection that gives text as bytes.

    Args:
        connection: what it sees is verified.
        path: of the same file.
    """
    base = connection.execute("SELECT position, hash FROM base").fetchone()
    if base is None or not (isinstance(base[0], int) and isinstance(base[1], bytes)):
        return Verification(0, 0, GENESIS, Finding(0, "the base of the chain is missing", Kind.BASE))
    fold = CheckedFold(*base)
    finding, compared = None, True
    try:
        compared = rebuild.is_current(connection)
        fold = _fold_at_base(connection, *base, compared=compared)
        rows = connection.execute("SELECT position, body, hash FROM events ORDER BY position")
        finding = fold.follow(rows)
        if finding is None:
            _check_archives(connection, *base)
            _check_base_state(connection, base[0])
            if compared:
                _compare(connection, fold)
                _compare_snapshots(fold)
            _check_length(connection, path, fold.position)
    except Bad as bad:
        finding = bad.finding
    except sqlite3.DatabaseError as error:
        if store.kind_of(error) != sqlite3.SQLITE_CORRUPT:
            raise
        finding = Finding(fold.position + 1, f"the file is damaged: {error}", Kind.DAMAGED)
    return Verification(fold.position - base[0], fold.position, fold.hash, finding, compared)


def _fold_at_base(connection: sqlite3.Connection, base: int, digest: bytes, *, compared: bool) -> CheckedFold:
    """Return the fold in which the log begins; `compared` says whether with what is stored beside it."""
    try:
        state = read_base_state(connection, base)
        return CheckedFold(
            base,
            digest,
            models=state.models.values(),
            jobs=state.jobs.values(),
            stored=StoredJobs(connection) if compared else None,
            snapshots=StoredSnapshots(connection, base) if compared else None,
        )
    except sqlite3.Error:
        raise
    except Exception as error:  # noqa: BLE001 - whatever somebody made of it is a finding
        problem = f"the state that archived events came to is damaged: {error!r}"
        raise Bad(base, problem, Kind.BASE) from None


def _check_archives(connection: sqlite3.Connection, base: int, digest: bytes) -> None:
    """Everything before the base must be in archives that follow one another, from the first event on."""
    last, last_hash = 0, GENESIS
    if base or check_readable(connection) >= _ARCHIVES_SINCE:
        for first, *end in connection.execute(
            "SELECT first_position, last_position, hash FROM archives ORDER BY last_position"
        ):
            if first != last + 1:
                problem = f"the archives that are told of do not have position {last + 1} to go on with"
                raise Bad(base, problem, Kind.BASE)
            last, last_hash = end
            if not isinstance(last, int):
                raise Bad(base, "the archives that are told of end with no position", Kind.BASE)
    if (last, last_hash) != (base, digest):
        problem = f"the archives that are told of end with position {last}, the log begins after {base}"
        raise Bad(base, f"{problem}, or has another hash there", Kind.BASE)


def _check_base_state(connection: sqlite3.Connection, base: int) -> None:
    if not is_base_state_whole(connection, base):
        raise Bad(base, "what is stored of archived events is not what they came to", Kind.BASE)


def _check_length(connection: sqlite3.Connection, path: Path, position: int) -> None:
    """SQLite takes the missing end of the last page for zeros, and misses whole pages by itself."""
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    if path.stat().st_size % page_size:
        raise Bad(position, "the file is damaged: its end was cut off", Kind.DAMAGED)


def _compare(connection: sqlite3.Connection, fold: CheckedFold) -> None:
    """The stored projections must be what the log gives; a difference is named at the head."""
    position = connection.execute("SELECT position FROM projected").fetchone()
    if position != (fold.position,):
        problem = f"the stored projections are at position {position and position[0]}"
        raise Bad(fold.position, problem, Kind.PROJECTIONS)
    _compare_models(connection, fold)
    assert fold.stored is not None
    difference = fold.stored.difference(fold.entities.jobs.values())
    if difference is not None:
        raise Bad(fold.position, difference, Kind.PROJECTIONS)


def _compare_snapshots(fold: CheckedFold) -> None:
    """The stored snapshots must be what the log gives; a difference is named where it is."""
    assert fold.snapshots is not None
    difference = fold.snapshots.end(fold.position)
    if difference is not None:
        raise Bad(*difference, Kind.PROJECTIONS)


def _compare_models(connection: sqlite3.Connection, fold: CheckedFold) -> None:
    expected = {key.encode(): model for key, model in fold.entities.models.items()}
    for key, body, is_text in connection.execute(
        "SELECT id, body, typeof(id) = 'text' AND typeof(body) = 'text' FROM models"
    ):
        model = expected.pop(key, None)
        if model is None or not is_text or store.as_bytes(model) != body:
            shown = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
            raise Bad(
                fold.position, f"the stored models differ from the log's at {shown!r}", Kind.PROJECTIONS
            )
    if expected:
        problem = f"the stored models lack {next(iter(expected)).decode()!r}"
        raise Bad(fold.position, problem, Kind.PROJECTIONS)
