"""Random ONNX models whose rows are known to be independent, or known to be coupled.

A server joins the requests of several clients along the first axis, runs the model once and splits the
outputs again. That is right only if a row's answer depends on nothing but this row: not on the values of
other rows, nor on its position, nor on the number of rows. `draw_graph` draws models of which this is known:

* An independent model consists of the steps in `rowoperators`, each of which keeps rows apart.
* A coupled model has, in addition, one step of the kinds in `COUPLINGS`, in the graph itself, in a body of an
  If, Loop or Scan, or in a function of the model. `draw_graph` runs it and returns it only if an answer is
  seen to change with the rows beside it.

To add a kind of coupling, write a function with `@coupling("Name")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from support import rowoperators
from support.rowdrafts import (
    FUNCTION_DOMAIN,
    KINDS,
    ROWS,
    STEPS,
    WORDS,
    Array,
    Draft,
    LiveValue,
    Step,
    offered_steps,
)

OPSETS = (7, 8, 9, 10, 11, 12, 13, 13, 14, 15, 16, 17, 17, 18, 18, 19, 20, 21, 21, 22, 23, 24, 25, 26)
"""Opsets of the drawn models; those that exporters write by default more often."""
DRAWN_OPERATORS = frozenset(taken.operator for taken in STEPS)
"""All operators of which an independent model can consist, qualified by the domain."""
TOLERANCE = 1e-3
"""Change of a float answer that shows a coupling; rounding stays far below."""
ATTEMPTS = 60
"""Models drawn in search of one whose coupling reaches an output."""


@dataclass(frozen=True)
class RowInput:
    """An input of a drawn model and the values that suit it.

    Attributes:
        name: Name of the input.
        kind: Element type, as NumPy names it.
        shape: Extents of one row.
        role: What the values stand for; `make` has a case for each.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    role: str

    def make(self, rng: np.random.Generator, count: int) -> Array:
        shape = (count, *self.shape)
        match self.role:
            case "ids":
                return rng.integers(0, 7, shape).astype(self.kind)
            case "lengths":
                return rng.integers(1, 5, shape).astype(self.kind)
            case "mask":
                return (rng.random(shape) < 0.7).astype(self.kind)
            case "pixels":
                return rng.integers(0, 256, shape).astype(self.kind)
            case "words":
                return np.array(WORDS, object)[rng.integers(0, len(WORDS), shape)]
            case _:
                return rng.normal(size=shape).astype(self.kind)


@dataclass(frozen=True)
class DrawnGraph:
    """A model and what is known of it.

    Attributes:
        model: The model; rows are the first axis of all its inputs and outputs.
        inputs: How to make rows of its inputs.
        operators: Operators in it, in bodies and functions as well, qualified by the domain.
        coupling: Kind and place of the coupling; empty if rows are independent.
    """

    model: ModelProto
    inputs: tuple[RowInput, ...]
    operators: tuple[str, ...]
    coupling: str

    def make_rows(self, rng: np.random.Generator, count: int) -> dict[str, Array]:
        """Return random rows for each input."""
        return {described.name: described.make(rng, count) for described in self.inputs}


Couple = Callable[[Draft], LiveValue]


@dataclass(frozen=True)
class Coupling:
    """One way to let a row's answer depend on other rows.

    Attributes:
        kind: Name of the coupling.
        build: Appends the nodes and returns the coupled value.
        since: First opset in which ONNX Runtime runs the nodes.
        until: Last opset.
    """

    kind: str
    build: Couple
    since: int
    until: int


_COUPLINGS: dict[str, Coupling] = {}


def coupling(kind: str, since: int = 7, until: int = 99) -> Callable[[Couple], Couple]:
    """Register a kind of coupling."""

    def register(build: Couple) -> Couple:
        assert kind not in _COUPLINGS
        _COUPLINGS[kind] = Coupling(kind, build, since, until)
        return build

    return register


# Couplings


def join(d: Draft, x: LiveValue, other: str, *, is_positive: bool = False) -> LiveValue:
    """Combine rows with a value that broadcasts to them."""
    match d.integer(0, 4):
        case 0:
            return d.like(x, d.node("Add", x.name, other))
        case 1:
            return d.like(x, d.node("Sub", other, x.name))
        case 2 if d.opset >= 9:
            return d.like(
                x, d.node("Where", d.node("Greater", x.name, other), x.name, d.constant(np.float32(5)))
            )
        case 3:
            divisor = (
                other if is_positive else d.node("Add", d.node("Abs", other), d.constant(np.float32(0.5)))
            )
            return d.like(x, d.node("Div", x.name, divisor))
        case _:
            return d.like(x, d.node("Mul", x.name, other))


def some_floats(d: Draft, low: int = 1, high: int = 3) -> LiveValue:
    """Return plain floats of a random form."""
    return d.floats(*d.extents(d.integer(low, high), 4))


def couple_reduction(operator: str, d: Draft) -> LiveValue:
    """Combine rows with a reduction over them, over all axes, or over an axis into which they are merged."""
    x = some_floats(d)
    source = d.node("Abs", x.name) if operator == "ReduceLogSum" else x.name
    match d.integer(0, 3):
        case 0:
            other = d.reduce(operator, source, [0] if d.opset < 13 else [-x.rank], keepdims=True)
        case 1:
            other = d.reduce(operator, source, None, keepdims=d.chance())
        case 2:
            moved = d.transpose(d.like(x, source), [*range(1, x.rank), 0])
            other = d.move(d.like(moved, d.reduce(operator, moved.name, [x.rank - 1], keepdims=True)), 0).name
        case _:
            other = d.reduce(operator, source, list(range(x.rank)), keepdims=False)
    return d.like(x, d.bound(join(d, x, d.node("Softsign", other)).name))


for _operator in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"):
    coupling(f"Reduce{_operator}")(partial(couple_reduction, f"Reduce{_operator}"))


@coupling("merged reduction")
def couple_merged_reduction(d: Draft) -> LiveValue:
    """Merge rows with a neighbour and reduce over both."""
    x = d.floats(*d.extents(2, 4))
    merged = d.reshape(x, (ROWS, x.shape[2]), after=x.shape[1])
    return join(d, x, d.reduce("ReduceMax", merged.name, [0], keepdims=True))


def couple_extreme(operator: str, d: Draft) -> LiveValue:
    """Tell each row which row is the greatest."""
    x = some_floats(d, 1, 2)
    axis = d.choose((0, None))  # the default is 0
    index = d.cast(d.node(operator, x.name, axis=axis, keepdims=1), "float32")
    return d.like(x, d.node("Add", x.name, index))


for _operator in ("ArgMax", "ArgMin"):
    coupling(_operator)(partial(couple_extreme, _operator))


@coupling("TopK over rows")
def couple_top_row(d: Draft) -> LiveValue:
    x = some_floats(d, 1, 2)
    if d.opset >= 10 and d.chance():  # the last axis by default
        turned = d.transpose(x, [*range(1, x.rank), 0])
        top = d.nodes("TopK", [turned.name, d.whole(1)], 2)[0]
        return join(d, x, d.move(d.like(turned, top), 0).name)
    return join(d, x, d.top_k(x.name, 1, 0)[0])


@coupling("rows sorted by length", since=10)
def couple_sorted_rows(d: Draft) -> LiveValue:
    """Sort rows by their lengths, as packed sequences are, and leave them so."""
    x, lengths = some_floats(d, 1, 2), d.lengths(4, "int64")
    _, order = d.top_k(d.cast(lengths.name, "float32"), d.rows(x), 0)
    return d.like(x, d.node("Gather", x.name, order, axis=0))


@coupling("CumSum over rows", since=11)
def couple_running_sum(d: Draft) -> LiveValue:
    x = some_floats(d)
    return d.like(x, d.bound(d.node("CumSum", x.name, d.constant(np.int64(0)), exclusive=d.integer(0, 1))))


@coupling("Softmax over rows", since=13)
def couple_softmax(d: Draft) -> LiveValue:
    x = some_floats(d)
    operator = d.choose(("Softmax", "LogSoftmax", "Hardmax"))
    if d.chance():  # the last axis by default
        turned = d.move(x, x.rank - 1)
        return d.like(turned, d.node(operator, turned.name))
    return d.like(x, d.node(operator, x.name, axis=d.choose((0, -x.rank))))


