"""Approval of loads over HTTP: who may answer and with what effect, emergencies, the check of a version."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support import models
from support.http import ONE, Answer, Json, LocalApi, local_server
from support.signing import make_key, public_pem, sign_version

from events.policy.rules import ApprovalRule, LoadPolicy, TrustMode, TrustRule
from events.types import (
    AccessDenied,
    ApprovalBypassed,
    Credential,
    Justification,
    LoadApproved,
    LoadRejected,
    LoadRequested,
    digest_of,
)
from server.appkeys import GATE, LOG
from server.config import ConfigError

Start = Callable[..., Awaitable[LocalApi]]

KEY = make_key()
POLICY = LoadPolicy(
    trust=(
        TrustRule(("signed*",), TrustMode.ENFORCE, keys=(public_pem(KEY),)),
        TrustRule(("warned*",), TrustMode.WARN, keys=(public_pem(KEY),)),
    ),
    approval=(
        ApprovalRule(("asked*", "signed*")),
        ApprovalRule(("two*",), approvals=2),
        ApprovalRule(("strict*",), emergency=False),
    ),
)
NO_DIGEST = "0" * 64
EMERGENCY = {"emergency": "the old version answers wrongly"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One application with a policy, for tests that do not disturb each other."""
    async with local_server(tmp_path_factory.mktemp("shared"), policy=POLICY) as api:
        yield api


async def asked(api: LocalApi, model_id: str, *, version: int = 1, **body: Any) -> Json:
    """Have alice load a version, and return the job, which waits for approval."""
    api.save(models.add(version), model_id, version)
    job = await api.accepted_load(model_id, **body)
    return await waiting(api, job["id"])


async def waiting(api: LocalApi, job_id: str) -> Json:
    """Wait until a job waits for approval, and return it."""
    await api.app[LOG].wait_until(lambda: api.app[LOG].state.jobs[job_id].waits_for_approval, 60)
    job = await api.job(job_id)
    assert job["approval"]["waits"]
    return job


async def answer(api: LocalApi, job: Json, what: str = "approve", by: str = "bob", **body: Any) -> Answer:
    """Answer to a load as somebody with the role `approve`."""
    said = {"digest": job["approval"]["digest"], "reason": "it looks right"} | body
    return await api.post(f"/api/v1/jobs/{job['id']}/{what}", json=said, roles=("approve",), subject=by)


async def load(api: LocalApi, model_id: str, *roles: str, **body: Any) -> Answer:
    """Ask for a load with these roles beside `admin`."""
    return await api.post(f"/api/v1/models/{model_id}/load", json=body, roles=("admin", *roles))


# Answers


async def test_waiting_job_shows_what_is_asked(shared: LocalApi) -> None:
    job = await asked(shared, "asked-shown", reason="Fixes #17.\nÄgypten, 日本")
    folder = shared.config.repository / "asked-shown" / "1"
    sha256 = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    approval = job["approval"]
    assert (job["status"], job["reason"], job["emergency"]) == ("pending", "Fixes #17.\nÄgypten, 日本", None)
    assert job["waiting_for"] == f"approval by another person until {approval['expires_at']}"
    assert approval == {
        "digest": digest_of([("model.onnx", sha256)]), "rule": approval["rule"], "approvals": 1,
        "approved_by": [], "bypassed": False, "waits": True, "expires_at": approval["expires_at"],
        "served_version": None, "signature": None, "requested_by": ["alice"],
        "differences": [{"path": "model.onnx", "change": "added"}],
    }  # fmt: skip
    [listed] = await shared.jobs("?model=asked-shown")
    assert listed["approval"] == approval
    overview = (await shared.get("/api/v1/overview")).json
    assert approval in [each["approval"] for each in overview["jobs"]]
    past = (await shared.get(f"/api/v1/jobs/{job['id']}?at={job['position']}")).json
    assert past["approval"] == approval | {"differences": []}


