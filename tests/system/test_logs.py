"""The log of a real server: lines of requests and jobs, forged lines, a reader that does not read."""

import asyncio
import json
import os
import re

from support import models
from support.http import LIMIT_S, ONE, Json, when
from support.models import save
from support.servers import MODULE, Server, serving
from yarl import URL

from server.config import Config
from server.observability.requestlog import MAX_UNAUTHENTICATED

LOUD = {"LOADLEDGER_LOG_LEVEL": "info", "LOADLEDGER_LOG_FORMAT": "json"}


PASSWORD = "hunter2"


def lines(text: str) -> list[Json]:
    """Return the lines of a log, each of which has to be JSON."""
    return [json.loads(line) for line in text.splitlines()]


async def until_logged(server: Server, event: str) -> list[Json]:
    async def look() -> list[Json]:
        complete, _, _ = server.output.read_text().rpartition("\n")
        return lines(complete)

    return await when(look, lambda told: any(line.get("event") == event for line in told))


async def raw(server: Server, *fields: str, path: str = "/x") -> bytes:
    """Send a request that no client sends, and return the answer."""
    url = URL(server.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
        "\r\n".join([f"GET {path} HTTP/1.1", "Host: a", "Connection: close", *fields, "", ""]).encode()
    )
    async with asyncio.timeout(LIMIT_S):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def infer(server: Server, **headers: str) -> str | None:
    answer = await server.api.post(
        "/v2/models/m/infer", roles=("infer",), json={"inputs": [ONE]}, headers=headers
    )
    assert answer.status == 200
    return answer.headers.get("X-Request-Id")


async def send_unauthenticated(server: Server) -> None:
    """Send requests that forge lines, and more than are logged."""
    forged = '{"time": "2026", "message": "forged"}'
    answers = [
        await raw(server, f"X-Request-Id: a{forged}", path="/a%0a" + forged.replace(" ", "")),
        await raw(server, "X-Request-Id: a\u2028b", "traceparent: 00-\u2028-01"),
        await raw(server, f"Authorization: Bearer {server.api.token('admin')}x", path="/api/v1/models?a=b"),
    ]
    answers += [
        await raw(server, path=f"http://mallory:{PASSWORD}@a{path}") for path in ("/api/v1/models?a=b", "")
    ]
    assert all(b"HTTP/1.1 401" in answer and b"\r\nX-Request-Id: " in answer for answer in answers)
    assert PASSWORD.encode() not in await raw(server, path=f"http://mallory:{PASSWORD}@a:99999/")
    for _ in range(MAX_UNAUTHENTICATED + 10):
        await server.api.get("/api/v1/models", roles=())


async def test_log_joins_requests_with_events_despite_hostile_input(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    async with serving(config, environment=LOUD) as server:
        headers = {"X-Request-Id": "load-1"}
        answer = await server.api.post("/api/v1/models/m/load", wait=60, headers=headers)
        assert answer.headers["X-Request-Id"] == "load-1"
        refused = await server.api.post("/api/v1/models/none/load")
        made = refused.headers["X-Request-Id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
        await server.api.get("/api/v1/models")
        await infer(server)
        await server.api.unload("m")
        await until_logged(server, "ModelUnloaded")
        await send_unauthenticated(server)
        assert await server.stop() == 0
        told = lines(server.output.read_text())
        token = server.api.token("admin")
    job_id = answer.json["id"]
    assert token.split(".")[2] not in server.output.read_text()
    assert PASSWORD not in server.output.read_text()
    assert PASSWORD.encode() not in b"".join(each.read_bytes() for each in config.data.glob("ledger.db*"))
    assert len([line for line in told if line.get("status") == 401]) == MAX_UNAUTHENTICATED
    assert not [line for line in told if line["message"] == "forged" or "?" in line.get("path", "")]
    told = [line for line in told if line.get("status") != 401]
    steps = [line for line in told if line.get("job") == job_id and "event" in line]
    assert [line["event"] for line in steps] == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert [line["position"] for line in steps] == [2, 3, 4]
    for line in steps:
        assert line["request_id"] == "load-1"
        assert (line["model"], line["version"], line["level"]) == ("m", 1, "info")
    assert steps[0]["subject"] == "alice"
    assert 0 < steps[2]["duration_s"] < LIMIT_S
    (request,) = [line for line in told if line.get("request_id") == "load-1" and "event" not in line]
    assert (request["method"], request["path"], request["status"]) == ("POST", "/api/v1/models/m/load", 200)
    assert (request["job"], request["position"], request["subject"]) == (job_id, 2, "alice")
    assert request["duration_s"] > 0
    (refusal,) = [line for line in told if line.get("request_id") == made]
    assert (refusal["status"], refusal["code"]) == (404, "unknown_model")
    assert not [line for line in told if line.get("method") == "GET" or "infer" in line["message"]]
    assert "memory of" in told[0]["message"]
    assert "workers are" in told[1]["message"]
    assert re.fullmatch(r"threads of each model: \d+, .+", told[2]["message"])
    assert next(line["event"] for line in told if "event" in line) == "ServerStarted"


async def test_unread_log_blocks_neither_requests_nor_stop(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    fifo = config.data.with_name("fifo")
    os.mkfifo(fifo)
    unread = os.open(fifo, os.O_RDWR)  # so that it can be opened for writing, and is never read
    try:
        command = ("sh", "-c", f'exec "$@" 2> "{fifo}"', "sh", *MODULE)
        environment = LOUD | {"LOADLEDGER_LOG_LEVEL": "debug"}
        async with serving(config, command=command, environment=environment) as server:
            await server.api.load("m")
            for _ in range(200):  # more than a pipe takes
                await server.api.get("/api/v1/models")
            await infer(server)
            assert await server.stop() == 0
    finally:
        os.close(unread)
