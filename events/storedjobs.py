"""The stored jobs beside those that a fold gives, one by one as these end: none of them has to be kept."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from itertools import chain

from events.jobs import Job
from events.store import as_bytes

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
