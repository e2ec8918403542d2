"""Memory that the server and one worker map: long tensors lie in it, instead of passing through a socket.

A worker has two such memories: one for requests, which it can only read, and one for answers. The server
alone reserves regions of both, and the worker uses those that a request names. A region is free again without
references: a request's regions are kept until the worker has answered or is gone, and an answer's until the
client has the answer, too.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any
from weakref import finalize, ref

from runtime.wire import SHARED_ALIGNMENT, MalformedFrame, Tensor

SHARED_BYTES = 32 * 2**20
"""Size of each memory: 13 tensors of 2.4 MB. Tensors that find no room take the socket."""
TRIM_S = 5.0
"""After this time without use a memory gives its pages back: new pages take longer than copying."""
SHARED_FROM_BYTES = 64 * 2**10
"""Shorter tensors take the socket, which costs less than a region."""
STEP_BYTES = 64 * 2**10
"""Regions begin and end at multiples of this: no two share a page, of any architecture."""
MAX_STEPS = 16
"""Steps in a region, then steps are twice as long: each size is a type of ctypes, which is kept for good."""
MFD_NOEXEC_SEAL = 0x8
"""linux/memfd.h; since Linux 6.3."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""A worker that made the file shorter would end the server: access beyond the end is SIGBUS."""


class Region:
    """A part of a `SharedMemory`, reserved while its `buffer` or a view of the buffer is referenced.

    Attributes:
        memory: the shared memory of the region.
        start: its offset.
        buffer: its bytes.
    """

    __slots__ = ("buffer", "memory", "start")

    def __init__(self, memory: SharedMemory, start: int, buffer: memoryview) -> None:
        self.memory = memory
        self.start = start
        self.buffer = buffer

    def holds(self, data: object) -> bool:
        return isinstance(data, memoryview) and data.obj is self.buffer.obj


