"""A client of several servers, and of the nodes behind them: where each request goes."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.clients import KINDS, connected, job
from support.connections import OddServer, odd_server, said
from support.workers import until

from loadledger import BadAnswer, ClientProblem, ServerUnreachable
from loadledger.address import Address, ConnectionOptions
from loadledger.requests import Answer, Request, ResponseStream
from loadledger.transports import nodes
from loadledger.transports.nodes import FailoverTransport

TOKEN = "s3cr3t-token"
JOB = said(json.dumps(job("completed")).encode())
OUTPUT = {"name": "y", "datatype": "FP32", "shape": [1], "data": [2.0]}
ANSWER = json.dumps({"model_name": "m", "model_version": "1", "outputs": [OUTPUT]}).encode()
INPUT = {"x": np.ones(1, np.float32)}

each_kind = pytest.mark.parametrize("kind", KINDS)


def answered(node: str, **fields: str) -> bytes:
    """Return the answer of a node as bytes."""
    named = {"Loadledger-Node": node, **{f"Loadledger-{name}": value for name, value in fields.items()}}
    return said(ANSWER, "200 OK", *(f"{name}: {value}" for name, value in named.items()))


@contextmanager
def absent() -> Iterator[str]:
    """Give the URL of a server that refuses connections."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


def heads(server: OddServer) -> list[str]:
    return [request.partition(b"\r\n")[0].decode() for request in server.requests]


def infer(client: Any) -> float:
    value: float = client.infer("m", INPUT)["y"].item()
    return value


INFER = "POST /v2/models/m/infer HTTP/1.1"


def test_urls_are_separated_by_commas() -> None:
    urls = "http://a:1, https://b/x,y,http://[::1]:8080/"
    found = [each.url for each in Address.each_of(urls, TOKEN)]
    assert found == ["http://a:1", "https://b/x,y", "http://[::1]:8080"]
    for wrong in ("http://a,b", "http://a,", "", ",http://a"):
        with pytest.raises(ValueError, match="http"):
            Address.each_of(wrong)


@each_kind
def test_refused_connection_is_retried_at_the_next_url(kind: str) -> None:
    with absent() as gone, odd_server(JOB, answered("n1")) as server:
        with connected(kind, f"{gone},{server.url}", TOKEN) as client:
            assert client.load("m").status == "completed"
            assert infer(client) == 2.0
        assert heads(server) == ["POST /api/v1/models/m/load HTTP/1.1", INFER]


@each_kind
def test_lost_answer_is_asked_for_elsewhere_only_if_repeatable(kind: str) -> None:
    with odd_server(b"") as lost, odd_server(JOB) as server:
        with connected(kind, f"{lost.url},{server.url}") as client:
            assert client.load("m").status == "completed"
        [first], [second] = lost.requests, server.requests
        key = b"\r\nIdempotency-Key: "
        assert first.partition(key)[2].split(b"\r\n")[0] == second.partition(key)[2].split(b"\r\n")[0]
    with odd_server(b"") as lost, odd_server() as server:
        with (
            connected(kind, f"{lost.url},{server.url}") as client,
            pytest.raises(ServerUnreachable, match=lost.url) as caught,
        ):
            infer(client)
        assert caught.value.sent
        assert not server.requests


@each_kind
def test_next_inference_goes_to_the_node_that_answered(kind: str) -> None:
    with odd_server(answered("n2"), answered("n2")) as node:
        with (
            odd_server(answered("n2", **{"Node-Address": node.url}), JOB) as server,
            connected(kind, server.url, TOKEN) as client,
        ):
            assert [infer(client) for _ in range(3)] == [2.0] * 3
            client.job("j1")
            assert heads(server) == [INFER, "GET /api/v1/jobs/j1 HTTP/1.1"]
        assert heads(node) == [INFER] * 2
        assert all(f"Bearer {TOKEN}".encode() in request for request in node.requests)


# Where an inference goes


