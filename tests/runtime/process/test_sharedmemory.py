"""Memory that a worker shares with the server: its regions, its seals, and inferences through it."""

import asyncio
import ctypes
import gc
import mmap
import os
import signal
from collections.abc import AsyncIterator
from itertools import pairwise

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.history import PLAIN
from support.workers import LIMIT_S, Serve, array, ask_all, freeze, resume, tensor, until

from runtime.errors import InferenceTimeout, WorkerDied
from runtime.process import sharedmemory
from runtime.process.sharedmemory import SHARED_BYTES, Region, SharedMemory, SharedRoom, TensorMemory
from runtime.process.worker import Worker
from runtime.wire import MalformedFrame, Tensor
from runtime.worker.sharedtensors import SharedTensors

ELEMENTS = 150_000
KB_600 = 4 * ELEMENTS


def extents_of(*regions: Region) -> list[tuple[int, int]]:
    return [(region.start, region.start + len(region.buffer)) for region in regions]


async def reserve(memory: SharedMemory, count: int = KB_600) -> Region:
    region = memory.reserve(count)
    assert region is not None
    return region


# Regions


@pytest.fixture
async def memory() -> AsyncIterator[SharedMemory]:
    memory, descriptor = SharedMemory.create(writable=True)
    os.close(descriptor)
    yield memory
    memory.close()


@PLAIN
@given(steps=st.lists(st.integers(1, 3 * 2**20) | st.none(), max_size=40))
async def test_regions_never_overlap(steps: list[int | None]) -> None:
    """None is the release of the oldest."""
    memory, descriptor = SharedMemory.create(writable=True)
    os.close(descriptor)
    regions = list[Region]()
    for count in steps:
        if count is None:
            del regions[:1]
        else:
            regions += filter(None, [memory.reserve(count)])
        assert memory.regions == len(regions)
        extents = sorted(extents_of(*regions))
        assert all(end <= start for (_, end), (start, _) in pairwise(extents))
        assert all(0 <= start < end <= SHARED_BYTES for start, end in extents)
    regions.clear()
    memory.close()


async def test_region_is_reserved_while_a_view_exists(memory: SharedMemory) -> None:
    region = await reserve(memory)
    view = region.buffer[10:20][2:]
    assert region.holds(view)
    assert not region.holds(memoryview(bytes(10)))
    del region
    assert (await reserve(memory)).start > 0
    del view
    assert (await reserve(memory)).start == 0


async def test_full_memory_gives_no_region(memory: SharedMemory) -> None:
    assert memory.reserve(SHARED_BYTES + 1) is None
    region = await reserve(memory, SHARED_BYTES)
    assert memory.reserve(1) is None
    memory.close()
    assert memory.reserve(1) is None
    region.buffer[:4] = b"last"  # what is in use outlives the memory
    assert bytes(region.buffer[:4]) == b"last"


async def test_memories_share_one_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharedmemory, "TRIM_S", 0.01)
    room = SharedRoom(2 * KB_600)
    (first, one), (second, two) = [SharedMemory.create(room, writable=True) for _ in range(2)]
    os.close(one)
    os.close(two)
    region: Region | None = await reserve(first)
    assert second.reserve(2 * KB_600) is None
    other = second.reserve(KB_600 // 2)
    assert other is not None
    taken = room.taken_bytes
    assert KB_600 * 3 // 2 <= taken <= 2 * KB_600
    del region
    region = await reserve(first)  # its pages are counted once
    assert room.taken_bytes == taken
    del region
    await until(lambda: room.taken_bytes < KB_600)  # only the other's
    second.close()
    assert room.taken_bytes > 0  # a region in use keeps the pages
    del other, second
    gc.collect()
    assert room.taken_bytes == 0
    first.close()


async def test_unused_memory_gives_its_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharedmemory, "TRIM_S", 0.01)
    memory, descriptor = SharedMemory.create(writable=False)
    region: Region | None = await reserve(memory)
    assert region is not None
    region.buffer[:] = bytes(KB_600)
    assert os.fstat(descriptor).st_blocks * 512 >= KB_600
    del region
    await until(lambda: os.fstat(descriptor).st_blocks == 0)
    os.close(descriptor)
    memory.close()


def test_worker_can_only_read_requests_and_resize_nothing() -> None:
    memory, (requests, answers) = TensorMemory.create()
    for descriptor in (requests, answers):
        with pytest.raises(OSError, match=r"Operation not permitted|Invalid argument"):
            os.ftruncate(descriptor, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(requests, 4096)
    mapped = mmap.mmap(requests, 4096, prot=mmap.PROT_READ)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_WRITE) == -1
    shared = SharedTensors(requests, answers)
    assert shared.locate(0, 0, 8).readonly
    with pytest.raises(MalformedFrame):
        shared.locate(0, SHARED_BYTES - 7, 8)
    memory.close()


