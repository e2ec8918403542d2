"""Finds an example of a model's inputs: zeros, or ones, of lengths that the model runs on.

A file may leave lengths open that the model's nodes do not: a picture's sides have to be multiples of 32, a
sequence needs 512 samples. The search tries usual lengths, the numbers that the runtime names when it refuses
one, and those of the model's weights.
"""

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from runtime.errors import RuntimeProblem
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Example, Fill, TensorSpec

MAX_ZEROS_BYTES = 64 * 2**20
"""Limit of an example: the size of a request. A model that declares more is hardly run with that much."""
TEXT_BYTES = 40
"""Size of an empty element of BYTES: numpy's reference to it, and ONNX Runtime's string."""
MAX_INPUTS = 64
"""Inputs of a model that has examples: a decoder with the keys and values of thirty layers has so many."""
SIDES = (224, 64, 48, 32, 96, 112, 128, 160, 256, 299, 320, 384, 416, 512, 640, 1024)
"""Lengths of a picture's open sides: the most usual one, then the quickest first."""
STEPS = (16, 512, 256, 128, 64, 32, 1, 8, 1024, 1600, 2048, 4096, 8000, 16000, 48000, 80)
"""Lengths of a sequence: words, frames, samples."""
PICTURE_DIMENSIONS = 4
SEARCH_S = 3.0
"""After so long nothing further is tried: a load waits for it."""
STOP_S = 10.0
"""After so long a run with a guessed length is stopped: it may be a loop that zeros never end."""
MAX_HINTED = 8
"""Numbers of a refusal, or of the weights, that are tried."""
MAX_REFUSAL = 256
"""Characters of a refusal that are kept."""
_NUMBER = re.compile(r"\b\d{1,5}\b")

Dimension = tuple[str, int] | str
"""An open dimension: its name, which is the same length in all inputs, or an input's name and an index."""
Run = Callable[[dict[str, Any], ort.RunOptions], Sequence[Any]]
NOT_FINITE = "the model answers zeros with NaN or an infinity, which JSON cannot represent"


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes:
        examples: by input, of the first try if the model refused all of them.
        run_us: the duration of the run; None if the model refused all tries.
        refusal: the problem of the first try.
        is_finite: whether the model answered, with numbers that JSON can represent.
    """

    examples: Mapping[str, Example]
    run_us: int | None
    refusal: RuntimeProblem | None
    is_finite: bool


def find_example(
    required: Sequence[TensorSpec],
    run: Run,
    on_begin: Callable[[], None],
    read_weight_lengths: Callable[[], Iterable[int]],
) -> Found | None:
    """Return an example of the inputs that a model requires; None if none may be made or sent.

    Args:
        required: these inputs.
        run: runs the model on arrays and returns its answers; raises RuntimeProblem.
        on_begin: called before the first run, and only if there is one.
        read_weight_lengths: reads the lengths of the model's weights.
    """
    if len(required) > MAX_INPUTS or not all(map(_is_tensor, required)):
        return None
    first, answered = None, None
    tries, hinted, until_s = deque(_usual_lengths(required)), set[int](), time.monotonic() + SEARCH_S
    tried, usual = set[tuple[tuple[int, ...], ...]](), len(tries)
    with _run_options(is_limited=not all(map(is_fixed, required))) as options:
        while tries and (first is None or time.monotonic() < until_s):
            lengths, usual = tries.popleft(), usual - 1
            if usual == 0 and lengths:
                tries.extend(_hinted_lengths(lengths, _choose_hints(read_weight_lengths(), hinted)))
            shapes = tuple(_shape(spec, lengths) for spec in required)
            if shapes in tried or _total_bytes(required, shapes) > MAX_ZEROS_BYTES:
                continue
            if not tried:
                on_begin()
            tried.add(shapes)
            for fill in _fills(required):
                found = _try(required, shapes, fill, run, options)
                if found.is_finite:
                    return found
                if found.refusal is None:
                    answered = answered or found
                    continue
                first = first or found
                numbers = map(int, _NUMBER.findall(str(found.refusal)))
                tries.extend(_hinted_lengths(lengths, _choose_hints(numbers, hinted)))
            if answered is not None:
                return answered
    return first


def is_fixed(spec: TensorSpec) -> bool:
    """Whether an input leaves no length open but that of the batch."""
    return all(_is_batch(spec, index) for index, length in enumerate(spec.shape) if length < 0)


def _is_batch(spec: TensorSpec, index: int) -> bool:
    """Whether a dimension is usually the batch's: the first one, but not of a lone sequence of floats."""
    return index == 0 and (len(spec.shape) > 1 or _is_whole(spec))


def _is_tensor(spec: TensorSpec) -> bool:
    return spec.datatype in DATATYPES and len(spec.shape) <= MAX_DIMENSIONS


