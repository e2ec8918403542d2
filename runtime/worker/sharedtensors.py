"""The worker's side of the memory that it shares with the server: requests to read, and answers to write.

The memory is mapped before the worker is confined, and its descriptors are closed: confined workers map no
other shared memory, nor can requests be mapped again for writing.
"""

import ctypes
import mmap
import os

from runtime.wire import SHARED_ALIGNMENT, Buffer, MalformedFrame

LONG_FROM_BYTES = 32 * 2**10
"""Shorter outputs are sent in the frame."""
MAP_FAILED = ctypes.c_void_p(-1).value
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip


class AnswerRegion:
    """The part of the memory for the outputs of one answer: `size` bytes from `start` on.

    Attributes:
        is_used: whether it has an output.
    """

    def __init__(self, memory: memoryview, start: int, size: int) -> None:
        self._memory = memory
        self.is_used = False
        self._next = start
        self._end = start + size

    def put(self, data: Buffer) -> int | None:
        """Copy an output's data there and return its offset, or None if the output belongs into the frame."""
        at, size = self._next, len(data)
        if size < LONG_FROM_BYTES or size > self._end - at:
            return None
        self._memory[at : at + size] = data
        self.is_used = True
        self._next += -(-size // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
        return at


class SharedTensors:
    """The two memories of a worker, mapped from their descriptors, which the constructor closes."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests = _map(requests, mmap.PROT_READ).toreadonly()
        self._answers = _map(answers, mmap.PROT_READ | mmap.PROT_WRITE)

    def locate(self, _number: int, at: int, size: int) -> memoryview:
        """Return an input's data at an offset of the requests' memory.

        Raises:
            MalformedFrame: the offset and size exceed the memory.
        """
        if at + size > len(self._requests):
            raise MalformedFrame("a tensor beyond the shared memory")
        return self._requests[at : at + size]

    def region(self, extent: tuple[int, int]) -> AnswerRegion:
        """Return the region of an answer: the offset and size that the server gives."""
        return AnswerRegion(self._answers, *extent)


def _map(descriptor: int, protection: int) -> memoryview:
    """Map a memory, not with Python's mmap, which keeps a copy of the descriptor."""
    size = os.fstat(descriptor).st_size
    address = _LIBC.mmap(None, size, protection, mmap.MAP_SHARED, descriptor, 0)
    if address == MAP_FAILED:
        raise OSError(ctypes.get_errno(), "cannot map shared memory")
    os.close(descriptor)
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
