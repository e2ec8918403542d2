"""Tokens and sign-in links over HTTP, and the socket in the data directory that needs no token."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.http import ONE, Answer, LocalApi, local_server
from support.models import add

from events.types import SignInLinkIssued, SignInLinkUsed, TokenIssued, TokenRevoked
from loadledger import Client
from loadledger.address import CONTROL_KEY, CONTROL_SOCKET
from server.api.tokens import MAX_TOKEN_S
from server.appkeys import LOG
from server.auth.control import KEY, SOCKET
from server.auth.gate import InvalidToken, Principal
from server.auth.subjects import local_actor
from server.auth.tokens import LINK_S, MAX_LINKS, TOKENS, SignInLinks
from server.serve import local_url

BOB = {"subject": "bob", "roles": ["infer"], "expires_s": 60}
ME = local_actor(os.geteuid())


async def issued(api: LocalApi, **changes: Any) -> dict[str, Any]:
    answer = await api.post("/api/v1/tokens", json=BOB | changes)
    assert answer.status == 201, answer.body
    body: dict[str, Any] = answer.json
    return body


async def send(
    api: LocalApi, token: str, method: str = "GET", path: str = "/api/v1/models", **options: Any
) -> Answer:
    headers = {"Authorization": f"Bearer {token}"}
    return await api.send(method, path, roles=(), headers=headers, **options)


async def infer(api: LocalApi, token: str) -> int:
    return (await send(api, token, "POST", "/v2/models/m/infer", json={"inputs": [ONE]})).status


async def test_issued_token_works_until_it_is_revoked(shared: LocalApi) -> None:
    shared.save(add(), "m")
    await shared.load("m")
    new = await issued(shared)
    claims = jwt.decode(new["token"], options={"verify_signature": False})
    assert (claims["jti"], claims["sub"], claims["roles"]) == (new["jti"], "bob", ["infer"])
    assert claims["exp"] - claims["iat"] == 60
    assert [await infer(shared, new["token"]) for _ in range(2)] == [200, 200]  # afresh, and remembered
    path = f"/api/v1/tokens/{new['jti']}/revoke"
    revoked = await shared.post(path, subject="carol")
    assert (revoked.status, revoked.json["revoked_by"]) == (200, "carol")
    assert await infer(shared, new["token"]) == 401
    refusal = await send(shared, new["token"])
    assert refusal.refusal == (401, "invalid_token")
    assert "revoked" in refusal.json["detail"]
    position = shared.position
    assert (await shared.post(path)).json == revoked.json
    assert shared.position == position
    assert [data.jti for data in await shared.data_of(TokenRevoked)] == [new["jti"]]


async def test_what_a_token_issued_is_named_and_revoked_with_it(shared: LocalApi) -> None:
    new = await issued(shared, roles=["admin"])
    link = (await send(shared, new["token"], "POST", "/api/v1/sign-in-links")).json
    child = (await send(shared, new["token"], "POST", "/api/v1/tokens", json=BOB)).json
    [listed, *_] = (await shared.get("/api/v1/tokens")).json["tokens"]
    assert (listed["jti"], listed["issued_with"]) == (child["jti"], new["jti"])
    path = f"/api/v1/tokens/{new['jti']}/revoke"
    assert (await shared.post(path)).json["issued"] == [child["jti"]]
    assert (await send(shared, child["token"])).status == 200
    assert (await shared.post(path, json={"issued": True})).json["issued"] == []
    assert (await send(shared, child["token"])).refusal == (401, "invalid_token")
    assert (await use(shared, link)).refusal == (401, "invalid_token")


async def use(api: LocalApi, link: Mapping[str, Any]) -> Answer:
    """Sign in with a link."""
    code = link["path"].removeprefix("/#sign-in=")
    return await api.post("/api/v1/sign-in-links/use", roles=(), json={"code": code})


async def test_tokens_are_listed_in_pages_newest_first(shared: LocalApi) -> None:
    made = [(await issued(shared, subject=f"s{number}"))["jti"] for number in range(3)]
    first = (await shared.get("/api/v1/tokens?limit=2")).json
    assert [token["jti"] for token in first["tokens"]] == made[:0:-1]
    rest = (await shared.get(f"/api/v1/tokens?limit=1&cursor={first['next_cursor']}")).json
    [token] = rest["tokens"]
    shown = (token["jti"], token["subject"], token["issued_by"], token["via"], token["revoked_at"])
    assert shown == (made[0], "s0", "alice", "api", None)
    assert "token" not in token


REFUSED: list[tuple[str, Mapping[str, Any], tuple[int, str]]] = [
    ("tokens", {}, (400, "invalid_body")),
    ("tokens", BOB | {"roles": []}, (400, "invalid_body")),
    ("tokens", BOB | {"roles": ["root"]}, (400, "invalid_body")),
    ("tokens", BOB | {"subject": "SYSTEM"}, (400, "invalid_body")),
    ("tokens", BOB | {"subject": "local:root"}, (400, "invalid_body")),
    ("tokens", BOB | {"expires_s": 0}, (400, "invalid_body")),
    ("tokens", BOB | {"expires_s": 2**40}, (400, "invalid_body")),
    ("tokens", BOB | {"expires_s": MAX_TOKEN_S + 1}, (400, "invalid_body")),
    ("tokens/nope/revoke", {"issued": "yes"}, (400, "invalid_body")),
    ("tokens/nope/revoke", {}, (404, "unknown_token")),
    (f"tokens/{'x' * 256}/revoke", {}, (400, "invalid_parameter")),
    ("sign-in-links", {"x": 1}, (400, "invalid_body")),
    ("sign-in-links/use", {}, (400, "invalid_body")),
    ("sign-in-links/use", {"code": "nope"}, (401, "invalid_token")),
]


async def test_invalid_request_about_tokens_is_refused(shared: LocalApi) -> None:
    for path, body, refusal in REFUSED:
        assert (await shared.post(f"/api/v1/{path}", json=body)).refusal == refusal, (path, body)


async def test_sign_in_link_works_once(shared: LocalApi) -> None:
    link = (await shared.post("/api/v1/sign-in-links", subject="dora")).json
    used = await use(shared, link)
    assert (used.status, used.json["subject"], used.json["roles"]) == (201, "dora", ["admin"])
    assert (await send(shared, used.json["token"])).status == 200
    assert (await use(shared, link)).refusal == (401, "invalid_token")
    events = [event for event in await shared.events() if event.actor == "dora"]
    assert [type(event.data) for event in events] == [SignInLinkIssued, SignInLinkUsed, TokenIssued]
    assert {getattr(event.data, "link_id", link["link_id"]) for event in events} == {link["link_id"]}
    assert link["path"].partition("=")[2] not in str(events)


def test_links_end_in_time_and_are_bounded() -> None:
    now, person = [0.0], Principal("alice", frozenset())
    links = SignInLinks(lambda: now[0])
    codes = [links.add(str(number), person) for number in range(MAX_LINKS + 1)]
    assert links.take(codes[1]).link_id == "1"
    now[0] = LINK_S
    for code in (codes[0], codes[1], codes[2], "", "\udcff"):
        with pytest.raises(InvalidToken):
            links.take(code)


async def test_provider_issues_tokens_and_ledger_revokes_them(tmp_path: Path) -> None:
    key, keys = Ed25519PrivateKey.generate(), tmp_path / "keys.pem"
    keys.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    async with local_server(tmp_path, jwt_keys=keys) as api:

        def signed(jti: object, subject: str = "ann") -> str:
            claims = {"sub": subject, "aud": "loadledger", "exp": 2**40, "roles": ["admin"], "jti": jti}
            return jwt.encode(claims, key, "EdDSA")

        token = signed("idp/1")
        for path, body in (("/api/v1/tokens", BOB), ("/api/v1/sign-in-links", {})):
            refused = await send(api, token, "POST", path, json=body)
            assert refused.refusal == (400, "not_supported")
        path = "/api/v1/tokens/idp%2F1/revoke"
        assert (await send(api, token, "POST", path)).refusal == (404, "unknown_token")
        assert (await send(api, token, "POST", path, json={"expires_s": 60})).json["subject"] is None
        assert (await send(api, token)).refusal == (401, "invalid_token")
        assert (await send(api, signed("idp/2"))).status == 200
        assert (await send(api, signed("idp/3", "local:root"))).refusal == (401, "invalid_token")


# The socket.


@pytest.fixture
async def deep(tmp_path: Path) -> AsyncIterator[LocalApi]:
    """A server whose data directory has a path that no socket's address can hold."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    (folder / "data").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:  # as a killed server leaves one
        there = os.open(folder / "data", os.O_RDONLY)
        left.bind(f"/proc/self/fd/{there}/{SOCKET}")
        os.close(there)
    async with local_server(folder, head_timeout_s=1) as api:
        yield api
    assert not {SOCKET, KEY} & {path.name for path in (folder / "data").iterdir()}


