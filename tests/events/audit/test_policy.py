"""`PolicyAudit` finds each load that was not signed or approved as the rules of its day ask, and no other.

The words of a table are those of `WORDS`. A model's files have the hash `ONE` or `TWO`. The load `L` is
requested by alice.
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
from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from support.clients import printed, printed_json
from support.history import History, at, model_loaded, opened
from support.ledgers import append_events
from support.signing import make_authority, make_key, public_pem, sign_version

from events.clock import parse_timestamp
from events.jobs import Job
from events.models import RELOADS
from events.serving import AdmittedBytes
from events.sqlite.datalock import LEDGER
from events.state import Entities
from events.statements import emergency_statement, load_statement
from events.types import (
    AddedFile,
    Cause,
    Contents,
    Draft,
    Event,
    Justification,
    LoadedFile,
    LoadJoined,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    PolicyInForce,
    VersionAdded,
    VersionRemoved,
    contents_of,
    digest_of,
    record_draft,
)
from events.values import Credential, FileHash
from features.approvals.commands import approval_statement
from features.approvals.facts import ApprovalResult, LoadApproval, VersionApproved
from features.approvals.fold import make_approval
from features.approvals.rules import AddedMode, ApprovalRule
from features.audit import MAX_REMARKS, PolicyAudit, RemarkKind
from features.beforeload import CheckInput, NotLoadable
from features.checks import check_load
from features.nodes.facts import NodeSignature
from features.rules import LoadPolicy, ModelRules
from features.signatures.facts import MAX_BUNDLES, LoadSignature
from features.signatures.rules import TrustedCertificates, TrustMode, TrustRule
from features.signatures.verification import key_digest

MODEL = "digits"
ONE, TWO = "ab" * 32, "cd" * 32
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


def contents(sha256: str = ONE) -> Contents:
    return contents_of(files_of(sha256))


APPROVAL = LoadPolicy(approval=(ApprovalRule((MODEL,)),))
POLICIES = {
    "none": LoadPolicy(),
    "approval": APPROVAL,
    "two": LoadPolicy(approval=(ApprovalRule((MODEL,), approvals=2),)),
    "strict": LoadPolicy(approval=(ApprovalRule((MODEL,)), ApprovalRule((MODEL,), emergency=False))),
    "recorded": LoadPolicy(approval=(ApprovalRule((MODEL,), added=AddedMode.RECORDED),)),
    "others": LoadPolicy(approval=(ApprovalRule(("other-*",)),)),
    "trust": LoadPolicy((TrustRule((MODEL,), TrustMode.ENFORCE, (PEMS[KEY],)),)),
    "rekeyed": LoadPolicy((TrustRule((MODEL,), TrustMode.ENFORCE, (PEMS[OTHER_KEY],)),)),
    "distrusted": LoadPolicy(
        (TrustRule((MODEL,), TrustMode.ENFORCE, (PEMS[OTHER_KEY],), distrusted=(SIGNERS[KEY],)),)
    ),
    "warn": LoadPolicy((TrustRule((MODEL,), TrustMode.WARN, (PEMS[KEY],)),)),
}
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
        self.history.add(PolicyInForce(policy, server=self.node), of=None, version=None)

    def request(
        self,
        job: str,
        by: str = "alice",
        *,
        emergency_for: str | None = None,
        cause: Cause = Cause.REQUEST,
        issued_by: tuple[str, ...] = (),
    ) -> None:
        said = Justification(Credential(issued_by=issued_by), "why")
        if emergency_for is not None:
            said = replace(said, emergency="outage", digest=digest_of(contents(emergency_for)))
            seen = self.sign(emergency_statement(job, MODEL, 1, by, said))
            said = replace(said, server_signature=seen)
        digest = UNSET if self.rules is NO_RULES else self.rules.digest
        asked = LoadRequested.of(LoadParameters(), cause, policy=digest, justification=said)
        self.history.add(asked, job, by=by)

    def sign(self, statement: bytes) -> NodeSignature | UnsetType:
        if self.node is UNSET:
            return UNSET
        return NodeSignature(self.node, base64.b64encode(self.key.sign(statement)).decode())

    def add(self, by: str, version: str = "1") -> None:
        added = VersionAdded(tuple(AddedFile(path, 1, sha256) for path, sha256 in contents()))
        self.history.add(added, by=by, version=int(version))

    def approve(self, by: str = "carol", *issued_by: str, sha256: str = ONE, of: str = ONE) -> None:
        """Approve the digest of `sha256` with the files of another one."""
        files = tuple(FileHash(*each) for each in contents(of))
        data = VersionApproved(digest_of(contents(sha256)), files, "fine", Credential(issued_by=issued_by))
        event_id = f"approval{self.history.state.position}"
        said = make_approval(record_draft(Draft(event_id, data, by, None, MODEL, 1), 0, ""), data)
        data = replace(data, server_signature=self.sign(approval_statement(MODEL, said)))
        self.history.add(data, by=by, event_id=event_id)

    def find_approval(self, by: str) -> int:
        """Return the position of a person's last approval; one that does not exist if there is none."""
        found = [each for each in self.history.facts if isinstance(each.data, VersionApproved)]
        return next((each.position for each in reversed(found) if each.actor == by), 999)

    def name_approvals(self, by: str, *positions: int, result: str = "approved") -> LoadApproval:
        persons, rule = tuple(by.split("+")) if by else (), self.rules.approval_digest or ""
        return LoadApproval(rule, ApprovalResult(result), persons, positions)

    def start(self, job: str) -> None:
        self.history.add(LoadStarted(1, server=self.node), job)

    def finish(self, job: str, result: str = "", by: str = "", sha256: str = ONE, **given: Any) -> None:
        """Load files, which say how they were approved; `given` are other fields of the event."""
        positions = map(self.find_approval, by.split("+")) if result == "approved" else ()
        approval = self.name_approvals(by, *positions, result=result) if result else UNSET
        data = replace(model_loaded(), files=files_of(sha256), approval=approval, server=self.node)
        data = replace(data, **given)
        passed = AdmittedBytes(digest_of(contents_of(data.files)), job, 1, data.evidence)
        if self.node is not UNSET and "server_signature" not in given:
            data = replace(data, server_signature=self.sign(load_statement(MODEL, passed)))
        self.history.add(data, job)

    def load(self, job: str, *said: str, **given: Any) -> None:
        self.start(job)
        self.finish(job, *said, **given)

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
    "add": Story.add,
    "remove": lambda s: s.history.add(VersionRemoved(), by="dave"),
    "approve": Story.approve,
    "approve_two": lambda s, by: s.approve(by, sha256=TWO, of=TWO),
    "approve_with_other_files": lambda s, by: s.approve(by, of=TWO),
    "withdraw": lambda s: s.history.withdraw(digest=digest_of(contents())),
    "request": lambda s, *by: s.request("L", *by),
    "request_with_token_of": lambda s, *issuers: s.request("L", issued_by=issuers),
    "request_again": lambda s, *by: s.request("L2", *by),
    "request_again_in_emergency": lambda s, sha256: s.request("L2", emergency_for=sha256),
    "request_emergency": lambda s: s.request("L", emergency_for=ONE),
    "request_other_emergency": lambda s: s.request("L", emergency_for=TWO),
    "request_reload": lambda s: s.request("R", "system", cause=Cause.RESTART),
    "request_reload_again": lambda s: s.request("R2", "system", cause=Cause.RESTART),
    "join": lambda s, by: s.history.add(LoadJoined(), "L", by=by),
    "start": lambda s: s.start("L"),
    "finish": lambda s, *said: s.finish("L", *said),
    "finish_again": lambda s, *said: s.finish("L2", *said),
    "load": lambda s, *said: s.load("L", *said),
    "load_again": lambda s, *said: s.load("L2", *said),
    "load_at_positions": lambda s, *at: s.load("L", approval=s.name_approvals("carol", *map(int, at))),
    "load_unsigned": lambda s, *said: s.load("L", *said, server_signature=UNSET),
    "load_signed_by_b": lambda s, *said: s.load("L", *said, server_signature=NodeSignature("b", "")),
    "change_settings": lambda s: s.history.change_settings("L2", "L"),
    "change_settings_at_reload": lambda s: s.history.change_settings("R", "L"),
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
    "reload_again_went_on": lambda s: s.load_signed("R2", is_in_ledger=True, was_verified=True),
    "reload_signed_without_rules": lambda s: s.load("R", files=files_of(ONE, bundle_of(ONE))),
    "restart": lambda s: s.history.restart(),
    "join_as_node": Story.join_as_node,
    "leave": lambda s: s.history.leave("a"),
    "other_key": lambda s: setattr(s, "key", Ed25519PrivateKey.generate()),
    "at_node": lambda s, node: setattr(s, "node", node),
    "at_no_node": lambda s: setattr(s, "node", UNSET),
}


