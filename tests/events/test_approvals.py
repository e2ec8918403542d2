"""Approvals: who may answer, what a waiting load holds, and what an answer changes."""

from dataclasses import replace as change

import pytest
from msgspec import UNSET, structs
from support.history import CONTENTS, DIGEST, MODEL, History, at, given, model_loaded

from events.accept import accept
from events.approvals import (
    MAX_WAITING,
    AnswerApproval,
    answer_statement,
    find_waiting_refusal,
    is_same_person,
)
from events.commands import Accepted, Existing, Refused, RequestCancel, RequestLoad, RequestUnload
from events.jobs import JobStatus
from events.models import ModelState
from events.types import (
    ApprovalResult,
    Cause,
    Credential,
    Justification,
    LoadApproval,
    LoadApproved,
    LoadRejected,
    LoadRequested,
    LoadSignature,
    NodeSignature,
    TokenIssued,
)

ANSWER = AnswerApproval("L2", "carol", DIGEST, "reviewed", Credential(), approves=True)
WAITS = "load request_v2 ask_v2"


def outcome(history: History, answer: AnswerApproval) -> str:
    """Return `approved`, `rejected`, `existing`, or the code of a refusal."""
    match accept(history.state, answer, lambda: "new", at(history.seconds)):
        case Accepted((draft,), "L2"):
            return "approved" if isinstance(draft.data, LoadApproved) else "rejected"
        case Existing("L2"):
            return "existing"
        case Refused(code):
            return code
    raise AssertionError


ANSWERS = [
    (WAITS, ANSWER, "approved"),
    (WAITS, change(ANSWER, approves=False), "rejected"),
    (WAITS, change(ANSWER, digest="00" * 32), "digest_differs"),
    (WAITS, change(ANSWER, actor="alice"), "same_person"),
    (WAITS, change(ANSWER, actor="Alice"), "same_person"),
    (WAITS, change(ANSWER, actor="alice", approves=False), "same_person"),
    (WAITS, change(ANSWER, job_id="L"), "not_waiting"),
    (f"{WAITS} approve_v2", ANSWER, "existing"),
    (f"{WAITS} approve_v2", change(ANSWER, actor="dave"), "not_waiting"),
    (f"{WAITS} reject_v2", ANSWER, "not_waiting"),
    (f"{WAITS} expire_v2", ANSWER, "not_waiting"),
    ("load request_v2 bypass_v2", ANSWER, "not_waiting"),
    ("load request_v2", ANSWER, "not_waiting"),
]


@pytest.mark.parametrize(("facts", "answer", "expected"), ANSWERS)
def test_answer_is_accepted_or_refused(facts: str, answer: AnswerApproval, expected: str) -> None:
    assert outcome(given(facts), answer) == expected


def test_answer_about_another_change_than_was_asked_for_is_refused() -> None:
    history = given("request_v2 ask_v2 load")  # it would replace a version now
    assert outcome(history, ANSWER) == "not_waiting"


def test_second_answer_of_a_person_counts_once() -> None:
    history = given("request_v2")
    history.ask_approval("L2", version=2, approvals=2)
    history.approve("L2", version=2)
    assert outcome(history, change(ANSWER, actor="Carol")) == "existing"
    history.approve("L2", version=2)
    assert history.state.jobs["L2"].waits_for_approval
    history.approve("L2", version=2, by="dave")
    assert not history.state.jobs["L2"].waits_for_approval


@pytest.mark.parametrize(
    ("subject", "other", "are_same"),
    [
        ("alice", "ALICE", True),
        ("alice", "\uff41lice", True),
        ("stra\u00dfe", "STRASSE", True),
        ("e\u0301va", "\u00e9va", True),
        ("alice", "alice2", False),
        ("alice", "bob", False),
    ],
)
def test_subjects_of_one_person_are_found(subject: str, other: str, are_same: bool) -> None:  # noqa: FBT001
    assert is_same_person(subject, other) is are_same


