"""Cutting a stream of bytes into the frames of `runtime.wire`, with as few copies as may be."""

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
"""Frames that fit are cut out of one read; a longer one is read straight into a buffer of its own."""

_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
"""Makes one that is not written to: filling 600 KB with zeros takes as long as reading them, and what is
announced and does not come would take memory."""
_new_bytearray.argtypes, _new_bytearray.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object


class FrameReader(Generic[M]):
    """Cuts what arrives on a channel into frames.

    Read into `buffer()`, then say with `advance` how much it was. The tensors' data of a frame refers to
    memory that nothing else uses.

    Args:
        decoder: knows the messages that are allowed here.

    Attributes:
        max_header_bytes: longer headers are none; may be changed between frames.
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
        """Give the place for the next bytes; never empty."""
        return memoryview(self._chunk if self._body is None else self._body)[self._filled :]

    def advance(self, count: int) -> list[Frame[M]]:
        """Take note of `count` more bytes in the buffer; returns the frames that are complete with them.

        Raises:
            MalformedFrame: what came is no frame.
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
        """Give the buffers back now: nothing more will be read, and the reader may live on in a cycle."""
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
