"""`POST …/unload` and `POST /api/v1/models/unload` with real models: what ends, in which order, and when."""

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from support import models
from support.http import ENDLESS, ONE, LocalApi
from support.ledgers import unwritable
from support.models import TEXT
from support.workers import computing, until


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def busy(api: LocalApi) -> asyncio.Task[object]:
    """Load `busy` and return an inference of it that does not end."""
    api.save(models.counting_loop(), "busy")
    await api.load("busy")
    is_computing = computing(api.worker("busy").pid)
    running: asyncio.Task[object] = asyncio.create_task(api.infer("busy", ENDLESS))
    await until(is_computing)
    return running


async def test_unload_ends_the_process_and_its_job(shared: LocalApi) -> None:
    shared.save(models.identity(), "m")
    load = await shared.load("m")
    pid = shared.worker("m").pid
    answer = await shared.post("/api/v1/models/m/unload", subject="Bob")
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json['id']}"
    assert "Retry-After" in answer.headers
    job = await shared.ended(answer.json["id"])
    assert not exists(pid)
    assert job == answer.json | {
        "kind": "unload", "status": "completed", "version": 1, "requested_by": "Bob",
        "parameters": {"force": False, "load_job_id": load["id"]},
        **{name: job[name] for name in ("position", "started_at", "finished_at", "stage", "attempt")},
    }  # fmt: skip
    model = await shared.model("m")
    assert (model["state"], model["active"], model["job_id"]) == ("unloaded", False, None)
    assert (await shared.types("m"))[3:] == ["UnloadRequested", "UnloadStarted", "ModelUnloaded"]


async def test_unload_without_name_ends_active_model(shared: LocalApi) -> None:
    for model_id in ("a", "b"):
        shared.save(models.identity(), model_id)
    head = shared.position
    for path, refusal in (
        ("a/unload", (409, "not_loaded")),
        ("a/unload?force=true", (409, "not_loaded")),
        ("a/unload?force=false", (409, "not_loaded")),
        ("unload", (409, "nothing_loaded")),
        ("unload?force=true", (409, "nothing_loaded")),
        ("nope/unload", (404, "unknown_model")),
    ):
        assert (await shared.post(f"/api/v1/models/{path}")).refusal == refusal
    assert shared.position == head
    for model_id in ("a", "b", "a"):  # the last one changes nothing, so "b" stays the active model
        await shared.load(model_id)
    for model_id in ("b", "a"):
        listed = (await shared.get("/api/v1/models")).json["models"]
        assert [model["id"] for model in listed if model["active"]] == [model_id]
        assert (await shared.post("/api/v1/models/unload", wait=60)).json["model_id"] == model_id
    assert (await shared.post("/api/v1/models/unload")).refusal == (409, "nothing_loaded")


async def test_loaded_model_without_files_can_be_unloaded(shared: LocalApi) -> None:
    shared.save(models.add(1), "removed")
    shared.save(TEXT, "failed")
    await shared.load("removed")
    await shared.failed_load("failed")
    for model_id in ("removed", "failed"):
        shutil.rmtree(shared.config.repository / model_id)
    assert (await shared.infer("removed", ONE)).status == 200
    listed = {model["id"]: model for model in (await shared.get("/api/v1/models")).json["models"]}
    assert (listed["removed"]["versions"], listed["removed"]["state"]) == ([], "loaded")
    assert "failed" not in listed
    assert (await shared.post("/api/v1/models/removed/load")).refusal == (404, "unknown_model")
    await shared.unload("removed")
    for model_id in ("removed", "failed"):
        for answer in (
            await shared.post(f"/api/v1/models/{model_id}/unload"),
            await shared.get(f"/api/v1/models/{model_id}"),
            await shared.infer(model_id, ONE),
        ):
            assert answer.refusal == (404, "unknown_model")


async def test_unload_of_lost_model_ends_its_reload(shared: LocalApi) -> None:
    shared.save(models.add(1), "lost")
    await shared.load("lost")
    with unwritable(shared.ledger, "LoadRequested"):  # keeps the model lost
        os.kill(shared.worker("lost").pid, signal.SIGKILL)
        await shared.model_when("lost", state="lost")
        await shared.unload("lost")
    assert (await shared.model("lost"))["state"] == "unloaded"
    assert [job["cause"] for job in await shared.jobs("?model=lost")] == ["request", "request"]


# Drain and force


async def test_unload_drains_until_force_ends_it(shared: LocalApi) -> None:
    """llama-swap #946: a request to a draining model is refused at once."""
    running = await busy(shared)
    worker = shared.worker("busy")
    draining = (await shared.post("/api/v1/models/busy/unload")).json
    job = await shared.job_when(draining["id"], stage="draining")
    assert job["status"] == "in_progress"
    assert (await shared.model("busy"))["state"] == "unloading"
    again = await shared.post("/api/v1/models/busy/unload")
    assert (again.status, again.json["id"]) == (202, draining["id"])
    assert (await shared.post(f"/api/v1/jobs/{job['id']}/cancel")).refusal == (409, "already_started")
    refused = await shared.infer("busy", ENDLESS)
    assert refused.refusal == (503, "model_unloading")
    assert int(refused.headers["Retry-After"]) >= 1
    forced = await shared.unload("busy", force=True)
    assert forced["id"] != draining["id"]
    assert (await shared.job(draining["id"]))["status"] == "completed"
    lost: Any = await running
    assert lost.refusal == (503, "model_unloaded")
    said = "model 'busy' was unloaded by alice, by force, before the inference had ended"
    assert (lost.json["error"], "Retry-After" in lost.headers) == (said, False)
    await until(lambda: not exists(worker.pid))


async def test_force_ends_a_version_that_drains_for_a_swap(shared: LocalApi) -> None:
    running = await busy(shared)
    shared.save(models.add(1), "busy", 2)
    await shared.load("busy", version=2)
    await shared.unload("busy", force=True)
    lost: Any = await running
    assert lost.refusal == (503, "model_unloaded")
    assert "was unloaded by alice, by force" in lost.json["error"]
