"""Comparison of stored projections and snapshots with a fold of the log, as the fold reaches them.

All connections return text as bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest

from events.jobs import Job
from events.models import Model
from events.nodes import Node
from events.sqlite import snapshots
from events.sqlite.queries import as_bytes, as_model
from events.state import Entities
from events.tokens import Token

NEVER = 2**63
"""No position is there."""

_IS_COPY = "typeof(position) = 'integer' AND typeof(model_id) = 'text' AND typeof(body) = 'text'"
"""What the schema does not enforce: text in UTF-8 and a BLOB of the same bytes look alike to the walk."""

_Row = tuple[object, object, object, int]
"""A stored job: the position at which it was created, its id, its body, and whether these two are text."""

_Copy = tuple[int, bytes, bytes]
"""A copy of a model in a snapshot: its position, the model's id, and the body."""


class StoredProjections:
    """The stored projections and snapshots of a ledger whose base is at the position `base`."""

    def __init__(self, connection: sqlite3.Connection, base: int) -> None:
        self._connection = connection
        self.jobs = StoredJobs(connection)
        self.snapshots = StoredSnapshots(connection, base)

    def find_difference(self, position: int, folded: Entities) -> tuple[int, str] | None:
        row = self._connection.execute("SELECT position FROM projected").fetchone()
        if row != (position,):
            return position, f"the stored projections are at position {row and row[0]}"
        problem = (
            self._compare_table("models", folded.models)
            or self.jobs.difference(folded.jobs.values())
            or self._compare_table("tokens", folded.tokens)
            or self._compare_table("nodes", folded.nodes)
        )
        return (position, problem) if problem else self.snapshots.end(position)

    def _compare_table(
        self, table: str, folded: Mapping[str, Model] | Mapping[str, Token] | Mapping[str, Node]
    ) -> str | None:
        expected = {key.encode(): entity for key, entity in folded.items()}
        for key, body, is_text in self._connection.execute(
            f"SELECT id, body, typeof(id) = 'text' AND typeof(body) = 'text' FROM {table}"  # noqa: S608 - literals above
        ):
            entity = expected.pop(key, None)
            if entity is None or not is_text or as_bytes(entity) != body:
                return f"the stored {table} differ from the log's at {_format_key(key)!r}"
        for key in expected:
            return f"the stored {table} lack {key.decode()!r}"
        return None


