"""This server as a node of several: its log in a database, its membership, and what it says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain

from aiohttp import web

from answers.nodes import NodeInfo
from events.clock import seconds_between
from events.commands import Receipt
from events.models import Model
from events.values import Confinement, NodeSignature
from features.nodes.commands import JoinNode
from nodes.copies import count_copies
from nodes.decisions import NodePlacement
from nodes.membership import Membership
from nodes.peers import Peers
from nodes.placement import NodeHints, find_usable, has_device, list_device_attributes
from nodes.routes import make_node_infos
from nodes.spread import CopyFigures, measure_copy
from runtime.consumer.running import RunningLoad
from runtime.consumer.usage import list_usage
from runtime.scheduler.view import Policy
from runtime.store.store import Store
from server.auth.gate import Verifier
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
        loads: the running loads, by job id, as the consumer keeps them.
        membership: as which it joined.
        placement: its share of the work.
    """

    membership: Membership
    placement: NodePlacement
    _renewing: asyncio.Task[None] | None = None

    def __init__(self, config: Config, address: str, verifier: Verifier) -> None:
        try:
            from nodes.postgres.connection import DatabaseClock  # noqa: PLC0415 - of an extra
            from nodes.postgres.leases import LeaseStore  # noqa: PLC0415
            from nodes.postgres.log import SharedLog  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(f"--ledger: {error.name} is not installed: {INSTALL}") from None
        clock = DatabaseClock()
        self._config = config
        self._address = config.own_address()
        self._leases = LeaseStore(address)
        self.id = config.node_id()
        self.loads: dict[str, RunningLoad] = {}
        self.log = SharedLog(address, config.data, clock)
        self.peers = Peers(config.data, self.id, self.log, verifier, lambda: clock().timestamp())

    async def join(
        self,
        policy: Policy,
        store: Store | None,
        *,
        public_key: str,
        confinement: Confinement,
        devices: Iterable[str] = (),
    ) -> Receipt:
        """Join, and renew the lease from now on.

        Args:
            policy: has the memory budget, and the most models.
            store: the versions that are here.
            public_key: with which the others verify what this node forwards.
            confinement: of its workers.
            devices: names of those that it has beside the CPU.

        Raises:
            NameInUse: `node_name_in_use`.
            LogUnavailable: `log_unavailable`.
        """
        command = JoinNode(
            self.id,
            self._address,
            tuple(sorted({*self._config.own_attributes(), *list_device_attributes(devices)})),
            policy.budget_bytes,
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
            describe=partial(self._measure, policy, store),
            end_workers=self._end_workers,
            open_signer=self.peers.open_signer,
        )
        self.placement = NodePlacement(self.id, self.membership, self.peers, self.peers.untrusted)
        receipt = await self.membership.start()
        self._renewing = asyncio.create_task(self.membership.run(), name="membership")
        return receipt

    @property
    def may_serve(self) -> bool:
        return self.membership.may_serve

    @property
    def is_sick(self) -> bool:
        return self.membership.is_sick

    @property
    def problem(self) -> str | None:
        return self.membership.problem

    def tasks(self) -> Mapping[str, asyncio.Task[None]]:
        return {} if self._renewing is None else {"membership": self._renewing}

    def describe(self) -> list[NodeInfo]:
        """Return all nodes as this one knows them; without the database it knows that it is late itself."""
        late = {self.id} if self.membership.is_late else frozenset[str]()
        return make_node_infos(self.log.state, self.membership.leases, self.id, late, self.peers.untrusted())

    def count_copies(self, model: Model) -> tuple[int, str | None]:
        """Return how many copies of a model are ready, and what the missing ones wait for."""
        return count_copies(self.log.state, self.peers.untrusted(), model)

    def has_device(self, devices: Sequence[str]) -> bool:
        """Whether any node that takes loads has one of these devices."""
        nodes = self.log.state.registers.nodes
        usable = find_usable(self.log.state, self.peers.untrusted())
        return any(has_device(devices, nodes[node_id]) for node_id in usable)

    def sign(self, statement: bytes) -> NodeSignature:
        """Sign what a person said to this node, so that the others believe it."""
        return self.peers.sign(statement)

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        await self._leases.close()

    async def _measure(self, policy: Policy, store: Store | None) -> NodeHints:
        """Return what helps to place loads here."""
        position = self.log.head.position
        uses = list_usage(self.loads.values(), self.log.state, self.log.now())
        taken = sum(max(use.reserved_bytes, use.memory_bytes) for use in uses)
        models = len({use.model_id for use in uses})
        versions = {} if store is None else store.stored_versions()
        return NodeHints(
            position,
            None if policy.budget_bytes is None else policy.budget_bytes - taken,
            None if policy.max_loaded is None else policy.max_loaded - models,
            frozenset(list(chain.from_iterable(versions.values()))[:MAX_DIGESTS]),
            self._measure_copies(),
        )

    def _measure_copies(self) -> Mapping[str, CopyFigures]:
        """Return how busy the copies here are, of the models that have several."""
        figures, now = dict[str, CopyFigures](), self.log.now()
        for load in self.loads.values():
            model = self.log.state.models.get(load.model_id)
            serving = model.find_serving(load.job_id) if model is not None and model.copies else None
            if serving is not None:
                figures[load.model_id] = measure_copy(load, seconds_between(serving.loaded_at, now))
        return figures

    def _end_workers(self) -> None:
        """Kill all workers; exits are recorded once the log can be written, and loads begin again."""
        for load in self.loads.values():
            load.kill()


THIS_NODE = web.AppKey("node", ThisNode)
"""This server as a node, once it has joined."""
