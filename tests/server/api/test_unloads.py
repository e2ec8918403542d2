"""`POST …/unload` and `POST /api/v1/models/unload` with real models: what ends, in which order, and when."""

import asyncio
import os
import shutil
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
from support import models
from support.http import ENDLESS, ONE, LocalApi
from support.models import TEXT, save, save_bytes
from support.workers import computing, until

from events.datalock import LEDGER
from events.types import UnloadRequested

Start = Callable[..., Awaitable[LocalApi]]

NO_LOADS = """CREATE TRIGGER no_loads BEFORE INSERT ON events
WHEN json_extract(NEW.body, '$.type') = 'LoadRequested' BEGIN SELECT RAISE(ABORT, 'not now'); END"""


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def wait_gone(pid: int) -> None:
    """Wait until there is no such process, not even a zombie."""
    await until(lambda: not exists(pid))


async def busy(api: LocalApi, repository: Path) -> asyncio.Task[object]:
    """Load `m` and return an inference of it that does not end."""
    save(models.counting_loop(), repository, "m")
    await api.load("m")
    is_computing = computing(api.worker("m").pid)
    running: asyncio.Task[object] = asyncio.create_task(api.infer("m", ENDLESS))
    await until(is_computing)
    return running


async def loading(api: LocalApi, repository: Path, version: int = 1) -> str:
    """Start an endless load of `m` and return its job's id."""
    save_bytes(models.endless_load(), repository, "m", version)
    job = await api.accepted_load("m", version=version)
    await api.job_when(job["id"], stage="loading")
    return str(job["id"])


async def test_unload_ends_the_process_and_its_job(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    load = await api.load("m")
    pid = api.worker("m").pid
    answer = await api.post("/api/v1/models/m/unload", subject="Bob")
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json['id']}"
    assert "Retry-After" in answer.headers
    job = await api.ended(answer.json["id"])
    assert not exists(pid)
    assert job == answer.json | {
        "kind": "unload", "status": "completed", "version": 1, "requested_by": "Bob",
        "parameters": {"force": False, "load_job_id": load["id"]},
        **{name: job[name] for name in ("position", "started_at", "finished_at", "stage", "attempt")},
    }  # fmt: skip
    model = await api.model("m")
    assert model == {
        "id": "m", "versions": [1], "state": "unloaded", "version": model["version"], "next_version": None,
        "active": False, "loaded_at": None, "loaded_by": None, "job_id": None, "position": None, "files": [],
        "prepared": None, "memory_bytes": None, "error": None, "instances": None,
    }  # fmt: skip
    assert (await api.types("m"))[3:] == ["UnloadRequested", "UnloadStarted", "ModelUnloaded"]


