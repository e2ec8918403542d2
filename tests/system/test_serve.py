"""The command `serve` as a process: start, child processes, settings, stop."""

import asyncio
import io
import json
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from support import models
from support.clients import Value, binary_request
from support.http import LIMIT_S, ONE, Json, when
from support.models import save, save_bytes
from support.servers import SCRIPT, Server, events, limited, refused_start, serving, verified
from support.workers import computing, freeze, until
from yarl import URL

from events.types import ServerStarted, ServerStopped
from runtime.memory import private_bytes
from server.config import Config


def trips(count: int) -> Json:
    return {"name": "trips", "shape": [], "datatype": "INT64", "data": [count]}


async def in_flight(server: Server) -> int:
    """Return how many inferences run."""
    uses = (await server.api.get("/api/v1/resources")).json["models"]
    return sum(use["in_flight"] for use in uses)


def mapped_files(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def refuses_connections(server: Server) -> None:
    """Wait until the server accepts no connections, which is how it begins to stop."""
    url = URL(server.url)
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(url.host, url.port)
            except ConnectionError:  # refused, or reset when it was in the backlog
                return
            writer.close()


async def test_serve_prints_its_address_and_children_have_no_http_stack(
    config: Config, tmp_path: Path
) -> None:
    config = replace(config, data=tmp_path / ("d" * 100) / ("d" * 100))  # longer than a socket's path may be
    config.data.parent.mkdir()
    save(models.add(1), config.repository, "m")
    few_descriptors = ("bash", "-c", 'ulimit -Sn 200 && exec "$@"', "bash", *SCRIPT)
    relative = "--repository=."  # the server is started in the repository; the last option counts
    environment = {"LOADLEDGER_HOST": "nowhere.invalid"}  # options go before variables
    async with serving(
        config, relative, "--host=127.0.0.1", command=few_descriptors, environment=environment
    ) as server:
        assert server.url.startswith("http://127.0.0.1:")
        soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        assert soft == hard != 200
        await server.api.load("m")
        assert (await server.api.infer("m", ONE)).json["outputs"][0]["data"] == [2]
        children = server.children()
        assert len(children) == 2  # the fork server and one worker
        for child in children:
            mapped = mapped_files(child)
            assert "onnxruntime" in mapped
            for library in ("aiohttp", "yarl", "uvloop", "sqlite"):
                assert library not in mapped
        assert f"is in use by process {server.pid};" in await refused_start(config)
        assert (await server.api.get("/health/ready")).status == 200
        assert await server.stop() == 0
        await server.nothing_left()
        assert server.process.stdout is not None
        said = (await server.process.stdout.read()).decode()
        assert f"models: 1 model with 1 version in {config.repository.resolve()}\n" in said
        assert server.warnings() == []
    log = await events(config)
    assert verified(config).position == len(log)
    assert isinstance(started := log[0].data, ServerStarted)
    assert (started.unclean, log[-1].data) == (False, ServerStopped())
    assert [event.type for event in log].count("ServerStarted") == 1
    assert (config.data.stat().st_mode & 0o777) == 0o700


async def test_stop_finishes_inferences_and_answers_202_to_waiting_clients(config: Config) -> None:
    """A terminal sends SIGINT to all processes."""
    save(models.counting_loop(), config.repository, "m")
    save_bytes(models.endless_load(), config.repository, "slow")
    async with serving(config) as server:
        await server.api.load("m")
        worker = server.worker()
        await freeze(worker)  # so that the inference has not ended when the server stops
        inference = asyncio.create_task(server.api.infer("m", trips(20_000)))
        await when(lambda: in_flight(server), bool)
        waiting = asyncio.create_task(server.api.post("/api/v1/models/slow/load", wait=60))
        await when(server.api.jobs, lambda jobs: jobs[0]["stage"] == "loading")
        stopping = asyncio.create_task(server.stop(signal.SIGINT, to_group=True))
        await refuses_connections(server)
        assert not inference.done()
        os.kill(worker, signal.SIGCONT)
        assert await stopping == 0
        answer = await inference
        assert (answer.status, answer.json["outputs"][0]["data"]) == (200, [20_000])
        assert ((await waiting).status, (await waiting).json["status"]) == (202, "in_progress")
        # The connections close: requests that follow on them at once would be lost.
        assert [each.headers.get("Connection") for each in (answer, await waiting)] == ["close"] * 2
    assert (await events(config))[-1].data == ServerStopped()


async def test_drain_timeout_ends_stuck_inference(config: Config) -> None:
    save(models.counting_loop(), config.repository, "m")
    async with serving(config, "--drain-timeout-s=0.2") as server:
        await server.api.load("m")
        is_computing = computing(server.worker())
        inference = asyncio.create_task(server.api.infer("m", trips(models.ENDLESS)))
        await until(is_computing)
        assert await server.stop() == 0
        answer = await inference
        assert answer.refusal == (503, "shutting_down")
        assert answer.json["error"] == "the server stopped before the inference of model 'm' had ended"
        await server.nothing_left()
    assert (await events(config))[-1].data == ServerStopped()


HEALTH = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


async def connect(
    server: Server, sent: bytes, *, half_closes: bool = False
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a connection over which this was sent; with `half_closes` a FIN is in its last segment.

    So the FIN comes before any answer, on a busy machine, too.
    """
    url = URL(server.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    if half_closes:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    writer.write(sent)
    if half_closes:
        writer.write_eof()
    return reader, writer


async def response(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Return what the server sends until it closes the connection."""
    received = b""
    async with asyncio.timeout(LIMIT_S):
        with suppress(ConnectionError):
            while piece := await reader.read(2**16):
                received += piece
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return received


async def test_serve_limits_heads_and_connections_but_not_probes(config: Config) -> None:
    command = limited(head_timeout_s=0.3, max_connections=2)
    long_target = b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n"
    async with serving(config, "--metrics=open", command=command) as server:
        assert b'"head_timeout"' in await response(*await connect(server, HEALTH[:-2]))
        assert b'"target_too_long"' in await response(*await connect(server, long_target))
        for path in (
            b"/v2/models/m/infer",
            b"/v2/models/%6D/infer",
            b"/api/v1/models/m/load",
        ):  # first, the fast path
            coded = b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" % path
            refused = await response(*await connect(server, coded + HEALTH))
            assert (b'"unknown_transfer_coding"' in refused, refused.count(b"HTTP/1.1")) == (True, 1)
        held = [await connect(server, HEALTH) for _ in range(2)]
        for reader, _ in held:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 OK")
        refused = await response(*await connect(server, HEALTH.replace(b"/health/live", b"/docs")))
        assert b'"too_many_connections"' in refused
        for path in (b"/health/live", b"/health/ready", b"/v2/health/ready", b"/metrics"):
            answer = await response(*await connect(server, HEALTH.replace(b"/health/live", path)))
            assert answer.startswith(b"HTTP/1.1 200 OK")
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        assert await server.stop() == 0
        assert server.warnings() == []


def inference(server: Server, count: int) -> bytes:
    """Return an inference that counts so far, as bytes."""
    body = json.dumps({"inputs": [trips(count)]}).encode()
    token = server.api.token("infer").encode()
    head = b"POST /v2/models/loop/infer HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\n" % token
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server of the models `loop` and `same`, which are loaded."""
    folder = tmp_path_factory.mktemp("serve")
    config = Config(repository=folder / "repository", data=folder / "data")
    save(models.counting_loop(), config.repository, "loop")
    save(models.identity(), config.repository, "same")
    async with serving(config) as server:
        await server.api.load("loop")
        await server.api.load("same")
        yield server


@pytest.mark.asyncio(loop_scope="module")
async def test_half_closed_client_is_answered_and_closed_one_cancelled(server: Server) -> None:
    for sent in (HEALTH, inference(server, 3), inference(server, 3) + inference(server, 3)):
        answer = await response(*await connect(server, sent, half_closes=True))
        assert answer.count(b"HTTP/1.1 200 OK") == sent.count(b"HTTP/1.1")
    _, writer = await connect(server, inference(server, models.ENDLESS))
    await when(lambda: in_flight(server), lambda count: count == 1)
    writer.close()
    await when(lambda: in_flight(server), lambda count: count == 0)
    cut_off = inference(server, 3)[:-1]
    assert await response(*await connect(server, cut_off, half_closes=True)) == b""
    assert (await server.api.infer("loop", trips(3))).status == 200
    assert server.warnings() == []


@pytest.mark.asyncio(loop_scope="module")
async def test_memory_of_large_bodies_is_given_back(server: Server) -> None:
    """Also that of bodies that are longer than the memory which a worker shares with the server."""
    headers, body = binary_request([Value("x", "FP32", (11_000_000,), bytes(44_000_000))])

    async def infer() -> int:
        return (await server.api.post("/v2/models/same/infer", data=io.BytesIO(body), headers=headers)).status

    before = private_bytes(server.pid)
    assert await asyncio.gather(*(infer() for _ in range(4))) == [200] * 4
    await until(lambda: private_bytes(server.pid) < before + 10_000_000)
