"""The stored projections made anew by folding the log, for folds that are not those they were made by."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from events import snapshots, store
from events.copies import lacks_wal, leave_alone_complete
from events.errors import LogUnavailable
from events.history import PAGE, base_state, fold, pages
from events.schema import check_readable, connect, connect_read_only

__all__ = ["FOLDS", "MAX_NAMED", "PAGE", "Rebuilt", "compare", "is_current", "rebuild", "rebuild_file"]

FOLDS = 2
"""The number of the folds: one more with each change after which the same events give other stored texts."""

MAX_NAMED = 100
"""Differences that are named: who has more has something else to do than to read them."""

_KEPT_SINCE = 2
"""The schema from which on the number is stored."""

_WALKS = {
    "models": "SELECT id, body FROM models ORDER BY 1",
    "jobs": "SELECT id, body FROM jobs ORDER BY 1",
}
"""What a rebuild may change: keys and bodies in the order of the keys."""

_Key = str | bytes


def is_current(connection: sqlite3.Connection) -> bool:
    """Whether the stored projections were made by this release's folds; what is damaged is not outdated."""
    if check_readable(connection) < _KEPT_SINCE:
        return False
    row: tuple[object] | None = connection.execute("SELECT folds FROM projected").fetchone()
    return row is None or bool(row[0] == FOLDS)


def rebuild(connection: sqlite3.Connection) -> None:
    """Fold the log from its base and store what comes of it, snapshots too, in one transaction.

    Memory grows with the models and the jobs that have not ended, not with the log.

    Raises:
        LogUnavailable: an event cannot be folded; nothing was changed.
        sqlite3.Error: it cannot be read or written; nothing was changed.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        state = base_state(connection)
        connection.execute("DELETE FROM jobs")
        connection.execute("DELETE FROM models")
        snapshots.forget(connection, state.position)
        connection.execute(
            "INSERT OR REPLACE INTO projected (one, position, folds) VALUES (1, ?, ?)",
            (state.position, FOLDS),
        )
        store.write_projections(connection, state.models.values(), state.jobs.values(), state.position)
        for page in pages(connection, state.position):
            models, jobs = fold(state, page)
            store.write_projections(connection, models.values(), jobs.values(), state.position)
            snapshots.write_if_due(connection, state.position, len(state.models) + state.backlog)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.rollback()
        raise


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was done: the position the projections had been at, and in which rows they differed, in words."""

    position: int | None
    differences: list[str]


def rebuild_file(path: Path) -> Rebuilt:
    """Make the stored projections of the ledger at `path` anew; the caller holds the lock of the data.

    A copy that lacks its write-ahead log goes on looking like one.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, it cannot be read or written, or folded; nothing was changed.
    """
    try:
        lacked_wal = lacks_wal(path)
        with closing(connect(path)) as connection:
            try:
                return _rebuilt(connection, path)
            finally:
                leave_alone_complete(connection, lacked_wal=lacked_wal)
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # SQLite's messages quote what is damaged
        raise LogUnavailable(f"the ledger {path.name} cannot be rebuilt: {error}") from error


def _rebuilt(connection: sqlite3.Connection, path: Path) -> Rebuilt:
    with closing(connect_read_only(path)) as before:
        before.execute("BEGIN")
        row = before.execute("SELECT position FROM projected").fetchone()  # the snapshot begins here
        rebuild(connection)
        return Rebuilt(row and row[0], compare(before, connection))


def compare(before: sqlite3.Connection, after: sqlite3.Connection) -> list[str]:
    """Return in which rows the stored projections differ, at most `MAX_NAMED`, each in words.

    Args:
        before: in a read transaction that began before they were made anew.
        after: where they are as they are now.
    """
    found = (
        f"the stored {name} {what} {key!r}"
        for name, walk in _WALKS.items()
        for what, key in _differences(before, after, walk)
    )
    return list(islice(found, MAX_NAMED))


def _differences(
    before: sqlite3.Connection, after: sqlite3.Connection, walk: str
) -> Iterator[tuple[str, _Key]]:
    """Walk both in the order of their keys; neither is held in memory."""
    old, new = before.execute(walk), after.execute(walk)
    one, other = old.fetchone(), new.fetchone()
    while one is not None or other is not None:
        if other is None or (one is not None and _place(one[0]) < _place(other[0])):
            yield "had, and the log does not give,", one[0]
            one = old.fetchone()
        elif one is None or _place(other[0]) < _place(one[0]):
            yield "lacked", other[0]
            other = new.fetchone()
        else:
            if one[1] != other[1]:
                yield "differed at", one[0]
            one, other = old.fetchone(), new.fetchone()


def _place(key: _Key) -> tuple[bool, _Key]:
    """Return what sorts keys as SQLite does, whatever somebody stored: texts, then bytes."""
    return isinstance(key, bytes), key
