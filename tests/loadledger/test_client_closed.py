"""A client for event loops never waits for ever: not when it is closed, nor for a server without an end."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support.clients import connected
from support.oddserver import LIMIT_S, odd_server, streamed
from support.playedcalls import bookmark

from loadledger import AsyncClient, ServerUnreachable


@pytest.mark.parametrize(
    ("said", "ask"),
    [
        (b"", lambda client: client.resources()),
        (b"", lambda client: anext(client.events(follow=True))),
        (streamed(bookmark(3) + b"\n"), lambda client: anext(client.events(follow=True))),
    ],
    ids=["an answer", "a stream", "an event"],
)
async def test_who_waits_for_a_client_that_is_closed_is_told(
    said: bytes, ask: Callable[[AsyncClient], Coroutine[Any, Any, Any]]
) -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def say(connection: socket.socket) -> None:
        connection.sendall(said)
        loop.call_soon_threadsafe(asked.set)

    with odd_server(say) as server:
        client = AsyncClient(server.url)
        waiting = asyncio.ensure_future(ask(client))
        async with asyncio.timeout(LIMIT_S):
            await asked.wait()
            await client.close()
            with pytest.raises(RuntimeError, match="this client is closed"):
                await waiting
    with pytest.raises(RuntimeError, match="this client is closed"):
        await client.health()


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (streamed(b"{}", end=True)[:-2], b"X: y\r\n"),
    ],
    ids=["head", "before it", "after the body"],
)
def test_a_server_that_has_no_end_is_given_up_wherever_that_is(head: bytes, part: bytes) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(1000):  # and then it is over, whoever still waits
            if over.wait(0.02):
                break
            connection.sendall(part)

    try:
        with odd_server(drip) as server, connected("AsyncClient", server.url, timeout_s=0.3) as client:
            with pytest.raises(ServerUnreachable, match="it took too long"):
                client.resources()
            over.set()
    finally:
        over.set()
