r"""The signed head: who keeps one can later prove that nothing before it was changed, removed or reordered.

What is signed, byte for byte (ASCII, each line ended by one `\n`, the last one too):

    loadledger-head-v1
    <position, decimal>
    <hash, 64 lower-case hexadecimal digits>
    <recorded_at of the event at the position; empty where there is no event>
    <base's position, decimal>
    <base's hash, 64 lower-case hexadecimal digits>

The signature is Ed25519 (RFC 8032) over these bytes. The first line keeps it apart from anything else
that may ever be signed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from events.sqlite.queries import LogBase

PREFIX = "loadledger-head-v1"
"""The first line of what is signed; another layout will have another."""

KEY_ID_DIGITS = 32
"""Of the hexadecimal SHA-256 of the public key: 128 bits, which nobody can meet with another key."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What is said of a ledger: its event at `position` has this hash, and the log begins after `base`."""

    position: int
    hash: bytes
    recorded_at: str
    base: LogBase

    def message(self) -> bytes:
        """Return the bytes that are signed."""
        lines = (
            PREFIX,
            str(self.position),
            self.hash.hex(),
            self.recorded_at,
            str(self.base.position),
            self.base.hash.hex(),
        )
        return "".join(f"{line}\n" for line in lines).encode("ascii")


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A statement with its signature (64 bytes), and the public key (DER, RFC 8410) that verifies it."""

    statement: Statement
    signature: bytes
    public_key: bytes

    def holds(self) -> bool:
        """Whether the key made the signature; whose key it is, others have to know."""
        try:
            key = load_der_public_key(self.public_key)
            if not isinstance(key, Ed25519PublicKey):
                return False
            key.verify(self.signature, self.statement.message())
        except (InvalidSignature, UnsupportedAlgorithm, ValueError):
            return False
        return True

    def members(self) -> dict[str, object]:
        """Return it as JSON has it: hashes in hexadecimal, the signature and the public key in base64."""
        statement = self.statement
        return {
            "position": statement.position,
            "hash": statement.hash.hex(),
            "recorded_at": statement.recorded_at or None,
            "base": {"position": statement.base.position, "hash": statement.base.hash.hex()},
            "algorithm": "Ed25519",
            "key_id": key_id(self.public_key),
            "public_key": base64.b64encode(self.public_key).decode(),
            "signature": base64.b64encode(self.signature).decode(),
        }


Sign = Callable[[Statement], SignedHead]
"""What makes a statement a signed head."""


class HeadSigner:
    """The ledger's key at work."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def __call__(self, statement: Statement) -> SignedHead:
        """Sign; the caller answers for it that what is said is durable."""
        return SignedHead(statement, self._key.sign(statement.message()), self.public_key)


def key_id(public_key: bytes) -> str:
    """Return the short name of a public key (DER)."""
    return hashlib.sha256(public_key).hexdigest()[:KEY_ID_DIGITS]


def as_signed_head(members: object) -> SignedHead:
    """Return what `SignedHead.members` wrote.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(members, dict):
        raise ValueError("this is no signed head")  # noqa: TRY004 - what it is was not decided here
    try:
        base = members["base"]
        statement = Statement(
            int(members["position"]),
            bytes.fromhex(members["hash"]),
            members["recorded_at"] or "",
            LogBase(int(base["position"]), bytes.fromhex(base["hash"])),
        )
        statement.message()
        signature = base64.b64decode(members["signature"], validate=True)
        return SignedHead(statement, signature, base64.b64decode(members["public_key"], validate=True))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"this is no signed head: {error!r}") from None
