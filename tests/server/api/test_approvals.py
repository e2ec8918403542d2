"""Approval of versions over HTTP: who may give it, its effect, emergencies, the check of a version."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support import models
from support.http import ONE, Answer, Json, LocalApi, local_server
from support.signing import make_key, public_pem, sign_version

from events.types import AccessDenied, Justification, LoadRequested, digest_of
from events.values import Credential
from features.approvals.rules import ApprovalRule
from features.rules import LoadPolicy
from features.signatures.rules import TrustMode, TrustRule
from server.appkeys import GATE
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
        ApprovalRule(("strict*",), emergency=False),
    ),
)
NO_DIGEST = "0" * 64
BAD_BODY = (400, "invalid_body")
EMERGENCY = {"emergency": "the old version answers wrongly"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One application with a policy, for tests that do not disturb each other."""
    async with local_server(tmp_path_factory.mktemp("shared"), policy=POLICY) as api:
        yield api


async def put(api: LocalApi, model_id: str, version: int = 1, by: str = "bob", **body: Any) -> Answer:
    """Approve a version as somebody with the role `approve`; by default what its check shows."""
    path = f"/api/v1/models/{model_id}/versions/{version}/approval"
    said: Json = {"reason": "it looks right"}
    if "digest" not in body:
        said["digest"] = (await verified(api, model_id, f"?version={version}"))["digest"]
    return await api.send("PUT", path, json=said | body, roles=("approve",), subject=by)


async def withdraw(api: LocalApi, model_id: str, query: str = "?reason=drift") -> Answer:
    path = f"/api/v1/models/{model_id}/versions/1/approval{query}"
    return await api.send("DELETE", path, roles=("approve",), subject="carol")


async def load(api: LocalApi, model_id: str, *roles: str, **body: Any) -> Answer:
    """Ask for a load with these roles beside `admin`, and wait for its end."""
    return await api.post(f"/api/v1/models/{model_id}/load", json=body, roles=("admin", *roles), wait=60)


# Approvals


async def test_load_is_refused_until_its_bytes_are_approved(shared: LocalApi) -> None:
    shared.save(models.add(), "asked")
    refused = (await load(shared, "asked", reason="Fixes #17.\nÄgypten, 日本")).json
    assert (refused["status"], refused["error"]["code"]) == ("failed", "not_approved")
    assert "`loadledger approve asked/1`" in refused["error"]["message"]
    assert refused["reason"] == "Fixes #17.\nÄgypten, 日本"
    [wanted] = (await shared.model("asked"))["unapproved"]
    assert wanted == {
        "version": 1, "digest": None, "is_refused": True, "added_by": None, "position": None,
    }  # fmt: skip
    approved = await put(shared, "asked")
    digest, [given] = (await verified(shared, "asked"))["digest"], approved.json["approvals"]
    assert (approved.status, approved.json["missing"]) == (200, 0)
    assert given == {
        "digest": digest, "version": 1, "by": "bob", "reason": "it looks right",
        "at": given["at"], "position": given["position"],
    }  # fmt: skip
    assert "unapproved" not in await shared.model("asked")
    assert (await load(shared, "asked")).json["status"] == "completed"
    assert (await shared.infer("asked", ONE)).status == 200
    model = await shared.model("asked")
    assert (model["approval"]["result"], model["approval"]["by"]) == ("approved", ["bob"])
    assert (model["approval"]["positions"], model["added_by"]) == ([given["position"]], None)
    assert model["policy"] == {"digest": model["policy"]["digest"], "trust": None, "approvals": 1}
    then = (await shared.get(f"/api/v1/models/asked?at={model['position']}")).json
    assert (then["approval"], then["approvals"]) == (model["approval"], [given])
    assert not then.keys() & {"policy", "unapproved"}
    before = (await shared.get(f"/api/v1/models/asked?at={given['position'] - 1}")).json
    assert "approvals" not in before
    for query in ("", "?reason=", "?reason=x&more=1"):
        assert (await withdraw(shared, "asked", query)).refusal == (400, "invalid_parameter")
    withdrawn = await withdraw(shared, "asked")
    assert (withdrawn.status, withdrawn.json["approvals"]) == (200, [])
    assert (await load(shared, "asked", pinned=True)).json["error"]["code"] == "not_approved"
    assert (await withdraw(shared, "asked")).refusal == (404, "unknown_approval")