def test_issuers_of_a_token_are_recorded_with_the_answer() -> None:
    history = given(WAITS)
    for jti, subject, by, issued_with in (
        ("t1", "alice", "root", None),
        ("t2", "helper", "alice", "t1"),
        ("t3", "carol", "helper", "t2"),
    ):
        issued = TokenIssued(jti, subject, ("approve",), "2027-01-01T00:00:00.000000Z", "api", issued_with)
        history.add(issued, None, of=None, version=None, by=by)
    answer = change(ANSWER, credential=Credential("idp", "t3"))
    decision = accept(history.state, answer, lambda: "new", at(history.seconds))
    assert isinstance(decision, Accepted)
    data = decision.drafts[0].data
    assert isinstance(data, LoadApproved)
    assert data.credential == Credential("idp", "t3", ("helper", "alice", "root"))


def test_answer_of_a_node_is_signed_with_what_it_says() -> None:
    history, signed = given(WAITS), list[bytes]()

    def sign(statement: bytes) -> NodeSignature:
        signed.append(statement)
        return NodeSignature("a", "c2ln")

    decision = accept(history.state, change(ANSWER, sign=sign), lambda: "new", at(history.seconds))
    assert isinstance(decision, Accepted)
    data = decision.drafts[0].data
    assert isinstance(data, LoadApproved)
    assert data.node_signature == NodeSignature("a", "c2ln")
    history.add(data, "L2", version=2, by="carol")
    job = history.state.jobs["L2"]
    assert job.approval is not None
    (answer,) = job.approval.answers
    assert signed == [answer_statement(job, job.approval.digest, job.approval.rule, answer)]
    other = structs.replace(answer, by="mallory")
    assert answer_statement(job, job.approval.digest, job.approval.rule, other) != signed[0]


# What a waiting load holds.


def test_waiting_load_has_no_turn_and_no_deadline() -> None:
    history = given(WAITS)
    job, model = history.state.jobs["L2"], history.model()
    assert (job.status, job.deadline_at, job.waits_for_approval) == (JobStatus.PENDING, None, True)
    assert (history.state.queue(MODEL), model.loads, model.state) == ([], (), ModelState.LOADED)
    assert [each.id for each in history.state.unended(MODEL)] == ["L2"]


def test_approved_load_comes_after_those_that_went_past_it() -> None:
    history = given("request_v2 ask_v2 request_again approve_v2")
    assert [job.id for job in history.state.queue(MODEL)] == ["L3", "L2"]
    assert [load.job_id for load in history.model().loads] == ["L3", "L2"]
    job = history.state.jobs["L2"]
    assert job.load is not None
    assert job.deadline_at == at(history.seconds + job.load.timeout_s)
    again = given("request_v2 ask_v2 request_again approve_v2")
    again.state.__post_init__()  # as a start reads it
    assert [each.id for each in again.state.queue(MODEL)] == ["L3", "L2"]


@pytest.mark.parametrize(
    ("facts", "status", "code"),
    [
        (f"{WAITS} reject_v2", JobStatus.FAILED, "rejected"),
        (f"{WAITS} expire_v2", JobStatus.FAILED, "approval_expired"),
        (f"{WAITS} fail_v2:approval_void", JobStatus.FAILED, "approval_void"),
        (f"{WAITS} request_cancel_L2 cancel_L2", JobStatus.CANCELLED, None),
    ],
)
def test_end_of_the_wait_leaves_the_model_as_it_is(facts: str, status: JobStatus, code: str | None) -> None:
    history, served = given(facts), given("load").model()
    job = history.state.jobs["L2"]
    assert (job.status, job.error and job.error.code) == (status, code)
    model = history.model()
    assert (model.phase, model.error, model.loads) == (served.phase, None, ())


@pytest.mark.parametrize(
    ("facts", "waits"), [("restart", True), ("crash", True), ("approve_v2 restart", False)]
)
def test_wait_survives_ends_of_processes(facts: str, waits: bool) -> None:  # noqa: FBT001
    assert given(f"{WAITS} {facts}").state.jobs["L2"].waits_for_approval is waits


def test_question_about_a_started_load_changes_nothing() -> None:
    history = given("load request_v2 start_v2")
    before = history.state.jobs["L2"], history.model()
    history.ask_approval("L2", version=2)
    assert (history.state.jobs["L2"], history.model()) == before


# Commands beside a waiting load.


def decide_load(history: History, **more: object) -> Accepted | Existing | Refused:
    command = RequestLoad(MODEL, 2, CONTENTS, "bob")
    return accept(history.state, change(command, **more), lambda: "new", at(9_999))  # type: ignore[arg-type]


