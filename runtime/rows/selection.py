"""Rules of operators that select elements, or put elements in place of others."""

from collections.abc import Sequence

import numpy as np

from runtime.rows.shapes import FAR, are_known, check_lengths
from runtime.rows.sizes import ROWS, Number, Size
from runtime.rows.values import (
    LAID_OUT,
    Call,
    Coupling,
    Kind,
    NotKnown,
    Value,
    changed,
    from_data,
    laid_out,
    moved,
    same,
    shape_of,
)

FAR_ROWS = 10**8
"""A batch has fewer rows: each has at least a byte. jax2tf writes an end of 10**9."""


def gather(call: Call) -> Value:
    """Gather: rows of indices into a table, or the same indices in each row."""
    value, indices = call.input(0), call.rows_of(call.input(1))
    if value.data is not None and indices.data is not None and indices.kind is Kind.SAME:
        axis = call.axis(call.attribute("axis", 0), value.data.ndim)
        if are_known(indices.data.flat):
            taken = np.take(value.data, indices.data.astype(int), axis)
            return from_data(call.symbols, taken, is_real=value.is_real)
    if {value.kind, indices.kind} <= {Kind.SAME, Kind.COUNT}:
        if Kind.COUNT in {value.kind, indices.kind}:
            return Value(Kind.COUNT, None)
        if value.shape is None or indices.shape is None:
            return same()
    old, at = shape_of(value), shape_of(indices)
    axis = call.axis(call.attribute("axis", 0), len(old))
    made = (*old[:axis], *at, *old[axis + 1 :])
    if value.kind is Kind.FILL:
        if indices.kind is Kind.SAME:
            return call.filled(made)
        value = call.rows_of(value)
    if value.kind is Kind.SAME and indices.kind is Kind.SAME:
        return same(made)
    if value.kind is Kind.SAME and indices.kind is Kind.ROWS:
        return moved(indices, made, axis + indices.axis)
    if value.kind in {Kind.ROWS, Kind.INDEX} and indices.kind is Kind.SAME:
        if value.axis != axis:
            shift = len(at) - 1 if value.axis > axis else 0
            return moved(value, made, value.axis + shift)
        if value.outer == 1 and value.inner == 1:
            raise Coupling(f"takes certain rows from axis {axis}, along which the rows lie")
        raise NotKnown(f"it takes parts from axis {axis}, along which the rows lie")
    if Kind.COUNT in {value.kind, indices.kind}:
        raise NotKnown("indices depend on the number of rows")
    raise NotKnown("each row has indices for all rows")


def gather_elements(call: Call) -> Value:
    value, indices = call.rows_of(call.input(0)), call.rows_of(call.input(1))
    old, made = shape_of(value), shape_of(indices)
    axis = call.axis(call.attribute("axis", 0), len(old))
    if value.kind is Kind.SAME and indices.kind is Kind.SAME:
        return same(made)
    if value.kind is Kind.ROWS and indices.kind is Kind.ROWS and value.axis == indices.axis:
        if value.axis == axis:
            raise NotKnown(f"indices select along axis {axis}, along which the rows lie")
        if call.has_layout(value, indices):
            return moved(indices, made, indices.axis)
    if value.kind is Kind.ROWS and value.axis == axis and indices.kind is Kind.SAME:
        raise Coupling(f"takes certain rows from axis {axis}, along which the rows lie")
    raise NotKnown("indices and elements have their rows along different axes")


def gather_nd(call: Call) -> Value:
    """GatherND: within each row by `batch_dims`, or with the row's number as first index."""
    value, indices = call.input(0), call.rows_of(call.input(1))
    value = call.rows_of(value)
    old, at = shape_of(value), shape_of(indices)
    batch = call.attribute("batch_dims", 0)
    count = at[-1] if at else 0
    if not isinstance(count, int):
        raise NotKnown("the number of indices is not known")
    made = (*at[:-1], *old[batch + count :])
    kinds = value.kind, indices.kind
    if kinds == (Kind.SAME, Kind.SAME):
        return same(made)
    has_all_rows = value.axis == 0 and (value.outer, value.inner) == (1, 1)
    names_row = indices.kind is Kind.TUPLES or (indices.kind is Kind.INDEX and count == 1)
    if value.kind is Kind.ROWS and has_all_rows and names_row and batch == 0 and indices.axis < len(at) - 1:
        return laid_out(made, indices.axis, indices.outer, indices.inner)
    if kinds == (Kind.SAME, Kind.ROWS) and batch == 0 and indices.axis < len(at) - 1:
        return moved(indices, made, indices.axis)
    is_alike = value.axis == indices.axis and call.has_layout(value, indices)
    if kinds == (Kind.ROWS, Kind.ROWS) and is_alike and value.axis < batch:
        return moved(indices, made, indices.axis)
    if kinds == (Kind.ROWS, Kind.SAME) and batch == 0:
        if value.axis < count:
            raise Coupling(f"takes certain rows from axis {value.axis}, along which the rows lie")
        return moved(value, made, len(at) - 1 + value.axis - count)
    raise NotKnown("indices of rows select among rows")


