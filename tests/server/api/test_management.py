"""Loading and unloading real models over HTTP, and what the answers, the jobs and the ledger say of it."""

import asyncio
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
from support import models
from support.http import LIMIT_S, Json, LocalApi, when
from support.models import CORRUPT, TEXT, save, save_bytes
from support.workers import computing, until

from events.accept import MAX_QUEUE
from events.commands import RequestLoad
from events.types import LoadRequested, UnloadRequested, WorkerExited
from runtime.memory import descendants
from server.app import LEDGER
from server.appkeys import LOG

Start = Callable[..., Awaitable[LocalApi]]

JOB = {
    "id", "kind", "model_id", "version", "status", "stage", "waiting_for", "created_at", "started_at",
    "finished_at", "requested_by", "cause", "cancel_requested", "attempt", "position", "parameters", "error",
}  # fmt: skip
MODEL = {
    "id", "versions", "state", "version", "next_version", "active", "loaded_at", "loaded_by", "job_id",
    "position", "files", "prepared", "memory_bytes", "error", "instances",
}  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
MIB = 2**20
ONE = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
NO_LOADS = """CREATE TRIGGER no_loads BEFORE INSERT ON events
WHEN json_extract(NEW.body, '$.type') = 'LoadRequested' BEGIN SELECT RAISE(ABORT, 'not now'); END"""


@cache
def endless_load() -> bytes:
    """A model that takes minutes to load: tests wait for its load to begin, never for its end."""
    content: bytes = models.slow_model(depth=2000).SerializeToString()
    return content


async def value_of(api: LocalApi, model_id: str) -> float:
    """What `models.add` of a constant makes of 1: tells who answers."""
    answer = await api.infer(model_id, ONE)
    assert answer.status == 200, answer.body
    value: float = answer.json["outputs"][0]["data"][0]
    return value


async def gone(pid: int) -> None:
    """Wait until there is no such process, not even a dead one."""
    await until(lambda: not exists(pid))


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def pages(api: LocalApi, kind: str, limit: int, count: int) -> list[Json]:
    """Return the members of a list's pages, of which there must be so many."""
    seen, cursor = [], ""
    for left in reversed(range(count)):
        page = (await api.get(f"/api/v1/{kind}?limit={limit}{cursor}")).json
        assert page.keys() == {kind, "as_of", "next_cursor"}
        assert page["as_of"] == api.position
        assert (page["next_cursor"] is None) == (left == 0)
        seen += page[kind]
        cursor = f"&cursor={page['next_cursor']}"
    return seen


# What a load and an unload look like


async def test_a_load_is_answered_at_once_with_a_job_that_can_be_followed_to_its_end(
    api: LocalApi, repository: Path
) -> None:
    folder = save(models.identity(), repository, "m")
    answer = await api.post("/api/v1/models/m/load", json={"timeout_s": 77}, subject="Ann")
    accepted = answer.json
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{accepted['id']}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["Vary"] == "Prefer"
    assert accepted.keys() == JOB
    assert (accepted["status"], accepted["finished_at"], accepted["error"]) in {
        (status, None, None) for status in ("pending", "in_progress")
    }
    job = await api.ended(accepted["id"])
    assert job.keys() == JOB
    assert {name: job[name] for name in ("kind", "model_id", "version", "status", "cause", "attempt")} == {
        "kind": "load", "model_id": "m", "version": 1, "status": "completed", "cause": "request",
        "attempt": 1,
    }  # fmt: skip
    assert job["requested_by"] == "Ann"
    assert (job["stage"], job["waiting_for"], job["error"]) == (None, None, None)
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert all(TIME.fullmatch(job[name]) for name in ("created_at", "started_at", "finished_at"))
    assert job["parameters"] == {
        "priority": "normal", "timeout_s": 77, "keep_alive_s": None, "memory_limit_bytes": None,
        "strategy": "beside", "pinned": False, "instances": 1, "max_batch_size": 0, "max_queue_delay_us": 0,
    }  # fmt: skip
    model = await api.model("m")
    assert model.keys() == MODEL
    [file] = model.pop("files")
    assert (file["path"], file["bytes"]) == ("model.onnx", (folder / "model.onnx").stat().st_size)
    assert re.fullmatch(r"[0-9a-f]{64}", file["sha256"])
    assert model.pop("memory_bytes") > 0
    assert model == {
        "id": "m", "versions": [1], "state": "loaded", "version": 1, "next_version": None, "active": True,
        "loaded_at": job["finished_at"], "loaded_by": "Ann", "job_id": job["id"],
        "position": job["position"], "prepared": None, "error": None, "instances": 1,
    }  # fmt: skip
    assert await api.types("m") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert {event.job_id for event in await api.events("m")} == {job["id"]}
    assert (await api.events("m"))[-1].position == model["position"]


