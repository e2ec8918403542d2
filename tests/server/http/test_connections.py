"""Slow-client protection and the connection limit, tested with raw sockets, over TCP and TLS."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
    Pair,
    SmallServer,
    make_pair,
    problem,
    small_server,
)
from support.workers import until

from runtime.memory import MemoryLimit
from runtime.memoryplan import plan_memory
from server.config import Config
from server.http.bodies import Bodies
from server.http.connection import ARRIVED_NS, RESERVE, ConnectionLimits, bind_address, listening
from server.http.responses import MAX_FIELDS, MAX_HEAD_BYTES, MAX_LINE_BYTES, DirectResponse
from server.http.tls import load_context

GET_LONG = GET.replace(b"/short", b"/long")
INVALID, TOO_LARGE = (400, "invalid_request"), (431, "head_too_large")
UNKNOWN_VERSION, UNKNOWN_CODING = (505, "unknown_http_version"), (501, "unknown_transfer_coding")
HEAD_TIMEOUT, TOO_MANY = (408, "head_timeout"), (503, "too_many_connections")
LONG_BODY = 4 * MAX_HEAD_BYTES


@pytest.fixture
async def server() -> AsyncIterator[SmallServer]:
    async with small_server() as server:
        yield server


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


@pytest.fixture
def tls(tmp_path: Path, pair: Pair) -> ssl.SSLContext:
    pair.write(cert := tmp_path / "cert.pem", key := tmp_path / "key.pem")
    return load_context(cert, key)


def fields(count: int, length: int = 1) -> bytes:
    return b"".join(b"F%d: %s\r\n" % (number, b"v" * length) for number in range(count))


def get(*lines: bytes) -> bytes:
    """Return a GET with these header fields."""
    return b"\r\n".join([b"GET /short HTTP/1.1", b"Host: a", *lines, b"", b""])


def sized(length: int) -> bytes:
    """Return the head of a request with so long a body."""
    return get(b"Content-Length: %d" % length)


async def begin_long(client: Client, server: SmallServer) -> None:
    """Request a long response, and leave it unread."""
    client.send(GET_LONG)
    await until(lambda: any(each.is_writing_paused for each in server.limits.open))


async def receive_long(client: Client) -> None:
    assert len(await client.answer()) > len(LONG_ANSWER)


async def disconnected(client: Client, server: SmallServer) -> None:
    """Wait until the server has disconnected a client amid a response."""
    await until(lambda: bool(server.limits.open))
    await until(lambda: not server.limits.open)
    assert len(await client.rest()) < len(LONG_ANSWER)


async def test_large_head_within_limits_is_answered(server: SmallServer) -> None:
    client = await server.connect()
    client.send(b"GET /short?" + b"q" * (MAX_LINE_BYTES - 100) + b" HTTP/1.1\r\nHost: a\r\n")
    client.send(fields(MAX_FIELDS - 10, 100))
    await client.get(b"Long: " + b"v" * (MAX_LINE_BYTES - 100) + b"\r\n\r\n")
    await client.get()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET /" + b"q" * (MAX_LINE_BYTES + 10) + b" HTTP/1.1\r\n\r\n", (414, "target_too_long")),
        (get(b"A: " + b"v" * (MAX_LINE_BYTES + 10)), TOO_LARGE),
        (get(b"v" * (MAX_LINE_BYTES + 10) + b": v"), TOO_LARGE),
        (get(fields(MAX_FIELDS + 10)), TOO_LARGE),
        (b"GET / HTTP/1.1\r\n" + fields(20, 4000), TOO_LARGE),
        (get(b"A b: c"), INVALID),
        (b"nonsense\r\n\r\n", INVALID),
        (b"GET http://[::1/ HTTP/1.1\r\n\r\n", INVALID),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS\r\n\r\n", INVALID),
        (sized(-1), INVALID),
        (GET + b"nonsense\r\n\r\n", INVALID),  # the first was not run, so nothing is lost
        (GET.replace(b"1.1", b"0.9"), UNKNOWN_VERSION),
        (GET.replace(b"1.1", b"2.0"), UNKNOWN_VERSION),
        (get(b"Transfer-Encoding: gzip, chunked") + b"5\r\nhello\r\n0\r\n\r\n" + GET, UNKNOWN_CODING),
    ],
    ids=[
        "target", "value", "name", "fields", "endless", "field", "text", "url", "tls", "length", "second",
        "0.9", "2.0", "coding",
    ],
)  # fmt: skip
async def test_head_that_is_not_understood_is_refused_once(
    server: SmallServer, sent: bytes, expected: tuple[int, str]
) -> None:
    """In a version of HTTP that the server speaks, whatever follows."""
    client = await server.connect()
    client.send(sent)
    answer = await client.rest()
    assert problem(answer) == expected
    assert answer.startswith(b"HTTP/1.")
    assert answer.count(b"Content-Length: ") == 1


CHUNKED, LENGTH = b"Transfer-Encoding: chunked", b"Content-Length: 5"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([b"Transfer-Encoding: gzip, chunked"], UNKNOWN_CODING),
        ([b"Transfer-Encoding: chunked, chunked"], UNKNOWN_CODING),
        ([b"Transfer-Encoding: ,chunked"], UNKNOWN_CODING),
        ([b"Transfer-Encoding: chunked, gzip"], UNKNOWN_CODING),
        ([b"Transfer-Encoding: chunked;q=1"], UNKNOWN_CODING),
        ([b"Transfer-Encoding: xchunked"], UNKNOWN_CODING),
        ([b"Transfer-Encoding: identity"], UNKNOWN_CODING),
        ([b"Transfer-Encoding:"], UNKNOWN_CODING),
        ([CHUNKED, CHUNKED], UNKNOWN_CODING),
        ([b"Transfer-Encoding: identity", CHUNKED], UNKNOWN_CODING),
        ([CHUNKED, b"Transfer-Encoding: identity"], UNKNOWN_CODING),
        ([CHUNKED, LENGTH], INVALID),
        ([LENGTH, b"Transfer-Encoding: identity"], INVALID),
        ([b"Transfer-Encoding : chunked"], INVALID),
        ([b"Transfer-Encoding: \x0bchunked"], INVALID),
        ([b"Transfer-Encoding:\r\n chunked"], INVALID),
    ],
    ids=lambda value: b" + ".join(value).decode() if isinstance(value, list) else "",
)
@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"], ids=["1.1", "1.0"])
async def test_body_that_is_not_just_chunked_is_refused(
    server: SmallServer, fields: list[bytes], version: bytes, expected: tuple[int, str]
) -> None:
    client = await server.connect()
    client.send(get(*fields).replace(b"HTTP/1.1", version))
    refused = await client.reader.readuntil(b"}")
    client.send(b"0\r\n\r\n")  # the end of the body, for which aiohttp would wait
    assert problem(refused + await client.rest()) == expected


async def test_chunked_body_is_for_http_1_1_only(server: SmallServer) -> None:
    client = await server.connect()
    await client.get(get(b"Transfer-Encoding:  CHUNKED  ") + b"0\r\n\r\n")
    client.send(get(CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert problem(await client.reader.readuntil(b"}")) == INVALID


async def test_requests_during_a_long_response_are_answered_after_it(server: SmallServer) -> None:
    client, count = await server.connect(), 60
    await begin_long(client, server)
    client.send(get(fields(6, 8000)[:-2]) * count + GET[:-2])
    await receive_long(client)
    for _ in range(count):
        await client.answer()
    await client.get(GET[-2:])  # the rest of a head that began during the long response
    await begin_long(client, server)
    client.send(b"nonsense\r\n\r\n")
    await receive_long(client)
    assert await client.refusal() == INVALID


async def test_head_that_does_not_end_is_refused_in_time(server: SmallServer) -> None:
    server.limits.head_s = 0.3
    client = await server.connect()
    rest = asyncio.create_task(client.rest())
    client.send(b"GET / HTTP/1.1\r\n")
    while not rest.done():
        client.send(b"A: b\r\n")
        await asyncio.sleep(0.02)
    assert problem(await rest) == HEAD_TIMEOUT
    assert await (await server.connect()).rest() == b""  # one that is silent


@pytest.mark.parametrize(
    ("first", "second"),
    [(GET, GET[:-2]), (GET + GET[:-4], b"\r\nA")],
    ids=["begun after the response", "begun with the request"],
)
async def test_unfinished_second_head_is_refused_in_time(
    server: SmallServer, first: bytes, second: bytes
) -> None:
    client = await server.connect()
    await client.get(first)
    server.limits.head_s = 0.1
    assert await client.refusal(second) == HEAD_TIMEOUT


@pytest.mark.parametrize("sent", [GET + GET[:-2], GET, GET + b"\r\n"], ids=["head", "nothing", "empty line"])
async def test_idle_timeout_closes_the_connection(server: SmallServer, sent: bytes) -> None:
    server.limits.idle_s = 0.25
    client, sent_s = await answered(server, sent)
    server.limits.head_s = 0.05
    assert await client.rest() == b""
    assert time.monotonic() - sent_s > 0.2  # not the head timeout: there is no 408


async def answered(server: SmallServer, sent: bytes) -> tuple[Client, float]:
    """Return a connection whose first request is answered, and when it was sent.

    aiohttp's idle timeout begins with the connection, so a request that the event loop reads late may find it
    closed: then there is another connection.
    """
    async with asyncio.timeout(LIMIT_S):
        while True:
            client, sent_s = await server.connect(), time.monotonic()
            try:
                await client.get(sent)
            except (ConnectionError, asyncio.IncompleteReadError):
                continue
            return client, sent_s


async def test_unread_body_and_declined_upgrade_do_not_count_as_head(server: SmallServer) -> None:
    upgrade = get(b"Connection: Upgrade", b"Upgrade: websocket")
    client = await server.connect()
    for sent in (sized(LONG_BODY), bytes(LONG_BODY) + GET, upgrade, sized(LONG_BODY)):
        await client.get(sent)
    await client.get(bytes(LONG_BODY) + upgrade)
    server.limits.head_s = 0.1
    assert await client.refusal(GET[:-2]) == HEAD_TIMEOUT


async def test_body_and_handler_may_take_longer_than_a_head() -> None:
    done = asyncio.Event()

    async def wait(_: web.Request) -> web.Response:
        await done.wait()
        return web.Response(body=b"done")

    async with small_server(others={"/wait": wait}) as server:
        client = await server.connect()
        await client.get()  # before the limit: a slow machine would be late with it
        server.limits.head_s = 0.05
        await client.get(sized(3) + b"a")
        for sent in (b"b", b"c" + GET):  # aiohttp reads on after a response, for a while
            await asyncio.sleep(0.15)
            client.send(sent)
        await client.answer()
        client.send(GET.replace(b"/short", b"/wait") + GET[:-2])
        await asyncio.sleep(0.15)
        done.set()
        assert (await client.answer()).endswith(b"done")


@pytest.mark.parametrize(
    ("path", "end"),
    [(b"/long", b""), (b"/long", b"Connection: close\r\n"), (b"/last", b"Connection: close\r\n")],
    ids=["kept", "closed", "end"],
)
async def test_client_that_does_not_read_is_disconnected(path: bytes, end: bytes) -> None:
    async def last(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.set_write_buffer_limits(2 * len(LONG_ANSWER))  # so that writing never pauses
        return web.Response(body=LONG_ANSWER)

    async with small_server(others={"/last": last}) as server:
        server.limits.unread_s = 0.1
        client = await server.connect()
        client.send(GET.replace(b"/short", path)[:-2] + end + b"\r\n")
        await disconnected(client, server)


async def test_slow_reader_gets_all_of_a_long_response(server: SmallServer) -> None:
    server.limits.unread_s = 5
    client, received = await server.connect(), 0
    client.send(GET_LONG[:-2] + b"Connection: close\r\n\r\n")
    async with asyncio.timeout(LIMIT_S):
        while piece := await client.reader.read(2**20):
            received += len(piece)
            await asyncio.sleep(0.001)
    assert received > len(LONG_ANSWER)


async def test_request_arrives_with_its_first_byte() -> None:
    """One that was sent before the answer to the previous request arrives when that is answered."""
    spans = list[tuple[int, int]]()

    async def note(request: web.Request) -> web.Response:
        spans.append((request[ARRIVED_NS], time.monotonic_ns()))
        return web.Response()

    async with small_server(others={"/note": note}) as server:
        client, request = await server.connect(), GET.replace(b"/short", b"/note")
        for _ in range(2):
            client.send(b"\r\n" + request[:9])
            await until(lambda: any(each._head_bytes for each in server.limits.open))
            begun_ns = time.monotonic_ns()
            await client.get(request[9:])
            assert 0 < spans[-1][0] < begun_ns
        client.send(request * 3)
        for _ in range(3):
            await client.answer()
    marks = [mark for span in spans for mark in span]
    assert marks == sorted(marks)


@asynccontextmanager
async def waiting_server(
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[SmallServer, asyncio.Queue[str], asyncio.Event]]:
    """Serve `/wait`, which waits, and `/stream`, which begins to answer first; yield events, and the end."""
    seen, has_ended = asyncio.Queue[str](), asyncio.Event()

    async def wait(_: web.Request) -> web.Response:
        seen.put_nowait("began")
        try:
            await has_ended.wait()
        except asyncio.CancelledError:
            seen.put_nowait("cancelled")
            raise
        return web.Response(body=b"waited")

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        await wait(request)
        return response

    async with small_server(tls, others={"/wait": wait, "/stream": stream}) as server:
        server.limits.half_closed_s = 0.01
        yield server, seen, has_ended
        has_ended.set()


async def happens(seen: asyncio.Queue[str], *expected: str) -> None:
    async with asyncio.timeout(LIMIT_S):
        for each in expected:
            assert await seen.get() == each


WAIT, STREAM = GET.replace(b"/short", b"/wait"), GET.replace(b"/short", b"/stream")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def half_close(server: SmallServer, sent: bytes) -> Client:
    """Send something, and end the client's sending."""
    client = await server.connect()
    client.send(sent)
    client.writer.write_eof()
    return client


