"""Somebody with the nodes' role in the database, and no key; somebody with a token of a node."""

import asyncio
import base64
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec.structs import replace
from support.clients import printed, printed_json, refused
from support.http import ONE, when
from support.models import add, save
from support.nodes import list_nodes
from support.postgres import Database
from support.reachable import (
    ReachableNode,
    forwarded,
    loaded_beside,
    reachable_node,
    reachable_nodes,
    read_claims,
    send,
)
from support.replicas import rows_in

from events.clock import format_timestamp, utc_now, uuid7
from events.codec import encode_event, hash_body
from events.types import SYSTEM, Draft, Event, EventsDiscarded, LoadRequested, record_draft
from events.values import Credential, FileHash
from features.approvals.commands import approval_statement
from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.approvals.fold import make_approval
from features.approvals.rules import ApprovalRule
from features.nodes.facts import NodeJoined, NodeSignature
from features.rules import LoadPolicy
from server.appkeys import LOG

INFER = "/v2/models/m/infer"
MODELS = "mnop"


MakeBody = Callable[[int, str], str]
"""Makes the body of an event of its position and time."""


async def append_as_role(database: Database, *bodies: MakeBody) -> None:
    """Append events to a ledger as the nodes' role, in one transaction, as soon as nobody else is first."""
    connection = await asyncpg.connect(database.server_url)
    try:
        await connection.execute("SET search_path = loadledger")
        while True:
            head = await connection.fetchrow("SELECT position, hash, recorded_at FROM head")
            assert head is not None
            position, digest, before = head
            at, after = max(before, format_timestamp(utc_now())), digest
            made = [make(position + number, at) for number, make in enumerate(bodies, start=1)]
            hashes = [digest := hash_body(digest, body) for body in made]
            said = await connection.fetchval(
                "SELECT append($1, $2, $3, $4, NULL, NULL, 3600)", position, after, made, hashes
            )
            if said == "appended":
                return
    finally:
        await connection.close()


def made_of(draft: Draft) -> MakeBody:
    return lambda position, at: encode_event(record_draft(draft, position, at))


def joins(data: NodeJoined) -> MakeBody:
    """Return what makes the event of a join."""
    return made_of(Draft(uuid7(), data, SYSTEM))


def rogue_join(name: str, address: str, epoch: int = 1) -> NodeJoined:
    """Return the join of a node that has no key of the others."""
    return NodeJoined(name, epoch, address, (), None, "1", None, unclean=False)


async def test_rogue_node_gets_no_model_and_no_token(ledger: Database, tmp_path: Path) -> None:
    received = list[str]()

    async def listen(request: web.Request) -> web.Response:
        received.append(f"{request.method} {request.path} {dict(request.headers)}")
        return web.json_response(
            {"outputs": [{"name": "y", "shape": [1], "datatype": "FP32", "data": [666]}]}
        )

    listener = web.Application()
    listener.router.add_route("*", "/{path:.*}", listen)
    async with (
        TestServer(listener) as server,
        reachable_nodes(ledger.server_url, tmp_path, "b", "c") as nodes,
    ):
        for name in ("a", "z"):  # one would place, and the other would get the next models
            await append_as_role(ledger, joins(rogue_join(name, str(server.make_url("/")).rstrip("/"))))
        await when(lambda: list_nodes(nodes[1].api), lambda found: len(found) == 4)
        for model_id in MODELS:
            save(add(1), tmp_path / "repository", model_id)
            assert (await nodes[0].api.load(model_id))["node"] in "bc"
        for model_id in MODELS:
            for node in nodes:
                answer = await when(
                    lambda node=node, model_id=model_id: node.api.infer(model_id, ONE),  # type: ignore[misc]
                    lambda answer: answer.status == 200,
                )
                assert answer.json["outputs"][0]["data"] == [2.0]
        assert received == []


def body(position: int, at: str, /, **changes: Any) -> str:
    """Return the body of an event with other members; `...` leaves one out."""
    event: dict[str, Any] = {
        "actor": "system",
        "data": {},
        "id": "01a20bcb-c779-794e-ba72-b4cf6aca3ebf",
        "job_id": None,
        "model_id": None,
        "position": position,
        "recorded_at": at,
        "schema": 1,
        "type": "OfLater",
        "version": None,
        "worker_id": None,
    }
    members = {name: value for name, value in {**event, **changes}.items() if value is not ...}
    return json.dumps(members, sort_keys=True, separators=(",", ":"))


NO_EVENTS: list[dict[str, Any]] = [
    *({name: ...} for name in json.loads(body(1, ""))),
    *({name: 1.5} for name in json.loads(body(1, ""))),
    *({name: []} for name in json.loads(body(1, ""))),
    *({"recorded_at": at} for at in ("9", "2026-02-30T00:00:00.000000Z", "2026-01-01T00:00:00Z")),
    *({"schema": value} for value in (0, -1, "1", 2**40)),
    *({"version": value} for value in ("1", -1, 2**70)),
    *({"type": value} for value in ("", "a", "x" * 99, None)),
    {"further": 1},
]