async def test_an_unload_ends_the_process_and_says_so(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    load = await api.load("m")
    pid = api.worker("m").pid
    answer = await api.post("/api/v1/models/m/unload", subject="Bob")
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json['id']}"
    assert "Retry-After" in answer.headers
    job = await api.ended(answer.json["id"])
    assert not exists(pid)
    assert (job["kind"], job["status"], job["version"], job["requested_by"]) == (
        "unload", "completed", 1, "Bob",
    )  # fmt: skip
    assert job["parameters"] == {"force": False, "load_job_id": load["id"]}
    model = await api.model("m")
    assert (model["state"], model["active"], model["loaded_at"], model["files"], model["memory_bytes"]) == (
        "unloaded", False, None, [], None,
    )  # fmt: skip
    assert (await api.types("m"))[3:] == ["UnloadRequested", "UnloadStarted", "ModelUnloaded"]


async def test_a_model_that_was_never_loaded_is_shown_with_its_versions(
    api: LocalApi, repository: Path
) -> None:
    for version in (1, 2, 10):
        save(models.identity(), repository, "m", version)
    assert await api.model("m") == {
        "id": "m", "versions": [1, 2, 10], "state": "unloaded", "version": None, "next_version": None,
        "active": False, "loaded_at": None, "loaded_by": None, "job_id": None, "position": None, "files": [],
        "prepared": None, "memory_bytes": None, "error": None, "instances": None,
    }  # fmt: skip


async def test_without_a_version_the_highest_is_loaded_and_with_one_that(
    api: LocalApi, repository: Path
) -> None:
    for version in (2, 9, 10):
        save(models.add(version), repository, "m", version)
    assert (await api.load("m"))["version"] == 10
    assert (await api.load("m", version=2))["version"] == 2
    assert await value_of(api, "m") == 3
    assert (await api.model("m"))["version"] == 2


# Instances


async def test_a_model_that_lost_an_instance_says_so_and_answers_until_it_is_whole(
    api: LocalApi, repository: Path
) -> None:
    path = save(models.add(1), repository, "m") / "model.onnx"
    good = path.read_bytes()
    job = await api.load("m", instances=2)
    assert job["parameters"]["instances"] == 2
    whole = await api.model("m")
    assert (whole["instances"], whole["error"]) == (2, None)
    path.write_bytes(TEXT)  # so that it stays as it is for a while
    os.kill(api.worker("m").pid, signal.SIGKILL)
    left = await api.model_when("m", instances=1)
    assert (left["state"], left["job_id"], left["memory_bytes"]) == (
        "loaded", job["id"], whole["memory_bytes"],
    )  # fmt: skip
    assert left["error"]["code"] in {"worker_died", "invalid_model"}
    assert await value_of(api, "m") == 2
    path.write_bytes(good)
    again = await api.model_when("m", instances=2)
    assert (again["state"], again["error"]) == ("loaded", None)
    assert (await api.job(again["job_id"]))["cause"] == "recovery"
    await api.unload("m")
    assert (await api.model("m"))["instances"] is None


async def test_a_load_that_asks_for_more_instances_gives_them_to_a_model_that_is_loaded(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    first = await api.load("m")
    second = await api.load("m", instances=2)
    assert second["id"] != first["id"]
    assert (await api.model("m"))["instances"] == 2
    for body in ({}, {"instances": 2}, {"timeout_s": 50}):  # none asks for fewer
        assert (await api.load("m", **body))["id"] == second["id"]


# The preference to wait


async def test_wait_is_answered_with_the_ended_job_whatever_its_outcome(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "good")
    save_bytes(TEXT, repository, "bad")
    for model_id, status in (("good", "completed"), ("bad", "failed")):
        answer = await api.post(f"/api/v1/models/{model_id}/load", wait=60)
        assert (answer.status, answer.json["status"]) == (200, status)
        assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json['id']}"
        assert "Retry-After" not in answer.headers