@coupling("Softmax over coerced axes", until=12)
def couple_coerced_softmax(d: Draft) -> LiveValue:
    """Before opset 13 an axis stands for all axes from it on: here the batch is among them."""
    x = some_floats(d, 1, 2)
    if d.chance():
        return d.like(x, d.node(d.choose(("Softmax", "LogSoftmax")), x.name, axis=0))
    x = d.move(x, x.rank - 1)
    return d.move(d.like(x, d.node("Softmax", x.name)), 0)


@coupling("LayerNormalization over rows", since=17)
def couple_layer_normalization(d: Draft) -> LiveValue:
    x = d.move(some_floats(d, 1, 2), 1)
    return d.like(x, d.node("LayerNormalization", x.name, d.positive(1), axis=1))


@coupling("MeanVarianceNormalization over rows", since=9)
def couple_mean_variance(d: Draft) -> LiveValue:
    x = d.floats(*d.extents(3, 3))
    axes = {} if d.chance() else {"axes": [0]}
    return d.like(x, d.node("MeanVarianceNormalization", x.name, **axes))


@coupling("BatchNormalization in training", since=14)
def couple_batch_normalization(d: Draft) -> LiveValue:
    x = some_floats(d)
    channels = x.shape[1]
    inputs = [d.positive(channels), d.weights(channels), d.weights(channels), d.positive(channels)]
    return d.like(x, d.nodes("BatchNormalization", [x.name, *inputs], 3, training_mode=1)[0])


def couple_random_numbers(operator: str, d: Draft) -> LiveValue:
    """Add numbers that differ from run to run."""
    x = some_floats(d)
    if operator == "Multinomial":
        odds = d.node("Abs", d.floats(4).name)
        drawn = d.cast(d.node(operator, odds, sample_size=4), "float32")
        return d.plain(drawn, 4)
    if operator == "Bernoulli":
        return d.like(x, d.node(operator, d.node("Sigmoid", x.name)))
    drawn = d.node(operator, *([x.name] if operator.endswith("Like") else []), **_shape_of_random(operator))
    return d.like(x, d.node("Add", x.name, drawn))


def _shape_of_random(operator: str) -> dict[str, Any]:
    return {} if operator.endswith("Like") else {"shape": [1]}


for _operator in ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"):
    coupling(f"{_operator} draws numbers", until=21)(partial(couple_random_numbers, _operator))
coupling("Bernoulli draws numbers", since=15, until=21)(partial(couple_random_numbers, "Bernoulli"))


@coupling("LpNormalization over rows")
def couple_lp_normalization(d: Draft) -> LiveValue:
    x = some_floats(d)
    if d.chance():  # the last axis by default
        turned = d.move(x, x.rank - 1)
        return d.like(turned, d.node("LpNormalization", turned.name))
    return d.like(x, d.node("LpNormalization", x.name, axis=0, p=d.integer(1, 2)))


@coupling("InstanceNormalization over rows")
def couple_instance_normalization(d: Draft) -> LiveValue:
    x = d.floats(d.integer(2, 4))
    turned = d.transpose(x, [1, 0])
    name = d.unsqueeze(turned.name, 0)
    name = d.node("InstanceNormalization", name, d.positive(x.shape[1]), d.weights(x.shape[1]))
    return d.transpose(d.like(turned, d.squeeze(name, 0)), [1, 0])


@coupling("GroupNormalization over rows", since=21)
def couple_group_normalization(d: Draft) -> LiveValue:
    x = d.transpose(d.floats(4, 2), [1, 2, 0])
    name = d.node("GroupNormalization", x.name, d.positive(2), d.weights(2), num_groups=1)
    return d.like(x, name)


@coupling("LRN over rows")
def couple_response(d: Draft) -> LiveValue:
    x = d.floats(*d.extents(1, 3))
    x = d.move(d.like(x, d.unsqueeze(d.unsqueeze(x.name, 2), 3), shape=(*x.shape, 1, 1)), 1)
    return d.like(x, d.node("LRN", x.name, size=3, alpha=5.0))


@coupling("divided by the longest")
def couple_longest(d: Draft) -> LiveValue:
    lengths = d.lengths(4, d.choose(("int64", "int32")))
    x = d.like(lengths, d.cast(lengths.name, "float32"), kind="float32")
    return d.like(x, d.node("Div", x.name, d.reduce("ReduceMax", x.name, [0], keepdims=d.chance())))


@coupling("masked up to the longest", since=11)
def couple_longest_mask(d: Draft) -> LiveValue:
    """Count positions up to the longest row, and average over them."""
    lengths = d.lengths(6, "int64")
    longest = d.cast(d.reduce("ReduceMax", d.cast(lengths.name, "int32"), [0], keepdims=False), "int64")
    positions = d.node("Range", d.constant(np.int64(0)), longest, d.constant(np.int64(1)))
    inside = d.node("Less", d.unsqueeze(positions, 0), d.unsqueeze(lengths.name, 1))
    return d.plain(d.reduce("ReduceMean", d.cast(inside, "float32"), [1], keepdims=True), 1)


@coupling("any over rows")
def couple_any(d: Draft) -> LiveValue:
    flags = d.booleans(*d.extents(1))
    anywhere = d.reduce("ReduceMax", d.cast(flags.name, "float32"), [0], keepdims=True)
    x = d.floats(flags.shape[1])
    return d.like(x, d.node("Sub", x.name, anywhere))


@coupling("brightest pixel")
def couple_brightest(d: Draft) -> LiveValue:
    x = d.integers(200, *d.extents(2), kind="uint8")
    pixels = d.cast(x.name, "float32")
    brightest = d.node(
        "Add", d.reduce("ReduceMax", pixels, None, keepdims=False), d.constant(np.float32(0.1))
    )
    return d.like(x, d.node("Div", pixels, brightest), kind="float32")


@coupling("clipped, then the greatest")
def couple_clipped(d: Draft) -> LiveValue:
    x = some_floats(d, 1, 2)
    clipped = d.clip(x.name, -0.2, 1.5)
    return join(d, d.like(x, clipped), d.reduce("ReduceMax", clipped, None, keepdims=False))


@coupling("quantised, then the greatest", since=10)
def couple_quantized(d: Draft) -> LiveValue:
    x = d.dequantized(d.quantized(*d.extents(1)))
    return join(d, x, d.reduce("ReduceMax", x.name, [0], keepdims=True))


@coupling("DynamicQuantizeLinear", since=11)
def couple_dynamic_quantization(d: Draft) -> LiveValue:
    x = some_floats(d)
    names = d.nodes("DynamicQuantizeLinear", [x.name], 3)
    return d.like(x, d.node("Mul", d.node("DequantizeLinear", *names), d.constant(np.float32(20))))


@coupling("com.microsoft.DynamicQuantizeMatMul")
def couple_dynamic_product(d: Draft) -> LiveValue:
    x = d.floats(4)
    matrix = d.constant(d.rng.integers(0, 255, (4, 3)), "uint8")
    name = d.node(
        "com.microsoft.DynamicQuantizeMatMul",
        x.name,
        matrix,
        d.constant(np.float32(0.2)),
        d.constant(np.uint8(128)),
    )
    return d.plain(name, 3)


@coupling("com.microsoft.DynamicQuantizeLSTM")
def couple_dynamic_recurrence(d: Draft) -> LiveValue:
    x = d.move(d.floats(2, 3), 1)
    weights = [d.constant(d.rng.integers(0, 255, (1, n, 8)), "uint8") for n in (3, 2)]
    scales = [d.constant(np.array([0.05], np.float32)), d.constant(np.array([128], np.uint8))] * 2
    names = d.nodes(
        "com.microsoft.DynamicQuantizeLSTM", [x.name, *weights, "", "", "", "", "", *scales], 2, hidden_size=2
    )
    return LiveValue(d.node("Mul", names[1], d.constant(np.float32(20))), "float32", (1, ROWS, 2))


@coupling("MatMul between rows")
def couple_gram(d: Draft) -> LiveValue:
    """Weigh rows by their likeness: attention with the batch in the place of the sequence."""
    x = d.floats(d.integer(2, 4))
    scores = d.node("MatMul", x.name, d.transpose(x, [1, 0]).name)
    scores = d.node("Softmax", scores, axis=1) if d.chance() else d.node("Tanh", scores)
    return d.like(x, d.node("MatMul", scores, x.name))


