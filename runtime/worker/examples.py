"""Finds an example of a model's inputs: zeros, or ones, of lengths that the model runs on.

A file may leave lengths open although its operators do not: a picture's sides must be multiples of 32, a
sequence needs 512 samples. The search tries usual lengths, the numbers in the runtime's refusals, and the
lengths of the model's weights.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from msgspec.structs import replace

from runtime.errors import RuntimeProblem
from runtime.wire import DATATYPES, Example, Fill, TensorSpec, plain_text
from runtime.worker.sessions import is_out_of_memory

MAX_EXAMPLE_BYTES = 64 * 2**20
"""Limit of an example: the size of a request. A larger declared model is unlikely to be run at that size."""
TEXT_BYTES = 40
"""Size of an empty element of BYTES: numpy's reference to it, and ONNX Runtime's string."""
MAX_INPUTS = 64
"""Inputs of a model that has examples: a decoder with the keys and values of thirty layers has so many."""
SIDES = (32, 48, 64, 96, 112, 128, 160, 224, 256, 299, 320, 384, 416, 512, 640, 1024)
"""Lengths of the open sides of a picture or volume, the smallest first, since ONNX Runtime's arena keeps the
memory of a session's first run."""
USUAL_SIDE = 224
"""Length of a side that most models of pictures were trained with."""
SEQUENCE_LENGTHS = (16, 512, 256, 128, 64, 32, 1, 8, 1024, 1600, 2048, 4096, 8000, 16000, 48000, 80)
"""Lengths of a sequence: words, frames, samples."""
PICTURE_DIMENSIONS = 4
MAX_HINTS = 32
"""Numbers from refusals and weights that are tried."""
MAX_REFUSAL_BYTES = 256
"""Length of a refusal that is kept, with each input."""
_NUMBER = re.compile(r"\b\d{1,5}\b")

Dimension = tuple[str, int] | str
"""An open dimension: its name, which has one length in all inputs, or an input's name and an index."""
Lengths = Mapping[Dimension, int]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search.

    Attributes:
        examples: by input; those of the first try if the model refused all tries.
        run_us: the duration of the run; None if the model refused all tries.
        problem: the refusal of the first try, likewise.
        is_finite: whether the model answered without NaN and infinities.
    """

    examples: Mapping[str, Example]
    run_us: int | None
    problem: RuntimeProblem | MemoryError | None
    is_finite: bool = False

    @property
    def lacks_memory(self) -> bool:
        return isinstance(self.problem, MemoryError) or is_out_of_memory(str(self.problem))


def find_example(
    required: Sequence[TensorSpec],
    run: Callable[[dict[str, Any]], Sequence[Any]],
    on_begin: Callable[[], None],
    read_weight_lengths: Callable[[], Iterable[int]],
    is_over: Callable[[], bool],
    *,
    is_batched: bool,
) -> SearchResult | None:
    """Return an example of the inputs that a model requires, or None if none may be made or sent.

    Args:
        required: the required inputs.
        run: runs the model on arrays by name and returns its answers; raises RuntimeProblem.
        on_begin: called before the first run, and only if there is one.
        read_weight_lengths: reads the lengths of the model's weights.
        is_over: whether the search has to end.
        is_batched: whether the first dimension of each input is the batch's.
    """
    if len(required) > MAX_INPUTS:
        return None
    # Whole numbers may be lengths or a mask, which cannot all be 0.
    fills: tuple[Fill, ...] = ("zeros", "ones") if any(map(_is_whole, required)) else ("zeros",)
    found: list[SearchResult] = []
    tried = set[tuple[tuple[int, ...], ...]]()
    for lengths in _lengths_to_try(required, found, read_weight_lengths, is_batched=is_batched):
        if found and (is_over() or found[-1].lacks_memory):
            break
        shapes = tuple(_shape(spec, lengths) for spec in required)
        if shapes in tried or _total_bytes(required, shapes) > MAX_EXAMPLE_BYTES:
            continue
        if not tried:
            on_begin()
        tried.add(shapes)
        for fill in fills:
            found.append(_run_once(required, shapes, fill, run))
            if found[-1].is_finite:
                return found[-1]
        answered = [each for each in found if each.problem is None]
        if answered:
            return answered[0]
    return found[0] if found else None


def is_fixed(spec: TensorSpec, *, is_batched: bool) -> bool:
    """Whether an input leaves no length open but the batch's."""
    opened = (index for index, length in enumerate(spec.shape) if length < 0)
    return all(_is_batch(spec, index, is_batched=is_batched) for index in opened)


def _is_batch(spec: TensorSpec, index: int, *, is_batched: bool) -> bool:
    """Whether a dimension is the batch's: usually the first one, except for a single sequence of floats."""
    return index == 0 and (is_batched or len(spec.shape) > 1 or _is_whole(spec))


