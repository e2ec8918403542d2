"""On-demand loads: an inference has its model loaded and waits for it; back-off after failures."""

import asyncio
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from itertools import product

import pytest
import pytest_asyncio
from msgspec import UNSET
from support import models
from support.http import ENDLESS, MALFORMED, ONE, Answer, LocalApi, local_server, when
from support.models import save, save_bytes
from support.workers import until

from events.clock import boottime, utc_now
from events.commands import Record
from events.jobcommands import RequestLoad
from events.models import Model, ModelState
from events.types import AccessDenied, Cause, Draft, LoadRequested, ModelLoaded
from events.versions import ModelVersions
from features.approvals.rules import ApprovalRule
from features.ondemand.app import DEMAND
from features.ondemand.loads import MAX_FAILURES, BackOff, DemandFailed, RecordedModel
from features.rules import LoadPolicy
from runtime.errors import InferenceTimeout, QueueFull
from runtime.repository import DEFAULTS_FILE
from runtime.scheduler.scheduler import LONGEST_BACK_OFF_S
from server.appkeys import CONSUMER, LOG, ROUTER

Start = Callable[..., Awaitable[LocalApi]]

SOON = {"timeout": 50_000}
M = ("m", None, "")
NOTHING = RecordedModel(None, None)
BECAUSE = DemandFailed("because")


def fail(back_off: BackOff, demand: tuple[str, int | None, str], before: RecordedModel) -> RecordedModel:
    """Fail at 0 s, and return what is known then."""
    back_off.check(demand, before, 0.0)
    after = RecordedModel(Model(demand[0]), before.versions)
    back_off.note(demand, BECAUSE, before, after, 0.0)
    return after


def test_pause_doubles_to_a_limit() -> None:
    back_off, now_s, known, pauses = BackOff(), 0.0, NOTHING, list[float]()
    for _ in range(9):
        back_off.check(M, known, now_s)
        before, known = known, RecordedModel(Model("m"), None)
        pauses.append(back_off.note(M, BECAUSE, before, known, now_s))
        with pytest.raises(DemandFailed, match="because") as refused:
            back_off.check(M, known, now_s + pauses[-1] - 0.25)
        assert refused.value.retry_after_s == 0.25
        now_s += pauses[-1]
    assert pauses == [0.5, 1, 2, 4, 8, 16, LONGEST_BACK_OFF_S, LONGEST_BACK_OFF_S, LONGEST_BACK_OFF_S]


def test_change_of_the_model_or_its_versions_ends_the_pause() -> None:
    back_off = BackOff()
    failed = fail(back_off, M, NOTHING)
    for changed in (RecordedModel(Model("m"), None), RecordedModel(failed.model, ModelVersions("m"))):
        back_off.check(M, changed, 0.0)
        assert back_off.note(M, BECAUSE, changed, failed, 0.0) == 0.5
    with pytest.raises(DemandFailed):
        back_off.check(M, failed, 0.4)


def test_versions_have_their_own_pauses() -> None:
    back_off = BackOff()
    known = fail(back_off, ("m", 2, ""), fail(back_off, ("m", 1, ""), NOTHING))
    for version in (1, 2):
        with pytest.raises(DemandFailed):
            back_off.check(("m", version, ""), known, 0.4)
    back_off.check(M, known, 0.4)
    back_off.check(("other", 1, ""), NOTHING, 0.4)


