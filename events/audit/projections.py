"""The stored jobs and snapshots beside a fold of the log, as it comes past them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from typing import Protocol

from events.jobs import Job
from events.models import Model
from events.sqlite import snapshots
from events.sqlite.queries import as_bytes, as_model
from events.sqlite.schema import check_readable

_Row = tuple[object, object, object, int]
"""The position at which a job was created, its id and its body, as they are stored, and whether as text."""


class StoredJobs:
    """A walk through the stored jobs in the order of their creation.

    Jobs end nearly in that order, so what the walk has passed, and no job has ended for yet, is about as much
    as the jobs that have not ended.

    Args:
        connection: it gives text as bytes.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._walk = connection.execute(  # a BLOB looks like text here, and nobody would find a job by it
            "SELECT created_position, id, body, typeof(id) = 'text' AND typeof(body) = 'text'"
            " FROM jobs ORDER BY created_position"
        )
        self._reached = 0
        self._misplaced: _Row | None = None
        self._passed: dict[int, _Row] = {}
        self._missed: dict[str, Job] = {}

    def compare(self, job: Job) -> None:
        """Compare a job that nothing happens to any more with what is stored.

        A job whose id comes again, which no log of ours has, is stored as it was the last time: what does not
        agree counts only in the end.
        """
        self._walk_to(job.created_position)
        stored = self._passed.get(job.created_position)
        if stored is not None and stored[1:] == (job.id.encode(), as_bytes(job), True):
            del self._passed[job.created_position]
            self._missed.pop(job.id, None)
        else:
            self._missed[job.id] = job

    def difference(self, unended: Iterable[Job]) -> str | None:
        """Return in words what the stored jobs have otherwise than the fold, when that is at its end."""
        for job in unended:
            self.compare(job)
        for _, key, *_ in self._left():
            return f"the stored jobs differ from the log's at {_shown(key)!r}"
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
            else:  # no event is there, and of these rows there may be any number
                self._misplaced = self._misplaced or row

    def _left(self) -> Iterator[_Row]:
        """Yield what no job was found to be; it can be asked for once, and need not be read to its end."""
        misplaced = () if self._misplaced is None else (self._misplaced,)
        return chain(misplaced, self._passed.values(), self._walk)


def _shown(key: object) -> str:
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)


NEVER = 2**63
"""No position is there."""

_Copy = tuple[int, bytes, bytes]

_IS_COPY = "typeof(position) = 'integer' AND typeof(model_id) = 'text' AND typeof(body) = 'text'"
"""What the schema alone does not hold, since text in UTF-8 and a BLOB of the same bytes look alike here."""


class Folded(Protocol):
    """What a fold has come to: all models, and the jobs that have not ended."""

    @property
    def models(self) -> Mapping[str, Model]:
        """By id."""
        ...

    @property
    def jobs(self) -> Mapping[str, Job]:
        """By id."""
        ...


