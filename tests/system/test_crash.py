"""kill -9 of the server: what was accepted ends, what was loaded comes back, nothing is left over."""

import asyncio
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from support import models
from support.http import Json, when
from support.models import save, save_bytes
from support.process import Server, events, serving, verified
from support.workers import computing, freeze, until

from events.types import Event, ServerStarted, WorkerExited
from server.config import Config

ENDED = {"completed", "failed", "cancelled"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "repository").mkdir()
    return Config(repository=tmp_path / "repository", data=tmp_path / "data")


def floats(*values: float) -> Json:
    return {"name": "x", "shape": [len(values)], "datatype": "FP32", "data": list(values)}


def types(log: list[Event], job_id: str) -> list[str]:
    """Return the types of a job's events, in order."""
    return [event.type for event in log if event.job_id == job_id]


async def all_ended(server: Server) -> dict[str, Json]:
    """Wait until every job has ended, and return them by id."""
    jobs = await when(
        lambda: server.api.jobs("?limit=1000"), lambda jobs: all(job["status"] in ENDED for job in jobs)
    )
    return {job["id"]: job for job in jobs}


async def test_jobs_pending_and_in_progress_end_and_loaded_models_come_back_after_kill_9(
    config: Config,
) -> None:
    for model_id, constant in (("loaded", 1), ("pending", 2)):
        save(models.add(constant), config.repository, model_id)
    save(models.slow_model(depth=2000), config.repository, "slow")  # takes minutes: no hurry to kill it
    async with serving(config, "--loads-at-once=1") as server:
        first = await server.api.load("loaded")
        slow = await server.api.accepted_load("slow")
        pending = await server.api.accepted_load("pending")
        await server.api.job_when(slow["id"], stage="loading")
        assert (await server.api.job(pending["id"]))["status"] == "pending"
        before = set(server.children())
        assert len(before) == 3
        await server.kill()
    assert not [pid for pid in before if is_running(pid)]

    save(models.add(3), config.repository, "slow")
    async with serving(config, "--loads-at-once=1") as server:
        assert before.isdisjoint(server.children())
        jobs = await all_ended(server)
        assert {job["status"] for job in jobs.values()} == {"completed"}
        assert (jobs[slow["id"]]["attempt"], jobs[pending["id"]]["attempt"]) == (2, 1)
        model = await server.api.model_when("loaded", state="loaded")
        assert model["job_id"] != first["id"]
        back = jobs[model["job_id"]]
        assert (back["cause"], back["requested_by"]) == ("restart", "system")
        assert (await server.api.infer("loaded", floats(1))).json["outputs"][0]["data"] == [2]
        assert (await server.api.infer("pending", floats(1))).json["outputs"][0]["data"] == [3]
        assert (await server.api.infer("slow", floats(1))).json["outputs"][0]["data"] == [4]
        assert await server.stop() == 0
    verified(config)
    log = await events(config)
    started = [event.data for event in log if isinstance(event.data, ServerStarted)]
    assert [data.unclean for data in started] == [False, True]
    assert started[1].down_since is not None
    assert types(log, slow["id"]) == ["LoadRequested", "LoadStarted", "LoadStarted", "ModelLoaded"]
    assert types(log, pending["id"]) == ["LoadRequested", "LoadStarted", "ModelLoaded"]


