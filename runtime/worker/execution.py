"""From `Infer` to `Outcome` or `Failure`, one by one or several at once."""

import time
from collections.abc import Sequence

from runtime.errors import InferenceCancelled, InferenceFailed, RuntimeProblem
from runtime.wire import Failure, Infer, Outcome, Tensor, plain_text
from runtime.worker.batching import BatchDimension, NotApart, Request, apart, together
from runtime.worker.cancellation import Cancellation
from runtime.worker.inference import Runner
from runtime.worker.outbox import Outbox

NO_MEMORY = "the worker has not enough memory for this inference"


class Executor:
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

    def prepare(self, infer: Infer, tensors: Sequence[Tensor]) -> Request | None:
        """Read a request; None if it was answered that it is none that can be run.

        Nothing of what is cancelled already is read: a long text takes more time than a client's 504.
        """
        if self._dropped(infer.id):
            return None
        came_ns = time.monotonic_ns()
        try:
            asked = self._runner.asked(infer.outputs, infer.text, infer.digest)
            feed = self._runner.feed(tensors)
            size, alone = (1, True) if self._dimension is None else self._dimension.measure(feed)
        except MemoryError:
            self._refuse(infer.id, InferenceFailed(NO_MEMORY))
        except RuntimeProblem as problem:  # in no other name: its traceback holds the tensors
            self._refuse(infer.id, problem)
        else:
            input_ns = time.monotonic_ns() - came_ns
            return Request(infer.id, asked, feed, size, alone, infer.sent_ns, came_ns, input_ns)
        return None

    def run(self, batch: Sequence[Request]) -> None:
        """Run requests that go together, at once or, if one of them spoils that, one after the other."""
        if len(batch) > 1:
            batch = [request for request in batch if not self._dropped(request.number)]
        if len(batch) > 1 and self._run_at_once(batch):
            return
        for request in batch:
            self._run_alone(request)

    def _run_alone(self, request: Request) -> None:
        begun_ns = time.monotonic_ns()
        options = self._cancellation.begin((request.number,))
        try:
            if options is None:
                self._cancellation.drop(request.number)
                raise InferenceCancelled
            self._outbox.before_run(self._last_run_ns)
            arrays = self._runner.run(request.asked, request.feed, options)
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

    def _run_at_once(self, batch: Sequence[Request]) -> bool:
        """Run a batch and answer all of it, or nothing of it: no request is to suffer from another."""
        begun_ns = time.monotonic_ns()
        options = self._cancellation.begin([request.number for request in batch])
        if options is None:
            return False
        self._outbox.before_run(self._last_run_ns)
        try:
            feed = together(batch)
            joined_ns = time.monotonic_ns()
            arrays = self._runner.run(batch[0].asked, feed, options)
            ran_ns = time.monotonic_ns()
            self._last_run_ns = ran_ns - begun_ns
            parts = apart(batch, arrays)
        except (MemoryError, RuntimeProblem, NotApart):
            self._cancellation.end_to_begin_again()
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
        self, request: Request, arrays: Sequence[object], times: tuple[int, int, int], execution_size: int
    ) -> bool:
        """Answer a request that was run; tells whether it has its outputs."""
        split_ns = time.monotonic_ns()
        try:
            heads, parts = self._runner.answer(request.asked, arrays)
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
        self._outbox.put(Failure(number, problem.code, plain_text(str(problem))))


def _queue_ns(request: Request, begun_ns: int) -> int:
    """Return for how long a request waited, what it took to read it left out."""
    return max(0, begun_ns - request.sent_ns - request.input_ns) if request.sent_ns else 0