class StoredJobs:
    """Walks through the stored jobs in the order of their creation.

    Jobs end nearly in that order. So the rows that the walk has passed, and that no ended job has matched
    yet, are about as many as the unended jobs.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._walk = connection.execute(  # a BLOB looks like text here, but no look-up would find it
            "SELECT created_position, id, body, typeof(id) = 'text' AND typeof(body) = 'text'"
            " FROM jobs ORDER BY created_position"
        )
        self._reached = 0
        self._misplaced: _Row | None = None
        self._passed: dict[int, _Row] = {}
        self._missed: dict[str, Job] = {}

    def compare(self, job: Job) -> None:
        """Compare an ended job with its row.

        A repeated job id, which no log of ours has, is stored as it was last: so a difference counts only at
        the end of the fold.
        """
        self._walk_to(job.created_position)
        stored = self._passed.get(job.created_position)
        if stored is not None and stored[1:] == (job.id.encode(), as_bytes(job), True):
            del self._passed[job.created_position]
            self._missed.pop(job.id, None)
        else:
            self._missed[job.id] = job

    def difference(self, unended: Iterable[Job]) -> str | None:
        for job in unended:
            self.compare(job)
        for _, key, *_ in self._take_unmatched():
            return f"the stored jobs differ from the log's at {_format_key(key)!r}"
        for key in self._missed:
            return f"the stored jobs lack {key!r}"
        return None

    def _walk_to(self, position: int) -> None:
        while self._reached < position:
            row: _Row | None = self._walk.fetchone()
            if row is None:
                return
            if isinstance(row[0], int) and row[0] > 0:
                self._passed[row[0]] = row
                self._reached = row[0]
            else:  # no event is there, and there may be any number of such rows
                self._misplaced = self._misplaced or row

    def _take_unmatched(self) -> Iterator[_Row]:
        """Yield the rows that no job matched; call it once."""
        misplaced = () if self._misplaced is None else (self._misplaced,)
        return chain(misplaced, self._passed.values(), self._walk)


class StoredSnapshots:
    """Walks through the snapshots in the order of their positions.

    Each copy of a model is compared once, at its position. A model with events since its latest copy must
    have a newer copy in the next snapshot if it changed. This costs at most one query for each copy and one
    for each event, and the memory of the ids of models with events since the last snapshot.

    Archives prove the snapshot at the base, which also has ended jobs and may have the text of an earlier
    release: here its copies only have to be of the models that they name. No snapshot may be before it.

    Attributes:
        next: the next position at which `compare` has to be called.
        touched: the models of the events since the last snapshot, which the fold adds; None means all of
            them, as in events of the server.
        difference: the first difference, as a position and words; None if there is none.
    """

    def __init__(self, connection: sqlite3.Connection, base: int) -> None:
        self._connection = connection
        self._base = base
        self.touched = set[str | None]()
        self.difference: tuple[int, str] | None = None
        self._positions = connection.execute("SELECT position FROM snapshots ORDER BY position")
        # Only numbers are sorted: SQLite has room for 100,000 of them before it takes a temporary file.
        self._copies = connection.execute("SELECT rowid FROM model_snapshots ORDER BY position")
        self._copy, self._position = self._next_copy(), self._next_position()
        self.next = self._soonest()

    def compare(self, position: int, folded: Entities) -> None:
        while self._copy is not None and self._copy[0] == position:
            self._compare_copy(folded, *self._copy)
            self._copy = self._next_copy()
        if self._position == position:
            self._compare_models(position, folded)
            self._compare_jobs(position, folded)
            self._position = self._next_position()
        self.next = self._soonest()

    def end(self, position: int) -> tuple[int, str] | None:
        """Return the first difference at the end of the fold; no snapshot may be beyond the log's end."""
        if self.next != NEVER:
            self._differ(self.next, f"is beyond position {position}, the end of the log")
        elsewhere = self._jobs_elsewhere(position)
        if elsewhere is not None:
            self._differ(elsewhere, "has jobs at a position outside the log")
        return self.difference

    def _compare_copy(self, folded: Entities, position: int, key: bytes, body: bytes) -> None:
        name = _format_key(key)
        model = folded.models.get(name)
        if position == self._base and model is not None:
            body = as_bytes(as_model(body))
        if model is None or as_bytes(model) != body:
            self._differ(position, f"differs from the log's at the model {name!r}")
        self.touched.discard(name)

    def _compare_models(self, position: int, folded: Entities) -> None:
        """Compare the models whose latest copy may be older than their last change."""
        for name in folded.models if None in self.touched else self.touched:
            model = folded.models.get(name) if name is not None else None
            row = self._connection.execute(
                "SELECT body FROM model_snapshots WHERE model_id = ? AND position <= ?"
                " ORDER BY position DESC LIMIT 1",
                (name, position),
            ).fetchone()
            if (row and row[0]) != (model and as_bytes(model)):
                self._differ(position, f"lacks what the log gives of the model {name!r}")
        self.touched.clear()

    def _compare_jobs(self, position: int, folded: Entities) -> None:
        stored = snapshots.jobs_of(self._connection, position)
        unended = sorted(folded.jobs.values(), key=lambda job: job.created_position)
        for job, row in zip_longest(unended, stored):
            if job is None or (as_bytes(job),) != row:
                surplus = "has a job too many"
                self._differ(position, surplus if job is None else f"differs from the log's at {job.id!r}")
                return

    def _differ(self, position: int, problem: str) -> None:
        if self.difference is None:
            self.difference = position, f"the stored snapshot {problem}"

    def _jobs_elsewhere(self, end: int) -> int | None:
        """Return a position outside the log at which snapshot jobs are stored, or None."""
        row = self._connection.execute(
            "SELECT position FROM job_snapshots WHERE position < ? OR position > ? LIMIT 1",
            (self._base, end),
        ).fetchone()
        return None if row is None else self._near(row[0])

    def _near(self, position: object) -> int:
        return position if isinstance(position, int) else self._base

    def _next_copy(self) -> _Copy | None:
        """Return the next copy; a copy that no fold can reach is a difference, and skipped."""
        for number in self._copies:
            *copy, is_copy = self._connection.execute(
                f"SELECT position, model_id, body, {_IS_COPY} FROM model_snapshots WHERE rowid = ?",  # noqa: S608 - literals
                number,
            ).fetchone()
            position, key, body = copy
            if is_copy and position >= self._base:
                return position, key, body
            self._differ(
                self._near(position), f"has a copy of {_format_key(key)!r} that no snapshot can have"
            )
        return None

    def _next_position(self) -> int:
        for (position,) in self._positions:
            if type(position) is int and position > self._base:
                return position
            if position != self._base:
                self._differ(self._near(position), f"is before position {self._base}, the base of the log")
        return NEVER

    def _soonest(self) -> int:
        return min(self._position, NEVER if self._copy is None else self._copy[0])


def _format_key(key: object) -> str:
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)