class SharedRoom:
    """The pages that all shared memories may have together.

    Args:
        max_bytes: beyond them, tensors take the socket; None is no limit.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self.taken_bytes = 0

    def take(self, count: int) -> bool:
        """Count pages that may be written from now on; returns whether there is room for them."""
        if self._max_bytes is not None and self.taken_bytes + count > self._max_bytes:
            return False
        self.taken_bytes += count
        return True

    def give_back(self, written: list[int]) -> None:
        """Count the pages of a memory no more: it was trimmed, or is unmapped."""
        count = sum(written)  # first: this may run in any thread
        written.clear()
        self.taken_bytes -= count


class SharedMemory:
    """One memory of a worker, made by `create`.

    Its pages are taken when they are first written, and returned when the worker ends.
    """

    def __init__(self, mapped: mmap.mmap, room: SharedRoom | None = None) -> None:
        self._mapped: mmap.mmap | None = mapped
        self._room, self._written = room or SharedRoom(), list[int]()
        finalize(mapped, self._room.give_back, self._written).atexit = False
        self._taken: list[tuple[int, int]] = []
        self._owners: dict[int, ref[Any]] = {}
        self._released = deque[tuple[int, int]]()
        self._trimming: asyncio.TimerHandle | None = None
        self._is_used = False

    @classmethod
    def create(cls, room: SharedRoom | None = None, *, writable: bool) -> tuple[SharedMemory, int]:
        """Return a memory, and the descriptor by which the worker maps it, to write or only to read.

        Raises:
            OSError: there is no descriptor for the memory.
        """
        descriptor = _create_file()
        try:
            os.ftruncate(descriptor, SHARED_BYTES)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            mapped = mmap.mmap(descriptor, SHARED_BYTES)
            if writable:
                return cls(mapped, room), descriptor
            reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return cls(mapped, room), reading

    @property
    def regions(self) -> int:
        self._collect_released()
        return len(self._taken)

    def reserve(self, count: int) -> Region | None:
        """Return a region of `count` bytes, as near to the beginning as possible, or None without space."""
        self._collect_released()
        size = _round_up(count)
        start = self._find_gap(size)
        if start is None or self._mapped is None:
            return None
        extent = start, start + size
        more = max(0, extent[1] - sum(self._written))  # regions are as near to the beginning as possible
        if more:
            if not self._room.take(more):
                return None
            self._written.append(more)
        owner = _array_of(size).from_buffer(self._mapped, start)
        self._owners[start] = ref(owner, partial(_note_release, self._released, extent))
        insort(self._taken, extent)
        self._is_used = True
        if self._trimming is None:
            self._trimming = asyncio.get_running_loop().call_later(TRIM_S, self._trim)
        return Region(self, start, memoryview(owner).cast("B")[:count])

    def close(self) -> None:
        """Reserve no more; the memory is returned when the last region is released."""
        mapped, self._mapped = self._mapped, None
        self._owners.clear()
        if mapped is not None:
            with suppress(BufferError):  # a region in use keeps the mapping
                mapped.close()
        if self._trimming is not None:
            self._trimming.cancel()

    def _find_gap(self, size: int) -> int | None:
        start = 0
        for taken_start, taken_end in self._taken:
            if taken_start - start >= size:
                break
            start = taken_end
        return start if start + size <= SHARED_BYTES else None

    def _collect_released(self) -> None:
        while self._released:
            extent = self._released.popleft()
            self._taken.remove(extent)
            del self._owners[extent[0]]

    def _trim(self) -> None:
        """Give all pages back if no region was in use since the last call."""
        self._trimming = None
        if self._mapped is None:
            return
        if self.regions or self._is_used:
            self._is_used = False
            self._trimming = asyncio.get_running_loop().call_later(TRIM_S, self._trim)
        else:
            self._mapped.madvise(mmap.MADV_REMOVE)
            self._room.give_back(self._written)


def _note_release(released: deque[tuple[int, int]], extent: tuple[int, int], _: ref[Any]) -> None:
    """Note that a region has no references any more; called in any thread, at any moment."""
    released.append(extent)


class TensorMemory:
    """The memory that a worker shares with the server, and the regions that its requests hold.

    Attributes:
        requests: the memory that the worker can only read, so that inputs cannot change afterwards.
        answers: the memory that the worker writes.
    """

    def __init__(self, requests: SharedMemory, answers: SharedMemory) -> None:
        self.requests = requests
        self.answers = answers
        self._held: dict[int, tuple[Region | None, Region | None]] = {}
        self._answer_bytes = 0

    @classmethod
    def create(cls, room: SharedRoom | None = None) -> tuple[TensorMemory, tuple[int, int]]:
        """Return the memory, and the descriptors by which a worker maps it.

        Raises:
            OSError: there are no descriptors for the memory.
        """
        requests, reading = SharedMemory.create(room, writable=False)
        try:
            answers, writing = SharedMemory.create(room, writable=True)
        except OSError:
            os.close(reading)
            raise
        return cls(requests, answers), (reading, writing)

    def hold(self, number: int, region: Region | None) -> tuple[int, int] | None:
        """Keep a request's region until `release`; returns offset and size of its answer's region.

        The answer is expected to be as long as the latest answer.
        """
        answer = self.answers.reserve(self._answer_bytes) if self._answer_bytes >= SHARED_FROM_BYTES else None
        if region is None and answer is None:
            return None
        self._held[number] = region, answer
        return None if answer is None else (answer.start, len(answer.buffer))

    def locate(self, number: int, at: int, size: int) -> memoryview:
        """Return the part of an answer's region that a worker names.

        Raises:
            MalformedFrame: the part is outside that region.
        """
        _, answer = self._held.get(number, (None, None))
        if answer is None or at < answer.start or at + size > answer.start + len(answer.buffer):
            raise MalformedFrame("an output outside of the answer's room")
        return answer.buffer[at - answer.start : at - answer.start + size]

    def release(self, number: int, outputs: Sequence[Tensor] = ()) -> None:
        """Release the region of a request that the worker has answered."""
        if outputs:
            self._answer_bytes = sum([len(each.data) + SHARED_ALIGNMENT for each in outputs if not each.text])
        if self._held:
            self._held.pop(number, None)

    def close(self) -> None:
        """Release all requests: the worker is gone."""
        self._held.clear()
        self.requests.close()
        self.answers.close()


def find_offsets(tensors: Sequence[Tensor], region: Region) -> Iterator[int | None]:
    """Yield the offset of each tensor of a request in shared memory, None for a tensor outside.

    Tensors in the region lie in it one after the other, in their order.
    """
    position = region.start
    for tensor in tensors:
        if region.holds(tensor.data):
            yield position
            position += len(tensor.data)
        else:
            yield None


def _create_file() -> int:
    """Return a descriptor of a file without a name, sealed against execution where the kernel can do that."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("tensors", flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("tensors", flags)


def _round_up(count: int) -> int:
    step = STEP_BYTES
    while step * MAX_STEPS < count:
        step *= 2
    return max(1, -(-count // step)) * step


@cache
def _array_of(size: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    return ctypes.c_ubyte * size
