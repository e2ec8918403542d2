"""Load on demand: an inference for a model that is not loaded has it loaded, and is answered by it."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from support import models
from support.http import Answer, Json, LocalApi, when
from support.models import save, save_bytes
from support.workers import until

from events.accept import MAX_QUEUE
from events.commands import RequestLoad
from events.types import Cause, LoadRequested
from server.appkeys import DEMAND, LEASES, LOG

Start = Callable[..., Awaitable[LocalApi]]

SLOW = models.slow_model(side=800, depth=2_000).SerializeToString()
"""Loads for half a minute, if it is let."""
ENDLESS = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}


def floats(*values: float) -> Json:
    return {"name": "x", "shape": [len(values)], "datatype": "FP32", "data": list(values)}


async def causes(api: LocalApi) -> list[str]:
    """Return why each load was requested, in order."""
    return [requested.cause.value for requested in await api.data_of(LoadRequested)]


async def recorded(api: LocalApi, model_id: str, kind: str) -> None:
    """Wait until this has happened to a model, though it may have gone on since: a state can be missed."""
    await when(lambda: api.types(model_id), lambda seen: kind in seen)


async def waiting(
    api: LocalApi, model_id: str, count: int = 1, **request: Json
) -> list[asyncio.Task[Answer]]:
    """Ask so many times for a model that is slow to load, and return when that has begun."""
    asked = [asyncio.create_task(api.infer(model_id, floats(1), **request)) for _ in range(count)]
    await when(lambda: api.model(model_id), lambda seen: seen["state"] == "loading")
    await until(lambda: api.app[DEMAND].waiting(model_id) == count)
    return asked


# What is loaded on demand


async def test_a_model_that_is_not_loaded_is_loaded_and_answers(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on")
    answer = await api.infer("m", floats(1))
    assert (answer.status, answer.json["outputs"][0]["data"]) == (200, [2])
    [requested, *_, loaded] = await api.events("m")
    assert isinstance(requested.data, LoadRequested)
    assert (requested.data.cause, requested.actor, requested.version) == (Cause.DEMAND, "pia", 1)
    assert answer.headers["Loadledger-Model"] == f"m/1;position={loaded.position}"
    head = api.position
    assert (await api.infer("m", floats(1))).status == 200
    assert api.position == head
    assert not api.app[LEASES].held("m")


async def test_a_load_that_waits_and_that_nobody_waits_for_any_more_is_cancelled(
    start: Start, repository: Path
) -> None:
    for model_id in ("m", "pinned"):
        save(models.add(1), repository, model_id)
    api = await start(on_demand="on", max_loaded=1)
    await api.load("pinned", pinned=True)
    assert (await api.infer("m", floats(1), parameters={"timeout": 2_000_000})).refusal == (
        504,
        "inference_timeout",
    )
    [job] = await api.jobs("?model=m")
    assert (await api.ended(job["id"]))["status"] == "cancelled"
    await api.unload("pinned")
    assert (await api.infer("m", floats(1))).status == 200


async def test_nothing_is_loaded_on_demand_unless_that_is_on(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    head = api.position
    answer = await api.infer("m", floats(1))
    assert answer.refusal == (503, "model_not_loaded")
    assert "Retry-After" in answer.headers
    assert (await api.infer("nope", floats(1))).refusal == (404, "unknown_model")
    assert api.position == head


async def test_a_body_of_tensors_alone_loads_its_model_too(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on")
    headers = {"Inference-Header-Content-Length": "0"}
    answer = await api.post("/v2/models/m/infer", data=b"\0\0\x80\x3f", headers=headers, roles=("predict",))
    assert answer.status == 200, answer.body
    assert await causes(api) == ["demand"]


async def test_many_inferences_at_once_load_their_model_once_in_the_name_of_the_first(
    start: Start, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on")

    async def ask(number: int) -> Answer:
        path, body = "/v2/models/m/infer", {"inputs": [floats(number)]}
        return await api.post(path, json=body, roles=("predict",), subject=f"p{number % 10}")

    answers = await asyncio.gather(*(ask(number) for number in range(200)))
    assert [answer.json["outputs"][0]["data"] for answer in answers] == [[n + 1.0] for n in range(200)]
    assert await api.types("m") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert not api.app[LEASES].held("m")


async def test_metadata_and_readiness_load_nothing(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on")
    head = api.position
    assert (await api.get("/v2/models/m")).refusal == (503, "model_not_loaded")
    assert (await api.get("/v2/models/m/ready")).refusal == (400, "not_ready")
    assert api.position == head


async def test_a_question_that_is_wrong_loads_nothing(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on")
    head = api.position
    assert (await api.post("/v2/models/m/infer", json={})).refusal == (400, "invalid_input")
    assert api.position == head


async def test_what_the_repository_does_not_have_is_404(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on")
    head = api.position
    for _ in range(2):
        assert (await api.infer("nope", floats(1))).refusal == (404, "unknown_model")
        assert (await api.infer("m", floats(1), version=7)).refusal == (404, "unknown_version")
    assert api.position == head


async def test_the_version_that_is_named_is_loaded_and_none_is_replaced(
    start: Start, repository: Path
) -> None:
    for version in (1, 2):
        save(models.add(version), repository, "m", version)
    api = await start(on_demand="on")
    assert (await api.infer("m", floats(1), version=1)).json["outputs"][0]["data"] == [2]
    head = api.position
    answer = await api.infer("m", floats(1), version=2)
    assert answer.refusal == (503, "model_not_loaded")
    assert "version 1 is" in answer.json["error"]
    assert (await api.infer("m", floats(1))).json["model_version"] == "1"
    assert api.position == head


async def test_of_two_versions_asked_at_once_one_is_loaded_and_the_other_is_503(
    start: Start, repository: Path
) -> None:
    for version in (1, 2):
        save(models.add(version), repository, "m", version)
    api = await start(on_demand="on")
    answers = await asyncio.gather(*(api.infer("m", floats(1), version=v) for v in (1, 2) for _ in range(5)))
    assert Counter(answer.status for answer in answers) == {200: 5, 503: 5}
    assert await causes(api) == ["demand"]


# What is under way already


async def test_a_load_that_somebody_asked_for_is_joined(start: Start, repository: Path) -> None:
    save(models.slow_identity(), repository, "m")
    api = await start(on_demand="on")
    await api.accepted_load("m")
    assert (await api.infer("m", floats(1))).json["outputs"][0]["data"] == [1]
    assert await causes(api) == ["request"]


async def test_an_unload_under_way_is_waited_out_and_the_model_loaded_again(
    start: Start, repository: Path
) -> None:
    save(models.counting_loop(), repository, "m")
    api = await start(on_demand="on")
    await api.load("m")
    worker = api.worker("m")
    running = asyncio.create_task(api.infer("m", ENDLESS))
    await until(lambda: worker.in_flight == 1)
    await api.post("/api/v1/models/m/unload")
    await api.model_when("m", state="unloading")
    asked = asyncio.create_task(api.infer("m", {**ENDLESS, "data": [5]}))
    await until(lambda: api.app[DEMAND].waiting("m") == 1)
    assert await causes(api) == ["request"]
    await api.unload("m", force=True)
    assert (await asked).json["outputs"][0]["data"] == [5]
    assert (await running).refusal == (503, "worker_died")
    assert await causes(api) == ["request", "demand"]
    await api.model_when("m", state="loaded")


async def test_a_model_that_lost_its_worker_is_waited_for_and_not_asked_for_again(
    start: Start, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on")
    await api.load("m")
    os.kill(api.worker("m").pid, signal.SIGKILL)
    await recorded(api, "m", "WorkerExited")
    assert (await api.infer("m", floats(1))).json["outputs"][0]["data"] == [2]
    assert await causes(api) == ["request", "recovery"]


async def test_a_swap_in_place_is_waited_for(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m", 1)
    save(models.slow_identity(side=400), repository, "m", 2)
    api = await start(on_demand="on")
    await api.load("m", version=1)
    await api.accepted_load("m", version=2, strategy="in_place")
    await recorded(api, "m", "ModelUnloaded")
    answer = await api.infer("m", floats(1))
    assert (answer.json["model_version"], answer.json["outputs"][0]["data"]) == ("2", [1])
    assert await causes(api) == ["request", "request"]


async def test_a_model_that_is_let_go_at_once_answers_first(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on", keep_alive_s=0, min_residency_s=0)
    for _ in range(5):
        assert (await api.infer("m", floats(1))).json["outputs"][0]["data"] == [2]
    await api.model_when("m", state="unloaded")
    assert set(await causes(api)) == {"demand"}


async def test_models_of_which_one_fits_take_turns_on_demand(start: Start, repository: Path) -> None:
    for number in range(3):
        save(models.add(number), repository, f"m{number}")
    api = await start(on_demand="on", max_loaded=1, evict="idle", min_residency_s=0)
    answers = await asyncio.gather(*(api.infer(f"m{n % 3}", floats(1)) for n in range(30)))
    assert [answer.json["outputs"][0]["data"] for answer in answers] == [[1.0 + n % 3] for n in range(30)]
    assert set(await causes(api)) == {"demand"}


# What goes wrong


async def test_a_load_that_fails_is_told_to_all_who_wait_and_not_tried_again_at_once(
    start: Start, repository: Path
) -> None:
    save(models.unknown_operator(), repository, "m")
    api = await start(on_demand="on")
    answers = await asyncio.gather(*(api.infer("m", floats(1)) for _ in range(20)))
    for answer in answers:
        assert answer.refusal == (503, "load_failed")
        assert "Frobnicate" in answer.json["error"]
        assert answer.headers["Retry-After"] == "1"
    job_id = (await api.events("m"))[0].job_id
    assert f"/api/v1/jobs/{job_id}" in {answer.headers.get("Location") for answer in answers}
    assert (await api.job(str(job_id)))["status"] == "failed"

    async def asked_again() -> tuple[str, int]:
        answer = await api.infer("m", floats(1))
        assert answer.refusal == (503, "load_failed")
        return answer.json["error"], len(await causes(api))

    told, loads = await when(asked_again, lambda seen: "tried again when asked in" in seen[0])
    assert "Frobnicate" in told
    await when(asked_again, lambda seen: seen[1] > loads)


async def test_a_load_by_somebody_else_ends_the_pause_after_a_failure(start: Start, repository: Path) -> None:
    save(models.unknown_operator(), repository, "m")
    api = await start(on_demand="on")
    assert (await api.infer("m", floats(1))).refusal == (503, "load_failed")
    save(models.add(1), repository, "m")
    await api.load("m")
    assert (await api.infer("m", floats(1))).status == 200
    await api.unload("m")
    assert (await api.infer("m", floats(1))).status == 200
    assert await causes(api) == ["demand", "request", "demand"]


async def test_a_version_that_fails_holds_the_others_up_no_longer_than_it_takes(
    start: Start, repository: Path
) -> None:
    save(models.unknown_operator(), repository, "m", 1)
    save(models.add(2), repository, "m", 2)
    api = await start(on_demand="on")
    assert (await api.infer("m", floats(1), version=1)).refusal == (503, "load_failed")
    assert (await api.infer("m", floats(1))).json["outputs"][0]["data"] == [3]


async def test_settings_of_the_model_that_are_wrong_are_not_the_asker_s_mistake(
    start: Start, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    (repository / "m" / "loadledger.toml").write_text("instances = 0\n")
    api = await start(on_demand="on")
    for _ in range(2):
        answer = await api.infer("m", floats(1))
        assert answer.refusal == (503, "load_failed")
        assert "instances" in answer.json["error"]
    assert await causes(api) == []


async def test_who_waits_longer_than_the_inference_may_take_is_504_and_the_load_goes_on(
    start: Start, repository: Path
) -> None:
    save_bytes(SLOW, repository, "m")
    api = await start(on_demand="on")
    [asked] = await waiting(api, "m", parameters={"timeout": 3_000_000})
    answer = await asked
    assert answer.refusal == (504, "inference_timeout")
    assert "still loading" in answer.json["error"]
    assert (await api.model("m"))["state"] == "loading"
    assert not api.app[LEASES].held("m")


async def test_what_waits_for_a_load_that_somebody_ends_is_told_so(start: Start, repository: Path) -> None:
    save_bytes(SLOW, repository, "m")
    api = await start(on_demand="on")
    asked = await waiting(api, "m", 3)
    await api.unload("m", force=True)
    for answer in await asyncio.gather(*asked):
        assert answer.refusal == (503, "load_failed")
        assert "cancelled" in answer.json["error"]
    assert await causes(api) == ["demand"]


async def test_no_more_wait_for_a_model_than_may_be_queued_for_it(start: Start, repository: Path) -> None:
    save_bytes(SLOW, repository, "m")
    api = await start(on_demand="on", inference_queue=2)
    asked = await waiting(api, "m", 2)
    assert (await api.infer("m", floats(1))).refusal == (503, "inference_queue_full")
    await api.unload("m", force=True)
    await asyncio.gather(*asked)


async def test_a_full_queue_of_jobs_is_429(start: Start, repository: Path) -> None:
    save_bytes(SLOW, repository, "slow")
    save(models.add(1), repository, "m")
    api = await start(on_demand="on", loads_at_once=1)
    await api.accepted_load("slow")
    asked = [RequestLoad(f"x{number}", 1, (), "alice") for number in range(MAX_QUEUE - 1)]
    await asyncio.gather(*map(api.app[LOG].submit, asked))
    assert (await api.infer("m", floats(1))).refusal == (429, "queue_full")


async def test_the_server_s_stop_is_told_to_who_waits(start: Start, repository: Path) -> None:
    save_bytes(SLOW, repository, "m")
    api = await start(on_demand="on")
    asked = await waiting(api, "m", 2)
    await api.app.shutdown()
    for answer in [*await asyncio.gather(*asked), await api.infer("m", floats(1))]:
        assert answer.refusal == (503, "shutting_down")


# Who gives up


async def test_who_gives_up_takes_the_load_from_nobody(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(on_demand="on")
    demand, leases = api.app[DEMAND], api.app[LEASES]
    forever_s = asyncio.get_running_loop().time() + 1000

    async def wait(subject: str) -> bool:
        async with demand.loaded("m", None, subject, forever_s):
            return leases.held("m")

    first, second = (asyncio.create_task(wait(subject)) for subject in ("ann", "bob"))
    await until(lambda: demand.waiting("m") == 2)
    first.cancel()
    assert await second
    assert first.cancelled()
    assert not leases.held("m")
    await until(lambda: demand.waiting("m") == 0)
    [requested, *_] = await api.events("m")
    assert requested.actor in ("ann", "bob")  # ann may have gone before anything was asked for


async def test_a_load_that_nobody_waits_for_any_more_completes_all_the_same(
    start: Start, repository: Path
) -> None:
    save(models.slow_identity(side=400), repository, "m")
    api = await start(on_demand="on")
    asked = asyncio.create_task(wait_for(api, "m"))
    await recorded(api, "m", "LoadStarted")
    asked.cancel()
    await asyncio.wait([asked])
    assert not api.app[LEASES].held("m")
    await api.model_when("m", state="loaded")
    assert await causes(api) == ["demand"]


async def wait_for(api: LocalApi, model_id: str) -> None:
    """Wait on demand, as an inference does that has all the time it needs."""
    forever_s = asyncio.get_running_loop().time() + 1000
    async with api.app[DEMAND].loaded(model_id, None, "ann", forever_s):
        pass
