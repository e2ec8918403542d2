"""What a worker says on its data channel: small answers together, large ones without a copy."""

import os
import socket
import threading
import time
from collections.abc import Sequence

import msgspec

from runtime.wire import PREFIX, Buffer, Message

JOINED_BYTES = 32 * 2**10
"""Copying this much takes about as long as telling the kernel of one buffer more."""
HELD_BYTES = 256 * 2**10
"""So much waits at most to be sent: what a socket's buffer holds about."""
HELD_NS = 200_000
"""So long an answer waits at most for runs that take as long as the last: a dozen small ones."""
WATCH_S = 0.005
"""How often it is looked whether a run that began with answers unsent has ended."""
MAX_BUFFERS = 512
"""Of one sendmsg; the kernel takes 1,024 (UIO_MAXIOV)."""

_ENCODER = msgspec.msgpack.Encoder()
_ROOM = bytes(PREFIX.size)


class Outbox:
    """Sends, and holds back what is small while more is about to follow.

    Sending many answers at once saves both sides a call of the kernel each, and the server a turn of its
    loop. The price is that an answer waits for the runs after it: for `HELD_NS`, and if one turns out to be
    longer than the one before for two times `WATCH_S`, after which a thread sends what waits.

    If the server has closed the channel nobody waits for anything any more, and the process ends.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._held = bytearray()
        self._since_ns = 0
        self._watched = threading.Event()
        self._watcher: threading.Thread | None = None

    def put(self, message: Message, parts: Sequence[Buffer] = ()) -> None:
        """Take a frame, to be sent now or at the latest with the next `flush`.

        The message has to be one that the other side takes, and `parts` the data of its tensors.
        """
        payload = sum(map(len, parts))
        with self._lock:
            held = self._held
            if not held:
                self._since_ns = time.monotonic_ns()
            start = len(held)
            held += _ROOM
            _ENCODER.encode_into(message, held, -1)
            PREFIX.pack_into(held, start, len(held) - start - PREFIX.size, payload)
            if payload < JOINED_BYTES:
                for part in parts:
                    held += part
                if len(held) < HELD_BYTES:
                    return
                parts = ()
            self._held = bytearray()
            self._send([held, *parts])

    def flush(self) -> None:
        """Send what is held back."""
        with self._lock:
            if self._held:
                held, self._held = self._held, bytearray()
                self._send([held])

    def before_run(self, expected_ns: int) -> None:
        """Send what is held back, or see to it that it is sent, before something runs.

        Args:
            expected_ns: how long it is likely to take; it may take much longer.
        """
        if not self._held:
            return
        late = time.monotonic_ns() - self._since_ns + expected_ns > HELD_NS
        if late or not (self._watched.is_set() or self._watch()):
            self.flush()

    def _watch(self) -> bool:
        """Have the thread look from now on; without one, nothing may be held back."""
        if self._watcher is None:
            watcher = threading.Thread(target=self._look, name="outbox", daemon=True)
            try:
                watcher.start()
            except RuntimeError:  # no memory for it
                return False
            self._watcher = watcher
        self._watched.set()
        return True

    def _look(self) -> None:
        while self._watched.wait():
            time.sleep(WATCH_S)
            with self._lock:
                if not self._held:
                    self._watched.clear()
                elif time.monotonic_ns() - self._since_ns > WATCH_S * 1e9:
                    self._send_some()

    def _send_some(self) -> None:
        """Send what goes without waiting: whoever waits here holds up the other thread."""
        try:
            del self._held[: self._channel.send(self._held, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            return
        except OSError:
            os._exit(0)

    def _send(self, parts: Sequence[Buffer]) -> None:
        buffers = [memoryview(part) for part in parts if len(part)]
        try:
            while buffers:
                sent = self._channel.sendmsg(buffers[:MAX_BUFFERS])
                while buffers and sent >= len(buffers[0]):
                    sent -= len(buffers.pop(0))
                if buffers:
                    buffers[0] = buffers[0][sent:]
        except OSError:
            os._exit(0)
