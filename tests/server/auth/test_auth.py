import base64
import hashlib
import hmac
import json
import os
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pytest_aiohttp import AiohttpClient
from support.smallapp import bearer, route, small_app, small_config

from server.auth.gate import InvalidToken, Principal, Verifier, create_verifier
from server.auth.keyring import KeyRing, read_public_keys
from server.auth.keys import KeyProblem, issue_token, keys_folder, list_keys, load_private_key, revoke, rotate
from server.config import Config
from server.routes import Access, LimitClass

Client = TestClient[web.Request, web.Application]

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = Ed25519PrivateKey.generate()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path / "data", limit_auth_failures="off")


@pytest.fixture
async def client(config: Config, aiohttp_client: AiohttpClient) -> Client:
    routes = [route(f"/{access.name}", access=access) for access in Access]
    return await aiohttp_client(small_app([*routes, route("/ANY", method="POST")], config))


def claims(**changes: object) -> dict[str, Any]:
    now = int(time.time())
    whole = {"sub": "alice", "aud": "loadledger", "exp": now + 60, "roles": ["admin"], **changes}
    return {name: value for name, value in whole.items() if value is not None}


def signed(config: Config, **changes: object) -> str:
    kid = list_keys(config.data)[-1].kid
    key = load_private_key(keys_folder(config.data) / f"{kid}.pem")
    return jwt.encode(claims(**changes), key, "EdDSA", headers={"kid": kid})


def public_pem(private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def jwk(algorithm: type[jwt.algorithms.Algorithm], private: Any, **members: object) -> dict[str, Any]:
    return {**algorithm.to_jwk(private.public_key(), as_dict=True), **members}


def unsigned(header: dict[str, object], payload: dict[str, Any], secret: bytes | None = None) -> str:
    """Write a token by hand: the library refuses to make those that an attacker would."""

    def part(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    body = f"{part(json.dumps(header).encode())}.{part(json.dumps(payload).encode())}"
    signature = b"" if secret is None else hmac.digest(secret, body.encode(), hashlib.sha256)
    return f"{body}.{part(signature)}"


async def test_without_a_token_the_challenge_has_no_error(client: Client) -> None:
    answer = await client.get("/ANY")
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="loadledger"'
    assert (await answer.json())["code"] == "no_credentials"


async def test_another_scheme_counts_as_no_token(client: Client) -> None:
    answer = await client.get("/ANY", headers={"Authorization": "Basic YTpi"})
    assert (answer.status, (await answer.json())["code"]) == (401, "no_credentials")


async def test_a_public_route_looks_at_no_token(client: Client) -> None:
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer"}):
        answer = await client.get("/PUBLIC", headers=headers)
        assert (answer.status, await answer.json()) == (200, {"subject": None})


async def test_a_token_in_the_query_is_none(client: Client, config: Config) -> None:
    answer = await client.get("/ANY", params={"access_token": signed(config)})
    assert answer.status == 401


@pytest.mark.parametrize(
    "field", ["Bearer", "Bearer ", "Bearer a b", "Bearer a,b", 'Bearer "a"', "Bearer é", ""]
)
async def test_a_malformed_field_is_a_bad_request(client: Client, field: str) -> None:
    answer = await client.get("/ANY", headers={"Authorization": field})
    assert (answer.status, (await answer.json())["code"]) == (400, "invalid_request")
    assert 'error="invalid_request"' in answer.headers["WWW-Authenticate"]


async def test_two_fields_are_a_bad_request_even_if_both_are_valid(client: Client, config: Config) -> None:
    field = ("Authorization", f"Bearer {signed(config)}")
    answer = await client.get("/ANY", headers=[field, field])
    assert (answer.status, (await answer.json())["code"]) == (400, "invalid_request")


async def test_the_scheme_may_be_written_as_one_likes(client: Client, config: Config) -> None:
    answer = await client.get("/ANY", headers={"Authorization": f"bearer  {signed(config)}"})
    assert answer.status == 200


async def test_unknown_paths_and_wrong_methods_are_told_to_nobody_without_a_token(
    client: Client, config: Config
) -> None:
    headers = bearer(config, "predict")
    for method, path, status in [("GET", "/none", 404), ("DELETE", "/ANY", 405), ("POST", "/PUBLIC", 405)]:
        assert (await client.request(method, path)).status == 401
        assert (await client.request(method, path, headers=headers)).status == status
        nobody = {"Authorization": f"Bearer {signed(config, roles=[])}"}
        assert (await client.request(method, path, headers=nobody)).status == 403


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": 1}, {"exp": None}, {"exp": "soon"}, {"exp": True}, {"exp": float("inf")},
        {"exp": float("nan")}, {"exp": 10**400}, {"exp": -1},
        {"aud": "other"}, {"aud": None}, {"aud": []}, {"aud": ["other"]}, {"aud": 7},
        {"nbf": 2**40}, {"iat": 2**40}, {"nbf": "now"}, {"iat": [1]},
        {"sub": None}, {"sub": ""}, {"sub": 7}, {"sub": "system"}, {"sub": "System "}, {"sub": "x" * 129},
        {"sub": "a\nb"}, {"sub": "\ud800"}, {"roles": "admin"}, {"roles": {"admin": True}}, {"roles": 1},
    ],
)  # fmt: skip
async def test_a_token_with_bad_claims_is_refused(
    client: Client, config: Config, changes: dict[str, object]
) -> None:
    answer = await client.get("/ANY", headers={"Authorization": f"Bearer {signed(config, **changes)}"})
    assert (answer.status, (await answer.json())["code"]) == (401, "invalid_token")
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["x", "loadledger"]},
        {"exp": 2**33 + 0.5},
        {"sub": "x" * 128},
        {"roles": ["admin", "unknown", 7]},
    ],
)
async def test_a_token_with_unusual_claims_is_taken(config: Config, changes: dict[str, object]) -> None:
    assert create_verifier(config).verify(signed(config, **changes), time.time()).roles == {"admin"}


