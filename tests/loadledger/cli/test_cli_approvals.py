"""`loadledger approve`, `reject` and `verify-model`, and loads that wait: against a server with a policy."""

import asyncio
import json
import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from support.clients import KINDS, connected, run_command
from support.http import LocalApi, local_server, when
from support.models import add
from support.servers import at_terminal

from events.policy.rules import ApprovalRule, LoadPolicy, TrustMode, TrustRule
from loadledger import ServerError

POLICY = LoadPolicy(
    trust=(TrustRule(("signed",), TrustMode.ENFORCE),),
    approval=(
        ApprovalRule(("m", "two")),
        ApprovalRule(("two",), approvals=2),
        ApprovalRule(("strict",), emergency=False),
    ),
)


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[LocalApi]:
    """A server whose policy demands approvals, and a signature of one model."""
    async with local_server(tmp_path, policy=POLICY) as api:
        for model_id in ("m", "two", "strict", "signed", "free"):
            api.save(add(1), model_id)
        yield api


def environment(api: LocalApi, subject: str, *roles: str) -> dict[str, str]:
    return {"LOADLEDGER_URL": api.url, "LOADLEDGER_TOKEN": api.token(*roles, subject=subject)}


async def run(api: LocalApi, command: str, subject: str = "alice", *roles: str) -> Result:
    """Run a command as a person: by default alice, an administrator."""
    given: dict[str, Any] = environment(api, subject, *(roles or ("admin",)))
    return await asyncio.to_thread(run_command, *shlex.split(command), **given)


async def prints(api: LocalApi, command: str, subject: str = "alice", *roles: str) -> str:
    result = await run(api, command, subject, *roles)
    assert result.exit_code == 0, result.output
    return result.stdout


async def refused(api: LocalApi, code: int, command: str, subject: str = "alice", *roles: str) -> str:
    result = await run(api, command, subject, *roles)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    return result.stderr


async def waiting_job(api: LocalApi, model_id: str) -> Any:
    """Wait until the newest load of a model waits for approval, and return its job."""

    async def newest() -> Any:
        found = await api.jobs(f"?model={model_id}")
        return found[0] if found else {"approval": None}

    return await when(newest, lambda job: bool(job["approval"] and job["approval"]["waits"]))


async def test_load_waits_until_another_person_approves(guarded: LocalApi) -> None:
    alice = environment(guarded, "alice", "admin")
    with at_terminal("load", "m", "--wait", "--reason", "Ticket 7", environment=alice) as terminal:
        job = await waiting_job(guarded, "m")
        digest, job_id = job["approval"]["digest"], job["id"]
        await terminal.until(rf"waits: approval .*; to approve it: loadledger approve {job_id}")
        shown = await prints(guarded, f"job {job_id}")
        for fact in (r"reason: +Ticket 7", r"asked by: +alice", r"approval: +0 of 1", rf"digest: +{digest}"):
            assert re.search(rf"^  {fact}$", shown, re.MULTILINE), shown
        assert "waits: approval" in await prints(guarded, "jobs")
        approve = f"approve {job_id} --reason reviewed --yes"
        assert "(same_person)" in (await run(guarded, approve, "alice", "admin", "approve")).stderr
        assert "(forbidden)" in (await run(guarded, approve, "bob", "admin")).stderr
        told = await prints(guarded, approve, "bob", "admin", "approve")
        assert "m version 1: waits for approval; the model serves nothing now" in told
        assert "  added: model.onnx\n" in told
        assert digest in told
        assert told.endswith("m version 1: approved\n")
        await terminal.until(r"m version 1: load completed in ")
        assert await terminal.end() == 0
    shown = await prints(guarded, "show m")
    assert re.search(r"^  policy: +signature off, 1 approval$", shown, re.MULTILINE)
    assert re.search(r"^  approval: +approved by bob$", shown, re.MULTILINE)
    assert re.search(r"^  approval: +1 of 1 by bob$", await prints(guarded, f"job {job_id}"), re.MULTILINE)


async def test_rejected_load_fails_with_the_reason(guarded: LocalApi) -> None:
    await guarded.accepted_load("m")
    job_id = (await waiting_job(guarded, "m"))["id"]
    reject = f"reject {job_id} --reason 'the wrong version'"
    assert await prints(guarded, reject, "bob", "approve") == "m version 1: rejected\n"
    ended = await refused(guarded, 1, f"job {job_id} --wait")
    assert "rejected by bob: the wrong version (rejected)" in ended
    assert "does not wait for approval" in await refused(guarded, 2, reject, "bob", "approve")


