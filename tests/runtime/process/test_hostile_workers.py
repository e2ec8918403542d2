"""A worker's words are hostile input: what it may not say ends it, and holds up nobody else."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from support import models
from support.impostors import Impostor, encoded, impostor, silent_worker
from support.workers import (
    FOR_EVER_S,
    LIMIT_S,
    answer,
    descriptors,
    floats,
    load,
    order_of,
    running_pool,
    until,
)

from features.devices.wire import ProviderLibrary, TargetDevice
from runtime import memory, wire
from runtime.errors import Exit, ForkServerUnavailable, WorkerDied
from runtime.process import forkclient
from runtime.process.channel import BYTES_PER_TURN, FRAMES_PER_TURN, Channel
from runtime.process.forkclient import ForkServer
from runtime.process.forkserver import Exited, Forked, ForkFailed, Ready
from runtime.process.inflight import _is_plausible
from runtime.process.worker import Worker
from runtime.wire import (
    PREFIX,
    READ_BYTES,
    FrameRules,
    Load,
    Loaded,
    Outcome,
    ProviderOperators,
    StageReached,
    Tensor,
    TensorSpec,
    heads,
)

ORDER = Load("/", "/", 0, 1)
KILLED = Exit(None, signal.SIGKILL)
PAUSE_S = 2.0
"""No hold of the loop takes this long on a busy machine either; before there were limits, some had no end."""

Y, OTHER = floats("y", 1.0), floats("other", 1.0)
LOADED = Loaded((), (TensorSpec("y", "FP32", (1,)), TensorSpec("z", "FP32", (1,))), 1, 2)
ON_DEVICE = msgspec.structs.replace(LOADED, placed=(ProviderOperators("openvino", "1", 1),))
LOADING, WARMING_UP = encoded(StageReached("loading")), encoded(StageReached("warming_up"))
SERVES = LOADING + encoded(LOADED)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run on the loop that the server has."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work, LIMIT_S))


def answered(*tensors: Tensor, number: int = 0) -> bytes:
    return encoded(Outcome(number, heads(tensors)), *tensors)


def announced(message: wire.Message, payload: int) -> bytes:
    """A frame of which the payload is still to come."""
    frame = encoded(message)
    return PREFIX.pack(len(frame) - PREFIX.size, payload) + frame[PREFIX.size :]


LONG = Outcome(0, (wire.TensorHead("y", "UINT8", (2**28,), 2**28),))

WHILE_LOADING = {
    "endless stages": (LOADING, LOADING, "stage 'loading' twice, or out of order"),
    "stages backwards": (WARMING_UP, LOADING, "stage 'loading' twice, or out of order"),
    "a payload": (announced(LOADED, 2**28), bytes(2**16), "+ 268435456 bytes (header + payload), of at most"),
    "a long header": (PREFIX.pack(2**20 + 1, 0), bytes(2**16), "a frame of 1048577 + 0 bytes"),
    "answers": (encoded(Outcome(0)), answered(Y), "Invalid value 'Outcome'"),
    "probed": (encoded(wire.Probed(0, (), ())), LOADING, "Probed in answer to Load"),
    "on a device": (encoded(ON_DEVICE), LOADING, "where operators run is not what was asked for"),
    "no messages": (b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", "a frame of 1347703880 + "),
    "no msgpack": (PREFIX.pack(1, 0) + b"\xc1", b"\xc1", "MessagePack data is malformed"),
}
"""Bytes of a worker that has its order, those that it repeats, and the reason why the server kills it."""

WHEN_ASKED = {
    "no output of the model": (answered(OTHER), "output 'other', which was not asked for"),
    "output not asked for": (answered(floats("z", 1.0)), "output 'z', which was not asked for"),
    "output twice": (answered(Y, Y), "an output twice"),
    "other datatype": (answered(Tensor("y", "INT8", (1,), b"\0")), "output 'y' in another form"),
    "JSON": (answered(Tensor("y", "FP32", (1,), b"[1]", text=True)), "output 'y' in another form"),
    "shared memory": (
        encoded(Outcome(0, (wire.TensorHead("y", "FP32", (1,), 4, at=0),))),
        "an output outside of the answer's room",
    ),
    "answer of another": (answered(Y, number=1), "an answer that nothing asked for"),
    "answer twice": (2 * answered(Y), "a message that nothing asked for"),
    "stage": (LOADING, "Invalid value 'StageReached'"),
    "loaded again": (encoded(LOADED), "Invalid value 'Loaded'"),
    "order of its own": (encoded(wire.RunBegun((0,))), "which inferences it runs, without priorities"),
    "long header": (PREFIX.pack(2**16, 0), "a frame of 65536 + 0 bytes"),
    "endless answer": (announced(LONG, 2**28 + 1), "+ 268435457 bytes (header + payload)"),
}
"""Answers of a loaded worker to a request for the output y, and the reason why the server kills it."""


@pytest.mark.parametrize(
    ("placed", "refuses", "falls_back"),
    [
        (("tpu",), True, True),
        (("tpu", "cpu"), False, True),
        ((), False, False),
        (("cpu",), False, False),
        (("cpu", "tpu"), False, False),
        (("tpu", "tpu"), False, False),
        (("tpu", "cpu", "cpu"), False, False),
    ],
)
def test_report_of_a_device_names_it_and_the_cpu(
    placed: tuple[str, ...], *, refuses: bool, falls_back: bool
) -> None:
    nodes = [ProviderOperators(provider, "1", 1) for provider in placed]
    for expected, may in ((refuses, False), (falls_back, True)):
        device = TargetDevice("tpu:0", ProviderLibrary("tpu", "/tpu.so", "TPU"), falls_back=may)
        assert _is_plausible(device, nodes) == expected


async def load_fails(worker: Worker) -> None:
    with pytest.raises(WorkerDied):
        await worker.load(ORDER, lambda _: None)


async def request_fails(worker: Worker) -> None:
    """The first request may be answered, the next one is not."""
    await worker.load(ORDER, lambda _: None)
    asked = [worker.infer((), (wire.WantedOutput("y"),), timeout_s=FOR_EVER_S) for _ in range(2)]
    with contextlib.suppress(WorkerDied):
        await asked[0]
    with pytest.raises(WorkerDied):
        await asked[1]


async def ends(worker: Worker) -> None:
    await asyncio.shield(worker.ended)


@asynccontextmanager
async def serving_meanwhile(folder: Path) -> AsyncIterator[None]:
    """Run inferences on a good model meanwhile: each is answered, and the loop has its turns."""
    models.save(models.add(), folder, "m")
    async with running_pool() as pool:
        good, _ = await load(pool, order_of(folder))
        pauses_s, over = list[float](), False

        async def ask() -> None:
            while not over:
                assert await answer(good, floats("x", 1)) == [2]

        async def turn() -> None:
            while not over:
                began = time.monotonic()
                await asyncio.sleep(0.001)
                pauses_s.append(time.monotonic() - began)

        asking, turning = asyncio.create_task(ask()), asyncio.create_task(turn())
        try:
            yield
        finally:
            over = True
            await asyncio.gather(asking, turning)
        assert max(pauses_s) < PAUSE_S


def test_hostile_words_end_their_worker_only(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """While it loads, when it is asked, and when nothing is asked."""
    cases: dict[str, tuple[list[bytes], bytes, str, Callable[[Worker], Awaitable[None]], str]] = {
        **{f"loading: {k}": ([a], b, "data", load_fails, why) for k, (a, b, why) in WHILE_LOADING.items()},
        **{
            f"asked: {k}": ([SERVES, said], b"", "data", request_fails, why)
            for k, (said, why) in WHEN_ASKED.items()
        },
        "nothing ordered": ([], LOADING, "data", ends, "a message that nothing asked for"),
        "nothing asked": ([SERVES], answered(Y), "data", load_then_end, "a message that nothing asked for"),
        "control": ([LOADING], answered(Y), "control", load_fails, "a message that nothing asked for"),
    }

    async def hold_against_all() -> None:
        async with serving_meanwhile(tmp_path):
            for name, (said, flood, where, holds, why) in cases.items():
                with subtests.test(name):
                    async with impostor(*said, flood=flood, where=where) as worker:
                        await holds(worker)
                        await ends(worker)
                        assert worker.ended.result() == KILLED
                        [line] = worker.stderr_tail()
                        assert line.startswith("killed by the server: it sent ")
                        assert why in line

    run(hold_against_all())


async def load_then_end(worker: Worker) -> None:
    with contextlib.suppress(WorkerDied):
        await worker.load(ORDER, lambda _: None)
    await ends(worker)


async def test_announced_payload_takes_no_memory() -> None:
    """Of a worker that may answer: pages without bytes are not resident."""
    async with silent_worker() as it:
        loading = asyncio.ensure_future(it.worker.load(ORDER, lambda _: None))
        await asyncio.sleep(0)
        receive(it, SERVES)
        await loading
        asked = asyncio.ensure_future(it.worker.infer((), timeout_s=FOR_EVER_S))
        await asyncio.sleep(0)
        before = memory.private_bytes("self")
        receive(it, announced(LONG, 2**28))
        assert memory.private_bytes("self") - before < 2**24
    with pytest.raises(WorkerDied):
        await asked


# The budget of a turn


@asynccontextmanager
async def receiving(on_frame: Callable[[], None]) -> AsyncIterator[socket.socket]:
    """Open a channel of a serving worker; yields the worker's end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    lost = asyncio.Event()
    rules: FrameRules[wire.FromWorker] = FrameRules(wire.FROM_SERVING)
    channel = Channel(rules, lambda _: on_frame(), pytest.fail, lost.set)
    await channel.connect(ours)
    with theirs:
        yield theirs
    await lost.wait()


