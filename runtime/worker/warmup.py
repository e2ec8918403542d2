"""The warm-up: a model runs before it is loaded, on given inputs or on an example that the worker finds.

It shows the duration and memory of an inference, and whether there can be one.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

from features import providers
from runtime.errors import InferenceCancelled, InferenceFailed, LoadRefused, RuntimeProblem
from runtime.onnxfile import read_weight_lengths
from runtime.wire import Example, Load, Tensor
from runtime.worker import extensions, sessions
from runtime.worker.examples import MAX_INPUTS, find_example, is_fixed
from runtime.worker.execution import SHRINK_ARENA
from runtime.worker.sessions import ServingSession, is_out_of_memory

SEARCH_NS = 10**9
"""Limit of a search for an example; a session that took longer to create may be searched as long."""
RUN_BYTES = 512 * 2**20
"""Memory of a run of a search, or the size of the model's files if larger."""
TOO_LONG = "it was stopped: to find inputs that the model takes may last {:.1f} s here"
WITH_ZEROS = (
    "the model does not run on zeros or ones of its declared shapes, and has to before it is loaded: give"
    " inputs that it takes as [[warm_up.inputs]] in its loadledger.toml"
)
WITH_GIVEN = (
    "the model does not run on the inputs that its loadledger.toml gives as [[warm_up.inputs]], and has to"
    " before it is loaded: correct them"
)
OR_NOT = "or, for loads on the CPU, switch that off there, by enabled = false under [warm_up]"
NOT_TRIED = "not tried: its loadledger.toml gives inputs for the warm-up"
FATAL = 4
"""ONNX Runtime's log level at which it logs fatal errors alone."""
Examples = Mapping[str, Example]
NO_EXAMPLES: Examples = {}


class SearchLimit:
    """Ends a search for an example: the thread of the control channel stops its run.

    Attributes:
        is_needed: true until the model is loaded.
        most_ns: the limit of the present search.
    """

    def __init__(self) -> None:
        self.is_needed = True
        self.most_ns = self._until_ns = 0
        self._options: ort.RunOptions | None = None

    def begin(self, most_ns: int) -> None:
        self.most_ns, self._until_ns = most_ns, time.monotonic_ns() + most_ns

    def is_over(self) -> bool:
        return time.monotonic_ns() > self._until_ns

    @contextmanager
    def applied(self, options: ort.RunOptions) -> Iterator[None]:
        """Stop a run with these options once the search is over."""
        self._options = options
        try:
            yield
        finally:
            self._options = None

    def check(self) -> None:
        options = self._options  # another thread sets it
        if options is not None and self.is_over():
            options.terminate = True


@dataclass(frozen=True, slots=True)
class ModelWarmUp:
    """The warm-up of a model.

    Attributes:
        order: the order of its load. With a target, a model that was not run is refused, as a request might
            fail.
        model: the model.
        given: inputs of its loadledger.toml; empty means a search for an example.
        file: the model's file, whose weights suggest lengths.
        limit: the limit of the search.
    """

    order: Load
    model: ServingSession
    given: Sequence[Tensor]
    file: Path | None
    limit: SearchLimit

    def run(self, loading_ns: int, on_begin: Callable[[], None]) -> tuple[int | None, Examples]:
        """Run the model on the given inputs, or else on an example that it accepts.

        Args:
            loading_ns: the duration of creating the session.
            on_begin: called before the first run, and only if there is one.

        Returns:
            The duration in microseconds, or None if the model was not run, and the examples by input.

        Raises:
            LoadRefused: `warm_up_failed`, with the runtime's words and what to do.
            MemoryError: there is not enough memory for a run.
        """
        is_elsewhere = self.order.target is not None
        # Zeros are no image, and a decoder of images may end the process for them (decision 49).
        if not self.given and not is_elsewhere and self.file is not None and extensions.are_named(self.file):
            return None, NO_EXAMPLES
        self.limit.begin(max(SEARCH_NS, loading_ns))
        try:
            run_us, examples = self._run_given(on_begin) if self.given else self._find_example(on_begin)
        except LoadRefused:
            if self.order.warm_up_required or is_elsewhere:
                raise
            return None, NO_EXAMPLES
        if run_us is None and is_elsewhere:
            said = {f". It says: {each.refusal}" for each in examples.values() if each.refusal}
            raise LoadRefused("warm_up_failed", "".join([providers.NOT_RUN, *sorted(said)[:1]]))
        return run_us, examples

    def _run_given(self, on_begin: Callable[[], None]) -> tuple[int, Examples]:
        started_ns = time.perf_counter_ns()
        on_begin()
        try:
            _run(self.model, self.model.runner.decode_inputs(self.given))
        except RuntimeProblem as problem:
            if isinstance(problem, InferenceFailed) and is_out_of_memory(str(problem)):
                raise MemoryError(str(problem)) from None
            raise _refuse(WITH_GIVEN, problem) from None
        run_us = (time.perf_counter_ns() - started_ns) // 1000
        return run_us, {
            tensor.name: Example(tensor.shape, "zeros", NOT_TRIED) for tensor in self.given[:MAX_INPUTS]
        }

    def _find_example(self, on_begin: Callable[[], None]) -> tuple[int | None, Examples]:
        required = [spec for spec in self.model.inputs if not spec.optional]
        is_batched = self.model.dimension is not None
        is_declared = all(is_fixed(spec, is_batched=is_batched) for spec in required)
        found = find_example(
            required,
            partial(_run, self.model) if is_declared else self._run_guess,
            on_begin,
            lambda: read_weight_lengths(self.file) if self.file else (),
            self.limit.is_over,
            is_batched=is_batched,
        )
        if found is None:
            return None, NO_EXAMPLES
        # ONNX Runtime reports a scalar like an undeclared shape, so zeros may have been no valid input.
        if found.problem is not None and is_declared and all(spec.shape for spec in required):
            if found.lacks_memory:
                raise MemoryError(str(found.problem))
            raise _refuse(WITH_ZEROS, found.problem)
        return found.run_us, found.examples

    def _run_guess(self, feed: dict[str, Any]) -> list[Any]:
        """Run the model on guessed lengths, within the bounds of a search."""
        options, run_bytes = ort.RunOptions(), max(RUN_BYTES, self.order.bytes)
        try:
            with self.limit.applied(options), sessions.memory_limited(run_bytes):
                return _run(self.model, feed, options, keeps_memory=False)
        except InferenceCancelled:
            raise InferenceFailed(TOO_LONG.format(self.limit.most_ns / 1e9)) from None


def _refuse(advice: str, problem: Exception) -> LoadRefused:
    return LoadRefused("warm_up_failed", f"{advice}, {OR_NOT}. It says: {problem}")


def _run(
    model: ServingSession,
    feed: dict[str, Any],
    options: ort.RunOptions | None = None,
    *,
    keeps_memory: bool = True,
) -> list[Any]:
    """Run the model for all outputs, however long; the model keeps no memory of guessed lengths."""
    if model.dimension is not None:
        model.dimension.measure(feed)
    options = options or ort.RunOptions()
    options.log_severity_level = FATAL  # a refusal is an answer here
    if not keeps_memory:
        options.add_run_config_entry(*SHRINK_ARENA)
    return model.runner.run(model.runner.select_outputs((), text=False, digest=True), feed, options)
