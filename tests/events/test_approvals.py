"""Approvals: who may give them, which count for which load, and what else is decided on them.

`support.history.STEPS` explains the words; all versions of these histories have the same bytes.
"""

from collections.abc import Sequence
from dataclasses import replace as change
from typing import Any

import pytest
from msgspec import UNSET, structs
from support.history import CONTENTS, DIGEST, MODEL, STEPS, History, at, given

from events.accept import accept
from events.commands import Accepted, Command, Decision, Existing
from events.models import Model
from events.types import (
    SYSTEM,
    AddedFile,
    Cause,
    Draft,
    Justification,
    LoadParameters,
    LoadRequested,
    TokenIssued,
    VersionAdded,
    VersionRemoved,
)
from events.values import Credential
from features.approvals.commands import (
    ApprovedBytes,
    ApproveVersion,
    WithdrawApproval,
    approval_statement,
    is_same_person,
    list_unapproved,
)
from features.approvals.facts import ApprovalResult, ApprovalWithdrawn, VersionApproved
from features.approvals.fold import MAX_APPROVED
from features.approvals.rules import NOT_APPROVED, AddedMode, ApprovalRule
from features.beforeload import CheckInput, NotLoadable
from features.checks import check_load
from features.nodes.facts import NodeSignature
from features.rules import ModelRules

OTHER = "ef" * 32
"""The digest of other bytes."""


def add_bytes(history: History, by: str, version: int = 1) -> None:
    files = tuple(AddedFile(path, 1, sha256) for path, sha256 in CONTENTS)
    history.add(VersionAdded(files), version=version, by=by)


def approve_with_token(history: History, by: str, *issued_by: str) -> None:
    credential = Credential(issued_by=issued_by)
    history.add(VersionApproved(DIGEST, (), "reviewed", credential), version=1, by=by)


WORDS: dict[str, Any] = {
    **STEPS,
    "add_by_bob": lambda h: add_bytes(h, "bob"),
    "add_by_carol": lambda h: add_bytes(h, "carol"),
    "add_by_Carol_as_3": lambda h: add_bytes(h, "CAROL", 3),
    "remove_3": lambda h: h.add(VersionRemoved(), version=3, by="dave"),
    "approve_as_alice": lambda h: h.approve(by="alice"),
    "approve_as_Carol": lambda h: h.approve(by="Carol"),
    "approve_of_alice": lambda h: approve_with_token(h, "eve", "root", "Alice"),
    "approve_of_bob": lambda h: approve_with_token(h, "eve", "bob"),
    "approve_of_carol": lambda h: approve_with_token(h, "eve", "carol"),
    "approve_unsigned": lambda h: h.approve(by="mallory"),
}


def told(words: str) -> History:
    history = History()
    for word in words.split():
        WORDS[word](history)
    return history


RULES: dict[str, Sequence[ApprovalRule]] = {
    "none": (),
    "one": (ApprovalRule(("*",)),),
    "two": (ApprovalRule(("*",)), ApprovalRule(("*",), 2)),
    "recorded": (ApprovalRule(("*",), added=AddedMode.RECORDED),),
    "strict": (ApprovalRule(("*",), emergency=False),),
}

PATHS: dict[str, tuple[Cause, str, str | None]] = {
    # who asks: the cause, the actor, and the digest that an emergency names
    "request": (Cause.REQUEST, "alice", None),
    "demand": (Cause.DEMAND, "alice", None),
    "emergency": (Cause.REQUEST, "alice", DIGEST),
    "emergency_other": (Cause.REQUEST, "alice", OTHER),
    **{cause: (cause, SYSTEM, None) for cause in (Cause.RECOVERY, Cause.RESTART, Cause.SWAP)},
    **{cause: (cause, SYSTEM, None) for cause in (Cause.DRAIN, Cause.COPY)},
    "unsigned": (Cause.RECOVERY, SYSTEM, None),  # whose load before no trusted node has signed
}