async def test_added_bytes_need_no_hash_and_another_person(shared: LocalApi) -> None:
    """The ledger has the hashes of what was added, and who did; a folder has neither."""
    content = models.add(5).SerializeToString()
    digest = digest_of([("model.onnx", hashlib.sha256(content).hexdigest())])
    await shared.add_by_upload("asked-added", 1, content)
    [wanted] = (await shared.model("asked-added"))["unapproved"]
    assert (wanted["digest"], wanted["added_by"], wanted["is_refused"]) == (digest, "alice", False)
    assert (await put(shared, "asked-added", digest=digest, by="Alice")).refusal == (403, "same_person")
    assert (await put(shared, "asked-added", digest=NO_DIGEST)).refusal == (409, "digest_differs")
    assert (await put(shared, "asked-added", digest=digest)).status == 200
    assert (await load(shared, "asked-added")).json["status"] == "completed"
    assert (await shared.model("asked-added"))["added_by"] == ["alice"]
    assert (await verified(shared, "asked-added"))["added_by"] == ["alice"]


INVALID: list[dict[str, Any]] = [
    *({"digest": digest} for digest in ("x" * 64, NO_DIGEST[1:], None)),
    *({"reason": reason} for reason in ("", " \n", "\x1b[2Jfine", "\u202efine", "x" * 1001, None)),
    {"more": 1},
]


async def test_approval_is_refused(shared: LocalApi) -> None:
    shared.save(models.add(), "asked-refused")
    head, path = shared.position, "/api/v1/models/asked-refused/versions/1/approval"
    unknown = await put(shared, "asked-refused", digest=NO_DIGEST)  # nobody has hashed it
    assert unknown.refusal == (409, "digest_differs")
    assert "GET /api/v1/models/asked-refused/verify?version=1 hashes it" in unknown.json["detail"]
    digest = (await verified(shared, "asked-refused"))["digest"]
    shared.save(models.add(7), "asked-refused")
    assert (await put(shared, "asked-refused", digest=digest)).refusal == (409, "digest_differs")
    for body in INVALID:
        assert (await put(shared, "asked-refused", **{"digest": digest} | body)).refusal == BAD_BODY, body
    said = {"digest": digest, "reason": "x"}
    for method, json in (("PUT", said), ("DELETE", None)):
        for roles in (("admin", "audit", "infer", "emergency"), ("admin",)):
            where = path if json else f"{path}?reason=x"
            refused = await shared.send(method, where, json=json, roles=roles, subject="bob")
            assert refused.refusal == (403, "forbidden")
            assert 'scope="approve"' in refused.headers["WWW-Authenticate"]
    assert (await put(shared, "none", digest=digest)).refusal == (404, "unknown_model")
    assert (await put(shared, "asked-refused", 7, digest=digest)).refusal == (404, "unknown_version")
    assert shared.position == head


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


async def test_emergency_passes_without_approval(shared: LocalApi) -> None:
    shared.save(models.add(), "asked-emergency")
    digest = (await verified(shared, "asked-emergency"))["digest"]
    unnamed = await load(shared, "asked-emergency", "emergency", **EMERGENCY)
    assert unnamed.refusal == BAD_BODY
    other = await load(shared, "asked-emergency", "emergency", **EMERGENCY, digest=NO_DIGEST)
    assert other.json["error"]["code"] == "model_changed"
    ended = (await load(shared, "asked-emergency", "emergency", **EMERGENCY, digest=digest)).json
    assert (ended["status"], ended["emergency"]) == ("completed", EMERGENCY["emergency"])
    approval = (await shared.model("asked-emergency"))["approval"]
    assert (approval["result"], approval["by"], approval["positions"]) == ("bypassed", ["alice"], [])
    scraped = (await shared.get("/metrics")).body.decode()
    assert "loadledger_emergency_loads_total 1.0" in scraped


