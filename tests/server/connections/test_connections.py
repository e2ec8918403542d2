"""What a connection may take, tried with raw sockets: heads, time, and unread answers."""

import asyncio
import time
from pathlib import Path

import pytest
from support.rawconnections import (
    GET,
    LIMIT_S,
    LONG_ANSWER,
    Client,
    Connect,
    connecting,
    fields,
    problem,
    roomy,
)
from support.workers import until

from server.connections.connection import Limits
from server.connections.refusals import MAX_FIELDS, MAX_HEAD_BYTES, MAX_LINE_BYTES


@pytest.fixture
def limits() -> Limits:
    return roomy()


async def in_a_hurry(connect: Connect, limits: Limits, head_s: float) -> Client:
    """Connect, and only then let heads take no longer: a slow machine would be late with the first one."""
    client = await connect()
    await until(lambda: bool(limits.open))
    limits.head_s = head_s
    return client


async def test_what_is_sent_within_the_limits_is_answered(tmp_path: Path, limits: Limits) -> None:
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
        (b"GET / HTTP/1.1\r\nA b: c\r\n\r\n", (400, "invalid_request")),
        (b"nonsense\r\n\r\n", (400, "invalid_request")),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS\r\n\r\n", (400, "invalid_request")),
        (b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", (400, "invalid_request")),
    ],
    ids=["target", "value", "name", "fields", "field", "nonsense", "handshake", "length"],
)
async def test_what_is_no_request_or_too_large_a_head_is_told_in_the_shape_of_all_errors(
    tmp_path: Path, limits: Limits, sent: bytes, expected: tuple[int, str]
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(sent)
        assert problem(await client.rest()) == expected


async def test_a_head_that_does_not_end_is_refused_when_it_is_too_long_to_be_kept(
    tmp_path: Path, limits: Limits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(b"GET / HTTP/1.1\r\n" + fields(20, 4000))
        assert MAX_HEAD_BYTES < 20 * 4000
        assert problem(await client.rest()) == (431, "head_too_large")


async def test_who_connects_and_sends_nothing_is_let_go_without_a_word(
    tmp_path: Path, limits: Limits
) -> None:
    limits.head_s = 0.05
    async with connecting(tmp_path, limits) as connect:
        assert await (await connect()).rest() == b""


async def test_a_head_that_trickles_in_is_not_waited_for(tmp_path: Path, limits: Limits) -> None:
    limits.head_s = 1.0  # from when it connects
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        rest = asyncio.create_task(client.rest())
        client.send(b"GET / HTTP/1.1\r\n")
        while not rest.done():
            client.send(b"A: b\r\n")
            await asyncio.sleep(0.02)
        assert problem(await rest) == (408, "head_timeout")


async def test_the_head_of_a_second_request_has_to_come_in_time_as_the_first(
    tmp_path: Path, limits: Limits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await in_a_hurry(connect, limits, 0.1)
        client.send(GET)
        await client.answer()
        client.send(GET[:-2])
        assert problem(await client.rest()) == (408, "head_timeout")


async def test_a_head_that_came_in_part_with_the_request_before_it_has_to_end_in_time(
    tmp_path: Path, limits: Limits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await in_a_hurry(connect, limits, 0.1)
        client.send(GET + GET[:-2])
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        assert problem(await client.rest()) == (408, "head_timeout")


async def test_a_head_that_was_begun_during_another_request_has_its_time_from_the_end_of_that(
    tmp_path: Path, limits: Limits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await in_a_hurry(connect, limits, 0.1)
        client.send(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(each.writing_paused for each in limits.open))
        (connection,) = limits.open
        client.send(GET[:-2])
        await until(lambda: connection._head_bytes > 0)
        assert len(await client.answer()) > len(LONG_ANSWER)
        assert problem(await client.rest()) == (408, "head_timeout")


async def test_a_head_that_was_begun_during_another_request_can_end_after_it(
    tmp_path: Path, limits: Limits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET + GET[:-2])
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        client.send(GET[-2:])
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


async def test_too_long_a_head_during_another_request_ends_the_connection_after_its_answer(
    tmp_path: Path, limits: Limits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(each.writing_paused for each in limits.open))
        (connection,) = limits.open
        client.send(b"GET / HTTP/1.1\r\n" + fields(20, 4000))
        await until(lambda: connection._head_bytes > MAX_HEAD_BYTES)
        assert len(await client.answer()) > len(LONG_ANSWER)
        assert await client.rest() == b""


async def test_empty_lines_between_requests_begin_no_head(tmp_path: Path, limits: Limits) -> None:
    limits.idle_s = 0.5
    async with connecting(tmp_path, limits) as connect:
        client = await in_a_hurry(connect, limits, 0.05)
        client.send(GET)
        await client.answer()
        client.send(b"\r\n")
        assert await client.rest() == b""  # of what is idle, not 408


async def test_a_body_that_nobody_reads_is_no_head_however_long_it_is(tmp_path: Path, limits: Limits) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        length = 4 * MAX_HEAD_BYTES
        client.send(b"GET /short HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        client.send(bytes(length) + GET)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


async def test_what_follows_a_wish_for_another_protocol_is_requests_with_bodies_and_heads_in_time(
    tmp_path: Path, limits: Limits
) -> None:
    wish = b"GET /short HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    length = 4 * MAX_HEAD_BYTES
    sized = b"GET /short HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(wish + sized)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        client.send(bytes(length))
        client.send(wish)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        limits.head_s = 0.1
        client.send(GET[:-2])
        assert problem(await client.rest()) == (408, "head_timeout")


async def test_a_request_that_comes_in_one_piece_with_what_is_no_http_is_refused_with_it(
    tmp_path: Path, limits: Limits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET + b"nonsense\r\n\r\n")
        assert problem(await client.rest()) == (400, "invalid_request")  # it was not run, so nothing is lost


async def test_a_request_under_way_is_answered_before_what_is_no_http(tmp_path: Path, limits: Limits) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(each.writing_paused for each in limits.open))
        client.send(b"nonsense\r\n\r\n")
        assert len(await client.answer()) > len(LONG_ANSWER)
        assert problem(await client.rest()) == (400, "invalid_request")


async def test_a_connection_is_kept_as_long_between_requests_as_it_may_be_idle(
    tmp_path: Path, limits: Limits
) -> None:
    limits.idle_s = 0.5
    async with connecting(tmp_path, limits) as connect:
        client = await in_a_hurry(connect, limits, 0.05)
        sent_s = time.monotonic()
        client.send(GET)
        await client.answer()
        assert await client.rest() == b""
        assert time.monotonic() - sent_s > 0.4  # not the limit for heads: it has begun none


async def test_a_body_may_take_longer_than_a_head(tmp_path: Path, limits: Limits) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await in_a_hurry(connect, limits, 0.1)
        client.send(b"GET /short HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\na")
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        await asyncio.sleep(0.3)  # the framework reads on, for a while
        client.send(b"bc" + GET)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


async def test_who_does_not_read_a_long_answer_is_let_go(tmp_path: Path, limits: Limits) -> None:
    limits.unread_s = 0.1
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(each.writing_paused for each in limits.open))
        await until(lambda: not limits.open)
        assert len(await client.rest()) < len(LONG_ANSWER)


async def test_requests_that_wait_for_their_turn_are_few_and_all_answered(
    tmp_path: Path, limits: Limits
) -> None:
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(each.writing_paused for each in limits.open))
        (connection,) = limits.open
        count = 60
        client.send((b"GET /short HTTP/1.1\r\nHost: a\r\n" + fields(6, 8000) + b"\r\n") * count)
        await until(lambda: connection._buffer_paused)
        assert len(connection._messages) < 10  # the next ones stay with the kernel, and with who sends them
        assert len(await client.answer()) > len(LONG_ANSWER)
        for _ in range(count):
            assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")


async def test_who_reads_a_long_answer_slowly_gets_all_of_it(tmp_path: Path, limits: Limits) -> None:
    limits.unread_s = 5
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(b"GET /long HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        received = 0
        async with asyncio.timeout(LIMIT_S):
            while piece := await client.reader.read(2**20):
                received += len(piece)
                await asyncio.sleep(0.001)
        assert received > len(LONG_ANSWER)


async def test_who_does_not_read_the_last_of_it_keeps_no_connection(tmp_path: Path, limits: Limits) -> None:
    limits.closing_s = 0.1
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(each.writing_paused for each in limits.open))
        for connection in tuple(limits.open):
            connection.force_close()
        await until(lambda: not limits.open)
        assert len(await client.rest()) < len(LONG_ANSWER)
