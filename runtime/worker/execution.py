"""Running inferences: one request or a batch, its cancellation, and the answers on the data channel."""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence

import msgspec
import onnxruntime as ort

from runtime.errors import InferenceCancelled, InferenceFailed, InferenceTimeout, RuntimeProblem
from runtime.memory import return_free_memory
from runtime.wire import (
    JOINED_BYTES,
    MAX_BEGUN,
    PREFIX,
    Buffer,
    Infer,
    InferenceFailure,
    Message,
    Outcome,
    RunBegun,
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
from runtime.worker.sessions import describe_room, is_out_of_memory
from runtime.worker.sharedtensors import SharedTensors

HELD_BYTES = 256 * 2**10
"""Limit of unsent answers: about what a socket's buffer holds."""
HELD_NS = 200_000
"""Limit of an answer's wait for runs that take as long as the last: a dozen small ones."""
WATCH_S = 0.005
"""Interval in which a thread checks for unsent answers during a long run."""
MAX_BUFFERS = 512
"""Buffers in one writev; the kernel allows 1,024 (UIO_MAXIOV)."""

KEPT_RUNS = 16
"""Latest runs of a size of inputs whose durations are kept."""
KNOWN_NS = 10**9
"""After so long without a run the next request is tried, whatever the duration of earlier runs."""
TRIAL_SHARE = 16
"""A sixteenth of the time of runs may go into trials that turn out late, if trials before were in time."""
MAX_TRIAL_PRICE = 8
"""Each late trial in a row counts for twice as much as the one before, up to so much: where no prediction is
wrong, the goodput under deadlines stays (with a sixteenth for each, it fell by up to a fifth, measured)."""
UNUSUAL = 2
"""A run is unusually long if it takes this many times the longest of the latest runs."""

_ENCODER = msgspec.msgpack.Encoder()
_ROOM = bytes(PREFIX.size)


NO_MEMORY = "the worker has not enough memory for this inference"
_NO_MEMORY = InferenceFailed(NO_MEMORY)
"""Made in advance: there may be no memory for it when it is needed."""
MOST_RERUNS = 2
"""After a lack of memory: the first shrinks the arena at its end, the second has all memory."""
SHRINK_ARENA = ("memory.enable_memory_arena_shrinkage", "cpu:0")
"""onnxruntime_run_options_config_keys.h: at the end of a run, free what no tensor uses."""


class Outbox:
    """Sends answers, and delays small ones while more are about to follow.

    Sending many answers at once saves both sides a system call each, and the server a turn of its loop. The
    price is that an answer waits for the runs after it: for `HELD_NS`, and if a run is longer than the one
    before, for twice `WATCH_S`, after which a thread sends it.

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
        """Queue a frame with its tensors' data; it is sent now or at the latest with the next `flush`.

        Raises:
            MemoryError: there is no memory for the frame; nothing is queued.
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
        """Wake the thread; returns False if the thread cannot start, so that nothing may be delayed."""
        if self._watcher is None:
            watcher = threading.Thread(target=self._run_watcher, name="outbox", daemon=True)
            try:
                watcher.start()
            except RuntimeError:  # no memory for a thread
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
        """Send as much as the socket takes at once: blocking here would block the other thread."""
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
        except (OSError, MemoryError):  # the channel is closed, or half a frame is sent
            os._exit(0)

    def fail(self, number: int, problem: RuntimeProblem) -> None:
        """Queue the answer to an inference without outputs."""
        self.put(InferenceFailure(number, problem.code, plain_text(str(problem))))


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


class LatestRuns:
    """Durations of a model's latest runs, to predict that of a request by the size of its inputs.

    Sizes with the same power of two count as equal. The duration may depend on something else, such as a
    value (the steps of a loop, the length of a text): a prediction that lets nothing run is never corrected.
    So a request that is predicted to be late is tried all the same while there is spare time: each run adds
    a share of its duration to it, and a trial that is late takes its own away. Trials that are in time take
    none of it, and so follow one another.

    Attributes:
        slowest_ns: the longest of all runs.
        spare_ns: how long trials may run in vain: at first, and at most, as long as the longest run.
    """

    def __init__(self) -> None:
        self.slowest_ns = 0
        self.spare_ns = KNOWN_NS  # bounded by the first run
        self._trial_price = 1
        self._durations_ns: dict[int, deque[int]] = {}
        self._ended_ns: dict[int, int] = {}

    def add(self, input_bytes: int, duration_ns: int, ended_ns: int) -> None:
        magnitude = input_bytes.bit_length()
        if magnitude not in self._durations_ns:
            self._durations_ns[magnitude] = deque(maxlen=KEPT_RUNS)
        self._durations_ns[magnitude].append(duration_ns)
        self._ended_ns[magnitude] = ended_ns
        self.slowest_ns = max(self.slowest_ns, duration_ns)
        self.spare_ns = min(self.slowest_ns, self.spare_ns + duration_ns // TRIAL_SHARE)

    def waste(self, duration_ns: int) -> None:
        """Count the time of a trial that was late."""
        self.spare_ns -= duration_ns * self._trial_price
        self._trial_price = min(MAX_TRIAL_PRICE, 2 * self._trial_price)

    def end_trial(self) -> None:
        """Note that a trial was in time."""
        self._trial_price = 1

    def longest_ns(self, input_bytes: int) -> int:
        return max(self._durations_ns.get(input_bytes.bit_length(), ()), default=0)

    def needed_ns(self, input_bytes: int, waited_ns: int, now_ns: int) -> int:
        """Return the least time that a request needs; 0 if no run was recorded within `KNOWN_NS`.

        A request that has waited for a run is one of many, and another could be in time instead: it needs as
        long as seven of eight runs took. Any other request is tried if a single run was short enough.
        """
        magnitude = input_bytes.bit_length()
        if now_ns - self._ended_ns.get(magnitude, -KNOWN_NS) > KNOWN_NS:
            return 0
        durations_ns = sorted(self._durations_ns[magnitude])
        has_waited = waited_ns > durations_ns[0]
        return durations_ns[len(durations_ns) * 7 // 8 if has_waited else 0]


class Cancellation:
    """Assigns each cancellation to its inference, which may be running, waiting or still to come.

    The worker's two threads share the object. One execution runs at a time, of one inference or of a batch. A
    member that is given up leaves its batch, which goes on for the others unless it takes unusually long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Sequence[int] = ()
        self._options: ort.RunOptions | None = None
        self._latest = -1
        self._waiting: set[int] = set()
        self._usual_until_ns = 0
        self._cancelled: dict[int, bool] = {}  # whether the inference is answered

    def wait(self, number: int) -> None:
        """Note that an inference waits, and that later ones may start before it."""
        with self._lock:
            self._waiting.add(number)

    def drop(self, number: int) -> bool | None:
        """Take a waiting or new inference out if it is cancelled.

        Returns:
            Whether the inference is answered; None if it is not cancelled.
        """
        if not self._cancelled:  # the usual case; `begin` finds later cancellations
            return None
        with self._lock:
            return self._forget(number) if number in self._cancelled else None

    def skip(self, number: int) -> bool:
        """Remove a waiting or new inference; returns whether it is answered, as cancelled."""
        with self._lock:
            return self._forget(number)

    def _forget(self, number: int) -> bool:
        self._waiting.discard(number)
        self._latest = max(self._latest, number)
        return self._cancelled.pop(number, False)

    def begin(self, numbers: Sequence[int], usual_ns: int = 0) -> ort.RunOptions | None:
        """Start these inferences; returns None and starts none if one of them is cancelled.

        After `usual_ns` a member that is given up ends the run, as its inputs may be the reason of the delay.
        """
        options = ort.RunOptions()  # of its own for each execution: `terminate` must not outlive it
        with self._lock:
            if self._cancelled and not self._cancelled.keys().isdisjoint(numbers):
                return None
            if self._waiting:
                self._waiting.difference_update(numbers)
            self._latest = max(self._latest, *numbers)
            self._running, self._options = numbers, options
            self._usual_until_ns = time.monotonic_ns() + usual_ns
        return options

    def end(self) -> Collection[int]:
        """End the running inferences; returns those that have left the batch, which are answered."""
        with self._lock:
            left: Collection[int] = ()
            if self._cancelled:
                left = [number for number in self._running if self._cancelled.pop(number, False)]
            self._running, self._options = (), None
        return left

    def end_for_rerun(self) -> None:
        """Move the running inferences back to the waiting ones; their cancellations stay."""
        with self._lock:
            self._waiting.update(each for each in self._running if each not in self._cancelled)
            self._running, self._options = (), None

    def cancel(self, number: int) -> bool:
        """Cancel an inference that runs, waits or is still to come; one that is over is ignored.

        Returns:
            Whether the caller must answer it, because it waits or leaves a batch that goes on.
        """
        with self._lock:
            if number in self._cancelled:
                return False
            if number in self._running and self._options is not None:
                must_answer = self._is_wanted_without(number)
                if not must_answer:
                    self._options.terminate = True
            elif number in self._waiting:
                must_answer = True
                self._waiting.discard(number)
            elif number > self._latest:
                must_answer = False
            else:
                return False
            self._cancelled[number] = must_answer
            return must_answer

    def _is_wanted_without(self, number: int) -> bool:
        """Whether the run goes on when this member leaves."""
        is_usual = time.monotonic_ns() < self._usual_until_ns
        return is_usual and any(each != number and each not in self._cancelled for each in self._running)


class InferenceExecutor:
    """Runs a model for requests, and answers each; another thread reads cancellations meanwhile.

    Args:
        runner: runs the model.
        outbox: takes the answers.
        cancellation: receives the cancellations of the other thread.
        dimension: the batch dimension; None runs each request alone.
        shared: the memory for long outputs.
        announces: whether the server is told what runs: it does not know the order.
    """

    def __init__(
        self,
        runner: Runner,
        outbox: Outbox,
        cancellation: Cancellation,
        dimension: BatchDimension | None,
        shared: SharedTensors,
        *,
        announces: bool = False,
    ) -> None:
        self._runner = runner
        self._outbox = outbox
        self._cancellation = cancellation
        self._dimension = dimension
        self._shared = shared
        self._announces = announces
        self._last_run_ns = 0
        self._latest_runs = LatestRuns()
        self._free_ns = 0  # when the latest request ended
        self._must_shrink = False
        self._reruns = -1, 0
        self._trial: int | None = None

    def prepare(self, infer: Infer, tensors: Sequence[Tensor]) -> BatchRequest | None:
        """Decode a request, or answer it and return None if it is refused or cancelled.

        A cancelled request is not decoded: decoding a long text may exceed the client's patience.
        """
        if self._drop_cancelled(infer.id):
            return None
        came_ns = time.monotonic_ns()
        if self._must_shrink:  # for an earlier request, whose objects are freed by now
            return_free_memory()
        try:
            outputs = self._runner.select_outputs(infer.outputs, infer.text, infer.digest)
            feed = self._runner.decode_inputs(tensors)
            size, alone = (1, False) if self._dimension is None else self._dimension.measure(feed)
        except MemoryError:
            self.refuse(infer.id)
        except RuntimeProblem as problem:  # keep no other reference: the traceback holds the tensors
            self.refuse(infer.id, problem)
        else:
            queue_ns = max(0, self._free_ns - infer.sent_ns) if infer.sent_ns else 0
            self._free_ns = time.monotonic_ns()
            input_ns = self._free_ns - came_ns
            region = None if infer.answer_region is None else self._shared.region(infer.answer_region)
            times = infer.sent_ns, came_ns, input_ns, queue_ns
            limits = infer.deadline_ns, infer.level
            return BatchRequest(infer.id, outputs, feed, size, alone, *times, region, *limits)
        return None

    def is_over(self, request: BatchRequest, batch_size: int) -> bool:
        """Return whether a request is cancelled, or too late for a run in a batch of this size.

        Such a request is answered. One that is predicted to be late is not over as long as there is spare
        time for all that is left to it, after which the server stops it. There is one such trial at a time,
        as each that is late ends the run of its batch, which then runs again without it.
        """
        if request.number == self._trial:  # which is decided anew
            self._trial = None
        if self._drop_cancelled(request.number):
            return True
        if not request.deadline_ns:
            return False
        now_ns = time.monotonic_ns()
        left_ns = request.deadline_ns - now_ns
        if left_ns > self._latest_runs.slowest_ns:
            return False
        batch_bytes = request.bytes() * batch_size // max(1, request.size)
        needed_ns = self._latest_runs.needed_ns(batch_bytes, now_ns - request.waiting_since_ns(), now_ns)
        if left_ns >= needed_ns:
            return False
        if self._trial is None and 0 < left_ns <= self._latest_runs.spare_ns:
            self._trial = request.number
            return False
        left = f"{max(0, left_ns) / 1e6:.1f} ms of its time were left"
        took = f"the latest runs of such inputs took {needed_ns / 1e6:.1f} ms"
        self.refuse(request.number, InferenceTimeout(f"the inference was not begun: {left}, and {took}"))
        return True

    def run(self, batch: Sequence[BatchRequest]) -> None:
        """Run a batch at once or, if a request makes it fail, one request after the other.

        A late trial has delayed the others of its batch, too, so all of that counts.
        """
        begun_ns, has_trial = time.monotonic_ns(), self._trial in [each.number for each in batch]
        batches = [batch]
        while batches:
            batch = [each for each in batches.pop() if not self._drop_cancelled(each.number)]
            if batch:
                batches += self._run_at_once(batch)
        self._free_ns = time.monotonic_ns()
        if has_trial and self._trial is not None:  # it was not answered
            self._latest_runs.waste(self._free_ns - begun_ns)
            self._trial = None

    def _begin(self, numbers: Sequence[int], input_bytes: int) -> ort.RunOptions | None:
        """Start inferences as `Cancellation.begin` does; after a lack of memory, shrink the arena.

        A trial that is given up ends the run at once: it may be what takes so long.
        """
        is_joined = len(numbers) > 1 and self._trial not in numbers
        usual_ns = UNUSUAL * self._latest_runs.longest_ns(input_bytes) if is_joined else 0
        options = self._cancellation.begin(numbers, usual_ns)
        if options is not None and self._must_shrink:
            options.add_run_config_entry(*SHRINK_ARENA)
            self._must_shrink = False
        if options is not None and self._announces:
            self._outbox.put(RunBegun(tuple(numbers[:MAX_BEGUN])))
            self._outbox.flush()
        return options

    def _run_at_once(self, batch: Sequence[BatchRequest]) -> Sequence[Sequence[BatchRequest]]:
        """Run and answer these requests; if the run of several fails or is ended, none is answered.

        So no request fails because of another.

        Returns:
            The batches to be run instead, the last one first: each request alone after a failure, and all
            together if one of them was given up.
        """
        is_one = len(batch) == 1
        input_bytes = sum([request.bytes() for request in batch])
        try:
            self._outbox.before_run(self._last_run_ns)
            begun_ns = time.monotonic_ns()
            # Joined first, as the server may reuse the memory of a member's inputs once the member has left.
            feed = batch[0].feed if is_one else join_inputs(batch)
            options = self._begin([request.number for request in batch], input_bytes)
            if options is None:
                return (batch,)
            joined_ns = time.monotonic_ns()
            arrays = self._runner.run(batch[0].outputs, feed, options)
            ran_ns = time.monotonic_ns()
            self._last_run_ns = ran_ns - joined_ns
            parts = [arrays] if is_one else split_outputs(batch, arrays)
        except (MemoryError, RuntimeProblem, OutputsNotBatched) as error:
            if is_one and not self._should_rerun(batch[0].number, error):
                self._cancellation.end()
                self._fail(batch[0].number, error if isinstance(error, RuntimeProblem) else _NO_MEMORY)
                return ()
            self._cancellation.end_for_rerun()
            is_whole = is_one or isinstance(error, InferenceCancelled)
            return (batch,) if is_whole else [(each,) for each in batch[::-1]]
        left = self._cancellation.end()
        self._latest_runs.add(input_bytes, ran_ns - begun_ns, ran_ns)
        del arrays
        execution_size = sum(request.size for request in batch)
        for request, part in zip(batch, parts, strict=True):
            if request.number in left:
                continue
            queue_ns = _queue_ns(request, begun_ns)
            times = queue_ns, request.input_ns + joined_ns - begun_ns, self._last_run_ns
            problem = self._answer(request, part, times, ran_ns, execution_size)
            if problem is None:
                execution_size = 0
                if request.number == self._trial:
                    self._latest_runs.end_trial()
                    self._trial = None
            else:
                part.clear()  # else memory for the message may be missing
                self._fail(request.number, problem)
        return ()

    def _should_rerun(self, number: int, error: Exception) -> bool:
        """Whether to run a request again after a lack of memory: the arena may keep memory of other inputs.

        A second run may lack memory, too, and shrinks the arena at its end; a third one has all memory.
        """
        if not isinstance(error, MemoryError) and not is_out_of_memory(str(error)):
            return False
        latest, count = self._reruns
        self._reruns = number, count + 1 if latest == number else 1
        self._must_shrink = True
        return self._reruns[1] <= MOST_RERUNS

    def _answer(
        self,
        request: BatchRequest,
        arrays: Sequence[object],
        times: tuple[int, int, int],
        ran_ns: int,
        execution_size: int,
    ) -> RuntimeProblem | None:
        """Answer a request that was run; returns why its outputs could not be sent, or None.

        The duration of encoding includes that of the earlier requests of the batch.
        """
        try:
            heads, parts = self._runner.encode_outputs(request.outputs, arrays, request.answer_region)
            output_ns = time.monotonic_ns() - ran_ns
            outcome = Outcome(request.number, heads, *times, output_ns, request.size, execution_size)
            self._outbox.put(outcome, parts)
            region = request.answer_region
            if region is not None and region.is_used:  # a long answer waits for no other
                self._outbox.flush()
        except MemoryError:
            return _NO_MEMORY
        except RuntimeProblem as problem:
            return problem.with_traceback(None)  # the traceback holds the encoded outputs
        return None

    def _drop_cancelled(self, number: int) -> bool:
        is_answered = self._cancellation.drop(number)
        if is_answered is False:
            self._fail(number, InferenceCancelled())
        return is_answered is not None

    def refuse(self, number: int, problem: RuntimeProblem = _NO_MEMORY) -> None:
        """Answer a request that is not run; by default for lack of memory."""
        if not self._cancellation.skip(number):
            self._fail(number, problem)
        self._free_ns = time.monotonic_ns()

    def _fail(self, number: int, problem: RuntimeProblem) -> None:
        text = str(problem)
        if problem is _NO_MEMORY or is_out_of_memory(text):
            self._must_shrink = True  # ONNX Runtime's arena keeps its memory, which later requests would lack
            problem = InferenceFailed(f"{text}{describe_room()}")
        self._outbox.fail(number, problem)


def _queue_ns(request: BatchRequest, begun_ns: int) -> int:
    """Return a request's wait for other requests, and to be run, without its copying and decoding."""
    return request.queue_ns + begun_ns - request.came_ns - request.input_ns
