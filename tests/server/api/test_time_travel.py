"""`?at=`: models and jobs at a position, or at a time, of the past."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest_asyncio
from support import models
from support.http import ONE, Json, LocalApi

from events.clock import parse_timestamp
from events.types import ModelLoaded, ServerStopped

Start = Callable[..., Awaitable[LocalApi]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def past(shared: LocalApi) -> LocalApi:
    """A server whose ledger has a load, a swap, another model and an unload."""
    for model_id, version in (("digits", 1), ("digits", 2), ("other", 1)):
        shared.save(models.add(), model_id, version)
        await shared.load(model_id)
    await shared.unload("digits")
    return shared


async def found(api: LocalApi, path: str, **options: Any) -> Json:
    answer = await api.get(f"/api/v1/{path}", **options)
    assert answer.status == 200, answer.body
    return answer.json


async def test_answer_of_inference_leads_to_its_load_and_files(past: LocalApi) -> None:
    position = int((await past.infer("other", ONE)).headers["Loadledger-Model"].rpartition("=")[2])
    then = await found(past, f"models/other?at={position}", roles=("audit",))
    assert (then["state"], then["version"], then["position"], then["loaded_by"], then["active"]) == (
        "loaded", 1, position, "alice", True,
    )  # fmt: skip
    assert then["versions"] is None
    [event] = [event for event in await past.events() if event.position == position]
    assert isinstance(event.data, ModelLoaded)
    assert then["job_id"] == event.job_id
    assert [file["sha256"] for file in then["files"]] == [file.sha256 for file in event.data.files]
    assert (then["as_of"], then["as_of_time"]) == (position, event.recorded_at)


async def test_before_the_first_event_there_is_nothing(past: LocalApi) -> None:
    listed = await found(past, "models?at=0")
    assert listed == {
        "models": [], "next_cursor": None, "as_of": 0,
        "server": {"state": "stopped", "since": None},
    }  # fmt: skip
    assert (await found(past, "jobs?at=0"))["jobs"] == []
    assert (await past.get("/api/v1/models/digits?at=0")).refusal == (404, "unknown_model")


async def test_time_before_the_first_event_is_refused_with_its_time(past: LocalApi) -> None:
    first = (await past.events())[0].recorded_at
    for path in ("models", "models/digits", "jobs", "jobs/none"):
        answer = await past.get(f"/api/v1/{path}?at=2001-01-01T00:00:00Z")
        assert answer.refusal == (400, "before_first_event")
        assert answer.json["detail"].startswith("2001-01-01T00:00:00Z is before the first event")
        assert first in answer.json["detail"]


async def test_past_before_a_restart_is_found_with_its_server_and_key(start: Start) -> None:
    api = await start()
    api.save(models.add(), "m")
    request = {"headers": {"Idempotency-Key": "k"}, "wait": 60}
    job_id = (await api.post("/api/v1/models/m/load", **request)).json["id"]
    position = (await api.infer("m", ONE)).headers["Loadledger-Model"].rpartition("=")[2]
    before = await found(api, f"models/m?at={position}")
    assert (before["job_id"], before["server"]["state"]) == (job_id, "running")
    await api.client.close()  # in order
    again = await start()
    assert await found(again, f"models/m?at={position}") == before
    assert (await again.post("/api/v1/models/m/load", **request)).json["id"] == job_id
    assert (await again.post("/api/v1/models/m/unload", **request)).refusal == (422, "idempotency_mismatch")
    stopped = next(event for event in await again.events() if isinstance(event.data, ServerStopped))
    for path in ("models?", "models/m?", "jobs?", f"jobs/{job_id}?"):
        then = await found(again, f"{path}at={position}")
        assert then["server"]["state"] == "running"
        then = await found(again, f"{path}at={quote(stopped.recorded_at)}")
        assert then["server"] == {"state": "stopped", "since": stopped.recorded_at}
        assert then["as_of"] == stopped.position
    assert (await found(again, f"models/m?at={stopped.position}"))["state"] == "lost"


async def test_head_and_future_time_show_the_present(past: LocalApi) -> None:
    listed = await found(past, "jobs?at=9999-12-31T23:59:59Z")
    assert listed["as_of"] == past.position
    assert listed["jobs"] == [job | {"stage": None, "waiting_for": None} for job in await past.jobs()]
    recorded = parse_timestamp((await past.events())[-1].recorded_at)
    for offset in ("+02:00", "%2B02:00"):
        local = recorded.replace(tzinfo=None) + timedelta(minutes=120)
        assert (await found(past, f"models?at={local.isoformat()}{offset}"))["as_of"] == past.position
    listed = await found(past, f"models?at={past.position}")
    now = await found(past, "models")
    assert listed["models"] == [
        {name: value for name, value in model.items() if name not in {"policy", "chosen"}}
        | {"versions": None, "repository_changed": None, "memory_bytes": None}
        for model in now["models"]
    ]


async def test_past_job_shows_its_status_then(past: LocalApi) -> None:
    requested, started, loaded = await past.events("other")
    at = [requested.position, started.position, loaded.position]
    statuses = [(await found(past, f"jobs/{requested.id}?at={position}"))["status"] for position in at]
    assert statuses == ["pending", "in_progress", "completed"]
    for missing in (f"{requested.id}?at={requested.position - 1}", f"none?at={requested.position}"):
        assert (await past.get(f"/api/v1/jobs/{missing}")).refusal == (404, "unknown_job")
    query = f"jobs?at={started.position}&model=other"
    [listed] = (await found(past, f"{query}&status=in_progress"))["jobs"]
    assert (listed["id"], listed["stage"], listed["waiting_for"]) == (requested.id, None, None)
    assert (await found(past, f"{query}&status=completed"))["jobs"] == []
    assert (await found(past, query))["jobs"] == [listed]


async def test_lists_of_the_past_have_pages(past: LocalApi) -> None:
    unloaded = (await past.events("digits"))[-1].position
    for name in ("models", "jobs"):
        whole = (await found(past, f"{name}?at={unloaded}"))[name]
        assert len(whole) > 1
        cursor: Any = ""
        seen: list[str] = []
        while cursor is not None:
            after = f"&cursor={quote(str(cursor))}" if cursor else ""
            page = await found(past, f"{name}?at={unloaded}&limit=1{after}")
            seen += [each["id"] for each in page[name]]
            cursor = page["next_cursor"]
        assert seen == [each["id"] for each in whole]


async def test_invalid_moment_is_400(shared: LocalApi) -> None:
    for at in (
        "", "-1", "1.5", "yesterday", "2026-01-31", "2026-01-31T14:02:00", "2026-01-31 14:02", "١٢",
        "2026-02-30T00:00:00Z", "2026-01-31T25:00:00Z", "0001-01-01T00:00:00%2B23:59", "1" * 30, "1%00",
    ):  # fmt: skip
        for path in ("models", "models/digits", "jobs", "jobs/x"):
            answer = await shared.get(f"/api/v1/{path}?at={quote(at, safe='%')}")
            assert answer.refusal == (400, "invalid_parameter"), answer.body
    for position in (shared.position + 1, 2**63, 10**19 - 1):
        answer = await shared.get(f"/api/v1/models?at={position}")
        assert answer.refusal == (400, "beyond_head")
        assert f"position {shared.position}:" in answer.json["detail"]


async def test_past_is_for_auditors_whatever_else_is_wrong(shared: LocalApi) -> None:
    for path in ("models", "models/digits", "jobs", "jobs/x"):
        answer = await shared.get(f"/api/v1/{path}?at=nonsense", roles=("infer",))
        assert answer.refusal == (403, "forbidden")
    for query in ("at=0&limit=bad", "at=0&at=1", "at=0&no=1"):
        answer = await shared.get(f"/api/v1/jobs?{query}", roles=("infer",))
        assert answer.refusal == (403, "forbidden")
        assert (await shared.get(f"/api/v1/jobs?{query}")).refusal == (400, "invalid_parameter")
    assert (await shared.get("/api/v1/models", roles=("infer",))).status == 200
    assert (await shared.get("/api/v1/models?at=0", roles=("audit",))).status == 200