@coupling("Gemm between rows")
def couple_gemm(d: Draft) -> LiveValue:
    x = d.floats(3)
    products = d.node("Gemm", x.name, x.name, d.weights(3), transA=1)
    return d.like(x, d.bound(d.node("MatMul", x.name, products)))


@coupling("Einsum between rows", since=12)
def couple_einsum(d: Draft) -> LiveValue:
    x = d.floats(3)
    if d.chance(0.3):
        return join(d, x, d.bound(d.node("Einsum", x.name, x.name, equation="i...,i...->...")))
    if d.chance():
        return d.like(x, d.bound(d.node("Einsum", x.name, x.name, x.name, equation="bc,dc,de->be")))
    return join(d, x, d.node("Einsum", x.name, equation="bc->c"))


@coupling("com.microsoft.FusedMatMul between rows")
def couple_fused_product(d: Draft) -> LiveValue:
    x = d.floats(3)
    scores = d.node("com.microsoft.FusedMatMul", x.name, x.name, transB=1)
    return d.like(x, d.bound(d.node("MatMul", d.node("Tanh", scores), x.name)))


@coupling("attention between rows")
def couple_attention(d: Draft) -> LiveValue:
    """Attend over [T, N, C] as if it were [N, T, C]."""
    x = d.move(d.floats(*d.extents(2, 4)), 1)
    scores = d.node("MatMul", x.name, d.node("Transpose", x.name, perm=[0, 2, 1]))
    return d.like(x, d.bound(d.node("MatMul", d.node("Softmax", scores, axis=2), x.name)))


@coupling("com.microsoft.MultiHeadAttention between rows")
def couple_head_attention(d: Draft) -> LiveValue:
    x = d.move(d.floats(d.integer(1, 3), 4), 1)
    return d.like(x, d.node("com.microsoft.MultiHeadAttention", x.name, x.name, x.name, num_heads=2))


@coupling("Attention between rows", since=23)
def couple_standard_attention(d: Draft) -> LiveValue:
    x = d.move(d.floats(2, 2, 4), 2)
    return d.like(x, d.node("Attention", x.name, x.name, x.name))


@coupling("Reshape in the wrong order")
def couple_wrong_reshape(d: Draft) -> LiveValue:
    """Read [T, N, C] as [N, T, C]: the elements of one row then come from several."""
    x = d.floats(*d.extents(2, 4))
    turned = d.move(d.floats(2, 3), 1) if x.shape[1] == 1 else d.move(x, 1)
    extents = [n for n in turned.shape if n != ROWS]
    return d.reshape(turned, (ROWS, *extents))


@coupling("Reshape to another number of rows")
def couple_interleaved_rows(d: Draft) -> LiveValue:
    """Read the transposed rows as rows."""
    x = d.floats(d.integer(2, 4))
    return d.reshape(d.transpose(x, [1, 0]), (ROWS, x.shape[1]))


@coupling("Reshape to one row")
def couple_single_row(d: Draft) -> LiveValue:
    x = some_floats(d)
    single = d.node("Reshape", x.name, d.whole(1, -1))
    return join(d, x, d.reduce(d.choose(("ReduceMax", "ReduceMean")), single, None, keepdims=False))


@coupling("Flatten to one row")
def couple_flattened(d: Draft) -> LiveValue:
    x = some_floats(d)
    single = d.node("Flatten", x.name, axis=0)
    peak = d.reduce("ReduceMin", single, [1], keepdims=False)
    return join(d, x, peak)


@coupling("Gather of one row")
def couple_gathered(d: Draft) -> LiveValue:
    x = some_floats(d)
    index = d.constant(np.array([0 if d.opset < 11 or d.chance() else -1]))
    return join(d, x, d.node("Gather", x.name, index, axis=0))


@coupling("rows reversed")
def couple_reversed(d: Draft) -> LiveValue:
    """Reverse the order of rows by a negative step or by indices."""
    x = some_floats(d)
    if d.opset >= 11 and d.chance():
        # not Range(N - 1, -1, -1), which ONNX Runtime 1.32 folds to an empty constant
        positions = d.node("Range", d.constant(np.int64(0)), d.squeeze(d.rows(x), 0), d.constant(np.int64(1)))
        order = d.node("Sub", d.node("Sub", d.rows(x), d.whole(1)), positions)
        return d.like(x, d.node("Gather", x.name, order, axis=0))
    if d.opset >= 10:
        return d.like(x, d.slice(x.name, 0, -1, -(2**63) + 1, -1))
    return join(d, x, d.slice(x.name, 0, -1, 2**31 - 1))


@coupling("GatherND over rows", since=11)
def couple_gather_nd(d: Draft) -> LiveValue:
    """Use a value of the row as a number of a row."""
    x = some_floats(d, 1, 2)
    indices = d.node("Mod", d.node("Add", d.integers(3, 1).name, d.whole(1)), d.rows(x))
    return d.like(x, d.node("GatherND", x.name, indices))


@coupling("GatherElements over rows", since=11)
def couple_gather_elements(d: Draft) -> LiveValue:
    x = some_floats(d, 1, 2)
    indices = d.node("Mod", d.node("Add", d.integers(3, *x.shape[1:]).name, d.whole(1)), d.rows(x))
    return d.like(x, d.node("GatherElements", x.name, indices, axis=0))


@coupling("Slice of the first row")
def couple_sliced(d: Draft) -> LiveValue:
    x = some_floats(d)
    return join(d, x, d.slice(x.name, 0, *d.choose(((0, 1), (-1, 2**31 - 1)))))


@coupling("rows rolled")
def couple_rolled(d: Draft) -> LiveValue:
    x = some_floats(d)
    parts = [d.slice(x.name, 0, 1, 2**31 - 1), d.slice(x.name, 0, 0, 1)]
    return d.like(x, d.node("Concat", *parts, axis=0))


@coupling("rows shifted by Pad")
def couple_padded(d: Draft) -> LiveValue:
    """Compare each row with the one before."""
    x = some_floats(d)
    pads = [0] * (2 * x.rank)
    pads[0] = 1
    shifted = d.slice(d.pad(x.name, pads, d.choose(("constant", "edge"))), 0, 0, -1)
    return d.like(x, d.node("Sub", x.name, shifted))


@coupling("Split of the batch", since=13)
def couple_split(d: Draft) -> LiveValue:
    x = some_floats(d)
    rest = d.node("Sub", d.rows(x), d.whole(1))
    sizes = d.node("Concat", d.whole(1), rest, axis=0)
    first, _ = d.nodes("Split", [x.name, sizes], 2, axis=0)
    return join(d, x, first)


@coupling("Compress of rows", since=9)
def couple_compressed(d: Draft) -> LiveValue:
    x = some_floats(d)
    if d.chance():  # elements of all rows by default
        flags = d.node("Reshape", d.booleans(*x.shape[1:]).name, d.whole(-1))
        total = d.reduce("ReduceSum", d.node("Compress", x.name, flags), [0], keepdims=False)
        return d.like(x, d.bound(d.node("Add", x.name, total)))
    kept = d.node("Compress", x.name, d.booleans().name, axis=0)
    return join(d, x, d.reduce("ReduceSum", kept, [0], keepdims=True))


@coupling("ReverseSequence over rows", since=10)
def couple_reversed_sequence(d: Draft) -> LiveValue:
    x = d.floats(3, *d.extents(d.integer(0, 1)))
    name = d.node("Expand", d.rows(x), d.whole(3))
    axes = d.choose(({"batch_axis": 1, "time_axis": 0}, {}))  # these are the defaults
    return d.like(x, d.node("ReverseSequence", x.name, name, **axes))


@coupling("ScatterND into rows", since=11)
def couple_scatter_nd(d: Draft) -> LiveValue:
    x = some_floats(d, 1, 2)
    indices = d.node("Mod", d.node("Add", d.integers(3, 1).name, d.whole(1)), d.rows(x))
    return d.like(x, d.node("ScatterND", x.name, indices, d.floats(*x.shape[1:]).name))


@coupling("ScatterElements into rows", since=11)
def couple_scatter_elements(d: Draft) -> LiveValue:
    x = some_floats(d, 1, 2)
    indices = d.node("Mod", d.node("Add", d.integers(3, *x.shape[1:]).name, d.whole(1)), d.rows(x))
    updates = d.node("Neg", x.name)
    return d.like(x, d.node("ScatterElements", x.name, indices, updates, axis=0))


