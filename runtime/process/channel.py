"""The server's end of a channel to a worker, on asyncio: frames out, frames in."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from runtime.frames import FrameReader
from runtime.wire import Buffer, Frame, FromWorker, MalformedFrame, Message, Tensor, encode

AWAKE_NS = 300_000
"""Where the last answer came within so long the next is waited for awake: sleeping and being woken takes as
long as a small model. At one client 1.3 times as many requests are answered with this, at eight 1.1 times."""
JOINED_BYTES = 32 * 2**10
"""Copying this much takes about as long as telling the kernel of one buffer more."""


class Channel(asyncio.BufferedProtocol):
    """One connected socket; its callbacks run on the loop.

    Args:
        decoder: knows the messages that may come in.
        on_frame: is called with each.
        on_lost: is called once, when nothing more can come: closed at either end, or a frame that is none.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[FromWorker],
        on_frame: Callable[[Frame[FromWorker]], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._reader = FrameReader(decoder)
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._waiting: list[Buffer] = []
        self._sent_ns = 0
        self._is_awaited = False
        self._is_quick = False
        self._is_awake = False
        self.lost = False

    async def connect(self, end: socket.socket) -> None:
        """Take over a connected stream socket, which is closed with the channel."""
        await self._loop.create_unix_connection(lambda: self, sock=end)

    def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Send a frame, after those that wait; on a lost channel nothing happens.

        What is sent within one turn of the loop goes out at its end, in one call of the kernel: with several
        clients, that call and waking the worker cost more than everything else that an inference takes here.
        Whoever waits for an answer is told by `on_lost`.
        """
        if self._transport is None or self._transport.is_closing():
            return
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting += encode(message, tensors)

    def _flush(self) -> None:
        parts, self._waiting = self._waiting, []
        if self._transport is not None and not self._transport.is_closing():
            for part in _joined(parts):
                self._transport.write(part)  # writelines of some Python 3.12 and 3.13 forgets pause_writing
        self._sent_ns, self._is_awaited = time.monotonic_ns(), True
        if self._is_quick and not self._is_awake:
            self._is_awake = True
            self._loop.call_soon(self._stay_awake)

    def _stay_awake(self) -> None:
        """Have the loop look for the answer again, and for all else, instead of sleeping; not for long.

        Whoever else wants this core has it meanwhile.
        """
        self._is_awake = self._is_awaited and time.monotonic_ns() - self._sent_ns < AWAKE_NS
        if self._is_awake:
            os.sched_yield()
            self._loop.call_soon(self._stay_awake)

    @property
    def unsent_bytes(self) -> int:
        """What the other side has not taken yet, of what was sent in earlier turns of the loop."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def limit_headers(self, max_bytes: int) -> None:
        """Take no longer headers than that from here on."""
        self._reader.max_header_bytes = max_bytes

    def abort(self) -> None:
        """Close the channel without a word more."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the frames know better
        """Give the place for the next bytes."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Hand on the frames that are complete now."""
        self._is_quick = time.monotonic_ns() - self._sent_ns < AWAKE_NS
        self._is_awaited = False
        try:
            for frame in self._reader.advance(nbytes):
                self._on_frame(frame)
        except MalformedFrame:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why does not matter
        """End; what has not been sent has nobody to read it."""
        self.lost = True
        self._reader.close()
        self._waiting.clear()
        self._on_lost()


def _joined(parts: list[Buffer]) -> list[Buffer]:
    """Join what is short, for few calls of the kernel; copy nothing that is long."""
    if sum(map(len, parts)) < JOINED_BYTES:
        return [b"".join(parts)]
    joined, short = list[Buffer](), list[Buffer]()
    for part in parts:
        if len(part) < JOINED_BYTES:
            short.append(part)
            continue
        joined += [b"".join(short), part]
        short = []
    return [*joined, b"".join(short)]
