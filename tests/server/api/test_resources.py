"""What `GET /api/v1/resources` says of the memory budget: whose it is, and who waits for it."""

import asyncio
import math
import os
import signal
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path

import pytest
from support import models
from support.http import Json, LocalApi, when
from support.models import save, save_bytes
from support.workers import computing, freeze, until

from runtime.memory import private_bytes
from runtime.needs import BYTES_PER_MODEL_BYTE, WORKER_BYTES
from server.appkeys import CONSUMER

Start = Callable[..., Awaitable[LocalApi]]

BUDGET = 60_000_000
TRIPS = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}


@cache
def endless_load() -> bytes:
    """A model that takes minutes to load: tests wait for its load to begin, never for its end."""
    content: bytes = models.slow_model(side=800, depth=4000).SerializeToString()
    return content


def estimate(repository: Path, model_id: str) -> int:
    """Return what a model is taken to need that was never loaded."""
    size = (repository / model_id / "1" / "model.onnx").stat().st_size
    return WORKER_BYTES + math.ceil(BYTES_PER_MODEL_BYTE * size)


async def resources(api: LocalApi) -> Json:
    answer = await api.get("/api/v1/resources")
    assert answer.status == 200
    seen = answer.json
    assert seen["reserved_bytes"] == sum(use["reserved_bytes"] for use in seen["models"])
    assert seen["used_bytes"] == sum(use["memory_bytes"] for use in seen["models"])
    assert seen["free_bytes"] == seen["budget_bytes"] - seen["reserved_bytes"] - seen["used_bytes"]
    return seen


async def resources_when(api: LocalApi, holds: Callable[[Json], bool]) -> Json:
    return await when(lambda: resources(api), holds)


def phases(seen: Json) -> list[tuple[str, str]]:
    return [(use["model_id"], use["phase"]) for use in seen["models"]]


async def test_of_an_idle_server_all_of_the_budget_is_free(start: Start) -> None:
    api = await start(memory_budget=str(BUDGET), max_loaded=7)
    seen = await resources(api)
    pressure = seen.pop("pressure")
    assert pressure is None or set(pressure) == {"memory_some_percent", "cpu_some_percent"}
    assert seen.pop("limit_bytes") > 0
    assert seen.pop("limit_source") in {"cgroup v2", "cgroup v1", "machine"}
    assert seen == {
        "budget_bytes": BUDGET,
        "reserved_bytes": 0,
        "used_bytes": 0,
        "free_bytes": BUDGET,
        "max_loaded": 7,
        "models": [],
        "waiting": [],
        "preparing": None,
        "as_of": api.position,
    }


async def test_a_budget_in_percent_is_of_the_limit_and_no_limit_of_models_is_null(start: Start) -> None:
    seen = await resources(await start(memory_budget="50%"))
    assert seen["budget_bytes"] == seen["limit_bytes"] // 2
    assert seen["max_loaded"] is None