LOADS = """
# A swap, a load that changes only settings, by a label, or by Triton's route is a request, as any other.
# what was recorded                  | rule     | path            | outcome
                                     | none     | request         | no approval
                                     | one      | request         | 1 more approval, by others than 'alice'
                                     | one      | demand          | 1 more approval, by others than 'alice'
approve                              | one      | request         | approved carol
approve                              | one      | demand          | approved carol
load approve                         | one      | request         | approved carol
approve withdraw                     | one      | request         | 1 more approval
approve withdraw approve_again       | one      | request         | approved dave
approve_other                        | one      | request         | 1 more approval
approve                              | two      | request         | 1 more approval
approve approve_again                | two      | request         | approved carol dave
approve approve_as_Carol             | two      | request         | 1 more approval
approve approve_of_carol             | two      | request         | 1 more approval
approve_of_carol approve             | two      | request         | 1 more approval
approve approve_again approve_of_bob | one      | request         | approved carol
approve_as_alice                     | one      | request         | 1 more approval
approve_of_alice                     | one      | request         | 1 more approval
approve_of_bob                       | one      | request         | approved eve
add_by_bob approve_of_bob            | one      | request         | 'bob', who added them and 'alice', who
add_by_bob approve                   | one      | request         | approved carol
approve add_by_carol                 | one      | request         | 1 more approval, by others than 'carol'
approve add_by_Carol_as_3 remove_3   | one      | request         | 1 more approval, by others than 'CAROL'
approve                              | recorded | request         | does not have who added
add_by_bob approve                   | recorded | request         | approved carol
add_by_bob                           | recorded | request         | 1 more approval
approve_unsigned                     | one      | request         | 1 more approval
                                     | one      | emergency       | bypassed alice
approve                              | one      | emergency       | approved carol
                                     | one      | emergency_other | model_changed
                                     | strict   | emergency       | emergency_forbidden
approve                              | strict   | emergency       | approved carol
                                     | recorded | emergency       | bypassed alice
load                                 | one      | recovery        | reload
load                                 | two      | restart         | reload
load                                 | recorded | swap            | reload
load                                 | strict   | drain           | reload
load approve withdraw                | one      | copy            | reload
load approve                         | one      | recovery        | reload
load                                 | one      | request         | 1 more approval
load approve                         | one      | unsigned        | no trusted node has signed
"""


def read_table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def describe_check(history: History, rules: ModelRules, path: str) -> str:
    """Return the approval of a load with those who gave it, or the code and the message of its refusal."""
    cause, actor, digest = PATHS[path]
    said = Justification(Credential(), emergency="outage", digest=digest) if digest else UNSET
    request = LoadRequested.of(LoadParameters(), cause, policy=rules.digest, justification=said)
    history.add(request, "new", by=actor)
    given_check = CheckInput(
        *(rules, history.model(), history.versions(), CONTENTS, lambda *_: b"", at(0), actor == SYSTEM),
        lambda statement, _: path != "unsigned" and b"mallory" not in statement,
    )
    try:
        checked = check_load(given_check, history.job("new"))
    except NotLoadable as refused:
        return f"{refused.failure.code}: {refused}"
    approval = checked.evidence.approval
    if approval is UNSET:
        return "no approval"
    assert all(each.holds(history.state) for each in checked.conditions)
    assert bool(checked.conditions) is (approval.result is ApprovalResult.APPROVED)
    assert len(approval.positions) == (len(approval.by) if checked.conditions else 0)
    return " ".join((approval.result, *approval.by))


@pytest.mark.parametrize(("words", "rule", "path", "expected"), read_table(LOADS))
def test_load_has_what_its_rule_asks_or_is_refused(words: str, rule: str, path: str, expected: str) -> None:
    outcome = describe_check(told(words), ModelRules((), tuple(RULES[rule])), path)
    assert expected in outcome
    if outcome.startswith(NOT_APPROVED) and "more approval" in outcome:
        assert f": the files {DIGEST} need" in outcome
        assert outcome.endswith(f"gives it with `loadledger approve {MODEL}/1`")


