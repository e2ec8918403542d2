"""Which bearer tokens are valid: claims, forgeries, keys that come and go, keys of an identity provider."""

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass
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
from support.http import route, small_app, small_config

from events.values import Credential
from server.auth.access import Access
from server.auth.gate import InvalidToken, Principal, Verifier, create_verifier, credential_of
from server.auth.keys import (
    KeyProblem,
    KeyRing,
    create_key,
    keys_folder,
    list_keys,
    load_private_key,
    read_public_keys,
    revoke,
)
from server.config import Config

Client = TestClient[web.Request, web.Application]

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = Ed25519PrivateKey.generate()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path / "data", limit_auth_failures="off")


@pytest.fixture
async def client(config: Config, aiohttp_client: AiohttpClient) -> Client:
    routes = [route("/any"), route("/public", access=Access.PUBLIC)]
    return await aiohttp_client(small_app(routes, config))


@dataclass
class Known:
    """A verifier, and a valid token that it has verified."""

    verifier: Verifier
    token: str
    now: float

    def is_valid(self, after_s: float, token: str = "") -> bool:
        """Return whether the token, or another one, is valid some seconds later."""
        return is_valid(self.verifier, token or self.token, self.now + after_s)


@pytest.fixture
def known(config: Config) -> Known:
    now = time.time()
    known = Known(create_verifier(config), signed(config, exp=now + 100), now)
    assert known.is_valid(0)
    return known


def claims(**changes: object) -> dict[str, Any]:
    default = {"sub": "alice", "aud": "loadledger", "exp": int(time.time()) + 60, "roles": ["admin"]}
    return {name: value for name, value in (default | changes).items() if value is not None}


def signed(config: Config, **changes: object) -> str:
    kid = list_keys(config.data)[-1].kid
    key = load_private_key(keys_folder(config.data) / f"{kid}.pem")
    return signed_by(key, "EdDSA", kid, **changes)


def signed_by(key: Any, algorithm: str, kid: str | None = None, **changes: object) -> str:
    return jwt.encode(claims(**changes), key, algorithm, headers={} if kid is None else {"kid": kid})


def public_pem(private: Any) -> bytes:
    content: bytes = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return content


def jwk(algorithm: type[jwt.algorithms.Algorithm], private: Any, **members: object) -> dict[str, Any]:
    return {**algorithm.to_jwk(private.public_key(), as_dict=True), **members}


def forge(header: dict[str, object], payload: dict[str, Any], secret: bytes | None = None) -> str:
    """Write a token by hand: the library refuses to make those that an attacker would."""

    def part(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    body = f"{part(json.dumps(header).encode())}.{part(json.dumps(payload).encode())}"
    signature = b"" if secret is None else hmac.digest(secret, body.encode(), hashlib.sha256)
    return f"{body}.{part(signature)}"


def is_valid(verifier: Verifier, token: str, now: float | None = None) -> bool:
    try:
        verifier.verify(token, time.time() if now is None else now)
    except InvalidToken:
        return False
    return True


NO_CREDENTIALS, MALFORMED = (401, "no_credentials"), (400, "invalid_request")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((), NO_CREDENTIALS),
        (("Basic YTpi",), NO_CREDENTIALS),
        (("Bearer",), MALFORMED),
        (("Bearer ",), MALFORMED),
        (("Bearer a b",), MALFORMED),
        (("Bearer a,b",), MALFORMED),
        (('Bearer "a"',), MALFORMED),
        (("Bearer é",), MALFORMED),
        (("",), MALFORMED),
        (("Bearer TOKEN", "Bearer TOKEN"), MALFORMED),
        (("Bearer a.b.c",), (401, "invalid_token")),
        (("Bearer TOKEN",), (200, None)),
        (("bearer  TOKEN",), (200, None)),
    ],
)
async def test_authorization_field_is_checked(
    client: Client, config: Config, fields: tuple[str, ...], expected: tuple[int, str | None]
) -> None:
    token = signed(config)
    headers = [("Authorization", field.replace("TOKEN", token)) for field in fields]
    answer = await client.get("/any", params={"access_token": token}, headers=headers)
    assert (answer.status, (await answer.json()).get("code")) == expected
    if answer.status != 200:
        error = "" if expected == NO_CREDENTIALS else f', error="{expected[1]}"'
        assert answer.headers["WWW-Authenticate"] == f'Bearer realm="loadledger"{error}'
    public = await client.get("/public", headers=headers)
    assert (public.status, await public.json()) == (200, {"subject": None})


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": 1}, {"exp": None}, {"exp": "soon"}, {"exp": True}, {"exp": float("inf")},
        {"exp": float("nan")}, {"exp": 10**400}, {"exp": -1},
        {"aud": "other"}, {"aud": None}, {"aud": []}, {"aud": ["other"]}, {"aud": 7},
        {"nbf": 2**40}, {"iat": 2**40}, {"nbf": "now"}, {"iat": [1]},
        {"sub": None}, {"sub": 7}, {"sub": "system"}, {"sub": "\ud800"},
        {"roles": "admin"}, {"roles": {"admin": True}}, {"roles": 1},
    ],
)  # fmt: skip
def test_invalid_claims_are_refused(config: Config, changes: dict[str, object]) -> None:
    assert not is_valid(create_verifier(config), signed(config, **changes))