@coupling("Tile of rows in the wrong order")
def couple_tiled(d: Draft) -> LiveValue:
    """Repeat the batch, [N, ...] -> [2*N, ...], and take neighbours for copies of one row."""
    x = d.floats(*d.extents(1, 4))
    doubled = d.node("Tile", x.name, d.whole(2, 1))
    pairs = d.node("Reshape", doubled, d.whole(-1, 2, x.shape[1]))
    return d.like(x, d.reduce("ReduceSum", pairs, [1], keepdims=False))


@coupling("Expand of one row", since=8)
def couple_expanded(d: Draft) -> LiveValue:
    x = some_floats(d)
    first = d.slice(x.name, 0, 0, 1)
    return d.like(x, d.node("Expand", first, d.node("Shape", x.name)))


@coupling("NonZero of rows", since=9)
def couple_non_zero(d: Draft) -> LiveValue:
    x = d.floats(d.integer(2, 3))
    found = d.node("NonZero", d.cast(d.booleans(3).name, "float32"))
    count = d.cast(d.node("Gather", d.node("Shape", found), d.constant(np.int64(1))), "float32")
    return d.like(x, d.node("Add", x.name, count))


@coupling("Unique of rows", since=11)
def couple_unique(d: Draft) -> LiveValue:
    ids = d.integers(5)
    _, _, inverse, counts = d.nodes("Unique", [ids.name], 4)
    if d.chance():
        return d.like(ids, inverse)
    return d.like(ids, d.node("Gather", counts, inverse))


@coupling("If on a reduced condition")
def couple_condition(d: Draft) -> LiveValue:
    x = some_floats(d, 1, 2)
    mean = d.reduce(d.choose(("ReduceMean", "ReduceMin")), x.name, None, keepdims=False)
    condition = d.node("Greater", mean, d.constant(np.float32(0 if d.chance() else -0.4)))
    graphs = []
    for factor in (1.0, -0.5):
        with d.body([x]) as scope:
            made = d.like(x, d.node("Mul", x.name, d.constant(np.float32(factor))))
        graphs.append(d.graph(scope, [], [d.info(made)]))
    return d.like(x, d.node("If", condition, then_branch=graphs[0], else_branch=graphs[1]))


def couple_trips(d: Draft, trips: str, *, stops: bool) -> LiveValue:
    """Append a Loop that halves a state as many times as rows decide."""
    x = some_floats(d, 1, 2)
    index, condition, state = d.new_name(), d.new_name(), d.like(x, d.new_name())
    with d.body([state]) as scope:
        following = d.like(x, d.node("Mul", state.name, d.constant(np.float32(0.6))))
        if stops:
            peak = d.reduce("ReduceMax", d.node("Abs", following.name), None, keepdims=False)
            kept = d.node("Greater", peak, d.constant(np.float32(0.4)))
        else:
            kept = d.node("Identity", condition)
    inputs = [
        helper.make_tensor_value_info(index, TensorProto.INT64, []),
        helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
        helper.make_tensor_value_info(state.name, TensorProto.FLOAT, [None] * x.rank),
    ]
    outputs = [helper.make_tensor_value_info(kept, TensorProto.BOOL, []), d.info(following)]
    graph = d.graph(scope, inputs, outputs)
    return d.like(x, d.node("Loop", trips, d.constant(np.bool_(True)), x.name, body=graph))


@coupling("Loop with trips from rows")
def couple_trip_count(d: Draft) -> LiveValue:
    lengths = d.lengths(4, "int32")
    trips = d.cast(d.reduce("ReduceMax", lengths.name, [0], keepdims=False), "int64")
    return couple_trips(d, trips, stops=False)


@coupling("Loop with a condition from rows")
def couple_loop_condition(d: Draft) -> LiveValue:
    return couple_trips(d, d.constant(np.int64(8)), stops=True)


@coupling("Loop over rows", since=11)
def couple_loop_over_rows(d: Draft) -> LiveValue:
    """Read one row in each iteration, and carry a state from one row to the next."""
    x = d.floats(d.integer(2, 4))
    index, condition, state = d.new_name(), d.new_name(), d.new_name()
    trips = d.squeeze(d.rows(x), 0)
    with d.body([x]) as scope:
        row = d.node("Gather", x.name, index, axis=0)
        total = d.node("Add", d.node("Mul", state, d.constant(np.float32(0.7))), row)
        kept, output = d.node("Identity", condition), d.node("Tanh", total)
    inputs = [
        helper.make_tensor_value_info(index, TensorProto.INT64, []),
        helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
        helper.make_tensor_value_info(state, TensorProto.FLOAT, [None]),
    ]
    outputs = [
        helper.make_tensor_value_info(kept, TensorProto.BOOL, []),
        helper.make_tensor_value_info(total, TensorProto.FLOAT, None),
        helper.make_tensor_value_info(output, TensorProto.FLOAT, None),
    ]
    graph = d.graph(scope, inputs, outputs)
    start = d.constant(np.zeros(x.shape[1], np.float32))
    return d.like(x, d.nodes("Loop", [trips, d.constant(np.bool_(True)), start], 2, body=graph)[1])


@coupling("Scan over rows", since=9)
def couple_scan(d: Draft) -> LiveValue:
    x = d.floats(d.integer(2, 4))
    state, row = d.new_name(), d.new_name()
    with d.body([]) as scope:
        total = d.node("Tanh", d.node("Add", state, row))
        output = d.node("Identity", total)
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [x.shape[1]])
        for name in (state, row, total, output)
    ]
    graph = d.graph(scope, infos[:2], infos[2:])
    start = d.constant(np.zeros(x.shape[1], np.float32))
    direction = {"scan_input_directions": [1], "scan_output_directions": [1]} if d.chance(0.3) else {}
    return d.like(x, d.nodes("Scan", [start, x.name], 2, body=graph, num_scan_inputs=1, **direction)[1])