def count_turns() -> Callable[[], int]:
    """Count the turns of the loop from now on."""
    turn = 0

    def count_turn() -> None:
        nonlocal turn
        turn += 1
        asyncio.get_running_loop().call_soon(count_turn)

    count_turn()
    return lambda: turn


def test_answers_of_one_turn_are_bounded() -> None:
    """A thousand at once are passed on, a few in each turn of the loop."""

    async def send_thousand() -> None:
        turn, turns = count_turns(), list[int]()
        async with receiving(lambda: turns.append(turn())) as theirs:
            theirs.sendall(1000 * encoded(Outcome(0)))
        assert len(turns) == 1000
        assert max(len(list(some)) for _, some in itertools.groupby(turns)) <= FRAMES_PER_TURN

    run(send_thousand())


def test_bytes_of_one_turn_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the other side writes."""
    updated, data = Channel.buffer_updated, Tensor("y", "UINT8", (2**26,), bytes(2**26))

    async def send_much() -> None:
        turn, came, by_turn = count_turns(), asyncio.Event(), Counter[int]()

        def noted(channel: Channel, nbytes: int) -> None:
            by_turn[turn()] += nbytes
            updated(channel, nbytes)

        monkeypatch.setattr(Channel, "buffer_updated", noted)
        async with receiving(came.set) as theirs:
            await asyncio.gather(asyncio.to_thread(theirs.sendall, answered(data)), came.wait())
        assert by_turn.total() > 2**26
        assert max(by_turn.values()) <= BYTES_PER_TURN + READ_BYTES

    run(send_much())


# stderr, and the fork server's socket


def written_bytes(pid: int) -> int:
    """Return how much a process has written, to whatever (proc_pid_io(5))."""
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counts["wchar"])


async def test_stderr_flood_is_read_by_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail keeps the last lines; the server's reason follows them."""
    most = 2**18
    monkeypatch.setattr(forkclient, "BYTES_PER_S", most)
    async with impostor(flood=b"\xff line\n" * 1000, where="stderr") as worker:
        await until(lambda: worker._stderr._pause is not None)
        written = written_bytes(worker.pid)
        assert written < most + 2 * 2**16  # what the pipe holds, and its last read
        await until(lambda: written_bytes(worker.pid) > written + 2 * 2**16)  # in the next second
        worker._data.get_buffer(-1)[:13] = PREFIX.pack(1, 0) + b"?"
        worker._data.buffer_updated(13)
        await ends(worker)
    assert worker.stderr_tail()[:-1] == 63 * ["\ufffd line"]
    assert worker.stderr_tail()[-1] == "killed by the server: it sent a message that nothing asked for"
    worker.records_stderr = False
    assert worker.recorded_tail() == worker.stderr_tail()[-1:]


