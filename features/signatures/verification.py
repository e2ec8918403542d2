"""Checks the signature of a version: its signer, and that it lists exactly the version's files. Pure.

Only the rule decides who may sign: the keys and roots of the system and of the bundle are ignored. A
certificate is verified as of the time of the check, which the caller gives, so that a check can be repeated.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeGuard

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec import Struct

from events.clock import Timestamp, parse_timestamp
from events.types import Contents
from features.signatures.bundles import Bundle, SignatureRefused, parse_bundle
from features.signatures.rules import TrustRule

__all__ = ["SignatureRefused", "VerifiedSignature", "check_signature", "find_bundle", "key_digest"]

_HASHES = {"secp256r1": SHA256(), "secp384r1": SHA384(), "secp521r1": SHA512()}
"""The hash function by the name of the curve, as in the published tool."""
_CURVES = "P-256, P-384 or P-521"
_CHANGED = "the bundle was changed after it was signed; sign the version again"
_KEPT = 256
"""Parsed keys and roots in memory: more than a policy has."""


class VerifiedSignature(Struct, frozen=True, gc=False):
    """The accepted signer of a version.

    Attributes:
        method: "key" or "certificate".
        signer: digest of the key (`key_digest`), or the certificate's subject (RFC 4514).
    """

    method: str
    signer: str


def find_bundle(contents: Contents) -> str:
    """Return the path of the one bundle among a version's files: `.sig`, and not in a folder.

    Raises:
        SignatureRefused: signature_missing without any, signature_invalid with several.
    """
    found = [path for path, _ in contents if path.endswith(".sig") and "/" not in path]
    if not found:
        text = "the version has no file that ends in .sig; sign it, for example with `model_signing sign key`"
        raise SignatureRefused("signature_missing", text)
    if len(found) > 1:
        text = f"the version has several signatures: {', '.join(map(repr, found)):.400}; keep one"
        raise SignatureRefused("signature_invalid", text)
    return found[0]


def check_signature(
    content: bytes, path: str, contents: Contents, rule: TrustRule, at: Timestamp
) -> VerifiedSignature:
    """Return the signer of a version.

    Args:
        content: the bundle.
        path: the bundle's path, the only file that need not be signed.
        contents: all files of the version, with the hashes that the store computed.
        rule: the rule about signers.
        at: the time at which certificates must be valid.

    Raises:
        SignatureRefused: the signature is broken, by nobody who may sign, or of other files.
        ValueError: the rule itself is broken; the server refuses such a rule at its start.
    """
    bundle = parse_bundle(content)
    verified = _verify_certificate(bundle, rule, at) if bundle.certificates else _verify_key(bundle, rule)
    stored, signed = dict(contents), {path: dict(contents).get(path), **bundle.resources}
    for name in sorted(stored.keys() | signed.keys()):
        if stored.get(name) != signed.get(name):
            known = "was changed" if name in stored else "is missing"
            reason = known if name in signed else "is not signed"
            text = f"{name!r:.200} {reason}; add the files as they were signed, or sign them again"
            raise SignatureRefused("signature_mismatch", text)
    return verified


def key_digest(pem: str) -> str:
    """Return the SHA-256 of a public key's PEM in hexadecimal: the hint in bundles."""
    return _digest(normalise_key(pem))


def normalise_key(pem: str) -> str:
    """Return a public key as PEM without comments.

    Raises:
        ValueError: the text is no public key for signatures; the message says why.
    """
    return _encode(_load_key(pem))


def normalise_roots(pem: str) -> str:
    """Return certificates as PEM without comments. Raises as `normalise_key`."""
    return "".join(each.public_bytes(Encoding.PEM).decode() for each in _load_roots(pem))


def parse_subject(text: str) -> x509.Name:
    """Return the name for a text in the form of RFC 4514. Raises as `normalise_key`."""
    try:
        name = x509.Name.from_rfc4514_string(re.sub(r"(?<!\\), +", ",", text))
    except ValueError:
        name = x509.Name([])
    if not name.rdns:
        raise ValueError(f"{text!r:.200} is no name as RFC 4514 writes it, like CN=release,O=Bank")
    return name


def _verify_key(bundle: Bundle, rule: TrustRule) -> VerifiedSignature:
    keys, hint = {key_digest(pem): _load_key(pem) for pem in rule.keys}, bundle.key_hint
    if hint is not None:
        _check_distrust(hint, rule)
        if hint not in keys:
            raise _untrusted(f"the key with the digest {hint!r:.100} signed, which the rule does not have")
        if not _is_signed_by(keys[hint], bundle):
            raise SignatureRefused("signature_invalid", _CHANGED)
        return VerifiedSignature("key", hint)
    for digest, key in keys.items():
        if _is_signed_by(key, bundle):
            _check_distrust(digest, rule)
            return VerifiedSignature("key", digest)
    raise _untrusted("no key of the rule made this signature, or the bundle was changed")


