"""Who may do what: each role on each route, in the order of checks; rate limits; denials in the ledger."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import product
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from aiohttp_apispec import json_schema
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import Schema
from pytest_aiohttp import AiohttpClient
from support.history import PLAIN
from support.http import LocalApi, bearer, route, small_app, small_config
from support.workers import until

from events.commands import Command, Record
from events.errors import LogUnavailable
from events.sqlite.datalock import LEDGER
from events.sqlite.listing import open_reader
from events.types import SYSTEM, AccessDenied
from server.app import all_routes
from server.appkeys import GATE
from server.auth.access import Access
from server.auth.gate import MAX_EVENTS, NO_ROUTE, OTHER, Denials
from server.auth.keys import create_key, list_keys, revoke
from server.auth.ratelimit import Windows, peer_of
from server.config import Config, RateLimit
from server.errors import QUOTA_EXCEEDED
from server.routing import Route

Client = TestClient[web.Request, web.Application]
Counts = dict[tuple[str, str], int]
Start = Callable[..., Awaitable[LocalApi]]
Roles = tuple[str, ...]

ROLES: tuple[Roles, ...] = ((), ("infer",), ("audit",), ("admin",), ("approve",), ("emergency",))
EVERYONE: set[Roles] = set(ROLES)
ANY_ROLE: set[Roles] = EVERYONE - {()}
INFER: set[Roles] = {("infer",), ("admin",)}
AUDIT: set[Roles] = {("audit",), ("admin",)}
ADMIN: set[Roles] = {("admin",)}
APPROVE: set[Roles] = {("approve",)}
NAMES = {
    "id": "m", "version": 1, "job_id": "j", "file": "console.css", "jti": "t", "upload": "s", "path": "p",
    "label": "champion",
}  # fmt: skip
"""Values of path parameters."""
QUERIES = {"/api/v1/events/stream": "?after=x"}
"""Ends the requests that would stream."""
TABLE: dict[str, set[Roles]] = {
    "GET /health/live": EVERYONE,
    "GET /health/ready": EVERYONE,
    "GET /v2/health/live": EVERYONE,
    "GET /v2/health/ready": EVERYONE,
    "GET /openapi.yaml": EVERYONE,
    "GET /metrics": ANY_ROLE,
    "GET /docs": EVERYONE,
    "GET /docs/static/*": EVERYONE,
    "GET /": EVERYONE,
    "GET /console/{file}": EVERYONE,
    "GET /console/vendor/{file}": EVERYONE,
    "GET /api/v1/models": ANY_ROLE,
    "GET /api/v1/models/{id}": ANY_ROLE,
    "GET /api/v1/jobs": ANY_ROLE,
    "GET /api/v1/jobs/{job_id}": ANY_ROLE,
    "GET /api/v1/nodes": ANY_ROLE,
    "GET /api/v1/overview": ANY_ROLE,
    "POST /api/v1/nodes/{id}/drain": ADMIN,
    "GET /api/v1/resources": ANY_ROLE,
    "GET /api/v1/resources/samples": ANY_ROLE,
    "GET /api/v1/models/{id}/samples": ANY_ROLE,
    "GET /api/v1/models/{id}/stderr": ADMIN,
    "GET /api/v1/events": AUDIT,
    "GET /api/v1/timeline": AUDIT,
    "GET /api/v1/events/stream": AUDIT,
    "GET /api/v1/events/head": AUDIT,
    "GET /api/v1/records": AUDIT,
    "GET /api/v1/records/files": AUDIT,
    "DELETE /api/v1/records/files/{file}": ADMIN,
    "GET /api/v1/tokens": ADMIN,
    "POST /api/v1/tokens": ADMIN,
    "POST /api/v1/tokens/{jti}/revoke": ADMIN,
    "POST /api/v1/sign-in-links": ADMIN,
    "POST /api/v1/sign-in-links/use": EVERYONE,
    "POST /api/v1/jobs/{job_id}/cancel": ADMIN,
    "PUT /api/v1/models/{id}/versions/{version}/approval": APPROVE,
    "DELETE /api/v1/models/{id}/versions/{version}/approval": APPROVE,
    "GET /api/v1/models/{id}/verify": AUDIT | APPROVE,
    "POST /api/v1/models/unload": ADMIN,
    "POST /api/v1/models/{id}/load": ADMIN,
    "GET /api/v1/models/{id}/versions/{version}": ANY_ROLE,
    "PUT /api/v1/models/{id}/versions/{version}": ADMIN,
    "DELETE /api/v1/models/{id}/versions/{version}": ADMIN,
    "PUT /api/v1/models/{id}/labels/{label}": ADMIN,
    "DELETE /api/v1/models/{id}/labels/{label}": ADMIN,
    "POST /api/v1/models/{id}/versions/{version}/uploads": ADMIN,
    "GET /api/v1/models/{id}/versions/{version}/uploads/{upload}": ADMIN,
    "DELETE /api/v1/models/{id}/versions/{version}/uploads/{upload}": ADMIN,
    "PUT /api/v1/models/{id}/versions/{version}/uploads/{upload}/files/{path}": ADMIN,
    "POST /api/v1/models/{id}/versions/{version}/uploads/{upload}/commit": ADMIN,
    "POST /api/v1/models/{id}/unload": ADMIN,
    "GET /v2/models/{id}": ANY_ROLE,
    "GET /v2/models/{id}/versions/{version}": ANY_ROLE,
    "GET /v2/models/{id}/ready": ANY_ROLE,
    "GET /v2/models/{id}/versions/{version}/ready": ANY_ROLE,
    "GET /v2": ANY_ROLE,
    "GET /v2/": ANY_ROLE,
    "GET /v2/models/stats": ANY_ROLE,
    "GET /v2/models/{id}/stats": ANY_ROLE,
    "GET /v2/models/{id}/versions/{version}/stats": ANY_ROLE,
    "GET /v2/models/{id}/config": ANY_ROLE,
    "GET /v2/models/{id}/versions/{version}/config": ANY_ROLE,
    "POST /v2/repository/index": ANY_ROLE,
    "POST /v2/repository/models/{id}/load": ADMIN,
    "POST /v2/repository/models/{id}/unload": ADMIN,
    "POST /v2/models/{id}/infer": INFER,
    "POST /v2/models/{id}/versions/{version}/infer": INFER,
}


def name(route: Route) -> str:
    path = "/docs/static/*" if route.path.startswith("/docs/static/") else route.path
    return f"{route.method} {path}"


def test_role_table_has_every_route() -> None:
    assert {name(each) for each in all_routes()} == TABLE.keys()


async def test_each_role_is_admitted_or_refused_as_the_table_says(shared: LocalApi) -> None:
    for each, roles in product(all_routes(), ROLES):
        case, path = f"{name(each)} {roles}", each.path.format(**NAMES)
        allowed = TABLE[name(each)]
        answer = await shared.send(each.method, path + QUERIES.get(path, ""), roles=roles)
        challenge = answer.headers.get("WWW-Authenticate")
        if roles in allowed:
            assert answer.status not in {401, 403}, case
        elif roles:
            assert answer.refusal == (403, "forbidden"), case
            assert challenge is not None
            assert 'error="insufficient_scope"' in challenge
        else:
            assert answer.refusal == (401, "no_credentials"), case
            assert challenge == 'Bearer realm="loadledger"'
        if each.method == "GET" and roles in ((), ("infer",)):
            head = await shared.send("HEAD", path, roles=roles)
            assert (head.status in {401, 403}) == (roles not in allowed), case
            assert not head.body


async def test_one_of_several_roles_is_enough(shared: LocalApi) -> None:
    for roles, status in ((("audit", "infer"), 200), (("approve", "infer"), 403)):
        assert (await shared.get("/api/v1/events/head", roles=roles)).status == status


async def test_unknown_path_or_method_needs_a_token(shared: LocalApi) -> None:
    for path in ("/nope", "/v2/repository", "/api/v1/models/m/load/", "/api", "/keys", "/docs/static/x"):
        assert (await shared.get(path, roles=())).refusal == (401, "no_credentials")
        assert (await shared.get(path, roles=("infer",))).refusal == (404, "not_found")
    for each in all_routes():
        path = each.path.format(**NAMES)
        assert (await shared.send("PATCH", path, roles=())).refusal == (401, "no_credentials")
        answer = await shared.send("PATCH", path, roles=("audit",))
        assert answer.refusal == (405, "method_not_allowed")
        assert each.method in answer.headers["Allow"].split(",")


async def test_role_is_checked_before_the_request(shared: LocalApi) -> None:
    for path in ("/api/v1/models/%2e%2e/load", "/api/v1/models/m/load?x=1"):
        headers = {"Content-Type": "text/plain"}
        answer = await shared.post(path, roles=("audit",), data=b"[" * 100, headers=headers)
        assert answer.refusal == (403, "forbidden")


class Clock:
    """Seconds since 1970, as far as a test is concerned; tokens issued just now are valid."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


