"""`openapi.yaml`: what a small set of routes gives, and that the committed document is the application's."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp_apispec import (
    docs,
    headers_schema,
    json_schema,
    match_info_schema,
    querystring_schema,
    response_schema,
)
from marshmallow import Schema, fields, validate
from openapi_spec_validator import OpenAPIV30SpecValidator
from support.http import LocalApi

from server.app import all_routes, create_app
from server.appkeys import OPENAPI
from server.config import Config
from server.errors import ERRORS, errors
from server.openapi import error_codes, openapi_document, openapi_yaml
from server.routes import ROUTES as ROUTE_TABLE
from server.routes import Access, LimitClass, Route
from server.validation import ParameterBoolean, StrictInteger

COMMITTED = Path(__file__).parents[2] / "openapi.yaml"


class JobSchema(Schema):
    id = fields.String(required=True)
    version = fields.Integer(allow_none=True)


class LoadSchema(Schema):
    version = StrictInteger(validate=validate.Range(1), metadata={"description": "The highest, if left out."})


class IdSchema(Schema):
    id = fields.String(required=True)


class ForceSchema(Schema):
    force = ParameterBoolean()


class PreferSchema(Schema):
    prefer = fields.String(data_key="Prefer")


@docs(tags=["models"], summary="Load a model", description="Asks for a load.")
@match_info_schema(IdSchema())
@querystring_schema(ForceSchema())
@headers_schema(PreferSchema())
@json_schema(LoadSchema())
@response_schema(JobSchema(), 202, description="The job.")
@response_schema(JobSchema(), 200, description="Nothing to do.")
@errors("unknown_model", "unknown_version")
@errors("log_unavailable")
async def load(request: web.Request) -> web.Response:  # noqa: ARG001
    return web.Response()


@docs(summary="Alive?", produces=["text/plain"], responses={"200": {"description": "Yes."}})
async def live(request: web.Request) -> web.Response:  # noqa: ARG001
    return web.Response()


ROUTES = [
    Route("POST", "/api/v1/models/{id}/load", load, Access.ADMIN, LimitClass.MANAGEMENT),
    Route("GET", "/health/live", live, Access.PUBLIC, LimitClass.NONE),
    Route("GET", "/v2/health/live", live, Access.ANY, LimitClass.READS),
]


@pytest.fixture
def document() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(openapi_yaml(ROUTES))
    return read


def test_document_is_valid_and_stable(document: dict[str, Any]) -> None:
    def state() -> list[Any]:
        described = [route.handler.__apispec__ for route in ROUTES]  # type: ignore[attr-defined]
        return [copy.copy(described), repr(described), repr(load.__schemas__)]  # type: ignore[attr-defined]

    before = state()
    OpenAPIV30SpecValidator(document).validate()
    assert openapi_yaml(ROUTES) == openapi_yaml(list(ROUTES))
    assert openapi_document(ROUTES) == document
    assert not re.search(r"[&*]id\d", openapi_yaml(ROUTES))
    assert state() == before


def test_each_route_has_its_security_and_operation_id(document: dict[str, Any]) -> None:
    assert list(document["paths"]) == ["/api/v1/models/{id}/load", "/health/live", "/v2/health/live"]
    operations = [next(iter(item.values())) for item in document["paths"].values()]
    assert [operation["security"] for operation in operations] == [[{"token": []}], [], [{"token": []}]]
    assert [operation["operationId"] for operation in operations] == ["load", "live", "live_2"]
    assert "Needs the role admin." in operations[0]["description"]


def test_parameters_body_and_answers_are_the_schemas(document: dict[str, Any]) -> None:
    operation = document["paths"]["/api/v1/models/{id}/load"]["post"]
    assert {(entry["in"], entry["name"], entry["required"]) for entry in operation["parameters"]} == {
        ("path", "id", True),
        ("query", "force", False),
        ("header", "Prefer", False),
    }
    types = {entry["name"]: entry["schema"]["type"] for entry in operation["parameters"]}
    assert types["force"] == "boolean"
    content = operation["requestBody"]["content"]["application/json"]
    assert content == {"schema": {"$ref": "#/components/schemas/Load"}}
    version = document["components"]["schemas"]["Load"]["properties"]["version"]
    assert (version["type"], version["minimum"]) == ("integer", 1)
    accepted = operation["responses"]["202"]
    assert accepted["description"] == "The job."
    assert accepted["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Job"}


def test_codes_of_a_route_include_those_implied() -> None:
    assert set(error_codes(ROUTES[0])) == {
        "unknown_model", "unknown_version", "log_unavailable", "internal", "invalid_request",
        "no_credentials",
        "invalid_token", "forbidden", "too_many_failures", "rate_limited", "invalid_body",
        "unsupported_media_type", "body_too_large", "body_timeout", "invalid_parameter",
    }  # fmt: skip
    assert error_codes(ROUTES[1]) == ["internal"]


def test_errors_under_v2_are_plain_json(document: dict[str, Any]) -> None:
    media_types = {
        path: list(next(iter(item.values()))["responses"]["500"]["content"])
        for path, item in document["paths"].items()
    }
    assert media_types["/v2/health/live"] == ["application/json"]
    assert media_types["/health/live"] == ["application/problem+json"]


# The application's document


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(COMMITTED.read_text(encoding="utf-8"))
    return read


def generated(folder: Path) -> str:
    return create_app(Config(repository=folder, data=folder / "data"))[OPENAPI]()


def test_committed_document_is_generated(tmp_path: Path) -> None:
    assert COMMITTED.read_text(encoding="utf-8") == generated(tmp_path), "run `make generated`"


def test_committed_document_is_valid(committed: dict[str, Any]) -> None:
    OpenAPIV30SpecValidator(committed).validate()
    assert committed["openapi"] == "3.0.3"


def test_committed_document_has_every_route(committed: dict[str, Any], tmp_path: Path) -> None:
    app = create_app(Config(repository=tmp_path, data=tmp_path))
    served = {
        (route.method.lower(), re.sub(r"\{(\w+)[^}]*\}", r"{\1}", route.resource.canonical))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    documented = {(method, path) for path, item in committed["paths"].items() for method in item}
    assert served == documented
    assert len(app[ROUTE_TABLE]) == len(app.router.routes())


def test_committed_document_has_every_error_code(committed: dict[str, Any]) -> None:
    for route in all_routes():
        responses = committed["paths"][route.path][route.method.lower()]["responses"]
        for code in error_codes(route):
            [content] = responses[str(ERRORS[code].status)]["content"].values()
            [allowed] = [part["properties"]["code"]["enum"] for part in content["schema"]["allOf"][1:]]
            assert code in allowed
            assert ERRORS[code].title in responses[str(ERRORS[code].status)]["description"]


def test_each_operation_has_summary_tags_and_answers(committed: dict[str, Any]) -> None:
    operations = [
        (path, operation) for path, item in committed["paths"].items() for operation in item.values()
    ]
    assert len({operation["operationId"] for _, operation in operations}) == len(operations)
    for path, operation in operations:
        assert operation["summary"], path
        assert operation["tags"], path
        assert any(status.startswith("2") for status in operation["responses"]), path
        assert all(response["description"] for response in operation["responses"].values()), path


async def test_server_serves_the_committed_document(api: LocalApi) -> None:
    answer = await api.get("/openapi.yaml", roles=())
    assert (answer.status, answer.media_type) == (200, "application/yaml")
    assert answer.body == COMMITTED.read_bytes()


async def test_managing_routes_need_admin(api: LocalApi) -> None:
    """TorchServe's CVEs, Kokoro-FastAPI #478: there is no unauthenticated management."""
    public = {route.path for route in all_routes() if route.access is Access.PUBLIC}
    assert not [path for path in public if "models" in path or "jobs" in path or "events" in path]
    managing = [route for route in all_routes() if route.access is Access.ADMIN]
    assert len(managing) >= 6
    for route in managing:
        path = route.path.replace("{id}", "m").replace("{job_id}", "j")
        assert (await api.send(route.method, path, roles=())).refusal == (401, "no_credentials")
        for role in ("predict", "audit"):
            assert (await api.send(route.method, path, roles=(role,))).refusal == (403, "forbidden")
