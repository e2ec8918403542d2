"""In-flight inferences of a worker: their deadlines, their cancellation, and a worker that is stuck."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from runtime.errors import Exit, InferenceTimeout, RuntimeProblem, WorkerDied
from runtime.timeouts import Timeout
from runtime.wire import Infer, Outcome, Tensor

Answer = tuple[Outcome, tuple[Tensor, ...]]
"""The result of an inference: its durations and its outputs."""


class InFlight:
    """The queued and running inferences of one worker, in the order of their requests.

    A cancelled or timed-out inference stays in flight until the worker reports its end.

    Args:
        patience_s: how long a cancelled inference may go on running.
        cancel: sends the cancellation to the worker.
        on_stuck: called when the worker does not stop it: requests behind it would wait for ever.
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
            del answer  # a failure's traceback holds this frame, and so would keep the tensors

    def settle(self, number: int, result: Answer | RuntimeProblem) -> None:
        """Hand the worker's answer to the caller, who may have gone."""
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

    def abandon(self, end: Exit) -> None:
        """Fail all inferences because the worker has ended; the first may have been running."""
        first = next(iter(self._pending), None)
        for number, (_, answer) in self._pending.items():
            if not answer.done():
                answer.set_exception(WorkerDied(end, begun=number == first))
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
        """Return the running inference if it is cancelled: they run in order, so it is the first.

        A cancelled inference behind it only waits, and proves nothing.
        """
        first = next(iter(self._pending))
        return first if first in self._cancelled else object()

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
