"""The live state at any position or time of the log, folded from the base or the last snapshot before it."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TypeVar

from events.clock import format_timestamp
from events.codec import decode_event
from events.errors import Archived, LedgerProblem, LogUnavailable
from events.jobs import Job, JobStatus, evolve_job
from events.models import Model
from events.sqlite import queries, snapshots
from events.sqlite.base import read_base, read_base_state
from events.sqlite.queries import as_job, as_model
from events.sqlite.schema import CACHE, check_readable, opened_to_read
from events.state import Changes, State
from events.types import Event, ServerStarted

_log = logging.getLogger(__name__)

PAGE = 500
"""Events folded at once: what is held in memory beside the live state."""

_DAMAGE = {0, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""Kinds of errors that are of what is stored; 0 is text that is not UTF-8."""

_passed_over = set[tuple[str, int]]()
"""The damaged snapshots that were told of: by file, and at most one for each there is."""

_UNENDED = (JobStatus.PENDING, JobStatus.IN_PROGRESS)


def state_at(connection: sqlite3.Connection, position: int, *, from_base: bool = False) -> State:
    """Return the live state after the event at `position`, which is in the log or its base.

    Args:
        connection: where a read transaction keeps several of these calls at one head.
        position: between the base and the head.
        from_base: whether to fold the whole log up to there, from nothing else.

    Raises:
        LogUnavailable: an event, or what stands for archived ones, is damaged.
    """
    state = base_state(connection) if from_base else _nearest(connection, position)
    for page in pages(connection, state.position, position):
        fold(state, page)
    return state


def base_state(connection: sqlite3.Connection) -> State:
    """Return the live state in which the log begins: nothing, or what archived events came to.

    Raises:
        LogUnavailable: the snapshot that stands for them is missing or damaged.
    """
    base = base_of(connection)
    if base and snapshots.latest(connection, base) != base:
        raise LogUnavailable(f"what stands for the archived events, the snapshot at {base}, is missing")
    try:
        return read_base_state(connection, base)
    except ValueError as error:
        raise LogUnavailable(
            f"what stands for the archived events up to {base} is damaged: {error}; "
            "`loadledger replay --archive` folds their archives instead"
        ) from error


def base_of(connection: sqlite3.Connection) -> int:
    """Return the position of the last event before those of the log: 0, or that of the last archived one."""
    return read_base(connection).position


def pages(
    connection: sqlite3.Connection, after: int, until: int | None = None
) -> Iterator[list[tuple[int, str]]]:
    """Yield the positions and bodies of the events above `after`, up to `until` or the head, in pages."""
    bound = 2**63 - 1 if until is None else until
    while True:
        page = connection.execute(
            "SELECT position, body FROM events WHERE position > ? AND position <= ?"
            " ORDER BY position LIMIT ?",
            (after, bound, PAGE),
        ).fetchall()
        if not page:
            return
        yield page
        after = page[-1][0]


def fold(state: State, page: list[tuple[int, str]]) -> tuple[dict[str, Model], dict[str, Job]]:
    """Fold a page into `state` and return what it changed.

    Raises:
        LogUnavailable: an event cannot be folded.
    """
    models, jobs = dict[str, Model](), dict[str, Job]()
    for position, body in page:
        changes = _applied(state, position, body)
        models.update(changes.models)
        jobs.update(changes.jobs)
        state.forget_ended(changes.jobs.values())
        state.keys.clear()
    return models, jobs