def couple_recurrence(operator: str, d: Draft) -> LiveValue:
    """Take [N, T, C] for [T, N, C]: the batch becomes the time."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    x = d.floats(d.integer(1, 3), 2)
    direction = d.choose(("forward", "reverse"))
    inputs = [x.name, d.weights(1, gates * 2, 2), d.weights(1, gates * 2, 2)]
    names = d.nodes(operator, inputs, 2, hidden_size=2, direction=direction)
    if d.chance():  # the last state only
        return join(d, x, names[1])
    return LiveValue(names[0], "float32", (ROWS, 1, x.shape[1], 2))


for _operator in ("LSTM", "GRU", "RNN"):
    coupling(f"{_operator} over rows")(partial(couple_recurrence, _operator))


def as_signal(d: Draft, x: LiveValue, perm: Sequence[int] = (1, 0)) -> str:
    """Return [1, C, N]: rows as the positions of a signal."""
    return d.unsqueeze(d.transpose(x, perm).name, 0)


def from_signal(d: Draft, x: LiveValue, name: str) -> LiveValue:
    return d.like(x, d.node("Transpose", d.squeeze(name, 0), perm=[1, 0]))


@coupling("Conv over rows")
def couple_convolution(d: Draft) -> LiveValue:
    x = d.floats(d.integer(1, 3))
    channels = x.shape[1]
    kernel = d.weights(channels, channels, 3, fan_in=3)
    return from_signal(d, x, d.node("Conv", as_signal(d, x), kernel, pads=[1, 1]))


@coupling("ConvTranspose over rows")
def couple_transposed_convolution(d: Draft) -> LiveValue:
    x = d.floats(d.integer(1, 3))
    kernel = d.weights(x.shape[1], x.shape[1], 3, fan_in=3)
    return from_signal(d, x, d.node("ConvTranspose", as_signal(d, x), kernel, pads=[1, 1]))


@coupling("Conv over channels of rows")
def couple_image(d: Draft) -> LiveValue:
    """Read [N, H, W] as one image [1, 1, N, H*W]."""
    x = d.floats(*d.extents(1, 4))
    image = d.unsqueeze(d.unsqueeze(x.name, 0), 0)
    name = d.node("Conv", image, d.weights(1, 1, 3, 3, fan_in=9), pads=[1, 1, 1, 1])
    return d.like(x, d.squeeze(d.squeeze(name, 0), 0))


def couple_pool(operator: str, d: Draft) -> LiveValue:
    x = d.floats(d.integer(1, 3))
    signal = as_signal(d, x)
    if operator.startswith("Global"):
        return join(d, x, d.squeeze(d.node(operator, signal), 2))
    return from_signal(d, x, d.node(operator, signal, kernel_shape=[3], pads=[1, 1]))


for _operator in ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
    coupling(f"{_operator} over rows", until=21 if _operator == "GlobalLpPool" else 99)(
        partial(couple_pool, _operator)
    )


@coupling("com.microsoft.MaxpoolWithMask")
def couple_masked_pool(d: Draft) -> LiveValue:
    """Pool with a mask: ONNX Runtime reads it at an offset that depends on the number of rows."""
    x, mask = d.floats(2, 4, 4), d.cast(d.booleans(2, 4, 4).name, "int32")
    name = d.node("com.microsoft.MaxpoolWithMask", x.name, mask, kernel_shape=[2, 2], strides=[2, 2])
    return d.plain(d.bound(name), 2, 2, 2)


@coupling("MaxPool's indices", since=8)
def couple_pool_indices(d: Draft) -> LiveValue:
    """Return indices that count through the whole batch."""
    x = d.floats(1, 4)
    indices = d.nodes("MaxPool", [x.name], 2, kernel_shape=[2], strides=[2])[1]
    return d.plain(indices, 1, 2, kind="int64")


@coupling("Resize of the batch", since=11)
def couple_resized(d: Draft) -> LiveValue:
    """Blur over rows: halve the batch, and bring it back."""
    x = d.floats(4)
    scales = d.constant(np.array([2, 1], np.float32))
    region = d.constant(np.zeros(0, np.float32)) if d.opset < 13 else ""
    doubled = d.node("Resize", x.name, region, scales, mode="linear")
    return d.like(x, d.slice(doubled, 0, 0, 2**31 - 1, 2))


@coupling("GridSample over rows", since=16)
def couple_sampled(d: Draft) -> LiveValue:
    x = d.floats(4)
    image = d.unsqueeze(d.unsqueeze(x.name, 0), 0)
    grid = d.constant(d.rng.uniform(-0.8, 0.8, (1, 1, 4, 2)).astype(np.float32))
    sampled = d.node("Reshape", d.node("GridSample", image, grid), d.whole(1, 4))
    return join(d, x, sampled)


@coupling("number of rows as a divisor")
def couple_row_count(d: Draft) -> LiveValue:
    x = some_floats(d)
    count = d.cast(d.rows(x), "float32")
    return join(d, x, count, is_positive=True)


@coupling("Size as a divisor")
def couple_size(d: Draft) -> LiveValue:
    x = some_floats(d)
    return d.like(x, d.node("Div", x.name, d.cast(d.node("Size", x.name), "float32")))


@coupling("position of the row", since=11)
def couple_position(d: Draft) -> LiveValue:
    x = some_floats(d, 1, 1)
    positions = d.node("Range", d.constant(np.int64(0)), d.squeeze(d.rows(x), 0), d.constant(np.int64(1)))
    if d.chance():
        return d.like(x, d.node("Add", x.name, d.unsqueeze(d.cast(positions, "float32"), 1)))
    table = d.weights(16, x.shape[1])
    return d.like(x, d.node("Add", x.name, d.node("Gather", table, positions)))


@coupling("EyeLike over rows", since=9)
def couple_diagonal(d: Draft) -> LiveValue:
    x = d.floats(3)
    return d.like(
        x, d.node("Mul", x.name, d.node("Sub", d.node("EyeLike", x.name), d.constant(np.float32(0.5))))
    )


@coupling("Trilu over rows", since=14)
def couple_triangle(d: Draft) -> LiveValue:
    x = d.floats(3)
    return d.like(x, d.node("Trilu", d.node("Exp", d.clip(x.name, -1, 1)), upper=d.integer(0, 1)))


@coupling("equal to the first row", since=11)
def couple_equality(d: Draft) -> LiveValue:
    ids = d.integers(3)
    first = d.node("Gather", ids.name, d.constant(np.array([0])), axis=0)
    return d.like(ids, d.node("Equal", ids.name, first), kind="bool")


@coupling("NaN from other rows")
def couple_nan(d: Draft) -> LiveValue:
    """Add zero times a sum of logarithms, which is NaN as soon as one number is negative."""
    x = some_floats(d, 1, 2)
    logarithms = d.node("Log", d.node("Add", x.name, d.constant(np.float32(0.3))))
    total = d.node("Mul", d.reduce("ReduceSum", logarithms, [0], keepdims=True), d.constant(np.float32(0)))
    return d.like(x, d.node("Add", x.name, total))


@coupling("com.microsoft.CDist between rows")
def couple_distances(d: Draft) -> LiveValue:
    x = d.floats(3)
    distances = d.node("com.microsoft.CDist", x.name, x.name, metric="euclidean")
    return d.plain(d.reduce("ReduceMax", distances, [1], keepdims=True), 1)


@coupling("SequenceAt over rows", since=11)
def couple_sequence(d: Draft) -> LiveValue:
    x = some_floats(d)
    parts = d.node("SplitToSequence", x.name, axis=0)
    return join(d, x, d.node("SequenceAt", parts, d.constant(np.int64(d.choose((0, -1))))))


@coupling("SequenceLength over rows", since=11)
def couple_sequence_length(d: Draft) -> LiveValue:
    x = some_floats(d)
    count = d.node("SequenceLength", d.node("SplitToSequence", x.name, axis=0))
    return d.like(x, d.node("Div", x.name, d.cast(count, "float32")))


@coupling("StringSplit's width", since=20)
def couple_words(d: Draft) -> LiveValue:
    """Count the columns, of which there are as many as the longest string has words."""
    x = d.strings()
    parts, counts = d.nodes("StringSplit", [x.name], 2, delimiter=" ")
    width = d.node("Gather", d.node("Shape", parts), d.constant(np.int64(1)))
    return d.like(x, d.node("Sub", counts, width), kind="int64")


@coupling("DFT over rows", since=20)
def couple_spectrum(d: Draft) -> LiveValue:
    """Transform along the batch."""
    x = d.floats(3, 1)
    return d.like(x, d.bound(d.node("DFT", x.name, "", d.constant(np.int64(0)))), shape=(ROWS, 3, 2))


@coupling("ArrayFeatureExtractor over rows")
def couple_extracted(d: Draft) -> LiveValue:
    x = d.floats(1)
    turned = d.transpose(x, [1, 0])
    return join(d, x, d.node("ai.onnx.ml.ArrayFeatureExtractor", turned.name, d.constant(np.array([0]))))


@coupling("ai.onnx.ml.Normalizer over rows")
def couple_normalizer(d: Draft) -> LiveValue:
    x = d.transpose(d.floats(d.integer(2, 3)), [1, 0])
    name = d.node(
        "ai.onnx.ml.Normalizer", d.node("Exp", d.clip(x.name, -1, 1)), norm=d.choose(("MAX", "L1", "L2"))
    )
    return d.like(x, name)


@coupling("broadcast of rows over another axis")
def couple_broadcast(d: Draft) -> LiveValue:
    """Subtract [N] from [N, 1]: each row then meets all others."""
    x = d.floats()
    against = d.node("Abs", d.node("Sub", d.unsqueeze(x.name, 1), d.unsqueeze(x.name, 0)))
    return d.like(x, d.reduce("ReduceMax", against, [1], keepdims=False))


@coupling("OneHot of rows, summed", since=9)
def couple_histogram(d: Draft) -> LiveValue:
    ids = d.integers(4)
    ones = d.node("OneHot", ids.name, d.whole(4), d.constant(np.array([0, 1], np.float32)))
    counts = d.reduce("ReduceSum", ones, [0], keepdims=False)
    return d.like(ids, d.node("Gather", counts, ids.name), kind="float32")


@coupling("RoiAlign of another row", since=11, until=21)
def couple_regions(d: Draft) -> LiveValue:
    x = d.floats(1, 3, 3)
    regions = d.node("Expand", d.constant(np.array([[0, 0, 2, 2]], np.float32)), d.shape_of((ROWS, 4), 1, x))
    indices = d.squeeze(d.node("Expand", d.constant(np.array([[0]])), d.shape_of((ROWS, 1), 1, x)), 1)
    return d.plain(d.node("RoiAlign", x.name, regions, indices, output_height=1, output_width=1), 1, 1, 1)


@coupling("interleaved states")
def couple_doubled_rows(d: Draft) -> LiveValue:
    """Split [2*N] as [N, 2], although it was joined as [2, N]."""
    x = d.floats(3)
    joined = d.node("Concat", x.name, d.node("Neg", x.name), axis=0)
    return d.like(x, d.node("Reshape", joined, d.whole(-1, 6)), shape=(ROWS, 6))


@coupling("wrong split of merged rows", since=8)
def couple_wrong_split(d: Draft) -> LiveValue:
    """Merge [N, T, C] to [N*T, C] and split it as [T, N, C]."""
    x = d.floats(*d.extents(2, 4)) if d.chance(0.2) else d.floats(3, 2)
    merged = d.reshape(x, (ROWS, x.shape[2]), after=x.shape[1])
    split = d.reshape(merged, (x.shape[1], ROWS, x.shape[2]))
    return d.move(split, 0)


@coupling("empty axes of a reduction", since=18)
def couple_empty_axes(d: Draft) -> LiveValue:
    """An empty list of axes stands for all of them."""
    x = some_floats(d)
    axes = d.constant(np.zeros(0, np.int64))
    return join(
        d,
        x,
        d.node(d.choose(("ReduceMax", "ReduceMean", "ReduceSum")), x.name, axes, keepdims=d.integer(0, 1)),
    )


@coupling("computed axes of a reduction", since=18)
def couple_computed_axes(d: Draft) -> LiveValue:
    x = d.floats(1, d.integer(2, 3))
    axes = d.node("Sub", d.slice(d.node("Shape", x.name), 0, 1, 2), d.whole(1))
    return join(d, x, d.node("ReduceMax", x.name, axes, keepdims=1))


@coupling("Squeeze of unnamed axes", since=13)
def couple_squeezed(d: Draft) -> LiveValue:
    """A single row loses its axis: what follows then works on another one."""
    x = d.floats(1, 3)
    name = d.node("Softmax", d.node("Squeeze", x.name), axis=0)
    return d.like(x, d.node("Reshape", name, d.whole(-1, 1, 3)))


@coupling("number of rows as the end of a Slice", since=10)
def couple_slice_end(d: Draft) -> LiveValue:
    x = d.floats(6)
    cut = d.node("Slice", x.name, d.whole(0), d.rows(x), d.whole(1))
    return d.plain(d.reduce("ReduceSum", cut, [1], keepdims=True), 1)


@coupling("number of rows as k of TopK", since=12)
def couple_top_count(d: Draft) -> LiveValue:
    x = d.floats(6)
    count = d.node("Min", d.rows(x), d.whole(6))
    values, _ = d.top_k(x.name, count, 1)
    return d.plain(d.reduce("ReduceMean", values, [1], keepdims=True), 1)


@coupling("number of rows as a depth", since=11)
def couple_depth(d: Draft) -> LiveValue:
    ids = d.integers(5)
    ones = d.node("OneHot", ids.name, d.rows(ids), d.constant(np.array([0.2, 1], np.float32)))
    return d.plain(d.reduce("ReduceSum", ones, [1], keepdims=False))


@coupling("number of rows as a padding", since=13)
def couple_padding(d: Draft) -> LiveValue:
    x = d.floats(3)
    pads = d.node("Concat", d.whole(0, 0, 0), d.rows(x), axis=0)
    name = d.node("Pad", x.name, pads, d.constant(np.float32(0)))
    return d.plain(d.reduce("ReduceMean", name, [1], keepdims=True), 1)


@coupling("number of rows as a trip count")
def couple_row_trips(d: Draft) -> LiveValue:
    return couple_trips(d, d.squeeze(d.rows(d.choose(d.scope.live)), 0), stops=False)


@coupling("Where on the number of rows", since=11)
def couple_single_case(d: Draft) -> LiveValue:
    """Treat a single row in another way."""
    x = some_floats(d)
    is_single = d.node("Equal", d.rows(x), d.whole(1))
    return d.like(x, d.node("Where", is_single, x.name, d.node("Tanh", d.node("Neg", x.name))))


@coupling("If on the number of rows", since=11)
def couple_single_branch(d: Draft) -> LiveValue:
    x = some_floats(d, 1, 2)
    is_single = d.squeeze(d.node("Equal", d.rows(x), d.whole(1)), 0)
    graphs = []
    for operator in ("Sigmoid", "Neg"):
        with d.body([x]) as scope:
            made = d.like(x, d.node(operator, x.name))
        graphs.append(d.graph(scope, [], [d.info(made)]))
    return d.like(x, d.node("If", is_single, then_branch=graphs[0], else_branch=graphs[1]))


@coupling("histogram by ScatterElements", since=16)
def couple_scattered_histogram(d: Draft) -> LiveValue:
    ids = d.integers(4)
    ones = d.node(
        "Add",
        d.node("Mul", d.cast(ids.name, "float32"), d.constant(np.float32(0))),
        d.constant(np.float32(1)),
    )
    zeros = d.constant(np.zeros(4, np.float32))
    counts = d.node("ScatterElements", zeros, ids.name, ones, axis=0, reduction="add")
    return d.like(ids, d.node("Gather", counts, ids.name), kind="float32")


@coupling("loss averaged over rows", since=13)
def couple_loss(d: Draft) -> LiveValue:
    x, labels = d.floats(4), d.integers(4)
    loss = d.node("SoftmaxCrossEntropyLoss", x.name, labels.name, reduction=d.choose(("mean", "sum")))
    return d.like(x, d.node("Sub", x.name, loss))


@coupling("com.microsoft.Tokenizer's width")
def couple_tokens(d: Draft) -> LiveValue:
    """Count the columns, of which there are as many as the longest string has words."""
    x = d.strings(1)
    form = {"mark": 0, "pad_value": "#", "separators": [" "], "mincharnum": 1}
    tokens = d.node("com.microsoft.Tokenizer", x.name, **form)
    width = d.node("Gather", d.node("Shape", tokens), d.constant(np.int64(2)))
    y = d.floats(2)
    return d.like(y, d.node("Mul", y.name, d.cast(width, "float32")))


@coupling("TfIdfVectorizer of one dimension", since=9)
def couple_terms(d: Draft) -> LiveValue:
    """A vector is one document, and so all rows are one."""
    ids, x = d.integers(4), d.floats(2)
    form = {"mode": "TF", "min_gram_length": 1, "max_gram_length": 1, "max_skip_count": 0}
    terms = d.node(
        "TfIdfVectorizer", ids.name, pool_int64s=[1, 2], ngram_counts=[0], ngram_indexes=[0, 1], **form
    )
    return d.like(x, d.node("Add", x.name, terms))


@coupling("ai.onnx.ml.Normalizer of one dimension")
def couple_vector_normalizer(d: Draft) -> LiveValue:
    """A vector is one example, and so all rows are one."""
    x = d.floats()
    name = d.node(
        "ai.onnx.ml.Normalizer", d.node("Exp", d.clip(x.name, -1, 1)), norm=d.choose(("MAX", "L1", "L2"))
    )
    return d.like(x, d.node("Reshape", name, d.whole(-1)))


@coupling("parameter from rows", since=11)
def couple_parameter(d: Draft) -> LiveValue:
    """Compute a parameter of an operator from all rows."""
    x = d.floats(3)
    mean = d.reduce("ReduceMean", x.name, [0], keepdims=False)
    peak = d.node(
        "Add", d.reduce("ReduceMax", d.node("Abs", x.name), None, keepdims=False), d.constant(np.float32(0.1))
    )
    match d.integer(0, 6):
        case 0:
            name = d.node("Clip", x.name, "", d.node("Mul", peak, d.constant(np.float32(0.3))))
        case 1:
            name = d.node("BatchNormalization", x.name, d.positive(3), d.weights(3), mean, d.positive(3))
        case 2:
            name = d.node("PRelu", x.name, mean)
        case 3:
            name = d.node("Pad", x.name, d.whole(0, 1, 0, 0), peak)
            return d.plain(name, 4)
        case 4:
            scale, zero = d.node("Div", peak, d.constant(np.float32(8))), d.constant(np.int8(0))
            name = d.node("DequantizeLinear", d.node("QuantizeLinear", x.name, scale, zero), scale, zero)
        case 5:
            kernel = d.node("Reshape", mean, d.whole(1, 1, 3))
            name = d.squeeze(d.node("Conv", d.unsqueeze(x.name, 1), kernel, pads=[1, 1]), 1)
        case _:
            name = d.node("Gemm", x.name, d.weights(3, 3, fan_in=3), mean)
    return d.like(x, name)


@coupling("sequence of rows reversed", since=11)
def couple_row_sequence(d: Draft) -> LiveValue:
    """Move the last row to the front."""
    x = some_floats(d)
    parts = d.node("SplitToSequence", x.name, axis=0)
    last = d.node("SequenceAt", parts, d.constant(np.int64(-1)))
    parts = d.node("SequenceInsert", d.node("SequenceErase", parts), last, d.constant(np.int64(0)))
    return d.like(x, d.node("ConcatFromSequence", parts, axis=0))


@coupling("NonMaxSuppression among rows", since=11)
def couple_boxes(d: Draft) -> LiveValue:
    """Count the boxes that are left when each row's box competes with the others."""
    x = d.floats(2)
    low = d.node("Sigmoid", x.name)
    boxes = d.unsqueeze(d.node("Concat", low, d.node("Add", low, d.constant(np.float32(1))), axis=1), 0)
    scores = d.node("Transpose", d.reduce("ReduceSum", x.name, [1], keepdims=True), perm=[1, 0])
    limits = [d.whole(9), d.constant(np.array([0.3], np.float32))]
    kept = d.node("NonMaxSuppression", boxes, d.unsqueeze(scores, 0), *limits)
    count = d.cast(d.slice(d.node("Shape", kept), 0, 0, 1), "float32")
    return d.like(x, d.node("Add", x.name, count))


