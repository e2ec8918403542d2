"""The repository through the API: a link that is re-pointed, and versions that cannot be served."""

import shutil
from pathlib import Path

import pytest
from support import models
from support.http import ONE, LocalApi, local_server
from support.models import save
from support.modes import unreadable

from events.types import LoadRequested
from server.appkeys import UPLOADS

FILE = {"Content-Type": "application/octet-stream"}
MODEL = models.add(9).SerializeToString()
UPLOADS_PATH = "/api/v1/models/m/versions/7/uploads"
UNREADABLE = (503, "repository_unreadable")


def point(link: Path, target: Path) -> None:
    """Re-point a link in one step, as git-sync does."""
    (new := link.with_name("new")).symlink_to(target)
    new.rename(link)


async def answer_of(api: LocalApi, model_id: str = "m") -> float:
    answer: float = (await api.infer(model_id, ONE)).json["outputs"][0]["data"][0]
    return answer


async def test_repository_that_is_a_link_is_followed_when_it_is_re_pointed(tmp_path: Path) -> None:
    link, old, new = tmp_path / "repository", tmp_path / "old", tmp_path / "new release"
    save(models.add(1), old, "m")
    for model_id in ("m", "n"):
        save(models.add(2), new, model_id)
    point(link, old)
    async with local_server(tmp_path) as api:
        await api.load("m")
        upload = (await api.post(UPLOADS_PATH)).json["id"]
        point(link, new)
        assert (await api.model("m"))["repository_changed"] is True
        assert await answer_of(api) == 2
        await api.load("n")
        assert (
            await api.send("PUT", f"{UPLOADS_PATH}/{upload}/files/model.onnx", data=MODEL, headers=FILE)
        ).refusal == (
            404,
            "unknown_upload",
        )
        assert (
            await api.send("PUT", UPLOADS_PATH.removesuffix("/uploads"), data=MODEL, headers=FILE)
        ).status == 201
        assert (new / "m/7/model.onnx").read_bytes() == MODEL
        shutil.rmtree(old)
        await api.load("m", version=1)
        assert await answer_of(api) == 3
        assert (await api.model("m"))["repository_changed"] is False
        assert (await api.send("DELETE", UPLOADS_PATH.removesuffix("/uploads"))).status == 204
        assert not (new / "m/7").exists()


async def test_commit_of_upload_of_an_earlier_repository_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "repository"
    for name in ("old", "new release"):
        (tmp_path / name).mkdir()
    point(link, tmp_path / "old")
    async with local_server(tmp_path) as api:
        uploads = api.app[UPLOADS]
        upload, _ = await uploads.begin_upload("m", 7, "alice", "key")
        (tmp_path / "model").write_bytes(MODEL)
        answer = await api.send(
            "PUT", f"{UPLOADS_PATH}/{upload.id}/files/model.onnx", data=MODEL, headers=FILE
        )
        assert answer.status == 201
        point(link, tmp_path / "new release")
        with pytest.raises(Exception, match="leads to another folder since this began") as refused:
            await uploads.commit(upload)
        assert getattr(refused.value, "code", None) == "repository_unreadable"
        assert await api.types("m") == []
        begun, is_new = await uploads.begin_upload("m", 7, "alice", "key")
        assert (begun.id != upload.id, is_new, begun.files) == (True, True, {})


async def test_loaded_models_serve_while_the_repository_is_gone(tmp_path: Path) -> None:
    async with local_server(tmp_path, on_demand="on") as api:
        repository = api.config.repository
        for model_id in ("m", "n"):
            api.save(models.add(1), model_id)
        repository.rename(tmp_path / "away")
        assert (await api.get("/api/v1/models")).refusal == UNREADABLE
        (tmp_path / "away").rename(repository)
        await api.load("m")
        repository.rename(tmp_path / "away")
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
        (tmp_path / "away").rename(repository)
        await api.load("n")
        assert (await api.model("m"))["not_served"] is None


async def test_load_without_a_number_says_which_version_it_passed_over(tmp_path: Path) -> None:
    async with local_server(tmp_path) as api:
        api.save(models.add(1), "m")
        reason = "version 2 of model 'm' cannot be read: Permission denied; let the server's user read it"
        with unreadable(api.save(models.add(2), "m", 2)):
            job = await api.load("m")
            assert (job["version"], job["passed_over"]) == (1, reason)
            assert (await api.job(job["id"]))["passed_over"] == reason
            assert [each.passed_over for each in await api.data_of(LoadRequested)] == [reason]
            again = await api.load("m")  # is answered with the job of the first
            assert (again["id"], again["passed_over"]) == (job["id"], reason)
            assert (await api.model("m"))["not_served"] == reason
            refused = await api.post("/api/v1/models/m/load", json={"version": 2})
            assert (refused.refusal, refused.json["detail"]) == (UNREADABLE, reason)
        assert (await api.load("m"))["version"] == 2
        assert (await api.model("m"))["not_served"] is None


async def test_model_that_cannot_be_read_is_worth_a_retry(tmp_path: Path) -> None:
    async with local_server(tmp_path) as api:
        api.save(models.add(1), "m")
        api.save(models.add(1), "n")
        with unreadable(api.config.repository / "m"):
            for answer in (
                await api.post("/api/v1/models/m/load"),
                await api.get("/api/v1/models/m"),
                await api.infer("m", ONE),
                await api.get("/v2/models/m"),
            ):
                assert answer.status == 503
                assert "the folder of model 'm' cannot be read: Permission denied" in answer.body.decode()
            listed = (await api.get("/api/v1/models")).json["models"]
            assert [(each["id"], each["not_served"] is None) for each in listed] == [
                ("m", False),
                ("n", True),
            ]
        await api.load("m")


async def test_files_that_are_back_under_a_removed_number_are_not_served(shared: LocalApi) -> None:
    api, version = shared, "/api/v1/models/back/versions/2"
    api.save(models.add(1), "back")
    folder = api.save(models.add(2), "back", 2)
    assert (await api.send("DELETE", version)).status == 204
    assert (await api.post("/api/v1/models/back/load", json={"version": 2})).json["detail"] == (
        "model 'back' has no version 2"
    )
    save(models.add(2), api.config.repository, "back", 2)
    says = (
        "version 2 of model 'back' was removed, and its folder has files all the same, which are not served"
    )
    refused = await api.post("/api/v1/models/back/load", json={"version": 2})
    assert refused.refusal == (404, "unknown_version")
    assert refused.json["detail"].startswith(says)
    assert (await api.model("back"))["not_served"].startswith(says)
    job = await api.load("back")
    assert (job["version"], job["passed_over"].startswith(says)) == (1, True)
    refused = await api.send("PUT", version, data=MODEL, headers=FILE)
    assert refused.refusal == (409, "version_exists")
    assert "was removed, and its folder has files all the same" in refused.json["detail"]
    folder.rename(folder.with_name("3"))  # the one way out
    assert (await api.load("back"))["version"] == 3
    save(models.add(2), api.config.repository, "back", 2)
    assert (await api.send("DELETE", version)).status == 204  # the other one
    assert (await api.send("PUT", version, data=MODEL, headers=FILE)).status == 201
    assert (await api.load("back", version=2))["version"] == 2


async def test_version_that_is_a_time_is_served(shared: LocalApi) -> None:
    version = 202611261230
    shared.save(models.add(1), "dated", version)
    assert (await shared.load("dated"))["version"] == version
    assert (await shared.infer("dated", ONE, version=version)).json["model_version"] == str(version)
    (entry,) = [each for each in (await shared.post("/v2/repository/index")).json if each["name"] == "dated"]
    assert entry["version"] == str(version)