async def test_forged_tokens_are_refused(client: Client, config: Config) -> None:
    kid = list_keys(config.data)[-1].kid
    private = load_private_key(keys_folder(config.data) / f"{kid}.pem")
    pem = public_pem(private)
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    header, payload, signature = signed(config).split(".")
    forged = [
        unsigned({"alg": "none", "kid": kid}, claims()),
        unsigned({"alg": "None", "typ": "JWT", "kid": kid}, claims()),
        unsigned({"kid": kid}, claims()),
        unsigned({"alg": "HS256", "kid": kid}, claims(), pem),
        unsigned({"alg": "HS256", "kid": kid}, claims(), raw),
        unsigned({"alg": "HS256", "kid": kid}, claims(), b""),
        unsigned({"alg": "EdDSA", "kid": kid}, claims(), pem),
        jwt.encode(claims(), Ed25519PrivateKey.generate(), "EdDSA", headers={"kid": kid}),
        jwt.encode(claims(), RSA_KEY, "RS256", headers={"kid": kid}),
        jwt.encode(claims(), EC_KEY, "ES256", headers={"kid": kid}),
        f"{header}.{payload}.",
        f"{header}.{payload}",
        f"{header}.{unsigned({}, claims(sub='root')).split('.')[1]}.{signature}",
        "a.b.c", "...", "x" * 6000, "e30.e30.e30",
    ]  # fmt: skip
    for token in forged:
        answer = await client.get("/ANY", headers={"Authorization": f"Bearer {token}"})
        assert (answer.status, (await answer.json())["code"]) == (401, "invalid_token"), token


@pytest.mark.parametrize(
    "kid", ["../ledger", "../keys/x", "/etc/passwd", "a\0b", "", None, 7, ["x"], {}, "x" * 3000]
)
async def test_a_hostile_kid_names_no_file(config: Config, kid: object) -> None:
    ledger = load_private_key(config.data / "ledger.key")
    (config.data / "keys" / "x.pem").write_bytes((config.data / "ledger.key").read_bytes())
    good = jwt.encode(claims(), ledger, "EdDSA", headers={"kid": "x"}).split(".")
    head = unsigned({"alg": "EdDSA", "kid": kid}, {}).split(".")[0]
    for token in (".".join([head, *good[1:]]), ".".join(good)):
        with pytest.raises(InvalidToken):
            create_verifier(config).verify(token, time.time())


async def test_a_revoked_key_is_refused_by_a_running_server_within_a_second(config: Config) -> None:
    verifier = create_verifier(config)
    token = signed(config)
    now = time.time()
    assert verifier.verify(token, now) == Principal("alice", frozenset({"admin"}))
    revoke(config.data, list_keys(config.data)[0].kid)
    assert verifier.verify(token, now + 0.9).subject == "alice"
    with pytest.raises(InvalidToken, match="not known"):
        verifier.verify(token, now + 1.1)