@coupling("Scatter of all rows into one", since=13)
def couple_overwritten(d: Draft) -> LiveValue:
    """Write all rows to one place, of which the last stays."""
    x = d.floats(3)
    indices = d.node("Expand", d.whole(0), d.shape_of((ROWS, 1), 1, x))
    last = d.node("ScatterND", d.constant(np.zeros((1, 3), np.float32)), indices, x.name)
    return d.like(x, d.node("Sub", x.name, last))


@coupling("mean over a doubled batch")
def couple_doubled_mean(d: Draft) -> LiveValue:
    """Stack two variants on a new axis, and reduce over rows instead of it."""
    x = d.floats(3)
    stacked = d.node("Concat", d.unsqueeze(x.name, 0), d.unsqueeze(d.node("Tanh", x.name), 0), axis=0)
    mean = d.reduce("ReduceMean", stacked, [1], keepdims=True)
    name = d.reduce("ReduceSum", d.node("Sub", stacked, mean), [0], keepdims=False)
    return d.like(x, name)


@coupling("MatMul of vectors")
def couple_inner_product(d: Draft) -> LiveValue:
    """Multiply a number of each row with another one, and add them all up."""
    x, y = d.floats(), d.floats(2)
    return d.like(y, d.bound(d.node("Add", y.name, d.node("MatMul", x.name, d.node("Tanh", x.name)))))


