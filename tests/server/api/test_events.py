"""`GET /api/v1/events`: pages both ways, filters, times, and the hashed text."""

import hashlib
import json

from support import models
from support.history import write
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


async def test_events_are_listed_in_pages_both_ways_and_by_time(api: LocalApi) -> None:
    await write(api.app[LOG], 6)
    page = await listed(api)
    assert [event["type"] for event in page["events"]] == ["ServerStarted", *["LoadStarted"] * 6]
    assert {event["schema"] for event in page["events"]} == {1}
    assert (page["as_of"], page["next_cursor"]) == (7, None)
    assert await pages(api, "after", 0) == [[1, 2, 3], [4, 5, 6], [7]]
    assert await pages(api, "before", 8) == [[7, 6, 5], [4, 3, 2], [1]]
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
        assert await positions(api, f"?{query}") == expected, query


async def test_filters_join_with_and_values_of_one_with_or(api: LocalApi) -> None:
    for name in ("m", "n"):
        api.save(models.add(1), name)
    jobs = {name: await api.load(name) for name in ("m", "n")}
    for query, expected in (
        ("type=ModelLoaded&model=m", [4]),
        ("model=n&model=m&type=LoadStarted&type=ModelLoaded", [3, 4, 6, 7]),
        (f"job={jobs['n']['id']}", [5, 6, 7]),
        ("actor=alice", [2, 5]),
        ("actor=alice&before=9", [5, 2]),
        ("actor=alice&type=ModelLoaded", []),
        ("model=nothing", []),
    ):
        assert await positions(api, f"?{query}") == expected, query
    body = (await api.get(PATH)).body  # the listed text is the text that is hashed
    before = bytes(32)
    start = len(b'{"events":[')
    for event in json.loads(body)["events"]:
        end = body.index(b',"hash":"', start)
        before = hashlib.sha256(before + body[start:end] + b"}").digest()
        assert event["hash"] == before.hex()
        start = end + len(b',"hash":""},') + 64
    assert before == api.app[LOG].head.hash


async def test_invalid_query_is_400(shared: LocalApi) -> None:
    for query in (
        "after=-1", "after=1.5", "before=0", "limit=0", "limit=1001", "after=1&after=2", "since=then",
        "since=2026-01-01", "until=2026-01-01T00:00:00", "until=2026-13-01T00:00:00Z", "type=Loaded",
        "model=", "type=stage", "order=asc", "&".join(f"job={number}" for number in range(17)),
    ):  # fmt: skip
        assert (await shared.get(f"{PATH}?{query}")).refusal == (400, "invalid_parameter"), query
    answer = await shared.get(f"{PATH}?after=2")
    assert answer.refusal == (400, "beyond_head")
    assert "1" in answer.json["detail"]
