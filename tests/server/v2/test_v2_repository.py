"""The repository extension with real models: load and unload wait for their end, the index tells states."""

import asyncio
import io
import json
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.http import LIMIT_S, Answer, Json, LocalApi, when
from support.models import FLOAT, TEXT, save, save_bytes
from support.workers import computing, until

from events.types import LoadRequested, UnloadRequested
from server.validation import MAX_JSON_BYTES

TRIPS = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}


@cache
def endless_load() -> bytes:
    """A model that takes minutes to load: tests wait for its load to begin, never for its end."""
    content: bytes = models.slow_model(depth=2000).SerializeToString()
    return content


async def load(api: LocalApi, model_id: str, **config: Any) -> Answer:
    """Load as tritonclient does: no Content-Type, the configuration as JSON in a string."""
    body = {"parameters": {"config": json.dumps(config)}} if config else {}
    return await send(api, f"models/{model_id}/load", json.dumps(body).encode())


async def unload(api: LocalApi, model_id: str) -> Answer:
    body = {"parameters": {"unload_dependents": False}}
    return await send(api, f"models/{model_id}/unload", json.dumps(body).encode())


async def send(api: LocalApi, path: str, body: bytes, **options: Any) -> Answer:
    """Send a body without a Content-Type, unless `options` have one."""
    options["skip_auto_headers"] = ["Content-Type"]
    return await api.post(f"/v2/repository/{path}", data=io.BytesIO(body), **options)


def job_of(answer: Answer) -> str:
    """Return the id of the job that an empty 200 names."""
    assert (answer.status, answer.body) == (200, b"")
    return answer.headers["Location"].removeprefix("/api/v1/jobs/")


async def index(api: LocalApi, body: bytes = b"") -> list[Json]:
    answer = await send(api, "index", body, roles=("predict",))
    assert answer.status == 200, answer.body
    told: list[Json] = answer.json
    return told


def entry(name: str, number: int, state: str, **more: str) -> Json:
    return {"name": name, "version": str(number), "state": state, **more}


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


# Load


async def test_a_load_is_answered_when_the_model_can_be_asked_and_names_its_job(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    answer = await load(api, "m")
    assert (await api.get("/v2/models/m/ready")).status == 200
    job = await api.job(job_of(answer))
    assert (job["status"], job["cause"], job["requested_by"]) == ("completed", "request", "alice")
    assert await api.types("m") == ["LoadRequested", "LoadStarted", "ModelLoaded"]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b"", None), (b"{}", "text/plain"), (b'{"parameters": {}}', "application/json"), (b"{}", "x")],
)
async def test_an_empty_body_of_any_content_type_is_taken_and_preferences_change_nothing(
    api: LocalApi, repository: Path, body: bytes, content_type: str | None
) -> None:
    save(models.identity(), repository, "m")
    headers = {"Prefer": "respond-async, wait=0", **({"Content-Type": content_type} if content_type else {})}
    for verb in ("load", "unload"):
        job_of(await send(api, f"models/m/{verb}", body, headers=headers))


