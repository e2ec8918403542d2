"""The worker: the process that holds one session of one model version.

Its main thread serves the data channel: reads, runs, answers, with no hand-over between. A second thread
sleeps on the control channel, so that a cancellation reaches an inference that is running. The worker ends
when either channel does, when it is told something that is no frame, and after a load that failed.
"""

import os
import socket
import threading
from collections.abc import Sequence
from typing import NoReturn

import onnxruntime as ort

from runtime.errors import InferenceCancelled, InferenceFailed, LoadRefused, RuntimeProblem
from runtime.frames import FrameReader
from runtime.inference import Runner
from runtime.loading import load, warm_up
from runtime.wire import (
    CONTROL,
    TO_WORKER,
    Failure,
    Frame,
    Infer,
    Load,
    LoadFailed,
    M,
    MalformedFrame,
    Message,
    Outcome,
    Stage,
    Tensor,
    ToWorker,
    encode,
    heads,
    plain_text,
)

EX_PROTOCOL = 76
"""sysexits.h: what a worker exits with when it was told something that is no frame."""
MAX_BUFFERS = 512
"""Of one sendmsg; the kernel takes 1,024 (UIO_MAXIOV)."""
STACK_BYTES = 512 * 2**10
"""Of our own threads, which do little. The usual 8 MiB would count against a memory limit."""


def prepare() -> None:
    """Do once, in the fork server, what every worker would have to do first."""
    warm_up()


def main(data: int, control: int) -> NoReturn:
    """Run a worker on the descriptors of its two channels; ends the process."""
    threading.stack_size(STACK_BYTES)
    cancellation = _Cancellation()
    listener = socket.socket(fileno=control)
    threading.Thread(target=_listen, args=(listener, cancellation), name="control", daemon=True).start()
    _Worker(socket.socket(fileno=data), cancellation).serve()
    os._exit(0)


class _Cancellation:
    """What both threads share: which inference runs, and which are not to be run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[int, ort.RunOptions] | None = None
        self._latest = -1
        self._cancelled: set[int] = set()

    def begin(self, number: int) -> ort.RunOptions:
        """Note that an inference starts; one that is cancelled already gets options that end it at once."""
        options = ort.RunOptions()
        with self._lock:
            options.terminate = number in self._cancelled
            self._cancelled.discard(number)
            self._latest = number
            self._running = (number, options)
        return options

    def end(self) -> None:
        """Note that nothing runs."""
        with self._lock:
            self._running = None

    def cancel(self, number: int) -> None:
        """Stop an inference, or see to it that it does not begin."""
        with self._lock:
            if self._running is not None and self._running[0] == number:
                self._running[1].terminate = True
            elif number > self._latest:
                self._cancelled.add(number)


class _Worker:
    """Serves the data channel, one message after the other."""

    def __init__(self, channel: socket.socket, cancellation: _Cancellation) -> None:
        self._channel = channel
        self._cancellation = cancellation
        self._runner: Runner | None = None

    def serve(self) -> None:
        """Answer until the channel ends."""
        reader = FrameReader(TO_WORKER)
        while count := _receive(self._channel, reader):
            for message, tensors in _frames(reader, count):
                self._handle(message, tensors)

    def _handle(self, message: ToWorker, tensors: Sequence[Tensor]) -> None:
        if isinstance(message, Load) and self._runner is None:
            self._load(message)
        elif isinstance(message, Infer) and self._runner is not None:
            self._infer(self._runner, message, tensors)
        else:
            os._exit(EX_PROTOCOL)

    def _load(self, order: Load) -> None:
        try:
            model = load(order, lambda stage: self._send(Stage(stage)))
        except LoadRefused as refusal:
            self._send(LoadFailed(refusal.code, plain_text(str(refusal))))
            os._exit(0)
        self._runner = Runner(model.session)
        self._send(model.report)

    def _infer(self, runner: Runner, request: Infer, tensors: Sequence[Tensor]) -> None:
        options = self._cancellation.begin(request.id)
        try:
            if options.terminate:
                raise InferenceCancelled
            outputs = runner.run(tensors, [output.name for output in request.outputs], options)
        except MemoryError:
            self._fail(request, InferenceFailed("the worker has not enough memory for this inference"))
        except RuntimeProblem as problem:
            self._fail(request, problem)
        else:
            self._send(Outcome(request.id, heads(outputs)), outputs)
        finally:
            self._cancellation.end()

    def _fail(self, request: Infer, problem: RuntimeProblem) -> None:
        self._send(Failure(request.id, problem.code, plain_text(str(problem))))

    def _send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        buffers = [memoryview(part) for part in encode(message, tensors)]
        try:
            while buffers:
                sent = self._channel.sendmsg(buffers[:MAX_BUFFERS])
                while buffers and sent >= len(buffers[0]):
                    sent -= len(buffers.pop(0))
                if buffers:
                    buffers[0] = buffers[0][sent:]
        except OSError:  # the server has closed the channel: nobody waits for anything any more
            os._exit(0)


def _listen(channel: socket.socket, cancellation: _Cancellation) -> None:
    """Serve the control channel. Its end is the worker's, even while it computes."""
    reader = FrameReader(CONTROL)
    while count := _receive(channel, reader):
        for message, _ in _frames(reader, count):
            cancellation.cancel(message.id)
    os._exit(0)


def _receive(channel: socket.socket, reader: FrameReader[M]) -> int:
    try:
        return channel.recv_into(reader.buffer())
    except ConnectionError:
        return 0


def _frames(reader: FrameReader[M], count: int) -> list[Frame[M]]:
    try:
        return reader.advance(count)
    except MalformedFrame as error:
        os.write(2, f"malformed frame: {error}\n".encode("utf-8", "replace"))
        os._exit(EX_PROTOCOL)
