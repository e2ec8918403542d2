"""Slow-client protection and the connection limit, tested with raw sockets, over TCP and TLS."""

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from support.connections import (
    GET,
    LIMIT_S,
    LONG_ANSWER,
    LONG_S,
    PROBE,
    Client,
    Connect,
    connecting,
    fields,
    make_pair,
    problem,
    roomy,
)
from support.workers import until

from server.config import Config
from server.http.connection import RESERVE, ConnectionLimits, listening
from server.http.limits import Bodies
from server.http.responses import MAX_FIELDS, MAX_HEAD_BYTES, MAX_LINE_BYTES, DirectResponse
from server.http.tls import load_context

GET_LONG = GET.replace(b"/short", b"/long")


@pytest.fixture
def limits() -> ConnectionLimits:
    return roomy()


def is_writing_paused(limits: ConnectionLimits) -> Callable[[], bool]:
    return lambda: any(each.is_writing_paused for each in limits.open)


async def connect_in_a_hurry(connect: Connect, limits: ConnectionLimits, head_s: float) -> Client:
    """Send a first request, and only then set the limit: a slow machine would be late with that one."""
    client = await connect()
    client.send(GET)
    assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
    limits.head_s = head_s
    return client


# Heads


async def test_large_head_within_limits_is_answered(tmp_path: Path, limits: ConnectionLimits) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        target = b"/short?" + b"q" * (MAX_LINE_BYTES - 100)
        client.send(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n" + fields(MAX_FIELDS - 10, 100))
        client.send(b"Long: " + b"v" * (MAX_LINE_BYTES - 100) + b"\r\n\r\n")
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        client.send(GET)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET /" + b"q" * (MAX_LINE_BYTES + 10) + b" HTTP/1.1\r\n\r\n", (414, "target_too_long")),
        (b"GET / HTTP/1.1\r\nA: " + b"v" * (MAX_LINE_BYTES + 10) + b"\r\n\r\n", (431, "head_too_large")),
        (b"GET / HTTP/1.1\r\n" + b"v" * (MAX_LINE_BYTES + 10) + b": v\r\n\r\n", (431, "head_too_large")),
        (b"GET / HTTP/1.1\r\n" + fields(MAX_FIELDS + 10) + b"\r\n", (431, "head_too_large")),
        (b"GET / HTTP/1.1\r\n" + fields(20, 4000), (431, "head_too_large")),
        (b"GET / HTTP/1.1\r\nA b: c\r\n\r\n", (400, "invalid_request")),
        (b"nonsense\r\n\r\n", (400, "invalid_request")),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS\r\n\r\n", (400, "invalid_request")),
        (b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", (400, "invalid_request")),
        (GET + b"nonsense\r\n\r\n", (400, "invalid_request")),  # the first was not run, so nothing is lost
    ],
    ids=["target", "value", "name", "fields", "endless", "field", "nonsense", "tls", "length", "second"],
)
async def test_malformed_or_too_large_head_is_refused(
    tmp_path: Path, limits: ConnectionLimits, sent: bytes, expected: tuple[int, str]
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(sent)
        assert problem(await client.rest()) == expected


async def test_malformed_request_is_refused_after_the_previous_response(
    tmp_path: Path, limits: ConnectionLimits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET_LONG)
        await until(is_writing_paused(limits))
        client.send(b"nonsense\r\n\r\n")
        assert len(await client.answer()) > len(LONG_ANSWER)
        assert problem(await client.rest()) == (400, "invalid_request")


async def test_silent_connection_is_closed(tmp_path: Path) -> None:
    async with connecting(tmp_path, roomy(head_s=0.05)) as connect:
        assert await (await connect()).rest() == b""


async def test_trickling_head_is_refused_in_time(tmp_path: Path) -> None:
    async with connecting(tmp_path, roomy(head_s=1.0)) as connect:
        client = await connect()
        rest = asyncio.create_task(client.rest())
        client.send(b"GET / HTTP/1.1\r\n")
        while not rest.done():
            client.send(b"A: b\r\n")
            await asyncio.sleep(0.02)
        assert problem(await rest) == (408, "head_timeout")


@pytest.mark.parametrize(
    ("first", "second"),
    [(GET, GET[:-2]), (GET + GET[:-4], b"\r\nA")],
    ids=["begun after the response", "begun with the request"],
)
async def test_unfinished_second_head_is_refused_in_time(
    tmp_path: Path, limits: ConnectionLimits, first: bytes, second: bytes
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(first)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        limits.head_s = 0.1
        client.send(second)
        assert problem(await client.rest()) == (408, "head_timeout")


@pytest.mark.parametrize("sent", [GET + GET[:-2], GET, GET + b"\r\n"], ids=["head", "nothing", "empty line"])
async def test_idle_timeout_closes_the_connection(tmp_path: Path, sent: bytes) -> None:
    limits = roomy(idle_s=0.5)
    async with connecting(tmp_path, limits) as connect:
        sent_s = time.monotonic()
        client = await connect()
        client.send(sent)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        limits.head_s = 0.05
        assert await client.rest() == b""
        assert time.monotonic() - sent_s > 0.4  # not the head timeout: there is no 408


async def test_head_begun_during_another_request_can_end_after_it(
    tmp_path: Path, limits: ConnectionLimits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET_LONG)
        await until(is_writing_paused(limits))
        client.send(GET[:-2])
        assert len(await client.answer()) > len(LONG_ANSWER)
        client.send(GET[-2:])
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


async def test_pipelined_requests_are_all_answered(tmp_path: Path, limits: ConnectionLimits) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET_LONG)
        await until(is_writing_paused(limits))
        count = 60
        client.send((b"GET /short HTTP/1.1\r\nHost: a\r\n" + fields(6, 8000) + b"\r\n") * count)
        assert len(await client.answer()) > len(LONG_ANSWER)
        for _ in range(count):
            assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


# Bodies and upgrades


async def test_unread_body_is_not_counted_as_head(tmp_path: Path, limits: ConnectionLimits) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        length = 4 * MAX_HEAD_BYTES
        client.send(b"GET /short HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        client.send(bytes(length) + GET)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


async def test_body_may_take_longer_than_a_head(tmp_path: Path, limits: ConnectionLimits) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect_in_a_hurry(connect, limits, 0.1)
        client.send(b"GET /short HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\na")
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        for sent in (b"b", b"c" + GET):  # aiohttp reads on after a response, for a while
            await asyncio.sleep(0.3)
            client.send(sent)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


async def test_requests_after_a_declined_upgrade_have_the_same_limits(
    tmp_path: Path, limits: ConnectionLimits
) -> None:
    upgrade = b"GET /short HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    length = 4 * MAX_HEAD_BYTES
    sized = b"GET /short HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        for sent in (upgrade, sized, bytes(length) + upgrade):
            client.send(sent)
            assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        limits.head_s = 0.1
        client.send(GET[:-2])
        assert problem(await client.rest()) == (408, "head_timeout")


# Idle connections and unread responses


async def test_handler_may_take_longer_than_a_head(tmp_path: Path, limits: ConnectionLimits) -> None:
    done = asyncio.Event()

    async def wait(_: web.Request) -> web.Response:
        await done.wait()
        return web.Response(body=b"done")

    async with connecting(tmp_path, limits, others={"/wait": wait}) as connect:
        client = await connect_in_a_hurry(connect, limits, 0.05)
        client.send(GET.replace(b"/short", b"/wait") + GET[:-2])
        await asyncio.sleep(0.3)
        done.set()
        assert (await client.answer()).endswith(b"done")


@pytest.mark.parametrize("end", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
@pytest.mark.parametrize("over_tls", [False, True], ids=["tcp", "tls"])
async def test_client_that_does_not_read_is_disconnected(
    tmp_path: Path,
    end: bytes,
    over_tls: bool,  # noqa: FBT001
) -> None:
    pair, context = make_pair(), None
    if over_tls:
        pair.write(tmp_path / "cert.pem", tmp_path / "key.pem")
        context = load_context(tmp_path / "cert.pem", tmp_path / "key.pem")
    limits = roomy(unread_s=0.1, idle_s=0.5, closing_s=0.1)
    async with connecting(tmp_path, limits, context) as connect:
        client = await connect()
        if over_tls:
            await client.writer.start_tls(pair.trusting(), server_hostname="localhost")
        client.send(GET_LONG[:-2] + end + b"\r\n")
        await until(lambda: bool(limits.open))
        await until(lambda: not limits.open)
        assert len(await client.rest()) < len(LONG_ANSWER)


async def test_client_that_does_not_read_the_end_is_disconnected(tmp_path: Path) -> None:
    async def last(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.set_write_buffer_limits(2 * len(LONG_ANSWER))  # so that writing never pauses
        return web.Response(body=LONG_ANSWER)

    limits = roomy(unread_s=0.1)
    async with connecting(tmp_path, limits, others={"/last": last}) as connect:
        client = await connect()
        client.send(b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        await until(lambda: bool(limits.open))
        await until(lambda: not limits.open)
        assert len(await client.rest()) < len(LONG_ANSWER)


async def test_slow_reader_gets_all_of_a_long_response(tmp_path: Path) -> None:
    async with connecting(tmp_path, roomy(unread_s=5)) as connect:
        client = await connect()
        client.send(GET_LONG[:-2] + b"Connection: close\r\n\r\n")
        received = 0
        async with asyncio.timeout(LIMIT_S):
            while piece := await client.reader.read(2**20):
                received += len(piece)
                await asyncio.sleep(0.001)
        assert received > len(LONG_ANSWER)


async def test_unread_fast_response_gives_back_its_memory(tmp_path: Path) -> None:
    bodies = Bodies(2**30)

    async def direct(_: web.Request) -> web.StreamResponse:
        return DirectResponse({}, [LONG_ANSWER], bodies.share("alice"))

    limits = roomy(unread_s=LONG_S)
    async with connecting(tmp_path, limits, others={"/direct": direct}) as connect:
        client = await connect()
        client.send(GET.replace(b"/short", b"/direct"))
        await until(lambda: bodies.taken_bytes == len(LONG_ANSWER))
        limits.unread_s = 0.1
        await until(lambda: bodies.taken_bytes == 0)
        assert len(await client.rest()) < len(LONG_ANSWER)


# The connection limit

POST = b"POST /short HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)


async def answered(client: Client, sent: bytes = GET) -> bool:
    """Send a request and return whether it is answered with 200."""
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
            answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"\r\nConnection: close" in answer
            assert answer.count(b"HTTP/1.1") == 1


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


def test_limit_leaves_descriptors_to_models_and_ledger(tmp_path: Path) -> None:
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


# Shutdown


async def test_shutdown_closes_idle_connections_only() -> None:
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
