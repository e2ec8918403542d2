"""Pages of events and jobs for the server: milliseconds in a long log, whatever the filter.

The statement of a page walks one index in the order of the answer, never sorts, and stops when the page is
full. With several fields in the filter, it walks the index of the field with the fewest events, and tests the
other fields of each event; if even that field has many events, the page ends after `SCAN` of them, full or
not, and has a cursor.

Events are returned as the stored text, without decoding and encoding.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, cast

import aiosqlite
import msgspec

from events.codec import decode_event
from events.errors import LogUnavailable
from events.jobs import Job
from events.sqlite.queries import EVENTS_PER_READ, JobQuery, Parameters, as_job, fetch_all, jobs_sql
from events.sqlite.readonly import CACHE, address_of, open_read_only
from events.sqlite.schema import BUSY_S
from events.sqlite.timetravel import BeyondHead
from events.storage import Row
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


class StoredEvent(msgspec.Struct, frozen=True, gc=False):
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


Steps: TypeAlias = Generator[tuple[str, Parameters], list[Any], T]
"""The statements of an answer, to which their rows are sent; whoever runs them has the connection.

The log only grows, so the later ones see the events that the first one saw, without a transaction.
"""


def find_event_page(query: EventQuery) -> Steps[StoredEventPage]:
    """Find a page of events.

    Raises:
        BeyondHead: `beyond_head`, there is no event `after`.
        LogUnavailable: `log_unavailable`, an event is damaged.
    """
    span = yield from _find_span(query)
    span = yield from _choose_index(query, span)
    sql = page_sql(query.wanted, span.leading, newest_first=query.newest_first)
    rows = yield sql, _parameters(query.wanted, span, query.limit + 1)
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


def read(connection: sqlite3.Connection, steps: Steps[T]) -> T:
    """Run the statements of an answer, and return it."""
    try:
        statement = next(steps)
        while True:
            statement = steps.send(connection.execute(*statement).fetchall())
    except StopIteration as end:
        return cast("T", end.value)


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


_SPAN_SQL = """SELECT coalesce((SELECT max(position) FROM events), 0),
(SELECT position FROM events WHERE recorded_at >= :since ORDER BY recorded_at, position LIMIT 1),
(SELECT position FROM events WHERE recorded_at <= :until ORDER BY recorded_at DESC, position DESC LIMIT 1)"""


def _find_span(query: EventQuery) -> Steps[_Span]:
    """Find the positions that a query allows, with its times resolved."""
    since, until = query.since, query.until
    bounds = {"since": since, "until": until}
    times = {name: bound if isinstance(bound, str) else None for name, bound in bounds.items()}
    [(head, first, last)] = yield _SPAN_SQL, times
    if isinstance(since, str):
        since = head + 1 if first is None else int(first)
    if isinstance(until, str):
        until = 0 if last is None else int(last)
    if query.after is not None and query.after > head:
        raise beyond_head(query.after, head)
    low = max(query.after or 0, (since or 0) - 1)
    highs = [head, until, query.before - 1 if query.before is not None else None]
    return _Span(low, min(each for each in highs if each is not None), head)


def _choose_index(query: EventQuery, span: _Span) -> Steps[_Span]:
    """Choose the index that the page walks, and how far."""
    columns = list(query.wanted.columns)
    if len(columns) < 2:  # noqa: PLR2004 - nothing to choose
        return replace(span, leading=next(iter(columns), None))
    sql = probe_sql(query.wanted, newest_first=query.newest_first)
    found = yield sql, _parameters(query.wanted, span, SCAN)
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

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    async def events(self, after: int, limit: int = EVENTS_PER_READ) -> list[Event]:
        return [decode_event(row.body) for row in await self.rows(after, limit)]

    async def rows(self, after: int, limit: int) -> list[Row]:
        sql = "SELECT position, body, hash FROM events WHERE position > ? ORDER BY position LIMIT ?"
        return [Row(*row) for row in await self._select(sql, (after, limit))]

    async def event(self, event_id: str) -> Event | None:
        sql = "SELECT body FROM events WHERE id = ?"
        rows = await self._select(sql, (event_id,))
        return decode_event(rows[0][0]) if rows else None

    async def latest_changes(self, model_id: str) -> list[Event]:
        """Return the latest `VersionAdded` or `VersionRemoved` of each version of a model."""
        sql = (
            "SELECT body, MAX(position) FROM events WHERE model_id = ? AND type IN (?, ?)"
            " GROUP BY json_extract(body, '$.version') ORDER BY json_extract(body, '$.version')"
        )
        rows = await self._select(sql, (model_id, VersionAdded.TYPE, VersionRemoved.TYPE))
        return [decode_event(body) for body, _ in rows]

    async def event_page(self, query: EventQuery) -> StoredEventPage:
        steps = find_event_page(query)
        try:
            statement = next(steps)
            while True:
                statement = steps.send(await self._select(*statement))
        except StopIteration as end:
            return cast("StoredEventPage", end.value)

    async def job(self, job_id: str) -> Job | None:
        rows = await self._select("SELECT body FROM jobs WHERE id = ?", (job_id,))
        return as_job(rows[0][0]) if rows else None

    async def jobs(self, query: JobQuery) -> Page[Job]:
        """Return a page of jobs with the position of the stored projections."""
        sql, parameters = jobs_sql(query)
        as_of = "SELECT position, NULL FROM projected"
        [(position, _), *rows] = await self._select(f"{as_of} UNION ALL SELECT * FROM ({sql})", parameters)  # noqa: S608 - as it was made
        found = [as_job(body) for _, body in rows]
        items = found[: query.limit]
        return Page(items, position, items[-1].created_position if len(found) > query.limit else None)

    async def _select(self, sql: str, parameters: Parameters) -> list[Any]:
        try:
            return await fetch_all(self._connection, sql, parameters)
        except sqlite3.Error as error:
            raise LogUnavailable(f"the ledger cannot be read: {error}") from error


@asynccontextmanager
async def open_reader(path: Path) -> AsyncIterator[Reader]:
    """Open a ledger for a server. Raises as `open_read_only` does."""
    with open_read_only(path, problem="cannot be opened"):  # completes what a process left that died
        pass
    async with aiosqlite.connect(
        address_of(path, "ro"), timeout=BUSY_S, uri=True, isolation_level=None
    ) as connection:
        await fetch_all(connection, CACHE)
        yield Reader(connection)
