"""The keys: private ones that sign tokens and the ledger's heads, and the public ones that verify tokens.

`<data>/keys/<kid>.pem` are our Ed25519 keys: the newest signs tokens, all verify them, and servers
that share a ledger know each other by them. `<data>/ledger.key` signs the ledger's head, and what this server
forwards. A key is revoked by removing its file, with all its tokens; a single token is revoked
in the ledger (`server.auth.tokens`).

An identity provider's file of public keys replaces the server's own. Each key is bound to exactly one
algorithm when it is read (RFC 8725 section 3.1): the header of a token chooses a key, never an algorithm.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from events.audit.kepthead import KEPT_HEAD, keep_first, sign_anew
from events.audit.signing import KEY_ID_DIGITS, HeadSigner, key_id
from events.clock import uuid7
from events.files import sync, write_file
from events.sqlite.datalock import LEDGER
from server.auth.access import ROLES
from server.auth.modes import find_risk
from server.auth.subjects import subject_refusal

_log = logging.getLogger(__name__)

ALGORITHM = "EdDSA"

LEDGER_KEY = "ledger.key"
"""The ledger's key in the data directory."""

MAX_EXPIRES_S = 100 * 365 * 86_400 - 1
"""Limit of a token's lifetime: longer ones are a mistake, and end beyond the range of timestamps."""

MAX_KEY_BYTES = 64 * 2**10
"""A longer file is no public key."""

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)

# The timestamp comes first, so that names sort by creation. The rest distinguishes two processes.
_KID = re.compile(r"[0-9]{8}T[0-9]{12}Z-[0-9a-f]{8}")
_STAMP = "%Y%m%dT%H%M%S%fZ"


REREAD_AFTER_S = 1.0
"""A revoked key is refused after at most this time; listing a small folder each second costs nothing."""

MIN_RSA_BITS = 2048  # NIST SP 800-131A; shorter keys can be factored

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

PublicKey = Ed25519PublicKey | RSAPublicKey | EllipticCurvePublicKey


class KeyProblem(Exception):
    """A key cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A signing key of the server; its `kid` is in the header of the tokens that it signed."""

    kid: str
    created_at: datetime
    signs: bool


def ensure_data_dir(data: Path) -> None:
    """Create the directory (0700), a first token key, the ledger's key and its head, unless they exist.

    Raises:
        KeyProblem: a key is unusable, or `refuse_unsafe` refuses the directory.
    """
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_unsafe(data)
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


def refuse_unsafe(data: Path) -> None:
    """Refuse a data directory in which another user could change the keys or the ledger.

    Raises:
        KeyProblem: with the path, its mode or owner, and the command that corrects it.
        OSError: a status cannot be read.
    """
    keys = [keys_folder(data) / f"{info.kid}.pem" for info in list_keys(data)]
    kept = [data / name for name in (LEDGER, f"{LEDGER}-wal", KEPT_HEAD)]
    for path in (data, keys_folder(data), *kept):
        _refuse_risk(path)
    for path in (data / LEDGER_KEY, *keys):
        _refuse_risk(path, is_private=True)


def _refuse_risk(path: Path, *, is_private: bool = False) -> None:
    if (risk := find_risk(path, is_private=is_private)) is not None:
        raise KeyProblem(risk)


def create_key(data: Path, now: datetime | None = None) -> str:
    """Create a key that signs new tokens, and return its kid; earlier ones verify until they are revoked."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = keys_folder(data)
    with suppress(FileExistsError):
        _make_folder(folder)
    stamp = (now or datetime.now(UTC)).astimezone(UTC)
    earlier = list_keys(data)
    if earlier:  # otherwise, after a step back of the clock, the new key would look older
        stamp = max(stamp, earlier[-1].created_at + timedelta(microseconds=1))
    kid = f"{stamp.strftime(_STAMP)}-{secrets.token_hex(4)}"
    _write_new(folder / f"{kid}.pem", _new_pem())
    return kid


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
    """Return the server's keys, oldest first; the last one signs."""
    try:
        names = [path.name for path in keys_folder(data).iterdir()]
    except FileNotFoundError:
        return []
    kids = sorted(name.removesuffix(".pem") for name in names if is_kid_file(name))
    return [KeyInfo(kid, _created_at(kid), signs=kid == kids[-1]) for kid in kids]