async def test_a_loaded_model_takes_what_its_workers_have_and_says_who_it_is(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m", 3)
    job = await api.load("m", instances=2, pinned=True, keep_alive_s=50)
    [use] = (await resources(api))["models"]
    pids = [worker.pid for load in api.app[CONSUMER].live.values() for worker in load.left]
    measured = sum(private_bytes(pid) for pid in pids)
    assert use.pop("memory_bytes") == pytest.approx(measured, rel=0.2)
    assert use == {
        "model_id": "m",
        "version": 3,
        "job_id": job["id"],
        "phase": "serving",
        "workers": 2,
        "reserved_bytes": 0,
        "in_flight": 0,
        "last_used_at": None,
        "pinned": True,
        "keep_alive_s": 50,
    }


async def test_the_end_of_the_last_inference_is_told_and_how_many_are_under_way(
    api: LocalApi, repository: Path
) -> None:
    save(models.counting_loop(), repository, "m")
    await api.load("m")
    assert (await api.infer("m", {**TRIPS, "data": [1]})).status == 200
    [use] = (await resources(api))["models"]
    assert use["in_flight"] == 0
    assert use["last_used_at"] >= (await api.model("m"))["loaded_at"]
    running = asyncio.create_task(api.infer("m", TRIPS))
    await resources_when(api, lambda seen: seen["models"][0]["in_flight"] == 1)
    await api.unload("m", force=True)
    assert (await running).refusal == (503, "worker_died")


async def test_a_loading_model_has_reserved_what_it_needs_until_it_has_ended(
    start: Start, repository: Path
) -> None:
    save_bytes(endless_load(), repository, "m")
    api = await start(memory_budget=str(BUDGET))
    job = await api.accepted_load("m")
    await api.job_when(job["id"], stage="loading")
    seen = await resources(api)
    assert phases(seen) == [("m", "loading")]
    [use] = seen["models"]
    assert (use["job_id"], use["workers"], use["memory_bytes"]) == (job["id"], 1, 0)
    assert use["reserved_bytes"] == estimate(repository, "m")
    await api.unload("m", force=True)
    await resources_when(api, lambda seen: seen["models"] == [] and seen["free_bytes"] == BUDGET)


async def test_a_swap_takes_the_memory_of_both_and_a_draining_model_takes_its_own_until_it_has_exited(
    start: Start, repository: Path
) -> None:
    save(models.counting_loop(), repository, "m", 1)
    save(models.counting_loop(), repository, "m", 2)
    api = await start(memory_budget=str(BUDGET))
    first = await api.load("m", version=1)
    is_computing = computing(api.worker("m").pid)
    running = asyncio.create_task(api.infer("m", TRIPS))
    await until(is_computing)
    second = await api.load("m", version=2)
    seen = await resources_when(api, lambda seen: ("m", "draining") in phases(seen))
    assert [(use["job_id"], use["version"], use["phase"]) for use in seen["models"]] == [
        (first["id"], 1, "draining"),
        (second["id"], 2, "serving"),
    ]
    assert all(use["memory_bytes"] > 0 and use["reserved_bytes"] == 0 for use in seen["models"])
    assert seen["models"][0]["in_flight"] == 1
    await api.unload("m", force=True)
    assert (await running).status == 503
    assert (await resources_when(api, lambda seen: not seen["models"]))["used_bytes"] == 0


async def test_who_waits_for_memory_says_how_much_is_needed_and_what_for(
    start: Start, repository: Path
) -> None:
    save(models.table(8), repository, "large")
    save(models.table(12), repository, "larger")
    api = await start(memory_budget=str(BUDGET - 10_000_000))
    await api.load("large")
    waits = await api.accepted_load("larger")
    seen = await resources_when(
        api, lambda seen: any("budget" in wait["waiting_for"] for wait in seen["waiting"])
    )
    [wait] = seen["waiting"]
    shown = await api.job_when(waits["id"], status="pending")
    needs = estimate(repository, "larger")
    assert wait == {
        "job_id": waits["id"],
        "model_id": "larger",
        "needs_bytes": needs,
        "waiting_for": shown["waiting_for"],
    }
    assert (
        f"{needs / 1e6:.0f} MB (estimated from its files) of memory, and of the budget of 50 MB"
        in wait["waiting_for"]
    )
    assert "--evict idle" in wait["waiting_for"]
    await api.unload("large")
    assert (await api.ended(waits["id"]))["status"] == "completed"
    assert (await resources(api))["waiting"] == []


async def test_who_waits_for_a_turn_is_told_oldest_first(start: Start, repository: Path) -> None:
    save_bytes(endless_load(), repository, "slow")
    for model_id in ("a", "b"):
        save(models.add(1), repository, model_id)
    api = await start(memory_budget=str(BUDGET), loads_at_once=1)
    slow = await api.accepted_load("slow")
    await api.job_when(slow["id"], stage="loading")
    asked = [(await api.accepted_load(model_id))["id"] for model_id in ("b", "a")]
    turns = [(job_id, True) for job_id in asked]
    await resources_when(
        api,
        lambda seen: (
            [(wait["job_id"], "a free place" in wait["waiting_for"]) for wait in seen["waiting"]] == turns
        ),
    )
    await api.unload("slow", force=True)
    assert [(await api.ended(job_id))["status"] for job_id in asked] == ["completed", "completed"]


async def test_what_a_stopped_worker_has_is_used_until_its_process_has_ended(
    start: Start, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    api = await start(memory_budget=str(BUDGET))
    await api.load("m")
    pid = api.worker("m").pid
    await freeze(pid)
    unload = (await api.post("/api/v1/models/m/unload")).json
    seen = await resources_when(api, lambda seen: phases(seen) in ([("m", "draining")], []))
    assert seen["used_bytes"] > 0 or (await api.job(unload["id"]))["status"] == "completed"
    os.kill(pid, signal.SIGCONT)
    assert (await api.ended(unload["id"]))["status"] == "completed"
    assert (await resources(api))["used_bytes"] == 0


@pytest.mark.parametrize("role", ["admin", "predict", "audit"])
async def test_any_role_may_look(api: LocalApi, role: str) -> None:
    assert (await api.get("/api/v1/resources", roles=(role,))).status == 200


async def test_nobody_may_look_without_a_token_and_a_query_is_refused(api: LocalApi) -> None:
    assert (await api.get("/api/v1/resources", roles=())).refusal == (401, "no_credentials")
    assert (await api.get("/api/v1/resources?model=m")).refusal == (400, "invalid_parameter")
