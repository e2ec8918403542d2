"""Questions about a moment of the past, asked beside the writer: what was so then."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from events import history
from events.clock import stamp
from events.errors import LedgerProblem, LogUnavailable
from events.jobs import Job, JobStatus
from events.refusals import Archived
from events.schema import CACHE, opened_to_read
from events.state import State

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
        return stamp(datetime.fromisoformat(f"{day}T{time}.{fraction or '0':0<6}{zone}"))
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
    base = history.base_of(connection)
    (head,) = connection.execute("SELECT coalesce(max(position), ?) FROM events", (base,)).fetchone()
    return base, int(head)


def state_of(connection: sqlite3.Connection, moment: Moment, *, from_base: bool = False) -> State:
    """Return the live state at a moment; 0 is empty, whatever is archived."""
    return history.state_at(connection, moment.position, from_base=from_base) if moment.position else State()


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
            return moment, history.job_at(connection, job_id, moment.position)

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
        """Return jobs as they were at a moment, as `history.jobs_at` does."""

        def ask(connection: sqlite3.Connection) -> tuple[Moment, list[Job]]:
            moment = moment_at(connection, at)
            if moment.position == 0:
                return moment, []
            found = history.jobs_at(
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
