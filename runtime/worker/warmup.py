"""The inference that a worker runs before its model is loaded, so that no request pays for the first one."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.errors import InferenceFailed, LoadRefused, RuntimeProblem
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Tensor, TensorSpec
from runtime.worker.model import Model

MAX_ZEROS_BYTES = 64 * 2**20
"""Of zeros: what a request may have. A model that declares more is hardly asked with that much."""
TEXT_BYTES = 40
"""Of an empty element of BYTES: numpy's reference to it, and what ONNX Runtime makes of it."""
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "bad allocation", "MemoryError")
"""How ONNX Runtime says so, and how Python does; there is no code for it."""
WITH_ZEROS = (
    "the model does not run on zeros of its declared shapes, and has to before it is loaded: give inputs that"
    " it takes as [[warm_up.inputs]] in its loadledger.toml"
)
WITH_GIVEN = (
    "the model does not run on the inputs that its loadledger.toml gives as [[warm_up.inputs]], and has to"
    " before it is loaded: correct them"
)
OR_NOT = "or switch that off there, by enabled = false under [warm_up]"


def warm_up(model: Model, given: Sequence[Tensor], on_begin: Callable[[], None]) -> int | None:
    """Run a model on what is given, else on zeros of the declared shapes, where these allow it.

    Args:
        model: with a batch dimension, zeros are one element along it.
        given: what a request would bring; nothing means zeros.
        on_begin: is called before it is run, and only then.

    Returns:
        Microseconds, or None if the shapes do not allow it.

    Raises:
        LoadRefused: `warm_up_failed`, with the runtime's words and what to do.
        MemoryError: there is not enough for it.
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
        # Of a scalar ONNX Runtime says what it says where no shape is declared: it may have been no input.
        if not given and not all(spec.shape for spec in required):
            return None
        told = WITH_GIVEN if given else WITH_ZEROS
        raise LoadRefused("warm_up_failed", f"{told}, {OR_NOT}. It says: {problem}") from None
    return (time.perf_counter_ns() - started_ns) // 1000


def _run(model: Model, given: Sequence[Tensor], required: Sequence[TensorSpec]) -> None:
    feed = model.runner.feed(given) if given else {spec.name: zeros(spec) for spec in required}
    if model.dimension is not None:
        model.dimension.measure(feed)
    model.runner.run(model.runner.asked((), text=False), feed, ort.RunOptions())


def zeros_are_allowed(model: Model, required: Sequence[TensorSpec]) -> bool:
    """Tell whether zeros can be made of these shapes, are not too many, and lead to an answer to send."""
    answers = any(spec.datatype in DATATYPES for spec in model.outputs)
    return answers and all(map(_is_known, required)) and sum(map(_bytes, required)) <= MAX_ZEROS_BYTES


def zeros(spec: TensorSpec) -> Any:
    """Make an input that is 0, False or the empty text throughout."""
    if spec.datatype == "BYTES":
        return np.full(_shape(spec), "", object)
    return np.zeros(_shape(spec), DATATYPES[spec.datatype].numpy)


def is_out_of_memory(text: str) -> bool:
    """Tell whether this is what ONNX Runtime says when it has no memory."""
    return any(words in text for words in OUT_OF_MEMORY)


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return the declared shape; an unknown first dimension is mostly the batch's, and 1 will do."""
    return (1, *spec.shape[1:]) if spec.shape[:1] == (-1,) else spec.shape


def _is_known(spec: TensorSpec) -> bool:
    shape = _shape(spec)
    return spec.datatype in DATATYPES and len(shape) <= MAX_DIMENSIONS and min(shape, default=0) >= 0


def _bytes(spec: TensorSpec) -> int:
    # A length of 0 does not make the others any that numpy takes.
    elements = math.prod(max(length, 1) for length in _shape(spec))
    return elements * (DATATYPES[spec.datatype].size or TEXT_BYTES)