def test_unusual_claims_are_accepted(config: Config) -> None:
    verifier = create_verifier(config)
    roles: list[Any] = ["admin", "unknown", 7]
    for changes in ({"aud": ["x", "loadledger"]}, {"exp": 2**33 + 0.5}, {"sub": "x" * 128}, {"roles": roles}):
        assert verifier.verify(signed(config, **changes), time.time()).roles == {"admin"}


def test_configured_issuer_is_required(tmp_path: Path) -> None:
    config = small_config(tmp_path / "data", jwt_issuer="https://issuer")
    verifier = create_verifier(config)
    issuers = ("https://issuer", "https://other", "https://issuer/", None)
    assert [is_valid(verifier, signed(config, iss=issuer)) for issuer in issuers] == [True] + [False] * 3


def test_credential_has_issuer_and_id(config: Config) -> None:
    for issuer in ("https://issuer", None):
        principal = create_verifier(config).verify(signed(config, iss=issuer, jti="j"), time.time())
        assert credential_of(principal) == Credential(issuer, "j")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("groups", {"groups": ["audit"]}),
        ("https://example.org/roles", {"https://example.org/roles": ["audit"]}),
        ("realm_access.roles", {"realm_access": {"roles": ["audit", "offline_access"]}}),
    ],
)
def test_roles_claim_is_configurable(config: Config, name: str, changes: dict[str, object]) -> None:
    verifier = Verifier(KeyRing(config.data), "loadledger", roles_claim=name)
    assert verifier.verify(signed(config, **changes), time.time()).roles == {"audit"}
    assert verifier.verify(signed(config), time.time()).roles == frozenset()


def test_forged_token_is_refused(config: Config) -> None:
    kid = list_keys(config.data)[-1].kid
    private = load_private_key(keys_folder(config.data) / f"{kid}.pem")
    pem = public_pem(private)
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    header, payload, signature = signed(config).split(".")
    forged = [
        forge({"alg": "none", "kid": kid}, claims()),
        forge({"alg": "None", "typ": "JWT", "kid": kid}, claims()),
        forge({"kid": kid}, claims()),
        forge({"alg": "HS256", "kid": kid}, claims(), pem),
        forge({"alg": "HS256", "kid": kid}, claims(), raw),
        forge({"alg": "HS256", "kid": kid}, claims(), b""),
        forge({"alg": "EdDSA", "kid": kid}, claims(), pem),
        signed_by(ED_KEY, "EdDSA", kid),
        signed_by(RSA_KEY, "RS256", kid),
        signed_by(EC_KEY, "ES256", kid),
        f"{header}.{payload}.",
        f"{header}.{payload}",
        f"{header}.{forge({}, claims(sub='root')).split('.')[1]}.{signature}",
        "a.b.c", "...", "x" * 6000, "e30.e30.e30",
    ]  # fmt: skip
    verifier = create_verifier(config)
    assert [token for token in forged if is_valid(verifier, token)] == []


@pytest.mark.parametrize(
    "kid", ["../ledger", "../keys/x", "/etc/passwd", "a\0b", "", None, 7, ["x"], {}, "x" * 3000]
)
def test_kid_cannot_name_another_file(config: Config, kid: object) -> None:
    ledger = load_private_key(config.data / "ledger.key")
    (config.data / "keys" / "x.pem").write_bytes((config.data / "ledger.key").read_bytes())
    token = signed_by(ledger, "EdDSA", "x")
    head = forge({"alg": "EdDSA", "kid": kid}, {}).partition(".")[0]
    for forged in (f"{head}.{token.partition('.')[2]}", token):
        assert not is_valid(create_verifier(config), forged)


def test_key_change_takes_effect_within_a_second(config: Config, known: Known) -> None:
    assert known.verifier.verify(known.token, known.now) == Principal("alice", frozenset({"admin"}))
    create_key(config.data)
    new = signed(config)
    assert [known.is_valid(0, new), known.is_valid(1, new), known.is_valid(1)] == [False, True, True]
    revoke(config.data, list_keys(config.data)[0].kid)
    assert [known.is_valid(1.9), known.is_valid(2.1)] == [True, False]


def test_revoked_key_is_refused_when_the_clock_is_set_back(config: Config, known: Known) -> None:
    revoke(config.data, list_keys(config.data)[0].kid)
    assert not known.is_valid(-1000)