def test_withdrawn_approval_does_not_let_a_checked_load_start() -> None:
    history = told("approve approve_again")
    condition = ApprovedBytes(MODEL, DIGEST, "alice", (1, 2))
    assert condition.holds(history.state)
    assert not ApprovedBytes(MODEL, DIGEST, "carol", (1, 2)).holds(history.state)
    add_bytes(history, "dave")
    assert not condition.holds(history.state)
    assert ApprovedBytes(MODEL, DIGEST, "alice", (1,)).holds(history.state)
    history.withdraw()
    assert not ApprovedBytes(MODEL, DIGEST, "alice", (1,)).holds(history.state)


# Commands.

APPROVE = ApproveVersion(MODEL, 1, DIGEST, CONTENTS, "carol", "reviewed", Credential())
WITHDRAW = WithdrawApproval(MODEL, 1, "carol", "it drifts", Credential())


def decide(history: History, command: Command) -> Decision:
    return accept(history.state, command, lambda: "new", at(history.seconds))


def outcome(decision: Decision) -> str:
    match decision:
        case Accepted(drafts):
            return " ".join(draft.data.TYPE for draft in drafts)
        case Existing(None):
            return "existing"
    return getattr(decision, "code", str(decision))


COMMANDS: list[tuple[str, Command, str]] = [
    ("", APPROVE, "VersionApproved"),
    ("load", APPROVE, "VersionApproved"),
    ("approve", APPROVE, "existing"),
    ("approve", change(APPROVE, actor="CAROL"), "existing"),
    ("approve", change(APPROVE, actor="dave"), "VersionApproved"),
    ("approve_of_alice", change(APPROVE, actor="eve"), "VersionApproved"),  # with a better token
    ("approve withdraw", APPROVE, "VersionApproved"),
    ("add_by_bob", APPROVE, "VersionApproved"),
    ("add_by_bob", change(APPROVE, digest=OTHER), "digest_differs"),
    ("add_by_bob", change(APPROVE, version=2, digest=OTHER), "VersionApproved"),
    ("add_by_carol", APPROVE, "same_person"),
    ("add_by_Carol_as_3 remove_3", APPROVE, "same_person"),
    ("approve", WITHDRAW, "ApprovalWithdrawn"),
    ("approve approve_again", change(WITHDRAW, actor="eve"), "ApprovalWithdrawn"),
    ("approve", change(WITHDRAW, version=2), "unknown_approval"),
    ("approve add_by_Carol_as_3", change(WITHDRAW, version=3), "ApprovalWithdrawn"),
    ("load_v2 approve", change(WITHDRAW, version=2), "ApprovalWithdrawn"),
    ("approve withdraw", WITHDRAW, "unknown_approval"),
]


@pytest.mark.parametrize(("words", "command", "expected"), COMMANDS)
def test_approval_is_accepted_or_refused(words: str, command: Command, expected: str) -> None:
    assert outcome(decide(told(words), command)) == expected


def issue_tokens(history: History) -> None:
    """Root issued alice's token, who issued one to the helper, who issued carol's."""
    for jti, subject, by, issued_with in (
        ("t1", "alice", "root", None),
        ("t2", "helper", "alice", "t1"),
        ("t3", "carol", "helper", "t2"),
    ):
        issued = TokenIssued(jti, subject, ("approve",), "2027-01-01T00:00:00.000000Z", "api", issued_with)
        history.add(issued, None, of=None, version=None, by=by)


def test_issuers_of_a_token_are_recorded_with_the_approval() -> None:
    history = given("load")
    issue_tokens(history)
    command = change(APPROVE, credential=Credential("idp", "t3"))
    decision = decide(history, command)
    assert isinstance(decision, Accepted)
    data = decision.drafts[0].data
    assert isinstance(data, VersionApproved)
    assert data.credential == Credential("idp", "t3", ("helper", "alice", "root"))
    assert (data.served_version, data.served_digest) == (1, DIGEST)
    assert [(each.path, each.sha256) for each in data.files] == [*CONTENTS]
    add_bytes(history, "Root")
    assert outcome(decide(history, command)) == "same_person"