Limited = Callable[..., Awaitable[tuple[Client, Config]]]


@pytest.fixture
def limited(tmp_path: Path, aiohttp_client: AiohttpClient) -> Limited:
    """Start a small application with these routes and limits."""

    async def started(*routes: Route, clock: Clock | None = None, **limits: str) -> tuple[Client, Config]:
        config = small_config(tmp_path / "data", **limits)
        return await aiohttp_client(small_app(routes, config, clock or Clock())), config

    return started


async def test_limit_is_shown_then_refuses_until_the_window_ends(limited: Limited) -> None:
    clock = Clock()
    client, config = await limited(route(), clock=clock, limit_reads="2/minute")
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
    problem = await refused.json()
    assert (problem["type"], problem["code"]) == (QUOTA_EXCEEDED, "rate_limited")
    assert problem["violated-policies"] == ["reads"]
    assert (await client.get("/x", headers=bob)).status == 200
    clock.now += int(refused.headers["Retry-After"])
    assert (await client.get("/x", headers=alice)).status == 200


async def test_limits_are_counted_apart(limited: Limited) -> None:
    limits = {"limit_reads": "1/day", "limit_management": "1/day", "limit_inference": "off"}
    client, config = await limited(*(route(f"/{access.name}", access=access) for access in Access), **limits)
    headers = bearer(config)
    for access, statuses in [
        *(("ANY", [200]), ("AUDIT", [429]), ("ADMIN", [200]), ("VERIFY", [429]), ("INFER", [200] * 3)),
    ]:
        assert [(await client.get(f"/{access}", headers=headers)).status for _ in statuses] == statuses
    answer = await client.get("/PUBLIC", headers=headers)
    assert (answer.status, "RateLimit" in answer.headers) == (200, False)


