"""The worker process: it holds one session of one model version and serves its two channels.

Its main thread serves the data channel: reads, runs, answers, with no hand-over between. The first message
says what to load; the worker confines itself to that, and then starts a second thread, which waits on the
control channel, so that a cancellation reaches a running inference. The worker ends when either channel ends,
on a malformed frame, and after a failed load.
"""

import _thread
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import msgspec
import numpy as np

from runtime.errors import InferenceCancelled, LoadRefused
from runtime.process.prctl import name_process
from runtime.requestjson import describe
from runtime.rows.judgement import Judgement
from runtime.wire import (
    CONTROL,
    MAX_REQUEST_BYTES,
    TO_WORKER,
    Buffer,
    Frame,
    FrameReader,
    FrameRules,
    Infer,
    Load,
    LoadFailure,
    M,
    MalformedFrame,
    Message,
    PayloadDropped,
    Probe,
    ReadJson,
    StageReached,
    Tensor,
    ToWorker,
    plain_text,
)
from runtime.worker import extensions
from runtime.worker.batching import Queue
from runtime.worker.confine import confine, probe
from runtime.worker.execution import Cancellation, InferenceExecutor, Outbox
from runtime.worker.loading import load
from runtime.worker.privileges import prefer_as_victim
from runtime.worker.sessions import ServingSession, limit_memory, run_smallest_model
from runtime.worker.sharedtensors import SharedTensors
from runtime.worker.warmup import SearchLimit

EX_PROTOCOL = 76
"""sysexits.h: the exit code of a worker after a malformed frame."""
LIMIT_CHECK_S = 0.1
"""Interval in which a load's run is checked for its limit."""
MAX_WAIT_S = 3600.0
"""Limit of a wait for more requests of a batch: select needs a limit."""
BUSY_POLL_NS = 400_000
"""A worker busy-polls for this time after a request that came within this time: one client of a small model
sends a request every 300 µs (measured), and gets 1.4 times as many answers. With fewer requests it sleeps."""
STACK_BYTES = 512 * 2**10
"""Stack of our own threads, which do little. The usual 8 MiB would count against a memory limit."""


def prepare() -> None:
    """Do the first work of every worker once, in the fork server."""
    run_smallest_model()
    extensions.map_library()


def main(data: int, control: int, requests: int, answers: int) -> NoReturn:
    """Run a worker on the descriptors of its two channels and its shared memory; ends the process."""
    prefer_as_victim()
    threading.stack_size(STACK_BYTES)
    shared = SharedTensors(requests, answers)
    _Worker(socket.socket(fileno=data), socket.socket(fileno=control), shared).serve()
    os._exit(0)