async def test_simultaneous_unloads_join_one_job(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    answers = await asyncio.gather(*(api.post("/api/v1/models/m/unload") for _ in range(8)))
    accepted = [answer for answer in answers if answer.status in {200, 202}]
    assert len({answer.json["id"] for answer in accepted}) == 1
    assert {answer.refusal for answer in answers if answer not in accepted} <= {(409, "not_loaded")}
    await api.ended(accepted[0].json["id"])
    assert len(await api.data_of(UnloadRequested)) == 1


async def test_unload_without_name_ends_active_model(api: LocalApi, repository: Path) -> None:
    for model_id in ("a", "b", "c"):
        save(models.identity(), repository, model_id)
        await api.load(model_id)
    await api.load("a")  # changes nothing, so "c" stays the active model
    for model_id in ("c", "b", "a"):
        listed = (await api.get("/api/v1/models")).json["models"]
        assert [model["id"] for model in listed if model["active"]] == [model_id]
        assert (await api.post("/api/v1/models/unload", wait=60)).json["model_id"] == model_id
    assert (await api.post("/api/v1/models/unload")).refusal == (409, "nothing_loaded")


async def test_refused_unload_appends_nothing(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    head = api.position
    for path, refusal in (
        ("m/unload", (409, "not_loaded")),
        ("m/unload?force=true", (409, "not_loaded")),
        ("m/unload?force=false", (409, "not_loaded")),
        ("unload", (409, "nothing_loaded")),
        ("unload?force=true", (409, "nothing_loaded")),
        ("nope/unload", (404, "unknown_model")),
    ):
        assert (await api.post(f"/api/v1/models/{path}")).refusal == refusal
    assert api.position == head


async def test_loaded_model_without_files_can_be_unloaded(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    save_bytes(TEXT, repository, "failed")
    await api.load("m")
    await api.failed_load("failed")
    for model_id in ("m", "failed"):
        shutil.rmtree(repository / model_id)
    assert (await api.infer("m", ONE)).status == 200
    [model] = (await api.get("/api/v1/models")).json["models"]
    assert (model["id"], model["versions"], model["state"]) == ("m", [], "loaded")
    assert (await api.post("/api/v1/models/m/load")).refusal == (404, "unknown_model")
    await api.unload("m")
    for model_id in ("m", "failed"):
        for answer in (
            await api.post(f"/api/v1/models/{model_id}/unload"),
            await api.get(f"/api/v1/models/{model_id}"),
            await api.infer(model_id, ONE),
        ):
            assert answer.refusal == (404, "unknown_model")
    assert (await api.get("/api/v1/models")).json["models"] == []


async def test_unload_of_lost_model_ends_its_reload(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    with closing(sqlite3.connect(api.config.data / LEDGER, isolation_level=None)) as ledger:
        ledger.execute(NO_LOADS)  # keeps the model lost
        os.kill(api.worker("m").pid, signal.SIGKILL)
        await api.model_when("m", state="lost")
        assert (await api.post("/api/v1/models/m/unload", wait=60)).json["status"] == "completed"
        ledger.execute("DROP TRIGGER no_loads")
    assert (await api.model("m"))["state"] == "unloaded"
    assert [job["cause"] for job in await api.jobs()] == ["request", "request"]


# Drain and force


async def test_unload_drains_until_force_ends_it(api: LocalApi, repository: Path) -> None:
    """llama-swap #946: a request to a draining model is refused at once."""
    running = await busy(api, repository)
    worker = api.worker("m")
    draining = (await api.post("/api/v1/models/m/unload")).json
    job = await api.job_when(draining["id"], stage="draining")
    assert job["status"] == "in_progress"
    assert (await api.model("m"))["state"] == "unloading"
    again = await api.post("/api/v1/models/m/unload")
    assert (again.status, again.json["id"]) == (202, draining["id"])
    assert (await api.post(f"/api/v1/jobs/{job['id']}/cancel")).refusal == (409, "already_started")
    refused = await api.infer("m", ENDLESS)
    assert refused.refusal == (503, "model_unloading")
    assert int(refused.headers["Retry-After"]) >= 1
    forced = await api.unload("m", force=True)
    assert forced["id"] != draining["id"]
    assert (await api.job(draining["id"]))["status"] == "completed"
    assert getattr(await running, "refusal", None) == (503, "worker_died")
    await wait_gone(worker.pid)


async def test_on_demand_request_to_draining_model_times_out(start: Start, repository: Path) -> None:
    """llama-swap #946."""
    api = await start(drain_timeout_s=60.0, on_demand="on")
    running = await busy(api, repository)
    await api.post("/api/v1/models/m/unload")
    await api.model_when("m", state="unloading")
    refused = await api.infer("m", ENDLESS, parameters={"timeout": 50_000})
    assert refused.refusal == (504, "inference_timeout")
    await api.unload("m", force=True)
    await running


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_loading_model_is_unloaded_only_by_force(
    api: LocalApi, repository: Path, *, is_stopped: bool
) -> None:
    load = await loading(api, repository)
    pid = api.worker("m").pid
    if is_stopped:
        os.kill(pid, signal.SIGSTOP)
    answer = await api.post("/api/v1/models/m/unload")
    assert answer.refusal == (409, "not_loaded")
    assert "force" in answer.json["detail"]
    unload = await api.unload("m", force=True)
    assert unload["parameters"] == {"force": True, "load_job_id": load}
    assert (await api.job(load))["status"] == "cancelled"
    await wait_gone(pid)
    assert (await api.model("m"))["state"] == "unloaded"
    assert await api.types("m") == [
        "LoadRequested", "LoadStarted", "UnloadRequested", "JobCancelled", "UnloadStarted", "ModelUnloaded",
    ]  # fmt: skip


async def test_force_without_loaded_model_ends_oldest_load(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    jobs = []
    for model_id in ("a", "b"):
        save_bytes(models.endless_load(), repository, model_id)
        jobs.append(await api.accepted_load(model_id))
    for model_id, job in zip(("a", "b"), jobs, strict=True):
        answer = await api.post("/api/v1/models/unload?force=true", wait=60)
        assert (answer.json["model_id"], answer.json["status"]) == (model_id, "completed")
        assert (await api.job(job["id"]))["status"] == "cancelled"
    assert (await api.post("/api/v1/models/unload?force=true")).refusal == (409, "nothing_loaded")


async def test_force_ends_swap_and_serving_version(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m", 1)
    await api.load("m", version=1)
    old = api.worker("m").pid
    swap = await loading(api, repository, version=2)
    new = api.worker("m").pid
    await api.unload("m", force=True)
    assert (await api.job(swap))["status"] == "cancelled"
    await wait_gone(old)
    await wait_gone(new)
    assert (await api.model("m"))["state"] == "unloaded"


async def test_unload_during_swap_unloads_the_new_version(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    save_bytes(models.endless_load(), repository, "slow")
    for version in (1, 2):
        save(models.add(version), repository, "m", version)
    await api.load("m", version=1)
    await api.accepted_load("slow")
    swap = await api.accepted_load("m", version=2)
    unload = (await api.post("/api/v1/models/m/unload")).json
    assert unload["parameters"]["load_job_id"] == swap["id"]
    await api.unload("slow", force=True)
    assert (await api.ended(unload["id"]))["status"] == "completed"
    assert (await api.job(swap["id"]))["status"] == "completed"
    assert (await api.model("m"))["state"] == "unloaded"
