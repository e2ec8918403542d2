"""`PolicyAudit` finds each load that was not signed or approved as the rules of its day ask, and no other.

The words of a table are those of `WORDS`. A model's files have the hash `ONE` or `TWO`.
"""

import asyncio
import base64
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given as given_any
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from support.clients import printed, printed_json
from support.history import FEWER, History, at, ids, model_loaded, opened
from support.ledgers import append_events
from support.signing import make_authority, make_key, public_pem, sign_version

from events.accept import accept
from events.approvals import AnswerApproval, answer_statement, emergency_statement, load_statement
from events.audit.policy import MAX_REMARKS, PolicyAudit, RemarkKind
from events.clock import parse_timestamp
from events.commands import Accepted, Command, RequestLoad
from events.jobs import ApprovalAnswer, Failure, Job
from events.models import MAX_ADMITTED, AdmittedBytes
from events.policy.checks import CheckInput, NotLoadable, check_load
from events.policy.rules import (
    ApprovalRule,
    LoadPolicy,
    ModelRules,
    TrustedCertificates,
    TrustMode,
    TrustRule,
)
from events.policy.signatures import key_digest
from events.sqlite.datalock import LEDGER
from events.state import Entities
from events.types import (
    ApprovalAsked,
    ApprovalBypassed,
    ApprovalResult,
    Cause,
    Credential,
    Event,
    FileHash,
    Justification,
    LoadApproval,
    LoadApproved,
    LoadedFile,
    LoadJoined,
    LoadSignature,
    LoadStarted,
    ModelLoaded,
    NodeSignature,
    PolicyInForce,
    Unknown,
    contents_of,
    digest_of,
)
from runtime.consumer.checks import draft_question

MODEL = "digits"
SIGNATURE_FILE = "model.sig"
PRIVATE_KEYS = {"key": make_key(), "other key": make_key()}
KEY, OTHER_KEY = PRIVATE_KEYS
PEMS = {name: public_pem(key) for name, key in PRIVATE_KEYS.items()}
SIGNERS = {name: key_digest(pem) for name, pem in PEMS.items()}


@cache
def bundle_of(sha256: str, key: str = KEY) -> str:
    """Return the signature bundle of a model with this hash."""
    return sign_version((("model.onnx", sha256),), PRIVATE_KEYS[key]).decode()


def files_of(sha256: str, bundle: str | None = None) -> tuple[LoadedFile, ...]:
    """Return the files of a version: its model, and its signature if it has one."""
    model = LoadedFile("model.onnx", 4_096, 1, sha256)
    if bundle is None:
        return (model,)
    return model, LoadedFile(SIGNATURE_FILE, 100, 1, hashlib.sha256(bundle.encode()).hexdigest())


APPROVAL = LoadPolicy(approval=(ApprovalRule((MODEL,)),))
POLICIES = {
    "none": LoadPolicy(),
    "approval": APPROVAL,
    "two": LoadPolicy(approval=(ApprovalRule((MODEL,), approvals=2),)),
    "strict": LoadPolicy(approval=(ApprovalRule((MODEL,)), ApprovalRule((MODEL,), emergency=False))),
    "others": LoadPolicy(approval=(ApprovalRule(("other-*",)),)),
    "trust": LoadPolicy((TrustRule((MODEL,), TrustMode.ENFORCE, (PEMS[KEY],)),)),
    "rekeyed": LoadPolicy((TrustRule((MODEL,), TrustMode.ENFORCE, (PEMS[OTHER_KEY],)),)),
    "distrusted": LoadPolicy(
        (TrustRule((MODEL,), TrustMode.ENFORCE, (PEMS[OTHER_KEY],), distrusted=(SIGNERS[KEY],)),)
    ),
    "warn": LoadPolicy((TrustRule((MODEL,), TrustMode.WARN, (PEMS[KEY],)),)),
}
ONE, TWO = "ab" * 32, "cd" * 32
NO_RULES = ModelRules()


