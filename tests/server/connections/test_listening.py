"""The connection limit, its reserve for probes, TLS handshakes and shutdown, tried with raw sockets."""

import asyncio
import socket
from pathlib import Path

import pytest
from aiohttp import web
from support.certificates import make_pair
from support.rawconnections import GET, LONG_ANSWER, LONG_S, PROBE, Client, connecting, problem, roomy
from support.workers import until

from server.config import Config
from server.connections.connection import RESERVE, ConnectionLimits, listening
from server.connections.tls import load_context

POST = b"POST /short HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)


async def answered(client: Client, sent: bytes = GET) -> bool:
    """Send a request and say whether it was answered well."""
    client.send(sent)
    return (await client.answer()).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "sent",
    [GET, POST, PROBE.replace(b"GET", b"POST"), PROBE.replace(b"live", b"x")],
    ids=["request", "body", "method", "path"],
)
async def test_connection_beyond_the_limit_is_refused_until_another_ends(tmp_path: Path, sent: bytes) -> None:
    limits = roomy(2)
    async with connecting(tmp_path, limits) as connect:
        first, second = await connect(), await connect()
        assert await answered(first)
        assert await answered(second)
        third = await connect()
        third.send(sent)
        refused = await third.rest()
        assert problem(refused) == (503, "too_many_connections")
        assert b"Retry-After: 1\r\n" in refused
        await first.close()
        await until(lambda: len(limits.open) == 1)
        assert await answered(await connect())


@pytest.mark.parametrize(
    "probe",
    [PROBE, PROBE.replace(b" HTTP", b"?verbose HTTP"), PROBE.replace(b"GET", b"HEAD")],
    ids=["plain", "query", "head"],
)
async def test_reserve_answers_one_probe_per_connection(tmp_path: Path, probe: bytes) -> None:
    async with connecting(tmp_path, roomy(0)) as connect:
        for _ in range(3):
            client = await connect()
            client.send(probe + probe)
            told = await client.rest()
            assert told.startswith(b"HTTP/1.1 200 OK")
            assert b"\r\nConnection: close" in told
            assert told.count(b"HTTP/1.1") == 1


async def test_reserve_has_a_shorter_head_timeout(tmp_path: Path) -> None:
    async with connecting(tmp_path, roomy(0, reserve_head_s=0.05)) as connect:
        for sent in (b"", PROBE[:-2]):
            client = await connect()
            client.send(sent)
            assert problem(await client.rest()) == (503, "too_many_connections")


async def test_connection_beyond_the_reserve_is_refused_at_once(tmp_path: Path) -> None:
    limits = roomy(0, reserve=1, reserve_head_s=LONG_S)
    async with connecting(tmp_path, limits) as connect:
        silent = await connect()
        await until(lambda: len(limits.open) == 1)
        assert problem(await (await connect()).rest()) == (503, "too_many_connections")
        await silent.close()
        await until(lambda: not limits.open)
        assert await answered(await connect(), PROBE)


def test_limits_leave_descriptors_to_models_and_ledger(tmp_path: Path) -> None:
    few = ConnectionLimits.of(Config(repository=tmp_path, data=tmp_path, max_connections=7))
    assert few.most == 7
    assert 1 <= few.reserve <= RESERVE
    many = ConnectionLimits.of(Config(repository=tmp_path, data=tmp_path, max_connections=1_000_000))
    assert 1 <= many.most <= 1_000_000


# TLS


async def test_unfinished_tls_handshake_is_ended_in_time(tmp_path: Path) -> None:
    pair, files = make_pair(), (tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.write(*files)
    async with connecting(tmp_path, roomy(head_s=1.0), load_context(*files)) as connect:
        silent, babbling = await connect(), await connect()
        babbling.send(GET)
        assert await silent.rest() == b""
        assert b"HTTP" not in await babbling.rest()


async def test_limits_hold_over_tls(tmp_path: Path) -> None:
    pair, files = make_pair(), (tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.write(*files)
    limits = roomy(1)
    async with connecting(tmp_path, limits, load_context(*files)) as connect:

        async def shake() -> Client:
            client = await connect()
            await client.writer.start_tls(pair.trusting(), server_hostname="localhost")
            return client

        first = await shake()
        assert await answered(first)
        assert await answered(await shake(), PROBE)
        refused = await shake()
        refused.send(GET)
        assert problem(await refused.rest()) == (503, "too_many_connections")
        limits.head_s = 0.1
        first.send(GET[:-2])
        assert problem(await first.rest()) == (408, "head_timeout")


@pytest.mark.parametrize("end", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
async def test_client_that_does_not_read_over_tls_is_disconnected(tmp_path: Path, end: bytes) -> None:
    pair, files = make_pair(), (tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.write(*files)
    limits = roomy(unread_s=0.1, idle_s=0.5, closing_s=0.1)
    async with connecting(tmp_path, limits, load_context(*files)) as connect:
        client = await connect()
        await client.writer.start_tls(pair.trusting(), server_hostname="localhost")
        client.send(b"GET /long HTTP/1.1\r\nHost: a\r\n" + end + b"\r\n")
        await until(lambda: bool(limits.open))
        await until(lambda: not limits.open)
        assert len(await client.rest()) < len(LONG_ANSWER)


# Shutdown


async def test_shutdown_closes_idle_connections_and_lets_running_requests_end() -> None:
    began, done = asyncio.Event(), asyncio.Event()

    async def wait(_: web.BaseRequest) -> web.Response:
        began.set()
        await done.wait()
        return web.Response(body=b"done")

    limits = roomy()
    runner = web.ServerRunner(web.Server(wait), shutdown_timeout=LONG_S)
    await runner.setup()
    assert runner.server is not None
    async with listening(runner.server, "127.0.0.1", 0, limits) as port:
        idle = Client(*await asyncio.open_connection("127.0.0.1", port))
        busy = Client(*await asyncio.open_connection("127.0.0.1", port))
        busy.send(GET)
        await began.wait()
    ending = asyncio.create_task(runner.cleanup())
    assert await idle.rest() == b""
    done.set()
    assert (await busy.rest()).endswith(b"done")
    await ending
    assert not limits.open
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    for client in (idle, busy):
        await client.close()
