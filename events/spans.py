"""The log in spans, each checked by itself, from a snapshot that is believed until the one before proved it.

That adds up: the first span begins at the base. If it proves what the second one believed, the second has
proved what the third one believed, and so on to the head. Nothing hangs on the snapshots, which are caches:
where one is not what the log gives, or anything else is not as it has to be, the log is checked in one span.

Each span may be read in a read transaction of its own: what a server appends changes nothing before it, and
nothing that is stored of jobs that have ended.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from msgspec import Struct

from events import snapshots
from events.basestate import read_base_state
from events.bodies import from_body
from events.checkedfold import CheckedFold
from events.findings import Bad, Kind
from events.jobs import Job
from events.snapshotcheck import StoredSnapshots
from events.store import as_job, as_model
from events.storedjobs import COLUMNS, StoredJobs

Rows = Iterable[tuple[int, bytes, bytes]]


class Span(Struct, frozen=True):
    """Positions `after` + 1 to `until`, or to the head.

    Attributes:
        after: the position before its first one: the base of the log, or where a snapshot is.
        hash: of the event at `after`.
        until: its last one; None is the head, whatever that is.
        is_first: whether it begins at the base.
    """

    after: int
    hash: bytes
    until: int | None = None
    is_first: bool = True

    def rows(self, connection: sqlite3.Connection) -> Rows:
        """Return the rows of the log in this span, and what is there that should not be."""
        where = self._where("position")
        return connection.execute(f"SELECT position, body, hash FROM events{where} ORDER BY position")  # noqa: S608 - numbers

    def begin(self, connection: sqlite3.Connection, *, compared: bool = True) -> CheckedFold:
        """Return the fold where the span begins.

        Args:
            connection: it gives text as bytes, and is in a read transaction.
            compared: whether jobs are compared with what is stored, as they end.

        Raises:
            Bad: what is stored of the state there is damaged.
            sqlite3.Error: it cannot be read.
        """
        try:
            return (
                self._begin_at_base(connection, compared=compared)
                if self.is_first
                else self._begin_at_snapshot(connection)
            )
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 - whatever somebody made of it is a finding
            what = "archived events" if self.is_first else "earlier events"
            problem = f"the state that {what} came to is damaged: {error!r}"
            raise Bad(self.after, problem, Kind.BASE) from None

    def _begin_at_base(self, connection: sqlite3.Connection, *, compared: bool) -> CheckedFold:
        state = read_base_state(connection, self.after)
        return CheckedFold(
            self.after,
            self.hash,
            models=state.models.values(),
            jobs=state.jobs.values(),
            stored=self._stored(connection, ()) if compared else None,
            snapshots=StoredSnapshots(connection, self.after, self.until) if compared else None,
        )

    def _begin_at_snapshot(self, connection: sqlite3.Connection) -> CheckedFold:
        (body,) = connection.execute("SELECT body FROM events WHERE position = ?", (self.after,)).fetchone()
        jobs = [as_job(each) for each in snapshots.jobs_of(connection, self.after)]
        return CheckedFold(
            self.after,
            self.hash,
            recorded_at=from_body(body).recorded_at,
            models=map(as_model, snapshots.models_of(connection, self.after)),
            jobs=jobs,
            stored=self._stored(connection, jobs),
            snapshots=StoredSnapshots(connection, self.after, self.until, at_base=False),
        )

    def _stored(self, connection: sqlite3.Connection, unended: Iterable[Job]) -> SpanJobs:
        return SpanJobs(connection, self._where("created_position"), unended)

    def _where(self, column: str) -> str:
        """Return the condition for what is in this span; of all spans together, it leaves out only nulls."""
        conditions = [] if self.is_first else [f"{column} > {self.after:d}"]
        if self.until is not None:
            conditions.append(f"{column} <= {self.until:d}")
        return f" WHERE {' AND '.join(conditions)}" if conditions else ""


class SpanJobs(StoredJobs):
    """The stored jobs that were created in a span, and those that had not ended where it begins."""

    def __init__(self, connection: sqlite3.Connection, where: str, unended: Iterable[Job]) -> None:
        super().__init__(connection)
        found = f"SELECT {COLUMNS} FROM jobs"  # noqa: S608 - literals
        self._walk = connection.execute(f"{found}{where} ORDER BY created_position")
        for job in unended:
            row = connection.execute(
                f"{found} WHERE created_position = ?", (job.created_position,)
            ).fetchone()
            if row is not None:
                self._passed[job.created_position] = row

    def leaves(self, unended: Iterable[Job]) -> bool:
        """Whether those that were not compared are these, whatever is stored of them; it is asked once."""
        expected = {(job.created_position, job.id.encode()) for job in unended}
        left = [(position, key) for position, key, *_ in islice(self._left(), len(expected) + 1)]
        return not self._missed and len(left) == len(expected) and set(left) == expected


class Proof(NamedTuple):
    """That a span is as it has to be: the marks of what it began and ended with."""

    began: str
    ended: str


def prove(connection: sqlite3.Connection, span: Span) -> Proof | None:
    """Check a span that is not the last one, and the jobs that ended in it.

    Returns:
        None where something is not as it has to be.

    Raises:
        Bad: likewise.
        sqlite3.Error: it cannot be read.
    """
    fold = span.begin(connection)
    began = fold.mark()
    fold.follow(span.rows(connection))
    stored = fold.stored
    left = isinstance(stored, SpanJobs) and stored.leaves(fold.entities.jobs.values())
    same = fold.snapshots is None or fold.snapshots.end(fold.position) is None
    return Proof(began, fold.mark()) if left and same and fold.position == span.until else None


def reach(mark: str, proofs: Iterable[Proof | None], believed: str) -> bool:
    """Whether one proof leads to the next, from a mark to the one that the last span believed."""
    for proof in proofs:
        if proof is None or proof.began != mark:
            return False
        mark = proof.ended
    return mark == believed


def spans(connection: sqlite3.Connection, base: int, digest: bytes, most: int) -> list[Span]:
    """Return the log in at most so many spans, as equal as its snapshots allow.

    Raises:
        Exception: something is damaged; what, is found by whoever checks the log in one span.
    """
    (head,) = connection.execute("SELECT max(position) FROM events").fetchone()
    begins = [(base, digest)]
    for number in range(1, most):
        position = snapshots.latest(connection, base + (head - base) * number // most)
        if position is not None and position > begins[-1][0]:
            (at,) = connection.execute("SELECT hash FROM events WHERE position = ?", (position,)).fetchone()
            begins.append((position, at))
    ends = [position for position, _ in begins[1:]]
    return [
        Span(position, at, until, position == base)
        for (position, at), until in zip(begins, [*ends, None], strict=True)
    ]


def has_nulls(connection: sqlite3.Connection) -> bool:
    """Whether there are rows without a position, which somebody else's tables may have: no span has them."""
    return any(
        connection.execute(f"SELECT 1 FROM {table} WHERE {column} IS NULL LIMIT 1").fetchone() is not None  # noqa: S608 - literals
        for table, column in (("events", "position"), ("jobs", "created_position"))
    )