def is_running(pid: int) -> bool:
    """Whether a process of this number is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_model_is_lost_until_it_is_loaded_again(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    async with serving(config) as server:
        await server.api.load("m")
        await server.kill()
    save(models.slow_model(depth=2000), config.repository, "m")  # takes minutes: time enough to look
    async with serving(config) as server:
        seen = await server.api.model("m")
        assert (seen["state"], seen["version"], seen["active"]) in {("lost", 1, False), ("loading", 1, False)}
        answer = await server.api.get("/v2/models/m")
        assert answer.refusal == (503, "model_not_loaded")
        assert "Retry-After" in answer.headers
        [job, _] = await when(
            server.api.jobs, lambda jobs: [job["stage"] for job in jobs] == ["loading", None]
        )
        assert job["cause"] == "restart"
        worker = server.worker()
        await freeze(worker)  # it may still be reading the file
        save(models.add(2), config.repository, "m")
        os.kill(worker, signal.SIGKILL)
        model = await server.api.model_when("m", state="loaded")
        assert model["active"]
        assert (await server.api.infer("m", floats(1))).json["outputs"][0]["data"] == [3]


async def test_the_model_loaded_last_is_active_again_whatever_came_back_first(config: Config) -> None:
    for model_id in ("a", "b", "c"):
        save(models.add(1), config.repository, model_id)
    async with serving(config) as server:
        for model_id in ("b", "c", "a"):
            await server.api.load(model_id)
        await server.kill()
    async with serving(config) as server:
        for model_id in ("a", "b", "c"):
            await server.api.model_when(model_id, state="loaded")
        for model_id in ("a", "c", "b"):
            answer = await server.api.post("/api/v1/models/unload", wait=60)
            assert (answer.status, answer.json["model_id"]) == (200, model_id)


async def test_an_unload_under_way_is_over_when_the_server_comes_back(config: Config) -> None:
    save(models.counting_loop(), config.repository, "m")
    async with serving(config) as server:
        await server.api.load("m")
        is_computing = computing(server.worker())
        trips = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}
        running = asyncio.create_task(server.api.infer("m", trips))
        await until(is_computing)
        unload = (await server.api.post("/api/v1/models/m/unload")).json
        await server.api.job_when(unload["id"], stage="draining")
        await server.kill()
        with pytest.raises(aiohttp.ClientError):
            await running
    async with serving(config) as server:
        assert (await server.api.ended(unload["id"]))["status"] == "completed"
        assert (await server.api.model("m"))["state"] == "unloaded"
        assert len(server.children()) == 1
    verified(config)


async def test_a_load_that_the_server_dies_in_three_times_is_not_tried_a_fourth_time(config: Config) -> None:
    save(models.add(1), config.repository, "good")
    save_bytes(models.slow_model(depth=2000).SerializeToString(), config.repository, "bad")
    job: Json = None
    for attempt in (1, 2, 3):
        async with serving(config) as server:
            job = job or await server.api.accepted_load("bad")
            await server.api.job_when(job["id"], stage="loading", attempt=attempt)
            await server.kill()
    async with serving(config) as server:
        ended = await server.api.ended(job["id"])
        assert (ended["status"], ended["error"]["code"], ended["attempt"]) == ("failed", "crash_loop", 3)
        assert (await server.api.model("bad"))["state"] == "failed"
        await server.api.load("good")
    verified(config)


async def test_a_load_that_the_server_is_stopped_in_in_order_is_tried_as_often_as_it_takes(
    config: Config,
) -> None:
    save_bytes(models.slow_model(depth=2000).SerializeToString(), config.repository, "m")
    job: Json = None
    for attempt in (1, 2, 3):
        async with serving(config) as server:
            job = job or await server.api.accepted_load("m")
            await server.api.job_when(job["id"], stage="loading", attempt=attempt)
            assert await server.stop() == 0
    save(models.add(1), config.repository, "m")
    async with serving(config) as server:
        ended = await server.api.ended(job["id"])
        assert (ended["status"], ended["attempt"]) == ("completed", 4)


async def test_models_that_cannot_come_back_are_given_up_with_the_reason_and_can_be_loaded_when_mended(
    config: Config,
) -> None:
    for model_id in ("crashes", "gone", "good"):
        save(models.add(1), config.repository, model_id)
    async with serving(config) as server:
        for model_id in ("crashes", "gone", "good"):
            await server.api.load(model_id)
        await server.kill()
    save(models.crash_on_load(), config.repository, "crashes")  # kills its worker on each load
    shutil.rmtree(config.repository / "gone")
    async with serving(config) as server:
        await server.api.model_when("crashes", state="failed")
        crashes = await server.api.model("crashes")
        assert crashes["error"]["code"] == "crash_loop"
        assert f"signal {signal.SIGFPE.value}" in crashes["error"]["message"]
        assert (await server.api.infer("good", floats(1))).status == 200
        await when(lambda: server.api.get("/api/v1/models/gone"), lambda answer: answer.status == 404)
        jobs = await all_ended(server)
        tried = [job for job in jobs.values() if job["model_id"] == "crashes" and job["attempt"]]
        assert [job["cause"] for job in tried] == ["recovery"] * 4 + ["restart", "request"]
        [given_up] = await server.api.jobs("?model=gone&limit=1")
        assert given_up["error"]["code"] == "crash_loop"
        assert "not in the repository" in given_up["error"]["message"]
        save(models.add(2), config.repository, "crashes")
        await server.api.load("crashes")
    log = await events(config)
    exited = [event for event in log if isinstance(event.data, WorkerExited)]
    assert {(event.model_id, event.data.signal) for event in exited} == {("crashes", signal.SIGFPE)}  # type: ignore[union-attr]
    verified(config)


def is_back(model: Json, before: str) -> bool:
    """Whether a model is loaded by another job than `before`."""
    return bool(model["state"] == "loaded" and model["job_id"] != before)


async def test_a_worker_killed_again_and_again_is_not_replaced_for_ever(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    async with serving(config) as server:
        await server.api.load("m")
        for _ in range(4):
            job_id = (await server.api.model("m"))["job_id"]
            os.kill(server.worker(), signal.SIGKILL)
            await when(lambda: server.api.model("m"), partial(is_back, before=job_id))
        os.kill(server.worker(), signal.SIGKILL)
        model = await server.api.model_when("m", state="failed")
        assert model["error"]["code"] == "crash_loop"
        assert "signal 9" in model["error"]["message"]
        await server.api.load("m")  # a person may try again
        assert (await server.api.infer("m", floats(1))).status == 200
