"""Failover to the next URL when a server is not there, and affinity to the nodes that have a model.

A node that forwards an inference names the address of the node that answered, or of several copies those of
all. The next inferences of that model go there: of two copies at random, to the one where this client has
fewer requests in flight. The token goes to no other address than the configured ones and those that they
name.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from loadledger.address import Address, ConnectionOptions
from loadledger.errors import BadAnswer, ServerUnreachable
from loadledger.requests import Answer, Request, ResponseStream, T, Transport, problem_code

TransportT = TypeVar("TransportT", bound=Transport)

NODE, NODE_ADDRESS = "loadledger-node", "loadledger-node-address"
"""Header fields: who has answered a request about a model, and where, if that was another node."""
COPIES = "loadledger-copies"
"""Header field: the addresses of all nodes that have the model, if they are several."""
NOT_THERE = frozenset({"model_not_loaded", "model_unloading", "shutting_down", "node_unreachable"})
"""Codes of a node that has not run the inference, and that is not the one to ask any more."""
REFUSED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS})
"""Answers to the token or its rate, without the name of a node: other copies give the same."""
NODE_CONNECT_S = 1.0
"""Limit of the time to connect to a node: the configured server can be asked instead."""
AVOID_S = 10.0
"""Back-off before a node is asked again that was not reached, or lacked a model: a restart takes less."""
MAX_NODES = 64
"""Addresses of nodes that a client goes to."""
MAX_MODELS = 1000
"""Models whose node a client remembers."""


@dataclass(slots=True, eq=False)
class _KnownNode(Generic[TransportT]):
    """A node, the connections to it, and how many requests of this client it has not answered."""

    url: str
    transport: TransportT
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class _KnownModel(Generic[TransportT]):
    """The nodes that have a model, and the header field that named them: that of the copies, or the name."""

    nodes: list[_KnownNode[TransportT]]
    named: str
    has_copies: bool


class FailoverTransport(Generic[TransportT]):
    """Connections to one server or several, and to the nodes behind them; threads may share it.

    Args:
        options: of each configured server, in the order in which they are tried.
        connect: makes the transport of a server.
        now: a monotonic clock, in seconds.

    Attributes:
        servers: the transports of the configured servers.
    """

    def __init__(
        self,
        options: Sequence[ConnectionOptions],
        connect: Callable[[ConnectionOptions], TransportT],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.servers = [connect(each) for each in options]
        self._options = options
        self._connect = connect
        self._now = now
        self._current = 0
        self._nodes: dict[str, _KnownNode[TransportT]] = {}
        self._known: dict[str, _KnownModel[TransportT]] = {}
        self._avoided: dict[tuple[str, str | None], float] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def close_all(self) -> list[TransportT]:
        """Return all transports, for the client to close; no further nodes are connected to."""
        with self._lock:
            self._is_closed = True
            self._known.clear()
            return [*self.servers, *(node.transport for node in self._nodes.values())]

    async def send(self, request: Request) -> Answer:
        if request.model is None:
            return await self._try_servers(request, lambda server: server.send(request))
        answer, may_repeat = await self._ask_nodes(request, request.model)
        if answer is None:
            answer = await self._try_servers(
                request, lambda server: server.send(request), may_repeat=may_repeat
            )
            self._learn(request.model, answer)
        return answer

    async def open(self, request: Request) -> ResponseStream:
        return await self._try_servers(request, lambda server: server.open(request))

    async def pause(self, seconds: float) -> None:
        await self.servers[0].pause(seconds)

    async def call(self, work: Callable[[], T]) -> T:
        return await self.servers[0].call(work)

    async def _try_servers(
        self, request: Request, ask: Callable[[TransportT], Awaitable[T]], *, may_repeat: bool = False
    ) -> T:
        """Ask the current server; if it is not there, the others, one of which is current from then on.

        With `may_repeat`, another is also asked once after a connection was lost.
        """
        for _ in self.servers[1:]:
            current = self._current
            try:
                return await ask(self.servers[current])
            except ServerUnreachable as problem:
                if problem.sent and not request.repeatable:
                    if not (may_repeat and problem.lost):
                        raise
                    may_repeat = False
                self._current = (current + 1) % len(self.servers)
        return await ask(self.servers[self._current])

    async def _ask_nodes(self, request: Request, model: str) -> tuple[Answer | None, bool]:
        """Return the answer of a node that has a model; None if a configured server is to be asked.

        Beside it is whether the inference may be sent once more after a connection was lost.

        Raises:
            ServerUnreachable: the inference may have run, for the second time if the model has copies, or it
                took too long.
        """
        known = self._known.get(model)
        if known is None:
            return None, False
        may_repeat = known.has_copies
        for node in self._choose(model, known):
            try:
                answer = await self._send(request, node)
            except (ServerUnreachable, BadAnswer) as problem:
                self._avoid(node)
                if isinstance(problem, ServerUnreachable) and problem.sent:
                    if not (may_repeat and problem.lost):
                        raise
                    may_repeat = False
            else:
                if self._is_answer(answer, node, model, known):
                    return answer, False
        return None, may_repeat

    def _choose(self, model: str, known: _KnownModel[TransportT]) -> list[_KnownNode[TransportT]]:
        """Return the node to ask for a model, and another one to ask if that is not there."""
        now_s, avoided = self._now(), self._avoided
        nodes = [
            node
            for node in known.nodes
            if max(avoided.get((node.url, which), now_s) for which in (None, model)) <= now_s
        ]
        return sorted(random.sample(nodes, min(2, len(nodes))), key=lambda node: node.in_flight)

    def _avoid(self, node: _KnownNode[TransportT], model: str | None = None) -> None:
        """Do not ask a node for a while, about a model or about any."""
        self._avoided[node.url, model] = self._now() + AVOID_S

    async def _send(self, request: Request, node: _KnownNode[TransportT]) -> Answer:
        with self._lock:
            node.in_flight += 1
        try:
            return await node.transport.send(request)
        finally:
            with self._lock:
                node.in_flight -= 1

    def _is_answer(
        self, answer: Answer, node: _KnownNode[TransportT], model: str, known: _KnownModel[TransportT]
    ) -> bool:
        """Return whether a node has answered for a model; note what that says of where the model is."""
        name, status = answer.headers.get(NODE), answer.status
        if status == HTTPStatus.SERVICE_UNAVAILABLE and problem_code(answer) in NOT_THERE:
            self._avoid(node, model)
            return False
        if name is None:
            # A stranger at the former address of the one node answers 401, too.
            if status in REFUSED and (known.has_copies or status != HTTPStatus.UNAUTHORIZED):
                return True
            self._avoid(node)
            return False
        if status == HTTPStatus.OK and answer.headers.get(COPIES, name) != known.named:
            self._known[model] = replace(known, nodes=[])  # a configured server says where it is now
        return True

    def _learn(self, model: str, answer: Answer) -> None:
        """Remember the nodes that have a model, as a configured server names them."""
        if answer.status != HTTPStatus.OK:
            return
        copies, headers = answer.headers.get(COPIES, ""), answer.headers
        named = (copies or headers.get(NODE_ADDRESS, "")).split(" ")[:MAX_NODES]
        urls = dict.fromkeys(each.rstrip("/") for each in named if each)
        nodes = [node for url in urls if (node := self._find_node(url)) is not None]
        if len(self._known) >= MAX_MODELS:
            self._known.clear()
            self._avoided.clear()
        self._known[model] = _KnownModel(nodes, copies or headers.get(NODE, ""), bool(copies))

    def _find_node(self, url: str) -> _KnownNode[TransportT] | None:
        """Return the node at an address; None if the token must not go there."""
        with self._lock:
            if url not in self._nodes and self._may_connect(url):
                token = self._options[0].address.token
                options = replace(
                    self._options[0], address=Address.of(url, token), max_connect_s=NODE_CONNECT_S
                )
                self._nodes[url] = _KnownNode(url, self._connect(options))
            return self._nodes.get(url)

    def _may_connect(self, url: str) -> bool:
        configured = self._options[self._current].address
        try:
            address = Address.of(url)
        except ValueError:
            return False
        return (
            not self._is_closed
            and len(self._nodes) < MAX_NODES
            and address.is_secure == configured.is_secure
            and (not _is_this_machine(url) or _is_this_machine(configured.url))
        )


def _is_this_machine(url: str) -> bool:
    """Whether an address leads to the client's own machine, where anybody may listen."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
