"""Time travel: models, jobs and servers at any position or time of the log.

`?at=` reads rows that the writer keeps with the events (`docs/decisions/0062`); a job's past is a fold of its
own few events. `events.audit.replay` folds the log itself.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import TypeVar

from events.clock import Timestamp, add_seconds, format_timestamp
from events.codec import decode_event
from events.errors import LedgerProblem, LogUnavailable
from events.history import ModelRow, ShownModel, decode_row, landmarks_around
from events.jobs import Job, JobStatus, evolve_job
from events.models import ModelState
from events.presence import Liveness, ServerState, find_liveness, unknown_since
from events.serving import Serving, make_serving
from events.sqlite import history, queries
from events.sqlite.history import latest_row
from events.sqlite.queries import LAST, JobQuery, as_job, jobs_sql, read_job, types_sql
from events.state import Changes, State, Transaction
from events.types import ENDS_OF_PROCESSES, Event, ModelLoaded
from events.versions import OF_VERSIONS, ModelVersions, evolve_versions

T = TypeVar("T")

_RFC_3339 = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d+)?)(?:([Zz])|([+ -]\d\d:\d\d))", re.ASCII)
"""A `+` in a query that was not written as `%2B` arrives as a space, so a space is a plus here."""

_UNENDED = (JobStatus.PENDING, JobStatus.IN_PROGRESS)

_NO_ROW = ModelRow(ModelState.UNLOADED)
"""The row of a model with known versions only."""

NOTE_EVERY_S = 60.0
"""Interval of a server's notes that it is alive: one commit each; unclean ends are known to the minute."""

_OVERDUE_S = 2 * NOTE_EVERY_S
"""A server without a note for so long may have ended."""


def cannot_fold(position: int, error: Exception) -> LogUnavailable:
    """Return the error for an event that cannot be folded."""
    return LogUnavailable(
        f"the ledger cannot be folded, its event {position} is not valid: {error!r}; "
        "restore a backup, or use the release that wrote it"
    )


def fold_page(state: State, page: list[tuple[int, str, bytes]]) -> Changes:
    """Fold a page into `state`, and return its changes.

    Raises:
        LogUnavailable: an event cannot be folded.
    """
    transaction = Transaction(state)
    for position, body, _ in page:
        try:
            transaction.apply(decode_event(body))
        except Exception as error:  # a forged body may raise anything
            raise cannot_fold(position, error) from error
    transaction.commit()
    return transaction.changes


# Models.

_AT = latest_row("models.id", ":position")
_PAST_MODELS = (
    f"models CROSS JOIN model_history AS history ON history.position = {_AT} AND history.model_id = models.id"
)
_AMONG = f"type IN ({types_sql(OF_VERSIONS)}) AND position <= :position"
_VERSIONS_OF = f"events INDEXED BY events_of_versions WHERE {_AMONG}"


def models_at(
    connection: sqlite3.Connection, position: int, *, cursor: str = "", limit: int = -1
) -> list[ShownModel]:
    """Return models as they were after the event at `position`, by id, beginning after `cursor`.

    Raises:
        LogUnavailable: a stored row, or an event that it names, is damaged.
    """
    found = connection.execute(
        f"SELECT models.id, history.body FROM {_PAST_MODELS} WHERE models.id > :cursor"  # noqa: S608 - literals
        " UNION ALL SELECT versions.id, NULL FROM versions WHERE id > :cursor"
        f" AND EXISTS (SELECT 1 FROM {_VERSIONS_OF} AND model_id = versions.id)"
        f" AND NOT EXISTS (SELECT 1 FROM {_PAST_MODELS} WHERE models.id = versions.id)"
        " ORDER BY 1 LIMIT :limit",
        {"position": position, "cursor": cursor, "limit": limit},
    ).fetchall()
    return [_show(connection, position, model_id, body) for model_id, body in found]


def model_at(connection: sqlite3.Connection, position: int, model_id: str) -> ShownModel | None:
    """Return a model as it was after the event at `position`, or None if the log did not know it yet."""
    found = connection.execute(
        f"SELECT history.body FROM {_PAST_MODELS} WHERE models.id = :model",  # noqa: S608 - literals
        {"position": position, "model": model_id},
    ).fetchone()
    if found is None and versions_at(connection, position, model_id) is None:
        return None
    return _show(connection, position, model_id, found and found[0])


def versions_at(connection: sqlite3.Connection, position: int, model_id: str) -> ModelVersions | None:
    """Return a model's versions as they were after the event at `position`, or None if it had none yet."""
    rows = connection.execute(
        f"SELECT body FROM {_VERSIONS_OF} AND model_id = :model ORDER BY position",  # noqa: S608 - literals
        {"position": position, "model": model_id},
    )
    versions = None
    for (body,) in rows:
        versions = evolve_versions(versions, decode_event(body))
    return versions


