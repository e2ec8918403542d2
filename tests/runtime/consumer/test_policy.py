"""Loads under rules: signatures and approvals with real files, real workers and a real ledger."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET, structs
from support import models
from support.running import Engine, code_of, error_of, job_of, running, save_models
from support.signing import make_key, public_pem, sign_folder
from support.workers import until

from events.audit.verify import verify
from events.clock import uuid7
from events.commands import Record
from events.jobs import JobStatus
from events.models import ModelState
from events.types import (
    SYSTEM,
    Draft,
    Justification,
    LoadParameters,
    LoadStarted,
    ModelLoaded,
    PolicyInForce,
    UnloadRequested,
    digest_of,
)
from events.values import Credential
from features.approvals.facts import ApprovalResult, LoadApproval
from features.approvals.rules import NOT_APPROVED, ApprovalRule
from features.audit import RemarkKind
from features.rules import LoadPolicy
from features.signatures.facts import LoadSignature
from features.signatures.rules import TrustMode, TrustRule
from features.signatures.verification import key_digest
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


@pytest.mark.parametrize(
    ("happens", "code", "names"),
    [
        (lambda _: None, "signature_missing", ""),
        (lambda folder: sign(folder, key=OTHER), "signature_untrusted", ""),
        (change_file, "signature_mismatch", ""),
        (add_file, "signature_mismatch", "extra.bin"),
        (break_bundle, "signature_invalid", ""),
    ],
)
async def test_version_without_trusted_signature_starts_no_worker(
    folder: Path, happens: Callable[[Path], object], code: str, names: str
) -> None:
    happens(folder)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        job = await engine.load("adder", 1)
        assert code_of(job) == code
        assert names in error_of(job).message
        assert await engine.facts(LoadStarted) == []
        assert engine.worker_pids() == []
        assert (await engine.load("other")).status is JobStatus.COMPLETED  # no rule is for it


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


@pytest.mark.parametrize("mode", [TrustMode.WARN, TrustMode.ENFORCE])
async def test_reload_goes_on_after_key_was_exchanged(folder: Path, mode: TrustMode) -> None:
    sign(folder)
    async with running(folder, policy=under(trust=(structs.replace(ENFORCE, mode=mode),))) as engine:
        await engine.load("adder", 1)
    async with running(folder, policy=under(trust=(ENFORCE,))) as engine:
        await engine.becomes("adder", ModelState.LOADED)  # which enforces what only warned before
    exchanged = structs.replace(ENFORCE, keys=(public_pem(OTHER),))
    async with running(folder, policy=under(trust=(exchanged,))) as engine:
        await engine.becomes("adder", ModelState.LOADED)
        signature = await signature_of(engine)
        assert (signature.was_verified, signature.is_enforced) == (True, True)
        await engine.unload("adder")
        job = await engine.load("adder", 1)
        assert code_of(job) == "signature_untrusted"  # a person's load obeys today's rules


DISTRUST = structs.replace(ENFORCE, distrusted=(key_digest(ENFORCE.keys[0]),))


@pytest.mark.parametrize(
    ("is_signed", "before", "rule", "code"),
    [
        pytest.param(True, (ENFORCE,), DISTRUST, "signature_untrusted", id="distrusted key"),
        pytest.param(False, (), ENFORCE, "signature_missing", id="never verified"),
    ],
)
async def test_reload_without_trusted_signature_is_refused(
    folder: Path, before: tuple[TrustRule, ...], rule: TrustRule, code: str, *, is_signed: bool
) -> None:
    if is_signed:
        sign(folder)
    async with running(folder, policy=under(trust=before)) as engine:
        await engine.load("adder", 1)
    async with running(folder, policy=under(trust=(rule,))) as engine:
        model = await engine.becomes("adder", ModelState.FAILED)
        assert model.error is not None
        assert model.error.code == code


# Approval.

ASKS = under(approval=(APPROVAL,))


async def refusal_of(engine: Engine, version: int = 1, parameters: LoadParameters | None = None) -> str:
    return code_of(await engine.load("adder", version, parameters)) or "none"


async def test_unapproved_load_fails_at_once_and_touches_nothing(folder: Path) -> None:
    async with running(folder, policy=ASKS) as engine:
        await engine.approve("adder", 1)
        await engine.load("adder", 1)
        served = engine.model("adder").serving
        for strategy in ("beside", "in_place"):
            assert await refusal_of(engine, 2, LoadParameters(strategy=strategy)) == NOT_APPROVED
        assert engine.model("adder").serving == served
        assert len(await engine.facts(LoadStarted)) == 1
        assert await engine.facts(UnloadRequested) == []
        assert await engine.ask("adder", 1) == 2


async def test_approval_is_of_bytes_and_holds_for_each_load(folder: Path) -> None:
    async with running(folder, policy=ASKS) as engine:
        await engine.approve("adder", 1)
        for _ in range(2):
            assert (await engine.load("adder", 1)).status is JobStatus.COMPLETED
            approval = await approval_of(engine)
            assert (approval.result, approval.by, approval.positions) == ("approved", ("carol",), (2,))
            await engine.unload("adder")
        models.save(models.add(9), folder / "models", "adder", 1)
        assert await refusal_of(engine) == NOT_APPROVED
        models.save(models.add(1), folder / "models", "adder", 1)
        assert (await engine.load("adder", 1)).status is JobStatus.COMPLETED


async def test_load_that_waits_is_refused_when_its_approval_is_withdrawn(folder: Path) -> None:
    async with running(folder, policy=replace(ASKS, loads_at_once=1)) as engine:
        await engine.approve("adder", 1)
        slow = await engine.ask_load("slow")
        await engine.loading("slow")
        waiting = await engine.ask_load("adder", 1)
        await until(
            lambda: "estimate" not in (engine.consumer.waiting_for(engine.job(waiting)) or "estimate")
        )
        await engine.withdraw("adder")
        await engine.unload("slow", force=True)
        await engine.ended(slow)
        assert code_of(await engine.ended(waiting)) == NOT_APPROVED
        assert await engine.facts(LoadStarted, of="adder") == []


async def test_withdrawn_version_serves_on_and_comes_back(folder: Path) -> None:
    async with running(folder, policy=ASKS) as engine:
        for version in (1, 2):
            await engine.approve("adder", version)
        await engine.load("adder", 1)
        await engine.withdraw("adder", 1)
        await engine.die("adder")
        await engine.becomes("adder", ModelState.LOADED)
        assert (await approval_of(engine)).result is ApprovalResult.RELOAD
        models.save(models.crash_on_load(), folder / "models", "adder", 3)
        await engine.approve("adder", 3)
        await engine.load("adder", 3, LoadParameters(strategy="in_place"))  # it fails, and version 1 is back
        await engine.becomes("adder", ModelState.LOADED)
        pinned = await engine.submit_load("adder", 1, LoadParameters(pinned=True), {"pinned"})
        assert code_of(await engine.ended(job_of(pinned))) == NOT_APPROVED
        assert await engine.ask("adder", 1) == 2
        await engine.unload("adder")
        assert await refusal_of(engine) == NOT_APPROVED


async def test_rule_on_a_running_server_takes_no_model_away(folder: Path) -> None:
    names = [f"m{number:02}" for number in range(3)]
    for number, name in enumerate(names):
        models.save(models.add(number), folder / "models", name)
    async with running(folder) as engine:
        for name in names:
            assert (await engine.load(name)).status is JobStatus.COMPLETED
    rules = LoadPolicy(approval=(ApprovalRule(("m*",)),))
    async with running(folder, policy=Policy(2, loads=rules)) as engine:
        await engine.log.submit(Record((Draft(uuid7(), PolicyInForce(rules), SYSTEM),)))
        for name in names:
            await engine.becomes(name, ModelState.LOADED)
        await engine.die("m01")
        await engine.becomes("m01", ModelState.LOADED)
        assert await engine.ask("m01", 1) == 2
        await engine.unload("m01")
        assert code_of(await engine.load("m01")) == NOT_APPROVED
        await engine.approve("m01")
        assert (await engine.load("m01")).status is JobStatus.COMPLETED
    verification = verify(folder / "ledger.db")
    assert verification.verified, verification.finding
    kinds = [remark.kind for remark in verification.remarks]
    assert kinds == [*[RemarkKind.RELOADED] * 4, RemarkKind.NO_ADDER]


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
        assert (await approval_of(engine)).result is ApprovalResult.BYPASSED
        await engine.unload("adder")
        assert await refusal_of(engine) == NOT_APPROVED  # bypassed is not approved
        others = await engine.submit_load("adder", 2, justification=said)
        assert code_of(await engine.ended(job_of(others))) == "model_changed"
