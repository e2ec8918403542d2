"""Requests in flight of a worker, and the rules of its messages.

A model that takes over its worker speaks in its place. So a worker may send only expected messages: reports
of one order, each stage at most once and in order, then answers to requests in flight, with the requested
outputs. Any other message is a `MalformedFrame`, which ends the worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, get_args

from features.wire import Target
from runtime.errors import InferenceTimeout, LoadRefused, RuntimeProblem, WorkerDied
from runtime.timeouts import Timeout
from runtime.wire import (
    FROM_LOADING,
    FROM_SERVING,
    MAX_FAILURE_BYTES,
    MAX_HEAD_BYTES,
    MAX_REPORT_BYTES,
    FrameRules,
    FromWorker,
    Infer,
    JsonRead,
    Load,
    Loaded,
    LoadFailure,
    LoadStage,
    MalformedFrame,
    Outcome,
    Probe,
    Probed,
    ProviderOperators,
    ReadJson,
    StageReached,
    Tensor,
    plain_text,
)

SILENCE: FrameRules[FromWorker] = FrameRules(FROM_SERVING, header_bytes=0, payload_bytes=0)
"""The rules without a pending order or a request in flight."""
REPORTS: FrameRules[FromWorker] = FrameRules(FROM_LOADING, MAX_REPORT_BYTES, payload_bytes=0)
"""The rules while an order is pending."""
SHA256_BYTES = 32


class PendingOrder:
    """A load, probe or reading whose report is pending, and the future of its caller."""

    def __init__(
        self, order: Load | Probe | ReadJson, answer: asyncio.Future[Any], on_stage: Callable[[str], None]
    ) -> None:
        self._order = order
        self._answer = answer
        self._on_stage = on_stage
        self._stages_left = iter(get_args(LoadStage) if isinstance(order, Load) else ())

    def take(self, report: FromWorker) -> bool:
        """Handle a report of the worker; returns whether it was the last one.

        Raises:
            MalformedFrame: a stage out of order or twice, or a report of another order.
        """
        match self._order, report:
            case Load(target=target), Loaded(placed=placed) if not _is_plausible(target, placed):
                raise MalformedFrame("where operators run is not what was asked for")
            case _, StageReached(stage):
                if stage not in self._stages_left:  # an iterator: each search goes on after the last find
                    raise MalformedFrame(f"stage '{stage}' twice, or out of order")
                self._on_stage(stage)
                return False
            case (Load(), Loaded()) | (Probe(), Probed()) | (ReadJson(), JsonRead()):
                self.settle(report)
            case Load(), LoadFailure(code, message):
                self.settle(LoadRefused(code, plain_text(message)))
            case _:
                kinds = type(report).__name__, type(self._order).__name__
                raise MalformedFrame("{} in answer to {}".format(*kinds))
        return True

    def settle(self, result: object) -> None:
        """Set the caller's result or exception, unless the caller has left or has its result."""
        if self._answer.done():
            return
        if isinstance(result, Exception):
            self._answer.set_exception(result)
        else:
            self._answer.set_result(result)


def _is_plausible(target: Target | None, placed: Sequence[ProviderOperators]) -> bool:
    """Whether operators run where the load's target allows it; nowhere else without one."""
    named = [each.provider for each in placed]
    return not named if target is None else target.may_run_on(named)