@dataclass
class Story:
    """A history of one model under a policy; `L` is a load, `R` a reload by the system."""

    history: History = field(default_factory=History)
    rules: ModelRules = NO_RULES
    node: str | UnsetType = UNSET
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def policy(self, policy: str | LoadPolicy) -> None:
        policy = POLICIES[policy] if isinstance(policy, str) else policy
        self.rules = policy.of(MODEL) or NO_RULES
        self.history.add(PolicyInForce(policy, self.node), of=None, version=None)

    def request(
        self,
        job: str,
        by: str = "alice",
        *,
        emergency: str | None = None,
        cause: Cause = Cause.REQUEST,
        issuers: tuple[str, ...] = (),
    ) -> None:
        said = Justification(Credential(issued_by=issuers), "why", emergency)
        if emergency is not None:
            said = replace(said, digest=digest_of(contents_of(files_of(ONE))))
        if emergency is not None and self.node is not UNSET:
            seen = self.sign(emergency_statement(job, MODEL, 1, by, said))
            said = replace(said, node_signature=seen)
        digest = UNSET if self.rules is NO_RULES else self.rules.digest
        self.history.ask_load(job, cause=cause, policy=digest, justification=said)
        facts, state = self.history.facts, self.history.state
        facts[-1] = replace(facts[-1], actor=by)
        state.jobs[job] = replace(state.jobs[job], requested_by=by)

    def ask(self, job: str, sha256: str = ONE, *, approvals: int | None = None) -> None:
        contents = contents_of(files_of(sha256))
        files = tuple(FileHash(*each) for each in contents)
        rule, approvals = self.rules.approval_digest or "", approvals or self.rules.approvals
        asked = ApprovalAsked(files, digest_of(contents), rule, approvals, at(90_000))
        self.history.add(asked, job)

    def sign(self, statement: bytes) -> NodeSignature | UnsetType:
        if self.node is UNSET:
            return UNSET
        return NodeSignature(self.node, base64.b64encode(self.key.sign(statement)).decode())

    def approve(self, job: str, by: str = "carol", sha256: str = ONE, **token: Any) -> None:
        digest, credential = digest_of(contents_of(files_of(sha256))), Credential(**token)
        rule, answer = self.rules.approval_digest or "", ApprovalAnswer(by, "fine")
        signature = self.sign(answer_statement(self.history.job(job), digest, rule, answer))
        self.history.add(LoadApproved(digest, rule, "fine", credential, signature), job, by=by)

    def bypass(self, job: str, sha256: str = ONE) -> None:
        digest, rule = digest_of(contents_of(files_of(sha256))), self.rules.approval_digest or ""
        answer = ApprovalAnswer("alice", "outage")
        signature = self.sign(answer_statement(self.history.job(job), digest, rule, answer))
        self.history.add(ApprovalBypassed(digest, rule, "outage", signature), job, by="alice")

    def load(self, job: str, result: str = "", by: str = "", sha256: str = ONE, **given: Any) -> None:
        """Load files, which say how they were approved; `given` are other fields of the event."""
        persons, rule = tuple(by.split("+")) if by else (), self.rules.approval_digest or ""
        approval = LoadApproval(rule, ApprovalResult(result), persons) if result else UNSET
        data = replace(model_loaded(), files=files_of(sha256), approval=approval, node_id=self.node)
        data = replace(data, **given)
        digest = digest_of(contents_of(data.files))
        passed = AdmittedBytes(digest, job, 1, data.signature, data.approval)
        if self.node is not UNSET and "node_signature" not in given:
            data = replace(data, node_signature=self.sign(load_statement(MODEL, passed)))
        self.history.add(LoadStarted(1, self.node), job)
        self.history.add(data, job)

    def load_signed(
        self,
        job: str,
        text: str = bundle_of(ONE),
        *,
        is_in_ledger: bool = False,
        stored: str | None = None,
        **changes: Any,
    ) -> None:
        """Load files with a signature, or with another one than the event has and names.

        `changes` are of what the event says of it.
        """
        named = stored or text
        name = hashlib.sha256(named.encode()).hexdigest()
        said = replace(
            LoadSignature(self.rules.digest, "key", SIGNERS[KEY], name, is_enforced=True), **changes
        )
        files = files_of(ONE, text)
        self.load(job, files=files, signature=said, bundle=UNSET if is_in_ledger else named)

    def join_as_node(self, node: str = "a") -> None:
        public = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.node = node
        self.history.join(node, public_key=public.decode())


