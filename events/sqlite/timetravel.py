"""Time travel: the live state and jobs at any position or time of the log.

A past state is a fold from the last snapshot before it, or from the base of the log (`docs/decisions/0019`).
"""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TypeVar

from events.clock import Timestamp, format_timestamp
from events.codec import decode_event
from events.errors import Archived, LedgerProblem, LogUnavailable
from events.jobs import Job, JobStatus, evolve_job
from events.models import Model
from events.sqlite import queries, snapshots
from events.sqlite.liveness import Liveness, liveness_at
from events.sqlite.queries import (
    LAST,
    JobQuery,
    make_state,
    read_base,
    read_job,
    read_pages,
    select_jobs,
)
from events.sqlite.readonly import ReaderThread, open_reader_thread
from events.sqlite.snapshots import read_base_state
from events.state import State
from events.types import ENDS_OF_PROCESSES, Event

T = TypeVar("T")

_DAMAGE = {0, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""Kinds of errors that are about stored content; 0 is text that is not UTF-8."""

_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,6})\d*)?(?:([Zz])|([+ -])(\d\d:\d\d))", re.ASCII
)
"""A `+` in a query that was not written as `%2B` arrives as a space; nothing else can be there."""

_UNENDED = (JobStatus.PENDING, JobStatus.IN_PROGRESS)

_log = logging.getLogger(__name__)

_skipped_snapshots = set[tuple[str, int]]()
"""The damaged snapshots that were logged: file and position, at most one entry for each snapshot."""


def state_at(connection: sqlite3.Connection, position: int, *, from_base: bool = False) -> State:
    """Return the live state after the event at `position`.

    Args:
        connection: where a read transaction keeps several of these calls at one head.
        position: between the base and the head; 0 is the empty state, whatever is archived.
        from_base: whether to fold from the base of the log, and use no snapshot.

    Raises:
        LogUnavailable: an event, or the state at the base, is damaged.
    """
    if position == 0:
        return State()
    state = load_base_state(connection) if from_base else _load_nearest(connection, position)
    fold_onto(connection, state, position)
    return state


def fold_onto(connection: sqlite3.Connection, state: State, until: int) -> None:
    """Fold into `state` the events after it, up to and with a position.

    Raises:
        LogUnavailable: an event cannot be folded.
    """
    for page in read_pages(connection, state.position, until):
        fold_page(state, page)


def load_base_state(connection: sqlite3.Connection) -> State:
    """Return the live state at the base of the log: empty, or the result of archived events.

    Raises:
        LogUnavailable: the snapshot at the base is missing or damaged.
    """
    base = read_base(connection).position
    if base and snapshots.latest(connection, base) != base:
        raise LogUnavailable(f"the snapshot at {base}, which replaces the archived events, is missing")
    try:
        return read_base_state(connection, base)
    except ValueError as error:
        raise LogUnavailable(
            f"the snapshot at {base}, which replaces the archived events, is damaged: {error}; "
            "`loadledger replay --archive` folds their archives instead"
        ) from error


def fold_page(state: State, page: list[tuple[int, str, bytes]]) -> tuple[dict[str, Model], dict[str, Job]]:
    """Fold a page into `state`, and return the models and jobs that it changed.

    Raises:
        LogUnavailable: an event cannot be folded.
    """
    models, jobs = dict[str, Model](), dict[str, Job]()
    for position, body, _ in page:
        try:
            changes = state.apply(decode_event(body))
        except Exception as error:  # a forged body may raise anything
            raise LogUnavailable(
                f"the ledger cannot be folded, its event {position} is not valid: {error!r}; "
                "restore a backup, or use the release that wrote it"
            ) from error
        models.update(changes.models)
        jobs.update(changes.jobs)
        state.forget_ended(changes.jobs.values())
        state.keys.clear()
    return models, jobs


def job_at(connection: sqlite3.Connection, position: int, job_id: str) -> Job | None:
    """Return the job as it was after the event at `position`, or None if there was none."""
    job = read_job(connection, job_id)
    if job is None:
        return None
    return _job_then(connection, job, position, lambda: state_at(connection, position))


def jobs_at(connection: sqlite3.Connection, position: int, query: JobQuery) -> list[Job]:
    """Return a page of jobs as they were after the event at `position`; the query has the status of then."""
    if query.status in _UNENDED:
        unended = reversed(state_at(connection, position).unended(query.model_id))
        found = [job for job in unended if job.status is query.status]
        return [job for job in found if query.before is None or job.created_position < query.before][
            : query.limit
        ]
    then = cache(lambda: state_at(connection, position))  # one fold for all jobs that need it
    stored = select_jobs(connection, query, until=position)
    past = (_job_then(connection, job, position, then) for job in stored[: query.limit])
    return [job for job in past if job is not None]


def _job_then(
    connection: sqlite3.Connection, job: Job, position: int, then: Callable[[], State]
) -> Job | None:
    """Return a job of the present as it was after `position`; without later events it is the same."""
    if job.position <= position:
        return job
    if job.created_position > position:
        return None
    if job.created_position <= read_base(connection).position:  # some of its events are archived
        return then().jobs.get(job.id)
    past: Job | None = None
    for event in _events_of(connection, job, position):
        past = evolve_job(past, event)
    return past


def _events_of(connection: sqlite3.Connection, job: Job, position: int) -> Iterator[Event]:
    """Yield the events that changed a job up to a position: its own, and those of servers and nodes."""
    kinds = ", ".join(f"'{kind.TYPE}'" for kind in ENDS_OF_PROCESSES)
    rows = connection.execute(
        "SELECT position, body FROM events WHERE job_id = :job AND position BETWEEN :first AND :last"  # noqa: S608 - literals
        f" UNION SELECT position, body FROM events WHERE type IN ({kinds})"
        " AND position BETWEEN :first AND :last ORDER BY position",
        {"job": job.id, "first": job.created_position, "last": position},
    )
    return (decode_event(body) for _, body in rows)


def _load_nearest(connection: sqlite3.Connection, position: int) -> State:
    base, nearest = read_base(connection).position, position + 1
    try:
        while (nearest := snapshots.latest(connection, nearest - 1) or 0) > base:
            if (state := _load_snapshot(connection, nearest)) is not None:
                return state
    except sqlite3.Error as error:
        _skip_snapshot(connection, nearest, error)
    return load_base_state(connection)


def _load_snapshot(connection: sqlite3.Connection, position: int) -> State | None:
    """Return the state of a snapshot, or None if it is damaged: the log has all that it has."""
    row = connection.execute("SELECT recorded_at FROM events WHERE position = ?", (position,)).fetchone()
    try:
        models, jobs = snapshots.models_of(connection, position), snapshots.jobs_of(connection, position)
        return make_state(position, row[0] if row is not None else "", models, jobs)
    except (TypeError, ValueError, sqlite3.Error) as error:
        _skip_snapshot(connection, position, error)
        return None


def _skip_snapshot(connection: sqlite3.Connection, position: int, error: Exception) -> None:
    """Log, once, that a snapshot is damaged; raise other errors of SQLite again."""
    if isinstance(error, sqlite3.Error) and queries.kind_of(error) not in _DAMAGE:
        raise error
    (_, _, file) = connection.execute("PRAGMA database_list").fetchone()
    if (file, position) not in _skipped_snapshots:
        _skipped_snapshots.add((file, position))
        _log.warning(
            "the snapshot at position %d is damaged, so time travel is slower: %s; "
            "`loadledger replay --rebuild` rebuilds it",
            position,
            error,
        )


class InvalidMoment(LedgerProblem):
    """The text is neither a position of the log nor a time with its offset, like 2026-01-31T14:02:00Z."""

    code = "invalid_parameter"


class BeyondHead(LedgerProblem):
    """The position is beyond the head of the log."""

    code = "beyond_head"


@dataclass(frozen=True, slots=True)
class Moment:
    """A position, and when its event was recorded: None for 0, and for the base.

    Attributes:
        time: the time that was asked for; None for a position.
        server: the state of the server then; None until it was asked for.
    """

    position: int
    recorded_at: str | None
    time: str | None = field(default=None, compare=False)
    server: Liveness | None = field(default=None, compare=False)


def moment_at(connection: sqlite3.Connection, at: str) -> Moment:
    """Return the moment that a position or a time means; a time means the last event recorded by then.

    Raises:
        InvalidMoment: `invalid_parameter`, it is neither.
        BeyondHead: `beyond_head`.
        Archived: `archived`, with the `oldest` position that can be read, and the `head`.
    """
    base, head = bounds(connection)
    if re.fullmatch(r"\d{1,19}", at, re.ASCII):
        return _at_position(connection, int(at), base, head)
    time = parse_time(at)
    row = connection.execute(
        "SELECT position, recorded_at FROM events WHERE recorded_at <= ?"
        " ORDER BY recorded_at DESC, position DESC LIMIT 1",
        (time,),
    ).fetchone()
    if row is not None:
        return Moment(row[0], row[1], time)
    if base:
        raise Archived(f"events recorded until {time} are archived, up to position {base}", base, head)
    return Moment(0, None, time)


def find_moment(connection: sqlite3.Connection, until: str | None, now: Timestamp) -> Moment:
    """Return the moment of a position in digits or a time, with the state of the server, which does not run.

    Without `until` it is now. Raises as `moment_at` does.
    """
    if until is None:
        base, head = bounds(connection)
        moment = replace(_at_position(connection, head, base, head), time=now)
    else:
        moment = moment_at(connection, until)
    time = min(moment.time, now) if moment.time is not None else None
    return replace(moment, server=liveness_at(connection, moment.position, time))


def parse_time(at: str) -> str:
    """Return an RFC 3339 time as a timestamp of the ledger; digits beyond microseconds are cut off.

    Raises:
        InvalidMoment: `invalid_parameter`.
    """
    match = _RFC_3339.fullmatch(at)
    if match is None:
        raise InvalidMoment(
            f"{at[:64]!r} is neither a position of the log, all digits, nor a time with its offset, like "
            "2026-01-31T14:02:00Z or 2026-01-31T15:02:00+01:00 (in a URL, + is %2B)"
        )
    day, time, fraction, zulu, sign, offset = match.groups()
    zone = "+00:00" if zulu else f"{'-' if sign == '-' else '+'}{offset}"
    try:
        return format_timestamp(datetime.fromisoformat(f"{day}T{time}.{fraction or '0':0<6}{zone}"))
    except (ValueError, OverflowError):
        raise InvalidMoment(f"there is no time {at[:64]!r}") from None


def parse_moment(text: str | None) -> int | str | None:
    """Return a position or a timestamp; None for None.

    Raises:
        InvalidMoment: `invalid_parameter`, the text is neither.
    """
    if text is None:
        return None
    return min(int(text), LAST) if re.fullmatch(r"\d{1,19}", text, re.ASCII) else parse_time(text)


def _at_position(connection: sqlite3.Connection, position: int, base: int, head: int) -> Moment:
    if position > head:
        raise BeyondHead(f"the log's head is at position {head}: there is no {position} yet")
    if 0 < position < base:
        raise Archived(
            f"position {position} is archived; the oldest position that you can ask for is {base}",
            base,
            head,
        )
    row = connection.execute("SELECT recorded_at FROM events WHERE position = ?", (position,)).fetchone()
    return Moment(position, row[0] if row is not None else None)


def bounds(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the positions of the base and of the last event; they are the same for a log without events."""
    base = read_base(connection).position
    (head,) = connection.execute("SELECT coalesce(max(position), ?) FROM events", (base,)).fetchone()
    return base, int(head)


class TimeTravelReader:
    """Reads past states in a thread of its own, so that readers of the present do not wait.

    One query at a time: whatever the number of callers, it uses one core and the memory of one state.
    """

    def __init__(self, thread: ReaderThread) -> None:
        self._thread = thread

    async def read(self, at: str, query: Callable[[sqlite3.Connection, int], T]) -> tuple[Moment, T]:
        """Return the moment that `at` means, with the state of the server, and a query's result there.

        Args:
            at: a position in digits, or a time.
            query: `state_at`, `job_at` or `jobs_at`.

        Raises:
            InvalidMoment: `invalid_parameter`, it is neither.
            BeyondHead: `beyond_head`.
            Archived: `archived`.
            LogUnavailable: `log_unavailable`, the file cannot be read.
        """

        def read(connection: sqlite3.Connection) -> tuple[Moment, T]:
            moment = moment_at(connection, at)
            server = liveness_at(connection, moment.position, moment.time, is_live=True)
            return replace(moment, server=server), query(connection, moment.position)

        try:
            return await self._thread.run(read)
        except ValueError as error:  # stored content may be damaged
            raise LogUnavailable(f"the ledger cannot be read: {error}") from error


@asynccontextmanager
async def open_time_travel_reader(path: Path) -> AsyncIterator[TimeTravelReader]:
    async with open_reader_thread(path, "ledger-past") as thread:
        yield TimeTravelReader(thread)
