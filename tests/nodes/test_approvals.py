"""Approval of bytes by real nodes over PostgreSQL: at another node, forged, with different policies."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET, structs
from support import models
from support.history import model_loaded
from support.http import LocalApi, when
from support.nodes import local_node
from support.postgres import Database
from support.replicas import opened_replica

from events.audit.verify import verify
from events.clock import uuid7
from events.commands import Receipt, Record
from events.jobcommands import RequestLoad, RequestUnload
from events.types import (
    SYSTEM,
    Cause,
    Draft,
    Justification,
    LoadedFile,
    LoadFailed,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    digest_of,
)
from events.values import Credential
from features.approvals.commands import ApproveVersion, WithdrawApproval
from features.approvals.facts import ApprovalResult, VersionApproved
from features.approvals.rules import NOT_APPROVED, ApprovalRule
from features.rules import LoadPolicy
from server.appkeys import CONSUMER, LOG
from server.cluster import CLUSTER

LIMIT_S = 30
POLICY = LoadPolicy(approval=(ApprovalRule(("m",)),))
FILES = (("model.onnx", hashlib.sha256(models.add(1).SerializeToString()).hexdigest()),)


@pytest.fixture(autouse=True)
def _version(tmp_path: Path) -> None:
    version = tmp_path / "repository" / "m" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(models.add(1).SerializeToString())


def make_request(api: LocalApi, **more: Any) -> RequestLoad:
    """Return a request by the rules that are in force at a node."""
    rules = api.app[CONSUMER].policy.loads.of("m")
    assert rules is not None
    return RequestLoad("m", 1, None, "alice", policy=rules.digest, is_checked=True, **more)


async def end_of(api: LocalApi, receipt: Receipt) -> str | None:
    """Wait for the end of a load; return the code of its failure, None if there is none."""
    job = await api.ended(receipt.job_id or "")
    return job["error"]["code"] if job["error"] else None


async def load(api: LocalApi, **more: Any) -> str | None:
    """Load at a node; return as `end_of`."""
    return await end_of(api, await api.app[LOG].submit(make_request(api, **more)))


async def unload(api: LocalApi) -> None:
    await api.app[LOG].submit(RequestUnload("m", "alice"))
    await api.model_when("m", state="unloaded")


async def approve(api: LocalApi) -> None:
    """Approve the version at a node, as carol."""
    said = "carol", "seen", Credential()
    await api.app[LOG].submit(ApproveVersion("m", 1, digest_of(FILES), FILES, *said, api.app[CLUSTER].sign))


async def withdraw(api: LocalApi) -> None:
    await api.app[LOG].submit(WithdrawApproval("m", 1, "dave", "it drifts", Credential()))


async def forge(ledger: Database, folder: Path, *drafts: Draft) -> None:
    """Append events as the role of the database."""
    async with opened_replica(ledger.server_url, folder / "forger") as log:
        await log.submit(Record(drafts))


async def list_results(api: LocalApi) -> list[ApprovalResult]:
    """Return with which approvals the model was loaded, which a node has signed each time."""
    loaded = await api.data_of(ModelLoaded)
    assert all(each.server_signature for each in loaded)
    return [each.approval.result for each in loaded if each.approval]


async def test_approval_at_one_node_counts_at_another_and_for_reloads(
    ledger: Database, tmp_path: Path
) -> None:
    async with (
        local_node(ledger, tmp_path, "a", policy=POLICY) as a,
        local_node(ledger, tmp_path, "b", policy=POLICY) as b,
    ):
        assert await load(b) == NOT_APPROVED
        await approve(a)
        assert (await a.post("/api/v1/nodes/a/drain")).status == 202
        assert await load(b) is None
        assert await list_results(b) == [ApprovalResult.APPROVED]
        assert {each.server for each in await b.data_of(ModelLoaded)} == {"b"}
        await withdraw(b)
    async with local_node(ledger, tmp_path, "c", policy=POLICY) as c:
        await c.model_when("m", state="loaded")
        assert await list_results(c) == [ApprovalResult.APPROVED, ApprovalResult.RELOAD]


async def test_forged_approval_does_not_count(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a", policy=POLICY) as a:
        await approve(a)
        assert await load(a) is None
        await unload(a)
        (signed,) = await a.data_of(VersionApproved)
        for forged in (signed, structs.replace(signed, server_signature=UNSET)):  # replayed, unsigned
            await withdraw(a)
            await forge(ledger, tmp_path, Draft(uuid7(), forged, "carol", None, "m", 1))
            assert await load(a) == NOT_APPROVED
        approved = [each.position for each in await a.events() if isinstance(each.data, VersionApproved)]
        finding = verify(a.app[LOG].path).finding
        assert finding is not None
        assert finding.position == approved[1]
        await approve(a)
        assert await load(a) is None


async def test_emergency_passes_if_a_node_has_seen_the_role(ledger: Database, tmp_path: Path) -> None:
    said = Justification(Credential(), emergency="an outage", digest=digest_of(FILES))
    async with local_node(ledger, tmp_path, "a", policy=POLICY) as a:
        # Without a signature, as the database's role can append it.
        assert await load(a, justification=said, sign=None) == NOT_APPROVED
        assert await list_results(a) == []
        assert await load(a, justification=said, sign=a.app[CLUSTER].sign) is None
        assert await list_results(a) == [ApprovalResult.BYPASSED]
        assert verify(a.app[LOG].path).verified


async def test_reload_of_load_that_no_node_signed_is_refused(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a", policy=POLICY) as a:
        (path, sha256), job_id = FILES[0], uuid7()
        loaded = structs.replace(model_loaded(), files=(LoadedFile(path, 9, 1, sha256),), server="a")
        request = LoadRequested.of(LoadParameters(), Cause.REQUEST)
        about = SYSTEM, job_id, "m", 1
        facts = Draft(job_id, request, *about), Draft(uuid7(), LoadStarted(1, server="a"), *about)
        await forge(ledger, tmp_path, *facts, Draft(uuid7(), loaded, *about))
        await a.app[LOG].wait_until(lambda: "m" in a.app[LOG].state.models, LIMIT_S)
    async with local_node(ledger, tmp_path, "b", policy=POLICY) as b:
        await b.model_when("m", state="failed")
        assert {each.code for each in await b.data_of(LoadFailed)} == {NOT_APPROVED}
        assert await b.data_of(ModelLoaded) == [loaded]


async def test_load_waits_for_node_that_starts_with_its_policy(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a", policy=POLICY) as a:
        await approve(a)
        assert await load(a) is None
        await unload(a)
        assert (await a.post("/api/v1/nodes/a/drain")).status == 202
        async with local_node(ledger, tmp_path, "b") as b:
            await b.app[LOG].wait_until(
                lambda: not b.app[LOG].state.registers.nodes["a"].takes_loads, LIMIT_S
            )
            waiting = (await a.app[LOG].submit(make_request(a))).job_id or ""
            reason = "policy_differs: a node with the rules by which it was accepted, "
            await when(
                lambda: b.get(f"/api/v1/jobs/{waiting}"),
                lambda job: (job.json.get("waiting_for") or "").startswith(reason),
            )
        async with local_node(ledger, tmp_path, "b", policy=POLICY) as b:
            assert (await b.ended(waiting))["node"] == "b"
            assert await list_results(b) == [ApprovalResult.APPROVED, ApprovalResult.APPROVED]
