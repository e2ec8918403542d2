"""`?at=`: models and jobs as they were at a position, or at a time, for those who may audit."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support import models
from support.http import Json, LocalApi

from events.clock import moment, stamp
from events.types import ModelLoaded, ModelUnloaded


@pytest.fixture
async def told(api: LocalApi, repository: Path) -> LocalApi:
    """A server whose ledger has a load, a swap, another model and an unload."""
    models.save(models.add(2.0), repository, "digits", 1)
    models.save(models.add(3.0), repository, "digits", 2)
    models.save(models.add(4.0), repository, "other", 1)
    await api.load("digits", version=1)
    await api.load("digits", version=2)
    await api.load("other")
    await api.unload("digits")
    return api


async def positions(api: LocalApi, kind: type) -> list[int]:
    return [event.position for event in await api.events() if isinstance(event.data, kind)]


async def found(api: LocalApi, path: str, **options: Any) -> Json:
    answer = await api.get(path, **options)
    assert answer.status == 200, answer.body
    return answer.json


async def test_a_model_is_shown_as_it_was_with_who_loaded_which_bytes(told: LocalApi) -> None:
    first, *_ = await positions(told, ModelLoaded)
    then = await found(told, f"/api/v1/models/digits?at={first}", roles=("audit",))
    assert (then["state"], then["version"], then["position"], then["loaded_by"]) == (
        "loaded", 1, first, "alice",
    )  # fmt: skip
    assert then["active"]
    assert then["versions"] is None
    [event] = [event for event in await told.events() if event.position == first]
    assert isinstance(event.data, ModelLoaded)
    assert [file["sha256"] for file in then["files"]] == [file.sha256 for file in event.data.files]
    assert (then["as_of"], then["as_of_time"]) == (first, event.recorded_at)
    assert (await told.model("digits"))["state"] == "unloaded"


async def test_a_time_means_the_last_position_recorded_no_later(told: LocalApi) -> None:
    events = await told.events()
    for event in events:
        later = stamp(moment(event.recorded_at) + timedelta(microseconds=1))
        listed = await found(told, f"/api/v1/models?at={event.recorded_at}")
        last = max(each.position for each in events if each.recorded_at <= event.recorded_at)
        assert listed["as_of"] == last
        then = await found(told, f"/api/v1/models?at={later}")
        assert then["as_of"] >= last
        assert listed["as_of_time"] == event.recorded_at


OFFSETS = ["+02:00", "%2B02:00", "-03:30", "Z", "z"]


async def test_a_time_may_have_any_offset_and_a_plus_need_not_be_escaped(
    told: LocalApi, subtests: pytest.Subtests
) -> None:
    for written in OFFSETS:
        with subtests.test(written):
            last = (await told.events())[-1]
            offset = {"+02:00": 120, "%2B02:00": 120, "-03:30": -210}.get(written, 0)
            local = moment(last.recorded_at).replace(tzinfo=None) + timedelta(minutes=offset)
            listed = await found(told, f"/api/v1/models?at={local.isoformat()}{written}")
            assert listed["as_of"] == last.position


async def test_before_everything_there_was_nothing(told: LocalApi) -> None:
    for at in ("0", "2001-01-01T00:00:00Z"):
        listed = await found(told, f"/api/v1/models?at={at}")
        assert listed == {"models": [], "next_cursor": None, "as_of": 0, "as_of_time": None}
        assert (await found(told, f"/api/v1/jobs?at={at}"))["jobs"] == []
        answer = await told.get(f"/api/v1/models/digits?at={at}")
        assert answer.refusal == (404, "unknown_model")


async def test_a_time_that_is_yet_to_come_is_the_head(told: LocalApi) -> None:
    listed = await found(told, "/api/v1/jobs?at=9999-12-31T23:59:59Z")
    assert listed["as_of"] == told.position
    assert listed["jobs"] == [job | {"stage": None, "waiting_for": None} for job in await told.jobs()]


async def test_the_head_is_what_is_so_now(told: LocalApi) -> None:
    listed = await found(told, f"/api/v1/models?at={told.position}")
    now = await found(told, "/api/v1/models")
    for then, model in zip(listed["models"], now["models"], strict=True):
        assert then == model | {"versions": None}


async def test_a_job_is_shown_as_far_as_it_was(told: LocalApi) -> None:
    asked, started, loaded = await told.events("other")
    positions = [asked.position, started.position, loaded.position]
    statuses = [(await found(told, f"/api/v1/jobs/{asked.id}?at={at}"))["status"] for at in positions]
    assert statuses == ["pending", "in_progress", "completed"]
    for missing in (f"{asked.id}?at={asked.position - 1}", f"none?at={asked.position}"):
        assert (await told.get(f"/api/v1/jobs/{missing}")).refusal == (404, "unknown_job")
    [listed] = (await found(told, f"/api/v1/jobs?at={started.position}&status=in_progress&model=other"))[
        "jobs"
    ]
    assert listed["id"] == asked.id
    assert (listed["stage"], listed["waiting_for"]) == (None, None)
    at = f"at={started.position}&model=other"
    assert (await found(told, f"/api/v1/jobs?{at}&status=completed"))["jobs"] == []
    assert (await found(told, f"/api/v1/jobs?{at}"))["jobs"] == [listed]


async def test_pages_of_the_past_are_followed_like_those_of_the_present(told: LocalApi) -> None:
    _, gone = await positions(told, ModelUnloaded)
    for name in ("models", "jobs"):
        whole = (await found(told, f"/api/v1/{name}?at={gone}"))[name]
        assert len(whole) > 1
        cursor: Any = ""
        seen: list[str] = []
        while cursor is not None:
            after = f"&cursor={quote(str(cursor))}" if cursor else ""
            page = await found(told, f"/api/v1/{name}?at={gone}&limit=1{after}")
            seen += [each["id"] for each in page[name]]
            cursor = page["next_cursor"]
        assert seen == [each["id"] for each in whole]


NO_MOMENTS = [
    "", "-1", "1.5", "yesterday", "2026-01-31", "2026-01-31T14:02:00", "2026-01-31 14:02", "١٢",
    "2026-02-30T00:00:00Z", "2026-01-31T25:00:00Z", "0001-01-01T00:00:00%2B23:59", "1" * 30, "1%00",
]  # fmt: skip


async def test_what_is_no_moment_is_refused_and_says_what_is(
    api: LocalApi, subtests: pytest.Subtests
) -> None:
    for at in NO_MOMENTS:
        with subtests.test(at):
            for path in ("models", "models/digits", "jobs", "jobs/x"):
                answer = await api.get(f"/api/v1/{path}?at={quote(at, safe='%')}")
                assert answer.refusal == (400, "invalid_parameter"), answer.body


async def test_a_position_that_is_not_there_yet_is_refused(api: LocalApi) -> None:
    for at in (api.position + 1, 2**63, 10**19 - 1):
        answer = await api.get(f"/api/v1/models?at={at}")
        assert answer.refusal == (400, "beyond_head")
        assert f"position {api.position}:" in answer.json["detail"]


async def test_the_past_is_for_those_who_may_audit(api: LocalApi) -> None:
    for path in ("models", "models/digits", "jobs", "jobs/x"):
        answer = await api.get(f"/api/v1/{path}?at=nonsense", roles=("predict",), subject="pia")
        assert answer.refusal == (403, "forbidden")
    for query in ("at=0&limit=bad", "at=0&at=1", "at=0&no=1"):  # whatever else is wrong
        answer = await api.get(f"/api/v1/jobs?{query}", roles=("predict",), subject="pia")
        assert answer.refusal == (403, "forbidden")
        assert (await api.get(f"/api/v1/jobs?{query}")).refusal == (400, "invalid_parameter")
    assert (await api.get("/api/v1/models", roles=("predict",), subject="pia")).status == 200
    assert (await api.get("/api/v1/models?at=0", roles=("audit",))).status == 200


async def test_an_inference_leads_to_the_load_behind_it(told: LocalApi) -> None:
    answer = await told.infer("other", {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]})
    assert answer.status == 200, answer.body
    position = int(answer.headers["Loadledger-Model"].rpartition("=")[2])
    [event] = [event for event in await told.events("other") if event.position == position]
    assert isinstance(event.data, ModelLoaded)
    then = await found(told, f"/api/v1/models/other?at={position}", roles=("audit",))
    assert (then["position"], then["job_id"]) == (position, event.job_id)
    assert then["files"][0]["sha256"] == event.data.files[0].sha256


async def test_the_past_survives_a_restart(
    start: Callable[..., Awaitable[LocalApi]], repository: Path
) -> None:
    models.save(models.add(2.0), repository, "digits", 1)
    api = await start()
    await api.load("digits")
    at = api.position
    then = await found(api, f"/api/v1/models/digits?at={at}")
    await api.client.close()
    again = await start()
    assert await found(again, f"/api/v1/models/digits?at={at}") == then
