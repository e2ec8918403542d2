"""`Storage` for one of several servers: append in the database, then store the rows in this server's replica.

The replica is a ledger in SQLite like that of a single server, and serves all reads. It is never ahead of the
database: a group is stored in it after the COMMIT in the database. The writer later reads what it lacks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from events.codec import hash_body
from events.errors import LedgerForked, LedgerProblem, LogUnavailable
from events.sqlite.datalock import LEDGER, mark_replica
from events.sqlite.storage import Database
from events.state import Changes, KnownRequests
from events.storage import LogHead, Row, StorageError, StoredLedger
from nodes.postgres.connection import (
    NO_LIMIT_S,
    Connection,
    DatabaseClock,
    HeadMoved,
    close,
    commit,
    connect,
    describe_address,
    measure_clock,
    translated_errors,
)
from nodes.postgres.schema import check_role, check_schema, describe_durability

_log = logging.getLogger(__name__)

CHANNEL = "loadledger"
"""The channel of `append`'s notifications; they carry no data, so a lost one loses nothing."""

POLL_S = 2.0
"""Interval of reading new events without a notification, such as over a connection that was cut."""

PAGE = 2_000
"""Events that the writer reads at once while it catches up: a fifth less work than with half of it, since
repeated changes of a model or job are stored once. The event loop folds them in 20 ms."""


class Authority(NamedTuple):
    """The node, epoch and lease in seconds of a server's appends; None for a writer that is no node."""

    node_id: str | None = None
    epoch: int | None = None
    lease_s: float | None = None