def tell(words: str) -> Story:
    story = Story()
    for word in words.split():
        step, *given = word.split(":")
        WORDS[step](story, *given)
    return story


APPROVED = "policy:approval approve request load:approved:carol"
BYPASSED = "policy:approval request_emergency load:bypassed:alice"
SIGNED = "policy:trust request load_signed"
UNRULED_RELOAD = "policy:none restart request_reload reload_signed_without_rules"
SETTINGS_IN_EMERGENCY = f"request_again_in_emergency:{ONE} change_settings"
NODE = "join_as_node policy:approval"
HONEST = [
    "request load",
    "policy:others request load",
    "policy:approval policy:none request load",
    "policy:approval forget_rules request policy:none load",
    APPROVED,
    "approve policy:approval request load:approved:carol",  # before there were rules
    f"{APPROVED} request_again load_again:approved:carol",
    f"{APPROVED} policy:none request_again load_again policy:approval restart request_reload reload:reload",
    f"{APPROVED} restart request_reload reload:reload",
    f"{APPROVED} withdraw restart request_reload reload:reload",
    "request load policy:approval restart request_reload reload:reload",
    "policy:two approve approve:dave request load:approved:carol+dave",
    "policy:two approve approve:CAROL approve:dave:carol approve:erin request load:approved:carol+erin",
    "policy:approval approve:alice approve:dave:alice approve:erin request load:approved:erin",
    "policy:approval approve request join:carol load:approved:carol",  # she asks for what she approved
    "policy:approval approve approve:dave withdraw approve:erin request load:approved:erin",
    "policy:approval request approve start withdraw finish:approved:carol",  # it had started by then
    "policy:approval request approve start add:carol finish:approved:carol",
    "policy:approval add:bob approve request load:approved:carol",
    "policy:recorded add:bob approve request load:approved:carol",
    "policy:recorded approve add:alice remove request load:approved:carol",
    BYPASSED,
    "policy:recorded request_emergency load:bypassed:alice",
    "policy:strict approve request_emergency load:approved:carol",
    SIGNED,
    f"{SIGNED} request_again load_signed_again",
    f"{SIGNED} policy:rekeyed restart request_reload reload_went_on",
    f"{SIGNED} {UNRULED_RELOAD} policy:rekeyed restart request_reload_again reload_again_went_on",
    "policy:warn request load",
    "policy:warn request load_unenforced",
    f"join_as_node {APPROVED}",
    f"{NODE} request_emergency load:bypassed:alice",
    f"{NODE} approve other_key join_as_node approve:dave request load:approved:dave",  # carol's is of no node
    "join_as_node request load policy:approval restart request_reload reload:reload",
    "join_as_node:b policy:approval join_as_node:c forget_rules request load",  # no rules at c
    "request load request_again change_settings",
    f"{APPROVED} request_again change_settings",
    f"{APPROVED} {SETTINGS_IN_EMERGENCY}",
    f"{APPROVED} withdraw request_reload change_settings_at_reload",
    f"request load policy:approval {SETTINGS_IN_EMERGENCY}",
    "request load policy:trust request_again change_settings",
    f"{NODE} approve request load:approved:carol request_again change_settings",
]