def test_key_file_with_other_content_is_another_key(config: Config, known: Known) -> None:
    path = keys_folder(config.data) / f"{list_keys(config.data)[0].kid}.pem"
    path.write_bytes(ED_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert not known.is_valid(1)
    path.write_text("no key")
    assert not known.is_valid(2, signed_by(ED_KEY, "EdDSA", path.stem))


def test_remembered_token_expires(known: Known) -> None:
    assert [known.is_valid(after_s) for after_s in (99.9, 100)] == [True, False]


def test_memory_of_verified_tokens_is_bounded(config: Config) -> None:
    verifier = Verifier(KeyRing(config.data), "loadledger", capacity=3)
    tokens = [signed(config, sub=f"user {number}") for number in range(10)]
    for token in tokens:
        verifier.verify(token, time.time())
    assert len(verifier._remembered) == 3
    assert verifier.verify(tokens[0], time.time()).subject == "user 0"


@pytest.mark.parametrize(
    ("private", "algorithm", "other"),
    [(RSA_KEY, "RS256", "RS512"), (EC_KEY, "ES256", None), (ED_KEY, "EdDSA", None)],
)
def test_provider_pem_is_bound_to_one_algorithm(
    tmp_path: Path, private: Any, algorithm: str, other: str | None
) -> None:
    file = tmp_path / "provider.pem"
    file.write_bytes(public_pem(private))
    verifier = Verifier(KeyRing(tmp_path, file), "loadledger")
    for kid in ("theirs", None):
        assert is_valid(verifier, signed_by(private, algorithm, kid))
    attacks = [forge({"alg": "HS256"}, claims(), file.read_bytes()), forge({"alg": "none"}, claims())]
    if other is not None:
        attacks.append(signed_by(private, other))
    assert [token for token in attacks if is_valid(verifier, token)] == []


def test_provider_key_set_replaces_own_keys(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    ps = jwk(jwt.algorithms.RSAAlgorithm, RSA_KEY, kid="r", alg="PS256", use="sig")
    es = jwk(jwt.algorithms.ECAlgorithm, EC_KEY, kid="e")
    secret = {"kty": "oct", "kid": "o", "k": base64.urlsafe_b64encode(b"x" * 32).decode(), "alg": "HS256"}
    file.write_text(json.dumps({"keys": [ps, es, secret]}))
    config = small_config(tmp_path / "data", jwt_keys=file)
    verifier = create_verifier(config)
    for private, algorithm, kid, expected in (
        (RSA_KEY, "PS256", "r", True),
        (EC_KEY, "ES256", "e", True),
        (RSA_KEY, "RS256", "r", False),
        (EC_KEY, "ES256", "r", False),
        (EC_KEY, "ES256", None, False),
        ("x" * 32, "HS256", "o", False),
    ):
        assert is_valid(verifier, signed_by(private, algorithm, kid)) is expected, (algorithm, kid)
    assert not is_valid(verifier, signed(config))


def test_provider_file_is_reread_unless_it_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, draft = tmp_path / "jwks.json", tmp_path / "draft"

    def publish(text: str) -> None:
        draft.write_text(text)
        draft.replace(file)

    publish(json.dumps({"keys": [jwk(jwt.algorithms.ECAlgorithm, EC_KEY, kid="e")]}))
    verifier = Verifier(KeyRing(tmp_path, file), "loadledger")
    old, new = signed_by(EC_KEY, "ES256", "e"), signed_by(ED_KEY, "EdDSA", "d")
    now = time.time()
    assert is_valid(verifier, old, now)
    publish('{"keys": [')
    assert is_valid(verifier, old, now + 2)
    assert "jwks.json cannot be read, its known keys stay in use" in caplog.text
    publish(json.dumps({"keys": [jwk(jwt.algorithms.OKPAlgorithm, ED_KEY, kid="d")]}))
    assert is_valid(verifier, new, now + 4)
    assert not is_valid(verifier, old, now + 4)
    file.unlink()
    assert not is_valid(verifier, new, now + 6)


def rsa_key_set(**members: object) -> bytes:
    return json.dumps({"keys": [{**jwk(jwt.algorithms.RSAAlgorithm, RSA_KEY, kid="r"), **members}]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        *(
            rsa_key_set(**members)
            for members in (
                {"use": "enc"}, {"alg": "HS256"}, {"alg": "none"}, {"alg": "ES256"},
                {"key_ops": ["encrypt"]}, {"n": "AQ"}, {"kid": 7}, {"kty": "oct"}, {"n": None},
            )
        ),
        b"", b"hello", b'{"keys": 7}', b"[]", b"{}", b"{" * 9999,
        RSA_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        public_pem(EC_KEY) + public_pem(ED_KEY),
        public_pem(ec.generate_private_key(ec.SECP256K1())),
        public_pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
    ],
)  # fmt: skip
def test_provider_file_without_usable_key_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(KeyProblem, match="keys"):
        read_public_keys(file)