async def test_append_refuses_what_is_no_event(ledger: Database, tmp_path: Path) -> None:
    async with reachable_node(ledger.server_url, tmp_path, "a") as node:
        for changes in NO_EVENTS:
            with pytest.raises(asyncpg.PostgresError):
                await append_as_role(ledger, lambda position, at, c=changes: body(position, at, **c))  # type: ignore[misc]
        for text in ("", "1", "{}", "[]", "{", '"a"', "null"):
            with pytest.raises(asyncpg.PostgresError):
                await append_as_role(ledger, lambda _position, _at, text=text: text)  # type: ignore[misc]
        for old, new in (('{"actor"', '{ "actor"'), ('"type"', '"\\u0074ype"'), ('"id"', '"id":"a","id"')):
            with pytest.raises(asyncpg.PostgresError):
                await append_as_role(
                    ledger,
                    lambda position, at, old=old, new=new: body(position, at).replace(old, new, 1),  # type: ignore[misc]
                )
        await append_as_role(ledger, body)  # of a later release, as far as anybody can know
        save(add(1), tmp_path / "repository", "m")
        await node.api.load("m")


POLICY = LoadPolicy(approval=(ApprovalRule(("m",)),))


async def load_job(node: ReachableNode, **said: str) -> tuple[str, str]:
    """Load the model `m` as alice; return the job, and `completed` or the code of its failure."""
    roles = ("admin", "emergency")
    job = (await node.api.post("/api/v1/models/m/load", json=said, roles=roles, wait=60)).json
    return job["id"], job["error"]["code"] if job["error"] else job["status"]


async def hash_version(node: ReachableNode) -> tuple[str, tuple[FileHash, ...]]:
    """Return the digest and the files of the version that a load of the model `m` takes."""
    found = (await node.api.get("/api/v1/models/m/verify", roles=("approve",))).json
    return found["digest"], tuple(FileHash(**file) for file in found["files"])


async def approve(node: ReachableNode) -> Event:
    """Approve the model `m` as carol; return the event."""
    said = {"digest": (await hash_version(node))[0], "reason": "reviewed"}
    path = "/api/v1/models/m/versions/1/approval"
    answer = await node.api.send("PUT", path, json=said, roles=("approve",), subject="carol")
    assert answer.status == 200
    return [each for each in await node.api.events("m") if isinstance(each.data, VersionApproved)][-1]


async def test_forged_approval_lets_no_load_pass(ledger: Database, tmp_path: Path) -> None:
    """The role approves without a signature, with one of another approval, and with that of its own node."""
    async with reachable_node(ledger.server_url, tmp_path, "a", policy=POLICY) as node:
        save(add(1), tmp_path / "repository", "m")
        genuine = await approve(node)
        assert (await load_job(node))[1] == "completed"
        save(add(2), tmp_path / "repository", "m")
        digest, files = await hash_version(node)
        data = VersionApproved(digest, files, "reviewed", Credential())
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        rogue = replace(rogue_join("z", "http://127.0.0.1:1"), public_key=public)
        await append_as_role(ledger, joins(rogue))
        by_dave = replace(data, credential=Credential(issued_by=("carol",)))
        await append_as_role(ledger, made_of(Draft(uuid7(), by_dave, "dave", None, "m", 1)))
        for signer in ("nobody", "a", "z"):
            forged = Draft(uuid7(), data, "carol", None, "m", 1)
            if signer == "a":
                assert isinstance(genuine.data, VersionApproved)
                with pytest.raises(asyncpg.UniqueViolationError):
                    await append_as_role(ledger, made_of(replace(forged, id=genuine.id)))
                forged = replace(forged, data=replace(data, server_signature=genuine.data.server_signature))
            if signer == "z":
                statement = approval_statement("m", make_approval(record_draft(forged, 0, ""), data))
                signature = NodeSignature("z", base64.b64encode(key.sign(statement)).decode())
                forged = replace(forged, data=replace(data, server_signature=signature))
            await append_as_role(ledger, made_of(forged))
            assert (await load_job(node))[1] == "not_approved", signer
        said = await asyncio.to_thread(partial(printed, "verify", "--ledger", ledger.server_url, code=1))
        assert "the signature of a node is missing (policy)" in said
        await approve(node)  # what was forged in her name is in nobody's way
        assert (await load_job(node))[1] == "completed"


