"""Hostile frames both ways: to a real worker, and from what has taken over a worker's process."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Coroutine, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from hostile.frames import replies, reports, to_worker
from msgspec.structs import replace
from support import models
from support.fleet import as_text, new_dice, of_both, tell
from support.impostors import silent_worker
from support.workers import LIMIT_S, ask, floats, fork_server_of, load, order_of

from runtime.errors import Exit, RuntimeProblem
from runtime.process.forkclient import Process
from runtime.process.forkserver import EX_SOFTWARE
from runtime.process.pool import WorkerPool
from runtime.process.sharedmemory import TensorMemory
from runtime.wire import FrameReader, FrameRules, FromWorker, Load
from runtime.worker.main import EX_PROTOCOL

ROUNDS = of_both(short=30, long=3000)
ENDS = {0, EX_PROTOCOL, EX_SOFTWARE}
"""A worker ends with its channels, by a malformed frame, or by an order that no server gives, such as to load
a path with NUL."""
ASKED = 3
"""Inferences that a worker is asked while it lies."""
STAGES = ("loading", "warming_up", "measuring")
"""In their order, each at most once."""
REPORT_S = 0.05
"""A load whose report has not come by then may never get one."""


Ends = Mapping[str, socket.socket]
"""One side's ends of a worker's channels, `data` and `control`."""


async def send(ends: Ends, frames: list[tuple[str, bytes]], rng: Random) -> None:
    """Send frames in pieces, until the other side hangs up."""
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        for channel, data in frames:
            cut = rng.randrange(len(data) + 1)
            for piece in (data[:cut], data[cut:]):
                await loop.sock_sendall(ends[channel], piece)
                await asyncio.sleep(0)


async def fork(pool: WorkerPool, stack: ExitStack) -> tuple[Process, Ends]:
    """Fork a worker that nobody watches; returns it, and this side's ends of its channels."""
    pairs = {name: socket.socketpair() for name in ("data", "control")}
    ours = {name: stack.enter_context(pair[0]) for name, pair in pairs.items()}
    output = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    theirs = [pair[1].fileno() for pair in pairs.values()]
    tensor_memory, shared = TensorMemory.create()
    child = await fork_server_of(pool).fork((*theirs, output, *shared))
    tensor_memory.close()
    stack.callback(child.close)
    for descriptor in (output, *shared):
        os.close(descriptor)
    for our_end, their_end in pairs.values():
        our_end.setblocking(False)
        their_end.close()
    return child, ours


async def read_answers(channel: socket.socket) -> int:
    """Read what a worker says until it hangs up, all of which is of the contract; returns how many frames."""
    rules: FrameRules[FromWorker] = FrameRules(msgspec.msgpack.Decoder(FromWorker))
    shared = memoryview(bytes(2**20))
    reader = FrameReader(rules, lambda _, at, size: shared[at : at + size])
    loop, frames = asyncio.get_running_loop(), 0
    with suppress(ConnectionError):
        while count := await loop.sock_recv_into(channel, reader.buffer()):
            reader.feed(count)
            frames += len(list(iter(reader.next_frame, None)))
    return frames


async def test_worker_with_hostile_frames_ends_by_protocol(pool: WorkerPool, tmp_path: Path) -> None:
    dice, ends, answers = new_dice(), Counter[str](), 0
    models.save(models.add(), tmp_path, "m")
    order = replace(order_of(tmp_path), memory_limit_bytes=100_000_000)
    for _ in range(ROUNDS):
        rng = Random(dice.randrange(2**32))
        async with asyncio.timeout(LIMIT_S):
            end, count = await _lie_to_worker(pool, order, rng)
        ends[str(end)] += 1
        answers += count
        assert (end.exit_code in ENDS, end.signal) == (True, None), end
    tell(f"workers that got hostile frames: {as_text(ends)}; {answers} answers")


async def _lie_to_worker(pool: WorkerPool, order: Load, rng: Random) -> tuple[Exit, int]:
    """Send hostile frames to a new worker, then hang up; returns its end, and how often it answered."""
    with ExitStack() as stack:
        child, ends = await fork(pool, stack)
        reading = asyncio.create_task(read_answers(ends["data"]))
        await send(ends, to_worker(rng, order), rng)
        for end in ends.values():
            end.shutdown(socket.SHUT_WR)
        return await child.end, await reading


async def test_hostile_worker_ends_its_own_requests_only(pool: WorkerPool, tmp_path: Path) -> None:
    dice, outcomes = new_dice(), Counter[str]()
    models.save(models.add(), tmp_path, "m")
    order = order_of(tmp_path)
    good, _ = await load(pool, order)
    for _ in range(ROUNDS):
        rng = Random(dice.randrange(2**32))
        async with asyncio.timeout(LIMIT_S):
            outcomes.update(await _be_lied_to(order, rng))
            await ask(good, [floats("x", 1)])
    tell(f"requests to hostile workers: {as_text(outcomes)}")


async def _be_lied_to(order: Load, rng: Random) -> list[str]:
    """Load and ask a worker whose frames are made up, until it is through or killed.

    Returns:
        What came of the load and the inferences.
    """
    stages = list[str]()
    async with silent_worker() as impostor:
        worker, ends = impostor.worker, {"data": impostor.data, "control": impostor.control}
        for end in ends.values():
            end.setblocking(False)
        loading = asyncio.create_task(worker.load(order, stages.append))
        await send(ends, reports(rng), rng)
        await asyncio.wait({loading}, timeout=REPORT_S)
        asked: list[Coroutine[Any, Any, Any]] = [
            worker.infer([floats("x", 1)], timeout_s=LIMIT_S) for _ in range(ASKED)
        ]
        answering = asyncio.gather(*asked, return_exceptions=True)
        await asyncio.sleep(0)
        await send(ends, replies(rng, numbers=ASKED), rng)
        for end in ends.values():
            end.close()
        results = [*await asyncio.gather(loading, return_exceptions=True), *await answering]
        await asyncio.shield(worker.ended)
    assert stages == [stage for stage in STAGES if stage in stages]
    return [_outcome(result) for result in results]


def _outcome(result: object) -> str:
    if isinstance(result, BaseException):
        assert isinstance(result, RuntimeProblem), repr(result)
        return result.code
    return "answered"