def test_remembered_failures_are_bounded() -> None:
    back_off = BackOff()
    seen = {number: fail(back_off, (f"m{number}", None, ""), NOTHING) for number in range(MAX_FAILURES + 1)}
    back_off.check(("m0", None, ""), seen[0], 0.1)
    for number in (1, MAX_FAILURES):
        with pytest.raises(DemandFailed):
            back_off.check((f"m{number}", None, ""), seen[number], 0.1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application with on-demand loads, for tests that do not disturb each other."""
    policy = LoadPolicy(approval=(ApprovalRule(("asked*",)),))
    async with local_server(tmp_path_factory.mktemp("shared"), on_demand="on", policy=policy) as api:
        yield api


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application with room for one loaded model."""
    small = {"max_loaded": 1, "evict": "idle", "min_residency_s": 0}
    async with local_server(tmp_path_factory.mktemp("small"), on_demand="on", **small) as api:
        yield api


@pytest_asyncio.fixture(loop_scope="module")
async def small(one_place: LocalApi) -> AsyncIterator[LocalApi]:
    """That application; the model that a test leaves loaded is unloaded after it."""
    yield one_place
    for model in (await one_place.get("/api/v1/models")).json["models"]:
        if model["state"] not in {"unloaded", "failed"}:
            await one_place.unload(model["id"], force=True)


on_the_modules_loop = pytest.mark.asyncio(loop_scope="module")


def add(api: LocalApi, model_id: str, *versions: int) -> None:
    """Save versions of `y = x + version`."""
    for version in versions or (1,):
        save(models.add(version), api.config.repository, model_id, version)


async def causes(api: LocalApi, model_id: str) -> list[str]:
    """Return why each load of a model was requested, in order."""
    events = await api.events(model_id)
    return [event.data.cause.value for event in events if isinstance(event.data, LoadRequested)]


async def recorded(api: LocalApi, model_id: str, kind: str) -> None:
    """Wait for an event: a state can be over before it is seen."""
    await when(lambda: api.types(model_id), lambda seen: kind in seen)


async def begin(api: LocalApi, model_id: str, count: int) -> list[asyncio.Task[Answer]]:
    """Send inferences for a model that is slow to load, and wait until that has begun."""
    tasks = [asyncio.create_task(api.infer(model_id, ONE)) for _ in range(count)]
    await when(lambda: api.model(model_id), lambda seen: seen["state"] == "loading")
    await until(lambda: api.app[DEMAND].count_waiting(model_id) == count)
    return tasks


@pytest.fixture
def look_ups(shared: LocalApi, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were looked up in the repository for an on-demand load."""
    demand, found = shared.app[DEMAND], list[str]()
    look_up = demand.look_up

    async def counted(model_id: str, version: int | None, subject: str) -> RequestLoad:
        found.append(model_id)
        return await look_up(model_id, version, subject)

    monkeypatch.setattr(demand, "look_up", counted)
    return found


async def wait(api: LocalApi, model_id: str, *, within_s: float = 1000) -> bool:
    """Wait as an inference does, and return whether the model is ready then, and held."""
    ends_at_s = asyncio.get_running_loop().time() + within_s
    async with api.app[DEMAND].keep_loaded(model_id, None, "ann", ends_at_s):
        return api.app[ROUTER].is_ready(model_id) and api.app[DEMAND].demand.has(model_id)


async def waiting(api: LocalApi, model_id: str, count: int) -> list[asyncio.Task[bool]]:
    """Begin to wait so many times."""
    tasks = [asyncio.create_task(wait(api, model_id)) for _ in range(count)]
    await until(lambda: api.app[DEMAND].count_waiting(model_id) == count)
    return tasks


async def test_thousand_waiters_are_one_look_up_and_one_load(shared: LocalApi, look_ups: list[str]) -> None:
    add(shared, "popular")
    with pytest.raises(InferenceTimeout, match="is not loaded yet"):
        await wait(shared, "popular", within_s=-1)
    await until(lambda: not shared.app[DEMAND]._attempts)
    assert await shared.types("popular") == []
    look_ups.clear()
    assert all(await asyncio.gather(*await waiting(shared, "popular", 1000)))
    assert look_ups == ["popular"]
    assert await shared.types("popular") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert shared.app[DEMAND].count_waiting("popular") == 0
    assert not shared.app[DEMAND].demand.has("popular", time.monotonic_ns())


async def test_waiter_beyond_the_queue_is_refused(
    shared: LocalApi, look_ups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.app[DEMAND], "max_waiting", 2)
    save_bytes(models.endless_load(), shared.config.repository, "queue")
    first, second = await waiting(shared, "queue", 2)
    with pytest.raises(QueueFull):
        await wait(shared, "queue")
    first.cancel()
    await asyncio.wait([first])
    with pytest.raises(InferenceTimeout):
        await wait(shared, "queue", within_s=0.05)
    assert not second.done()
    assert look_ups == ["queue"]
    await recorded(shared, "queue", "LoadStarted")  # else nobody needs the load, and it is cancelled
    second.cancel()
    await shared.unload("queue", force=True)


async def test_started_load_without_waiters_completes(shared: LocalApi) -> None:
    save(models.slow_identity(side=400), shared.config.repository, "alone")
    [alone] = await waiting(shared, "alone", 1)
    await recorded(shared, "alone", "LoadStarted")
    alone.cancel()
    await asyncio.wait([alone])
    assert shared.app[DEMAND].count_waiting("alone") == 0
    await shared.model_when("alone", state="loaded")
    assert await causes(shared, "alone") == ["demand"]


async def test_defect_of_a_look_up_fails_its_waiters_only(
    shared: LocalApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    defect = OSError("the disk is on fire")

    async def fail_to_look_up(*_: object) -> RequestLoad:
        raise defect

    add(shared, "burning")
    with monkeypatch.context() as patched:
        patched.setattr(shared.app[DEMAND], "look_up", fail_to_look_up)
        results = await asyncio.gather(*(wait(shared, "burning") for _ in range(3)), return_exceptions=True)
    assert results == [defect] * 3
    assert "the disk is on fire" in caplog.text
    assert await wait(shared, "burning")


async def test_inference_loads_its_model(shared: LocalApi) -> None:
    add(shared, "m")
    answer = await shared.infer("m", ONE)
    assert (answer.status, answer.json["outputs"][0]["data"]) == (200, [2])
    [requested, *_, loaded] = await shared.events("m")
    assert isinstance(requested.data, LoadRequested)
    assert isinstance(loaded.data, ModelLoaded)
    assert (requested.data.cause, requested.actor, requested.version) == (Cause.DEMAND, "pia", 1)
    assert answer.headers["Loadledger-Model"] == f"m/1;position={loaded.position}"
    [stats] = (await shared.get("/v2/models/m/stats")).json["model_stats"]
    spent_ns = {name: each["ns"] for name, each in stats["inference_stats"].items()}
    assert loaded.data.durations.loading_us * 1000 <= spent_ns["queue"] <= spent_ns["success"]
    assert (await shared.infer("m", ONE)).status == 200
    assert await shared.types("m") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert not shared.app[DEMAND].demand.has("m")
    add(shared, "raw")
    headers = {"Inference-Header-Content-Length": "0"}
    assert (await shared.post("/v2/models/raw/infer", data=b"\0\0\x80\x3f", headers=headers)).status == 200


async def test_reads_and_invalid_requests_load_nothing(shared: LocalApi) -> None:
    add(shared, "untouched")
    for answer, expected in (
        (await shared.get("/v2/models/untouched/config"), (503, "model_not_loaded")),
        (await shared.get("/v2/models/untouched/ready"), (400, "not_ready")),
        (await shared.post("/v2/models/untouched/infer", json={}), (400, "invalid_input")),
        (await shared.infer("untouched", ONE, version=7), (404, "unknown_version")),
        (await shared.infer("nope", ONE), (404, "unknown_model")),
    ):
        assert answer.refusal == expected
    for path, (body, headers) in product(("untouched", "%75ntouched"), MALFORMED):
        answer = await shared.post(f"/v2/models/{path}/infer", data=body, headers=headers, roles=("infer",))
        assert answer.refusal == (400, "invalid_input")
    assert await shared.types("untouched") == await shared.types("nope") == []


async def test_named_version_is_loaded_and_none_is_replaced(shared: LocalApi) -> None:
    add(shared, "pair", 1, 2)
    answers = await asyncio.gather(*(shared.infer("pair", ONE, version=v) for v in (1, 2) for _ in range(5)))
    assert Counter(answer.status for answer in answers) == {200: 5, 503: 5}
    loaded = (await shared.model("pair"))["version"]
    assert (await shared.infer("pair", ONE)).json["model_version"] == str(loaded)
    refused = await shared.infer("pair", ONE, version=3 - loaded)
    assert refused.refusal == (503, "model_not_loaded")
    assert f"version {loaded} is" in refused.json["error"]
    assert await causes(shared, "pair") == ["demand"]


BATCHES = {"instances": 2, "threads": 1, "max_batch_size": 4}


@on_the_modules_loop
async def test_demand_brings_a_rollback_back(small: LocalApi) -> None:
    add(small, "back", 1, 2)
    await small.load("back", version=2)
    await small.load("back", version=1, **BATCHES)
    add(small, "other")
    assert (await small.infer("other", ONE)).status == 200
    shown = await small.model_when("back", state="unloaded")
    assert (shown["chosen"]["version"], shown["chosen"]["by"]) == (1, "alice")
    assert {name: shown["chosen"]["parameters"][name] for name in BATCHES} == BATCHES
    add(small, "back", 3)
    answer = await small.infer("back", ONE)
    assert (answer.json["model_version"], answer.json["outputs"][0]["data"]) == ("1", [2])
    request = (await small.data_of(LoadRequested))[-1]
    assert request.cause is Cause.DEMAND
    assert {name: getattr(request, name) for name in BATCHES} == BATCHES
    assert (await small.infer("back", ONE, version=2)).refusal == (503, "model_not_loaded")


async def test_unloaded_or_removed_model_stays_out_of_service(shared: LocalApi) -> None:
    add(shared, "held", 1, 2)
    versions = "/api/v1/models/held/versions"
    assert (await shared.infer("held", ONE)).status == 200
    job = await shared.unload("held")
    refused = await shared.infer("held", ONE)
    assert refused.refusal == (503, "out_of_service")
    by = f"out of service: unloaded by alice at {job['finished_at']} (job {job['id']})"
    assert by in refused.json["error"]
    shown = await shared.model("held")
    assert (shown["state"], shown["chosen"]["version"]) == ("unloaded", None)
    assert (await shared.send("DELETE", f"{versions}/2")).status == 204
    await shared.load("held")
    assert (await shared.infer("held", ONE)).json["model_version"] == "1"
    assert (await shared.post("/v2/repository/models/held/unload")).status == 200
    assert (await shared.infer("held", ONE)).refusal == (503, "out_of_service")
    await shared.load("held")
    assert (await shared.send("DELETE", f"{versions}/1")).refusal[0] == 409
    assert (await shared.send("DELETE", f"{versions}/1?force=true")).status == 204
    assert (await shared.infer("held", ONE)).refusal == (503, "out_of_service")
    assert await causes(shared, "held") == ["demand", "request", "request"]


async def test_removal_by_force_ends_loads_of_its_version_only(shared: LocalApi) -> None:
    for version in (1, 2):
        save(models.add(version), shared.config.repository, "forced", version)
    save(models.slow_identity(side=400), shared.config.repository, "forced", 3)
    await shared.load("forced", version=1)
    job = await shared.accepted_load("forced", version=3)
    assert (await shared.send("DELETE", "/api/v1/models/forced/versions/3?force=true")).status == 204
    assert (await shared.ended(job["id"]))["status"] == "cancelled"
    assert (await shared.infer("forced", ONE)).json["model_version"] == "1"
    await shared.send("PUT", "/api/v1/models/forced/labels/champion", json={"version": 2})
    removal = await shared.send("DELETE", "/api/v1/models/forced/versions/2?force=true")
    assert removal.refusal == (409, "version_in_use")
    missing = await shared.send("DELETE", "/api/v1/models/forced/versions/9?force=true")
    assert missing.refusal == (404, "unknown_version")
    assert (await shared.model("forced"))["state"] == "loaded"


async def test_unload_ends_before_the_model_is_loaded_again(shared: LocalApi) -> None:
    save(models.counting_loop(), shared.config.repository, "loop")
    await shared.load("loop")
    worker = shared.worker("loop")
    running = asyncio.create_task(shared.infer("loop", ENDLESS))
    await until(lambda: worker.in_flight == 1)
    await shared.post("/api/v1/models/loop/unload?until_asked=true")
    await shared.model_when("loop", state="unloading")
    late = await shared.infer("loop", ENDLESS, parameters=SOON)
    assert late.refusal == (504, "inference_timeout")
    assert "it is being unloaded" in late.json["error"]
    waiting = asyncio.create_task(shared.infer("loop", {**ENDLESS, "data": [5]}))
    await until(lambda: shared.app[DEMAND].count_waiting("loop") == 1)
    assert await causes(shared, "loop") == ["request"]
    await shared.unload("loop", force=True, until_asked=True)
    assert (await waiting).json["outputs"][0]["data"] == [5]
    assert (await running).refusal == (503, "model_unloaded")
    assert await causes(shared, "loop") == ["request", "demand"]


async def test_lost_model_is_waited_for(shared: LocalApi) -> None:
    add(shared, "lost")
    await shared.load("lost")
    os.kill(shared.worker("lost").pid, signal.SIGKILL)
    await recorded(shared, "lost", "WorkerExited")
    assert (await shared.infer("lost", ONE)).json["outputs"][0]["data"] == [2]
    assert await causes(shared, "lost") == ["request", "recovery"]


@on_the_modules_loop
async def test_lost_model_that_is_given_up_fails_its_waiters(small: LocalApi) -> None:
    log, ahead_s = small.app[LOG], 0
    log.clock._wall = lambda: utc_now() + timedelta(seconds=ahead_s)  # from now on
    log.clock._boottime = lambda: boottime() + ahead_s
    defaults = save(models.crash_on_zeros(), small.config.repository, "given-up").parent / DEFAULTS_FILE
    defaults.write_text("warm_up.enabled = false")
    await small.load("given-up")
    defaults.unlink()
    os.kill(small.worker("given-up").pid, signal.SIGKILL)
    await recorded(small, "given-up", "WorkerExited")
    waiting = asyncio.create_task(small.infer("given-up", ONE))
    await until(lambda: small.app[DEMAND].count_waiting("given-up") == 1)
    incidents = log.state.models["given-up"].incidents
    while not waiting.done():  # the reload is tried again after growing pauses
        ahead_s += 30
        log.notify()
        await until(lambda seen=incidents: waiting.done() or log.state.models["given-up"].incidents != seen)  # type: ignore[misc]
        incidents = log.state.models["given-up"].incidents
    assert (await waiting).refusal == (503, "load_failed")
    assert log.state.models["given-up"].state is ModelState.FAILED
    assert set(await causes(small, "given-up")) == {"request", "recovery"}


async def test_swap_in_place_is_waited_for(shared: LocalApi) -> None:
    add(shared, "swap")
    save(models.slow_identity(side=400), shared.config.repository, "swap", 2)
    await shared.load("swap", version=1)
    await shared.accepted_load("swap", version=2, strategy="in_place")
    await recorded(shared, "swap", "ModelUnloaded")
    answer = await shared.infer("swap", ONE)
    assert (answer.json["model_version"], answer.json["outputs"][0]["data"]) == ("2", [1])
    assert await causes(shared, "swap") == ["request", "request"]


@on_the_modules_loop
async def test_one_place_is_waited_for_and_taken_in_turns(
    small: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.app[DEMAND].demand, "kept_s", 0)
    for number in range(3):
        folder = save(models.add(number), small.config.repository, f"m{number}").parent
        (folder / DEFAULTS_FILE).write_text("keep_alive_s = 0")
    await small.load("m0", pinned=True)
    leaving = asyncio.create_task(small.infer("m1", ONE))
    [job] = await when(lambda: small.jobs("?model=m1"), bool)
    refused = await small.infer("m1", ONE, parameters=SOON)
    assert refused.refusal == (504, "inference_timeout")
    assert f"job {job['id']} is pending and waits for " in refused.json["error"]
    leaving.cancel()
    assert (await small.ended(job["id"]))["status"] == "cancelled"
    await small.load("m0", pinned=False)
    await small.unload("m0", until_asked=True)
    answers = await asyncio.gather(*(small.infer(f"m{n % 3}", ONE) for n in range(30)))
    assert [answer.json["outputs"][0]["data"] for answer in answers] == [[1.0 + n % 3] for n in range(30)]
    assert set(await causes(small, "m1")) == {"demand"}
    await small.model_when("m0", state="unloaded")


@pytest_asyncio.fixture(loop_scope="module")
async def full(small: LocalApi) -> LocalApi:
    """That application with the only place taken by `pinned`."""
    add(small, "pinned")
    await small.load("pinned", pinned=True)
    return small


@on_the_modules_loop
async def test_load_cancelled_for_lack_of_demand_is_asked_again(
    full: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(full, "again")
    monkeypatch.setattr(full.app[DEMAND].demand, "kept_s", 0)
    leaving = asyncio.create_task(full.infer("again", ONE))
    [job] = await when(lambda: full.jobs("?model=again"), bool)
    log = full.app[LOG]
    with closing(sqlite3.connect(log.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        denied = asyncio.create_task(log.submit(Record((Draft("e", AccessDenied("x", 1), "bob"),))))
        await asyncio.sleep(0)
        await until(lambda: log.waiting == 0)  # the writer has it, and waits
        leaving.cancel()
        await until(lambda: log.waiting == 1)  # the cancellation is decided
        staying = [asyncio.create_task(full.infer("again", ONE)) for _ in range(3)]
        await until(lambda: full.app[DEMAND].count_waiting("again") == 3)
        other.execute("ROLLBACK")
    await denied
    assert (await full.ended(job["id"]))["status"] == "cancelled"
    await full.unload("pinned")
    for answer in await asyncio.gather(*staying):
        assert answer.json["outputs"][0]["data"] == [2]
    assert await causes(full, "again") == ["demand", "demand"]


@on_the_modules_loop
async def test_inference_that_gave_up_finds_its_model_later(
    full: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(full, "patient")
    consumer = full.app[CONSUMER]
    monkeypatch.setattr(consumer, "policy", replace(consumer.policy, takes_turns=False))
    refused = await full.infer("patient", ONE, parameters=SOON)
    assert refused.refusal == (504, "inference_timeout")
    [job] = await full.jobs("?model=patient")
    other = asyncio.create_task(full.infer("m0", ONE))
    await when(lambda: full.jobs("?model=m0&status=pending"), bool)
    await full.unload("pinned")
    assert (await full.ended(job["id"]))["status"] == "completed"
    [waiting] = await full.jobs("?model=m0&status=pending")  # the loaded model is kept for who repeats
    assert (await full.infer("patient", ONE)).json["outputs"][0]["data"] == [2]
    assert (await other).json["outputs"][0]["data"] == [1]
    assert (await full.ended(waiting["id"]))["status"] == "completed"
    assert await causes(full, "patient") == ["demand"]


@on_the_modules_loop
async def test_requested_load_takes_the_place_of_a_pending_on_demand_load(full: LocalApi) -> None:
    add(full, "asked-for")
    leaving, staying = (asyncio.create_task(full.infer("asked-for", ONE)) for _ in range(2))
    await until(lambda: full.app[DEMAND].count_waiting("asked-for") == 2)
    [on_demand] = await when(lambda: full.jobs("?model=asked-for"), bool)
    requested = await full.accepted_load("asked-for", keep_alive_s=60)
    superseded = await full.ended(on_demand["id"])
    assert (superseded["status"], superseded["superseded_by"]) == ("cancelled", requested["id"])
    leaving.cancel()
    await until(lambda: full.app[DEMAND].count_waiting("asked-for") == 1)
    staying.cancel()  # with the last inference the on-demand load would have been cancelled
    late = asyncio.create_task(full.infer("asked-for", ONE))
    await until(lambda: full.app[DEMAND].count_waiting("asked-for") == 1)
    await full.unload("pinned")
    assert (await late).json["outputs"][0]["data"] == [2]
    ended = await full.ended(requested["id"])
    assert (ended["status"], ended["parameters"]["keep_alive_s"]) == ("completed", 60)
    assert await causes(full, "asked-for") == ["demand", "request"]


async def test_failed_load_is_told_to_all_and_retried_later(shared: LocalApi) -> None:
    save(models.unknown_operator(), shared.config.repository, "broken", 1)
    add(shared, "broken", 2)
    answers = await asyncio.gather(*(shared.infer("broken", ONE, version=1) for _ in range(20)))
    for answer in answers:
        assert answer.refusal == (503, "load_failed")
        assert "Frobnicate" in answer.json["error"]
        assert answer.headers["Retry-After"] == "1"
    job_id = (await shared.events("broken"))[0].job_id
    assert f"/api/v1/jobs/{job_id}" in {answer.headers.get("Location") for answer in answers}
    assert (await shared.job(str(job_id)))["status"] == "failed"

    async def retry() -> tuple[str, int]:
        answer = await shared.infer("broken", ONE, version=1)
        assert answer.refusal == (503, "load_failed")
        return answer.json["error"], len(await causes(shared, "broken"))

    error, loads = await when(retry, lambda seen: "tries again" in seen[0])
    assert "Frobnicate" in error
    await when(retry, lambda seen: seen[1] > loads)
    assert (await shared.infer("broken", ONE)).json["outputs"][0]["data"] == [3]  # of version 2


async def test_invalid_model_settings_are_load_failed(shared: LocalApi) -> None:
    add(shared, "unset")
    (shared.config.repository / "unset" / "loadledger.toml").write_text("instances = 0\n")
    for _ in range(2):
        answer = await shared.infer("unset", ONE)
        assert answer.refusal == (503, "load_failed")
        assert "instances" in answer.json["error"]
    assert await causes(shared, "unset") == []


async def test_timeout_is_504_and_the_load_goes_on(shared: LocalApi) -> None:
    save_bytes(models.endless_load(), shared.config.repository, "slow")
    waiting = await begin(shared, "slow", 3)
    late = await shared.infer("slow", ONE, parameters=SOON)
    assert late.refusal == (504, "inference_timeout")
    assert "still loading" in late.json["error"]
    assert (await shared.model("slow"))["state"] == "loading"
    await shared.unload("slow", force=True)
    for answer in await asyncio.gather(*waiting):
        assert answer.refusal == (503, "load_failed")
        assert "cancelled" in answer.json["error"]
    assert await causes(shared, "slow") == ["demand"]
    assert shared.app[DEMAND].count_waiting("slow") == 0


async def test_shutdown_ends_the_wait_for_a_load(start: Start) -> None:
    """That of inferences, and that of a load of the repository extension."""
    api = await start(on_demand="on")
    for model_id in ("m", "n"):
        save_bytes(models.endless_load(), api.config.repository, model_id)
    waiting = await begin(api, "m", 2)
    load = asyncio.create_task(api.post("/v2/repository/models/n/load"))
    [job] = await when(lambda: api.jobs("?model=n"), bool)
    await api.app.shutdown()
    for answer in [*await asyncio.gather(*waiting, load), await api.infer("m", ONE)]:
        assert answer.refusal == (503, "shutting_down")
    assert (await load).headers["Location"] == f"/api/v1/jobs/{job['id']}"


async def approve(api: LocalApi, model_id: str) -> None:
    """Approve version 1 as bob, after its check."""
    checked = await api.get(f"/api/v1/models/{model_id}/verify", roles=("approve",))
    path = f"/api/v1/models/{model_id}/versions/1/approval"
    said = {"digest": checked.json["digest"], "reason": "it looks right"}
    answer = await api.send("PUT", path, json=said, roles=("approve",), subject="bob")
    assert answer.status == 200, answer.body


async def test_approval_ends_the_back_off_of_a_refused_demand(shared: LocalApi) -> None:
    add(shared, "asked")
    refused = await shared.infer("asked", ONE)
    assert refused.refusal == (503, "load_failed")
    assert "1 more approval, by others than 'pia', who asks" in refused.json["detail"]
    await approve(shared, "asked")
    assert (await shared.infer("asked", ONE)).status == 200
    requests = [data for data in await shared.data_of(LoadRequested) if data.policy]
    assert {(data.cause, data.justification) for data in requests} == {(Cause.DEMAND, UNSET)}
    assert (await shared.model("asked"))["approval"]["by"] == ["bob"]


async def test_refusal_of_one_caller_is_not_that_of_another(shared: LocalApi) -> None:
    add(shared, "asked-twice")
    await approve(shared, "asked-twice")

    async def ask(subject: str) -> int:
        path, body = "/v2/models/asked-twice/infer", {"inputs": [ONE]}
        return (await shared.post(path, json=body, roles=("infer",), subject=subject)).status

    assert [*await asyncio.gather(ask("bob"), ask("bob"))] == [503, 503]  # who approved asks, too
    assert await ask("pia") == 200
    assert await ask("bob") == 200