class StoredSnapshots:
    """A walk through the snapshots, in the order of their positions.

    A copy of a model is compared once, where it was written. Of the models that events were about since their
    latest copy, a snapshot that has no other has to have that one. So it takes a look for each copy and one
    for each event, at most, and memory for the names of the models since the last snapshot.

    Attributes:
        next: the position at which `compare` has something to do; it must not be passed over.
        touched: the models of the events since the last snapshot, where the fold puts them; null stands for
            all of them, as events of the server have it.
        difference: the first that was found, as a position and words; null if there was none.

    Args:
        connection: it gives text as bytes.
        base: where the log begins. The snapshot there has jobs that had ended, archives prove it, and its
            text may be that of an earlier release; but its copies have to be those of the models that they
            are said to be of, and there must not be any before.
    """

    def __init__(self, connection: sqlite3.Connection, base: int) -> None:
        self._connection = connection
        self._base = base
        self._copies: Iterable[tuple[int]] = iter(())
        self._positions: Iterable[tuple[int]] = iter(())
        self.touched = set[str | None]()
        self.difference: tuple[int, str] | None = None
        if check_readable(connection) >= snapshots.SINCE_SCHEMA:
            self._positions = connection.execute("SELECT position FROM snapshots ORDER BY position")
            # Only numbers are sorted: SQLite has room for 100,000 of them before it takes a temporary file.
            self._copies = connection.execute("SELECT rowid FROM model_snapshots ORDER BY position")
        self._copy, self._position = self._next_copy(), self._next_position()
        self.next = self._soonest()

    def compare(self, position: int, folded: Folded) -> None:
        """Compare what is stored at `next`, the position at which the fold is, with what that came to."""
        while self._copy is not None and self._copy[0] == position:
            self._compare_copy(folded, *self._copy)
            self._copy = self._next_copy()
        if self._position == position:
            self._compare_models(position, folded)
            self._compare_jobs(position, folded)
            self._position = self._next_position()
        self.next = self._soonest()

    def end(self, position: int) -> tuple[int, str] | None:
        """Return the difference, if any: there must not be snapshots of what is beyond the end of the log."""
        if self.next != NEVER:
            self._differ(self.next, f"is beyond position {position}, with which the log ends")
        elsewhere = self._jobs_elsewhere(position)
        if elsewhere is not None:
            self._differ(elsewhere, "has jobs where the log has no events")
        return self.difference

    def _compare_copy(self, folded: Folded, position: int, key: bytes, body: bytes) -> None:
        name = _text(key)
        model = folded.models.get(name)
        if position == self._base and model is not None:
            body = as_bytes(as_model(body))
        if model is None or as_bytes(model) != body:
            self._differ(position, f"differs from the log's at the model {name!r}")
        self.touched.discard(name)

    def _compare_models(self, position: int, folded: Folded) -> None:
        """Look at the models whose latest copy may be from before their last change."""
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

    def _compare_jobs(self, position: int, folded: Folded) -> None:
        stored = snapshots.jobs_of(self._connection, position)
        unended = sorted(folded.jobs.values(), key=lambda job: job.created_position)
        for job, body in zip_longest(unended, stored):
            if job is None or as_bytes(job) != body:
                name = "that is one more than there were" if job is None else repr(job.id)
                self._differ(position, f"differs from the log's at the job {name}")
                return

    def _differ(self, position: int, problem: str) -> None:
        if self.difference is None:
            self.difference = position, f"the stored snapshot {problem}"

    def _jobs_elsewhere(self, end: int) -> int | None:
        """Return a position outside the log at which jobs wait for a snapshot, or None."""
        if check_readable(self._connection) < snapshots.SINCE_SCHEMA:
            return None
        row = self._connection.execute(
            "SELECT position FROM job_snapshots WHERE position < ? OR position > ? LIMIT 1",
            (self._base, end),
        ).fetchone()
        return None if row is None else self._near(row[0])

    def _near(self, position: object) -> int:
        """Return the position, or the base instead of what is none."""
        return position if isinstance(position, int) else self._base

    def _next_copy(self) -> _Copy | None:
        """Return the next copy; those that no fold comes past are told, and passed over."""
        for number in self._copies:
            *copy, is_copy = self._connection.execute(
                f"SELECT position, model_id, body, {_IS_COPY} FROM model_snapshots WHERE rowid = ?",  # noqa: S608 - literals
                number,
            ).fetchone()
            position, key, body = copy
            if is_copy and position >= self._base:
                return position, key, body
            self._differ(self._near(position), f"has a copy of {_text(key)!r} that no snapshot can have")
        return None

    def _next_position(self) -> int:
        """Return the position of the next snapshot; that of the base is proved by others."""
        for (position,) in self._positions:
            if type(position) is int and position > self._base:
                return position
            if position != self._base:
                self._differ(
                    self._near(position), f"is before position {self._base}, after which the log begins"
                )
        return NEVER

    def _soonest(self) -> int:
        return min(self._position, NEVER if self._copy is None else self._copy[0])


def _text(key: object) -> str:
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)
