"""A server in a container of 1 GiB: what models and clients take together never ends the container."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from support import models
from support.cgroups import Container, container
from support.grpccalls import GRPC, find_gateway, grpc_client, inference
from support.http import ONE, Answer, Api, Json
from support.http2 import Http2Connection, http2, message
from support.servers import MODULE, NO_DEVICES, Server, serving, verified
from support.workers import LIMIT_S, until
from yarl import URL

from features.grpc.translation import INFER
from server.config import Config

GIB = 2**30
BODY_BYTES = 64 * 2**20
BODIES = 8
SUBJECTS = ("alice", "bob")
BALLAST = 10_000_000
"""Floats that a loaded model holds: 40 MB, and 80 MB of memory."""
LARGE = (4_000_000, 5_000_000, 6_000_000)
"""Floats of inferences that work although the budget is full: up to 24 MB."""
LONG = 8_000_000
"""Floats of a long answer: 32 MB."""
LONGEST = 15_000_000
"""Floats of a request of gRPC: 60 MB."""
HUGE = 130_000_000
"""Floats of an inference that would fit into the budget, and not beside what the others take: 520 MB."""


@pytest.fixture
def box() -> Iterator[Container]:
    with container(GIB) as box:
        yield box


@asynccontextmanager
async def full_server(folder: Path, box: Container, *arguments: str) -> AsyncIterator[Server]:
    """Start a server in the container, and load models until its budget is full."""
    config = Config(repository=folder / "models", data=folder / "data")
    models.save(models.add(), config.repository, "witness")
    models.save(models.memory_bomb_on_load(), config.repository, "burst")
    models.save(models.filled(), config.repository, "filled")
    for number in range(2):
        models.save(models.memory_bomb_on_run(), config.repository, f"bomb-{number}")
    for number in range(20):
        models.save(models.grown(BALLAST), config.repository, f"ballast-{number}")
    command = (*box.entering, *MODULE)
    async with serving(config, *arguments, command=command, environment=NO_DEVICES) as server:
        api, count = server.api, 0
        for model_id in ("witness", "filled", "bomb-0", "bomb-1"):
            await api.load(model_id)
        while (job := await load(api, f"ballast-{count}"))["status"] == "completed":
            count += 1
        assert job["error"]["code"] in ("insufficient_memory", "out_of_memory", "timeout")
        yield server
        for number in range(count):
            assert (await api.get(f"/v2/models/ballast-{number}/ready")).status == 200
        assert box.kills == 0
    verified(config)


@asynccontextmanager
async def witnessed(api: Api) -> AsyncIterator[None]:
    """Ask another model all the time, which must always answer."""
    done, answers = asyncio.Event(), list[Answer]()

    async def ask() -> None:
        while not done.is_set():
            answers.append(await api.post("/v2/models/witness/infer", json={"inputs": [ONE]}, subject="eve"))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ask())
        try:
            yield
        finally:
            done.set()
    assert {answer.status for answer in answers} == {200}


async def load(api: Api, model_id: str) -> Json:
    body = {"threads": 1, "timeout_s": 20}
    answer = await api.post(f"/api/v1/models/{model_id}/load", json=body, wait=30)
    assert answer.status in (200, 202), answer.body
    return answer.json


async def infer(api: Api, model_id: str, name: str, count: int) -> Answer:
    tensor: Json = {"name": name, "shape": [1], "datatype": "INT64", "data": [count]}
    return await api.post(f"/v2/models/{model_id}/infer", json={"inputs": [tensor]})


async def send_slowly(api: Api, subject: str, until_sent: asyncio.Event) -> Answer | None:
    """Send a long body up to its last byte, and wait; returns None if the connection was closed."""

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        for _ in range(BODY_BYTES // 2**20 - 1):
            yield b" " * 2**20
        await until_sent.wait()
        yield b"}"

    try:
        return await api.post("/v2/models/bomb-0/infer", data=body(), subject=subject)
    except (OSError, aiohttp.ClientError):  # refused before its end
        return None


async def test_model_ends_before_its_container_does(tmp_path: Path, box: Container) -> None:
    async with full_server(tmp_path, box) as server, asyncio.timeout(LIMIT_S), witnessed(server.api):
        api = server.api
        sent, all_bodies = asyncio.Event(), list(SUBJECTS) * BODIES
        bodies = [asyncio.create_task(send_slowly(api, subject, sent)) for subject in all_bodies]
        await until(lambda: sum(body.done() for body in bodies) >= len(bodies) - len(SUBJECTS))
        *lost, burst = await asyncio.gather(
            infer(api, "bomb-0", "shape", HUGE), infer(api, "bomb-1", "shape", HUGE), load(api, "burst")
        )
        sent.set()
        await asyncio.gather(*bodies)
        for answer in lost:
            assert answer.refusal == (400, "inference_failed")
            assert "its worker may take" in answer.json["error"]
        assert burst["status"] == "failed"
        assert burst["error"]["code"] in ("out_of_memory", "insufficient_memory")
        for number in range(2):
            for count in LARGE:  # although ONNX Runtime keeps memory of the inferences before
                answer = await infer(api, f"bomb-{number}", "shape", count)
                assert answer.status == 200, answer.body
                assert (await infer(api, f"bomb-{number}", "shape", HUGE)).refusal == (
                    400,
                    "inference_failed",
                )


async def ask_without_reading(api: Api) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a long answer, of which not more than the kernel's buffers have room for is read."""
    tensor = {"name": "count", "shape": [1], "datatype": "INT64", "data": [LONG]}
    wanted = [{"name": "y", "parameters": {"binary_data": True}}]
    body = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    url = URL(api.url)
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=2**16)
    writer.write(
        f"POST /v2/models/filled/infer HTTP/1.1\r\nHost: server\r\nConnection: close\r\n"
        f"Authorization: Bearer {api.token('infer')}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return reader, writer


async def test_unread_answers_never_end_the_container(tmp_path: Path, box: Container) -> None:
    async with full_server(tmp_path, box) as server, asyncio.timeout(LIMIT_S), witnessed(server.api):
        api = server.api
        connections = [await ask_without_reading(api) for _ in range(30)]
        readers = [reader for reader, _ in connections]
        heads = [(await reader.readline()).split()[1] for reader in readers]
        assert set(heads) == {b"200", b"503"}
        rest = [await reader.read() for reader in readers]
        for _, writer in connections:
            writer.close()
        refused = [body for head, body in zip(heads, rest, strict=True) if head == b"503"]
        assert all(b'"code":"bodies_full"' in body for body in refused)


async def test_calls_of_grpc_never_end_the_container(tmp_path: Path, box: Container) -> None:
    """Nor the process that speaks it: long messages, ones that never end, and answers that nobody reads."""
    request = inference("witness", np.zeros(LONGEST, np.float32)).SerializeToString()
    asked = inference("filled", np.array([LONG], np.int64), "count", "INT64").SerializeToString()
    async with (
        AsyncExitStack() as stack,
        full_server(tmp_path, box, *GRPC) as server,
        asyncio.timeout(LIMIT_S),
        witnessed(server.api),
    ):
        gateway, token = await find_gateway(server), server.api.token("infer")

        def attack(connection: Http2Connection, data: bytes, *, ends: bool) -> None:
            with suppress(ConnectionError):
                connection.send_data(connection.call(INFER, token), data, ends=ends)

        with ExitStack() as connections:
            statuses = set[str]()
            client = await stack.enter_async_context(grpc_client(gateway.address, token))

            async def ask() -> None:
                method: Any = client.channel.unary_unary(INFER)
                try:
                    await method(request, metadata=(("authorization", f"Bearer {token}"),))
                except grpc.aio.AioRpcError as error:
                    statuses.add(error.code().name)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(8):
                    for data, ends in ((message(request, BODY_BYTES), False), (message(asked), True)):
                        each = connections.enter_context(http2(gateway.address, window=0))
                        tasks.create_task(asyncio.to_thread(attack, each, data, ends=ends))
                    tasks.create_task(ask())
            # The last one is of the model's worker, which lacked memory.
            assert statuses <= {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "INVALID_ARGUMENT"}
            assert await client.status() == "SERVING"
        assert await find_gateway(server) == gateway


async def test_server_says_at_its_start_what_its_memory_is_for(tmp_path: Path, box: Container) -> None:
    config = Config(repository=tmp_path / "models", data=tmp_path / "data")
    models.save(models.add(), config.repository, "m")
    command = (*box.entering, *MODULE)
    async with serving(config, "--memory-budget=80%", command=command, environment=NO_DEVICES) as server:
        await server.logged("memory of")
        [warning] = [line for line in server.warnings() if "memory of" in line]
        assert "memory of 1,074 MB (cgroup v" in warning
        assert "set --memory-budget to 568MiB or less" in warning
        assert box.is_unified is ("all processes of the container at once" in warning)
        memory = (await server.api.get("/api/v1/resources")).json["memory"]
        assert memory["summary"] in warning
        assert memory["kills_together"] is box.is_unified
        [started] = (await server.api.get("/api/v1/events?type=ServerStarted")).json["events"]
        assert started["data"]["memory"]["excess_bytes"] == memory["excess_bytes"] > 0
