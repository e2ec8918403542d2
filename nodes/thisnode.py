"""This server as a node of several: its log in a database, its membership, and its description of itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TypeVar

from aiohttp import web
from msgspec.structs import replace

from answers.health import NotReady
from answers.models import ModelInfo
from answers.nodes import NodeInfo
from events.clock import seconds_between
from events.commands import Receipt
from events.errors import LedgerProblem
from events.models import Model
from events.types import LoadParameters
from features.nodes.commands import JoinNode
from features.nodes.members import make_node_infos
from features.rooms import ATTRIBUTES, list_demands
from nodes.copies import count_copies
from nodes.duties import find_node
from nodes.forwarding import Forwarder
from nodes.membership import Membership
from nodes.peers import Peers
from nodes.placement import NodeHints, find_usable, meets
from nodes.spread import CopyFigures, measure_copy
from runtime.consumer.usage import list_usage
from runtime.scheduler.view import Policy
from runtime.store.store import Store
from server.api.events import PROVER
from server.appkeys import POLICY, POOL, VERSIONS
from server.auth.gate import Verifier
from server.auth.keys import keys_folder, list_keys, public_pem
from server.config import Config, ConfigError, parse_node_attributes

MAX_DIGESTS = 2_000
"""Files that a node says it has: 140 KB in its row of the database."""

MAX_AWAY_S = 600.0
"""How long a node serves that is cut from the database: longer than an outage that somebody is working on."""
AWAY_SHARE = 2 / 3
"""Of the lease: a node that is not to serve then has ended its workers before others load its models."""

INSTALL = "pip install 'loadledger[postgres]'"

T = TypeVar("T")


class ThisNode(Forwarder):
    """This server among the nodes of a ledger in a database, of which the data directory has a replica.

    Raises:
        ConfigError: the driver is not installed, or the node's address is not known.
        KeyProblem: `ledger.key` cannot be read.

    Attributes:
        membership: its membership.
    """

    _renewing: asyncio.Task[None] | None = None

    def __init__(self, config: Config, verifier: Verifier) -> None:
        try:
            from nodes.postgres.connection import DatabaseClock  # noqa: PLC0415 - of an extra
            from nodes.postgres.leases import LeaseStore  # noqa: PLC0415
            from nodes.postgres.log import SharedLog  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(f"--ledger: {error.name} is not installed: {INSTALL}") from None
        address, clock = config.ledger or "", DatabaseClock()
        self._config = config
        self._address = _find_address(config)
        self._leases = LeaseStore(address)
        log, node_id = SharedLog(address, config.data, clock), config.node_name or socket.gethostname()
        peers = Peers(config.data, node_id, log, verifier, lambda: clock().timestamp())
        self.sign, self.verify_forwarded = peers.sign, peers.verify_forwarded
        self.membership = Membership(
            log,
            self._leases,
            node_id,
            lease_s=config.lease_s,
            away_limit_s=MAX_AWAY_S if config.when_away == "serve" else config.lease_s * AWAY_SHARE,
            serves_sick=config.when_away == "serve",
            set_epoch=log.set_epoch,
            end_workers=self._end_workers,
            open_signer=peers.open_signer,
        )
        super().__init__(node_id, log, self.membership, peers, timeout_s=config.inference_timeout_s)

    @staticmethod
    def check_keys(data: Path) -> None:
        """Check that a data directory has keys, by which nodes know each other.

        Raises:
            ConfigError: it has none.
        """
        if not list_keys(data):
            raise ConfigError(
                f"--ledger: {keys_folder(data)} has no key, and nodes know each other by keys that they"
                " share: copy the folder from another node;"
                f" `loadledger key rotate --data {data}` makes the first one"
            )

    async def open(self, check: Callable[[], Awaitable[T]], open_files: Callable[[], Awaitable[None]]) -> T:
        await open_files()
        await self.log.open()
        return await check()  # only now the replica has what the database has

    async def begin(self, app: web.Application) -> Receipt:
        """Join, and renew the lease from now on.

        Raises:
            NameInUse: `node_name_in_use`.
            LogUnavailable: `log_unavailable`.
        """
        pool, policy, store = app[POOL], app[POLICY], app[VERSIONS].store
        attributes = set(chain.from_iterable(each(pool) for each in ATTRIBUTES))
        if self._config.node_attributes is not None:
            attributes.update(parse_node_attributes(self._config.node_attributes))
        command = JoinNode(
            self.name,
            self._address,
            tuple(sorted(attributes)),
            policy.budget_bytes,
            version("loadledger"),
            public_pem(app[PROVER].signer),
            confinement=pool.applied.confinement,
        )
        receipt = await self.membership.start(command, lambda: self._measure(policy, store))
        self._renewing = asyncio.create_task(self.membership.run(), name="membership")
        return receipt

    async def leave(self, end_work: Callable[[], Awaitable[None]]) -> None:
        await end_work()
        with suppress(LedgerProblem):  # the other nodes find this one late
            await self.membership.leave()

    async def record_stop(self) -> None:
        """Record nothing: it has left."""

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        await self._leases.close()
        await self.log.close()

    def tasks(self) -> Mapping[str, asyncio.Task[None]]:
        return {} if self._renewing is None else {"membership": self._renewing}

    def checks(self) -> Mapping[str, bool]:
        """Return whether it can do its work, so that the others need not load its models.

        Without the log it goes on to answer inferences for a while.
        """
        log = self.log.healthy or self.membership.may_serve
        return {"log": log, "lease": not self.membership.is_sick}

    def problem(self) -> NotReady | None:
        problem = self.membership.problem
        if problem is None:
            return None
        return NotReady(
            check="lease",
            cause=f"the lease is not renewed: {problem}",
            cure="check the ledger's database, and the network to it",
        )

    def count_missing(self, models: Iterable[Model]) -> int:  # noqa: ARG002 - others have them
        return 0

    def describe(self) -> list[NodeInfo]:
        """Return all nodes as this one knows them; without the database it knows that it is late itself."""
        late = {self.name} if self.membership.is_late else frozenset[str]()
        free_bytes = {name: hints.free_bytes for name, hints in self.membership.peers.items()}
        known = self.log.state, self.membership.leases, self.name, late, self._untrusted()
        return make_node_infos(*known, free_bytes=free_bytes)

    def complete_answer(self, shown: ModelInfo, model: Model) -> ModelInfo:
        if shown.copies is None:
            return shown
        ready, waiting_for = count_copies(self.log.state, self._untrusted(), model)
        return replace(shown, copies_ready=ready, copies_waiting_for=waiting_for)

    def can_run(self, parameters: LoadParameters) -> bool:
        nodes = self.log.state.registers.nodes
        usable = find_usable(self.log.state, self._untrusted())
        return any(meets(list_demands(parameters), nodes[node_id]) for node_id in usable)

    def has_duty(self, duty: str) -> bool:
        """Whether this node does the work; not before it has read what others, also gone ones, said of it."""
        members = self.membership
        if not members.leases or members.is_outdated or members.is_late:
            return False
        hints = {**members.peers, self.name: NodeHints(1, duties=self.duties)}
        nodes = self.log.state.registers.nodes.values()
        return find_node(duty, nodes, hints, self._untrusted()) == self.name

    def read_handovers(self, duty: str) -> Sequence[str]:
        return [hints.duties[duty] for hints in self.membership.peers.values() if duty in hints.duties]

    async def _measure(self, policy: Policy, store: Store | None) -> NodeHints:
        """Return the hints for placing loads here.

        Args:
            policy: has the memory budget, and the most models.
            store: the versions that are here.
        """
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
            dict(self.duties),
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


def _find_address(config: Config) -> str:
    """Return the URL at which other nodes reach this one.

    Raises:
        ConfigError: the port is not known before the server listens.
    """
    if config.node_address is not None:
        return config.node_address.rstrip("/")
    if not config.port:
        raise ConfigError("--node-address: must be given with --port 0")
    return f"{'http' if config.tls_cert is None else 'https'}://{socket.gethostname()}:{config.port}"
