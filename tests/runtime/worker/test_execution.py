"""What the worker's executor does without a worker around it."""

import socket
import tracemalloc
from collections.abc import Iterator

import onnxruntime as ort
import pytest
from support import models

from runtime.frames import FrameReader
from runtime.wire import FROM_WORKER, Failure, Infer, Tensor, TensorSpec, WantedOutput
from runtime.worker.cancellation import Cancellation
from runtime.worker.execution import Executor
from runtime.worker.inference import Runner
from runtime.worker.outbox import Outbox

NO_NUMBERS = Tensor("x", "FP32", (1,), b'["none"]', text=True)


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def runner() -> Runner:
    session = ort.InferenceSession(models.add().SerializeToString(), providers=["CPUExecutionProvider"])
    return Runner(session, [TensorSpec("x", "FP32", (-1,))], [TensorSpec("y", "FP32", (-1,))])


def test_what_was_cancelled_before_it_came_is_not_read(
    channel: tuple[socket.socket, socket.socket], runner: Runner
) -> None:
    outbox, cancellation = Outbox(channel[1]), Cancellation()
    executor = Executor(runner, outbox, cancellation, None)
    cancellation.cancel(1)
    for number in range(3):
        assert executor.prepare(Infer(number), [NO_NUMBERS]) is None
    outbox.flush()
    reader = FrameReader(FROM_WORKER)
    answers = [message for message, _ in reader.advance(channel[0].recv_into(reader.buffer()))]
    codes = [(answer.id, answer.code) for answer in answers if isinstance(answer, Failure)]
    assert codes == [(0, "invalid_input"), (1, "inference_cancelled"), (2, "invalid_input")]


def test_an_output_named_without_end_is_answered_and_not_remembered(runner: Runner) -> None:
    once = (WantedOutput("y"),)
    assert runner.asked(once, False) is runner.asked(once, False)
    tracemalloc.start()
    try:
        for count in range(50, 100):
            assert runner.asked(tuple(WantedOutput("y") for _ in range(count * 100)), False).names == ["y"]
        assert tracemalloc.get_traced_memory()[0] < 2**20
    finally:
        tracemalloc.stop()