@pytest.mark.parametrize("words", HONEST)
def test_honest_history_has_no_finding(words: str) -> None:
    assert audit(tell(words).history.facts)[0] is None


MISSING = "1 more approval"
FORGED = [
    # Rules.
    ("policy:approval forget_rules request load", "the request for this load names none"),
    ("rules_of:approval approve request load:approved:carol", "not those in force"),
    ("rules_of:approval request policy:others rules_of:approval load", "not those in force"),
    ("policy:approval forget_rules load_unrequested", "the request for this load is missing"),
    ("rules_of:approval forget_rules request rules_of:approval load:approved:carol", "names none"),
    # Approvals.
    ("policy:approval approve_with_other_files:carol", "its files do not have the digest"),
    ("policy:approval request load", MISSING),
    ("policy:approval request load:approved:carol", MISSING),
    ("policy:approval approve request load", "the approval that its rules ask for is missing"),
    ("policy:approval approve_two:carol request load:approved:carol", MISSING),
    (f"policy:approval approve request load:approved:carol:{TWO}", MISSING),
    ("policy:two approve request load:approved:carol", MISSING),
    ("policy:approval approve:alice request load:approved:alice", MISSING),
    ("policy:approval approve:ALICE request load:approved:ALICE", MISSING),
    ("policy:approval approve:carol:alice request load:approved:carol", "'alice', who asks for the load"),
    ("policy:approval add:carol approve request load:approved:carol", "'carol', who added them"),
    ("policy:approval approve add:Carol:3 request load:approved:carol", "'Carol', who added them"),
    ("policy:approval add:carol remove approve request load:approved:carol", "'carol', who added them"),
    ("policy:approval add:bob approve:carol:root:Bob request load:approved:carol", "'bob', who added them"),
    ("policy:two approve approve:Carol request load:approved:carol+Carol", MISSING),
    ("policy:two approve approve:dave:carol request load:approved:carol+dave", MISSING),
    ("policy:recorded approve request load:approved:carol", "does not have who added"),
    ("policy:approval approve withdraw request load:approved:carol", MISSING),
    ("policy:approval approve request withdraw load:approved:carol", MISSING),
    ("policy:approval approve request start withdraw start finish:approved:carol", MISSING),
    ("policy:approval approve withdraw request load:reload", MISSING),
    ("policy:approval approve request load_at_positions:999", MISSING),
    ("policy:approval approve request load_at_positions:1", MISSING),  # another event
    ("policy:approval approve request load_at_positions:2:999", "that is not in the log before"),
    ("policy:approval approve approve:dave request load_at_positions:3", "that is not in the log before"),
    ("policy:approval approve request load_at_positions", "that is not in the log before"),
    ("policy:approval approve request rules_of:two load:approved:carol", "that is not in the log before"),
    (f"{APPROVED} policy:two request_again load_again:approved:carol", MISSING),
    (f"{APPROVED} withdraw request_again finish_again:approved:carol", MISSING),  # never started
    # Reloads.
    (f"{APPROVED} request_again load_again:reload", "that is not in the log before"),
    (f"{APPROVED} withdraw request_again load_again:reload", MISSING),
    (f"{APPROVED} restart request_reload reload:approved:carol", "that is not in the log before"),
    ("policy:approval request_reload reload:reload", MISSING),
    (f"{APPROVED} restart request_reload reload:reload::{TWO}", MISSING),
    # Emergencies.
    ("policy:approval request load:bypassed:alice", MISSING),
    ("policy:approval approve request load:bypassed:alice", "that is not in the log before"),
    ("policy:strict request_emergency load:bypassed:alice", "the rules allow no emergency"),
    ("policy:approval request_other_emergency load:bypassed:alice", "the emergency was for the files"),
    ("policy:approval request_emergency load:bypassed:carol", "that is not in the log before"),
    ("policy:approval request_emergency load:approved:alice", "that is not in the log before"),
    ("policy:approval request_emergency load:reload", "that is not in the log before"),
    # Settings.
    ("request load policy:approval request_again change_settings", MISSING),
    ("request load request_again policy:approval change_settings", "its request does not name them"),
    (f"{APPROVED} request_again:carol change_settings", "by others than 'carol', who asks"),
    (f"{APPROVED} withdraw request_again change_settings", MISSING),
    (f"{APPROVED} add:carol request_again change_settings", "'carol', who added them"),
    (f"{APPROVED} policy:recorded request_again change_settings", "does not have who added"),
    (f"request load policy:strict {SETTINGS_IN_EMERGENCY}", "the rules allow no emergency"),
    (f"request load policy:approval request_again_in_emergency:{TWO} change_settings", "was for the files"),
    (f"join_as_node request load policy:approval other_key {SETTINGS_IN_EMERGENCY}", "role emergency"),
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
    (f"{NODE} other_key approve", "not by the key with which"),
    (f"{NODE} at_node:b approve", "not by the key with which"),
    (f"{NODE} at_no_node approve", "the signature of a node is missing"),
    (f"{NODE} at_no_node request_emergency at_node:a load:bypassed:alice", MISSING),
    (f"{NODE} other_key request_emergency load:bypassed:alice", "has the role emergency"),
    (f"{NODE} request_other_emergency load:bypassed:alice", "the emergency was for the files"),
    ("policy:approval approve join_as_node policy:approval request load:approved:carol", MISSING),
    ("join_as_node request load_unsigned policy:approval restart request_reload reload:reload", "no trusted"),
    (f"{NODE} approve request other_key load:approved:carol", "not by the key with which"),
    (f"{NODE} approve request load_unsigned:approved:carol", "the signature of a node is missing"),
    (
        f"{NODE} join_as_node:b at_node:a approve request load_signed_by_b:approved:carol",
        "'a' has not signed",
    ),
]


