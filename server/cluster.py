"""This server as a node of several: its log in a database, its membership, and what it says of itself."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from events.commands import JoinNode, Receipt
from events.log import Log
from events.nodes import Confinement
from events.sqlite.datalock import LEDGER
from runtime.membership import Membership
from server.config import Config, ConfigError

INSTALL = "pip install 'loadledger[postgres]'"


class SharedLedger:
    """A ledger in a database, of which the data directory has a replica.

    Raises:
        ConfigError: the driver is not installed, or the node's address is not known.

    Attributes:
        log: not open yet.
        membership: of this node; None before `join`.
    """

    def __init__(self, config: Config, address: str) -> None:
        try:
            from events.postgres.connection import DatabaseClock  # noqa: PLC0415 - of an extra
            from events.postgres.leases import LeaseStore  # noqa: PLC0415
            from events.postgres.storage import Authority, ReplicatedStorage  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(f"--ledger: {error.name} is not installed: {INSTALL}") from None
        clock = DatabaseClock()
        storage = ReplicatedStorage(address, config.data, clock)

        def authorise(node_id: str, epoch: int | None, lease_s: float) -> None:
            storage.authority = Authority(node_id, epoch, lease_s)

        self._config = config
        self._node_address = config.own_address()
        self._authorise = authorise
        self._leases = LeaseStore(address)
        self._running: asyncio.Task[None] | None = None
        self.log = Log(config.data / LEDGER, storage=storage, now=clock)
        self.membership: Membership | None = None

    async def join(
        self, *, budget_bytes: int | None, public_key: str, confinement: Confinement
    ) -> tuple[Membership, Receipt]:
        """Join as a node, and renew the lease from now on.

        Raises:
            NameInUse: `node_name_in_use`.
            LogUnavailable: `log_unavailable`.
        """
        command = JoinNode(
            self._config.node_id(),
            self._node_address,
            self._config.labels(),
            budget_bytes,
            version("loadledger"),
            public_key,
            confinement=confinement,
        )
        self.membership = membership = Membership(
            self.log, self._leases, command, lease_s=self._config.lease_s, authorise=self._authorise
        )
        receipt = await membership.start()
        self._running = asyncio.create_task(membership.run(), name="membership")
        return membership, receipt

    async def close(self) -> None:
        """Stop renewing."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        await self._leases.close()
