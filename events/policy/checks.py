"""Whether a load passes its model's rules: the signature of its files, and their approval. Pure.

A reload by the system brings back bytes that were loaded before, so that a restart does not empty a machine:
it needs no approval, and goes on without today's keys if its bytes were verified before. With nodes, a
trusted one has to have signed that: who may write to their database could say that any bytes were loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from events.approvals import answer_statement, load_statement
from events.clock import Timestamp
from events.jobs import APPROVAL_VOID, POLICY_DIFFERS, Failure, Job
from events.models import AdmittedBytes, Model
from events.policy.rules import ModelRules, TrustMode
from events.policy.signatures import SignatureRefused, check_signature, find_bundle
from events.types import (
    ApprovalResult,
    Cause,
    Contents,
    LoadApproval,
    LoadSignature,
    NodeSignature,
    contents_of,
    digest_of,
)

APPROVAL_REQUIRED = "approval_required"
"""Error code of a load that nobody can be asked about: one on demand, or of bytes that no node has signed."""

IsSigned = Callable[[bytes, NodeSignature | UnsetType], bool]
"""Whether a trusted node has signed a statement; of a ledger of one server it has."""


class NotLoadable(Exception):
    """A load does not pass the rules; `failure` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(code, message)


@dataclass(frozen=True, slots=True)
class CheckInput:
    """The input of the check of a version's files.

    Attributes:
        rules: of the model, where it is to be loaded.
        model_id: the model.
        model: as its events say; None if there was none.
        contents: of the files, as the store has hashed its copy.
        read: returns the content of one of them.
        now: the time of the load.
        is_reload: whether the files are those of a load before.
        is_signed: says whether a trusted node has signed a statement.
    """

    rules: ModelRules
    model_id: str
    model: Model | None
    contents: Contents
    read: Callable[[str], bytes]
    now: Timestamp
    is_reload: bool
    is_signed: IsSigned

    @property
    def digest(self) -> str:
        return digest_of(self.contents)

    @property
    def admitted(self) -> AdmittedBytes | None:
        """The checks that these bytes passed before; None without any that a trusted node has signed."""
        found = None if self.model is None else self.model.find_admitted(self.digest)
        if found is None or not self.is_signed(load_statement(self.model_id, found), found.node_signature):
            return None
        return found


@dataclass(frozen=True, slots=True)
class CheckedLoad:
    """A load that passes the rules, as `ModelLoaded` has it; without `approval` a person is to be asked.

    `bundle` is UNSET if the ledger has it from a load of the same bytes.
    """

    signature: LoadSignature | UnsetType
    bundle: str | UnsetType
    approval: LoadApproval | UnsetType | None


def check_load(given: CheckInput, job: Job) -> CheckedLoad:
    """Check a load against its model's rules.

    Raises:
        NotLoadable: `policy_differs`, `signature_missing`, `signature_invalid`, `signature_untrusted`,
            `signature_mismatch`, `signature_unsupported`, `approval_void`, `approval_required`.
    """
    accepted = job.policy_digest
    if accepted != given.rules.digest:
        what = f"the load was accepted under rules with the digest {accepted or 'none'}"
        raise NotLoadable(POLICY_DIFFERS, f"{what}, and {given.rules.digest} are in force: load it again")
    signature, bundle = check_signatures(given) if given.rules.trust else (UNSET, UNSET)
    return CheckedLoad(signature, bundle, find_approval(given, job))


def check_signatures(given: CheckInput) -> tuple[LoadSignature, str | UnsetType]:
    """Return the signature under all rules, and the bundle unless the ledger has it.

    Raises:
        NotLoadable: a code that begins with `signature_`.
    """
    rules, read = given.rules, cache(given.read)
    distrusted = tuple({key for rule in rules.trust for key in rule.distrusted})
    before = None if given.admitted is None else given.admitted.signature or None
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
    is_known = before is not None and before.bundle == bundle
    return signature, UNSET if is_known else content.decode()


def find_approval(given: CheckInput, job: Job) -> LoadApproval | UnsetType | None:
    """Return the approval of a load; UNSET if it needs none, None if a person is to be asked.

    Raises:
        NotLoadable: `approval_void`, `approval_required`.
    """
    rule, admitted, state = given.rules.approval_digest, given.admitted, job.approval
    if rule is None:
        return UNSET
    if state is not None and state.is_given:
        if (state.digest, state.rule) != (given.digest, rule):
            what = f"{state.digest} were approved, and the files are now {given.digest}"
            raise NotLoadable(APPROVAL_VOID, f"{what}: load it again, to ask once more")
        for answer in state.answers:
            statement = answer_statement(job, state.digest, state.rule, answer)
            if not given.is_signed(statement, answer.node_signature):
                what = f"no trusted node has signed the answer of {answer.by!r}"
                raise NotLoadable(APPROVAL_VOID, f"{what}: load it again, to ask once more")
        result = ApprovalResult.BYPASSED if state.is_bypassed else ApprovalResult.APPROVED
        return LoadApproval(rule, result, tuple(answer.by for answer in state.answers))
    if admitted is not None and admitted.is_approved_under(rule):
        return LoadApproval(rule, ApprovalResult.APPROVED_BEFORE)
    if given.is_reload:
        if admitted is None and not _is_proven(given):
            what = "no trusted node has signed that it loaded these files before"
            advice = "a person has to load this version, and another to approve it"
            raise NotLoadable(APPROVAL_REQUIRED, f"{what}: {advice}")
        return LoadApproval(rule, ApprovalResult.RELOAD)
    if job.cause is Cause.DEMAND:
        raise NotLoadable(APPROVAL_REQUIRED, "a person has to load this version, and another to approve it")
    return None


def _is_proven(given: CheckInput) -> bool:
    """Whether a trusted node has signed the load that a reload brings back, with or without rules."""
    loads = () if given.model is None else given.model.reloadable
    return any(
        given.is_signed(load_statement(given.model_id, each.passed), each.node_signature)
        for each in loads
        if digest_of(contents_of(each.files)) == given.digest
    )