def keys_folder(data: Path) -> Path:
    return data / "keys"


def is_kid(kid: str) -> bool:
    """Whether a text is a kid of the server's own keys; only such names are looked up in the file system."""
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
    """Sign a token with the newest key; the caller records it. Without a `jti` the token gets a new one.

    `now_s` is in seconds since 1970; None is the present time.

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
        KeyProblem: the file has no such key.
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
    """Give a file created by root to the folder's owner, whose server could not read it otherwise.

    The descriptor is used, since the owner may have replaced the name meanwhile.
    """
    if os.geteuid() == 0:
        owner = folder.stat()
        with suppress(PermissionError):  # root in a container that may not change owners
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


def open_signer(data: Path) -> HeadSigner:
    """Return the signer of heads, with the ledger's key.

    Raises:
        KeyProblem: the ledger has no key, or the key also signs tokens.
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
    with suppress(KeyProblem):  # an unreadable key does not sign tokens either
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


@dataclass(frozen=True, slots=True, eq=False)
class VerificationKey:
    """A public key and its one algorithm, compared by identity."""

    kid: str | None
    algorithm: str
    public: PublicKey


_Keys = Mapping[str | None, VerificationKey]
_FileIdentity = tuple[int, int, int]
"""Inode, size and time of a file when it was read; a difference means another content."""


@dataclass(eq=False)
class KeyRing:
    """The keys that verify tokens. A look-up rereads changed files; the constructor reads none.

    Attributes:
        data: the data directory with our own keys.
        provider: the file of an identity provider, whose keys replace our own.
    """

    data: Path
    provider: Path | None = None
    _files: dict[Path, tuple[_FileIdentity, _Keys]] = field(default_factory=dict, init=False)
    _keys: _Keys = field(default_factory=dict, init=False)
    _read_at: float | None = field(default=None, init=False)

    def find(self, kid: str | None, now: float) -> VerificationKey | None:
        """Return the key that a token names, or None; the same object until its file changes.

        A provider's PEM key verifies all tokens, and the only key of a set also tokens that name no key.
        """
        # A clock that was set back must not keep a revoked key alive.
        if self._read_at is None or not 0 <= now - self._read_at < REREAD_AFTER_S:
            self._read_at = now
            self._reread()
        if kid is None and self.provider is not None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid) or self._keys.get(None)

    def list_keys(self, now: float) -> _Keys:
        """Return all keys; an equal mapping until a file changes."""
        self.find(None, now)
        return self._keys

    def _reread(self) -> None:
        try:
            if self.provider is not None:
                paths = [self.provider]
            else:
                paths = [path for path in keys_folder(self.data).iterdir() if is_kid_file(path.name)]
        except FileNotFoundError:
            paths = []
        except OSError as error:  # such as a lack of descriptors: no reason to refuse all tokens
            _log.warning("the key folder cannot be read, the known keys stay in use: %s", error)
            return
        known, self._files = self._files, {}
        for path in paths:
            try:
                status = path.stat()
                identity = (status.st_ino, status.st_size, status.st_mtime_ns)
                if path not in known or known[path][0] != identity:
                    self._files[path] = identity, self._read(path)
                else:
                    self._files[path] = known[path]
            except FileNotFoundError:
                continue  # revoked just now
            except (OSError, KeyProblem) as error:
                if self.provider is not None and path in known:  # probably half-written
                    self._files[path] = known[path]
                    _log.warning("%s cannot be read, its known keys stay in use: %s", path.name, error)
                else:
                    _log.warning("%s cannot be read, and is not used: %s", path.name, error)
        self._keys = {kid: key for _, keys in self._files.values() for kid, key in keys.items()}

    def _read(self, path: Path) -> _Keys:
        if self.provider is not None:
            return read_public_keys(path)
        _refuse_risk(path, is_private=True)
        return {path.stem: VerificationKey(path.stem, ALGORITHM, load_private_key(path).public_key())}


