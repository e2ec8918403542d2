"""Comparison of stored projections and history with a fold of the log, during the fold.

All connections return text as bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain

from events.history import encode_row, find_landmark, has_row, make_row
from events.jobs import Job
from events.models import Model
from events.presence import Transition
from events.registers import RegisterEntry
from events.sqlite.history import SELECT_TRANSITIONS
from events.sqlite.queries import as_bytes
from events.state import Entities
from events.types import Event
from features.folds import describe_server

_Row = tuple[object, object, object, object, int]
"""A stored job: its creation's position, its id, body and landmark, and whether id and body are text."""


class StoredProjections:
    """The stored projections and history of a ledger."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.jobs = StoredJobs(connection)
        self.history = StoredHistory(connection)

    def find_difference(self, position: int, folded: Entities) -> tuple[int, str] | None:
        row = self._connection.execute("SELECT position FROM projected").fetchone()
        if row != (position,):
            return position, f"the stored projections are at position {row and row[0]}"
        problem = self._compare_table("models", folded.models) or self.jobs.difference(folded.jobs.values())
        for table, entries in folded.registers.items():
            problem = problem or self._compare_table(table, entries)
        return (position, problem) if problem else self.history.find_surplus(position)

    def _compare_table(self, table: str, folded: Mapping[str, Model | RegisterEntry]) -> str | None:
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

    Jobs end nearly in that order. So about as many rows are passed and unmatched as there are unended jobs.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._walk = connection.execute(  # a BLOB looks like text here, but look-ups would not find it
            "SELECT created_position, id, body, landmark, typeof(id) = 'text' AND typeof(body) = 'text'"
            " FROM jobs ORDER BY created_position"
        )
        self._reached = 0
        self._misplaced: _Row | None = None
        self._passed: dict[int, _Row] = {}
        self._missed: dict[str, Job] = {}

    def compare(self, job: Job) -> None:
        """Compare an ended job with its row.

        The stored row of a repeated job id, which only a forged log has, is that of the last job: so a
        difference counts only at the end of the fold.
        """
        self._walk_to(job.created_position)
        stored = self._passed.get(job.created_position)
        if stored is not None and stored[1:] == (job.id.encode(), as_bytes(job), find_landmark(job), True):
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
            else:  # there is no event, and possibly any number of such rows
                self._misplaced = self._misplaced or row

    def _take_unmatched(self) -> Iterator[_Row]:
        """Yield the rows that no job matched; call it once."""
        misplaced = () if self._misplaced is None else (self._misplaced,)
        return chain(misplaced, self._passed.values(), self._walk)


class StoredHistory:
    """Walks through the rows of the history in the order of their positions, beside a fold of the log.

    Attributes:
        difference: the first difference, as a position and words, or None.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._rows = connection.execute(
            "SELECT position, model_id, is_common, body FROM model_history ORDER BY position, model_id"
        )
        self._transitions = connection.execute(f"{SELECT_TRANSITIONS} ORDER BY position, server")
        self.difference: tuple[int, str] | None = None

    def compare(self, event: Event, models: Collection[Model], transitions: Iterable[Transition]) -> None:
        """Compare the rows at an event with the models that it changed, and with its transitions."""
        for model in models if len(models) == 1 else _by_id(models):
            if has_row(event, model):
                self._compare_model(event.position, model, is_common=model.id != event.model_id)
        self._compare_transitions(event.position, transitions)

    def find_surplus(self, position: int) -> tuple[int, str] | None:
        """Return the first difference at the end of the fold: no row may be left."""
        for walk, what in ((self._rows, "history of models"), (self._transitions, "presence")):
            row = walk.fetchone()
            if row is not None and self.difference is None:
                self.difference = position, f"the stored {what} has a row that the log does not give"
        return self.difference

    def _compare_model(self, position: int, model: Model, *, is_common: bool) -> None:
        expected = position, model.id.encode(), is_common, encode_row(make_row(model))
        if next(self._rows, None) != expected and self.difference is None:
            self.difference = position, f"the stored history of the model {model.id!r} differs from the log's"

    def _compare_transitions(self, position: int, transitions: Iterable[Transition]) -> None:
        for each in sorted(transitions, key=lambda each: each.server.encode()) if transitions else ():
            _, *texts = each
            expected = position, *(None if text is None else text.encode() for text in texts)
            if next(self._transitions, None) != expected and self.difference is None:
                whom = describe_server(each.server) if each.server else "the server"
                self.difference = position, f"the stored presence of {whom} differs from the log's"


def _by_id(models: Iterable[Model]) -> list[Model]:
    return sorted(models, key=lambda model: model.id.encode())


def _format_key(key: object) -> str:
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)
