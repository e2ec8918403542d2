"""Checks a load against its model's rules before it may start: its files are copied, hashed, then checked.

The load then takes exactly these files, by their hashes. `events.policy.checks` decides; this reads files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.approvals import emergency_statement, find_waiting_refusal
from events.clock import Timestamp, add_seconds, uuid7
from events.jobs import Failure, Job
from events.policy.bundles import MAX_BYTES
from events.policy.checks import CheckedLoad, CheckInput, IsSigned, NotLoadable, check_load, check_signatures
from events.policy.rules import ModelRules
from events.state import State
from events.types import (
    SYSTEM,
    ApprovalAsked,
    ApprovalBypassed,
    Contents,
    Draft,
    FileHash,
    Justification,
    LoadedFile,
    LoadSignature,
    digest_of,
)
from runtime.repository import REQUEST_LIMIT_S
from runtime.store.versions import Versions

MakeInput = Callable[[Contents, Callable[[str], bytes]], CheckInput]
"""Returns the input of a check of contents, with a function that reads one of the files."""


async def check_files(
    versions: Versions,
    job: Job,
    expected: Sequence[LoadedFile] | None,
    make_input: MakeInput,
) -> tuple[tuple[LoadedFile, ...], CheckedLoad]:
    """Copy and hash a version, and check it; returns its files and what they passed.

    `expected` are the files that a reload must have; None takes the present ones.

    Raises:
        NotLoadable: as `events.policy.checks.check_load`.
        RuntimeProblem: as `Versions.version`.
        RuntimeError: there is no store, so files might change after the check; the server refuses to start.
    """
    if versions.store is None:
        raise RuntimeError("rules need a store")
    version, _ = job.load_order
    async with versions.version(job.model_id, version, expected) as held:
        contents = await held.hash()
        await held.settle()
        given = make_input(contents, partial(_read_bundle, held.folder))
        return held.loaded_files, await asyncio.to_thread(check_load, given, job)


class ApprovalNeed(StrEnum):
    """Whether a load of a version's present files would wait for approval."""

    NOT_NEEDED = "not_needed"
    APPROVED_BEFORE = "approved_before"
    REQUIRED = "required"


class CheckedVersion(Struct, frozen=True):
    """The checks that a load would pass; `signature` is None without a rule for it, or with a problem."""

    version: int
    digest: str
    files: tuple[FileHash, ...]
    signature: LoadSignature | None
    problem: Failure | None
    approval: ApprovalNeed


async def check_version(
    versions: Versions,
    model_id: str,
    version: int | None,
    make_input: MakeInput,
) -> CheckedVersion:
    """Hash the files of a version, by default the highest, and check them against the rules; loads nothing.

    Raises:
        RuntimeProblem: as `Versions.version`.
    """
    find = partial(versions.repository.find_version, model_id, version)
    chosen = await versions.repository.file_system.run(model_id, find, REQUEST_LIMIT_S)
    async with versions.version(model_id, chosen) as held:
        given = make_input(await held.hash(), partial(_read_bundle, held.folder))
        return await asyncio.to_thread(check_contents, given, chosen)


def check_contents(given: CheckInput, version: int) -> CheckedVersion:
    """Check files that are not to be loaded now; `given.read` may raise OSError or RuntimeProblem."""
    signature, problem, need = None, None, ApprovalNeed.NOT_NEEDED
    try:
        if given.rules.trust:
            signature, _ = check_signatures(given)
    except NotLoadable as refused:
        problem = refused.failure
    if (rule := given.rules.approval_digest) is not None:
        is_approved = given.admitted is not None and given.admitted.is_approved_under(rule)
        need = ApprovalNeed.APPROVED_BEFORE if is_approved else ApprovalNeed.REQUIRED
    return CheckedVersion(version, given.digest, _hashes_of(given.contents), signature, problem, need)


def _hashes_of(contents: Contents) -> tuple[FileHash, ...]:
    return tuple(FileHash(path, sha256) for path, sha256 in contents)


def _read_bundle(folder: Path, path: str) -> bytes:
    with (folder / path).open("rb") as file:  # of the store: nobody else writes there
        return file.read(MAX_BYTES + 1)


def draft_question(
    job: Job,
    rules: ModelRules,
    signature: LoadSignature | UnsetType,
    contents: Contents,
    *,
    state: State,
    now: Timestamp,
    is_signed: IsSigned,
) -> Draft | Failure:
    """Return `ApprovalAsked`, or `ApprovalBypassed` of an emergency, or why nobody can be asked now."""
    digest, rule = digest_of(contents), rules.approval_digest or ""
    said = None if job.policy is UNSET else job.policy.justification
    if said is not None and said.emergency is not None and _is_seen(job, said, is_signed):
        if not rules.allows_emergency:
            return Failure("emergency_forbidden", "its rules allow no emergency: ask for approval instead")
        if digest != said.digest:
            text = f"the emergency was for the files {said.digest or 'of none'}, and the version has {digest}"
            return Failure("model_changed", f"{text}: load it again")
        data = ApprovalBypassed(digest, rule, said.emergency)
        return Draft(uuid7(), data, job.requested_by, job.id, job.model_id, job.version)
    if (refusal := find_waiting_refusal(state, job)) is not None:
        return Failure("queue_full", refusal)
    model, expires_at = state.models.get(job.model_id), add_seconds(now, rules.expires_s)
    asked = ApprovalAsked(_hashes_of(contents), digest, rule, rules.approvals, expires_at, signature)
    if model is not None and (serving := model.serving) is not None:
        asked = replace(asked, served_version=serving.version, served_digest=serving.passed.digest)
    return Draft(uuid7(), asked, SYSTEM, job.id, job.model_id, job.version)


def _is_seen(job: Job, said: Justification, is_signed: IsSigned) -> bool:
    """Whether a trusted node has seen that who asks has the role `emergency`."""
    statement = emergency_statement(job.id, job.model_id, job.version, job.requested_by, said)
    return is_signed(statement, said.node_signature)