def problem_of(audited: PolicyAudit, event: Event) -> str | None:
    check_event = audited.checks.get(type(event.data))
    return None if check_event is None else check_event(event, event.data)


def audit(facts: Iterable[Event]) -> tuple[tuple[int, str] | None, PolicyAudit]:
    """Return the first position that is wrong and what is missing there, and the audit."""
    entities = Entities()
    audited = PolicyAudit(entities)
    for event in facts:
        if (problem := problem_of(audited, event)) is not None:
            return (event.position, problem), audited
        entities.apply(event)
    return None, audited


WORDS: dict[str, Callable[..., object]] = {
    "policy": Story.policy,
    "forget_rules": lambda s: setattr(s, "rules", NO_RULES),
    "rules_of": lambda s, name: setattr(s, "rules", POLICIES[name].of(MODEL)),
    "request": lambda s, *by: s.request("L", *by),
    "request_again": lambda s: s.request("L2"),
    "bypass_other": lambda s: s.bypass("L", TWO),
    "request_emergency": lambda s: s.request("L", emergency="outage"),
    "request_reload": lambda s: s.request("R", "system", cause=Cause.RESTART),
    "join": lambda s, by: s.history.add(LoadJoined(), "L", by=by),
    "ask": lambda s, *sha256: s.ask("L", *sha256),
    "ask_one_person": lambda s: s.ask("L", approvals=1),
    "approve": lambda s, by, *sha256: s.approve("L", by, *sha256),
    "bypass": lambda s: s.bypass("L"),
    "load": lambda s, *said: s.load("L", *said),
    "load_again": lambda s, *said: s.load("L2", *said),
    "reload": lambda s, *said: s.load("R", *said),
    "load_unrequested": lambda s, *said: s.load("unknown", *said),
    "load_signed": lambda s: s.load_signed("L"),
    "load_signed_again": lambda s: s.load_signed("L2", is_in_ledger=True),
    "load_without_bundle": lambda s: s.load_signed("L", is_in_ledger=True),
    "load_signed_by_other": lambda s: s.load_signed("L", bundle_of(ONE, OTHER_KEY)),
    "load_signed_other_files": lambda s: s.load_signed("L", bundle_of(TWO)),
    "load_that_names_other_signer": lambda s: s.load_signed("L", signer=SIGNERS[OTHER_KEY]),
    "load_that_names_other_bundle": lambda s: s.load_signed("L", bundle="ef" * 32),
    "load_signed_beside_files": lambda s: s.load_signed("L", stored=bundle_of(ONE, OTHER_KEY)),
    "load_under_other_rules": lambda s: s.load_signed("L", policy="ef" * 32),
    "load_unenforced": lambda s: s.load_signed("L", is_enforced=False),
    "load_went_on": lambda s: s.load_signed("L", is_in_ledger=True, was_verified=True),
    "load_went_on_again": lambda s: s.load_signed("L2", is_in_ledger=True, was_verified=True),
    "reload_went_on": lambda s: s.load_signed("R", is_in_ledger=True, was_verified=True),
    "restart": lambda s: s.history.restart(),
    "join_as_node": Story.join_as_node,
    "leave": lambda s: s.history.leave("a"),
    "unsigned": lambda s: setattr(s, "key", Ed25519PrivateKey.generate()),
    "at_node": lambda s, node: setattr(s, "node", node),
}