async def test_errors_of_limited_routes_show_the_limit(limited: Limited) -> None:
    @json_schema(Schema())
    async def missing(request: web.Request) -> web.Response:  # noqa: ARG001
        raise web.HTTPNotFound

    client, config = await limited(
        route(access=Access.INFER),
        route("/y", missing, method="POST"),
        route("/z", access=Access.ADMIN),
        limit_management="1/minute",
    )
    answers = [
        await client.get("/x", headers=bearer(config, "audit")),
        await client.get("/nothing", headers=bearer(config)),
        await client.post("/y", headers=bearer(config)),
        await client.post("/y", headers=bearer(config), data=b"["),
        await client.get("/z", headers=bearer(config, "audit")),
        await client.get("/z", headers=bearer(config, "audit")),  # the limit comes before the role
    ]
    assert [answer.status for answer in answers] == [403, 404, 404, 415, 403, 429]
    assert all("RateLimit" in answer.headers for answer in answers)


BAD, MALFORMED = {"Authorization": "Bearer a.b.c"}, {"Authorization": "Bearer"}


async def test_address_with_too_many_failures_is_refused(limited: Limited) -> None:
    clock, public = Clock(), route("/health", access=Access.PUBLIC)
    client, config = await limited(route(), public, clock=clock, limit_auth_failures="3/minute")
    good, bad = bearer(config), BAD
    for headers in (None, None, None, bad, MALFORMED, None, bad):
        assert (await client.get("/x", headers=headers)).status != 429
    for headers in (None, bad, good):
        answer = await client.get("/x", headers=headers)
        problem = await answer.json()
        assert (answer.status, problem["code"]) == (429, "too_many_failures")
        assert (answer.headers["Retry-After"], problem["violated-policies"]) == ("60", ["auth-failures"])
    assert (await client.get("/health", headers=bad)).status == 200
    clock.now += 60
    assert (await client.get("/x", headers=good)).status == 200


async def test_known_token_passes_the_limit_of_its_address(limited: Limited) -> None:
    clock = Clock()
    client, config = await limited(route(), clock=clock, limit_auth_failures="1/hour")

    async def status(headers: dict[str, str]) -> int:
        return (await client.get("/x", headers=headers)).status

    revoked, revoked_kid = bearer(config), list_keys(config.data)[0].kid
    create_key(config.data)
    known, expired, new = bearer(config), bearer(config, expires_s=60), bearer(config, subject="carol")
    other_spelling = {"Authorization": known["Authorization"].replace("Bearer ", "bEARER  ")}
    for expected in (401, 429):
        assert [await status(headers) for headers in (known, revoked, expired, BAD)] == [200] * 3 + [expected]
    assert [await status(headers) for headers in (other_spelling, new, MALFORMED)] == [200, 429, 429]
    revoke(config.data, revoked_kid)
    clock.now += 61  # times of tokens are whole seconds, and a second may have begun since the clock was read
    assert [await status(headers) for headers in (known, revoked, expired)] == [200, 429, 429]


def test_full_memory_forgets_the_least_recently_used_counter() -> None:
    windows = Windows(RateLimit(9, 60), Clock(), capacity=2)
    for key in ("a", "b", "a", "c", "a"):
        windows.count(key)
    assert [windows.peek(key)[0] for key in ("a", "b", "c")] == [3, 0, 1]
    assert len(windows) == 2


def test_ipv6_addresses_are_counted_by_network() -> None:
    peers = {
        "192.0.2.7": "192.0.2.7", "::ffff:192.0.2.7": "192.0.2.7", "2001:db8::1": "2001:db8::/64",
        "2001:db8::ffff:1": "2001:db8::/64", "fe80::1%eth0": "fe80::/64", None: "local", "?": "?",
    }  # fmt: skip
    assert {address: peer_of(address) for address in peers} == peers