async def is_asked_twice(client: Client) -> None:
    """Wait until the server has asked twice whether the client is there."""
    async with asyncio.timeout(LIMIT_S):
        assert await client.reader.readexactly(2 * len(CONTINUE)) == 2 * CONTINUE


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        (GET, 1),
        (GET.replace(b"1.1", b"1.0"), 1),
        (GET[:-2] + b"Connection: close\r\n\r\n", 1),
        (GET + GET + GET, 3),
        (sized(LONG_BODY) + bytes(LONG_BODY), 1),
        (get(CHUNKED) + b"5\r\nhello\r\n0\r\n\r\n", 1),
        (GET + GET[:-2], 1),
        (GET[:-2], 0),
        (b"", 0),
    ],
    ids=["1.1", "1.0", "close", "three", "length", "chunked", "half", "unended-head", "nothing"],
)
async def test_whole_requests_of_half_closed_connection_are_answered(
    server: SmallServer, sent: bytes, answers: int
) -> None:
    server.limits.check_s = 1.0  # a slow machine has time for HTTP/1.0
    client = await half_close(server, sent)
    answer = await client.rest()
    assert answer.count(b" 200 OK\r\n") == answer.count(b"short") == answers


async def test_answers_of_half_closed_connection_are_whole() -> None:
    """The client is asked meanwhile whether it is there."""
    async with waiting_server() as (server, seen, has_ended):
        client = await half_close(server, GET_LONG)
        await receive_long(client)
        assert await client.rest() == b""
        client = await half_close(server, WAIT)
        await is_asked_twice(client)
        has_ended.set()
        answer = await client.rest()
    assert answer.replace(CONTINUE, b"").startswith(b"HTTP/1.1 200 OK")
    assert (answer.endswith(b"waited"), [seen.get_nowait()], seen.empty()) == (True, ["began"], True)


