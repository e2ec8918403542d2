"""The fast path of inferences: it answers each request as the router and the middlewares do."""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from support import models
from support.http import ONE, LocalApi, local_server
from support.models import save

from runtime.requestjson import LONG_JSON_BYTES
from server.config import parse_size

BODY = json.dumps({"inputs": [ONE]}).encode()
FAST, SLOW = "/v2/models/m/infer", "/v2/models/%6D/infer"
NOT_COMPARED = {"Date", "RateLimit", "Content-Length", "Connection"}
INFER = ("infer",)
LARGEST = "5MiB"
BOMB = gzip.compress(BODY + b" " * parse_size(LARGEST), mtime=0)
LONG = BODY.replace(b"[1]}", b"[1" + b" " * LONG_JSON_BYTES + b"]}")
TWO_MEMBERS = gzip.compress(BODY[:9], mtime=0) + gzip.compress(BODY[9:], mtime=0)
LENGTH = "Inference-Header-Content-Length"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application with `y = x + 1` loaded as `m`, and limits."""
    limits = {"limit_inference": "4/minute", "max_request_size": LARGEST}
    async with local_server(tmp_path_factory.mktemp("shared"), **limits) as api:
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


def request(api: LocalApi, subject: str, *fields: str, body: bytes = BODY, version: str = "1.1") -> bytes:
    token = f"Authorization: Bearer {api.token('infer', subject=subject)}"
    head = [f"POST {FAST} HTTP/{version}", "Host: a", f"Content-Length: {len(body)}", token, *fields, "", ""]
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
        sent: Any = {"data": body, "headers": headers, "roles": roles, "subject": str(uuid4())}
        fast, slow = await shared.post(fast_path, **sent), await shared.post(slow_path, **sent)
        assert fast.status == slow.status
        assert fast.json == slow.json
        assert {*fast.headers} - NOT_COMPARED == {*slow.headers} - NOT_COMPARED
        assert fast.status == status or fast_path != FAST


async def test_both_paths_count_each_request_for_one_limit(shared: LocalApi) -> None:
    """However long its JSON is."""
    found = []
    for path, body in ((FAST, BODY), (SLOW, LONG), (FAST, LONG), (SLOW, BODY), (FAST, BODY), (SLOW, BODY)):
        answer = await shared.post(path, data=io.BytesIO(body), roles=INFER, subject="ann")
        found.append((answer.status, answer.headers["RateLimit"].partition(";t=")[0]))
    assert found == [
        *((200, f'"inference";r={left}') for left in (3, 2, 1, 0)),
        *[(429, '"inference";r=0')] * 2,
    ]


async def test_connection_is_kept_as_the_client_requests(shared: LocalApi) -> None:
    closed = await send_raw(shared, request(shared, "bob", "Connection: close"))
    assert b"\r\nConnection: close\r\n" in closed
    assert b"\r\nConnection" not in await send_raw(shared, request(shared, "bob", version="1.0"))


async def test_pipelined_requests_are_answered_in_order(shared: LocalApi) -> None:
    second = BODY.replace(b"{", b'{"id": "second", ', 1)
    last = request(shared, "carol", "Connection: close", body=second)
    answers = (await send_raw(shared, request(shared, "carol"), last)).split(b"HTTP/1.1 200 OK")
    assert [b'"id":"second"' in answer for answer in answers[1:]] == [False, True]
