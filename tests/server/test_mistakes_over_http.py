"""Mistakes that others' users reported (DESIGN.md, "Policies"), as a client meets them here.

tests/runtime/scheduling/test_mistakes.py has the rows that are decided by the scheduler alone, and a list of
all.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import aiohttp
import pytest
from support import models
from support.http import LocalApi, when
from support.models import TEXT, save, save_bytes
from support.workers import freeze

from events.models import ModelState
from server.app import all_routes
from server.appkeys import LOG
from server.routes import Access

Start = Callable[..., Awaitable[LocalApi]]

ONE = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
ENDLESS = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}


@cache
def endless_load() -> bytes:
    content: bytes = models.slow_model(depth=2000).SerializeToString()
    return content


async def draining(api: LocalApi, repository: Path) -> asyncio.Task[object]:
    """Have a model drain for ever: it is being unloaded, and an inference runs that does not end."""
    save(models.counting_loop(), repository, "m")
    await api.load("m")
    running = asyncio.create_task(api.infer("m", ENDLESS))
    await when(lambda: api.get("/api/v1/resources"), lambda seen: seen.json["models"][0]["in_flight"] == 1)
    await api.post("/api/v1/models/m/unload")
    await api.model_when("m", state="unloading")
    return running


async def ended(request: asyncio.Task[object]) -> None:
    with suppress(aiohttp.ClientError, asyncio.CancelledError):
        await request


async def test_llama_swap_946_a_request_during_an_unload_is_told_so_at_once(
    start: Start, repository: Path
) -> None:
    api = await start(drain_timeout_s=60.0)
    running = await draining(api, repository)
    refused = await api.infer("m", ENDLESS)
    assert refused.refusal == (503, "model_unloading")
    assert int(refused.headers["Retry-After"]) >= 1
    await api.unload("m", force=True)
    await ended(running)


async def test_llama_swap_946_a_request_during_an_unload_waits_no_longer_than_it_may(
    start: Start, repository: Path
) -> None:
    api = await start(drain_timeout_s=60.0, on_demand="on")
    running = await draining(api, repository)
    refused = await api.infer("m", ENDLESS, parameters={"timeout": 50_000})
    assert refused.refusal == (504, "inference_timeout")
    await api.unload("m", force=True)
    await ended(running)


async def test_ollama_7779_an_unload_of_what_does_not_stop_ends_at_its_deadline(
    start: Start, repository: Path
) -> None:
    api = await start(drain_timeout_s=0.1)
    running = await draining(api, repository)
    await freeze(api.worker("m").pid)
    assert (await api.model_when("m", state="unloaded"))["error"] is None
    await ended(running)


async def test_triton_6711_a_failed_load_says_why(api: LocalApi, repository: Path) -> None:
    save_bytes(TEXT, repository, "text")
    save(models.crash_on_load(), repository, "crash")
    refused = await api.failed_load("text")
    assert refused["error"]["code"] == "invalid_model"
    died = await api.failed_load("crash")
    assert died["error"]["code"] == "worker_died"
    assert "signal" in died["error"]["message"]


async def test_triton_6536_a_client_that_gave_up_changes_nothing(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    request = asyncio.create_task(api.post("/v2/repository/models/m/load"))
    await when(api.jobs, bool)
    request.cancel()
    await ended(request)
    assert (await api.model_when("m", state="loaded"))["version"] == 1


async def test_triton_8958_nobody_notices_a_load(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    save_bytes(endless_load(), repository, "slow")
    await api.load("m")
    job = await api.accepted_load("slow")
    await api.job_when(job["id"], stage="loading")
    for path in ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"):
        assert (await api.get(path)).status == 200
    assert (await api.infer("m", ONE)).status == 200
    await api.post(f"/api/v1/jobs/{job['id']}/cancel", wait=60)


async def test_triton_356_a_file_that_changes_while_it_is_loaded_is_not_loaded(
    api: LocalApi, repository: Path
) -> None:
    file = save(models.slow_model(1000), repository, "m") / "model.onnx"
    job = await api.accepted_load("m")
    await api.job_when(job["id"], stage="loading")
    os.utime(file, ns=(1, 1))  # somebody still writes it
    assert (await api.ended(job["id"]))["error"]["code"] == "model_changed"


async def test_mlserver_957_index_jobs_and_models_are_folds_of_one_state(
    api: LocalApi, repository: Path
) -> None:
    for name in ("a", "b"):
        save(models.add(1), repository, name)
    save_bytes(TEXT, repository, "text")
    jobs = [await api.load("a"), await api.load("b"), await api.unload("b"), await api.failed_load("text")]
    index = (await api.post("/v2/repository/index")).json
    ready = {entry["name"]: entry["state"] == "READY" for entry in index}
    listed = (await api.get("/api/v1/models")).json
    assert listed["as_of"] == api.app[LOG].state.position
    states = {model["id"]: model["state"] for model in listed["models"]}
    assert states == {"a": "loaded", "b": "unloaded", "text": "failed"}
    assert ready == {name: state == ModelState.LOADED for name, state in states.items()}
    assert [job["id"] for job in await api.jobs()] == [job["id"] for job in reversed(jobs)]


@pytest.mark.parametrize("strategy", ["beside", "in_place", "auto"])
async def test_tensorflow_serving_2017_a_version_is_replaced_as_the_operator_wants(
    api: LocalApi, repository: Path, strategy: str
) -> None:
    save(models.add(1), repository, "m")
    save(models.add(2), repository, "m", 2)
    await api.load("m", version=1)
    await api.load("m", version=2, strategy=strategy)
    assert (await api.infer("m", ONE)).json["outputs"][0]["data"] == [3]
    [swap] = [job for job in await api.jobs() if job["kind"] == "unload"]
    causes = {event.id: event.type for event in await api.events("m")}
    [request] = [event for event in await api.events("m") if event.id == swap["id"]]
    cause = request.data.cause_event_id if hasattr(request.data, "cause_event_id") else None
    assert causes[str(cause)] == ("LoadRequested" if strategy == "in_place" else "ModelLoaded")


async def test_torchserve_s_cves_nothing_is_managed_without_a_token(api: LocalApi) -> None:
    public = {route.path for route in all_routes() if route.access is Access.PUBLIC}
    assert not [path for path in public if "models" in path or "jobs" in path or "events" in path]
    managing = [route for route in all_routes() if route.access is Access.ADMIN]
    assert len(managing) >= 6
    for route in managing:
        path = route.path.replace("{id}", "m").replace("{job_id}", "j")
        assert (await api.send(route.method, path, roles=())).refusal == (401, "no_credentials")
        assert (await api.send(route.method, path, roles=("predict",))).refusal == (403, "forbidden")