async def test_a_new_key_is_taken_within_a_second_and_the_old_one_stays(config: Config) -> None:
    verifier = create_verifier(config)
    old, now = signed(config), time.time()
    verifier.verify(old, now)
    rotate(config.data)
    new = signed(config)
    with pytest.raises(InvalidToken):
        verifier.verify(new, now)
    assert verifier.verify(new, now + 1) == verifier.verify(old, now + 1)


async def test_a_clock_that_is_set_back_keeps_no_revoked_key_alive(config: Config) -> None:
    verifier = create_verifier(config)
    token, now = signed(config), time.time()
    verifier.verify(token, now)
    revoke(config.data, list_keys(config.data)[0].kid)
    with pytest.raises(InvalidToken):
        verifier.verify(token, now - 1000)


async def test_a_key_file_with_another_content_is_another_key(config: Config) -> None:
    verifier = create_verifier(config)
    token, now = signed(config), time.time()
    verifier.verify(token, now)
    path = keys_folder(config.data) / f"{list_keys(config.data)[0].kid}.pem"
    path.write_bytes(ED_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InvalidToken):
        verifier.verify(token, now + 1)
    path.write_text("no key")
    with pytest.raises(InvalidToken):
        verifier.verify(signed_with_ed(), now + 2)


def signed_with_ed() -> str:
    return jwt.encode(claims(), ED_KEY, "EdDSA")


async def test_a_remembered_token_expires_like_any_other(config: Config) -> None:
    verifier = create_verifier(config)
    now = time.time()
    token = signed(config, exp=now + 10)
    verifier.verify(token, now)
    verifier.verify(token, now + 9.9)
    with pytest.raises(InvalidToken, match="expired"):
        verifier.verify(token, now + 10)


async def test_the_memory_of_verified_tokens_is_bounded(config: Config) -> None:
    verifier = Verifier(KeyRing(config.data), "loadledger", capacity=3)
    tokens = [signed(config, sub=f"user {number}") for number in range(10)]
    for token in tokens:
        verifier.verify(token, time.time())
    assert len(verifier._remembered) == 3
    assert verifier.verify(tokens[0], time.time()).subject == "user 0"


async def test_an_issuer_is_checked_where_it_is_configured(tmp_path: Path) -> None:
    config = small_config(tmp_path / "data", jwt_issuer="https://issuer")
    verifier = create_verifier(config)
    verifier.verify(signed(config, iss="https://issuer"), time.time())
    for issuer in ("https://other", "https://issuer/", None):
        with pytest.raises(InvalidToken):
            verifier.verify(signed(config, iss=issuer), time.time())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("groups", {"groups": ["audit"]}),
        ("https://example.org/roles", {"https://example.org/roles": ["audit"]}),
        ("realm_access.roles", {"realm_access": {"roles": ["audit", "offline_access"]}}),
    ],
)
async def test_the_claim_with_the_roles_can_be_another(
    config: Config, name: str, changes: dict[str, object]
) -> None:
    verifier = Verifier(KeyRing(config.data), "loadledger", roles_claim=name)
    assert verifier.verify(signed(config, **changes), time.time()).roles == {"audit"}
    assert verifier.verify(signed(config), time.time()).roles == frozenset()


@pytest.mark.parametrize(
    ("private", "algorithm", "other"),
    [(RSA_KEY, "RS256", "RS512"), (EC_KEY, "ES256", None), (ED_KEY, "EdDSA", None)],
)
async def test_a_public_key_of_a_provider_is_bound_to_one_algorithm(
    tmp_path: Path, private: Any, algorithm: str, other: str | None
) -> None:
    file = tmp_path / "provider.pem"
    file.write_bytes(public_pem(private))
    verifier = Verifier(KeyRing(tmp_path, file), "loadledger")
    for headers in ({"kid": "theirs"}, {}):
        token = jwt.encode(claims(), private, algorithm, headers=headers)
        assert verifier.verify(token, time.time()).subject == "alice"
    attacks = [unsigned({"alg": "HS256"}, claims(), file.read_bytes()), unsigned({"alg": "none"}, claims())]
    if other is not None:
        attacks.append(jwt.encode(claims(), private, other))
    for token in attacks:
        with pytest.raises(InvalidToken):
            verifier.verify(token, time.time())