@pytest.mark.parametrize(("words", "missing"), FORGED)
def test_forged_history_is_found_at_its_last_event(words: str, missing: str) -> None:
    facts = tell(words).history.facts
    found, _ = audit(facts)
    assert found is not None
    assert found[0] == facts[-1].position
    assert missing in found[1]


def test_load_of_another_version_than_requested_is_found() -> None:
    story = tell("policy:approval approve request start")
    approval = story.name_approvals("carol", 2)
    story.history.add(replace(model_loaded(), files=files_of(ONE), approval=approval), "L", version=2)
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


# What a load records of its signature, which the audit reads.

SIGNATURES = [
    # facts up to the request of a load, whether its files are signed; what is recorded, or why it is refused
    ("policy:trust request", True, "signed, with its bundle"),
    ("policy:trust request", False, "signature_missing"),
    ("policy:rekeyed request", True, "signature_untrusted"),
    (f"{SIGNED} request_again", True, "signed"),  # the ledger has the bundle
    (f"{SIGNED} restart request_reload", True, "signed"),
    (f"{SIGNED} policy:rekeyed request_again", True, "signature_untrusted"),
    (f"{SIGNED} policy:rekeyed restart request_reload", True, "went on"),
    (f"{SIGNED} policy:distrusted restart request_reload", True, "signature_untrusted"),
    (f"{SIGNED} {UNRULED_RELOAD} policy:rekeyed restart request_reload_again", True, "went on"),
    (
        "policy:warn request load_unenforced policy:rekeyed restart request_reload",
        True,
        "signature_untrusted",
    ),
    ("policy:warn request", False, "unsigned, signature_missing"),
    ("policy:warn request", True, "unenforced, with its bundle"),
]


