"""Rules of operators that compute along certain axes: reductions, normalisations, matrix products."""

from collections.abc import Sequence

import numpy as np

from runtime.rows.elements import broadcast, broadcast_shapes, is_exact, show
from runtime.rows.sizes import Number
from runtime.rows.values import (
    LAID_OUT,
    Call,
    Coupling,
    Kind,
    NotKnown,
    Rule,
    Value,
    changed,
    from_data,
    laid_out,
    moved,
    same,
    shape_of,
)

# Reductions


def reduce(call: Call) -> Value:
    """A reduction over axes: an attribute, in newer versions an input; without axes over all of them."""
    value = call.input(0)
    if value.kind is Kind.SAME and value.shape is None:
        call.need_same(1)
        return value
    rank = len(shape_of(value))
    axes = call.axes(1, rank)
    if not axes:
        if call.flag("noop_with_empty_axes"):  # some square their elements, or take logarithms
            return changed(value)
        axes = list(range(rank))
    return reduce_axes(call, value, axes, keeps=call.flag("keepdims", default=True))


def reduce_axis(call: Call) -> Value:
    """A reduction over one axis: ArgMax and ArgMin."""
    value = call.input(0)
    axis = call.axis(call.attribute("axis", 0), len(call.shape(0)))
    return reduce_axes(call, value, [axis], keeps=call.flag("keepdims", default=True))


def reduce_axes(call: Call, value: Value, axes: Sequence[int], *, keeps: bool) -> Value:
    old = shape_of(value)
    if value.kind in {Kind.INDEX, Kind.TUPLES}:
        raise NotKnown("it computes with the positions of rows in the batch")
    if value.kind in LAID_OUT and value.axis in axes:
        call.refuse_axis(value.axis)
    made = [1 if at in axes else each for at, each in enumerate(old) if keeps or at not in axes]
    if value.data is not None:
        return _reduce_data(call, value, axes, made)
    if value.kind is Kind.COUNT:
        return Value(Kind.COUNT, None)
    if value.kind is Kind.FILL:
        reduced = any(call.symbols.mentions_rows(old[at]) for at in axes)
        return Value(Kind.COUNT, None) if reduced else call.filled(made)
    place = value.axis if keeps else value.axis - sum(at < value.axis for at in axes)
    return moved(value, made, place)


def _reduce_data(call: Call, value: Value, axes: Sequence[int], made: Sequence[Number]) -> Value:
    """Multiply all lengths of a shape, as exporters do; other results are not computed."""
    if call.node.operator == "ReduceProd" and len(axes) == value.data.ndim and not value.is_real:
        product = call.symbols.product(value.data.flat)
        if not is_exact(call.symbols, [product, *value.data.flat], is_real=False):
            product = call.symbols.result("ReduceProd", *value.data.flat)
        result = np.array(product, dtype=object)
        return from_data(call.symbols, result.reshape([1] * len(made)))
    return Value(value.kind, tuple(made) if value.kind is Kind.SAME else None)


# Along axes, keeping the shape


def along(default: int, *, since: int = 0, before: int = 1, name: str = "axis") -> Rule:
    """Return the rule of an operator that computes along one axis and keeps the shape.

    Args:
        default: the axis without an attribute.
        since: the version from which that holds; before, all axes from the given one on were one.
        before: the default of those versions.
        name: the attribute.
    """

    def rule(call: Call) -> Value:
        value = call.plain(0)
        rank = len(shape_of(value))
        if call.since < since:
            axes = list(range(call.axis(call.attribute(name, before), rank), rank))
        else:
            axes = [call.axis(call.attribute(name, default), rank)]
        return keep_along(call, value, axes)

    return rule


def keep_along(call: Call, value: Value, axes: Sequence[int]) -> Value:
    """Return a tensor of the same shape, computed along these axes."""
    if value.kind is Kind.SAME:
        return same(value.shape)
    if value.kind in LAID_OUT and value.axis in axes:
        call.refuse_axis(value.axis)
    return moved(value, shape_of(value), value.axis)


def cumulate(call: Call) -> Value:
    """CumSum and CumProd: the axis is an input."""
    value, axis = call.plain(0), call.integers(1)
    if axis is None:
        raise NotKnown("its axis is missing")
    return keep_along(call, value, [call.axis(axis[0], len(shape_of(value)))])


