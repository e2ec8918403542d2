"""Nodes of one ledger as real `serve` processes: started, stopped, killed, frozen, cut off, under load.

    async with clustered(folder, server) as cluster, cluster.traffic(dice, cluster.fleet.ids):
        await cluster.nodes["n1"].kill()
        await cluster.until(lambda state: state.registers.nodes["n1"].phase is NodePhase.LOST)

Each node has an address of its own, so that no other process takes its port while it is down, and a proxy
before the database. All of them have the same keys and the same repository.
"""

import asyncio
import itertools
import random
import resource
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import aiohttp

from events.models import Model
from events.sqlite.datalock import LEDGER
from events.sqlite.queries import read_head, read_state
from events.state import State
from events.storage import LogHead
from features.nodes.register import NodePhase
from runtime.scheduler.scheduler import is_crash_loop
from server.config import Config
from support.cutting import CuttingProxy, cutting_proxy
from support.disks import FreezableDisk
from support.fleet import UNLIMITED, Fleet, Source, check_inference, of_both, question
from support.http import Answer, Api, Json, when
from support.nodes import share_keys
from support.postgres import Address, Database, PostgresServer, free_address
from support.replicas import change, make_ledger
from support.servers import Server, limited, serving

LEASE_S = of_both(short=16.0, long=8.0)
"""As little as a busy machine allows: a third of it is the time limit of a renewal, connecting included. With
8 s, which are enough for a long run alone, nodes were lost beside two other suites on two cores."""
REQUEST_S = 30.0
"""How long a client waits for a server that may be frozen or cut off."""
SETTINGS = (f"--lease-s={LEASE_S}", "--drain-timeout-s=5", *UNLIMITED)
MODELS = 8
LITTLE, WRITABLE = 2**12, 2**40
"""File sizes: without room for a transaction in the write-ahead log, and that nothing reaches."""

Place = tuple[str, str, str]
"""A node, a model, and the job of its load."""


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """An inference that was answered.

    Attributes:
        source: the load that answered.
        node_id: the node that names itself.
        known: how far that node had read the log before it was asked; 0 if nobody asked.
    """

    source: Source
    node_id: str
    known: int


LOST_CONNECTION = (aiohttp.ClientError, TimeoutError, OSError)