async def test_a_key_set_of_a_provider_replaces_our_own_keys(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    file = tmp_path / "jwks.json"
    ps = jwk(jwt.algorithms.RSAAlgorithm, RSA_KEY, kid="r", alg="PS256", use="sig")
    es = jwk(jwt.algorithms.ECAlgorithm, EC_KEY, kid="e")
    secret = {"kty": "oct", "kid": "o", "k": base64.urlsafe_b64encode(b"x" * 32).decode(), "alg": "HS256"}
    file.write_text(json.dumps({"keys": [ps, es, secret]}))
    config = small_config(tmp_path / "data", jwt_keys=file)
    client = await aiohttp_client(small_app([route()], config))

    async def status(token: str) -> int:
        return (await client.get("/x", headers={"Authorization": f"Bearer {token}"})).status

    assert await status(jwt.encode(claims(), RSA_KEY, "PS256", headers={"kid": "r"})) == 200
    assert await status(jwt.encode(claims(), EC_KEY, "ES256", headers={"kid": "e"})) == 200
    assert await status(jwt.encode(claims(), RSA_KEY, "RS256", headers={"kid": "r"})) == 401
    assert await status(jwt.encode(claims(), EC_KEY, "ES256", headers={"kid": "r"})) == 401
    assert await status(jwt.encode(claims(), EC_KEY, "ES256")) == 401
    assert await status(jwt.encode(claims(), "x" * 32, "HS256", headers={"kid": "o"})) == 401
    assert await status(issue_token(config.data, "a", ["admin"], expires_s=9, audience="loadledger")) == 401


async def test_a_changed_key_set_is_reread_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"

    def publish(text: str) -> None:
        draft = tmp_path / "draft"
        draft.write_text(text)
        os.replace(draft, file)  # noqa: PTH105

    publish(json.dumps({"keys": [jwk(jwt.algorithms.ECAlgorithm, EC_KEY, kid="e")]}))
    verifier = Verifier(KeyRing(tmp_path, file), "loadledger")
    old = jwt.encode(claims(exp=2**40), EC_KEY, "ES256", headers={"kid": "e"})
    new = jwt.encode(claims(exp=2**40), ED_KEY, "EdDSA", headers={"kid": "d"})
    now = time.time()
    verifier.verify(old, now)
    publish('{"keys": [')
    verifier.verify(old, now + 2)
    publish(json.dumps({"keys": [jwk(jwt.algorithms.OKPAlgorithm, ED_KEY, kid="d")]}))
    verifier.verify(new, now + 4)
    with pytest.raises(InvalidToken):
        verifier.verify(old, now + 4)
    file.unlink()
    with pytest.raises(InvalidToken):
        verifier.verify(new, now + 6)


@pytest.mark.parametrize(
    "members",
    [{"use": "enc"}, {"alg": "HS256"}, {"alg": "none"}, {"alg": "ES256"}, {"key_ops": ["encrypt"]},
     {"n": "AQ"}, {"kid": 7}, {"kty": "oct"}, {"n": None}],
)  # fmt: skip
async def test_a_key_that_cannot_verify_tokens_is_not_used(
    tmp_path: Path, members: dict[str, object]
) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [{**jwk(jwt.algorithms.RSAAlgorithm, RSA_KEY, kid="r"), **members}]}))
    with pytest.raises(KeyProblem):
        read_public_keys(file)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"hello", b'{"keys": 7}', b"[]", b"{}", b"{" * 9999,
        RSA_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        public_pem(EC_KEY) + public_pem(ED_KEY),
        public_pem(ec.generate_private_key(ec.SECP256K1())),
        public_pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
    ],
)  # fmt: skip
async def test_a_file_without_a_usable_public_key_says_so(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(KeyProblem, match="keys"):
        read_public_keys(file)


async def test_the_limit_of_the_subject_comes_before_the_role(
    config: Config, aiohttp_client: AiohttpClient
) -> None:
    changed = small_config(config.data, limit_management="1/minute")
    routes = [route(access=Access.ADMIN, limit=LimitClass.MANAGEMENT)]
    client = await aiohttp_client(small_app(routes, changed))
    headers = bearer(config, "predict")
    assert [(await client.get("/x", headers=headers)).status for _ in range(2)] == [403, 429]
