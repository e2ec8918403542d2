"""`POST …/load` with real models: answers, versions, settings that change in place, swaps and failures."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support import models
from support.http import LIMIT_S, ONE, LocalApi, local_server, when
from support.ledgers import unwritable

from events import jobcommands
from events.types import Cause, ModelLoaded, WorkerExited, digest_of
from runtime.cgroups import count_usable_cpus
from server.check import find_unusable_paths
from server.config import Config

JOB = {
    "id", "kind", "model_id", "version", "status", "stage", "waiting_for", "created_at", "started_at",
    "finished_at", "requested_by", "cause", "cancel_requested", "superseded_by", "attempt", "position",
    "parameters", "error", "reason", "emergency",
}  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


async def result_of(api: LocalApi, model_id: str) -> float:
    """Return what `models.add` of a constant makes of 1, which tells versions apart."""
    answer = await api.infer(model_id, ONE)
    assert answer.status == 200, answer.body
    value: float = answer.json["outputs"][0]["data"][0]
    return value


# Answers


def tensor(name: str, **more: Any) -> dict[str, Any]:
    """Return a vector of any length as an answer has it."""
    return {"name": name, "datatype": "FP32", "shape": [-1], **more}


async def test_load_is_accepted_and_its_job_completes(shared: LocalApi) -> None:
    folder = shared.save(models.identity(), "m")
    answer = await shared.post("/api/v1/models/m/load", json={"timeout_s": 77}, subject="Ann")
    accepted = answer.json
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{accepted['id']}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["Vary"] == "Prefer"
    assert accepted.keys() == JOB
    assert accepted["status"] in {"pending", "in_progress"}
    job = await shared.ended(accepted["id"])
    assert all(TIME.fullmatch(job[name]) for name in ("created_at", "started_at", "finished_at"))
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert job == accepted | {
        "kind": "load", "model_id": "m", "version": 1, "status": "completed", "cause": "request",
        "attempt": 1, "requested_by": "Ann", "stage": None, "waiting_for": None, "error": None,
        "cancel_requested": False,
        "superseded_by": None, "reason": None, "emergency": None,
        "parameters": {
            "priority": "normal", "timeout_s": 77, "keep_alive_s": None, "memory_limit_bytes": None,
            "strategy": "beside", "pinned": False, "instances": 1, "max_batch_size": 0,
            "max_queue_delay_us": 0, "progress_timeout_s": 120, "threads": None,
        },
        **{name: job[name] for name in ("position", "started_at", "finished_at")},
    }  # fmt: skip
    model = await shared.model("m")
    [file] = model.pop("files")
    assert (file["path"], file["bytes"]) == ("model.onnx", (folder / "model.onnx").stat().st_size)
    assert re.fullmatch(r"[0-9a-f]{64}", file["sha256"])
    assert min(model.pop("memory_bytes"), model.pop("memory_at_load_bytes")) > 0
    assert model == {
        "brought_back": None,
        "inputs": [tensor("x", example={"shape": [16], "values": "zeros"})],
        "outputs": [tensor("y")],
        "inputs_of_version": 1,
        "parameters": job["parameters"],
        "chosen": {
            "version": 1, "parameters": job["parameters"], "by": "Ann", "at": job["finished_at"],
            "job_id": job["id"], "digest": digest_of([("model.onnx", file["sha256"])]),
        },
        "id": "m", "versions": [1], "state": "loaded", "version": 1, "next_version": None, "active": True,
        "loaded_at": job["finished_at"], "loaded_by": "Ann", "job_id": job["id"],
        "position": job["position"], "error": None, "instances": 1,
        "repository_changed": False, "not_served": None, "threads": count_usable_cpus(),
        "signature": None, "approval": None, "added_by": None,
    }  # fmt: skip
    events = await shared.events("m")
    assert [event.type for event in events] == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert {event.job_id for event in events} == {job["id"]}
    loaded = events[-1]
    assert isinstance(loaded.data, ModelLoaded)
    assert (loaded.position, loaded.data.durations.warming_up_us is None) == (model["position"], False)
    head = shared.position
    for body in ({}, {"version": 1}, {"timeout_s": 60}, {"priority": "high"}, {"instances": 1}):
        again = await shared.post("/api/v1/models/m/load", json=body, subject="Ann")
        assert (again.status, again.json) == (200, job)
    assert shared.position == head


async def test_wait_answers_202_when_time_is_up_or_server_stops(api: LocalApi) -> None:
    api.save(models.endless_load(), "m")
    job = await api.accepted_load("m")
    await api.job_when(job["id"], stage="loading")
    answer = await api.post("/api/v1/models/m/load", wait=1)
    assert (answer.status, answer.json["id"], answer.json["status"]) == (202, job["id"], "in_progress")
    api.save(models.identity(), "m", 2)
    waiting = asyncio.create_task(api.post("/api/v1/models/m/load", json={"version": 2}, wait=60))
    await when(api.jobs, lambda jobs: len(jobs) == 2)
    async with asyncio.timeout(LIMIT_S):
        await api.client.server.close()
    answer = await waiting
    assert (answer.status, answer.json["finished_at"]) == (202, None)


# Settings of a loaded model


async def test_load_that_changes_settings_completes_without_a_load(shared: LocalApi) -> None:
    shared.save(models.add(1), "changed")
    loaded = await shared.load("changed", instances=2, memory_limit_bytes=2**30)
    pid, before = shared.worker("changed").pid, await shared.model("changed")
    answer = await shared.post("/api/v1/models/changed/load", json={"pinned": True, "keep_alive_s": 60})
    assert (answer.status, answer.json["status"], answer.json["started_at"]) == (200, "completed", None)
    pinned = answer.json
    assert pinned["id"] != loaded["id"]
    assert pinned["parameters"] == loaded["parameters"] | {"pinned": True, "keep_alive_s": 60}
    chosen = {"version": 1, "parameters": pinned["parameters"], "by": "alice", "job_id": pinned["id"]}
    assert await shared.model("changed") == before | {
        "parameters": pinned["parameters"],
        "chosen": chosen | {"at": pinned["finished_at"], "digest": before["chosen"]["digest"]},
    }  # fmt: skip
    used = (await shared.get("/api/v1/resources")).json["models"]
    assert [(use["pinned"], use["keep_alive_s"]) for use in used if use["model_id"] == "changed"] == [
        (True, 60)
    ]
    assert (await shared.types("changed"))[3:] == ["LoadRequested", "ModelSettingsChanged"]
    assert (await shared.load("changed", pinned=True))["id"] == loaded["id"]
    assert shared.worker("changed").pid == pid


async def test_changed_settings_of_dead_worker_start_another(shared: LocalApi) -> None:
    shared.save(models.add(1), "dead")
    await shared.load("dead")
    worker = shared.worker("dead")
    worker.kill()
    await asyncio.shield(worker.ended)
    job = await shared.accepted_load("dead", pinned=True)
    assert (await shared.ended(job["id"]))["status"] == "completed"
    assert shared.worker("dead").pid != worker.pid
    assert (await shared.infer("dead", ONE)).status == 200


# Workers that die


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bare(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """A server without a store, that only reads its repository and records nothing that workers print."""
    settings = {"store_size": "off", "ledger_stderr": "off", "repository_writable": "off"}
    async with local_server(tmp_path_factory.mktemp("bare"), **settings) as api:
        yield api


@pytest.mark.parametrize("is_recorded", [True, False])
async def test_printed_input_of_a_client_is_recorded_if_on(
    shared: LocalApi, bare: LocalApi, caplog: pytest.LogCaptureFixture, *, is_recorded: bool
) -> None:
    """With off, the ledger has nothing that a worker printed; the operator's log has it."""
    api = shared if is_recorded else bare
    api.save(models.look_up(), "table")
    api.save(models.crash_on_load(), "crash")
    await api.load("table")
    asked = await api.infer("table", {"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [4711]})
    assert asked.refusal == (400, "invalid_input")
    api.worker("table").kill()
    error = (await api.failed_load("crash"))["error"]
    assert error["message"].startswith("the worker was killed by signal 8 while it loaded the model")

    async def exits() -> list[WorkerExited]:
        events = [*await api.events("table"), *await api.events("crash")]
        return [event.data for event in events if isinstance(event.data, WorkerExited)]

    found = await when(exits, lambda found: len(found) == 2)
    recorded = "\n".join([error["message"], *(line for each in found for line in each.stderr)])
    words = ("idx=4711", "Fatal Python error: Floating")
    assert [word in recorded for word in words] == 2 * [is_recorded]
    assert [word in caplog.text for word in words] == 2 * [not is_recorded]
    assert is_recorded or [each.stderr for each in found] == 2 * [()]


async def test_stderr_shows_running_and_last_exited_worker(shared: LocalApi) -> None:
    shared.save(models.crash_on_run(), "divide")
    await shared.load("divide")
    worker = shared.worker("divide")
    inputs = {"a": models.LOWEST, "b": -1}
    tensors = [{"name": name, "datatype": "INT64", "shape": [1], "data": [n]} for name, n in inputs.items()]
    assert (await shared.infer("divide", *tensors)).status == 503

    async def printed() -> Any:
        return (await shared.get("/api/v1/models/divide/stderr")).json

    seen = await when(printed, lambda seen: seen["last_exited"] is not None and len(seen["workers"]) > 0)
    assert seen["recorded"] is True
    assert [(each["version"], each["lines"]) for each in seen["workers"]] == [(1, [])]
    assert (seen["last_exited"]["worker_id"], seen["last_exited"]["version"]) == (worker.worker_id, 1)
    assert any("point exception" in line for line in seen["last_exited"]["lines"])
    denied = await shared.get("/api/v1/models/divide/stderr", roles=("audit", "infer"))
    assert denied.refusal == (403, "forbidden")


async def test_swap_serves_old_version_until_new_one_is_loaded(shared: LocalApi) -> None:
    """TensorFlow Serving #2017."""
    for version, model in ((1, models.add(1)), (2, models.endless_load()), (3, models.add(3))):
        shared.save(model, "swapped", version)
    await shared.load("swapped", version=1)
    swap = await shared.accepted_load("swapped", version=2)
    await shared.job_when(swap["id"], stage="loading")
    model = await shared.model("swapped")
    assert (model["state"], model["version"], model["next_version"]) == ("loaded", 1, 2)
    assert await result_of(shared, "swapped") == 2
    os.kill(shared.worker("swapped").pid, signal.SIGKILL)
    assert (await shared.ended(swap["id"]))["status"] == "failed"
    model = await shared.model("swapped")
    assert (model["state"], model["version"], model["next_version"]) == ("loaded", 1, None)
    assert model["error"]["code"] == "worker_died"
    assert await result_of(shared, "swapped") == 2
    load = await shared.load("swapped", version=3)
    assert await result_of(shared, "swapped") == 4
    [unload, *_] = await shared.jobs("?model=swapped")
    shown = {name: unload[name] for name in ("kind", "cause", "version", "requested_by")}
    assert shown == {"kind": "unload", "cause": "swap", "version": 1, "requested_by": "system"}
    assert (await shared.model("swapped"))["job_id"] == load["id"]


# Swaps and recovery


async def test_lost_instance_is_shown_until_it_is_replaced(shared: LocalApi) -> None:
    shared.save(models.add(1), "lost")
    await shared.load("lost", instances=2)
    whole = await shared.model("lost")
    assert (whole["instances"], whole["error"]) == (2, None)
    with unwritable(shared.ledger, "LoadRequested"):  # the recovery cannot begin
        os.kill(shared.worker("lost").pid, signal.SIGKILL)
        left = await shared.model_when("lost", instances=1)
        assert left["error"]["code"] == "worker_died"
        assert left == whole | {name: left[name] for name in ("instances", "error", "memory_bytes")}
        assert left["memory_bytes"] < whole["memory_bytes"]
        assert await result_of(shared, "lost") == 2
    again = await shared.model_when("lost", instances=2)
    assert (again["state"], again["error"]) == ("loaded", None)
    recovery = await shared.job(again["job_id"])
    assert (recovery["cause"], recovery["requested_by"]) == ("recovery", "system")


# Failures


async def test_no_answer_names_a_folder_of_the_server(shared: LocalApi) -> None:
    """Messages of ONNX Runtime and crashing workers have absolute paths; roles infer and audit see none."""
    config = shared.config
    shared.save(models.unknown_operator(), "unknown")
    shared.save(models.crash_on_load(), "crashing")
    (config.repository / "unfit").mkdir()
    (config.repository / "unfit" / "1").symlink_to(config.repository / "unknown" / "1")
    (config.repository / "unfit" / "loadledger.toml").write_text("instances = 'two'")
    failed = [await shared.failed_load(model_id) for model_id in ("unknown", "crashing")]
    assert "has no operator Frobnicate" in failed[0]["error"]["message"]
    own = (config.repository, config.data)
    folders = {*map(str, own), *map(os.path.realpath, own), sys.prefix, sys.base_prefix} - {"/usr"}
    get, post = shared.get, shared.post
    answers = [
        *[await get(path, roles=("infer",)) for path in (
            "/api/v1/models", "/api/v1/models/unknown", "/api/v1/models/crashing", "/api/v1/models/none",
            "/api/v1/jobs?model=unknown", f"/api/v1/jobs/{failed[1]['id']}", "/api/v1/resources",
            "/v2/models/unknown", "/v2/models/crashing/config", "/v2/models/unknown/stats",
            "/v2/models/unfit", "/openapi.yaml",
        )],
        await post("/v2/repository/index", roles=("infer",)),
        await post("/v2/models/unknown/infer", json={"inputs": []}, roles=("infer",)),
        await post("/v2/repository/models/unknown/load"),
        await post("/api/v1/models/unfit/load"),
        *[await get(f"/api/v1/events?model={name}", roles=("audit",)) for name in ("unknown", "crashing")],
    ]  # fmt: skip
    told = {answer.status for answer in answers}
    assert told >= {200, 400, 404, 503}
    for answer in answers:
        assert not [folder for folder in folders if folder in answer.body.decode()]
    assert await shared.types("crashing") == ["LoadRequested", "LoadStarted", "WorkerExited", "LoadFailed"]


async def test_load_beyond_a_full_queue_is_429(shared: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = replace(jobcommands.RULES[Cause.REQUEST], most_unended=1)
    monkeypatch.setitem(jobcommands.RULES, Cause.REQUEST, rule)
    shared.save(models.endless_load(), "first")
    shared.save(models.identity(), "beyond")
    first = await shared.accepted_load("first")
    answer = await shared.post("/api/v1/models/beyond/load")
    assert answer.refusal == (429, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    joined = await shared.post("/api/v1/models/first/load")
    assert (joined.status, joined.json["id"]) == (202, first["id"])
    await shared.unload("first", force=True)


# Files of the repository


async def test_newer_files_of_the_repository_are_shown(shared: LocalApi) -> None:
    async def is_changed() -> bool | None:
        shown: bool | None = (await shared.model("newer"))["repository_changed"]
        return shown

    folder = shared.save(models.add(1), "newer")
    assert await is_changed() is None
    first = await shared.load("newer")
    position = shared.position
    assert await is_changed() is False
    os.utime(folder / "model.onnx")
    assert await is_changed() is True
    equal = await shared.load("newer")
    assert (equal["id"] != first["id"], equal["started_at"]) == (True, None)
    assert ((await shared.model("newer"))["job_id"], await is_changed()) == (first["id"], False)
    assert (await shared.load("newer"))["id"] == first["id"]
    shared.save(models.add(2), "newer")
    assert await is_changed() is True
    [listed] = [each for each in (await shared.get("/api/v1/models")).json["models"] if each["id"] == "newer"]
    assert listed["repository_changed"] is True
    assert (await shared.get(f"/api/v1/models/newer?at={position}")).json["repository_changed"] is None
    assert (await shared.load("newer"))["started_at"] is not None
    assert await is_changed() is False


@pytest.mark.asyncio(loop_scope="module")
async def test_load_without_a_store_takes_the_repositorys_files(bare: LocalApi) -> None:
    folder = bare.save(models.add(1), "m")
    (folder.parent / "1.sig").write_bytes(b"signature")
    await bare.load("m")
    loaded = (await bare.events("m"))[-1].data
    assert isinstance(loaded, ModelLoaded)
    assert (loaded.verified, [file.path for file in loaded.files]) == (False, ["1.sig", "model.onnx"])
    assert not (bare.config.data / "store").exists()
    writable = Config(repository=Path(), data=Path(), store_size="off", repository_writable="on")
    mistakes = [place for place, _ in find_unusable_paths(asdict(writable))]
    assert "--repository-writable" in mistakes


async def test_files_in_a_folder_named_as_the_model_are_served(shared: LocalApi, bare: LocalApi) -> None:
    for api in (shared, bare):
        inner = api.config.repository / "inner/1/model.onnx"
        inner.mkdir(parents=True)
        (inner / "model.onnx").write_bytes(models.external("data/w.bin").SerializeToString())
        (inner / "data").mkdir()
        (inner / "data/w.bin").write_bytes(models.external_bytes())
        await api.load("inner")
        loaded = await api.model("inner")
        assert [file["path"] for file in loaded["files"]] == ["data/w.bin", "model.onnx"]
        assert loaded["repository_changed"] is False
        assert loaded["inputs"]


@pytest.mark.asyncio(loop_scope="module")
async def test_server_that_only_reads_refuses_changes(bare: LocalApi) -> None:
    bare.save(models.add(1), "there")
    binary = {"Content-Type": "application/octet-stream"}
    for answer in (
        await bare.send("PUT", "/api/v1/models/m/versions/1", data=b"x", headers=binary),
        await bare.send("DELETE", "/api/v1/models/there/versions/1"),
    ):
        assert answer.refusal == (409, "repository_read_only")
