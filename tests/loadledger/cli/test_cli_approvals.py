"""`loadledger approve` and `verify-model`, and loads that are refused: against a server with a policy."""

import json
import re
from collections.abc import Iterator

import pytest
from support.clients import KINDS, Shell, connected
from support.http import LocalApi, local_server
from support.models import add
from support.servers import at_terminal
from support.sources import in_thread

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


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    """A server whose policy demands approvals, and a signature of one model."""
    with in_thread(local_server(tmp_path_factory.mktemp("guarded"), policy=POLICY)) as api:
        for model_id in (*GUARDED, "strict", "signed", "free"):
            api.save(add(1), model_id)
        yield api


@pytest.fixture
def alice(guarded: LocalApi) -> Shell:
    """An administrator."""
    return Shell(guarded, "admin")


@pytest.fixture
def bob(guarded: LocalApi) -> Shell:
    """An approver."""
    return Shell(guarded, "approve", subject="bob")


def test_load_is_refused_but_while_another_person_approves(alice: Shell, bob: Shell) -> None:
    told = alice.refused(1, "load m --wait --reason 'Ticket 7'")
    assert re.search(r"need 1 more approval, by others than 'alice', .* `loadledger approve m/1`", told)
    assert re.search(r"^  unapproved: +version 1, refused$", alice.prints("show m"), re.MULTILINE)
    approve = "approve m/1 --reason reviewed --yes"
    assert "(forbidden)" in alice.run(*approve.split()).stderr
    told = bob.prints(approve)
    assert re.fullmatch(
        r"m version 1: the model serves nothing now\n"
        r"  digest:    [0-9a-f]{64}\n"
        r"  added by:  nobody that the ledger has\n"
        r"  problem:   not_approved: .* 1 more .*\n"
        r"  added: model\.onnx\n"
        r"m version 1: approved\n",
        told,
    )
    assert "completed" in alice.prints("load m --wait")
    shown = alice.prints("show m")
    assert re.search(r"^  policy: +signature off, 1 approval$", shown, re.MULTILINE)
    assert re.search(r"^  approval: +approved by bob$", shown, re.MULTILINE)
    assert re.search(r"^  approved: +version 1 by bob \(reviewed\)$", shown, re.MULTILINE)
    withdraw = "approve m/1 --withdraw --reason 'It drifts' --yes"
    assert bob.prints(withdraw) == "m version 1: approval withdrawn\n"
    assert "(unknown_approval)" in bob.refused(2, withdraw)
    assert "(not_approved)" in alice.refused(1, "load m --pin --wait")


def test_approval_of_two_persons_says_how_many_are_left(alice: Shell, bob: Shell, guarded: LocalApi) -> None:
    approve = "approve two/1 --reason fine --yes"
    assert bob.prints(approve).endswith("approved; 1 approval left\n")
    answered = Shell(guarded, "approve", subject="carol").run(*approve.split(), "--json")
    assert [each["by"] for each in json.loads(answered.stdout)["approvals"]] == ["bob", "carol"]
    assert "the model serves nothing now" in answered.stderr
    alice.prints("load two --wait")
    guarded.save(add(2), "two", 2)
    told = bob.prints("approve two/2 --reason fine --yes")
    assert "two version 2: the model serves version 1 now" in told
    assert "  changed: model.onnx\n" in told


async def test_approve_at_terminal_asks_for_confirmation_and_reason(alice: Shell, bob: Shell) -> None:
    with at_terminal("approve", "asked/1", environment=bob.environment) as terminal:
        await terminal.until(r"Approve it\? \[y/N\]")
        terminal.press(b"n\n")
        assert await terminal.end() == 130
    with at_terminal("approve", "asked/1", environment=bob.environment) as terminal:
        await terminal.until(r"added: model\.onnx[^$]*Approve it\?")
        terminal.press(b"y\n")
        await terminal.until("Reason:")
        terminal.press(b"reviewed\n")
        assert await terminal.end() == 0
    assert alice.json("show asked")["approvals"][0]["reason"] == "reviewed"


def test_emergency_passes_where_role_and_rule_allow_it(alice: Shell, guarded: LocalApi) -> None:
    assert "(forbidden)" in alice.refused(2, "load urgent --emergency 'An outage'")
    helper = Shell(guarded, "admin", "emergency")
    told = helper.run("load", "urgent", "--wait", "--emergency", "An outage")
    assert "completed" in told.stdout
    assert re.search(r"emergency: version 1, files [0-9a-f]{64}", told.stderr)
    [job] = alice.json("jobs --model urgent")["jobs"]
    assert re.search(r"^  emergency: +An outage$", alice.prints(f"job {job['id']}"), re.MULTILINE)
    assert "approval:       bypassed by alice" in alice.prints("show urgent")
    assert "(emergency_forbidden)" in helper.refused(2, "load strict --emergency 'An outage'")


def test_verify_model_prints_facts_and_ends_with_problem(alice: Shell, guarded: LocalApi) -> None:
    unapproved = Shell(guarded, "audit").run("verify-model", "verified/1")
    assert unapproved.exit_code == 1
    assert re.fullmatch(
        r"verified version 1:\n  digest:    [0-9a-f]{64}\n  added by:  nobody that the ledger has\n"
        r"  problem:   not_approved: the files [0-9a-f]{64} need 1 more approval; .*\n"
        r"  model\.onnx: sha256 [0-9a-f]{64}\n",
        unapproved.stdout,
    )
    assert "problem" not in alice.prints("verify-model free")
    unsigned = alice.run("verify-model", "signed")
    assert unsigned.exit_code == 1
    assert re.search(r"^  problem: +signature_missing: ", unsigned.stdout, re.MULTILINE)
    found = alice.run("verify-model", "signed", "--json")
    assert (found.exit_code, json.loads(found.stdout)["problem"]["code"]) == (1, "signature_missing")
    assert "(unknown_version)" in alice.refused(2, "verify-model verified/7")
    assert alice.json("show verified")["state"] == "unloaded"


@pytest.mark.parametrize("kind", KINDS)
def test_each_client_verifies_approves_and_withdraws(kind: str, guarded: LocalApi) -> None:
    with connected(kind, guarded.url, guarded.token("admin", "approve", subject="bob")) as client:
        found = client.verify_model(kind)
        assert found.problem is not None
        assert (found.version, found.added_by, found.problem.code) == (1, None, "not_approved")
        assert client.verify_model("free", 1).problem is None
        assert client.load("free", reason="a trial", wait=True).reason == "a trial"
        given = client.approve(kind, 1, found.digest, "reviewed")
        assert ([each.by for each in given.approvals], given.missing) == (["bob"], 0)
        assert [each.reason for each in client.model(kind).approvals] == ["reviewed"]
        assert client.withdraw_approval(kind, 1, "it drifts").approvals == []
        for code, call in (
            ("unknown_version", lambda: client.verify_model(kind, 7)),
            ("digest_differs", lambda: client.approve(kind, 1, "0" * 64, "no")),
            ("unknown_approval", lambda: client.withdraw_approval(kind, 1, "again")),
        ):
            with pytest.raises(ServerError) as refusal:
                call()
            assert refusal.value.code == code