async def test_forged_withdrawal_only_denies_loads(ledger: Database, tmp_path: Path) -> None:
    async with reachable_node(ledger.server_url, tmp_path, "a", policy=POLICY) as node:
        save(add(1), tmp_path / "repository", "m")
        await approve(node)
        assert (await load_job(node))[1] == "completed"
        digest, _ = await hash_version(node)
        withdrawn = ApprovalWithdrawn(digest, "so", Credential())
        await append_as_role(ledger, made_of(Draft(uuid7(), withdrawn, "dave", None, "m", 1)))
        refused = await node.api.post("/api/v1/models/m/load", json={"pinned": True}, wait=60)
        assert refused.json["error"]["code"] == "not_approved"
        assert (await node.api.infer("m", ONE)).status == 200
        await approve(node)
        pinned = await node.api.post("/api/v1/models/m/load", json={"pinned": True}, wait=60)
        assert pinned.json["status"] == "completed"
        assert "verified" in await asyncio.to_thread(printed, "verify", "--ledger", ledger.server_url)


async def test_emergency_is_not_repeated_for_other_bytes(ledger: Database, tmp_path: Path) -> None:
    """The role repeats the signed request of an emergency that has ended, when other files are there."""
    async with reachable_node(ledger.server_url, tmp_path, "a", policy=POLICY) as node:
        save(add(1), tmp_path / "repository", "m")
        digest, _ = await hash_version(node)
        job_id, result = await load_job(node, emergency="an outage", digest=digest)
        assert result == "completed"
        await node.api.unload("m")
        save(add(2), tmp_path / "repository", "m")
        (asked,) = await node.api.data_of(LoadRequested)
        with pytest.raises(asyncpg.UniqueViolationError):
            await append_as_role(ledger, made_of(Draft(job_id, asked, "alice", job_id, "m", 1)))
        await append_as_role(ledger, made_of(Draft(uuid7(), asked, "alice", job_id, "m", 1)))  # means nothing
        fresh = uuid7()
        await append_as_role(ledger, made_of(Draft(fresh, asked, "alice", fresh, "m", 1)))
        refused = await node.api.ended(fresh)  # the signature is for another job
        assert (refused["status"], refused["error"]["code"]) == ("failed", "not_approved")
        assert (await node.api.model("m"))["state"] == "failed"
        assert "verified" in await asyncio.to_thread(printed, "verify", "--ledger", ledger.server_url)


async def test_unreadable_event_is_discarded_on_record(ledger: Database, tmp_path: Path) -> None:
    file, discard = tmp_path / "discarded", ("discard", "--ledger", ledger.owner_url)
    async with reachable_node(ledger.server_url, tmp_path, "a") as node:
        save(add(1), tmp_path / "repository", "m")
        assert "there is nothing to discard" in await asyncio.to_thread(refused, *discard, file)
        forged = {"type": "LoadRequested", "id": uuid7()}
        await append_as_role(ledger, lambda position, at: body(position, at, **forged), body)
        first = node.app[LOG].head.position + 1
        assert (await node.api.post("/api/v1/models/m/load")).refusal == (503, "log_unavailable")
        role = ("discard", "--ledger", ledger.server_url, file)
        assert "does not own the ledger" in await asyncio.to_thread(refused, *role)
        kept = (await rows_in(ledger))[-2:]
        done = await asyncio.to_thread(printed_json, *discard, file)
        assert done == {"first_position": first, "last_position": first + 1, "hash": kept[1][2].hex()}
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [(each["position"], each["body"], bytes.fromhex(each["hash"])) for each in lines] == kept
        await when(
            lambda: node.api.post("/api/v1/models/m/load", wait=60), lambda answer: answer.status == 200
        )
        assert await node.api.data_of(EventsDiscarded) == [EventsDiscarded(*done.values())]
        assert "verified" in await asyncio.to_thread(printed, "verify", "--ledger", ledger.server_url)


async def test_forwarded_token_is_for_one_node_model_and_minute(ledger: Database, tmp_path: Path) -> None:
    async with reachable_nodes(ledger.server_url, tmp_path, "a", "b") as nodes:
        for model_id in ("m", "loop"):
            save(add(1), tmp_path / "repository", model_id)
        owner, other = await loaded_beside(nodes, "m")
        good, forged = forwarded(other, owner, "admin"), forwarded(owner, owner)
        assert (await send(owner, INFER, good)).status == 200
        await send(owner, INFER, forged)  # remembered, or not
        refused = [
            await send(other, INFER, good),
            await send(owner, "/v2/models/loop/infer", good),
            await send(owner, "/v2/models/loop/versions/1/infer", good),
            await send(owner, "/v2/models/loop/ready", good, "GET"),
            await send(owner, "/api/v1/models/m", good, "GET"),
            await send(owner, "/api/v1/models/m/unload", good),
            await send(owner, INFER, forwarded(other, owner, expires_s=-1)),
            await send(owner, INFER, {**good, "Authorization": good["Authorization"][:-8] + "AAAAAAAA"}),
        ]
        assert {answer.refusal for answer in refused} == {(401, "invalid_token")}
        bare = {"Authorization": good["Authorization"]}
        assert (await send(owner, INFER, bare)).refusal == (401, "invalid_token")
        claims = read_claims(good)
        assert claims["exp"] <= time.time() + 61
        assert (claims["sub"], claims["roles"], claims["aud"]) == ("pia", ["admin"], f"{owner.name}/1")
