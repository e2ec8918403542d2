"""Running inferences: one request or a batch, its cancellation, and the answers on the data channel."""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import onnxruntime as ort

from runtime.errors import InferenceCancelled, InferenceFailed, RuntimeProblem
from runtime.wire import (
    JOINED_BYTES,
    PREFIX,
    Buffer,
    Infer,
    InferenceFailure,
    Message,
    Outcome,
    Tensor,
    plain_text,
)
from runtime.worker.batching import (
    BatchDimension,
    BatchRequest,
    OutputsNotBatched,
    join_inputs,
    split_outputs,
)
from runtime.worker.inference import Runner
from runtime.worker.sessions import is_out_of_memory, return_free_memory
from runtime.worker.sharedtensors import SharedTensors

HELD_BYTES = 256 * 2**10
"""Limit of unsent answers: about what a socket's buffer holds."""
HELD_NS = 200_000
"""Limit of an answer's wait for runs that take as long as the last: a dozen small ones."""
WATCH_S = 0.005
"""Interval in which a thread checks for unsent answers during a long run."""
MAX_BUFFERS = 512
"""Buffers in one writev; the kernel allows 1,024 (UIO_MAXIOV)."""

_ENCODER = msgspec.msgpack.Encoder()
_ROOM = bytes(PREFIX.size)


NO_MEMORY = "the worker has not enough memory for this inference"
_NO_MEMORY = InferenceFailed(NO_MEMORY)
"""Made now: there may be no memory for it when it is needed."""
SHRINK_ARENA = ("memory.enable_memory_arena_shrinkage", "cpu:0")
"""onnxruntime_run_options_config_keys.h: at the end of a run, free what no tensor uses."""


class Outbox:
    """Sends answers, and delays small ones while more are about to follow.

    Sending many answers at once saves both sides a system call each, and the server a turn of its loop. The
    price is that an answer waits for the runs after it: for `HELD_NS`, and if a run turns out to be longer
    than the one before, for twice `WATCH_S`, after which a thread sends it.

    When the server has closed the channel, the process ends.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._held = bytearray()
        self._since_ns = 0
        self._watched = threading.Event()
        self._watcher: threading.Thread | None = None

    def put(self, message: Message, parts: Sequence[Buffer] = ()) -> None:
        """Queue a frame with its tensors' data, which is sent now or at the latest with the next `flush`.

        Raises:
            MemoryError: there is no memory for it; nothing is queued.
        """
        payload = sum(map(len, parts))
        with self._lock:
            held = self._held
            if not held:
                self._since_ns = time.monotonic_ns()
            start = len(held)
            try:
                _append(held, message, payload, parts)
            except MemoryError:
                del held[start:]
                raise
            if payload < JOINED_BYTES:
                if len(held) < HELD_BYTES:
                    return
                parts = ()
            self._held = bytearray()
            self._send([held, *parts])

    def flush(self) -> None:
        with self._lock:
            if self._held:
                held, self._held = self._held, bytearray()
                self._send([held])

    def before_run(self, expected_ns: int) -> None:
        """Before a run, send the delayed answers or have the thread send them in time.

        Args:
            expected_ns: the likely duration of the run; it may take much longer.
        """
        if not self._held:
            return
        late = time.monotonic_ns() - self._since_ns + expected_ns > HELD_NS
        if late or not (self._watched.is_set() or self._watch()):
            self.flush()

    def _watch(self) -> bool:
        """Wake the thread; returns False if it cannot start, and nothing may be delayed."""
        if self._watcher is None:
            watcher = threading.Thread(target=self._run_watcher, name="outbox", daemon=True)
            try:
                watcher.start()
            except RuntimeError:  # no memory for it
                return False
            self._watcher = watcher
        self._watched.set()
        return True

    def _run_watcher(self) -> None:
        while self._watched.wait():
            time.sleep(WATCH_S)
            with self._lock:
                if not self._held:
                    self._watched.clear()
                elif time.monotonic_ns() - self._since_ns > WATCH_S * 1e9:
                    self._send_some()

    def _send_some(self) -> None:
        """Send what the socket takes at once: to block here would block the other thread."""
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
                sent = os.writev(self._channel.fileno(), buffers[:MAX_BUFFERS])
                while buffers and sent >= len(buffers[0]):
                    sent -= len(buffers.pop(0))
                if buffers:
                    buffers[0] = buffers[0][sent:]
        except (OSError, MemoryError):  # the channel is closed; or half a frame is sent
            os._exit(0)


def _append(held: bytearray, message: Message, payload: int, parts: Sequence[Buffer]) -> None:
    """Append a frame, with its payload if that is short."""
    start = len(held)
    held += _ROOM
    _ENCODER.encode_into(message, held, -1)
    header = len(held) - start - PREFIX.size
    PREFIX.pack_into(held, start, header, payload)
    if payload < JOINED_BYTES:
        for part in parts:
            held += part


class Cancellation:
    """Assigns each cancellation to its inference, which may be still to come, waiting or running.

    The worker's two threads share it. One execution runs at a time, of one inference or of a batch.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Sequence[int] = ()
        self._options: ort.RunOptions | None = None
        self._latest = -1
        self._waiting: set[int] = set()
        self._cancelled: set[int] = set()

    def wait(self, number: int) -> None:
        """Note that an inference waits, and that later ones may start before it."""
        with self._lock:
            self._waiting.add(number)

    def drop(self, number: int) -> bool:
        """Return whether a waiting or new inference is cancelled; if so, it is over."""
        if not self._cancelled:  # as nearly always; `begin` finds later cancellations
            return False
        with self._lock:
            if number not in self._cancelled:
                return False
            self._cancelled.discard(number)
            self._waiting.discard(number)
            self._latest = max(self._latest, number)
            return True

    def skip(self, number: int) -> None:
        with self._lock:
            self._cancelled.discard(number)
            self._latest = max(self._latest, number)

    def begin(self, numbers: Sequence[int]) -> ort.RunOptions | None:
        """Start these inferences; returns None and starts none if one of them is cancelled."""
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
        """End the running inferences; cancellations of them are forgotten."""
        with self._lock:
            if self._cancelled:
                self._cancelled.difference_update(self._running)
            self._running, self._options = (), None

    def end_for_rerun(self) -> None:
        """Let the running inferences wait again; their cancellations stay."""
        with self._lock:
            self._waiting.update(self._running)
            self._running, self._options = (), None

    def cancel(self, number: int) -> None:
        """Cancel an inference that runs, waits or is still to come; one that is over is ignored."""
        with self._lock:
            if number in self._running and self._options is not None:
                self._options.terminate = True
                self._cancelled.add(number)
            elif number > self._latest or number in self._waiting:
                self._cancelled.add(number)


