"""Whether rows of a batch change each other's answers: with batching, rows belong to several clients.

A few operators certainly couple all rows of a tensor. For all others a row is run alone and beside a row of
very different size: both answers must be equal but for last bits, which ONNX Runtime rounds differently with
more rows.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import RuntimeProblem
from runtime.onnxfile import find_operator
from runtime.wire import DATATYPES, TensorSpec

COUPLING = {
    "the model computes one scale for all rows ({}): quantise it with quantize_static of ONNX Runtime": (
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
    ),
    "the model draws random numbers ({})": (
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        *("Multinomial", "Bernoulli"),
    ),
}
"""Operators whose rows depend on each other in any graph, with the words for an error. A run with rows that
differ little would not reveal a scale."""
NOT_SHOWN = "that they do not change each other's answers cannot be shown"
TOLERANCE = 0.01
"""Part of an answer's largest number: a float rounded before a quantisation moves it by 1/255 at most."""
TOLERANCE_OF_HALVES = 0.05
"""Tolerance of FP16, which has 11 bits."""
TIMES = 1000.0
"""Factor by which the numbers of the other row are larger."""

FLOATS = {"FP16", "BF16", "FP32", "FP64"}
TEXT = "loadledger"

Feed = dict[str, Any]
Run = Callable[[Feed], Sequence[Any]]
Make = Callable[[Any], Any]
"""Makes floats in the shape of the given ones."""


def find_dependence(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], row: Feed, run: Run, file: Path | None
) -> str | None:
    """Return why rows of a batch might change each other's answers, or None if they provably do not.

    Args:
        inputs: the model's required inputs, with the batch as their first dimension.
        outputs: its outputs, in the order of a run.
        row: a row of the inputs on which the model runs; empty if none is known.
        run: runs the model and returns its outputs; raises RuntimeProblem.
        file: the model's file.

    Raises:
        MemoryError: there is not enough memory for a run.
    """
    for words, operators in COUPLING.items():
        found = None if file is None else find_operator(file, operators)
        if found is not None:
            return words.format(found)
    if not row:
        return f"{NOT_SHOWN}, without inputs that the model takes: give some in its loadledger.toml"

    def answer(feed: Feed) -> list[Any]:
        return [
            array if array is None else _to_floats(spec, array)
            for spec, array in zip(outputs, run(feed), strict=True)
        ]

    problem = "its answers to all inputs that were tried are the same"
    for first, other in _make_pairs(inputs, row):
        try:
            alone, others = answer(first), answer(other)
        except RuntimeProblem as refused:
            problem = str(refused)
            continue
        dependence = _compare(first, other, alone, answer)
        if dependence is not None or not all(map(_is_close, alone, others)):
            return dependence
    return f"{NOT_SHOWN}: {problem}"


def _compare(row: Feed, other: Feed, alone: Sequence[Any], answer: Run) -> str | None:
    """Run a row before and after another one; returns the defect of its answers, or None."""
    for position, pair in enumerate(((row, other), (other, row))):
        try:
            joined = answer({name: np.concatenate([each[name] for each in pair]) for name in row})
        except RuntimeProblem as problem:
            return f"the model does not take two rows at once: {problem}"
        for one, both in zip(alone, joined, strict=True):
            if one is None and both is None:
                continue
            if [np.shape(each)[:1] for each in (one, both)] != [(1,), (2,)]:
                return "an output does not have a row for each row of the inputs"
            if not _is_close(one, both[position : position + 1]):
                return "the answer to a row was another one beside a row of very different numbers"
    return None


def _is_close(one: Any, other: Any) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return one is other
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    sizes = np.abs(one[np.isfinite(one)], dtype=np.float64)
    tolerance = TOLERANCE_OF_HALVES if one.dtype.itemsize < 4 else TOLERANCE  # noqa: PLR2004
    with np.errstate(invalid="ignore"):
        close = np.isclose(one, other, 0, tolerance * sizes.max(initial=0), equal_nan=True)
    return bool(close.all())


def _make_pairs(inputs: Sequence[TensorSpec], row: Feed) -> Iterator[tuple[Feed, Feed]]:
    """Yield pairs of rows that differ much, the likeliest first; the model may refuse a pair.

    Elements other than floats may be words, a mask or lengths: they stay, are alike or differ.
    """
    longest = max((length for array in row.values() for length in array.shape), default=1)
    count = partial(_count, min(longest, 127))
    wholes: list[tuple[Make, Make]] = [
        (np.copy, partial(_count, 1)),
        (partial(_repeat, longest), partial(_repeat, longest)),
        (count, lambda like: np.flip(count(like))),
        (partial(_repeat, 1), partial(_repeat, 1)),
        (np.copy, np.copy),
    ]
    draws: list[tuple[Make, float]] = [
        (_draw, TIMES),
        (lambda like: np.abs(_draw(like)), TIMES),
        (np.copy, TIMES),
        (partial(_count, 1), 1),
    ]
    are_floats = {spec.datatype in FLOATS for spec in inputs}
    for whole, other in wholes if False in are_floats else wholes[:1]:
        for draw, times in draws if True in are_floats else draws[:1]:
            enlarge = partial(_enlarge, draw, times)
            yield _make_row(inputs, row, draw, whole), _make_row(inputs, row, enlarge, other)


def _make_row(inputs: Sequence[TensorSpec], row: Feed, draw: Make, whole: Make) -> Feed:
    """Return a row with other elements."""
    makes = [draw if spec.datatype in FLOATS else whole for spec in inputs]
    return {
        spec.name: _from_numbers(spec, make(_to_floats(spec, row[spec.name])))
        for spec, make in zip(inputs, makes, strict=True)
    }


def _enlarge(draw: Make, times: float, like: Any) -> Any:
    return times * np.flip(draw(like))


def _draw(like: Any) -> Any:
    """Return numbers from -1 to 1 without a pattern; a confined worker cannot import numpy's generators."""
    return np.sin(np.arange(1, like.size + 1) ** 2 * 0.7).reshape(like.shape)


def _count(most: int, like: Any) -> Any:
    return np.arange(like.size).reshape(like.shape) % (most + 1)


def _repeat(number: int, like: Any) -> Any:
    return np.full(like.shape, number)


def _to_floats(spec: TensorSpec, array: Any) -> Any:
    """Return an array of numbers; BF16, which numpy lacks, as FP32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if spec.datatype == "BF16" else array


def _from_numbers(spec: TensorSpec, values: Any) -> Any:
    if spec.datatype == "BYTES":
        return values if values.dtype == object else np.where(values, TEXT, "").astype(object)
    if spec.datatype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(DATATYPES[spec.datatype].numpy)