def job_at(connection: sqlite3.Connection, job_id: str, position: int) -> Job | None:
    """Return the job as it was after the event at `position`, ended or not, or None if there was none."""
    row = connection.execute("SELECT body FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        return None
    return _as_it_was(connection, as_job(row[0]), position, lambda: state_at(connection, position))


def jobs_at(
    connection: sqlite3.Connection,
    position: int,
    *,
    before: int | None = None,
    limit: int = 100,
    model_id: str | None = None,
    status: JobStatus | None = None,
) -> list[Job]:
    """Return the jobs as they were after the event at `position`, newest first: at most `limit`.

    Args:
        connection: as for `state_at`.
        position: between the base and the head.
        before: only jobs that were created at positions below this one.
        limit: how many at most.
        model_id: only jobs of this model.
        status: only jobs that had this status then.
    """
    if status in _UNENDED:
        unended = reversed(state_at(connection, position).unended(model_id))
        found = [job for job in unended if job.status is status]
        return [job for job in found if before is None or job.created_position < before][:limit]
    clauses = {
        "created_position <= :position": position,
        "created_position < :before": before,
        "model_id = :model_id": model_id,
        "status = :status AND json_extract(body, '$.position') <= :position": status,
    }  # what ended later had another status then
    where = " AND ".join(clause for clause, value in clauses.items() if value is not None)
    rows = connection.execute(
        f"SELECT body FROM jobs WHERE {where} ORDER BY created_position DESC LIMIT :limit",  # noqa: S608 - literals above
        {"position": position, "before": before, "model_id": model_id, "status": status, "limit": limit},
    )
    then = cache(lambda: state_at(connection, position))  # one for all that need it
    past = (_as_it_was(connection, as_job(body), position, then) for (body,) in rows.fetchall())
    return [job for job in past if job is not None]


def _as_it_was(
    connection: sqlite3.Connection, job: Job, position: int, then: Callable[[], State]
) -> Job | None:
    """Return what a job of the present was then; what nothing happened to since is the same."""
    if job.position <= position:
        return job
    if job.created_position > position:
        return None
    if job.created_position <= base_of(connection):  # some of its events are archived
        return then().jobs.get(job.id)
    past: Job | None = None
    for event in _events_of(connection, job, position):
        past = evolve_job(past, event)
    return past


def _events_of(connection: sqlite3.Connection, job: Job, position: int) -> Iterator[Event]:
    """Yield the events that concerned a job up to a position: its own, and the starts of the server."""
    rows = connection.execute(
        "SELECT position, body FROM events WHERE job_id = ? AND position BETWEEN ? AND ?"
        " UNION SELECT position, body FROM events WHERE type = ? AND position BETWEEN ? AND ?"
        " ORDER BY position",
        (job.id, job.created_position, position, ServerStarted.TYPE, job.created_position, position),
    )
    return (decode_event(body) for _, body in rows)


def _nearest(connection: sqlite3.Connection, position: int) -> State:
    if check_readable(connection) < snapshots.SINCE_SCHEMA:
        return base_state(connection)
    base, nearest = base_of(connection), position + 1
    try:
        while (nearest := snapshots.latest(connection, nearest - 1) or 0) > base:
            if (state := _snapshot(connection, nearest)) is not None:
                return state
    except sqlite3.Error as error:
        _pass_over(connection, nearest, error)
    return base_state(connection)


def _snapshot(connection: sqlite3.Connection, position: int) -> State | None:
    """Return the state that a snapshot has, or None where it is damaged: the log says all that it says."""
    row = connection.execute("SELECT recorded_at FROM events WHERE position = ?", (position,)).fetchone()
    try:
        models = [as_model(body) for body in snapshots.models_of(connection, position)]
        jobs = [as_job(body) for body in snapshots.jobs_of(connection, position)]
    except (TypeError, ValueError, sqlite3.Error) as error:
        _pass_over(connection, position, error)
        return None
    return State(
        position,
        row[0] if row is not None else "",
        {model.id: model for model in models},
        {job.id: job for job in jobs},
    )


def _pass_over(connection: sqlite3.Connection, position: int, error: Exception) -> None:
    """Tell, once, that a snapshot is damaged.

    Raises:
        sqlite3.Error: it says nothing of what is in the file.
    """
    if isinstance(error, sqlite3.Error) and queries.kind_of(error) not in _DAMAGE:
        raise error
    (_, _, file) = connection.execute("PRAGMA database_list").fetchone()
    if (file, position) not in _passed_over:
        _passed_over.add((file, position))
        _log.warning(
            "the snapshot at position %d is damaged, so the past is slower to ask for: %s; "
            "`loadledger replay --rebuild` makes it anew",
            position,
            error,
        )


def _applied(state: State, position: int, body: str) -> Changes:
    try:
        return state.apply(decode_event(body))
    except Exception as error:  # whatever a forged body does to us
        raise LogUnavailable(
            f"the ledger cannot be folded, its event {position} is none: {error!r}; "
            "restore a backup, or use the release that wrote it"
        ) from error


T = TypeVar("T")

_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,6})\d*)?(?:([Zz])|([+ -])(\d\d:\d\d))", re.ASCII
)
"""A query's `+` arrives as a space where it was not written as `%2B`; nothing else can stand there."""


class BadMoment(LedgerProblem):
    """A moment is a position of the log, or a time with its offset, like 2026-01-31T14:02:00Z."""

    code = "invalid_parameter"


class BeyondHead(LedgerProblem):
    """The log has not come as far as this position."""

    code = "beyond_head"


@dataclass(frozen=True, slots=True)
class Moment:
    """A position, and when its event was recorded: null for 0, and for the last archived one."""

    position: int
    recorded_at: str | None


def moment_at(connection: sqlite3.Connection, at: str) -> Moment:
    """Return the moment that a position, or a time, means: the last position recorded no later.

    Raises:
        BadMoment: `invalid_parameter`, it is neither.
        BeyondHead: `beyond_head`.
        Archived: `archived`, with the `oldest` position that can be asked for, and the `head`.
    """
    base, head = _bounds(connection)
    if re.fullmatch(r"\d{1,19}", at, re.ASCII):
        return _at_position(connection, int(at), base, head)
    time = parse_time(at)
    row = connection.execute(
        "SELECT position, recorded_at FROM events WHERE recorded_at <= ?"
        " ORDER BY recorded_at DESC, position DESC LIMIT 1",
        (time,),
    ).fetchone()
    if row is not None:
        return Moment(*row)
    if base:
        raise Archived(f"what was recorded until {time} is archived, up to position {base}", base, head)
    return Moment(0, None)


