"""Whether the bytes of a version have the approval that its model's rules require. Pure."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from events.jobs import Job
from events.statements import emergency_statement
from events.types import SYSTEM, Justification
from features.approvals.commands import ApprovedBytes, find_approval
from features.approvals.facts import ApprovalResult, LoadApproval
from features.approvals.rules import NOT_APPROVED
from features.beforeload import CheckedLoad, CheckInput, NotLoadable


def check(given: CheckInput, job: Job | None, passed: CheckedLoad) -> CheckedLoad:
    """Check the approval, if there are rules; see `features.beforeload.Check`."""
    if job is None:
        if given.rules.persons and not given.is_reload:
            _find_approval(given, SYSTEM, given.version)
        return passed
    approval = check_approval(given, job)
    if approval is UNSET or not approval.positions:
        return passed.add(approval=approval)
    approved = ApprovedBytes(job.model_id, given.digest, job.requested_by, approval.positions)
    return passed.add(approved, approval=approval)


def check_approval(given: CheckInput, job: Job) -> LoadApproval | UnsetType:
    """Return the approval of a load, or UNSET if its rules require none.

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
    """Whether a trusted server has confirmed that the requester has the role `emergency`."""
    statement = emergency_statement(job.id, job.model_id, job.version, job.requested_by, said)
    return given.is_signed(statement, said.server_signature)
