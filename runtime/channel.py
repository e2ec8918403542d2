"""The server's end of a channel to a worker, on asyncio: frames out with backpressure, frames in."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from runtime.frames import FrameReader
from runtime.wire import Buffer, Frame, FromWorker, MalformedFrame, Message, Tensor, encode

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
        self._transport: asyncio.WriteTransport | None = None
        self._writable = asyncio.Event()
        self.lost = False

    async def connect(self, end: socket.socket) -> None:
        """Take over a connected stream socket, which is closed with the channel."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    async def writable(self) -> None:
        """Wait until the other side has taken most of what was sent, or the channel is lost."""
        while not self._writable.is_set():
            await self._writable.wait()

    def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Send a frame, at once or after those that wait; on a lost channel nothing happens.

        Whoever waits for an answer is told by `on_lost`.
        """
        if self._transport is not None and not self._transport.is_closing():
            for part in _parts(encode(message, tensors)):
                self._transport.write(part)  # writelines of some Python 3.12 and 3.13 forgets pause_writing

    def abort(self) -> None:
        """Close the channel without a word more."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.WriteTransport", transport)
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the frames know better
        """Give the place for the next bytes."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Hand on the frames that are complete now."""
        try:
            for frame in self._reader.advance(nbytes):
                self._on_frame(frame)
        except MalformedFrame:
            self.abort()

    def pause_writing(self) -> None:
        """Note that the other side does not read as fast as we write."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Note that it has caught up."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why does not matter
        """End, and let go whoever waits to send."""
        self.lost = True
        self._reader.close()
        self._writable.set()
        self._on_lost()


def _parts(buffers: list[Buffer]) -> list[Buffer]:
    """Join what is short, for one call of the kernel; copy nothing that is long."""
    return [b"".join(buffers)] if sum(map(len, buffers)) < JOINED_BYTES else buffers