@pytest.mark.parametrize("sent", [WAIT, WAIT.replace(b"1.1", b"1.0"), STREAM], ids=["1.1", "1.0", "begun"])
async def test_request_of_client_that_left_is_cancelled(sent: bytes) -> None:
    async with waiting_server() as (server, seen, _):
        client = await server.connect()
        client.send(sent)
        await happens(seen, "began")
        await client.close()
        await happens(seen, "cancelled")
        await until(lambda: not server.limits.open)


async def test_request_of_half_closed_client_ends_with_the_client() -> None:
    """In HTTP/1.0, where it cannot be asked whether it is there, at once."""
    async with waiting_server() as (server, seen, _):
        client = await half_close(server, WAIT)
        await is_asked_twice(client)
        await client.close()
        await happens(seen, "began", "cancelled")
        client = await half_close(server, WAIT.replace(b"1.1", b"1.0"))
        assert await client.rest() == b""
        await happens(seen, "began", "cancelled")


async def test_request_over_tls_of_client_that_left_is_cancelled(tls: ssl.SSLContext, pair: Pair) -> None:
    async with waiting_server(tls) as (server, seen, _):
        client = Client(*await asyncio.open_connection("localhost", server.port, ssl=pair.trusting()))
        client.send(WAIT)
        await happens(seen, "began")
        await client.close()
        await happens(seen, "cancelled")


