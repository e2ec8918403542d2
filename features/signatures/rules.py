"""The rules about signatures: who may sign the versions of some models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

SIGNATURE_CODES = tuple(
    f"signature_{each}" for each in ("missing", "invalid", "untrusted", "mismatch", "unsupported")
)


class TrustMode(StrEnum):
    """The effect of a rule on a version without a signature that it accepts."""

    OFF = "off"
    WARN = "warn"
    ENFORCE = "enforce"


_STRENGTH = tuple(TrustMode)


class TrustedCertificates(Struct, frozen=True, gc=False):
    """Certificates that may sign: roots as PEM, and a subject like `CN=a,O=b` (RFC 4514)."""

    roots: str
    subject: str


class TrustRule(Struct, frozen=True, gc=False):
    """A rule about signatures: the signers of some models' versions.

    Attributes:
        models: globs of model ids, with `*`, `?` and `[...]`, in the case that they have.
        mode: what follows without such a signature.
        keys: public keys, PEM each.
        certificates: of those who may sign with a certificate.
        distrusted: SHA-256 of the PEM of keys that may not sign any more, in hexadecimal, as
            `signatures.key_digest` has them: their signatures do not let a reload go on either.
    """

    models: tuple[str, ...]
    mode: TrustMode
    keys: tuple[str, ...] = ()
    certificates: tuple[TrustedCertificates, ...] = ()
    distrusted: tuple[str, ...] = ()


def list_weaker_trust(before: TrustRule, after: TrustRule | None) -> Iterator[str]:
    """Yield each way in which a rule is weaker than before; `after` is None for a removed rule."""
    if before.mode is TrustMode.OFF:
        return
    after, name = after or replace(before, mode=TrustMode.OFF), f"signatures of {', '.join(before.models)}"
    if _STRENGTH.index(after.mode) < _STRENGTH.index(before.mode):
        yield f"{name}: the mode is {after.mode} instead of {before.mode}"
    for key in sorted({*after.keys} - {*before.keys}):
        yield f"{name}: the key {hashlib.sha256(key.encode()).hexdigest()} may sign"
    for subject in sorted({each.subject for each in {*after.certificates} - {*before.certificates}}):
        yield f"{name}: other certificates of {subject} may sign"
    for digest in sorted({*before.distrusted} - {*after.distrusted}):
        yield f"{name}: the key {digest} is not distrusted any more"