@pytest.mark.parametrize("at", [-1, 1, 2**62])
async def test_answer_outside_of_its_room_is_malformed(at: int) -> None:
    memory, descriptors = TensorMemory.create()
    for descriptor in descriptors:
        os.close(descriptor)
    memory.release(0, [Tensor("y", "UINT8", (KB_600,), bytes(KB_600))])
    others, room = memory.hold(1, None), memory.hold(2, None)
    assert others is not None
    assert room is not None
    assert others[0] + others[1] <= room[0]
    assert len(memory.locate(2, room[0], room[1])) == room[1]
    for number, start, size in ((2, room[0] + at, room[1]), (1, *room), (3, room[0], 1)):
        with pytest.raises(MalformedFrame):
            memory.locate(number, start, size)
    memory.close()


# Inferences


@pytest_asyncio.fixture(loop_scope="module")
async def worker(serve: Serve) -> Worker:
    """A worker that adds one."""
    return await serve(models.add())


async def in_region(worker: Worker, *values: np.ndarray) -> tuple[Region, list[Tensor]]:
    """Put inputs one after the other into a region, as a request's body does."""
    region = await reserve(worker.tensor_memory.requests, sum(value.nbytes for value in values))
    tensors, start = [], 0
    for value in values:
        data = region.buffer[start : start + value.nbytes]
        data[:] = value.tobytes()
        tensors.append(Tensor("x", "FP32", value.shape, data))
        start += value.nbytes
    return region, tensors


VALUES = np.arange(ELEMENTS, dtype=np.float32)


async def test_inference_through_shared_memory_is_equal(worker: Worker) -> None:
    memory = worker.tensor_memory
    for elements in (ELEMENTS, ELEMENTS, 16, 4 * ELEMENTS, 4 * ELEMENTS, ELEMENTS, 16):
        values = np.arange(elements, dtype=np.float32)
        region, inputs = await in_region(worker, values)
        _, [output] = await worker.infer(inputs, timeout_s=LIMIT_S, region=region)
        assert np.array_equal(array(output), values + 1)
        del region, inputs
        assert memory.requests.regions == 0
    _, [first] = await ask_all(worker, [tensor("x", "FP32", VALUES)])  # through the socket
    _, [second] = await ask_all(worker, [tensor("x", "FP32", VALUES)])
    assert memory.answers.regions == 1
    is_equal = bytes(first.data) == bytes(second.data)
    del second
    await asyncio.sleep(0)  # the callback that brought it ends
    assert is_equal
    assert memory.answers.regions == 0


async def test_regions_of_a_timed_out_request_stay_until_its_end(worker: Worker) -> None:
    memory = worker.tensor_memory
    await ask_all(worker, [tensor("x", "FP32", VALUES)])  # so that an answer's length is known
    await freeze(worker.pid)
    region, inputs = await in_region(worker, VALUES)
    with pytest.raises(InferenceTimeout):
        await worker.infer(inputs, timeout_s=0.01, region=region)
    del region, inputs
    gc.collect()
    assert (memory.requests.regions, memory.answers.regions) == (1, 1)
    resume(worker.pid)
    await worker.wait_until_drained()
    gc.collect()
    assert (memory.requests.regions, memory.answers.regions) == (0, 0)


async def test_killed_worker_gives_its_regions_back(worker: Worker) -> None:
    await ask_all(worker, [tensor("x", "FP32", VALUES)])
    await freeze(worker.pid)
    region, inputs = await in_region(worker, VALUES)
    asked = asyncio.ensure_future(worker.infer(inputs, timeout_s=LIMIT_S, region=region))
    await asyncio.sleep(0)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        await asked
    assert bytes(inputs[0].data) == VALUES.tobytes()  # for another worker
    assert worker.tensor_memory.requests.reserve(1) is None


async def test_inputs_of_another_worker_take_the_socket(worker: Worker) -> None:
    memory, descriptors = TensorMemory.create()
    for descriptor in descriptors:
        os.close(descriptor)
    region = await reserve(memory.requests)
    region.buffer[:] = VALUES.tobytes()
    inputs = [Tensor("x", "FP32", VALUES.shape, region.buffer)]
    _, [output] = await worker.infer(inputs, timeout_s=LIMIT_S, region=region)
    assert np.array_equal(array(output), VALUES + 1)
    memory.close()