@pytest.mark.parametrize(("words", "is_signed", "expected"), SIGNATURES)
def test_load_records_signature_that_its_rules_ask_for(words: str, *, is_signed: bool, expected: str) -> None:
    story, bundle = tell(words), bundle_of(ONE)
    job, model = next(iter(story.history.state.queue(MODEL))), story.history.model()
    given = CheckInput(
        *(story.rules, model, story.history.versions()),
        contents=contents_of(files_of(ONE, bundle if is_signed else None)),
        read=lambda *_: bundle.encode(),
        now=at(story.history.seconds),
        is_reload=job.cause in RELOADS,
        is_signed=lambda *_: True,
    )
    assert describe_signature(given, job) == expected


def describe_signature(given: CheckInput, job: Job) -> str:
    try:
        found = check_load(given, job).evidence
    except NotLoadable as refused:
        return refused.failure.code
    said = found.signature
    assert said is not UNSET
    assert said.policy == given.rules.digest
    kind = "went on" if said.was_verified else "signed" if said.is_enforced else "unenforced"
    words = [
        "unsigned" if said.signer is None else kind,
        said.problem,
        "with its bundle" if found.bundle else "",
    ]
    return ", ".join(filter(None, words))


# Remarks.


def remarks_of(story: Story, *, of_adders: bool = False) -> list[tuple[int, RemarkKind, str]]:
    """Return the remarks about adders, or all others: few of these stories have one."""
    found, audited = audit(story.history.facts)
    assert found is None
    said = [(each.position, each.kind, each.text) for each in audited.remarks]
    return [each for each in said if (each[1] is RemarkKind.NO_ADDER) is of_adders]