def scatter_elements(call: Call) -> Value:
    """ScatterElements: within each row."""
    values = [call.rows_of(call.input(at)) for at in range(3)]
    if all(value.kind is Kind.SAME for value in values):
        return same(values[0].shape)
    base = values[0]
    axis = call.axis(call.attribute("axis", 0), len(shape_of(base)))
    if any(value.kind is not Kind.ROWS or value.axis != base.axis for value in values):
        raise NotKnown("not all of its inputs have rows along the same axis")
    if base.axis == axis:
        raise NotKnown(f"indices select along axis {axis}, along which the rows lie")
    if not all(call.has_layout(value, base) for value in values):
        raise NotKnown("rows lie in different order in its inputs")
    return base


def scatter_nd(call: Call) -> Value:
    """ScatterND: by the row's number as first index, or at the same places in each row."""
    base, indices, updates = (call.rows_of(call.input(at)) for at in range(3))
    kinds = base.kind, indices.kind, updates.kind
    if kinds == (Kind.SAME, Kind.SAME, Kind.SAME):
        return _scattered(call, base, indices, updates)
    at = shape_of(indices)
    count = at[-1] if at else 0
    if base.kind is not Kind.ROWS or not isinstance(count, int):
        raise NotKnown("its input has no rows, or the number of indices is not known")
    is_whole = base.axis == 0 and (base.outer, base.inner) == (1, 1)
    fits = updates.kind is Kind.ROWS and updates.axis == indices.axis and call.has_layout(updates, indices)
    if indices.kind is Kind.TUPLES and is_whole and fits:
        return base
    if indices.kind is Kind.SAME and base.axis >= count:
        place = len(at) - 1 + base.axis - count
        if updates.kind is Kind.ROWS and updates.axis == place and call.has_layout(updates, base):
            return base
    raise NotKnown("indices select among rows")


def _scattered(call: Call, base: Value, indices: Value, updates: Value) -> Value:
    """Replace elements of a known shape, as exporters do it for `shape[-2:] = …`."""
    known = base.data is not None and updates.data is not None and indices.data is not None
    if not known or not are_known(indices.data.flat) or call.text("reduction", "none") != "none":
        return same(base.shape)
    made = base.data.copy()
    try:
        made[tuple(np.moveaxis(indices.data.astype(int), -1, 0))] = updates.data
    except (IndexError, ValueError):
        raise NotKnown("an index that is not there") from None
    return from_data(call.symbols, made, is_real=base.is_real)


def slice_(call: Call) -> Value:
    """Slice: along other axes than that of the rows, or whole copies of the batch."""
    value = call.input(0)
    if value.kind is Kind.SAME and value.shape is None:
        call.need_same(1, 2, 3, 4)
        return value
    old = shape_of(value)
    if call.since < 10:  # they were attributes
        starts, ends, axes = (call.attribute(name) for name in ("starts", "ends", "axes"))
        steps: Sequence[Number] | None = None
    else:
        if call.optional(3) is None and value.data is None and call.input(1).data is None:
            raise NotKnown("where it cuts is computed by the model")
        axes, steps = call.integers(3), call.integers(4)
        starts, ends = (_bounds(call, at, axes, old) for at in (1, 2))
    if starts is None or ends is None:
        raise NotKnown("where it cuts is missing")
    places = [call.axis(each, len(old)) for each in (axes if axes is not None else range(len(starts)))]
    cuts = list(zip(places, starts, ends, steps or [1] * len(places), strict=False))
    if len(cuts) != len(starts) or len(cuts) != len(ends):
        raise NotKnown("numbers that do not fit each other")
    if value.data is not None and not any(isinstance(each, Size) for cut in cuts for each in cut):
        return _cut_data(call, value, cuts)
    made, outer = list(old), value.outer
    for axis, start, end, step in cuts:
        if value.kind in LAID_OUT and axis == value.axis:
            made[axis], outer = _cut_rows(call, value, start, end, step)
        elif value.kind is Kind.TUPLES and axis == len(old) - 1:
            raise NotKnown("it takes apart indices of rows")
        else:
            made[axis] = _cut(call, old[axis], start, end, step)
    if value.kind is Kind.FILL:
        return call.filled(made)
    if value.kind is Kind.COUNT:
        return Value(Kind.COUNT, None)
    return Value(value.kind, tuple(made), value.axis, outer, value.inner)