async def test_approved_load_goes_on_by_itself(shared: LocalApi) -> None:
    job = await asked(shared, "asked")
    approved = await answer(shared, job)
    assert approved.status == 200
    assert (approved.json["id"], approved.json["approval"]["waits"]) == (job["id"], False)
    assert approved.json["approval"]["approved_by"] == ["bob"]
    ended = await shared.ended(job["id"])
    assert (ended["status"], ended["approval"]["differences"]) == ("completed", [])
    assert (await shared.infer("asked", ONE)).status == 200
    said = [
        (event.actor, event.data.digest, event.data.reason)
        for event in await shared.events("asked")
        if isinstance(event.data, LoadApproved)
    ]
    assert said == [
        ("bob", job["approval"]["digest"], "it looks right"),
    ]
    model = await shared.model("asked")
    assert model["approval"] == {"rule": job["approval"]["rule"], "result": "approved", "by": ["bob"]}
    assert model["policy"] == {"digest": model["policy"]["digest"], "trust": None, "approvals": 1}
    then = (await shared.get(f"/api/v1/models/asked?at={model['position']}")).json
    assert (then["approval"], "policy" in then) == (model["approval"], False)
    again = await asked(shared, "asked", version=2)
    assert (again["approval"]["served_version"], again["approval"]["differences"]) == (
        1, [{"path": "model.onnx", "change": "changed"}],
    )  # fmt: skip
    await shared.load("asked", version=1, instances=2)
    assert (await shared.model("asked"))["approval"]["result"] == "approved_before"


async def test_differences_name_each_file(shared: LocalApi) -> None:
    for version, names in ((1, ("kept", "gone")), (2, ("kept", "new"))):
        folder = shared.save(models.add(version), "asked-files", version)
        for name in names:
            (folder / f"{name}.txt").write_text(name)
    first = await waiting(shared, (await shared.accepted_load("asked-files", version=1))["id"])
    await answer(shared, first)
    await shared.ended(first["id"])
    job = await waiting(shared, (await shared.accepted_load("asked-files"))["id"])
    changes = [(each["path"], each["change"]) for each in job["approval"]["differences"]]
    assert changes == [("gone.txt", "removed"), ("model.onnx", "changed"), ("new.txt", "added")]


async def test_rejected_load_fails(shared: LocalApi) -> None:
    job = await asked(shared, "asked-rejected")
    rejected = await answer(shared, job, "reject", reason="the signature is of last year")
    assert (rejected.status, rejected.json["status"]) == (200, "failed")
    assert rejected.json["error"] == {
        "code": "rejected", "message": "rejected by bob: the signature is of last year",
    }  # fmt: skip
    [data] = [data for data in await shared.data_of(LoadRejected) if data.reason.endswith("last year")]
    assert data.digest == job["approval"]["digest"]


ANSWERS: list[tuple[str, dict[str, Any], int, str]] = [
    ("bob", {"digest": NO_DIGEST}, 409, "digest_differs"),
    ("bob", {"digest": "x" * 64}, 400, "invalid_body"),
    ("bob", {"digest": NO_DIGEST[1:]}, 400, "invalid_body"),
    ("bob", {"digest": None}, 400, "invalid_body"),
    ("bob", {"reason": ""}, 400, "invalid_body"),
    ("bob", {"reason": " \n"}, 400, "invalid_body"),
    ("bob", {"reason": "\x1b[2Jfine"}, 400, "invalid_body"),
    ("bob", {"reason": "\u202efine"}, 400, "invalid_body"),
    ("bob", {"reason": "x" * 1001}, 400, "invalid_body"),
    ("bob", {"reason": None}, 400, "invalid_body"),
    ("bob", {"more": 1}, 400, "invalid_body"),
    ("alice", {}, 403, "same_person"),
    ("ALICE", {}, 403, "same_person"),
    ("\uff41lice", {}, 403, "same_person"),
]


