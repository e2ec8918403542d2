"""The limits of one connection, tried with raw sockets: heads, time, malformed HTTP, unread responses."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from support.rawconnections import (
    GET,
    LIMIT_S,
    LONG_ANSWER,
    LONG_S,
    Client,
    Connect,
    connecting,
    fields,
    problem,
    roomy,
)
from support.workers import until

from server.connections.bodies import Bodies
from server.connections.connection import ConnectionLimits
from server.connections.direct import DirectResponse
from server.connections.refusals import MAX_FIELDS, MAX_HEAD_BYTES, MAX_LINE_BYTES

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


async def test_large_requests_within_limits_are_answered(tmp_path: Path, limits: ConnectionLimits) -> None:
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
async def test_malformed_or_too_large_head_gets_the_one_error_body(
    tmp_path: Path, limits: ConnectionLimits, sent: bytes, expected: tuple[int, str]
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(sent)
        assert problem(await client.rest()) == expected


async def test_malformed_request_is_refused_after_the_response_before_it(
    tmp_path: Path, limits: ConnectionLimits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET_LONG)
        await until(is_writing_paused(limits))
        client.send(b"nonsense\r\n\r\n")
        assert len(await client.answer()) > len(LONG_ANSWER)
        assert problem(await client.rest()) == (400, "invalid_request")


async def test_silent_connection_is_closed_without_a_word(tmp_path: Path) -> None:
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


async def test_unfinished_second_head_is_refused_in_time(tmp_path: Path, limits: ConnectionLimits) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect_in_a_hurry(connect, limits, 0.1)
        client.send(GET[:-2])
        assert problem(await client.rest()) == (408, "head_timeout")


async def test_head_begun_with_the_request_before_it_has_its_time_from_its_next_byte(
    tmp_path: Path, limits: ConnectionLimits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET + GET[:-4])
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        limits.head_s = 0.1
        client.send(b"\r\nA")
        assert problem(await client.rest()) == (408, "head_timeout")


async def test_head_begun_with_the_request_before_it_ends_with_the_idle_timeout(tmp_path: Path) -> None:
    async with connecting(tmp_path, roomy(idle_s=0.2)) as connect:
        client = await connect()
        client.send(GET + GET[:-2])
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        assert await client.rest() == b""


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


async def test_empty_lines_between_requests_begin_no_head(tmp_path: Path) -> None:
    limits = roomy(idle_s=0.5)
    async with connecting(tmp_path, limits) as connect:
        client = await connect_in_a_hurry(connect, limits, 0.05)
        client.send(b"\r\n")
        assert await client.rest() == b""  # by the idle timeout: no 408


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


async def test_unread_body_is_no_head_however_long_it_is(tmp_path: Path, limits: ConnectionLimits) -> None:
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


async def test_idle_connection_is_kept_for_the_idle_timeout(tmp_path: Path) -> None:
    limits = roomy(idle_s=0.5)
    async with connecting(tmp_path, limits) as connect:
        sent_s = time.monotonic()
        client = await connect_in_a_hurry(connect, limits, 0.05)
        assert await client.rest() == b""
        assert time.monotonic() - sent_s > 0.4  # not the limit for heads: it has begun none


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
async def test_client_that_does_not_read_is_disconnected(tmp_path: Path, end: bytes) -> None:
    limits = roomy(unread_s=0.1)
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET_LONG[:-2] + end + b"\r\n")
        await until(is_writing_paused(limits))
        await until(lambda: not limits.open)
        assert len(await client.rest()) < len(LONG_ANSWER)


async def test_client_that_does_not_read_the_end_of_the_last_response_is_disconnected(tmp_path: Path) -> None:
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


async def test_unread_direct_response_is_cut_off_and_its_memory_given_back(tmp_path: Path) -> None:
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
