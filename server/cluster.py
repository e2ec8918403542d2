"""This server as a node of several: its log in a database, its membership, and what it says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain

from aiohttp import web

from events.commands import JoinNode, Receipt
from events.types import Confinement
from runtime.cache.key import make_key
from runtime.cache.store import ModelCache
from runtime.membership import Membership, OpenSigner
from runtime.scheduler.view import NodeHints
from server.appkeys import CONSUMER, CONTENTS, LOG, MEMBERSHIP
from server.auth.gate import Verifier
from server.auth.peers import Peers
from server.config import Config, ConfigError

MAX_DIGESTS = 2_000
"""Files that a node says it has: 140 KB in its row of the database."""

INSTALL = "pip install 'loadledger[postgres]'"


class SharedLedger:
    """A ledger in a database, of which the data directory has a replica.

    Raises:
        ConfigError: the driver is not installed, or the node's address is not known.

    Attributes:
        log: not open yet.
    """

    def __init__(self, config: Config, address: str) -> None:
        try:
            from events.postgres.connection import DatabaseClock  # noqa: PLC0415 - of an extra
            from events.postgres.leases import LeaseStore  # noqa: PLC0415
            from events.postgres.log import SharedLog  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(f"--ledger: {error.name} is not installed: {INSTALL}") from None
        clock = DatabaseClock()
        self._config = config
        self._node_address = config.own_address()
        self._clock = clock
        self._leases = LeaseStore(address)
        self._tasks = list[asyncio.Task[None]]()
        self.log = SharedLog(address, config.data, clock)

    def open_peers(self, verifier: Verifier) -> Peers:
        """Return what this node knows of the others by their keys.

        Raises:
            KeyProblem: `ledger.key` cannot be read.
        """
        config, now_s = self._config, lambda: self._clock().timestamp()
        return Peers(config.data, config.node_id(), self.log, verifier, now_s)

    async def join(
        self, *, open_signer: OpenSigner, budget_bytes: int | None, public_key: str, confinement: Confinement
    ) -> tuple[Membership, asyncio.Task[None], Receipt]:
        """Join as a node; the task renews the lease from now on.

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
        membership = Membership(
            self.log,
            self._leases,
            command,
            lease_s=self._config.lease_s,
            away_limit_s=self._config.away_limit_s(),
            serves_sick=self._config.when_away == "serve",
            set_epoch=self.log.set_epoch,
            open_signer=open_signer,
        )
        receipt = await membership.start()
        renewing = asyncio.create_task(membership.run(), name="membership")
        self._tasks.append(renewing)
        return membership, renewing, receipt

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
            await asyncio.wait([task])
        await self._leases.close()


def attach_node(app: web.Application, cache: ModelCache | None) -> None:
    membership, consumer = app[MEMBERSHIP], app[CONSUMER]

    def change() -> None:
        consumer.set_node(membership.node_id, membership.epoch)

    membership.hints = partial(_describe_node, app, cache)
    membership.on_change = change
    membership.end_workers = consumer.end_workers
    change()


async def _describe_node(app: web.Application, cache: ModelCache | None) -> NodeHints:
    consumer, store = app[CONSUMER], app[CONTENTS].store
    position, policy, uses = app[LOG].head.position, consumer.policy, consumer.uses()
    taken = sum(max(use.reserved_bytes, use.memory_bytes) for use in uses)
    models = len({use.model_id for use in uses})
    versions = {} if store is None else store.stored_versions()
    prepared = await asyncio.to_thread(_find_prepared, cache, versions)
    return NodeHints(
        position,
        None if policy.budget_bytes is None else policy.budget_bytes - taken,
        None if policy.max_loaded is None else policy.max_loaded - models,
        frozenset(list(chain.from_iterable(versions.values()))[:MAX_DIGESTS]),
        frozenset(prepared[:MAX_DIGESTS]),
    )


def _find_prepared(cache: ModelCache | None, versions: Mapping[str, Sequence[str]]) -> list[str]:
    if cache is None:
        return []
    found = (files for digest, files in versions.items() if cache.find(make_key(digest)) is not None)
    return list(chain.from_iterable(found))
