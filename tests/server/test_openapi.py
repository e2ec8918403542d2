import copy
import re
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

from server.errors import errors
from server.openapi import error_codes, openapi_document, openapi_yaml
from server.routes import Access, LimitClass, Route
from server.validation import ParameterBoolean, StrictInteger


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


def test_the_document_is_valid_and_the_same_each_time(document: dict[str, Any]) -> None:
    OpenAPIV30SpecValidator(document).validate()
    assert openapi_yaml(ROUTES) == openapi_yaml(list(ROUTES))
    assert openapi_document(ROUTES) == document


def test_what_the_decorators_wrote_is_not_changed() -> None:
    def state() -> list[Any]:
        described = [route.handler.__apispec__ for route in ROUTES]  # type: ignore[attr-defined]
        return [copy.copy(described), repr(described), repr(load.__schemas__)]  # type: ignore[attr-defined]

    before = state()
    openapi_yaml(ROUTES)
    assert state() == before


def test_no_alias_stands_in_the_text() -> None:
    assert not re.search(r"[&*]id\d", openapi_yaml(ROUTES))


def test_every_route_is_in_it_with_its_security(document: dict[str, Any]) -> None:
    assert list(document["paths"]) == [
        "/api/v1/models/{id}/load",
        "/health/live",
        "/v2/health/live",
    ]
    operations = [next(iter(item.values())) for item in document["paths"].values()]
    assert [operation["security"] for operation in operations] == [[{"token": []}], [], [{"token": []}]]
    assert [operation["operationId"] for operation in operations] == ["load", "live", "live_2"]
    assert "Needs the role admin." in operations[0]["description"]


def test_parameters_body_and_answers_come_from_the_schemas(document: dict[str, Any]) -> None:
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


def test_the_codes_of_a_route_are_its_own_and_those_that_follow() -> None:
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
