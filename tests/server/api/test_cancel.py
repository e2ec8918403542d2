"""Cancelling real jobs over HTTP, and what the answers, the jobs and the ledger say of it."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
from support import models
from support.http import Answer, Json, LocalApi, when
from support.models import TEXT, save, save_bytes
from support.workers import computing, until

from events.types import CancelRequested, JobCancelled
from server.app import LEDGER

Start = Callable[..., Awaitable[LocalApi]]

TRIPS = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}
ONE = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}


@cache
def endless_load() -> bytes:
    """A model that takes minutes to load: tests wait for its load to begin, never for its end."""
    content: bytes = models.slow_model(depth=2000).SerializeToString()
    return content


async def cancel(api: LocalApi, job: Json, **options: object) -> Answer:
    return await api.post(f"/api/v1/jobs/{job['id']}/cancel", **options)


async def cancelled(api: LocalApi, job: Json) -> Json:
    """Cancel a job and return it, which must have been in time."""
    answer = await cancel(api, job, wait=60)
    assert (answer.status, answer.json["status"]) == (200, "cancelled"), answer.body
    return answer.json


async def loading(api: LocalApi, repository: Path, model_id: str = "m", version: int = 1) -> Json:
    """Return the job of a load that goes on for minutes, and has begun."""
    save_bytes(endless_load(), repository, model_id, version)
    job = await api.accepted_load(model_id)
    return await api.job_when(job["id"], stage="loading")


# In time


async def test_a_load_that_is_cancelled_ends_with_its_process_and_the_ledger_says_who(
    api: LocalApi, repository: Path
) -> None:
    job = await loading(api, repository)
    assert job["cancel_requested"] is False
    pid = api.worker("m").pid
    answer = await cancel(api, job, subject="Bob")
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{job['id']}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json["id"] == job["id"]
    assert answer.json["cancel_requested"] is True
    ended = await api.ended(job["id"])
    assert (ended["status"], ended["error"], ended["requested_by"]) == ("cancelled", None, "alice")
    assert ended["cancel_requested"] is True
    await until(lambda: not Path(f"/proc/{pid}").exists())
    assert (await api.model("m"))["state"] == "unloaded"
    assert await api.types("m") == ["LoadRequested", "LoadStarted", "CancelRequested", "JobCancelled"]
    [asked] = [event for event in await api.events("m") if event.type == CancelRequested.TYPE]
    assert (asked.actor, asked.job_id) == ("Bob", job["id"])


async def test_a_load_that_waits_for_its_turn_is_cancelled_and_the_next_goes_on(
    start: Start, repository: Path
) -> None:
    api = await start(loads_at_once=1)
    slow = await loading(api, repository, "slow")
    save(models.add(1), repository, "m")
    waiting = await api.accepted_load("m")
    assert (await cancelled(api, waiting))["started_at"] is None
    again = await api.accepted_load("m")
    assert again["id"] != waiting["id"]
    await cancelled(api, slow)
    assert (await api.ended(again["id"]))["status"] == "completed"


async def test_a_swap_that_is_cancelled_leaves_what_serves(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    first = await api.load("m")
    swap = await loading(api, repository, version=2)
    await cancelled(api, swap)
    model = await api.model("m")
    assert (model["state"], model["version"], model["next_version"], model["job_id"]) == (
        "loaded", 1, None, first["id"],
    )  # fmt: skip
    assert (await api.infer("m", ONE)).status == 200


async def test_an_unload_that_waits_for_a_swap_is_cancelled_and_the_model_stays(
    start: Start, repository: Path
) -> None:
    api = await start(loads_at_once=1)
    save(models.add(1), repository, "m")
    save(models.add(2), repository, "m", 2)
    await api.load("m", version=1)
    slow = await loading(api, repository, "slow")
    swap = await api.accepted_load("m")
    unload = (await api.post("/api/v1/models/m/unload")).json
    await cancelled(api, unload)
    await cancelled(api, slow)
    assert (await api.ended(swap["id"]))["status"] == "completed"
    assert (await api.model("m"))["state"] == "loaded"


async def test_cancels_at_once_are_one(api: LocalApi, repository: Path) -> None:
    job = await loading(api, repository)
    answers = await asyncio.gather(*(cancel(api, job, wait=60) for _ in range(5)))
    for answer in answers:
        told = (answer.status, answer.json.get("status"))
        assert told == (200, "cancelled") or answer.refusal == (409, "already_finished")
    assert len(await api.data_of(CancelRequested)) == len(await api.data_of(JobCancelled)) == 1


async def test_who_waits_under_v2_for_a_load_that_is_cancelled_is_told(
    api: LocalApi, repository: Path
) -> None:
    save_bytes(endless_load(), repository, "m")
    waiting = asyncio.create_task(api.post("/v2/repository/models/m/load", data=b""))
    [job] = await when(api.jobs, lambda jobs: [job["stage"] for job in jobs] == ["loading"])
    await cancelled(api, job)
    answer = await waiting
    assert answer.refusal == (400, "cancelled")
    assert answer.json["error"] == "load failed for model 'm': version 1: it was cancelled"


# Too late


async def test_a_job_that_has_ended_is_409_whatever_its_outcome(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    save_bytes(TEXT, repository, "bad")
    jobs = [await api.load("m"), await api.failed_load("bad"), await api.unload("m")]
    head = api.position
    for job in jobs:
        assert (await cancel(api, job)).refusal == (409, "already_finished")
    assert api.position == head


async def test_an_unload_that_has_begun_is_409(api: LocalApi, repository: Path) -> None:
    save(models.counting_loop(), repository, "m")
    await api.load("m")
    is_computing = computing(api.worker("m").pid)
    running = asyncio.create_task(api.infer("m", TRIPS))
    await until(is_computing)
    unload = (await api.post("/api/v1/models/m/unload")).json
    await api.job_when(unload["id"], stage="draining")
    head = api.position
    assert (await cancel(api, unload)).refusal == (409, "already_started")
    assert api.position == head
    await api.unload("m", force=True)
    assert (await running).status == 503


async def test_an_unload_that_cannot_be_recorded_and_is_cancelled_leaves_the_model_serving(
    api: LocalApi, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    with closing(sqlite3.connect(api.config.data / LEDGER, isolation_level=None)) as ledger:
        ledger.execute(
            "CREATE TRIGGER full BEFORE INSERT ON events"
            " WHEN json_extract(NEW.body, '$.type') = 'UnloadStarted'"
            " BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
        unload = (await api.post("/api/v1/models/m/unload")).json
        await until(lambda: "cannot be written" in caplog.text)
        assert (await cancelled(api, unload))["started_at"] is None
        ledger.execute("DROP TRIGGER full")
    assert (await api.infer("m", ONE)).status == 200
    assert (await api.unload("m"))["status"] == "completed"


# What is no cancel


async def test_an_unknown_job_is_404(api: LocalApi) -> None:
    assert (await cancel(api, {"id": "nope"})).refusal == (404, "unknown_job")


async def test_a_cancel_takes_nothing_but_an_empty_object(api: LocalApi, repository: Path) -> None:
    job = await loading(api, repository)
    head = api.position
    path = f"/api/v1/jobs/{job['id']}/cancel"
    assert (await api.post(path, json={"force": True})).refusal == (400, "invalid_body")
    assert (await api.post(f"{path}?force=true")).refusal == (400, "invalid_parameter")
    assert (await api.post(path, data=b"{}", headers={"Content-Type": "text/plain"})).status == 415
    for roles in (("predict",), ("audit",)):
        assert (await api.post(path, roles=roles)).refusal == (403, "forbidden")
    assert api.position == head
    assert (await api.post(path, json={}, wait=60)).json["status"] == "cancelled"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_cancel_is_a_post(api: LocalApi, method: str) -> None:
    answer = await api.send(method, "/api/v1/jobs/j/cancel")
    assert answer.refusal == (405, "method_not_allowed")