@pytest.mark.parametrize("what", ["approve", "reject"])
async def test_answer_is_refused(shared: LocalApi, what: str) -> None:
    job = await asked(shared, f"asked-{what}-refused")
    head = shared.position
    for by, body, status, code in ANSWERS:
        refused = await answer(shared, job, what, by, **body)
        assert refused.refusal == (status, code), (by, body)
    path = f"/api/v1/jobs/{job['id']}/{what}"
    said = {"digest": job["approval"]["digest"], "reason": "x"}
    for roles in (("admin", "audit", "predict", "emergency"), ("admin",)):
        refused = await shared.post(path, json=said, roles=roles, subject="bob")
        assert refused.refusal == (403, "forbidden")
        assert 'scope="approve"' in refused.headers["WWW-Authenticate"]
    for missing in ({}, {"reason": "x"}, {"digest": NO_DIGEST}):
        refused = await shared.post(path, json=missing, roles=("approve",), subject="bob")
        assert refused.refusal == (400, "invalid_body")
    assert (await answer(shared, job | {"id": "none"}, what)).refusal == (404, "unknown_job")
    assert shared.position == head
    assert (await shared.job(job["id"]))["status"] == "pending"


async def test_answer_to_ended_load_is_refused(shared: LocalApi) -> None:
    job = await asked(shared, "asked-ended")
    cancelled = await shared.post(f"/api/v1/jobs/{job['id']}/cancel", wait=60)
    assert cancelled.json["status"] == "cancelled"
    assert (await answer(shared, job)).refusal == (409, "not_waiting")
    shared.save(models.add(), "free")
    plain = await shared.load("free")
    assert plain["approval"] is None
    assert (await answer(shared, job | {"id": plain["id"]})).refusal == (409, "not_waiting")


async def test_person_who_joined_may_not_approve(shared: LocalApi) -> None:
    job = await asked(shared, "asked-joined")
    joined = await shared.post("/api/v1/models/asked-joined/load", subject="bob")
    assert joined.json["id"] == job["id"]
    assert joined.json["approval"]["requested_by"] == ["alice", "bob"]
    assert (await answer(shared, job, by="Bob")).refusal == (403, "same_person")
    assert (await answer(shared, job, by="carol")).status == 200


async def test_second_approval_of_a_person_counts_once(shared: LocalApi) -> None:
    job = await asked(shared, "two")
    for by in ("bob", "bob", "BOB"):
        seen = await answer(shared, job, by=by)
        approval = seen.json["approval"]
        assert (seen.status, approval["approved_by"], approval["waits"]) == (200, ["bob"], True)
    assert (await answer(shared, job, by="carol")).json["approval"]["approved_by"] == ["bob", "carol"]
    assert (await shared.ended(job["id"]))["status"] == "completed"


async def test_idempotency_key_finds_waiting_load(shared: LocalApi) -> None:
    shared.save(models.add(), "asked-key")
    send = {"json": {"reason": "why"}, "headers": {"Idempotency-Key": '"k"'}}
    first, again = [await shared.post("/api/v1/models/asked-key/load", **send) for _ in range(2)]
    assert first.json["id"] == again.json["id"]
    other = send | {"json": {"reason": "another"}}
    refused = await shared.post("/api/v1/models/asked-key/load", **other)
    assert refused.refusal == (422, "idempotency_mismatch")
    job = await waiting(shared, first.json["id"])
    assert (await answer(shared, job)).status == 200
    await shared.ended(job["id"])
    assert (await shared.post("/api/v1/models/asked-key/load", **send)).json["id"] == job["id"]


async def test_load_waits_across_restart(start: Start) -> None:
    api = await start(policy=POLICY)
    job = await asked(api, "asked")
    await api.client.close()
    api = await start(policy=POLICY)
    job = await waiting(api, job["id"])
    assert (await answer(api, job)).status == 200
    assert (await api.ended(job["id"]))["status"] == "completed"


# What a person says


