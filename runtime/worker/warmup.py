"""Warm-up: the inference before a load completes, on given inputs or on zeros."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.errors import InferenceFailed, LoadRefused, RuntimeProblem
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Tensor, TensorSpec
from runtime.worker.sessions import ServingSession, is_out_of_memory

MAX_ZEROS_BYTES = 64 * 2**20
"""Limit of zeros: the size of a request. A model that declares more is hardly run with that much."""
TEXT_BYTES = 40
"""Size of an empty element of BYTES: numpy's reference to it, and ONNX Runtime's string."""
WITH_ZEROS = (
    "the model does not run on zeros of its declared shapes, and has to before it is loaded: give inputs that"
    " it takes as [[warm_up.inputs]] in its loadledger.toml"
)
WITH_GIVEN = (
    "the model does not run on the inputs that its loadledger.toml gives as [[warm_up.inputs]], and has to"
    " before it is loaded: correct them"
)
OR_NOT = "or switch that off there, by enabled = false under [warm_up]"


def warm_up(model: ServingSession, given: Sequence[Tensor], on_begin: Callable[[], None]) -> int | None:
    """Run a model on the given inputs, else on zeros of the declared shapes, so that no request is the first.

    Args:
        model: the model; zeros are one element along its batch dimension.
        given: inputs of its loadledger.toml; empty means zeros.
        on_begin: called before the run, and only if there is one.

    Returns:
        The duration in microseconds, or None if the shapes do not allow zeros.

    Raises:
        LoadRefused: `warm_up_failed`, with the runtime's words and what to do.
        MemoryError: there is not enough memory for it.
    """
    required = [spec for spec in model.inputs if not spec.optional]
    if not given and not zeros_are_allowed(model, required):
        return None
    started_ns = time.perf_counter_ns()
    on_begin()
    try:
        _run(model, given, required)
    except RuntimeProblem as problem:
        if isinstance(problem, InferenceFailed) and is_out_of_memory(str(problem)):
            raise MemoryError(str(problem)) from None
        # ONNX Runtime reports a scalar like an undeclared shape, so zeros may have been no valid input.
        if not given and not all(spec.shape for spec in required):
            return None
        advice = WITH_GIVEN if given else WITH_ZEROS
        raise LoadRefused("warm_up_failed", f"{advice}, {OR_NOT}. It says: {problem}") from None
    return (time.perf_counter_ns() - started_ns) // 1000


def _run(model: ServingSession, given: Sequence[Tensor], required: Sequence[TensorSpec]) -> None:
    feed = model.runner.decode_inputs(given) if given else {spec.name: make_zeros(spec) for spec in required}
    if model.dimension is not None:
        model.dimension.measure(feed)
    model.runner.run(model.runner.select_outputs((), text=False), feed, ort.RunOptions())


def zeros_are_allowed(model: ServingSession, required: Sequence[TensorSpec]) -> bool:
    """Return whether these shapes allow zeros, within the limit, and the model has an output to send."""
    answers = any(spec.datatype in DATATYPES for spec in model.outputs)
    return answers and all(map(_is_known, required)) and sum(map(_bytes, required)) <= MAX_ZEROS_BYTES


def make_zeros(spec: TensorSpec) -> Any:
    """Return an input of 0, False or empty texts."""
    if spec.datatype == "BYTES":
        return np.full(_shape(spec), "", object)
    return np.zeros(_shape(spec), DATATYPES[spec.datatype].numpy)


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return the declared shape with 1 for an open first dimension, usually the batch dimension."""
    return (1, *spec.shape[1:]) if spec.shape[:1] == (-1,) else spec.shape


def _is_known(spec: TensorSpec) -> bool:
    shape = _shape(spec)
    return spec.datatype in DATATYPES and len(shape) <= MAX_DIMENSIONS and min(shape, default=0) >= 0


def _bytes(spec: TensorSpec) -> int:
    # A length of 0 does not make the others any that numpy takes.
    elements = math.prod(max(length, 1) for length in _shape(spec))
    return elements * (DATATYPES[spec.datatype].size or TEXT_BYTES)
