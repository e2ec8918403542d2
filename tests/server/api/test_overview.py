"""`GET /api/v1/overview`: models, jobs, memory and nodes in one answer, by role."""

import pytest
from support import models
from support.http import LocalApi

pytestmark = pytest.mark.asyncio(loop_scope="module")

OVERVIEW = "/api/v1/overview"


async def test_overview_has_what_single_resources_have(shared: LocalApi) -> None:
    for model_id in ("m", "n"):
        shared.save(models.add(), model_id)
    await shared.load("m")
    seen, models_page = (await shared.get(OVERVIEW)).json, (await shared.get("/api/v1/models")).json
    assert seen["models"] == models_page["models"]
    assert seen["jobs"] == await shared.jobs()
    resources = (await shared.get("/api/v1/resources")).json
    assert seen["resources"]["models"] == resources["models"]
    assert seen["resources"].keys() == resources.keys()
    assert (seen["nodes"], seen["failed_jobs"], seen["as_of"]) == ([], [], shared.position)


async def test_overview_names_the_last_failed_job_of_failed_model(shared: LocalApi) -> None:
    shared.save(models.CORRUPT, "bad")
    shared.save(models.add(), "good")
    await shared.load("good")
    jobs = [await shared.failed_load("bad") for _ in range(2)]
    assert (await shared.get(OVERVIEW)).json["failed_jobs"] == [jobs[-1]]


async def test_overview_continues_in_the_list_of_models(shared: LocalApi) -> None:
    for model_id in ("a", "b", "c"):
        shared.save(models.add(), model_id)
    ids = [model["id"] for model in (await shared.get("/api/v1/models")).json["models"]]
    seen = (await shared.get(f"{OVERVIEW}?limit=2")).json
    rest = (await shared.get(f"/api/v1/models?cursor={seen['next_cursor']}")).json
    assert [model["id"] for page in (seen, rest) for model in page["models"]] == ids


@pytest.mark.parametrize(("role", "is_shown"), [("admin", True), ("audit", True), ("infer", False)])
async def test_overview_shows_the_start_to_readers_of_events(
    shared: LocalApi, role: str, *, is_shown: bool
) -> None:
    overview = await shared.get(OVERVIEW, roles=(role,))
    seen = overview.json
    [started] = (await shared.get("/api/v1/events?type=ServerStarted&before=9007199254740991&limit=1")).json[
        "events"
    ]
    assert seen["server_started"] == (started if is_shown else None)
    page = await shared.get("/api/v1/events?type=ServerStarted&limit=1")
    line = page.body.removeprefix(b'{"events":[').partition(b"],")[0]
    assert (line in overview.body) is is_shown, "the event's exact text, which has its hash"
    assert seen["resources"]["budget_bytes"] > 0
