"""Keys, authorities and signature bundles of OpenSSF Model Signing 1.0, made in memory.

`sign_version(contents, key)` returns what `model_signing sign key` writes for a version:

    key = make_key()
    (folder / "model.sig").write_bytes(sign_version(contents, key))
    rule = TrustRule(("*",), TrustMode.ENFORCE, keys=(public_pem(key),))

With a certificate: `authority = make_authority()`, `signer = authority.issue()`, then
`sign_version(contents, signer.key, signer.chain)`; the rule has `authority.pem`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from events.types import Contents

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
START = datetime(2026, 1, 1)  # noqa: DTZ001 - certificates have UTC without a zone
NOW = "2026-06-01T00:00:00.000000Z"
"""When the certificates are valid that are made here by default: all of 2026."""

_HASHES = {"secp256r1": SHA256(), "secp384r1": SHA384(), "secp521r1": SHA512()}
_CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def make_key(curve: str = "P-256") -> ec.EllipticCurvePrivateKey:
    """Make a private key of P-256, P-384 or P-521."""
    return ec.generate_private_key(_CURVES[curve])


def public_pem(key: Any) -> str:
    """Return the public key of a private one as PEM, as a key file has it."""
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def make_contents(*paths: str) -> Contents:
    """Return contents with a file at each path."""
    return tuple(sorted((path, hashlib.sha256(path.encode()).hexdigest()) for path in paths))


def make_statement(contents: Contents, **serialization: Any) -> dict[str, Any]:
    """Return the in-toto statement that lists these files."""
    root = hashlib.sha256(b"".join(bytes.fromhex(sha256) for _, sha256 in contents)).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [".git"],
                **serialization,
            },
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": sha256} for path, sha256 in contents
            ],
        },
    }  # fmt: skip


def sign_folder(version: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    """Sign a version's folder as it is; return the bundle, which is beside it."""
    files = sorted(path for path in version.rglob("*") if path.is_file())
    hashes = ((path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files)
    contents = tuple((path.relative_to(version).as_posix(), sha256) for path, sha256 in hashes)
    bundle = version.parent / f"{version.name}.sig"
    bundle.write_bytes(sign_version(contents, key))
    return bundle


def sign_payload(
    payload: bytes, key: ec.EllipticCurvePrivateKey, chain: Sequence[x509.Certificate] = (), **members: Any
) -> bytes:
    """Return a bundle with any signed payload; `members` replace those of the bundle."""
    kind = PAYLOAD_TYPE.encode()
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    signature = key.sign(message, ec.ECDSA(_HASHES[key.curve.name]))
    material: Mapping[str, Any] = {
        "publicKey": {"hint": hashlib.sha256(public_pem(key).encode()).hexdigest()}
    }
    if chain:
        certificates = [{"rawBytes": encode_base64(each.public_bytes(Encoding.DER))} for each in chain]
        material = {"x509CertificateChain": {"certificates": certificates}}
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {**material, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": encode_base64(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": encode_base64(signature), "keyid": ""}],
        },
    }
    return json.dumps({**document, **members}).encode()


def sign_version(
    contents: Contents,
    key: ec.EllipticCurvePrivateKey,
    chain: Sequence[x509.Certificate] = (),
    *,
    path: str = "model.sig",
    **serialization: Any,
) -> bytes:
    """Return the bundle that signs a version.

    Args:
        contents: the version's files; the bundle's own path is left out if it is among them.
        key: signs.
        chain: certificates for the key, the signing one first; none if the key alone signs.
        path: of the bundle.
        serialization: other members of the statement's `serialization`.
    """
    signed = tuple(each for each in contents if each[0] != path)
    return sign_payload(json.dumps(make_statement(signed, **serialization)).encode(), key, chain)


def encode_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@dataclass(frozen=True)
class Certified:
    """A certificate with its private key, and the certificates below the root, its own first."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    chain: tuple[x509.Certificate, ...]

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def issue(
        self,
        subject: str = "CN=release,O=Bank",
        *,
        curve: str = "P-256",
        key: Any = None,
        start: datetime = START,
        days: int = 365,
        usage: Sequence[ObjectIdentifier] = (ExtendedKeyUsageOID.CODE_SIGNING,),
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    ) -> Certified:
        """Issue a certificate for signing code; without `usage` it has no extended key usage."""
        wanted = [(x509.ExtendedKeyUsage(usage), False)] if usage else []
        key = key or make_key(curve)
        certificate = _issue(self, subject, key, start=start, days=days, extensions=[*wanted, *extensions])
        return Certified(key, certificate, (certificate, *self.chain))

    def issue_authority(
        self,
        subject: str = "CN=Intermediate,O=Bank",
        *,
        path_length: int | None = None,
        usage: Sequence[ObjectIdentifier] = (),
    ) -> Certified:
        """Issue the certificate of an authority below this one, by default for any usage."""
        key = make_key()
        extensions = _of_authority(path_length)
        if usage:
            extensions.append((x509.ExtendedKeyUsage(usage), False))
        certificate = _issue(self, subject, key, start=START, days=365, extensions=extensions)
        return Certified(key, certificate, (certificate, *self.chain))


def make_authority(
    subject: str = "CN=Root,O=Bank", *, path_length: int | None = None, days: int = 365
) -> Certified:
    """Make a root; its own certificate is no part of the chains that bundles have."""
    key = make_key()
    return Certified(
        key, _issue(None, subject, key, start=START, days=days, extensions=_of_authority(path_length)), ()
    )


def key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=key_cert_sign, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, crl_sign=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _of_authority(path_length: int | None) -> list[tuple[x509.ExtensionType, bool]]:
    return [
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (key_usage(key_cert_sign=True), True),
    ]


def _issue(
    issuer: Certified | None,
    subject: str,
    key: Any,
    *,
    start: datetime,
    days: int,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    name = x509.Name.from_rfc4514_string(subject)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(key if issuer is None else issuer.key, SHA256())
