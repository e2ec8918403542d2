"""`GET /api/v1/timeline`: the lanes of a real ledger, and what the route refuses."""

import pytest
from support import models
from support.http import LocalApi

REFUSED = {
    "from=noon": "invalid_parameter",
    "from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z": "invalid_parameter",
    "resolution=600": "invalid_parameter",
    "limit=101": "invalid_parameter",
}


async def test_timeline_shows_loads(shared: LocalApi) -> None:
    shared.save(models.add(), "lane")
    job = await shared.load("lane")
    loaded = await shared.model("lane")
    answer = await shared.get("/api/v1/timeline?find=lane", roles=("audit",))
    [lane] = answer.json["lanes"]
    assert [segment["state"] for segment in lane["segments"]][-1] == "loaded"
    last = lane["segments"][-1]
    assert (last["version"], last["by"], last["load_job_id"]) == (1, "alice", job["id"])
    assert last["position"] == loaded["position"]
    assert answer.json["server"][-1]["state"] == "running"
    assert answer.json["to"] == last["to"] > loaded["loaded_at"]
    assert answer.json["as_of"] == shared.position


@pytest.mark.parametrize("query", REFUSED)
async def test_timeline_refuses_invalid_ranges(shared: LocalApi, query: str) -> None:
    assert (await shared.get(f"/api/v1/timeline?{query}")).refusal == (400, REFUSED[query])
