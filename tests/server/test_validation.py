import gzip
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from aiohttp_apispec import (
    docs,
    headers_schema,
    json_schema,
    match_info_schema,
    querystring_schema,
    request_schema,
)
from marshmallow import Schema, fields, validate
from pytest_aiohttp import AiohttpClient
from yarl import URL

from server.errors import errors_middleware
from server.validation import (
    MAX_JSON_BYTES,
    NothingSchema,
    ParameterBoolean,
    ParameterInteger,
    StrictBoolean,
    StrictInteger,
    header_fields,
    json_body,
    path_parameters,
    query_parameters,
    validation_middleware,
)

Client = TestClient[web.Request, web.Application]
JSON = {"Content-Type": "application/json"}


class BodySchema(Schema):
    version = StrictInteger(validate=validate.Range(1))
    pinned = StrictBoolean()
    priority = fields.String(validate=validate.OneOf(["high", "low"]), load_default="low")
    parts = fields.List(fields.Nested(Schema.from_dict({"size": StrictInteger(required=True)})))


class PathSchema(Schema):
    name = fields.String(
        required=True, validate=validate.Regexp(r"[a-z]+\Z", error="Must be lower-case letters.")
    )


class QuerySchema(Schema):
    force = ParameterBoolean(load_default=False)
    limit = ParameterInteger(validate=validate.Range(1, 100))


class HeaderSchema(Schema):
    prefer = fields.String(data_key="Prefer")


@docs(summary="Everything")
@json_schema(BodySchema())
@match_info_schema(PathSchema())
@querystring_schema(QuerySchema())
@headers_schema(HeaderSchema())
async def everything(request: web.Request) -> web.Response:
    return web.json_response(
        [json_body(request), path_parameters(request), query_parameters(request), header_fields(request)]
    )


@request_schema(BodySchema())
@querystring_schema(NothingSchema())
async def default_location(request: web.Request) -> web.Response:
    return web.json_response(json_body(request))


async def left_alone(request: web.Request) -> web.Response:
    return web.json_response(len(await request.read()))


@pytest.fixture
async def client(aiohttp_client: AiohttpClient) -> Client:
    app = web.Application(middlewares=[errors_middleware, validation_middleware], client_max_size=2**26)
    app.router.add_post("/all/{name}", everything)
    app.router.add_post("/default", default_location)
    app.router.add_post("/raw", left_alone)
    return await aiohttp_client(app)


async def refusal(client: Client, body: object, path: str = "/default") -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post(path, data=data, headers=JSON)
    assert answer.status == 400, await answer.text()
    problem: dict[str, Any] = await answer.json()
    return problem


async def test_everything_is_loaded_where_its_accessor_finds_it(client: Client) -> None:
    answer = await client.post(
        "/all/abc?force=true&limit=7",
        json={"version": 3, "parts": [{"size": 1}]},
        headers=[("Prefer", "wait=1"), ("Prefer", "respond-async"), ("X-Other", "ignored")],
    )
    assert await answer.json() == [
        {"version": 3, "priority": "low", "parts": [{"size": 1}]},
        {"name": "abc"},
        {"force": True, "limit": 7},
        {"prefer": "wait=1, respond-async"},
    ]


async def test_an_empty_body_is_an_empty_object_whatever_it_is_declared_as(client: Client) -> None:
    for headers in ({}, JSON, {"Content-Type": "text/plain"}):
        answer = await client.post("/default", headers=headers)
        assert (answer.status, await answer.json()) == (200, {"priority": "low"})


@pytest.mark.parametrize(
    "media_type",
    ["application/json", "application/json; charset=utf-8", 'Application/JSON; Charset="UTF-8"',
     "application/merge-patch+json", "application/json; version=1"],
)  # fmt: skip
async def test_these_are_declared_json(client: Client, media_type: str) -> None:
    answer = await client.post("/default", data=b"{}", headers={"Content-Type": media_type})
    assert answer.status == 200


