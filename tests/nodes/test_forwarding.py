"""Forwarding: any node answers for any model, through the node that has it."""

import asyncio
import base64
import gzip
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from support import models
from support.connections import odd_server, said
from support.cutting import cutting_proxy
from support.http import ENDLESS, MALFORMED, ONE, Answer, LocalApi, when
from support.models import save
from support.postgres import Database, join_shared_server
from support.reachable import (
    ReachableNode,
    forwarded,
    loaded_beside,
    reachable_node,
    reachable_nodes,
    read_claims,
    send,
)
from support.replicas import make_ledger
from support.uploads import FILES, files_in
from support.workers import computing, until

from events.registercommands import RevokeToken
from features.nodes.commands import DrainNode
from features.ondemand.app import DEMAND
from nodes import forwarding
from server.appkeys import BODIES, LOG
from server.auth.gate import Principal
from server.auth.tokens import timestamp_in
from server.http.bodies import iterate_body

BODY = json.dumps({"inputs": [ONE]}).encode()
LENGTH, ADDRESS = "Inference-Header-Content-Length", "Loadledger-Node-Address"
INFER = ("infer",)
NOT_COMPARED = {"date", "ratelimit", "x-request-id"}
"""Fields of each answer, in small letters: releases of aiohttp spell them differently."""
PATHS = ("/v2/models/m/infer", "/v2/models/%6D/infer", "/v2/models/m/versions/1/infer")
"""The fast path, the router's, and that of a version."""
UNEQUAL = json.dumps(
    {
        "inputs": [
            {"name": name, "shape": [count], "datatype": "FP32", "data": [1] * count}
            for name, count in (("a", 2), ("b", 3))
        ]
    }
).encode()
"""Inputs with which `models.subtract` fails."""
PROBLEM = {
    "type": "urn:loadledger:error:queue_full",
    "title": "a",
    "status": 429,
    "detail": "b",
    "code": "queue_full",
    "error": "b",
}
FAILED = said(json.dumps(PROBLEM).encode(), "429 Too Many Requests", "Retry-After: 7", "X-Odd: 1")

Pair = tuple[ReachableNode, ReachableNode]


def binary(count: int) -> tuple[bytes, dict[str, str]]:
    """Return body and header fields of an inference whose tensor and outputs are binary."""
    data = np.arange(count, dtype="<f4").tobytes()
    tensor = {"name": "x", "shape": [count], "datatype": "FP32"}
    head = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    return head + data, {LENGTH: str(len(head))}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    """Two nodes: the one at which all models are loaded, and one that joined after that."""
    postgres, folder = await join_shared_server(), tmp_path_factory.mktemp("nodes")
    loaded = {"m": models.add(1), "loop": models.counting_loop(), "subtract": models.subtract()}
    async with (
        postgres.database(make_ledger) as ledger,
        reachable_node(ledger.server_url, folder, "a", repository_writable="on") as owner,
    ):
        for model_id, model in loaded.items():
            save(model, folder / "repository", model_id)
            await owner.api.load(model_id)
        async with reachable_node(ledger.server_url, folder, "b", repository_writable="on") as other:
            yield owner, other


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def ask(node: ReachableNode, path: str = PATHS[0], body: bytes = BODY, **headers: Any) -> Answer:
    return await node.api.post(path, data=body, headers=headers, roles=INFER, subject="pia")


@contextmanager
def target(node: ReachableNode, address: tuple[str, int]) -> Iterator[None]:
    """Have something else answer at a node's address."""
    before, node.proxy.target = node.proxy.target, address
    try:
        yield
    finally:
        node.proxy.target = before