class InferenceExecutor:
    """Runs a model for requests, and answers each; another thread reads cancellations meanwhile.

    Args:
        runner: runs the model.
        outbox: takes the answers.
        cancellation: what the other thread cancels.
        dimension: that of batches; None runs each request alone.
        shared: where long outputs go.
        clock: measures runs of one request, in nanoseconds.
    """

    def __init__(
        self,
        runner: Runner,
        outbox: Outbox,
        cancellation: Cancellation,
        dimension: BatchDimension | None,
        shared: SharedTensors,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._runner = runner
        self._outbox = outbox
        self._cancellation = cancellation
        self._dimension = dimension
        self._clock = clock
        self._shared = shared
        self._last_run_ns = 0
        self._free_ns = 0  # when the latest request was over
        self._must_shrink = False

    def prepare(self, infer: Infer, tensors: Sequence[Tensor]) -> BatchRequest | None:
        """Decode a request; None if it is refused or cancelled, which is answered.

        A cancelled request is not decoded: a long text would take longer than the client waits.
        """
        if self._drop_cancelled(infer.id):
            return None
        came_ns = time.monotonic_ns()
        if self._must_shrink:  # of an earlier request, whose objects are gone by now
            return_free_memory()
        try:
            outputs = self._runner.select_outputs(infer.outputs, infer.text, infer.digest)
            feed = self._runner.decode_inputs(tensors)
            size, alone = (1, True) if self._dimension is None else self._dimension.measure(feed)
        except MemoryError:
            self.refuse(infer.id)
        except RuntimeProblem as problem:  # keep no other reference: its traceback holds the tensors
            self.refuse(infer.id, problem)
        else:
            queue_ns = max(0, self._free_ns - infer.sent_ns) if infer.sent_ns else 0
            self._free_ns = time.monotonic_ns()
            input_ns = self._free_ns - came_ns
            room = None if infer.room is None else self._shared.room(infer.room)
            return BatchRequest(
                infer.id, outputs, feed, size, alone, infer.sent_ns, came_ns, input_ns, queue_ns, room
            )
        return None

    def run(self, batch: Sequence[BatchRequest]) -> None:
        """Run a batch at once or, if a request makes it fail, one request after the other."""
        if len(batch) > 1:
            batch = [request for request in batch if not self._drop_cancelled(request.number)]
        if batch and not self._run_at_once(batch):
            for request in batch:
                self._run_at_once((request,))
        self._free_ns = time.monotonic_ns()

    def _begin(self, numbers: Sequence[int]) -> ort.RunOptions | None:
        """Start these inferences as `Cancellation.begin` does; after a lack of memory, shrink the arena."""
        options = self._cancellation.begin(numbers)
        if options is not None and self._must_shrink:
            options.add_run_config_entry(*SHRINK_ARENA)
            self._must_shrink = False
        return options

    def _run_at_once(self, batch: Sequence[BatchRequest]) -> bool:
        """Run and answer these requests; of several none is answered, and False returned, if the run fails.

        So no request fails because of another.
        """
        is_one = len(batch) == 1
        try:
            self._outbox.before_run(self._last_run_ns)
            begun_ns = time.monotonic_ns()
            options = self._begin([request.number for request in batch])
            if options is None:
                return is_one and self._drop_cancelled(batch[0].number)
            feed = batch[0].feed if is_one else join_inputs(batch)
            joined_ns, started_ns = time.monotonic_ns(), self._clock()
            arrays = self._runner.run(batch[0].outputs, feed, options)
            self._last_run_ns = self._clock() - started_ns
            ran_ns = time.monotonic_ns()
            parts = [arrays] if is_one else split_outputs(batch, arrays)
        except (MemoryError, RuntimeProblem, OutputsNotBatched) as error:
            if is_one:
                self._cancellation.end()
                self._fail(batch[0].number, error if isinstance(error, RuntimeProblem) else _NO_MEMORY)
            else:
                self._cancellation.end_for_rerun()
            return is_one
        self._cancellation.end()
        del arrays
        execution_size = sum(request.size for request in batch)
        for request, part in zip(batch, parts, strict=True):
            queue_ns = _queue_ns(request, begun_ns)
            times = queue_ns, request.input_ns + joined_ns - begun_ns, self._last_run_ns
            problem = self._answer(request, part, times, ran_ns, execution_size)
            if problem is None:
                execution_size = 0
            else:
                part.clear()  # else there may be no memory for the message
                self._fail(request.number, problem)
        return True

    def _answer(
        self,
        request: BatchRequest,
        arrays: Sequence[object],
        times: tuple[int, int, int],
        ran_ns: int,
        execution_size: int,
    ) -> RuntimeProblem | None:
        """Answer a request that was run; returns why its outputs could not be sent, and None if they were.

        The encoding of its outputs includes that of the requests before it in a batch.
        """
        try:
            heads, parts = self._runner.encode_outputs(request.outputs, arrays, request.room)
            output_ns = time.monotonic_ns() - ran_ns
            outcome = Outcome(request.number, heads, *times, output_ns, request.size, execution_size)
            self._outbox.put(outcome, parts)
            if request.room is not None and request.room.is_used:  # so long an answer waits for no other
                self._outbox.flush()
        except MemoryError:
            return _NO_MEMORY
        except RuntimeProblem as problem:
            return problem.with_traceback(None)  # it holds what was encoded
        return None

    def _drop_cancelled(self, number: int) -> bool:
        dropped = self._cancellation.drop(number)
        if dropped:
            self._fail(number, InferenceCancelled())
        return dropped

    def refuse(self, number: int, problem: RuntimeProblem = _NO_MEMORY) -> None:
        """Answer a request that is not run; by default for lack of memory."""
        self._cancellation.skip(number)
        self._fail(number, problem)
        self._free_ns = time.monotonic_ns()

    def _fail(self, number: int, problem: RuntimeProblem) -> None:
        text = str(problem)
        if problem is _NO_MEMORY or is_out_of_memory(text):
            self._must_shrink = True  # ONNX Runtime keeps what it took, and later requests would lack it
        self._outbox.put(InferenceFailure(number, problem.code, plain_text(text)))


def _queue_ns(request: BatchRequest, begun_ns: int) -> int:
    """Return how long a request waited for others, and to be run; copying and decoding it are no part."""
    return request.queue_ns + begun_ns - request.came_ns - request.input_ns