class AnswerRules:
    """Rules of the answers to requests of a loaded model.

    Args:
        loaded: the worker's own report.

    Attributes:
        frames: the rules while requests are in flight.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._datatypes = {spec.name: spec.datatype for spec in loaded.outputs}
        names_bytes = sum(len(name.encode()) for name in self._datatypes)
        header_bytes = MAX_FAILURE_BYTES + names_bytes + MAX_HEAD_BYTES * len(self._datatypes)
        self.frames: FrameRules[FromWorker] = FrameRules(FROM_SERVING, header_bytes)

    def check(self, request: Infer, tensors: Sequence[Tensor]) -> None:
        """Check the outputs of an answer.

        Raises:
            MalformedFrame: an output twice, one that was not requested, or one in another form.
        """
        wanted = {output.name: output.text for output in request.outputs} if request.outputs else None
        for tensor in tensors:
            name, datatype = tensor.name, self._datatypes.get(tensor.name)
            if datatype is None or (wanted is not None and name not in wanted):
                raise MalformedFrame(f"output {name[:64]!r}, which was not asked for")
            if request.digest:
                is_right = (tensor.datatype, tensor.shape, tensor.text) == ("UINT8", (SHA256_BYTES,), False)
            else:
                is_text = request.text if wanted is None else wanted[name]
                is_right = tensor.datatype == datatype and tensor.text == is_text
            if not is_right:
                raise MalformedFrame(f"output {name[:64]!r} in another form than was asked for")
        if len(tensors) > 1 and len({tensor.name for tensor in tensors}) < len(tensors):
            raise MalformedFrame("an output twice")


Answer = tuple[Outcome, tuple[Tensor, ...]]
"""The result of an inference: its durations and its outputs."""


class InFlight:
    """The queued and running inferences of one worker, in the order of their requests.

    Of a load with priorities, those that the worker has begun come first.

    A cancelled or timed-out inference stays in flight until the worker reports its end.

    Args:
        patience_s: how long a cancelled inference may go on running.
        cancel: sends the cancellation to the worker.
        on_stuck: called when the worker does not stop a cancelled inference: later ones would wait.
    """

    def __init__(
        self, patience_s: float, cancel: Callable[[int], None], on_stuck: Callable[[], None]
    ) -> None:
        self.patience_s = patience_s
        self._send_cancel = cancel
        self._on_stuck = on_stuck
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, tuple[Infer, asyncio.Future[Answer]]] = {}
        self._cancelled: set[int] = set()
        self._watching: Timeout | None = None
        self._idle = asyncio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def oldest_sent_ns(self) -> int | None:
        """When the oldest inference in flight was sent (CLOCK_MONOTONIC), or None without one."""
        return min([request.sent_ns for request, _ in self._pending.values()], default=None)

    def find(self, number: int) -> Infer | None:
        pending = self._pending.get(number)
        return None if pending is None else pending[0]

    async def wait_until_drained(self) -> None:
        while self._pending:
            self._idle.clear()
            await self._idle.wait()

    async def answer(self, request: Infer, timeout_s: float) -> Answer:
        """Wait for the answer to an inference that was just sent; cancelling this cancels the inference.

        Raises:
            InferenceTimeout: `inference_timeout`; the inference is cancelled.
            WorkerDied: `worker_died`.
            RuntimeProblem: the inference failed.
        """
        answer: asyncio.Future[Answer] = self._loop.create_future()
        number = request.id
        self._pending[number] = request, answer
        deadline = Timeout(timeout_s, self._expire, number, timeout_s)
        try:
            return await answer
        except asyncio.CancelledError:
            self._cancel(number)
            raise
        finally:
            deadline.cancel()
            del answer  # the traceback of a failure holds this frame, which would keep the tensors

    def begin(self, numbers: Sequence[int]) -> None:
        """Move inferences that run now to the front; some of a batch may have been answered already."""
        self._pending = {
            each: self._pending[each] for each in numbers if each in self._pending
        } | self._pending

    def settle(self, number: int, result: Answer | RuntimeProblem) -> None:
        """Hand the worker's answer to the caller, who may have left."""
        _, answer = self._pending.pop(number)
        if self._cancelled:
            self._cancelled.discard(number)
            if not self._cancelled:
                self._stop_watching()
        if not self._pending:
            self._idle.set()
        if answer.done():
            return
        if isinstance(result, RuntimeProblem):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    def fail(self, describe: Callable[[], RuntimeProblem]) -> None:
        """Fail all inferences for their callers; the worker may still answer them."""
        for _, answer in self._pending.values():
            if not answer.done():
                answer.set_exception(describe())

    def abandon(self, describe_end: Callable[[bool], WorkerDied]) -> None:
        """Fail all inferences because the worker has ended; the first may have been running.

        Args:
            describe_end: returns the error of an inference, by whether it may have begun.
        """
        first = next(iter(self._pending), None)
        for number, (_, answer) in self._pending.items():
            if not answer.done():
                answer.set_exception(describe_end(number == first))
        self._pending.clear()
        self._cancelled.clear()
        self._stop_watching()
        self._idle.set()

    def _expire(self, number: int, timeout_s: float) -> None:
        pending = self._pending.get(number)
        if pending is not None and not pending[1].done():
            reason = f"the inference did not end within {timeout_s:g} s and was stopped"
            pending[1].set_exception(InferenceTimeout(reason))
            self._cancel(number)

    def _cancel(self, number: int) -> None:
        if number in self._pending:
            self._cancelled.add(number)
            self._send_cancel(number)
            if self._watching is None:
                progress = self._find_cancelled_run
                self._watching = Timeout(self.patience_s, self._on_stuck, progress=progress)

    def _find_cancelled_run(self) -> object:
        """Return the running inference if it is cancelled: it is the first, by their order or by `begin`.

        A cancelled inference behind the first is not read yet, and proves nothing: the worker answers waiting
        requests, and those that leave a batch that goes on, at once.
        """
        first = next(iter(self._pending))
        return first if first in self._cancelled else object()

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
