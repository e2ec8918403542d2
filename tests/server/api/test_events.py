"""`GET /api/v1/events`: pages both ways, filters, times, and the hashed text."""

import hashlib
import json

import pytest_asyncio
from support import models
from support.http import Json, LocalApi

from server.appkeys import LOG

PATH = "/api/v1/events"


async def listed(api: LocalApi, query: str = "") -> Json:
    """Return a page of events."""
    answer = await api.get(f"{PATH}{query}", roles=("audit",))
    assert answer.status == 200, answer.body
    return answer.json


async def positions(api: LocalApi, query: str = "") -> list[int]:
    return [event["position"] for event in (await listed(api, query))["events"]]


async def pages(api: LocalApi, parameter: str, cursor: int) -> list[list[int]]:
    """Return the positions of all pages of three events."""
    page = await listed(api, f"?{parameter}={cursor}&limit=3")
    first = [[event["position"] for event in page["events"]]]
    return first if page["next_cursor"] is None else first + await pages(api, parameter, page["next_cursor"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def loaded(shared: LocalApi) -> LocalApi:
    """A server whose ledger has the loads of two models, of three events each, after its start."""
    for name in ("m", "n"):
        shared.save(models.add(1), name)
        await shared.load(name)
    return shared


async def test_events_are_listed_in_pages_both_ways_and_by_time(loaded: LocalApi) -> None:
    page = await listed(loaded)
    load = ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert [event["type"] for event in page["events"]] == ["ServerStarted", *load, *load]
    assert {event["schema"] for event in page["events"]} == {1}
    assert (page["as_of"], page["next_cursor"]) == (7, None)
    assert await pages(loaded, "after", 0) == [[1, 2, 3], [4, 5, 6], [7]]
    assert await pages(loaded, "before", 8) == [[7, 6, 5], [4, 3, 2], [1]]
    second, fourth = page["events"][1]["recorded_at"], page["events"][3]["recorded_at"]
    for query, expected in (
        ("after=2&before=6", [5, 4, 3]),
        ("after=7", []),
        (f"since={second}&until={fourth}", [2, 3, 4]),
        ("since=2&until=4", [2, 3, 4]),
        (f"since={second}&until=3&before=9", [3, 2]),
        ("since=0&until=0", []),
        ("since=9&until=99", []),
        ("since=2099-01-01T00:00:00Z", []),
        ("until=2001-01-01T00:00:00%2B02:00", []),
        ("since=2001-01-01T00:00:00-02:00&limit=2", [1, 2]),
    ):
        assert await positions(loaded, f"?{query}") == expected, query


async def test_filters_join_with_and_values_of_one_with_or(loaded: LocalApi) -> None:
    [of_n, _] = await loaded.jobs()
    for query, expected in (
        ("type=ModelLoaded&model=m", [4]),
        ("model=n&model=m&type=LoadStarted&type=ModelLoaded", [3, 4, 6, 7]),
        (f"job={of_n['id']}", [5, 6, 7]),
        ("actor=alice", [2, 5]),
        ("actor=alice&before=9", [5, 2]),
        ("actor=alice&type=ModelLoaded", []),
        ("model=nothing", []),
    ):
        assert await positions(loaded, f"?{query}") == expected, query


async def test_listed_text_is_the_text_that_is_hashed(loaded: LocalApi) -> None:
    body = (await loaded.get(PATH)).body
    before = bytes(32)
    start = len(b'{"events":[')
    for event in json.loads(body)["events"]:
        end = body.index(b',"hash":"', start)
        before = hashlib.sha256(before + body[start:end] + b"}").digest()
        assert event["hash"] == before.hex()
        start = end + len(b',"hash":""},') + 64
    assert before == loaded.app[LOG].head.hash


async def test_invalid_query_is_400(loaded: LocalApi) -> None:
    for query in (
        "after=-1", "after=1.5", "before=0", "limit=0", "limit=1001", "after=1&after=2", "since=then",
        "since=2026-01-01", "until=2026-01-01T00:00:00", "until=2026-13-01T00:00:00Z", "type=Loaded",
        "model=", "type=stage", "order=asc", "&".join(f"job={number}" for number in range(17)),
    ):  # fmt: skip
        assert (await loaded.get(f"{PATH}?{query}")).refusal == (400, "invalid_parameter"), query
    answer = await loaded.get(f"{PATH}?after=8")
    assert answer.refusal == (400, "beyond_head")
    assert "7" in answer.json["detail"]