def _bounds(call: Call, at: int, axes: Sequence[int] | None, old: Sequence[Number]) -> list[Number]:
    """Return starts or ends; those that nobody knows are symbols if they do not depend on the rows."""
    value = call.input(at)
    if value.data is not None:
        return list(value.data.flat)
    if value.kind is not Kind.SAME:
        raise NotKnown("where it cuts is computed from the batch")
    count = len(axes) if axes is not None else len(old)
    return [call.symbols.result("Cut", call.symbols.unknown()) for _ in range(count)]


def _cut(call: Call, length: Number, start: Number, end: Number, step: Number) -> Number:
    """Return the length of a slice."""
    if not isinstance(end, Size) and end >= FAR and start == 0 and step == 1:
        return length
    if start == 0 and step == 1 and end == length:
        return length
    if not any(isinstance(each, Size) for each in (length, start, end, step)):
        _check_cut(length, start, step)
        return len(range(*slice(start, end, step).indices(length)))
    if any(map(call.symbols.mentions_rows, (length, start, end))):
        raise NotKnown("it cuts at the number of rows")
    return call.dimension("slice", length, start, end, step)


def _check_cut(length: int, start: int, step: int) -> None:
    """Refuse what Python cuts otherwise than ONNX, which begins at the first element then."""
    if step < 0 and start < -length:
        raise NotKnown("it cuts backwards from before the beginning")


def _cut_rows(call: Call, value: Value, start: Number, end: Number, step: Number) -> tuple[Number, Number]:
    """Cut along the rows: all of them, or whole copies of the batch, which exporters make for two halves.

    Returns:
        The length, and the number of copies.
    """
    length = shape_of(value)[value.axis]
    is_single = value.outer == 1 and value.inner == 1
    is_open = not isinstance(end, Size) and end >= (FAR_ROWS if is_single else FAR)
    if start == 0 and step == 1 and (is_open or end == length):
        return length, value.outer
    block = call.symbols.multiply(ROWS, value.inner)
    first = call.symbols.divide(start, block)
    last = call.symbols.divide(length if is_open else end, block)
    if step == 1 and isinstance(first, int) and isinstance(last, int) and isinstance(value.outer, int):
        if 0 <= first < last <= value.outer:
            return call.symbols.multiply(block, last - first), last - first
        raise NotKnown(f"it cuts axis {value.axis}, along which the rows lie")
    if is_single and not isinstance(start, Size) and not isinstance(end, Size):
        raise Coupling(f"takes certain rows from axis {value.axis}, along which the rows lie")
    raise NotKnown(f"it cuts axis {value.axis}, along which the rows lie")


def _cut_data(call: Call, value: Value, cuts: Sequence[tuple[int, Number, Number, Number]]) -> Value:
    index = [slice(None)] * value.data.ndim
    for axis, start, end, step in cuts:
        _check_cut(value.data.shape[axis], start, step)
        index[axis] = slice(start, end, step)
        if step < 0 and end < -value.data.shape[axis]:
            index[axis] = slice(start, None, step)
    return from_data(call.symbols, value.data[tuple(index)], is_real=value.is_real)


