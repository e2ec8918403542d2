"""The repository through the API: a link that is re-pointed, and versions that cannot be served."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support import models
from support.http import ONE, Answer, LocalApi, local_server
from support.models import save
from support.modes import unreadable

from events.types import LoadRequested
from server.appkeys import UPLOADS

FILE = {"Content-Type": "application/octet-stream"}
MODEL = models.add(9).SerializeToString()
VERSION, EIGHTH = "/api/v1/models/m/versions/7", "/api/v1/models/m/versions/8"
UNREADABLE = (503, "repository_unreadable")


def point(link: Path, target: Path) -> None:
    """Re-point a link in one step, as git-sync does."""
    (new := link.with_name("new")).symlink_to(target)
    new.rename(link)


async def answer_of(api: LocalApi, model_id: str = "m") -> float:
    answer: float = (await api.infer(model_id, ONE)).json["outputs"][0]["data"][0]
    return answer


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application that loads models on demand."""
    async with local_server(tmp_path_factory.mktemp("shared"), on_demand="on") as api:
        yield api


async def put_file(api: LocalApi, path: str) -> Answer:
    return await api.send("PUT", path, data=MODEL, headers=FILE)


async def test_repository_that_is_a_link_is_followed_when_it_is_re_pointed(tmp_path: Path) -> None:
    link, old, new = tmp_path / "repository", tmp_path / "old", tmp_path / "new release"
    save(models.add(1), old, "m")
    for model_id in ("m", "n"):
        save(models.add(2), new, model_id)
    point(link, old)
    async with local_server(tmp_path) as api:
        await api.load("m")
        upload = (await api.post(f"{VERSION}/uploads")).json["id"]
        uploads = api.app[UPLOADS]
        begun, _ = await uploads.begin_upload("m", 8, "alice", "key")
        assert (await put_file(api, f"{EIGHTH}/uploads/{begun.id}/files/model.onnx")).status == 201
        point(link, new)
        assert (await api.model("m"))["repository_changed"] is True
        assert await answer_of(api) == 2
        await api.load("n")
        head = api.position
        with pytest.raises(Exception, match="leads to another folder since this began") as refused:
            await uploads.commit(begun)
        assert (getattr(refused.value, "code", None), api.position) == ("repository_unreadable", head)
        answer = await put_file(api, f"{VERSION}/uploads/{upload}/files/model.onnx")
        assert answer.refusal == (404, "unknown_upload")
        again, is_new = await uploads.begin_upload("m", 8, "alice", "key")
        assert (again.id != begun.id, is_new, again.files) == (True, True, {})
        assert (await put_file(api, VERSION)).status == 201
        assert (new / "m/7/model.onnx").read_bytes() == MODEL
        shutil.rmtree(old)
        await api.load("m", version=1)
        assert await answer_of(api) == 3
        assert (await api.model("m"))["repository_changed"] is False
        assert (await api.send("DELETE", VERSION)).status == 204
        assert not (new / "m/7").exists()


async def test_loaded_models_serve_while_the_repository_is_gone(shared: LocalApi) -> None:
    api, repository = shared, shared.config.repository
    away = repository.with_name("away")
    for model_id in ("m", "n"):
        api.save(models.add(1), model_id)
    repository.rename(away)
    try:
        assert (await api.get("/api/v1/models")).refusal == UNREADABLE
    finally:
        away.rename(repository)
    await api.load("m")
    repository.rename(away)
    try:
        for answer in (
            await api.post("/api/v1/models/n/load"),
            await api.post("/api/v1/models/m/load", json={"version": 1}),
            await api.get("/api/v1/models/n"),
            await api.post("/v2/repository/models/n/load"),
        ):
            assert answer.status == 503
            assert "the repository's folder cannot be read: No such file or directory" in answer.body.decode()
        demand = await api.infer("n", ONE)
        assert demand.refusal == (503, "load_failed")
        assert "the repository's folder cannot be read" in demand.json["detail"]
        assert await answer_of(api) == 2
        assert (await api.get("/health/ready", roles=())).status == 200
        (listed,) = (await api.get("/api/v1/models")).json["models"]
        assert (listed["id"], listed["state"], listed["versions"]) == ("m", "loaded", [])
        assert listed["not_served"].startswith("the repository's folder cannot be read")
        assert (await api.get("/api/v1/overview")).json["models"][0]["not_served"] == listed["not_served"]
        assert [each["name"] for each in (await api.post("/v2/repository/index")).json] == ["m"]
    finally:
        away.rename(repository)
    await api.load("n")
    assert (await api.model("m"))["not_served"] is None


