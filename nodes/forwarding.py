"""Forwarding of requests about a loaded model to the node that has it.

Any node answers for any model. A request about a model that the state says is loaded at another node goes
to that node's address over HTTP: the same body, unparsed, and a token of this node in place of the client's
(`nodes.peers`). The answer comes back as it is. A forwarded request names the node that sent it, and
how far that one knows the ledger: its receiver answers by a state that is no older, and never forwards it
again. Of a model with copies it goes to one of them (`nodes.spread`), and to another one, once, if that one
refuses it or is not there. A request about an upload of a version goes to the node that its id names, with
its body as it arrives. A server alone has no forwarder.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from events.log import Log
from features.nodes.register import Node
from nodes.decisions import NodePlacement, Standing
from nodes.peers import CATCH_UP_S, Peers, read_position
from nodes.spread import measure_copy
from runtime.errors import InferenceTimeout
from runtime.lostmodels import CRASHES
from runtime.router import Here, Router, There
from runtime.timeouts import TimeoutExpired, timeout
from runtime.wire import Buffer
from server.appkeys import ROUTER
from server.auth.gate import FORWARDED, POSITION, PRINCIPAL
from server.auth.ratelimit import AUTH_FAILURES, QUOTA
from server.cluster import COPIES, NODE, NODE_ADDRESS, Cluster
from server.errors import ANSWER_FIELDS, ServerProblem
from server.http.bodies import BodyMemory, read_body
from server.http.connection import read_body_into
from server.http.responses import DirectResponse
from server.observability.output import REQUEST_ID, begin_context
from server.v2.codec import HEADER_LENGTH

MAX_CONNECTIONS = 256
"""Connections to each other node; further requests wait for a free one."""
KEPT_S = 15.0
"""An idle connection is closed before the other node closes it (`idle_timeout_s`)."""
CONNECT_S = 5.0
"""For a connection to another node: beyond it, its machine is gone."""
CATCH_UP_OR_REFUSE_S = 5.0
"""As `CATCH_UP_S` where this node would refuse without them: a disk can hold up a replica for seconds."""
PASS_ON_S = 300.0
"""For the next piece of a body that is passed on, and for its answer: a commit reads and syncs its files."""
READ_BYTES = 2**20
"""Of an answer before its reader has its turn; aiohttp's 64 KB take a pause each."""
IN_PLACE_BYTES = 2**15
"""Longer bodies are read in place, into one buffer."""
JOINED_BYTES = 2**16
"""Longer bodies are sent in a part of their own; shorter ones with the head."""

LOAD = "Loadledger-Load"
"""In the answer of a copy to another node: how busy it is."""

_SENT = frozenset(
    name.lower()
    for name in (
        *(hdrs.CONTENT_TYPE, hdrs.CONTENT_ENCODING, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING),
        *(HEADER_LENGTH, "traceparent", "tracestate", "Repr-Digest", "Content-Digest"),
    )
)
"""Header fields of a request that go to the other node."""
_RETURNED = frozenset(
    name.lower()
    for name in (
        *(hdrs.CONTENT_TYPE, hdrs.CONTENT_ENCODING, hdrs.VARY, HEADER_LENGTH, hdrs.RETRY_AFTER),
        *(hdrs.LOCATION, hdrs.WWW_AUTHENTICATE, "Loadledger-Model", NODE),
    )
)
"""Header fields of an answer that go to the client."""
_REDIRECTS = range(300, 400)
_NOT_ADDED = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE, hdrs.USER_AGENT)
"""Header fields that aiohttp would add."""


class NodeUnreachable(ServerProblem):
    """The node that has the model, or the upload, cannot be reached."""

    code = "node_unreachable"

    def __init__(self, node: Node, reason: str, *, is_answered: bool = False) -> None:
        super().__init__(
            f"node '{node.id}', which has to answer, cannot be reached at {node.address}: {reason};"
            " if it does not come back, its models are loaded at other nodes"
        )
        self.is_answered = is_answered


