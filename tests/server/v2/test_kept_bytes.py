"""What a person chose stays: the bytes and the version of a model that was away, or cannot come back."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support import models
from support.http import ONE, LocalApi, application, local_server, when
from support.models import save
from support.workers import until

from events.clock import uuid7
from events.commands import Record
from events.types import Cause, Draft, LoadParameters, LoadRequested, contents_of, digest_of
from features.ondemand.app import DEMAND
from server.appkeys import LOG, VERSIONS

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEWER = "the repository has newer files than those that were loaded"
OLD, NEW = [2.0], [9.0]
"""Answers of the model that was loaded, `y = x + 1`, and of the one in its folder since, `y = x + 8`."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """An application with room for one loaded model, which loads models on demand."""
    room = {"max_loaded": 1, "evict": "idle", "min_residency_s": 0}
    async with local_server(tmp_path_factory.mktemp("room"), on_demand="on", **room) as api:
        save(models.add(50), api.config.repository, "other")
        yield api


async def answer_of(api: LocalApi, model_id: str) -> Any:
    answer = await api.infer(model_id, ONE)
    return answer.json["outputs"][0]["data"] if answer.status == 200 else answer.refusal


async def notices(api: LocalApi) -> list[str]:
    return [each["title"] for each in (await api.get("/api/v1/resources")).json.get("notices", [])]


async def causes(api: LocalApi, model_id: str) -> list[str]:
    events = await api.events(model_id)
    return [event.data.cause.value for event in events if isinstance(event.data, LoadRequested)]


async def evict(api: LocalApi, model_id: str) -> None:
    assert await answer_of(api, "other") == [51.0]
    await api.model_when(model_id, state="unloaded")


async def let_idle(api: LocalApi, model_id: str) -> None:
    await api.load(model_id, keep_alive_s=0)
    await api.model_when(model_id, state="unloaded")


async def unload_until_asked(api: LocalApi, model_id: str) -> None:
    await api.unload(model_id, until_asked=True)


def overwrite(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(models.add(8).SerializeToString())


def overwrite_half(folder: Path) -> None:
    new = models.add(8).SerializeToString()
    with (folder / "model.onnx").open("r+b") as half:
        half.write(new[: len(new) // 2])


def take_away(folder: Path) -> None:
    shutil.rmtree(folder.parent)


async def forget(api: LocalApi, model_id: str) -> None:
    take_away(api.config.repository / model_id / "1")
    await api.model(model_id)  # looks at the files


@pytest.mark.parametrize(
    ("leave", "happen"),
    [*product((evict, let_idle, unload_until_asked), (overwrite, overwrite_half, take_away))],
)
async def test_model_that_was_away_has_the_bytes_from_before(
    api: LocalApi,
    leave: Callable[[LocalApi, str], Awaitable[None]],
    happen: Callable[[Path], None],
) -> None:
    model_id = f"{leave.__name__}-{happen.__name__}"
    folder = save(models.add(1), api.config.repository, model_id)
    await api.load(model_id)
    if leave is not let_idle:
        happen(folder)
    await leave(api, model_id)
    if leave is let_idle:  # which a person asked for, so that the files were compared then
        happen(folder)
    away = await api.model(model_id)
    assert (away["state"], away["repository_changed"]) == ("unloaded", happen is not take_away)
    assert await answer_of(api, model_id) == OLD
    back = await api.model(model_id)
    assert back["repository_changed"] is (happen is not take_away)
    if happen is overwrite:
        assert f"{model_id}: {NEWER}" in await notices(api)
        await api.load(model_id, keep_alive_s=-1)
        assert await answer_of(api, model_id) == NEW
        assert (await api.model(model_id))["repository_changed"] is False
        assert f"{model_id}: {NEWER}" not in await notices(api)
    if happen is not take_away:  # or the next notice would be of several
        await forget(api, model_id)


async def test_load_on_demand_tells_of_newer_files(api: LocalApi) -> None:
    folder = save(models.add(1), api.config.repository, "told")
    await api.load("told")
    await unload_until_asked(api, "told")
    overwrite(folder)
    assert await answer_of(api, "told") == OLD
    await when(lambda: notices(api), lambda seen: f"told: {NEWER}" in seen)
    await forget(api, "told")


async def test_bytes_that_nobody_chose_are_those_of_the_first_load_since_the_add(api: LocalApi) -> None:
    folder = save(models.add(1), api.config.repository, "unchosen")
    assert await answer_of(api, "unchosen") == OLD
    overwrite(folder)
    await evict(api, "unchosen")
    assert (await api.model("unchosen"))["repository_changed"] is True
    assert await answer_of(api, "unchosen") == OLD
    await evict(api, "unchosen")
    version = "/api/v1/models/unchosen/versions/1"
    assert (await api.send("DELETE", version)).status == 204
    await api.add_by_upload("unchosen", 1, models.add(8).SerializeToString())
    assert await answer_of(api, "unchosen") == NEW
    assert await causes(api, "unchosen") == ["demand"] * 3


async def test_bytes_that_replace_a_removed_choice_wait_for_a_person(api: LocalApi) -> None:
    save(models.add(1), api.config.repository, "replaced")
    await api.load("replaced")
    await evict(api, "replaced")
    assert (await api.send("DELETE", "/api/v1/models/replaced/versions/1")).status == 204
    assert (await api.get("/api/v1/models/replaced")).refusal == (404, "unknown_model")
    await api.add_by_upload("replaced", 1, models.add(8).SerializeToString())
    refused = await api.infer("replaced", ONE)
    assert refused.refusal == (503, "out_of_service")
    assert "alice has added other bytes in its place since: load it to use these" in refused.json["error"]
    await api.load("replaced")
    assert await answer_of(api, "replaced") == NEW


def lose_stored(api: LocalApi, model_id: str) -> None:
    """Remove the stored bytes that a person chose."""
    store, chosen = api.app[VERSIONS].store, api.app[LOG].state.models[model_id].chosen
    assert store is not None
    assert chosen
    shutil.rmtree(store.folder_of(digest_of(contents_of(chosen.files))).parent)


async def test_bytes_that_are_nowhere_are_refused_until_they_are_back(api: LocalApi) -> None:
    folder = save(models.add(1), api.config.repository, "nowhere")
    await api.load("nowhere")
    await unload_until_asked(api, "nowhere")
    lose_stored(api, "nowhere")
    overwrite(folder)
    refused = await api.infer("nowhere", ONE)
    assert refused.refusal == (503, "bytes_gone")
    assert "load the model again to use what the repository has now" in refused.json["error"]
    assert (await api.infer("nowhere", ONE)).refusal == (503, "bytes_gone")
    failed = await api.model("nowhere")
    assert (failed["state"], failed["error"]["code"]) == ("failed", "bytes_gone")
    assert "nowhere: the bytes that served are gone" in await notices(api)
    save(models.add(1), api.config.repository, "nowhere")
    await when(lambda: answer_of(api, "nowhere"), lambda seen: seen == OLD)
    assert "nowhere: the bytes that served are gone" not in await notices(api)


async def test_who_may_infer_does_not_choose_for_others(api: LocalApi) -> None:
    for version in (1, 3):
        save(models.add(version), api.config.repository, "rolled-back", version)
    for version in (3, 1):
        await api.load("rolled-back", version=version)
    labels = "/api/v1/models/rolled-back/labels/canary"
    assert (await api.send("PUT", labels, json={"version": 3})).status == 204
    await evict(api, "rolled-back")
    for named in ("canary", 3):
        refused = await api.infer("rolled-back", ONE, version=named)
        assert refused.refusal == (503, "model_not_loaded")
        assert "version 1 of model 'rolled-back' was loaded by alice" in refused.json["error"]
        assert 'POST /api/v1/models/rolled-back/load and body {"version": 3}' in refused.json["error"]
    assert await answer_of(api, "rolled-back") == OLD
    assert await causes(api, "rolled-back") == ["request", "request", "demand"]


async def move_away(api: LocalApi, model_id: str) -> None:
    """A person chose version 1; an inference of an earlier release has loaded version 3 since."""
    for version in (1, 3):
        save(models.add(version), api.config.repository, model_id, version)
    await api.load(model_id, version=1)
    await unload_until_asked(api, model_id)
    job, request = uuid7(), LoadRequested.of(LoadParameters(), Cause.DEMAND)
    with api.app[DEMAND].demand.hold(model_id):
        await api.app[LOG].submit(Record((Draft(job, request, "pia", job, model_id, 3),)))
        await api.model_when(model_id, state="loaded", version=3)


async def test_choice_returns_with_the_first_inference_that_names_no_version(api: LocalApi) -> None:
    await move_away(api, "moved")
    assert (await api.infer("moved", ONE, version=3)).json["model_version"] == "3"
    assert (await api.get("/v2/models/moved/ready")).status == 200
    answers = await asyncio.gather(*(api.infer("moved", ONE) for _ in range(5)))
    assert {answer.json["model_version"] for answer in answers} == {"1"}
    assert (await api.model("moved"))["version"] == 1
    assert (await api.infer("moved", ONE, version=3)).refusal == (503, "model_not_loaded")
    assert await causes(api, "moved") == ["request", "demand", "demand"]


async def test_choice_that_cannot_return_is_tried_once(api: LocalApi) -> None:
    await move_away(api, "stuck")
    lose_stored(api, "stuck")
    shutil.rmtree(api.config.repository / "stuck" / "1")
    for _ in range(3):
        assert (await api.infer("stuck", ONE)).json["model_version"] == "3"
    assert await causes(api, "stuck") == ["request", "demand", "demand"]
    shown = await api.model("stuck")
    assert (shown["state"], shown["version"], shown["error"]["code"]) == ("loaded", 3, "bytes_gone")


@pytest.mark.parametrize("on_demand", ["off", "on"])
async def test_model_whose_bytes_are_gone_after_a_restart_is_failed(tmp_path: Path, on_demand: str) -> None:
    async with local_server(tmp_path, on_demand=on_demand) as api:
        for number, name in enumerate(("m", "w"), 1):  # others: the store is by content
            save(models.add(number), api.config.repository, name)
            await api.load(name)
        config = api.config
    shutil.rmtree(config.repository / "m")
    shutil.rmtree(config.data / "store")
    async with application(config) as api:
        await until(lambda: api.app[LOG].state.models["m"].is_missed)
        shown = (await api.get("/api/v1/models")).json["models"]
        assert {each["id"]: each["state"] for each in shown}["m"] == "failed"
        assert (await api.model("m"))["error"]["code"] == "bytes_gone"
        for answer in (await api.infer("m", ONE), await api.get("/v2/models/m")):
            assert answer.refusal == (503, "bytes_gone")
        assert "m" in {each["name"] for each in (await api.post("/v2/repository/index")).json}
        assert (await api.get("/v2/models/m/ready")).refusal == (400, "not_ready")
        assert (await api.get("/health/ready", roles=())).status == 200
        assert "m: the bytes that served are gone" in await notices(api)
        assert (await api.post("/api/v1/models/m/load")).refusal == (404, "unknown_model")
        await api.unload("m")
        assert (await api.get("/api/v1/models/m")).refusal == (404, "unknown_model")
        assert await notices(api) == []