def tell(words: str) -> Story:
    story = Story()
    for word in words.split():
        step, *given = word.split(":")
        WORDS[step](story, *given)
    return story


APPROVED = "policy:approval request ask approve:carol load:approved:carol"
SIGNED = "policy:trust request load_signed"
HONEST = [
    "request load",
    "policy:others request load",
    "policy:approval policy:none request load",
    "policy:approval forget_rules request policy:none load",
    APPROVED,
    f"{APPROVED} request_again load_again:approved_before",
    f"{APPROVED} restart request_reload reload:approved_before",
    "request load policy:approval restart request_reload reload:reload",
    "policy:two request ask approve:carol approve:dave load:approved:carol+dave",
    "policy:approval request ask approve:carol join:carol load:approved:carol",  # she asked only later
    "policy:approval request_emergency bypass load:bypassed:alice",
    SIGNED,
    f"{SIGNED} request_again load_signed_again",
    f"{SIGNED} policy:rekeyed restart request_reload reload_went_on",
    "policy:warn request load",
    f"join_as_node {APPROVED}",
    "join_as_node policy:approval request_emergency bypass load:bypassed:alice",
    "join_as_node:b policy:approval join_as_node:c forget_rules request load",  # no rules at c
]


@pytest.mark.parametrize("words", HONEST)
def test_honest_history_has_no_finding(words: str) -> None:
    assert audit(tell(words).history.facts)[0] is None


FORGED = [
    # Approvals.
    ("policy:approval forget_rules request load", "the request for this load names none"),
    ("rules_of:approval request ask approve:carol load:approved:carol", "not those in force"),
    ("rules_of:approval request ask policy:others rules_of:approval load", "not those in force"),
    ("policy:approval forget_rules load_unrequested", "the request for this load is missing"),
    ("rules_of:approval forget_rules request rules_of:approval load:approved:carol", "names none"),
    ("policy:approval request load", "the approval that its rules ask for is missing"),
    ("policy:approval request load:approved:carol", "that is not in the log before"),
    ("policy:approval request ask load:approved:carol", "that is not in the log before"),
    (f"policy:approval request ask approve:carol:{TWO} load:approved:carol", "is not in the log before"),
    ("policy:approval request ask approve:alice", "'alice' asked for this load"),
    ("policy:approval request ask approve:ALICE", "'ALICE' asked for this load"),
    ("policy:approval request join:carol ask approve:carol", "'carol' asked for this load"),
    ("policy:two request ask approve:carol approve:Carol", "'Carol' asked for this load or approved it"),
    (f"policy:approval request ask approve:carol load:approved:carol:{TWO}", "the files are now"),
    ("policy:approval request ask approve:carol load:approved:dave", "not in the log"),
    ("policy:approval request ask approve:carol rules_of:two load:approved:carol", "not in the log"),
    ("policy:two request ask_one_person approve:carol load:approved:carol", "2 other persons, and carol"),
    ("policy:approval request load:approved_before", "that is not in the log before"),
    (
        f"{APPROVED} policy:two request_again load_again:approved_before",
        "that is not in the log before",
    ),
    (f"{APPROVED} request_again load_again:reload", "that is not in the log before"),
    ("policy:approval request_reload reload:reload", "that is not in the log before"),
    ("policy:approval request_emergency load:bypassed:alice", "that is not in the log before"),
    ("policy:approval request bypass load:bypassed:alice", "the request names none"),
    ("policy:strict request_emergency bypass load:bypassed:alice", "its rules allow no emergency"),
    ("policy:approval request_emergency bypass load:approved:alice", "that is not in the log before"),
    # Signatures.
    ("policy:trust request load", "the signature that its rules ask for is missing"),
    ("policy:trust request load_without_bundle", "neither this load nor one before has it"),
    ("policy:trust request load_signed_by_other", "its rules refuse the signature"),
    ("policy:trust request load_signed_other_files", "its rules refuse the signature"),
    ("policy:trust request load_that_names_other_signer", "is another one"),
    ("policy:trust request load_that_names_other_bundle", "is another one"),
    ("policy:trust request load_signed_beside_files", "is missing: neither this load"),
    ("policy:trust request load_under_other_rules", "was not checked under the rules"),
    ("policy:trust request load_unenforced", "was not checked under the rules"),
    ("policy:warn request load_signed", "was not checked under the rules"),
    ("policy:rekeyed request load_went_on", "its rules refuse the signature"),
    ("policy:rekeyed restart request_reload reload_went_on", "its rules refuse the signature"),
    (f"{SIGNED} policy:rekeyed request_again load_went_on_again", "its rules refuse the signature"),
    (
        "policy:warn request load_unenforced policy:rekeyed restart request_reload reload_went_on",
        "its rules refuse the signature",
    ),
    (f"{SIGNED} policy:distrusted restart request_reload reload_went_on", "its rules refuse the signature"),
    # Nodes.
    ("join_as_node policy:approval request ask unsigned approve:carol", "not by the key with which"),
    ("join_as_node policy:approval request ask at_node:b approve:carol", "not by the key with which"),
    ("policy:approval request_emergency bypass_other", "the emergency was for other files"),
    ("join_as_node policy:approval request_emergency bypass_other", "the emergency was for other files"),
    ("join_as_node policy:approval request_emergency unsigned bypass", "not by the key with which"),
    ("join_as_node policy:approval unsigned request_emergency bypass", "has the role emergency"),
    (
        "policy:approval request ask approve:carol join_as_node policy:approval load:approved:carol",
        "no trusted node has signed the answer",
    ),
    (
        f"{APPROVED} join_as_node policy:approval request_again load_again:approved_before",
        "that is not in the log before",
    ),
    (
        "join_as_node policy:approval request ask approve:carol unsigned load:approved:carol",
        "not by the key with which",
    ),
]


