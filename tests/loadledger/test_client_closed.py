"""A client for event loops that is closed while tasks of it wait: they are told, and do not wait for ever."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support.oddserver import LIMIT_S, odd_server, streamed
from support.playedcalls import bookmark

from loadledger import AsyncClient


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
