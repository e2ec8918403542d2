"""Rules of operators that read and make shapes, and of those that move, join and separate axes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from runtime.onnxgraph import ConstantTensor
from runtime.rows.sizes import ROWS, Number, Size
from runtime.rows.values import (
    LAID_OUT,
    MAX_DATA,
    Call,
    Coupling,
    Kind,
    NotKnown,
    Value,
    from_data,
    from_tensor,
    laid_out,
    moved,
    same,
    shape_of,
)

FAR = 2**31 - 1
"""Exporters write this end, or a larger one, for "to the end"."""


# Shapes and constants


def shape(call: Call) -> Value:
    """Shape: the lengths as data, N among them."""
    value = call.input(0)
    if value.shape is None:
        if value.kind not in {Kind.SAME, Kind.COUNT}:
            raise NotKnown("it takes a sequence")
        return Value(value.kind, (call.symbols.unknown(),))
    start, end = call.attribute("start", 0), call.attribute("end", FAR)
    return from_data(call.symbols, objects(value.shape[start:end]))


def size(call: Call) -> Value:
    """Size: the number of elements as data."""
    return from_data(call.symbols, objects([call.symbols.product(call.shape(0))]).reshape(()))


def constant(call: Call) -> Value:
    """Constant, in all its forms; a sparse one and texts have no contents here."""
    if sum(name.startswith(("value", "sparse_value")) for name in call.node.attribute_names()) > 1:
        raise NotKnown("a constant with several values")
    value = call.attribute("value")
    if isinstance(value, ConstantTensor):
        return from_tensor(call.symbols, value)
    for name in ("value_float", "value_int", "value_floats", "value_ints"):
        number = call.attribute(name)
        if number is not None:
            array = objects(number) if isinstance(number, tuple) else objects([number]).reshape(())
            return from_data(call.symbols, array, is_real="float" in name)
    return same()


def constant_of_shape(call: Call) -> Value:
    """ConstantOfShape: one number, as exporters fill first states of the batch."""
    lengths = call.needed_numbers(0)
    check_lengths(call, lengths)
    fill = call.attribute("value")
    element: Any = 0.0
    if isinstance(fill, ConstantTensor):
        data = from_tensor(call.symbols, fill).data
        element = None if data is None else data.flat[0]
    if element is not None and are_known(lengths) and math.prod(lengths) <= MAX_DATA:
        data = np.full(lengths, element, dtype=object)
        return from_data(call.symbols, data, is_real=isinstance(element, float))
    return call.filled(lengths)


def range_(call: Call) -> Value:
    """Range: of N numbers from 0 it has the positions of the rows."""
    if any(call.input(at).data is None for at in range(3)):
        if all(call.input(at).kind is Kind.SAME for at in range(3)):
            return same([call.symbols.unknown()])
        raise NotKnown("a range whose length is computed from the batch")
    numbers = start, limit, step = [call.input(at).data.flat[0] for at in range(3)]
    if not any(isinstance(each, Size) for each in numbers) and step:
        count = max(0, math.ceil((limit - start) / step))
        if count <= MAX_DATA and are_known(numbers):
            return from_data(call.symbols, objects(range(start, limit, step)))
        return same([count])
    if start == 0 and step == 1 and limit == ROWS:
        return laid_out([ROWS], 0, kind=Kind.INDEX)
    if any(map(call.symbols.mentions_rows, numbers)):
        return Value(Kind.COUNT, None)
    if start == 0 and step == 1 and call.symbols.is_length(limit) and call.symbols.is_whole(limit):
        return same([limit])
    return same([call.symbols.unknown()])


def check_lengths(call: Call, lengths: Sequence[Number]) -> None:
    """Refuse lengths that may be negative: -1 in a shape stands for something else."""
    if not all(map(call.symbols.is_length, lengths)):
        raise NotKnown("a shape is computed by the model in a way that is not followed")


def objects(values: Iterable[Any]) -> Any:
    """Return an array of these values as they are."""
    listed = list(values)
    made = np.empty(len(listed), dtype=object)
    made[:] = listed
    return made


# Axes


def transpose(call: Call) -> Value:
    """Transpose: the axis of the rows moves."""
    value = call.input(0)
    if value.kind is Kind.SAME and value.shape is None:
        return value
    old = shape_of(value)
    order = call.attribute("perm")
    axes = [call.axis(each, len(old)) for each in (order if order is not None else range(len(old))[::-1])]
    if sorted(axes) != list(range(len(old))):
        raise NotKnown("an order of axes that is none")
    if value.data is not None:
        return from_data(call.symbols, value.data.transpose(axes), is_real=value.is_real)
    made = [old[each] for each in axes]
    if value.kind is Kind.TUPLES and axes[-1] != len(old) - 1:
        raise NotKnown("it moves indices of rows")
    return moved(value, made, axes.index(value.axis) if value.kind in LAID_OUT else 0)


def unsqueeze(call: Call) -> Value:
    """Unsqueeze: new dimensions of 1."""
    value = call.input(0)
    if value.kind is Kind.SAME and value.shape is None:
        call.need_same(1)
        return value
    given = call.integers(1) if len(call.inputs) > 1 else call.attribute("axes")
    if given is None:
        raise NotKnown("axes are missing")
    rank = len(shape_of(value)) + len(given)
    axes = {call.axis(each, rank) for each in given}
    rest = iter(shape_of(value))
    kept = [at for at in range(rank) if at not in axes]
    made = [1 if at in axes else next(rest) for at in range(rank)]
    if value.data is not None:
        return from_data(call.symbols, value.data.reshape(made), is_real=value.is_real)
    if value.kind is Kind.TUPLES and rank - 1 in axes:
        raise NotKnown("it moves indices of rows")
    return moved(value, made, kept[value.axis] if value.kind in LAID_OUT else 0)


def squeeze(call: Call) -> Value:
    """Squeeze: dimensions of 1 go; that of the rows must not be among them."""
    value = call.input(0)
    if value.kind is Kind.SAME and value.shape is None:
        call.need_same(1)
        return value
    old = shape_of(value)
    given = call.integers(1) if len(call.inputs) > 1 else call.attribute("axes")
    if not given:  # ONNX Runtime takes no axes for all
        if any(isinstance(each, Size) for each in old):
            raise NotKnown("it removes dimensions of 1, which open lengths may have, or the number of rows")
        given = [at for at, each in enumerate(old) if each == 1]
    axes = {call.axis(each, len(old)) for each in given}
    if value.kind in LAID_OUT and value.axis in axes:
        raise NotKnown(f"it removes axis {value.axis}, along which the rows lie")
    kept = [at for at in range(len(old)) if at not in axes]
    made = [old[at] for at in kept]
    if value.data is not None:
        return from_data(call.symbols, value.data.reshape(made), is_real=value.is_real)
    if any(map(call.symbols.mentions_rows, (old[at] for at in axes))):
        raise NotKnown("it removes a dimension of the number of rows")
    if value.kind is Kind.TUPLES and len(old) - 1 in axes:
        raise NotKnown("it moves indices of rows")
    return moved(value, made, kept.index(value.axis) if value.kind in LAID_OUT else 0)


def flatten(call: Call) -> Value:
    """Flatten: a Reshape to two dimensions."""
    value = call.input(0)
    old = shape_of(value)
    axis = call.attribute("axis", 1)
    axis = axis + len(old) if axis < 0 else axis
    product = call.symbols.product
    return reshape_to(call, value, [product(old[:axis]), product(old[axis:])])


def reshape(call: Call) -> Value:
    """Reshape: 0 keeps a dimension, -1 stands for the rest."""
    value = call.input(0)
    lengths = list(call.attribute("shape", ())) if call.since < 5 else call.numbers(1)
    if lengths is None:
        raise NotKnown("a shape is missing")
    if value.shape is None:
        if value.kind is Kind.SAME and not any(map(call.symbols.mentions_rows, lengths)):
            known = -1 not in lengths and 0 not in lengths and all(map(call.symbols.is_length, lengths))
            return same(lengths if known else [call.symbols.unknown() for _ in lengths])
        raise NotKnown("the number of dimensions of its input is not known")
    old = value.shape
    may_copy_rows = False
    if not (call.since >= 14 and call.flag("allowzero")):
        if any(each == 0 and at >= len(old) for at, each in enumerate(lengths)):
            raise NotKnown("a shape that does not fit its input")
        mentions = call.symbols.mentions_rows
        may_copy_rows = any(
            call.symbols.is_computed(each) and mentions(kept) and not mentions(each)
            for each, kept in zip(lengths, old, strict=False)
        )
        lengths = [old[at] if each == 0 else each for at, each in enumerate(lengths)]
    if lengths.count(-1) > 1:
        raise NotKnown("a shape with several open dimensions")
    if -1 in lengths:
        at = lengths.index(-1)
        others = lengths[:at] + lengths[at + 1 :]
        check_lengths(call, others)
        lengths[at] = _find_rest(call, call.symbols.product(old), call.symbols.product(others))
    check_lengths(call, lengths)
    made = reshape_to(call, value, lengths)
    if may_copy_rows:
        raise NotKnown("a length that is computed may be 0, which stands for the number of rows there")
    return made


def _find_rest(call: Call, total: Number, product: Number) -> Number:
    """Return the length that -1 stands for: the number of elements by the product of the other lengths.

    1. It divides, whatever the lengths are.
    2. Both have N once, or neither has: the quotient is the same for each number of rows.
    3. Only one has N: with one row it has to divide, and with several it may, and mix them.
    """
    symbols = call.symbols
    exact = None if product == 0 else symbols.divide(total, product)
    if exact is not None:  # 1
        return exact
    if symbols.mentions_rows(total) != symbols.mentions_rows(product):  # 3
        raise NotKnown("whether a dimension joins parts of several rows depends on open lengths")
    if symbols.mentions_rows(total):  # 2
        total, product = symbols.divide(total, ROWS), symbols.divide(product, ROWS)
    if total is None or product is None or any(map(symbols.mentions_rows, (total, product))):
        raise NotKnown("a shape mentions the number of rows in a way that is not followed")
    return symbols.result("quotient", total, product, is_length=True)


def reshape_to(call: Call, value: Value, lengths: Sequence[Number]) -> Value:
    """Return a tensor with the same elements in this shape.

    There are `before * N * after` elements in all: `before` is the product of the dimensions before that of
    the rows, and of its `outer`. They stay rows if exactly one dimension of the result has N, and the product
    of those before it divides `before`; what comes after follows from the number of elements.
    """
    old, symbols = shape_of(value), call.symbols
    if value.data is not None and are_known(lengths):
        return from_data(symbols, value.data.reshape(list(lengths)), is_real=value.is_real)
    if value.kind is Kind.FILL:
        return call.filled(lengths)
    if value.kind not in LAID_OUT:
        if value.kind is Kind.SAME and any(map(symbols.mentions_rows, lengths)):
            raise NotKnown("a shape mentions the number of rows that has none")
        return Value(value.kind, tuple(lengths))
    if value.kind is Kind.TUPLES:
        raise NotKnown("it moves indices of rows")
    before = symbols.multiply(symbols.product(old[: value.axis]), value.outer)
    axes = [at for at, each in enumerate(lengths) if symbols.mentions_rows(each)]
    if not axes:
        raise Coupling(f"joins the rows along axis {value.axis} with each other")
    if len(axes) > 1:
        raise NotKnown("a shape in which several dimensions mention the number of rows")
    (axis,) = axes
    times = symbols.divide(lengths[axis], ROWS)
    outer = symbols.divide(before, symbols.product(lengths[:axis]))
    inner = None if times is None or outer is None else symbols.divide(times, outer)
    if inner is None or any(map(symbols.mentions_rows, (outer, inner))):
        if are_known((before, times, *lengths[:axis])):
            raise Coupling(f"moves axis {value.axis}, along which the rows lie, so that it mixes rows")
        raise NotKnown("it joins or separates dimensions around the rows in a way that is not followed")
    return laid_out(lengths, axis, outer, inner, value.kind)


def eye_like(call: Call) -> Value:
    """EyeLike: a diagonal of the shape of its input."""
    value = call.input(0)
    if value.kind is not Kind.SAME and any(map(call.symbols.mentions_rows, shape_of(value))):
        raise NotKnown("it computes with the positions of rows in the batch")
    return same(value.shape)


def are_known(numbers: Iterable[Number]) -> bool:
    """Whether all numbers are plain integers."""
    return all(isinstance(each, int) for each in numbers)