SELF_ISSUED, RELOADED = RemarkKind.SELF_ISSUED, RemarkKind.RELOADED
REMARKS: list[tuple[str, RemarkKind | None, str]] = [
    (APPROVED, None, ""),
    ("policy:approval approve:carol:erin request_with_token_of:dave load:approved:carol", None, ""),
    ("policy:approval approve request_with_token_of:Carol load:approved:carol", SELF_ISSUED, "'carol'"),
    (
        "policy:approval approve:carol:root:Dave request_with_token_of:dave load:approved:carol",
        *(SELF_ISSUED, "'carol' and who asked or approved before may be one person: 'Dave' issued"),
    ),
    ("policy:two approve:carol:erin approve:dave:root request load:approved:carol+dave", None, ""),
    (
        "policy:two approve:carol:erin approve:dave:erin request load:approved:carol+dave",
        *(SELF_ISSUED, "'dave' and who asked"),
    ),
    (BYPASSED, RemarkKind.BYPASSED, "'alice' let 'digits' be loaded without approval: outage"),
    (
        f"request load policy:approval {SETTINGS_IN_EMERGENCY}",
        *(RemarkKind.BYPASSED, "'alice' let 'digits' be loaded without approval: outage"),
    ),
    (f"{APPROVED} restart request_reload reload:reload", None, ""),
    (f"{APPROVED} withdraw restart request_reload reload:reload", RELOADED, "a reload of 'digits' brought"),
    ("request load policy:approval restart request_reload reload:reload", RELOADED, MISSING),
    ("policy:approval policy:none", RemarkKind.WEAKENED, "0 must approve instead of 1"),
    ("policy:recorded policy:approval", RemarkKind.WEAKENED, "whose adder the ledger does not have"),
    ("policy:approval policy:recorded", None, ""),
    ("policy:trust policy:rekeyed", RemarkKind.WEAKENED, "may sign"),
]


@pytest.mark.parametrize(("words", "kind", "text"), REMARKS)
def test_remark_is_of_the_last_event(words: str, kind: RemarkKind | None, text: str) -> None:
    story = tell(words)
    found = remarks_of(story)
    assert [each[:2] for each in found] == ([] if kind is None else [(len(story.history.facts), kind)])
    assert all(text in each[2] for each in found)


@pytest.mark.parametrize(
    ("words", "is_remarked"), [(APPROVED, True), (f"add:bob {APPROVED}", False), (BYPASSED, False)]
)
def test_approved_bytes_without_adder_are_a_remark(words: str, *, is_remarked: bool) -> None:
    texts = [text for _, _, text in remarks_of(tell(words), of_adders=True)]
    assert texts == ["the log does not have who added version 1 of 'digits'"] * is_remarked


def test_reload_that_went_on_is_a_remark() -> None:
    weakened, went_on = remarks_of(tell(f"{SIGNED} policy:rekeyed restart request_reload reload_went_on"))
    assert weakened[1] == RemarkKind.WEAKENED  # another key may sign
    assert went_on[:2] == (9, RemarkKind.WENT_ON)


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
    assert len(audited._bundles[MODEL]) == MAX_BUNDLES


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
    sound = data_with(tmp_path / "sound", BYPASSED)
    lines = printed("verify", "--data", sound).splitlines()
    assert lines[2] == (
        "remark: position 4: 'alice' let 'digits' be loaded without approval: outage (approval_bypassed)"
    )
    [remark] = printed_json("verify", "--data", sound)["remarks"]
    assert (remark["position"], remark["kind"]) == (4, "approval_bypassed")
    forged = data_with(tmp_path / "forged", f"{APPROVED} request_again load_again")
    assert printed("verify", "--data", forged, code=1).splitlines()[0] == (
        "NOT verified: position 8: the approval that its rules ask for is missing (policy)"
    )
    assert printed_json("verify", "--data", forged, code=1)["finding"]["kind"] == "policy"