@contextmanager
def _run_options(*, is_limited: bool) -> Iterator[ort.RunOptions]:
    """Give the options of all tries: nothing is logged, and after `STOP_S` a limited run is stopped."""
    options = ort.RunOptions()
    options.log_severity_level = 4  # a refusal is an answer here; fatal ones are left
    timer = threading.Timer(STOP_S, setattr, (options, "terminate", True))
    timer.daemon = True
    if is_limited:
        with suppress(RuntimeError):  # no memory for a thread
            timer.start()
    try:
        yield options
    finally:
        timer.cancel()


def _try(
    required: Sequence[TensorSpec],
    shapes: Sequence[tuple[int, ...]],
    fill: Fill,
    run: Run,
    options: ort.RunOptions,
) -> Found:
    started_ns, refusal, text = time.perf_counter_ns(), None, NOT_FINITE
    examples = {
        spec.name: Example(shape, fill if _is_whole(spec) else "zeros")
        for spec, shape in zip(required, shapes, strict=True)
    }
    try:
        answers = run({spec.name: _make_array(spec, examples[spec.name]) for spec in required}, options)
        is_finite = all(map(_is_finite, answers))
    except RuntimeProblem as problem:
        refusal, is_finite = problem, False
        text = " ".join(str(problem).split())[:MAX_REFUSAL]
    run_us = (time.perf_counter_ns() - started_ns) // 1000
    if not is_finite:
        examples = {name: msgspec.structs.replace(each, refusal=text) for name, each in examples.items()}
    return Found(examples, run_us if refusal is None else None, refusal, is_finite)


def _is_finite(answer: Any) -> bool:
    return not (isinstance(answer, np.ndarray) and answer.dtype.kind == "f") or bool(
        np.isfinite(answer).all()
    )


def _usual_lengths(required: Sequence[TensorSpec]) -> Iterator[dict[Dimension, int]]:
    """Yield lengths for the open dimensions, the likeliest first; batches have one element."""
    kinds: dict[Dimension, Sequence[int]] = {}
    batch, first = dict[Dimension, int](), dict[Dimension, int]()
    for spec in required:
        dimensions = [*_open_dimensions(spec)]
        for index, dimension in dimensions:
            name = dimension if isinstance(dimension, str) else ""
            is_side = len(spec.shape) >= PICTURE_DIMENSIONS and index > 0
            kinds.setdefault(dimension, SIDES if is_side else STEPS)
            if "past" in name:  # keys and values of earlier tokens, of which there are none
                batch[dimension] = 0
            elif "batch" in name.lower() or _is_batch(spec, index):
                batch[dimension] = 1
        first |= {dimension: 1 for _, dimension in dimensions[:1]}
    for position in range(len(SIDES)):
        usual = {dimension: lengths[position] for dimension, lengths in kinds.items()}
        yield usual | batch
        yield usual | first | batch  # a state has its batch dimension in the middle


def _choose_hints(numbers: Iterable[int], hinted: set[int]) -> list[int]:
    """Return the first numbers that can be lengths and were not tried before; adds them to `hinted`."""
    new = [each for each in dict.fromkeys(numbers) if each > 1 and each not in hinted][:MAX_HINTED]
    hinted.update(new)
    return new


def _hinted_lengths(lengths: Mapping[Dimension, int], hints: Iterable[int]) -> Iterator[dict[Dimension, int]]:
    """Yield refused lengths with a number of the refusal in place of all but batches, then of each."""
    for hint in hints:
        yield {dimension: length if length <= 1 else hint for dimension, length in lengths.items()}
        for dimension in lengths:
            yield {**lengths, dimension: hint}


def _open_dimensions(spec: TensorSpec) -> Iterator[tuple[int, Dimension]]:
    names = spec.dimensions or ("",) * len(spec.shape)
    for index, (length, name) in enumerate(zip(spec.shape, names, strict=True)):
        if length < 0:
            yield index, name or (spec.name, index)


def _shape(spec: TensorSpec, lengths: Mapping[Dimension, int]) -> tuple[int, ...]:
    shape = list(spec.shape)
    for index, dimension in _open_dimensions(spec):
        shape[index] = lengths[dimension]
    return tuple(shape)


def _fills(required: Iterable[TensorSpec]) -> tuple[Fill, ...]:
    """Return what to fill inputs with: whole numbers may be lengths or a mask, which cannot all be 0."""
    return ("zeros", "ones") if any(map(_is_whole, required)) else ("zeros",)


def _is_whole(spec: TensorSpec) -> bool:
    return "INT" in spec.datatype or spec.datatype == "BOOL"


def _make_array(spec: TensorSpec, example: Example) -> Any:
    if spec.datatype == "BYTES":
        return np.full(example.shape, "", object)
    make = np.ones if example.values == "ones" else np.zeros
    return make(example.shape, DATATYPES[spec.datatype].numpy)


def _total_bytes(required: Iterable[TensorSpec], shapes: Iterable[tuple[int, ...]]) -> int:
    # A length of 0 does not make the others any that numpy takes.
    return sum(
        math.prod(max(length, 1) for length in shape) * (DATATYPES[spec.datatype].size or TEXT_BYTES)
        for spec, shape in zip(required, shapes, strict=True)
    )