def _is_whole(spec: TensorSpec) -> bool:
    return "INT" in spec.datatype or spec.datatype == "BOOL"


def _run_once(
    required: Sequence[TensorSpec],
    shapes: Sequence[tuple[int, ...]],
    fill: Fill,
    run: Callable[[dict[str, Any]], Sequence[Any]],
) -> SearchResult:
    examples = {
        spec.name: Example(shape, fill if _is_whole(spec) else "zeros")
        for spec, shape in zip(required, shapes, strict=True)
    }
    started_ns = time.perf_counter_ns()
    try:
        arrays = {spec.name: make_array(spec, examples[spec.name]) for spec in required}
        is_finite = all(map(_is_finite, run(arrays)))
    except (MemoryError, RuntimeProblem) as problem:
        refusal = plain_text(" ".join(str(problem).split()), MAX_REFUSAL_BYTES)
        refused = {name: replace(example, refusal=refusal) for name, example in examples.items()}
        return SearchResult(refused, None, problem.with_traceback(None))
    return SearchResult(examples, (time.perf_counter_ns() - started_ns) // 1000, None, is_finite)


def _is_finite(answer: Any) -> bool:
    is_float = isinstance(answer, np.ndarray) and answer.dtype.kind == "f"
    return not is_float or bool(np.isfinite(answer).all())


def make_array(spec: TensorSpec, example: Example) -> Any:
    if spec.datatype == "BYTES":
        return np.full(example.shape, "", object)
    make = np.ones if example.values == "ones" else np.zeros
    return make(example.shape, DATATYPES[spec.datatype].numpy)


def _lengths_to_try(
    required: Sequence[TensorSpec],
    found: Iterable[SearchResult],
    read_weight_lengths: Callable[[], Iterable[int]],
    *,
    is_batched: bool,
) -> Iterator[Lengths]:
    """Yield lengths for the open dimensions, the likeliest first; batches have one element.

    Args:
        required: the inputs.
        found: the result with the lengths yielded so far.
        read_weight_lengths: see `find_example`.
        is_batched: see `find_example`.
    """
    kinds: dict[Dimension, Sequence[int]] = {}
    batch, first = dict[Dimension, int](), dict[Dimension, int]()
    for spec in required:
        dimensions = [*_open_dimensions(spec)]
        for index, dimension in dimensions:
            name = dimension if isinstance(dimension, str) else ""
            is_side = len(spec.shape) >= PICTURE_DIMENSIONS and index > 0
            kinds.setdefault(dimension, SIDES if is_side else SEQUENCE_LENGTHS)
            if "past" in name:  # keys and values of earlier tokens: there are none
                batch[dimension] = 0
            elif "batch" in name.lower() or _is_batch(spec, index, is_batched=is_batched):
                batch[dimension] = 1
        first |= {dimension: 1 for _, dimension in dimensions[:1]}
    smallest = {dimension: lengths[0] for dimension, lengths in kinds.items()} | batch
    usual = (
        smallest | {dimension: USUAL_SIDE for dimension, lengths in kinds.items() if lengths is SIDES} | batch
    )
    for position in range(len(SIDES)):
        lengths = {dimension: lengths[position] for dimension, lengths in kinds.items()}
        yield lengths | batch
        yield lengths | first | batch  # a state has its batch dimension in the middle
    if kinds:
        named = _NUMBER.findall(" ".join(str(each.problem) for each in found))
        numbers = dict.fromkeys([*map(int, named), *read_weight_lengths()])
        for number in islice((each for each in numbers if each > 1), MAX_HINTS):
            yield dict.fromkeys(kinds, number) | batch
            yield from (others | {dimension: number} for dimension in kinds for others in (smallest, usual))


def _open_dimensions(spec: TensorSpec) -> Iterator[tuple[int, Dimension]]:
    names = spec.dimensions or ("",) * len(spec.shape)
    for index, (length, name) in enumerate(zip(spec.shape, names, strict=True)):
        if length < 0:
            yield index, name or (spec.name, index)


def _shape(spec: TensorSpec, lengths: Lengths) -> tuple[int, ...]:
    opened = dict(_open_dimensions(spec))
    return tuple(lengths[opened[at]] if at in opened else length for at, length in enumerate(spec.shape))


def _total_bytes(required: Iterable[TensorSpec], shapes: Iterable[tuple[int, ...]]) -> int:
    # A length of 0 does not allow the others to exceed numpy's limit.
    return sum(
        math.prod(max(length, 1) for length in shape) * (DATATYPES[spec.datatype].size or TEXT_BYTES)
        for spec, shape in zip(required, shapes, strict=True)
    )
