"""Signature bundles of OpenSSF Model Signing 1.0: a Sigstore bundle with signed hashes of files.

A bundle is JSON: data for its verification, and a DSSE envelope with an in-toto statement, which lists each
file with its SHA-256. The rules are stricter than the published verifier's, so that a bundle has one meaning:
duplicate keys, names that are not canonical, and a second signature are refused. Other members, such as
`ignore_paths`, have no effect: `signatures` compares the list with all files.

Format: https://docs.sigstore.dev/about/bundle/ and https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from msgspec import Struct

MAX_BYTES = 2**20
"""Length of a bundle, which lists some 4,000 files."""
MAX_CERTIFICATES = 8
"""Certificates of a bundle: more than authorities have in practice, and few enough to verify quickly."""

_MEDIA_TYPES = (
    "application/vnd.dev.sigstore.bundle.v0.3+json",
    "application/vnd.dev.sigstore.bundle+json;version=0.3",
)
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SIGN_AGAIN = "sign the version again with `model_signing sign key` or `sign certificate`, 1.0 or later"
_T = TypeVar("_T")


class SignatureRefused(Exception):
    """A version has no valid signature; the message says why, and what to do.

    The code is `signature_missing`, `signature_invalid` (broken, ambiguous or changed), `signature_untrusted`
    (by nobody who may sign), `signature_mismatch` (of other files), or `signature_unsupported` (in another
    form). `is_distrusted` says that the signing key was distrusted since.
    """

    def __init__(self, code: str, message: str, *, is_distrusted: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_distrusted = is_distrusted


class Bundle(Struct, frozen=True, gc=False):
    """A parsed bundle, whose signature is not verified yet.

    Attributes:
        payload: the signed statement, byte for byte.
        signature: ECDSA, in DER.
        key_hint: SHA-256 of the public key's PEM, in hexadecimal, or None.
        certificates: in DER, the signing one first; empty if a key signed.
        resources: SHA-256 of each signed file in hexadecimal, by its path.
    """

    payload: bytes
    signature: bytes
    key_hint: str | None
    certificates: tuple[bytes, ...]
    resources: Mapping[str, str]

    def signed_bytes(self) -> bytes:
        """Return the signed bytes: the pre-authentication encoding of DSSE 1.0."""
        kind = _PAYLOAD_TYPE.encode()
        return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(self.payload), self.payload)


def parse_bundle(content: bytes) -> Bundle:
    """Parse a bundle.

    Raises:
        SignatureRefused: signature_invalid, or signature_unsupported for another form.
    """
    if len(content) > MAX_BYTES:
        raise _invalid(f"the bundle has {len(content)} bytes, more than {MAX_BYTES}")
    try:
        document = _read_json(content)
        _check(document, "mediaType", *_MEDIA_TYPES)
        hint, certificates = _read_material(_get(document, "verificationMaterial", dict))
        envelope = _get(document, "dsseEnvelope", dict)
        _check(envelope, "payloadType", _PAYLOAD_TYPE)
        payload = _decode(envelope, "payload")
        signature = _decode(_get_one(envelope, "signatures"), "sig")
        return Bundle(payload, signature, hint, certificates, _read_statement(_read_json(payload)))
    except RecursionError:
        raise _invalid("the bundle is nested too deeply") from None


def _read_material(material: Any) -> tuple[str | None, tuple[bytes, ...]]:
    """Return the hint of the public key, or the certificates."""
    if material.get("certificate") is not None:
        text = "the bundle is keyless: it needs Sigstore's transparency log, which is not consulted"
        raise SignatureRefused("signature_unsupported", f"{text}; {_SIGN_AGAIN}")
    if material.get("x509CertificateChain") is None:
        key = _get(material, "publicKey", dict)
        return (_get(key, "hint", str) if key.get("hint") else None), ()
    if material.get("publicKey") is not None:
        raise _invalid("the bundle has both a public key and certificates")
    certificates = _get(_get(material, "x509CertificateChain", dict), "certificates", list)
    if not 1 <= len(certificates) <= MAX_CERTIFICATES:
        raise _invalid(f"the bundle has {len(certificates)} certificates, not 1 to {MAX_CERTIFICATES}")
    return None, tuple(_decode(each, "rawBytes") for each in certificates)


def _read_statement(statement: Any) -> dict[str, str]:
    """Return the SHA-256 of each file in the statement, by its path."""
    _check(statement, "_type", "https://in-toto.io/Statement/v1")
    _check(statement, "predicateType", "https://model_signing/signature/v1.0")
    predicate = _get(statement, "predicate", dict)
    serialization = _get(predicate, "serialization", dict)
    _check(serialization, "method", "files")
    _check(serialization, "hash_type", "sha256")
    resources: dict[str, str] = {}
    for each in _get(predicate, "resources", list):
        _check(each, "algorithm", "sha256")
        name, digest = _get(each, "name", str), _get(each, "digest", str)
        if _SHA256.fullmatch(digest) is None:
            raise _invalid(f"the digest of {name!r:.200} is not SHA-256 in lower-case hexadecimal")
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise _invalid(f"{name!r:.200} is not the relative path of a file")
        if name in resources:
            raise _invalid(f"{name!r:.200} is listed twice")
        resources[name] = digest
    root = hashlib.sha256(b"".join(map(bytes.fromhex, resources.values()))).hexdigest()
    if _get(_get(_get_one(statement, "subject"), "digest", dict), "sha256", str) != root:
        raise _invalid("the subject's digest is not that of the listed files")
    return resources


def _read_json(content: bytes) -> Any:
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique_keys)
    except ValueError as error:  # also for text that is not UTF-8, or integers with too many digits
        raise _invalid(f"the bundle is not valid JSON: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError("a key appears twice in one object")
    return read


def _get(parent: Any, key: str, kind: type[_T]) -> _T:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, kind):
        raise _invalid(f"the bundle's {key} is missing, or of the wrong type")
    return value


def _get_one(parent: Any, key: str) -> Any:
    values = _get(parent, key, list)
    if len(values) != 1:
        raise _invalid(f"the bundle's {key} has {len(values)} entries instead of one")
    return values[0]


def _decode(parent: Any, key: str) -> bytes:
    try:
        return base64.b64decode(_get(parent, key, str), validate=True)
    except ValueError as error:
        raise _invalid(f"the bundle's {key} is not base64: {error}") from None


def _check(parent: Any, key: str, *supported: str) -> None:
    if (value := _get(parent, key, str)) not in supported:
        text = f"the bundle's {key} is {value!r:.200}, and only {supported[0]} is supported"
        raise SignatureRefused("signature_unsupported", f"{text}; {_SIGN_AGAIN}")


def _invalid(text: str) -> SignatureRefused:
    return SignatureRefused("signature_invalid", f"{text}; {_SIGN_AGAIN}")