@pytest.mark.parametrize(("words", "missing"), FORGED)
def test_forged_history_is_found_at_its_last_event(words: str, missing: str) -> None:
    facts = tell(words).history.facts
    found, _ = audit(facts)
    assert found is not None
    assert found[0] == facts[-1].position
    assert missing in found[1]


def test_load_at_node_without_signature_is_found() -> None:
    story = tell("join_as_node policy:approval request ask approve:carol")
    story.load("L", "approved", "carol", node_signature=UNSET)
    assert audit(story.history.facts)[0] == (7, "the signature of a node is missing")


def test_load_signed_by_another_node_is_found() -> None:
    story = tell("join_as_node:b join_as_node policy:approval request ask approve:carol")
    story.load("L", "approved", "carol", node_signature=NodeSignature("b", ""))
    assert audit(story.history.facts)[0] == (8, "the node 'a' has not signed it, where it was loaded")


def test_load_of_another_version_than_requested_is_found() -> None:
    story = tell("policy:approval request ask approve:carol")
    approval = LoadApproval(story.rules.approval_digest or "", ApprovalResult.APPROVED, ("carol",))
    data = replace(model_loaded(), files=files_of(ONE), approval=approval)
    story.history.add(data, "L", version=2)
    assert audit(story.history.facts)[0] == (5, "the request for this load is missing")


def test_expired_certificate_passes_as_of_the_request() -> None:
    story, root, subject = Story(), make_authority(), "CN=release,O=Bank"
    certificates = (TrustedCertificates(root.pem, subject),)
    story.policy(LoadPolicy((TrustRule((MODEL,), TrustMode.ENFORCE, certificates=certificates),)))
    story.request("L")
    end = parse_timestamp(story.history.facts[-1].recorded_at).replace(tzinfo=None)
    signer = root.issue(subject, start=end - timedelta(days=1), days=1)
    text = sign_version((("model.onnx", ONE),), signer.key, signer.chain).decode()
    story.load_signed("L", text, method="certificate", signer=subject)
    assert audit(story.history.facts)[0] is None


