"""The limits of connections as `serve` has them, tried with raw sockets; all of them are in tests/server."""

import asyncio
import json
import signal
from contextlib import suppress
from pathlib import Path

from support.http import LIMIT_S
from support.process import Server, serving
from support.workers import freeze
from yarl import URL

from server.config import Config

ALIVE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


async def connected(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = URL(server.url)
    return await asyncio.open_connection(url.host, url.port)


async def said(server: Server, sent: bytes) -> bytes:
    """Return all that the server says to this until it closes the connection."""
    [answer] = await all_said(server, sent)
    return answer


async def all_said(server: Server, *sent: bytes) -> list[bytes]:
    """Return what the server says to each of these, of connections that come all at once.

    It is stopped until all is sent, so that its limits count no time that this machine takes to send it.
    """
    await freeze(server.pid)
    connections = [await connected(server) for _ in sent]
    for (_, writer), each in zip(connections, sent, strict=True):
        writer.write(each)
    server.send(signal.SIGCONT)
    return await asyncio.gather(*(heard(*connection) for connection in connections))


async def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Return what comes until the server closes the connection."""
    received = b""
    async with asyncio.timeout(LIMIT_S):
        with suppress(ConnectionError):
            while piece := await reader.read(2**16):
                received += piece
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return received


def code(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["code"])


async def test_serve_bounds_heads_idleness_and_the_number_of_connections(tmp_path: Path) -> None:
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    config.repository.mkdir()
    limits = ("--head-timeout-s=0.3", "--idle-timeout-s=1", "--max-connections=4")
    async with serving(config, *limits) as server:
        assert await said(server, b"") == b""
        assert code(await said(server, ALIVE[:-2])) == "head_timeout"
        assert (await said(server, ALIVE)).startswith(b"HTTP/1.1 200 OK")  # and is not kept for ever
        assert code(await said(server, b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n")) == "target_too_long"
        head = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9000 + b"\r\n\r\n"
        assert code(await said(server, head)) == "head_too_large"
        answers = await all_said(server, *[b""] * 12)
        refused = [answer for answer in answers if answer]
        assert len(refused) >= 12 - 4
        assert {code(answer) for answer in refused} == {"too_many_connections"}
        assert (await said(server, ALIVE)).startswith(b"HTTP/1.1 200 OK")
        assert await server.stop() == 0
        assert server.output.read_text() == ""


async def test_probes_are_answered_by_a_server_whose_connections_are_all_taken(tmp_path: Path) -> None:
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    config.repository.mkdir()
    async with serving(config, "--max-connections=2", "--metrics=open") as server:
        held = [await connected(server) for _ in range(2)]
        for reader, writer in held:
            writer.write(ALIVE)
            async with asyncio.timeout(LIMIT_S):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200 OK")
        for path in (b"/health/live", b"/health/ready", b"/v2/health/ready", b"/metrics"):
            assert (await said(server, ALIVE.replace(b"/health/live", path))).startswith(b"HTTP/1.1 200 OK")
        assert code(await said(server, ALIVE.replace(b"/health/live", b"/docs"))) == "too_many_connections"
        for _, writer in held:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        assert await server.stop() == 0