class ModelMoved(ServerProblem):
    """The request was forwarded to a node at which the model is not loaded any more."""

    code = "model_not_loaded"

    def __init__(self, model_id: str, node_id: str, sender: str, position: int) -> None:
        super().__init__(
            f"model '{model_id}' is loaded at node '{node_id}', not here; node '{sender[:63]}' has forwarded"
            " the request here, which happens once only",
            http_headers={POSITION: str(position)},
        )


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """A request as it is sent to another node.

    Attributes:
        received: the request as the client sent it.
        body: in memory, or as it arrives; None without a body.
        ends_at_s: the time limit of the answer, on the loop's clock; None without a limit.
        version: in the path, if it matters which copy answers.
        memory: counts the answer as it arrives; None for short answers.
    """

    received: web.BaseRequest
    model_id: str
    method: str
    headers: CIMultiDict[str]
    body: Buffer | AsyncIterator[bytes] | None
    ends_at_s: float | None = None
    version: int | None = None
    memory: BodyMemory | None = None


@dataclass(frozen=True, slots=True)
class _Reply:
    """The answer of another node, read to its end."""

    node: Node
    status: int
    headers: CIMultiDict[str]
    parts: list[bytes]


class Forwarder(NodePlacement, Cluster):
    """A node that sends requests about models to the nodes that have them.

    Args:
        node_id: its name.
        log: the ledger's log.
        standing: this node's standing.
        peers: the keys of the other nodes.
        timeout_s: limit of a forwarded request.
    """

    _session: aiohttp.ClientSession
    _router: Router

    def __init__(self, node_id: str, log: Log, standing: Standing, peers: Peers, *, timeout_s: float) -> None:
        NodePlacement.__init__(self, node_id, standing, peers, peers.untrusted)
        Cluster.__init__(self, log)
        self.peers = peers
        self._waits: dict[asyncio.Timeout, tuple[_Forwarded, Node]] = {}
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def forwarding(self, app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=MAX_CONNECTIONS, keepalive_timeout=KEPT_S)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BYTES,
        ) as self._session:
            self._router = app[ROUTER]
            ending = asyncio.create_task(self._end_waits(), name="waits for lost nodes")
            try:
                yield
            finally:
                ending.cancel()

    async def catch_up(self, request: web.BaseRequest, model_id: str) -> None:
        """Begin to answer a request here, by a state no older than that of a node that forwarded it."""
        request[ANSWER_FIELDS] = {NODE: self.name}
        if FORWARDED in request.headers:
            limit_s = CATCH_UP_S if self._router.is_ready(model_id) else CATCH_UP_OR_REFUSE_S
            await self.log.wait_for(read_position(request.headers), limit_s)

    async def forward(
        self,
        request: web.BaseRequest,
        there: There,
        model_id: str,
        memory: BodyMemory,
        *,
        body: Buffer | None = None,
        ends_at_s: float | None = None,
    ) -> web.StreamResponse:
        """Answer a request through the node at which its model is loaded.

        Raises:
            ModelMoved: `model_not_loaded`, the request was forwarded here, and the model is elsewhere.
            NodeUnreachable: `node_unreachable`.
            InferenceTimeout: `inference_timeout`.
            ServerProblem: an error of reading the body.
        """
        request.pop(ANSWER_FIELDS, None)
        node, sender = self.log.state.registers.nodes[there.server], request.headers.get(FORWARDED)
        if sender is not None:
            raise ModelMoved(model_id, node.id, sender, self.log.state.position)
        headers = self._headers_of(request)
        if body is not None:
            headers.popall(hdrs.CONTENT_ENCODING, None)
        elif request.method == hdrs.METH_POST:
            body = await _receive(request, memory)
        if body is not None:
            headers[hdrs.CONTENT_LENGTH] = str(len(body))
        method = hdrs.METH_GET if body is None else hdrs.METH_POST
        ends_at_s = ends_at_s or asyncio.get_running_loop().time() + self._timeout_s
        forwarded = _Forwarded(request, model_id, method, headers, body, ends_at_s, there.version, memory)
        reply = await (self._send(forwarded, node) if there.is_last else self._ask(forwarded, node))
        fields = _returned_fields(request, reply)
        if body is not None and reply.status == HTTPStatus.OK:
            fields[REQUEST_ID] = headers[REQUEST_ID]
            return DirectResponse({**fields, **self._name_copies(model_id)}, reply.parts, memory)
        memory.give_back()
        return web.Response(status=reply.status, body=b"".join(reply.parts), headers=fields)

    def _headers_of(self, request: web.BaseRequest) -> CIMultiDict[str]:
        headers = CIMultiDict(
            [(name, value) for name, value in request.headers.items() if name.lower() in _SENT]
        )
        context = begin_context(request)
        headers.update({FORWARDED: self.name, REQUEST_ID: context.request_id, **context.carrier})
        return headers

    async def _ask(self, forwarded: _Forwarded, node: Node) -> _Reply:
        """Send a request to a node; once more if the node refuses or is gone, and the model is elsewhere."""
        try:
            reply = await self._send(forwarded, node)
        except NodeUnreachable as problem:
            other = self._find_another(forwarded, node)
            if other is None or problem.is_answered:
                raise
            return await self._send(forwarded, other)
        if reply.status != HTTPStatus.SERVICE_UNAVAILABLE or _has_killed_worker(reply):
            return reply
        other, position = self._find_another(forwarded, node), read_position(reply.headers)
        if other is None and position:
            await self.log.wait_for(position, CATCH_UP_OR_REFUSE_S)
            other = self._find_another(forwarded, node)
        return reply if other is None else await self._send(forwarded, other)

    def _find_another(self, forwarded: _Forwarded, tried: Node) -> Node | None:
        """Return another node at which the model is loaded by now, which may be this one."""
        state = self.log.state
        model = state.models.get(forwarded.model_id)
        if model is None:
            return None
        name = self.choose(model, state, forwarded.version, tried=tried)
        return None if name is None else state.registers.nodes[name]

    async def _end_waits(self) -> None:
        """End the waits for answers of nodes that are lost, if others have the models; until cancelled."""
        nodes = self.log.state.registers.nodes
        with self.log.subscribed() as wakeup:
            while True:
                await wakeup.wait()
                wakeup.clear()
                if self.log.state.registers.nodes is nodes:
                    continue
                nodes = self.log.state.registers.nodes
                for limit, (forwarded, node) in self._waits.items():
                    known = nodes.get(node.id)
                    is_there = known is not None and known.is_present and known.epoch == node.epoch
                    if not is_there and not limit.expired() and self._find_another(forwarded, node):
                        limit.reschedule(asyncio.get_running_loop().time())

    def describe_copy(self, request: web.BaseRequest, here: Here) -> Mapping[str, str]:
        """Return how busy a copy is, for the node that asks; or where all copies are, for a client."""
        if FORWARDED in request.headers:
            return {LOAD: measure_copy(here.load).header}
        return self._name_copies(here.model_id)

    def _name_copies(self, model_id: str) -> Mapping[str, str]:
        model = self.log.state.models.get(model_id)
        if model is None or not model.copies:
            return {}
        addresses = self.list_addresses(model, self.log.state)
        return {COPIES: " ".join(addresses)} if len(addresses) > 1 else {}

    async def _send(self, forwarded: _Forwarded, node: Node) -> _Reply:
        """Send a request to a node that has the model, and note its figures for the spread."""
        model_id = forwarded.model_id
        try:
            with self.spread.sending(node.id, model_id):
                reply = await self._exchange(forwarded, node)
        except NodeUnreachable:
            self.spread.avoid(node.id, time.monotonic())
            raise
        self.spread.hear(node.id, model_id, reply.headers.get(LOAD, ""), time.monotonic())
        return reply

    async def _exchange(self, forwarded: _Forwarded, node: Node) -> _Reply:
        """Send a request to a node and read its answer.

        Raises:
            NodeUnreachable: `node_unreachable`.
            InferenceTimeout: `inference_timeout`.
            ServerProblem: `bodies_full`.
        """
        received = forwarded.received
        token = self.peers.make_token(node, forwarded.model_id, received[PRINCIPAL])
        path = received.rel_url.raw_path  # without the host that a request to a proxy names
        own = ((hdrs.AUTHORIZATION, f"Bearer {token}"), (POSITION, str(self.log.state.position)))
        reply, limit = None, asyncio.timeout_at(forwarded.ends_at_s)
        try:
            async with limit:
                if forwarded.ends_at_s is not None:
                    self._waits[limit] = forwarded, node
                async with self._session.request(
                    forwarded.method,
                    URL(f"{node.address}{path}", encoded=True),
                    headers=CIMultiDict([*forwarded.headers.items(), *own]),
                    data=_payload(forwarded.body),
                    skip_auto_headers=_NOT_ADDED,
                    allow_redirects=False,
                ) as response:
                    if response.status in _REDIRECTS:
                        raise NodeUnreachable(node, "a redirect, which is no node's answer", is_answered=True)
                    if _refuses_token(response):
                        raise NodeUnreachable(node, "it does not take this node's token")
                    reply = _Reply(node, response.status, CIMultiDict(response.headers), [])
                    while part := await response.content.readany():
                        if forwarded.memory is not None:
                            forwarded.memory.take_answer(len(part))
                        reply.parts.append(part)
                    return reply
        except aiohttp.ConnectionTimeoutError:
            raise NodeUnreachable(node, f"no connection within {CONNECT_S:g} s") from None
        except TimeoutError:
            if limit.when() != forwarded.ends_at_s:
                raise NodeUnreachable(node, "it is lost") from None
            raise InferenceTimeout(
                f"node '{node.id}', at which the model is loaded, has not answered in time"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise NodeUnreachable(node, _reason(error), is_answered=reply is not None) from None
        finally:
            self._waits.pop(limit, None)

    def find_other(self, request: web.BaseRequest, name: str) -> There | None:
        """Return the present node that a request names; None if this one, or for a forwarded request."""
        node = self.log.state.registers.nodes.get(name)
        if FORWARDED in request.headers or node is None or name == self.name:
            return None
        return There(name) if node.is_present and name not in self.peers.untrusted() else None

    async def pass_on(
        self, request: web.BaseRequest, there: There, model_id: str, body: AsyncIterator[bytes] | None
    ) -> web.Response:
        """Answer a request about a model through a node, to which its body goes as it arrives.

        Raises:
            NodeUnreachable: `node_unreachable`.
            ServerProblem: an error of reading the body.
        """
        node, headers = self.log.state.registers.nodes[there.server], self._headers_of(request)
        passed_bytes, broken = 0, list[Exception]()

        async def read(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            nonlocal passed_bytes
            try:
                async for piece in body:
                    passed_bytes += len(piece)
                    yield piece
            except Exception as error:
                broken.append(error)  # aiohttp would call it a lost connection
                raise

        if body is not None and request.content_length is not None:
            headers[hdrs.CONTENT_LENGTH] = str(request.content_length)
        passed_on = None if body is None else read(body)
        forwarded = _Forwarded(request, model_id, request.method, headers, passed_on)
        try:
            async with timeout(PASS_ON_S, lambda: passed_bytes):
                reply = await self._exchange(forwarded, node)
        except TimeoutExpired:
            raise NodeUnreachable(node, f"no answer within {PASS_ON_S:g} s") from None
        except NodeUnreachable:
            if broken:
                raise broken[0] from None
            raise
        fields = _returned_fields(request, reply)
        return web.Response(status=reply.status, body=b"".join(reply.parts), headers=fields)


async def _receive(request: web.BaseRequest, memory: BodyMemory) -> Buffer:
    """Read a body as it is; a long one in place."""
    length, max_bytes = request.content_length or 0, memory.max_request_bytes
    if not IN_PLACE_BYTES < length <= max_bytes or request.content.is_eof():
        return await read_body(request, max_bytes, memory)
    memory.take(length)
    body = bytearray(length)
    await read_body_into(request, 0, memoryview(body))
    return body


def _refuses_token(response: aiohttp.ClientResponse) -> bool:
    """Whether a node knows this one's epoch no more, or has refused its tokens too often."""
    policy = response.headers.get("RateLimit-Policy", "")
    return response.status == HTTPStatus.UNAUTHORIZED or AUTH_FAILURES in policy


def _has_killed_worker(reply: _Reply) -> bool:
    """Whether a request was being computed when its worker died, by the code in the JSON of the refusal."""
    text = b"".join(reply.parts)
    return any(f'"{code}"'.encode() in text for code in CRASHES)


def _payload(body: Buffer | AsyncIterator[bytes] | None) -> Any:
    """Return a body as aiohttp sends it; a long one in one part, which is not copied."""
    if body is None or isinstance(body, AsyncIterator) or len(body) <= JOINED_BYTES:
        return body
    return _whole(body)


async def _whole(body: Buffer) -> AsyncGenerator[Buffer, None]:
    yield body


def _returned_fields(request: web.BaseRequest, reply: _Reply) -> dict[str, str]:
    """Return the header fields of an answer for the client, with this node's limit of the client."""
    fields = {str(name): value for name, value in reply.headers.items() if name.lower() in _RETURNED}
    quota = request.get(QUOTA)
    return {**fields, NODE_ADDRESS: reply.node.address, **({} if quota is None else quota.headers())}


def _reason(error: Exception) -> str:
    """Return why a connection failed, without data of the request."""
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number > 0:
        return os.strerror(number).lower()
    if isinstance(error, aiohttp.ClientSSLError):
        return "its certificate is not trusted"
    return (
        "its name is not known"
        if isinstance(error, aiohttp.ClientConnectorDNSError)
        else "the connection ended"
    )
