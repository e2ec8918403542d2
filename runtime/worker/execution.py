"""Running inferences: one request or a batch, its cancellation, and the answers on the data channel."""

import os
import socket
import threading
import time
from collections.abc import Sequence

import msgspec
import onnxruntime as ort

from runtime.errors import InferenceCancelled, InferenceFailed, RuntimeProblem
from runtime.wire import PREFIX, Buffer, Infer, InferenceFailure, Message, Outcome, Tensor, plain_text
from runtime.worker.batching import (
    BatchDimension,
    BatchRequest,
    OutputsNotBatched,
    join_inputs,
    split_outputs,
)
from runtime.worker.inference import Runner

JOINED_BYTES = 32 * 2**10
"""Copying this much takes about as long as one more buffer in a system call."""
HELD_BYTES = 256 * 2**10
"""So much waits at most to be sent: what a socket's buffer holds about."""
HELD_NS = 200_000
"""So long an answer waits at most for runs that take as long as the last: a dozen small ones."""
WATCH_S = 0.005
"""How often it is looked whether a run that began with answers unsent has ended."""
MAX_BUFFERS = 512
"""Of one sendmsg; the kernel takes 1,024 (UIO_MAXIOV)."""

_ENCODER = msgspec.msgpack.Encoder()
_ROOM = bytes(PREFIX.size)


