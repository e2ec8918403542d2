"""Whether a load passes its model's rules: the signature of its files, and their approval. Pure.

A reload by the system brings back bytes that were loaded before, so that a restart does not empty a machine:
it needs no approval, and goes on without today's keys if its bytes were verified before. With nodes, a
trusted one has to have signed that: who may write to their database could say that any bytes were loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.clock import Timestamp
from events.commands import Condition
from events.jobs import POLICY_DIFFERS, Failure, Job
from events.models import Model
from events.serving import AdmittedBytes
from events.statements import IsSigned, emergency_statement, load_statement
from events.types import SYSTEM, Contents, Justification, digest_of, hashes_of
from events.values import FileHash
from events.versions import ModelVersions
from features.approvals.commands import ApprovedBytes, find_approval
from features.approvals.facts import ApprovalResult, LoadApproval
from features.approvals.rules import NOT_APPROVED
from features.evidence import LoadEvidence
from features.rules import ModelRules
from features.signatures.facts import LoadSignature
from features.signatures.rules import TrustMode
from features.signatures.verification import SignatureRefused, check_signature, find_bundle


class NotLoadable(Exception):
    """A load does not pass the rules; `failure` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(code, message)


@dataclass(frozen=True)
class CheckInput:
    """The input of the check of a version's files.

    Attributes:
        rules: of the model, where it is to be loaded.
        model: as its events say, and `versions`, too.
        contents: of the files, as the store has hashed its copy.
        read: returns the content of one of them.
        now: the time of the load.
        is_reload: whether the files are those of a load before.
        is_signed: says whether a trusted node has signed a statement.
    """

    rules: ModelRules
    model: Model
    versions: ModelVersions
    contents: Contents
    read: Callable[[str], bytes]
    now: Timestamp
    is_reload: bool
    is_signed: IsSigned

    @property
    def digest(self) -> str:
        return digest_of(self.contents)

    @cached_property
    def admitted(self) -> AdmittedBytes | None:
        """These bytes as a load of the model has admitted them, if a trusted node has signed that.

        A load whose signature was enforced comes first.
        """
        found = sorted(
            self.model.list_admitted_bytes(self.digest), key=lambda each: not each.evidence.is_enforced
        )
        signed = (
            each for each in found if self.is_signed(load_statement(self.model.id, each), each.node_signature)
        )
        return next(signed, None)


@dataclass(frozen=True, slots=True)
class CheckedLoad:
    """A load that passes the rules, as `ModelLoaded` has it.

    `bundle` is UNSET if the ledger has it from a load of the same bytes. `conditions` must still hold when
    the load starts.
    """

    evidence: LoadEvidence
    bundle: str | UnsetType
    conditions: tuple[Condition, ...] = ()


def check_load(given: CheckInput, job: Job) -> CheckedLoad:
    """Check a load against its model's rules.

    Raises:
        NotLoadable: `policy_differs`, `signature_missing`, `signature_invalid`, `signature_untrusted`,
            `signature_mismatch`, `signature_unsupported`, `not_approved`, `emergency_forbidden`,
            `model_changed`.
    """
    accepted = job.policy_digest
    if accepted != given.rules.digest:
        what = f"the load was accepted under rules with the digest {accepted or 'none'}"
        raise NotLoadable(POLICY_DIFFERS, f"{what}, and {given.rules.digest} are in force: load it again")
    signature, bundle = check_signatures(given) if given.rules.trust else (UNSET, UNSET)
    approval = check_approval(given, job)
    conditions: tuple[Condition, ...] = ()
    if approval is not UNSET and approval.positions:
        conditions = (ApprovedBytes(job.model_id, given.digest, job.requested_by, approval.positions),)
    return CheckedLoad(LoadEvidence(signature, approval), bundle, conditions)


class CheckedVersion(Struct, frozen=True):
    """The checks that a load of a version would pass.

    Attributes:
        files: path and SHA-256 of each.
        signature: None without a rule for it, or if a load would be refused for it.
        problem: why a load would be refused, whoever asks for it; None if it would not.
        added_by: all who added these files; None if the ledger has nobody.
    """

    version: int
    digest: str
    files: tuple[FileHash, ...]
    signature: LoadSignature | None
    problem: Failure | None
    added_by: tuple[str, ...] | None


