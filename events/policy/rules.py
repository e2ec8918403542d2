"""The rules of a policy, those of one model, and how far a later policy is weaker.

Rules are recorded with the contents of their key files, so that an old load can be judged by the policy of
its day. A load records the digest of its model's rules (`ModelRules.digest`), so a change of the rules for
other models does not concern it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from itertools import chain, starmap
from typing import TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

SIGNATURE_CODES = tuple(
    f"signature_{each}" for each in ("missing", "invalid", "untrusted", "mismatch", "unsupported")
)
NOT_APPROVED = "not_approved"
"""Error code of a load whose bytes too few other persons have approved."""

POLICY_CODES = (*SIGNATURE_CODES, NOT_APPROVED)
"""Error codes of loads that do not pass the rules: another attempt ends likewise, until a person acts."""


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


class AddedMode(StrEnum):
    """The versions that an approval rule lets pass: any, or only those whose adder the ledger has."""

    ANY = "any"
    RECORDED = "recorded"


class ApprovalRule(Struct, frozen=True, gc=False):
    """A rule about approval: how many other persons approve the bytes that some models are loaded from.

    Attributes:
        models: globs, as in `TrustRule`.
        approvals: how many other persons must approve.
        added: `recorded` if the ledger must have who added the bytes.
        emergency: whether the role `emergency` may pass without.
    """

    models: tuple[str, ...]
    approvals: int = 1
    added: AddedMode = AddedMode.ANY
    emergency: bool = True


_R = TypeVar("_R", TrustRule, ApprovalRule)


class LoadPolicy(Struct, frozen=True, gc=False):
    """All rules of a server, in the order of its configuration file."""

    trust: tuple[TrustRule, ...] = ()
    approval: tuple[ApprovalRule, ...] = ()

    def of(self, model_id: str) -> ModelRules | None:
        """Return the rules for a model; None if there is none, or all are off."""
        trust = tuple(
            rule for rule in self.trust if rule.mode is not TrustMode.OFF and _matches(rule.models, model_id)
        )
        approval = tuple(rule for rule in self.approval if _matches(rule.models, model_id))
        return ModelRules(trust, approval) if trust or approval else None

    def count_persons(self, model_id: str) -> int:
        """Return how many other persons must approve the bytes of a model; 0 without such rules."""
        return (self.of(model_id) or ModelRules()).persons


class ModelRules(Struct, frozen=True, gc=False):
    """The rules for one model: every one must pass."""

    trust: tuple[TrustRule, ...] = ()
    approval: tuple[ApprovalRule, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all of them, in hexadecimal."""
        return _digest((*self.trust, *self.approval))

    @property
    def approval_digest(self) -> str | None:
        """SHA-256 of the rules of approval; None without any."""
        return _digest(self.approval) if self.approval else None

    @property
    def names(self) -> list[str]:
        """The tables of its rules in the configuration file, with their globs."""
        trust = [f"[[trust]] {' '.join(rule.models)} ({rule.mode})" for rule in self.trust]
        return [*trust, *(f"[[approval]] {' '.join(rule.models)}" for rule in self.approval)]

    @property
    def persons(self) -> int:
        """How many persons must approve."""
        return max((rule.approvals for rule in self.approval), default=0)

    @property
    def needs_adder(self) -> bool:
        """Whether the ledger must have who added the bytes."""
        return any(rule.added is AddedMode.RECORDED for rule in self.approval)

    @property
    def allows_emergency(self) -> bool:
        return all(rule.emergency for rule in self.approval)

    @property
    def enforced(self) -> tuple[TrustRule, ...]:
        return tuple(rule for rule in self.trust if rule.mode is TrustMode.ENFORCE)


def list_weakenings(before: LoadPolicy, after: LoadPolicy) -> list[str]:
    """Return a sentence for each way in which a policy is weaker than the one before.

    Rules are compared by their globs; those of the same globs in their order.
    """
    trust = starmap(_weaker_trust, _pairs(before.trust, after.trust))
    approval = starmap(_weaker_approval, _pairs(before.approval, after.approval))
    return [*chain.from_iterable((*trust, *approval))]


def _pairs(before: Sequence[_R], after: Sequence[_R]) -> Iterator[tuple[_R, _R | None]]:
    """Yield each rule that changed, with what it is now; None for a rule that is gone."""
    left = [rule for rule in after if rule not in before]
    for rule in before:
        if rule not in after:
            now = next((each for each in left if each.models == rule.models), None)
            if now is not None:
                left.remove(now)
            yield rule, now


def _weaker_trust(before: TrustRule, after: TrustRule | None) -> Iterator[str]:
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


def _weaker_approval(before: ApprovalRule, after: ApprovalRule | None) -> Iterator[str]:
    after, name = after or replace(before, approvals=0), f"approval for {', '.join(before.models)}"
    if after.approvals < before.approvals:
        yield f"{name}: {after.approvals} must approve instead of {before.approvals}"
    if before.added is AddedMode.RECORDED and after.added is AddedMode.ANY:
        yield f"{name}: bytes pass whose adder the ledger does not have"
    if after.emergency and not before.emergency:
        yield f"{name}: the role emergency may pass without"


def _matches(globs: Iterable[str], model_id: str) -> bool:
    return any(fnmatchcase(model_id, glob) for glob in globs)


def _digest(rules: Iterable[TrustRule | ApprovalRule]) -> str:
    """Return the digest of what rules demand: neither their order nor their globs change it."""
    encoded = sorted(msgspec.json.encode(replace(rule, models=()), order="sorted") for rule in rules)
    return hashlib.sha256(b"\n".join(encoded)).hexdigest()
