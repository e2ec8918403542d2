"""Pages of events and jobs for the server: milliseconds in a long log, whatever the filter.

The statement of a page walks one index in the order of the answer, never sorts, and stops when the page is
full. With several fields in the filter, it walks the index of the field with the fewest events, and tests the
other fields of each event; if even that field has many events, the page ends after `SCAN` of them, full or
not, and has a cursor.

Events are returned as the stored text, without decoding and encoding.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from events.codec import decode_event
from events.errors import LogUnavailable
from events.jobs import Job
from events.sqlite.queries import EVENTS_PER_READ, JobQuery, read_job, select_jobs
from events.sqlite.readonly import ReaderThread, open_reader_thread
from events.sqlite.timetravel import BeyondHead
from events.types import Event, VersionAdded, VersionRemoved

SCAN = 10_000
"""Candidates that one page reads, some microseconds each, if the filter has several fields."""

INDEXES = {
    "job_id": "events_by_job",
    "model_id": "events_by_model",
    "type": "events_by_type",
    "actor": "events_by_actor",
}
"""The index of each column that a filter may name."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as stored, with the members that a filter tests.

    Attributes:
        line: the body, exactly as it is hashed, with one more member at its end, `hash`, in hexadecimal; one
            line of UTF-8 without the line feed.
    """

    position: int
    type: str
    model_id: str | None
    job_id: str | None
    actor: str
    line: bytes


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Matches events that have one of the values of each field; an empty field matches all."""

    types: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    actors: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Return the values of each column in the filter, each value once."""
        values_of = {"job_id": self.jobs, "model_id": self.models, "type": self.types, "actor": self.actors}
        return {column: tuple(dict.fromkeys(values)) for column, values in values_of.items() if values}

    def matches(self, event: StoredEvent) -> bool:
        return (
            (not self.types or event.type in self.types)
            and (not self.models or event.model_id in self.models)
            and (not self.jobs or event.job_id in self.jobs)
            and (not self.actors or event.actor in self.actors)
        )


EVERYTHING = EventFilter()


class _Members(msgspec.Struct, gc=False):
    position: int
    type: str
    actor: str
    model_id: str | None
    job_id: str | None


_DECODER = msgspec.json.Decoder(_Members)


def stored_event(body: bytes, digest: bytes) -> StoredEvent:
    """Return the event of a row; raise ValueError if its body is damaged."""
    members = _DECODER.decode(body)
    line = b'%b,"hash":"%b"}' % (body[:-1], digest.hex().encode())
    return StoredEvent(members.position, members.type, members.model_id, members.job_id, members.actor, line)


@dataclass(frozen=True, slots=True)
class EventQuery:
    """A query for a page of events.

    Attributes:
        after: only positions above; None begins with the log.
        before: only positions below.
        since: only from this position or timestamp on.
        until: only up to this position or timestamp, inclusive.
    """

    wanted: EventFilter = EVERYTHING
    after: int | None = None
    before: int | None = None
    since: int | str | None = None
    until: int | str | None = None
    newest_first: bool = False
    limit: int = 100


@dataclass(frozen=True, slots=True)
class StoredEventPage:
    """A page of events in the order of its query.

    Attributes:
        as_of: the head of the log that the page reflects.
        next_cursor: the `after` of the next page, or its `before` in descending order; None on the last page.
            A page that is not full may still have one.
        seen: the position up to which the page has all events of the query, in ascending order.
    """

    items: list[StoredEvent]
    as_of: int
    next_cursor: int | None
    seen: int


@dataclass(frozen=True, slots=True)
class _Span:
    """The part of the log that one page reads: positions above `low`, up to `high`.

    `leading` is the column whose index is walked, None for the log itself; `cut`: the query has more.
    """

    low: int
    high: int
    head: int
    leading: str | None = None
    cut: bool = False


def read_event_page(connection: sqlite3.Connection, query: EventQuery) -> StoredEventPage:
    """Return a page of events, in the transaction of a connection.

    Raises:
        BeyondHead: `beyond_head`, there is no event `after`.
        LogUnavailable: `log_unavailable`, an event is damaged.
    """
    span = _choose_index(connection, query, _find_span(connection, query))
    sql = page_sql(query.wanted, span.leading, newest_first=query.newest_first)
    rows = connection.execute(sql, _parameters(query.wanted, span, query.limit + 1)).fetchall()
    try:
        found = [stored_event(body, digest) for body, digest, _ in rows]
    except ValueError as error:
        raise LogUnavailable(f"the ledger is damaged: {error}; run `loadledger verify`") from error
    items, cursor = found[: query.limit], None
    if len(found) > query.limit:
        cursor = items[-1].position
    elif span.cut:
        cursor = span.low + 1 if query.newest_first else span.high
    seen = max(span.low, span.high) if cursor is None else cursor
    return StoredEventPage(items, span.head, cursor, seen)


def page_sql(wanted: EventFilter, leading: str | None, *, newest_first: bool) -> str:
    """Return the statement of a page: the body, hash and position of each event, in order."""
    order = "DESC" if newest_first else "ASC"
    arms = _arms("CAST(body AS BLOB) AS body, hash, position", wanted.columns, leading)
    return f"{' UNION ALL '.join(arms)} ORDER BY position {order} LIMIT :limit"


def probe_sql(wanted: EventFilter, *, newest_first: bool) -> str:
    """Return the statement that counts the events of each column, up to a limit, with their last position."""
    order, far = ("DESC", "min") if newest_first else ("ASC", "max")
    return " UNION ALL ".join(
        f"SELECT '{column}', count(*), {far}(position) FROM ("  # noqa: S608 - literals
        f"{' UNION ALL '.join(_arms('position', {column: values}, column))}"
        f" ORDER BY position {order} LIMIT :limit)"
        for column, values in wanted.columns.items()
    )


def _arms(what: str, columns: Mapping[str, Sequence[str]], leading: str | None) -> list[str]:
    """Return a statement for each value of the leading column: each walks its index in order."""
    among = "position > :low AND position <= :high"
    if leading is None:
        return [f"SELECT {what} FROM events WHERE {among}"]  # noqa: S608 - literals
    others = "".join(
        f" AND {_further_condition(column, len(values))}"
        for column, values in columns.items()
        if column != leading
    )
    return [
        f"SELECT {what} FROM events INDEXED BY {INDEXES[leading]}"  # noqa: S608 - literals
        f" WHERE {leading} = :{leading}_{number} AND {among}{others}"
        for number in range(len(columns[leading]))
    ]


def _further_condition(column: str, number: int) -> str:
    """Return the condition that an event has one of `number` values in a column that does not lead.

    For one value, a look-up in its index takes about half the time of reading the event's text (measured).
    For several values the text is read once, instead of several look-ups; the plus excludes the index.
    """
    if number == 1:
        return (
            f"EXISTS (SELECT 1 FROM events AS other INDEXED BY {INDEXES[column]}"  # noqa: S608 - literals
            f" WHERE other.{column} = :{column}_0 AND other.position = events.position)"
        )
    return f"+{column} IN ({', '.join(f':{column}_{each}' for each in range(number))})"


def beyond_head(after: int, head: int) -> BeyondHead:
    return BeyondHead(
        f"the log's head is at position {head}: there is no {after} yet; if there was, this is another log"
    )


def _find_span(connection: sqlite3.Connection, query: EventQuery) -> _Span:
    """Return the positions that a query allows, with its times resolved."""
    since, until = query.since, query.until
    head, first, last = connection.execute(
        "SELECT coalesce((SELECT max(position) FROM events), 0),"
        " (SELECT position FROM events WHERE recorded_at >= :since ORDER BY recorded_at, position LIMIT 1),"
        " (SELECT position FROM events WHERE recorded_at <= :until"
        "  ORDER BY recorded_at DESC, position DESC LIMIT 1)",
        {
            "since": since if isinstance(since, str) else None,
            "until": until if isinstance(until, str) else None,
        },
    ).fetchone()
    if isinstance(since, str):
        since = head + 1 if first is None else int(first)
    if isinstance(until, str):
        until = 0 if last is None else int(last)
    if query.after is not None and query.after > head:
        raise beyond_head(query.after, head)
    low = max(query.after or 0, (since or 0) - 1)
    highs = [head, until, query.before - 1 if query.before is not None else None]
    return _Span(low, min(each for each in highs if each is not None), head)


def _choose_index(connection: sqlite3.Connection, query: EventQuery, span: _Span) -> _Span:
    """Choose the index that the page walks, and how far."""
    columns = list(query.wanted.columns)
    if len(columns) < 2:  # noqa: PLR2004 - nothing to choose
        return replace(span, leading=next(iter(columns), None))
    sql = probe_sql(query.wanted, newest_first=query.newest_first)
    found = connection.execute(sql, _parameters(query.wanted, span, SCAN)).fetchall()
    toward = -1 if query.newest_first else 1
    column, count, far = min(found, key=lambda row: (row[1], -toward * (row[2] or 0)))
    if count < SCAN:
        return replace(span, leading=column)
    if query.newest_first:
        return replace(span, leading=column, low=far - 1, cut=far - 1 > span.low)
    return replace(span, leading=column, high=far, cut=far < span.high)


def _parameters(wanted: EventFilter, span: _Span, limit: int) -> dict[str, object]:
    values = {
        f"{column}_{number}": value
        for column, several in wanted.columns.items()
        for number, value in enumerate(several)
    }
    return {"low": span.low, "high": span.high, "limit": limit, **values}


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, and the position that it reflects; `next_cursor` is None on the last page."""

    items: list[T]
    as_of: int
    next_cursor: int | None


