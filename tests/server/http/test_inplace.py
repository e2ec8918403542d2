"""Long bodies that are read in place, past aiohttp's parser, which must go on where they end."""

import asyncio
import random

import pytest
from aiohttp import web
from support.connections import GET, LIMIT_S, LONG_S, small_server

from server.http.bodies import BodyTimeout
from server.http.connection import read_body_into

TEXT, TENSORS = b"{text}", random.Random(0).randbytes(3 * 10**6)
HEAD = b"GET /in-place HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(TEXT + TENSORS)
REQUEST = HEAD + TEXT + TENSORS


class InPlace:
    """A handler that reads the body into a buffer, and what became of that."""

    def __init__(self, idle_s: float = LONG_S) -> None:
        self._idle_s = idle_s
        self.began, self.ended = asyncio.Event(), asyncio.Event()
        self.problem: BaseException | None = None

    async def handle(self, request: web.Request) -> web.Response:
        """Answer with all of the body."""
        self.began.set()
        buffer = bytearray(len(TENSORS))
        try:
            text = await read_body_into(request, len(TEXT), memoryview(buffer), self._idle_s)
        except BaseException as problem:
            self.problem = problem
            raise
        finally:
            self.ended.set()
        return web.Response(body=text + buffer)


@pytest.mark.parametrize("first", [0, 3, len(TEXT), 20_000, 70_000, 10**6, len(TEXT + TENSORS) - 1])
async def test_body_read_in_place_is_equal(first: int) -> None:
    """However much of it comes with the head, and with another request behind it."""
    handler = InPlace()
    async with small_server(others={"/in-place": handler.handle}) as server:
        client = await server.connect()
        for _ in range(2):
            handler.began.clear()
            client.send(REQUEST[: len(HEAD) + first])
            await handler.began.wait()
            client.send(REQUEST[len(HEAD) + first :] + GET)
            assert (await client.answer()).endswith(b"\r\n\r\n" + TEXT + TENSORS)
            assert (await client.answer()).endswith(b"short")


async def test_stalled_body_in_place_is_given_up() -> None:
    handler = InPlace(idle_s=0.05)
    async with small_server(others={"/in-place": handler.handle}) as server:
        client = await server.connect()
        client.send(REQUEST[:-1])
        await handler.ended.wait()
        assert isinstance(handler.problem, BodyTimeout)
        client.send(REQUEST[-1:])
        async with asyncio.timeout(LIMIT_S):
            assert b" 500 " in await client.reader.readline()


@pytest.mark.parametrize("sent", [len(HEAD), len(HEAD) + 10**6, len(REQUEST) - 1])
async def test_client_leaving_ends_a_body_in_place(sent: int) -> None:
    handler = InPlace()
    async with small_server(others={"/in-place": handler.handle}) as server:
        client = await server.connect()
        client.send(REQUEST[:sent])
        await handler.began.wait()
        await client.close()
        await handler.ended.wait()
        assert isinstance(handler.problem, asyncio.CancelledError | ConnectionResetError)