def read_public_keys(path: Path) -> _Keys:
    """Read a PEM public key (under None) or the usable keys of a JWKS (by kid).

    Raises:
        KeyProblem: the file has no key that can verify tokens, or another user could change it.
        OSError: the file cannot be read.
    """
    _refuse_risk(path)
    content = path.read_bytes()
    if not content.lstrip().startswith(b"{"):
        return {None: _read_pem(path, content)}
    keys = _read_jwks(path, content)
    if not keys:
        raise KeyProblem(f"{path} has no key for verifying signatures")
    return keys


def _read_pem(path: Path, content: bytes) -> VerificationKey:
    if content.count(b"-----BEGIN") != 1 or b"PRIVATE KEY-----" in content:
        raise KeyProblem(f"{path} must hold one public key and nothing else; several go into a JWKS")
    try:
        public = load_pem_public_key(content)
    except ValueError as error:
        raise KeyProblem(f"{path} is not a PEM public key: {error}") from error
    key = _bind_algorithm(None, public, None)
    if key is None:
        raise KeyProblem(f"{path} is not an RSA (2048 bits or more), P-256, P-384, P-521 or Ed25519 key")
    return key


def _read_jwks(path: Path, content: bytes) -> _Keys:
    try:
        document = json.loads(content)
        entries = document["keys"]
    except (ValueError, KeyError, RecursionError) as error:
        raise KeyProblem(f"{path} is not a JWKS: {error!r}") from error
    if not isinstance(entries, list):
        raise KeyProblem(f"{path} is not a JWKS: its keys are not a list")
    usable = [key for entry in entries if (key := _read_jwk(entry)) is not None]
    keys = {key.kid: key for key in usable}
    if len(keys) != len(usable) or (None in keys and len(keys) > 1):
        raise KeyProblem(f"{path} has several keys of one kid, or without any")
    return keys


def _read_jwk(entry: Any) -> VerificationKey | None:
    """Return a key of a JWKS, or None for one that cannot verify signatures, such as an encryption key."""
    if not isinstance(entry, dict) or entry.get("kty") not in {"RSA", "EC", "OKP"}:
        return None
    kid, algorithm = entry.get("kid"), entry.get("alg")
    if entry.get("use", "sig") != "sig" or "verify" not in entry.get("key_ops", ["verify"]):
        return None
    if not isinstance(kid, str | None) or not isinstance(algorithm, str | None):
        return None
    readers: Mapping[str, Callable[[dict[str, Any]], Any]] = {
        "RSA": jwt.algorithms.RSAAlgorithm.from_jwk,
        "EC": jwt.algorithms.ECAlgorithm.from_jwk,
        "OKP": jwt.algorithms.OKPAlgorithm.from_jwk,
    }
    public_members = {
        name: value for name, value in entry.items() if name not in {"d", "p", "q", "dp", "dq", "qi"}
    }
    try:
        return _bind_algorithm(kid, readers[entry["kty"]](public_members), algorithm)
    except (jwt.InvalidKeyError, KeyError, TypeError, ValueError) as error:
        _log.warning("key %r of the JWKS is not used: %s", kid, error)
        return None


def _bind_algorithm(kid: str | None, public: object, algorithm: str | None) -> VerificationKey | None:
    """Bind a key to its one algorithm; None without one, or if the declared one does not fit the key."""
    match public:
        case RSAPublicKey() if public.key_size >= MIN_RSA_BITS:
            possible: tuple[str, ...] = _RSA
        case EllipticCurvePublicKey() if public.curve.name in _CURVES:
            possible = (_CURVES[public.curve.name],)
        case Ed25519PublicKey():
            possible = (ALGORITHM,)
        case _:
            return None
    if algorithm is not None and algorithm not in possible:
        return None
    return VerificationKey(kid, algorithm or possible[0], public)
