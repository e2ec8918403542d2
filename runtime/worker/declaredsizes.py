"""What a model declares of its inputs and outputs, held against the limits of requests and answers.

A model that no request can ask is refused at its load, and an answer that would be too long before it is
computed, where the outputs' dimensions have names of inputs' dimensions. Not all files tell the truth: of a
model that halves the sides of a picture, converters give the output's sides the names of the input's, and
ONNX Runtime only warns. So a declared shape counts once a run has shown that it is kept.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runtime.wire import DATATYPES, LENGTH, MAX_DIMENSIONS, MAX_PAYLOAD_BYTES, MAX_REQUEST_BYTES, TensorSpec

OBSERVED_RUNS = 32
"""First runs of a session whose outputs are compared with their declared shapes, in 2 us each."""
HEAD_BYTES = 64 * 2**10
"""Of the JSON of a request before its tensors."""
LARGE_BYTES = 2**20
"""Of an output of a fixed shape that may matter."""
OUTPUT_ADVICE = {
    "map(": "convert the model with zipmap=False (of skl2onnx: options={'zipmap': False})",
    "seq(": "end the graph with SequenceAt or ConcatFromSequence, which make a tensor of a sequence",
    "": "end the graph with a Cast to FLOAT",
}
INPUT_ADVICE = {
    "map(": "convert the model without DictVectorizer or CastMap, so that it takes a tensor",
    "seq(": "let the graph take tensors, and make the sequence of them by SequenceConstruct",
    "": "let the graph take FLOAT, and begin it with a Cast",
}
_BATCH = "(batch)"
"""Name of the first dimension with batching; no file's can have brackets."""


def explain_uselessness(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_request_bytes: int
) -> str | None:
    """Return why each inference of a model would be refused, and what to change; None if some would not.

    Open lengths are taken to be 1, and those of an output 0 unless an input has them, too.
    """
    required = [spec for spec in inputs if not spec.optional]
    for spec in required:
        if not _is_sendable(spec):
            return f"no request can give {_describe(spec, 'input', INPUT_ADVICE)}"
    sendable = [spec for spec in outputs if _is_sendable(spec)]
    if outputs and not sendable:
        return f"no answer can have {_describe(outputs[0], 'output', OUTPUT_ADVICE)}"
    needed = sum(_least_bytes(spec, [1] * len(spec.shape)) for spec in required)
    if needed > max_request_bytes:
        return (
            f"its inputs have {needed} bytes, and a request may have {max_request_bytes}: {_enlarge(needed)}"
        )
    known = {name for spec in required for name in spec.dimensions if name}
    sizes = [_least_bytes(spec, [name in known for name in _names(spec)]) for spec in sendable]
    if min(sizes, default=0) > MAX_PAYLOAD_BYTES:
        most = f"an answer may have {MAX_PAYLOAD_BYTES}: let it give less, or several outputs to choose from"
        return f"its smallest output has {min(sizes)} bytes, and {most}"
    return None


def _is_sendable(spec: TensorSpec) -> bool:
    return spec.datatype in DATATYPES and len(spec.shape) <= MAX_DIMENSIONS


def _describe(spec: TensorSpec, kind: str, advice: Mapping[str, str]) -> str:
    if spec.datatype in DATATYPES:
        return (
            f"{kind} {spec.name!r} its {len(spec.shape)} dimensions, of at most {MAX_DIMENSIONS}: join some"
        )
    fitting = next(each for mark, each in advice.items() if mark in spec.datatype)
    return f"{kind} {spec.name!r}, which is a {spec.datatype}: {fitting}"


def _enlarge(needed: int) -> str:
    mib = (needed + HEAD_BYTES) // 2**20 + 1
    if mib * 2**20 > MAX_REQUEST_BYTES:
        return "let it take less at once"
    return f"start the server with --max-request-size={mib}MiB"


def _least_bytes(spec: TensorSpec, open_lengths: Sequence[int]) -> int:
    pairs = zip(spec.shape, open_lengths, strict=True)
    lengths = (length if length >= 0 else open_length for length, open_length in pairs)
    return math.prod(lengths) * (DATATYPES[spec.datatype].size or LENGTH.size)


def _names(spec: TensorSpec, *, is_batched: bool = False) -> tuple[str, ...]:
    names = spec.dimensions or ("",) * len(spec.shape)
    return (_BATCH, *names[1:]) if is_batched else names


Source = tuple[str, int]
"""Where the length of an output's dimension is found: an input, and which of its dimensions."""


class OutputSizes:
    """Tells the sizes of outputs from a request's inputs.

    Attributes:
        kept: of each output whose declared shape counts, the bytes if all open lengths are 1, and the sources
            of these.
        runs_to_observe: how many of the next runs are to be observed.
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, is_batched: bool
    ) -> None:
        sources: dict[str, Source] = {}
        for spec in inputs:
            for axis, name in enumerate(_names(spec, is_batched=is_batched)):
                if name and not spec.optional:
                    sources.setdefault(name, (spec.name, axis))
        self._declared: dict[str, tuple[int, tuple[int | Source, ...]]] = {}
        self.kept: dict[str, tuple[int, Sequence[Source]]] = {}
        for spec in outputs:
            pairs = zip(spec.shape, _names(spec, is_batched=is_batched), strict=True)
            lengths = [length if length >= 0 else sources.get(name) for length, name in pairs]
            known = tuple(length for length in lengths if length is not None)
            if len(known) == len(lengths) and _is_sendable(spec) and spec.datatype != "BYTES":
                size = _least_bytes(spec, [1] * len(lengths))
                if -1 in spec.shape or size >= LARGE_BYTES:
                    self._declared[spec.name] = size, known
        self.runs_to_observe = OBSERVED_RUNS if self._declared else 0

    def observe(self, names: Iterable[str], feed: Mapping[str, Any], arrays: Iterable[Any]) -> None:
        """Compare the outputs of a run with what is declared; only of a first dimension shows 1 anything."""
        self.runs_to_observe -= 1
        for name, array in zip(names, arrays, strict=True):
            if name not in self._declared or array is None:
                continue
            size, lengths = self._declared[name]
            sources = [each for each in lengths if not isinstance(each, int)]
            told = tuple(each if isinstance(each, int) else feed[each[0]].shape[each[1]] for each in lengths)
            if array.shape != told:
                del self._declared[name]
                self.kept.pop(name, None)
            elif all(
                isinstance(each, int) or length != 1
                for each, length in [*zip(lengths, told, strict=True)][1:]
            ):
                self.kept[name] = size, sources

    def tell(self, name: str, feed: Mapping[str, Any]) -> int:
        """Return the bytes of an output; 0 if they are not known."""
        if name not in self.kept:
            return 0
        size, sources = self.kept[name]
        for input_name, axis in sources:
            shape = feed[input_name].shape
            size *= shape[axis] if axis < len(shape) else 0  # the runtime refuses such an input
        return size
