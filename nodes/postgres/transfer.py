"""A whole ledger into an empty database, to migrate it, and out of one, to verify it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from events.clock import format_timestamp, uuid7
from events.codec import GENESIS, decode_event
from events.errors import LedgerProblem, LogUnavailable
from events.log import encode_drafts
from events.storage import LogHead, RawRow, Row, StorageError
from events.types import Draft, EventsDiscarded
from features.nodes.register import Node
from nodes.postgres.connection import Connection, close, connect, translated_errors
from nodes.postgres.schema import check_owner, check_schema

PAGE = 5_000
"""Events read at once by a verification: some megabytes."""

_OF_COMMANDS = {"statement_timeout": "0", "lock_timeout": "10s", "idle_in_transaction_session_timeout": "0"}
"""Settings of a command's session that reads or copies a whole ledger."""

_LIFT_TRIGGER = "SELECT set_config('loadledger.discarding', 'on', true)"
"""Let events be deleted until the transaction ends, in this session alone (migrations/postgres)."""

FIRST_LEASE_S = 10.0
"""Lease of a present node when its ledger is copied: the default of `--lease-s`."""


class LedgerNotEmpty(LedgerProblem):
    """The database has events already: a ledger can only be copied into an empty one."""

    code = "ledger_not_empty"


async def copy_ledger_in(
    connection: Connection,
    rows: Iterable[Row],
    head: LogHead,
    nodes: Iterable[Node] = (),
    *,
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Copy a verified ledger into an empty database, in one transaction.

    Args:
        connection: of the schema's owner, without a limit for a statement.
        rows: all events, in order.
        head: the last event.
        nodes: the nodes of a replica: present ones get a lease, after which they can be declared lost.
        before_commit: called before the transaction is committed.

    Raises:
        LedgerNotEmpty: `ledger_not_empty`.
    """
    with translated_errors("could not be written"):
        async with connection.transaction():
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
        first: the position of an event that no node could read, nor any later one.
        actor: the remover.
        keep: stores the removed events.
    """
    with translated_errors("could not be written"):
        async with connection.transaction():
            await connection.execute("SELECT lock_head()")
            found = await connection.fetch(
                "SELECT position, body, hash FROM events WHERE position >= $1 ORDER BY position", first - 1
            )
            rows = [Row(position, body, digest) for position, body, digest in found]
            if first == 1:
                rows.insert(0, Row(0, "", GENESIS))
            [last, *removed] = rows
            keep(removed)
            before = decode_event(last.body).recorded_at if last.body else ""
            await connection.execute(_LIFT_TRIGGER)
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


class DatabaseLedger:
    """A ledger in a database for commands, which block for each statement.

    Attributes:
        connection: without a limit for a statement.
        run: runs a coroutine of the connection to its end.
    """

    def __init__(self, runner: asyncio.Runner, connection: Connection) -> None:
        self.connection = connection
        self.run = runner.run

    def begin_snapshot(self) -> None:
        """Begin a snapshot for all further reads; raise LedgerProblem without a ledger of this release."""

        async def begin() -> None:
            await check_schema(self.connection)
            with translated_errors("could not be read"):
                await self.connection.transaction(isolation="repeatable_read", readonly=True).start()

        self.run(begin())

    def refuse_other_role(self) -> None:
        """Refuse a role that does not own the ledger; raises LedgerProblem as `begin_snapshot` does, too."""
        self.run(check_schema(self.connection))
        self.run(check_owner(self.connection))

    def head(self) -> LogHead:
        return LogHead(*(self._fetch("SELECT position, hash, recorded_at FROM head") or [()])[0])

    def raw_rows(self) -> Iterator[RawRow]:
        """Yield positions, bodies and hashes of all events."""
        after = -1
        while found := self._fetch(
            "SELECT position, convert_to(body, 'UTF8'), hash FROM events"
            " WHERE position > $1 ORDER BY position LIMIT $2",
            after,
            PAGE,
        ):
            yield from ((position, body, digest) for position, body, digest in found)
            after = found[-1][0]

    def _fetch(self, query: str, *values: object) -> list[Sequence[Any]]:
        async def fetch() -> list[Sequence[Any]]:
            with translated_errors("could not be read"):
                return await self.connection.fetch(query, *values)

        return self.run(fetch())


@contextmanager
def open_database(address: str) -> Iterator[DatabaseLedger]:
    """Connect to a database for a command, which reads or copies a whole ledger.

    Raises:
        LogUnavailable: `log_unavailable`, here or in the block, the database refuses, or does not answer.
    """
    with asyncio.Runner() as runner:
        try:
            connection = runner.run(connect(address, command_s=None, **_OF_COMMANDS))
            try:
                yield DatabaseLedger(runner, connection)
            finally:
                runner.run(close(connection))
        except StorageError as error:
            raise LogUnavailable(str(error)) from error
