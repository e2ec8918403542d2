"""Audit of the loads in a log: by the rules of its time, only signed and approved versions were loaded. Pure.

`PolicyAudit` repeats, from the log alone, the checks of `features.checks`, and compares their results with
what `ModelLoaded` says. The key of a node is that of its join; whether the nodes' shared keys have
signed that join, `nodes.peers` checks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as change
from enum import StrEnum
from functools import partial
from typing import Any

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from events.audit.signing import is_signed_by
from events.clock import Timestamp
from events.jobs import Job
from events.models import RELOADS, Model
from events.serving import AdmittedBytes
from events.state import Entities
from events.statements import emergency_statement, load_statement
from events.types import (
    SYSTEM,
    Contents,
    Event,
    LoadStarted,
    ModelLoaded,
    ModelSettingsChanged,
    PolicyInForce,
    contents_of,
    digest_of,
)
from events.versions import ModelVersions
from features.approvals.check import check_approval
from features.approvals.commands import approval_statement, find_approval, find_same_person
from features.approvals.facts import ApprovalResult, LoadApproval, VersionApproved
from features.approvals.fold import make_approval
from features.beforeload import CheckInput, NotLoadable
from features.nodes.facts import NodeSignature
from features.rules import ModelRules, list_weakenings
from features.signatures.check import check_signatures
from features.signatures.facts import LoadSignature, remember_bundle
from features.signatures.verification import SignatureRefused

MAX_REMARKS = 1_000
"""Remarks that are kept, the first ones, so that memory does not grow with the log."""


class RemarkKind(StrEnum):
    """The kind of a remark: a fact of a log that is no finding, but that an auditor wants to know."""

    WEAKENED = "policy_weakened"
    SELF_ISSUED = "approval_self_issued"
    BYPASSED = "approval_bypassed"
    WENT_ON = "signature_refused"
    RELOADED = "not_approved"
    NO_ADDER = "adder_unknown"


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
        checks: by the type of event; each returns a sentence about the defect, or None.
        remarks: the first ones so far.
    """

    def __init__(self, entities: Entities) -> None:
        self.remarks = list[Remark]()
        self.checks: Mapping[type, Callable[[Event, Any], str | None]] = {
            PolicyInForce: self._compare_policies,
            VersionApproved: self._check_approval,
            LoadStarted: self._keep_versions,
            ModelLoaded: self._check_load,
            ModelSettingsChanged: self._check_settings,
        }
        self._entities = entities
        self._bundles = dict[str, dict[str, str]]()  # by model and name
        self._started = dict[str, tuple[str, ModelVersions]]()  # by model: the last load that started

    def _remark(self, event: Event, kind: RemarkKind, text: str) -> None:
        if len(self.remarks) < MAX_REMARKS:
            self.remarks.append(Remark(event.position, kind, text))

    def _compare_policies(self, event: Event, data: PolicyInForce) -> None:
        before = self._entities.registers.find_policy(data.server or None)
        for sentence in list_weakenings(before, data.policy):
            self._remark(event, RemarkKind.WEAKENED, sentence)

    # Statements of persons.

    def _check_approval(self, event: Event, data: VersionApproved) -> str | None:
        if digest_of((file.path, file.sha256) for file in data.files) != data.digest:
            return "its files do not have the digest that was approved"
        if not self._entities.registers.nodes:
            return None
        statement = approval_statement(event.model_id or "", make_approval(event, data))
        return self._find_unsigned(statement, data.server_signature)

    def _keep_versions(self, event: Event, _: LoadStarted) -> None:
        """Keep the state at a load's start, on which the load goes on, regardless of later withdrawals."""
        job = self._entities.jobs.get(event.job_id or "")
        if job is not None and job.policy_digest is not None:
            versions = self._entities.registers.find_versions(job.model_id)
            self._started[job.model_id] = job.id, versions

    def _check_bypass(self, event: Event, job: Job) -> str | None:
        said = None if job.policy is UNSET else job.policy.justification
        if said is None:
            return None
        text = f"{job.requested_by!r} let {job.model_id!r} be loaded without approval: {said.emergency}"
        self._remark(event, RemarkKind.BYPASSED, text)
        if not self._entities.registers.nodes:
            return None
        statement = emergency_statement(job.id, job.model_id, job.version, job.requested_by, said)
        if self._find_unsigned(statement, said.server_signature) is not None:
            return "no node has signed that who asked for this load has the role emergency"
        return None

    def _find_unsigned(self, statement: bytes, signature: NodeSignature | UnsetType) -> str | None:
        """Return why a node's signature of a statement is missing or invalid, or None."""
        if signature is UNSET:
            return "the signature of a node is missing"
        node = self._entities.registers.nodes.get(signature.server)
        if node is None or not is_signed_by(statement, signature.signature, node.public_key or ""):
            return f"its signature is not by the key with which the node {signature.server!r} joined"
        return None

    # Loads.

    def _check_load(self, event: Event, data: ModelLoaded) -> str | None:
        model_id, job = event.model_id or "", self._entities.jobs.get(event.job_id or "")
        rules = self._entities.registers.find_policy(data.server or None).of(model_id)
        digest = None if job is None else job.policy_digest
        if rules is None and digest is None and (data.signature, data.approval) == (UNSET, UNSET):
            return None
        if job is None or job.load is None or (job.model_id, job.version) != (model_id, event.version):
            return "the request for this load is missing"
        if digest is None:
            return "the model has rules, or it says so, and the request for this load names none"
        if rules is None or rules.digest != digest:
            return f"the rules {digest}, which the request names, are not those in force"
        started = self._started.get(model_id, ("", None))
        model, contents = self._entities.models.get(model_id) or Model(model_id), contents_of(data.files)
        given = self._make_input(event, rules, model, contents, data.server)
        given = change(given, read=partial(self._read_bundle, model_id, dict(contents), data.bundle))
        if started[0] == job.id and started[1] is not None:
            given = change(given, versions=started[1])
        problem = (
            self._check_signature(event, data, job, given)
            or self._check_load_approval(event, data.approval, job, given)
            or self._check_node(data, job, given)
        )
        if problem is None and data.signature is not UNSET and data.signature.bundle is not None:
            self._keep_bundle(model, data.signature.bundle, data.bundle)
        return problem

    def _make_input(
        self, event: Event, rules: ModelRules, model: Model, contents: Contents, node_id: str | UnsetType
    ) -> CheckInput:
        job = self._entities.jobs.get(event.job_id or "")
        is_known = contents in (contents_of(each.files) for each in model.held)
        return CheckInput(
            rules,
            model,
            self._entities.registers.find_versions(model.id),
            contents,
            read=partial(self._read_bundle, model.id, dict(contents), UNSET),
            now=event.recorded_at,
            is_reload=job is not None and job.cause in RELOADS and is_known,
            # Nodes' signatures were checked where they were recorded, but at a server alone there are none.
            is_signed=lambda _, signature: node_id is UNSET or signature is not UNSET,
        )

    def _check_node(self, data: ModelLoaded, job: Job, given: CheckInput) -> str | None:
        if data.server is UNSET or job.version is None:
            return None
        if data.server_signature is not UNSET and data.server_signature.server != data.server:
            return f"the node {data.server!r} has not signed it, where it was loaded"
        passed = AdmittedBytes(given.digest, job.id, job.version, data.evidence)
        return self._find_unsigned(load_statement(job.model_id, passed), data.server_signature)

    def _check_signature(self, event: Event, data: ModelLoaded, job: Job, given: CheckInput) -> str | None:
        signature, rules = data.signature, given.rules
        if signature is UNSET:
            return "the signature that its rules ask for is missing" if rules.enforced else None
        if signature.policy != rules.digest or signature.is_enforced != bool(rules.enforced):
            return "its signature was not checked under the rules that the request names"
        if not rules.enforced:
            return None
        problem = _check_again(signature, given, requested_at=job.created_at)
        if problem is None and signature.was_verified:
            text = f"a reload of {job.model_id!r} went on though its rules refuse its signature"
            self._remark(event, RemarkKind.WENT_ON, text)
        return problem

    def _check_load_approval(
        self, event: Event, said: LoadApproval | UnsetType, job: Job, given: CheckInput
    ) -> str | None:
        if said is not UNSET and said.positions:  # others may not have counted: of a node's old key
            named = (each for each in given.versions.approvals if each.position in said.positions)
            given = change(given, versions=replace(given.versions, approvals=tuple(named)))
        try:
            found = check_approval(given, job)
        except NotLoadable as refused:
            return f"its approval does not count: {refused}"
        if said is UNSET or found is UNSET:
            return None if said == found else "the approval that its rules ask for is missing"
        if said != found:
            return f"it says that it was {said.result}, and that is not in the log before"
        if said.result is ApprovalResult.BYPASSED:
            return self._check_bypass(event, job)
        if said.result is ApprovalResult.RELOAD:
            missing = find_approval(given.versions, given.rules, given.digest, SYSTEM, given.is_signed)
            if isinstance(missing, str):
                text = f"a reload of {job.model_id!r} brought back what is not approved: {missing}"
                self._remark(event, RemarkKind.RELOADED, text)
        else:
            self._remark_issuers(event, said, job, given.versions)
            if not given.versions.list_adders(given.digest):
                text = f"the log does not have who added version {job.version} of {job.model_id!r}"
                self._remark(event, RemarkKind.NO_ADDER, text)
        return None

    def _remark_issuers(self, event: Event, said: LoadApproval, job: Job, versions: ModelVersions) -> None:
        """Remark approvals that may be by the requester, or by one person, by the issuers of their tokens."""
        asked = None if job.policy is UNSET else job.policy.justification
        others = [job.requested_by, *(() if asked is None else asked.credential.issued_by)]
        for each in versions.approvals:
            if each.position in said.positions:
                shared = find_same_person(each.people, others)
                if shared is not None:
                    text = f"{each.by!r} and who asked or approved before may be one person: {shared!r}"
                    self._remark(event, RemarkKind.SELF_ISSUED, f"{text} issued a token of theirs")
                others += each.people

    def _check_settings(self, event: Event, data: ModelSettingsChanged) -> str | None:
        """Check the approval of bytes whose settings a person changed."""
        job = self._entities.jobs.get(event.job_id or "")
        model = self._entities.models.get(event.model_id or "")
        serving = None if model is None else model.find_serving(data.load_job_id)
        if job is None or model is None or serving is None:
            return None
        rules = self._entities.registers.find_policy(serving.server).of(job.model_id)
        if rules is None or not rules.persons:
            return None
        if job.policy_digest != rules.digest:
            return f"the rules {rules.digest} are in force, and its request does not name them"
        given = self._make_input(event, rules, model, contents_of(serving.files), serving.at)
        try:
            found = check_approval(given, job)
        except NotLoadable as refused:
            return f"its approval does not count: {refused}"
        is_bypassed = found is not UNSET and found.result is ApprovalResult.BYPASSED
        return self._check_bypass(event, job) if is_bypassed else None

    def _read_bundle(
        self, model_id: str, names: Mapping[str, str], recorded: str | UnsetType, path: str, _: int
    ) -> bytes:
        name = names[path]
        text = recorded or self._bundles.get(model_id, {}).get(name)
        if text is None or hashlib.sha256(text.encode()).hexdigest() != name:
            reason = f"the signature bundle {name} is missing: neither this load nor one before has it"
            raise SignatureRefused("signature_missing", reason)
        return text.encode()

    def _keep_bundle(self, model: Model, name: str, recorded: str | UnsetType) -> None:
        """Keep the bundles that the model names after this load, and drop all others."""
        known = self._bundles.get(model.id, {}) | ({} if recorded is UNSET else {name: recorded})
        kept = remember_bundle(model.known_evidence or (), name)
        self._bundles[model.id] = {key: text for key, text in known.items() if key in kept}


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