async def test_socket_manages_tokens_within_limits(deep: LocalApi) -> None:
    data = deep.config.data
    assert (SOCKET, KEY) == (CONTROL_SOCKET, CONTROL_KEY)
    assert [stat.S_IMODE((data / name).stat().st_mode) for name in (SOCKET, KEY)] == [0o600] * 2
    local = Client.of_data(data)
    new = await asyncio.to_thread(local.post, "/api/v1/tokens", BOB | {"roles": ["audit", "admin"]})
    token = new["token"]
    assert (await send(deep, token)).status == 200
    [listed] = (await asyncio.to_thread(local.get, "/api/v1/tokens"))["tokens"]
    shown = (listed["subject"], listed["roles"], listed["issued_by"], listed["via"])
    assert shown == ("bob", ["admin", "audit"], ME, "socket")
    revoked = await asyncio.to_thread(local.post, f"/api/v1/tokens/{listed['jti']}/revoke", {})
    assert revoked["revoked_by"] == ME
    assert (await send(deep, token)).status == 401
    link = await asyncio.to_thread(local.post, "/api/v1/sign-in-links", {})
    used = await use(deep, link)
    assert (used.json["subject"], (await send(deep, used.json["token"])).status) == (ME, 200)
    made = await deep.app[TOKENS].issue("eve", ["admin"], expires_s=60, actor="eve", via="serve")
    assert deep.app[LOG].state.registers.tokens[made.jti].via == "serve"
    with pytest.raises(Exception, match="no such request"):
        await asyncio.to_thread(local.get, "/api/v1/models")
    local.close()
    there = os.open(deep.config.data, os.O_RDONLY)
    reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{there}/{SOCKET}")
    os.close(there)
    writer.write(b"GET /api/v1/tokens HTTP/1.1\r\n")
    assert b" 408 " in await reader.readline()  # a client that sends no more is disconnected
    writer.close()


async def test_server_runs_where_no_socket_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data" / SOCKET).mkdir(parents=True)
    async with local_server(tmp_path, limit_auth_failures="2/minute") as api:
        assert (await api.get("/api/v1/tokens")).status == 200
        assert "tokens and nodes are managed over HTTP only" in caplog.text
        path, body = "/api/v1/sign-in-links/use", {"code": "no"}  # wrong codes count as failed tokens do
        refusals = [(await api.post(path, roles=(), json=body)).refusal for _ in range(3)]
        assert refusals == [(401, "invalid_token")] * 2 + [(429, "too_many_failures")]


def test_server_is_reached_on_its_own_machine() -> None:
    for listening, reached in (
        ("http://0.0.0.0:80", "http://127.0.0.1:80"),
        ("http://[::]:80", "http://[::1]:80"),
        ("https://10.0.0.1:8080", "https://10.0.0.1:8080"),
    ):
        assert local_url(listening) == reached
