"""The server's side of a worker: load, infer, measure, stop and kill one process."""

import asyncio
import itertools
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from runtime import memory
from runtime.errors import (
    OUT_OF_MEMORY,
    Exit,
    ForkServerUnavailable,
    InferenceCancelled,
    InferenceFailed,
    InferenceTimeout,
    InvalidInput,
    Kill,
    NotRepresentable,
    QueueFull,
    RuntimeProblem,
    WorkerDied,
)
from runtime.process.channel import Channel
from runtime.process.forkclient import Process, StderrTail
from runtime.process.inflight import REPORTS, SILENCE, Answer, AnswerRules, InFlight, PendingOrder
from runtime.process.sharedmemory import Region, TensorMemory, find_offsets
from runtime.timeouts import EXIT_WAIT_S, MEASURE_LIMIT_S, Timeout, timeout
from runtime.wire import (
    Cancel,
    Frame,
    FromWorker,
    Infer,
    InferenceFailure,
    Load,
    Loaded,
    MalformedFrame,
    Outcome,
    PayloadDropped,
    PayloadRoom,
    Probe,
    ReadJson,
    RunBegun,
    Tensor,
    ToWorker,
    WantedOutput,
    heads,
    plain_text,
)

SAMPLE_INTERVAL_S = 0.005
"""Pause between samples. A sample costs 0.015 ms; the kernel's own peak covers most of the pause."""
MAX_SHARE = 20
"""Sampling takes at most this fraction of the event loop's time, however many workers load at once."""
_PROCESS_CPU_CLOCK = 2
"""Kind of the clock that clock_getcpuclockid(3) makes of a process id, which Python does not have."""
_STATUS_BYTES = 64 * 2**10
"""Enough for the longest status; one read gives all of it."""


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """The memory of a worker that has loaded its model, and the duration of measuring it."""

    memory_bytes: int
    peak_memory_bytes: int
    measuring_us: int


class LoadSamples:
    """The samples of one loading worker.

    The descriptor names the process and not its pid: after an exit, no other process is sampled in its place.

    Attributes:
        anonymous_bytes: memory without files, at the last sample; shared with the fork server or not.
        empty_bytes: all memory before the load, also swapped pages and page tables.
        added_bytes: the memory that the load has added to `empty_bytes` so far.
        peak_anonymous_bytes: the largest memory without files, as sampled or as proved by the kernel's peak
            between two samples. File pages read meanwhile may hide as much of that peak.
    """

    def __init__(self, status: int) -> None:
        self._status = status
        self._seen = self._first = memory.Resident(0, 0, 0)
        self.peak_anonymous_bytes = 0
        seen = self._read()
        if seen is not None:
            self._seen = self._first = seen
            self.peak_anonymous_bytes = seen.anonymous_bytes

    @property
    def anonymous_bytes(self) -> int:
        return self._seen.anonymous_bytes

    @property
    def empty_bytes(self) -> int:
        return self._first.taken_bytes

    @property
    def added_bytes(self) -> int:
        return max(0, self._seen.taken_bytes - self._first.taken_bytes)

    def sample(self) -> None:
        """Sample the memory now; a process that has exited keeps its last sample."""
        seen = self._read()
        if seen is None:
            return
        before, self._seen = self._seen, seen
        peak = seen.anonymous_bytes
        if seen.peak_bytes > before.peak_bytes:  # the peak was at some moment since the sample before
            peak = max(peak, seen.peak_bytes - max(before.file_bytes, seen.file_bytes))
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, peak)

    def loaded_memory(self, private_bytes: int | None, measuring_us: int) -> WorkerMemory:
        """Return the memory of the loaded worker, as of a sample just now.

        Args:
            private_bytes: its measured private bytes; if None, all of its memory without files counts, which
                is more.
            measuring_us: the duration of that measurement.
        """
        if private_bytes is None:
            private_bytes = self.anonymous_bytes
        shared_bytes = max(0, self.anonymous_bytes - private_bytes)
        peak_bytes = max(self.peak_anonymous_bytes - shared_bytes, private_bytes)
        return WorkerMemory(private_bytes, peak_bytes, measuring_us)

    def _read(self) -> memory.Resident | None:
        try:
            return memory.parse_resident(os.pread(self._status, _STATUS_BYTES, 0))
        except ProcessLookupError:
            return None