async def recorded(api: LocalApi) -> Counts:
    """Stop the server and return what its ledger says of denied attempts."""
    await api.client.close()
    async with open_reader(api.config.data / LEDGER) as reader:
        events = await reader.events(0)
    assert events[-1].type == "ServerStopped"
    return {
        (event.actor, event.data.action): event.data.count
        for event in events
        if isinstance(event.data, AccessDenied)
    }


class Ledger:
    """Accepts commands as the log does, after so many failures."""

    def __init__(self, failures: int = 0) -> None:
        self.minutes: list[Counts] = []
        self.failures = failures

    async def submit(self, command: Command) -> None:
        if self.failures:
            self.failures -= 1
            raise LogUnavailable
        assert isinstance(command, Record)
        data = [(draft.actor, draft.data) for draft in command.drafts]
        self.minutes.append(
            {(who, denied.action): denied.count for who, denied in data if isinstance(denied, AccessDenied)}
        )


async def test_denials_of_verified_subjects_are_in_the_ledger(api: LocalApi) -> None:
    load = "/api/v1/models/m/load"
    bad = {"Authorization": f"Bearer {api.token('infer')}x"}
    for method, path, roles, subject, headers, status in (
        *[("POST", load, ("infer",), "pia", {}, 403)] * 3,
        ("GET", "/api/v1/events/head", ("infer",), "pia", {}, 403),
        ("GET", "/api/v1/models", ("infer",), "pia", {}, 200),
        ("GET", "/api/v1/models?at=1", ("infer",), "pia", {}, 403),
        ("POST", "/api/v1/models/x/load", ("audit",), "ann", {}, 403),
        ("POST", "/v2/models/m/infer", ("audit",), "ann", {}, 403),  # the fast path
        ("POST", "/v2/models/%6D/infer", ("audit",), "ann", {}, 403),
        ("POST", "/v2/models/m/versions/1/infer", ("audit",), "ann", {}, 403),
        ("POST", load, (), "", {}, 401),
        ("POST", load, (), "", bad, 401),
        ("POST", load, ("admin",), "alice", {}, 404),
    ):
        answer = await api.send(method, path, roles=roles, subject=subject, headers=headers)
        assert answer.status == status, path
    api.app[GATE].denials.count("nobody", NO_ROUTE)
    assert await recorded(api) == {
        ("pia", "POST /api/v1/models/{id}/load"): 3,
        ("pia", "GET /api/v1/events/head"): 1,
        ("pia", "GET /api/v1/models?"): 1,
        ("ann", "POST /api/v1/models/{id}/load"): 1,
        ("ann", "POST /v2/models/{id}/infer"): 2,
        ("ann", "POST /v2/models/{id}/versions/{version}/infer"): 1,
        ("nobody", NO_ROUTE): 1,
    }


@PLAIN
@given(st.lists(st.tuples(st.integers(0, 90).map(str), st.sampled_from("ab")), max_size=400))
def test_no_denial_is_lost_and_events_are_bounded(attempts: list[tuple[str, str]]) -> None:
    denials, ledger = Denials(), Ledger()
    for attempt in attempts:
        denials.count(*attempt)
    denials.close()
    asyncio.run(denials.run(ledger.submit))
    assert len(ledger.minutes) == bool(attempts)
    counts = ledger.minutes[0] if ledger.minutes else {}
    assert sum(counts.values()) == len(attempts)
    assert len(counts) <= MAX_EVENTS
    kept = {key for key in counts if key != (SYSTEM, OTHER)}
    assert kept <= set(attempts)
    assert ((SYSTEM, OTHER) in counts) == (len(set(attempts)) > MAX_EVENTS - 1)
    for key in kept:
        assert counts[key] == attempts.count(key)


async def test_denials_are_appended_each_minute_and_kept_after_a_failure() -> None:
    denials, ledger = Denials(), Ledger(failures=2)
    denials.count("pia", "a")
    running = asyncio.create_task(denials.run(ledger.submit, minute_s=0.001))
    await until(lambda: not ledger.failures)
    for number in range(2 * MAX_EVENTS):
        denials.count("pia", f"b{number}")
    for minutes in range(1, 4):
        await until(lambda minutes=minutes: len(ledger.minutes) >= minutes)  # type: ignore[misc]
        denials.count("ann", "c")
    denials.close()
    await running
    assert sum(sum(counts.values()) for counts in ledger.minutes) == 4 + 2 * MAX_EVENTS
    assert all(len(counts) <= MAX_EVENTS for counts in ledger.minutes)
    assert ledger.minutes[0]["pia", "a"] == 1