def survey_version(given: CheckInput, version: int) -> CheckedVersion:
    """Check files that are not to be loaded now; for errors see `CheckInput.read`."""
    signature, problem = None, None
    try:
        if given.rules.trust:
            signature, _ = check_signatures(given)
        if given.rules.persons and not given.is_reload:
            _find_approval(given, SYSTEM, version)
    except NotLoadable as refused:
        problem = refused.failure
    adders = tuple(given.versions.list_adders(given.digest)) or None
    files = hashes_of(given.contents)
    return CheckedVersion(version, given.digest, files, signature, problem, adders)


def check_signatures(given: CheckInput) -> tuple[LoadSignature, str | UnsetType]:
    """Return the signature under all rules, and the bundle unless the ledger has it.

    Raises:
        NotLoadable: a code that begins with `signature_`.
    """
    rules, read = given.rules, cache(given.read)
    distrusted = tuple({key for rule in rules.trust for key in rule.distrusted})
    before = None if given.admitted is None else given.admitted.evidence.signature or None
    found, problem, is_enforced, was_verified = None, None, False, False
    path = ""
    for rule in rules.trust:
        try:
            path = find_bundle(given.contents)
            by_all = replace(rule, distrusted=distrusted)  # a key that one rule distrusts, no other lets pass
            found = check_signature(read(path), path, given.contents, by_all, given.now)
            is_enforced = is_enforced or rule.mode is TrustMode.ENFORCE
        except SignatureRefused as refused:
            if rule.mode is TrustMode.WARN:
                problem = problem or refused.code
            elif (
                given.is_reload
                and before is not None
                and before.is_enforced
                and not (refused.is_distrusted or before.signer in distrusted)
            ):  # such as after a key was exchanged
                was_verified = True
            else:
                raise NotLoadable(refused.code, str(refused)) from None
    if found is None and before is not None and was_verified:
        return replace(before, policy=rules.digest, problem=problem, was_verified=True), UNSET
    if found is None:
        return LoadSignature(rules.digest, problem=problem), UNSET
    content = read(path)
    bundle = hashlib.sha256(content).hexdigest()
    signature = LoadSignature(
        rules.digest, found.method, found.signer, bundle, is_enforced or was_verified, problem, was_verified
    )
    is_known = bundle in (given.model.known_evidence or ())
    return signature, UNSET if is_known else content.decode()


def check_approval(given: CheckInput, job: Job) -> LoadApproval | UnsetType:
    """Return the approval with which a load goes on; UNSET if its rules ask for none.

    Raises:
        NotLoadable: `not_approved`, `emergency_forbidden`, `model_changed`.
    """
    rules, said = given.rules, None if job.policy is UNSET else job.policy.justification
    rule = rules.approval_digest
    if rule is None:
        return UNSET
    if given.is_reload:
        if given.admitted is None:
            what = "no trusted node has signed that it loaded these files before"
            raise NotLoadable(NOT_APPROVED, f"{what}: a person has to load this version")
        return LoadApproval(rule, ApprovalResult.RELOAD)
    try:
        return _find_approval(given, job.requested_by, job.version)
    except NotLoadable:
        if said is None or said.emergency is None or not _is_seen(given, job, said):
            raise
    if not rules.allows_emergency:
        raise NotLoadable("emergency_forbidden", "the rules allow no emergency: have the version approved")
    if said.digest != given.digest:
        what = f"the emergency was for the files {said.digest or 'of none'}"
        raise NotLoadable("model_changed", f"{what}, and the version has {given.digest}: load it again")
    return LoadApproval(rule, ApprovalResult.BYPASSED, (job.requested_by,))


def _find_approval(given: CheckInput, requester: str, version: int | None) -> LoadApproval:
    found = find_approval(given.versions, given.rules, given.digest, requester, given.is_signed)
    if isinstance(found, LoadApproval):
        return found
    command = f"`loadledger approve {given.model.id}/{version}`"
    raise NotLoadable(NOT_APPROVED, f"{found}; a person with the role approve gives it with {command}")


def _is_seen(given: CheckInput, job: Job, said: Justification) -> bool:
    """Whether a trusted node has seen that who asks has the role `emergency`."""
    statement = emergency_statement(job.id, job.model_id, job.version, job.requested_by, said)
    return given.is_signed(statement, said.node_signature)