class _Worker:
    """Serves the data channel; its order also starts the thread of the control channel."""

    def __init__(self, channel: socket.socket, control: socket.socket, shared: SharedTensors) -> None:
        self._channel = channel
        self._control = control
        self._shared = shared
        self._cancellation = Cancellation()
        self._limit = SearchLimit()
        rules = FrameRules(TO_WORKER, payload_bytes=MAX_REQUEST_BYTES)
        self._reader = FrameReader(rules, shared.locate)
        self._outbox = Outbox(channel)
        self._executor: InferenceExecutor | None = None
        self._queue: Queue | None = None
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._busy_polls = False

    def serve(self) -> None:
        """Answer requests until the channel ends; requests that are read together are answered together."""
        while self._read():
            if self._queue is not None and self._executor is not None:
                self._serve_batches(self._queue, self._executor)
            self._outbox.flush()

    def _serve_batches(self, queue: Queue, executor: InferenceExecutor) -> None:
        while queue:
            wait_ns = queue.wait_ns(time.monotonic_ns())
            if wait_ns is not None and self._wait_for_more(wait_ns):
                if not self._read():
                    return
                if queue.has_priorities:  # the next unread request may be the one to run first
                    continue
            if not wait_ns and not queue.drop(executor.is_over):
                executor.run(queue.take())  # full or due: later requests belong to the next batch

    def _wait_for_more(self, wait_ns: int) -> bool:
        if wait_ns:
            self._outbox.flush()
        return bool(select.select([self._channel], [], [], min(wait_ns / 1e9, MAX_WAIT_S))[0])

    def _read(self) -> bool:
        """Read and handle the next messages; returns False at the end of the channel."""
        asked_ns = time.monotonic_ns()
        if self._busy_polls:
            self._busy_poll(asked_ns + BUSY_POLL_NS)
        count = _receive(self._channel, self._reader)
        self._busy_polls = time.monotonic_ns() - asked_ns < BUSY_POLL_NS
        try:
            for message, tensors in _frames(self._reader, count):
                self._handle(message, tensors)
        except PayloadDropped as dropped:
            self._refuse(dropped.message)
        return count > 0

    def _busy_poll(self, until_ns: int) -> None:
        """Poll for the next request before sleeping: waking up takes as long as many runs.

        Other processes may have the core meanwhile.
        """
        while not self._poll.poll(0) and time.monotonic_ns() < until_ns:
            os.sched_yield()

    def _handle(self, message: ToWorker, tensors: Sequence[Tensor]) -> None:
        if isinstance(message, Infer) and self._executor is not None:
            request = self._executor.prepare(message, tensors)
            if request is None:
                return
            if self._queue is None:
                if not self._executor.is_over(request, request.size):
                    self._executor.run((request,))
            else:
                self._cancellation.wait(request.number)
                self._queue.add(request)
            return
        if self._executor is not None:  # a second order
            os._exit(EX_PROTOCOL)
        match message:
            case Load():
                self._load(message, tensors)
            case ReadJson():
                self._read_json(message, tensors[0])
            case Probe():
                self._send(probe(message))
                os._exit(0)
            case Infer():  # before a model is loaded
                os._exit(EX_PROTOCOL)

    def _refuse(self, message: Message) -> None:
        """Refuse a request because there is no memory for its tensors."""
        if not isinstance(message, Infer) or self._executor is None:
            raise MemoryError
        self._executor.refuse(message.id)

    def _load(self, order: Load, given: Sequence[Tensor]) -> None:
        """Confine this worker before it has another thread, or reads a byte of a model; then load."""
        name_process(order.name)
        confine(order)
        # Not `threading`: its `start` waits for the new thread, and so would the load.
        _thread.start_new_thread(_listen, (self._control, self._cancellation, self._outbox, self._limit))
        try:
            model, report = load(order, given, self._limit, lambda stage: self._send(StageReached(stage)))
        except LoadRefused as refusal:
            self._send(LoadFailure(refusal.code, plain_text(str(refusal))))
            os._exit(0)
        self._limit.is_needed = False
        self._begin(order, model, report.rows)
        self._send(report)

    def _read_json(self, order: ReadJson, text: Tensor) -> NoReturn:
        name_process("JSON of a request")
        confine(order)
        limit_memory(order.memory_limit_bytes, mapped_bytes=0, threads=1)
        self._send(describe(text.data, find_address))
        os._exit(0)

    def _begin(self, order: Load, model: ServingSession, rows: Judgement | None) -> None:
        """Prepare to run inferences; those of rows that may depend on each other as without batching."""
        joins = order.dependent_rows or rows is None or rows.verdict == "independent"
        limit, delay_ns = order.max_batch_size if joins else 0, order.max_queue_delay_us * 1000
        if limit or order.has_priorities:
            self._queue = Queue(max(1, limit), delay_ns, has_priorities=order.has_priorities)
        self._executor = InferenceExecutor(
            model.runner,
            self._outbox,
            self._cancellation,
            model.dimension,
            self._shared,
            announces=order.has_priorities,
        )

    def _send(self, message: Message) -> None:
        self._outbox.put(message)
        self._outbox.flush()


def _listen(channel: socket.socket, cancellation: Cancellation, outbox: Outbox, limit: SearchLimit) -> None:
    """Serve the control channel; its end ends the worker, even while it computes."""
    while limit.is_needed and not select.select([channel], [], [], LIMIT_CHECK_S)[0]:
        limit.check()
    reader = FrameReader(FrameRules(CONTROL))
    while count := _receive(channel, reader):
        for message, _ in _frames(reader, count):
            if cancellation.cancel(message.id):
                outbox.fail(message.id, InferenceCancelled())
                outbox.flush()
    os._exit(0)


def find_address(buffer: Buffer | msgspec.Raw) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _receive(channel: socket.socket, reader: FrameReader[M]) -> int:
    try:
        return channel.recv_into(reader.buffer())
    except ConnectionError:
        return 0


def _frames(reader: FrameReader[M], count: int) -> Iterator[Frame[M]]:
    reader.feed(count)
    try:
        while (frame := reader.next_frame()) is not None:
            yield frame
    except MalformedFrame as error:
        os.write(2, f"malformed frame: {error}\n".encode("utf-8", "replace"))
        os._exit(EX_PROTOCOL)
