"""Views of what is there: lists of models and jobs, the overview, the timeline and charts."""

import pytest
import pytest_asyncio
from support import models
from support.http import ONE, Json, LocalApi
from support.models import TEXT

from events.models import ModelState
from server.appkeys import CONSUMER, LIMIT, LOG, TIME_SERIES
from server.observability.timeseries import measure

NAMES = ["B", "a", "a.1", "b", "c"]
OVERVIEW = "/api/v1/overview"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def all_jobs(shared: LocalApi) -> list[Json]:
    """The jobs of a server with one loaded model, `b`, and one, `a`, that failed twice; newest first."""
    for name in NAMES:
        shared.save(TEXT if name == "a" else models.add(), name)
    for version in (2, 10):
        shared.save(models.add(), "c", version)
    jobs = [await shared.load("b"), await shared.failed_load("a"), await shared.failed_load("a")]
    jobs += [await shared.unload("b"), await shared.load("b")]
    return jobs[::-1]


async def test_models_and_jobs_are_listed_in_pages_with_filters(
    shared: LocalApi, all_jobs: list[Json]
) -> None:
    """MLServer #957: index, jobs and models are folds of one state."""
    seen = await pages(shared, "models", limit=2, count=3)
    assert [model["id"] for model in seen] == NAMES
    assert seen[-1] == {
        "id": "c", "versions": [1, 2, 10], "state": "unloaded", "version": None, "next_version": None,
        "active": False, "loaded_at": None, "loaded_by": None, "job_id": None, "position": None, "files": [],
        "memory_bytes": None, "error": None, "instances": None, "threads": None,
        "memory_at_load_bytes": None, "brought_back": None,
        "repository_changed": None, "not_served": None, "signature": None, "approval": None,
        "added_by": None,
    }  # fmt: skip
    assert (await shared.get("/api/v1/models?limit=5")).json["next_cursor"] is None
    assert (await shared.get("/api/v1/models?cursor=zzz")).json["models"] == []
    assert await pages(shared, "jobs", limit=2, count=3) == all_jobs
    ids = [job["id"] for job in all_jobs]
    for query, expected in (
        ("?model=b", [ids[0], ids[1], ids[4]]),
        ("?status=failed", [ids[2], ids[3]]),
        ("?model=b&status=completed&limit=1", [ids[0]]),
        ("?model=a&status=completed", []),
        ("?model=%00", []),
        ("?model=%ff", []),
        ("?cursor=1", []),
    ):
        assert [job["id"] for job in await shared.jobs(query)] == expected, query
    states = {model["id"]: model["state"] for model in seen}
    assert states == dict.fromkeys(NAMES, "unloaded") | {"a": "failed", "b": "loaded"}
    index = (await shared.post("/v2/repository/index")).json
    assert {entry["name"]: entry.get("state") == "READY" for entry in index} == {
        name: state == ModelState.LOADED for name, state in states.items()
    }


async def pages(api: LocalApi, kind: str, limit: int, count: int) -> list[Json]:
    """Return the members of all pages of a list, which must be so many pages."""
    seen, cursor = [], ""
    for left in reversed(range(count)):
        page = (await api.get(f"/api/v1/{kind}?limit={limit}{cursor}")).json
        assert page.keys() == {kind, "as_of", "next_cursor"}
        assert page["as_of"] == api.position
        assert (page["next_cursor"] is None) == (left == 0)
        seen += page[kind]
        cursor = f"&cursor={page['next_cursor']}"
    return seen


async def test_overview_has_what_single_resources_have(shared: LocalApi, all_jobs: list[Json]) -> None:
    seen = (await shared.get(OVERVIEW)).json
    assert seen["models"] == (await shared.get("/api/v1/models")).json["models"]
    assert seen["jobs"] == all_jobs
    resources = (await shared.get("/api/v1/resources")).json
    assert seen["resources"]["models"] == resources["models"]
    assert seen["resources"].keys() == resources.keys()
    assert (seen["nodes"], seen["failed_jobs"], seen["as_of"]) == ([], [all_jobs[2]], shared.position)
    first = (await shared.get(f"{OVERVIEW}?limit=2")).json
    rest = (await shared.get(f"/api/v1/models?cursor={first['next_cursor']}")).json
    assert [model["id"] for page in (first, rest) for model in page["models"]] == NAMES


async def test_overview_shows_the_start_to_readers_of_events(shared: LocalApi) -> None:
    page = await shared.get("/api/v1/events?type=ServerStarted&limit=1")
    [started], line = page.json["events"], page.body.removeprefix(b'{"events":[').partition(b"],")[0]
    for role, is_shown in (("admin", True), ("audit", True), ("infer", False)):
        overview = await shared.get(OVERVIEW, roles=(role,))
        assert overview.json["server_started"] == (started if is_shown else None)
        assert (line in overview.body) is is_shown, "the event's exact text, which has its hash"
        assert overview.json["resources"]["budget_bytes"] > 0


@pytest.mark.usefixtures("all_jobs")
async def test_timeline_shows_loads(shared: LocalApi) -> None:
    loaded = await shared.model("b")
    answer = await shared.get("/api/v1/timeline?find=b&limit=2", roles=("audit",))
    lane = answer.json["lanes"][-1]
    last = lane["segments"][-1]
    assert (last["state"], last["version"], last["by"]) == ("loaded", 1, "alice")
    assert (last["load_job_id"], last["position"]) == (loaded["job_id"], loaded["position"])
    assert answer.json["server"][-1]["state"] == "running"
    assert answer.json["to"] == last["to"] > loaded["loaded_at"]
    assert answer.json["as_of"] == shared.position


@pytest.mark.usefixtures("all_jobs")
async def test_samples_have_latencies_and_memory(shared: LocalApi) -> None:
    for _ in range(3):
        assert (await shared.infer("b", ONE)).status == 200
    app = shared.app
    app[TIME_SERIES].sample(app[LOG].now(), measure(app[CONSUMER], app[LIMIT]), app[CONSUMER].loads)
    server = (await shared.get("/api/v1/resources/samples", roles=("infer",))).json
    assert (server["range"], server["interval_s"], server["whole"]["requests"]) == ("1h", 10, 3)
    last = server["points"][-1]
    assert 0 < last["p50_s"] <= last["p95_s"] <= last["p99_s"]
    assert last["server_bytes"] > 10_000_000
    assert last["budget_bytes"] > last["used_bytes"] > 0
    model = (await shared.get("/api/v1/models/b/samples?range=24h", roles=("audit",))).json
    assert (model["interval_s"], model["whole"], len(model["points"])) == (300, server["whole"], 1)
    assert model["points"][0]["memory_bytes"] == last["used_bytes"]
    assert (await shared.get("/api/v1/models/c/samples")).json["points"] == []


REFUSED = {
    "timeline?from=noon": (400, "invalid_parameter"),
    "timeline?from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z": (400, "invalid_parameter"),
    "timeline?resolution=600": (400, "invalid_parameter"),
    "timeline?limit=101": (400, "invalid_parameter"),
    "resources?model=m": (400, "invalid_parameter"),
    "resources/samples?range=7d": (400, "invalid_parameter"),
    "models/none/samples": (404, "unknown_model"),
    "models/none/stderr": (404, "unknown_model"),
}


async def test_view_is_refused(shared: LocalApi) -> None:
    assert {path: (await shared.get(f"/api/v1/{path}")).refusal for path in REFUSED} == REFUSED
