r"""Signed heads: proof, for their keeper, that no earlier event was changed, removed or reordered.

The signed message, byte for byte (ASCII; each line ends with one `\n`, the last one too):

    loadledger-head-v1
    <position, decimal>
    <hash, 64 lower-case hexadecimal digits>
    <recorded_at of the event at the position; empty without an event>

The signature is Ed25519 (RFC 8032) over these bytes. The first line distinguishes the message from any other
message that the key may ever sign.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

PREFIX = "loadledger-head-v1"
"""The first line of the message; another layout will have another."""

KEY_ID_DIGITS = 32
"""Digits of the hexadecimal SHA-256 of the public key: 128 bits, which no other key can match."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement about a ledger: its event at `position` has this hash."""

    position: int
    hash: bytes
    recorded_at: str

    def message(self) -> bytes:
        lines = (PREFIX, str(self.position), self.hash.hex(), self.recorded_at)
        return "".join(f"{line}\n" for line in lines).encode("ascii")


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A statement with its signature (64 bytes), and the public key (DER, RFC 8410) that verifies it."""

    statement: Statement
    signature: bytes
    public_key: bytes

    def holds(self) -> bool:
        """Whether the signature is by the key; the caller has to know whose key it is."""
        try:
            key = load_der_public_key(self.public_key)
            if not isinstance(key, Ed25519PublicKey):
                return False
            key.verify(self.signature, self.statement.message())
        except (InvalidSignature, UnsupportedAlgorithm, ValueError):
            return False
        return True

    def members(self) -> dict[str, object]:
        """Return the members of the JSON form: hashes in hexadecimal, signature and public key in base64."""
        statement = self.statement
        return {
            "position": statement.position,
            "hash": statement.hash.hex(),
            "recorded_at": statement.recorded_at or None,
            "algorithm": "Ed25519",
            "key_id": key_id(self.public_key),
            "public_key": base64.b64encode(self.public_key).decode(),
            "signature": base64.b64encode(self.signature).decode(),
        }


Sign = Callable[[Statement], SignedHead]
"""Signs a statement."""


class HeadSigner:
    """Signs heads with the ledger's key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def __call__(self, statement: Statement) -> SignedHead:
        """Sign a statement; the caller ensures that its event is durable."""
        return SignedHead(statement, self._key.sign(statement.message()), self.public_key)


def key_id(public_key: bytes) -> str:
    """Return the id of a public key (DER)."""
    return hashlib.sha256(public_key).hexdigest()[:KEY_ID_DIGITS]


def as_signed_head(members: object) -> SignedHead:
    """Parse the result of `SignedHead.members`.

    Raises:
        ValueError: the members are not those of a signed head.
    """
    if not isinstance(members, dict):
        raise ValueError("this is not a signed head")  # noqa: TRY004 - parsed data, not an argument
    try:
        statement = Statement(
            int(members["position"]), bytes.fromhex(members["hash"]), members["recorded_at"] or ""
        )
        statement.message()
        signature = base64.b64decode(members["signature"], validate=True)
        return SignedHead(statement, signature, base64.b64decode(members["public_key"], validate=True))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"this is not a signed head: {error!r}") from None


def is_signed_by(statement: bytes, signature: str, public_key: str) -> bool:
    """Whether a signature in base64 is by an Ed25519 key in PEM."""
    try:
        key = load_pem_public_key(public_key.encode())
        if not isinstance(key, Ed25519PublicKey):
            return False
        key.verify(base64.b64decode(signature, validate=True), statement)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True