async def test_emergency_is_refused(shared: LocalApi) -> None:
    for model_id in ("asked-denied", "free-denied", "strict"):
        shared.save(models.add(), model_id)
    head = shared.position
    for model_id, roles, code in (
        ("asked-denied", ("admin",), "forbidden"),
        ("asked-denied", ("admin", "approve"), "forbidden"),
        ("asked-denied", ("emergency",), "forbidden"),
        ("free-denied", ("admin",), "forbidden"),
        ("strict", ("admin",), "forbidden"),
        ("strict", ("admin", "emergency"), "emergency_forbidden"),
    ):
        refused = await shared.post(f"/api/v1/models/{model_id}/load", json=EMERGENCY, roles=roles)
        assert refused.refusal == (403, code), (model_id, roles)
    assert shared.position == head


async def test_denied_emergency_is_counted(shared: LocalApi) -> None:
    shared.save(models.add(), "free-denied")
    path, denied = "/api/v1/models/free-denied/load", "POST /api/v1/models/{id}/load (emergency)"
    assert (await shared.post(path, json=EMERGENCY, subject="erin")).refusal == (403, "forbidden")
    counts = shared.app[GATE].denials._counts.items()  # which are recorded each minute
    pending = [AccessDenied(action, count) for (subject, action), count in counts if subject == "erin"]
    recorded = [event.data for event in await shared.events() if event.actor == "erin"]
    assert [*pending, *recorded] == [AccessDenied(denied, 1)]


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
            "signature": None, "problem": None, "added_by": None,
        }  # fmt: skip
    assert (await put(shared, "free-verify")).json["missing"] == 0  # and counts once there is a rule


async def test_verify_is_refused(shared: LocalApi) -> None:
    shared.save(models.add(), "free-refused")
    for path, refusal in (
        ("none/verify", (404, "unknown_model")),
        ("free-refused/verify?version=7", (404, "unknown_version")),
        ("free-refused/verify?version=0", (400, "invalid_parameter")),
        ("free-refused/verify?x=1", (400, "invalid_parameter")),
    ):
        assert (await shared.get(f"/api/v1/models/{path}", roles=("audit",))).refusal == refusal


async def test_verify_checks_the_signature(shared: LocalApi) -> None:
    folder = shared.save(models.add(), "signed")
    seen = await verified(shared, "signed")
    assert (seen["signature"], seen["problem"]["code"]) == (None, "signature_missing")
    sign(folder)
    seen = await verified(shared, "signed")
    assert seen["problem"]["code"] == "not_approved"
    assert seen["problem"]["message"].startswith(f"the files {seen['digest']} need 1 more approval; ")
    assert (seen["signature"]["method"], seen["signature"]["enforced"]) == ("key", True)
    await put(shared, "signed")
    assert (await load(shared, "signed")).json["status"] == "completed"
    assert (await verified(shared, "signed"))["problem"] is None
    model = await shared.model("signed")
    assert (model["signature"], model["policy"]["trust"]) == (seen["signature"], "enforce")
    [listed] = [
        each for each in (await shared.get("/api/v1/models")).json["models"] if each["id"] == "signed"
    ]
    assert (listed["signature"], listed["policy"]) == (model["signature"], model["policy"])
    then = (await shared.get(f"/api/v1/models/signed?at={model['position']}")).json
    assert then["signature"] == seen["signature"]
    shared.save(models.add(), "warned")
    await shared.load("warned")
    unsigned = await shared.model("warned")
    assert (unsigned["signature"]["problem"], unsigned["signature"]["signer"]) == ("signature_missing", None)
    assert (unsigned["policy"]["trust"], unsigned["policy"]["approvals"]) == ("warn", 0)


async def test_server_with_a_policy_and_no_store_does_not_start(start: Start) -> None:
    with pytest.raises(ConfigError, match="--store-size"):
        await start(policy=POLICY, store_size="off")