def in_flight(api: LocalApi, model_id: str) -> int:
    return api.worker(model_id).in_flight


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (BODY, {}),
        (BODY, {"X-Request-Id": "mine"}),
        (BODY.replace(b"{", b'{"id": "7", ', 1), {"Content-Type": "application/json"}),
        (gzip.compress(BODY), {"Content-Encoding": "gzip"}),
        binary(16),
        binary(150_000),
        (binary(150_000)[0], {**binary(150_000)[1], "Accept-Encoding": "gzip"}),
        (BODY[:-1], {}),
        (BODY, {LENGTH: "-1"}),
        (BODY.replace(b"FP32", b"INT8"), {}),
    ],
    ids=["json", "id", "typed", "gzip", "small", "large", "compressed", "malformed", "length", "datatype"],
)
async def test_both_nodes_answer_alike(pair: Pair, path: str, body: bytes, headers: dict[str, str]) -> None:
    owner, other = pair
    here, there = await ask(owner, path, body, **headers), await ask(other, path, body, **headers)
    assert there.status == here.status
    assert there.body == here.body
    fields = {name: value for name, value in there.headers.items() if name.lower() not in NOT_COMPARED}
    assert fields.pop(ADDRESS) == owner.address
    assert fields.pop("Loadledger-Node") == owner.name
    assert fields == {
        name: value
        for name, value in here.headers.items()
        if name.lower() not in {*NOT_COMPARED, "loadledger-node"}
    }
    assert here.headers["Loadledger-Node"] == owner.name
    if "X-Request-Id" in headers:
        assert there.headers["X-Request-Id"] == "mine"


@pytest.mark.parametrize("suffix", ["", "/ready", "/config", "/stats"])
async def test_reads_of_a_model_are_forwarded(pair: Pair, suffix: str) -> None:
    owner, other = pair
    for path in (f"/v2/models/m{suffix}", f"/v2/models/m/versions/1{suffix}"):
        here, there = await owner.api.get(path), await other.api.get(path)
        assert (there.status, there.json) == (here.status, here.json) == (200, there.json)
        assert (await other.api.send("HEAD", path)).status == 200
        assert there.headers["Loadledger-Node"] == owner.name
    assert (await other.api.get(f"/v2/models/m/versions/2{suffix}")).status == (
        await owner.api.get(f"/v2/models/m/versions/2{suffix}")
    ).status


async def test_label_that_one_node_sets_is_a_version_at_both(pair: Pair) -> None:
    owner, other = pair
    label = "/api/v1/models/m/labels/champion"
    assert (await other.api.send("PUT", label, json={"version": 1})).status == 204
    path = "/v2/models/m/versions/champion"
    for node in (other, owner):  # the first forwards, with how far it knows the ledger
        answer = await ask(node, f"{path}/infer")
        assert (answer.status, answer.json["model_version"]) == (200, "1")
        assert (await node.api.get(f"{path}/ready")).status == 200
        assert (await ask(node, "/v2/models/m/versions/nobody/infer")).refusal == (404, "unknown_label")


@pytest.mark.parametrize(
    ("model_id", "refusal"),
    [("nope", (404, "unknown_model")), ("subtract", (400, "inference_failed"))],
)
async def test_refusals_are_the_same_at_both_nodes(
    pair: Pair, model_id: str, refusal: tuple[int, str]
) -> None:
    found = [await ask(node, f"/v2/models/{model_id}/infer", UNEQUAL) for node in pair]
    assert [answer.refusal for answer in found] == [refusal, refusal]
    assert found[0].json == found[1].json, found


async def test_forwarded_request_is_not_forwarded_again(pair: Pair) -> None:
    owner, other = pair
    for path in PATHS:
        refused = await send(other, path, forwarded(owner, other))
        assert refused.refusal == (503, "model_not_loaded")
        assert refused.headers["Retry-After"] == "1"
        assert "node 'a', not here; node 'a' has forwarded" in refused.json["detail"]
        assert (await send(owner, path, forwarded(other, owner))).status == 200
    await owner.proxy.reset()
    with target(owner, other.proxy.target):  # the address of one node leads to another one
        refused = await ask(other)
    await owner.proxy.reset()
    assert refused.refusal == (503, "node_unreachable")  # whose token is for the other one


async def test_forwarding_needs_a_token_of_the_role(pair: Pair) -> None:
    owner, other = pair
    for path in PATHS:
        assert (await other.api.post(path, data=BODY, roles=("audit",))).status == 403
        assert (await send(owner, path, forwarded(other, owner, "audit"))).status == 403
        from_b: dict[str, Any] = {"Loadledger-Forwarded": "b"}
        assert (await send(owner, path, from_b)).refusal == (401, "no_credentials")
        assert (await ask(owner, path, **from_b)).refusal == (401, "invalid_token")  # a client's