class MemorySampler:
    """Samples all loading workers in one timer of the event loop, which runs while there are any."""

    def __init__(self) -> None:
        self._watched: dict[LoadSamples, Callable[[int], None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def watch(self, pid: int, on_sample: Callable[[int], None]) -> Iterator[LoadSamples]:
        """Sample a worker within the context.

        Args:
            pid: its process id; the worker must not have been reaped, or the caller must notice its end by
                other means.
            on_sample: called with the bytes that the load has added, after each sample.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`, there is no descriptor for watching the process.
        """
        try:
            status = os.open(f"{memory.PROC}/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # the process has exited; the load's caller hears of that
            status = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ForkServerUnavailable(f"a worker's memory cannot be watched: {error.strerror}") from None
        samples = LoadSamples(status)
        try:
            self._watched[samples] = on_sample
            self._schedule(SAMPLE_INTERVAL_S)
            yield samples
        finally:
            del self._watched[samples]
            os.close(status)

    def _schedule(self, in_s: float) -> None:
        if self._timer is None and self._watched:
            self._timer = asyncio.get_running_loop().call_later(in_s, self._sample_all)

    def _sample_all(self) -> None:
        self._timer = None
        began = time.monotonic()
        for samples, on_sample in list(self._watched.items()):
            samples.sample()
            on_sample(samples.added_bytes)
        self._schedule(max(SAMPLE_INTERVAL_S, MAX_SHARE * (time.monotonic() - began)))


MB = 1_000_000
UNSENT_REQUESTS = 4
"""Limit of unread inferences, in requests of the largest size. Beyond it the next one is refused, however few
they are: cancelled and timed-out requests stay in memory until they are read, too."""
MAX_UNSENT_CANCELS_BYTES = 2**20
"""Some 50,000. A worker reads cancellations at once, even while it computes; else it is killed."""
SURPLUS_NAMES = 64
"""Names that a request may have beyond the model's own: the worker's refusal of them has better words."""
PROBLEMS: dict[str, type[RuntimeProblem]] = {
    problem.code: problem
    for problem in (InvalidInput, NotRepresentable, InferenceFailed, InferenceCancelled, InferenceTimeout)
}


class Worker:
    """One worker process; `WorkerPool.start` creates it.

    Attributes:
        worker_id: its id in the ledger.
        pid: its process id, for people and /proc only: after `ended` another process may have it.
        memory_bytes: its private bytes, as last measured; during the load, the bytes that the load has added.
        loaded_memory: its memory once it has loaded a model.
        records_stderr: whether the ledger may have its output.
        tensor_memory: the memory that it shares with the server.
        ended: set once, when the process is gone. Wait for it with `asyncio.wait` or through
            `asyncio.shield`: a task that is cancelled while it awaits a future cancels the future, too.
    """

    def __init__(
        self,
        worker_id: str,
        process: Process,
        stderr: int,
        patience_s: float,
        sampler: MemorySampler,
        *,
        tensor_memory: TensorMemory,
        answer_room: PayloadRoom | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.pid = process.pid
        self.memory_bytes = 0
        self.loaded_memory: WorkerMemory | None = None
        self.records_stderr = True
        self.tensor_memory = tensor_memory
        self._sampler = sampler
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Exit] = self._loop.create_future()
        self._process = process
        process.watch(self._on_gone)
        self._stderr = StderrTail(stderr)
        self._in_flight = InFlight(patience_s, self._cancel, self._kill_stuck)
        self._answer_room = answer_room or PayloadRoom()
        self._data = Channel(
            SILENCE,
            self._on_frame,
            self._on_malformed,
            self._on_lost,
            tensor_memory.locate,
            room=self._answer_room,
            on_dropped=self._refuse_answer,
        )
        self._control = Channel(SILENCE, self._on_frame, self._on_malformed, self._on_lost)
        self._ids = itertools.count()
        self._pending: PendingOrder | None = None
        self._answer_rules: AnswerRules | None = None
        self._most_names = SURPLUS_NAMES
        self._max_unsent_bytes = 0
        self._has_priorities = False
        self._stopping = False
        self._kill: Kill | None = None
        self._exit_timer: Timeout | None = None
        self._empty_bytes = self._unused_bytes = 0
        self._most_bytes: int | None = None

    async def connect(self, data: socket.socket, control: socket.socket) -> None:
        """Adopt the server's ends of the channels; the pool kills the worker if that fails."""

        async def both() -> None:
            try:
                await self._data.connect(data)
            except BaseException:  # such as the cancellation of all tasks
                control.close()
                raise
            await self._control.connect(control)

        await asyncio.shield(both())  # half of the work would leave a socket that nobody closes

    @property
    def orphaned(self) -> bool:
        return self._process.orphaned

    @property
    def dying(self) -> bool:
        """Whether the process is gone; its last output may still be on its way."""
        return self._exit_timer is not None

    @property
    def in_flight(self) -> int:
        """How many inferences are queued or running, including those whose caller has left."""
        return len(self._in_flight)

    @property
    def oldest_sent_ns(self) -> int | None:
        """When the oldest inference in flight was sent (CLOCK_MONOTONIC), or None without one."""
        return self._in_flight.oldest_sent_ns

    @property
    def cpu_s(self) -> float:
        """The processor time of the process, user and system; 0 if it has ended. Reading takes 1.3 µs."""
        with suppress(OSError):
            return time.clock_gettime(~self.pid << 3 | _PROCESS_CPU_CLOCK)
        return 0.0

    def fail_inferences(self, describe: Callable[[], RuntimeProblem]) -> None:
        """Fail all inferences in flight for their callers; the process goes on."""
        self._in_flight.fail(describe)

    async def wait_until_drained(self) -> None:
        """Wait until nothing is in flight; a dead worker is drained."""
        await self._in_flight.wait_until_drained()

    async def load(
        self,
        order: Load,
        on_stage: Callable[[str], None],
        warm_up_inputs: Sequence[Tensor] = (),
        on_sample: Callable[[], None] = lambda: None,
    ) -> Loaded:
        """Load a model, once per worker; the worker ends by itself when this fails.

        Args:
            order: the version, and the parameters of the load.
            on_stage: called with `loading`, `warming_up` if the model is run, and `measuring`.
            warm_up_inputs: inputs of the warm-up; empty means zeros, where shapes allow it.
            on_sample: called after each sample of `memory_bytes`.

        Raises:
            LoadRefused: with the code of the reason.
            WorkerDied: `worker_died`.
        """
        # A cancelled request may wait this long for others of its batch.
        self._in_flight.patience_s += order.max_queue_delay_us / 1e6
        self._has_priorities = order.has_priorities
        self._most_bytes = order.most_bytes(memory.thread_bytes())
        self._max_unsent_bytes = UNSENT_REQUESTS * order.max_request_bytes

        def note_sample(bytes_: int) -> None:
            self.memory_bytes = bytes_
            on_sample()

        with self._sampler.watch(self.pid, note_sample) as samples:
            self._empty_bytes = samples.empty_bytes
            report: Loaded = await self.execute(order, warm_up_inputs, on_stage)
            self._most_names = len(report.inputs) + len(report.outputs) + SURPLUS_NAMES
            on_stage("measuring")
            self.loaded_memory = await self._measure_load(samples)
        return report

    async def execute(
        self,
        order: Load | Probe | ReadJson,
        tensors: Sequence[Tensor] = (),
        on_stage: Callable[[str], None] = lambda _: None,
    ) -> Any:
        """Have the worker carry out an order, and return its report; `load` does so, and more, for a load.

        It is the worker's only order. The worker ends after all but `Load`, and if that fails.

        Args:
            order: what to do.
            tensors: those of a load's warm-up or the text of `ReadJson`, whose heads are added to the order.
            on_stage: called with the stages of a load.

        Raises:
            LoadRefused: of `Load`, with the code of the reason.
            WorkerDied: `worker_died`.
        """
        if tensors:
            order = replace(order, tensors=heads(tensors))
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._pending = PendingOrder(order, answer, on_stage)
        self._data.expect(REPORTS)
        self._send(order, tensors)
        return await answer

    async def infer(
        self,
        inputs: Sequence[Tensor],
        outputs: tuple[WantedOutput, ...] = (),
        *,
        text: bool = False,
        digest: bool = False,
        timeout_s: float,
        region: Region | None = None,
        level: int = 0,
    ) -> Answer:
        """Run the model; cancelling the awaiting task cancels the inference.

        This does not wait for the worker to read: the caller bounds what is in flight.

        Args:
            inputs: by name, in any order; their data must not change until this returns.
            outputs: the wanted outputs; empty means all that are tensors.
            text: whether all tensors are returned as JSON.
            digest: whether each output is returned as UINT8 of shape [32] instead: SHA-256 over its
                datatype, shape and data, to compare with another worker's.
            timeout_s: limit after which the inference is cancelled; the worker refuses it at once if runs
                like it take longer than what is left.
            region: where inputs lie; those in another worker's are sent through the socket.
            level: the priority, if the load has priorities; a lower one runs first.

        Raises:
            InvalidInput: `invalid_input`, or `not_representable` for what JSON cannot carry.
            InferenceFailed: `inference_failed`.
            InferenceCancelled: `inference_cancelled`.
            InferenceTimeout: `inference_timeout`.
            QueueFull: `inference_queue_full`, the worker has too much to read.
            WorkerDied: `worker_died`.
        """
        if self._data.unsent_bytes > self._max_unsent_bytes:
            raise QueueFull("the model's worker has more to read than may wait")
        if len(inputs) + len(outputs) > self._most_names:
            raise InvalidInput("the request names more inputs and outputs than the model has")
        if region is not None and region.memory is not self.tensor_memory.requests:
            region = None  # another worker was chosen since the body arrived: its inputs take the socket
        number = next(self._ids)
        answer_region = self.tensor_memory.hold(number, region)
        try:
            if region is None:
                tensors, sent = heads(inputs), inputs
            else:
                tensors = heads(inputs, find_offsets(inputs, region))
                sent = [tensor for tensor in inputs if not region.holds(tensor.data)]
            sent_ns = time.monotonic_ns()
            deadline_ns = sent_ns + int(timeout_s * 1e9)
            request = Infer(
                number, tensors, outputs, text, sent_ns, digest, answer_region, deadline_ns, level
            )
            self._send(request, sent)
        except MalformedFrame as error:
            self.tensor_memory.release(number)
            raise InvalidInput(str(error)) from None
        self._expect_answers()
        return await self._in_flight.answer(request, timeout_s)

    async def measure(self) -> int:
        """Measure the worker's private bytes; they are also in `memory_bytes`.

        One that has more memory than its limits allow, swapped pages and page tables included, is killed.

        Raises:
            WorkerDied: `worker_died`.
        """

        def read() -> tuple[int, int]:
            return memory.private_bytes(self.pid), memory.taken_bytes(self.pid)

        try:
            measured, taken = await asyncio.to_thread(read)
        except ProcessLookupError:
            measured = taken = 0
        if self._process.has_ended():  # else another process may have had its pid
            raise WorkerDied(await asyncio.shield(self.ended))
        self.memory_bytes = measured
        added, most = taken - self._empty_bytes, self._most_bytes
        if most is not None and added > most:
            took = f"it took {added // MB} MB of memory, with swapped pages and page tables"
            self.kill_for(f"{took}, and may take {most // MB} MB", OUT_OF_MEMORY)
        return measured

    @property
    def grown_bytes(self) -> int:
        """The bytes that it has taken since it had loaded, as last measured; negative if it has less."""
        return 0 if self.loaded_memory is None else self.memory_bytes - self.loaded_memory.memory_bytes

    def limit_growth(self, count: int) -> None:
        """Let the worker take so many bytes beside its measured ones, within its own limit (prlimit(2)).

        What it has mapped since counts, touched or not. If the kernel does not let the server limit a worker,
        that has its own limit alone.
        """
        if self.loaded_memory is None:  # its load limits it
            return
        with suppress(OSError, ValueError):  # ProcessLookupError: it has ended
            data = memory.data_bytes(self.pid)
            mapped = max(0, data - self._unused_bytes - self.memory_bytes)
            _, hard = resource.prlimit(self.pid, resource.RLIMIT_DATA)
            soft = data + max(0, count - mapped)
            if not self._process.has_ended():  # else another process may have had its pid
                soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
                resource.prlimit(self.pid, resource.RLIMIT_DATA, (soft, hard))

    async def stop(self, grace_s: float = 1.0) -> Exit:
        """End the worker by closing its channels, and after `grace_s` kill it."""
        self._stopping = True
        self._data.abort()
        self._control.abort()
        with suppress(TimeoutError):
            async with timeout(grace_s):
                return await asyncio.shield(self.ended)
        self.kill()
        return await asyncio.shield(self.ended)

    def kill(self) -> None:
        """Kill the worker at once; it may be stopped or gone already."""
        self._process.send_signal(signal.SIGKILL)

    def stderr_tail(self) -> list[str]:
        """Return the worker's last lines on stderr, and why the server killed it: at most 64, 16 KiB."""
        return self._stderr.lines()

    def recorded_tail(self) -> list[str]:
        """Return the part of the tail that the ledger may have: at least why the server killed the worker."""
        return self._stderr.lines() if self.records_stderr else self._stderr.note_lines()

    async def _measure_load(self, samples: LoadSamples) -> WorkerMemory:
        began_ns = time.perf_counter_ns()
        private_bytes = None
        with suppress(OSError):  # no time left, or no descriptor to read with
            async with timeout(MEASURE_LIMIT_S):
                private_bytes = await self.measure()
        samples.sample()
        loaded_memory = samples.loaded_memory(private_bytes, (time.perf_counter_ns() - began_ns) // 1000)
        self.memory_bytes = loaded_memory.memory_bytes
        with suppress(OSError):  # without a descriptor for it, less may be mapped; a caller notices an exit
            self._unused_bytes = memory.data_bytes(self.pid) - self.memory_bytes
        return loaded_memory

    def _cancel(self, number: int) -> None:
        self._control.send(Cancel(number))
        if self._control.unsent_bytes > MAX_UNSENT_CANCELS_BYTES:
            self.kill()

    def _kill_stuck(self) -> None:
        self.kill_for(f"an inference did not stop within {self._in_flight.patience_s:g} s")

    def _on_malformed(self, reason: str) -> None:
        self.kill_for(f"it sent {reason}")

    def kill_for(self, reason: str, code: str = WorkerDied.code) -> None:
        """Kill the worker, and record why."""
        self._kill = Kill(reason, code)
        self._stderr.note(f"killed by the server: {reason}")
        self.kill()

    def _send(self, message: ToWorker, tensors: Sequence[Tensor] = ()) -> None:
        if self.ended.done():
            raise WorkerDied(self.ended.result())
        self._data.send(message, tensors)

    def _on_frame(self, frame: Frame[FromWorker]) -> None:
        """Take a frame of the data channel; the control channel's rules let none pass."""
        message, tensors = frame
        if type(message) is Outcome or type(message) is InferenceFailure:  # answers come most often
            self._take_answer(message, tensors)
        elif isinstance(message, RunBegun):
            if not self._has_priorities:
                raise MalformedFrame("which inferences it runs, without priorities")
            self._in_flight.begin(message.ids)
        elif self._pending is not None and self._pending.take(message):
            self._pending = None
            self._data.expect(SILENCE)
            if isinstance(message, Loaded):
                self._answer_rules = AnswerRules(message)
                if self._in_flight:
                    self._expect_answers()

    def _expect_answers(self) -> None:
        if self._answer_rules is not None:
            self._data.expect(self._answer_rules.frames)

    def _take_answer(self, message: Outcome | InferenceFailure, tensors: tuple[Tensor, ...]) -> None:
        request = self._in_flight.find(message.id)
        if request is None or self._answer_rules is None:
            raise MalformedFrame("an answer that nothing asked for")
        if isinstance(message, Outcome):
            self._answer_rules.check(request, tensors)
            self.tensor_memory.release(message.id, tensors)
            self._in_flight.settle(message.id, (message, tensors))
        else:
            self.tensor_memory.release(message.id)
            problem = PROBLEMS.get(message.code, InferenceFailed)
            self._in_flight.settle(message.id, problem(plain_text(message.message)))
        if not self._in_flight:
            self._data.expect(SILENCE)

    def _refuse_answer(self, dropped: PayloadDropped) -> None:
        """Fail the inference whose answer the server has no memory for."""
        message, most = dropped.message, self._answer_room.max_bytes
        if not isinstance(message, Outcome) or self._in_flight.find(message.id) is None:
            raise MalformedFrame("an answer that nothing asked for")
        problem = RuntimeProblem(
            "too many large answers are in memory at once; try again", code="bodies_full"
        )
        if dropped.bytes > most:
            problem = InferenceFailed(
                f"the outputs have {dropped.bytes} bytes, and one answer may take {most} bytes of the"
                " server's memory: ask for fewer or shorter outputs, or give its container more memory"
            )
        self.tensor_memory.release(message.id)
        self._in_flight.settle(message.id, problem)
        if not self._in_flight:
            self._data.expect(SILENCE)

    def _on_lost(self) -> None:
        if not self._stopping:
            self.kill()
        self._finish_when_complete()

    def _on_gone(self) -> None:
        """The process is gone; its exit report and its last output may still arrive."""
        self._exit_timer = Timeout(EXIT_WAIT_S, self._finish)
        self._process.end.add_done_callback(lambda _: self._finish_when_complete())
        self._finish_when_complete()

    def _finish_when_complete(self) -> None:
        if (
            self._exit_timer is not None
            and self._process.end.done()
            and self._data.lost
            and self._control.lost
        ):
            self._finish()

    def _finish(self) -> None:
        if self.ended.done() or self._exit_timer is None:
            return
        self._exit_timer.cancel()
        end = self._process.close()
        self._data.abort()
        self._control.abort()
        self._stderr.close()
        self.tensor_memory.close()
        self.ended.set_result(end)
        self._in_flight.abandon(
            lambda begun: WorkerDied(end, begun=begun, kill=self._kill, worker_id=self.worker_id)
        )
        if self._pending is not None:
            self._pending.settle(WorkerDied(end))