async def test_unread_fast_response_gives_back_its_memory() -> None:
    bodies = Bodies(plan_memory(MemoryLimit(2**34, "machine"), None, 2**30))

    async def direct(_: web.Request) -> web.StreamResponse:
        return DirectResponse({}, [LONG_ANSWER], bodies.memory_of("alice"))

    async with small_server(others={"/direct": direct}) as server:
        client = await server.connect()
        client.send(GET.replace(b"/short", b"/direct"))
        await until(lambda: bodies.taken_bytes == len(LONG_ANSWER))
        server.limits.unread_s = 0.1
        await until(lambda: bodies.taken_bytes == 0)
        assert len(await client.rest()) < len(LONG_ANSWER)


@pytest.mark.parametrize(
    "sent",
    [
        GET,
        b"POST /short HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000),
        PROBE.replace(b"GET", b"POST"),
        PROBE.replace(b"live", b"x"),
    ],
    ids=["request", "body", "method", "path"],
)
async def test_connection_beyond_the_limit_is_refused_until_another_ends(
    server: SmallServer, sent: bytes
) -> None:
    server.limits.most = 2
    first, second = await server.connect(), await server.connect()
    await first.get()
    await second.get()
    third = await server.connect()
    third.send(sent)
    refused = await third.rest()
    assert problem(refused) == TOO_MANY
    assert b"Retry-After: 1\r\n" in refused
    await first.close()
    await until(lambda: len(server.limits.open) == 1)
    await (await server.connect()).get()


