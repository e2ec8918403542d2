"""Reading the log beside the writer: own connection, read-only, short pages, one statement a snapshot.

Lists of events: the SQL that gives a page of a long log in milliseconds, whatever is asked for.

Each statement walks one index in the order of the answer and stops when the page is full; nothing is sorted.
Of several fields that are asked for, the one with the fewest events leads, and the others are looked at in
what it gives; where even that one has many, a page ends after `SCAN` of them, full or not, and says so.

Events as they are handed on: as the text that is stored, which is never decoded and encoded again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import aiosqlite
import msgspec

from events.codec import decode_event
from events.errors import Archived, LogUnavailable
from events.jobs import Job, JobStatus
from events.sqlite.history import BeyondHead
from events.sqlite.queries import as_job
from events.sqlite.schema import CACHE, opened_to_read, read_only_uri
from events.types import Event


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event, and the members that filters look at.

    Attributes:
        line: the body, exactly as it is hashed, with one member more at its end: `hash`, in hexadecimal.
            It is one line of UTF-8, without its end.
    """

    position: int
    type: str
    model_id: str | None
    job_id: str | None
    actor: str
    line: bytes


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events: in each field that names some, one of these; a field without any lets all pass."""

    types: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    actors: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Return what is asked of which column of the log, each value once."""
        asked = {
            "job_id": self.jobs,
            "model_id": self.models,
            "type": self.types,
            "actor": self.actors,
        }
        return {column: tuple(dict.fromkeys(values)) for column, values in asked.items() if values}

    def matches(self, event: StoredEvent) -> bool:
        """Whether an event is asked for."""
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
    """Return the event of a row.

    Raises:
        msgspec.DecodeError: the body is damaged.
        UnicodeDecodeError: likewise.
    """
    members = _DECODER.decode(body)
    line = b'%b,"hash":"%b"}' % (body[:-1], digest.hex().encode())
    return StoredEvent(members.position, members.type, members.model_id, members.job_id, members.actor, line)


def hash_of(line: bytes) -> bytes:
    """Return the 32 bytes of the hash in a line."""
    return bytes.fromhex(line[-66:-2].decode())


SCAN = 10_000
"""Candidates that one page looks at, some microseconds each, when several fields are asked for."""

LAST = 2**63 - 1
"""No position is above this."""

INDEXES = {
    "job_id": "events_by_job",
    "model_id": "events_by_model",
    "type": "events_by_type",
    "actor": "events_by_actor",
}

_FIELDS = {"job_id": "jobs", "model_id": "models", "type": "types", "actor": "actors"}

Query = Callable[[str, Mapping[str, object]], Awaitable[list[tuple[Any, ...]]]]
"""Runs a statement and returns its rows."""


