"""A whole ledger into an empty database, to migrate it there, and out of one, to verify or archive it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from events.clock import format_timestamp, uuid7
from events.codec import decode_event
from events.errors import LedgerDamaged, LedgerProblem
from events.log import encode_drafts
from events.nodes import Node
from events.postgres.bases import read_stored_base, write_stored_base
from events.postgres.connection import Connection, connect, translated_errors
from events.postgres.log import fold_rows
from events.postgres.schema import check_schema
from events.sqlite.storage import Database
from events.storage import LogHead, Row, StoredBase, StoredLedger
from events.types import Anchor, Draft, EventsDiscarded

PAGE = 5_000
"""Events read at once by a verification: some megabytes."""

FIRST_LEASE_S = 10.0
"""Lease of a node that is present when its ledger is copied: that of `--lease-s` as it is by default."""


class LedgerNotEmpty(LedgerProblem):
    """The database has events already: a ledger can only be copied into an empty one."""

    code = "ledger_not_empty"


async def copy_ledger_in(
    connection: Connection,
    stored: StoredBase,
    rows: Iterable[Row],
    head: LogHead,
    nodes: Iterable[Node] = (),
    *,
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Copy a verified ledger into an empty database, in one transaction.

    Args:
        connection: of the schema's owner, without a limit for a statement.
        stored: where its log begins.
        rows: all its events, in order.
        head: the last of them.
        nodes: of a replica: those that are present get a lease, after which they can be declared lost.
        before_commit: called when all is in the transaction.

    Raises:
        LedgerNotEmpty: `ledger_not_empty`.
    """
    with translated_errors("could not be written"):
        async with connection.transaction():
            await connection.execute("SET LOCAL statement_timeout = 0")
            await connection.execute("LOCK TABLE head IN EXCLUSIVE MODE")
            if await connection.fetchval("SELECT position FROM head") or await connection.fetchval(
                "SELECT EXISTS (SELECT FROM events)"
            ):
                raise LedgerNotEmpty
            await write_stored_base(connection, stored)
            await connection.copy_records_to_table(
                "events",
                records=((row.position, row.body, row.hash) for row in rows),
                columns=("position", "body", "hash"),
                schema_name="loadledger",
            )
            await connection.execute(
                "UPDATE head SET position = $1, hash = $2, recorded_at = $3",
                head.position,
                head.hash,
                head.recorded_at,
            )
            await connection.executemany(
                "INSERT INTO nodes (node_id, epoch, lease_s, renewed_at, steady_since)"
                " VALUES ($1, $2, $3, clock_timestamp(), clock_timestamp())",
                [(node.id, node.epoch, FIRST_LEASE_S) for node in nodes if node.is_present],
            )
            before_commit()


async def discard_end(
    connection: Connection, first: int, actor: str, keep: Callable[[Sequence[Row]], None]
) -> EventsDiscarded:
    """Remove the events from a position on, in one transaction that records it in their place.

    Args:
        connection: of the schema's owner, without a limit for a statement.
        first: the position of an event that no node could read, nor one after it.
        actor: who removes them.
        keep: stores what is removed.
    """
    with translated_errors("could not be written"):
        async with connection.transaction():
            await connection.execute("SELECT lock_head()")
            found = await connection.fetch(
                "SELECT position, body, hash FROM events WHERE position >= $1 ORDER BY position", first - 1
            )
            rows = [Row(position, body, digest) for position, body, digest in found]
            if rows[0].position == first:  # behind the base
                rows.insert(0, Row(first - 1, "", await connection.fetchval("SELECT hash FROM base")))
            [last, *removed] = rows
            keep(removed)
            before = decode_event(last.body).recorded_at if last.body else ""
            await connection.execute("SET LOCAL loadledger.archiving = 'on'")
            await connection.execute("DELETE FROM events WHERE position >= $1", first)
            await connection.execute(
                "UPDATE head SET position = $1, hash = $2, recorded_at = $3", last.position, last.hash, before
            )
            data = EventsDiscarded(first, removed[-1].position, removed[-1].hash.hex())
            now = format_timestamp(await connection.fetchval("SELECT clock_timestamp()"))
            head = LogHead(last.position, last.hash, before)
            _, [row], _ = encode_drafts([Draft(uuid7(), data, actor)], head, now)
            await connection.execute(
                "SELECT append($1, $2, $3, $4, NULL, NULL, NULL)",
                head.position,
                head.hash,
                [row.body],
                [row.hash],
            )
    return data


class DatabaseReader:
    """Reads a ledger in a database, as it was when it was opened.

    Attributes:
        stored: where the log begins, with the archives and the state there.
        head: position and hash that the database says its last event has.
    """

    def __init__(self, connection: Connection, stored: StoredBase, head: Anchor) -> None:
        self._connection = connection
        self.stored = stored
        self.head = head

    async def pages(self) -> AsyncIterator[list[tuple[int, bytes, bytes]]]:
        """Yield positions, bodies and hashes of all events, in order."""
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
    """
    connection = await connect(address, idle_in_transaction_session_timeout="0")
    try:
        await check_schema(connection)
        with translated_errors("could not be read"):
            await connection.transaction(isolation="repeatable_read", readonly=True).start()
            stored = await read_stored_base(connection)
            head = Anchor(*(await connection.fetchrow("SELECT position, hash FROM head") or (0, b"")))
        yield DatabaseReader(connection, stored, head)
    finally:
        connection.terminate()


async def make_replica(address: str, path: Path) -> StoredBase:
    """Make a replica of a whole ledger in an empty file, and return where the log begins.

    Raises:
        LedgerProblem: as `open_database_reader` says, or an event cannot be folded.
        LedgerDamaged: `ledger_damaged`, the state at the base was changed, or the head is not the last event.
        StorageError: the database cannot be read, or the file cannot be written.
    """
    replica = Database(path, is_replica=True)
    try:
        async with open_database_reader(address) as reader:
            stored = await replica.open()
            if reader.stored.base.position:
                stored = await replica.start_at_base(reader.stored)
            head = await _fill(replica, reader, stored)
            if (head.position, head.hash) != (reader.head.position, reader.head.hash):
                raise LedgerDamaged(
                    f"the database's last event is at position {head.position}, and its head says "
                    f"{reader.head.position}: see `loadledger verify --ledger`"
                )
            return reader.stored
    finally:
        await replica.close()


async def _fill(replica: Database, reader: DatabaseReader, stored: StoredLedger) -> LogHead:
    """Store all events of a database in a replica that is at its base; return the last one."""
    head, state = stored.head, stored.state
    async for page in reader.pages():
        rows = [Row(position, body.decode(), digest) for position, body, digest in page]
        followed = fold_rows(rows, state)
        await replica.append(rows, followed.changes, head)
        followed.transaction.commit()
        head = followed.head
    return head