async def test_reason_is_recorded_with_the_token(shared: LocalApi) -> None:
    shared.save(models.add(), "free-reason")
    job = await shared.load("free-reason", reason="a try")
    assert (job["reason"], job["parameters"].keys() & {"reason", "emergency"}) == ("a try", set())
    assert (await shared.load("free-reason"))["id"] == job["id"]  # a reason is no parameter
    token = shared.app[GATE].verifier.verify(shared.token("admin"), 0)
    said = Justification(Credential(None, token.jti), "a try")
    [data] = [each for each in await shared.data_of(LoadRequested) if each.justification == said]
    assert not data.policy


@pytest.mark.parametrize("member", ["reason", "emergency"])
@pytest.mark.parametrize("text", ["", " ", "x" * 1001, None, 7])
async def test_invalid_reason_is_refused(shared: LocalApi, member: str, text: object) -> None:
    shared.save(models.add(), "asked-invalid")
    refused = await load(shared, "asked-invalid", "emergency", **{member: text})
    assert refused.refusal == (400, "invalid_body")


async def test_emergency_passes_without_approval(shared: LocalApi) -> None:
    shared.save(models.add(), "asked-emergency")
    job = (await load(shared, "asked-emergency", "emergency", **EMERGENCY)).json
    ended = await shared.ended(job["id"])
    assert (ended["status"], ended["emergency"]) == ("completed", EMERGENCY["emergency"])
    approval = ended["approval"]
    assert (approval["bypassed"], approval["waits"], approval["expires_at"]) == (True, False, None)
    assert (approval["approved_by"], approval["approvals"]) == ([], 0)
    assert (await shared.model("asked-emergency"))["approval"]["result"] == "bypassed"
    [data] = await shared.data_of(ApprovalBypassed)
    assert data.reason == EMERGENCY["emergency"]
    scraped = (await shared.get("/metrics")).body.decode()
    assert "loadledger_approvals_bypassed_total 1.0" in scraped


@pytest.mark.parametrize(
    ("model_id", "roles", "code"),
    [
        ("asked-denied", (), "forbidden"),
        ("asked-denied", ("approve",), "forbidden"),
        ("free-denied", (), "forbidden"),
        ("strict", (), "forbidden"),
        ("strict", ("emergency",), "emergency_forbidden"),
    ],
)
async def test_emergency_is_refused(
    shared: LocalApi, model_id: str, roles: tuple[str, ...], code: str
) -> None:
    shared.save(models.add(), model_id)
    head = shared.position
    assert (await load(shared, model_id, *roles, **EMERGENCY)).refusal == (403, code)
    assert shared.position == head
    alone = await shared.post(f"/api/v1/models/{model_id}/load", json=EMERGENCY, roles=("emergency",))
    assert alone.refusal == (403, "forbidden")


async def test_emergency_for_files_that_cannot_be_hashed_is_refused(shared: LocalApi) -> None:
    (shared.save(models.add(), "asked-link") / "weights").symlink_to("/etc/hostname")
    head = shared.position
    refused = await load(shared, "asked-link", "emergency", **EMERGENCY)
    assert refused.refusal == (400, "unsafe_file")
    assert shared.position == head


async def test_denied_emergency_is_counted(start: Start) -> None:
    api = await start()
    api.save(models.add(), "m")
    assert (await load(api, "m", **EMERGENCY)).refusal == (403, "forbidden")
    counts = api.app[GATE].denials._counts
    assert counts == {("alice", "POST /api/v1/models/{id}/load (emergency)"): 1}
    assert not await api.data_of(AccessDenied)


async def test_waiting_loads_are_measured(start: Start) -> None:
    api = await start(policy=POLICY)
    await asked(api, "asked-1")
    await asked(api, "asked-2")
    scraped = (await api.get("/metrics")).body.decode()
    assert "loadledger_loads_waiting_for_approval 2.0" in scraped
    assert "loadledger_approvals_bypassed_total 0.0" in scraped