def active_at(connection: sqlite3.Connection, position: int) -> str | None:
    """Return the id of the active model after the event at `position`, or None."""
    found = connection.execute(
        f"SELECT models.id, json_extract(history.body, '$.rank') AS rank FROM {_PAST_MODELS}"  # noqa: S608 - literals
        " WHERE rank IS NOT NULL AND json_extract(history.body, '$.state') IN ('loaded', 'unloading')"
        " ORDER BY rank DESC LIMIT 1",
        {"position": position},
    ).fetchone()
    return None if found is None else str(found[0])


def _show(connection: sqlite3.Connection, position: int, model_id: str, body: str | None) -> ShownModel:
    versions = versions_at(connection, position, model_id) or ModelVersions(model_id)
    try:
        row = _NO_ROW if body is None else decode_row(body)
    except ValueError as error:
        raise LogUnavailable(
            f"the stored history of {model_id!r} is damaged: {error}; "
            "`loadledger replay --rebuild` rebuilds it"
        ) from error
    loads = [read_load(connection, model_id, each.load) for each in row.servings]
    return ShownModel(model_id, row, versions, tuple(loads))


def read_load(connection: sqlite3.Connection, model_id: str, position: int) -> Serving:
    """Return the load whose `ModelLoaded` is at a position.

    Raises:
        LogUnavailable: there is no such event.
    """
    found = connection.execute(
        "SELECT events.body, jobs.body FROM events, jobs"
        " WHERE events.position = ? AND jobs.id = events.job_id",
        (position,),
    ).fetchone()
    load = None
    try:
        event = None if found is None else decode_event(found[0])
        if event is not None and isinstance(event.data, ModelLoaded):
            load = make_serving(event, event.data, as_job(found[1]))
    except Exception as error:  # a forged body may raise anything
        raise LogUnavailable(f"the ledger is damaged: {error!r}; run `loadledger verify`") from error
    if load is not None:
        return load
    raise LogUnavailable(
        f"the stored history of {model_id!r} is damaged: the event {position} is not its load; "
        "`loadledger replay --rebuild` rebuilds it"
    )


# Jobs.


def job_at(connection: sqlite3.Connection, position: int, job_id: str) -> Job | None:
    """Return the job as it was after the event at `position`, or None if there was none."""
    job = read_job(connection, job_id)
    return None if job is None else _job_then(connection, job, position)


def jobs_at(connection: sqlite3.Connection, position: int, query: JobQuery) -> list[Job]:
    """Return a page of jobs as they were after the event at `position`; `status` is their status then."""
    stored: Iterable[Job] = (
        _select_unended(connection, query, position)
        if query.status in _UNENDED
        else (as_job(body) for _, body in connection.execute(*jobs_sql(query, position)).fetchall())
    )
    past = (_job_then(connection, job, position) for job in stored)
    found = (job for job in past if job is not None and query.status in (None, job.status))
    return list(islice(found, query.limit))


def _select_unended(connection: sqlite3.Connection, query: JobQuery, position: int) -> Iterator[Job]:
    """Return the jobs that were unended after the event at `position`, as they are now, newest first."""
    where = "created_position <= :position AND created_position < :before"
    if query.model_id is not None:
        where += " AND model_id = :model"
    found = connection.execute(
        "SELECT created_position, body FROM jobs INDEXED BY jobs_by_landmark"  # noqa: S608 - literals
        "  WHERE landmark IN (SELECT value FROM json_each(:landmarks))"
        f"  AND json_extract(body, '$.position') > :position AND {where}"
        f" UNION ALL SELECT created_position, body FROM jobs WHERE landmark IS NULL AND {where}"
        "  AND status IN ('pending', 'in_progress') ORDER BY created_position DESC",
        {
            "position": position,
            "before": LAST if query.before is None else query.before,
            "model": query.model_id,
            "landmarks": json.dumps(landmarks_around(position)),
        },
    ).fetchall()
    return (as_job(body) for _, body in found)


def _job_then(connection: sqlite3.Connection, job: Job, position: int) -> Job | None:
    """Return a present job as it was after `position`; unchanged without later events."""
    if job.position <= position:
        return job
    if job.created_position > position:
        return None
    past = None
    for event in _events_of(connection, job, position):
        past = evolve_job(past, event)
    return past