def split(call: Call) -> list[Value]:
    value = call.input(0)
    count = len(call.node.outputs)
    if value.kind is Kind.SAME and value.shape is None:
        call.need_same(1)
        return [value] * count
    old = shape_of(value)
    axis = call.axis(call.attribute("axis", 0), len(old))
    given = (
        call.numbers(1) if len(call.inputs) > 1 and call.inputs[1] is not None else call.attribute("split")
    )
    if value.data is not None and (given is None or all(isinstance(each, int) for each in given)):
        return _split_data(call, value, axis, given)
    if value.kind in LAID_OUT and axis == value.axis:
        return _split_rows(call, value, axis, given)
    if value.kind is Kind.TUPLES and axis == len(old) - 1:
        raise NotKnown("it takes apart indices of rows")
    if given is None:
        count = call.attribute("num_outputs", count)
        even = call.symbols.divide(old[axis], count)
        if even is not None:
            lengths = [even] * count
        elif isinstance(old[axis], int):
            part = -(-old[axis] // count)
            lengths = [min(part, max(0, old[axis] - part * at)) for at in range(count)]
        else:
            lengths = [call.dimension("split", old[axis], count, at) for at in range(count)]
    else:
        lengths = list(given)
        check_lengths(call, lengths)
    shapes = [(*old[:axis], length, *old[axis + 1 :]) for length in lengths]
    if value.kind is Kind.FILL:
        return [call.filled(each) for each in shapes]
    return [moved(value, each, value.axis) for each in shapes]


def _split_data(call: Call, value: Value, axis: int, given: Sequence[int] | None) -> list[Value]:
    count = len(call.node.outputs)
    length = value.data.shape[axis]
    part = -(-length // count)
    ends = [part * (at + 1) for at in range(count)] if given is None else list(np.cumsum(given))
    parts = np.split(value.data, [int(each) for each in ends[:-1]], axis)
    return [from_data(call.symbols, each, is_real=value.is_real) for each in parts]


def _split_rows(call: Call, value: Value, axis: int, given: Sequence[Number] | None) -> list[Value]:
    """Split along the rows: whole copies of the batch."""
    count, old = len(call.node.outputs), shape_of(value)
    block = call.symbols.multiply(ROWS, value.inner)
    if given is None:
        even = call.symbols.divide(value.outer, count)
        copies = [even] * count
    else:
        copies = [call.symbols.divide(each, block) for each in given]
    if not all(isinstance(each, int) and each > 0 for each in copies):
        if value.outer == 1 and value.inner == 1 and count > 1:
            raise Coupling(f"splits axis {axis}, along which the rows lie")
        if count == 1:
            return [value]
        raise NotKnown(f"it splits axis {axis}, along which the rows lie")
    lengths = [call.symbols.multiply(block, each) for each in copies]
    return [
        laid_out((*old[:axis], length, *old[axis + 1 :]), axis, each, value.inner, value.kind)
        for length, each in zip(lengths, copies, strict=True)
    ]


def compress(call: Call) -> Value:
    """Compress: elements of an axis that a condition selects."""
    value, condition = call.rows_of(call.input(0)), call.input(1)
    if value.kind is Kind.SAME and condition.kind is Kind.SAME:
        return same()
    old, axis = shape_of(value), call.attribute("axis")
    if axis is None or condition.kind is not Kind.SAME or value.kind is not Kind.ROWS:
        raise NotKnown("which elements it takes is computed from the batch")
    axis = call.axis(axis, len(old))
    if axis == value.axis:
        raise Coupling(f"takes certain rows from axis {axis}, along which the rows lie")
    return moved(value, (*old[:axis], call.symbols.unknown(), *old[axis + 1 :]), value.axis)


def reverse_sequence(call: Call) -> Value:
    value, lengths = call.rows_of(call.input(0)), call.rows_of(call.input(1))
    if value.kind is Kind.SAME and lengths.kind is Kind.SAME:
        return changed(value)
    rank = len(shape_of(value))
    batch, time = (
        call.axis(call.attribute(name, default), rank)
        for name, default in (("batch_axis", 1), ("time_axis", 0))
    )
    if value.kind is not Kind.ROWS:
        raise NotKnown("lengths of rows reverse a tensor without rows")
    if value.axis == time:
        raise Coupling(f"reverses axis {time}, along which the rows lie")
    if value.axis == batch and lengths.kind is Kind.ROWS and call.has_layout(value, lengths):
        return value
    if value.axis not in {batch, time} and lengths.kind is Kind.SAME:
        return value
    raise NotKnown("its lengths do not belong to the rows")


def trilu(call: Call) -> Value:
    value = call.plain(0)
    call.need_same(1)
    if value.kind is Kind.SAME:
        return same(value.shape)
    rank = len(shape_of(value))
    if value.axis >= rank - 2:
        raise Coupling(f"cuts a triangle from axis {value.axis}, along which the rows lie")
    return moved(value, shape_of(value), value.axis)


def one_hot(call: Call) -> Value:
    value = call.plain(0)
    call.need_same(1, 2)
    old = shape_of(value)
    axis = call.axis(call.attribute("axis", -1), len(old) + 1)
    depth = call.number_or_unknown(1)
    made = (*old[:axis], depth, *old[axis:])
    if value.kind is Kind.SAME:
        return same(made)
    return moved(value, made, value.axis + (axis <= value.axis))
