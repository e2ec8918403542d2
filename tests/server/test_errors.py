"""Every error is one RFC 9457 body, from the table of codes."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from aiohttp_apispec import json_schema
from marshmallow import Schema
from pytest_aiohttp import AiohttpClient
from support.http import bearer, route, small_app, small_config

from server.config import Config
from server.errors import DETAIL_CHARACTERS, ERRORS, ServerProblem
from server.http.validation import read_body
from server.routing import Access, LimitClass

Client = TestClient[web.Request, web.Application]
AnswerOf = Callable[..., Awaitable[tuple[aiohttp.ClientResponse, dict[str, Any]]]]
MEMBERS = {"type", "title", "status", "detail", "code", "error"}


class Domain(Exception):
    """An error of another package, known by its code only."""

    def __init__(self, code: object, text: str = "what happened", **attributes: object) -> None:
        super().__init__(text)
        self.code = code
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path / "data", limit_auth_failures="off")


@pytest.fixture
async def answer_of(config: Config, aiohttp_client: AiohttpClient) -> AnswerOf:
    """Serve a route that raises what a test chooses."""
    raised: list[Exception] = []

    async def handler(request: web.Request) -> web.Response:  # noqa: ARG001
        raise raised.pop()

    routes = [route(path, handler) for path in ("/x", "/v2", "/v2/models", "/v20")]
    client = await aiohttp_client(small_app(routes, config))

    async def get(error: Exception, path: str = "/x") -> tuple[aiohttp.ClientResponse, dict[str, Any]]:
        raised.append(error)
        answer = await client.get(path, headers=bearer(config))
        return answer, await answer.json(content_type=None)

    return get


async def test_each_code_has_one_body_and_status(answer_of: AnswerOf) -> None:
    for code, kind in ERRORS.items():
        answer, body = await answer_of(Domain(code))
        assert answer.status == kind.status == body["status"]
        assert answer.content_type == "application/problem+json"
        assert (body["code"], body["title"], body["error"]) == (code, kind.title, body["detail"])
        assert body["type"] in {kind.registered_type, f"urn:loadledger:error:{code}"}
        assert set(body) - {"instance"} == MEMBERS
        assert answer.headers.get("Retry-After") == ("1" if kind.status in {429, 503} else None)
        assert code == "internal" or body["detail"] == "what happened"


@pytest.mark.parametrize(
    "error",
    [
        Domain("no such code", "secret"), Domain(7, "secret"), KeyError("secret"),
        web.HTTPBadGateway(text="secret"),
    ],
)  # fmt: skip
async def test_unexpected_error_is_logged_with_an_id(
    answer_of: AnswerOf, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    with caplog.at_level(logging.ERROR, "server.errors"):
        answer, body = await answer_of(error)
    assert (answer.status, body["code"]) == (500, "internal")
    assert "secret" not in json.dumps(body)
    reference = body["instance"].removeprefix("urn:uuid:")
    assert reference in body["detail"]
    assert reference in caplog.text
    assert "Traceback" in caplog.text


async def test_retry_after_is_rounded_up_to_seconds(answer_of: AnswerOf) -> None:
    for seconds, field in ((0, "1"), (0.2, "1"), (2, "2"), (2.1, "3")):
        answer, _ = await answer_of(Domain("model_unloading", retry_after_s=seconds))
        assert answer.headers["Retry-After"] == field


async def test_members_headers_and_long_details_of_an_error(answer_of: AnswerOf) -> None:
    attributes = {"problem_members": {"load": "/x"}, "http_headers": {"Link": "</x>"}}
    answer, body = await answer_of(Domain("not_loaded", "\ud800" * 100_000, **attributes))
    assert (answer.status, body["load"], answer.headers["Link"]) == (409, "/x", "</x>")
    assert len(body["detail"]) == DETAIL_CHARACTERS
    assert set(body["detail"]) == {"?", "…"}


async def test_errors_under_v2_are_plain_json(answer_of: AnswerOf) -> None:
    for path, kind in (("/v2", "json"), ("/v2/models", "json"), ("/v20", "problem+json")):
        answer, body = await answer_of(Domain("unknown_model"), path)
        assert (answer.content_type, set(body)) == (f"application/{kind}", MEMBERS)


async def test_errors_of_every_layer_have_the_one_body(config: Config, aiohttp_client: AiohttpClient) -> None:
    @json_schema(Schema())
    async def takes_json(request: web.Request) -> web.Response:
        return web.json_response({"size": len(await request.read())})

    async def reads(request: web.Request) -> web.Response:
        return web.json_response({"size": len(await request.read())})

    routes = [
        route("/public", access=Access.PUBLIC, limit=LimitClass.NONE),
        route("/admin", access=Access.ADMIN),
        route("/json", takes_json, method="POST"),
        route("/v2/read", reads, method="POST"),
    ]
    app = small_app(routes, config)
    app._client_max_size = 1000
    client = await aiohttp_client(app)
    big, headers, auditor = b"x" * 2000, bearer(config), bearer(config, "audit")
    typed = {**headers, "Content-Type": "application/json"}
    expected = [
        (await client.get("/admin"), 401, "no_credentials"),
        (await client.get("/admin", headers=auditor), 403, "forbidden"),
        (await client.get("/none", headers=headers), 404, "not_found"),
        (await client.get("/v2/none", headers=headers), 404, "not_found"),
        (wrong_method := await client.delete("/public", headers=headers), 405, "method_not_allowed"),
        (await client.post("/json", headers=headers, data=b"{}"), 415, "unsupported_media_type"),
        (await client.post("/json", headers=typed, data=b"{"), 400, "invalid_body"),
        (await client.post("/v2/read", headers=headers, data=big), 413, "body_too_large"),
    ]
    for answer, status, code in expected:
        body = await answer.json(content_type=None)
        assert (answer.status, body["status"], body["code"], set(body)) == (status, status, code, MEMBERS)
        assert answer.content_type == f"application/{'' if '/v2' in answer.url.path else 'problem+'}json"
    assert wrong_method.headers["Allow"] == "GET,HEAD"
    assert "GET,HEAD" in (await wrong_method.json())["detail"]


async def test_redirect_is_not_an_error(config: Config, aiohttp_client: AiohttpClient) -> None:
    async def moved(request: web.Request) -> web.Response:  # noqa: ARG001
        raise web.HTTPSeeOther("/elsewhere")

    client = await aiohttp_client(small_app([route("/x", moved)], config))
    answer = await client.get("/x", headers=bearer(config), allow_redirects=False)
    assert (answer.status, answer.headers["Location"]) == (303, "/elsewhere")


async def test_error_amid_a_stream_closes_the_connection(
    config: Config, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        raise RuntimeError("secret")

    client = await aiohttp_client(small_app([route("/x", stream)], config))
    answer = await client.get("/x", headers=bearer(config))
    with pytest.raises(aiohttp.ClientPayloadError):
        await answer.read()
    assert "reference" in caplog.text


async def _raw(client: Client, head: str, body: bytes = b"") -> tuple[bytes, bytes]:
    """Send a request, its body after `100 Continue`, and return the head and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    try:
        async with asyncio.timeout(10):
            writer.write(head.encode() + b"\r\n\r\n")
            if "100-continue" in head:
                await reader.readuntil(b"100 Continue\r\n\r\n")
            writer.write(body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
            return answer, await reader.readexactly(length)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        ("Transfer-Encoding: chunked", b"zz\r\n", "body_timeout"),
        ("Content-Length: 4", b"no", "body_timeout"),
        ("Content-Encoding: gzip\r\nContent-Length: 4", b"nope", "unsupported_media_type"),
    ],
)
async def test_unreadable_body_is_a_client_error(
    config: Config, aiohttp_client: AiohttpClient, headers: str, body: bytes, code: str
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=await read_body(request, 100, idle_s=0.1))

    client = await aiohttp_client(small_app([route("/x", handler, method="POST")], config))
    token = bearer(config)["Authorization"]
    head = f"POST /x HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nExpect: 100-continue\r\n{headers}"
    answer, content = await _raw(client, head, body)
    problem = json.loads(content)
    assert (problem["code"], set(problem)) == (code, MEMBERS)
    assert answer.startswith(f"HTTP/1.1 {ERRORS[code].status} ".encode())


async def test_expect_100_continue_is_answered_others_ignored(
    config: Config, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(small_app([route()], config))
    token = bearer(config)["Authorization"]
    for expectation in ("100-continue", "tea"):
        head = f"GET /x HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nExpect: {expectation}"
        answer, _ = await _raw(client, head)
        assert answer.startswith(b"HTTP/1.1 200 OK")


def test_problem_without_detail_uses_its_docstring() -> None:
    assert str(ServerProblem()) == "The request could not be served."
