"""The private keys that sign tokens and the ledger's heads, as files in the data directory.

`<data>/keys/<kid>.pem` are our Ed25519 keys: the newest signs tokens, all verify them; nodes sign their
joins with them, too. `<data>/ledger.key` signs the ledger's head, and what this node forwards
(`server.auth.peers`). A key is revoked by removing its file, with all its tokens; a single token is revoked
in the ledger (`server.auth.tokens`).
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from events.audit.files import sync, write_file
from events.audit.kepthead import keep_first, sign_anew
from events.audit.signing import KEY_ID_DIGITS, HeadSigner, key_id
from events.clock import uuid7
from events.sqlite.datalock import LEDGER
from server.auth.subjects import subject_refusal

_log = logging.getLogger(__name__)

ROLES = frozenset({"admin", "predict", "audit"})
"""All roles."""

ALGORITHM = "EdDSA"

LEDGER_KEY = "ledger.key"
"""The ledger's key in the data directory."""

MAX_EXPIRES_S = 100 * 365 * 86_400 - 1
"""Of a token's lifetime: longer ones are a mistake, and end after what a timestamp can hold."""

MAX_KEY_BYTES = 64 * 2**10
"""A longer file is no public key."""

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)

# The timestamp comes first, so that names sort by creation. The rest keeps two processes apart.
_KID = re.compile(r"[0-9]{8}T[0-9]{12}Z-[0-9a-f]{8}")
_STAMP = "%Y%m%dT%H%M%S%fZ"


class KeyProblem(Exception):
    """A key cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A signing key of ours; its `kid` is in the header of the tokens that it signed."""

    kid: str
    created_at: datetime
    signs: bool


def ensure_data_dir(data: Path) -> None:
    """Create the directory (0700), a first token key, the ledger's key and its head, as far as missing."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not list_keys(data):
        create_key(data)
    ledger_key = data / LEDGER_KEY
    is_new = not ledger_key.exists()
    if is_new:
        if (data / LEDGER).exists():
            _log.warning("ledger.key was missing: from now on heads are signed with another key")
        with suppress(FileExistsError):  # another process was faster, and its key is as good
            _write_new(ledger_key, _new_pem())
    signer = HeadSigner(load_private_key(ledger_key))
    if is_new:
        sign_anew(data, signer)
    keep_first(data, signer)


def create_key(data: Path, now: datetime | None = None) -> str:
    """Create a key that signs new tokens, and return its kid."""
    folder = keys_folder(data)
    with suppress(FileExistsError):
        _make_folder(folder)
    stamp = (now or datetime.now(UTC)).astimezone(UTC)
    earlier = list_keys(data)
    if earlier:  # or a clock that was set back would make the new key look older
        stamp = max(stamp, earlier[-1].created_at + timedelta(microseconds=1))
    kid = f"{stamp.strftime(_STAMP)}-{secrets.token_hex(4)}"
    _write_new(folder / f"{kid}.pem", _new_pem())
    return kid


def rotate(data: Path) -> str:
    """Create a key that signs new tokens; earlier ones verify until they are revoked."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    return create_key(data)


def revoke(data: Path, kid: str) -> None:
    """Remove a key; a running server refuses its tokens within about a second.

    Raises:
        KeyProblem: there is no such key.
    """
    unknown = KeyProblem(f"there is no key {kid[:64]!r}; `loadledger key list` shows them")
    if not is_kid(kid):
        raise unknown
    path = keys_folder(data) / f"{kid}.pem"
    try:
        path.unlink()
    except FileNotFoundError:
        raise unknown from None
    sync(path.parent)


def list_keys(data: Path) -> list[KeyInfo]:
    """Return our keys, oldest first; the last one signs."""
    try:
        names = [path.name for path in keys_folder(data).iterdir()]
    except FileNotFoundError:
        return []
    kids = sorted(name.removesuffix(".pem") for name in names if is_kid_file(name))
    return [KeyInfo(kid, _created_at(kid), signs=kid == kids[-1]) for kid in kids]


def keys_folder(data: Path) -> Path:
    return data / "keys"


def is_kid(kid: str) -> bool:
    """Return whether this is a kid of ours; nothing else is looked up in the file system."""
    try:
        return _KID.fullmatch(kid) is not None and _created_at(kid) is not None
    except ValueError:  # digits, but no date
        return False


def is_kid_file(name: str) -> bool:
    return name.endswith(".pem") and is_kid(name.removesuffix(".pem"))


