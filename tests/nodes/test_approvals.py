"""Approval of loads by real nodes over PostgreSQL: answers at another node, forgeries, different policies."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import UNSET, UnsetType, structs
from support import models
from support.history import CONTENTS, History, at, model_loaded
from support.http import LocalApi, when
from support.nodes import local_node
from support.postgres import Database
from support.replicas import opened_replica

from events.approvals import AnswerApproval, load_statement
from events.audit.verify import verify
from events.clock import uuid7
from events.commands import Receipt, Record, RequestLoad, RequestUnload
from events.jobs import APPROVAL_VOID, ApprovalState
from events.policy.checks import CheckInput, NotLoadable, find_approval
from events.policy.rules import ApprovalRule, LoadPolicy, ModelRules
from events.types import (
    ApprovalAsked,
    ApprovalResult,
    Cause,
    Credential,
    Draft,
    Justification,
    LoadApproval,
    LoadApproved,
    ModelLoaded,
    NodeSignature,
    digest_of,
)
from server.appkeys import CONSUMER, LOG
from server.cluster import CLUSTER

LIMIT_S = 30
POLICY = LoadPolicy(approval=(ApprovalRule(("m",)),))


def save_model(folder: Path) -> None:
    version = folder / "repository" / "m" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(models.add(1).SerializeToString())


async def request_load(api: LocalApi) -> str:
    """Request a load by the rules that are in force at a node; return its job."""
    rules = api.app[CONSUMER].policy.loads.of("m")
    assert rules is not None
    receipt: Receipt = await api.app[LOG].submit(RequestLoad("m", 1, None, "alice", policy=rules.digest))
    assert receipt.job_id is not None
    return receipt.job_id


async def wait_for_question(api: LocalApi, job_id: str) -> ApprovalState:
    """Wait until a node knows that a load waits for approval, and return of what."""
    log = api.app[LOG]

    def find() -> ApprovalState | None:
        job = log.state.unended_job(job_id)
        return None if job is None else job.approval

    await log.wait_until(lambda: find() is not None, LIMIT_S)
    asked = find()
    assert asked is not None
    return asked


async def approve(api: LocalApi, job_id: str) -> None:
    """Approve a load at a node, as carol."""
    asked = await wait_for_question(api, job_id)
    sign = api.app[CLUSTER].sign
    answer = AnswerApproval(job_id, "carol", asked.digest, "seen", Credential(), approves=True, sign=sign)
    await api.app[LOG].submit(answer)


async def list_results(api: LocalApi) -> list[ApprovalResult]:
    """Return with which approvals the model was loaded, which a node has signed each time."""
    loaded = await api.data_of(ModelLoaded)
    assert all(each.node_signature for each in loaded)
    return [each.approval.result for each in loaded if each.approval]


async def test_load_goes_on_when_approved_at_another_node(ledger: Database, tmp_path: Path) -> None:
    save_model(tmp_path)
    async with (
        local_node(ledger, tmp_path, "a", policy=POLICY) as a,
        local_node(ledger, tmp_path, "b", policy=POLICY) as b,
    ):
        job_id = await request_load(a)
        asked = await wait_for_question(a, job_id)
        (question,) = await a.data_of(ApprovalAsked)
        assert (question.digest, question.approvals) == (asked.digest, 1)
        await approve(b if question.node_id == "a" else a, job_id)
        assert (await a.ended(job_id))["status"] == "completed"
        await a.app[LOG].submit(RequestUnload("m", "alice"))
        await a.model_when("m", state="unloaded")
        assert (await a.ended(await request_load(a)))["status"] == "completed"
        assert await list_results(a) == [ApprovalResult.APPROVED, ApprovalResult.APPROVED_BEFORE]


async def test_load_with_forged_approval_fails(ledger: Database, tmp_path: Path) -> None:
    save_model(tmp_path)
    async with local_node(ledger, tmp_path, "a", policy=POLICY) as a:
        job_id = await request_load(a)
        asked = await wait_for_question(a, job_id)
        forged = LoadApproved(asked.digest, asked.rule, "seen", Credential())
        async with opened_replica(ledger.server_url, tmp_path / "forger") as log:  # as the database's role
            await log.submit(Record((Draft(uuid7(), forged, "carol", job_id, "m", 1),)))
        job = await a.ended(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", APPROVAL_VOID)
        assert await a.data_of(ModelLoaded) == []


@pytest.mark.parametrize("is_forged", [True, False])
async def test_emergency_passes_if_a_node_has_seen_the_role(
    ledger: Database, tmp_path: Path, *, is_forged: bool
) -> None:
    save_model(tmp_path)
    digest = digest_of((("model.onnx", hashlib.sha256(models.add(1).SerializeToString()).hexdigest()),))
    said = Justification(Credential(), emergency="an outage", digest=digest)
    async with local_node(ledger, tmp_path, "a", policy=POLICY) as a:
        rules = POLICY.of("m") or ModelRules()
        load = RequestLoad("m", 1, None, "alice", policy=rules.digest, justification=said)
        if is_forged:
            async with opened_replica(ledger.server_url, tmp_path / "forger") as log:
                job_id = (await log.submit(load)).job_id or ""
            assert not (await wait_for_question(a, job_id)).is_bypassed
        else:
            job_id = (await a.app[LOG].submit(replace(load, sign=a.app[CLUSTER].sign))).job_id or ""
            assert (await a.ended(job_id))["status"] == "completed"
            assert await list_results(a) == [ApprovalResult.BYPASSED]
            assert verify(a.app[LOG].path).verified


async def test_load_waits_for_node_that_starts_with_its_policy(ledger: Database, tmp_path: Path) -> None:
    save_model(tmp_path)
    async with local_node(ledger, tmp_path, "a", policy=POLICY) as a:
        job_id = await request_load(a)
        await approve(a, job_id)
        assert (await a.ended(job_id))["status"] == "completed"
        await a.app[LOG].submit(RequestUnload("m", "alice"))
        await a.model_when("m", state="unloaded")
        assert (await a.post("/api/v1/nodes/a/drain")).status == 202
        async with local_node(ledger, tmp_path, "b") as b:
            await b.app[LOG].wait_until(
                lambda: not b.app[LOG].state.registers.nodes["a"].takes_loads, LIMIT_S
            )
            waiting = await request_load(a)
            reason = "policy_differs: a node with the rules by which it was accepted, "
            await when(
                lambda: b.get(f"/api/v1/jobs/{waiting}"),
                lambda job: (job.json.get("waiting_for") or "").startswith(reason),
            )
        async with local_node(ledger, tmp_path, "b", policy=POLICY) as b:
            assert (await b.ended(waiting))["node"] == "b"
            assert await list_results(b) == [ApprovalResult.APPROVED, ApprovalResult.APPROVED_BEFORE]


@pytest.mark.parametrize(
    ("is_alone", "signature", "goes_on"),
    [(True, UNSET, True), (False, NodeSignature("a", "s"), True), (False, UNSET, False)],
)
def test_reload_needs_proof_that_a_node_loaded_its_files(
    signature: NodeSignature | UnsetType, *, is_alone: bool, goes_on: bool
) -> None:
    history = History()
    history.ask_load("L", of="m")
    history.start_load("L", of="m")
    history.add(structs.replace(model_loaded(), node_signature=signature), "L", of="m")
    history.restart()
    history.ask_load("R", of="m", cause=Cause.RESTART)
    model, rules = history.state.models["m"], POLICY.of("m") or ModelRules()

    def is_signed(statement: bytes, given: NodeSignature | UnsetType) -> bool:
        assert model.serving is not None
        assert statement == load_statement("m", model.serving.passed)
        return is_alone or given is not UNSET

    given = CheckInput(rules, "m", model, CONTENTS, lambda _: b"", at(0), is_reload=True, is_signed=is_signed)
    if goes_on:
        reloaded = LoadApproval(rules.approval_digest or "", ApprovalResult.RELOAD)
        assert find_approval(given, history.job("R")) == reloaded
    else:
        with pytest.raises(NotLoadable, match="a person has to load this version"):
            find_approval(given, history.job("R"))