async def test_load_without_a_number_says_which_version_it_passed_over(shared: LocalApi) -> None:
    shared.save(models.add(1), "over")
    reason = "version 2 of model 'over' cannot be read: Permission denied; let the server's user read it"
    with unreadable(shared.save(models.add(2), "over", 2)):
        job = await shared.load("over")
        assert (job["version"], job["passed_over"]) == (1, reason)
        assert (await shared.job(job["id"]))["passed_over"] == reason
        requested = [event.data for event in await shared.events("over")]
        assert [each.passed_over for each in requested if isinstance(each, LoadRequested)] == [reason]
        again = await shared.load("over")  # is answered with the job of the first
        assert (again["id"], again["passed_over"]) == (job["id"], reason)
        assert (await shared.model("over"))["not_served"] == reason
        refused = await shared.post("/api/v1/models/over/load", json={"version": 2})
        assert (refused.refusal, refused.json["detail"]) == (UNREADABLE, reason)
    assert (await shared.load("over"))["version"] == 2
    assert (await shared.model("over"))["not_served"] is None


async def test_model_that_cannot_be_read_is_worth_a_retry(shared: LocalApi) -> None:
    for model_id in ("hidden", "seen"):
        shared.save(models.add(1), model_id)
    with unreadable(shared.config.repository / "hidden"):
        for answer in (
            await shared.post("/api/v1/models/hidden/load"),
            await shared.get("/api/v1/models/hidden"),
            await shared.infer("hidden", ONE),
            await shared.get("/v2/models/hidden"),
        ):
            assert answer.status == 503
            assert "the folder of model 'hidden' cannot be read: Permission denied" in answer.body.decode()
        listed = {each["id"]: each for each in (await shared.get("/api/v1/models")).json["models"]}
        assert listed["hidden"]["not_served"] is not None
        assert listed["seen"]["not_served"] is None
    await shared.load("hidden")


async def test_files_that_are_back_under_a_removed_number_are_not_served(shared: LocalApi) -> None:
    api, version, load = shared, "/api/v1/models/back/versions/2", "/api/v1/models/back/load"
    api.save(models.add(1), "back")
    folder = api.save(models.add(2), "back", 2)
    assert (await api.send("DELETE", version)).status == 204
    assert (await api.post(load, json={"version": 2})).json["detail"] == "model 'back' has no version 2"
    save(models.add(2), api.config.repository, "back", 2)
    says = (
        "version 2 of model 'back' was removed, and its folder has files all the same, which are not served"
    )
    refused = await api.post(load, json={"version": 2})
    assert refused.refusal == (404, "unknown_version")
    assert refused.json["detail"].startswith(says)
    assert (await api.model("back"))["not_served"].startswith(says)
    job = await api.load("back")
    assert (job["version"], job["passed_over"].startswith(says)) == (1, True)
    refused = await put_file(api, version)
    assert refused.refusal == (409, "version_exists")
    assert "was removed, and its folder has files all the same" in refused.json["detail"]
    folder.rename(folder.with_name("3"))  # the one way out
    assert (await api.load("back"))["version"] == 3
    save(models.add(2), api.config.repository, "back", 2)
    assert (await api.send("DELETE", version)).status == 204  # the other one
    assert (await put_file(api, version)).status == 201
    assert (await api.load("back", version=2))["version"] == 2


async def test_version_that_is_a_time_is_served(shared: LocalApi) -> None:
    version = 202611261230
    shared.save(models.add(1), "dated", version)
    assert (await shared.load("dated"))["version"] == version
    assert (await shared.infer("dated", ONE, version=version)).json["model_version"] == str(version)
    (entry,) = [each for each in (await shared.post("/v2/repository/index")).json if each["name"] == "dated"]
    assert entry["version"] == str(version)


async def test_version_named_by_a_label_is_loaded_on_demand(shared: LocalApi) -> None:
    for version in (1, 2):
        shared.save(models.add(version), "named", version)
    await shared.send("PUT", "/api/v1/models/named/labels/champion", json={"version": 1})
    assert (await shared.infer("named", ONE, version="champion")).json["model_version"] == "1"
