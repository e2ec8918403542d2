"""The key that signs the ledger's head and nothing else: `<data>/ledger.key`, never one of the tokens'."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

from events.signing import KEY_ID_DIGITS, HeadSigner, key_id
from server.auth.keys import KeyProblem, keys_folder, list_keys, load_private_key

LEDGER_KEY = "ledger.key"
"""The key's file in the data directory; `server.auth.keys.ensure_data_dir` makes it."""


MAX_KEY_BYTES = 64 * 2**10
"""What is longer is no public key."""

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


def open_signer(data: Path) -> HeadSigner:
    """Return what signs heads with the ledger's key.

    Raises:
        KeyProblem: there is none, or it is one that signs tokens.
    """
    path = data / LEDGER_KEY
    if not path.exists():
        raise KeyProblem(
            f"there is no {path}: restore it from where it was backed up, or have `serve` or `token` make "
            "another, by which heads are signed from then on"
        )
    signer = HeadSigner(load_private_key(path))
    for info in list_keys(data):
        if _public_key(keys_folder(data) / f"{info.kid}.pem") == signer.public_key:
            raise KeyProblem(f"{path} is the key {info.kid}, which signs tokens: it must be another")
    return signer


def _public_key(path: Path) -> bytes | None:
    with suppress(KeyProblem):  # one that cannot be read signs no tokens either
        return HeadSigner(load_private_key(path)).public_key
    return None


def public_pem(signer: HeadSigner) -> str:
    """Return the public key as PEM, which `openssl` reads."""
    key = load_der_public_key(signer.public_key)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def expected_key(text: str) -> str:
    """Return the id of the public key that was given: by its id, or as a file.

    Args:
        text: the id, or the name of a file that has the key as PEM, alone or as `loadledger key ledger`
            prints it, or as DER.

    Raises:
        KeyProblem: it is neither.
    """
    if re.fullmatch(rf"[0-9a-fA-F]{{{KEY_ID_DIGITS}}}", text, re.ASCII):
        return text.lower()
    try:
        with Path(text).open("rb") as file:
            return key_id(_der(file.read(MAX_KEY_BYTES)))
    except (OSError, UnsupportedAlgorithm, ValueError) as error:
        raise KeyProblem(
            f"{text} is neither a key id, {KEY_ID_DIGITS} hexadecimal digits, nor a file with a public key: "
            f"{error}"
        ) from error


def _der(content: bytes) -> bytes:
    pem = _PEM.search(content)
    key = load_der_public_key(content) if pem is None else load_pem_public_key(pem[0])
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("it is not an Ed25519 key")  # noqa: TRY004 - a value that somebody gave
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