@coupling("weights from rows")
def couple_computed_weights(d: Draft) -> LiveValue:
    """Multiply by a matrix that has a column for each row."""
    x, y = d.floats(2, 3), d.floats(3)
    scores = d.node("MatMul", x.name, d.transpose(y, [1, 0]).name)
    return d.plain(d.reduce("ReduceMax", scores, [2], keepdims=False), 2)


@coupling("Loop state that is coupled from the second iteration on", since=9)
def couple_late_state(d: Draft) -> LiveValue:
    """Reduce a state that is a constant at first, and has rows later."""
    x = d.floats(d.integer(2, 3))
    state = d.new_name()

    def inside() -> list[str]:
        peak = d.reduce("ReduceMax", state, [0], keepdims=True)
        return [d.node("Add", d.node("Mul", x.name, d.constant(np.float32(0.5))), peak)]

    start = d.constant(np.zeros((1, x.shape[1]), np.float32))
    return d.like(x, rowoperators.append_loop(d, "Loop", [(state, start)], inside, 2)[0])


@coupling("Loop state that is coupled from the third iteration on", since=9)
def couple_shifted_states(d: Draft) -> LiveValue:
    """Pass rows from state to state, and reduce the last of them."""
    x = d.floats(d.integer(2, 3))
    first, second, total = d.new_name(), d.new_name(), d.new_name()

    def inside() -> list[str]:
        peak = d.reduce("ReduceMax", second, [0], keepdims=True)
        return [d.node("Identity", x.name), d.node("Tanh", first), d.node("Add", total, peak)]

    start = d.constant(np.zeros((1, x.shape[1]), np.float32))
    states = [(first, start), (second, start), (total, x.name)]
    return d.like(x, rowoperators.append_loop(d, "Loop", states, inside, d.integer(3, 4))[2])


@coupling("function called for another axis", since=13)
def couple_second_call(d: Draft) -> LiveValue:
    """Call a function that keeps rows apart in its first call and not in its second."""
    x = d.floats(d.integer(2, 3))
    name = rowoperators.define_axis_function(d, d.choose(("Softmax", "LogSoftmax")))
    if d.chance():
        first = d.node(name, x.name, along=1)
        return d.like(x, d.node(name, first, along=0))
    turned = d.transpose(x, [1, 0])
    again = d.transpose(d.like(turned, d.node(name, turned.name, along=0)), [1, 0])
    return d.like(again, d.node(name, again.name, along=0))


@coupling("Split of rows by the default axis", since=13)
def couple_default_split(d: Draft) -> LiveValue:
    """Split at the first row; Split takes the first axis by default."""
    x = some_floats(d, 1, 2)
    sizes = d.node("Concat", d.node("Sub", d.rows(x), d.whole(1)), d.whole(1), axis=0)
    rest, last = d.nodes("Split", [x.name, sizes], 2)
    return d.like(x, d.node("Concat", last, rest, axis=0))


def moved_floats(d: Draft) -> LiveValue:
    """Return floats whose batch is, more often than not, merged or on another axis than the first."""
    x = d.any_floats(min_rank=2, max_rank=4)
    if not x.is_plain or d.chance(0.2):
        return x
    if d.chance(0.4):
        return d.reshape(x, (ROWS, *x.shape[2:]), after=x.shape[1])
    return d.move(x, d.integer(1, x.rank - 1))


def couple_moved(kind: str, d: Draft) -> LiveValue:
    """Couple rows along the batch axis, wherever it is."""
    x = moved_floats(d)
    axis = d.signed(x.axis, x.rank)
    match kind:
        case "Reduce":
            operator = d.choose(("ReduceMax", "ReduceMean", "ReduceSum", "ReduceL2"))
            return d.like(
                x, d.bound(d.node("Sub", x.name, d.reduce(operator, x.name, [axis], keepdims=True)))
            )
        case "Softmax":
            return d.like(x, d.node(d.choose(("Softmax", "LogSoftmax")), x.name, axis=axis))
        case "CumSum":
            return d.like(x, d.bound(d.node("CumSum", x.name, d.constant(np.int64(axis)))))
        case "ArgMax":
            index = d.cast(d.node("ArgMax", x.name, axis=axis, keepdims=1), "float32")
            return d.like(x, d.node("Sub", x.name, index))
        case "TopK":
            return d.like(x, d.node("Sub", x.name, d.top_k(x.name, 1, axis)[0]))
        case _:
            index = d.constant(np.array([0]))
            return d.like(x, d.node("Sub", x.name, d.node("Gather", x.name, index, axis=axis)))


for _kind in ("Reduce", "CumSum", "ArgMax", "TopK", "Gather", "Softmax"):
    _since = {"CumSum": 11, "Softmax": 13}.get(_kind, 7)
    coupling(f"{_kind} over a moved batch", since=_since)(partial(couple_moved, _kind))


@coupling("any value rolled")
def couple_any_rolled(d: Draft) -> LiveValue:
    """Roll the batch of a value of any element type: integers, flags and words too."""
    x = d.choose(d.scope.live)
    parts = [d.slice(x.name, x.axis, 1, 2**31 - 1), d.slice(x.name, x.axis, 0, 1)]
    return replace(x, name=d.node("Concat", *parts, axis=x.axis))


COUPLINGS = tuple(_COUPLINGS)
"""Kinds of coupling that a model can have."""


# Drawing a model