async def test_load_of_two_approvals_says_how_many_are_left(guarded: LocalApi) -> None:
    await guarded.accepted_load("two")
    job_id = (await waiting_job(guarded, "two"))["id"]
    approve = f"approve {job_id} --reason fine --yes"
    assert (await prints(guarded, approve, "bob", "approve")).endswith("approved; 1 approval left\n")
    answered = await run(guarded, f"{approve} --json", "carol", "approve")
    assert json.loads(answered.stdout)["approval"]["approved_by"] == ["bob", "carol"]
    assert "1 of 2 by bob" in answered.stderr
    await guarded.job_when(job_id, status="completed")
    guarded.save(add(2), "two", 2)
    await guarded.accepted_load("two", version=2)
    job_id = (await waiting_job(guarded, "two"))["id"]
    told = await prints(guarded, f"approve {job_id} --reason fine --yes", "bob", "approve")
    assert "two version 2: waits for approval; the model serves version 1 now" in told
    assert "  changed: model.onnx\n" in told


async def test_approve_at_terminal_asks_for_confirmation_and_reason(guarded: LocalApi) -> None:
    await guarded.accepted_load("m")
    job_id = (await waiting_job(guarded, "m"))["id"]
    bob = environment(guarded, "bob", "approve")
    with at_terminal("approve", job_id, environment=bob) as terminal:
        await terminal.until(r"Approve it\? \[y/N\]")
        terminal.press(b"n\n")
        assert await terminal.end() == 130
    with at_terminal("approve", job_id, environment=bob) as terminal:
        await terminal.until(r"added: model\.onnx[^$]*Approve it\?")
        terminal.press(b"y\n")
        await terminal.until("Reason:")
        terminal.press(b"reviewed\n")
        assert await terminal.end() == 0
    await guarded.job_when(job_id, status="completed")


async def test_emergency_passes_where_role_and_rule_allow_it(guarded: LocalApi) -> None:
    assert "(forbidden)" in await refused(guarded, 2, "load m --emergency 'An outage'")
    helper = ("alice", "admin", "emergency")
    assert "completed" in await prints(guarded, "load m --wait --emergency 'An outage'", *helper)
    [job] = await guarded.jobs("?model=m")
    shown = await prints(guarded, f"job {job['id']}")
    assert re.search(r"^  emergency: +An outage$", shown, re.MULTILINE)
    assert re.search(r"^  approval: +bypassed$", shown, re.MULTILINE)
    assert "approval:       bypassed" in await prints(guarded, "show m")
    strict = await refused(guarded, 2, "load strict --emergency 'An outage'", *helper)
    assert "(emergency_forbidden)" in strict


async def test_verify_model_prints_facts_and_ends_with_problem(guarded: LocalApi) -> None:
    told = await prints(guarded, "verify-model m/1", "eve", "audit")
    assert re.fullmatch(
        r"m version 1: digest [0-9a-f]{64}\n  approval:  required\n  model\.onnx: sha256 [0-9a-f]{64}\n", told
    )
    assert "approval:  not needed" in await prints(guarded, "verify-model free")
    unsigned = await run(guarded, "verify-model signed")
    assert unsigned.exit_code == 1
    assert re.search(r"^  problem: +signature_missing: ", unsigned.stdout, re.MULTILINE)
    found = await run(guarded, "verify-model signed --json")
    assert (found.exit_code, json.loads(found.stdout)["problem"]["code"]) == (1, "signature_missing")
    assert "(unknown_version)" in await refused(guarded, 2, "verify-model m/7")
    assert (await guarded.model("m"))["state"] == "unloaded"


@pytest.mark.parametrize("kind", KINDS)
async def test_each_client_verifies_and_answers_what_waits(kind: str, guarded: LocalApi) -> None:
    def answer() -> str:
        token = guarded.token("admin", "approve", subject="bob")
        with connected(kind, guarded.url, token) as client:
            found = client.verify_model("m")
            assert (found.version, found.approval, found.problem) == (1, "required", None)
            job = client.load("free", reason="a trial", wait=True)
            assert (job.reason, job.approval) == ("a trial", None)
            [waiting] = client.jobs(model="m")
            assert waiting.approval is not None
            assert (waiting.approval.digest, waiting.approval.requested_by) == (found.digest, ["alice"])
            with pytest.raises(ServerError) as refusal:
                client.reject(waiting.id, "0" * 64, "no")
            assert refusal.value.code == "digest_differs"
            client.approve(waiting.id, found.digest, "reviewed")
            assert client.wait_for(waiting.id).status == "completed"
            with pytest.raises(ServerError) as refusal:
                client.approve(waiting.id, found.digest, "reviewed")
            return refusal.value.code

    await guarded.accepted_load("m")
    await waiting_job(guarded, "m")
    assert await asyncio.to_thread(answer) == "not_waiting"
    assert (await guarded.model("m"))["approval"]["by"] == ["bob"]
