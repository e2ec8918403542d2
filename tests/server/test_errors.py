"""Every error is one RFC 9457 body, from the table of codes."""

import asyncio
import errno
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp import AiohttpClient
from support.http import bearer, route, small_app, small_config

from server.appkeys import CONFIG
from server.config import Config
from server.errors import DETAIL_CHARACTERS, ERRORS, ServerProblem
from server.http.validation import read_plain_body

Client = TestClient[web.Request, web.Application]
AnswerOf = Callable[..., Awaitable[tuple[aiohttp.ClientResponse, dict[str, Any]]]]
RAISED: web.AppKey[list[Exception]] = web.AppKey("raised", list)
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


async def raising(request: web.Request) -> web.Response:
    raise request.app[RAISED].pop()


async def moving(request: web.Request) -> web.Response:  # noqa: ARG001
    raise web.HTTPSeeOther("/elsewhere")


async def breaking_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"half")
    raise RuntimeError("secret")


async def reading(request: web.Request) -> web.Response:
    return web.Response(body=await read_plain_body(request, 100, idle_s=0.1))


@pytest.fixture
async def client(config: Config, aiohttp_client: AiohttpClient) -> Client:
    routes = [route(path, raising) for path in ("/x", "/v2", "/v2/models", "/v20")]
    routes += [route("/moved", moving), route("/half", breaking_off), route("/me")]
    app = small_app([*routes, route("/read", reading, method="POST")], config)
    app[RAISED], app[CONFIG] = [], config
    return await aiohttp_client(app, headers=bearer(config))


@pytest.fixture
def answer_of(client: Client) -> AnswerOf:
    """A function that returns the answer of a handler that raises an error."""

    async def get(error: Exception, path: str = "/x") -> tuple[aiohttp.ClientResponse, dict[str, Any]]:
        client.app[RAISED].append(error)
        answer = await client.get(path)
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


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_lack_of_descriptors_is_to_be_tried_again(answer_of: AnswerOf, number: int) -> None:
    answer, body = await answer_of(OSError(number, "secret", "/secret"))
    assert (answer.status, body["code"]) == (503, "too_many_files")
    assert answer.headers["Retry-After"] == "1"
    assert "secret" not in json.dumps(body)


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


async def test_errors_under_v2_are_plain_json(client: Client, answer_of: AnswerOf) -> None:
    for path, kind in (("/v2", "json"), ("/v2/models", "json"), ("/v20", "problem+json")):
        answer, body = await answer_of(Domain("unknown_model"), path)
        assert (answer.content_type, set(body)) == (f"application/{kind}", MEMBERS)
    for path, kind in (("/none", "problem+json"), ("/v2/none", "json")):
        answer = await client.get(path)
        body = await answer.json(content_type=None)
        assert (answer.status, body["code"], set(body)) == (404, "not_found", MEMBERS)
        assert answer.content_type == f"application/{kind}"
    answer = await client.delete("/x")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD")
    assert "GET,HEAD" in (await answer.json())["detail"]


async def test_error_amid_a_stream_closes_the_connection(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await client.get("/half")
    with pytest.raises(aiohttp.ClientPayloadError):
        await answer.read()
    assert "reference" in caplog.text


async def _raw(client: Client, line: str, headers: str, body: bytes = b"") -> tuple[bytes, bytes]:
    """Send a request, its body after `100 Continue`, and return the head and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    try:
        async with asyncio.timeout(10):
            token = bearer(client.app[CONFIG])["Authorization"]
            head = f"{line} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n{headers}\r\n\r\n"
            writer.write(head.encode())
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
    client: Client, headers: str, body: bytes, code: str
) -> None:
    answer, content = await _raw(client, "POST /read", f"Expect: 100-continue\r\n{headers}", body)
    problem = json.loads(content)
    assert (problem["code"], set(problem)) == (code, MEMBERS)
    assert answer.startswith(f"HTTP/1.1 {ERRORS[code].status} ".encode())


async def test_expect_100_continue_is_answered_others_ignored(client: Client) -> None:
    for expectation in ("100-continue", "tea"):
        answer, _ = await _raw(client, "GET /me", f"Expect: {expectation}")
        assert answer.startswith(b"HTTP/1.1 200 OK")


def test_problem_without_detail_uses_its_docstring() -> None:
    assert str(ServerProblem()) == "The request could not be served."