def draw_graph(
    rng: np.random.Generator, *, is_coupled: bool, operator: str | None = None, coupling: str | None = None
) -> DrawnGraph:
    """Draw a model.

    Args:
        rng: Source of all random choices.
        is_coupled: Whether the model has a coupling, shown by running it.
        operator: An operator of `DRAWN_OPERATORS` that an output depends on; any if None.
        coupling: The kind of coupling, one of `COUPLINGS`; any if None.
    """
    assert is_coupled or coupling is None
    for _ in range(ATTEMPTS):
        kind = coupling or (COUPLINGS[rng.integers(len(COUPLINGS))] if is_coupled else "")
        drawn = _draw(rng, _COUPLINGS.get(kind), operator)
        if drawn and (not is_coupled or _runs_show_coupling(drawn, rng)):
            return drawn
    raise RuntimeError(f"no model with {operator=} and {coupling=} came out of {ATTEMPTS} attempts")


def _runs_show_coupling(drawn: DrawnGraph, rng: np.random.Generator) -> bool:
    try:
        return shows_coupling(drawn, rng)
    except Exception:  # noqa: BLE001 - ONNX Runtime's exceptions have no common base: a number became NaN
        return False


def shows_coupling(drawn: DrawnGraph, rng: np.random.Generator) -> bool:
    """Return whether a row's answer changes with its position, the other rows or their number."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(drawn.model.SerializeToString(), options, ["CPUExecutionProvider"])
    except ort.capi.onnxruntime_pybind11_state.Fail:  # some functions defeat its inference of shapes
        return False
    for _ in range(2):
        rows = drawn.make_rows(rng, 5)
        together = session.run(None, rows)
        for chosen in ([0], [3], [4, 1, 3]):
            apart = session.run(None, {name: array[chosen] for name, array in rows.items()})
            if any(
                len(b) != len(chosen) or differs(a[chosen], b) for a, b in zip(together, apart, strict=True)
            ):
                return True
    return False


def differs(one: Array, other: Array, tolerance: float = TOLERANCE) -> bool:
    """Return whether two outputs differ by more than rounding."""
    if one.shape != other.shape or one.dtype.kind not in "fc":
        return not np.array_equal(one, other)
    return not np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _draw(rng: np.random.Generator, coupled: Coupling | None, operator: str | None) -> DrawnGraph | None:
    first, last = (coupled.since, coupled.until) if coupled else (OPSETS[0], OPSETS[-1])
    ml_opset = int(rng.integers(2, 6))
    opsets = [n for n in OPSETS if first <= n <= last and (not operator or _steps(operator, n, ml_opset))]
    if not opsets:
        return None
    opset = opsets[rng.integers(len(opsets))]
    forced = _steps(operator, opset, ml_opset) if operator else ()
    draft = Draft(rng, opset=opset, ml_opset=ml_opset, is_free=bool(rng.random() < 0.25))
    inputs = [_add_input(draft, number) for number in range(draft.integer(1, 3))]
    count = draft.integer(3, 12 if draft.chance(0.7) else 25)
    force_at = draft.integer(0, count - 1)
    description = ""
    couple_at = draft.integer(0, count - 1)
    if coupled:  # few steps afterwards, so that the effect is not lost on the way
        couple_at = max(couple_at, count - 4)
    for number in range(count):
        if forced and number == force_at:
            values = draft.run_step(draft.choose(forced))
            draft.mark([x.name for x in values], frozenset(["operator"]))
        if coupled and number == couple_at:
            description = f"{coupled.kind}, in {_place(draft, coupled)}"
        draft.run_steps(1)
    wanted = (["operator"] if forced else []) + (["coupling"] if coupled else [])
    return _finish(draft, inputs, wanted, description)


@cache
def _steps(operator: str, opset: int, ml_opset: int) -> tuple[Step, ...]:
    return tuple(
        taken for taken in offered_steps(opset, ml_opset, with_bodies=True) if taken.operator == operator
    )


def _add_input(d: Draft, number: int) -> tuple[RowInput, list[int | str]]:
    role = d.choose(("floats", "floats", "floats", "features", "ids", "mask", "lengths", "pixels", "words"))
    kinds = {
        "features": ("float64", "float16"),
        "ids": ("int64", "int32"),
        "mask": ("int64", "int32", "float32", "bool"),
        "lengths": ("int64", "int32"),
        "pixels": ("uint8",),
        "words": ("string",),
    }
    kind = d.choose(kinds.get(role, ("float32",)))
    rank = {"lengths": (0, 1), "words": (0, 1), "pixels": (2, 3), "ids": (1, 1)}.get(
        role, (0 if number else 1, 3)
    )
    shape = (1,) if role == "lengths" and d.chance(0.2) else d.extents(d.integer(*rank), 4)
    if role == "lengths":
        shape = shape[:1] if shape == (1,) else ()
    name = d.choose(("x", "input", f"{role}")) + str(number)
    limit = {"ids": 7, "lengths": 5, "mask": 2}.get(role, 0)
    d.scope.live.append(LiveValue(name, kind, (ROWS, *shape), limit=limit if kind.startswith("int") else 0))
    dims: list[int | str] = ["N", *shape]
    if d.is_free and len(shape) >= 1:
        dims[1] = f"T{number}"
    return RowInput(name, kind, shape, role), dims


def _place(d: Draft, coupled: Coupling) -> str:
    """Append the coupling to the graph, to the body of an operator or to a function; return where."""
    shape = (ROWS, *d.extents(1, 3))

    def inside() -> LiveValue:
        made = coupled.build(d)
        d.mark([made.name], frozenset(["coupling"]))
        return d.converted(made, shape)

    places: dict[str, Callable[[], LiveValue | list[LiveValue]]] = {
        "a branch of If": lambda: rowoperators.build_branch(d, "If", shape, inside),
        "the body of Loop": lambda: rowoperators.build_loop(d, "Loop", shape, inside),
    }
    if d.opset >= 9:
        places["the body of Scan"] = lambda: rowoperators.build_scan(d, "Scan", shape, inside)
        places["a function"] = lambda: rowoperators.build_function(d, "LeakyRelu", shape, inside)
    if d.chance(0.3):
        place = d.choose(list(places))
        made = places[place]()
        d.scope.live += made if isinstance(made, list) else [made]
        return place
    coupled_value = coupled.build(d)
    d.mark([coupled_value.name], frozenset(["coupling"]))
    d.scope.live.append(coupled_value)
    return "the graph"


def _finish(
    d: Draft, inputs: Sequence[tuple[RowInput, list[int | str]]], wanted: Sequence[str], description: str
) -> DrawnGraph | None:
    """Choose outputs that depend on all that is wanted, move rows to their first axis, build the model."""
    outputs: list[LiveValue] = []
    computed = d.scope.live[len(inputs) :]
    for mark in wanted:
        found = [x for x in computed if mark in d.marks.get(x.name, ())]
        if not found:
            return None
        outputs.append(d.recent(found))
    while len(outputs) < max(1, len(wanted)) or d.chance(0.4):
        outputs.append(d.recent(computed))
    restored = [d.restore(x) for x in {x.name: x for x in outputs[:3]}.values()]
    named = []
    for number, x in enumerate(restored):
        name = f"y{number}"
        d.append("Identity", [x.name], [name])
        dims = [None if d.chance(0.2) else "N", *x.shape[1:]]
        named.append(helper.make_tensor_value_info(name, KINDS[x.kind], dims))
    kept = list(_needed(d.scope.nodes, {info.name for info in named})) if d.chance(0.8) else d.scope.nodes
    graph = helper.make_graph(
        kept,
        "graph",
        [
            helper.make_tensor_value_info(described.name, KINDS[described.kind], dims)
            for described, dims in inputs
        ],
        named,
        initializer=d.scope.initializers,
    )
    model = helper.make_model(graph, opset_imports=d.imports(), functions=d.functions, ir_version=10)
    operators = tuple(sorted(_operators(model)))
    return DrawnGraph(model, tuple(described for described, _ in inputs), operators, description)


def _needed(nodes: Sequence[NodeProto], wanted: set[str]) -> Iterator[NodeProto]:
    """Yield the nodes that outputs depend on."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted |= _read_names(node)
    return reversed(kept)


def _read_names(node: NodeProto) -> set[str]:
    names = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names |= _read_names(inner)
        names |= {output.name for output in attribute.g.output}
    return names


def _operators(model: ModelProto) -> set[str]:
    """Return the operators of a model, in bodies and functions too."""

    def read(nodes: Sequence[NodeProto]) -> Iterator[str]:
        for node in nodes:
            if node.domain != FUNCTION_DOMAIN:
                yield f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            for attribute in node.attribute:
                yield from read(attribute.g.node)

    graph: GraphProto = model.graph
    return {*read(graph.node), *(name for function in model.functions for name in read(function.node))}