@dataclass(slots=True)
class ClusterNode:
    """One node, running or not.

    Attributes:
        name: its id.
        config: its data directory, and the repository.
        database: of the ledger.
        proxy: between the node and the database.
        settings: of its server, beside and before the usual ones.
        disk: on which its data directory is, if a test may freeze that.
        is_frozen: whether its server process was stopped with SIGSTOP.
        has_frozen_disk: whether it is frozen; who reads the replica then would hang, too.
    """

    name: str
    config: Config
    database: Database
    proxy: CuttingProxy
    settings: tuple[str, ...] = ()
    disk: FreezableDisk | None = None
    is_frozen: bool = False
    has_frozen_disk: bool = False
    _was_ended: bool = True
    _address: Address = field(default_factory=free_address)
    _server: Server | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def server(self) -> Server:
        """The running server."""
        assert self._server is not None, f"{self.name} does not run"
        return self._server

    @property
    def api(self) -> Api:
        """A client of the running server."""
        return self.server.api

    @property
    def is_running(self) -> bool:
        """Whether its process is there, frozen or not."""
        return self._server is not None and self._server.process.returncode is None

    @property
    def answers(self) -> bool:
        """Whether it runs, and neither it nor its disk is frozen."""
        return self.is_running and not self.is_frozen and not self.has_frozen_disk

    @property
    def replica(self) -> Path:
        """Its replica of the ledger."""
        return self.config.data / LEDGER

    @property
    def output(self) -> str:
        """What it has written to stderr in all its lives."""
        return self.config.data.with_name(f"{self.name}.stderr").read_text(encoding="utf-8", errors="replace")

    async def start(self) -> None:
        """Start the server; it has joined when this returns."""
        await self.close()
        host, port = self._address
        ledger = self.database.url("ledger_server", self.proxy.address)
        arguments = (f"--ledger={ledger}", f"--node-name={self.name}", f"--host={host}", f"--port={port}")
        own = f"--node-address=http://{host}:{port}"
        started = serving(self.config, *arguments, own, *SETTINGS, *self.settings, command=limited())
        self._server = await self._stack.enter_async_context(started)
        self.is_frozen = self._was_ended = False

    async def kill(self) -> None:
        """Kill the server with SIGKILL, and wait until all its processes are gone."""
        self._was_ended = True
        await self.server.kill()
        self.is_frozen = False

    async def stop(self) -> None:
        """Stop the server in order."""
        self._was_ended = True
        assert await self.server.stop() == 0, self.output[-3000:]

    def freeze(self) -> None:
        """Stop the server's process with SIGSTOP; its workers go on."""
        self.server.send(signal.SIGSTOP)
        self.is_frozen = True

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self.server.send(signal.SIGCONT)
        self.is_frozen = False

    def fill_disk(self) -> None:
        """Refuse its writes to files, as a full disk does when the write-ahead log has to grow."""
        resource.prlimit(self.server.pid, resource.RLIMIT_FSIZE, (LITTLE, WRITABLE))

    def freeze_disk(self) -> None:
        """Let its writes hang; not every machine allows that."""
        if self.disk is not None:
            self.disk.freeze()
            self.has_frozen_disk = True

    def mend_disk(self) -> None:
        """Let its writes pass, whether the disk was full or frozen."""
        if self.disk is not None and self.has_frozen_disk:
            self.disk.thaw()
            self.has_frozen_disk = False
        if self.is_running:
            resource.prlimit(self.server.pid, resource.RLIMIT_FSIZE, (WRITABLE, WRITABLE))

    def check_exit(self) -> None:
        """Fail if its server has ended by itself."""
        if not self.is_running and not self._was_ended:
            code = self.server.process.returncode
            raise AssertionError(f"{self.name} ended by itself with {code}: {self.output[-2000:]}")

    async def close(self) -> None:
        """Kill the server if it runs, and close its client."""
        self.mend_disk()
        await self._stack.aclose()
        self._server, self.is_frozen = None, False

    def read_state(self) -> State:
        """Return the state that its replica has stored."""
        with closing(sqlite3.connect(f"file:{self.replica}?mode=ro", uri=True)) as connection:
            return read_state(connection)

    def read_head(self) -> LogHead:
        """Return the head of its replica."""
        with closing(sqlite3.connect(f"file:{self.replica}?mode=ro", uri=True)) as connection:
            return read_head(connection)

    async def catch_up(self) -> None:
        """Wait until its server answers from all that its replica has: it stores events, then folds them."""
        stored = self.read_head().position
        await when(lambda: self.api.get("/api/v1/events/head"), lambda head: head.json["position"] >= stored)

    async def list_live(self) -> set[Place]:
        """Return the loads that have workers at it."""
        uses = (await self.api.get("/api/v1/resources")).json["models"]
        return {(self.name, use["model_id"], use["job_id"]) for use in uses}


