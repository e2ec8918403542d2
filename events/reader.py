"""Reading the log beside the writer: own connection, read-only, short pages, one statement a snapshot."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import aiosqlite

from events.bodies import from_body
from events.errors import LogUnavailable
from events.jobs import Job, JobStatus
from events.listing import Asked, EventPage, event_page
from events.schema import CACHE, opened_to_read, read_only_uri
from events.store import as_job
from events.types import Event

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
        return [from_body(str(body)) for (body,) in rows]

    async def event_page(self, asked: Asked) -> EventPage:
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
