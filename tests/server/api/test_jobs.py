"""Jobs over HTTP: cancel, and `Prefer: wait=N` as RFC 7240 has it."""

import asyncio
from pathlib import Path

import pytest
from support import models
from support.http import ONE, Answer, Json, LocalApi, when
from support.ledgers import unwritable
from support.models import TEXT
from support.workers import until

from server.api.jobs import MAX_WAIT_S, wait_s


async def cancel(api: LocalApi, job: Json, **options: object) -> Answer:
    return await api.post(f"/api/v1/jobs/{job['id']}/cancel", **options)


async def cancelled(api: LocalApi, job: Json) -> Json:
    """Cancel a job and return it, which must end as cancelled."""
    answer = await cancel(api, job, wait=60)
    assert (answer.status, answer.json["status"]) == (200, "cancelled"), answer.body
    return answer.json


async def loading(api: LocalApi, model_id: str, version: int = 1) -> Json:
    """Return the job of a load that has begun and takes minutes."""
    api.save(models.endless_load(), model_id, version)
    job = await api.accepted_load(model_id)
    return await api.job_when(job["id"], stage="loading")


# Cancel


async def test_cancel_ends_a_load_and_its_process(shared: LocalApi) -> None:
    job = await loading(shared, "m")
    assert job["cancel_requested"] is False
    pid = shared.worker("m").pid
    answer = await cancel(shared, job, subject="Bob")
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{job['id']}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert (answer.json["id"], answer.json["cancel_requested"]) == (job["id"], True)
    ended = await shared.ended(job["id"])
    assert (ended["status"], ended["error"], ended["requested_by"]) == ("cancelled", None, "alice")
    await until(lambda: not Path(f"/proc/{pid}").exists())
    assert (await shared.model("m"))["state"] == "unloaded"
    events = await shared.events("m")
    assert [event.type for event in events] == [
        "LoadRequested", "LoadStarted", "CancelRequested", "JobCancelled",
    ]  # fmt: skip
    assert (events[2].actor, events[2].job_id) == ("Bob", job["id"])


async def test_cancel_of_swap_keeps_serving_version(shared: LocalApi) -> None:
    shared.save(models.add(1), "swapped")
    first = await shared.load("swapped")
    await cancelled(shared, await loading(shared, "swapped", version=2))
    model = await shared.model("swapped")
    kept = {"state": "loaded", "version": 1, "next_version": None, "job_id": first["id"]}
    assert {name: model[name] for name in kept} == kept
    assert (await shared.infer("swapped", ONE)).status == 200


async def test_cancel_of_a_load_under_v2_is_400(shared: LocalApi) -> None:
    shared.save(models.endless_load(), "v2")
    waiting = asyncio.create_task(shared.post("/v2/repository/models/v2/load", data=b""))
    [job] = await when(
        lambda: shared.jobs("?model=v2"), lambda jobs: [job["stage"] for job in jobs] == ["loading"]
    )
    await cancelled(shared, job)
    answer = await waiting
    assert answer.refusal == (400, "cancelled")
    assert answer.json["error"] == "load failed for model 'v2': version 1: it was cancelled"


async def test_cancel_of_unrecorded_unload_keeps_the_model(
    shared: LocalApi, caplog: pytest.LogCaptureFixture
) -> None:
    shared.save(models.add(1), "kept")
    await shared.load("kept")
    with unwritable(shared.ledger, "UnloadStarted"):
        unload = (await shared.post("/api/v1/models/kept/unload")).json
        await until(lambda: "cannot be written" in caplog.text)
        assert (await cancelled(shared, unload))["started_at"] is None
    assert (await shared.infer("kept", ONE)).status == 200
    assert (await shared.unload("kept"))["status"] == "completed"


async def test_refused_cancel_appends_nothing(shared: LocalApi) -> None:
    shared.save(models.identity(), "good")
    shared.save(TEXT, "bad")
    finished = [await shared.load("good"), await shared.failed_load("bad"), await shared.unload("good")]
    job = await loading(shared, "refused")
    head, path = shared.position, f"/api/v1/jobs/{job['id']}/cancel"
    for each in finished:
        assert (await cancel(shared, each)).refusal == (409, "already_finished")
    assert (await cancel(shared, {"id": "nope"})).refusal == (404, "unknown_job")
    assert (await shared.post(path, json={"force": True})).refusal == (400, "invalid_body")
    assert (await shared.post(f"{path}?force=true")).refusal == (400, "invalid_parameter")
    assert (await shared.post(path, data=b"{}", headers={"Content-Type": "text/plain"})).status == 415
    for method in ("GET", "DELETE"):
        assert (await shared.send(method, path)).refusal == (405, "method_not_allowed")
    assert shared.position == head
    assert (await shared.post(path, json={}, wait=60)).json["status"] == "cancelled"


# Prefer


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ([], 0), ([""], 0), (["wait=10"], 10), (["wait=0"], 0), (["WAIT=10"], 10), (["wait = 10"], 10),
        (['wait="10"'], 10), (["respond-async, wait=10"], 10), (["wait=10, respond-async"], 10),
        (["wait=10; x=y"], 10), (["wait=10;x"], 10), (["respond-async", "wait=10"], 10),
        (['foo="a, wait=30", wait=10'], 10), (['foo="\\", wait=30", wait=10'], 10),
        (["wait=5, wait=10"], 5), (["wait=5", "wait=10"], 5),
        (["wait=61"], MAX_WAIT_S), (["wait=99999999999999999999"], MAX_WAIT_S),
        *(
            ([text], 0)
            for text in (
                "wait", "wait=", "wait=-1", "wait=1.5", "wait=x", "wait=\u0663", "await=5", "wait5",
                "waiting=5", "wait=5 6", 'wait="5', 'wait=5"', 'foo="a, wait=30"', 'foo=", wait=30', ",,,",
                "=", ";", '"', "respond-async",
            )
        ),
    ],
)  # fmt: skip
def test_prefer_wait_is_read_as_in_rfc_7240(fields: list[str], seconds: int) -> None:
    assert wait_s(fields) == seconds