def _verify_certificate(bundle: Bundle, rule: TrustRule, at: Timestamp) -> VerifiedSignature:
    try:
        signer, *others = [x509.load_der_x509_certificate(each) for each in bundle.certificates]
        key, subject = signer.public_key(), _read_subject(signer)
        digests = [_digest(_encode(each.public_key())) for each in (signer, *others)]
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        text = f"a certificate of the bundle cannot be read: {error}; sign the version again"
        raise SignatureRefused("signature_invalid", text) from None
    if not _is_supported(key):
        text = f"the certificate's key is not of {_CURVES}; sign with a certificate for such a key"
        raise SignatureRefused("signature_unsupported", text)
    for digest in digests:  # also for an expired certificate, or one whose root the rule has no more
        _check_distrust(digest, rule)
    trusted = [each for each in rule.certificates if parse_subject(each.subject) == signer.subject]
    if not trusted:
        raise _untrusted(f"the certificate of {subject!r:.200} signed, which the rule does not have")
    policy = (
        verification.PolicyBuilder()
        .store(verification.Store([root for each in trusted for root in _load_roots(each.roots)]))
        .time(parse_timestamp(at).replace(tzinfo=None))  # a time without a zone is in UTC
        .extension_policies(ca_policy=_OF_AUTHORITIES, ee_policy=_OF_SIGNERS)
    )
    try:
        chain = policy.build_client_verifier().verify(signer, others).chain
        digests = [_digest(_encode(each.public_key())) for each in chain]
    except (verification.VerificationError, ValueError, UnsupportedAlgorithm) as error:
        raise _untrusted(f"the certificate of {subject!r:.200} is refused as of {at}: {error}") from None
    for digest in digests:
        _check_distrust(digest, rule)
    if not _is_signed_by(key, bundle):
        raise SignatureRefused("signature_invalid", _CHANGED)
    return VerifiedSignature("certificate", subject)


def _read_subject(certificate: x509.Certificate) -> str:
    try:
        return certificate.subject.rfc4514_string()
    except (KeyError, TypeError):  # exceptions of the library
        raise ValueError("a value in its subject has an ASN.1 type that a name cannot have") from None


def _is_signed_by(key: ec.EllipticCurvePublicKey, bundle: Bundle) -> bool:
    try:
        key.verify(bundle.signature, bundle.signed_bytes(), ec.ECDSA(_HASHES[key.curve.name]))
    except InvalidSignature:
        return False
    return True


def _check_distrust(digest: str, rule: TrustRule) -> None:
    if digest in rule.distrusted:
        text = f"the key with the digest {digest} is distrusted: its signatures count no more"
        raise _untrusted(text, is_distrusted=True)


def _untrusted(text: str, *, is_distrusted: bool = False) -> SignatureRefused:
    text += "; sign with a key or certificate of the rule, or let the operator change the rule"
    return SignatureRefused("signature_untrusted", text, is_distrusted=is_distrusted)


def _require(holds: Callable[[Any], bool], text: str) -> Callable[[object, object, Any], None]:
    def validate(_policy: object, _certificate: object, extension: Any) -> None:
        if extension is not None and not holds(extension):
            raise ValueError(text)

    return validate


_ANY = verification.Criticality.AGNOSTIC
_IS_AUTHORITY = _require(lambda each: each.ca, "an issuer is no authority")
_MAY_ISSUE = _require(lambda each: each.key_cert_sign, "an issuer may not issue")
_IS_NO_AUTHORITY = _require(lambda each: not each.ca, "it is of an authority")
_MAY_SIGN = _require(lambda each: each.digital_signature, "it may not sign")
_IS_FOR_CODE = _require(lambda each: ExtendedKeyUsageOID.CODE_SIGNING in each, "it is not for code signing")
_CODE_USAGES = {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
_MAY_ISSUE_FOR_CODE = _require(
    lambda each: not _CODE_USAGES.isdisjoint(each), "an issuer is not for code signing"
)
"""Extended key usages nest: an authority that has some issues only for these, as in Go's `crypto/x509`."""
_OF_AUTHORITIES = (
    verification.ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, _ANY, _IS_AUTHORITY)
    .may_be_present(x509.KeyUsage, _ANY, _MAY_ISSUE)
    .may_be_present(x509.ExtendedKeyUsage, _ANY, _MAY_ISSUE_FOR_CODE)
    .require_not_present(x509.NameConstraints)  # the library does not apply them to subjects
)
_OF_SIGNERS = (
    verification.ExtensionPolicy.permit_all()
    .may_be_present(x509.BasicConstraints, _ANY, _IS_NO_AUTHORITY)
    .may_be_present(x509.KeyUsage, _ANY, _MAY_SIGN)
    .require_present(x509.ExtendedKeyUsage, _ANY, _IS_FOR_CODE)
)


@lru_cache(_KEPT)
def _load_key(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("there is no public key as PEM: `openssl ec -pubout` writes one") from None
    if not _is_supported(key) or pem.count("-----BEGIN") > 1:
        raise ValueError(f"it must be one public key of {_CURVES}")
    return key


@lru_cache(_KEPT)
def _load_roots(pem: str) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(x509.load_pem_x509_certificates(pem.encode()))
    except ValueError:
        raise ValueError("there is no certificate as PEM, or one that cannot be read") from None


def _is_supported(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    return isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES


def _encode(key: Any) -> str:
    return str(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def _digest(pem: str) -> str:
    return hashlib.sha256(pem.encode()).hexdigest()
