"""The server's end of a channel to a worker, on asyncio: frames out, frames in, and busy-polling."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import cast

from runtime.wire import (
    Buffer,
    Frame,
    FrameReader,
    FrameRules,
    FromWorker,
    Locate,
    MalformedFrame,
    Message,
    PayloadDropped,
    PayloadRoom,
    Tensor,
    encode,
    join_short,
)

BUSY_POLL_NS = 300_000
"""After an answer within this time the loop busy-polls for the next one: to sleep and wake takes as long as a
small model. At one client this answers 1.3 times as many requests, at eight 1.1 times."""
FRAMES_PER_TURN = 64
"""Frames of one channel. Each wakes a client's task; with more at once, all clients would wait for them."""
BYTES_PER_TURN = 4 * 2**20
"""Bytes of one channel: a millisecond of copying. uvloop reads up to 32 times in a turn, a buffer each."""


class Channel(asyncio.BufferedProtocol):
    """One connected socket; its callbacks run on the loop.

    A worker's frames are hostile input: beyond a budget of frames and bytes the rest waits for the next turn
    of the loop, and after a malformed frame nothing more is read.

    Args:
        rules: the frames that may come at first.
        on_frame: called with each frame; raises `MalformedFrame` for a frame that must not come now.
        on_malformed: called once with the defect, before the channel closes for it.
        on_lost: called once, when the channel is closed at either end.
        locate: finds the tensors of a frame in shared memory.
        room: the memory for long answers, which a receiver counts in the same turn of the loop.
        on_dropped: called with a frame for which there was no memory.
    """

    def __init__(
        self,
        rules: FrameRules[FromWorker],
        on_frame: Callable[[Frame[FromWorker]], None],
        on_malformed: Callable[[str], None],
        on_lost: Callable[[], None],
        locate: Locate | None = None,
        *,
        room: PayloadRoom | None = None,
        on_dropped: Callable[[PayloadDropped], None] | None = None,
    ) -> None:
        self._room = room or PayloadRoom()
        self._reader = FrameReader(rules, locate, self._room)
        self._on_dropped = on_dropped
        self._on_frame = on_frame
        self._on_malformed = on_malformed
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unsent: list[Buffer] = []
        self._sent_ns = 0
        self._awaits_answer = False
        self._answers_fast = False
        self._is_polling = False
        self._offered_bytes = 0
        self._turn_bytes = 0
        self.lost = False

    async def connect(self, end: socket.socket) -> None:
        """Adopt a connected stream socket, which the channel closes, even if `connect` fails."""
        try:
            await self._loop.create_unix_connection(lambda: self, sock=end)
        except BaseException:
            if self._transport is None:
                end.close()
            raise

    def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Queue a frame; a lost channel drops it, since `on_lost` has reported the loss.

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
            for part in join_short(parts):
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
        """Bytes of earlier turns of the loop that the worker has not read yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def expect(self, rules: FrameRules[FromWorker]) -> None:
        self._reader.rules = rules

    def abort(self) -> None:
        """Close the channel without sending the queued frames."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the frames know better
        buffer = self._reader.buffer()
        self._offered_bytes = len(buffer)
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on the frames that are now complete, within the budget of a turn."""
        self._answers_fast = time.monotonic_ns() - self._sent_ns < BUSY_POLL_NS
        self._awaits_answer = False
        self._reader.feed(nbytes)
        # A read that leaves room in the buffer is the last of its turn.
        self._turn_bytes = self._turn_bytes + nbytes if nbytes == self._offered_bytes else 0
        if not self._pass_on() or self._turn_bytes >= BYTES_PER_TURN:
            self._yield_turn()

    def _pass_on(self) -> bool:
        """Pass on complete frames; returns whether none may be left."""
        try:
            for _ in range(FRAMES_PER_TURN):
                try:
                    frame = self._reader.next_frame()
                except PayloadDropped as dropped:
                    if self._on_dropped is None:
                        raise
                    self._on_dropped(dropped)
                    continue
                if frame is None:
                    return True
                self._on_frame(frame)
                if held := self._reader.take_held():  # its receiver runs before this, and counts it
                    self._loop.call_soon(self._room.give_back, held)
        except MalformedFrame as error:
            self._refuse(str(error))
        except MemoryError:
            self._refuse("more bytes than the server has memory for")
        else:
            return False
        return True

    def _yield_turn(self) -> None:
        """Pause reading until all other callbacks of the loop have had a turn."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._turn_bytes = 0
        if not self._pass_on():
            self._loop.call_soon(self._take_turn)
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    def _refuse(self, reason: str) -> None:
        self._on_malformed(reason)
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why does not matter
        """Report the end, and drop the unsent frames."""
        self.lost = True
        self._reader.close()
        self._unsent.clear()
        self._on_lost()
