"""A TCP proxy that fails like a network: it closes connections, holds bytes back, or delays them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

Address = tuple[str, int]
Direction = Literal["requests", "answers"]
CHUNK_BYTES = 2**16


@dataclass(slots=True)
class CuttingProxy:
    """Forwards each connection to a target until a test cuts it; it runs on the test's event loop.

    Attributes:
        target: where connections go; a test may change it for later ones.
        address: where it listens.
        delay_s: how much later each chunk of bytes goes on.
    """

    target: Address
    address: Address = ("", 0)
    delay_s: float = 0.0
    _is_cut: bool = False
    _passing: dict[Direction, asyncio.Event] = field(
        default_factory=lambda: {"requests": asyncio.Event(), "answers": asyncio.Event()}
    )
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    async def cut(self) -> None:
        """Close all connections, with the bytes that are on the way, and each new one at once."""
        self._is_cut = True
        await self._abort_connections()

    async def reset(self) -> None:
        await self._abort_connections()

    def swallow(self, *directions: Direction) -> None:
        """Let no byte and no end of a connection pass, in both directions unless one is named.

        As with packets that are dropped, neither side notices, and what was sent arrives after `heal`. With
        `cut` it is lost.
        """
        for direction in directions or self._passing:
            self._passing[direction].clear()

    def heal(self) -> None:
        """Pass everything without a delay: what was held back, and new connections."""
        self._is_cut, self.delay_s = False, 0.0
        for event in self._passing.values():
            event.set()

    async def _abort_connections(self) -> None:
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        writers = [writer]
        try:
            if not self._is_cut:
                target_reader, target_writer = await asyncio.open_connection(*self.target)
                writers.append(target_writer)
                await self._pump_both((reader, target_writer), (target_reader, writer))
        except (OSError, asyncio.CancelledError):
            for each in writers:
                each.transport.abort()
        finally:
            for each in writers:
                each.close()

    async def _pump_both(
        self,
        requests: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        answers: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        pumps = [
            asyncio.create_task(self._pump(*requests, "requests")),
            asyncio.create_task(self._pump(*answers, "answers")),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        """Pass on chunks in one direction until that side ends the connection."""
        while True:
            chunk = await reader.read(CHUNK_BYTES)
            await asyncio.sleep(self.delay_s)
            await self._passing[direction].wait()
            if not chunk:
                return
            writer.write(chunk)
            await writer.drain()


@asynccontextmanager
async def cutting_proxy(target: Address) -> AsyncIterator[CuttingProxy]:
    """Run a proxy on a free port before a server; it passes everything until the test says otherwise."""
    proxy = CuttingProxy(target)
    proxy.heal()
    server = await asyncio.start_server(proxy._forward, "127.0.0.1", 0)
    proxy.address = server.sockets[0].getsockname()
    try:
        yield proxy
    finally:
        server.close()
        await proxy.cut()
        await server.wait_closed()
