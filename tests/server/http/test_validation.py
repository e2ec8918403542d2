"""Strict JSON, and the schemas that a request is checked with before its handler runs."""

import gzip
import io
import json
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from aiohttp_apispec import (
    headers_schema,
    json_schema,
    match_info_schema,
    querystring_schema,
    request_schema,
)
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import Schema, fields, validate
from pytest_aiohttp import AiohttpClient
from support.history import PLAIN
from yarl import URL

from runtime import strictjson
from server.errors import errors_middleware
from server.http import validation

Client = TestClient[web.Request, web.Application]
JSON = {"Content-Type": "application/json"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


class BodySchema(Schema):
    version = validation.StrictInteger(validate=validate.Range(1))
    pinned = validation.StrictBoolean()
    priority = fields.String(validate=validate.OneOf(["high", "low"]), load_default="low")
    parts = fields.List(fields.Nested(Schema.from_dict({"size": validation.StrictInteger(required=True)})))


class PathSchema(Schema):
    name = fields.String(validate=validate.Regexp(r"[a-z]+\Z", error="Must be lower-case letters."))


class QuerySchema(Schema):
    force = validation.ParameterBoolean(load_default=False)
    limit = validation.ParameterInteger(validate=validate.Range(1, 100))


class HeaderSchema(Schema):
    prefer = fields.String(data_key="Prefer")


@json_schema(BodySchema())
@match_info_schema(PathSchema())
@querystring_schema(QuerySchema())
@headers_schema(HeaderSchema())
async def everything(request: web.Request) -> web.Response:
    return web.json_response(
        [
            validation.json_body(request),
            validation.path_parameters(request),
            validation.query_parameters(request),
            validation.header_fields(request),
        ]
    )


@request_schema(BodySchema())
@querystring_schema(validation.NothingSchema())
async def default_location(request: web.Request) -> web.Response:
    return web.json_response(validation.json_body(request))


async def left_alone(request: web.Request) -> web.Response:
    return web.json_response(len(await request.read()))


@pytest.fixture
async def client(aiohttp_client: AiohttpClient) -> Client:
    app = web.Application(
        middlewares=[errors_middleware, validation.validation_middleware], client_max_size=2**26
    )
    app.router.add_post("/all/{name}", everything)
    app.router.add_post("/default", default_location)
    app.router.add_post("/raw", left_alone)
    return await aiohttp_client(app)


async def send(client: Client, url: str, data: Any = b"", **headers: str) -> tuple[int, str, str]:
    """Send a request and return status, code and detail of its refusal."""
    fields = JSON | {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await client.post(URL(url, encoded=True), data=data, headers=fields)
    problem = await answer.json()
    return answer.status, problem["code"], problem["detail"]


@PLAIN
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_loads_reads_back_any_json(value: Any, ascii_only: bool, indent: int | None) -> None:  # noqa: FBT001
    assert strictjson.loads(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()) == value


def test_loads_reads_the_deepest_and_largest_exactly() -> None:
    for value in ({"a": {"a": [{"a": 1}, {"a": 2}]}}, "[{" * 1000, "\U0001f600", 2**63, sys.float_info.max):
        assert strictjson.loads(json.dumps(value).encode()) == value
    assert strictjson.loads(b"[" * strictjson.MAX_DEPTH + b"]" * strictjson.MAX_DEPTH) == json.loads(
        "[" * strictjson.MAX_DEPTH + "]" * strictjson.MAX_DEPTH
    )


@PLAIN
@given(st.binary() | st.text('[]{}":,\\u\n0N ').map(str.encode))
def test_loads_reads_or_refuses_any_bytes(body: bytes) -> None:
    try:
        value = strictjson.loads(body)
    except strictjson.InvalidJson:
        return
    assert value == json.loads(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON: Expecting value at line 1 column 1"),
        (b'{"a": 1} x', "Extra data at line 1 column 10"),
        (b"[1,\n2", "line 2 column 2"),
        (b'"a\nb"', "control character"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\\ud800"', "unpaired surrogate"),
        (b'{"\\udc00": 1}', "unpaired surrogate"),
        (b'{"a": 1,\n "\\u0061": 2}', 'the key "a" appears twice in one object'),
        (b'[{"a": {"b": 1, "b": 1}}]', 'the key "b" appears twice'),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"-1e999", '"-1e999" is out of range'),
        (b"1" * 5000, "an integer is out of range"),
        (b"[" * (strictjson.MAX_DEPTH + 1) + b"]" * (strictjson.MAX_DEPTH + 1), "nested deeper than 32"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "nested deeper than 32"),
        (b"[" * 500_000, "nested deeper than 32"),
        (b'{"a":' * 200_000, "nested deeper than 32"),
        (b"[" * 33 + b'"' + b'\\"' * 500_000, "Unterminated string"),
    ],
)
def test_loads_refuses_other_json_with_reason(body: bytes, message: str) -> None:
    with pytest.raises(strictjson.InvalidJson, match=re.escape(message)):
        strictjson.loads(body)


async def test_each_part_of_a_request_is_loaded_by_its_schema(client: Client) -> None:
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
    for headers in ({}, JSON, {"Content-Type": "text/plain"}):
        answer = await client.post("/default", headers=headers)
        assert (answer.status, await answer.json()) == (200, {"priority": "low"})


async def test_body_must_be_declared_as_json_in_utf_8(client: Client) -> None:
    for status, media_types in (
        (200, ("application/json", "application/json; charset=utf-8", 'Application/JSON; Charset="UTF-8"',
               "application/merge-patch+json", "application/json; version=1",
               "application/json ; x=" + "(" * 7000)),
        (415, ("text/plain", "text/json", "application/octet-stream", "application/x-www-form-urlencoded",
               "json", "", "application/json; charset=latin-1", "application/jsonx",
               "multipart/form-data; boundary=x", "+json", "(" * 7000, '"' * 7000, ";" * 7000,
               "application/json; charset=utf-8; charset=latin-1")),
    ):  # fmt: skip
        for media_type in media_types:
            answer = await client.post("/default", data=b"{}", headers={"Content-Type": media_type})
            assert answer.status == status, media_type


INTEGER, BOOLEAN = "body: version: Must be an integer of 64 bits.", "body: pinned: Must be true or false."
OBJECT = "body: Must be a JSON object."
NO_INTEGERS: list[Any] = ["3", 1.5, 1.0, True, 2**63, [], {}]
NO_BOOLEANS: list[Any] = [1, 0, "true", "", []]
NO_OBJECTS: list[Any] = [[], None, "{}"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        *(({"version": value}, INTEGER) for value in NO_INTEGERS),
        *(({"pinned": value}, BOOLEAN) for value in NO_BOOLEANS),
        ({"version": None}, "body: version: Field may not be null."),
        ({"version": 0}, "body: version: Must be greater than or equal to 1."),
        ({"priority": "urgent"}, "body: priority: Must be one of: high, low."),
        ({"parts": [{"size": 1}, {}]}, "body: parts.1.size: Missing data for required field."),
        ({"x": 1}, "body: x: Unknown field.; known are parts, pinned, priority, version"),
        *((value, OBJECT) for value in NO_OBJECTS),
        (b" ", "not JSON: Expecting value at line 1 column 2"),
    ],
)
async def test_invalid_body_names_the_field_and_its_values(client: Client, body: object, detail: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert await send(client, "/default", data) == (400, "invalid_body", detail)


async def test_many_mistakes_are_counted(client: Client) -> None:
    body = json.dumps({f"field{number:03}": 1 for number in range(500)}).encode()
    *_, detail = await send(client, "/default", body)
    assert [name in detail for name in ("field009", "field010")] == [True, False]
    assert detail.endswith("and 490 more")


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        *((f"/all/{name}", "path: name: Must be lower-case letters.") for name in ("ABC", "%2e%2e", "a%00")),
        *(
            (f"/all/a?limit={number}", "query: limit: Must be an integer of 64 bits.")
            for number in ("%2B1", "1.0", "", "%D9%A3", 2**63)
        ),
        ("/all/a?limit=0", "query: limit: Must be greater than or equal to 1 and less than or equal to 100."),
        ("/all/a?force=1", "query: force: Must be true or false."),
        ("/all/a?force=true&force=true", "query: force: Must be given once."),
        ("/all/a?at=1", "query: at: Unknown field.; known are force, limit"),
        ("/default?at=1", "query: at: Unknown field.; nothing is allowed here"),
    ],
)
async def test_invalid_parameter_names_what_is_allowed(client: Client, url: str, detail: str) -> None:
    assert await send(client, url) == (400, "invalid_parameter", detail)


async def test_large_body_is_413_by_length_or_while_read(client: Client) -> None:
    padding = b" " * (validation.MAX_JSON_BYTES - 2)
    assert (await client.post("/default", data=io.BytesIO(b"{}" + padding), headers=JSON)).status == 200
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 2**26:
            sent += 2**16
            yield b" " * 2**16

    for body in (io.BytesIO(b"{} " + padding), endless()):
        assert (await send(client, "/default", body))[:2] == (413, "body_too_large")
    assert sent < 2**26


async def test_compressed_body_is_415(client: Client) -> None:
    packed = await send(client, "/default", gzip.compress(b"{}"), Content_Encoding="gzip")
    text = "the body must not be compressed: leave Content-Encoding out"
    assert packed == (415, "unsupported_media_type", text)


async def test_handler_without_schema_reads_its_body(client: Client) -> None:
    body = io.BytesIO(b"x" * (2 * validation.MAX_JSON_BYTES))
    answer = await client.post("/raw", data=body, headers={"Content-Type": "text/plain"})
    assert await answer.json() == 2 * validation.MAX_JSON_BYTES