@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "text/json", "application/octet-stream", "application/x-www-form-urlencoded", "json", "",
     "application/json; charset=latin-1", "application/jsonx", "multipart/form-data; boundary=x"],
)  # fmt: skip
async def test_a_body_that_is_not_declared_json_is_not_taken(client: Client, media_type: str) -> None:
    answer = await client.post("/default", data=b"{}", headers={"Content-Type": media_type})
    assert (answer.status, (await answer.json())["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("value", ["3", 1.5, 1.0, True, None, 2**63, [], {}])
async def test_an_integer_is_an_integer(client: Client, value: object) -> None:
    problem = await refusal(client, {"version": value})
    assert problem["code"] == "invalid_body"
    assert problem["detail"].startswith("body: version: ")


@pytest.mark.parametrize("value", [1, 0, "true", "", None, []])
async def test_a_boolean_is_a_boolean(client: Client, value: object) -> None:
    assert (await refusal(client, {"pinned": value}))["detail"].startswith("body: pinned: ")


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"version": 0}, "body: version: Must be greater than or equal to 1."),
        ({"version": "1"}, "body: version: Must be an integer of 64 bits."),
        ({"pinned": 1}, "body: pinned: Must be true or false."),
        ({"priority": "urgent"}, "body: priority: Must be one of: high, low."),
        ({"parts": [{"size": 1}, {}]}, "body: parts.1.size: Missing data for required field."),
        ({"x": 1}, "body: x: Unknown field.; known are parts, pinned, priority, version"),
        ([], "body: Must be a JSON object."),
        (None, "body: Must be a JSON object."),
        ("{}", "body: Must be a JSON object."),
        (
            b'{"version": 1, "version": 2}',
            'the key "version" appears twice in one object',
        ),
        (b"{", "not JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
        (b" ", "not JSON: Expecting value at line 1 column 2"),
        (b"[" * 100_000, "nested deeper than 32"),
    ],
)
async def test_a_mistake_names_the_field_and_what_is_allowed(
    client: Client, body: object, detail: str
) -> None:
    assert (await refusal(client, body))["detail"] == detail


async def test_many_mistakes_are_counted(client: Client) -> None:
    detail = (await refusal(client, {f"field{number:03}": 1 for number in range(500)}))["detail"]
    assert "field009" in detail
    assert "field010" not in detail
    assert detail.endswith("and 490 more")


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("/all/ABC", "path: name: Must be lower-case letters."),
        ("/all/%2e%2e", "path: name: Must be lower-case letters."),
        ("/all/a%00", "path: name: Must be lower-case letters."),
        ("/all/a?force=1", "query: force: Must be true or false."),
        ("/all/a?force=true&force=true", "query: force: Must be given once."),
        ("/all/a?limit=0", "query: limit: Must be greater than or equal to 1 and less than or equal to 100."),
        ("/all/a?limit=%2B1", "query: limit: Must be an integer of 64 bits."),
        ("/all/a?limit=1.0", "query: limit: Must be an integer of 64 bits."),
        ("/all/a?limit=", "query: limit: Must be an integer of 64 bits."),
        ("/all/a?limit=%D9%A3", "query: limit: Must be an integer of 64 bits."),
        ("/all/a?limit=9223372036854775808", "query: limit: Must be an integer of 64 bits."),
        ("/all/a?at=1", "query: at: Unknown field.; known are force, limit"),
        ("/default?at=1", "query: at: Unknown field.; nothing is taken here"),
    ],
)
async def test_a_parameter_that_is_not_taken_is_told(client: Client, url: str, detail: str) -> None:
    answer = await client.post(URL(url, encoded=True))
    problem = await answer.json()
    assert (answer.status, problem["code"], problem["detail"]) == (400, "invalid_parameter", detail)


async def test_a_large_body_is_refused_by_its_declared_length(client: Client) -> None:
    padding = b" " * (MAX_JSON_BYTES - 2)
    assert (await client.post("/default", data=io.BytesIO(b"{}" + padding), headers=JSON)).status == 200
    answer = await client.post("/default", data=io.BytesIO(b"{} " + padding), headers=JSON)
    assert (answer.status, (await answer.json())["code"]) == (413, "body_too_large")


async def test_a_large_body_without_a_length_is_refused_while_it_is_read(client: Client) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 2**26:
            sent += 2**16
            yield b" " * 2**16

    answer = await client.post("/default", data=endless(), headers=JSON)
    assert (answer.status, (await answer.json())["code"]) == (413, "body_too_large")
    assert sent < 2**26


async def test_a_compressed_body_is_refused(client: Client) -> None:
    bomb = gzip.compress(b" " * 2**26)
    headers = {**JSON, "Content-Encoding": "gzip"}
    assert (await client.post("/default", data=bomb, headers=headers)).status == 415


async def test_a_handler_without_a_body_schema_reads_its_body_itself(client: Client) -> None:
    answer = await client.post(
        "/raw", data=io.BytesIO(b"x" * (2 * MAX_JSON_BYTES)), headers={"Content-Type": "text/plain"}
    )
    assert await answer.json() == 2 * MAX_JSON_BYTES
