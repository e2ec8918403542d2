"""Cuts a byte stream into frames of `runtime.wire`, with few copies."""

import ctypes
from typing import Generic

import msgspec

from runtime.wire import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX,
    Frame,
    M,
    MalformedFrame,
    decode,
)

CHUNK_BYTES = 64 * 2**10
"""Shorter frames are cut out of one read; a longer one is read into a buffer of its own."""
JOINED_BYTES = 32 * 2**10
"""Of frames to send: copying this much takes about as long as one more buffer in a system call."""

_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
"""Allocates without filling: zeroing 600 KB takes as long as reading them, and announced bytes that never
come would take memory."""
_new_bytearray.argtypes, _new_bytearray.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object


class FrameReader(Generic[M]):
    """Cuts the bytes of a channel into frames.

    Read into `buffer()`, then call `advance` with the number of bytes. The tensor data of a frame refers to
    memory that nothing else uses.

    Args:
        decoder: of the messages that are allowed on the channel.

    Attributes:
        max_header_bytes: longer headers are malformed; may be changed between frames.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self.max_header_bytes = MAX_HEADER_BYTES
        self._decoder = decoder
        self._chunk = bytearray(CHUNK_BYTES)
        self._body: bytearray | None = None
        self._begin = 0
        self._header_bytes = 0
        self._filled = 0

    def buffer(self) -> memoryview:
        """Return the buffer for the next bytes; never empty."""
        return memoryview(self._chunk if self._body is None else self._body)[self._filled :]

    def advance(self, count: int) -> list[Frame[M]]:
        """Accept `count` more bytes in the buffer; return the frames that they complete.

        Raises:
            MalformedFrame: the bytes are no frame.
        """
        self._filled += count
        if self._body is None:
            return self._cut()
        if self._filled < len(self._body):
            return []
        frame = decode(memoryview(self._body)[self._begin :], self._header_bytes, self._decoder)
        self._body, self._filled = None, 0
        return [frame]

    def close(self) -> None:
        """Release the buffers now: nothing more is read, and a reference cycle may keep the reader alive."""
        self._chunk, self._body = bytearray(), None

    def _cut(self) -> list[Frame[M]]:
        frames: list[Frame[M]] = []
        view, start = memoryview(self._chunk), 0
        while self._filled - start >= PREFIX.size:
            header, payload = PREFIX.unpack_from(self._chunk, start)
            if header > self.max_header_bytes or payload > MAX_PAYLOAD_BYTES:
                raise MalformedFrame("a frame of more than the allowed length")
            start += PREFIX.size
            end = start + header + payload
            if end > self._filled:
                self._begin_body(start, header, payload)
                return frames
            # A copy, since the chunk is used again.
            frames.append(decode(memoryview(bytes(view[start:end])), header, self._decoder))
            start = end
        if start < self._filled:
            self._chunk[: self._filled - start] = self._chunk[start : self._filled]
        self._filled -= start
        return frames

    def _begin_body(self, start: int, header: int, payload: int) -> None:
        self._begin = -header % ALIGNMENT
        self._body = _new_bytearray(None, self._begin + header + payload)
        self._header_bytes = header
        came = self._filled - start
        self._body[self._begin : self._begin + came] = self._chunk[start : self._filled]
        self._filled = self._begin + came
