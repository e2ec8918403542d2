"""The short way of inferences: whatever is asked, the answer is that of the long way."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support import models
from support.http import LocalApi
from support.models import save

Start = Callable[..., Awaitable[LocalApi]]

QUESTION = json.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}]}).encode()
SHORT, LONG = "/v2/models/m/infer", "/v2/models/%6D/infer"
NOT_COMPARED = {"Date", "RateLimit", "Content-Length", "Connection"}


async def spoken(api: LocalApi, path: str, body: bytes, *fields: str, version: str = "HTTP/1.1") -> bytes:
    """Send a request as it is and return all that comes until the server closes the connection."""
    host, port = api.client.server.host, api.client.server.port
    reader, writer = await asyncio.open_connection(host, port)
    head = [f"POST {path} {version}", "Host: a", f"Content-Length: {len(body)}", *fields, "", ""]
    writer.write("\r\n".join(head).encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_both_ways_give_the_same_answers_and_refusals(
    start: Start, repository: Path, subtests: pytest.Subtests
) -> None:
    save(models.add(1), repository, "m")
    api = await start()
    await api.load("m")
    cases: dict[str, tuple[dict[str, str], bytes, tuple[str, ...]]] = {
        "an answer": ({}, QUESTION, ("predict",)),
        "no token": ({}, QUESTION, ()),
        "another role": ({}, QUESTION, ("audit",)),
        "no JSON": ({}, b"{", ("predict",)),
        "no length": ({"Inference-Header-Content-Length": "-1"}, QUESTION, ("predict",)),
        "an unknown coding": ({"Content-Encoding": "br"}, QUESTION, ("predict",)),
        "a coding that it is not in": ({"Content-Encoding": "gzip"}, QUESTION, ("predict",)),
    }
    for name, (headers, body, roles) in cases.items():
        with subtests.test(name):
            answers = [
                await api.post(path, data=body, headers=headers, roles=roles) for path in (SHORT, LONG)
            ]
            assert answers[0].status == answers[1].status
            assert answers[0].json == answers[1].json
            fields = [{*answer.headers} - NOT_COMPARED for answer in answers]
            assert fields[0] == fields[1]


async def test_a_version_or_a_model_that_is_not_there_is_told_the_same_both_ways(
    start: Start, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    api = await start()
    await api.load("m")
    for short, long in (
        ("/v2/models/nope/infer", "/v2/models/%6Eope/infer"),
        ("/v2/models/m/versions/2/infer", "/v2/models/%6D/versions/2/infer"),
    ):
        answers = [await api.post(path, data=QUESTION, roles=("predict",)) for path in (short, long)]
        assert answers[0].refusal == answers[1].refusal
        assert answers[0].refusal[0] in (404, 503)


async def test_inferences_of_both_ways_are_counted_together(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(limit_inference="2/minute")
    await api.load("m")
    statuses = []
    for path in (SHORT, LONG, SHORT):
        answer = await api.post(path, data=QUESTION, roles=("predict",))
        statuses.append((answer.status, answer.headers["RateLimit"].partition(";t=")[0]))
    assert statuses == [(200, '"inference";r=1'), (200, '"inference";r=0'), (429, '"inference";r=0')]


async def test_the_connection_is_kept_or_closed_as_the_client_asks(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    token = f"Authorization: Bearer {api.token('predict')}"
    closed = await spoken(api, SHORT, QUESTION, token, "Connection: close")
    assert b"\r\nConnection: close\r\n" in closed
    assert b"\r\nConnection" not in await spoken(api, SHORT, QUESTION, token, version="HTTP/1.0")


async def test_two_requests_in_one_packet_are_two_answers_in_their_order(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    token = f"Authorization: Bearer {api.token('predict')}"
    body = json.dumps({**json.loads(QUESTION), "id": "second"}).encode()
    head = f"POST {SHORT} HTTP/1.1\r\nHost: a\r\n{token}\r\n"
    pipelined = f"{head}Content-Length: {len(QUESTION)}\r\n\r\n".encode() + QUESTION
    pipelined += f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    reader, writer = await asyncio.open_connection(api.client.server.host, api.client.server.port)
    writer.write(pipelined)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    first, second = answer.split(b"HTTP/1.1 200 OK")[1:]
    assert b'"id"' not in first
    assert b'"id":"second"' in second


async def test_a_large_answer_arrives_whole(api: LocalApi, repository: Path) -> None:
    save(models.identity(shape=[None]), repository, "m")
    await api.load("m")
    values = [float(number) for number in range(300_000)]
    question = {"name": "x", "shape": [len(values)], "datatype": "FP32", "data": values}
    body = io.BytesIO(json.dumps({"inputs": [question]}).encode())
    answer = await api.post(SHORT, data=body, roles=("predict",))
    assert answer.json["outputs"][0]["data"] == values


async def test_a_client_that_asks_before_it_sends_takes_the_long_way(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    headers = {"Expect": "100-continue"}
    answer = await api.post(SHORT, data=QUESTION, headers=headers, roles=("predict",))
    assert answer.json["outputs"][0]["data"] == [2, 3]