class ReplicatedStorage:
    """The log in PostgreSQL, and this server's replica of it.

    Args:
        address: the database's address.
        data: this server's data directory, whose ledger no other process writes.
        clock: set to the database's time at each connection.
        on_change: called when another server has appended.

    Attributes:
        authority: the node, epoch and lease of its appends.
    """

    def __init__(
        self, address: str, data: Path, clock: DatabaseClock, *, on_change: Callable[[], None]
    ) -> None:
        self._address = address
        self._data = data
        self._replica = Database(data / LEDGER, is_replica=True)
        self._clock = clock
        self._connection: Connection | None = None
        self._is_locked = False
        self._on_change = on_change
        self._is_notified = False
        self._was_open = False
        self._is_marked = False
        self._read_s = 0.0
        self.authority = Authority()

    @property
    def is_open(self) -> bool:
        """Whether both the database and the replica are open."""
        return self._replica.is_open and self._connection is not None and not self._connection.is_closed()

    @property
    def has_news(self) -> bool:
        """Whether a NOTIFY arrived, or the poll interval has passed."""
        return self._is_notified or time.monotonic() - self._read_s >= POLL_S

    async def open(self) -> StoredLedger:
        """Open the replica, connect, and read the replica's state; the caller then catches up.

        Raises:
            LedgerForked: `ledger_forked`, the database does not have the replica's head.
            LedgerProblem: `schema_missing`, `schema_outdated`, `future_schema`, `foreign_database`,
                `unsafe_role`.
            LogUnavailable: `log_unavailable`, the replica or the database cannot be opened.
        """
        if self._replica.is_open:
            await self._replica.close_after_error()
        stored = await self._replica.open()
        try:
            self._connection = await connect(self._address)
            await self._prepare(self._connection)
        except StorageError as error:
            self._cut()
            raise LogUnavailable(f"the ledger cannot be opened: {error}") from error
        except LedgerProblem as error:
            self._cut()
            if not self._was_open:
                raise
            raise LogUnavailable(f"the ledger cannot be opened any more: {error}") from error
        except BaseException:
            self._cut()
            raise
        self._is_notified = self._was_open = True
        return stored

    async def _prepare(self, connection: Connection) -> None:
        await check_schema(connection)
        await check_role(connection)
        with translated_errors("cannot be followed"):
            await connection.add_listener(CHANNEL, self._heard)
            self._clock.offset = await measure_clock(connection)
        shown = describe_address(self._address)
        _log.info("the ledger is in %s; %s", shown, await describe_durability(connection))

    def _heard(self, connection: object, pid: int, _channel: str, _payload: object) -> None:
        """Note that another server has appended; this server knows its own appends."""
        own = self._connection
        if own is not None and connection is own and pid != own.get_server_pid():
            self._is_notified = True
            self._on_change()

    async def append(self, rows: Sequence[Row], changes: Changes, after: LogHead) -> None:
        """Append in the database, durably, then store the rows in the replica.

        Raises:
            HeadMoved: the database's head is not `after`; nothing was appended.
            EpochOver: `log_unavailable`, this node was declared lost; nothing was appended.
            NodeAlive: `node_alive`, the events declare the loss of a present node; nothing was appended.
        """
        connection = self._connected
        with translated_errors("could not be written"):
            appending = connection.fetchval(
                "SELECT append($1, $2, $3, $4, $5, $6, $7)",
                after.position,
                after.hash,
                [row.body for row in rows],
                [row.hash for row in rows],
                *self.authority,
                timeout=NO_LIMIT_S,
            )
            if await commit(connection, appending) != "appended":
                raise HeadMoved
            if self._is_locked:
                self._is_locked = False
                await commit(connection, connection.execute("COMMIT", timeout=NO_LIMIT_S))
        await self._replica.append(rows, changes, after)

    async def read_after(self, head: LogHead) -> Sequence[Row]:
        """Return the next events after `head`; none if `head` is the database's head.

        Raises:
            LedgerForked: `ledger_forked`, the database has another event at the head's position, or none.
        """
        self._is_notified, self._read_s = False, time.monotonic()
        with translated_errors("could not be read"):
            found = await self._connected.fetch(
                "SELECT position, body, hash FROM events WHERE position > $1 ORDER BY position LIMIT $2",
                head.position,
                PAGE,
            )
            rows = [Row(position, body, digest) for position, body, digest in found]
            if not rows or rows[0].position != head.position + 1:
                await self._check_end(head)
        before = head
        for row in rows:
            if row.hash != hash_body(before.hash, row.body):
                raise forked(self._address, before)
            before = LogHead(row.position, row.hash)
        if len(rows) == PAGE:
            self._is_notified = True
        if not self._is_marked:  # now it is certain that the file and the database have one history
            await asyncio.to_thread(mark_replica, self._data, describe_address(self._address))
            self._is_marked = True
        return rows

    async def _check_end(self, head: LogHead) -> None:
        position, digest = await self._connected.fetchrow("SELECT position, hash FROM head") or (-1, b"")
        if position < head.position or (position == head.position and digest != head.hash):
            raise forked(self._address, head)

    async def store(self, rows: Sequence[Row], changes: Changes, after: LogHead) -> None:
        """Store events of other servers in the replica; the arguments are those of `append`."""
        await self._replica.append(rows, changes, after)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Keep other servers from appending until `append` has committed, or the block ends."""
        with translated_errors("could not be locked"):
            await self._connected.execute("BEGIN")
            self._is_locked = True
            await self._connected.execute("SELECT lock_head()")
        try:
            yield
        finally:
            is_locked, self._is_locked = self._is_locked, False
            if is_locked and self.is_open:
                with translated_errors("could not be unlocked"):
                    await self._connected.execute("ROLLBACK")

    async def contains(self, head: LogHead) -> bool:
        """Whether the database has this event, including its synchronous standby, if any.

        An append of another session may wait for the standby: it is not yet visible, or no longer waits. The
        probe's commit comes after it, and waits, too.
        """
        await self._probe_database()
        with translated_errors("could not be read"):
            return bool(
                await self._connected.fetchval(
                    "SELECT EXISTS (SELECT FROM events WHERE position = $1 AND hash = $2)",
                    head.position,
                    head.hash,
                )
            )

    async def read_requests(
        self, hashes: AbstractSet[str], joinable: AbstractSet[tuple[str, str]]
    ) -> KnownRequests:
        return await self._replica.read_requests(hashes, joinable)

    async def note_last_use(self, used: Mapping[str, str], seen_at: str) -> None:
        await self._replica.note_last_use(used, seen_at)

    async def probe(self) -> None:
        await self._probe_database()
        await self._replica.probe()

    async def checkpoint(self) -> bool:
        return await self._replica.checkpoint()

    async def close_after_error(self, error: StorageError | None = None) -> None:
        """Close both after an error; the connection is cut, since closing it would cancel its statement."""
        self._cut()
        if self._replica.is_open:
            await self._replica.close_after_error(error)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await close(connection)
        await self._replica.close()

    async def _probe_database(self) -> None:
        connection = self._connected
        with translated_errors("could not be written"):
            await commit(connection, connection.execute("SELECT probe()", timeout=NO_LIMIT_S))

    @property
    def _connected(self) -> Connection:
        if self._connection is None:
            raise StorageError("the ledger's database is not connected")
        return self._connection

    def _cut(self) -> None:
        connection, self._connection, self._is_locked = self._connection, None, False
        if connection is not None:
            connection.terminate()


def forked(address: str, head: LogHead) -> LedgerForked:
    return LedgerForked(
        f"{describe_address(address)} does not have the event at position {head.position} with the hash "
        f"{head.hash.hex()}, which this server has in its ledger.db: the database lost or changed events, or "
        "it is another ledger's, like one that a server alone began in this data directory: begin with an "
        "empty one, or `loadledger migrate --data`. Compare with `loadledger verify`, on the database and on "
        "each data directory"
    )
