"""The server's end of a channel to a worker, on asyncio: frames out, frames in, and busy-polling."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from runtime.frames import JOINED_BYTES, FrameReader
from runtime.wire import Buffer, Frame, FromWorker, MalformedFrame, Message, Tensor, encode

BUSY_POLL_NS = 300_000
"""After an answer within this time the loop busy-polls for the next one: to sleep and wake takes as long as a
small model. At one client this answers 1.3 times as many requests, at eight 1.1 times."""


class Channel(asyncio.BufferedProtocol):
    """One connected socket; its callbacks run on the loop.

    `on_lost` is called once, when the channel is closed at either end or a frame is malformed.
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
        self._unsent: list[Buffer] = []
        self._sent_ns = 0
        self._awaits_answer = False
        self._answers_fast = False
        self._is_polling = False
        self.lost = False

    async def connect(self, end: socket.socket) -> None:
        """Adopt a connected stream socket, which the channel closes."""
        await self._loop.create_unix_connection(lambda: self, sock=end)

    def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Queue a frame; on a lost channel nothing happens, since `on_lost` reports that.

        All frames of one turn of the loop are sent at its end in one system call: with several clients, that
        call and waking the worker cost more than everything else that an inference takes here.
        """
        if self._transport is None or self._transport.is_closing():
            return
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += encode(message, tensors)

    def _flush(self) -> None:
        parts, self._unsent = self._unsent, []
        if self._transport is not None and not self._transport.is_closing():
            for part in _join_short(parts):
                self._transport.write(part)  # writelines of some Python 3.12 and 3.13 forgets pause_writing
        self._sent_ns, self._awaits_answer = time.monotonic_ns(), True
        if self._answers_fast and not self._is_polling:
            self._is_polling = True
            self._loop.call_soon(self._busy_poll)

    def _busy_poll(self) -> None:
        """Keep the loop turning for a short while instead of sleeping; other processes may have the core."""
        self._is_polling = self._awaits_answer and time.monotonic_ns() - self._sent_ns < BUSY_POLL_NS
        if self._is_polling:
            os.sched_yield()
            self._loop.call_soon(self._busy_poll)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of earlier turns of the loop that the other side has not read yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def limit_headers(self, max_bytes: int) -> None:
        """Limit the headers of the frames that follow."""
        self._reader.max_header_bytes = max_bytes

    def abort(self) -> None:
        """Close the channel without sending what is queued."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the frames know better
        """Return the buffer for the next bytes."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on the frames that are now complete."""
        self._answers_fast = time.monotonic_ns() - self._sent_ns < BUSY_POLL_NS
        self._awaits_answer = False
        try:
            for frame in self._reader.advance(nbytes):
                self._on_frame(frame)
        except MalformedFrame:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why does not matter
        """Report the end, and drop what was not sent."""
        self.lost = True
        self._reader.close()
        self._unsent.clear()
        self._on_lost()


def _join_short(parts: list[Buffer]) -> list[Buffer]:
    """Join short buffers, for few system calls; long ones are not copied."""
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