async def test_a_wait_that_is_too_short_is_answered_202_and_the_job_goes_on(
    api: LocalApi, repository: Path
) -> None:
    save_bytes(endless_load(), repository, "m")
    job = await api.accepted_load("m")
    await api.job_when(job["id"], status="in_progress")
    answer = await api.post("/api/v1/models/m/load", wait=1)
    assert (answer.status, answer.json["id"], answer.json["status"]) == (202, job["id"], "in_progress")
    assert (await api.job(job["id"]))["status"] == "in_progress"


async def test_a_server_that_stops_answers_who_waits_with_202(api: LocalApi, repository: Path) -> None:
    save_bytes(endless_load(), repository, "m")
    waiting = asyncio.create_task(api.post("/api/v1/models/m/load", wait=60))
    await when(api.jobs, lambda jobs: [job["stage"] for job in jobs] == ["loading"])
    async with asyncio.timeout(LIMIT_S):
        await api.client.server.close()
    answer = await waiting
    assert (answer.status, answer.json["status"]) == (202, "in_progress")


# Nothing to do, and the same asked twice


async def test_a_load_of_what_is_loaded_is_answered_with_its_job_and_appends_nothing(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    job = await api.load("m", timeout_s=50)
    head = api.position
    for body in ({}, {"version": 1}, {"timeout_s": 60}):
        answer = await api.post("/api/v1/models/m/load", json=body)
        assert (answer.status, answer.json) == (200, job)
    assert api.position == head


async def test_requests_that_are_refused_and_reads_append_nothing(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    head = api.position
    for path in (
        "m/unload",
        "unload",
        "unload?force=true",
        "m/unload?force=true",
        "nope/load",
        "nope/unload",
    ):
        assert (await api.post(f"/api/v1/models/{path}")).status in {404, 409}
    for path in ("models", "models/m", "jobs"):
        assert (await api.get(f"/api/v1/{path}")).status == 200
    assert api.position == head


async def test_identical_loads_at_once_are_one_job(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    answers = await asyncio.gather(
        *(api.post("/api/v1/models/m/load", json={"timeout_s": 100 + i}, wait=60) for i in range(8))
    )
    assert {answer.status for answer in answers} == {200}
    [job] = {answer.json["id"]: answer.json for answer in answers}.values()
    [asked] = await api.data_of(LoadRequested)
    assert job["parameters"]["timeout_s"] == asked.timeout_s
    assert len(await api.jobs()) == 1


async def test_identical_unloads_at_once_are_one_job(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    answers = await asyncio.gather(*(api.post("/api/v1/models/m/unload") for _ in range(8)))
    done = [answer for answer in answers if answer.status in {200, 202}]
    assert len({answer.json["id"] for answer in done}) == 1
    assert {answer.refusal for answer in answers if answer not in done} <= {(409, "not_loaded")}
    await api.ended(done[0].json["id"])
    assert len(await api.data_of(UnloadRequested)) == 1


async def test_a_load_and_an_unload_at_once_end_in_the_order_of_their_acceptance(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    unload, load = await asyncio.gather(
        api.post("/api/v1/models/m/unload"), api.post("/api/v1/models/m/load", wait=60)
    )
    for answer in (unload, load):
        assert (await api.ended(answer.json["id"]))["status"] == "completed"
    state = "loaded" if unload.json["position"] < load.json["position"] else "unloaded"
    assert (await api.model("m"))["state"] == state


# Unloading


async def test_unload_without_a_name_ends_the_model_loaded_last_then_the_one_before(
    api: LocalApi, repository: Path
) -> None:
    for model_id in ("a", "b", "c"):
        save(models.identity(), repository, model_id)
        await api.load(model_id)
    await api.load("a")  # changes nothing, so it does not make "a" the active one
    for model_id in ("c", "b", "a"):
        active = [
            model["id"] for model in (await api.get("/api/v1/models")).json["models"] if model["active"]
        ]
        assert active == [model_id]
        assert (await api.post("/api/v1/models/unload", wait=60)).json["model_id"] == model_id
    answer = await api.post("/api/v1/models/unload")
    assert answer.refusal == (409, "nothing_loaded")


async def test_unload_of_what_is_in_the_repository_and_not_loaded_is_409(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    for query in ("", "?force=true", "?force=false"):
        assert (await api.post(f"/api/v1/models/m/unload{query}")).refusal == (409, "not_loaded")


async def test_a_model_whose_files_are_gone_is_shown_and_can_be_unloaded_as_long_as_it_is_loaded(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    shutil.rmtree(repository / "m")
    assert await value_of(api, "m") == 2
    model = await api.model("m")
    assert (model["versions"], model["state"]) == ([], "loaded")
    assert [each["id"] for each in (await api.get("/api/v1/models")).json["models"]] == ["m"]
    assert (await api.post("/api/v1/models/m/load")).refusal == (404, "unknown_model")
    await api.unload("m")
    assert (await api.post("/api/v1/models/m/unload")).refusal == (404, "unknown_model")
    assert (await api.get("/api/v1/models/m")).refusal == (404, "unknown_model")
    assert (await api.infer("m", ONE)).refusal == (404, "unknown_model")
    assert (await api.get("/api/v1/models")).json["models"] == []


async def test_a_model_that_failed_is_forgotten_with_its_files(api: LocalApi, repository: Path) -> None:
    save_bytes(TEXT, repository, "m")
    await api.failed_load("m")
    assert (await api.model("m"))["state"] == "failed"
    shutil.rmtree(repository / "m")
    assert (await api.get("/api/v1/models/m")).refusal == (404, "unknown_model")
    assert (await api.post("/api/v1/models/m/unload")).refusal == (404, "unknown_model")
    assert (await api.get("/api/v1/models")).json["models"] == []


async def test_a_model_that_only_loads_is_unloaded_with_force_only(api: LocalApi, repository: Path) -> None:
    save_bytes(endless_load(), repository, "m")
    load = await api.accepted_load("m")
    await api.job_when(load["id"], stage="loading")
    pid = api.worker("m").pid
    answer = await api.post("/api/v1/models/m/unload")
    assert answer.refusal == (409, "not_loaded")
    assert "force" in answer.json["detail"]
    unload = await api.unload("m", force=True)
    assert unload["parameters"] == {"force": True, "load_job_id": load["id"]}
    assert (await api.job(load["id"]))["status"] == "cancelled"
    await gone(pid)
    assert (await api.model("m"))["state"] == "unloaded"
    assert await api.types("m") == [
        "LoadRequested", "LoadStarted", "UnloadRequested", "JobCancelled", "UnloadStarted", "ModelUnloaded",
    ]  # fmt: skip


async def test_force_with_nothing_loaded_ends_the_oldest_load(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    jobs = []
    for model_id in ("a", "b"):
        save_bytes(endless_load(), repository, model_id)
        jobs.append(await api.accepted_load(model_id))
    for model_id, job in zip(("a", "b"), jobs, strict=True):
        answer = await api.post("/api/v1/models/unload?force=true", wait=60)
        assert (answer.json["model_id"], answer.json["status"]) == (model_id, "completed")
        assert (await api.job(job["id"]))["status"] == "cancelled"
    assert (await api.post("/api/v1/models/unload?force=true")).refusal == (409, "nothing_loaded")


async def test_force_ends_a_worker_that_is_stopped(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    pid = api.worker("m").pid
    os.kill(pid, signal.SIGSTOP)
    await api.unload("m", force=True)
    await gone(pid)


async def test_force_ends_a_load_whose_worker_is_stopped(api: LocalApi, repository: Path) -> None:
    save_bytes(endless_load(), repository, "m")
    load = await api.accepted_load("m")
    await api.job_when(load["id"], stage="loading")
    pid = api.worker("m").pid
    os.kill(pid, signal.SIGSTOP)
    await api.unload("m", force=True)
    await gone(pid)
    assert (await api.job(load["id"]))["status"] == "cancelled"


async def test_an_unload_waits_for_running_requests_and_force_does_not(
    api: LocalApi, repository: Path
) -> None:
    save(models.counting_loop(), repository, "m")
    await api.load("m")
    worker = api.worker("m")
    is_computing = computing(worker.pid)
    trips = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}
    running = asyncio.create_task(api.infer("m", trips))
    await until(is_computing)
    draining = (await api.post("/api/v1/models/m/unload")).json
    job = await api.job_when(draining["id"], stage="draining")
    assert job["status"] == "in_progress"
    assert (await api.model("m"))["state"] == "unloading"
    again = await api.post("/api/v1/models/m/unload")
    assert (again.status, again.json["id"]) == (202, draining["id"])
    refused = await api.infer("m", trips)
    assert refused.refusal == (503, "model_unloading")
    assert "Retry-After" in refused.headers
    forced = await api.unload("m", force=True)
    assert forced["id"] != draining["id"]
    assert (await api.job(draining["id"]))["status"] == "completed"
    assert (await running).refusal == (503, "worker_died")
    await gone(worker.pid)


async def test_an_unload_does_not_wait_longer_than_the_drain_timeout(start: Start, repository: Path) -> None:
    save(models.counting_loop(), repository, "m")
    api = await start(drain_timeout_s=0.2)
    await api.load("m")
    is_computing = computing(api.worker("m").pid)
    trips = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}
    running = asyncio.create_task(api.infer("m", trips))
    await until(is_computing)
    await api.unload("m")
    assert (await running).status == 503


# Failures


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (CORRUPT, "INVALID_PROTOBUF"),
        (b"", "No graph was found"),
        (TEXT, "INVALID_PROTOBUF"),
        (models.unknown_operator().SerializeToString(), "Frobnicate"),
    ],
    ids=["corrupt", "empty", "text", "unknown operator"],
)
async def test_a_file_that_is_no_model_fails_its_job_with_the_runtime_s_words_and_harms_nobody(
    api: LocalApi, repository: Path, content: bytes, says: str
) -> None:
    save(models.add(1), repository, "good")
    save_bytes(content, repository, "bad")
    await api.load("good")
    job = await api.failed_load("bad")
    assert job["error"]["code"] == "invalid_model"
    assert says in job["error"]["message"]
    model = await api.model("bad")
    assert (model["state"], model["version"], model["error"]) == ("failed", 1, job["error"])
    assert await value_of(api, "good") == 2
    assert (await api.get("/health/ready")).status == 200
    assert await api.data_of(WorkerExited) == []
    save(models.add(2), repository, "bad")
    await api.load("bad")  # failed is not a dead end
    assert await value_of(api, "bad") == 3


async def test_a_model_that_kills_its_worker_while_loading_fails_its_job_and_harms_nobody(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "good")
    save(models.crash_on_load(), repository, "bad")
    await api.load("good")
    for _ in range(2):  # and each request tries it again
        job = await api.failed_load("bad")
        assert job["error"]["code"] == "worker_died"
        assert "killed by signal" in job["error"]["message"]
    assert await api.types("bad") == ["LoadRequested", "LoadStarted", "WorkerExited", "LoadFailed"] * 2
    assert await value_of(api, "good") == 2


async def test_a_worker_killed_while_it_loads_fails_its_job(api: LocalApi, repository: Path) -> None:
    save_bytes(endless_load(), repository, "m")
    load = await api.accepted_load("m")
    await api.job_when(load["id"], stage="loading")
    os.kill(api.worker("m").pid, signal.SIGKILL)
    job = await api.ended(load["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "worker_died")
    [exited] = await api.data_of(WorkerExited)
    assert (exited.exit_code, exited.signal) == (None, signal.SIGKILL)


async def test_a_load_that_takes_longer_than_it_may_fails_and_says_what_it_waited_for(
    api: LocalApi, repository: Path
) -> None:
    save_bytes(endless_load(), repository, "m")
    job = await api.failed_load("m", timeout_s=3)  # of which a busy machine takes some for itself
    assert job["error"]["code"] == "timeout"
    assert "within 3 s" in job["error"]["message"]
    await until(lambda: len(descendants(os.getpid())) == 1)  # the fork server is left, and no worker
    assert (await api.model("m"))["state"] == "failed"


async def test_a_load_that_never_got_its_turn_fails_in_time_too(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    save_bytes(endless_load(), repository, "slow")
    save(models.identity(), repository, "m")
    await api.accepted_load("slow")
    job = await api.failed_load("m", timeout_s=1)
    assert (job["error"]["code"], job["started_at"], job["attempt"]) == ("timeout", None, 0)
    assert "a free place" in job["error"]["message"]


async def test_a_model_that_needs_more_memory_than_it_may_take_fails_its_job(
    api: LocalApi, repository: Path
) -> None:
    save(models.memory_bomb_on_load(), repository, "m")
    job = await api.failed_load("m", memory_limit_bytes=200 * MIB)
    assert job["error"]["code"] == "out_of_memory"
    assert str(200 * MIB) in job["error"]["message"]


# Queues, swaps, recovery


async def test_jobs_say_what_they_wait_for(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    save_bytes(endless_load(), repository, "slow")
    save(models.identity(), repository, "m")
    save(models.identity(), repository, "m", 2)
    slow = await api.accepted_load("slow")
    await api.job_when(slow["id"], status="in_progress", waiting_for=None)
    first = await api.accepted_load("m", version=1)
    second = await api.accepted_load("m", version=2)
    waiting = await api.job_when(first["id"], waiting_for="a free place: of loads, 1 may run at once")
    assert (waiting["status"], waiting["stage"]) == ("pending", None)
    await api.job_when(second["id"], waiting_for=f"job {first['id']} of the same model")
    await api.unload("slow", force=True)
    for job in (first, second):
        ended = await api.ended(job["id"])
        assert (ended["status"], ended["waiting_for"]) == ("completed", None)
    assert (await api.model("m"))["version"] == 2


async def test_a_full_queue_refuses_at_once_and_takes_again_when_there_is_room(
    start: Start, repository: Path
) -> None:
    api = await start(loads_at_once=1)
    for name in ("first", "last"):
        save(models.identity(), repository, name)
    save_bytes(endless_load(), repository, "slow")
    await api.accepted_load("slow")
    first = await api.accepted_load("first")
    others = [RequestLoad(f"x{number}", 1, (), "alice") for number in range(MAX_QUEUE - 2)]
    await asyncio.gather(*map(api.app[LOG].submit, others))
    answer = await api.post("/api/v1/models/last/load")
    assert answer.refusal == (429, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    again = await api.post("/api/v1/models/first/load")  # joins the one that waits
    assert (again.status, again.json["id"]) == (202, first["id"])
    await api.unload("first", force=True)
    await api.accepted_load("last")


async def test_another_version_takes_over_when_it_is_loaded_and_the_old_process_ends(
    api: LocalApi, repository: Path
) -> None:
    for version in (1, 2):
        save(models.add(version), repository, "m", version)
    await api.load("m", version=1)
    old = api.worker("m")
    load = await api.load("m", version=2)
    assert await value_of(api, "m") == 3
    await gone(old.pid)
    swap = (await when(api.jobs, lambda jobs: all(job["finished_at"] for job in jobs)))[0]
    assert (swap["kind"], swap["cause"], swap["status"], swap["version"]) == (
        "unload",
        "swap",
        "completed",
        1,
    )
    assert swap["requested_by"] == "system"
    model = await api.model("m")
    assert (model["state"], model["version"], model["next_version"], model["job_id"]) == (
        "loaded", 2, None, load["id"],
    )  # fmt: skip


async def test_while_a_version_loads_beside_the_old_one_serves_and_the_new_one_is_named(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m", 1)
    save_bytes(endless_load(), repository, "m", 2)
    await api.load("m", version=1)
    swap = await api.accepted_load("m", version=2)
    await api.job_when(swap["id"], stage="loading")
    model = await api.model("m")
    assert (model["state"], model["version"], model["next_version"]) == ("loaded", 1, 2)
    assert await value_of(api, "m") == 2
    os.kill(api.worker("m").pid, signal.SIGKILL)
    assert (await api.ended(swap["id"]))["status"] == "failed"
    model = await api.model("m")
    assert (model["state"], model["version"], model["next_version"]) == ("loaded", 1, None)
    assert model["error"]["code"] == "worker_died"
    assert await value_of(api, "m") == 2


async def test_force_ends_a_swap_and_what_serves(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m", 1)
    save_bytes(endless_load(), repository, "m", 2)
    await api.load("m", version=1)
    old = api.worker("m").pid
    swap = await api.accepted_load("m", version=2)
    await api.job_when(swap["id"], stage="loading")
    new = api.worker("m").pid
    await api.unload("m", force=True)
    assert (await api.job(swap["id"]))["status"] == "cancelled"
    await gone(old)
    await gone(new)
    assert (await api.model("m"))["state"] == "unloaded"


async def test_an_unload_in_mid_swap_waits_for_it_and_ends_the_result(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    save_bytes(endless_load(), repository, "slow")
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


async def test_a_load_of_changed_files_is_a_reload(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    first = await api.load("m")
    save(models.add(2), repository, "m")
    second = await api.load("m")
    assert second["id"] != first["id"]
    assert await value_of(api, "m") == 3


async def test_a_worker_that_dies_is_replaced_and_the_ledger_says_why(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    first = await api.load("m")
    os.kill(api.worker("m").pid, signal.SIGKILL)
    jobs = await when(api.jobs, lambda jobs: len(jobs) == 2 and jobs[0]["finished_at"] is not None)
    assert (jobs[0]["cause"], jobs[0]["requested_by"], jobs[0]["status"]) == (
        "recovery",
        "system",
        "completed",
    )
    model = await api.model("m")
    assert (model["state"], model["active"], model["job_id"]) == ("loaded", True, jobs[0]["id"])
    assert jobs[0]["id"] != first["id"]
    assert await value_of(api, "m") == 2


async def test_an_unload_of_a_lost_model_ends_the_wish_to_have_it_back(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    with closing(sqlite3.connect(api.config.data / LEDGER, isolation_level=None)) as ledger:
        ledger.execute(NO_LOADS)  # so that it stays lost, however long the test takes to notice
        os.kill(api.worker("m").pid, signal.SIGKILL)
        await api.model_when("m", state="lost")
        assert (await api.post("/api/v1/models/m/unload", wait=60)).json["status"] == "completed"
        ledger.execute("DROP TRIGGER no_loads")
    assert (await api.model("m"))["state"] == "unloaded"
    assert [job["cause"] for job in await api.jobs()] == ["request", "request"]


# Lists


async def test_models_are_listed_by_id_in_pages_that_say_what_they_reflect(
    api: LocalApi, repository: Path
) -> None:
    names = ["B", "a", "a.1", "b", "c"]
    for name in names:
        save(models.identity(), repository, name)
    await api.load("b")
    seen = await pages(api, "models", limit=2, count=3)
    assert [model["id"] for model in seen] == names
    assert all(model.keys() == MODEL for model in seen)
    assert [model["state"] for model in seen].count("loaded") == 1
    assert (await api.get("/api/v1/models?limit=5")).json["next_cursor"] is None
    assert (await api.get("/api/v1/models?cursor=zzz")).json["models"] == []


async def test_jobs_are_listed_newest_first_in_pages_by_model_and_status(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "good")
    save_bytes(TEXT, repository, "bad")
    made = [
        await api.load("good"),
        await api.failed_load("bad"),
        await api.unload("good"),
        await api.load("good"),
    ]
    made.reverse()
    assert await pages(api, "jobs", limit=2, count=2) == made
    ids = [job["id"] for job in made]
    for query, expected in (
        ("?model=good", [ids[0], ids[1], ids[3]]),
        ("?status=failed", [ids[2]]),
        ("?model=good&status=completed&limit=1", [ids[0]]),
        ("?model=bad&status=completed", []),
        ("?model=%00", []),
        ("?model=%ff", []),
        ("?cursor=1", []),
    ):
        assert [job["id"] for job in await api.jobs(query)] == expected, query