class Silent:
    """A transport that answers for a node, and names another one."""

    def __init__(self, options: ConnectionOptions) -> None:
        self.options = options
        self.named, self.header = "", nodes.NODE_ADDRESS

    async def send(self, request: Request) -> Answer:
        """Return an answer from another node."""
        assert request.model
        return Answer(200, {"loadledger-node": "n2", self.header: self.named}, b"")

    async def open(self, request: Request) -> ResponseStream:
        """Refuse."""
        raise NotImplementedError(request)

    async def pause(self, seconds: float) -> None:
        """Refuse."""
        raise NotImplementedError(seconds)

    async def call(self, work: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(work)


def ok(node: str | None = "n1", **fields: str) -> Answer:
    """Return an answer: `at` is the address of another node, which has answered; `copies` those of all."""
    named = {nodes.NODE: node, nodes.NODE_ADDRESS: fields.get("at"), nodes.COPIES: fields.get("copies")}
    return Answer(200, {name: value for name, value in named.items() if value}, b"")


def no(status: int, code: str, node: str | None = None, **fields: str) -> Answer:
    """Return a refusal."""
    return Answer(status, ok(node, **fields).headers, json.dumps({"code": code}).encode())


GONE = ServerUnreachable("http://h", "connection refused")
LOST = ServerUnreachable("http://h", "the connection was lost", sent=True, lost=True)
SLOW = ServerUnreachable("http://h", "it took too long", sent=True)
FOREIGN = BadAnswer("no HTTP")
N, BOTH = "http://n", "http://n http://o"
ONE_NODE = [ok("n2", at=N), ok("n1")]
"""The server names the node, and the next time itself."""
COPIES = [ok("n1", copies=BOTH), ok("n1")]
COPY = [ok("n2", copies=BOTH)]
UNLOADING = no(503, "model_unloading", "n2")
STRANGER = ok(None)


@pytest.mark.parametrize(
    ("answers", "ends", "asked"),
    [
        # servers a and b
        ({"a": [GONE], "b": [ok()]}, [200, 200], "abb"),
        ({"a": [GONE], "b": [GONE]}, [GONE, GONE], "abba"),
        ({"a": [LOST]}, [LOST, LOST], "aa"),
        ({"a": [no(503, "inference_failed", "n2", at=N)]}, [503, 503], "aa"),
        # the node n, to which the server a has forwarded
        ({"a": ONE_NODE, "n": [ok("n2")]}, [200, 200, 200], "ann"),
        ({"a": ONE_NODE, "n": [no(503, "model_not_loaded", "n2")]}, [200, 200, 200], "anaa"),
        ({"a": ONE_NODE, "n": [no(503, "shutting_down", "n2")]}, [200, 200, 200], "anaa"),
        ({"a": ONE_NODE, "n": [no(401, "invalid_token")]}, [200, 200, 200], "anaa"),
        ({"a": ONE_NODE, "n": [STRANGER]}, [200, 200, 200], "anaa"),
        ({"a": ONE_NODE, "n": [FOREIGN]}, [200, 200, 200], "anaa"),
        ({"a": ONE_NODE[:1], "n": [GONE]}, [200, 200, 200], "anaa"),
        ({"a": ONE_NODE, "n": [LOST]}, [200, LOST, 200], "ana"),
        ({"a": ONE_NODE, "n": [no(403, "forbidden")]}, [200, 403, 403], "ann"),
        ({"a": ONE_NODE, "n": [no(503, "worker_died", "n3")]}, [200, 503, 503], "ann"),
        ({"a": ONE_NODE, "n": [ok("n3", at="http://o")]}, [200, 200, 200], "ana"),
        # the copies n and o, of which n is asked first
        ({"a": COPIES, "n": COPY}, [200, 200, 200], "ann"),
        ({"a": COPIES, "n": [LOST], "o": COPY}, [200, 200, 200], "anoo"),
        ({"a": COPIES, "n": [GONE], "o": COPY}, [200, 200, 200], "anoo"),
        ({"a": COPIES, "n": [UNLOADING], "o": COPY}, [200, 200, 200], "anoo"),
        ({"a": COPIES, "n": [no(503, "node_unreachable")], "o": COPY}, [200, 200, 200], "anoo"),
        ({"a": COPIES, "n": [STRANGER], "o": COPY}, [200, 200, 200], "anoo"),
        ({"a": COPIES, "n": [FOREIGN], "o": COPY}, [200, 200, 200], "anoo"),
        ({"a": COPIES, "n": [SLOW]}, [200, SLOW], "an"),
        ({"a": COPIES, "n": [no(429, "rate_limited")]}, [200, 429, 429], "ann"),
        ({"a": COPIES, "n": [no(401, "invalid_token")]}, [200, 401, 401], "ann"),
        ({"a": COPIES, "n": [no(403, "forbidden")]}, [200, 403, 403], "ann"),
        # it may run twice at most
        ({"a": COPIES, "n": [LOST], "o": [LOST]}, [200, LOST], "ano"),
        ({"a": COPIES, "n": [LOST], "o": [UNLOADING]}, [200, 200], "anoa"),
        ({"a": COPIES, "n": [UNLOADING], "o": [LOST]}, [200, 200], "anoa"),
        ({"a": COPIES, "n": [UNLOADING], "o": [UNLOADING]}, [200, 200], "anoa"),
        ({"a": [COPIES[0], LOST], "b": COPIES, "n": [UNLOADING], "o": [UNLOADING]}, [200, 200], "anoab"),
        ({"a": [COPIES[0], LOST], "n": [UNLOADING], "o": [LOST]}, [200, LOST], "anoa"),
        # a model that has other copies now is looked up anew
        ({"a": [ok(copies=f"{N} {N}/"), COPIES[0]], "n": COPY}, [200, 200, 200, 200], "anan"),
        ({"a": [ok(copies=f"{N} {N}/"), LOST], "b": COPIES, "n": COPY}, [200, 200, 200, 200], "anabn"),
    ],
)
async def test_inference_goes_where_its_model_is(
    answers: dict[str, list[Answer | ClientProblem]], ends: list[Any], asked: str
) -> None:
    hosts, left = list[str](), {host: list(given) for host, given in answers.items()}

    class Playing(Silent):
        async def send(self, request: Request) -> Answer:
            """Play the next answer of this server, the last one again and again."""
            assert request.model == "m"
            host = self.options.address.url.removeprefix("http://")
            hosts.append(host)
            given = left[host].pop(0) if len(left[host]) > 1 else left[host][0]
            if isinstance(given, ClientProblem):
                raise given
            return given

    options = [ConnectionOptions(Address.of(url), 30.0) for url in ("http://a", "http://b")]
    transport, seen = FailoverTransport(options, Playing, lambda: 0.0), list[Any]()
    for _ in ends:
        try:
            seen.append((await transport.send(Request("POST", "/x", repeatable=False, model="m"))).status)
        except ServerUnreachable as problem:
            seen.append(problem)
        if other := transport._nodes.get("http://o"):
            other.in_flight = 1  # so that n, with none, is asked first
    assert (seen, "".join(hosts)) == (ends, asked)


@pytest.mark.parametrize(
    ("configured", "named", "goes"),
    [
        ("http://a:1", "http://b:2", True),
        ("http://a:1", "http://b:2/", True),
        ("https://a:1", "https://b:2", True),
        ("http://127.0.0.1:1", "http://127.0.0.1:2", True),
        ("https://a:1", "http://b:2", False),
        ("http://a:1", "https://b:2", False),
        ("http://a:1", "http://eve@b:2", False),
        ("http://a:1", "http://b:2/?x", False),
        ("http://a:1", "file:///etc", False),
        ("http://a:1", "http://127.0.0.1:2", False),
        ("http://a:1", "http://localhost:2", False),
    ],
)
async def test_token_goes_to_addresses_that_the_server_names_unless_odd(
    configured: str, named: str, *, goes: bool
) -> None:
    made = [
        *(await connections_to_named(configured, named)),
        *(await connections_to_named(configured, named, nodes.COPIES)),
    ]
    assert [each.options.address for each in made] == ([Address.of(named, TOKEN)] * 2 if goes else [])
    assert all(each.options.connect_s == nodes.NODE_CONNECT_S for each in made)


async def connections_to_named(configured: str, named: str, header: str = nodes.NODE_ADDRESS) -> list[Silent]:
    """Return the transports that a client makes to an address which a configured server names."""
    transport = FailoverTransport([ConnectionOptions(Address.of(configured, TOKEN), 30.0)], Silent)
    transport.servers[0].named, transport.servers[0].header = named, header
    await transport.send(Request("POST", "/x", model="m"))
    return transport.close_all()[1:]


class Copy(Silent):
    """A transport to a server that names two copies, or to one of them; the test decides its answers."""

    def __init__(self, options: ConnectionOptions) -> None:
        super().__init__(options)
        self.code, self.asked, self.may_answer = "", 0, asyncio.Event()
        self.may_answer.set()

    async def send(self, request: Request) -> Answer:
        """Answer, or refuse with the code that the test has set."""
        assert request.model
        self.asked += 1
        await self.may_answer.wait()
        fields = {"loadledger-node": "n", nodes.COPIES: "http://a http://b"}
        body = json.dumps({"code": self.code}).encode()
        return Answer(503, fields, body) if self.code else Answer(200, fields, b"")


class TwoCopies:
    """A client of a model with two copies, and its clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        options = ConnectionOptions(Address.of("http://server"), 30.0)
        self.transport = FailoverTransport([options], Copy, lambda: self.now_s)

    @property
    def nodes(self) -> list[Copy]:
        return [node.transport for node in self.transport._nodes.values()]

    async def learn(self, model: str) -> None:
        """Have the server name the copies of a model."""
        await self.transport.send(Request("POST", "/x", model=model))

    async def ask(self, model: str = "m", times: int = 1) -> list[int]:
        """Send inferences, none of which is answered before all are sent; return how often each was asked."""
        before = self.list_counts()
        for node in self.nodes:
            node.may_answer.clear()
        request = Request("POST", "/x", model=model)
        sent = [asyncio.create_task(self.transport.send(request)) for _ in range(times)]
        await until(lambda: sum(self.list_counts()) == sum(before) + times)
        counts = [after - count for after, count in zip(self.list_counts(), before, strict=True)]
        for node in self.nodes:
            node.may_answer.set()
        await asyncio.gather(*sent)
        return counts

    def list_counts(self) -> list[int]:
        return [node.asked for node in self.nodes]


@pytest.mark.parametrize("code", ["model_unloading", "node_unreachable", "model_not_loaded"])
async def test_copy_that_was_not_there_is_used_again(code: str) -> None:
    copies = TwoCopies()
    for model in ("m", "other"):
        await copies.learn(model)
    gone, _ = copies.nodes
    gone.code = code
    while not gone.asked:
        await copies.ask()
    gone.code = ""
    assert await copies.ask(times=20) == [0, 20]
    assert await copies.ask("other", times=20) == [10, 10]
    copies.now_s = nodes.AVOID_S
    assert await copies.ask(times=20) == [10, 10]
    assert copies.transport.servers[0].asked == 2


async def test_copy_with_fewer_requests_in_flight_is_asked() -> None:
    copies = TwoCopies()
    await copies.learn("m")
    failing, _ = copies.nodes
    for code in ("", "inference_failed"):  # which is fast, and attracts nothing
        failing.code = code
        assert await copies.ask(times=20) == [10, 10]


async def test_remembered_nodes_and_models_are_bounded() -> None:
    transport = FailoverTransport([ConnectionOptions(Address.of("http://a"), 30.0)], Silent)
    for index in range(max(nodes.MAX_NODES, nodes.MAX_MODELS) + 1):
        transport.servers[0].named = f"http://n{index}"
        await transport.send(Request("POST", "/x", model=f"m{index}"))
    assert len(transport._known) <= nodes.MAX_MODELS
    assert len(transport.close_all()) == nodes.MAX_NODES + 1