def _events_of(connection: sqlite3.Connection, job: Job, position: int) -> Iterator[Event]:
    """Yield the events that changed a job up to a position: its own, and those of servers."""
    kinds = ", ".join(f"'{kind.TYPE}'" for kind in ENDS_OF_PROCESSES)
    rows = connection.execute(
        "SELECT position, body FROM events WHERE job_id = :job AND position BETWEEN :first AND :last"  # noqa: S608 - literals
        f" UNION SELECT position, body FROM events WHERE type IN ({kinds})"
        " AND position BETWEEN :first AND :last ORDER BY position",
        {"job": job.id, "first": job.created_position, "last": position},
    )
    return (decode_event(body) for _, body in rows)


# Moments.


def liveness_at(connection: sqlite3.Connection, position: int, time: Timestamp | None = None) -> Liveness:
    """Return the state of the running server right after the event at `position`, or at a later time.

    Args:
        connection: in one transaction with other queries of that moment.
        position: the position of the last event by then; 0 is before the first.
        time: a time before the next event; None for the moment of the event itself.
    """
    last, following = history.presence_around(connection, position)
    return find_liveness(last, following, time, is_first=position == 0)


def unknown_if_overdue(connection: sqlite3.Connection, found: Liveness, time: Timestamp | None) -> Liveness:
    """Return the state of a server after the last event: unknown if its last note is long ago."""
    if found.state is ServerState.RUNNING and time is not None:
        seen_at = max(queries.read_last_seen(connection), queries.read_head(connection).recorded_at)
        if time > add_seconds(seen_at, _OVERDUE_S):
            return unknown_since(found, seen_at)
    return found


class InvalidMoment(LedgerProblem):
    """The text is neither a position of the log nor a time with its offset, like 2026-01-31T14:02:00Z."""

    code = "invalid_parameter"


class BeyondHead(LedgerProblem):
    """The position is beyond the head of the log."""

    code = "beyond_head"


class BeforeFirst(LedgerProblem):
    """The time is before the first event of the log."""

    code = "before_first_event"


@dataclass(frozen=True, slots=True)
class Moment:
    """A position, and when its event was recorded: None for 0.

    Attributes:
        time: the requested time; None for a position.
        server: the state of the server then; None until it is read.
    """

    position: int
    recorded_at: str | None
    time: str | None = field(default=None, compare=False)
    server: Liveness | None = field(default=None, compare=False)


def moment_at(connection: sqlite3.Connection, at: str) -> Moment:
    """Return the moment of a position or a time; a time means the last event recorded by then.

    Raises:
        InvalidMoment: `invalid_parameter`, the text is neither.
        BeyondHead: `beyond_head`.
        BeforeFirst: `before_first_event`.
    """
    if re.fullmatch(r"\d{1,19}", at, re.ASCII):
        return _at_position(connection, int(at))
    time = parse_time(at)
    row = connection.execute(
        "SELECT position, recorded_at FROM events WHERE recorded_at <= ?"
        " ORDER BY recorded_at DESC, position DESC LIMIT 1",
        (time,),
    ).fetchone()
    if row is not None:
        return Moment(row[0], row[1], time)
    first = connection.execute("SELECT recorded_at FROM events ORDER BY position LIMIT 1").fetchone()
    if first is not None:
        raise BeforeFirst(f"{time[:19]}Z is before the first event, of {first[0]}: name a later time")
    return Moment(0, None, time)


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
    time, zulu, offset = match.groups()
    try:
        return format_timestamp(datetime.fromisoformat(time + ("Z" if zulu else offset.replace(" ", "+"))))
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


def _at_position(connection: sqlite3.Connection, position: int) -> Moment:
    head = queries.read_head(connection).position
    if position > head:
        raise BeyondHead(f"the log's head is at position {head}: there is no {position} yet")
    return Moment(position, queries.recorded_at(connection, position) or None)


def read_moment(
    connection: sqlite3.Connection, at: str, query: Callable[[sqlite3.Connection, int], T]
) -> tuple[Moment, T]:
    """Return the moment of `at`, with the state of the server, and a query's result there.

    Args:
        connection: the running server's, in one transaction.
        at: a position in digits, or a time.
        query: `models_at`, `job_at`, `jobs_at` or another query of a position.

    Raises:
        InvalidMoment: `invalid_parameter`, `at` is neither.
        BeyondHead: `beyond_head`.
        BeforeFirst: `before_first_event`.
        LogUnavailable: `log_unavailable`, the stored data is damaged.
    """
    moment = moment_at(connection, at)
    try:
        server = liveness_at(connection, moment.position, moment.time)
        return replace(moment, server=server), query(connection, moment.position)
    except ValueError as error:  # stored content may be damaged
        raise LogUnavailable(f"the ledger cannot be read: {error}") from error
