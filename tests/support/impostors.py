"""Processes that speak in place of a worker, as one does that its model has taken over."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from runtime import wire
from runtime.errors import Exit
from runtime.process.forkclient import Process
from runtime.process.sharedmemory import TensorMemory
from runtime.process.worker import MemorySampler, Worker
from support.workers import LIMIT_S

_SPEECH = """
import os, sys
data, out = int(sys.argv[1]), int(sys.argv[2])
words = [sys.stdin.buffer.read(length) for length in map(int, sys.argv[3:])]
flood = sys.stdin.buffer.read()
for said in words:
    os.read(data, 2**16)  # the server asks for something
    while said:
        said = said[os.write(out, said) :]
while flood:
    os.write(out, flood)
os.read(data, 2**16)
"""
"""Argv: the data channel, where to write to, and how long each thing is that it says when it is asked."""


@dataclass(frozen=True, slots=True)
class Impostor:
    """A worker of the server, and the ends of its channels, which a test may write to."""

    worker: Worker
    data: socket.socket
    control: socket.socket


class _Ends:
    """The two channels and the stderr pipe of a worker: the server's ends, and the worker's."""

    def __init__(self) -> None:
        self.data, self.data_end = socket.socketpair()
        self.control, self.control_end = socket.socketpair()
        self.stderr, self.stderr_end = os.pipe2(os.O_CLOEXEC)
        self.data.setblocking(False)
        self.control.setblocking(False)


def encoded(message: wire.Message, *tensors: wire.Tensor) -> bytes:
    """Return a frame."""
    return b"".join(bytes(part) for part in wire.encode(message, tensors))


@asynccontextmanager
async def silent_worker() -> AsyncIterator[Impostor]:
    """Run a process that says nothing, for a test that speaks for it."""
    ends = _Ends()
    async with _adopted(_start(["sleep", "1000"]), ends) as worker:
        yield Impostor(worker, ends.data_end, ends.control_end)


@asynccontextmanager
async def impostor(*said: bytes, flood: bytes = b"", where: str = "data") -> AsyncIterator[Worker]:
    """Run a process that says one thing for each message of the server, and then this for ever.

    Args:
        said: to say first.
        flood: to repeat at the end.
        where: it writes to: `data`, `control` or `stderr`.
    """
    ends = _Ends()
    data = ends.data_end.fileno()
    out = {"data": data, "control": ends.control_end.fileno(), "stderr": ends.stderr_end}[where]
    numbers = [data, out, *map(len, said)]
    command = [sys.executable, "-ISc", _SPEECH, *map(str, numbers)]
    process = _start(command, b"".join([*said, flood]), pass_fds=(data, out, ends.control_end.fileno()))
    ends.data_end.close()  # else its end would not be the end of the channel
    ends.control_end.close()
    async with _adopted(process, ends) as worker:
        yield worker


def _start(command: list[str], given: bytes = b"", **options: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, **options)
    assert process.stdin is not None
    process.stdin.write(given)
    process.stdin.close()
    return process


@asynccontextmanager
async def _adopted(process: subprocess.Popen[bytes], ends: _Ends) -> AsyncIterator[Worker]:
    """Have the server take a process for a worker that it has forked."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[Exit] = loop.create_future()
    watched = os.pidfd_open(process.pid)

    def reap() -> None:
        loop.remove_reader(watched)
        os.close(watched)
        code = process.wait()
        end.set_result(Exit(code if code >= 0 else None, -code if code < 0 else None))

    loop.add_reader(watched, reap)
    os.close(ends.stderr_end)
    child = Process(process.pid, os.pidfd_open(process.pid), end)
    tensor_memory, shared = TensorMemory.create()
    for descriptor in shared:
        os.close(descriptor)
    worker = Worker("impostor", child, ends.stderr, LIMIT_S, MemorySampler(), tensor_memory=tensor_memory)
    await worker.connect(ends.data, ends.control)
    try:
        yield worker
    finally:
        ends.data_end.close()
        ends.control_end.close()
        worker.kill()
        await asyncio.shield(worker.ended)
