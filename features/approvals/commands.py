"""Approval of bytes: its givers, the approvals that a load rests on, and signed statements. Pure.

An approval is a fact about a model and the digest of all files (`events.versions`); a load asks for it before
it starts, and never waits. Two subjects are one person if they differ only in case or in forms of the same
letters, whatever the issuers of their tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from answers.approvals import UnapprovedVersion
from events.commands import Accepted, Command, Condition, Decision, DecisionInput, Existing, Refused
from events.models import Model
from events.state import State
from events.statements import IsSigned, Sign
from events.tokens import add_issuers
from events.types import SYSTEM, Contents, Draft, hashes_of, record_draft
from events.values import Credential
from events.versions import ModelVersions
from features.approvals.facts import ApprovalResult, ApprovalWithdrawn, LoadApproval, VersionApproved
from features.approvals.fold import Approval, make_approval
from features.approvals.rules import NOT_APPROVED
from features.rules import ModelRules

# Valid approvals.


def is_same_person(subject: str, other: str) -> bool:
    return _fold_subject(subject) == _fold_subject(other)


def _fold_subject(subject: str) -> str:
    folded = unicodedata.normalize("NFKC", subject).casefold()
    return unicodedata.normalize("NFKC", folded).strip()  # folding may decompose a letter


def find_same_person(subjects: Iterable[str], others: Iterable[str]) -> str | None:
    """Return the first of some subjects that is the same person as another subject."""
    folded = {_fold_subject(each) for each in others}
    return next((each for each in subjects if _fold_subject(each) in folded), None)


def list_valid_approvals(
    versions: ModelVersions, digest: str, requester: str, is_signed: IsSigned = lambda _, __: True
) -> list[Approval]:
    """Return the valid approvals of bytes for a load, the oldest first, each of another person.

    No approval counts by a person who added the bytes or requests the load, or with a token issued by one.
    """
    excluded = [*versions.list_adders(digest), requester]
    counted = list[Approval]()
    for each in versions.approvals:
        if each.digest != digest or find_same_person(each.people, excluded) is not None:
            continue
        if any(
            find_same_person(each.people, [one.by]) or find_same_person([each.by], one.people)
            for one in counted
        ):
            continue
        if is_signed(approval_statement(versions.id, each), each.server_signature):
            counted.append(each)
    return counted


class ApprovedBytes(Condition, frozen=True, gc=False):
    """The given approvals of bytes are still valid for the load of a requester."""

    model_id: str
    digest: str
    requester: str
    positions: tuple[int, ...]

    def holds(self, state: State) -> bool:
        versions = state.registers.find_versions(self.model_id)
        named = tuple(each for each in versions.approvals if each.position in self.positions)
        counted = list_valid_approvals(replace(versions, approvals=named), self.digest, self.requester)
        return {*self.positions} == {each.position for each in counted}


def find_approval(
    versions: ModelVersions, rules: ModelRules, digest: str, requester: str, is_signed: IsSigned
) -> LoadApproval | str:
    """Return the approval that a load of bytes rests on, or what is missing and who may give it."""
    adders, files = versions.list_adders(digest), f"the files {digest}"
    if rules.needs_adder and not adders:
        return f"the ledger does not have who added {files}: `loadledger add` records it"
    counted = list_valid_approvals(versions, digest, requester, is_signed)[: rules.persons]
    if missing := rules.persons - len(counted):
        plural = "" if missing == 1 else "s"
        asks = [] if requester == SYSTEM else [f"{requester!r}, who asks for the load"]
        others = " and ".join([*(f"{name!r}, who added them" for name in adders if name != requester), *asks])
        return f"{files} need {missing} more approval{plural}" + (
            f", by others than {others}" if others else ""
        )
    by, positions = tuple(each.by for each in counted), tuple(each.position for each in counted)
    return LoadApproval(rules.approval_digest or "", ApprovalResult.APPROVED, by, positions)


def list_unapproved(
    model: Model | None, versions: ModelVersions, rules: ModelRules | None
) -> list[UnapprovedVersion]:
    """Return the versions of a model that wait for an approval, newest first."""
    if rules is None or not rules.persons:
        return []
    approved_at = max((each.position for each in versions.approvals), default=0)
    is_refused = model is not None and model.error is not None and model.error.code == NOT_APPROVED
    refused = [model.last_version] if model is not None and is_refused else []
    new = [each.version for each in reversed(versions.added) if each.position > approved_at]
    found = []
    for version in dict.fromkeys([*refused, *new]):
        if version is None or version in versions.removed:
            continue
        added = versions.find_added(version)
        named = [each.digest for each in reversed(versions.approvals) if each.version == version]
        digest = added.digest if added is not None else next(iter(named), None)
        if digest is None or len(list_valid_approvals(versions, digest, SYSTEM)) < rules.persons:
            by, position = (None, None) if added is None else (added.by, added.position)
            refusal = version in refused
            found.append(
                UnapprovedVersion(
                    version=version, digest=digest, is_refused=refusal, added_by=by, position=position
                )
            )
    return found


# Commands of persons.


@dataclass(frozen=True, slots=True)
class ApproveVersion(Command):
    """Approve the bytes of a version, which the caller has found in the repository.

    Attributes:
        files: path and SHA-256 of each, as the server has hashed them.
        digest: the digest of the files.
        credential: the person's; the issuers of its token are added.
        sign: signs for this server among several; None for a server alone.
    """

    model_id: str
    version: int
    digest: str
    files: Contents
    actor: str
    reason: str
    credential: Credential
    sign: Sign | None = None

    def decide(self, at: DecisionInput) -> Decision:
        versions, model = at.state.registers.find_versions(self.model_id), at.state.models.get(self.model_id)
        added = versions.find_added(self.version)
        if added is not None and added.digest != self.digest:
            what = f"version {self.version} was added with the digest {added.digest}, not {self.digest}"
            return Refused("digest_differs", f"{what}: look at its files again")
        credential = add_issuers(self.credential, at.state.registers.tokens)
        people = self.actor, *credential.issued_by
        if (shared := find_same_person(people, versions.list_adders(self.digest))) is not None:
            issued = "" if shared == self.actor else "issued your token and "
            what = f"{shared!r} {issued}added these files"
            return Refused("same_person", f"{what}: another person has to approve them")
        for each in versions.approvals:
            is_same = each.digest == self.digest and each.issued_by == credential.issued_by
            if is_same and is_same_person(each.by, self.actor):
                statement = approval_statement(self.model_id, each)
                # With another signature, it may be invalid.
                if self.sign is None or self.sign(statement) == each.server_signature:
                    return Existing(None)
        serving = None if model is None else model.serving
        data = VersionApproved(
            self.digest,
            hashes_of(self.files),
            self.reason,
            credential,
            None if serving is None else serving.version,
            None if serving is None else serving.digest,
        )
        draft = Draft(at.new_id(), data, self.actor, None, self.model_id, self.version)
        if self.sign is not None:
            said = make_approval(record_draft(draft, 0, ""), data)
            signature = self.sign(approval_statement(self.model_id, said))
            draft = replace(draft, data=replace(data, server_signature=signature))
        return Accepted((draft,))


@dataclass(frozen=True, slots=True)
class WithdrawApproval(Command):
    """Withdraw all approvals of the present bytes of a version, or of bytes approved under its number."""

    model_id: str
    version: int
    actor: str
    reason: str
    credential: Credential

    def decide(self, at: DecisionInput) -> Decision:
        versions, model = at.state.registers.find_versions(self.model_id), at.state.models.get(self.model_id)
        added, held = versions.find_added(self.version), () if model is None else model.held
        own = {each.digest for each in held if each.version == self.version}
        own |= set() if added is None else {added.digest}
        named = (each for each in versions.approvals if each.version == self.version or each.digest in own)
        digests = dict.fromkeys(each.digest for each in named)
        if not digests:
            name = f"version {self.version} of model '{self.model_id}'"
            return Refused("unknown_approval", f"{name} is not approved: there is nothing to withdraw")
        credential = add_issuers(self.credential, at.state.registers.tokens)
        about = self.actor, None, self.model_id, self.version
        return Accepted(
            tuple(
                Draft(at.new_id(), ApprovalWithdrawn(each, self.reason, credential), *about)
                for each in digests
            )
        )


def approval_statement(model_id: str, said: Approval) -> bytes:
    """Return the bytes that the server of an approval signs, like `events.statements`."""
    what = "loadledger-approval-v1", said.event_id, model_id, said.version, said.digest
    return msgspec.json.encode((*what, said.by, said.reason, said.jti, said.issuer, said.issued_by))
