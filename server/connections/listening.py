"""The address that the server listens on: each connection there is one within limits."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from aiohttp import web

from server.connections.connection import Connection, Limits
from server.connections.places import Place

BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted: a burst is no reason to refuse any."""

NO_DESCRIPTOR_S = 0.1
"""How long nobody is accepted when the process has no descriptor left."""


class Make(Protocol):
    """Makes a connection, of which no more is known than its place, if that."""

    def __call__(self, place: Place | None = None) -> Connection: ...  # noqa: D102


@asynccontextmanager
async def listening(
    server: web.Server, host: str, port: int, limits: Limits, context: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Listen, and give the port; on leaving, no new connections are accepted.

    Args:
        server: of a runner that is set up: it ends the connections there are.
        host: a name or an address.
        port: 0 picks a free one.
        limits: of the connections.
        context: for HTTPS.

    Raises:
        OSError: the address cannot be listened on.
    """

    def make(place: Place | None = None) -> Connection:
        return Connection(limits, server, place)

    where = _accepting(make, host, port) if context is None else _shaking(make, host, port, limits, context)
    async with where as bound:
        sweeping = asyncio.create_task(limits.sweep(), name="sweep of connections")
        try:
            yield bound
        finally:
            await _end({sweeping})


@asynccontextmanager
async def _accepting(make: Make, host: str, port: int) -> AsyncIterator[int]:
    accepting = await asyncio.get_running_loop().create_server(make, host, port, backlog=BACKLOG)
    try:
        yield accepting.sockets[0].getsockname()[1]
    finally:
        accepting.close()


@asynccontextmanager
async def _shaking(
    make: Make, host: str, port: int, limits: Limits, context: ssl.SSLContext
) -> AsyncIterator[int]:
    """Accept connections that begin with a handshake, which count from their first moment.

    The loop's own server tells nobody of a connection before its handshake is done: those who never do one
    would take all descriptors.
    """
    loop = asyncio.get_running_loop()

    async def shake(accepted: socket.socket, place: Place) -> None:
        task, connection = asyncio.current_task(), make(place)
        assert task is not None
        place.give_way = place.abort = task.cancel
        # Its time for a handshake is that for a head: who does neither is the same.
        limit_s = limits.head_s_of(place)
        try:
            with suppress(OSError):  # of the network or of TLS: it is nobody's fault here
                await loop.connect_accepted_socket(
                    lambda: connection, accepted, ssl=context, ssl_handshake_timeout=limit_s
                )
        finally:
            if connection not in limits.open:
                limits.places.leave(place)

    async def accept(listener: socket.socket) -> None:
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(NO_DESCRIPTOR_S)
                continue
            place = limits.places.take(address[0])
            if place is None:
                accepted.close()  # who has done no handshake cannot be told why
                continue
            task = loop.create_task(shake(accepted, place))
            limits.handshakes.add(task)
            task.add_done_callback(limits.handshakes.discard)
            await asyncio.sleep(0)  # so that a burst neither keeps the loop nor comes before it can give way

    listeners = await _listeners(host, port)
    tasks = {loop.create_task(accept(listener), name="accepting") for listener in listeners}
    try:
        yield listeners[0].getsockname()[1]
    finally:
        await _end(tasks)
        for listener in listeners:
            listener.close()
        await _end(set(limits.handshakes))


async def _listeners(host: str, port: int) -> list[socket.socket]:
    """Listen on each address that a name has."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listeners = list[socket.socket]()
    try:
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            listeners.append(socket.create_server(address, family=family, backlog=BACKLOG))
            listeners[-1].setblocking(False)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