def normalise_rest(call: Call) -> Sequence[Value]:
    """LayerNormalization and its kin: all axes from `axis` on; also mean and deviation."""
    value = call.plain(0)
    if value.kind is Kind.SAME:
        call.need_same(1, 2)
        return [same(value.shape), same(), same()]
    old = shape_of(value)
    first = call.axis(call.attribute("axis", -1), len(old))
    made = keep_along(call, value, range(first, len(old)))
    _check_parameters(call, value, (1, 2))
    reduced = [1 if at >= first else each for at, each in enumerate(old)]
    statistics = moved(value, reduced, value.axis)
    return [made, statistics, statistics]


def _check_parameters(call: Call, value: Value, positions: Sequence[int]) -> None:
    """Refuse weights that depend on rows, or that meet the axis of the rows."""
    call.need_same(*positions)
    behind = len(shape_of(value)) - value.axis
    for at in positions:
        weights = call.optional(at)
        if weights is not None and len(shape_of(weights)) >= behind and shape_of(weights)[-behind] != 1:
            raise NotKnown(f"its input {at} has a dimension where the rows lie")


def normalise_mean_variance(call: Call) -> Value:
    value = call.plain(0)
    rank = len(shape_of(value))
    return keep_along(call, value, [call.axis(each, rank) for each in call.attribute("axes", (0, 2, 3))])


def normalise_batch(call: Call) -> Sequence[Value]:
    """BatchNormalization with given statistics; in training mode it computes those of the batch."""
    returns_statistics = len([name for name in call.node.outputs if name]) > 1
    if call.since < 7:
        trains = returns_statistics or not call.flag("is_test")
    elif call.since < 14:  # more outputs than one say that it trains
        trains = returns_statistics
    else:
        trains = call.flag("training_mode")
    if trains:
        raise Coupling("computes the mean and deviation of the whole batch")
    if returns_statistics:
        raise NotKnown("it returns statistics without computing them")
    value = call.plain(0)
    if value.kind is Kind.ROWS and value.axis == 1:  # as Keras writes a LayerNormalization
        for at in range(1, 5):
            call.need_rows(at, value)
    else:
        call.need_same(1, 2, 3, 4)
    return [changed(value)] * max(1, len(call.node.outputs))


def normalise_channels(call: Call) -> Value:
    """LRN: neighbours along axis 1."""
    return keep_along(call, call.plain(0), [1])


def quantise(call: Call) -> Value:
    """QuantizeLinear and DequantizeLinear.

    1. Blocks have scales of their own: only weights are known to have them.
    2. One scale for the tensor, or one for each element of another axis than that of the rows.
    3. One scale for each row.
    """
    value, scale = call.plain(0), call.plain(1)
    if call.attribute("block_size", 0):  # 1
        call.need_same(0, 1, 2)
    if value.kind is Kind.SAME and scale.kind is Kind.SAME:
        call.need_same(2)
        return same(value.shape)
    length = call.symbols.product(shape_of(scale))
    axis = value.axis if length == 1 else call.axis(call.attribute("axis", 1), len(shape_of(value)))
    if scale.kind is Kind.SAME:  # 2
        call.need_same(2)
        if length != 1 and value.axis == axis:
            raise NotKnown(f"a scale for each element of axis {axis}, along which the rows lie")
        return value
    for part in [scale, *([] if call.optional(2) is None else [call.plain(2)])]:  # 3
        if part.kind is not Kind.ROWS or len(shape_of(part)) != 1 or value.kind is not Kind.ROWS:
            raise NotKnown("its scale is computed from the batch")
        if value.axis != axis or not call.has_layout(value, part):
            raise NotKnown("a scale for each row meets another axis than that of the rows")
    return value


def top_k(call: Call) -> Sequence[Value]:
    """TopK; sorted rows may be brought back into their order later, so that this is no coupling yet."""
    value = call.plain(0)
    old = shape_of(value)
    axis = call.axis(call.attribute("axis", -1), len(old))
    if value.kind is Kind.ROWS and value.axis == axis:
        raise NotKnown(f"it sorts along axis {axis}, along which the rows lie")
    count = call.attribute("k") if call.since < 10 else call.number_or_unknown(1)
    if call.symbols.mentions_rows(count):
        raise NotKnown("it takes as many elements as there are rows")
    made = moved(value, (*old[:axis], count, *old[axis + 1 :]), value.axis)
    return [made, made]


# Products