def test_same_load_joins_the_waiting_one() -> None:
    history = given(WAITS)
    decision = decide_load(history)
    assert isinstance(decision, Accepted)
    assert (decision.job_id, decision.is_join) == ("L2", True)
    emergency = Justification(Credential(), emergency="outage")
    others = (("model.onnx", "cd" * 32),)
    for other in (
        {"policy": "00" * 32},
        {"justification": emergency},
        {"version": 3},
        {"contents": others},
        {"contents": None},
    ):
        new = decide_load(history, **other)
        assert isinstance(new, Accepted)
        assert isinstance(new.drafts[0].data, LoadRequested)


@pytest.mark.parametrize("cause", [Cause.DEMAND, Cause.RECOVERY])
def test_load_by_the_system_does_not_wait_for_approval_of_another(cause: Cause) -> None:
    decision = decide_load(given("request_v2 ask_v2"), cause=cause)
    assert isinstance(decision, Accepted)
    assert isinstance(decision.drafts[0].data, LoadRequested)


def test_who_joined_cannot_approve() -> None:
    history = given("load")
    said = Justification(Credential(), "the new data")
    history.ask_load("L2", version=2, justification=said)
    decision = decide_load(history)
    assert isinstance(decision, Accepted)
    history.add(decision.drafts[0].data, "L2", version=2, by="bob")
    history.ask_approval("L2", version=2)
    assert outcome(history, change(ANSWER, actor="BOB")) == "same_person"
    assert outcome(history, ANSWER) == "approved"


def test_unload_goes_past_a_waiting_load_and_cancel_ends_it() -> None:
    history = given(WAITS)
    unload = accept(history.state, RequestUnload(MODEL, "bob"), lambda: "new", at(9_999))
    assert isinstance(unload, Accepted)
    assert getattr(unload.drafts[0].data, "load_job_id", None) == "L"
    cancel = accept(history.state, RequestCancel("L2", "bob"), lambda: "new", at(9_999))
    assert isinstance(cancel, Accepted)


def request_load(history: History, job: str, model_id: str, by: str) -> None:
    requested = given("request").facts[0].data
    history.add(requested, job, of=model_id, by=by)


def test_most_loads_that_wait_are_limited() -> None:
    history = History()
    for number in range(MAX_WAITING):
        request_load(history, f"L{number}", f"m{number}", f"user{number % 16}")
        history.ask_approval(f"L{number}", of=f"m{number}")
    request_load(history, "L2", "other", "user99")
    assert find_waiting_refusal(history.state, history.state.jobs["L2"]) is not None
    history.add(LoadRejected(DIGEST, "no", Credential()), "L0", of="m0", by="carol")
    assert find_waiting_refusal(history.state, history.state.jobs["L2"]) is None


# What a model remembers.


def test_model_remembers_what_its_bytes_passed() -> None:
    history = given("request_v2 ask_v2 approve_v2 start_v2")
    signature = LoadSignature("cd" * 32, "key", "ef" * 32, "ab" * 32, is_enforced=True)
    approval = LoadApproval("cd" * 32, ApprovalResult.APPROVED, ("carol",))
    loaded = structs.replace(model_loaded(), signature=signature, approval=approval)
    history.add(loaded, "L2", version=2)
    admitted = history.model().find_admitted(DIGEST)
    assert admitted is not None
    assert (admitted.job_id, admitted.signature, admitted.approval) == ("L2", signature, approval)
    assert admitted.is_approved_under("cd" * 32)
    assert not admitted.is_approved_under("00" * 32)
    history.kill_worker("w")
    history.ask_load("R", version=2, cause=Cause.RECOVERY)
    history.start_load("R", version=2)
    by_fewer = structs.replace(loaded, signature=structs.replace(signature, is_enforced=False))
    history.add(by_fewer, "R", version=2)
    assert history.model().find_admitted(DIGEST) == admitted  # the next reload may need what was enforced
    history.ask_unload("U", "R")
    history.start_unload("U")
    history.end_unload("U")
    assert history.model().find_admitted(DIGEST) == admitted


def test_load_without_rules_leaves_nothing() -> None:
    assert given("load").model().admitted is UNSET
