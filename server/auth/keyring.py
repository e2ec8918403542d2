"""The public keys that verify tokens: our own folder's, or those of an existing identity provider.

Each key is bound to exactly one algorithm when it is read (RFC 8725 section 3.1); what a token says about its
algorithm or key never chooses more than which of these is tried.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from server.auth.keys import ALGORITHM, KeyProblem, is_kid_file, keys_folder, load_private_key

log = logging.getLogger(__name__)

REREAD_AFTER_S = 1.0
"""A revoked key is refused after at most this time; a listing of a small folder per second costs nothing."""

MIN_RSA_BITS = 2048  # NIST SP 800-131A; shorter ones can be factored

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

PublicKey = Ed25519PublicKey | RSAPublicKey | EllipticCurvePublicKey


@dataclass(frozen=True, slots=True, eq=False)
class VerificationKey:
    """A public key and the one algorithm it verifies. Two are the same only if they are one object."""

    kid: str | None
    algorithm: str
    public: PublicKey


class KeyRing(Protocol):
    """Where the verifier finds keys."""

    def find(self, kid: str | None, now: float) -> VerificationKey | None:
        """Return the key a token names, or None. The same object as long as the key is the same."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it was when it was read; a difference in any of these is another content."""

    inode: int
    size: int
    mtime_ns: int


def open_key_ring(data: Path, foreign: Path | None) -> KeyRing:
    """Return our own keys, or an identity provider's where its file is given. Nothing is read yet."""
    return FolderKeyRing(data) if foreign is None else FileKeyRing(foreign)


class FolderKeyRing:
    """Our own keys, in `<data>/keys`. Creating one touches no file; each look-up may reread the folder."""

    def __init__(self, data: Path) -> None:
        self._folder = keys_folder(data)
        self._keys: dict[str, tuple[_File, VerificationKey]] = {}
        self._read_at: float | None = None

    def find(self, kid: str | None, now: float) -> VerificationKey | None:
        """Return the key of that name."""
        if _is_due(self._read_at, now):
            self._read_at = now
            self._reread()
        known = self._keys.get(kid) if kid is not None else None
        return known[1] if known is not None else None

    def _reread(self) -> None:
        try:
            names = [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            names = []
        except OSError as error:  # out of descriptors, say: not a reason to lock everyone out
            log.warning("the key folder cannot be read, the keys known stay: %s", error)
            return
        present = (name.removesuffix(".pem") for name in names if is_kid_file(name))
        self._keys = dict(self._entries(present))

    def _entries(self, kids: Iterator[str]) -> Iterator[tuple[str, tuple[_File, VerificationKey]]]:
        for kid in kids:
            path = self._folder / f"{kid}.pem"
            try:
                file = _look_at(path)
                known = self._keys.get(kid)
                if known is not None and known[0] == file:
                    yield kid, known
                else:
                    yield kid, (file, VerificationKey(kid, ALGORITHM, load_private_key(path).public_key()))
            except FileNotFoundError:
                continue  # revoked just now
            except (OSError, KeyProblem) as error:
                log.warning("key %s is not used: %s", kid, error)


class FileKeyRing:
    """Keys of an existing identity provider: one public key as PEM, or a JWKS."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: _File | None = None
        self._keys: Mapping[str | None, VerificationKey] = {}
        self._read_at: float | None = None

    def find(self, kid: str | None, now: float) -> VerificationKey | None:
        """Return the key of that name; a PEM key, and the only key of a set for a token that names none."""
        if _is_due(self._read_at, now):
            self._read_at = now
            self._reread()
        if None in self._keys:
            return self._keys[None]
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)

    def _reread(self) -> None:
        try:
            file = _look_at(self._path)
            if file != self._file:
                self._keys = read_public_keys(self._path)
                self._file = file
        except FileNotFoundError:
            self._keys, self._file = {}, None
        except (OSError, KeyProblem) as error:  # half-written, most likely
            log.warning("the identity provider's keys cannot be read, those known stay: %s", error)


def read_public_keys(path: Path) -> Mapping[str | None, VerificationKey]:
    """Read a PEM public key (under None) or the usable keys of a JWKS (by kid).

    Raises:
        KeyProblem: the file has no key that can verify tokens.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if not content.lstrip().startswith(b"{"):
        return {None: _pem(path, content)}
    keys = _jwks(path, content)
    if not keys:
        raise KeyProblem(f"{path} has no key for verifying signatures")
    return keys


def _pem(path: Path, content: bytes) -> VerificationKey:
    if content.count(b"-----BEGIN") != 1 or b"PRIVATE KEY-----" in content:
        raise KeyProblem(f"{path} must hold one public key and nothing else; several go into a JWKS")
    try:
        public = load_pem_public_key(content)
    except ValueError as error:
        raise KeyProblem(f"{path} is not a PEM public key: {error}") from error
    key = _pinned(None, public, None)
    if key is None:
        raise KeyProblem(f"{path} is not an RSA (2048 bits or more), P-256, P-384, P-521 or Ed25519 key")
    return key


def _jwks(path: Path, content: bytes) -> Mapping[str | None, VerificationKey]:
    try:
        document = json.loads(content)
        entries = document["keys"]
    except (ValueError, KeyError, RecursionError) as error:
        raise KeyProblem(f"{path} is not a JWKS: {error!r}") from error
    if not isinstance(entries, list):
        raise KeyProblem(f"{path} is not a JWKS: its keys are not a list")
    usable = [key for entry in entries if (key := _jwk(entry)) is not None]
    keys = {key.kid: key for key in usable}
    if len(keys) != len(usable) or (None in keys and len(keys) > 1):
        raise KeyProblem(f"{path} has several keys of one kid, or without any")
    return keys


def _jwk(entry: Any) -> VerificationKey | None:
    """Return a key of a JWKS; None for what cannot verify signatures: encryption keys, secrets."""
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
        return _pinned(kid, readers[entry["kty"]](public_members), algorithm)
    except (jwt.InvalidKeyError, KeyError, TypeError, ValueError) as error:
        log.warning("key %r of the JWKS is not used: %s", kid, error)
        return None


def _pinned(kid: str | None, public: object, algorithm: str | None) -> VerificationKey | None:
    """Bind a key to its one algorithm; None if it has none, or if the one it claims is not for such a key."""
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


def _is_due(read_at: float | None, now: float) -> bool:
    # A clock that was set back must not keep a revoked key alive.
    return read_at is None or not 0 <= now - read_at < REREAD_AFTER_S


def _look_at(path: Path) -> _File:
    status = path.stat()
    return _File(status.st_ino, status.st_size, status.st_mtime_ns)
