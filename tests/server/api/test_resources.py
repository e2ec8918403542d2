"""`GET /api/v1/resources`: which models use the memory budget, and which jobs wait for it."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support import models
from support.http import ENDLESS, Json, LocalApi, when
from support.models import save, save_bytes
from support.workers import computing, until

from runtime.estimates import BYTES_PER_MODEL_BYTE, WORKER_BYTES
from runtime.memory import private_bytes
from server.appkeys import CONSUMER

Start = Callable[..., Awaitable[LocalApi]]

BUDGET = 60_000_000


def estimate(repository: Path, model_id: str) -> int:
    """Return the estimated memory of a model that was never loaded."""
    size = (repository / model_id / "1" / "model.onnx").stat().st_size
    return WORKER_BYTES + math.ceil(BYTES_PER_MODEL_BYTE * size)


async def resources(api: LocalApi) -> Json:
    """Return the answer, whose sums must add up."""
    answer = await api.get("/api/v1/resources")
    assert answer.status == 200
    seen = answer.json
    assert seen["reserved_bytes"] == sum(use["reserved_bytes"] for use in seen["models"])
    assert seen["used_bytes"] == sum(use["memory_bytes"] for use in seen["models"])
    assert seen["free_bytes"] == seen["budget_bytes"] - seen["reserved_bytes"] - seen["used_bytes"]
    return seen


async def resources_when(api: LocalApi, holds: Callable[[Json], bool]) -> Json:
    return await when(lambda: resources(api), holds)


@pytest.mark.parametrize(("budget", "max_loaded"), [(str(BUDGET), 7), ("50%", 0)])
async def test_idle_server_has_its_whole_budget_free(start: Start, budget: str, max_loaded: int) -> None:
    api = await start(memory_budget=budget, max_loaded=max_loaded)
    seen = await resources(api)
    pressure = seen.pop("pressure")
    assert pressure is None or set(pressure) == {"memory_some_percent", "cpu_some_percent"}
    limit = seen.pop("limit_bytes")
    assert seen.pop("limit_source") in {"cgroup v2", "cgroup v1", "machine"}
    expected = limit // 2 if budget.endswith("%") else BUDGET
    assert seen == {
        "budget_bytes": expected, "reserved_bytes": 0, "used_bytes": 0, "free_bytes": expected,
        "max_loaded": max_loaded or None, "models": [], "waiting": [], "preparing": None,
        "as_of": api.position,
    }  # fmt: skip


async def test_loaded_model_uses_the_memory_of_its_workers(api: LocalApi, repository: Path) -> None:
    save(models.counting_loop(), repository, "m", 3)
    job = await api.load("m", instances=2, pinned=True, keep_alive_s=50)
    [use] = (await resources(api))["models"]
    pids = [worker.pid for load in api.app[CONSUMER].loads.values() for worker in load.alive_workers]
    assert use.pop("memory_bytes") == pytest.approx(sum(map(private_bytes, pids)), rel=0.2)
    assert use == {
        "model_id": "m", "version": 3, "job_id": job["id"], "phase": "serving", "workers": 2,
        "reserved_bytes": 0, "in_flight": 0, "last_used_at": None, "pinned": True, "keep_alive_s": 50,
    }  # fmt: skip
    assert (await api.infer("m", {**ENDLESS, "data": [1]})).status == 200
    seen = await resources_when(api, lambda seen: seen["models"][0]["last_used_at"] is not None)
    [use] = seen["models"]
    assert use["in_flight"] == 0
    assert use["last_used_at"] >= (await api.model("m"))["loaded_at"]
    running = asyncio.create_task(api.infer("m", ENDLESS))
    await resources_when(api, lambda seen: seen["models"][0]["in_flight"] == 1)
    await api.unload("m", force=True)
    assert (await running).refusal == (503, "worker_died")


async def test_loading_model_reserves_its_estimate(start: Start, repository: Path) -> None:
    content = models.slow_model(side=800, depth=4000).SerializeToString()
    save_bytes(content, repository, "m")
    api = await start(memory_budget=str(BUDGET))
    job = await api.accepted_load("m")
    await api.job_when(job["id"], stage="loading")
    [use] = (await resources(api))["models"]
    assert (use["model_id"], use["phase"]) == ("m", "loading")
    assert (use["job_id"], use["workers"], use["memory_bytes"]) == (job["id"], 1, 0)
    assert use["reserved_bytes"] == estimate(repository, "m")
    await api.unload("m", force=True)
    await resources_when(api, lambda seen: seen["models"] == [] and seen["free_bytes"] == BUDGET)


async def test_draining_model_uses_memory_until_its_process_ends(start: Start, repository: Path) -> None:
    for version in (1, 2):
        save(models.counting_loop(), repository, "m", version)
    api = await start(memory_budget=str(BUDGET))
    first = await api.load("m", version=1)
    is_computing = computing(api.worker("m").pid)
    running = asyncio.create_task(api.infer("m", ENDLESS))
    await until(is_computing)
    second = await api.load("m", version=2)
    seen = await resources_when(
        api, lambda seen: [use["phase"] for use in seen["models"]] == ["draining", "serving"]
    )
    assert [(use["job_id"], use["version"]) for use in seen["models"]] == [
        (first["id"], 1),
        (second["id"], 2),
    ]
    assert all(use["memory_bytes"] > 0 and use["reserved_bytes"] == 0 for use in seen["models"])
    assert seen["models"][0]["in_flight"] == 1
    await api.unload("m", force=True)
    assert (await running).status == 503
    assert (await resources_when(api, lambda seen: not seen["models"]))["used_bytes"] == 0


async def test_load_without_room_waits_and_says_for_what(start: Start, repository: Path) -> None:
    save(models.table(8), repository, "large")
    save(models.table(12), repository, "larger")
    api = await start(memory_budget=str(BUDGET - 10_000_000))
    await api.load("large")
    job = await api.accepted_load("larger")
    seen = await resources_when(
        api, lambda seen: any("budget" in wait["waiting_for"] for wait in seen["waiting"])
    )
    needs = estimate(repository, "larger")
    reason = (await api.job_when(job["id"], status="pending"))["waiting_for"]
    assert seen["waiting"] == [
        {"job_id": job["id"], "model_id": "larger", "needs_bytes": needs, "waiting_for": reason}
    ]
    assert f"{needs / 1e6:.0f} MB" in reason
    assert "50 MB" in reason
    assert "--evict idle" in reason
    await api.unload("large")
    assert (await api.ended(job["id"]))["status"] == "completed"
    assert (await resources(api))["waiting"] == []


async def test_queued_loads_are_listed_oldest_first(start: Start, repository: Path) -> None:
    save_bytes(models.endless_load(), repository, "slow")
    for model_id in ("a", "b"):
        save(models.add(1), repository, model_id)
    api = await start(loads_at_once=1)
    slow = await api.accepted_load("slow")
    await api.job_when(slow["id"], stage="loading")
    queued = [(await api.accepted_load(model_id))["id"] for model_id in ("b", "a")]
    await resources_when(api, lambda seen: [wait["job_id"] for wait in seen["waiting"]] == queued)
    await api.unload("slow", force=True)
    assert [(await api.ended(job_id))["status"] for job_id in queued] == ["completed", "completed"]


async def test_any_role_may_read_resources(api: LocalApi) -> None:
    for role in ("admin", "predict", "audit"):
        assert (await api.get("/api/v1/resources", roles=(role,))).status == 200
    assert (await api.get("/api/v1/resources", roles=())).refusal == (401, "no_credentials")
    assert (await api.get("/api/v1/resources?model=m")).refusal == (400, "invalid_parameter")
