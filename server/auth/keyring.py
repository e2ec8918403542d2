"""The public keys that verify tokens: the data directory's, or those of an identity provider's file.

Each key is bound to exactly one algorithm when it is read (RFC 8725 section 3.1). The header of a token only
chooses one of these keys, never an algorithm.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from server.auth.keys import ALGORITHM, KeyProblem, is_kid_file, keys_folder, load_private_key

_log = logging.getLogger(__name__)

REREAD_AFTER_S = 1.0
"""A revoked key is refused after at most this time; listing a small folder each second costs nothing."""

MIN_RSA_BITS = 2048  # NIST SP 800-131A; shorter ones can be factored

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

PublicKey = Ed25519PublicKey | RSAPublicKey | EllipticCurvePublicKey


@dataclass(frozen=True, slots=True, eq=False)
class VerificationKey:
    """A public key and its one algorithm. Two are equal only if they are the same object."""

    kid: str | None
    algorithm: str
    public: PublicKey


_Keys = Mapping[str | None, VerificationKey]
_FileIdentity = tuple[int, int, int]
"""Inode, size and time of a file when it was read; if one differs, the content does."""


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
        """Return the key that a token names, or None; the same object as long as its file is unchanged.

        A provider's PEM key verifies all tokens, and the only key of a set also those that name none.
        """
        # A clock that was set back must not keep a revoked key alive.
        if self._read_at is None or not 0 <= now - self._read_at < REREAD_AFTER_S:
            self._read_at = now
            self._reread()
        if kid is None and self.provider is not None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid) or self._keys.get(None)

    def list_keys(self, now: float) -> _Keys:
        """Return all keys; an equal mapping as long as no file has changed."""
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
        except OSError as error:  # such as too few descriptors: no reason to refuse all tokens
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
                if self.provider is not None and path in known:  # half-written, most likely
                    self._files[path] = known[path]
                    _log.warning("%s cannot be read, its known keys stay in use: %s", path.name, error)
                else:
                    _log.warning("%s cannot be read, and is not used: %s", path.name, error)
        self._keys = {kid: key for _, keys in self._files.values() for kid, key in keys.items()}

    def _read(self, path: Path) -> _Keys:
        if self.provider is not None:
            return read_public_keys(path)
        return {path.stem: VerificationKey(path.stem, ALGORITHM, load_private_key(path).public_key())}


def read_public_keys(path: Path) -> _Keys:
    """Read a PEM public key (under None) or the usable keys of a JWKS (by kid).

    Raises:
        KeyProblem: the file has no key that can verify tokens.
        OSError: the file cannot be read.
    """
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
    """Return a key of a JWKS; None if it cannot verify signatures, such as encryption keys and secrets."""
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
    """Bind a key to its one algorithm; None if there is none, or if the declared one does not fit the key."""
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
