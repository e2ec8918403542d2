"""Who may do what: each role on each route, as DESIGN.md's table has it, written out here again."""

import pytest
from support.http import LocalApi

from server.app import all_routes
from server.routes import Access, LimitClass, Route

Roles = tuple[str, ...]

ROLES: tuple[Roles, ...] = ((), ("predict",), ("audit",), ("admin",))
EVERYONE: set[Roles] = set(ROLES)
ANY_ROLE: set[Roles] = {("predict",), ("audit",), ("admin",)}
PREDICT: set[Roles] = {("predict",), ("admin",)}
ADMIN: set[Roles] = {("admin",)}
AUDIT: set[Roles] = {("audit",), ("admin",)}
NAMES = {"id": "m", "version": 1, "job_id": "j", "file": "console.css"}
"""What stands in a path."""
QUERIES = {"/api/v1/events/stream": "?after=x"}
"""What keeps a request short that is let through."""
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
    "GET /api/v1/models": ANY_ROLE,
    "GET /api/v1/models/{id}": ANY_ROLE,
    "GET /api/v1/jobs": ANY_ROLE,
    "GET /api/v1/jobs/{job_id}": ANY_ROLE,
    "GET /api/v1/resources": ANY_ROLE,
    "GET /api/v1/events": AUDIT,
    "GET /api/v1/events/stream": AUDIT,
    "GET /api/v1/events/head": AUDIT,
    "POST /api/v1/jobs/{job_id}/cancel": ADMIN,
    "POST /api/v1/models/unload": ADMIN,
    "POST /api/v1/models/{id}/load": ADMIN,
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
    "POST /v2/models/{id}/infer": PREDICT,
    "POST /v2/models/{id}/versions/{version}/infer": PREDICT,
}


def name(route: Route) -> str:
    path = "/docs/static/*" if route.path.startswith("/docs/static/") else route.path
    return f"{route.method} {path}"


def test_the_table_has_every_route_and_no_other() -> None:
    assert {name(route) for route in all_routes()} == TABLE.keys()


async def test_each_role_is_let_through_or_refused_as_the_table_says(
    api: LocalApi, subtests: pytest.Subtests
) -> None:
    for route in all_routes():
        path = route.path.format(**NAMES)
        for roles in ROLES:
            with subtests.test(f"{name(route)} {roles}"):
                answer = await api.send(route.method, path + QUERIES.get(path, ""), roles=roles)
                if roles in TABLE[name(route)]:
                    assert answer.status not in {401, 403}
                elif roles:
                    assert answer.refusal == (403, "forbidden")
                    assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]
                else:
                    assert answer.refusal == (401, "no_credentials")
                    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="loadledger"'


async def test_roles_add_up(api: LocalApi) -> None:
    path = "/api/v1/models/m/unload"
    assert (await api.post(path, roles=("audit", "predict"))).refusal == (403, "forbidden")
    assert (await api.post(path, roles=("audit", "predict", "admin"))).refusal == (404, "unknown_model")


async def test_head_is_allowed_to_whom_get_is(api: LocalApi) -> None:
    for route in all_routes():
        if route.method == "GET":
            path = route.path.format(**NAMES)
            for roles in ROLES:
                answer = await api.send("HEAD", path, roles=roles)
                assert (answer.status in {401, 403}) == (roles not in TABLE[name(route)]), route.path
                assert not answer.body


async def test_what_is_not_there_is_not_explored_without_a_token(api: LocalApi) -> None:
    for path in ("/nope", "/v2/repository", "/api/v1/models/m/load/", "/api", "/keys", "/docs/static/x"):
        assert (await api.get(path, roles=())).refusal == (401, "no_credentials")
        assert (await api.get(path, roles=("predict",))).refusal == (404, "not_found")


async def test_a_wrong_method_is_405_with_those_that_are_right(api: LocalApi) -> None:
    for route in all_routes():
        path = route.path.format(**NAMES)
        answer = await api.send("DELETE", path, roles=("audit",))
        assert answer.refusal == (405, "method_not_allowed")
        assert route.method in answer.headers["Allow"].split(",")
        assert (await api.send("DELETE", path, roles=())).refusal == (401, "no_credentials")


async def test_a_refusal_comes_before_a_look_at_the_request(api: LocalApi) -> None:
    for path in ("/api/v1/models/%2e%2e/load", "/api/v1/models/m/load?x=1"):
        answer = await api.post(
            path, roles=("audit",), data=b"[" * 100, headers={"Content-Type": "text/plain"}
        )
        assert answer.refusal == (403, "forbidden")


def test_every_route_but_the_public_ones_is_counted() -> None:
    for route in all_routes():
        assert (route.limit is LimitClass.NONE) == (route.access is Access.PUBLIC), route.path