@pytest.mark.parametrize(
    "probe",
    [PROBE, PROBE.replace(b" HTTP", b"?verbose HTTP"), PROBE.replace(b"GET", b"HEAD")],
    ids=["plain", "query", "head"],
)
async def test_reserve_answers_one_probe_per_connection(server: SmallServer, probe: bytes) -> None:
    server.limits.most = 0
    for _ in range(3):
        client = await server.connect()
        client.send(probe + probe)
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"\r\nConnection: close" in answer
        assert answer.count(b"HTTP/1.1") == 1


async def test_reserve_is_limited_in_time_and_number(server: SmallServer) -> None:
    server.limits.most, server.limits.reserve, server.limits.reserve_head_s = 0, 1, 0.05
    for sent in (b"", PROBE[:-2]):
        assert await (await server.connect()).refusal(sent) == TOO_MANY
        await until(lambda: not server.limits.open)
    server.limits.reserve_head_s = LONG_S
    silent = await server.connect()
    await until(lambda: len(server.limits.open) == 1)
    assert await (await server.connect()).refusal() == TOO_MANY
    await silent.close()
    await until(lambda: not server.limits.open)
    await (await server.connect()).get(PROBE)


def test_limit_leaves_descriptors_to_models_and_ledger(tmp_path: Path) -> None:
    few = ConnectionLimits.of(Config(repository=tmp_path, data=tmp_path, max_connections=7))
    assert few.most == 7
    assert 1 <= few.reserve <= RESERVE
    many = ConnectionLimits.of(Config(repository=tmp_path, data=tmp_path, max_connections=1_000_000))
    assert 1 <= many.most <= 1_000_000