async def test_forwarded_token_ends_with_the_clients_and_names_its_issuer(pair: Pair) -> None:
    owner, other = pair
    sender, receiver = (node.node.peers for node in (other, owner))
    to = other.app[LOG].state.registers.nodes[owner.name]
    for issuer in ("https://issuer", None):
        client = Principal("pia", frozenset({"infer"}), "jti", time.time() + 3600, issuer)
        seen = receiver.verify(sender.make_token(to, "m", client), "m")
        assert (seen, seen.jti, seen.issuer) == (client, "jti", issuer)

    latest = time.time() + 5.5  # the clock may be set back meanwhile
    assert read_claims(forwarded(other, owner, expires_s=5))["exp"] <= latest
    assert read_claims(forwarded(other, owner, expires_s=5)) != read_claims(forwarded(other, owner))
    good = forwarded(other, owner, jti="revoked")
    assert (await send(owner, PATHS[0], good)).status == 200
    later = timestamp_in(3600)
    await owner.app[LOG].submit(RevokeToken("revoked", "alice", later))
    refused = await send(owner, PATHS[0], good)
    assert refused.refusal == (401, "invalid_token")
    assert "revoked" in refused.json["detail"]


async def test_only_some_header_fields_are_forwarded(pair: Pair) -> None:
    owner, other = pair
    sent = {
        "Content-Type": "a/b",
        "Content-Encoding": "odd",
        "Accept": "c/d",
        "Accept-Encoding": "identity",
        LENGTH: "7",
        "X-Request-Id": "mine",
        "traceparent": "00-1-2-01",
        "tracestate": "a=1",
    }
    hidden = {"Connection": "close", "Te": "trailers", "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4"}
    known = other.app[LOG].state.position
    with odd_server(FAILED) as server:
        port = int(server.url.rpartition(":")[2])
        await owner.proxy.reset()
        with target(owner, ("localhost", port)):
            answer = await ask(other, body=b"\0unparsed", **sent, **hidden)
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    arrived = {name.title(): value for name, _, value in (field.partition(": ") for field in fields)}
    claims = read_claims(arrived)
    assert arrived.pop("Authorization") != f"Bearer {other.api.token('infer', subject='pia')}"
    assert (claims["iss"], claims["aud"], claims["sub"]) == ("b", "a/1", "pia")
    assert known <= int(arrived.pop("Loadledger-Position")) <= other.app[LOG].state.position
    expected = {
        **sent,
        "Loadledger-Forwarded": other.name,
        "Content-Length": "9",
        "Host": f"{owner.proxy.address[0]}:{owner.proxy.address[1]}",
    }
    assert line == "POST /v2/models/m/infer HTTP/1.1"
    assert arrived == {name.title(): value for name, value in expected.items()}
    assert body == b"\0unparsed"
    assert answer.refusal == (429, "queue_full")
    assert answer.headers["Retry-After"] == "7"
    assert "X-Odd" not in answer.headers


@pytest.mark.parametrize(
    "script",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        b"SSH-2.0-no\r\n\r\n",
        said(b"", "302 Found", "Location: http://127.0.0.1:1/"),
        said(b"", "401 Unauthorized"),
        said(b"", "429 Too Many Requests", 'RateLimit-Policy: "auth-failures";q=30;w=60'),
    ],
    ids=["closed", "cut", "foreign", "redirect", "token", "tokens"],
)
async def test_broken_answer_of_a_node_is_refused(pair: Pair, script: bytes) -> None:
    owner, other = pair
    with odd_server(script) as server:
        await owner.proxy.reset()
        with target(owner, ("localhost", int(server.url.rpartition(":")[2]))):
            answer = await ask(other)
    assert answer.refusal == (503, "node_unreachable")
    assert answer.headers["Retry-After"] == "1"
    assert (await ask(other)).status == 200


