"""Proof by recomputation: the chain, the gaps, and the stored projections against a fold of the log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from events import store
from events.bodies import from_body
from events.canonical import GENESIS, chain
from events.errors import LogUnavailable
from events.jobs import Job
from events.schema import check_readable, connect_read_only, refuse_foreign
from events.state import State


@dataclass(frozen=True, slots=True)
class Finding:
    """The first thing that is wrong: at which position, and what."""

    position: int
    problem: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found: how many events, the head as recomputed, and the first problem, if any."""

    events: int
    position: int
    hash: bytes
    finding: Finding | None

    @property
    def verified(self) -> bool:
        """Whether nothing is wrong."""
        return self.finding is None


class _Bad(Exception):
    def __init__(self, position: int, problem: str) -> None:
        super().__init__(problem)
        self.finding = Finding(position, problem)


class _Fold:
    """The projections as the log gives them, and the chain up to where it was read."""

    def __init__(self, position: int, digest: bytes) -> None:
        self.base = self.position = position
        self.hash = digest
        self.state = State(position)
        self.jobs: dict[str, Job] = {}

    def take(self, position: int, body: bytes, digest: bytes) -> None:
        if position != self.position + 1:
            raise _Bad(self.position + 1, f"missing: the next event is at position {position}")
        text = _text(position, body)
        if chain(self.hash, text) != digest:
            raise _Bad(position, "the hash is not that of the previous hash and the body")
        try:
            event = from_body(text)
            changed = self.state.apply(event).jobs
        except Exception as error:  # noqa: BLE001 - whatever a forged body does to us is a finding
            raise _Bad(position, f"the body is not an event: {error!r}") from None
        if event.position != position:
            raise _Bad(position, f"the body says position {event.position}")
        self.position, self.hash = position, digest
        self.jobs.update(changed)
        self.state.forget_ended(changed.values())


def verify(path: Path) -> Verification:
    """Verify the ledger at `path`, reading only; works beside a running server.

    All reads are one snapshot. Memory grows with the number of jobs, not of events.

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
            return _verify(connection)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's messages quote what is damaged
        raise LogUnavailable(f"the ledger {path.name} cannot be read: {error}") from error


def _verify(connection: sqlite3.Connection) -> Verification:
    base = connection.execute("SELECT position, hash FROM base").fetchone()
    if base is None or not (isinstance(base[0], int) and isinstance(base[1], bytes)):
        return Verification(0, 0, GENESIS, Finding(0, "the base of the chain is missing"))
    fold = _Fold(*base)
    finding = None
    try:
        for row in _rows(connection):
            fold.take(*row)
        _compare(connection, fold)
    except _Bad as bad:
        finding = bad.finding
    except sqlite3.DatabaseError as error:
        if store.kind_of(error) != sqlite3.SQLITE_CORRUPT:
            raise
        finding = Finding(fold.position + 1, f"the file is damaged: {error}")
    return Verification(fold.position - fold.base, fold.position, fold.hash, finding)


def _rows(connection: sqlite3.Connection) -> Iterator[tuple[int, bytes, bytes]]:
    yield from connection.execute("SELECT position, body, hash FROM events ORDER BY position")


def _text(position: int, body: bytes) -> str:
    try:
        return str(body, "utf-8")
    except (UnicodeDecodeError, TypeError):
        raise _Bad(position, "the body is not UTF-8") from None


def _compare(connection: sqlite3.Connection, fold: _Fold) -> None:
    """The stored projections must be what the log gives; a difference is named at the head."""
    position = connection.execute("SELECT position FROM projected").fetchone()
    if position != (fold.position,):
        raise _Bad(fold.position, f"the stored projections are at position {position and position[0]}")
    models = {key.encode(): (store.as_text(model).encode(), None) for key, model in fold.state.models.items()}
    jobs = {
        key.encode(): (store.as_text(job).encode(), job.created_position) for key, job in fold.jobs.items()
    }
    _compare_table("models", connection.execute("SELECT id, body, NULL FROM models"), models, fold.position)
    _compare_table(
        "jobs", connection.execute("SELECT id, body, created_position FROM jobs"), jobs, fold.position
    )


def _compare_table(
    name: str,
    rows: Iterable[tuple[bytes, bytes, int | None]],
    expected: MutableMapping[bytes, tuple[bytes, Any]],
    position: int,
) -> None:
    for key, *stored in rows:
        if expected.pop(key, None) != tuple(stored):
            shown = bytes(key).decode(errors="replace")
            raise _Bad(position, f"the stored {name} differ from the log's at {shown!r}")
    if expected:
        raise _Bad(position, f"the stored {name} lack {next(iter(expected)).decode()!r}")