async def test_unfinished_tls_handshake_is_ended_in_time(tls: ssl.SSLContext) -> None:
    async with small_server(tls, head_s=0.3) as server:
        silent, babbling = await server.connect(), await server.connect()
        babbling.send(GET)
        assert await silent.rest() == b""
        assert b"HTTP" not in await babbling.rest()


async def test_limits_hold_over_tls(tls: ssl.SSLContext, pair: Pair) -> None:
    async with small_server(tls) as server:
        limits = server.limits
        limits.most = 1

        async def shake() -> Client:
            client = await server.connect()
            await client.writer.start_tls(pair.trusting(), server_hostname="localhost")
            return client

        first = await shake()
        await first.get()
        await (await shake()).get(PROBE)
        assert await (await shake()).refusal(GET) == TOO_MANY
        limits.head_s = 0.1
        assert await first.refusal(GET[:-2]) == HEAD_TIMEOUT
        limits.head_s, limits.unread_s, limits.idle_s = LONG_S, 0.1, 0.2
        for end in (b"", b"Connection: close\r\n"):
            await until(lambda: not limits.open)
            unread = await shake()
            unread.send(GET_LONG[:-2] + end + b"\r\n")
            await disconnected(unread, server)


async def test_shutdown_closes_idle_connections_only() -> None:
    began, done = asyncio.Event(), asyncio.Event()

    async def wait(_: web.BaseRequest) -> web.Response:
        began.set()
        await done.wait()
        return web.Response(body=b"done")

    runner = web.ServerRunner(web.Server(wait), shutdown_timeout=LONG_S)
    limits = ConnectionLimits(LONG_S, LONG_S, 100)
    await runner.setup()
    assert runner.server is not None
    with bind_address("127.0.0.1", 0) as bound:
        async with listening(runner.server, bound, limits, None) as port:
            server = SmallServer(limits, port)
            idle, busy = await server.connect(), await server.connect()
            busy.send(GET)
            await began.wait()
    ending = asyncio.create_task(runner.cleanup())
    assert await idle.rest() == b""
    done.set()
    assert (await busy.rest()).endswith(b"done")
    await ending
    assert not limits.open
    with pytest.raises(ConnectionRefusedError):
        await server.connect()
    for client in server.clients:
        await client.close()


def test_addresses_that_a_machine_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of "localhost", whose address of IPv6 cannot be bound where IPv6 is off."""
    absent, present = "192.0.2.1", "127.0.0.1"  # RFC 5737
    with pytest.raises(OSError, match="does not have this address"), bind_address(absent, 0):
        pass
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, 0)) for host in (absent, present)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with bind_address("localhost", 0) as bound:
        assert [each.getsockname()[0] for each in bound] == [present]
