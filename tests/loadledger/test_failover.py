"""A client of several servers, and of the nodes behind them, byte by byte."""

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

from loadledger import Busy, ServerError, ServerUnreachable
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


def answered(node: str | None = None, address: str | None = None, copies: str | None = None) -> bytes:
    """Return the answer of a node, which has come from another one if it names an address."""
    named = {"Loadledger-Node": node, "Loadledger-Node-Address": address, "Loadledger-Copies": copies}
    return said(ANSWER, "200 OK", *(f"{name}: {value}" for name, value in named.items() if value))


def refused(status: str, code: str, node: str | None = None) -> bytes:
    fields = [] if node is None else [f"Loadledger-Node: {node}"]
    return said(json.dumps({"code": code, "detail": "no"}).encode(), status, *fields)


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
    with absent() as gone, odd_server(JOB, answered()) as server:
        with connected(kind, f"{gone},{server.url}", TOKEN) as client:
            assert client.load("m").status == "completed"
            assert infer(client) == 2.0
        assert heads(server) == ["POST /api/v1/models/m/load HTTP/1.1", INFER]


@each_kind
def test_all_urls_absent_is_unreachable(kind: str) -> None:
    with absent() as one, absent() as two, connected(kind, f"{one},{two}") as client:
        for _ in range(2):
            with pytest.raises(ServerUnreachable, match="cannot be reached"):
                infer(client)


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
            odd_server(answered("n2", node.url), JOB) as server,
            connected(kind, server.url, TOKEN) as client,
        ):
            assert [infer(client) for _ in range(3)] == [2.0] * 3
            client.job("j1")
            assert heads(server) == [INFER, "GET /api/v1/jobs/j1 HTTP/1.1"]
        assert heads(node) == [INFER] * 2
        assert all(f"Bearer {TOKEN}".encode() in request for request in node.requests)


@each_kind
@pytest.mark.parametrize(
    "script",
    [
        refused("503 Service Unavailable", "model_not_loaded", "n2"),
        refused("503 Service Unavailable", "shutting_down", "n2"),
        refused("401 Unauthorized", "invalid_token"),
        said(b"<html>", media_type="text/html"),
        b"SSH-2.0-no\r\n\r\n",
    ],
    ids=["moved", "stopping", "keys", "foreign", "no-http"],
)
def test_configured_server_is_asked_when_the_node_is_not_it(kind: str, script: bytes) -> None:
    with odd_server(script) as node:
        here = (answered("n2", node.url), answered("n1"), answered("n1"))
        with odd_server(*here) as server, connected(kind, server.url) as client:
            assert [infer(client) for _ in range(3)] == [2.0] * 3
            assert heads(server) == [INFER] * 3
        assert heads(node) == [INFER]


@each_kind
def test_absent_node_is_not_tried_again_for_a_while(kind: str) -> None:
    with absent() as gone, odd_server(*[answered("n2", gone)] * 3) as server:
        with connected(kind, server.url) as client:
            assert [infer(client) for _ in range(3)] == [2.0] * 3
        assert heads(server) == [INFER] * 3


@each_kind
def test_refusal_of_the_node_is_the_answer(kind: str) -> None:
    with odd_server(refused("503 Service Unavailable", "worker_died", "n2")) as node:
        with odd_server(answered("n2", node.url)) as server, connected(kind, server.url) as client:
            assert infer(client) == 2.0
            with pytest.raises(Busy, match="worker_died"):
                infer(client)
        assert heads(node) == [INFER]


@each_kind
def test_node_that_forwards_names_no_address_to_go_to(kind: str) -> None:
    with odd_server() as third, odd_server(answered("n3", third.url)) as node:
        here = (answered("n2", node.url), answered("n1"))
        with odd_server(*here) as server, connected(kind, server.url) as client:
            assert [infer(client) for _ in range(3)] == [2.0] * 3
            assert heads(server) == [INFER] * 2
        assert (heads(node), heads(third)) == ([INFER], [])


