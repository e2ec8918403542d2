"""Failover to the next URL when a server is not there, and affinity to the node that has a model.

A node that forwards an inference names the address of the node that answered. The next inference of that
model goes there. The token goes to no other address than the configured ones and those that they name.
"""

from __future__ import annotations

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
NOT_THERE = frozenset({"model_not_loaded", "model_unloading", "shutting_down"})
"""Codes of a node that has not run the inference, and that is not the one to ask any more."""
NODE_CONNECT_S = 1.0
"""Limit of the time to connect to a node: the configured server can be asked instead."""
AVOID_S = 60.0
"""How long an address is not tried again that was not reached, or where no node answered."""
MAX_NODES = 64
"""Addresses of nodes that a client goes to."""
MAX_MODELS = 1000
"""Models whose node a client remembers."""


@dataclass(frozen=True, slots=True)
class _KnownNode(Generic[TransportT]):
    """The node that has answered for a model, and the connections to it."""

    name: str
    url: str
    transport: TransportT


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
        self._nodes: dict[str, TransportT] = {}
        self._known: dict[str, _KnownNode[TransportT]] = {}
        self._avoided: dict[str, float] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def close_all(self) -> list[TransportT]:
        """Return all transports, for the client to close; no further nodes are connected to."""
        with self._lock:
            self._is_closed = True
            self._known.clear()
            return [*self.servers, *self._nodes.values()]

    async def send(self, request: Request) -> Answer:
        if request.model is None:
            return await self._try_servers(request, lambda server: server.send(request))
        known = self._known.get(request.model)
        answer = None if known is None else await self._ask_node(request, known)
        if answer is None:
            answer = await self._try_servers(request, lambda server: server.send(request))
            if NODE_ADDRESS in answer.headers:
                self._learn(request.model, answer)
        return answer

    async def open(self, request: Request) -> ResponseStream:
        return await self._try_servers(request, lambda server: server.open(request))

    async def pause(self, seconds: float) -> None:
        await self.servers[0].pause(seconds)

    async def call(self, work: Callable[[], T]) -> T:
        return await self.servers[0].call(work)

    async def _try_servers(self, request: Request, ask: Callable[[TransportT], Awaitable[T]]) -> T:
        """Ask the current server; if it is not there, the others, one of which is current from then on."""
        for _ in self.servers[1:]:
            current = self._current
            try:
                return await ask(self.servers[current])
            except ServerUnreachable as problem:
                if problem.sent and not request.repeatable:
                    raise
                self._current = (current + 1) % len(self.servers)
        return await ask(self.servers[self._current])

    async def _ask_node(self, request: Request, known: _KnownNode[TransportT]) -> Answer | None:
        """Return the answer of the node that a model was at; None if the configured server is to be asked.

        Raises:
            ServerUnreachable: the inference may have run.
        """
        try:
            answer = await known.transport.send(request)
        except (ServerUnreachable, BadAnswer) as problem:
            self._forget(request, known, avoids=True)
            if getattr(problem, "sent", False):
                raise
            return None
        name = answer.headers.get(NODE)
        if name == known.name and not _is_elsewhere(answer):
            return answer
        self._forget(request, known, avoids=name is None)
        return answer if name not in (None, known.name) else None

    def _learn(self, model: str, answer: Answer) -> None:
        """Remember the node that has answered for a model."""
        url = answer.headers[NODE_ADDRESS].rstrip("/")
        transport = self._find_transport(url)
        if transport is None:
            return
        if len(self._known) >= MAX_MODELS:
            self._known.clear()
        self._known[model] = _KnownNode(answer.headers.get(NODE, ""), url, transport)

    def _find_transport(self, url: str) -> TransportT | None:
        """Return the transport of a node; None of an address that the token must not go to, or to avoid."""
        if self._avoided.get(url, 0.0) > self._now():
            return None
        with self._lock:
            if url not in self._nodes and self._may_connect(url):
                token = self._options[0].address.token
                options = replace(
                    self._options[0], address=Address.of(url, token), max_connect_s=NODE_CONNECT_S
                )
                self._nodes[url] = self._connect(options)
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

    def _forget(self, request: Request, known: _KnownNode[TransportT], *, avoids: bool) -> None:
        self._known.pop(request.model or "", None)
        if avoids:
            self._avoided[known.url] = self._now() + AVOID_S


def _is_elsewhere(answer: Answer) -> bool:
    """Whether a node says that it does not have the model."""
    return answer.status == HTTPStatus.SERVICE_UNAVAILABLE and problem_code(answer) in NOT_THERE


def _is_this_machine(url: str) -> bool:
    """Whether an address leads to the client's own machine, where anybody may listen."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
