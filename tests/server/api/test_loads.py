"""`POST …/load` with real models: answers, versions, settings that change in place, swaps and failures."""

import asyncio
import os
import re
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path

import aiohttp
import pytest
from support import models
from support.http import LIMIT_S, ONE, LocalApi, when
from support.models import CORRUPT, TEXT, save, save_bytes
from support.workers import until

from events.accept import MAX_QUEUE
from events.commands import RequestLoad
from events.datalock import LEDGER
from events.types import LoadRequested, ModelLoaded
from server.appkeys import LOG

Start = Callable[..., Awaitable[LocalApi]]

JOB = {
    "id", "kind", "model_id", "version", "status", "stage", "waiting_for", "created_at", "started_at",
    "finished_at", "requested_by", "cause", "cancel_requested", "attempt", "position", "parameters", "error",
}  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
MIB = 2**20
NO_MODEL_LOADED = """CREATE TRIGGER full BEFORE INSERT ON events
WHEN json_extract(NEW.body, '$.type') = 'ModelLoaded' BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"""


async def result_of(api: LocalApi, model_id: str) -> float:
    """Return what `models.add` of a constant makes of 1, which tells versions apart."""
    answer = await api.infer(model_id, ONE)
    assert answer.status == 200, answer.body
    value: float = answer.json["outputs"][0]["data"][0]
    return value


# Answers


async def test_load_is_accepted_and_its_job_completes(api: LocalApi, repository: Path) -> None:
    folder = save(models.identity(), repository, "m")
    answer = await api.post("/api/v1/models/m/load", json={"timeout_s": 77}, subject="Ann")
    accepted = answer.json
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{accepted['id']}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["Vary"] == "Prefer"
    assert accepted.keys() == JOB
    assert accepted["status"] in {"pending", "in_progress"}
    job = await api.ended(accepted["id"])
    assert all(TIME.fullmatch(job[name]) for name in ("created_at", "started_at", "finished_at"))
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert job == accepted | {
        "kind": "load", "model_id": "m", "version": 1, "status": "completed", "cause": "request",
        "attempt": 1, "requested_by": "Ann", "stage": None, "waiting_for": None, "error": None,
        "cancel_requested": False,
        "parameters": {
            "priority": "normal", "timeout_s": 77, "keep_alive_s": None, "memory_limit_bytes": None,
            "strategy": "beside", "pinned": False, "instances": 1, "max_batch_size": 0,
            "max_queue_delay_us": 0,
        },
        **{name: job[name] for name in ("position", "started_at", "finished_at")},
    }  # fmt: skip
    model = await api.model("m")
    [file] = model.pop("files")
    assert (file["path"], file["bytes"]) == ("model.onnx", (folder / "model.onnx").stat().st_size)
    assert re.fullmatch(r"[0-9a-f]{64}", file["sha256"])
    assert model.pop("memory_bytes") > 0
    assert model == {
        "id": "m", "versions": [1], "state": "loaded", "version": 1, "next_version": None, "active": True,
        "loaded_at": job["finished_at"], "loaded_by": "Ann", "job_id": job["id"],
        "position": job["position"], "prepared": None, "error": None, "instances": 1,
    }  # fmt: skip
    events = await api.events("m")
    assert [event.type for event in events] == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert {event.job_id for event in events} == {job["id"]}
    assert events[-1].position == model["position"]


async def test_load_takes_highest_version_or_the_one_named(api: LocalApi, repository: Path) -> None:
    for version in (2, 9, 10):
        save(models.add(version), repository, "m", version)
    assert (await api.load("m"))["version"] == 10
    assert (await api.load("m", version=2))["version"] == 2
    assert await result_of(api, "m") == 3
    assert (await api.model("m"))["version"] == 2


async def test_wait_answers_200_when_the_job_has_ended(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "good")
    save_bytes(TEXT, repository, "bad")
    for model_id, status in (("good", "completed"), ("bad", "failed")):
        answer = await api.post(f"/api/v1/models/{model_id}/load", wait=60)
        assert (answer.status, answer.json["status"]) == (200, status)
        assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json['id']}"
        assert "Retry-After" not in answer.headers


