"""This server as a node of several: its log in a database, its membership, and what it says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain

from events.commands import JoinNode, Receipt
from events.types import Confinement
from runtime.consumer.consumer import Consumer
from runtime.membership import Membership
from runtime.optimised.key import make_key
from runtime.optimised.store import OptimisedStore
from runtime.scheduler.view import NodeHints
from runtime.store.store import Store
from server.auth.gate import Verifier
from server.auth.peers import Peers
from server.config import Config, ConfigError

MAX_DIGESTS = 2_000
"""Files that a node says it has: 140 KB in its row of the database."""

INSTALL = "pip install 'loadledger[postgres]'"


class ThisNode:
    """This server among the nodes of a ledger in a database, of which the data directory has a replica.

    Raises:
        ConfigError: the driver is not installed, or the node's address is not known.
        KeyProblem: `ledger.key` cannot be read.

    Attributes:
        log: not open yet.
        peers: what this node knows of the others by their keys.
        membership: as which it joined.
        renewing: renews its lease.
    """

    membership: Membership
    renewing: asyncio.Task[None] | None = None

    def __init__(self, config: Config, address: str, verifier: Verifier) -> None:
        try:
            from events.postgres.connection import DatabaseClock  # noqa: PLC0415 - of an extra
            from events.postgres.leases import LeaseStore  # noqa: PLC0415
            from events.postgres.log import SharedLog  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(f"--ledger: {error.name} is not installed: {INSTALL}") from None
        clock = DatabaseClock()
        self._config = config
        self._address = config.own_address()
        self._leases = LeaseStore(address)
        self.id = config.node_id()
        self.log = SharedLog(address, config.data, clock)
        self.peers = Peers(config.data, self.id, self.log, verifier, lambda: clock().timestamp())

    async def join(self, *, budget_bytes: int | None, public_key: str, confinement: Confinement) -> Receipt:
        """Join, and renew the lease from now on.

        Raises:
            NameInUse: `node_name_in_use`.
            LogUnavailable: `log_unavailable`.
        """
        command = JoinNode(
            self.id,
            self._address,
            self._config.labels(),
            budget_bytes,
            version("loadledger"),
            public_key,
            confinement=confinement,
        )
        self.membership = Membership(
            self.log,
            self._leases,
            command,
            lease_s=self._config.lease_s,
            away_limit_s=self._config.away_limit_s(),
            serves_sick=self._config.when_away == "serve",
            set_epoch=self.log.set_epoch,
            open_signer=self.peers.open_signer,
        )
        receipt = await self.membership.start()
        self.renewing = asyncio.create_task(self.membership.run(), name="membership")
        return receipt

    def attach(self, consumer: Consumer, store: Store | None, optimised: OptimisedStore | None) -> None:
        """Let the consumer work as this node, and the node say of itself what helps to place loads."""

        def change() -> None:
            consumer.set_node(self.id, self.membership.epoch)

        self.membership.hints = partial(self._describe, consumer, store, optimised)
        self.membership.on_change = change
        self.membership.end_workers = consumer.end_workers
        change()

    async def close(self) -> None:
        if self.renewing is not None:
            self.renewing.cancel()
            await asyncio.wait([self.renewing])
        await self._leases.close()

    async def _describe(
        self, consumer: Consumer, store: Store | None, optimised: OptimisedStore | None
    ) -> NodeHints:
        position, policy, uses = self.log.head.position, consumer.policy, consumer.uses()
        taken = sum(max(use.reserved_bytes, use.memory_bytes) for use in uses)
        models = len({use.model_id for use in uses})
        versions = {} if store is None else store.stored_versions()
        prepared = await asyncio.to_thread(_find_prepared, optimised, versions)
        return NodeHints(
            position,
            None if policy.budget_bytes is None else policy.budget_bytes - taken,
            None if policy.max_loaded is None else policy.max_loaded - models,
            frozenset(list(chain.from_iterable(versions.values()))[:MAX_DIGESTS]),
            frozenset(prepared[:MAX_DIGESTS]),
        )


def _find_prepared(store: OptimisedStore | None, versions: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the files of the versions that have an optimised model."""
    if store is None:
        return []
    entries = ((files, store.find(make_key(digest))) for digest, files in versions.items())
    return [file for files, entry in entries if entry is not None and entry.files for file in files]