class Outbox:
    """Sends, and holds back what is small while more is about to follow.

    Sending many answers at once saves both sides a call of the kernel each, and the server a turn of its
    loop. The price is that an answer waits for the runs after it: for `HELD_NS`, and if one turns out to be
    longer than the one before for two times `WATCH_S`, after which a thread sends what waits.

    If the server has closed the channel nobody waits for anything any more, and the process ends.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._held = bytearray()
        self._since_ns = 0
        self._watched = threading.Event()
        self._watcher: threading.Thread | None = None

    def put(self, message: Message, parts: Sequence[Buffer] = ()) -> None:
        """Take a frame, to be sent now or at the latest with the next `flush`.

        The message has to be one that the other side takes, and `parts` the data of its tensors.
        """
        payload = sum(map(len, parts))
        with self._lock:
            held = self._held
            if not held:
                self._since_ns = time.monotonic_ns()
            start = len(held)
            held += _ROOM
            _ENCODER.encode_into(message, held, -1)
            PREFIX.pack_into(held, start, len(held) - start - PREFIX.size, payload)
            if payload < JOINED_BYTES:
                for part in parts:
                    held += part
                if len(held) < HELD_BYTES:
                    return
                parts = ()
            self._held = bytearray()
            self._send([held, *parts])

    def flush(self) -> None:
        """Send what is held back."""
        with self._lock:
            if self._held:
                held, self._held = self._held, bytearray()
                self._send([held])

    def before_run(self, expected_ns: int) -> None:
        """Send what is held back, or see to it that it is sent, before something runs.

        Args:
            expected_ns: how long it is likely to take; it may take much longer.
        """
        if not self._held:
            return
        late = time.monotonic_ns() - self._since_ns + expected_ns > HELD_NS
        if late or not (self._watched.is_set() or self._watch()):
            self.flush()

    def _watch(self) -> bool:
        """Have the thread look from now on; without one, nothing may be held back."""
        if self._watcher is None:
            watcher = threading.Thread(target=self._look, name="outbox", daemon=True)
            try:
                watcher.start()
            except RuntimeError:  # no memory for it
                return False
            self._watcher = watcher
        self._watched.set()
        return True

    def _look(self) -> None:
        while self._watched.wait():
            time.sleep(WATCH_S)
            with self._lock:
                if not self._held:
                    self._watched.clear()
                elif time.monotonic_ns() - self._since_ns > WATCH_S * 1e9:
                    self._send_some()

    def _send_some(self) -> None:
        """Send what goes without waiting: whoever waits here holds up the other thread."""
        try:
            del self._held[: self._channel.send(self._held, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            return
        except OSError:
            os._exit(0)

    def _send(self, parts: Sequence[Buffer]) -> None:
        buffers = [memoryview(part) for part in parts if len(part)]
        try:
            while buffers:
                sent = self._channel.sendmsg(buffers[:MAX_BUFFERS])
                while buffers and sent >= len(buffers[0]):
                    sent -= len(buffers.pop(0))
                if buffers:
                    buffers[0] = buffers[0][sent:]
        except OSError:
            os._exit(0)


class Cancellation:
    """Keeps a cancellation for exactly the inference that it is meant for, be it to come, waiting or running.

    One execution runs at a time, of one inference or of several that go together.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Sequence[int] = ()
        self._options: ort.RunOptions | None = None
        self._latest = -1
        self._waiting: set[int] = set()
        self._cancelled: set[int] = set()

    def wait(self, number: int) -> None:
        """Note that an inference has come, and that later ones may be begun before it."""
        with self._lock:
            self._waiting.add(number)

    def drop(self, number: int) -> bool:
        """Tell whether an inference that waits, or has just come, is cancelled; it is then over."""
        if not self._cancelled:  # as nearly always; what is cancelled from here on, `begin` finds
            return False
        with self._lock:
            if number not in self._cancelled:
                return False
            self._cancelled.discard(number)
            self._waiting.discard(number)
            self._latest = max(self._latest, number)
            return True

    def skip(self, number: int) -> None:
        """Note that an inference has come and is over: it cannot be run."""
        with self._lock:
            self._cancelled.discard(number)
            self._latest = max(self._latest, number)

    def begin(self, numbers: Sequence[int]) -> ort.RunOptions | None:
        """Note that these inferences start; None, and they do not, if one of them is cancelled."""
        options = ort.RunOptions()  # of its own for each execution: `terminate` must not outlive it
        with self._lock:
            if self._cancelled and not self._cancelled.isdisjoint(numbers):
                return None
            if self._waiting:
                self._waiting.difference_update(numbers)
            self._latest = max(self._latest, *numbers)
            self._running, self._options = numbers, options
        return options

    def end(self) -> None:
        """Note that what ran is over; who was cancelled meanwhile and has an answer is cancelled no more."""
        with self._lock:
            if self._cancelled:
                self._cancelled.difference_update(self._running)
            self._running, self._options = (), None

    def end_for_rerun(self) -> None:
        """Note that what ran waits again; who was cancelled meanwhile stays cancelled."""
        with self._lock:
            self._waiting.update(self._running)
            self._running, self._options = (), None

    def cancel(self, number: int) -> None:
        """Stop an inference, or see to it that it does not begin; of one that is over nothing happens."""
        with self._lock:
            if number in self._running and self._options is not None:
                self._options.terminate = True
                self._cancelled.add(number)
            elif number > self._latest or number in self._waiting:
                self._cancelled.add(number)


NO_MEMORY = "the worker has not enough memory for this inference"


