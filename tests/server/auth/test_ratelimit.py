from pathlib import Path

import pytest
from aiohttp import web
from aiohttp_apispec import json_schema
from marshmallow import Schema
from pytest_aiohttp import AiohttpClient
from support.smallapp import bearer, route, small_app, small_config

from server.auth.ratelimit import RateLimited, RateLimits, Windows, peer_of
from server.config import RateLimit
from server.errors import QUOTA_EXCEEDED
from server.routes import Access, LimitClass


class Clock:
    """The time, as far as a test is concerned."""

    def __init__(self) -> None:
        self.now = 1_000_000_000.0

    def __call__(self) -> float:
        return self.now


class TokenTime(Clock):
    """A time at which tokens that were issued just now are valid."""

    def __init__(self) -> None:
        import time  # noqa: PLC0415

        self.now = time.time()


async def test_what_is_left_is_told_and_then_refused_until_the_window_ends(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    clock = TokenTime()
    config = small_config(tmp_path / "data", limit_reads="2/minute")
    client = await aiohttp_client(small_app([route()], config, clock))
    alice, bob = bearer(config), bearer(config, subject="bob")
    for left in (1, 0):
        answer = await client.get("/x", headers=alice)
        assert answer.status == 200
        assert answer.headers["RateLimit-Policy"] == '"reads";q=2;w=60'
        assert answer.headers["RateLimit"] == f'"reads";r={left};t=60'
    clock.now += 20.5
    refused = await client.get("/x", headers=alice)
    assert (refused.status, refused.headers["Retry-After"]) == (429, "40")
    assert refused.headers["RateLimit"] == '"reads";r=0;t=40'
    body = await refused.json()
    assert (body["type"], body["code"], body["violated-policies"]) == (
        QUOTA_EXCEEDED,
        "rate_limited",
        ["reads"],
    )
    assert (await client.get("/x", headers=bob)).status == 200
    clock.now += int(refused.headers["Retry-After"])
    assert (await client.get("/x", headers=alice)).status == 200


async def test_classes_are_counted_apart_and_off_is_off(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    config = small_config(
        tmp_path / "data", limit_reads="1/day", limit_management="1/day", limit_inference="off"
    )
    routes = [route(f"/{limit.value}", limit=limit) for limit in LimitClass]
    client = await aiohttp_client(small_app(routes, config))
    headers = bearer(config)
    for limit, statuses in [("reads", [200, 429]), ("management", [200, 429]), ("inference", [200] * 3)]:
        assert [(await client.get(f"/{limit}", headers=headers)).status for _ in statuses] == statuses
    answer = await client.get("/none", headers=headers)
    assert answer.status == 200
    assert "RateLimit" not in answer.headers


async def test_errors_of_limited_routes_have_the_header_fields_too(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    config = small_config(tmp_path / "data")

    @json_schema(Schema())
    async def handler(request: web.Request) -> web.Response:  # noqa: ARG001
        raise web.HTTPNotFound

    routes = [route(access=Access.ADMIN), route("/y", handler, method="POST")]
    client = await aiohttp_client(small_app(routes, config))
    answers = [
        await client.get("/x", headers=bearer(config, "audit")),
        await client.get("/nothing", headers=bearer(config)),
        await client.post("/y", headers=bearer(config)),
        await client.post("/y", headers=bearer(config), data=b"["),
    ]
    assert [answer.status for answer in answers] == [403, 404, 404, 415]
    assert all("RateLimit" in answer.headers for answer in answers)


async def test_an_address_whose_credentials_were_refused_too_often_waits(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    clock = TokenTime()
    config = small_config(tmp_path / "data", limit_auth_failures="3/minute")
    routes = [route(), route("/health", access=Access.PUBLIC, limit=LimitClass.NONE)]
    client = await aiohttp_client(small_app(routes, config, clock))
    good, bad, malformed = bearer(config), {"Authorization": "Bearer a.b.c"}, {"Authorization": "Bearer"}
    for headers in (None, bad, good, malformed, None, bad):
        assert (await client.get("/x", headers=headers)).status != 429
    for headers in (None, bad, good):
        answer = await client.get("/x", headers=headers)
        body = await answer.json()
        assert (answer.status, body["code"], answer.headers["Retry-After"]) == (
            429,
            "too_many_failures",
            "60",
        )
        assert body["violated-policies"] == ["auth-failures"]
    assert (await client.get("/health", headers=bad)).status == 200
    clock.now += 60
    assert (await client.get("/x", headers=good)).status == 200


async def test_requests_without_credentials_lock_nobody_out(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    config = small_config(tmp_path / "data", limit_auth_failures="1/minute")
    client = await aiohttp_client(small_app([route()], config))
    assert [(await client.get("/x")).status for _ in range(5)] == [401] * 5


def test_a_full_memory_forgets_the_least_recently_used_counter() -> None:
    windows = Windows(RateLimit(9, 60), Clock(), capacity=2)
    for key in ("a", "b", "a", "c", "a"):
        windows.count(key)
    assert [windows.counted(key)[0] for key in ("a", "b", "c")] == [3, 0, 1]
    assert len(windows) == 2


def test_a_window_begins_with_its_first_request(tmp_path: Path) -> None:
    clock = Clock()
    rates = RateLimits(small_config(tmp_path / "data", limit_reads="2/minute"), clock)
    first = rates.count(LimitClass.READS, "alice")
    clock.now += 59.5
    second = rates.count(LimitClass.READS, "alice")
    assert first is not None
    assert second is not None
    assert [(quota.remaining, quota.reset_s) for quota in (first, second)] == [(1, 60), (0, 1)]
    with pytest.raises(RateLimited) as refused:
        rates.count(LimitClass.READS, "alice")
    assert refused.value.retry_after_s == 1


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        (None, "local"),
        ("?", "?"),
    ],
)
def test_an_address_stands_for_whoever_can_choose_it(address: str | None, peer: str) -> None:
    assert peer_of(address) == peer