@dataclass(frozen=True, slots=True)
class EventQuery:
    """Which events of the log, and how many.

    Attributes:
        after: only those with positions above; None is from where the log begins.
        before: only those with positions below.
        since: only those from this position, or from this stamp, on.
        until: only those up to this position, or up to this stamp; both included.
        newest_first: in which order.
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
    """Some events in the order asked for.

    Attributes:
        as_of: the head of the log that this reflects.
        base: up to here events are in an archive.
        next_cursor: what to ask for with `after`, or `before` when the newest come first, to go on; None if
            there is nothing more. A page that is not full may still have one.
        seen: of an answer in ascending order: up to here all that was asked for is in it.
    """

    items: list[StoredEvent]
    as_of: int
    base: int
    next_cursor: int | None
    seen: int


@dataclass(frozen=True, slots=True)
class _Walk:
    """The part of the log that one page looks at: positions above `low`, up to `high`.

    Attributes:
        base: that of the log when this was decided.
        head: likewise.
        leading: the column whose index is walked; None is the log itself.
        cut: whether there is more beyond this part.
    """

    low: int
    high: int
    base: int
    head: int
    leading: str | None = None
    cut: bool = False


async def event_page(query: Query, asked: EventQuery) -> StoredEventPage:
    """Return a page of events.

    Raises:
        Archived: `archived`, what is asked for begins, or ends, before what is retained.
        BeyondHead: `beyond_head`, there is no event `after`.
        LogUnavailable: `log_unavailable`.
    """
    walk = await _lead(query, asked, await _bounds(query, asked))
    sql = page_sql(asked.wanted, walk.leading, newest_first=asked.newest_first)
    rows = await query(sql, _parameters(asked.wanted, walk, asked.limit + 1))
    base = rows[0][0]
    if base > walk.base and walk.low < base:  # moved away meanwhile, by a command
        raise archived(base, walk.head)
    found = _events(rows)
    found.sort(key=lambda event: event.position, reverse=asked.newest_first)
    return _page(asked, walk, found)


def page_sql(wanted: EventFilter, leading: str | None, *, newest_first: bool) -> str:
    """Return the statement of a page: each row is the base and the body and hash of an event, or nulls."""
    order = "DESC" if newest_first else "ASC"
    arms = _arms("CAST(body AS BLOB) AS body, hash, position", wanted, leading)
    return (
        "SELECT base.position, page.body, page.hash FROM base LEFT JOIN ("  # noqa: S608 - literals
        f"{' UNION ALL '.join(arms)} ORDER BY position {order} LIMIT :limit) AS page"
    )


def probe_sql(wanted: EventFilter, *, newest_first: bool) -> str:
    """Return the statement that says of each column how many events it gives, up to a limit, and how far."""
    order, far = ("DESC", "min") if newest_first else ("ASC", "max")
    return " UNION ALL ".join(
        f"SELECT '{column}', count(*), {far}(position) FROM ("  # noqa: S608 - literals
        f"{' UNION ALL '.join(_arms('position', EventFilter(**{_FIELDS[column]: values}), column))}"
        f" ORDER BY position {order} LIMIT :limit)"
        for column, values in wanted.columns.items()
    )


def _arms(what: str, wanted: EventFilter, leading: str | None) -> list[str]:
    """Return a statement for each value of the column that leads: each walks its index in order."""
    among = "position > :low AND position <= :high"
    if leading is None:
        return [f"SELECT {what} FROM events WHERE {among}"]  # noqa: S608 - literals
    others = "".join(
        f" AND {_also(column, len(values))}" for column, values in wanted.columns.items() if column != leading
    )
    return [
        f"SELECT {what} FROM events INDEXED BY {INDEXES[leading]}"  # noqa: S608 - literals
        f" WHERE {leading} = :{leading}_{number} AND {among}{others}"
        for number in range(len(wanted.columns[leading]))
    ]


def _also(column: str, number: int) -> str:
    """Return the condition that an event has one of so many values in a column that does not lead.

    For one value its index is asked, in about half the time of reading the events' texts (measured).
    For several these are read, once, where an index would be asked for each value; the plus keeps it out.
    """
    if number == 1:
        return (
            f"EXISTS (SELECT 1 FROM events AS other INDEXED BY {INDEXES[column]}"  # noqa: S608 - literals
            f" WHERE other.{column} = :{column}_0 AND other.position = events.position)"
        )
    return f"+{column} IN ({', '.join(f':{column}_{each}' for each in range(number))})"


def archived(base: int, head: int) -> Archived:
    """Return the error that says from where there are events; the `oldest` is the first of them."""
    return Archived(f"events up to {base} are archived: begin again with after={base}", base + 1, head)


def beyond_head(after: int, head: int) -> BeyondHead:
    """Return the error that says how far the log goes."""
    return BeyondHead(
        f"the log's head is at position {head}: there is no {after} yet; if there was, this is another log"
    )


async def _bounds(query: Query, asked: EventQuery) -> _Walk:
    """Return all that may be looked at, moments resolved to positions."""
    since, until = asked.since, asked.until
    moments = {
        "since": since if isinstance(since, str) else None,
        "until": until if isinstance(until, str) else None,
    }
    [(base, head, first, last, oldest_at)] = await query(
        "SELECT base.position, coalesce((SELECT max(position) FROM events), base.position),"
        " (SELECT position FROM events WHERE recorded_at >= :since ORDER BY recorded_at, position LIMIT 1),"
        " (SELECT position FROM events WHERE recorded_at <= :until"
        "  ORDER BY recorded_at DESC, position DESC LIMIT 1),"
        " (SELECT recorded_at FROM events ORDER BY position LIMIT 1) FROM base",
        moments,
    )
    if isinstance(since, str):
        if base and (oldest_at is None or since < oldest_at):
            raise archived(base, head)
        since = head + 1 if first is None else int(first)
    if isinstance(until, str):
        until = base if last is None else int(last)
    if asked.after is not None and asked.after > head:
        raise beyond_head(asked.after, head)
    lows = [asked.after, max(0, since - 1) if since is not None else None]
    low = max((each for each in lows if each is not None), default=None)
    highs = [until, asked.before - 1 if asked.before is not None else None]
    high = min((each for each in highs if each is not None), default=None)
    ends_archived = base > 0 and low is None and high is not None and high <= base
    if ends_archived or (low is not None and low < base):
        raise archived(base, head)
    return _Walk(base if low is None else low, head if high is None else min(high, head), base, head)


async def _lead(query: Query, asked: EventQuery, walk: _Walk) -> _Walk:
    """Decide which index is walked, and how far."""
    columns = list(asked.wanted.columns)
    if len(columns) < 2:  # noqa: PLR2004 - nothing to choose
        return replace(walk, leading=next(iter(columns), None))
    sql = probe_sql(asked.wanted, newest_first=asked.newest_first)
    found = await query(sql, _parameters(asked.wanted, walk, SCAN))
    toward = -1 if asked.newest_first else 1
    column, count, far = min(found, key=lambda row: (row[1], -toward * (row[2] or 0)))
    if count < SCAN:
        return replace(walk, leading=column)
    if asked.newest_first:
        return replace(walk, leading=column, low=far - 1, cut=far - 1 > walk.low)
    return replace(walk, leading=column, high=far, cut=far < walk.high)


def _parameters(wanted: EventFilter, walk: _Walk, limit: int) -> dict[str, object]:
    values = {
        f"{column}_{number}": value
        for column, several in wanted.columns.items()
        for number, value in enumerate(several)
    }
    return {"low": walk.low, "high": walk.high, "limit": limit, **values}


def _events(rows: Iterable[tuple[Any, ...]]) -> list[StoredEvent]:
    try:
        return [stored_event(body, digest) for _, body, digest in rows if body is not None]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LogUnavailable(f"the ledger is damaged: {error}; run `loadledger verify`") from error


def _page(asked: EventQuery, walk: _Walk, found: list[StoredEvent]) -> StoredEventPage:
    items, cursor = found[: asked.limit], None
    if len(found) > asked.limit:
        cursor = items[-1].position
    elif walk.cut:
        cursor = walk.low + 1 if asked.newest_first else walk.high
    seen = max(walk.low, walk.high) if cursor is None else cursor
    return StoredEventPage(items, walk.head, walk.base, cursor, seen)


PAGE = 500
"""Rows read at once: short enough that no cursor stays open and the WAL can be checkpointed."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, and the position that it reflects; `next_cursor` is null on the last one."""

    items: list[T]
    as_of: int
    next_cursor: int | None