# Remarks.


def remarks_of(story: Story) -> list[tuple[int, RemarkKind, str]]:
    found, audited = audit(story.history.facts)
    assert found is None
    return [(each.position, each.kind, each.text) for each in audited.remarks]


def test_bypass_and_reload_that_went_on_are_remarks() -> None:
    [bypassed] = remarks_of(tell("policy:approval request_emergency bypass load:bypassed:alice"))
    assert bypassed == (
        3,
        RemarkKind.BYPASSED,
        "'alice' let 'digits' be loaded without approval: outage",
    )
    weakened, went_on = remarks_of(tell(f"{SIGNED} policy:rekeyed restart request_reload reload_went_on"))
    assert weakened[1] == RemarkKind.WEAKENED  # another key may sign
    assert went_on[:2] == (9, RemarkKind.WENT_ON)


@pytest.mark.parametrize(
    ("of_request", "of_answer", "remarked"),
    [
        ((), (), False),
        (("Carol",), (), True),
        ((), ("ALICE",), True),
        (("dave",), ("root", "Dave"), True),
        (("dave",), ("erin",), False),
    ],
)
def test_approval_by_token_of_the_requesters_issuer_is_a_remark(
    of_request: tuple[str, ...], of_answer: tuple[str, ...], *, remarked: bool
) -> None:
    story = tell("policy:approval")
    story.request("L", issuers=of_request)
    story.ask("L")
    story.approve("L", issued_by=of_answer)
    assert [each[:2] for each in remarks_of(story)] == [(4, RemarkKind.SELF_ISSUED)] * remarked


@pytest.mark.parametrize(("issuers", "remarked"), [(("dave",), True), (("erin",), False), (("carol",), True)])
def test_two_approvers_whose_tokens_one_issued_are_a_remark(
    issuers: tuple[str, ...], *, remarked: bool
) -> None:
    story = tell("policy:two")
    story.request("L")
    story.ask("L")
    story.approve("L", issued_by=("dave",))
    story.approve("L", "bob", issued_by=issuers)
    assert [each[:2] for each in remarks_of(story)] == [(5, RemarkKind.SELF_ISSUED)] * remarked


def test_weakened_policy_is_a_remark() -> None:
    story = tell("policy:approval policy:none policy:approval")
    assert remarks_of(story) == [(2, RemarkKind.WEAKENED, "approval for digits: 0 must approve instead of 1")]


def test_remarks_beyond_limit_are_dropped() -> None:
    story = tell("policy:approval policy:none " * (MAX_REMARKS + 5))
    assert len(remarks_of(story)) == MAX_REMARKS


def test_audit_keeps_only_bundles_that_matter() -> None:
    story, bundles = tell("policy:trust"), 40
    for number in range(bundles):
        sha256 = f"{number:064x}"
        text = bundle_of(sha256)
        name = hashlib.sha256(text.encode()).hexdigest()
        said = LoadSignature(story.rules.digest, "key", SIGNERS[KEY], name, is_enforced=True)
        story.request(f"L{number}")
        story.load(f"L{number}", files=files_of(sha256, text), signature=said, bundle=text)
    found, audited = audit(story.history.facts)
    assert found is None
    assert (
        len(audited._bundles[MODEL]) == MAX_ADMITTED + 1
    )  # those that the model names before its last load, and that one's


# Histories that the product makes.


PERSONS = ("alice", "bob", "carol", "Dave")
SHAS = (ONE, TWO)


