"""The checks before a load, in their order: each sees what those before have passed."""

from __future__ import annotations

from dataclasses import replace

from msgspec import Struct

from events.jobs import POLICY_DIFFERS, Failure, Job
from events.types import hashes_of
from events.values import FileHash
from features.approvals import check as approvals
from features.beforeload import Check, CheckedLoad, CheckInput, NotLoadable
from features.facts import RecordedEvidence
from features.signatures import check as signatures

CHECKS: tuple[Check, ...] = (signatures.check, approvals.check)


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
    passed = CheckedLoad()
    for check in CHECKS:
        passed = check(given, job, passed)
    return passed


class CheckedVersion(Struct, frozen=True):
    """The checks that a load of a version would pass.

    Attributes:
        files: path and SHA-256 of each.
        evidence: of the checks that a load would pass, before one refuses it.
        problem: why a load would be refused, whoever asks for it; None if it would not.
        added_by: all who added these files; None if the ledger has nobody.
    """

    version: int
    digest: str
    files: tuple[FileHash, ...]
    evidence: RecordedEvidence
    problem: Failure | None
    added_by: tuple[str, ...] | None


def survey_version(given: CheckInput, version: int) -> CheckedVersion:
    """Check files that are not to be loaded now; for errors see `CheckInput.read`."""
    passed, problem = CheckedLoad(), None
    try:
        for check in CHECKS:
            passed = check(replace(given, version=version), None, passed)
    except NotLoadable as refused:
        problem = refused.failure
    adders = tuple(given.versions.list_adders(given.digest)) or None
    files = hashes_of(given.contents)
    return CheckedVersion(version, given.digest, files, passed.evidence, problem, adders)