class Reader:
    """A read-only connection to the ledger; its queries return values, never rows.

    Every method raises LogUnavailable (`log_unavailable`) where the file cannot be read.
    """

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    async def events(self, after: int, limit: int = PAGE) -> list[Event]:
        """Return at most `limit` events with positions above `after`, in order."""
        rows = await self._all(
            "SELECT body FROM events WHERE position > ? ORDER BY position LIMIT ?",
            (after, limit),
        )
        return [decode_event(str(body)) for (body,) in rows]

    async def event_page(self, asked: EventQuery) -> StoredEventPage:
        """Return events as they are stored, and where to go on.

        Raises:
            Archived: `archived`, what is asked for begins before what is retained.
        """
        return await event_page(self._all, asked)

    async def job(self, job_id: str) -> Job | None:
        """Return the job, ended or not, or None if there is none."""
        rows = await self._all("SELECT body FROM jobs WHERE id = ?", (job_id,))
        return as_job(str(rows[0][0])) if rows else None

    async def jobs(
        self,
        *,
        before: int | None = None,
        limit: int = 100,
        model_id: str | None = None,
        status: JobStatus | None = None,
    ) -> Page[Job]:
        """Return jobs, newest first: at most `limit`, created at positions below the cursor `before`."""
        clauses = {
            "created_position < :before": before,
            "model_id = :model_id": model_id,
            "status = :status": status,
        }  # only what is asked for, so that its index is used
        where = " AND ".join(clause for clause, value in clauses.items() if value is not None) or "TRUE"
        rows = await self._all(
            "SELECT projected.position, page.body FROM projected LEFT JOIN ("  # noqa: S608 - literals above
            f" SELECT body, created_position FROM jobs WHERE {where}"
            " ORDER BY created_position DESC LIMIT :limit + 1) AS page ORDER BY page.created_position DESC",
            {"before": before, "model_id": model_id, "status": status, "limit": limit},
        )
        found = [as_job(str(body)) for _, body in rows if body is not None]
        items = found[:limit]
        return Page(items, int(rows[0][0]), items[-1].created_position if len(found) > limit else None)

    async def _all(self, sql: str, parameters: object) -> list[tuple[str | int, ...]]:
        try:
            rows = await self._connection.execute_fetchall(sql, parameters)
        except sqlite3.Error as error:
            raise LogUnavailable(f"the ledger cannot be read: {error}") from error
        return [tuple(row) for row in rows]


@asynccontextmanager
async def open_reader(path: Path) -> AsyncIterator[Reader]:
    """Open the ledger for reading; closed on exit.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, there is none, or it cannot be opened.
    """
    with opened_to_read(path, "cannot be opened"):
        connection = await aiosqlite.connect(read_only_uri(path), uri=True, isolation_level=None)
    try:
        await connection.execute("PRAGMA busy_timeout = 5000")
        await connection.execute(CACHE)
        yield Reader(connection)
    finally:
        await connection.close()