async def test_a_load_of_what_is_loaded_appends_nothing_and_names_the_job_behind_it(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    first, head = job_of(await load(api, "m")), api.position
    assert job_of(await load(api, "m")) == first
    assert api.position == head


async def test_loads_of_changed_files_and_of_new_versions_swap(api: LocalApi, repository: Path) -> None:
    save(models.add(1.0), repository, "m")
    first = job_of(await load(api, "m"))
    save(models.add(22.0), repository, "m")
    os.utime(repository / "m" / "1" / "model.onnx", ns=(1, 1))
    second = job_of(await load(api, "m"))
    save(models.add(3.0), repository, "m", 2)
    third = job_of(await load(api, "m"))
    assert len({first, second, third}) == 3
    assert (await api.model("m"))["version"] == 2


async def test_two_loads_at_once_are_one_job(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    answers = await asyncio.gather(*(load(api, "m") for _ in range(5)))
    assert len({job_of(answer) for answer in answers}) == 1
    assert len(await api.data_of(LoadRequested)) == 1


async def test_loads_of_two_versions_at_once_are_carried_out_one_after_the_other(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1.0), repository, "m", 1)
    save(models.add(2.0), repository, "m", 2)
    answers = await asyncio.gather(*(load(api, "m", version_policy=_version(n)) for n in (1, 2)))
    jobs = {(await api.job(job_of(answer)))["version"] for answer in answers}
    assert jobs == {1, 2}


async def test_a_client_that_goes_away_changes_nothing_about_its_load(
    api: LocalApi, repository: Path
) -> None:
    save(models.slow_model(side=500), repository, "m")
    waiting = asyncio.create_task(load(api, "m"))
    await when(api.jobs, bool)
    waiting.cancel()  # and with it the handler: the tests' server, too, cancels those of clients that left
    [job] = await api.jobs()
    assert (await api.ended(job["id"]))["status"] == "completed"
    assert job_of(await load(api, "m")) == job["id"]


async def test_a_server_that_stops_tells_who_waits_that_the_load_goes_on(
    api: LocalApi, repository: Path
) -> None:
    save_bytes(endless_load(), repository, "m")
    waiting = asyncio.create_task(load(api, "m"))
    await _loading(api, "m")
    [job] = await api.jobs()
    async with asyncio.timeout(LIMIT_S):
        await api.client.server.close()
    answer = await waiting
    assert answer.refusal == (503, "shutting_down")
    assert answer.headers["Location"] == f"/api/v1/jobs/{job['id']}"


# Loads that fail


async def failed(api: LocalApi, model_id: str, status: int, code: str, reason: str) -> None:
    """Load, and check that it failed with this code and that the words are the job's."""
    answer = await load(api, model_id)
    assert answer.refusal == (status, code)
    job = await api.job(answer.headers["Location"].removeprefix("/api/v1/jobs/"))
    assert (job["status"], job["error"]["code"]) == ("failed", code)
    assert reason in job["error"]["message"]
    expected = f"load failed for model '{model_id}': version 1: {job['error']['message']}"
    assert answer.json["error"] == expected


async def test_a_model_that_cannot_be_loaded_is_a_400_with_the_runtime_s_reason(
    api: LocalApi, repository: Path
) -> None:
    save_bytes(TEXT, repository, "text")
    save(models.unknown_operator(), repository, "m")
    await failed(api, "text", 400, "invalid_model", "")
    await failed(api, "m", 400, "invalid_model", "Frobnicate")


async def test_a_file_that_leads_out_of_the_repository_is_a_400(
    api: LocalApi, repository: Path, tmp_path: Path
) -> None:
    folder = save(models.identity(), repository, "m")
    (tmp_path / "secret").write_text("x")
    (folder / "data").symlink_to(tmp_path / "secret")
    await failed(api, "m", 400, "unsafe_file", "leads out")


async def test_no_memory_no_time_and_a_dead_worker_are_503(api: LocalApi, repository: Path) -> None:
    save(models.memory_bomb_on_load(), repository, "bomb")
    (repository / "bomb" / "loadledger.toml").write_text(f"memory_limit_bytes = {200 * 2**20}")
    await failed(api, "bomb", 503, "out_of_memory", "")
    save_bytes(endless_load(), repository, "slow")
    (repository / "slow" / "loadledger.toml").write_text("timeout_s = 1")
    await failed(api, "slow", 503, "timeout", "not loaded within 1 s")
    save(models.crash_on_load(), repository, "crash")
    await failed(api, "crash", 503, "worker_died", "killed by signal")


async def test_a_failed_swap_is_an_error_and_what_serves_goes_on(api: LocalApi, repository: Path) -> None:
    save(models.add(), repository, "m", 1)
    job_of(await load(api, "m"))
    save_bytes(TEXT, repository, "m", 2)
    answer = await load(api, "m")
    assert answer.refusal == (400, "invalid_model")
    first, second = await index(api)
    assert first == entry("m", 1, "READY")
    assert (second["version"], second["state"]) == ("2", "UNAVAILABLE")
    assert second["reason"] in answer.json["error"]


async def test_what_is_not_in_the_repository_is_404_and_what_is_no_name_400(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    head = api.position
    assert (await load(api, "none")).refusal == (404, "unknown_model")
    assert (await load(api, "m", version_policy=_version(2))).refusal == (404, "unknown_version")
    for verb in ("load", "unload"):
        assert (await send(api, f"models/..%2fm/{verb}", b"")).refusal in {
            (400, "invalid_parameter"),
            (404, "not_found"),
        }
    assert api.position == head


# The configuration that a load may bring


async def test_what_a_configuration_chooses_is_what_the_load_is_requested_with(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(FLOAT, (None, 4)), repository, "m", 1)
    save(models.identity(FLOAT, (None, 4)), repository, "m", 2)
    job = job_of(
        await load(
            api,
            "m",
            name="m",
            platform="onnxruntime_onnx",
            backend="onnxruntime",
            default_model_filename="model.onnx",
            model_transaction_policy={"decoupled": False},
            input=[],
            max_batch_size=8,
            dynamic_batching={"max_queue_delay_microseconds": "250"},
            instance_group=[{"name": "m_0", "count": 2, "kind": "KIND_CPU"}],
            version_policy=_version(1),
        )
    )
    asked = (await api.job(job))["parameters"]
    chosen = {name: asked[name] for name in ("instances", "max_batch_size", "max_queue_delay_us")}
    assert chosen == {"instances": 2, "max_batch_size": 8, "max_queue_delay_us": 250}
    assert (await api.model("m"))["version"] == 1


async def test_a_configuration_as_it_was_told_can_be_sent_back_without_inputs_and_outputs(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(FLOAT, (None, 4)), repository, "m")
    first = job_of(await load(api, "m", max_batch_size=4))
    config = (await api.get("/v2/models/m/config")).json
    del config["input"], config["output"]
    assert job_of(await load(api, "m", **config)) == first


async def test_another_configuration_of_what_is_loaded_is_a_load_of_its_own(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(FLOAT, (None, 4)), repository, "m")
    first = job_of(await load(api, "m", max_batch_size=4))
    second = job_of(await load(api, "m", max_batch_size=8))
    assert first != second
    assert job_of(await load(api, "m")) == second
    assert (await api.get("/v2/models/m/config")).json["max_batch_size"] == 8


async def test_what_the_model_s_file_says_holds_for_these_loads_too(api: LocalApi, repository: Path) -> None:
    file = save(models.identity(), repository, "m").parent / "loadledger.toml"
    file.write_text('priority = "high"\nkeep_alive_s = 600\nstrategy = "auto"\npinned = true')
    parameters = (await api.job(job_of(await load(api, "m"))))["parameters"]
    said = {"priority": "high", "keep_alive_s": 600, "strategy": "auto", "pinned": True}
    assert parameters | said == parameters


async def test_a_body_that_is_not_taken_is_refused_and_appends_nothing(
    api: LocalApi, repository: Path, subtests: pytest.Subtests
) -> None:
    save(models.identity(), repository, "m")
    head = api.position
    for body, refusal in (
        (b"[]", (400, "invalid_body")),
        (b"{", (400, "invalid_body")),
        (b'{"parameters": 1}', (400, "invalid_body")),
        (b'{"parameters": {"file:1/model.onnx": "eA=="}}', (400, "not_supported")),
        (b" " * (MAX_JSON_BYTES + 1), (413, "body_too_large")),
    ):
        for verb in ("load", "unload"):
            with subtests.test(f"{verb} {body[:50]!r}"):
                assert (await send(api, f"models/m/{verb}", body)).refusal == refusal
    assert api.position == head


async def test_a_configuration_that_no_load_can_have_is_refused_by_name(
    api: LocalApi, repository: Path, subtests: pytest.Subtests
) -> None:
    save(models.identity(), repository, "m")
    head = api.position
    for config, code, told in (
        ({"max_batch_size": -1}, "invalid_body", "max_batch_size"),
        ({"instance_group": [{"count": 65}]}, "invalid_body", "instances"),
        ({"version_policy": _version(0)}, "invalid_body", "version"),
        ({"sequence_batching": {}}, "not_supported", "sequence_batching"),
    ):
        with subtests.test(told):
            answer = await load(api, "m", **config)
            assert answer.refusal == (400, code)
            assert told in answer.json["error"]
    assert api.position == head


# Unload


async def test_an_unload_is_answered_when_the_process_is_gone(api: LocalApi, repository: Path) -> None:
    save(models.weights(20), repository, "m")
    job_of(await load(api, "m"))
    pid = api.worker("m").pid
    job = await api.job(job_of(await unload(api, "m")))
    assert gone(pid)
    assert (job["kind"], job["status"], job["parameters"]["force"]) == ("unload", "completed", False)


async def test_an_unload_of_what_is_not_loaded_is_no_error_and_appends_nothing(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    head = api.position
    for name in ("m", "none"):
        answer = await unload(api, name)
        assert (answer.status, answer.body) == (200, b"")
        assert "Location" not in answer.headers
    assert api.position == head


async def test_an_unload_waits_for_running_requests_and_for_one_under_way(
    api: LocalApi, repository: Path
) -> None:
    save(models.counting_loop(), repository, "m")
    job_of(await load(api, "m"))
    pid = api.worker("m").pid
    is_computing = computing(pid)
    running = asyncio.create_task(api.infer("m", TRIPS))
    await until(is_computing)
    unloads = [asyncio.create_task(unload(api, "m")) for _ in range(2)]
    await api.model_when("m", state="unloading")
    assert await index(api) == [entry("m", 1, "UNLOADING")]
    assert not gone(pid)
    os.kill(pid, signal.SIGKILL)
    answers = await asyncio.gather(*unloads)
    assert len({job_of(answer) for answer in answers}) == 1
    assert len(await api.data_of(UnloadRequested)) == 1
    await running


async def test_an_unload_of_a_model_that_is_only_loading_ends_the_load(
    api: LocalApi, repository: Path
) -> None:
    save_bytes(endless_load(), repository, "m")
    waiting = asyncio.create_task(load(api, "m"))
    await _loading(api, "m")
    pid = api.worker("m").pid
    assert await index(api) == [entry("m", 1, "LOADING")]
    job_of(await unload(api, "m"))
    assert gone(pid)
    answer = await waiting
    assert answer.refusal == (400, "cancelled")
    assert answer.json["error"].startswith("load failed for model 'm': version 1: ")
    assert await index(api) == [entry("m", 1, "UNAVAILABLE", reason="unloaded")]


# The index


async def test_the_index_has_each_known_version_with_its_state_and_names_alone_of_the_rest(
    api: LocalApi, repository: Path
) -> None:
    assert await index(api) == []
    for name in ("ready", "unloaded", "never"):
        save(models.identity(), repository, name, 3)
    (repository / "empty").mkdir()
    for name in ("ready", "unloaded"):
        job_of(await load(api, name))
    job_of(await unload(api, "unloaded"))
    expected = [
        {"name": "never"},
        entry("ready", 3, "READY"),
        entry("unloaded", 3, "UNAVAILABLE", reason="unloaded"),
    ]
    assert await index(api) == await index(api, b'{"ready": false}') == expected
    assert await index(api, b'{"ready": true}') == [entry("ready", 3, "READY")]


async def test_a_model_that_has_left_the_repository_is_told_of_as_long_as_it_is_loaded(
    api: LocalApi, repository: Path
) -> None:
    folder = save(models.identity(), repository, "m")
    job_of(await load(api, "m"))
    (folder / "model.onnx").unlink()
    assert await index(api) == [entry("m", 1, "READY")]
    job_of(await unload(api, "m"))
    assert await index(api) == []


@pytest.mark.parametrize("body", [b'{"ready": 1}', b'{"ready": null}', b"[]", b'{"x": 1}', b"nope"])
async def test_an_index_s_body_has_ready_and_nothing_else(api: LocalApi, body: bytes) -> None:
    assert (await send(api, "index", body)).refusal == (400, "invalid_body")


async def test_a_repository_s_name_is_not_found(api: LocalApi) -> None:
    for path in ("r/index", "r/models/m/load", "r/models/m/unload"):
        assert (await send(api, path, b"")).refusal == (404, "not_found")


def _version(number: int) -> Json:
    return {"specific": {"versions": [number]}}


async def _loading(api: LocalApi, model_id: str) -> None:
    """Wait until the model's worker is at its load."""

    async def stages() -> list[str]:
        return [job["stage"] for job in await api.jobs(f"?model={model_id}")]

    await when(stages, lambda seen: seen == ["loading"])
