"""Hostile clients of gRPC: neither the server nor calls of others notice, and the gateway goes on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from support import models
from support.fleet import new_dice, of_both
from support.grpccalls import GRPC, GatewayProcess, GrpcClient, find_gateway, grpc_client, inference, refusal
from support.http import ONE
from support.http2 import RST_STREAM, frame, http2, message
from support.models import save
from support.servers import Server, serving
from support.workers import until

from features.grpc.gateway import MAX_STREAMS
from features.grpc.translation import CHECK, INFER, METHODS
from server.config import Config

X = np.array([1, 2, 3], np.float32)
LARGEST = 64 * 2**20
STREAMS = of_both(short=2000, long=10_000)
MESSAGES = of_both(short=300, long=10_000)
GROWTH_BYTES = 400 * 2**20
"""More than all attacks of a test leave behind, and much less than they would take without limits."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("grpc")
    config = Config(repository=folder / "repository", data=folder / "data")
    save(models.add(1), config.repository, "m")
    save(models.filled(), config.repository, "filled")
    async with serving(config, *GRPC, "--limit-inference=off") as server:
        for model_id in ("m", "filled"):
            await server.api.load(model_id)
        yield server


def memory_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:"))


@asynccontextmanager
async def witnessed(server: Server) -> AsyncIterator[tuple[GatewayProcess, GrpcClient]]:
    """Ask over gRPC and HTTP all the time: each question must be answered, by the same process."""
    gateway, done, count = await find_gateway(server), asyncio.Event(), 0
    before = memory_of(gateway.pid)
    async with grpc_client(gateway.address, server.api.token("infer")) as client:

        async def ask() -> None:
            nonlocal count
            while not done.is_set():
                assert list(await client.infer("m", X)) == [2, 3, 4]
                assert await client.status() == "SERVING"
                assert (await server.api.infer("m", ONE)).status == 200
                count += 1

        asking = asyncio.create_task(ask())
        await until(lambda: count > 0 or asking.done())
        try:
            yield gateway, client
            seen = count + 1
            await until(lambda: count > seen or asking.done())
        finally:
            done.set()
        await asking
    assert memory_of(gateway.pid) < before + GROWTH_BYTES


async def attack(work: Callable[[], object]) -> None:
    """Do blocking work in a thread; the server may hang up."""
    with suppress(ConnectionError):
        await asyncio.to_thread(work)