def matmul(first: int = 0, second: int = 1, *, same_inputs: Sequence[int] = ()) -> Rule:
    """Return the rule of a matrix product of two inputs; others must not depend on the rows."""

    def rule(call: Call) -> Value:
        call.need_same(*same_inputs)
        return multiply(call, call.plain(first), call.plain(second))

    return rule


def multiply(call: Call, left: Value, right: Value) -> Value:
    """Return the product of matrices in the last two dimensions.

    The rows of the left operand may lie along its second last axis; those of both along axes before.
    """
    if left.kind is Kind.SAME and right.kind is Kind.SAME and (left.shape is None or right.shape is None):
        return same()
    one, other = shape_of(left), shape_of(right)
    if not one or not other:
        raise NotKnown("a scalar has no product of matrices")
    first = [1, *one] if len(one) == 1 else list(one)
    second = [*other, 1] if len(other) == 1 else list(other)
    # Axes counted from the end: -1 and -2 are those of the matrices.
    left_at = left.axis - len(one) if left.kind is Kind.ROWS else 0
    right_at = (right.axis - len(other) - (len(other) == 1)) if right.kind is Kind.ROWS else 0
    if left_at == -1 or right_at == -2:
        axis = left.axis if left_at == -1 else right.axis
        raise Coupling(f"sums over axis {axis}, along which the rows lie")
    made = [*broadcast_shapes(call, [first[:-2], second[:-2]]), first[-2], second[-1]]
    rank = len(made)
    if left_at and right_at:
        if left_at == right_at and left_at < -2:
            if not call.has_layout(left, right):
                raise NotKnown("rows lie in different order in its inputs")
        else:
            raise Coupling("multiplies each row by the rows of its other input")
    rows = left if left_at else right
    at = left_at or right_at
    if at < -2 and not (left_at and right_at):
        partner = second if left_at else first
        if len(partner) >= -at and partner[at] != 1:
            raise NotKnown(
                f"an input without rows has a dimension of {show(partner[at])} where others have rows"
            )
    if at:
        made[rank + at] = shape_of(rows)[rows.axis]
    place = rank + at - (len(one) == 1 and at == -1)
    if len(one) == 1:
        del made[-2]
    if len(other) == 1:
        del made[-1]
    return laid_out(made, place, rows.outer, rows.inner) if at else same(made)


def transposed(value: Value) -> Value:
    """Exchange the last two axes."""
    old = list(shape_of(value))
    if len(old) < 2:
        return value
    old[-1], old[-2] = old[-2], old[-1]
    last = len(old) - 1
    axis = {last: last - 1, last - 1: last}.get(value.axis, value.axis)
    return moved(value, old, axis)


def gemm(call: Call) -> Value:
    """Gemm: a product, of which either matrix may be transposed, and a bias."""
    left, right = (
        transposed(call.plain(at)) if call.attribute(name, 0) else call.plain(at)
        for at, name in enumerate(("transA", "transB"))
    )
    product, bias = multiply(call, left, right), call.optional(2)
    return product if bias is None else broadcast(call, [product, bias])


# What no rows survive


def random(_: Call) -> Value:
    """Random numbers: they differ from run to run."""
    raise Coupling("draws random numbers")


def whole_scale(call: Call) -> Sequence[Value]:
    """Dynamic quantisation of a whole tensor: large numbers of one row take the digits of another."""
    if call.input(0).kind is Kind.SAME:
        call.need_same(*range(len(call.inputs)))
        return [same(call.input(0).shape), same(()), same(())]
    raise Coupling("computes one scale for all rows (quantize_static of ONNX Runtime makes models without)")


def compacts(call: Call) -> Sequence[Value]:
    """Unique: all elements are compared with all others."""
    if call.input(0).kind is Kind.SAME:
        values = same([call.symbols.unknown()]) if call.attribute("axis") is None else same()
        return [values, *([same([call.symbols.unknown()])] * 3)]
    raise NotKnown("it compares all elements of all rows with each other")


def data_dependent(call: Call) -> Sequence[Value]:
    """NonZero and NonMaxSuppression: as many columns or rows as the data say."""
    if all(value.kind is Kind.SAME for value in call.present_inputs()):
        is_boxes = call.node.operator == "NonMaxSuppression"
        shape = [call.symbols.unknown(), 3] if is_boxes else [len(call.shape(0)), call.symbols.unknown()]
        return [same(shape)]
    raise NotKnown("the length of its result depends on the elements of all rows")