def sign_token(
    data: Path,
    subject: str,
    roles: Collection[str],
    *,
    expires_s: float,
    audience: str,
    issuer: str | None = None,
    jti: str | None = None,
    now_s: int | None = None,
) -> str:
    """Sign a token with the newest key; recording it is the caller's. Without a `jti` it gets a new one.

    `now_s` is in seconds since 1970; None is now.

    Raises:
        KeyProblem: the subject, a role or the time is invalid, or there is no key.
    """
    refusal, unknown = subject_refusal(subject, is_own=True), sorted(set(roles) - ROLES)
    if refusal is None and (unknown or not roles):
        refusal = f"roles are {', '.join(sorted(ROLES))}; not {', '.join(unknown) or 'none'}"
    if refusal is None and not 0 < expires_s <= MAX_EXPIRES_S:
        refusal = "a token must expire in the future, and within 100 years"
    if refusal is not None:
        raise KeyProblem(refusal)
    known = list_keys(data)
    if not known:
        raise KeyProblem(f"there is no key under {keys_folder(data)}; `loadledger key rotate` creates one")
    kid, now = known[-1].kid, int(time.time()) if now_s is None else now_s
    key = load_private_key(keys_folder(data) / f"{kid}.pem")
    claims = {
        "jti": jti or uuid7(),
        "sub": subject,
        "aud": audience,
        "roles": sorted(set(roles)),
        "iat": now,
        "exp": now + int(expires_s),
    }
    if issuer is not None:
        claims["iss"] = issuer
    return jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": kid})


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key.

    Raises:
        KeyProblem: the file has none.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, TypeError, ValueError) as error:
        raise KeyProblem(f"{path} is not a readable private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyProblem(f"{path} is not an Ed25519 key")
    return key


def _created_at(kid: str) -> datetime:
    return datetime.strptime(kid.partition("-")[0], _STAMP).replace(tzinfo=UTC)


def _new_pem() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _leave_to_owner(descriptor, folder.parent)
    finally:
        os.close(descriptor)


def _write_new(path: Path, content: bytes) -> None:
    """Create a file atomically and durably, and leave it to the owner of its folder."""
    with write_file(path, replace=False) as file:
        file.write(content)
        _leave_to_owner(file.fileno(), path.parent)


def _leave_to_owner(descriptor: int, folder: Path) -> None:
    """Give a file that root created to the folder's owner, whose server could not read it otherwise.

    By its descriptor, since the owner may have replaced its name meanwhile.
    """
    if os.geteuid() == 0:
        owner = folder.stat()
        with suppress(PermissionError):  # root in a container that may not change owners
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


def open_signer(data: Path) -> HeadSigner:
    """Return the signer of heads, with the ledger's key.

    Raises:
        KeyProblem: there is none, or it also signs tokens.
    """
    path = data / LEDGER_KEY
    if not path.exists():
        raise KeyProblem(
            f"there is no {path}: restore it from your backup, or let `serve` or `token` create another, "
            "which signs heads from then on"
        )
    signer = HeadSigner(load_private_key(path))
    for info in list_keys(data):
        if _public_key(keys_folder(data) / f"{info.kid}.pem") == signer.public_key:
            raise KeyProblem(f"{path} is the key {info.kid}, which signs tokens: it must be another")
    return signer


def _public_key(path: Path) -> bytes | None:
    with suppress(KeyProblem):  # an unreadable key signs no tokens either
        return HeadSigner(load_private_key(path)).public_key
    return None


def public_pem(signer: HeadSigner) -> str:
    """Return the public key as PEM, which `openssl` reads."""
    key = load_der_public_key(signer.public_key)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def expected_key(text: str) -> str:
    """Return the id of a public key, given by its id or as a file.

    The file has the key as PEM, alone or as `loadledger key ledger` prints it, or as DER.

    Raises:
        KeyProblem: the text is neither.
    """
    if re.fullmatch(rf"[0-9a-fA-F]{{{KEY_ID_DIGITS}}}", text, re.ASCII):
        return text.lower()
    try:
        with Path(text).open("rb") as file:
            return key_id(_read_der(file.read(MAX_KEY_BYTES)))
    except (OSError, UnsupportedAlgorithm, ValueError) as error:
        raise KeyProblem(
            f"{text} is neither a key id, {KEY_ID_DIGITS} hexadecimal digits, nor a file with a public key: "
            f"{error}"
        ) from error


def _read_der(content: bytes) -> bytes:
    pem = _PEM.search(content)
    key = load_der_public_key(content) if pem is None else load_pem_public_key(pem[0])
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("it is not an Ed25519 key")  # noqa: TRY004 - the value of an argument
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