def test_approval_is_signed_with_what_it_says_and_its_own_id() -> None:
    history, signed = given("load"), list[bytes]()

    def sign(statement: bytes) -> NodeSignature:
        signed.append(statement)
        return NodeSignature("a", "c2ln")

    decision = decide(history, change(APPROVE, sign=sign))
    assert isinstance(decision, Accepted)
    (draft,) = decision.drafts
    history.add(draft.data, None, version=1, by="carol", event_id=draft.id)
    (approval,) = history.versions().approvals
    assert approval.server_signature == NodeSignature("a", "c2ln")
    assert signed == [approval_statement(MODEL, approval)]
    for name, value in (("by", "mallory"), ("event_id", "x"), ("version", 2), ("digest", OTHER)):
        assert approval_statement(MODEL, structs.replace(approval, **{name: value})) != signed[0]
    assert approval_statement("other", approval) != signed[0]


def test_subjects_of_one_person_are_found() -> None:
    for one, other in (
        ("alice", "ALICE"),
        ("alice", "\uff41lice"),
        ("stra\u00dfe", "STRASSE"),
        ("e\u0301va", "\u00e9va"),
    ):
        assert is_same_person(one, other)
    for other in ("alice2", "bob"):
        assert not is_same_person("alice", other)


# The fold.


def test_oldest_approvals_go_but_those_of_what_serves() -> None:
    history = given("load approve")
    for number in range(MAX_APPROVED + 3):
        history.approve(2, digest=f"{number:064}")
    kept = {each.digest for each in history.versions().approvals}
    assert len(kept) == MAX_APPROVED
    assert kept == {DIGEST, *(f"{number:064}" for number in range(4, MAX_APPROVED + 3))}


def test_withdrawal_is_of_all_persons_and_of_one_digest() -> None:
    versions = told("approve approve_again approve_other withdraw").versions()
    assert [each.digest for each in versions.approvals] == [OTHER]


# Versions that wait for a person.


UNAPPROVED = [
    # what was recorded, the versions in their order, an exclamation mark for a refused one
    ("", ""),
    ("load", ""),
    ("add_by_bob", "1"),
    ("add_by_bob add_by_Carol_as_3", "3 1"),
    ("add_by_bob approve", ""),
    ("add_by_bob approve add_by_Carol_as_3", "3"),
    ("add_by_bob approve withdraw", "1"),
    ("add_by_Carol_as_3 remove_3", ""),
    (f"request start fail:{NOT_APPROVED}", "1!"),
    (f"request start fail:{NOT_APPROVED} approve_again", ""),
    (f"add_by_Carol_as_3 request start fail:{NOT_APPROVED}", "1! 3"),
    ("request start fail:invalid_model", ""),
]


@pytest.mark.parametrize(("words", "expected"), UNAPPROVED)
def test_added_and_refused_versions_wait_for_approval(words: str, expected: str) -> None:
    history = History()
    for word in words.split():
        step, _, argument = word.partition(":")
        WORDS[step](history, *filter(None, [argument]))
    rules = ModelRules((), tuple(RULES["one"]))
    found = list_unapproved(history.model(), history.versions(), rules)
    assert " ".join(f"{each.version}{'!' * each.is_refused}" for each in found) == expected
    assert list_unapproved(history.model(), history.versions(), None) == []
    assert list_unapproved(Model(MODEL), history.versions(), ModelRules()) == []


def test_withdrawal_names_the_digests_of_the_version() -> None:
    history = told("approve approve_other")
    history.approve(1, digest=OTHER)
    decision = decide(history, WITHDRAW)
    assert isinstance(decision, Accepted)
    said = [draft.data for draft in decision.drafts]
    assert said == [ApprovalWithdrawn(each, "it drifts", Credential()) for each in (DIGEST, OTHER)]
    assert all(isinstance(draft, Draft) and draft.job_id is None for draft in decision.drafts)
