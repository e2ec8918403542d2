"""Loads under rules: signatures and approvals with real files, real workers and a real ledger."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET
from support import models
from support.running import Engine, code_of, error_of, job_of, running, save_models, stopped_clock
from support.signing import make_key, public_pem, sign_folder

from events.errors import RequestRefused
from events.jobs import JobStatus
from events.models import ModelState
from events.policy.rules import ApprovalRule, LoadPolicy, TrustMode, TrustRule
from events.policy.signatures import key_digest
from events.types import (
    ApprovalAsked,
    ApprovalBypassed,
    ApprovalResult,
    Credential,
    Justification,
    LoadApproval,
    LoadSignature,
    LoadStarted,
    ModelLoaded,
    digest_of,
)
from runtime.scheduler.view import Policy

KEY, OTHER = make_key(), make_key()
ENFORCE = TrustRule(("adder",), TrustMode.ENFORCE, (public_pem(KEY),))
APPROVAL = ApprovalRule(("adder",))


def under(*, trust: tuple[TrustRule, ...] = (), approval: tuple[ApprovalRule, ...] = ()) -> Policy:
    return Policy(2, loads=LoadPolicy(trust, approval))


def sign(folder: Path, version: int = 1, *, key: Any = KEY, model_id: str = "adder") -> Path:
    return sign_folder(folder / "models" / model_id / str(version), key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_models(tmp_path)


async def loaded(engine: Engine) -> ModelLoaded:
    return (await engine.facts(ModelLoaded, of="adder"))[-1]


async def signature_of(engine: Engine) -> LoadSignature:
    signature = (await loaded(engine)).signature
    assert signature is not UNSET
    return signature


async def approval_of(engine: Engine) -> LoadApproval:
    approval = (await loaded(engine)).approval
    assert approval is not UNSET
    return approval


async def failure_of(engine: Engine) -> str | None:
    model = await engine.becomes("adder", ModelState.FAILED)
    return None if model.error is None else model.error.code


# Signatures.


async def test_signed_version_loads_and_records_who_signed(folder: Path) -> None:
    bundle = sign(folder)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        assert (await engine.load("adder", 1)).status is JobStatus.COMPLETED
        first, signature = await loaded(engine), await signature_of(engine)
        assert signature.is_enforced
        assert (signature.method, signature.signer) == ("key", key_digest(public_pem(KEY)))
        assert first.bundle == bundle.read_text()
        assert {file.path for file in first.files} == {"1.sig", "model.onnx"}
        assert await engine.ask("adder", 1) == 2
        await engine.unload("adder")
        await engine.load("adder", 1)
        assert (await loaded(engine)).bundle is UNSET  # the ledger has it


def change_file(folder: Path) -> None:
    sign(folder)
    models.save(models.add(7), folder / "models", "adder", 1)


def add_file(folder: Path) -> None:
    sign(folder)
    (folder / "models" / "adder" / "1" / "extra.bin").write_bytes(b"x")


def break_bundle(folder: Path) -> None:
    bundle = sign(folder)
    bundle.write_bytes(bundle.read_bytes()[:-20])


REFUSED = {
    "signature_missing": lambda _: None,
    "signature_untrusted": lambda folder: sign(folder, key=OTHER),
    "signature_mismatch": change_file,
    "signature_invalid": break_bundle,
}


@pytest.mark.parametrize("code", REFUSED)
async def test_version_without_trusted_signature_starts_no_worker(folder: Path, code: str) -> None:
    REFUSED[code](folder)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        assert code_of(await engine.load("adder", 1)) == code
        assert await engine.facts(LoadStarted) == []
        assert engine.worker_pids() == []
        assert (await engine.load("other")).status is JobStatus.COMPLETED  # no rule is for it


async def test_file_that_is_not_signed_is_named(folder: Path) -> None:
    add_file(folder)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        job = await engine.load("adder", 1)
        assert code_of(job) == "signature_mismatch"
        assert "extra.bin" in error_of(job).message


async def test_warn_loads_and_records_the_problem(folder: Path) -> None:
    change_file(folder)
    rule = TrustRule(("a*",), TrustMode.WARN, (public_pem(KEY),))
    async with running(folder, policy=under(trust=(rule,))) as engine:
        assert (await engine.load("adder", 1)).status is JobStatus.COMPLETED
        signature = await signature_of(engine)
        assert (signature.problem, signature.signer, signature.is_enforced) == (
            "signature_mismatch",
            None,
            False,
        )


async def test_load_of_other_rules_is_refused(folder: Path) -> None:
    sign(folder)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        job = await engine.ended(job_of(await engine.submit_load("adder", 1, policy="00" * 32)))
        assert code_of(job) == "policy_differs"


async def test_reload_goes_on_after_key_was_exchanged(folder: Path) -> None:
    sign(folder)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        await engine.load("adder", 1)
    exchanged = replace_keys(OTHER)
    async with running(folder, policy=under(trust=(exchanged,))) as engine:
        await engine.becomes("adder", ModelState.LOADED)
        signature = await signature_of(engine)
        assert (signature.was_verified, signature.is_enforced) == (True, True)
        await engine.unload("adder")
        assert (
            code_of(await engine.load("adder", 1)) == "signature_untrusted"
        )  # a person's load obeys today's


async def test_reload_enforced_the_rule_that_only_warned_before(folder: Path) -> None:
    sign(folder)
    rule = TrustRule(("adder",), TrustMode.WARN, ENFORCE.keys)
    async with running(folder, policy=under(trust=(rule,))) as engine:
        await engine.load("adder", 1)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        await engine.becomes("adder", ModelState.LOADED)
    async with running(folder, policy=under(trust=(replace_keys(OTHER),))) as engine:
        await engine.becomes("adder", ModelState.LOADED)
        assert (await signature_of(engine)).was_verified


async def test_corrected_files_ask_anew_beside_those_that_wait(folder: Path) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,))) as engine:
        first = await engine.ask_load("adder", 1)
        await engine.waiting(first)
        assert await engine.ask_load("adder", 1) == first
        models.save(models.add(9), folder / "models", "adder", 1)
        second = await engine.ask_load("adder", 1)
        await engine.answer(second)
        assert (await engine.ended(second)).status is JobStatus.COMPLETED
        assert code_of(await engine.ended(first)) == "approval_void"


async def test_reload_of_distrusted_key_is_refused(folder: Path) -> None:
    sign(folder)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        await engine.load("adder", 1)
    distrusted = TrustRule(
        ("adder",), TrustMode.ENFORCE, ENFORCE.keys, distrusted=(key_digest(ENFORCE.keys[0]),)
    )
    async with running(folder, policy=under(trust=(distrusted,))) as engine:
        assert await failure_of(engine) == "signature_untrusted"


async def test_reload_of_never_verified_bytes_is_refused(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        assert await failure_of(engine) == "signature_missing"


def replace_keys(key: Any) -> TrustRule:
    return TrustRule(("adder",), TrustMode.ENFORCE, (public_pem(key),))


# Approval.


async def test_load_waits_for_approval_and_goes_on_by_itself(folder: Path) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,))) as engine:
        job_id = await engine.ask_load("adder", 2)
        asked = await engine.waiting(job_id)
        assert (engine.consumer.loads, engine.worker_pids()) == ({}, [])
        assert (await engine.load("other")).status is JobStatus.COMPLETED
        assert "approval by another person" in (
            engine.consumer.waiting_for(engine.log.state.jobs[job_id]) or ""
        )
        await engine.answer(job_id)
        assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
        assert await approval_of(engine) == LoadApproval(asked.rule, ApprovalResult.APPROVED, ("carol",))
        assert await engine.ask("adder", 1) == 3


async def test_bytes_that_were_approved_load_again_without(folder: Path) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,))) as engine:
        for version in (1, 2):
            job_id = await engine.ask_load("adder", version)
            await engine.answer(job_id)
            await engine.ended(job_id)
        assert (await engine.load("adder", 1)).status is JobStatus.COMPLETED
        assert (await approval_of(engine)).result is ApprovalResult.APPROVED_BEFORE
        await engine.die("adder")
        await engine.becomes("adder", ModelState.LOADED)
        assert len(await engine.facts(ApprovalAsked)) == 2
        models.save(models.add(9), folder / "models", "adder", 1)
        await engine.waiting(await engine.ask_load("adder", 1))  # other bytes


async def test_changed_bytes_void_the_approval(folder: Path) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,))) as engine:
        job_id = await engine.ask_load("adder", 1)
        await engine.waiting(job_id)
        models.save(models.add(9), folder / "models", "adder", 1)
        await engine.answer(job_id)
        assert code_of(await engine.ended(job_id)) == "approval_void"
        assert await engine.facts(ModelLoaded) == []


async def test_other_version_served_meanwhile_voids_the_approval(folder: Path) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,))) as engine:
        first, second = [await engine.ask_load("adder", version) for version in (1, 2)]
        await engine.waiting(first)
        await engine.waiting(second)
        await engine.answer(second)
        assert (await engine.ended(second)).status is JobStatus.COMPLETED
        assert code_of(await engine.ended(first)) == "approval_void"


async def test_rejected_load_fails(folder: Path) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,))) as engine:
        job_id = await engine.ask_load("adder", 1)
        await engine.answer(job_id, approves=False)
        job = await engine.ended(job_id)
        assert (code_of(job), error_of(job).message) == ("rejected", "rejected by carol: reviewed")


async def test_load_that_nobody_approves_expires(folder: Path) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,)), clock=stopped_clock()) as engine:
        job_id = await engine.ask_load("adder", 1)
        await engine.waiting(job_id)
        engine.pass_time(86_399)
        assert (await engine.load("other")).status is JobStatus.COMPLETED
        assert engine.log.state.jobs[job_id].waits_for_approval
        engine.pass_time(1)
        assert code_of(await engine.ended(job_id)) == "approval_expired"


@pytest.mark.parametrize("by", ["alice", "ALICE", "\uff41lice", "bob"])
async def test_who_asked_or_joined_cannot_approve(folder: Path, by: str) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,))) as engine:
        job_id = await engine.ask_load("adder", 1)
        await engine.waiting(job_id)
        joined = await engine.submit_load("adder", 1, actor="bob")
        assert (joined.job_id, joined.existing) == (job_id, True)
        with pytest.raises(RequestRefused) as refused:
            await engine.answer(job_id, by)
        assert refused.value.code == "same_person"


async def test_two_approvals_are_of_two_persons(folder: Path) -> None:
    rule = ApprovalRule(("adder",), approvals=2)
    async with running(folder, policy=under(approval=(rule,))) as engine:
        job_id = await engine.ask_load("adder", 1)
        await engine.answer(job_id, "carol")
        await engine.answer(job_id, "Carol")
        assert engine.log.state.jobs[job_id].waits_for_approval
        await engine.answer(job_id, "dave")
        assert (await engine.ended(job_id)).status is JobStatus.COMPLETED


async def test_waiting_load_survives_restart_and_holds_no_turn(folder: Path) -> None:
    policy = under(trust=(replace_keys(KEY),), approval=(APPROVAL,))
    sign(folder, 1), sign(folder, 2)
    async with running(folder, policy=policy) as engine:
        served = await engine.ask_load("adder", 1)
        await engine.answer(served)
        await engine.ended(served)
        job_id = await engine.ask_load("adder", 2)
        await engine.waiting(job_id)
        await engine.die("adder")
        await engine.becomes("adder", ModelState.LOADED)  # the reload goes past it
    async with running(folder, policy=policy) as engine:
        await engine.becomes("adder", ModelState.LOADED)
        await engine.answer(job_id)
        assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
        assert await engine.ask("adder", 1) == 3


async def test_forced_unload_and_new_rules_end_the_wait(folder: Path) -> None:
    async with running(folder, policy=under(approval=(APPROVAL,))) as engine:
        first = await engine.ask_load("adder", 1)
        await engine.answer(first)
        await engine.ended(first)
        second = await engine.ask_load("adder", 2)
        await engine.waiting(second)
        await engine.unload("adder", force=True)
        assert (await engine.ended(second)).status is JobStatus.CANCELLED
        third = await engine.ask_load("adder", 2)
        await engine.waiting(third)
    async with running(folder, policy=under(approval=(replace_rule(APPROVAL, 2),))) as engine:
        assert code_of(await engine.ended(third)) == "policy_differs"


def replace_rule(rule: ApprovalRule, approvals: int) -> ApprovalRule:
    return ApprovalRule(rule.models, approvals)


@pytest.mark.parametrize("allowed", [True, False])
async def test_emergency_passes_without_approval_if_allowed(folder: Path, *, allowed: bool) -> None:
    rule = ApprovalRule(("adder",), emergency=allowed)
    content = (folder / "models" / "adder" / "1" / "model.onnx").read_bytes()
    digest = digest_of((("model.onnx", hashlib.sha256(content).hexdigest()),))
    said = Justification(Credential(), emergency="the old version answers nonsense", digest=digest)
    async with running(folder, policy=under(approval=(rule,))) as engine:
        job = await engine.ended(job_of(await engine.submit_load("adder", 1, justification=said)))
        if not allowed:
            assert code_of(job) == "emergency_forbidden"
            return
        (bypassed,) = await engine.facts(ApprovalBypassed)
        assert bypassed.reason == said.emergency
        assert (await approval_of(engine)).result is ApprovalResult.BYPASSED
        await engine.unload("adder")
        await engine.waiting(await engine.ask_load("adder", 1))  # bypassed is not approved
        others = await engine.submit_load("adder", 2, justification=said)
        assert code_of(await engine.ended(job_of(others))) == "model_changed"


async def test_subject_has_at_most_eight_waiting_loads(folder: Path) -> None:
    rule = ApprovalRule(("*",))
    for number in range(9):
        models.save(models.add(number), folder / "models", f"m{number}")
    async with running(folder, policy=under(approval=(rule,))) as engine:
        for number in range(8):
            await engine.waiting(await engine.ask_load(f"m{number}"))
        assert code_of(await engine.load("m8")) == "queue_full"
        other = await engine.submit_load("m8", actor="bob")
        await engine.waiting(job_of(other))
