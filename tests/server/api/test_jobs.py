"""Jobs over HTTP: cancel, lists, what they wait for, and `Prefer: wait=N` as RFC 7240 has it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support import models
from support.http import ONE, Answer, Json, LocalApi, when
from support.ledgers import unwritable
from support.models import TEXT
from support.workers import until

from events.models import ModelState
from server.api.jobs import MAX_WAIT_S, wait_s

Start = Callable[..., Awaitable[LocalApi]]


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
    assert (model["state"], model["version"], model["next_version"], model["job_id"]) == (
        "loaded", 1, None, first["id"],
    )  # fmt: skip
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


# Lists


async def test_queued_jobs_say_what_they_wait_for(start: Start) -> None:
    api = await start(loads_at_once=1)
    slow = await loading(api, "slow")
    assert slow["waiting_for"] is None
    for version in (1, 2):
        api.save(models.identity(), "m", version)
    first = await api.accepted_load("m", version=1)
    second = await api.accepted_load("m", version=2)
    waiting = await when(lambda: api.job(first["id"]), lambda job: job["waiting_for"] is not None)
    assert "1 may run at once" in waiting["waiting_for"]
    assert (waiting["status"], waiting["stage"]) == ("pending", None)
    await api.job_when(second["id"], waiting_for=f"job {first['id']} of the same model")
    assert (await cancelled(api, second))["started_at"] is None
    again = await api.accepted_load("m", version=2)
    assert again["id"] != second["id"]
    await cancelled(api, slow)
    for job in (first, again):
        ended = await api.ended(job["id"])
        assert (ended["status"], ended["waiting_for"]) == ("completed", None)


async def pages(api: LocalApi, kind: str, limit: int, count: int) -> list[Json]:
    """Return the members of all pages of a list, which must be so many pages."""
    seen, cursor = [], ""
    for left in reversed(range(count)):
        page = (await api.get(f"/api/v1/{kind}?limit={limit}{cursor}")).json
        assert page.keys() == {kind, "as_of", "next_cursor"}
        assert page["as_of"] == api.position
        assert (page["next_cursor"] is None) == (left == 0)
        seen += page[kind]
        cursor = f"&cursor={page['next_cursor']}"
    return seen


async def test_models_and_jobs_are_listed_in_pages_with_filters(api: LocalApi) -> None:
    """MLServer #957: index, jobs and models are folds of one state."""
    names = ["B", "a", "a.1", "b", "c"]
    for name in names:
        api.save(TEXT if name == "a" else models.identity(), name)
    for version in (2, 10):
        api.save(models.identity(), "c", version)
    made = [await api.load("b"), await api.failed_load("a"), await api.unload("b"), await api.load("b")]
    made.reverse()
    seen = await pages(api, "models", limit=2, count=3)
    assert [model["id"] for model in seen] == names
    assert seen[-1] == {
        "id": "c", "versions": [1, 2, 10], "state": "unloaded", "version": None, "next_version": None,
        "active": False, "loaded_at": None, "loaded_by": None, "job_id": None, "position": None, "files": [],
        "memory_bytes": None, "error": None, "instances": None, "threads": None,
        "memory_at_load_bytes": None, "brought_back": None,
        "repository_changed": None, "not_served": None, "signature": None, "approval": None,
        "added_by": None,
    }  # fmt: skip
    assert (await api.get("/api/v1/models?limit=5")).json["next_cursor"] is None
    assert (await api.get("/api/v1/models?cursor=zzz")).json["models"] == []
    assert await pages(api, "jobs", limit=2, count=2) == made
    ids = [job["id"] for job in made]
    for query, expected in (
        ("?model=b", [ids[0], ids[1], ids[3]]),
        ("?status=failed", [ids[2]]),
        ("?model=b&status=completed&limit=1", [ids[0]]),
        ("?model=a&status=completed", []),
        ("?model=%00", []),
        ("?model=%ff", []),
        ("?cursor=1", []),
    ):
        assert [job["id"] for job in await api.jobs(query)] == expected, query
    states = {model["id"]: model["state"] for model in seen}
    assert states == dict.fromkeys(names, "unloaded") | {"a": "failed", "b": "loaded"}
    index = (await api.post("/v2/repository/index")).json
    assert {entry["name"]: entry.get("state") == "READY" for entry in index} == {
        name: state == ModelState.LOADED for name, state in states.items()
    }


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
