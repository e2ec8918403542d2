"""A whole ledger into an empty database, to migrate one from SQLite, and out of one, to verify it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from events.errors import LedgerProblem
from events.postgres.connection import Connection, connect, translated_errors
from events.postgres.schema import check_schema
from events.storage import LogHead, Row
from events.types import LogBase

PAGE = 5_000
"""Events read at once by a verification: some megabytes."""


class LedgerNotEmpty(LedgerProblem):
    """The database has events already: a ledger can only be copied into an empty one."""

    code = "ledger_not_empty"


async def copy_events(connection: Connection, rows: Iterable[Row], head: LogHead) -> None:
    """Copy all events of a verified ledger into an empty database, in one transaction.

    Args:
        connection: of the schema's owner.
        rows: from position 1 on, in order.
        head: the last of them.

    Raises:
        LedgerNotEmpty: `ledger_not_empty`.
        StorageError: the database refused it; nothing was changed.
    """
    with translated_errors("could not be written"):
        async with connection.transaction():
            await connection.execute("SET LOCAL statement_timeout = 0")
            await connection.execute("LOCK TABLE head IN EXCLUSIVE MODE")
            if await connection.fetchval("SELECT position FROM head") or await connection.fetchval(
                "SELECT EXISTS (SELECT FROM events)"
            ):
                raise LedgerNotEmpty
            await connection.copy_records_to_table(
                "events",
                records=((row.position, row.body, row.hash) for row in rows),
                columns=("position", "body", "hash"),
                schema_name="loadledger",
                timeout=None,
            )
            await connection.execute(
                "UPDATE head SET position = $1, hash = $2, recorded_at = $3",
                head.position,
                head.hash,
                head.recorded_at,
            )


class DatabaseReader:
    """Reads the events of a ledger in a database, as they were when it was opened.

    Attributes:
        base: position and hash of the last archived event.
        head: position and hash that the database says its last event has.
    """

    def __init__(self, connection: Connection, base: LogBase, head: LogBase) -> None:
        self._connection = connection
        self.base = base
        self.head = head

    async def pages(self) -> AsyncIterator[list[tuple[int, bytes, bytes]]]:
        """Yield positions, bodies and hashes of all events, in order.

        Raises:
            StorageError: they cannot be read.
        """
        after = -1
        while True:
            with translated_errors("could not be read"):
                found = await self._connection.fetch(
                    "SELECT position, convert_to(body, 'UTF8'), hash FROM events"
                    " WHERE position > $1 ORDER BY position LIMIT $2",
                    after,
                    PAGE,
                )
            if not found:
                return
            yield [(position, body, digest) for position, body, digest in found]
            after = found[-1][0]


@asynccontextmanager
async def open_database_reader(address: str) -> AsyncIterator[DatabaseReader]:
    """Connect to a database and read in one snapshot of it.

    Raises:
        LedgerProblem: `schema_missing`, `schema_outdated`, `future_schema`, `foreign_database`.
        StorageError: it cannot be reached or read.
    """
    connection = await connect(address, idle_in_transaction_session_timeout="0")
    try:
        await check_schema(connection)
        with translated_errors("could not be read"):
            await connection.transaction(isolation="repeatable_read", readonly=True).start()
            base = LogBase(*(await connection.fetchrow("SELECT position, hash FROM base") or (0, b"")))
            head = LogBase(*(await connection.fetchrow("SELECT position, hash FROM head") or (0, b"")))
        yield DatabaseReader(connection, base, head)
    finally:
        connection.terminate()