# The check of a version


def sign(folder: Path, key: Any = KEY) -> None:
    """Sign the files of a version."""
    files = ((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in folder.iterdir())
    (folder / "model.sig").write_bytes(sign_version(tuple(sorted(files)), key))


async def verified(api: LocalApi, model_id: str, query: str = "", role: str = "approve") -> Json:
    """Return the check of a version, which records nothing."""
    head = api.position
    answer = await api.get(f"/api/v1/models/{model_id}/verify{query}", roles=(role,))
    assert answer.status == 200, answer.body
    assert api.position == head
    return answer.json


async def test_verify_hashes_version_without_rules(shared: LocalApi) -> None:
    for version in (1, 2):
        shared.save(models.add(version), "free-verify", version)
    for role, query, version in (("admin", "", 2), ("audit", "?version=1", 1), ("approve", "?version=2", 2)):
        seen = await verified(shared, "free-verify", query, role)
        content = (shared.config.repository / "free-verify" / str(version) / "model.onnx").read_bytes()
        files = [{"path": "model.onnx", "sha256": hashlib.sha256(content).hexdigest()}]
        assert seen == {
            "model_id": "free-verify", "version": version, "files": files,
            "digest": digest_of((file["path"], file["sha256"]) for file in files),
            "signature": None, "problem": None, "approval": "not_needed",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("none/verify", 404, "unknown_model"),
        ("free-refused/verify?version=7", 404, "unknown_version"),
        ("free-refused/verify?version=0", 400, "invalid_parameter"),
        ("free-refused/verify?x=1", 400, "invalid_parameter"),
    ],
)
async def test_verify_is_refused(shared: LocalApi, path: str, status: int, code: str) -> None:
    shared.save(models.add(), "free-refused")
    refused = await shared.get(f"/api/v1/models/{path}", roles=("audit",))
    assert refused.refusal == (status, code)


async def test_verify_checks_the_signature(shared: LocalApi) -> None:
    folder = shared.save(models.add(), "signed")
    seen = await verified(shared, "signed")
    assert (seen["signature"], seen["problem"]["code"]) == (None, "signature_missing")
    sign(folder)
    seen = await verified(shared, "signed")
    assert (seen["problem"], seen["approval"]) == (None, "required")
    assert (seen["signature"]["method"], seen["signature"]["enforced"]) == ("key", True)
    job = await shared.accepted_load("signed")
    job = await waiting(shared, job["id"])
    assert job["approval"]["signature"] == seen["signature"]
    assert job["approval"]["digest"] == seen["digest"]
    await answer(shared, job)
    assert (await shared.ended(job["id"]))["status"] == "completed"
    assert (await verified(shared, "signed"))["approval"] == "approved_before"
    model = await shared.model("signed")
    assert (model["signature"], model["policy"]["trust"]) == (seen["signature"], "enforce")
    [listed] = [
        each for each in (await shared.get("/api/v1/models")).json["models"] if each["id"] == "signed"
    ]
    assert (listed["signature"], listed["policy"]) == (model["signature"], model["policy"])
    then = (await shared.get(f"/api/v1/models/signed?at={model['position']}")).json
    assert then["signature"] == seen["signature"]


async def test_unsigned_version_is_loaded_with_a_warning(shared: LocalApi) -> None:
    shared.save(models.add(), "warned")
    assert (await verified(shared, "warned"))["signature"]["problem"] == "signature_missing"
    await shared.load("warned")
    model = await shared.model("warned")
    assert (model["signature"]["problem"], model["signature"]["signer"]) == ("signature_missing", None)
    assert (model["policy"]["trust"], model["policy"]["approvals"]) == ("warn", 0)


async def test_server_with_a_policy_and_no_store_does_not_start(start: Start) -> None:
    with pytest.raises(ConfigError, match="--store-size"):
        await start(policy=POLICY, store_size="off")
