"""Authorization fields that no client should send: forged, malformed, enormous, or signed and odd."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hostile.mutations import EDGES, mutate_bytes

from server.auth.keys import keys_folder, list_keys, load_private_key
from server.config import Config

MAX_FIELD_BYTES = 7000
"""Longer fields never reach the gate."""
ALGORITHMS: tuple[Any, ...] = (
    "none", "None", "HS256", "RS256", "ES256", "EdDSA", "eddsa", "Ed448", "", None, 1, [], {},
)  # fmt: skip
KIDS: tuple[Any, ...] = (
    None, "", "../../../etc/passwd", "\0", "x" * 4000, 1, True, [], {}, ["a"], "\u202e", "%2e%2e", "\ud800",
)  # fmt: skip
TIMES: tuple[Any, ...] = (
    *EDGES, 1e308, -1e308, 1e-320, float("nan"), float("inf"), True, None, "9999999999", [], {}, 1.5,
)  # fmt: skip
ROLES: tuple[Any, ...] = (
    ["admin"], "admin", ["root"], [], {}, None, 1, [None], [["admin"]], [{"admin": 1}], ["admin"] * 500,
    {"admin": True}, [1, True, "infer"],
)  # fmt: skip
SUBJECTS: tuple[Any, ...] = (
    "mallory", "system", "SYSTEM", "\uff53\uff59\uff53\uff54\uff45\uff4d", "sys\u00adtem",
    "sy\u200bstem", "s\u0443stem", "", " ", "a" * 128, "a" * 129, "a\nb", "a\0b", "\ud800", "\u202eeve",
    "e\u0301" * 40, "\U0001f469\u200d\U0001f467", "\U000e0041", "\ufeff", "\u3164", None, 1, [], {},
    True,
)  # fmt: skip


SCHEMES = (b"bearer   ", b"Basic ", b"", b"Bearer", b"Bearer\t", b"Bearer Bearer ")


@dataclass(frozen=True, slots=True)
class Field:
    """An Authorization field, or a token; `is_signed` if the server's key signed it, so that it may pass."""

    content: bytes
    is_signed: bool


class Forger:
    """Makes fields, with the key of a server for those that are signed rightly.

    Args:
        config: of the server.
    """

    def __init__(self, config: Config) -> None:
        self._kid = list_keys(config.data)[-1].kid
        self._key = load_private_key(keys_folder(config.data) / f"{self._kid}.pem")
        self._other = Ed25519PrivateKey.generate()
        public = self._key.public_key()
        self._secrets = (
            b"",
            public.public_bytes(Encoding.Raw, PublicFormat.Raw),
            public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        )

    def field(self, rng: Random) -> Field:
        """Return an Authorization field."""
        token = rng.choice((self._forged, self._forged, self._malformed, self._odd, self._odd, self._odd))(
            rng
        )
        scheme = rng.choice((b"Bearer ",) * 12 + SCHEMES)
        content = (scheme + token.content[:MAX_FIELD_BYTES]).translate(None, b"\r\n\0")
        return Field(content, token.is_signed)

    def _header(self, **changes: object) -> dict[str, Any]:
        return {"alg": "EdDSA", "typ": "JWT", "kid": self._kid, **changes}

    def _claims(self, **changes: object) -> dict[str, Any]:
        now = int(time.time())
        default = {"sub": "mallory", "aud": "loadledger", "roles": ["admin"], "iat": now, "exp": now + 600}
        return {**default, **changes}

    def _signed(self, header: object, claims: object, *, raw: bytes | None = None) -> bytes:
        body = _part(_dump(header)) + b"." + _part(_dump(claims) if raw is None else raw)
        return body + b"." + _part(self._key.sign(body))

    def _forged(self, rng: Random) -> Field:
        """Sign with nothing, another key, the public key as a secret, or a signature of other claims."""
        header = self._header(alg=rng.choice(ALGORITHMS), kid=rng.choice((self._kid, *KIDS)))
        body = _part(_dump(header)) + b"." + _part(_dump(self._claims()))
        good = self._signed(self._header(), self._claims(roles=["infer"])).rpartition(b".")[2]
        signers: tuple[Callable[[], bytes], ...] = (
            lambda: b"",
            lambda: _part(self._other.sign(body)),
            lambda: _part(hmac.digest(rng.choice(self._secrets), body, hashlib.sha256)),
            lambda: good,
            lambda: _part(bytes(64)),
        )
        signature = rng.choice(signers)
        return Field(body + b"." + signature(), is_signed=False)

    def _malformed(self, rng: Random) -> Field:
        """Change the bytes of a token that was good."""
        good = self._signed(self._header(), self._claims())
        rest = b"." + good.partition(b".")[2]
        makers: tuple[Callable[[], bytes], ...] = (
            lambda: mutate_bytes(rng, good),
            lambda: mutate_bytes(rng, good),
            lambda: b"." * rng.choice((1, 2, 3, 5000)),
            lambda: b"=" * 5000,
            lambda: _part(b"[" * 4000) + rest,
            lambda: _part(b'{"a":' * 800) + rest,
            lambda: _part(_dump(rng.choice((None, [], 1, "x")))) + rest,
            lambda: b"\xff" * 100,
            lambda: good + b"," + good,
            lambda: b"a" * MAX_FIELD_BYTES,
        )
        content = rng.choice(makers)()
        return Field(content, is_signed=content.rstrip(b"=") == good)  # some issuers pad

    def _odd(self, rng: Random) -> Field:
        """Sign odd headers and claims rightly, as a careless or compromised issuer would."""
        header, claims = self._header(), self._claims(sub=rng.choice(SUBJECTS[1:]))
        for _ in range(rng.choice((0, 1, 2))):
            name, values = rng.choice(_CLAIMS)
            claims[name] = rng.choice(values)
        if rng.random() < 0.2:
            header |= {
                rng.choice(("crit", "b64", "typ", "jwk", "x5c", "zip", "cty")): rng.choice((*KIDS, False))
            }
        if rng.random() < 0.1:
            claims.pop(rng.choice(sorted(claims)))
        bombs = (
            b"[" * 4000,
            b'{"a":' * 800 + b"1" + b"}" * 800,
            b'{"sub":"a","sub":"b"}',
            b"\xff",
            b"1" * 4500,
        )
        raw = rng.choice(bombs) if rng.random() < 0.15 else None
        return Field(self._signed(header, claims, raw=raw), is_signed=True)


_CLAIMS: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("exp", TIMES),
    ("nbf", TIMES),
    ("iat", TIMES),
    ("roles", ROLES),
    ("sub", SUBJECTS),
    ("aud", (None, 1, [], ["loadledger"], [1], {}, "other", ["loadledger", None], "loadledger\0")),
    ("iss", (None, 1, [], "x")),
    ("jti", (None, 1, [], "x" * 3000)),
)


def _dump(value: object) -> bytes:
    return json.dumps(value).encode()


def _part(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")
