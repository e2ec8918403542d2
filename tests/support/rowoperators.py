"""One step for each operator that a row-independent graph may have; see `rowdrafts`.

To add an operator, write a function with `@step("Name")`; a prefix names the operator's domain. The function
asks the draft for its inputs, appends nodes, and returns the live values that it made. `since` and `until`
narrow the opsets down to those in which ONNX Runtime runs the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper

from support.rowdrafts import FUNCTION_DOMAIN, KINDS, ROWS, WORDS, Draft, LiveValue, step

Nested = Callable[[], LiveValue]
"""Appends to the body of an operator and returns the body's value."""
SMALL = np.float32(0.02)
"""Scale of quantised weights."""

# Elementwise


@step(
    "Neg", "Abs", "Relu", "Sigmoid", "Tanh", "Sin", "Cos", "Atan", "Erf", "Softsign", "Floor", "Ceil", "Sign"
)
@step("Identity", "Round", "HardSwish", "Mish", "Gelu", "Elu", "Selu", "LeakyRelu", "HardSigmoid", "Celu")
@step(
    "Softplus", "ThresholdedRelu", "com.microsoft.ScaledSiLU", "com.microsoft.Gelu", "com.microsoft.QuickGelu"
)
@step("com.microsoft.FastGelu", "Asinh")
@step("Swish", until=24)
def apply_unary(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    attributes = {}
    if (
        op
        in {
            "Elu",
            "LeakyRelu",
            "Celu",
            "ThresholdedRelu",
            "com.microsoft.QuickGelu",
            "Swish",
            "com.microsoft.ScaledSiLU",
        }
        and d.chance()
    ):
        attributes = {"alpha": round(d.rng.uniform(0.1, 1.2), 3)}
    return d.like(x, d.node(op, x.name, **attributes))


@step("Exp", "Sinh", "Cosh", "Tan")
def apply_growing(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    return d.like(x, d.bound(d.node(op, d.clip(x.name, -1.5, 1.5))))


@step("Acos", "Asin", "Atanh")
def apply_on_unit_interval(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    return d.like(x, d.node(op, d.clip(x.name, -0.9, 0.9)))


@step("Log", "Sqrt", "Reciprocal", "Acosh")
def apply_on_positive(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    return d.like(x, d.node(op, d.node("Add", d.node("Abs", x.name), d.constant(np.float32(1.1)))))


@step("Shrink", since=9)
def shrink(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    return d.like(x, d.node(op, x.name, lambd=0.3, bias=0.1))


@step("PRelu")
def apply_prelu(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    return d.like(x, d.node(op, x.name, constant_beside(d, x)))


@step("Clip")
def clip(d: Draft, op: str) -> LiveValue:
    if d.opset >= 12 and d.chance(0.3):
        x = d.integers(6, *d.extents(1))
        low, high = d.constant(np.int64(1)), d.constant(np.int64(4))
        return d.like(x, d.node(op, x.name, low, high), limit=5)
    x = d.any_floats()
    if d.opset >= 11 and d.chance(0.2):
        return d.like(x, d.node(op, x.name, "", d.constant(np.float32(0.7))))
    return d.like(x, d.clip(x.name, -0.7, 1.2))


@step("Dropout")
def drop_nothing(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    if d.opset >= 12 and d.chance():
        return d.like(x, d.node(op, x.name, d.constant(np.float32(0.4)), d.constant(np.bool_(False))))
    return d.like(x, d.node(op, x.name))


@step("Cast")
def cast(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    kind = d.choose(("float64", "float16", "int64", "int32", "bool", "uint8", "int8"))
    name = d.clip(x.name, 0, 3) if kind == "uint8" else x.name
    return d.like(x, d.node(op, name, to=KINDS[kind]), kind=kind)


@step("CastLike")
def cast_like(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    kind = d.choose(("float64", "int64", "int32"))
    return d.like(x, d.node(op, x.name, d.constant(np.zeros((), kind))), kind=kind)


@step("IsNaN", "IsInf", since=10)
def find_special(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    name = d.node("Log", x.name) if op == "IsNaN" else d.node("Div", x.name, d.node("Relu", x.name))
    return d.like(x, d.node(op, name), kind="bool")


@step("Not")
def negate(d: Draft, op: str) -> LiveValue:
    x = d.any_booleans()
    return d.like(x, d.node(op, x.name), kind="bool")


def constant_beside(
    d: Draft, x: LiveValue, kind: str = "float32", low: float = -1.0, high: float = 1.0
) -> str:
    """Add a constant that broadcasts to the form of a value."""
    rank = d.integer(0, x.rank)
    shape = [1 if n == ROWS or d.chance(0.3) else n for n in x.shape[x.rank - rank :]]
    data = d.rng.uniform(low, high, shape)
    return d.constant(np.round(data).astype(kind) if kind.startswith(("int", "uint")) else data.astype(kind))


def beside(d: Draft, x: LiveValue) -> str:
    """Return floats that broadcast to the form of `x`: a constant, another live value, or a part of `x`."""
    match d.integer(0, 4):
        case 0:
            return constant_beside(d, x)
        case 1:
            y = d.pick("float32", lambda y: can_stand_beside(x, y))
            return y.name if y else constant_beside(d, x)
        case 2:
            y = d.floats(x.before, x.after, *(n for n in x.shape if n != ROWS))
            return d.pack(y, x.shape, x.before, x.after).name
        case 3 if x.rank >= 2:
            return d.reduce("ReduceMean", x.name, [d.choose(x.inner)], keepdims=True)
        case _ if not x.is_merged:
            y = d.floats(*(n if d.chance(0.7) else 1 for n in x.shape if n != ROWS))
            return d.move(y, x.axis).name
    return constant_beside(d, x)


def can_stand_beside(x: LiveValue, y: LiveValue) -> bool:
    """Return whether `y` broadcasts to the form of `x`, with the batch axes one above the other."""
    if (x.before, x.after) != (y.before, y.after) or y.rank > x.rank or y.axis + x.rank - y.rank != x.axis:
        return False
    return all(n in {1, m} for n, m in zip(y.shape, x.shape[x.rank - y.rank :], strict=True))


@step("Add", "Sub", "Mul", "Div")
@step("Max", "Min", "Mean", "Sum", since=8)
def combine(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    y = beside(d, x)
    if op == "Div":
        y = d.node("Add", d.node("Abs", y), d.constant(np.float32(1)))
    names = [x.name, y]
    if op in {"Max", "Min", "Mean", "Sum"} and d.opset >= 8 and d.chance():
        names.append(beside(d, x))
    if op != "Div" and d.chance():
        names.reverse()
    name = d.node(op, *names)
    return d.like(x, d.bound(name) if op in {"Add", "Sub", "Mul", "Sum"} and d.chance(0.7) else name)


@step("Add", "Sub", "Mul", "Div")
@step("Mod", since=10)
@step("Min", "Max", since=12)
def combine_integers(d: Draft, op: str) -> LiveValue:
    x = d.integers(7, *d.extents(d.integer(0, 2)), kind=d.choose(("int64", "int32")))
    y = constant_beside(d, x, x.kind, 1, 4)
    return d.like(x, d.node(op, x.name, y), limit=4 if op == "Mod" else 0)


@step("Pow")
def raise_power(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    base = d.node("Add", d.node("Abs", d.clip(x.name, -2, 2)), d.constant(np.float32(0.5)))
    exponent = constant_beside(d, x) if d.chance() else d.constant(np.float32(2))
    return d.like(x, d.node(op, base, exponent))


@step("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
def compare(d: Draft, op: str) -> LiveValue:
    if op == "Equal" or (d.opset >= 9 and d.chance(0.3)):
        x = d.integers(4, *d.extents(d.integer(0, 2)))
        return d.like(x, d.node(op, x.name, constant_beside(d, x, "int64", 0, 3)), kind="bool")
    x = d.any_floats()
    return d.like(x, d.node(op, x.name, beside(d, x)), kind="bool")


@step("And", "Or", "Xor")
def combine_booleans(d: Draft, op: str) -> LiveValue:
    shape = d.extents(d.integer(0, 2))
    x = d.booleans(*shape)
    y = d.booleans(*(n if d.chance() else 1 for n in shape))
    return d.like(x, d.node(op, x.name, y.name))


@step("Where", since=9)
def choose_elements(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    flags = d.node("Greater", beside(d, x), constant_beside(d, x))
    return d.like(x, d.node(op, flags, *d.choose(((x.name, beside(d, x)), (beside(d, x), x.name)))))


@step("BitwiseAnd", "BitwiseOr", "BitwiseXor")
def combine_bits(d: Draft, op: str) -> LiveValue:
    x = d.integers(8, *d.extents(1), kind=d.choose(("int64", "int32", "uint8")))
    return d.like(x, d.node(op, x.name, constant_beside(d, x, x.kind, 0, 7)))


@step("BitwiseNot")
def negate_bits(d: Draft, op: str) -> LiveValue:
    x = d.integers(8, *d.extents(1), kind="int32")
    return d.like(x, d.node(op, x.name))


@step("BitShift")
def shift_bits(d: Draft, op: str) -> LiveValue:
    x = d.integers(8, *d.extents(1), kind="uint32")
    direction = d.choose(("LEFT", "RIGHT"))
    return d.like(x, d.node(op, x.name, constant_beside(d, x, x.kind, 0, 3), direction=direction))


@step("com.microsoft.BiasGelu")
def add_bias_gelu(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(1, 2)))
    return d.like(x, d.node(op, x.name, d.weights(x.shape[-1])))


@step("com.microsoft.FastGelu")
def add_bias_fast_gelu(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(1, 2)))
    return d.like(x, d.node(op, x.name, d.weights(x.shape[-1])))


# Forms


@step("Transpose")
def transpose(d: Draft, op: str) -> LiveValue:
    del op
    x = d.any_floats(min_rank=2)
    return d.transpose(x, [int(axis) for axis in d.rng.permutation(x.rank)])


@step("Reshape")
def merge_rows(d: Draft, op: str) -> LiveValue:
    """Merge the batch with a neighbour, [N, T, C] -> [N*T, C] or [T, N, C] -> [T*N, C]."""
    del op
    x = d.any_floats(min_rank=2)
    axis = x.axis
    if axis + 1 < x.rank and (axis == 0 or d.chance()):
        shape = (*x.shape[:axis], ROWS, *x.shape[axis + 2 :])
        return d.reshape(x, shape, x.before, x.after * x.shape[axis + 1])
    shape = (*x.shape[: axis - 1], ROWS, *x.shape[axis + 1 :])
    return d.reshape(x, shape, x.before * x.shape[axis - 1], x.after)


@step("Reshape")
def split_rows(d: Draft, op: str) -> LiveValue:
    """Split a merged batch axis again, as far as one of its two factors."""
    del op
    x = d.pick("float32", lambda x: x.is_merged) or merge_rows(d, "Reshape")
    axis = x.axis
    if x.after > 1:
        return d.reshape(x, (*x.shape[:axis], ROWS, x.after, *x.shape[axis + 1 :]), x.before)
    return d.reshape(x, (*x.shape[:axis], x.before, ROWS, *x.shape[axis + 1 :]), 1, x.after)


@step("Reshape")
def reshape_inner(d: Draft, op: str) -> LiveValue:
    """Change the axes on either side of the batch, and leave the batch."""
    del op
    x = d.any_floats(min_rank=2)
    sides = (x.shape[: x.axis], x.shape[x.axis + 1 :])
    first, last = (divided(d, math.prod(side)) if side else () for side in sides)
    return d.reshape(x, (*first, ROWS, *last), x.before, x.after)


def divided(d: Draft, count: int) -> tuple[int, ...]:
    """Divide a number into one to three factors."""
    factors: list[int] = []
    for _ in range(d.integer(0, 2)):
        factor = d.choose([n for n in range(1, count + 1) if count % n == 0])
        factors.append(factor)
        count //= factor
    return (*factors, count)


@step("Flatten")
def flatten(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    axis = x.axis
    if axis == 0 and d.chance(0.8):
        width = math.prod(x.shape[1:])
        return d.like(x, d.node(op, x.name, axis=1), shape=(ROWS, width))
    before, after = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    if d.chance():  # the batch ends up in the first of two axes
        name = d.node(op, x.name, axis=d.signed(axis + 1, x.rank) if axis + 1 < x.rank else x.rank)
        return d.like(x, name, shape=(ROWS, after), before=before * x.before)
    return d.like(x, d.node(op, x.name, axis=axis), shape=(before, ROWS), after=after * x.after)


@step("Squeeze")
def squeeze(d: Draft, op: str) -> LiveValue:
    del op
    x = d.any_floats()
    position = d.integer(0, x.rank)
    name = d.squeeze(d.node("Identity", d.unsqueeze(x.name, position)), position)
    found = d.pick("float32", lambda y: 1 in y.shape and y.rank >= 2)
    if found is None:
        return d.like(x, name)
    axis = found.shape.index(1)
    rest = (*found.shape[:axis], *found.shape[axis + 1 :])
    return d.like(found, d.squeeze(found.name, d.signed(axis, found.rank)), shape=rest)


@step("Unsqueeze")
def unsqueeze(d: Draft, op: str) -> LiveValue:
    del op
    x = d.any_floats(max_rank=4)
    position = d.integer(0, x.rank)
    shape = (*x.shape[:position], 1, *x.shape[position:])
    return d.like(x, d.unsqueeze(x.name, d.signed(position, x.rank + 1)), shape=shape)


@step("com.microsoft.ExpandDims")
def expand_dims(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(max_rank=4)
    position = d.integer(0, x.rank)
    shape = (*x.shape[:position], 1, *x.shape[position:])
    return d.like(x, d.node(op, x.name, d.constant(np.int32(position))), shape=shape)


@step("Expand", since=8)
def expand(d: Draft, op: str) -> LiveValue:
    match d.integer(0, 2):
        case 0:  # a constant for each row
            x = d.floats(*d.extents(2, 4))
            shape = d.shape_of(x.shape, 1, x)
            name = d.node(op, d.weights(1, *d.choose((x.shape[1:], (1, x.shape[2])))), shape)
            return d.like(x, d.node("Add", x.name, d.bound(name)))
        case 1:  # a new axis before the batch, which broadcasts
            x = d.floats(*d.extents(d.integer(0, 2), 4))
            longer = (d.integer(2, 3), *x.shape)
            return d.like(x, d.node(op, x.name, d.shape_of(longer, 1, x)), shape=longer)
        case _:  # ones keep the batch's extent
            x = d.floats(*d.extents(1, 4), 1)
            count = d.integer(2, 4)
            return d.like(x, d.node(op, x.name, d.whole(1, 1, count)), shape=(*x.shape[:-1], count))


@step("Tile")
def tile(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(max_rank=4)
    axis = d.integer(0, x.rank - 1)
    repeats = [2 if i == axis else 1 for i in range(x.rank)]
    shape = tuple(n if n == ROWS else n * m for n, m in zip(x.shape, repeats, strict=True))
    before = x.before * repeats[x.axis]
    if before * x.after > 40 or math.prod(shape) < -600 or x.before > 1:
        return d.like(x, d.node(op, x.name, d.whole(*[1] * x.rank)))
    return d.like(x, d.node(op, x.name, d.whole(*repeats)), shape=shape, before=before)


@step("Concat")
def concatenate(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(1, 3), 4))
    axis = d.integer(1, x.rank - 1)
    sizes = [d.integer(1, 3) for _ in range(d.integer(1, 2))]
    parts = [
        x,
        *(d.floats(*(size if i == axis else n for i, n in enumerate(x.shape) if i)) for size in sizes),
    ]
    target = d.integer(0, x.rank - 1)
    moved = [d.move(part, target) for part in parts]
    inner = moved[0].inner[axis - 1]
    shape = tuple(n + sum(sizes) if i == inner else n for i, n in enumerate(moved[0].shape))
    name = d.node(op, *(part.name for part in moved), axis=d.signed(inner, x.rank))
    return d.like(moved[0], name, shape=shape)


@step("Concat", since=8)
def prepend_token(d: Draft, op: str) -> LiveValue:
    """Put a learned class token before each row's sequence."""
    x = d.floats(*d.extents(2, 4))
    token = d.node("Expand", d.weights(1, 1, x.shape[2]), d.shape_of((ROWS, 1, x.shape[2]), 1, x))
    return d.like(x, d.node(op, token, x.name, axis=1), shape=(ROWS, x.shape[1] + 1, x.shape[2]))


@step("Split")
def split(d: Draft, op: str) -> list[LiveValue]:
    x = d.any_floats(min_rank=2)
    axis = d.choose(x.inner)
    extent = x.shape[axis]
    if d.opset >= 18 and extent > 1 and d.chance():
        size = -(-extent // 2)
        names, sizes = d.nodes(op, [x.name], 2, axis=axis, num_outputs=2), [size, extent - size]
    else:
        first = d.integer(1, extent)
        sizes = [first, extent - first] if first < extent else [extent]
        names = d.split(x.name, d.signed(axis, x.rank), sizes)
    return [
        d.like(x, name, shape=tuple(size if i == axis else n for i, n in enumerate(x.shape)))
        for name, size in zip(names, sizes, strict=True)
    ]


@step("Slice")
def cut_slice(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    axis = d.choose(x.inner)
    extent = x.shape[axis]
    start = d.integer(0, extent - 1)
    end = d.choose((extent, 2**31 - 1, 2**63 - 1, d.integer(start + 1, extent)))
    stride = d.choose((1, 1, 2)) if d.opset >= 10 else 1
    if d.opset >= 10 and d.chance(0.2):
        start, end, stride = d.choose((-1, 2**31 - 1)), d.choose((-(2**63) + 1, -(2**31))), -1
    count = len(range(extent)[start:end:stride]) if stride > 0 else extent
    shape = tuple(count if i == axis else n for i, n in enumerate(x.shape))
    if d.opset >= 10 and d.chance(0.3):  # all axes, and the batch axis as a whole
        ranges = [(start, end, stride) if i == axis else (0, 2**63 - 1, 1) for i in range(x.rank)]
        name = d.node(
            op,
            x.name,
            *(d.whole(*(part[i] for part in ranges)) for i in range(2)),
            d.whole(*range(x.rank)),
            d.whole(*(part[2] for part in ranges)),
        )
        return d.like(x, name, shape=shape)
    if d.opset >= 13 and d.chance(0.3):
        axis -= x.rank
    return d.like(x, d.slice(x.name, axis, start, end, stride), shape=shape)


@step("Pad")
def pad(d: Draft, op: str) -> LiveValue:
    del op
    x = d.any_floats(min_rank=2, max_rank=4)
    axis = d.choose(x.inner)
    modes = [
        "constant",
        "edge",
        *(["reflect"] if x.shape[axis] > 2 else []),
        *(["wrap"] if d.opset >= 19 else []),
    ]
    first, last = d.integer(0, 1), d.integer(0, 2 if x.shape[axis] > 2 else 1)
    pads = [0] * (2 * x.rank)
    pads[axis], pads[axis + x.rank] = first, last
    shape = tuple(n + first + last if i == axis else n for i, n in enumerate(x.shape))
    return d.like(x, d.pad(x.name, pads, d.choose(modes)), shape=shape)


@step("Gather")
def gather(d: Draft, op: str) -> LiveValue:
    if d.chance(0.4):  # an embedding
        x = d.integers(7, *d.extents(d.integer(0, 2)), kind=d.choose(("int64", "int32")))
        width = d.integer(2, 4)
        return d.like(
            x, d.node(op, d.weights(7, width), x.name, axis=0), kind="float32", shape=(*x.shape, width)
        )
    x = d.any_floats(min_rank=2)
    axis = d.choose(x.inner)
    extent = x.shape[axis]
    if x.rank > 1 and d.chance(0.4):
        index = d.integer(-extent if d.opset >= 11 else 0, extent - 1)
        rest = (*x.shape[:axis], *x.shape[axis + 1 :])
        return d.like(
            x, d.node(op, x.name, d.constant(np.int64(index)), axis=d.signed(axis, x.rank)), shape=rest
        )
    index_shape = d.choose(((3,), (2, 2)))
    indices = d.constant(d.rng.integers(0, extent, index_shape))
    shape = (*x.shape[:axis], *index_shape, *x.shape[axis + 1 :])
    return d.like(x, d.node(op, x.name, indices, axis=axis), shape=shape)


@step("GatherElements")
def gather_elements(d: Draft, op: str) -> LiveValue:
    shape = d.extents(d.integer(1, 2))
    axis = d.integer(1, len(shape))
    x = d.floats(*shape)
    count = d.integer(1, 3)
    indices = d.integers(shape[axis - 1], *(count if i + 1 == axis else n for i, n in enumerate(shape)))
    name = d.node(op, x.name, indices.name, axis=d.signed(axis, x.rank))
    return d.like(x, name, shape=indices.shape)


@step("GatherND", since=12)
def gather_nd(d: Draft, op: str) -> LiveValue:
    shape = d.extents(2, 4)
    x, indices = d.floats(*shape), d.integers(shape[0], 3, 1)
    return d.like(x, d.node(op, x.name, indices.name, batch_dims=1), shape=(ROWS, 3, shape[1]))


@step("GatherND")
def gather_last_token(d: Draft, op: str) -> LiveValue:
    """Select each row's last token with the indices (row, length - 1), as exporters of text models do."""
    shape = d.extents(2, 4)
    x, last = d.floats(*shape), d.integers(shape[0])
    positions = d.node("Range", d.constant(np.int64(0)), d.squeeze(d.rows(x), 0), d.constant(np.int64(1)))
    pair = d.node("Concat", d.unsqueeze(positions, 1), d.unsqueeze(last.name, 1), axis=1)
    return d.like(x, d.node(op, x.name, pair), shape=(ROWS, shape[1]))


@step("ScatterElements", "Scatter", since=9)
def scatter_elements(d: Draft, op: str) -> LiveValue:
    shape = d.extents(d.integer(1, 2))
    axis = d.integer(1, len(shape))
    x = d.floats(*shape)
    other = tuple(1 if i + 1 == axis else n for i, n in enumerate(shape))
    indices, updates = d.integers(shape[axis - 1], *other), d.floats(*other)
    reduction = {"reduction": d.choose(("add", "mul"))} if d.opset >= 16 and d.chance(0.4) else {}
    return d.like(x, d.node(op, x.name, indices.name, updates.name, axis=axis, **reduction))


@step("ScatterND")
def scatter_nd(d: Draft, op: str) -> LiveValue:
    """Replace columns of [C, N, ...], where the batch is not the first axis."""
    shape = d.extents(d.integer(1, 2), 4)
    x, updates = d.move(d.floats(*shape), 1), d.move(d.floats(1, *shape[1:]), 1)
    indices = d.constant(np.array([[d.integer(0, shape[0] - 1)]], np.int64))
    return d.like(x, d.node(op, x.name, indices, updates.name))


@step("Compress", since=9)
def compress(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    axis = d.choose(x.inner)
    kept = d.rng.random(x.shape[axis]) < 0.6
    kept[0] = True
    shape = tuple(int(kept.sum()) if i == axis else n for i, n in enumerate(x.shape))
    return d.like(x, d.node(op, x.name, d.constant(kept), axis=axis), shape=shape)


@step("ReverseSequence", since=10)
def reverse_sequence(d: Draft, op: str) -> LiveValue:
    time = d.integer(2, 4)
    x, lengths = d.floats(time, *d.extents(d.integer(0, 1), 4)), d.lengths(time, "int64")
    if d.chance():
        return d.like(x, d.node(op, x.name, lengths.name, batch_axis=0, time_axis=1))
    x = d.move(x, 1)
    return d.like(x, d.node(op, x.name, lengths.name))


@step("DepthToSpace", "SpaceToDepth")
def move_blocks(d: Draft, op: str) -> LiveValue:
    if op == "SpaceToDepth":
        x = d.floats(2, 4, 2)
        return d.like(x, d.node(op, x.name, blocksize=2), shape=(ROWS, 8, 2, 1))
    x = d.floats(4, 2, 3)
    mode = {"mode": d.choose(("DCR", "CRD"))} if d.opset >= 11 else {}
    return d.like(x, d.node(op, x.name, blocksize=2, **mode), shape=(ROWS, 1, 4, 6))


@step("CenterCropPad")
def crop_center(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(2))
    sizes = d.extents(2)
    return d.like(x, d.node(op, x.name, d.whole(*sizes), axes=[1, 2]), shape=(ROWS, *sizes))


@step("Col2Im")
def fold_columns(d: Draft, op: str) -> LiveValue:
    x = d.floats(8, 4)
    return d.like(x, d.node(op, x.name, d.whole(4, 4), d.whole(2, 2), strides=[2, 2]), shape=(ROWS, 2, 4, 4))


@step("com.microsoft.UnfoldTensor")
def unfold(d: Draft, op: str) -> LiveValue:
    x = d.floats(2, 5)
    return d.like(x, d.node(op, x.name, dim=2, size=2, step=1), shape=(ROWS, 2, 4, 2))


@step("Trilu", "com.microsoft.Trilu")
def keep_triangle(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(2, 3), 4))
    extra = [d.constant(np.int64(d.integer(-1, 1)))] if d.chance() else []
    return d.like(x, d.node(op, x.name, *extra, upper=d.integer(0, 1)))


@step("Upsample", until=9)
def upsample(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(3, 3))
    shape = (ROWS, x.shape[1], x.shape[2] * 2, x.shape[3] * 2)
    if d.opset >= 9:
        return d.like(
            x, d.node(op, x.name, d.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest"), shape=shape
        )
    return d.like(x, d.node(op, x.name, scales=[1.0, 1.0, 2.0, 2.0], mode="nearest"), shape=shape)


@step("Resize", since=10)
def resize(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(3, 3))
    channels, height, width = x.shape[1:]
    shape = (ROWS, channels, height * 2, width * 2)
    mode = d.choose(("nearest", "linear"))
    scales = d.constant(np.array([1, 1, 2, 2], np.float32))
    if d.opset == 10:
        return d.like(x, d.node(op, x.name, scales, mode=mode), shape=shape)
    region = d.constant(np.zeros(0, np.float32)) if d.opset < 13 else ""
    if d.opset >= 18 and d.chance(0.3):
        name = d.node(op, x.name, "", "", d.whole(height * 2, width * 2), axes=[2, 3], mode=mode)
        return d.like(x, name, shape=shape)
    if d.chance():
        return d.like(x, d.node(op, x.name, region, scales, mode=mode), shape=shape)
    first = d.slice(d.node("Shape", x.name), 0, 0, 2)
    sizes = d.node("Concat", first, d.whole(height * 2, width * 2), axis=0)
    empty = d.constant(np.zeros(0, np.float32)) if d.opset < 13 else ""
    return d.like(x, d.node(op, x.name, region, empty, sizes, mode=mode), shape=shape)


# Shapes, ranges and other values without rows


@step("Shape", "Size")
def scale_by_extent(d: Draft, op: str) -> LiveValue:
    """Divide by an extent other than the batch's."""
    x = d.floats(*d.extents(2))
    if op == "Shape":
        extent = d.node("Gather", d.node(op, x.name), d.constant(np.int64(d.integer(1, 2))), axis=0)
    else:
        extent = d.node(op, d.node("Gather", d.weights(2, 3), d.constant(np.int64(1))))
    return d.like(x, d.node("Div", x.name, d.cast(extent, "float32")))


@step("ConstantOfShape", since=9)
def fill(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(1, 2)))
    filler = helper.make_tensor("value", TensorProto.FLOAT, [1], [round(d.rng.normal(), 2)])
    filled = d.node(op, d.shape_of(x.shape, 1, x), value=filler)
    return d.like(x, d.node(d.choose(("Add", "Sub", "Max")) if d.opset >= 8 else "Add", x.name, filled))


@step("Range", since=11)
def add_positions(d: Draft, op: str) -> LiveValue:
    """Add the position on an axis that is not the batch."""
    x = d.floats(*d.extents(d.integer(1, 2)))
    limit = d.node("Gather", d.node("Shape", x.name), d.constant(np.int64(x.rank - 1)), axis=0)
    positions = d.node(op, d.constant(np.int64(0)), limit, d.constant(np.int64(1)))
    scaled = d.node("Mul", d.cast(positions, "float32"), d.constant(np.float32(0.2)))
    return d.like(x, d.bound(d.node("Add", x.name, scaled)))


@step("Range", since=11)
def mask_by_length(d: Draft, op: str) -> LiveValue:
    """Set to zero what stands past each row's length."""
    time = d.integer(2, 4)
    x, lengths = d.floats(time, *d.extents(1)), d.lengths(time, "int64")
    limit = d.node("Gather", d.node("Shape", x.name), d.constant(np.int64(1)), axis=0)
    positions = d.node(op, d.constant(np.int64(0)), limit, d.constant(np.int64(1)))
    inside = d.node("Less", d.unsqueeze(positions, 0), d.unsqueeze(lengths.name, 1))
    return d.like(x, d.node("Mul", x.name, d.unsqueeze(d.cast(inside, "float32"), 2)))


@step("EyeLike", since=9)
def multiply_by_identity(d: Draft, op: str) -> LiveValue:
    width = d.integer(2, 4)
    x = d.floats(width)
    return d.like(x, d.node("MatMul", x.name, d.node(op, d.weights(width, width), k=d.integer(0, 1))))


@step("NonZero", since=9)
def gather_marked_columns(d: Draft, op: str) -> LiveValue:
    width = d.integer(2, 5)
    marked = d.rng.random(width) < 0.6
    marked[0] = True
    x = d.floats(width)
    columns = d.squeeze(d.node(op, d.constant(marked.astype(np.float32))), 0)
    return d.like(x, d.node("Gather", x.name, columns, axis=1), shape=(ROWS, int(marked.sum())))


@step("Unique", "com.microsoft.Unique")
def gather_unique_columns(d: Draft, op: str) -> LiveValue:
    x = d.floats(4)
    table = d.constant(np.array([3, 1, 3, 0], np.float32))
    columns = d.node(op, table) if op == "Unique" else d.nodes(op, [table], 3)[0]
    return d.like(x, d.node("Gather", x.name, d.cast(columns, "int64"), axis=1), shape=(ROWS, 3))


@step("HannWindow", "HammingWindow", "BlackmanWindow")
def apply_window(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(1), d.integer(3, 6))
    window = d.node(op, d.constant(np.int64(x.shape[-1])), periodic=d.integer(0, 1))
    return d.like(x, d.node("Mul", x.name, window))


@step("MelWeightMatrix")
def apply_mel_filters(d: Draft, op: str) -> LiveValue:
    x = d.floats(3, 9)
    numbers = [d.constant(np.int64(n)) for n in (4, 16, 8000)]
    edges = [d.constant(np.float32(n)) for n in (0, 4000)]
    return d.like(x, d.bound(d.node("MatMul", x.name, d.node(op, *numbers, *edges))), shape=(ROWS, 3, 4))


@step("Constant")
def add_constant(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    if d.opset >= 12:
        made = d.node(op, value_float=round(d.rng.normal(), 3))
    else:
        made = d.node(op, value=helper.make_tensor("c", TensorProto.FLOAT, [], [0.25]))
    return d.like(x, d.bound(d.node("Add", x.name, made)))


@step("OneHot", since=9)
def encode_one_hot(d: Draft, op: str) -> LiveValue:
    x = d.integers(5, *d.extents(d.integer(0, 1)))
    values = d.constant(np.array([0, 1], np.float32))
    axis = d.integer(0, x.rank) if d.opset >= 11 else -1
    position = axis if axis >= 0 else x.rank
    shape = (*x.shape[:position], 5, *x.shape[position:])
    return d.like(x, d.node(op, x.name, d.whole(5), values, axis=axis), kind="float32", shape=shape)


# Reductions and normalisations over other axes


@step("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")
@step("ReduceLogSumExp", "ReduceSumSquare", "ReduceLogSum")
def reduce_inner(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    axes = sorted({d.choose(x.inner) for _ in range(d.integer(1, 2))})
    keepdims = d.chance()
    name = (
        d.node("Add", d.node("Abs", x.name), d.constant(np.float32(0.5))) if op == "ReduceLogSum" else x.name
    )
    written = [d.signed(axis, x.rank) if d.opset >= 13 else axis for axis in axes]
    made = d.reduce(op, name, written, keepdims=keepdims)
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keepdims or i not in axes)
    return d.like(x, made if op in {"ReduceMean", "ReduceMax", "ReduceMin"} else d.bound(made), shape=shape)


@step("ReduceSum", "ReduceMax", "ReduceMean")
def reduce_integers(d: Draft, op: str) -> LiveValue:
    x = d.integers(
        5, *d.extents(2), kind=d.choose(("int64", "int32")) if op != "ReduceMax" or d.opset >= 12 else "int32"
    )
    return d.like(x, d.reduce(op, x.name, [1], keepdims=False), shape=(ROWS, x.shape[2]))


@step("ArgMax", "ArgMin")
def find_extreme(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    axis = d.choose(x.inner)
    keepdims = d.chance()
    shape = tuple(1 if i == axis else n for i, n in enumerate(x.shape) if keepdims or i != axis)
    last = {"select_last_index": 1} if d.opset >= 12 and d.chance(0.3) else {}
    name = d.node(op, x.name, axis=d.signed(axis, x.rank), keepdims=int(keepdims), **last)
    return d.like(x, name, kind="int64", shape=shape, limit=x.shape[axis])


@step("TopK")
def find_greatest(d: Draft, op: str) -> list[LiveValue]:
    del op
    x = d.any_floats(min_rank=2)
    axis = d.choose(x.inner)
    count = d.integer(1, x.shape[axis])
    shape = tuple(count if i == axis else n for i, n in enumerate(x.shape))
    largest = {"largest": d.integer(0, 1)} if d.opset >= 11 else {}
    values, indices = d.top_k(x.name, count, axis, **largest)
    return [
        d.like(x, values, shape=shape),
        d.like(x, indices, kind="int64", shape=shape, limit=x.shape[axis]),
    ]


@step("CumSum", "CumProd", since=11)
def accumulate(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    axis = d.constant(np.int64(d.signed(d.choose(x.inner), x.rank)))
    return d.like(x, d.bound(d.node(op, x.name, axis, exclusive=d.integer(0, 1), reverse=d.integer(0, 1))))


@step("Softmax", "LogSoftmax", "Hardmax")
def normalize_exponents(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    if d.opset < 13:  # all axes from this one on become one
        x = x if x.axis < x.rank - 1 else d.move(x, 0)
        return d.like(x, d.node(op, x.name, axis=d.integer(x.axis + 1, x.rank - 1)))
    if x.axis < x.rank - 1 and d.chance(0.3):
        return d.like(x, d.node(op, x.name))
    return d.like(x, d.node(op, x.name, axis=d.signed(d.choose(x.inner), x.rank)))


@step("LayerNormalization", "RMSNormalization")
def normalize_layer(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(1, 3)))
    axis = d.integer(1, x.rank - 1) if op == "LayerNormalization" else x.rank - 1
    shape = x.shape[axis:]
    inputs = [d.positive(*shape), *([d.weights(*shape)] if op == "LayerNormalization" and d.chance() else [])]
    return d.like(x, d.node(op, x.name, *inputs, axis=d.signed(axis, x.rank)))


@step("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization")
def normalize_skip(d: Draft, op: str) -> LiveValue:
    shape = d.extents(2)
    x = d.floats(*shape)
    skip = d.floats(*shape).name if d.chance(0.7) else d.weights(*shape)
    beta = [d.weights(shape[-1])] if op.endswith("SkipLayerNormalization") else []
    extra = [d.weights(shape[-1])] if d.chance() else []
    return d.like(x, d.node(op, x.name, skip, d.positive(shape[-1]), *beta, *extra))


@step("LpNormalization")
def normalize_lp(d: Draft, op: str) -> LiveValue:
    x = d.any_floats(min_rank=2)
    shifted = d.node("Add", d.node("Abs", x.name), d.constant(np.float32(0.1)))
    return d.like(x, d.node(op, shifted, axis=d.signed(d.choose(x.inner), x.rank), p=d.integer(1, 2)))


@step("MeanVarianceNormalization", since=9)
def normalize_mean_variance(d: Draft, op: str) -> LiveValue:
    if d.scope.is_function and d.opset >= 18:  # ONNX fails to infer shapes in such a body
        return apply_unary(d, "Tanh")
    x = d.floats(d.integer(1, 3), d.integer(2, 3), 2)
    # a variance of zero comes out as NaN
    varied = d.node("Add", d.node("Tanh", x.name), d.weights(x.shape[1], *x.shape[2:]))
    return d.like(x, d.bound(d.node(op, varied, axes=d.choose(([2, 3], [1, 2, 3])))))


@step("BatchNormalization")
def normalize_batch(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(1, 3)))
    channels = x.shape[1]
    inputs = [d.positive(channels), d.weights(channels), d.weights(channels), d.positive(channels)]
    return d.like(x, d.node(op, x.name, *inputs, epsilon=1e-3))


@step("InstanceNormalization")
def normalize_instance(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(2, 3)))
    return d.like(x, d.bound(d.node(op, x.name, d.positive(x.shape[1]), d.weights(x.shape[1]))))


@step("GroupNormalization")
def normalize_group(d: Draft, op: str) -> LiveValue:
    x = d.floats(4, *d.extents(2, 3))
    count = 2 if d.opset < 21 else 4
    return d.like(x, d.bound(d.node(op, x.name, d.positive(count), d.weights(count), num_groups=2)))


@step("LRN")
def normalize_response(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(3))
    return d.like(x, d.node(op, x.name, size=3))


# Products


@step("MatMul")
def multiply(d: Draft, op: str) -> LiveValue:
    match d.integer(0, 3):
        case 0:  # rows stand on the last but one axis, weights behind
            x = d.any_floats(min_rank=2)
            x = x if x.axis < x.rank - 1 else d.move(x, 0)
            width, count = x.shape[-1], d.integer(1, 5)
            name = d.node(op, x.name, d.weights(width, count, fan_in=width))
            return d.like(x, d.bound(name) if d.chance() else name, shape=(*x.shape[:-1], count))
        case 1:  # weights before the transposed rows
            x = d.any_floats(min_rank=2)
            x = d.move(x, x.rank - 1)
            width, count = x.shape[-2], d.integer(1, 5)
            name = d.node(op, d.weights(count, width, fan_in=width), x.name)
            return d.like(x, d.bound(name), shape=(*x.shape[:-2], count, ROWS))
        case 2:  # a product for each row
            height, width, count = d.extents(3, 4)
            x, y = d.floats(height, width), d.floats(width, count)
            return d.like(x, d.bound(d.node(op, x.name, y.name)), shape=(ROWS, height, count))
        case _:  # a product for each row and each head, one side without heads
            height, width, count = d.extents(3, 3)
            x, y = d.floats(2, height, width), d.floats(1, width, count)
            return d.like(x, d.bound(d.node(op, x.name, y.name)), shape=(ROWS, 2, height, count))


@step("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul")
def multiply_fused(d: Draft, op: str) -> LiveValue:
    height, width, count = d.extents(3, 4)
    x, y = d.floats(height, width), d.floats(count, width)
    return d.like(x, d.bound(d.node(op, x.name, y.name, transB=1, alpha=0.5)), shape=(ROWS, height, count))


@step("Gemm", "com.microsoft.FusedGemm")
def multiply_general(d: Draft, op: str) -> LiveValue:
    width, count = d.extents(2)
    x = d.floats(width)
    x = d.move(x, d.integer(0, 1))
    is_turned = x.axis == 1
    turn = d.integer(0, 1)
    matrix = d.weights(*((count, width) if turn else (width, count)), fan_in=width)
    extra = (
        [d.weights(*d.choose(((count,), (1, count), (1,))))]
        if d.opset >= 11 and d.chance()
        else [d.weights(count)]
    )
    more = {"activation": "Relu"} if op != "Gemm" else {}
    name = d.node(op, x.name, matrix, *extra, transA=int(is_turned), transB=turn, **more)
    return d.plain(d.bound(name), count)


@step("Einsum")
def sum_products(d: Draft, op: str) -> LiveValue:
    height, width, count = d.extents(3, 4)
    x = d.floats(height, width)
    match d.integer(0, 4):
        case 4:
            return d.plain(d.node(op, x.name, equation="...ij->...ji"), width, height)
        case 0:
            name = d.node(op, x.name, d.weights(width, count, fan_in=width), equation="btc,cd->btd")
            return d.plain(name, height, count)
        case 1:
            y = d.floats(count, width)
            return d.plain(d.bound(d.node(op, x.name, y.name, equation="bqc,bkc->bqk")), height, count)
        case 2:
            name = d.node(op, d.move(x, 1).name, d.weights(width, fan_in=width), equation="tbc,c->bt")
            return d.plain(d.bound(name), height)
        case _:
            return d.like(x, d.node(op, x.name, equation="bij->ijb"), shape=(height, width, ROWS))


@step("Det", "com.microsoft.Inverse")
def invert(d: Draft, op: str) -> LiveValue:
    x = d.floats(3, 3)
    scaled = d.node("Add", d.node("Tanh", x.name), d.constant(np.float32(5 * np.eye(3))))
    name = d.bound(d.node(op, scaled))
    return d.like(x, name, shape=(ROWS,)) if op == "Det" else d.like(x, name)


@step("com.microsoft.CDist")
def measure_distances(d: Draft, op: str) -> LiveValue:
    """Distances of rows to constants: the operator takes no further batch axis."""
    width = d.integer(2, 4)
    x = d.floats(width)
    return d.plain(d.node(op, x.name, d.weights(3, width), metric=d.choose(("euclidean", "sqeuclidean"))), 3)


# Convolutions, pools, images


@step("Conv", "com.microsoft.FusedConv")
def convolve(d: Draft, op: str) -> LiveValue:
    dims = d.integer(1, 3) if op == "Conv" else 2
    groups = d.integer(1, 2)
    channels, count = groups * d.integer(1, 2), groups * d.integer(1, 2)
    extent, kernel, stride = d.integer(3, 4), d.integer(1, 3), d.integer(1, 2)
    x = d.floats(channels, *[extent] * dims)
    matrix = d.weights(count, channels // groups, *[kernel] * dims, fan_in=channels // groups * kernel**dims)
    bias = [d.weights(count)] if d.chance() else []
    if d.chance(0.3):
        form: dict[str, Any] = {"auto_pad": d.choose(("SAME_UPPER", "SAME_LOWER"))}
        out = -(-extent // stride)
    else:
        padding = d.integer(0, kernel // 2)
        form, out = {"pads": [padding] * (2 * dims)}, (extent + 2 * padding - kernel) // stride + 1
    more = {"activation": "Relu"} if op != "Conv" else {}
    name = d.node(
        op,
        x.name,
        matrix,
        *bias,
        kernel_shape=[kernel] * dims,
        strides=[stride] * dims,
        group=groups,
        **form,
        **more,
    )
    return d.plain(d.bound(name), count, *[out] * dims)


@step("ConvTranspose", "com.microsoft.ConvTransposeWithDynamicPads")
def convolve_transposed(d: Draft, op: str) -> LiveValue:
    dims = d.integer(1, 2) if op == "ConvTranspose" else 2
    channels, count, extent, stride = d.integer(1, 3), d.integer(1, 3), d.integer(2, 3), d.integer(1, 2)
    x = d.floats(channels, *[extent] * dims)
    matrix = d.weights(channels, count, *[2] * dims, fan_in=channels)
    extra = [d.whole(*[0] * (2 * dims))] if op != "ConvTranspose" else []
    name = d.node(op, x.name, matrix, *extra, strides=[stride] * dims, kernel_shape=[2] * dims)
    return d.plain(d.bound(name), count, *[(extent - 1) * stride + 2] * dims)


@step("MaxPool", "AveragePool", "LpPool")
def pool(d: Draft, op: str) -> LiveValue:
    dims = d.integer(1, 3)
    extent, stride = d.integer(2, 4), d.integer(1, 2)
    x = d.floats(d.integer(1, 3), *[extent] * dims)
    ceil = (
        {"ceil_mode": 1}
        if d.opset >= 10 and op != "LpPool" and (extent - 2) % stride == 0 and d.chance()
        else {}
    )
    name = d.node(op, x.name, kernel_shape=[2] * dims, strides=[stride] * dims, **ceil)
    return d.plain(
        name if op != "LpPool" else d.bound(name), x.shape[1], *[(extent - 2) // stride + 1] * dims
    )


@step("MaxUnpool", since=9)
def unpool(d: Draft, op: str) -> LiveValue:
    """Put maxima back; the indices count through the whole batch, and so does the operator."""
    x = d.floats(2, 4, 4)
    values, indices = d.nodes("MaxPool", [x.name], 2, kernel_shape=[2, 2], strides=[2, 2])
    return d.like(x, d.node(op, values, indices, kernel_shape=[2, 2], strides=[2, 2]))


@step("com.microsoft.NhwcMaxPool", since=10)
def pool_channels_last(d: Draft, op: str) -> LiveValue:
    x = d.quantized(4, 4, 2)
    return d.dequantized(
        d.like(x, d.node(op, x.name, kernel_shape=[2, 2], strides=[2, 2]), shape=(ROWS, 2, 2, 2))
    )


@step("GlobalAveragePool", "GlobalMaxPool")
@step("GlobalLpPool", until=21)
def pool_globally(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(3, 3))
    name = d.node(op, x.name)
    return d.plain(name if op != "GlobalLpPool" else d.bound(name), x.shape[1], 1, 1)


@step("GridSample", "com.microsoft.GridSample")
def sample_grid(d: Draft, op: str) -> LiveValue:
    x, grid = d.floats(2, 3, 3), d.floats(2, 4, 2)
    modes = ("bilinear", "nearest") if op != "GridSample" or d.opset < 20 else ("linear", "nearest")
    padding = d.choose(("zeros", "border", "reflection"))
    return d.plain(
        d.node(op, x.name, d.node("Tanh", grid.name), mode=d.choose(modes), padding_mode=padding), 2, 2, 4
    )


@step("AffineGrid")
def make_grid(d: Draft, op: str) -> LiveValue:
    x = d.floats(2, 3)
    return d.plain(d.bound(d.node(op, x.name, d.shape_of((ROWS, 1, 2, 3), 1, x))), 2, 3, 2)


@step("RoiAlign", since=11, until=21)
@step("com.microsoft.CropAndResize", since=11)
def align_regions(d: Draft, op: str) -> LiveValue:
    """Take one region from each row, with the row's own number as its index."""
    x, corners = d.floats(2, 4, 4), d.floats(2)
    positions = d.node("Range", d.constant(np.int64(0)), d.squeeze(d.rows(x), 0), d.constant(np.int64(1)))
    low = d.node("Sigmoid", corners.name)
    high = d.node("Add", low, d.constant(np.float32(2 if op == "RoiAlign" else 0.3)))
    regions = d.node("Concat", low, high, axis=1)
    if op == "RoiAlign":
        name = d.node(op, x.name, regions, positions, output_height=2, output_width=2)
    else:
        name = d.node(op, x.name, regions, d.cast(positions, "int32"), d.constant(np.array([2, 2], np.int32)))
    return d.plain(name, 2, 2, 2)


@step("MaxRoiPool", since=11, until=21)
def pool_regions(d: Draft, op: str) -> LiveValue:
    x = d.floats(2, 4, 4)
    positions = d.node("Range", d.constant(np.int64(0)), d.squeeze(d.rows(x), 0), d.constant(np.int64(1)))
    first = d.unsqueeze(d.cast(positions, "float32"), 1)
    box = d.node("Expand", d.constant(np.array([[0, 0, 3, 3]], np.float32)), d.shape_of((ROWS, 4), 1, x))
    regions = d.node("Concat", first, box, axis=1)
    return d.plain(d.node(op, x.name, regions, pooled_shape=[2, 2]), 2, 2, 2)


@step("DeformConv", since=19)
def convolve_deformed(d: Draft, op: str) -> LiveValue:
    x, offsets = d.floats(2, 3, 3), d.floats(8, 2, 2)
    name = d.node(
        op,
        x.name,
        d.weights(2, 2, 2, 2, fan_in=8),
        d.node("Tanh", offsets.name),
        kernel_shape=[2, 2],
        pads=[0] * 4,
    )
    return d.plain(d.bound(name), 2, 2, 2)


# Signals


@step("DFT")
def transform_fourier(d: Draft, op: str) -> LiveValue:
    x = d.floats(4, 1)
    name = d.node(op, x.name, "", d.constant(np.int64(1))) if d.opset >= 20 else d.node(op, x.name, axis=1)
    return d.plain(d.bound(name), 4, 2)


@step("STFT")
def transform_frames(d: Draft, op: str) -> LiveValue:
    x = d.floats(8)
    x = d.like(x, d.unsqueeze(x.name, 2), shape=(ROWS, 8, 1)) if d.chance() else x
    window = d.node("HannWindow", d.constant(np.int64(4)))
    name = d.node(op, x.name, d.constant(np.int64(2)), window, d.constant(np.int64(4)), onesided=1)
    return d.plain(d.bound(name), 3, 3, 2)


# Recurrent networks


@step("LSTM", "GRU", "RNN")
def recur(d: Draft, op: str) -> list[LiveValue]:
    time, width, hidden = d.integer(2, 3), d.integer(1, 3), d.integer(1, 3)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    direction = d.choose(("forward", "reverse", "bidirectional"))
    count = 2 if direction == "bidirectional" else 1
    x = d.move(d.floats(time, width), 1)
    inputs = [
        x.name,
        d.weights(count, gates * hidden, width, fan_in=width),
        d.weights(count, gates * hidden, hidden),
    ]
    inputs.append(d.weights(count, 2 * gates * hidden) if d.chance() else "")
    inputs.append(d.lengths(time).name if d.chance(0.4) else "")
    if d.chance():
        states = [initial_state(d, count, hidden, x) for _ in range(2 if op == "LSTM" else 1)]
        inputs += states
    while not inputs[-1]:
        inputs.pop()
    extra = {"linear_before_reset": d.integer(0, 1)} if op == "GRU" else {}
    outputs = d.nodes(op, inputs, 3 if op == "LSTM" else 2, hidden_size=hidden, direction=direction, **extra)
    state = (count, ROWS, hidden)
    made = [LiveValue(outputs[0], "float32", (time, count, ROWS, hidden))]
    return made + [LiveValue(name, "float32", state) for name in outputs[1:]]


def initial_state(d: Draft, count: int, hidden: int, x: LiveValue) -> str:
    """Return [count, N, hidden]: zeros whose shape is computed, a learned state, or a value of the rows."""
    shape = (count, ROWS, hidden)
    match d.integer(0, 2):
        case 0 if d.opset >= 9:
            filler = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
            return d.node("ConstantOfShape", d.shape_of(shape, 1, x), value=filler)
        case 1 if d.opset >= 8:
            return d.node("Expand", d.weights(count, 1, hidden), d.shape_of(shape, 1, x))
    return d.move(d.floats(count, hidden), 1).name


# Quantised operators


@step("QuantizeLinear", "DequantizeLinear", since=10)
def quantize(d: Draft, op: str) -> list[LiveValue]:
    shape = d.extents(d.integer(1, 2))
    if d.opset >= 13 and d.chance(0.4):
        axis = d.integer(1, len(shape))
        extent = shape[axis - 1]
        scale, zero = (
            d.constant(d.rng.uniform(0.03, 0.1, extent).astype(np.float32)),
            d.constant(np.zeros(extent, np.int8)),
        )
        x = d.floats(*shape)
        quantised = d.node("QuantizeLinear", x.name, scale, zero, axis=axis)
        return [d.like(x, d.node("DequantizeLinear", quantised, scale, zero, axis=axis))]
    # from opset 21 on ONNX Runtime 1.32 refuses int8 before a Reshape
    x = d.quantized(*shape, kind=d.choose(("uint8", "int8")) if d.opset < 21 else "uint8")
    return [x, d.dequantized(x)] if op == "QuantizeLinear" else [d.dequantized(x)]


@step("com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear")
def quantize_contrib(d: Draft, op: str) -> LiveValue:
    del op
    x = d.floats(*d.extents(1))
    scale, zero = d.scale()
    return d.like(
        x,
        d.node(
            "com.microsoft.DequantizeLinear",
            d.node("com.microsoft.QuantizeLinear", x.name, scale, zero),
            scale,
            zero,
        ),
    )


@step("QLinearConv", "com.microsoft.QLinearConv", since=10)
def convolve_quantized(d: Draft, op: str) -> LiveValue:
    x = d.quantized(2, 3, 3)
    kernel, zero = d.constant(d.rng.integers(0, 255, (2, 2, 2, 2)), "uint8"), d.constant(np.uint8(128))
    out = d.constant(np.float32(0.1)), d.constant(np.uint8(128))
    name = d.node(op, x.name, *d.scale(), kernel, d.constant(np.float32(0.01)), zero, *out)
    return d.dequantized(d.like(x, name, shape=(ROWS, 2, 2, 2)))


@step("QLinearMatMul", since=10)
def multiply_quantized(d: Draft, op: str) -> LiveValue:
    x = d.quantized(*d.extents(d.integer(1, 2)))
    matrix = d.constant(d.rng.integers(0, 255, (x.shape[-1], 3)), "uint8")
    name = d.node(op, x.name, *d.scale(), matrix, *d.scale(), *d.scale())
    return d.dequantized(d.like(x, name, shape=(*x.shape[:-1], 3)))


@step("MatMulInteger", "com.microsoft.MatMulIntegerToFloat", since=10)
def multiply_integers(d: Draft, op: str) -> LiveValue:
    x = d.quantized(*d.extents(d.integer(1, 2)))
    matrix = d.constant(d.rng.integers(0, 255, (x.shape[-1], 3)), "uint8")
    zero = d.constant(np.uint8(128))
    shape = (*x.shape[:-1], 3)
    if op == "MatMulInteger":
        return d.like(x, d.node(op, x.name, matrix, zero, zero), kind="int32", shape=shape)
    scale = d.constant(SMALL), d.constant(SMALL)
    return d.like(x, d.bound(d.node(op, x.name, matrix, *scale, zero, zero)), kind="float32", shape=shape)


@step("com.microsoft.MatMulInteger16")
def multiply_short_integers(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(2))
    name = d.node("Cast", d.node("Mul", x.name, d.constant(np.float32(9))), to=TensorProto.INT16)
    product = d.node(op, name, d.constant(d.rng.integers(-9, 9, (x.shape[-1], 3)), "int16"))
    return d.like(x, product, kind="int32", shape=(*x.shape[:-1], 3))


@step("ConvInteger", since=10)
def convolve_integers(d: Draft, op: str) -> LiveValue:
    x = d.quantized(2, 3, 3)
    kernel, zero = d.constant(d.rng.integers(0, 255, (2, 2, 2, 2)), "uint8"), d.constant(np.uint8(128))
    return d.like(x, d.node(op, x.name, kernel, zero, zero), kind="int32", shape=(ROWS, 2, 2, 2))


@step("com.microsoft.QLinearAdd", "com.microsoft.QLinearMul", since=10)
def combine_quantized(d: Draft, op: str) -> LiveValue:
    shape = d.extents(2)
    x, y = d.quantized(*shape), d.quantized(*shape)
    return d.dequantized(d.like(x, d.node(op, x.name, *d.scale(), y.name, *d.scale(), *d.scale())))


@step("com.microsoft.QLinearSigmoid", "com.microsoft.QLinearLeakyRelu", since=10)
def apply_quantized(d: Draft, op: str) -> LiveValue:
    x = d.quantized(*d.extents(2))
    return d.dequantized(d.like(x, d.node(op, x.name, *d.scale(), *d.scale())))


@step("com.microsoft.QLinearSoftmax", since=10)
def normalize_quantized(d: Draft, op: str) -> LiveValue:
    x = d.quantized(*d.extents(2))
    return d.dequantized(d.like(x, d.node(op, x.name, *d.scale(), *d.scale(), axis=2, opset=13)))


@step("com.microsoft.QLinearConcat", since=10)
def concatenate_quantized(d: Draft, op: str) -> LiveValue:
    x, y = d.quantized(2, 3), d.quantized(1, 3)
    name = d.node(op, *d.scale(), x.name, *d.scale(), y.name, *d.scale(), axis=1)
    return d.dequantized(d.like(x, name, shape=(ROWS, 3, 3)))


@step("com.microsoft.QLinearWhere", since=10)
def choose_quantized(d: Draft, op: str) -> LiveValue:
    shape = d.extents(2)
    flags, x, y = d.booleans(*shape), d.quantized(*shape), d.quantized(*shape)
    return d.dequantized(
        d.like(x, d.node(op, flags.name, x.name, *d.scale(), y.name, *d.scale(), *d.scale()))
    )


@step("com.microsoft.QLinearGlobalAveragePool", "com.microsoft.QLinearAveragePool", since=10)
def pool_quantized(d: Draft, op: str) -> LiveValue:
    x = d.quantized(2, 2, 2)
    form = {} if "Global" in op else {"kernel_shape": [2, 2]}
    return d.dequantized(d.like(x, d.node(op, x.name, *d.scale(), *d.scale(), **form), shape=(ROWS, 2, 1, 1)))


@step("com.microsoft.QGemm", since=10)
def multiply_general_quantized(d: Draft, op: str) -> LiveValue:
    x = d.quantized(3)
    matrix = d.constant(d.rng.integers(0, 255, (3, 2)), "uint8")
    name = d.node(op, x.name, *d.scale(), matrix, *d.scale(), "", *d.scale())
    return d.dequantized(d.like(x, name, shape=(ROWS, 2)))


@step("com.microsoft.MatMulNBits")
def multiply_packed(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(0, 1)), 16)
    packed = d.constant(d.rng.integers(0, 255, (3, 1, 8)), "uint8")
    name = d.node(op, x.name, packed, d.constant(np.full(3, SMALL)), K=16, N=3, bits=4, block_size=16)
    return d.like(x, d.bound(name), shape=(*x.shape[:-1], 3))


@step("com.microsoft.GatherBlockQuantized")
def gather_quantized(d: Draft, op: str) -> LiveValue:
    x = d.integers(4, *d.extents(1))
    table = d.constant(d.rng.integers(0, 255, (4, 16)), "uint8")
    name = d.node(op, table, x.name, d.constant(np.full((4, 1), SMALL)), block_size=16, bits=8)
    return d.like(x, d.bound(name), kind="float32", shape=(*x.shape, 16))


# Transformers


@step("com.microsoft.EmbedLayerNormalization")
def embed(d: Draft, op: str) -> LiveValue:
    time, width = d.integer(2, 4), d.integer(2, 4)
    ids = d.integers(7, time, kind="int32")
    segments = d.integers(2, time, kind="int32").name if d.chance() else ""
    mask = [d.integers(2, time, kind="int32").name] if d.chance() else []
    tables = [d.weights(7, width), d.weights(5, width), d.weights(2, width) if segments else ""]
    names = d.nodes(op, [ids.name, segments, *tables, d.positive(width), d.weights(width), *mask], 2)
    return d.plain(names[0], time, width)


@step("com.microsoft.Attention")
def attend(d: Draft, op: str) -> LiveValue:
    time, width = d.integer(2, 4), 4
    x = d.floats(time, width)
    mask = d.choose(([], [d.integers(2, time, kind="int32").name], [d.lengths(time).name]))
    name = d.node(
        op,
        x.name,
        d.weights(width, 12, fan_in=width),
        d.weights(12),
        *mask,
        num_heads=2,
        unidirectional=d.integer(0, 1),
    )
    return d.plain(name, time, width)


@step("com.microsoft.QAttention", since=10)
def attend_quantized(d: Draft, op: str) -> LiveValue:
    time, width = d.integer(2, 4), 4
    x = d.quantized(time, width)
    matrix = d.constant(d.rng.integers(0, 255, (width, 12)), "uint8")
    scale, zero = d.scale()
    name = d.node(
        op,
        x.name,
        matrix,
        d.weights(12),
        scale,
        d.constant(SMALL),
        "",
        zero,
        d.constant(np.uint8(128)),
        num_heads=2,
    )
    return d.plain(d.bound(name), time, width)


@step("com.microsoft.MultiHeadAttention")
def attend_cross(d: Draft, op: str) -> LiveValue:
    time, other, width = d.integer(1, 3), d.integer(1, 3), 4
    query, key, value = d.floats(time, width), d.floats(other, width), d.floats(other, width)
    bias = d.weights(12) if d.chance() else ""
    mask = d.choose(("", d.integers(2, other, kind="int32").name, d.lengths(other).name))
    inputs = [query.name, key.name, value.name, bias, mask]
    while not inputs[-1]:
        inputs.pop()
    return d.plain(d.node(op, *inputs, num_heads=2), time, width)


@step("com.microsoft.GroupQueryAttention", since=9)
def attend_grouped(d: Draft, op: str) -> LiveValue:
    time = d.integer(2, 3)
    query, key, value = d.floats(time, 32), d.floats(time, 16), d.floats(time, 16)
    last = d.cast(d.node("Sub", d.lengths(time, "int64").name, d.constant(np.int64(1))), "int32")
    total = d.constant(np.int32(time))
    past = [d.node("ConstantOfShape", d.shape_of((ROWS, 2, 0, 8), 1, query)) for _ in range(2)]
    inputs = [query.name, key.name, value.name, *past, last, total]
    return d.plain(d.nodes(op, inputs, 3, num_heads=4, kv_num_heads=2)[0], time, 32)


@step("Attention", since=23)
def attend_standard(d: Draft, op: str) -> LiveValue:
    time, other = d.integer(1, 3), d.integer(1, 3)
    causal = d.integer(0, 1)
    mask = d.choose(([], [d.weights(time, other)], [d.floats(1, time, other).name]))
    if d.chance():
        heads = d.choose((2, 4))
        query, key, value = d.floats(heads, time, 4), d.floats(2, other, 4), d.floats(2, other, 3)
        name = d.node(op, query.name, key.name, value.name, *mask, is_causal=causal)
        return d.plain(name, heads, time, 3)
    # as many heads of keys as of queries: for others ONNX infers the wrong width from three dimensions
    query, key, value = d.floats(time, 8), d.floats(other, 8), d.floats(other, 8)
    name = d.node(
        op, query.name, key.name, value.name, *mask, is_causal=causal, q_num_heads=2, kv_num_heads=2
    )
    return d.plain(name, time, 8)


@step("RotaryEmbedding", "com.microsoft.RotaryEmbedding")
def rotate(d: Draft, op: str) -> LiveValue:
    time = d.integer(2, 3)
    tables = [d.weights(4, 2), d.weights(4, 2)]
    positions = d.integers(4, time).name
    x = d.floats(2, time, 4)
    if op == "RotaryEmbedding":
        return d.like(x, d.bound(d.node(op, x.name, *tables, positions)))
    return d.like(x, d.bound(d.node(op, x.name, positions, *tables)))


@step("TensorScatter", since=24)
def update_cache(d: Draft, op: str) -> LiveValue:
    cache, update, starts = d.floats(2, 4, 3), d.floats(2, 2, 3), d.integers(3)
    return d.like(cache, d.node(op, cache.name, update.name, starts.name, axis=2))


@step("com.microsoft.GatedAdd")
def add_gated(d: Draft, op: str) -> LiveValue:
    shape = d.extents(d.integer(1, 2))
    x, y, gate = d.floats(*shape), d.floats(*shape), d.floats(*shape[:-1], 1)
    return d.like(x, d.bound(d.node(op, x.name, y.name, gate.name)))


@step("com.microsoft.Pad", since=11)
def pad_contrib(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(1))
    return d.like(x, d.node(op, x.name, d.whole(0, 1, 0, 2)), shape=(ROWS, x.shape[1] + 3))


@step("com.microsoft.Range")
def add_contrib_positions(d: Draft, op: str) -> LiveValue:
    x = d.floats(4)
    numbers = [d.constant(np.float32(n)) for n in (0, 1, 0.25)]
    return d.like(x, d.bound(d.node("Add", x.name, d.node(op, *numbers))))


@step("com.microsoft.GatedRMSNorm")
def normalize_gated(d: Draft, op: str) -> LiveValue:
    shape = d.extents(d.integer(1, 2))
    x, gate = d.floats(*shape), d.floats(*shape)
    return d.like(x, d.bound(d.node(op, x.name, d.positive(shape[-1]), gate.name)))


@step("com.microsoft.BranchwiseRMSNorm")
def normalize_branches(d: Draft, op: str) -> LiveValue:
    x = d.floats(2, 4)
    return d.like(x, d.node(op, x.name, d.positive(4), num_branches=2))


@step("com.microsoft.CausalConvWithState")
def convolve_causal(d: Draft, op: str) -> LiveValue:
    x = d.floats(3, d.integer(2, 4))
    return d.like(x, d.bound(d.nodes(op, [x.name, d.weights(3, 1, 2)], 2)[0]))


@step("com.microsoft.LinearAttention")
def attend_linear(d: Draft, op: str) -> LiveValue:
    time = d.integer(1, 3)
    query, key, value = (d.floats(time, 4) for _ in range(3))
    names = d.nodes(
        op, [query.name, key.name, value.name], 2, q_num_heads=2, kv_num_heads=2, update_rule="linear"
    )
    return d.plain(d.bound(names[0]), time, 4)


@step("com.microsoft.LinearAttentionGate")
def gate_linear_attention(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(2, 4))
    return d.like(x, d.bound(d.node(op, x.name, d.weights(x.shape[-1]), d.weights(x.shape[-1]))))


@step("com.microsoft.MRotaryEmbedding")
def rotate_sections(d: Draft, op: str) -> LiveValue:
    """Rotate by three positions, which have an axis before the batch."""
    time = d.integer(1, 3)
    x, positions = d.floats(time, 4), d.move(d.integers(4, 3, time), 1)
    tables = [d.weights(4, 2), d.weights(4, 2)]
    return d.like(
        x, d.bound(d.node(op, x.name, positions.name, *tables, mrope_section=[1, 1, 0], num_heads=1))
    )


@step("com.microsoft.WordConvEmbedding")
def embed_characters(d: Draft, op: str) -> LiveValue:
    x = d.integers(6, 5, kind="int32")
    # a word that begins with 0 is padding, for which ONNX Runtime returns memory that it has not written
    ids = d.node("Add", x.name, d.constant(np.int32(1)))
    tables = [d.weights(4, 1, 2, 3, fan_in=6), d.weights(4), d.weights(7, 3)]
    form = {"embedding_size": 4, "conv_window_size": 2, "char_embedding_size": 3}
    return d.plain(d.bound(d.node(op, ids, *tables, **form)), 4)


@step("com.microsoft.NGramRepeatBlock")
def block_repetitions(d: Draft, op: str) -> LiveValue:
    x, scores = d.integers(5, 4), d.floats(5)
    return d.like(scores, d.node("Tanh", d.node(op, x.name, scores.name, ngram_size=2)))


@step("com.microsoft.MoE")
def mix_experts(d: Draft, op: str) -> LiveValue:
    x, scores = d.floats(4), d.floats(2)
    inputs = [d.weights(2, 4, 8, fan_in=4), d.weights(2, 8), d.weights(2, 8, 4, fan_in=8)]
    return d.like(
        x, d.bound(d.node(op, x.name, scores.name, *inputs, k=d.integer(1, 2), activation_type="relu"))
    )


@step("com.microsoft.MatMulBnb4")
def multiply_bits(d: Draft, op: str) -> LiveValue:
    x = d.floats(16)
    packed = d.constant(d.rng.integers(0, 255, 24), "uint8")
    form = {"K": 16, "N": 3, "block_size": 16, "quant_type": d.integer(0, 1)}
    return d.plain(d.bound(d.node(op, x.name, packed, d.positive(3), **form)), 3)


@step("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", since=13)
def score_labels(d: Draft, op: str) -> LiveValue:
    x, labels = d.floats(4), d.integers(4)
    return d.plain(d.bound(d.node(op, x.name, labels.name, reduction="none")))


@step("BitCast")
def read_bits(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    bits = d.node(op, x.name, to=TensorProto.INT32)
    return d.like(x, d.node(op, bits, to=TensorProto.FLOAT))


# Classical models


@step("ai.onnx.ml.Scaler")
def scale_features(d: Draft, op: str) -> LiveValue:
    x = d.floats(3)
    return d.like(x, d.node(op, x.name, offset=[0.1, 0.2, 0.3], scale=[0.5, 0.7, 0.9]))


@step("ai.onnx.ml.Normalizer")
def normalize_features(d: Draft, op: str) -> LiveValue:
    x = d.floats(d.integer(2, 4))
    name = d.node("Add", d.node("Abs", x.name), d.constant(np.float32(0.1)))
    return d.like(x, d.node(op, name, norm=d.choose(("MAX", "L1", "L2"))))


@step("ai.onnx.ml.Binarizer")
def binarize(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    return d.like(x, d.node(op, x.name, threshold=0.1))


@step("ai.onnx.ml.Imputer")
def impute(d: Draft, op: str) -> LiveValue:
    x = d.floats(3)
    name = d.node("Log", x.name)
    return d.like(
        x, d.bound(d.node(op, name, imputed_value_floats=[0.1, 0.2, 0.3], replaced_value_float=float("nan")))
    )


@step("ai.onnx.ml.OneHotEncoder")
def encode_categories(d: Draft, op: str) -> LiveValue:
    if d.chance():
        x = d.strings(*d.extents(d.integer(0, 1)))
        name = d.node(op, x.name, cats_strings=["cat", "dog", "owl"], zeros=1)
    else:
        x = d.integers(4, *d.extents(d.integer(0, 1)))
        name = d.node(op, x.name, cats_int64s=[0, 1, 2], zeros=1)
    return d.like(x, name, kind="float32", shape=(*x.shape, 3))


@step("ai.onnx.ml.LabelEncoder")
def encode_labels(d: Draft, op: str) -> LiveValue:
    x = d.strings(*d.extents(d.integer(0, 1)))
    name = d.node(op, x.name, keys_strings=list(WORDS[:5]), values_int64s=[4, 3, 2, 1, 0], default_int64=5)
    return d.like(x, name, kind="int64", limit=6)


@step("ai.onnx.ml.CategoryMapper")
def map_categories(d: Draft, op: str) -> LiveValue:
    x = d.strings(*d.extents(d.integer(0, 1)))
    name = d.node(op, x.name, cats_strings=["cat", "dog"], cats_int64s=[0, 1], default_int64=2)
    return d.like(x, name, kind="int64", limit=3)


@step("ai.onnx.ml.ArrayFeatureExtractor")
def extract_features(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(1, 2)))
    columns = d.rng.integers(0, x.shape[-1], 2)
    return d.like(x, d.node(op, x.name, d.constant(columns)), shape=(*x.shape[:-1], 2))


@step("ai.onnx.ml.FeatureVectorizer")
def join_features(d: Draft, op: str) -> LiveValue:
    x, y = d.floats(3), d.floats(2)
    return d.plain(d.node(op, x.name, y.name, inputdimensions=[3, 2]), 5)


@step("ai.onnx.ml.LinearRegressor")
def regress_linear(d: Draft, op: str) -> LiveValue:
    x = d.floats(3)
    coefficients = [round(number, 3) for number in d.rng.normal(size=6) / 3]
    return d.plain(d.node(op, x.name, coefficients=coefficients, intercepts=[0.1, -0.2], targets=2), 2)


@step("ai.onnx.ml.LinearClassifier")
def classify_linear(d: Draft, op: str) -> list[LiveValue]:
    x = d.floats(3)
    coefficients = [round(number, 3) for number in d.rng.normal(size=6)]
    labels, scores = d.nodes(
        op,
        [x.name],
        2,
        coefficients=coefficients,
        intercepts=[0.1, -0.2],
        classlabels_ints=[0, 1],
        post_transform=d.choose(("NONE", "SOFTMAX", "LOGISTIC")),
    )
    return [d.plain(labels, kind="int64", limit=2), d.plain(d.bound(scores), 2)]


TREE = {
    "nodes_treeids": [0, 0, 0],
    "nodes_nodeids": [0, 1, 2],
    "nodes_featureids": [1, 0, 0],
    "nodes_values": [0.2, 0.0, 0.0],
    "nodes_hitrates": [1.0, 1.0, 1.0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
    "nodes_truenodeids": [1, 0, 0],
    "nodes_falsenodeids": [2, 0, 0],
    "nodes_missing_value_tracks_true": [0, 0, 0],
}


@step("ai.onnx.ml.TreeEnsembleRegressor")
def regress_trees(d: Draft, op: str) -> LiveValue:
    x = d.floats(3)
    targets = {
        "target_treeids": [0, 0],
        "target_nodeids": [1, 2],
        "target_ids": [0, 0],
        "target_weights": [0.3, -0.8],
    }
    return d.plain(d.node(op, x.name, n_targets=1, **TREE, **targets), 1)


@step("ai.onnx.ml.TreeEnsembleClassifier")
def classify_trees(d: Draft, op: str) -> list[LiveValue]:
    x = d.floats(3)
    classes = {
        "class_treeids": [0, 0],
        "class_nodeids": [1, 2],
        "class_ids": [0, 1],
        "class_weights": [0.7, 0.9],
    }
    if d.chance():
        labels, scores = d.nodes(op, [x.name], 2, classlabels_int64s=[0, 1], **TREE, **classes)
        return [d.plain(labels, kind="int64", limit=2), d.plain(scores, 2)]
    labels, scores = d.nodes(op, [x.name], 2, classlabels_strings=["cat", "dog"], **TREE, **classes)
    return [d.plain(labels, kind="string"), d.plain(scores, 2)]


@step("ai.onnx.ml.TreeEnsemble")
def evaluate_trees(d: Draft, op: str) -> LiveValue:
    x = d.floats(3)
    return d.plain(
        d.node(
            op,
            x.name,
            n_targets=1,
            nodes_featureids=[1],
            nodes_splits=helper.make_tensor("s", TensorProto.FLOAT, [1], [0.2]),
            nodes_modes=helper.make_tensor("m", TensorProto.UINT8, [1], [0]),
            nodes_truenodeids=[0],
            nodes_falsenodeids=[1],
            nodes_trueleafs=[1],
            nodes_falseleafs=[1],
            tree_roots=[0],
            leaf_targetids=[0, 0],
            leaf_weights=helper.make_tensor("w", TensorProto.FLOAT, [2], [0.4, -0.6]),
        ),
        1,
    )


@step("ai.onnx.ml.SVMRegressor")
def regress_svm(d: Draft, op: str) -> LiveValue:
    x = d.floats(3)
    vectors = [round(number, 3) for number in d.rng.normal(size=6)]
    return d.plain(
        d.bound(
            d.node(
                op,
                x.name,
                coefficients=[0.5, -0.4],
                support_vectors=vectors,
                n_supports=2,
                rho=[0.1],
                kernel_type=d.choose(("RBF", "LINEAR", "POLY", "SIGMOID")),
                kernel_params=[0.3, 0.1, 2.0],
            )
        ),
        1,
    )


@step("ai.onnx.ml.SVMClassifier")
def classify_svm(d: Draft, op: str) -> list[LiveValue]:
    x = d.floats(3)
    vectors = [round(number, 3) for number in d.rng.normal(size=6)]
    labels, scores = d.nodes(
        op,
        [x.name],
        2,
        coefficients=[0.5, -0.4],
        support_vectors=vectors,
        vectors_per_class=[1, 1],
        rho=[0.1],
        kernel_type="RBF",
        kernel_params=[0.3, 0.1, 2.0],
        classlabels_ints=[0, 1],
    )
    return [d.plain(labels, kind="int64", limit=2), d.plain(d.bound(scores), 2)]


# Strings


@step("StringConcat")
def join_strings(d: Draft, op: str) -> LiveValue:
    x = d.strings(*d.extents(d.integer(0, 1)))
    return d.like(x, d.node(op, x.name, d.constant("!", "object")), kind="string")


@step("RegexFullMatch")
def match_pattern(d: Draft, op: str) -> LiveValue:
    x = d.strings(*d.extents(d.integer(0, 1)))
    return d.like(x, d.node(op, x.name, pattern="[a-e].*"), kind="bool")


@step("StringSplit")
def count_words(d: Draft, op: str) -> LiveValue:
    """Count the words; the width of the operator's other output is the most words of a row."""
    x = d.strings(*d.extents(d.integer(0, 1)))
    return d.like(x, d.nodes(op, [x.name], 2, delimiter=" ")[1], kind="int64", limit=4)


@step("StringNormalizer", since=10)
def normalize_strings(d: Draft, op: str) -> LiveValue:
    x = d.strings(*d.extents(d.integer(0, 1)))
    x = d.strings() if x.rank > 1 else x
    return d.like(
        x, d.node(op, x.name, case_change_action=d.choose(("UPPER", "LOWER")), locale="C"), kind="string"
    )


@step("TfIdfVectorizer", since=9)
def count_terms(d: Draft, op: str) -> LiveValue:
    form = {
        "mode": d.choose(("TF", "IDF", "TFIDF")),
        "min_gram_length": 1,
        "max_gram_length": 1,
        "max_skip_count": 0,
        "ngram_counts": [0],
        "ngram_indexes": [0, 1],
        "weights": [0.5, 0.7],
    }
    if d.chance():
        x = d.strings(3)
        name = d.node(op, x.name, pool_strings=["cat", "dog"], **form)
    else:
        x = d.integers(4, 3)
        name = d.node(op, x.name, pool_int64s=[1, 2], **form)
    return d.plain(name, 2)


@step("com.microsoft.MurmurHash3", since=10)
def hash_values(d: Draft, op: str) -> LiveValue:
    x = d.strings(*d.extents(d.integer(0, 1))) if d.chance() else d.integers(9, *d.extents(1), kind="int32")
    name = d.node("Mod", d.cast(d.node(op, x.name, positive=1), "int64"), d.constant(np.int64(7)))
    return d.like(x, name, kind="int64", limit=7)


# Sequences and optionals


@step("SplitToSequence", "SequenceAt")
def split_to_sequence(d: Draft, op: str) -> LiveValue:
    del op
    x = d.any_floats(min_rank=2)
    axis = d.choose(x.inner)
    keepdims = d.integer(0, 1)
    parts = d.node("SplitToSequence", x.name, axis=axis, keepdims=keepdims)
    position = d.constant(np.int64(d.integer(-x.shape[axis], x.shape[axis] - 1)))
    shape = tuple(1 if i == axis else n for i, n in enumerate(x.shape) if keepdims or i != axis)
    return d.like(x, d.node("SequenceAt", parts, position), shape=shape)


@step("SequenceConstruct", "ConcatFromSequence", "SequenceInsert", "SequenceErase", "SequenceEmpty", since=11)
def construct_sequence(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(d.integer(1, 2), 4))
    y, extra = d.floats(*x.shape[1:]), d.floats(*x.shape[1:])
    if op == "SequenceEmpty":
        parts = d.node(op, dtype=TensorProto.FLOAT)
        parts = d.node("SequenceInsert", d.node("SequenceInsert", parts, x.name), y.name)
    else:
        parts = d.node("SequenceConstruct", x.name, y.name)
    if op in {"SequenceInsert", "SequenceErase"}:
        parts = d.node("SequenceInsert", parts, extra.name, d.constant(np.int64(0)))
    if op == "SequenceErase":
        parts = d.node("SequenceErase", parts, d.constant(np.int64(d.integer(0, 1))))
    count = 3 if op == "SequenceInsert" else 2
    axis = d.integer(1, x.rank - 1)
    if d.chance():
        shape = tuple(count * n if i == axis else n for i, n in enumerate(x.shape))
        return d.like(x, d.node("ConcatFromSequence", parts, axis=axis), shape=shape)
    axis = d.integer(0, x.rank)
    shape = (*x.shape[:axis], count, *x.shape[axis:])
    return d.like(x, d.node("ConcatFromSequence", parts, axis=axis, new_axis=1), shape=shape)


@step("SequenceLength", since=11)
def scale_by_length(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(2))
    count = d.node(op, d.node("SplitToSequence", x.name, axis=1))
    return d.like(x, d.node("Div", x.name, d.cast(count, "float32")))


@step("SequenceMap", since=17, has_body=True)
def map_sequence(d: Draft, op: str) -> LiveValue:
    x = d.floats(*d.extents(2, 4))
    parts = d.node("SplitToSequence", x.name, axis=1)
    part = d.like(x, d.new_name(), shape=(ROWS, 1, x.shape[2]))
    with d.body([part]) as scope:
        d.mark([part.name], d.marks.get(x.name, frozenset()))
        made = d.like(part, d.bound(d.node("Mul", part.name, d.weights(x.shape[2]))))
    graph = d.graph(scope, [d.info(part)], [d.info(made)])
    mapped = d.node(op, parts, body=graph)
    return d.like(x, d.node("ConcatFromSequence", mapped, axis=1))


@step("Optional", "OptionalGetElement", "OptionalHasElement", since=15)
def wrap_optional(d: Draft, op: str) -> LiveValue:
    x = d.any_floats()
    wrapped = d.node("Optional", x.name)
    got = d.node("OptionalGetElement", wrapped)
    if op == "OptionalHasElement":
        got = d.node("Mul", got, d.cast(d.node(op, wrapped), "float32"))
    return d.like(x, got)


# Compositions that exporters write


@step("Reshape", "Softmax", since=13)
def attend_by_products(d: Draft, op: str) -> LiveValue:
    """Multi-head attention, with the heads merged into the batch or on an axis of their own."""
    del op
    time, heads, width = d.integer(2, 3), 2, d.integer(1, 3)
    sources = [d.floats(time, heads * width) for _ in range(3)]
    turned = [d.transpose(d.reshape(x, (ROWS, time, heads, width)), [0, 2, 1, 3]) for x in sources]
    is_merged = d.chance()
    if is_merged:
        turned = [d.reshape(x, (ROWS, time, width), after=heads) for x in turned]
    query, key, value = turned
    perm = [*range(key.rank - 2), key.rank - 1, key.rank - 2]
    scores = d.node("MatMul", query.name, d.node("Transpose", key.name, perm=perm))
    if not is_merged and d.chance():
        flags = d.unsqueeze(d.cast(d.booleans(time).name, "float32"), 1, 2)
        scores = d.node("Add", scores, d.node("Mul", flags, d.constant(np.float32(-9))))
    mixed = d.like(query, d.node("MatMul", d.node("Softmax", scores, axis=-1), value.name))
    if is_merged:
        mixed = d.reshape(mixed, (ROWS, heads, time, width))
    return d.reshape(d.transpose(mixed, [0, 2, 1, 3]), (ROWS, time, heads * width))


@step("Reshape", "MatMul")
def mix_windows(d: Draft, op: str) -> LiveValue:
    """Cut images into windows, merge them into the batch, and put them together again."""
    del op
    count, size, width = d.integer(1, 2), 2, d.integer(1, 3)
    extent = count * size
    x = d.floats(extent, extent, width)
    x = d.transpose(d.reshape(x, (ROWS, count, size, count, size, width)), [0, 1, 3, 2, 4, 5])
    x = d.reshape(x, (ROWS, size * size, width), after=count * count)
    x = d.like(x, d.bound(d.node("MatMul", d.weights(size * size, size * size, fan_in=4), x.name)))
    x = d.transpose(d.reshape(x, (ROWS, count, count, size, size, width)), [0, 1, 3, 2, 4, 5])
    return d.reshape(x, (ROWS, extent, extent, width))


@step("Reshape", "Transpose")
def shuffle_channels(d: Draft, op: str) -> LiveValue:
    del op
    x = d.floats(4, *d.extents(2, 3))
    split = d.reshape(x, (ROWS, 2, 2, *x.shape[2:]))
    return d.reshape(d.transpose(split, [0, 2, 1, 3, 4]), x.shape)


@step("Concat")
@step("Slice", since=10)
def double_rows(d: Draft, op: str) -> LiveValue:
    """Run two variants of each row as one batch, [N, ...] -> [2*N, ...], and take them apart again."""
    x = d.floats(*d.extents(d.integer(1, 2), 4))
    y = d.floats(*x.shape[1:])
    joined = d.like(x, d.node("Concat", x.name, y.name, axis=0), before=2)
    name = d.bound(d.node("MatMul", joined.name, d.weights(x.shape[-1], x.shape[-1], fan_in=x.shape[-1])))
    if op == "Slice":
        rows, end = d.rows(x), d.whole(2**31 - 1)
        name = d.node("Slice", name, *d.choose(((rows, end), (d.whole(0), rows))), d.whole(0))
        return d.like(x, name)
    return d.like(joined, name)


@step("ReduceSum", "Div")
def average_masked(d: Draft, op: str) -> LiveValue:
    """Average each row's tokens up to its own length, as sentence encoders do."""
    del op
    time = d.integer(2, 4)
    x, mask = d.floats(time, d.integer(1, 4)), d.unsqueeze(d.cast(d.booleans(time).name, "float32"), 2)
    total = d.reduce("ReduceSum", d.node("Mul", x.name, mask), [1], keepdims=False)
    count = d.clip(d.reduce("ReduceSum", mask, [1], keepdims=False), 1, 1e9)
    return d.plain(d.node("Div", total, count), x.shape[2])


# Control flow and functions


def nested_result(d: Draft, shape: tuple[int, ...]) -> LiveValue:
    """Append steps to a body and return floats of a plain shape, never the input of the body itself."""
    d.run_steps(d.integer(0, 2))
    made = d.converted(d.recent(d.scope.live), shape)
    return d.like(made, d.node("Identity", made.name) if d.chance() else d.bound(made.name))


@step("If", has_body=True)
def branch(d: Draft, op: str) -> LiveValue:
    """Choose a branch by a constant, or by an extent other than the batch's."""
    shape = (ROWS, *d.extents(d.integer(1, 2), 4))
    return build_branch(d, op, shape, lambda: nested_result(d, shape))


def build_branch(d: Draft, op: str, shape: tuple[int, ...], taken: Nested) -> LiveValue:
    """Append an If whose taken branch is the given one."""
    is_first = d.chance()
    if d.chance():
        condition = d.constant(np.bool_(is_first))
    else:
        x = d.floats(*d.extents(1))
        extent = d.node("Gather", d.node("Shape", x.name), d.constant(np.int64(1)), axis=0)
        wanted = x.shape[1] if is_first else x.shape[1] + 1
        condition = d.node("Equal", extent, d.constant(np.int64(wanted)))
    graphs = []
    for builder in (taken, lambda: nested_result(d, shape)):
        with d.body(d.scope.live) as scope:
            made = builder()
        graphs.append((d.graph(scope, [], [d.info(made)]), frozenset(scope.marks)))
    if not is_first:
        graphs.reverse()
    name = d.node(op, condition, then_branch=graphs[0][0], else_branch=graphs[1][0])
    d.mark([name], graphs[0][1] | graphs[1][1])
    return LiveValue(name, "float32", shape)


@step("Loop", has_body=True)
def loop(d: Draft, op: str) -> list[LiveValue]:
    """Repeat a body a constant number of times, with a state and an output of each iteration."""
    shape = (ROWS, *d.extents(d.integer(1, 2), 3))
    return build_loop(d, op, shape, lambda: nested_result(d, shape))


def build_loop(d: Draft, op: str, shape: tuple[int, ...], inside: Nested) -> list[LiveValue]:
    """Append a Loop; the body's own value is added to the state and returned for each iteration."""
    state = d.floats(*shape[1:])
    trips = d.integer(1, 3)
    index, condition, carried = d.new_name(), d.new_name(), d.like(state, d.new_name())
    with d.body([*d.scope.live, carried]) as scope:
        d.mark([carried.name], d.marks.get(state.name, frozenset()))
        made = inside()
        following = d.like(state, d.bound(d.node("Add", carried.name, made.name)))
        kept = d.node("Identity", condition)
        output = d.like(made, d.node("Identity", made.name))
    inputs = [
        helper.make_tensor_value_info(index, TensorProto.INT64, []),
        helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
        helper.make_tensor_value_info(carried.name, TensorProto.FLOAT, [None] * len(shape)),
    ]
    outputs = [helper.make_tensor_value_info(kept, TensorProto.BOOL, []), d.info(following), d.info(output)]
    graph = d.graph(scope, inputs, outputs)
    start = d.constant(np.bool_(True)) if d.chance() else ""
    names = d.nodes(op, [d.constant(np.int64(trips)), start, state.name], 2, body=graph)
    d.mark(names, frozenset(scope.marks))
    return [LiveValue(names[0], "float32", shape), LiveValue(names[1], "float32", (trips, *shape))]


@step("Loop", since=9)
def loop_from_constant(d: Draft, op: str) -> LiveValue:
    """Start from a constant; the state has rows from the second iteration on only."""
    x = d.floats(d.integer(2, 4))
    state = d.new_name()
    start = d.constant(d.rng.normal(size=(1, x.shape[1])).astype(np.float32))

    def inside() -> str:
        return d.node("Tanh", d.node("Add", d.node("Mul", state, d.constant(np.float32(0.5))), x.name))

    return d.like(x, append_loop(d, op, [(state, start)], lambda: [inside()], 3)[0])


def append_loop(
    d: Draft, op: str, states: list[tuple[str, str]], inside: Callable[[], list[str]], trips: int
) -> list[str]:
    """Append a Loop with matrices as states; return their last values.

    Args:
        d: The draft.
        op: The operator, Loop.
        states: For each state, its name in the body and the name of its first value.
        inside: Appends the body and returns the following states.
        trips: Number of iterations.
    """
    index, condition = d.new_name(), d.new_name()
    with d.body(d.scope.live) as scope:
        following = inside()
        kept = d.node("Identity", condition)
    inputs = [
        helper.make_tensor_value_info(index, TensorProto.INT64, []),
        helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name, _ in states),
    ]
    outputs = [
        helper.make_tensor_value_info(kept, TensorProto.BOOL, []),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in following),
    ]
    graph = d.graph(scope, inputs, outputs)
    first = [start for _, start in states]
    names = d.nodes(op, [d.constant(np.int64(trips)), "", *first], len(states), body=graph)
    d.mark(names, frozenset(scope.marks))
    return names


@step("Scan", since=9, has_body=True)
def scan(d: Draft, op: str) -> list[LiveValue]:
    """Scan an axis that is not the batch, with a state for each row."""
    shape = (ROWS, *d.extents(1, 3))
    return build_scan(d, op, shape, lambda: nested_result(d, shape))


def build_scan(d: Draft, op: str, shape: tuple[int, ...], inside: Nested) -> list[LiveValue]:
    state, time, width = d.floats(*shape[1:]), d.integer(2, 3), shape[1]
    x = d.floats(time, width)
    form = {}
    if d.chance():
        form = {"scan_input_axes": [1]}
    else:
        x = d.move(x, 1)
    carried, part = d.like(state, d.new_name()), d.plain(d.new_name(), width)
    live = [carried, part] if d.scope.is_function else [*d.scope.live, carried, part]
    with d.body(live) as scope:
        d.mark([carried.name], d.marks.get(state.name, frozenset()))
        d.mark([part.name], d.marks.get(x.name, frozenset()))
        made = inside()
        total = d.node("Add", d.node("Add", carried.name, made.name), part.name)
        following = d.like(state, d.bound(total))
        output = d.like(made, d.node("Identity", made.name))
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 2)
        for name in (carried.name, part.name)
    ]
    graph = d.graph(scope, inputs, [d.info(following, is_shaped=True), d.info(output, is_shaped=True)])
    position = d.integer(0, 2)
    if position or d.chance():
        form["scan_output_axes"] = [position]
    names = d.nodes(op, [state.name, x.name], 2, body=graph, num_scan_inputs=1, **form)
    d.mark(names, frozenset(scope.marks))
    stacked = (*shape[:position], time, *shape[position:])
    return [LiveValue(names[0], "float32", shape), LiveValue(names[1], "float32", stacked)]


@step("Scan", since=8, until=8)
def scan_each_row(d: Draft, op: str) -> list[LiveValue]:
    """Scan in the form of opset 8, in which the operator itself has the batch as the first axis."""
    state, x = d.floats(3), d.floats(2, 3)
    names = [d.new_name() for _ in range(2)]
    with d.body([]) as scope:
        total = d.node("Tanh", d.node("Add", *names))
        output = d.node("Mul", total, names[1])
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in (*names, total, output)]
    graph = d.graph(scope, infos[:2], infos[2:])
    made = d.nodes(op, ["", state.name, x.name], 2, body=graph, num_scan_inputs=1)
    return [d.plain(made[0], 3), d.plain(made[1], 2, 3)]


@step("Softmax", since=13)
def call_with_axis(d: Draft, op: str) -> LiveValue:
    """Call one function for rows on either axis; its attribute names the other one."""
    x = d.floats(d.integer(2, 4))
    name = define_axis_function(d, op)
    first = d.node(name, x.name, along=1)
    turned = d.transpose(d.like(x, first), [1, 0])
    return d.like(turned, d.node(name, turned.name, along=0))


def define_axis_function(d: Draft, op: str) -> str:
    """Define a function that applies an operator along an axis; return its qualified name."""
    name = f"Function{len(d.functions)}"
    inner = helper.make_node(op, ["x"], ["y"])
    inner.attribute.append(AttributeProto(name="axis", ref_attr_name="along", type=AttributeProto.INT))
    d.functions.append(
        helper.make_function(FUNCTION_DOMAIN, name, ["x"], ["y"], [inner], d.imports(), attributes=["along"])
    )
    return f"{FUNCTION_DOMAIN}.{name}"


@step("LeakyRelu", since=9, has_body=True)
def call_function(d: Draft, op: str) -> LiveValue:
    shape = (ROWS, *d.extents(d.integer(1, 2), 3))
    return build_function(d, op, shape, lambda: nested_result(d, shape))


def build_function(d: Draft, op: str, shape: tuple[int, ...], inside: Nested) -> LiveValue:
    """Define a function of the model, with an attribute, and call it once or twice."""
    parameters = [LiveValue(f"p{d.new_name()}", "float32", shape) for _ in range(2)]
    if d.chance(0.3):  # names of the graph mean other values in a function
        parameters[0] = LiveValue(d.choose(d.scope.live).name, "float32", shape)
    arguments = [d.floats(*shape[1:]), d.floats(*shape[1:])]
    marks = frozenset().union(*(d.marks.get(x.name, frozenset()) for x in arguments))
    with d.body(parameters, is_function=True) as scope:
        made = d.converted(inside(), shape)
        leaky = helper.make_node(op, [made.name], [f"q{d.new_name()}"])
        leaky.attribute.append(AttributeProto(name="alpha", ref_attr_name="slope", type=AttributeProto.FLOAT))
        scope.nodes.append(leaky)
        result = d.node("Add", leaky.output[0], parameters[1].name)
    name = f"Function{len(d.functions)}"
    d.functions.append(
        helper.make_function(
            FUNCTION_DOMAIN,
            name,
            [x.name for x in parameters],
            [result],
            scope.nodes,
            d.imports(),
            attributes=["slope"],
        )
    )
    called = d.node(f"{FUNCTION_DOMAIN}.{name}", *(x.name for x in arguments), slope=0.2)
    d.mark([called], frozenset(scope.marks) | marks)
    if d.chance(0.3):
        called = d.node(f"{FUNCTION_DOMAIN}.{name}", called, arguments[0].name, slope=0.1)
        d.mark([called], frozenset(scope.marks) | marks)
    return LiveValue(d.bound(called), "float32", shape)