@contextmanager
def copies(*scripts: bytes | None) -> Iterator[tuple[list[OddServer], str]]:
    """Run two nodes that have a model, each of which answers with all, after its script if there is one."""
    names = list[str]()

    def answer(connection: socket.socket) -> None:
        connection.sendall(answered("n", copies=" ".join(names)))

    first, second = ([answer if script is None else script, *[answer] * 40] for script in scripts)
    with odd_server(*first) as one, odd_server(*second) as two:
        names += [one.url, two.url]
        yield [one, two], " ".join(names)


@each_kind
def test_inferences_are_spread_over_copies(kind: str) -> None:
    with copies(None, None) as (nodes, names), odd_server(answered("n1", copies=names)) as server:
        with connected(kind, server.url, TOKEN) as client:
            assert [infer(client) for _ in range(20)] == [2.0] * 20
        assert heads(server) == [INFER]
        counts = [len(node.requests) for node in nodes]
        assert (sum(counts), min(counts) > 0) == (19, True)


@each_kind
@pytest.mark.parametrize(
    "script",
    [
        b"",
        refused("503 Service Unavailable", "model_unloading", "n2"),
        refused("503 Service Unavailable", "node_unreachable"),
        said(b"<html>", media_type="text/html"),
    ],
    ids=["lost", "unloading", "unreachable", "foreign"],
)
def test_another_copy_is_asked_once(kind: str, script: bytes) -> None:
    with copies(script, None) as (nodes, names), odd_server(answered("n1", copies=names)) as server:
        with connected(kind, server.url) as client:
            assert infer(client) == 2.0
            while not nodes[0].requests:  # each is as likely to be asked first
                assert infer(client) == 2.0
            before = len(nodes[1].requests)
            assert [infer(client) for _ in range(9)] == [2.0] * 9
        assert [len(node.requests) for node in nodes] == [1, before + 9]
        assert heads(server) == [INFER]


@each_kind
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_inference_may_run_twice_at_most(kind: str, lost: int) -> None:
    scripts = [b""] * lost + [refused("503 Service Unavailable", "model_unloading", "n2")] * (2 - lost)
    with (
        copies(*scripts) as (nodes, names),
        odd_server(answered("n1", copies=names), answered("n1")) as server,
        connected(kind, server.url) as client,
    ):
        assert infer(client) == 2.0
        if lost == len(nodes):
            with pytest.raises(ServerUnreachable, match="lost"):
                infer(client)
        else:
            assert infer(client) == 2.0
        assert [len(node.requests) for node in nodes] == [1, 1]
        assert len(server.requests) == (1 if lost == len(nodes) else 2)


@each_kind
@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("429 Too Many Requests", "rate_limited"),
        ("401 Unauthorized", "invalid_token"),
        ("403 Forbidden", "forbidden"),
    ],
)
def test_refusal_by_the_gate_of_a_copy_is_the_answer(kind: str, status: str, code: str) -> None:
    with (
        copies(refused(status, code), None) as ([refusing, _], names),
        odd_server(answered("n1", copies=names)) as server,
        connected(kind, server.url) as client,
    ):
        codes = list[str]()
        while len(refusing.requests) < 2:  # it is not avoided
            try:
                infer(client)
            except ServerError as error:
                codes.append(error.code)
        assert codes == [code]
        assert heads(server) == [INFER]


@each_kind
def test_model_with_other_copies_is_looked_up_anew(kind: str) -> None:
    with copies(None, None) as (nodes, names):
        before = names.partition(" ")[0] + " " + names.partition(" ")[0] + "/"
        with odd_server(answered("n1", copies=before), answered("n1", copies=names)) as server:
            with connected(kind, server.url) as client:
                assert [infer(client) for _ in range(20)] == [2.0] * 20
            assert heads(server) == [INFER] * 2
        assert min(len(node.requests) for node in nodes) > 0


@each_kind
def test_lost_lookup_of_changed_copies_is_repeated(kind: str) -> None:
    with copies(None, None) as (_, names):
        before = names.partition(" ")[0] + " " + names.partition(" ")[0] + "/"
        with (
            odd_server(answered("n1", copies=before), b"") as lost,
            odd_server(answered("n1", copies=names)) as server,
            connected(kind, f"{lost.url},{server.url}") as client,
        ):
            assert [infer(client) for _ in range(4)] == [2.0] * 4
        assert (heads(lost), heads(server)) == ([INFER] * 2, [INFER])


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
