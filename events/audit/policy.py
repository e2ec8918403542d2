"""Audit of the loads in a log: only what was signed and approved, by the rules of its day, was loaded. Pure.

`PolicyAudit` repeats, from the log alone, the checks of `events.policy.checks`, and compares their results
with what `ModelLoaded` says. The key of a node is that of its join; whether the nodes' shared keys have
signed that join, `nodes.peers` checks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as change
from enum import StrEnum
from itertools import chain, product
from typing import Any

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from events.approvals import (
    answer_statement,
    emergency_statement,
    is_same_person,
    list_requesters,
    load_statement,
)
from events.audit.signing import is_signed_by
from events.clock import Timestamp
from events.jobs import ApprovalAnswer, Job
from events.models import RELOADS, AdmittedBytes, Model
from events.policy.checks import CheckInput, NotLoadable, check_signatures, find_approval
from events.policy.rules import list_weakenings
from events.policy.signatures import SignatureRefused
from events.state import Entities
from events.types import (
    ApprovalBypassed,
    ApprovalResult,
    Event,
    LoadApproval,
    LoadApproved,
    LoadSignature,
    ModelLoaded,
    NodeSignature,
    PolicyInForce,
    contents_of,
)

MAX_REMARKS = 1_000
"""Remarks that are kept, the first ones, so that memory does not grow with the log."""


class RemarkKind(StrEnum):
    """The kind of a remark: a fact of a log that is no finding, but that an auditor wants to know."""

    WEAKENED = "policy_weakened"
    SELF_ISSUED = "approval_self_issued"
    BYPASSED = "approval_bypassed"
    WENT_ON = "signature_refused"


@dataclass(frozen=True, slots=True)
class Remark:
    """One sentence about the event at a position."""

    position: int
    kind: RemarkKind
    text: str


class PolicyAudit:
    """Checks each event against the rules that apply to it; the caller applies it to `entities` afterwards.

    Args:
        entities: the fold.

    Attributes:
        checks: by the type of event; each returns a sentence that says what is missing, or None.
        remarks: the first ones so far.
    """

    def __init__(self, entities: Entities) -> None:
        self.remarks = list[Remark]()
        self.checks: Mapping[type, Callable[[Event, Any], str | None]] = {
            PolicyInForce: self._compare_policies,
            LoadApproved: self._check_approval,
            ApprovalBypassed: self._check_bypass,
            ModelLoaded: self._check_load,
        }
        self._entities = entities
        self._bundles = dict[str, dict[str, str]]()  # by model and name

    def _remark(self, event: Event, kind: RemarkKind, text: str) -> None:
        if len(self.remarks) < MAX_REMARKS:
            self.remarks.append(Remark(event.position, kind, text))

    def _compare_policies(self, event: Event, data: PolicyInForce) -> None:
        before = self._entities.registers.find_policy(data.node_id or None)
        for sentence in list_weakenings(before, data.policy):
            self._remark(event, RemarkKind.WEAKENED, sentence)

    # What persons say.

    def _check_approval(self, event: Event, data: LoadApproved) -> str | None:
        """Check an approval that counts; the fold ignores any other."""
        job, actor, token = self._entities.jobs.get(event.job_id or ""), event.actor, data.credential
        asked = None if job is None else job.approval
        if job is None or asked is None or job.policy_digest is None or not job.waits_for_approval:
            return None
        if (asked.digest, asked.rule) != (data.digest, data.rule) or actor in asked.approved_by:
            return None
        requesters, said = list_requesters(job), job.policy.justification if job.policy else None
        if any(is_same_person(actor, each) for each in (*requesters, *asked.approved_by)):
            return f"{actor!r} asked for this load or approved it already, and another person has to"
        issued_by = () if said is None else said.credential.issued_by
        issuers = (*issued_by, *chain.from_iterable(each.issued_by for each in asked.answers))
        pairs = product((actor, *token.issued_by), (*requesters, *asked.approved_by, *issuers))
        shared = next((one for one, other in pairs if is_same_person(one, other)), None)
        if shared is not None:
            text = f"{actor!r} and who asked or approved before may be one person: {shared!r} issued a token"
            self._remark(event, RemarkKind.SELF_ISSUED, f"{text} of theirs")
        return self._check_answer(job, data, ApprovalAnswer(actor, data.reason, token.jti, token.issuer))

    def _check_bypass(self, event: Event, data: ApprovalBypassed) -> str | None:
        job = self._entities.jobs.get(event.job_id or "")
        if job is None or job.policy_digest is None:
            return None
        text = f"{event.actor!r} let {job.model_id!r} be loaded without approval: {data.reason}"
        self._remark(event, RemarkKind.BYPASSED, text)
        said = job.policy.justification if job.policy else None
        if said is not None and said.emergency is not None and said.digest != data.digest:
            return "the emergency was for other files than those that passed"
        if self._entities.registers.nodes and said is not None:
            statement = emergency_statement(job.id, job.model_id, job.version, job.requested_by, said)
            if self._find_unsigned(statement, said.node_signature) is not None:
                return "no node has signed that who asked for this load has the role emergency"
        return self._check_answer(job, data, ApprovalAnswer(event.actor, data.reason))

    def _check_answer(
        self, job: Job, data: LoadApproved | ApprovalBypassed, answer: ApprovalAnswer
    ) -> str | None:
        if not self._entities.registers.nodes:
            return None
        return self._find_unsigned(answer_statement(job, data.digest, data.rule, answer), data.node_signature)

    def _find_unsigned(self, statement: bytes, signature: NodeSignature | UnsetType) -> str | None:
        """Return why a node has not signed a statement; None if it has."""
        if signature is UNSET:
            return "the signature of a node is missing"
        node = self._entities.registers.nodes.get(signature.node_id)
        if node is None or not is_signed_by(statement, signature.signature, node.public_key or ""):
            return f"its signature is not by the key with which the node {signature.node_id!r} joined"
        return None

    # Loads.

    def _check_load(self, event: Event, data: ModelLoaded) -> str | None:
        model_id, job = event.model_id or "", self._entities.jobs.get(event.job_id or "")
        rules = self._entities.registers.find_policy(data.node_id or None).of(model_id)
        digest = None if job is None else job.policy_digest
        if rules is None and digest is None and (data.signature, data.approval) == (UNSET, UNSET):
            return None
        if job is None or job.load is None or (job.model_id, job.version) != (model_id, event.version):
            return "the request for this load is missing"
        if digest is None:
            return "the model has rules, or it says so, and the request for this load names none"
        if rules is None or rules.digest != digest:
            return f"the rules {digest}, which the request names, are not those in force"
        model, contents = self._entities.models.get(model_id) or Model(model_id), contents_of(data.files)
        given = CheckInput(
            rules,
            model_id,
            model,
            contents,
            read=lambda path: self._read_bundle(model_id, dict(contents)[path], data.bundle),
            now=event.recorded_at,
            is_reload=job.cause in RELOADS and contents in (contents_of(each.files) for each in model.held),
            # Nodes' signatures were checked where they were recorded, but at a server alone there are none.
            is_signed=lambda _, signature: data.node_id is UNSET or signature is not UNSET,
        )
        problem = (
            self._check_signature(event, data, job, given)
            or _check_load_approval(data.approval, job, given)
            or self._check_node(data, job, given)
        )
        if problem is None and data.signature is not UNSET and data.signature.bundle is not None:
            self._keep_bundle(model, data.signature.bundle, data.bundle)
        return problem

    def _check_node(self, data: ModelLoaded, job: Job, given: CheckInput) -> str | None:
        if data.node_id is UNSET or job.version is None:
            return None
        if data.node_signature is not UNSET and data.node_signature.node_id != data.node_id:
            return f"the node {data.node_id!r} has not signed it, where it was loaded"
        passed = AdmittedBytes(given.digest, job.id, job.version, data.signature, data.approval)
        return self._find_unsigned(load_statement(job.model_id, passed), data.node_signature)

    def _check_signature(self, event: Event, data: ModelLoaded, job: Job, given: CheckInput) -> str | None:
        signature, rules = data.signature, given.rules
        if signature is UNSET:
            return "the signature that its rules ask for is missing" if rules.enforced else None
        if signature.policy != rules.digest or signature.is_enforced != bool(rules.enforced):
            return "its signature was not checked under the rules that the request names"
        if not rules.enforced:
            return None
        problem = _check_again(signature, given, requested_at=job.queued_at)
        if problem is None and signature.was_verified:
            text = f"a reload of {job.model_id!r} went on though its rules refuse its signature"
            self._remark(event, RemarkKind.WENT_ON, text)
        return problem

    def _read_bundle(self, model_id: str, name: str, recorded: str | UnsetType) -> bytes:
        text = recorded or self._bundles.get(model_id, {}).get(name)
        if text is None or hashlib.sha256(text.encode()).hexdigest() != name:
            reason = f"the signature bundle {name} is missing: neither this load nor one before has it"
            raise SignatureRefused("signature_missing", reason)
        return text.encode()

    def _keep_bundle(self, model: Model, name: str, recorded: str | UnsetType) -> None:
        """Keep the bundles that the model names after this load, and drop all others."""
        known = self._bundles.get(model.id, {}) | ({} if recorded is UNSET else {name: recorded})
        kept = {*_list_bundles(model), name}
        self._bundles[model.id] = {key: text for key, text in known.items() if key in kept}


def _list_bundles(model: Model) -> set[str]:
    signatures = [each.signature for each in model.admitted or () if each.signature is not UNSET]
    return {each.bundle for each in signatures if each.bundle is not None}


def _check_again(signature: LoadSignature, given: CheckInput, requested_at: Timestamp) -> str | None:
    """Check a signature as of the load, or of its request: its certificate may have run out in between."""
    problem = None
    for now in (given.now, requested_at):
        try:
            found, _ = check_signatures(change(given, now=now))
        except NotLoadable as refused:
            problem = problem or f"its rules refuse the signature: {refused}"
        else:
            if replace(found, problem=signature.problem) == signature:
                return None
            problem = problem or f"the signature of its files is another one, by {found.signer}"
    return problem


def _check_load_approval(said: LoadApproval | UnsetType, job: Job, given: CheckInput) -> str | None:
    rules = given.rules
    try:
        found = find_approval(given, job)
    except NotLoadable as refused:
        return f"its approval does not count: {refused}"
    if said is UNSET:
        return None if found is UNSET else "the approval that its rules ask for is missing"
    is_reload = said == LoadApproval(rules.approval_digest or "", ApprovalResult.RELOAD)
    if said != found and not (is_reload and given.is_reload):
        return f"it says that it was {said.result}, and that is not in the log before"
    if said.result is ApprovalResult.APPROVED and len(said.by) < rules.approvals:
        return f"its rules ask for {rules.approvals} other persons, and {', '.join(said.by)} answered"
    asked = job.policy.justification if job.policy else None
    is_emergency = rules.allows_emergency and asked is not None and asked.emergency is not None
    if said.result is ApprovalResult.BYPASSED and not is_emergency:
        return "its rules allow no emergency, or the request names none"
    return None
