"""The leases of nodes: their rows in the database, renewed and judged by the database's clock alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from events.clock import format_timestamp
from features.nodes.register import Lease
from nodes.postgres.connection import Connection, close, connect, translated_errors


class LeaseStore:
    """The table of leases, over a connection of its own: a connection serves one task.

    Args:
        address: the database's address.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._connection: Connection | None = None

    async def renew(self, node_id: str, epoch: int, lease_s: float, hints: str, limit_s: float) -> bool:
        """Renew the lease of an epoch; return False if the epoch is over. An error leaves that open."""
        async with self._connected(limit_s) as connection:
            return bool(
                await connection.fetchval("SELECT renew($1, $2, $3, $4)", node_id, epoch, lease_s, hints)
            )

    async def read(self, limit_s: float) -> tuple[Lease, ...]:
        """Return all leases, by the names of their nodes."""
        async with self._connected(limit_s) as connection:
            rows = await connection.fetch(
                "SELECT node_id, epoch, ended, renewed_at, hints, instance,"
                " renewed_at + lease_s * interval '1 second' < clock_timestamp() FROM nodes ORDER BY node_id"
            )
        return tuple(
            Lease(node_id, epoch, ended, is_late, format_timestamp(renewed_at), hints, instance)
            for node_id, epoch, ended, renewed_at, hints, instance, is_late in rows
        )

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await close(connection)

    @asynccontextmanager
    async def _connected(self, limit_s: float) -> AsyncIterator[Connection]:
        """Connect if necessary; after an error, or a timeout, the connection is given up."""
        try:
            with translated_errors("did not take a lease"):
                async with asyncio.timeout(limit_s):
                    if self._connection is None:
                        # An absent standby must end no lease. A promoted standby without the last renewals
                        # makes no node late: a node that declares a loss has itself renewed there for a
                        # lease.
                        self._connection = await connect(self._address, synchronous_commit="local")
                    yield self._connection
        except BaseException:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.terminate()
            raise