class Server:
    """What a server with a policy does, by its own decisions; its workers always load."""

    def __init__(self) -> None:
        self.history, self.new_id, self.policy = History(), ids(), LoadPolicy()

    @property
    def rules(self) -> ModelRules | None:
        return self.policy.of(MODEL)

    def submit(self, command: Command) -> None:
        seconds = self.history.seconds + 1
        decision = accept(self.history.state, command, self.new_id, at(seconds))
        for draft in decision.drafts if isinstance(decision, Accepted) else ():
            self.history.add(
                draft.data,
                draft.job_id,
                of=draft.model_id,
                version=draft.version,
                by=draft.actor,
                event_id=draft.id,
            )

    def restart(self, policy: LoadPolicy) -> None:
        self.history.restart()
        if policy != self.policy:
            self.policy = policy
            self.history.add(PolicyInForce(policy), of=None, version=None)
        model = self.history.model()
        if model.serving is not None and not model.loads:
            self.request("system", model.serving.version, cause=model.lost_by or Cause.RESTART)

    def request(
        self, by: str, version: int, *, emergency: str | None = None, cause: Cause = Cause.REQUEST
    ) -> None:
        digest = UNSET if self.rules is None else self.rules.digest
        said = UNSET if cause is not Cause.REQUEST else Justification(Credential(), "why", emergency)
        asked = frozenset({"priority"})
        command = RequestLoad(
            MODEL, version, None, by, cause=cause, asked=asked, policy=digest, justification=said
        )
        self.submit(command)

    def answer(self, by: str) -> None:
        for job in self.history.state.unended():
            if job.waits_for_approval and job.approval is not None:
                digest = job.approval.digest
                self.submit(AnswerApproval(job.id, by, digest, "fine", Credential(), approves=True))
                return

    def work(self) -> None:
        """Check the next load, and ask for its approval, or load it."""
        queue = self.history.state.queue(MODEL)
        job = next((each for each in queue if not each.waits_for_approval), None)
        if job is None or job.version is None:
            return
        if job.policy_digest != (None if self.rules is None else self.rules.digest):
            self.history.fail_load(job.id, "policy_differs", version=job.version)
        elif self.rules is None:
            self._finish(job)
        else:
            self._check(job, self.rules)

    def _check(self, job: Job, rules: ModelRules) -> None:
        model = self.history.state.models.get(MODEL)
        sha256 = SHAS[(job.version or 1) - 1]
        files = files_of(sha256, bundle_of(sha256))
        contents = contents_of(files)
        is_reload = model is not None and model.serving is not None and job.cause is not Cause.REQUEST
        given = CheckInput(
            rules,
            MODEL,
            model,
            contents,
            read=lambda _: bundle_of(sha256).encode(),
            now=at(self.history.seconds),
            is_reload=is_reload,
            is_signed=lambda *_: True,
        )
        try:
            checked = check_load(given, job)
        except NotLoadable as refused:
            self.history.fail_load(job.id, refused.failure.code, version=job.version or 1)
            return
        if checked.approval is not None:
            said = {"signature": checked.signature, "approval": checked.approval, "bundle": checked.bundle}
            self._finish(job, **said)
            return
        state = self.history.state
        now, signature = state.recorded_at, checked.signature
        question = draft_question(
            job, rules, signature, contents, state=state, now=now, is_signed=given.is_signed
        )
        if isinstance(question, Failure):
            self.history.fail_load(job.id, question.code, version=job.version or 1)
        else:
            self.history.add(question.data, job.id, version=job.version, by=question.actor)

    def _finish(self, job: Job, **said: Any) -> None:
        sha256 = SHAS[(job.version or 1) - 1]
        self.history.start_load(job.id, attempt=job.attempt + 1, version=job.version)
        loaded = replace(model_loaded(f"w-{job.id}"), files=files_of(sha256, bundle_of(sha256)), **said)
        self.history.add(loaded, job.id, version=job.version)


BOTH = LoadPolicy(POLICIES["trust"].trust, (ApprovalRule((MODEL,), approvals=2),))
IN_FORCE = (LoadPolicy(), APPROVAL, POLICIES["strict"], POLICIES["trust"], BOTH)


