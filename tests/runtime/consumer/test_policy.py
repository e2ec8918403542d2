"""Loads under rules: signatures and approvals with real files, real workers and a real ledger."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import UNSET, structs
from support import models
from support.running import Engine, Run, code_of, error_of, job_of
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


def under(*, trust: tuple[TrustRule, ...] = (), approval: tuple[ApprovalRule, ...] = ()) -> Policy:
    return Policy(2, loads=LoadPolicy(trust, approval))


def sign(folder: Path, version: int = 1, *, key: Any = KEY) -> Path:
    return sign_folder(folder / "models" / "adder" / str(version), key)


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


async def test_signed_version_loads_and_records_who_signed(folder: Path, run: Run) -> None:
    bundle = sign(folder)
    async with run(policy=under(trust=(ENFORCE,))) as engine:
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
        other_rules = await engine.submit_load("adder", 2, policy="00" * 32)
        assert code_of(await engine.ended(job_of(other_rules))) == "policy_differs"


def change_file(folder: Path, version: int = 1) -> None:
    sign(folder, version)
    models.save(models.add(7), folder / "models", "adder", version)


def add_file(folder: Path, version: int) -> None:
    sign(folder, version)
    (folder / "models" / "adder" / str(version) / "extra.bin").write_bytes(b"x")


def break_bundle(folder: Path, version: int) -> None:
    bundle = sign(folder, version)
    bundle.write_bytes(bundle.read_bytes()[:-20])


REFUSED: list[tuple[Callable[[Path, int], object], str, str]] = [
    (lambda *_: None, "signature_missing", ""),
    (lambda folder, version: sign(folder, version, key=OTHER), "signature_untrusted", ""),
    (change_file, "signature_mismatch", ""),
    (add_file, "signature_mismatch", "extra.bin"),
    (break_bundle, "signature_invalid", ""),
]
"""A change of a version, the code of its load, and a name in the message."""


async def test_version_without_trusted_signature_starts_no_worker(folder: Path, run: Run) -> None:
    for version, (happens, _, _) in enumerate(REFUSED, 1):
        models.save(models.add(), folder / "models", "adder", version)
        happens(folder, version)
    async with run(policy=under(trust=(ENFORCE,))) as engine:
        for version, (_, code, name) in enumerate(REFUSED, 1):
            error = error_of(await engine.load("adder", version))
            assert (error.code, name in error.message) == (code, True)
        assert await engine.facts(LoadStarted) == []
        assert engine.worker_pids() == []
        assert (await engine.load("other")).status is JobStatus.COMPLETED  # no rule is for it


async def test_warn_loads_and_records_the_problem(folder: Path, run: Run) -> None:
    change_file(folder)
    rule = TrustRule(("a*",), TrustMode.WARN, (public_pem(KEY),))
    async with run(policy=under(trust=(rule,))) as engine:
        assert (await engine.load("adder", 1)).status is JobStatus.COMPLETED
        found = await signature_of(engine)
        assert (found.problem, found.signer, found.is_enforced) == ("signature_mismatch", None, False)


async def test_reload_goes_on_after_key_was_exchanged(folder: Path, run: Run) -> None:
    sign(folder)
    async with run(policy=under(trust=(structs.replace(ENFORCE, mode=TrustMode.WARN),))) as engine:
        await engine.load("adder", 1)
    async with run(policy=under(trust=(ENFORCE,))) as engine:
        await engine.becomes("adder", ModelState.LOADED)  # which enforces what only warned before
    exchanged = structs.replace(ENFORCE, keys=(public_pem(OTHER),))
    async with run(policy=under(trust=(exchanged,))) as engine:
        await engine.becomes("adder", ModelState.LOADED)
        signature = await signature_of(engine)
        assert (signature.was_verified, signature.is_enforced) == (True, True)
        await engine.unload("adder")
        job = await engine.load("adder", 1)
        assert code_of(job) == "signature_untrusted"  # a person's load obeys today's rules


async def test_reload_without_trusted_signature_is_refused(folder: Path, run: Run) -> None:
    """Of a key that is distrusted since, and of a model for which there was no rule."""
    sign(folder)
    async with run(policy=under(trust=(ENFORCE,))) as engine:
        for name in ("adder", "other"):
            await engine.load(name, 1)
    distrust = structs.replace(ENFORCE, distrusted=(key_digest(ENFORCE.keys[0]),))
    new = structs.replace(ENFORCE, models=("other",))
    async with run(policy=under(trust=(distrust, new))) as engine:
        for name, code in (("adder", "signature_untrusted"), ("other", "signature_missing")):
            model = await engine.becomes(name, ModelState.FAILED)
            assert model.error is not None
            assert model.error.code == code


# Approval.

ASKS = under(approval=(ApprovalRule(("adder",)),))


async def refusal_of(engine: Engine, version: int = 1, parameters: LoadParameters | None = None) -> str:
    return code_of(await engine.load("adder", version, parameters)) or "none"


async def test_unapproved_load_fails_at_once_and_touches_nothing(run: Run) -> None:
    async with run(policy=ASKS) as engine:
        await engine.approve("adder", 1)
        await engine.load("adder", 1)
        served = engine.model("adder").serving
        for strategy in ("beside", "in_place"):
            assert await refusal_of(engine, 2, LoadParameters(strategy=strategy)) == NOT_APPROVED
        assert engine.model("adder").serving == served
        assert len(await engine.facts(LoadStarted)) == 1
        assert await engine.facts(UnloadRequested) == []
        assert await engine.ask("adder", 1) == 2


async def test_approval_is_of_bytes_and_holds_for_each_load(folder: Path, run: Run) -> None:
    async with run(policy=ASKS) as engine:
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


async def test_load_that_waits_is_refused_when_its_approval_is_withdrawn(run: Run) -> None:
    async with run(policy=replace(ASKS, loads_at_once=1)) as engine:
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


async def test_withdrawn_version_serves_on_and_comes_back(folder: Path, run: Run) -> None:
    async with run(policy=ASKS) as engine:
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


async def test_rule_on_a_running_server_takes_no_model_away(folder: Path, run: Run) -> None:
    async with run() as engine:
        for name in ("adder", "other"):
            assert (await engine.load(name)).status is JobStatus.COMPLETED
    rules = LoadPolicy(approval=(ApprovalRule(("*",)),))
    async with run(policy=Policy(2, loads=rules)) as engine:
        await engine.log.submit(Record((Draft(uuid7(), PolicyInForce(rules), SYSTEM),)))
        for name in ("adder", "other"):
            await engine.becomes(name, ModelState.LOADED)
        await engine.die("other")
        await engine.becomes("other", ModelState.LOADED)
        assert await engine.ask("other", 1) == 101
        await engine.unload("other")
        assert code_of(await engine.load("other")) == NOT_APPROVED
        await engine.approve("other")
        assert (await engine.load("other")).status is JobStatus.COMPLETED
    verification = verify(folder / "ledger.db")
    assert verification.verified, verification.finding
    kinds = [remark.kind for remark in verification.remarks]
    assert kinds == [*[RemarkKind.RELOADED] * 3, RemarkKind.NO_ADDER]


async def test_emergency_passes_without_approval_if_allowed(folder: Path, run: Run) -> None:
    allowed, strict = ApprovalRule(("adder",), emergency=True), ApprovalRule(("other",), emergency=False)
    content = (folder / "models" / "adder" / "1" / "model.onnx").read_bytes()
    digest = digest_of((("model.onnx", hashlib.sha256(content).hexdigest()),))
    said = Justification(Credential(), emergency="the old version answers nonsense", digest=digest)
    async with run(policy=under(approval=(allowed, strict))) as engine:

        async def try_load(model_id: str, version: int) -> str | None:
            receipt = await engine.submit_load(model_id, version, justification=said)
            return code_of(await engine.ended(job_of(receipt)))

        assert await try_load("other", 1) == "emergency_forbidden"
        assert await try_load("adder", 1) is None
        assert (await approval_of(engine)).result is ApprovalResult.BYPASSED
        await engine.unload("adder")
        assert await refusal_of(engine) == NOT_APPROVED  # bypassed is not approved
        assert await try_load("adder", 2) == "model_changed"
