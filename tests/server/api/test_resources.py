"""`GET /api/v1/resources`: which models use the memory budget, and which jobs wait for it."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from msgspec.structs import replace
from support import models
from support.history import History, model_loaded
from support.http import ENDLESS, Json, LocalApi, local_server, when
from support.workers import computing, until

from events.models import ModelState
from runtime.cgroups import count_usable_cpus
from runtime.memory import private_bytes
from runtime.memoryplan import describe_plan, plan_memory
from runtime.scheduler.estimates import BYTES_PER_MODEL_BYTE, WORKER_BYTES
from runtime.worker.landlock import find_abi
from server.api.resources import describe_unjoined
from server.appkeys import CONFIG, CONSUMER, LIMIT, MEMORY_PLAN

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUDGET = 50_000_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """An application with a small budget, in which one load may run at once."""
    settings = {"memory_budget": str(BUDGET), "max_loaded": 7, "loads_at_once": 1}
    async with local_server(tmp_path_factory.mktemp("small"), **settings) as api:
        yield api


def estimate(api: LocalApi, model_id: str) -> int:
    """Return the estimated memory of a model that was never loaded."""
    size = (api.config.repository / model_id / "1" / "model.onnx").stat().st_size
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


async def test_idle_server_has_its_whole_budget_free(shared: LocalApi, small: LocalApi) -> None:
    limit_bytes = shared.app[LIMIT].bytes
    usual = plan_memory(shared.app[LIMIT], None, shared.config.max_request_bytes)
    for api, budget, max_loaded in ((shared, usual.budget_bytes, None), (small, BUDGET, 7)):
        seen = await resources(api)
        plan = api.app[MEMORY_PLAN]
        assert seen.pop("memory") == {
            "excess_bytes": plan.excess_bytes,
            "kills_together": plan.limit.kills_together, "summary": describe_plan(plan),
        }  # fmt: skip
        pressure = seen.pop("pressure")
        assert pressure is None or set(pressure) == {"memory_some_percent", "cpu_some_percent"}
        assert seen.pop("limit_source") in {"cgroup v2", "cgroup v1", "machine"}
        confinement, [cpu] = seen.pop("confinement"), seen.pop("devices")
        assert confinement["landlock_abi"] == find_abi()
        assert (confinement["mode"], confinement["seccomp"]) == ("auto", True)
        assert (cpu["device"], cpu["total_bytes"], cpu["budget_bytes"]) == ("cpu", limit_bytes, budget)
        assert seen == {
            "limit_bytes": limit_bytes, "budget_bytes": budget, "reserved_bytes": 0, "used_bytes": 0,
            "free_bytes": budget, "max_loaded": max_loaded, "threads": count_usable_cpus(), "models": [],
            "drain_timeout_s": shared.app[CONFIG].drain_timeout_s,
            "waiting": [], "as_of": api.position, "repository_writable": True, "device_problems": [],
            "confinement_of_devices": None,
        }  # fmt: skip


async def test_notice_names_a_few_of_the_models_that_are_not_batched() -> None:
    history = History()
    for number in range(5):
        model_id, job = f"m{number}", f"L{number}"
        history.ask_load(job, of=model_id, max_batch_size=8)
        said = {"rows": "unknown", "rows_depend": f"op{number}"} if number else {"rows": "independent"}
        history.add(replace(model_loaded(job), **said), job, of=model_id)
    told = list[tuple[str, str]]()
    while notices := list(describe_unjoined(history.state.models.values())):
        told += [(each.title.partition(":")[0], each.why) for each in notices]
        loaded = [each.id for each in history.state.models.values() if each.phase is ModelState.LOADED][-1]
        history.unload(f"U-{loaded}", f"L{loaded[1:]}", of=loaded)
    assert told == [
        ("4 models", "m1: op1; m2: op2; m3: op3; and 1 more."),
        ("3 models", "m1: op1; m2: op2; m3: op3."),
        ("2 models", "m1: op1; m2: op2."),
        ("m1", "op1."),
    ]


async def test_loaded_model_uses_the_memory_of_its_workers(shared: LocalApi) -> None:
    shared.save(models.counting_loop(), "m", 3)
    job = await shared.load("m", instances=2, pinned=True, keep_alive_s=50)
    [use] = (await resources(shared))["models"]
    pids = [worker.pid for load in shared.app[CONSUMER].loads.values() for worker in load.alive_workers]
    assert use.pop("memory_bytes") == pytest.approx(sum(map(private_bytes, pids)), rel=0.2)
    shown = await shared.model("m")
    assert use.pop("memory_at_load_bytes") == shown["memory_at_load_bytes"] > 0
    assert shown["memory_bytes"] == pytest.approx(sum(map(private_bytes, pids)), rel=0.2)
    assert use.pop("cpu_s") > 0
    assert use == {
        "model_id": "m", "version": 3, "job_id": job["id"], "phase": "serving", "workers": 2,
        "reserved_bytes": 0, "in_flight": 0, "last_used_at": None, "pinned": True,
        "keep_alive_s": 50, "device": None, "device_bytes": 0,
    }  # fmt: skip
    assert (await shared.infer("m", {**ENDLESS, "data": [1]})).status == 200
    seen = await resources_when(shared, lambda seen: seen["models"][0]["last_used_at"] is not None)
    [use] = seen["models"]
    assert use["in_flight"] == 0
    assert use["last_used_at"] >= (await shared.model("m"))["loaded_at"]
    running = asyncio.create_task(shared.infer("m", ENDLESS))
    [first] = (await resources_when(shared, lambda seen: seen["models"][0]["in_flight"] == 1))["models"]
    another = asyncio.create_task(shared.infer("m", ENDLESS))  # the other worker's

    def has_grown(seen: Json) -> bool:
        [use] = seen["models"]
        grown = [use[each] > first[each] for each in ("oldest_request_s", "cpu_s")]
        return use["in_flight"] == 2 and all(grown)

    await resources_when(shared, has_grown)
    assert first["cpu_s"] >= use["cpu_s"]
    await shared.unload("m", force=True)
    assert (await running).refusal == (503, "model_unloaded")
    assert (await another).status == 503


async def test_queued_jobs_wait_for_the_loading_model_and_say_so(small: LocalApi) -> None:
    small.save(models.endless_load(), "slow")
    for model_id, version in (("a", 1), ("b", 1), ("b", 2)):
        small.save(models.add(1), model_id, version)
    slow = await small.job_when((await small.accepted_load("slow"))["id"], stage="loading")
    assert slow["waiting_for"] is None
    [use] = (await resources(small))["models"]
    assert (use["model_id"], use["phase"]) == ("slow", "loading")
    assert (use["job_id"], use["workers"], use["memory_bytes"]) == (slow["id"], 1, 0)
    assert use["reserved_bytes"] == estimate(small, "slow")
    asked = [("b", 1), ("b", 2), ("a", 1)]
    queued = [(await small.accepted_load(model_id, version=version))["id"] for model_id, version in asked]
    first, second, _ = queued
    await resources_when(  # oldest first
        small, lambda seen: [wait["job_id"] for wait in seen["waiting"]] == queued
    )
    waiting = await small.job(first)
    assert "1 may run at once" in waiting["waiting_for"]
    assert (waiting["status"], waiting["stage"]) == ("pending", None)
    await small.job_when(second, waiting_for="the load of the same model, before it")
    cancelled = (await small.post(f"/api/v1/jobs/{second}/cancel", wait=60)).json
    assert (cancelled["status"], cancelled["started_at"]) == ("cancelled", None)
    again = (await small.accepted_load("b", version=2))["id"]
    assert again != second
    await small.unload("slow", force=True)
    for job_id in (first, queued[2], again):
        ended = await small.ended(job_id)
        assert (ended["status"], ended["waiting_for"]) == ("completed", None)
    for model_id in ("a", "b"):
        await small.unload(model_id)
    await resources_when(small, lambda seen: seen["models"] == [] and seen["free_bytes"] == BUDGET)


async def test_draining_model_uses_memory_until_its_process_ends(small: LocalApi) -> None:
    for version in (1, 2):
        small.save(models.counting_loop(), "drained", version)
    first = await small.load("drained", version=1)
    is_computing = computing(small.worker("drained").pid)
    running = asyncio.create_task(small.infer("drained", ENDLESS))
    await until(is_computing)
    second = await small.load("drained", version=2)
    seen = await resources_when(
        small, lambda seen: [use["phase"] for use in seen["models"]] == ["draining", "serving"]
    )
    found = [(use["job_id"], use["version"], use["in_flight"]) for use in seen["models"]]
    assert found == [(first["id"], 1, 1), (second["id"], 2, 0)]
    assert all(use["memory_bytes"] > 0 and use["reserved_bytes"] == 0 for use in seen["models"])
    await small.unload("drained", force=True)
    assert (await running).status == 503
    assert (await resources_when(small, lambda seen: not seen["models"]))["used_bytes"] == 0


async def test_load_without_room_waits_and_says_for_what(small: LocalApi) -> None:
    small.save(models.table(8), "large")
    small.save(models.table(16), "larger")
    await small.load("large")
    job = await small.accepted_load("larger")
    seen = await resources_when(
        small, lambda seen: any("memory: needs" in wait["waiting_for"] for wait in seen["waiting"])
    )
    needs = estimate(small, "larger")
    reason = (await small.job_when(job["id"], status="pending"))["waiting_for"]
    assert seen["waiting"] == [
        {"job_id": job["id"], "model_id": "larger", "needs_bytes": needs, "waiting_for": reason}
    ]
    for words in (f"{needs / 1e6:.0f} MB", "50 MB", "--evict idle"):
        assert words in reason
    waiting = await small.model("larger")
    assert (waiting["state"], waiting["open_load"]["waiting_for"]) == ("unloaded", reason)
    text = small.config.repository / "text" / "1" / "model.onnx"
    text.parent.mkdir(parents=True)
    text.write_bytes(b"no model" * 1000)
    broken = await small.ended((await small.accepted_load("text"))["id"])  # it does not queue for room
    assert broken["error"]["message"].startswith("model.onnx is a text and no model")
    assert "open_load" not in await small.model("text")
    await small.unload("large")
    assert (await small.ended(job["id"]))["status"] == "completed"
    assert (await resources(small))["waiting"] == []
    await small.unload("larger")