@st.composite
def served(draw: st.DrawFn) -> list[Event]:
    """Return what a server records that persons use, and that is restarted with other policies."""
    server = Server()
    server.restart(draw(st.sampled_from(IN_FORCE)))
    persons, versions = st.sampled_from(PERSONS), st.sampled_from((1, 2))
    steps = st.sampled_from(["request", "emergency", "answer", "work", "all", "all", "restart"])
    for step in draw(st.lists(steps, min_size=5, max_size=30)):
        match step:
            case "request":
                server.request(draw(persons), draw(versions))
            case "emergency":
                server.request(draw(persons), draw(versions), emergency="outage")
            case "answer":
                server.answer(draw(persons))
            case "work":
                server.work()
            case "all":  # a load, up to its end unless its rules or others are in its way
                server.request(draw(persons), draw(versions))
                server.work()
                for person in PERSONS:
                    server.answer(person)
                server.work()
            case "restart":
                server.restart(draw(st.sampled_from(IN_FORCE)))
    return server.history.facts


def forgeries(facts: list[Event]) -> list[tuple[int, Event]]:
    """Return events that loads rest on, each with its place and as somebody would forge or remove it."""
    approved = {
        each.job_id
        for each in facts
        if isinstance(each.data, ModelLoaded)
        and each.data.approval is not UNSET
        and each.data.approval.result in (ApprovalResult.APPROVED, ApprovalResult.BYPASSED)
    }
    requesters = {each.id: each.actor for each in facts}
    found = list[tuple[int, Event]]()
    for place, event in enumerate(facts):
        data = event.data
        removed = replace(event, data=Unknown("Removed", 1, {}))
        if isinstance(data, LoadApproved | ApprovalBypassed) and event.job_id in approved:
            found += [(place, removed), (place, replace(event, data=replace(data, digest="ef" * 32)))]
        if isinstance(data, LoadApproved) and event.job_id in approved:
            found.append((place, replace(event, actor=requesters[event.job_id or ""])))
        if isinstance(data, ModelLoaded) and data.bundle is not UNSET:
            found.append((place, replace(event, data=replace(data, bundle=UNSET))))
            found.append((place, replace(event, data=replace(data, bundle=bundle_of(ONE, OTHER_KEY)))))
        if isinstance(data, ModelLoaded) and data.approval is not UNSET:
            found.append((place, replace(event, data=replace(data, approval=UNSET))))
    return found


@FEWER
@given_any(served())
def test_server_that_keeps_its_policy_leaves_no_finding(facts: list[Event]) -> None:
    found, _ = audit(facts)
    assert found is None
    for place, forged in forgeries(facts):
        found, _ = audit([*facts[:place], forged, *facts[place + 1 :]])
        assert found is not None, forged
        assert found[0] >= forged.position


# The whole ledger.


async def write_facts(path: Path, facts: Iterable[Event]) -> None:
    async with opened(path) as log:
        await append_events(log, facts)


def data_with(folder: Path, words: str) -> Path:
    """Return a data directory with the ledger of a history."""
    folder.mkdir()
    asyncio.run(write_facts(folder / LEDGER, tell(words).history.facts))
    return folder


def test_verify_command_says_what_is_missing_and_exits_with_1(tmp_path: Path) -> None:
    sound = data_with(tmp_path / "sound", "policy:approval request_emergency bypass load:bypassed:alice")
    lines = printed("verify", "--data", sound).splitlines()
    assert lines[2] == (
        "remark: position 3: 'alice' let 'digits' be loaded without approval: outage (approval_bypassed)"
    )
    [remark] = printed_json("verify", "--data", sound)["remarks"]
    assert (remark["position"], remark["kind"]) == (3, "approval_bypassed")
    forged = data_with(tmp_path / "forged", f"{APPROVED} request_again load_again")
    assert printed("verify", "--data", forged, code=1).splitlines()[0] == (
        "NOT verified: position 9: the approval that its rules ask for is missing (policy)"
    )
    assert printed_json("verify", "--data", forged, code=1)["finding"]["kind"] == "policy"
