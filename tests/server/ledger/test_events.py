"""The list of events: pages both ways, filters, times, and the text as it is stored."""

import hashlib
import json

import pytest
from support import models
from support.events import write
from support.http import Json, LocalApi
from support.models import save

from server.appkeys import LOG

PATH = "/api/v1/events"


async def listed(api: LocalApi, query: str = "") -> Json:
    """Return a page, which has to be one."""
    answer = await api.get(f"{PATH}{query}", roles=("audit",))
    assert answer.status == 200, answer.body
    return answer.json


async def positions(api: LocalApi, query: str = "") -> list[int]:
    return [event["position"] for event in (await listed(api, query))["events"]]


async def pages(api: LocalApi, parameter: str, cursor: int) -> list[list[int]]:
    """Return the positions of all pages of three, following the cursor."""
    page = await listed(api, f"?{parameter}={cursor}&limit=3")
    first = [[event["position"] for event in page["events"]]]
    return first if page["next_cursor"] is None else first + await pages(api, parameter, page["next_cursor"])


async def test_events_are_listed_from_the_oldest_on_and_what_they_reflect_is_told(api: LocalApi) -> None:
    await write(api.app[LOG], 3)
    page = await listed(api)
    assert [event["type"] for event in page["events"]] == ["ServerStarted", *["LoadStarted"] * 3]
    assert {name: page[name] for name in ("as_of", "oldest", "next_cursor")} == {
        "as_of": 4, "oldest": 1, "next_cursor": None,
    }  # fmt: skip


async def test_pages_go_on_both_ways(api: LocalApi) -> None:
    await write(api.app[LOG], 6)
    assert await pages(api, "after", 0) == [[1, 2, 3], [4, 5, 6], [7]]
    assert await pages(api, "before", 8) == [[7, 6, 5], [4, 3, 2], [1]]
    assert await positions(api, "?after=2&before=6") == [5, 4, 3]
    assert await positions(api, "?after=7") == []


async def test_the_text_is_that_which_is_hashed(api: LocalApi) -> None:
    save(models.add(1), api.config.repository, "m")
    await api.load("m")
    body = (await api.get(PATH)).body
    before = bytes(32)
    start = len(b'{"events":[')
    for event in json.loads(body)["events"]:
        end = body.index(b',"hash":"', start)
        before = hashlib.sha256(before + body[start:end] + b"}").digest()
        assert event["hash"] == before.hex()
        start = end + len(b',"hash":""},') + 64
    assert before == api.app[LOG].head.hash


async def test_filters_have_to_fit_all_and_values_of_one_any(api: LocalApi) -> None:
    for name in ("m", "n"):
        save(models.add(1), api.config.repository, name)
    jobs = {name: await api.load(name) for name in ("m", "n")}
    assert await positions(api, "?type=ModelLoaded&model=m") == [4]
    assert await positions(api, "?model=n&model=m&type=LoadStarted&type=ModelLoaded") == [3, 4, 6, 7]
    assert await positions(api, f"?job={jobs['n']['id']}") == [5, 6, 7]
    assert await positions(api, "?actor=alice") == [2, 5]
    assert await positions(api, "?actor=alice&before=9") == [5, 2]
    assert await positions(api, "?actor=alice&type=ModelLoaded") == []
    assert await positions(api, "?model=nothing") == []


async def test_a_time_or_a_position_says_since_and_until_when_and_both_are_included(api: LocalApi) -> None:
    await write(api.app[LOG], 4)
    events = (await listed(api))["events"]
    second, fourth = events[1]["recorded_at"], events[3]["recorded_at"]
    assert await positions(api, f"?since={second}&until={fourth}") == [2, 3, 4]
    assert await positions(api, "?since=2&until=4") == [2, 3, 4]
    assert await positions(api, f"?since={second}&until=3&before=9") == [3, 2]
    assert await positions(api, "?since=0&until=0") == []
    assert await positions(api, "?since=9&until=99") == []
    assert await positions(api, "?since=2099-01-01T00:00:00Z") == []
    assert await positions(api, "?until=2001-01-01T00:00:00%2B02:00") == []
    assert await positions(api, "?since=2001-01-01T00:00:00-02:00&limit=2") == [1, 2]


NOT_UNDERSTOOD = [
    "?after=-1", "?after=1.5", "?before=0", "?limit=0", "?limit=1001", "?after=1&after=2", "?since=then",
    "?since=2026-01-01", "?until=2026-01-01T00:00:00", "?until=2026-13-01T00:00:00Z", "?type=Loaded",
    "?model=", "?type=stage", "?order=asc", "?" + "&".join(f"job={number}" for number in range(17)),
]  # fmt: skip


async def test_what_is_not_understood_is_refused(api: LocalApi, subtests: pytest.Subtests) -> None:
    for query in NOT_UNDERSTOOD:
        with subtests.test(query[:30]):
            assert (await api.get(f"{PATH}{query}")).refusal == (400, "invalid_parameter")


async def test_a_position_that_the_log_does_not_have_yet_is_refused_with_its_head(api: LocalApi) -> None:
    answer = await api.get(f"{PATH}?after=2")
    assert answer.refusal == (400, "beyond_head")
    assert "1" in answer.json["detail"]


async def test_only_who_may_audit_sees_them(api: LocalApi) -> None:
    for path in (PATH, f"{PATH}/stream"):
        assert (await api.get(path, roles=("predict",))).refusal == (403, "forbidden")
        assert (await api.get(path, roles=())).refusal == (401, "no_credentials")


async def test_an_event_of_another_release_is_listed_as_it_is(api: LocalApi) -> None:
    await write(api.app[LOG], 1)
    assert (await listed(api, "?limit=1"))["events"][0]["schema"] == 1
