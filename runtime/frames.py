"""Cuts a byte stream into frames of `runtime.wire`, with few copies."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import msgspec

from runtime.wire import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX,
    Buffer,
    Frame,
    Locate,
    M,
    MalformedFrame,
    Message,
    decode,
    decode_header,
)

CHUNK_BYTES = 64 * 2**10
"""Shorter frames are cut out of one read; a longer one is read into a buffer of its own."""
READ_BYTES = 2**20
"""Limit of one read: a socket is read on for as long as its other side goes on writing."""
JOINED_BYTES = 32 * 2**10
"""Of frames to send: copying this much takes about as long as one more buffer in a system call."""


class PayloadDropped(MemoryError):
    """There is no memory for the payload of a frame; it was read and dropped, and the channel goes on.

    Attributes:
        message: the frame's message, without its tensors.
    """

    def __init__(self, message: Message) -> None:
        super().__init__()
        self.message = message


_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
"""Allocates without filling: zeroing 600 KB takes as long as reading them, and announced bytes that never
come would take memory."""
_new_bytearray.argtypes, _new_bytearray.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object


@dataclass(frozen=True, slots=True)
class FrameRules(Generic[M]):
    """Which frames may come: the messages, and limits that a frame's prefix is held against.

    Without header bytes, none may come.
    """

    decoder: msgspec.msgpack.Decoder[M]
    header_bytes: int = MAX_HEADER_BYTES
    payload_bytes: int = MAX_PAYLOAD_BYTES


class FrameReader(Generic[M]):
    """Cuts the bytes of a channel into frames.

    Read into `buffer()`, call `feed` with the number of bytes, and then `next_frame` until there is none. The
    tensor data of a frame refers to memory that nothing else uses.

    Attributes:
        rules: which frames may come next; may be changed between frames.

    Args:
        rules: which frames may come at first.
        locate: finds the tensors that lie in shared memory; None if none do.
    """

    def __init__(self, rules: FrameRules[M], locate: Locate | None = None) -> None:
        self.rules = rules
        self._locate = locate
        self._chunk = bytearray(CHUNK_BYTES)
        self._body: bytearray | None = None
        self._begin = 0
        self._header_bytes = 0
        self._start = 0
        self._filled = 0
        self._is_dropped = False
        self._drop_bytes = 0

    def buffer(self) -> memoryview:
        """Return the buffer for the next bytes; never empty once `next_frame` has returned None."""
        if self._body is None:
            return memoryview(self._chunk)[self._filled :]
        if self._drop_bytes and self._filled == len(self._body):
            return memoryview(self._chunk)[: self._drop_bytes]
        return memoryview(self._body)[self._filled : self._filled + READ_BYTES]

    def feed(self, count: int) -> None:
        if self._drop_bytes and self._body is not None and self._filled == len(self._body):
            self._drop_bytes -= count
        else:
            self._filled += count

    def next_frame(self) -> Frame[M] | None:
        """Return the next complete frame.

        Raises:
            MalformedFrame: the bytes are no frame, or none that may come now.
            PayloadDropped: there was no memory for the frame's payload.
        """
        if self._body is not None:
            return self._finish_body(self._body)
        start = self._start
        if self._filled - start < PREFIX.size:
            if start:
                self._move_rest(start)
            return None
        header, payload = PREFIX.unpack_from(self._chunk, start)
        rules = self.rules
        if header > rules.header_bytes or payload > rules.payload_bytes:
            raise MalformedFrame(_describe_excess(rules, header, payload))
        start += PREFIX.size
        end = start + header + payload
        if end > self._filled:
            self._begin_body(start, header, payload)
            return None
        self._start = end
        # A copy, since the chunk is used again.
        return decode(
            memoryview(bytes(memoryview(self._chunk)[start:end])), header, rules.decoder, self._locate
        )

    def close(self) -> None:
        """Release the buffers now: nothing more is read, and a reference cycle may keep the reader alive."""
        self._chunk, self._body = bytearray(), None
        self._start = self._filled = 0

    def _move_rest(self, start: int) -> None:
        if start < self._filled:
            self._chunk[: self._filled - start] = self._chunk[start : self._filled]
        self._filled -= start
        self._start = 0

    def _begin_body(self, start: int, header: int, payload: int) -> None:
        """Read the rest of a frame into a buffer of its own; a page of it takes memory when bytes arrive."""
        self._begin = -header % ALIGNMENT
        self._header_bytes = header
        try:
            self._body = _new_bytearray(None, self._begin + header + payload)
        except MemoryError:  # the message says whose frame it is
            self._body, self._drop_bytes, self._is_dropped = bytearray(self._begin + header), payload, True
        came = self._filled - start
        kept = min(came, len(self._body) - self._begin)
        self._body[self._begin : self._begin + kept] = self._chunk[start : start + kept]
        self._drop_bytes -= came - kept
        self._start, self._filled = 0, self._begin + kept

    def _finish_body(self, body: bytearray) -> Frame[M] | None:
        if self._filled < len(body) or self._drop_bytes:
            return None
        self._body, self._filled = None, 0
        if self._is_dropped:
            self._is_dropped = False
            raise PayloadDropped(decode_header(memoryview(body)[self._begin :], self.rules.decoder))
        return decode(memoryview(body)[self._begin :], self._header_bytes, self.rules.decoder, self._locate)


def _describe_excess(rules: FrameRules[M], header: int, payload: int) -> str:
    if not rules.header_bytes:
        return "a message that nothing asked for"
    came, most = f"{header} + {payload}", f"{rules.header_bytes} + {rules.payload_bytes}"
    return f"a frame of {came} bytes (header + payload), of at most {most}"


def join_short(parts: Sequence[Buffer]) -> list[Buffer]:
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