async def test_answer_of_a_node_counts_while_it_arrives(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, other = pair
    bodies = other.api.app[BODIES]
    with odd_server(said(bytes(8 * 2**20))) as server:
        await owner.proxy.reset()
        monkeypatch.setattr(bodies, "_max_bytes", 2**20)
        with target(owner, ("localhost", int(server.url.rpartition(":")[2]))):
            answer = await ask(other)
    assert answer.refusal == (503, "bodies_full")
    assert bodies.taken_bytes == 0


async def test_refused_connection_names_the_node(pair: Pair) -> None:
    owner, other = pair
    await owner.proxy.cut()
    answers = [await ask(other, path) for path in PATHS] + [await other.api.get("/v2/models/m/ready")]
    owner.proxy.heal()
    assert {answer.refusal for answer in answers} == {(503, "node_unreachable")}
    assert (
        f"node 'a', which has to answer, cannot be reached at {owner.address}" in (answers[0].json["detail"])
    )
    assert (await ask(other)).status == 200


async def test_client_that_leaves_ends_the_forwarded_inference(pair: Pair) -> None:
    owner, other = pair
    is_computing = computing(owner.api.worker("loop").pid)
    running = asyncio.create_task(other.api.infer("loop", ENDLESS))
    await until(is_computing)
    running.cancel()
    await until(lambda: not in_flight(owner.api, "loop"))
    assert (await other.api.infer("loop", {**ENDLESS, "data": [5]})).status == 200


async def test_slow_client_holds_up_one_node_only(pair: Pair) -> None:
    owner, other = pair
    body, fields = binary(150_000)
    lines = [
        "POST /v2/models/m/infer HTTP/1.1",
        "Host: a",
        f"Content-Length: {len(body)}",
        f"Authorization: Bearer {other.api.token('infer')}",
        *(f"{name}: {value}" for name, value in fields.items()),
    ]
    assert other.api.client.port is not None
    reader, writer = await asyncio.open_connection(other.api.client.host, other.api.client.port, limit=2**10)
    writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body[:-1])
    await until(lambda: other.app[BODIES].taken_bytes > len(body) // 2)
    assert not in_flight(owner.api, "m")
    assert not owner.app[BODIES].taken_bytes
    writer.write(body[-1:])
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    assert not in_flight(owner.api, "m")
    received = await reader.read(-1)
    assert np.frombuffer(received[-600_000:], "<f4")[-1] == 150_000
    writer.close()
    await writer.wait_closed()
    await until(lambda: not other.app[BODIES].taken_bytes)


async def test_body_budget_counts_forwarded_bodies(pair: Pair) -> None:
    _, other = pair
    bodies = other.app[BODIES]
    bodies.add("pia", 2**29)
    body, fields = binary(150_000)
    refused = await ask(other, body=body, **fields)
    bodies.add("pia", -(2**29))
    assert refused.refusal == (503, "bodies_full")
    assert (await ask(other, body=body, **fields)).status == 200
    assert bodies.taken_bytes == 0


async def endless_body() -> AsyncIterator[bytes]:
    yield b"1"
    await asyncio.Event().wait()


async def test_requests_about_an_upload_go_to_its_node(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, other = pair
    before = files_in(owner.api.config.repository)
    uploads = "/api/v1/models/uploaded/versions/1/uploads"
    begun = await owner.api.post(uploads)
    upload = begun.headers["Location"]
    assert upload.endswith(".a")
    for path, data in FILES.items():
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        for of, status in ((b"", 400), (data, 201)):
            fields = {"Repr-Digest": f"sha-256=:{digest}:"}
            answer = await other.api.send("PUT", f"{upload}/files/{path}", data=of, headers=fields)
            assert answer.status == status
    part = {"Content-Range": "bytes 0-0/2"}
    answer = await other.api.send("PUT", f"{upload}/files/part", data=b"1", headers=part)
    assert answer.refusal == (400, "invalid_parameter")
    with monkeypatch.context() as patch:
        patch.setattr(iterate_body, "__defaults__", (0.1,))
        answer = await other.api.send("PUT", f"{upload}/files/part", data=endless_body())
    assert answer.refusal == (408, "body_timeout")
    shown = await other.api.get(upload, roles=("admin",))
    assert {each["path"] for each in shown.json["files"]} == FILES.keys()
    unknown = (404, "unknown_upload")
    assert (await other.api.get(upload, roles=("admin",), subject="bob")).refusal == unknown
    own = forwarded(owner, other, "admin", model_id="uploaded")
    assert (await other.api.get(upload, roles=(), headers=own)).refusal == unknown
    await owner.proxy.cut()
    assert (await other.api.post(f"{upload}/commit")).refusal == (503, "node_unreachable")
    owner.proxy.heal()
    refused = await other.api.post(f"{upload}/commit", json={"source": "https://alice:secret@host/m"})
    assert refused.refusal == (400, "invalid_body")
    coded = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refused = await other.api.post(f"{upload}/commit", data=gzip.compress(b"{}"), headers=coded)
    assert refused.refusal == (415, "unsupported_media_type")
    statement = {"source": "hf://org/repo@main", "resolved": "hf://org/repo@c0ffee"}
    answer = await other.api.post(f"{upload}/commit", json=statement)
    assert (answer.status, answer.headers["Location"]) == (201, "/api/v1/models/uploaded")
    [shown] = (await owner.api.model("uploaded"))["sources"]
    assert shown.items() >= {**statement, "added_by": "alice"}.items()
    added = {f"uploaded/1/{path}": data for path, data in FILES.items()}
    assert files_in(owner.api.config.repository) == before | added
    second = (await other.api.post(uploads.replace("/1/", "/2/"))).headers["Location"]
    assert (await owner.api.send("DELETE", second)).status == 204
    assert (await owner.api.send("DELETE", f"{second}x")).refusal == unknown


async def test_forwarded_request_waits_for_what_its_sender_knows(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, node = pair  # at which the next model is loaded, since it has none
    monkeypatch.setattr(forwarding, "CATCH_UP_S", 0.0)  # which is for models that are here
    monkeypatch.setattr(forwarding, "CATCH_UP_OR_REFUSE_S", 60.0)
    save(models.add(1), node.api.config.repository, "late")
    await until(lambda: node.app[LOG].state.position == owner.app[LOG].state.position)
    loaded_at = node.app[LOG].state.position + 4  # after the request, the placement and the start
    path, own = "/v2/models/late/infer", forwarded(owner, node, model_id="late")
    assert (await send(node, path, own)).refusal == (503, "model_not_loaded")
    asking = asyncio.create_task(send(node, path, {**own, "Loadledger-Position": str(loaded_at)}))
    await node.api.load("late")
    assert (await asking).status == 200
    serving = node.app[LOG].state.models["late"].serving
    assert serving is not None
    assert (serving.server, serving.position) == (node.name, loaded_at)
    ahead = str(loaded_at + 1000)
    assert (await send(node, path, {**own, "Loadledger-Position": ahead})).status == 200


async def test_no_inference_fails_while_its_model_moves(ledger: Database, tmp_path: Path) -> None:
    async with reachable_nodes(ledger.server_url, tmp_path, "a", "b", "c") as nodes:
        save(models.add(1), tmp_path / "repository", "m")
        owner, _ = await loaded_beside(nodes, "m")
        (body, fields), arriving = binary(150_000), asyncio.Event()
        stopping, answers = asyncio.Event(), list[Answer]()

        async def keep_asking(node: ReachableNode) -> None:
            while not stopping.is_set():
                answers.append(await ask(node))

        async def parts() -> AsyncIterator[bytes]:
            yield body[:-1]
            await arriving.wait()
            yield body[-1:]

        begun = {**fields, "Content-Length": str(len(body))}
        slow = asyncio.create_task(owner.api.post(PATHS[0], data=parts(), headers=begun, roles=INFER))
        asking = [asyncio.create_task(keep_asking(node)) for node in nodes]
        await until(lambda: len(answers) > 20 and owner.app[BODIES].taken_bytes > len(body) // 2)
        await owner.app[LOG].submit(DrainNode(owner.name, "alice"))
        moved_to = await _moved(nodes, owner)
        count = len(answers)
        await until(lambda: len(answers) > count + 20)
        stopping.set()
        await asyncio.gather(*asking)
        assert [answer.body for answer in answers if answer.status != 200] == []
        assert {answer.headers["Loadledger-Node"] for answer in answers} == {owner.name, moved_to}

        arriving.set()
        answer = await slow
        assert (answer.status, answer.headers["Loadledger-Node"]) == (200, moved_to)
        assert np.frombuffer(answer.body[-600_000:], "<f4")[-1] == 150_000
        assert not owner.app[BODIES].taken_bytes


async def _moved(nodes: Sequence[ReachableNode], owner: ReachableNode) -> str:
    """Wait until all nodes know that the model is elsewhere, and unloaded where it was."""

    async def look() -> set[str | None]:
        return {node.node_of("m") for node in nodes}

    found = await when(look, lambda names: len(names) == 1 and names.isdisjoint({None, owner.name}))
    [name] = found
    assert name is not None
    return name


async def test_good_body_loads_on_demand_where_the_model_fits(ledger: Database, tmp_path: Path) -> None:
    options: dict[str, Any] = {"on_demand": "on", "max_loaded": 2, "evict": "idle", "min_residency_s": 0}
    url = ledger.server_url
    async with (
        reachable_node(url, tmp_path, "a", **options) as roomy,
        reachable_node(url, tmp_path, "b", **options, memory_budget="1000000") as small,
    ):
        for index, node in enumerate((small, roomy)):
            save(models.add(index), tmp_path / "repository", f"m{index}")
            answer = await ask(node, f"/v2/models/m{index}/infer")
            assert answer.json["outputs"][0]["data"] == [1.0 + index]
            assert answer.headers["Loadledger-Node"] == roomy.name
            assert (ADDRESS in answer.headers) is (node is small)
        waits = [
            {end for end, waited_s in node.app[DEMAND].waited_s.items() if waited_s}
            for node in (small, roomy)
        ]
        assert waits == [{"forwarded"}, {"completed"}]

        save(models.add(1), tmp_path / "repository", "m")  # now there is no room without an eviction
        for sender, node in ((roomy, small), (small, roomy)):
            for body, headers in MALFORMED:
                answer = await ask(node, body=body, **headers)
                assert answer.refusal == (400, "invalid_input")
                fields = {**forwarded(sender, node), **headers}
                answer = await node.api.post(PATHS[0], data=body, headers=fields, roles=())
                assert answer.refusal == (400, "invalid_input")
        assert await roomy.api.types("m") == []
        assert {"ModelUnloaded"}.isdisjoint([event.type for event in await roomy.api.events()])


async def test_nodes_answer_while_the_database_is_away(ledger: Database, tmp_path: Path) -> None:
    """Also for a token revoked since, as `docs/cluster.md` says; but nothing is recorded for it."""
    async with (
        cutting_proxy(ledger.server.address) as first,
        cutting_proxy(ledger.server.address) as second,
        reachable_node(ledger.url("ledger_server", first.address), tmp_path, "a", lease_s=3.0) as owner,
    ):
        save(models.add(1), tmp_path / "repository", "m")
        await owner.api.load("m")
        url = ledger.url("ledger_server", second.address)
        async with reachable_node(url, tmp_path, "b", lease_s=3.0) as other:
            asked = {"subject": "mallory", "roles": ["admin"], "expires_s": 600}
            issued = (await other.api.post("/api/v1/tokens", json=asked)).json
            token = {"Authorization": f"Bearer {issued['token']}"}

            async def try_all(node: ReachableNode) -> list[int]:
                send = partial(node.api.send, roles=(), headers=token)
                answers = (
                    await send("GET", "/api/v1/models"),
                    await send("POST", PATHS[0], json={"inputs": [ONE]}),
                    await send("POST", "/api/v1/models/m/unload", json={}),
                )
                return [answer.status for answer in answers]

            await until(lambda: issued["jti"] in owner.app[LOG].state.registers.tokens)
            await first.cut()
            assert (await other.api.post(f"/api/v1/tokens/{issued['jti']}/revoke")).status == 200
            assert await try_all(owner) == [200, 200, 503]
            assert await try_all(other) == [401, 401, 401]

            await second.cut()
            nodes = owner, other
            await until(lambda: all(node.node.membership.is_late for node in nodes))
            assert [(await ask(node)).headers["Loadledger-Node"] for node in nodes] == ["a", "a"]
            for proxy in (first, second):
                proxy.heal()
            await until(lambda: all(not node.node.membership.is_late for node in nodes))
            assert (await ask(other)).status == 200
            await when(lambda: try_all(owner), lambda found: found == [401, 401, 401])
