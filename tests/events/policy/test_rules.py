"""Rules: which concern a model, what they digest to, and when a later policy is weaker."""

import hashlib
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from features.approvals.rules import AddedMode, ApprovalRule
from features.rules import LoadPolicy, list_weakenings
from features.signatures.rules import TrustedCertificates, TrustMode, TrustRule

FRAUD = ("fraud-*",)
TRUST = TrustRule(FRAUD, TrustMode.ENFORCE, ("key",), distrusted=("old",))
WARN = replace(TRUST, mode=TrustMode.WARN)
OFF = replace(TRUST, mode=TrustMode.OFF)
APPROVAL = ApprovalRule(FRAUD, approvals=2, added=AddedMode.RECORDED, emergency=False)


@pytest.mark.parametrize(
    ("globs", "model_id", "expected"),
    [
        (("fraud-*",), "fraud-1", True),
        (("fraud-*",), "Fraud-1", False),
        (("fraud-*",), "a-fraud-1", False),
        (("a", "fraud-[12]"), "fraud-2", True),
        (("fraud-?",), "fraud-10", False),
        (("*",), "digits", True),
    ],
)
def test_rule_concerns_models_of_its_globs(globs: tuple[str, ...], model_id: str, *, expected: bool) -> None:
    policy = LoadPolicy((replace(TRUST, models=globs),))
    assert (policy.of(model_id) is not None) is expected


def test_rules_of_a_model_all_count() -> None:
    other = ApprovalRule(("*",), approvals=1)
    rules = LoadPolicy((TRUST, WARN, OFF), (APPROVAL, other)).of("fraud-1")
    assert rules is not None
    assert rules.trust == (TRUST, WARN)
    assert rules.enforced == (TRUST,)
    assert (rules.persons, rules.needs_adder, rules.allows_emergency) == (2, True, False)
    weaker = LoadPolicy((TRUST,), (other,)).of("fraud-1")
    assert weaker is not None
    assert (weaker.needs_adder, weaker.allows_emergency) == (False, True)


def test_model_without_rules_has_none() -> None:
    assert LoadPolicy((OFF,)).of("fraud-1") is None
    assert LoadPolicy((TRUST,), (APPROVAL,)).of("digits") is None


def test_digest_is_of_the_rules_of_the_model_only() -> None:
    rules = LoadPolicy((TRUST,), (APPROVAL,)).of("fraud-1")
    more = LoadPolicy((TRUST, replace(TRUST, models=("a",))), (APPROVAL,)).of("fraud-1")
    less = LoadPolicy((WARN,), (APPROVAL,)).of("fraud-1")
    assert rules is not None
    assert more is not None
    assert less is not None
    assert rules.digest == more.digest != less.digest
    assert rules.approval_digest == less.approval_digest


KEY_2 = hashlib.sha256(b"key 2").hexdigest()
CERTIFICATES = TrustedCertificates("roots", "CN=a")
Rule = TrustRule | ApprovalRule
WEAKENINGS: dict[str, tuple[Sequence[Rule], Sequence[Rule], list[str]]] = {
    "nothing": ([TRUST, APPROVAL], [TRUST, APPROVAL], []),
    "another order": ([TRUST, APPROVAL, WARN], [WARN, APPROVAL, TRUST], []),
    "more rules": ([TRUST], [TRUST, APPROVAL, WARN], []),
    "stronger mode": ([WARN], [TRUST], []),
    "off is gone": ([OFF], [], []),
    "off gets keys": ([OFF], [replace(OFF, keys=("key", "key 2"))], []),
    "a key less": ([replace(TRUST, keys=("key", "key 2"))], [TRUST], []),
    "another distrusted": ([TRUST], [replace(TRUST, distrusted=("old", "older"))], []),
    "stronger approval": (
        [replace(APPROVAL, added=AddedMode.ANY, emergency=True)],
        [replace(APPROVAL, approvals=3)],
        [],
    ),
    "trust is gone": ([TRUST], [], ["signatures of fraud-*: the mode is off instead of enforce"]),
    "other globs": (
        [TRUST],
        [replace(TRUST, models=("fraud-1",))],
        ["signatures of fraud-*: the mode is off instead of enforce"],
    ),
    "warn": ([TRUST], [WARN], ["signatures of fraud-*: the mode is warn instead of enforce"]),
    "off": ([WARN], [OFF], ["signatures of fraud-*: the mode is off instead of warn"]),
    "key": ([TRUST], [replace(TRUST, keys=("key 2",))], [f"signatures of fraud-*: the key {KEY_2} may sign"]),
    "certificates": (
        [TRUST],
        [replace(TRUST, certificates=(CERTIFICATES,))],
        ["signatures of fraud-*: other certificates of CN=a may sign"],
    ),
    "roots": (
        [replace(TRUST, certificates=(CERTIFICATES,))],
        [replace(TRUST, certificates=(replace(CERTIFICATES, roots="more roots"),))],
        ["signatures of fraud-*: other certificates of CN=a may sign"],
    ),
    "trusted again": (
        [TRUST],
        [replace(TRUST, distrusted=())],
        ["signatures of fraud-*: the key old is not distrusted any more"],
    ),
    "approval is gone": ([APPROVAL], [TRUST], ["approval for fraud-*: 0 must approve instead of 2"]),
    "fewer approvals": (
        [APPROVAL],
        [replace(APPROVAL, approvals=1)],
        ["approval for fraud-*: 1 must approve instead of 2"],
    ),
    "added": (
        [APPROVAL],
        [replace(APPROVAL, added=AddedMode.ANY)],
        ["approval for fraud-*: bytes pass whose adder the ledger does not have"],
    ),
    "emergency": (
        [APPROVAL],
        [replace(APPROVAL, emergency=True)],
        ["approval for fraud-*: the role emergency may pass without"],
    ),
    "one of two rules": (
        [TRUST, replace(TRUST, keys=("b",))],
        [TRUST, replace(WARN, keys=("b",))],
        ["signatures of fraud-*: the mode is warn instead of enforce"],
    ),
    "several": (
        [TRUST, APPROVAL],
        [replace(WARN, distrusted=())],
        [
            "signatures of fraud-*: the mode is warn instead of enforce",
            "signatures of fraud-*: the key old is not distrusted any more",
            "approval for fraud-*: 0 must approve instead of 2",
        ],
    ),
}


def policy_of(rules: Sequence[Rule]) -> LoadPolicy:
    trust = tuple(rule for rule in rules if isinstance(rule, TrustRule))
    return LoadPolicy(trust, tuple(rule for rule in rules if isinstance(rule, ApprovalRule)))


@pytest.mark.parametrize("case", WEAKENINGS)
def test_weakenings_are_listed_in_sentences(case: str) -> None:
    before, after, expected = WEAKENINGS[case]
    assert list_weakenings(policy_of(before), policy_of(after)) == expected
