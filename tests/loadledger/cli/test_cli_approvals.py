"""`loadledger approve` and `verify-model`, and loads that are refused: against a server with a policy."""

import asyncio
import json
import re
import shlex
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from click.testing import Result
from support.clients import KINDS, connected, run_command
from support.http import LocalApi, local_server
from support.models import add
from support.servers import at_terminal

from features.approvals.rules import ApprovalRule
from features.rules import LoadPolicy
from features.signatures.rules import TrustMode, TrustRule
from loadledger import ServerError

GUARDED = ("m", "two", "asked", "urgent", "verified", *KINDS)
POLICY = LoadPolicy(
    trust=(TrustRule(("signed",), TrustMode.ENFORCE),),
    approval=(
        ApprovalRule(GUARDED),
        ApprovalRule(("two",), approvals=2),
        ApprovalRule(("strict",), emergency=False),
    ),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """A server whose policy demands approvals, and a signature of one model."""
    async with local_server(tmp_path_factory.mktemp("guarded"), policy=POLICY) as api:
        for model_id in (*GUARDED, "strict", "signed", "free"):
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


async def test_load_is_refused_but_while_another_person_approves(shared: LocalApi) -> None:
    told = await refused(shared, 1, "load m --wait --reason 'Ticket 7'")
    assert re.search(r"need 1 more approval, by others than 'alice', .* `loadledger approve m/1`", told)
    assert re.search(r"^  unapproved: +version 1, refused$", await prints(shared, "show m"), re.MULTILINE)
    approve = "approve m/1 --reason reviewed --yes"
    assert "(forbidden)" in (await run(shared, approve, "bob", "admin")).stderr
    told = await prints(shared, approve, "bob", "admin", "approve")
    assert told.startswith("m version 1: the model serves nothing now\n")
    for fact in (
        r"digest: +[0-9a-f]{64}",
        r"added by: +nobody that the ledger has",
        r"problem: +not_approved: .* 1 more",
    ):
        assert re.search(rf"^  {fact}", told, re.MULTILINE), told
    assert told.endswith("  added: model.onnx\nm version 1: approved\n")
    assert "completed" in await prints(shared, "load m --wait")
    shown = await prints(shared, "show m")
    assert re.search(r"^  policy: +signature off, 1 approval$", shown, re.MULTILINE)
    assert re.search(r"^  approval: +approved by bob$", shown, re.MULTILINE)
    assert re.search(r"^  approved: +version 1 by bob \(reviewed\)$", shown, re.MULTILINE)
    withdraw = "approve m/1 --withdraw --reason 'It drifts' --yes"
    assert await prints(shared, withdraw, "eve", "approve") == "m version 1: approval withdrawn\n"
    assert "(unknown_approval)" in await refused(shared, 2, withdraw, "eve", "approve")
    assert "(not_approved)" in await refused(shared, 1, "load m --pin --wait")


async def test_approval_of_two_persons_says_how_many_are_left(shared: LocalApi) -> None:
    approve = "approve two/1 --reason fine --yes"
    assert (await prints(shared, approve, "bob", "approve")).endswith("approved; 1 approval left\n")
    answered = await run(shared, f"{approve} --json", "carol", "approve")
    assert [each["by"] for each in json.loads(answered.stdout)["approvals"]] == ["bob", "carol"]
    assert "the model serves nothing now" in answered.stderr
    await shared.load("two")
    shared.save(add(2), "two", 2)
    told = await prints(shared, "approve two/2 --reason fine --yes", "bob", "approve")
    assert "two version 2: the model serves version 1 now" in told
    assert "  changed: model.onnx\n" in told


async def test_approve_at_terminal_asks_for_confirmation_and_reason(shared: LocalApi) -> None:
    bob = environment(shared, "bob", "approve")
    with at_terminal("approve", "asked/1", environment=bob) as terminal:
        await terminal.until(r"Approve it\? \[y/N\]")
        terminal.press(b"n\n")
        assert await terminal.end() == 130
    with at_terminal("approve", "asked/1", environment=bob) as terminal:
        await terminal.until(r"added: model\.onnx[^$]*Approve it\?")
        terminal.press(b"y\n")
        await terminal.until("Reason:")
        terminal.press(b"reviewed\n")
        assert await terminal.end() == 0
    await shared.load("asked")


async def test_emergency_passes_where_role_and_rule_allow_it(shared: LocalApi) -> None:
    assert "(forbidden)" in await refused(shared, 2, "load urgent --emergency 'An outage'")
    helper = ("alice", "admin", "emergency")
    told = await run(shared, "load urgent --wait --emergency 'An outage'", *helper)
    assert "completed" in told.stdout
    assert re.search(r"emergency: version 1, files [0-9a-f]{64}", told.stderr)
    [job] = await shared.jobs("?model=urgent")
    shown = await prints(shared, f"job {job['id']}")
    assert re.search(r"^  emergency: +An outage$", shown, re.MULTILINE)
    assert "approval:       bypassed by alice" in await prints(shared, "show urgent")
    strict = await refused(shared, 2, "load strict --emergency 'An outage'", *helper)
    assert "(emergency_forbidden)" in strict


async def test_verify_model_prints_facts_and_ends_with_problem(shared: LocalApi) -> None:
    unapproved = await run(shared, "verify-model verified/1", "eve", "audit")
    assert unapproved.exit_code == 1
    assert re.fullmatch(
        r"verified version 1:\n  digest:    [0-9a-f]{64}\n  added by:  nobody that the ledger has\n"
        r"  problem:   not_approved: the files [0-9a-f]{64} need 1 more approval; .*\n"
        r"  model\.onnx: sha256 [0-9a-f]{64}\n",
        unapproved.stdout,
    )
    assert "problem" not in await prints(shared, "verify-model free")
    unsigned = await run(shared, "verify-model signed")
    assert unsigned.exit_code == 1
    assert re.search(r"^  problem: +signature_missing: ", unsigned.stdout, re.MULTILINE)
    found = await run(shared, "verify-model signed --json")
    assert (found.exit_code, json.loads(found.stdout)["problem"]["code"]) == (1, "signature_missing")
    assert "(unknown_version)" in await refused(shared, 2, "verify-model verified/7")
    assert (await shared.model("verified"))["state"] == "unloaded"


@pytest.mark.parametrize("kind", KINDS)
async def test_each_client_verifies_approves_and_withdraws(kind: str, shared: LocalApi) -> None:
    def approve() -> str:
        token = shared.token("admin", "approve", subject="bob")
        with connected(kind, shared.url, token) as client:
            found = client.verify_model(kind)
            assert (found.version, found.added_by) == (1, None)
            assert found.problem is not None
            assert found.problem.code == "not_approved"
            assert client.verify_model("free", 1).problem is None
            with pytest.raises(ServerError) as refusal:
                client.verify_model(kind, 7)
            assert refusal.value.code == "unknown_version"
            assert client.load("free", reason="a trial", wait=True).reason == "a trial"
            with pytest.raises(ServerError) as refusal:
                client.approve(kind, 1, "0" * 64, "no")
            assert refusal.value.code == "digest_differs"
            given = client.approve(kind, 1, found.digest, "reviewed")
            assert ([each.by for each in given.approvals], given.missing) == (["bob"], 0)
            assert [each.reason for each in client.model(kind).approvals] == ["reviewed"]
            assert client.withdraw_approval(kind, 1, "it drifts").approvals == []
            with pytest.raises(ServerError) as refusal:
                client.withdraw_approval(kind, 1, "again")
            return refusal.value.code

    assert await asyncio.to_thread(approve) == "unknown_approval"
