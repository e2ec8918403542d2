"""The fast path of inferences: it answers each request as the router and the middlewares do."""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from support import models
from support.http import ONE, LocalApi, local_server
from support.models import save

from runtime.requestjson import LONG_JSON_BYTES
from server.config import parse_size

Start = Callable[..., Awaitable[LocalApi]]

BODY = json.dumps({"inputs": [ONE]}).encode()
FAST, SLOW = "/v2/models/m/infer", "/v2/models/%6D/infer"
NOT_COMPARED = {"Date", "RateLimit", "Content-Length", "Connection"}
INFER = ("infer",)
LARGEST = parse_size("64MiB")
BOMB = gzip.compress(BODY + b" " * LARGEST, mtime=0)
TWO_MEMBERS = gzip.compress(BODY[:9], mtime=0) + gzip.compress(BODY[9:], mtime=0)
LENGTH = "Inference-Header-Content-Length"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application with `y = x + 1` loaded as `m`."""
    async with local_server(tmp_path_factory.mktemp("shared")) as api:
        save(models.add(1), api.config.repository, "m")
        await api.load("m")
        yield api


async def send_raw(api: LocalApi, *requests: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection(api.client.server.host, api.client.server.port)
    writer.write(b"".join(requests))
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


def request(api: LocalApi, *fields: str, body: bytes = BODY, version: str = "HTTP/1.1") -> bytes:
    token = f"Authorization: Bearer {api.token('infer')}"
    head = [f"POST {FAST} {version}", "Host: a", f"Content-Length: {len(body)}", token, *fields, "", ""]
    return "\r\n".join(head).encode() + body


@pytest.mark.parametrize(
    ("headers", "body", "roles", "status"),
    [
        ({}, BODY, INFER, 200),
        ({"Expect": "100-continue"}, BODY, INFER, 200),
        ({}, BODY, (), 401),
        ({}, BODY, ("audit",), 403),
        ({}, b"{", INFER, 400),
        ({LENGTH: "-1"}, BODY, INFER, 400),
        ({}, BODY.replace(b"{", b'{"id": "1", "id": "2", ', 1), INFER, 400),
        ({"Content-Encoding": "gzip"}, BOMB, INFER, 413),
        ({"Content-Encoding": "gzip"}, TWO_MEMBERS, INFER, 200),
        ({LENGTH: str(len(BODY) + 1)}, BODY, INFER, 400),
        ({"Content-Encoding": "br"}, BODY, INFER, 415),
        ({"Content-Encoding": "gzip"}, BODY, INFER, 400),
    ],
)
async def test_both_paths_answer_alike(
    shared: LocalApi, headers: dict[str, str], body: bytes, roles: tuple[str, ...], status: int
) -> None:
    for fast_path, slow_path in (
        (FAST, SLOW),
        ("/v2/models/nope/infer", "/v2/models/%6Eope/infer"),
        ("/v2/models/m/versions/2/infer", "/v2/models/%6D/versions/2/infer"),
    ):
        fast = await shared.post(fast_path, data=body, headers=headers, roles=roles)
        slow = await shared.post(slow_path, data=body, headers=headers, roles=roles)
        assert fast.status == slow.status
        assert fast.json == slow.json
        assert {*fast.headers} - NOT_COMPARED == {*slow.headers} - NOT_COMPARED
        assert fast.status == status or fast_path != FAST


async def test_both_paths_count_for_one_limit(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(limit_inference="2/minute")
    await api.load("m")
    found = []
    for path in (FAST, SLOW, FAST):
        answer = await api.post(path, data=BODY, roles=INFER)
        found.append((answer.status, answer.headers["RateLimit"].partition(";t=")[0]))
    assert found == [(200, '"inference";r=1'), (200, '"inference";r=0'), (429, '"inference";r=0')]


async def test_bytes_of_json_are_no_requests(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(limit_inference="9/minute")
    await api.load("m")
    long = BODY.replace(b"[1]}", b"[1" + b" " * LONG_JSON_BYTES + b"]}")
    found = [await api.post(path, data=io.BytesIO(long), roles=INFER) for path in (FAST, SLOW)]
    assert [answer.status for answer in found] == [200, 200]
    left = [answer.headers["RateLimit"].partition(";t=")[0] for answer in found]
    assert left == ['"inference";r=8', '"inference";r=7']


async def test_connection_is_kept_as_the_client_requests(shared: LocalApi) -> None:
    closed = await send_raw(shared, request(shared, "Connection: close"))
    assert b"\r\nConnection: close\r\n" in closed
    assert b"\r\nConnection" not in await send_raw(shared, request(shared, version="HTTP/1.0"))


async def test_pipelined_requests_are_answered_in_order(shared: LocalApi) -> None:
    second = BODY.replace(b"{", b'{"id": "second", ', 1)
    last = request(shared, "Connection: close", body=second)
    answers = (await send_raw(shared, request(shared), last)).split(b"HTTP/1.1 200 OK")
    assert [b'"id":"second"' in answer for answer in answers[1:]] == [False, True]
