"""The rules of a policy, those of one model, and how far a later policy is weaker.

Rules are recorded with the contents of their key files, so that an old load can be judged by the policy of
its day. A load records the digest of its model's rules (`ModelRules.digest`), so a change of the rules for
other models does not concern it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain, starmap
from typing import TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from features.approvals.rules import NOT_APPROVED, AddedMode, ApprovalRule, list_weaker_approval
from features.signatures.rules import SIGNATURE_CODES, TrustMode, TrustRule, list_weaker_trust

POLICY_CODES = (*SIGNATURE_CODES, NOT_APPROVED)
"""Error codes of loads that do not pass the rules: another attempt ends likewise, until a person acts."""


_R = TypeVar("_R", TrustRule, ApprovalRule)


class LoadPolicy(Struct, frozen=True, gc=False):
    """All rules of a server, in the order of its configuration file."""

    trust: tuple[TrustRule, ...] = ()
    approval: tuple[ApprovalRule, ...] = ()

    def of(self, model_id: str) -> ModelRules | None:
        """Return the rules for a model, or None without any, or if all are off."""
        trust = tuple(
            rule
            for rule in self.trust
            if rule.mode is not TrustMode.OFF and matches_any(rule.models, model_id)
        )
        approval = tuple(rule for rule in self.approval if matches_any(rule.models, model_id))
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
        """SHA-256 of the rules of approval, or None."""
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
        """Whether the ledger must know who added the bytes."""
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
    trust = starmap(list_weaker_trust, _pairs(before.trust, after.trust))
    approval = starmap(list_weaker_approval, _pairs(before.approval, after.approval))
    return [*chain.from_iterable((*trust, *approval))]


def _pairs(before: Sequence[_R], after: Sequence[_R]) -> Iterator[tuple[_R, _R | None]]:
    """Yield each rule that changed, with its new form, or None for a removed rule."""
    left = [rule for rule in after if rule not in before]
    for rule in before:
        if rule not in after:
            now = next((each for each in left if each.models == rule.models), None)
            if now is not None:
                left.remove(now)
            yield rule, now


def matches_any(globs: Iterable[str], model_id: str) -> bool:
    """Whether one of the globs of a rule matches a model."""
    return any(fnmatchcase(model_id, glob) for glob in globs)


def _digest(rules: Iterable[TrustRule | ApprovalRule]) -> str:
    """Return the digest of the rules' demands: neither their order nor their globs change it."""
    encoded = sorted(msgspec.json.encode(replace(rule, models=()), order="sorted") for rule in rules)
    return hashlib.sha256(b"\n".join(encoded)).hexdigest()
