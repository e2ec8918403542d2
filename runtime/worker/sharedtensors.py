"""The worker's side of the memory that it shares with the server: requests to read, and answers to write.

It is mapped before the worker is confined, and the descriptors are closed: no other shared memory is allowed
afterwards, nor may requests be mapped again to be written.
"""

import ctypes
import mmap
import os

from runtime.wire import SHARED_ALIGNMENT, Buffer, MalformedFrame

LONG_FROM_BYTES = 32 * 2**10
"""A shorter output goes into the frame."""
MAP_FAILED = ctypes.c_void_p(-1).value
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip


class Room:
    """Where the outputs of one answer may go: the part of the memory from `start` on, of `size` bytes.

    Attributes:
        is_used: whether an output is there.
    """

    def __init__(self, memory: memoryview, start: int, size: int) -> None:
        self._memory = memory
        self.is_used = False
        self._next = start
        self._end = start + size

    def put(self, data: Buffer) -> int | None:
        """Copy the data of an output there and return where it begins; None if it belongs into the frame."""
        at, size = self._next, len(data)
        if size < LONG_FROM_BYTES or size > self._end - at:
            return None
        self._memory[at : at + size] = data
        self.is_used = True
        self._next += -(-size // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
        return at


class SharedTensors:
    """The two memories of a worker, mapped from their descriptors, which this closes."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests = _map(requests, mmap.PROT_READ).toreadonly()
        self._answers = _map(answers, mmap.PROT_READ | mmap.PROT_WRITE)

    def locate(self, _number: int, at: int, size: int) -> memoryview:
        """Return an input's data.

        Raises:
            MalformedFrame: there is no such place.
        """
        if at + size > len(self._requests):
            raise MalformedFrame("a tensor beyond the shared memory")
        return self._requests[at : at + size]

    def room(self, extent: tuple[int, int]) -> Room:
        """Return the room of an answer, from where the server says, of as many bytes."""
        return Room(self._answers, *extent)


def _map(descriptor: int, protection: int) -> memoryview:
    """Map a memory, not with Python's mmap, which keeps a copy of the descriptor."""
    size = os.fstat(descriptor).st_size
    address = _LIBC.mmap(None, size, protection, mmap.MAP_SHARED, descriptor, 0)
    if address == MAP_FAILED:
        raise OSError(ctypes.get_errno(), "cannot map shared memory")
    os.close(descriptor)
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