async def test_calls_of_any_number_are_refused_or_wait(server: Server) -> None:
    async with witnessed(server) as (gateway, _):
        with ExitStack() as stack:
            for _ in range(STREAMS // MAX_STREAMS):
                connection = stack.enter_context(http2(gateway.address))

                def begin(call: Callable[[str], int] = connection.call) -> None:
                    for _ in range(MAX_STREAMS + 10):
                        call(INFER)

                await attack(begin)
            await asyncio.sleep(2)


async def test_calls_that_are_reset_at_once_leave_nothing(server: Server) -> None:
    async with witnessed(server) as (gateway, _):
        with http2(gateway.address) as connection:

            def reset() -> None:
                for _ in range(STREAMS):
                    connection.send(frame(RST_STREAM, 0, connection.call(INFER), b"\0\0\0\x08"))

            await attack(reset)


@pytest.mark.parametrize("declared", [LARGEST + 1, 2**32 - 1], ids=["one too many", "4 GiB"])
async def test_message_that_is_too_long_is_refused_at_its_head(server: Server, declared: int) -> None:
    async with witnessed(server) as (gateway, _):
        with http2(gateway.address) as connection:
            connection.send_data(connection.call(INFER), message(b"x", declared))
            received = b""
            while b"8" not in received and b"grpc-status" not in received:  # RESOURCE_EXHAUSTED
                received += await asyncio.to_thread(connection.read_some)


async def test_messages_that_arrive_slowly_hold_no_memory_of_others(server: Server) -> None:
    async with witnessed(server) as (gateway, _):
        with ExitStack() as stack:
            for _ in range(40):  # each of which may become 64 MiB
                connection = stack.enter_context(http2(gateway.address))
                connection.send_data(connection.call(INFER), message(b"\x0a", LARGEST))
            await asyncio.sleep(2)  # longer than a message may take before it counts as the largest


async def test_answers_that_nobody_reads_hold_no_memory_of_others(server: Server) -> None:
    token, asked = server.api.token("infer", subject="mallory"), 4 * 2**20
    async with witnessed(server) as (gateway, _):
        with ExitStack() as stack:
            for _ in range(10):  # each of them asks for 16 MiB
                connection = stack.enter_context(http2(gateway.address, window=0))
                request = inference("filled", np.array([asked], np.int64), "count", "INT64")
                stream = connection.call(INFER, token)
                connection.send_data(stream, message(request.SerializeToString()), ends=True)
            await asyncio.sleep(2)


async def test_http1_and_noise_are_disconnected(server: Server) -> None:
    rng = new_dice()
    async with witnessed(server) as (gateway, _):
        host, _, port = gateway.address.rpartition(":")
        for sent in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", *(rng.randbytes(200) for _ in range(20))):
            with socket.create_connection((host, int(port)), timeout=5) as connection, suppress(OSError):
                connection.sendall(sent)
                await asyncio.to_thread(connection.recv, 2**16)


def hostile_messages(rng: Random) -> list[bytes]:
    """Return encoded requests: noise, a mutated valid one, and ones that a decoder takes much memory for."""
    valid = inference("m", X, id="seven").SerializeToString()
    found = [rng.randbytes(rng.randrange(200)) for _ in range(MESSAGES // 2)]
    for _ in range(MESSAGES // 2):
        at = rng.randrange(len(valid))
        found.append(valid[:at] + rng.randbytes(rng.randrange(4)) + valid[at + rng.randrange(3) :])
    deep = b""
    for _ in range(200):  # groups in groups, and a message in a message
        deep = b"\x0b" + deep + b"\x0c"
    nested = b""
    for _ in range(5000):
        nested = b"\x2a" + bytes([len(nested) % 128]) + nested
    empty_inputs, empty_parameters = b"\x2a\x00" * (2**23), b"\x2a\x82\x80\x80\x04" + b"\x22\x00" * 2**22
    return [*found, deep, nested, empty_inputs, empty_parameters]


async def test_malformed_messages_are_refused(server: Server) -> None:
    statuses = set[tuple[str, str]]()
    async with witnessed(server) as (_, client):
        for sent in hostile_messages(new_dice()):
            call: Any = client.channel.unary_unary(INFER)
            metadata = (("authorization", f"Bearer {client.token}"),)
            try:
                await call(sent, metadata=metadata)  # one that is valid still
            except grpc.aio.AioRpcError as error:
                if error.details() != "Internal error from Core":  # the client's, if it has not sent all yet
                    statuses.add((error.code().name, error.details() or ""))
    assert {code for code, _ in statuses} <= {"INVALID_ARGUMENT", "NOT_FOUND"}, statuses


async def test_malformed_messages_of_other_methods_are_refused(server: Server) -> None:
    async with witnessed(server) as (_, client):
        for path in METHODS:
            method: Any = client.channel.unary_unary(path)
            call = partial(method, metadata=(("authorization", "Bearer x"),))
            assert (await refusal(call(b"\xff\xff\xff")))[0] == "INVALID_ARGUMENT"
            if path != CHECK:
                _, metadata = await refusal(call(b"\x0a" + b"\x80\x80\x80\x01" + b"x" * 2**21))
                assert metadata["loadledger-code"] == "body_too_large"


async def test_bombs_of_gzip_are_refused(server: Server) -> None:
    sent = inference("m", np.zeros(LARGEST // 2, np.float32)).SerializeToString()
    async with (
        witnessed(server) as (gateway, _),
        grpc.aio.insecure_channel(gateway.address, compression=grpc.Compression.Gzip) as channel,
    ):
        method: Any = channel.unary_unary(INFER)
        assert (await refusal(method(sent)))[0] == "RESOURCE_EXHAUSTED"