@dataclass(slots=True)
class Cluster:
    """Nodes over one ledger, the models that they serve, and what their clients were answered.

    Attributes:
        accepted: ids of the jobs that were answered with 200 or 202.
        answers: of inferences.
        counts: of what the clients did and what was done to the nodes.
    """

    database: Database
    fleet: Fleet
    nodes: dict[str, ClusterNode]
    accepted: set[str] = field(default_factory=set)
    answers: set[NodeAnswer] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def answering(self) -> list[ClusterNode]:
        """The nodes that run and are not frozen."""
        return [node for node in self.nodes.values() if node.answers]

    async def restore(self) -> None:
        """Start the database, and thaw, heal and start all nodes, as far as they are not at work.

        Raises:
            AssertionError: a node has ended by itself.
        """
        for node in self.nodes.values():
            node.mend_disk()
            node.check_exit()
        if not self.database.server.is_running:
            await self.database.server.start()
        for node in self.nodes.values():
            node.proxy.heal()
            if node.is_frozen:
                node.thaw()
        await asyncio.gather(*(node.start() for node in self.nodes.values() if not node.is_running))

    async def follow(self, server: PostgresServer) -> None:
        """Let the nodes reach another server of the database, after an outage longer than their leases."""
        self.database = Database(server, self.database.name)
        await self.pass_lease(*self.nodes.values())
        for node in self.nodes.values():
            node.proxy.target = server.address

    async def until(
        self, holds: Callable[[State], bool], *, at: ClusterNode | None = None, what: str = ""
    ) -> State:
        """Wait until this holds of the state at one node; without one, at any that answers."""

        async def look() -> State:
            witness = at or max(self.answering, key=lambda node: node.read_head().position)
            return witness.read_state()

        try:
            return await when(look, holds)
        except AssertionError:
            raise AssertionError(f"{what or 'the state did not come'}: {self.describe()}") from None

    async def pass_lease(self, *nodes: ClusterNode) -> None:
        """Let a lease pass by the database's clock, in which these nodes have not renewed theirs."""
        names = ", ".join(f"'{node.name}'" for node in nodes)
        await change(
            self.database,
            "UPDATE nodes SET steady_since = steady_since - lease_s * interval '1 second'",
            "UPDATE nodes SET renewed_at = renewed_at - lease_s * interval '1 second'"
            f" WHERE node_id IN ({names})",
        )

    async def until_lost(self, node: ClusterNode, epoch: int) -> None:
        """Wait until a node that cannot renew its lease is lost, as if a lease had passed since."""
        await self.pass_lease(node)
        await self.until(is_lost(node.name, epoch))

    async def settled(self) -> State:
        """Wait until nodes have joined, nothing is under way, and replicas and processes are as recorded."""
        seen: list[str] = []

        async def look() -> State | None:
            seen.clear()
            states = [node.read_state() for node in self.answering]
            present = {node.id for node in states[0].registers.nodes.values() if node.is_present}
            seen.extend(f"{node.name} has not joined" for node in self.answering if node.name not in present)
            seen.extend(_list_unsettled(states[0]))
            if len({(state.position, state.recorded_at) for state in states}) > 1 or seen:
                return None
            live = set[Place]().union(*[await node.list_live() for node in self.answering])
            recorded = set(list_places(states[0]))
            seen.extend(f"{place} is not live" for place in recorded - live)
            seen.extend(f"{place} is not recorded" for place in live - recorded)
            return states[0] if recorded == live else None

        try:
            state = await when(look, lambda state: state is not None)
        except AssertionError:
            raise AssertionError(f"not settled: {seen[:20]}; {self.describe()}") from None
        assert state is not None
        return state

    async def load(self, *model_ids: str, **body: Json) -> State:
        """Load models, wherever; return the state when all is at rest."""
        apis = itertools.cycle(node.api for node in self.answering)

        async def load(model_id: str, api: Api) -> Answer:
            loading = partial(api.post, f"/api/v1/models/{model_id}/load", json=body, wait=60)
            # A node that lost its lease answers with 503 until it has joined again.
            return await when(loading, lambda answer: answer.status != 503)

        answers = await asyncio.gather(*map(load, model_ids, apis))
        assert all(answer.json["status"] == "completed" for answer in answers), answers
        self.accepted |= {answer.json["id"] for answer in answers}
        return await self.settled()

    def describe(self) -> str:
        """Return what each node's replica says of nodes, for a failed test."""
        parts = []
        for node in self.nodes.values():
            with suppress(sqlite3.Error, ValueError):
                state = node.read_state()
                phases = {each.id: f"{each.phase} {each.epoch}" for each in state.registers.nodes.values()}
                parts.append(f"{node.name} (answers: {node.answers}) at {state.position}: {phases}")
        return "; ".join(parts)

    @asynccontextmanager
    async def traffic(
        self, dice: random.Random, model_ids: list[str], clients: int = 2
    ) -> AsyncIterator[None]:
        """Load, unload, cancel and infer at random nodes while the block runs."""
        tasks = [
            asyncio.create_task(self._request_often(random.Random(dice.random()), model_ids))
            for _ in range(clients)
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        defects = [end for end in ends if not isinstance(end, asyncio.CancelledError)]
        assert not defects, defects

    async def _request_often(self, dice: random.Random, model_ids: list[str]) -> None:
        while True:
            await asyncio.sleep(dice.uniform(0, 0.05))
            nodes = self.answering
            if nodes:
                node = dice.choice(nodes)
                with suppress(*LOST_CONNECTION):
                    async with asyncio.timeout(REQUEST_S):
                        await self._request(node, dice, dice.choice(model_ids))

    async def _request(self, node: ClusterNode, dice: random.Random, model_id: str) -> None:
        if dice.random() < 0.3:
            await self._try_infer(node, dice)
            return
        path = self._choose_path(dice, model_id)
        body = self._choose_body(dice) if path.endswith("/load") else {}
        answer = await node.api.post(path, json=body, wait=dice.choice((0, 0, 1)))
        unknown = path.endswith("/cancel") and answer.status == 404  # to a node that has not heard of it yet
        assert answer.status in (200, 202, 409, 503) or unknown, answer
        self.counts[f"answered {answer.status}"] += 1
        if answer.status in (200, 202):
            self.accepted.add(answer.json["id"])

    def _choose_path(self, dice: random.Random, model_id: str) -> str:
        if self.accepted and dice.random() < 0.05:
            return f"/api/v1/jobs/{dice.choice(sorted(self.accepted)[-8:])}/cancel"
        if dice.random() < 0.3:
            return f"/api/v1/models/{model_id}/unload" + dice.choice(("", "?force=true"))
        return f"/api/v1/models/{model_id}/load"

    def _choose_body(self, dice: random.Random) -> Json:
        """Return the parameters of a load: without a version it is the highest, as mostly."""
        body: dict[str, Json] = {"copies": dice.randint(1, len(self.nodes))} if dice.random() < 0.5 else {}
        return body | ({"version": dice.choice(self.fleet.versions)} if dice.random() < 0.3 else {})

    async def _try_infer(self, node: ClusterNode, dice: random.Random) -> None:
        """Ask a node for an inference of a model that is loaded, or was a moment ago, at any node."""
        model_ids = [model_id for _, model_id, _ in list_places(node.read_state())]
        if model_ids:
            version = dice.choice((None, None, *self.fleet.versions))
            witness = dice.choice(self.answering)
            answer = await self._ask(node, dice.choice(model_ids), dice, version, witness=witness)
            assert answer.status in (200, 503, 504), answer

    async def infer(self, node: ClusterNode, model_id: str, dice: random.Random) -> None:
        """Ask a node for an inference, which must be answered."""
        answer = await self._ask(node, model_id, dice, witness=node)
        assert answer.status == 200, (node.name, model_id, answer)

    async def _ask(
        self,
        node: ClusterNode,
        model_id: str,
        dice: random.Random,
        version: int | None = None,
        *,
        witness: ClusterNode,
    ) -> Answer:
        """Ask a node for an inference; if the witness answers it, its knowledge before is noted."""
        known = (await witness.api.get("/api/v1/events/head")).json["position"]
        asked = question(dice)
        answer = await node.api.infer(model_id, asked, version=version)
        self.counts[f"inferred {answer.status}"] += 1
        if answer.status == 200:
            source, by = check_inference(model_id, asked, answer), answer.headers["Loadledger-Node"]
            assert version in (None, source.version), answer.headers
            self.answers.add(NodeAnswer(source, by, known if by == witness.name else 0))
        return answer

    @asynccontextmanager
    async def inferring(self, places: list[tuple[str, str]], dice: random.Random) -> AsyncIterator[None]:
        """Ask nodes for inferences of models that they have while the block runs; each must be answered."""

        async def ask() -> None:
            while True:
                name, model_id = dice.choice(places)
                await self.infer(self.nodes[name], model_id, dice)
                await asyncio.sleep(0.01)

        task = asyncio.create_task(ask())
        try:
            yield
            if task.done():
                await task
        finally:
            task.cancel()
            await asyncio.wait([task])


def list_places(state: State) -> Iterator[Place]:
    """Yield where models are loaded, each copy of them, as recorded."""
    for model in state.models.values():
        for copy in model.servings if model.state == "loaded" else ():
            yield copy.server or "", model.id, copy.load_job_id


def find_places(state: State, name: str) -> list[str]:
    """Return the models that are recorded as loaded at a node."""
    return sorted(model_id for node, model_id, _ in list_places(state) if node == name)


def find_nodes(state: State, model_ids: list[str]) -> dict[str, str]:
    """Return the nodes at which models are loaded, of each the one of a copy."""
    return {model_id: node for node, model_id, _ in list_places(state) if model_id in model_ids}


def is_lost(name: str, epoch: int) -> Callable[[State], bool]:
    """Return whether this epoch of a node is recorded as lost, and no later one has begun."""

    def holds(state: State) -> bool:
        node = state.registers.nodes[name]
        return node.phase is NodePhase.LOST and node.epoch == epoch

    return holds


def has_joined(name: str, epoch: int) -> Callable[[State], bool]:
    """Return whether this epoch of a node, or a later one, has begun and not ended."""

    def holds(state: State) -> bool:
        node = state.registers.nodes[name]
        return node.phase is NodePhase.JOINED and node.epoch >= epoch

    return holds


def are_elsewhere(model_ids: list[str], name: str) -> Callable[[State], bool]:
    """Return whether models are loaded, and none at this node."""

    def holds(state: State) -> bool:
        places = {(node, model_id) for node, model_id, _ in list_places(state) if model_id in model_ids}
        return {model_id for _, model_id in places} == {*model_ids} and name not in {
            node for node, _ in places
        }

    return holds


def _list_unsettled(state: State) -> Iterator[str]:
    """Yield the jobs and models that are under way."""
    for job in state.unended():
        yield f"job {job.id} {job.kind} {job.model_id} {job.status} at {job.server} ({job.cause})"
    for model in state.models.values():
        if model.state in ("loading", "unloading", "lost"):
            yield f"model {model.id} {model.state}"
        yield from _list_uneven_copies(
            model, sum(node.takes_loads for node in state.registers.nodes.values())
        )


def _list_uneven_copies(model: Model, takers: int) -> Iterator[str]:
    """Yield what a model's copies lack: one version, and one at each of as many nodes as are wanted."""
    first = model.serving
    if model.state != "loaded" or first is None or is_crash_loop(model):
        return
    found = [f"{each.server}: {each.version}" for each in model.servings]
    if not all(each.is_copy_of(first) for each in model.servings):
        yield f"model {model.id} has different copies: {found}"
    wanted = min(first.parameters.wanted_copies, max(1, takers))
    if len(found) != wanted:
        yield f"model {model.id} has copies at {found}, wanted are {wanted}"


@asynccontextmanager
async def clustered(
    folder: Path,
    server: PostgresServer,
    *,
    names: tuple[str, ...] = ("n1", "n2", "n3"),
    disks: Mapping[str, FreezableDisk] | None = None,
    versions: tuple[int, ...] = (1,),
    settings: tuple[str, ...] = (),
) -> AsyncIterator[Cluster]:
    """Run nodes over a new ledger in a PostgreSQL server; kill them after the block.

    Those named in `disks` have their data there. Settings go before the usual ones.

    The ledger's database stays, since the server may be another one by then: it ends with its server.
    """
    repository = folder / "repository"
    fleet = Fleet(repository, MODELS, versions=versions)
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(server.database(make_ledger))
        cluster = Cluster(database, fleet, {})
        for name in names:
            config = Config(repository=repository, data=folder / name)
            share_keys(folder, config.data)
            proxy = await stack.enter_async_context(cutting_proxy(server.address))
            node = ClusterNode(name, config, database, proxy, settings, (disks or {}).get(name))
            stack.push_async_callback(node.close)
            cluster.nodes[name] = node
        await cluster.restore()
        yield cluster