class InferenceExecutor:
    """Runs a model for requests, and answers each.

    Args:
        runner: runs the model.
        outbox: where the answers go.
        cancellation: is told what runs.
        dimension: for a model with a batch dimension.
    """

    def __init__(
        self, runner: Runner, outbox: Outbox, cancellation: Cancellation, dimension: BatchDimension | None
    ) -> None:
        self._runner = runner
        self._outbox = outbox
        self._cancellation = cancellation
        self._dimension = dimension
        self._last_run_ns = 0

    def prepare(self, infer: Infer, tensors: Sequence[Tensor]) -> BatchRequest | None:
        """Read a request; None if it was answered that it is none that can be run.

        Nothing of what is cancelled already is read: a long text takes more time than a client's 504.
        """
        if self._dropped(infer.id):
            return None
        came_ns = time.monotonic_ns()
        try:
            asked = self._runner.select_outputs(infer.outputs, infer.text, infer.digest)
            feed = self._runner.decode_inputs(tensors)
            size, alone = (1, True) if self._dimension is None else self._dimension.measure(feed)
        except MemoryError:
            self._refuse(infer.id, InferenceFailed(NO_MEMORY))
        except RuntimeProblem as problem:  # in no other name: its traceback holds the tensors
            self._refuse(infer.id, problem)
        else:
            input_ns = time.monotonic_ns() - came_ns
            return BatchRequest(infer.id, asked, feed, size, alone, infer.sent_ns, came_ns, input_ns)
        return None

    def run(self, batch: Sequence[BatchRequest]) -> None:
        """Run requests that go together, at once or, if one of them spoils that, one after the other."""
        if len(batch) > 1:
            batch = [request for request in batch if not self._dropped(request.number)]
        if len(batch) > 1 and self._run_at_once(batch):
            return
        for request in batch:
            self._run_alone(request)

    def _run_alone(self, request: BatchRequest) -> None:
        begun_ns = time.monotonic_ns()
        options = self._cancellation.begin((request.number,))
        try:
            if options is None:
                self._cancellation.drop(request.number)
                raise InferenceCancelled
            self._outbox.before_run(self._last_run_ns)
            arrays = self._runner.run(request.outputs, request.feed, options)
            self._last_run_ns = time.monotonic_ns() - begun_ns
        except MemoryError:
            self._fail(request.number, InferenceFailed(NO_MEMORY))
        except RuntimeProblem as problem:
            self._fail(request.number, problem)
        else:
            times = _queue_ns(request, begun_ns), request.input_ns, self._last_run_ns
            self._answer(request, arrays, times, request.size)
        finally:
            self._cancellation.end()

    def _run_at_once(self, batch: Sequence[BatchRequest]) -> bool:
        """Run a batch and answer all of it, or nothing of it: no request is to suffer from another."""
        begun_ns = time.monotonic_ns()
        options = self._cancellation.begin([request.number for request in batch])
        if options is None:
            return False
        self._outbox.before_run(self._last_run_ns)
        try:
            feed = join_inputs(batch)
            joined_ns = time.monotonic_ns()
            arrays = self._runner.run(batch[0].outputs, feed, options)
            ran_ns = time.monotonic_ns()
            self._last_run_ns = ran_ns - begun_ns
            parts = split_outputs(batch, arrays)
        except (MemoryError, RuntimeProblem, OutputsNotBatched):
            self._cancellation.end_for_rerun()
            return False
        self._cancellation.end()
        execution_size = sum(request.size for request in batch)
        for request, part in zip(batch, parts, strict=True):
            queue_ns = _queue_ns(request, begun_ns)
            times = queue_ns, request.input_ns + joined_ns - begun_ns, ran_ns - joined_ns
            if self._answer(request, part, times, execution_size):
                execution_size = 0
        return True

    def _answer(
        self,
        request: BatchRequest,
        arrays: Sequence[object],
        times: tuple[int, int, int],
        execution_size: int,
    ) -> bool:
        """Answer a request that was run; tells whether it has its outputs."""
        split_ns = time.monotonic_ns()
        try:
            heads, parts = self._runner.encode_outputs(request.outputs, arrays)
        except MemoryError:
            self._fail(request.number, InferenceFailed(NO_MEMORY))
        except RuntimeProblem as problem:
            self._fail(request.number, problem)
        else:
            output_ns = time.monotonic_ns() - split_ns
            outcome = Outcome(request.number, heads, *times, output_ns, request.size, execution_size)
            self._outbox.put(outcome, parts)
            return True
        return False

    def _dropped(self, number: int) -> bool:
        dropped = self._cancellation.drop(number)
        if dropped:
            self._fail(number, InferenceCancelled())
        return dropped

    def _refuse(self, number: int, problem: RuntimeProblem) -> None:
        self._cancellation.skip(number)
        self._fail(number, problem)

    def _fail(self, number: int, problem: RuntimeProblem) -> None:
        self._outbox.put(InferenceFailure(number, problem.code, plain_text(str(problem))))


def _queue_ns(request: BatchRequest, begun_ns: int) -> int:
    """Return for how long a request waited, what it took to read it left out."""
    return max(0, begun_ns - request.sent_ns - request.input_ns) if request.sent_ns else 0