async def test_wait_answers_202_when_time_is_up_or_server_stops(api: LocalApi, repository: Path) -> None:
    save_bytes(models.endless_load(), repository, "m")
    job = await api.accepted_load("m")
    await api.job_when(job["id"], stage="loading")
    answer = await api.post("/api/v1/models/m/load", wait=1)
    assert (answer.status, answer.json["id"], answer.json["status"]) == (202, job["id"], "in_progress")
    save(models.identity(), repository, "m", 2)
    waiting = asyncio.create_task(api.post("/api/v1/models/m/load", json={"version": 2}, wait=60))
    await when(api.jobs, lambda jobs: len(jobs) == 2)
    async with asyncio.timeout(LIMIT_S):
        await api.client.server.close()
    answer = await waiting
    assert (answer.status, answer.json["finished_at"]) == (202, None)


# The same load again


async def test_load_of_loaded_version_answers_its_job(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    job = await api.load("m", timeout_s=50)
    head = api.position
    for body in ({}, {"version": 1}, {"timeout_s": 60}, {"priority": "high"}, {"instances": 1}):
        answer = await api.post("/api/v1/models/m/load", json=body)
        assert (answer.status, answer.json) == (200, job)
    assert api.position == head


async def test_simultaneous_loads_join_one_job(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    answers = await asyncio.gather(
        *(api.post("/api/v1/models/m/load", json={"timeout_s": 100 + i}, wait=60) for i in range(8))
    )
    assert {answer.status for answer in answers} == {200}
    [job] = {answer.json["id"]: answer.json for answer in answers}.values()
    [requested] = await api.data_of(LoadRequested)
    assert job["parameters"]["timeout_s"] == requested.timeout_s


async def test_load_continues_when_client_disconnects(api: LocalApi, repository: Path) -> None:
    """Triton #6536."""
    save(models.add(1), repository, "m")
    request = asyncio.create_task(api.post("/v2/repository/models/m/load"))
    await when(api.jobs, bool)
    request.cancel()
    with suppress(aiohttp.ClientError, asyncio.CancelledError):
        await request
    assert (await api.model_when("m", state="loaded"))["version"] == 1


# Settings of a loaded model


async def test_load_that_changes_settings_reuses_workers(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    loaded = await api.load("m", instances=2, memory_limit_bytes=2**30)
    pid, before = api.worker("m").pid, await api.model("m")
    pinned = await api.load("m", pinned=True)
    assert pinned["id"] != loaded["id"]
    assert pinned["parameters"] == loaded["parameters"] | {"pinned": True}
    assert api.worker("m").pid == pid
    after = await api.model("m")
    assert after["position"] > before["position"]
    renewed = ("job_id", "position", "loaded_at")
    assert after == before | {name: after[name] for name in renewed}
    assert after["job_id"] == pinned["id"]
    first, second = await api.data_of(ModelLoaded)
    assert (second.worker_ids, second.files) == (first.worker_ids, first.files)
    assert [each.keeps_load_job_id for each in await api.data_of(LoadRequested)] == [None, loaded["id"]]
    for same in ({}, {"pinned": True}, {"priority": "high"}):
        assert (await api.load("m", **same))["id"] == pinned["id"]
    assert (await api.load("m", pinned=False, keep_alive_s=60))["id"] != pinned["id"]


async def test_changed_settings_apply_once_the_log_can_be_written(
    api: LocalApi, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(models.add(1), repository, "m")
    loaded = await api.load("m")
    pid = api.worker("m").pid
    with closing(sqlite3.connect(api.config.data / LEDGER)) as ledger:
        ledger.execute(NO_MODEL_LOADED)
        job = await api.accepted_load("m", pinned=True)
        await until(lambda: "cannot be written" in caplog.text)
        assert (await api.infer("m", ONE)).status == 200
        assert (await api.model("m"))["job_id"] == loaded["id"]
        ledger.execute("DROP TRIGGER full")
    assert (await api.ended(job["id"]))["status"] == "completed"
    assert api.worker("m").pid == pid


async def test_changed_settings_of_dead_worker_start_another(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    worker = api.worker("m")
    worker.kill()
    await asyncio.shield(worker.ended)
    job = await api.accepted_load("m", pinned=True)
    assert (await api.ended(job["id"]))["status"] == "completed"
    assert api.worker("m").pid != worker.pid
    assert (await api.infer("m", ONE)).status == 200


# Swaps and recovery


async def test_swap_serves_old_version_until_new_one_is_loaded(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m", 1)
    save_bytes(models.endless_load(), repository, "m", 2)
    save(models.add(3), repository, "m", 3)
    await api.load("m", version=1)
    old = api.worker("m").pid
    swap = await api.accepted_load("m", version=2)
    await api.job_when(swap["id"], stage="loading")
    model = await api.model("m")
    assert (model["state"], model["version"], model["next_version"]) == ("loaded", 1, 2)
    assert await result_of(api, "m") == 2
    os.kill(api.worker("m").pid, signal.SIGKILL)
    assert (await api.ended(swap["id"]))["status"] == "failed"
    model = await api.model("m")
    assert (model["state"], model["version"], model["next_version"]) == ("loaded", 1, None)
    assert model["error"]["code"] == "worker_died"
    assert await result_of(api, "m") == 2
    load = await api.load("m", version=3)
    assert await result_of(api, "m") == 4
    await until(lambda: not Path(f"/proc/{old}").exists())
    unload = (await when(api.jobs, lambda jobs: all(job["finished_at"] for job in jobs)))[0]
    shown = {name: unload[name] for name in ("kind", "cause", "status", "version", "requested_by")}
    assert shown == {
        "kind": "unload", "cause": "swap", "status": "completed", "version": 1, "requested_by": "system",
    }  # fmt: skip
    assert (await api.model("m"))["job_id"] == load["id"]


@pytest.mark.parametrize(
    ("strategy", "cause"), [("beside", "ModelLoaded"), ("in_place", "LoadRequested"), ("auto", "ModelLoaded")]
)
async def test_strategy_decides_when_old_version_is_unloaded(
    api: LocalApi, repository: Path, strategy: str, cause: str
) -> None:
    """TensorFlow Serving #2017."""
    save(models.add(1), repository, "m")
    save(models.add(2), repository, "m", 2)
    await api.load("m", version=1)
    await api.load("m", version=2, strategy=strategy)
    assert await result_of(api, "m") == 3
    [swap] = [job for job in await api.jobs() if job["kind"] == "unload"]
    events = {event.id: event for event in await api.events("m")}
    assert events[str(getattr(events[swap["id"]].data, "cause_event_id", None))].type == cause


async def test_lost_instance_is_shown_until_it_is_replaced(api: LocalApi, repository: Path) -> None:
    path = save(models.add(1), repository, "m") / "model.onnx"
    good = path.read_bytes()
    job = await api.load("m", instances=2)
    whole = await api.model("m")
    assert (whole["instances"], whole["error"]) == (2, None)
    path.write_bytes(TEXT)  # the recovery fails for a while
    os.kill(api.worker("m").pid, signal.SIGKILL)
    left = await api.model_when("m", instances=1)
    assert left["error"]["code"] in {"worker_died", "invalid_model"}
    assert left == whole | {"instances": 1, "error": left["error"]}
    assert await result_of(api, "m") == 2
    path.write_bytes(good)
    again = await api.model_when("m", instances=2)
    assert (again["state"], again["error"]) == ("loaded", None)
    recovery = await api.job(again["job_id"])
    assert (recovery["cause"], recovery["requested_by"]) == ("recovery", "system")
    assert recovery["id"] != job["id"]


# Failures


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        pytest.param(CORRUPT, "invalid_model", "INVALID_PROTOBUF", id="corrupt"),
        pytest.param(b"", "invalid_model", "No graph was found", id="empty"),
        pytest.param(TEXT, "invalid_model", "INVALID_PROTOBUF", id="text"),
        pytest.param(
            models.unknown_operator().SerializeToString(), "invalid_model", "Frobnicate", id="operator"
        ),
        pytest.param(
            models.crash_on_load().SerializeToString(), "worker_died", "killed by signal", id="crash"
        ),
        pytest.param(
            models.divide().SerializeToString(), "warm_up_failed", "Integer division by zero", id="warm-up"
        ),
        pytest.param(
            models.memory_bomb_on_load().SerializeToString(), "out_of_memory", str(200 * MIB), id="memory"
        ),
        pytest.param(models.endless_load(), "timeout", "within 3 s", id="timeout"),
    ],
)  # fmt: skip
async def test_failed_load_says_why_and_disturbs_nothing(
    shared: LocalApi, content: bytes, code: str, message: str
) -> None:
    """Triton #6711; llama-swap #92."""
    repository, bad = shared.config.repository, f"{code}-{len(content)}"
    save(models.add(1), repository, "good")
    save_bytes(content, repository, bad)
    await shared.load("good")
    limits = {"timeout": {"timeout_s": 3}, "out_of_memory": {"memory_limit_bytes": 200 * MIB}}
    job = await shared.failed_load(bad, **limits.get(code, {}))
    assert job["error"]["code"] == code
    assert message in job["error"]["message"]
    model = await shared.model(bad)
    assert (model["state"], model["version"], model["error"]) == ("failed", 1, job["error"])
    assert await result_of(shared, "good") == 2
    assert (await shared.get("/health/ready")).status == 200
    assert (await shared.types(bad)).count("WorkerExited") == (1 if code == "worker_died" else 0)
    save(models.add(2), repository, bad)
    await shared.load(bad)
    assert await result_of(shared, bad) == 3


async def test_queued_load_times_out_without_starting(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    save_bytes(models.endless_load(), repository, "slow")
    save(models.identity(), repository, "m")
    await api.accepted_load("slow")
    job = await api.failed_load("m", timeout_s=1)
    assert (job["error"]["code"], job["started_at"], job["attempt"]) == ("timeout", None, 0)
    assert "1 may run at once" in job["error"]["message"]


async def test_file_that_changes_while_it_loads_fails_the_load(api: LocalApi, repository: Path) -> None:
    """Triton #356."""
    file = save(models.slow_model(600), repository, "m") / "model.onnx"
    job = await api.accepted_load("m")
    await api.job_when(job["id"], stage="loading")
    os.utime(file, ns=(1, 1))
    assert (await api.ended(job["id"]))["error"]["code"] == "model_changed"


async def test_full_queue_is_429_until_there_is_room(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    for name in ("first", "last"):
        save(models.identity(), repository, name)
    save_bytes(models.endless_load(), repository, "slow")
    await api.accepted_load("slow")
    first = await api.accepted_load("first")
    others = [RequestLoad(f"x{number}", 1, (), "alice") for number in range(MAX_QUEUE - 2)]
    await asyncio.gather(*map(api.app[LOG].submit, others))
    answer = await api.post("/api/v1/models/last/load")
    assert answer.refusal == (429, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    joined = await api.post("/api/v1/models/first/load")
    assert (joined.status, joined.json["id"]) == (202, first["id"])
    await api.unload("first", force=True)
    await api.accepted_load("last")


@pytest.mark.parametrize(("setting", "is_run"), [({}, True), ({"warm_up": "off"}, False)])
async def test_warm_up_setting_decides_on_first_inference(
    start: Start, repository: Path, setting: dict[str, str], *, is_run: bool
) -> None:
    save(models.add(), repository, "m")
    api = await start(**setting)
    await api.load("m")
    [loaded] = await api.data_of(ModelLoaded)
    assert (loaded.durations.warming_up_us is not None) is is_run


async def test_failed_warm_up_can_be_switched_off_per_model(api: LocalApi, repository: Path) -> None:
    model = save(models.divide(), repository, "m").parent
    answer = await api.post("/v2/repository/models/m/load")
    assert answer.refusal == (400, "warm_up_failed")
    assert "[[warm_up.inputs]]" in answer.json["error"]
    (model / "loadledger.toml").write_text("warm_up.enabled = 1")
    answer = await api.post("/api/v1/models/m/load")
    assert answer.refusal == (400, "invalid_defaults")
    assert "m/loadledger.toml: warm_up.enabled: Expected `bool`" in answer.json["detail"]
    (model / "loadledger.toml").write_text("warm_up.enabled = false")
    await api.load("m")