def head_of(connection: sqlite3.Connection) -> Moment:
    """Return the moment of the last event."""
    base, head = _bounds(connection)
    return _at_position(connection, head, base, head)


def parse_time(at: str) -> str:
    """Return an RFC 3339 time as a stamp of the ledger; what is finer than a microsecond is cut off.

    Raises:
        BadMoment: `invalid_parameter`.
    """
    match = _RFC_3339.fullmatch(at)
    if match is None:
        raise BadMoment(
            f"{at[:64]!r} is neither a position of the log, all digits, nor a time with its offset, like "
            "2026-01-31T14:02:00Z or 2026-01-31T15:02:00+01:00 (in a URL, + is %2B)"
        )
    day, time, fraction, zulu, sign, offset = match.groups()
    zone = "+00:00" if zulu else f"{'-' if sign == '-' else '+'}{offset}"
    try:
        return format_timestamp(datetime.fromisoformat(f"{day}T{time}.{fraction or '0':0<6}{zone}"))
    except (ValueError, OverflowError):
        raise BadMoment(f"there is no time {at[:64]!r}") from None


def _at_position(connection: sqlite3.Connection, position: int, base: int, head: int) -> Moment:
    if position > head:
        raise BeyondHead(f"the log's head is at position {head}: there is no {position} yet")
    if 0 < position < base:
        raise Archived(
            f"position {position} is archived, as is all before {base}, the oldest that can be asked for",
            base,
            head,
        )
    row = connection.execute("SELECT recorded_at FROM events WHERE position = ?", (position,)).fetchone()
    return Moment(position, row[0] if row is not None else None)


def _bounds(connection: sqlite3.Connection) -> tuple[int, int]:
    base = base_of(connection)
    (head,) = connection.execute("SELECT coalesce(max(position), ?) FROM events", (base,)).fetchone()
    return base, int(head)


def state_of(connection: sqlite3.Connection, moment: Moment, *, from_base: bool = False) -> State:
    """Return the live state at a moment; 0 is empty, whatever is archived."""
    return state_at(connection, moment.position, from_base=from_base) if moment.position else State()


class Past:
    """A connection of its own in a thread of its own, so that the present is not kept waiting.

    One question at a time: however many ask, they take one core and the memory of one state. Every method
    raises what `moment_at` does, and LogUnavailable (`log_unavailable`) where the file cannot be read.
    """

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._thread = thread

    async def state(self, at: str) -> tuple[Moment, State]:
        """Return the live state at a moment, and which that is."""

        def ask(connection: sqlite3.Connection) -> tuple[Moment, State]:
            moment = moment_at(connection, at)
            return moment, state_of(connection, moment)

        return await self._ask(ask)

    async def job(self, at: str, job_id: str) -> tuple[Moment, Job | None]:
        """Return a job as it was at a moment; None if there was none."""

        def ask(connection: sqlite3.Connection) -> tuple[Moment, Job | None]:
            moment = moment_at(connection, at)
            return moment, job_at(connection, job_id, moment.position)

        return await self._ask(ask)

    async def jobs(
        self,
        at: str,
        *,
        before: int | None = None,
        limit: int = 100,
        model_id: str | None = None,
        status: JobStatus | None = None,
    ) -> tuple[Moment, list[Job]]:
        """Return jobs as they were at a moment, as `jobs_at` does."""

        def ask(connection: sqlite3.Connection) -> tuple[Moment, list[Job]]:
            moment = moment_at(connection, at)
            if moment.position == 0:
                return moment, []
            found = jobs_at(
                connection, moment.position, before=before, limit=limit, model_id=model_id, status=status
            )
            return moment, found

        return await self._ask(ask)

    async def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        def work() -> T:
            with _at_one_head(self._connection):
                return question(self._connection)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


@asynccontextmanager
async def open_past(path: Path) -> AsyncIterator[Past]:
    """Open the ledger for questions about the past; closed on exit.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, there is none, or it cannot be opened.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-past")
    with opened_to_read(path) as connection:
        connection.execute(CACHE)
        try:
            yield Past(connection, thread)
        finally:
            await asyncio.to_thread(thread.shutdown, cancel_futures=True)


@contextmanager
def _at_one_head(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        connection.execute("BEGIN")
        try:
            yield
        finally:
            connection.rollback()
    except (sqlite3.Error, ValueError) as error:  # what is stored may be damaged
        raise LogUnavailable(f"the ledger cannot be read: {error}") from error
