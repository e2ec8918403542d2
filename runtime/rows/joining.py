"""Rules of operators that join, repeat and pad tensors."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.rows.elements import broadcast_shapes, show
from runtime.rows.shapes import are_known, check_lengths, objects
from runtime.rows.sizes import ROWS, Number
from runtime.rows.values import (
    LAID_OUT,
    MAX_DATA,
    Call,
    Coupling,
    Kind,
    NotKnown,
    Value,
    from_data,
    laid_out,
    moved,
    same,
    shape_of,
)


def concat(call: Call) -> Value:
    """Concat: along another axis than that of the rows, or copies of the batch one after the other."""
    values = call.present_inputs()
    if {value.kind for value in values} == {Kind.SAME} and any(value.shape is None for value in values):
        return same()
    shapes = [shape_of(value) for value in values]
    rank = len(shapes[0])
    axis = call.axis(call.attribute("axis", 1 if call.since < 4 else None), rank)
    if any(len(each) != rank for each in shapes):
        raise NotKnown("inputs with different numbers of dimensions")
    small = [value for value in values if value.kind in {Kind.SAME, Kind.COUNT}]
    sizes = [MAX_DATA + 1 if value.shape is None else call.symbols.product(value.shape) for value in values]
    is_small = are_known(sizes) and sum(sizes) <= MAX_DATA
    if is_small and len(small) == len(values) and any(value.data is not None for value in values):
        arrays = [_elements(call, value) for value in values]
        if all(array is not None for array in arrays):
            joined = np.concatenate(arrays, axis)
            return from_data(call.symbols, joined, is_real=any(value.is_real for value in values))
    if any(value.kind is Kind.COUNT for value in values):
        if len(small) == len(values):
            return Value(Kind.COUNT, None)
        raise NotKnown("it joins rows with numbers that depend on the number of rows")
    kinds = {value.kind for value in values}
    total: Number = 0
    for each in shapes:
        total = call.symbols.add(total, each[axis])
    made = [*shapes[0]]
    for at in range(rank):
        lengths = [each[at] for each in shapes]
        made[at] = next((each for each in lengths if isinstance(each, int)), lengths[0])
    made[axis] = total
    if kinds == {Kind.SAME}:
        return same(made)
    if kinds == {Kind.FILL} and len(values) == 1:
        return values[0]
    return _join_rows(call, [call.rows_of(value) for value in values], made, axis)


def _join_rows(call: Call, values: Sequence[Value], made: list[Number], axis: int) -> Value:
    rows = [value for value in values if value.kind in LAID_OUT]
    first = rows[0]
    shapes = [shape_of(value) for value in values]
    if len(rows) != len(values):
        raise NotKnown("it joins rows with a tensor that has none")
    if any(value.axis != first.axis for value in rows):
        raise Coupling("joins rows along one axis with rows along another")
    if axis == first.axis:
        if any(value.inner != first.inner for value in rows) or {value.kind for value in rows} != {Kind.ROWS}:
            raise NotKnown("rows lie in different order in its inputs")
        outer: Number = 0
        for value in rows:
            outer = call.symbols.add(outer, value.outer)
        return laid_out(made, axis, outer, first.inner)
    if not all(call.has_layout(value, first) for value in rows):
        raise NotKnown("rows lie in different order in its inputs")
    made[first.axis] = shapes[0][first.axis]
    kinds = [value.kind for value in rows]
    if set(kinds) == {Kind.ROWS}:
        return laid_out(made, first.axis, first.outer, first.inner)
    if len(rows) == 1:
        return first
    is_last = axis == len(made) - 1
    if is_last and kinds[0] is Kind.INDEX and shapes[0][axis] == 1 and set(kinds[1:]) <= {Kind.ROWS}:
        return laid_out(made, first.axis, first.outer, first.inner, Kind.TUPLES)
    raise NotKnown("it computes with the positions of rows in the batch")


def _elements(call: Call, value: Value) -> Any:
    """Return the elements of a small tensor, symbols where they are not known; None if there are many."""
    if value.data is not None:
        return value.data
    lengths = shape_of(value)
    if value.kind is not Kind.SAME or not are_known(lengths) or math.prod(lengths) > MAX_DATA:
        return None
    unknown = (call.symbols.result("Element", call.symbols.unknown()) for _ in range(math.prod(lengths)))
    return objects(unknown).reshape(lengths)


def expand(call: Call) -> Value:
    """Expand: broadcast to a shape, which may have the number of rows."""
    value, lengths = call.input(0), call.needed_numbers(1)
    check_lengths(call, lengths)
    return spread(call, value, lengths)


def spread(call: Call, value: Value, lengths: Sequence[Number]) -> Value:
    """Return a tensor broadcast to a shape.

    1. Small contents are repeated.
    2. Rows stay where they are; nothing else may be repeated as often as there are rows.
    3. A single number fills the shape.
    4. A tensor without rows, repeated along one axis as often as there are rows, has the same part in each.
    """
    old, symbols = shape_of(value), call.symbols
    rank = max(len(old), len(lengths))
    before = [1] * (rank - len(old)) + list(old)
    after = [1] * (rank - len(lengths)) + list(lengths)
    if value.data is not None and are_known(after) and math.prod(after) <= MAX_DATA:
        target = np.broadcast_shapes(tuple(before), tuple(after))
        return from_data(symbols, np.broadcast_to(value.data, target), is_real=value.is_real)
    if value.kind is Kind.COUNT:
        return Value(Kind.COUNT, None)
    new = [at for at in range(rank) if symbols.mentions_rows(after[at])]
    if value.kind in LAID_OUT:
        if value.kind is Kind.TUPLES and after[-1] not in {1, before[-1]}:
            raise NotKnown("it repeats indices of rows")
        place = value.axis + rank - len(old)
        if any(at != place for at in new) or after[place] not in {1, before[place]}:
            raise NotKnown("it repeats rows as often as there are rows")
        made = broadcast_shapes(call, [before, after])
        made[place] = before[place]
        return moved(value, made, place)
    if value.kind is Kind.FILL or all(each == 1 for each in before):
        return call.filled(broadcast_shapes(call, [before, after]))
    if not new:
        return same(broadcast_shapes(call, [before, after]))
    if len(new) > 1 or before[new[0]] != 1:
        raise NotKnown(f"it repeats a dimension of {show(before[new[0]])} as often as there are rows")
    inner = symbols.divide(after[new[0]], ROWS)
    if inner is None or symbols.mentions_rows(inner):
        raise NotKnown("a shape that mentions the number of rows in a way that is not followed")
    return laid_out(broadcast_shapes(call, [before, after]), new[0], 1, inner)


def tile(call: Call) -> Value:
    """Tile: copies of the rows one after the other, or of a tensor without rows for each row."""
    value, repeats = call.input(0), call.needed_numbers(1)
    if call.since < 6:
        raise NotKnown("an old form of this operator")
    if value.kind is Kind.SAME and value.shape is None:
        call.need_same(1)
        return value
    old, symbols = shape_of(value), call.symbols
    check_lengths(call, repeats)
    if len(repeats) != len(old):
        raise NotKnown("numbers that do not fit each other")
    made = [symbols.multiply(length, times) for length, times in zip(old, repeats, strict=True)]
    if value.data is not None and are_known(repeats) and math.prod(made) <= MAX_DATA:
        return from_data(symbols, np.tile(value.data, [int(each) for each in repeats]), is_real=value.is_real)
    if value.kind is Kind.FILL:
        return call.filled(made)
    if value.kind is Kind.COUNT:
        return Value(Kind.COUNT, None)
    new = [at for at, each in enumerate(repeats) if symbols.mentions_rows(each)]
    if value.kind in LAID_OUT:
        if new or (value.kind is not Kind.ROWS and repeats[-1] != 1):
            raise NotKnown("it repeats rows as often as there are rows")
        outer = symbols.multiply(value.outer, repeats[value.axis])
        return laid_out(made, value.axis, outer, value.inner, value.kind)
    if not new:
        return same(made)
    times = symbols.divide(repeats[new[0]], ROWS)
    if len(new) > 1 or times != 1:
        raise NotKnown("it repeats a tensor as often as there are rows in several dimensions")
    return laid_out(made, new[0], 1, old[new[0]])


def pad(call: Call) -> Value:
    """Pad: along other axes than that of the rows."""
    value = call.input(0)
    if value.kind is Kind.SAME and value.shape is None:
        call.need_same(1, 2, 3)
        return value
    old = shape_of(value)
    if call.since < 11:
        amounts = call.attribute("pads") or call.attribute("paddings")
        axes = list(range(len(old)))
    else:
        amounts = call.numbers(1)
        given = call.integers(3)
        axes = list(range(len(old))) if given is None else [call.axis(each, len(old)) for each in given]
        call.need_same(2)
    if amounts is None or len(amounts) != 2 * len(axes):
        raise NotKnown("numbers that do not fit each other")
    made = list(old)
    for at, axis in enumerate(axes):
        first, last = amounts[at], amounts[at + len(axes)]
        if first == 0 and last == 0:
            continue
        if any(map(call.symbols.mentions_rows, (first, last, old[axis]))):
            if value.kind in LAID_OUT and value.axis == axis:
                raise Coupling(f"adds rows to axis {axis}, along which the rows lie")
            raise NotKnown("it pads by the number of rows")
        made[axis] = call.symbols.add(call.symbols.add(old[axis], first), last)
    if value.kind in {Kind.INDEX, Kind.TUPLES}:
        raise NotKnown("it computes with the positions of rows in the batch")
    if value.kind is Kind.COUNT:
        return Value(Kind.COUNT, None)
    value = call.rows_of(value)
    return moved(value, made, value.axis)
