"""Raw connections to a small server within limits: what a client does that keeps to no rule."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from server.connections.connection import ConnectionLimits, listening
from server.routes import Access, LimitClass
from support.smallapp import route, small_app, small_config

LIMIT_S = 30.0
LONG_S = 600.0
LONG_ANSWER = bytes(16 * 2**20)
GET = b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n"
PROBE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


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
            received = bytearray()
            with suppress(ConnectionError):
                while piece := await self.reader.read(2**20):
                    received += piece
            return bytes(received)

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


async def short(_: web.Request) -> web.Response:
    return web.Response(body=b"short")


async def long(_: web.Request) -> web.Response:
    return web.Response(body=LONG_ANSWER)


def roomy(most: int = 100, **others: Any) -> ConnectionLimits:
    """Return limits that no client meets, but for these."""
    return ConnectionLimits(**{"head_s": LONG_S, "idle_s": LONG_S, "most": most, "check_s": 0.02, **others})


@asynccontextmanager
async def connecting(
    folder: Path,
    limits: ConnectionLimits,
    tls: ssl.SSLContext | None = None,
    others: Mapping[str, Handler] | None = None,
) -> AsyncIterator[Connect]:
    """Serve some routes within these limits, and yield what connects to them."""
    public: dict[str, Any] = {"access": Access.PUBLIC, "limit": LimitClass.NONE}
    handlers = {"/short": short, "/long": long, "/health/live": short, "/metrics": long, **(others or {})}
    routes = [route(path, handler, **public) for path, handler in handlers.items()]
    runner = web.AppRunner(
        small_app(routes, small_config(folder / "data")), access_log=None, handler_cancellation=True
    )
    await runner.setup()
    clients = list[Client]()
    assert runner.server is not None
    try:
        async with listening(runner.server, "127.0.0.1", 0, limits, tls) as port:

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