async def test_foreign_message_ends_the_fork_server(subtests: pytest.Subtests) -> None:
    """It answers nothing that was asked for, so whoever sent it is no fork server."""
    foreign: dict[str, list[object]] = {
        "junk": ["junk"],
        "fork": [Forked(1)],
        "failed fork": [ForkFailed("so it says")],
        "exit": [Exited(1, 0, None)],
        "untrue exit": [Exited(1, 2**63, None)],
        "ready twice": [Ready(), Ready()],
    }
    for name, messages in foreign.items():
        with subtests.test(name):
            before = descriptors(os.getpid())
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            stderr, nobody = os.pipe2(os.O_CLOEXEC)
            process = subprocess.Popen(["sleep", "1000"])  # noqa: ASYNC220 - it takes no time
            fork_server = ForkServer(process, os.pidfd_open(process.pid), ours, stderr)
            for message in messages:
                socket.send_fds(theirs, [msgspec.msgpack.encode(message)], [nobody])
            await asyncio.shield(fork_server.ended)
            assert process.returncode == -signal.SIGKILL
            if name != "ready twice":
                with pytest.raises(ForkServerUnavailable, match="a message that nothing asked for"):
                    await fork_server.ready
            os.close(nobody)
            theirs.close()
            assert descriptors(os.getpid()) == before


# Any words


def receive(it: Impostor, data: bytes) -> None:
    """Let the server read this; after a malformed frame it reads nothing."""
    channel = it.worker._data
    while data and not channel._transport.is_closing():  # type: ignore[union-attr]
        buffer = channel.get_buffer(-1)
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        channel.buffer_updated(count)
        data = data[count:]
