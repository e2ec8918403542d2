"""Rules: which concern a model, what they digest to, and when a later policy is weaker."""

import hashlib
import re
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
CERTIFIED, MORE_ROOTS = (
    replace(TRUST, certificates=(replace(CERTIFICATES, roots=roots),)) for roots in ("roots", "more roots")
)
WEAK_APPROVAL = replace(APPROVAL, added=AddedMode.ANY, emergency=True)
NOTHING_SIGNED = "signatures: the mode is off instead of enforce"
Rule = TrustRule | ApprovalRule
WEAKENINGS: list[tuple[Sequence[Rule], Sequence[Rule], list[str]]] = [
    # the rules before, and after; what is weaker, for `fraud-*`
    ([TRUST, APPROVAL], [TRUST, APPROVAL], []),
    ([TRUST, APPROVAL, WARN], [WARN, APPROVAL, TRUST], []),
    ([TRUST], [TRUST, APPROVAL, WARN], []),
    ([WARN], [TRUST], []),
    ([OFF], [], []),
    ([OFF], [replace(OFF, keys=("key", "key 2"))], []),
    ([replace(TRUST, keys=("key", "key 2"))], [TRUST], []),
    ([TRUST], [replace(TRUST, distrusted=("old", "older"))], []),
    ([WEAK_APPROVAL], [replace(APPROVAL, approvals=3)], []),
    ([TRUST], [], [NOTHING_SIGNED]),
    ([TRUST], [replace(TRUST, models=("fraud-1",))], [NOTHING_SIGNED]),
    ([TRUST], [WARN], ["signatures: the mode is warn instead of enforce"]),
    ([WARN], [OFF], ["signatures: the mode is off instead of warn"]),
    ([TRUST], [replace(TRUST, keys=("key 2",))], [f"signatures: the key {KEY_2} may sign"]),
    ([TRUST], [CERTIFIED], ["signatures: other certificates of CN=a may sign"]),
    ([CERTIFIED], [MORE_ROOTS], ["signatures: other certificates of CN=a may sign"]),
    ([TRUST], [replace(TRUST, distrusted=())], ["signatures: the key old is not distrusted any more"]),
    ([APPROVAL], [TRUST], ["approval: 0 must approve instead of 2"]),
    ([APPROVAL], [replace(APPROVAL, approvals=1)], ["approval: 1 must approve instead of 2"]),
    (
        [APPROVAL],
        [WEAK_APPROVAL],
        [
            "approval: bytes pass whose adder the ledger does not have",
            "approval: the role emergency may pass without",
        ],
    ),
    (
        [TRUST, replace(TRUST, keys=("b",))],
        [TRUST, replace(WARN, keys=("b",))],
        ["signatures: the mode is warn instead of enforce"],
    ),
    (
        [TRUST, APPROVAL],
        [replace(WARN, distrusted=())],
        [
            "signatures: the mode is warn instead of enforce",
            "signatures: the key old is not distrusted any more",
            "approval: 0 must approve instead of 2",
        ],
    ),
]


def policy_of(rules: Sequence[Rule]) -> LoadPolicy:
    trust = tuple(rule for rule in rules if isinstance(rule, TrustRule))
    return LoadPolicy(trust, tuple(rule for rule in rules if isinstance(rule, ApprovalRule)))


@pytest.mark.parametrize(("before", "after", "weaker"), WEAKENINGS)
def test_weakenings_are_listed_in_sentences(
    before: Sequence[Rule], after: Sequence[Rule], weaker: list[str]
) -> None:
    found = list_weakenings(policy_of(before), policy_of(after))
    assert [re.sub(r"( of| for) fraud-\*:", ":", each, count=1) for each in found] == weaker
    assert all(" fraud-*: " in each for each in found)
