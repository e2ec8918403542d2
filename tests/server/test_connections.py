"""What a connection may take, tried with raw sockets: heads, time, unread answers, and how many there are."""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.certificates import make_pair
from support.smallapp import route, small_app, small_config
from support.workers import until

from server.config import Config
from server.connections import MAX_FIELDS, MAX_HEAD_BYTES, MAX_LINE_BYTES, Connection, Limits
from server.listening import listening
from server.routes import Access, LimitClass
from server.tls import load_context

LIMIT_S = 30.0
LONG_S = 600.0
LONG_ANSWER = bytes(16 * 2**20)
GET = b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n"


class Client:
    """One end of a raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self) -> bytes:
        """Return all that comes until the server closes the connection."""
        async with asyncio.timeout(LIMIT_S):
            received = b""
            with suppress(ConnectionError):
                while piece := await self.reader.read(2**20):
                    received += piece
            return received

    async def answer(self) -> bytes:
        """Return one answer of those that have a length."""
        async with asyncio.timeout(LIMIT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return head + await self.reader.readexactly(length)

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


Connect = Callable[[], Awaitable[Client]]
Listen = Callable[..., Any]


async def short(_: web.Request) -> web.Response:
    return web.Response(body=b"short")


async def long(_: web.Request) -> web.Response:
    return web.Response(body=LONG_ANSWER)


@pytest.fixture
def limits() -> Limits:
    return Limits(head_s=LONG_S, idle_s=LONG_S, most=100)


@asynccontextmanager
async def connecting(
    folder: Path, limits: Limits, context: ssl.SSLContext | None = None
) -> AsyncIterator[Connect]:
    """Serve two routes within these limits, and give what connects to them."""
    public: dict[str, Any] = {"access": Access.PUBLIC, "limit": LimitClass.NONE}
    routes = [route("/short", short, **public), route("/long", long, **public)]
    runner = web.AppRunner(small_app(routes, small_config(folder / "data")), access_log=None)
    await runner.setup()
    clients = list[Client]()
    assert runner.server is not None
    try:
        async with listening(runner.server, "127.0.0.1", 0, limits, context) as port:

            async def connect() -> Client:
                with socket.socket() as made:  # of which little is kept by the kernel
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
                    made.setblocking(False)
                    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
                    client = Client(*await asyncio.open_connection(sock=made.dup(), limit=2**16))
                clients.append(client)
                return client

            yield connect
    finally:
        for client in clients:
            await client.close()
        await runner.cleanup()
    assert not limits.open
    assert not limits.handshakes


def problem(answer: bytes) -> tuple[int, str]:
    """Return status and code of an answer that tells a problem."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, told = int(head.split()[1]), json.loads(body)
    assert b"content-type: application/problem+json" in head.lower()
    assert head.startswith(b"HTTP/1.0 ") or b"\r\nConnection: close" in head
    assert b"\r\nServer: loadledger" in head
    assert told["status"] == status
    return status, told["code"]


def fields(count: int, length: int = 1) -> bytes:
    return b"".join(b"F%d: %s\r\n" % (number, b"v" * length) for number in range(count))


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
    limits.head_s = 0.2
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
    limits.head_s = 0.1
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        client.send(GET)
        await client.answer()
        client.send(GET[:-2])
        assert problem(await client.rest()) == (408, "head_timeout")


async def test_a_connection_is_kept_as_long_between_requests_as_it_may_be_idle(
    tmp_path: Path, limits: Limits
) -> None:
    limits.head_s, limits.idle_s = 0.05, 0.5
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
        sent_s = time.monotonic()
        client.send(GET)
        await client.answer()
        assert await client.rest() == b""
        assert time.monotonic() - sent_s > 0.4  # not the limit for heads: it has begun none


async def test_a_body_may_take_longer_than_a_head(tmp_path: Path, limits: Limits) -> None:
    limits.head_s = 0.1
    async with connecting(tmp_path, limits) as connect:
        client = await connect()
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


async def test_one_connection_too_many_is_refused_and_told_so_and_room_is_used_again(
    tmp_path: Path, limits: Limits
) -> None:
    limits.most = 2
    async with connecting(tmp_path, limits) as connect:
        first, second = await connect(), await connect()
        for client in (first, second):
            client.send(GET)
            await client.answer()
        third = await connect()
        refused = await third.rest()
        assert problem(refused) == (503, "too_many_connections")
        assert b"Retry-After: 1\r\n" in refused
        await first.close()
        await until(lambda: len(limits.open) == 1)
        fourth = await connect()
        fourth.send(GET)
        assert (await fourth.answer()).startswith(b"HTTP/1.1 200 OK")


async def test_who_never_ends_a_handshake_counts_as_a_connection(tmp_path: Path, limits: Limits) -> None:
    limits.most = 2
    pair, files = make_pair(), (tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.write(*files)
    async with connecting(tmp_path, limits, load_context(*files)) as connect:
        silent, babbling = await connect(), await connect()
        await until(lambda: len(limits.handshakes) == limits.most)
        assert await (await connect()).rest() == b""  # there is no way to tell why
        babbling.send(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in await babbling.rest()
        client = await connect()
        await client.writer.start_tls(pair.trusting(), server_hostname="localhost")
        client.send(GET)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 OK")
        assert (len(limits.open), len(limits.handshakes)) == (1, 1)
        await silent.close()
        await until(lambda: not limits.handshakes)


def test_connections_leave_descriptors_to_the_models_and_the_ledger(tmp_path: Path) -> None:
    config = Config(repository=tmp_path, data=tmp_path, max_connections=7)
    assert Limits.of(config).most == 7
    many = Limits.of(Config(repository=tmp_path, data=tmp_path, max_connections=1_000_000))
    assert 1 <= many.most <= 1_000_000
    assert issubclass(Connection, web.RequestHandler)