class Reader:
    """Reads pages of events and jobs; its methods return values, never rows.

    Every method raises LogUnavailable (`log_unavailable`) if the file cannot be read.
    """

    def __init__(self, thread: ReaderThread) -> None:
        self._thread = thread

    async def events(self, after: int, limit: int = EVENTS_PER_READ) -> list[Event]:
        def read(connection: sqlite3.Connection) -> list[Event]:
            sql = "SELECT body FROM events WHERE position > ? ORDER BY position LIMIT ?"
            return [decode_event(body) for (body,) in connection.execute(sql, (after, limit)).fetchall()]

        return await self._thread.run(read)

    async def version_event(self, event_id: str) -> Event | None:
        def read(connection: sqlite3.Connection) -> Event | None:
            sql = "SELECT body FROM events WHERE type IN (?, ?) AND json_extract(body, '$.id') = ?"
            row = connection.execute(sql, (VersionAdded.TYPE, VersionRemoved.TYPE, event_id)).fetchone()
            return None if row is None else decode_event(row[0])

        return await self._thread.run(read)

    async def latest_changes(self, model_id: str) -> list[Event]:
        """Return the latest `VersionAdded` or `VersionRemoved` of each version of a model."""
        sql = (
            "SELECT body, MAX(position) FROM events WHERE model_id = ? AND type IN (?, ?)"
            " GROUP BY json_extract(body, '$.version') ORDER BY json_extract(body, '$.version')"
        )
        kinds = (VersionAdded.TYPE, VersionRemoved.TYPE)
        return await self._thread.run(
            lambda connection: [decode_event(body) for body, _ in connection.execute(sql, (model_id, *kinds))]
        )

    async def event_page(self, query: EventQuery) -> StoredEventPage:
        return await self._thread.run(lambda connection: read_event_page(connection, query))

    async def job(self, job_id: str) -> Job | None:
        return await self._thread.run(lambda connection: read_job(connection, job_id))

    async def jobs(self, query: JobQuery) -> Page[Job]:
        return await self._thread.run(lambda connection: read_jobs(connection, query))


def read_jobs(connection: sqlite3.Connection, query: JobQuery) -> Page[Job]:
    """Return a page of jobs with the position of the stored projections."""
    (position,) = connection.execute("SELECT position FROM projected").fetchone()
    found = select_jobs(connection, query)
    items = found[: query.limit]
    return Page(items, position, items[-1].created_position if len(found) > query.limit else None)


@asynccontextmanager
async def open_reader(path: Path) -> AsyncIterator[Reader]:
    async with open_reader_thread(path, "ledger-reader") as thread:
        yield Reader(thread)
