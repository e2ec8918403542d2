"""Rules of sequences of tensors, which exporters write for lists: all elements are treated as one tensor."""

from msgspec.structs import replace

from runtime.rows.sizes import Size
from runtime.rows.values import Call, Kind, NotKnown, Value, laid_out, moved, same, shape_of

EMPTY = Value(Kind.SEQUENCE)
"""A sequence without elements."""


def join(call: Call, first: Value, second: Value) -> Value:
    """Return a tensor that may be one or the other.

    Raises:
        NotKnown: they depend on the rows in different ways.
    """
    first, second = call.rows_of(first), call.rows_of(second)
    if first.kind is not second.kind:
        raise NotKnown("two values that depend on the rows in different ways")
    if first.kind is Kind.SEQUENCE:
        return join_sequences(call, first, second)
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        if first.kind in {Kind.SAME, Kind.COUNT}:
            return Value(first.kind)
        raise NotKnown("two values with different numbers of dimensions")
    if first.kind is not Kind.SAME and (first.axis != second.axis or not call.has_layout(first, second)):
        raise NotKnown("two values whose rows lie along different axes")
    pairs = zip(first.shape, second.shape, strict=True)
    made = [one if one == other else call.symbols.unknown() for one, other in pairs]
    if first.kind is Kind.COUNT:
        return Value(Kind.COUNT)
    if first.kind is not Kind.SAME:
        made[first.axis] = first.shape[first.axis]
    is_equal = first.data is not None and second.data is not None and _is_equal(first, second)
    return replace(first, shape=tuple(made), data=first.data if is_equal else None)


def _is_equal(first: Value, second: Value) -> bool:
    return first.data.shape == second.data.shape and list(first.data.flat) == list(second.data.flat)


def join_sequences(call: Call, first: Value, second: Value) -> Value:
    if first.items is None or second.items is None:
        return first if second.items is None else second
    return replace(first, items=join(call, first.items, second.items))


def sequence_empty(call: Call) -> Value:
    del call
    return EMPTY


def _sequence(call: Call, at: int) -> Value:
    value = call.input(at)
    if value.kind is not Kind.SEQUENCE:
        raise NotKnown("it takes a sequence")
    return value


def sequence_construct(call: Call) -> Value:
    items = call.input(0)
    for value in call.present_inputs()[1:]:
        items = join(call, items, value)
    return replace(EMPTY, items=items)


def sequence_insert(call: Call) -> Value:
    sequence = _sequence(call, 0)
    call.need_same(2)
    return join_sequences(call, sequence, replace(EMPTY, items=call.input(1)))


def sequence_at(call: Call) -> Value:
    sequence = _sequence(call, 0)
    call.need_same(1)
    return one_of(call, sequence)


def one_of(call: Call, sequence: Value) -> Value:
    """Return an element of a sequence: open lengths of one are not those of another, but for those with N."""
    items = sequence.items
    if items is None:
        raise NotKnown("a sequence without elements")
    if items.shape is None or items.kind is Kind.SEQUENCE:
        return items
    mentions = call.symbols.mentions_rows
    shape = [
        call.symbols.unknown() if isinstance(each, Size) and not mentions(each) else each
        for each in items.shape
    ]
    return replace(items, shape=tuple(shape), data=None)


def sequence_length(call: Call) -> Value:
    _sequence(call, 0)
    return same(())


def split_to_sequence(call: Call) -> Value:
    value = call.plain(0)
    call.need_same(1)
    old = shape_of(value)
    axis = call.axis(call.attribute("axis", 0), len(old))
    if value.kind is Kind.ROWS and value.axis == axis:
        raise NotKnown(f"it splits axis {axis}, along which the rows lie")
    keeps = call.optional(1) is not None or call.flag("keepdims", default=True)
    length = 1 if call.optional(1) is None else call.symbols.unknown()
    made = [*old[:axis], *([length] if keeps else []), *old[axis + 1 :]]
    place = value.axis if keeps else value.axis - (axis < value.axis)
    return replace(EMPTY, items=moved(value, made, place))


def concat_from_sequence(call: Call) -> Value:
    items = _sequence(call, 0).items
    if items is None:
        raise NotKnown("a sequence without elements")
    items = call.rows_of(items)
    old = shape_of(items)
    is_new = call.flag("new_axis")
    axis = call.axis(call.attribute("axis", 0), len(old) + is_new)
    rest = old[axis:] if is_new else old[axis + 1 :]
    made = (*old[:axis], call.symbols.unknown(), *rest)
    if items.kind is Kind.SAME:
        return same(made)
    if items.kind is not Kind.ROWS or (not is_new and items.axis == axis):
        raise NotKnown("it joins rows with rows")
    return laid_out(made, items.axis + (is_new and axis <= items.axis), items.outer, items.inner)


def sequence_erase(call: Call) -> Value:
    call.need_same(1)
    return _sequence(call, 0)


def optional(call: Call) -> Value:
    """An optional value, and what it holds."""
    return call.input(0)


def has_element(call: Call) -> Value:
    """Whether a value is there does not depend on what it is."""
    del call
    return same(())
