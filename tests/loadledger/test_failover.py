"""A client of several servers, and of the nodes behind them, byte by byte."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.clients import KINDS, connected, job
from support.connections import OddServer, odd_server, said

from loadledger import Busy, ServerUnreachable
from loadledger.address import Address, ConnectionOptions
from loadledger.requests import Answer, Request, ResponseStream
from loadledger.transports import failover
from loadledger.transports.failover import FailoverTransport

TOKEN = "s3cr3t-token"
JOB = said(json.dumps(job("completed")).encode())
OUTPUT = {"name": "y", "datatype": "FP32", "shape": [1], "data": [2.0]}
ANSWER = json.dumps({"model_name": "m", "model_version": "1", "outputs": [OUTPUT]}).encode()
INPUT = {"x": np.ones(1, np.float32)}

each_kind = pytest.mark.parametrize("kind", KINDS)


def answered(node: str | None = None, address: str | None = None) -> bytes:
    """Return the answer of a node, which has come from another one if it names an address."""
    named = {"Loadledger-Node": node, "Loadledger-Node-Address": address}
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


class Silent:
    """A transport that answers for a node, and names another one."""

    def __init__(self, options: ConnectionOptions) -> None:
        self.options = options
        self.named = ""

    async def send(self, request: Request) -> Answer:
        """Return an answer from another node."""
        assert request.model
        return Answer(200, {"loadledger-node": "n2", "loadledger-node-address": self.named}, b"")

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
    made = await connections_to_named(configured, named)
    assert [each.options.address for each in made] == ([Address.of(named, TOKEN)] if goes else [])
    assert all(each.options.connect_s == failover.NODE_CONNECT_S for each in made)


async def connections_to_named(configured: str, named: str) -> list[Silent]:
    """Return the transports that a client makes to an address which a configured server names."""
    transport = FailoverTransport([ConnectionOptions(Address.of(configured, TOKEN), 30.0)], Silent)
    transport.servers[0].named = named
    await transport.send(Request("POST", "/x", model="m"))
    return transport.close_all()[1:]


async def test_remembered_nodes_and_models_are_bounded() -> None:
    transport = FailoverTransport([ConnectionOptions(Address.of("http://a"), 30.0)], Silent)
    for index in range(max(failover.MAX_NODES, failover.MAX_MODELS) + 1):
        transport.servers[0].named = f"http://n{index}"
        await transport.send(Request("POST", "/x", model=f"m{index}"))
    assert len(transport._known) <= failover.MAX_MODELS
    assert len(transport.close_all()) == failover.MAX_NODES + 1
