"""Rules of operators that compute each element from elements at the same place, with broadcasting."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.onnxgraph import BOOL, FLOAT, INT32, INT64
from runtime.rows.sizes import Number, Size, Symbols
from runtime.rows.values import (
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
    unknown,
)


def elementwise(call: Call) -> Value:
    """Broadcast the inputs; small known contents are computed."""
    values = call.present_inputs()
    data = _compute(call, values)
    if data is not None:
        return data
    return broadcast(call, values)


def broadcast(call: Call, values: Sequence[Value]) -> Value:
    """Return how a result depends on the rows whose elements come from elements at the same place.

    The first that applies:

    1. Nothing has rows, or one number fills all that mentions N: so it is with the result.
    2. The number of rows, or their positions, become an operand. Exporters of PyTorch broadcast indices by a
       Max, of which only the shape is used.
    3. All inputs have rows in the same way and are of one shape.
    4. Rows lie along the same axis, counted from the end, and in the same order. An input without rows has a
       dimension of 1 there, or none, or is filled with one number.

    Raises:
        Coupling: rows of one tensor meet rows of another, or the number of rows becomes an operand.
        NotKnown: dimensions are not known, or meet the rows without being 1.
    """
    kinds, first = {value.kind for value in values}, values[0]
    if kinds == {Kind.SAME}:  # 1
        if any(value.shape is None for value in values):
            return same()
        return same(broadcast_shapes(call, [shape_of(value) for value in values]))
    if kinds <= {Kind.SAME, Kind.FILL} and all(map(_is_one_number, values)):
        return call.filled(broadcast_shapes(call, [shape_of(value) for value in values]))
    if Kind.INDEX in kinds and kinds <= {Kind.SAME, Kind.FILL, Kind.INDEX, Kind.COUNT}:  # 2
        return Value(Kind.COUNT, tuple(broadcast_shapes(call, [shape_of(value) for value in values])))
    if kinds & {Kind.INDEX, Kind.TUPLES}:
        raise NotKnown("it computes with the positions of rows in the batch")
    if kinds <= {Kind.SAME, Kind.COUNT}:
        return Value(Kind.COUNT)
    if Kind.COUNT in kinds:
        if any(value.kind is Kind.COUNT and value.data is None for value in values):
            raise NotKnown("an input is computed from the number of rows")
        raise Coupling("uses the number of rows as a number")
    if kinds == {Kind.ROWS} and all(_is_alike(value, first) for value in values):  # 3
        return moved(first, shape_of(first), first.axis)
    if Kind.ROWS not in kinds:  # 4
        values = [call.rows_of(value) for value in values]
    shapes = [shape_of(value) for value in values]
    rank = max(map(len, shapes))
    # Each input's shape as if it had all dimensions of the result, and where its rows lie in it.
    spread = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    places = [rank - len(shape) + value.axis for value, shape in zip(values, shapes, strict=True)]
    at = next(at for at, value in enumerate(values) if value.kind is Kind.ROWS)
    rows, place = values[at], places[at]
    for value, shape, where in zip(values, spread, places, strict=True):
        if value.kind is Kind.ROWS and where != place:
            raise Coupling(f"pairs rows along axis {place} with rows along another axis")
        if value.kind is Kind.ROWS and not call.has_layout(value, rows):
            raise NotKnown("rows lie in different order in its inputs")
        fits = value.kind is Kind.ROWS or (value.kind is Kind.FILL and shape[place] == spread[at][place])
        if not fits and shape[place] != 1:
            raise NotKnown(
                f"an input without rows has a dimension of {show(shape[place])} where others have rows"
            )
        if any(call.symbols.mentions_rows(each) for axis, each in enumerate(shape) if axis != place):
            raise NotKnown("an input has the number of rows in several dimensions")
    return moved(rows, broadcast_shapes(call, shapes), place)


def _is_one_number(value: Value) -> bool:
    return value.kind is Kind.FILL or (value.shape is not None and all(each == 1 for each in value.shape))


def _is_alike(value: Value, other: Value) -> bool:
    """Whether two tensors with rows have the same shape and layout."""
    same_layout = value.outer == other.outer and value.inner == other.inner
    return value.shape == other.shape and value.axis == other.axis and same_layout


def show(length: Number) -> str:
    return "unknown length" if isinstance(length, Size) else str(length)


def broadcast_shapes(call: Call, shapes: Sequence[Sequence[Number]]) -> list[Number]:
    """Return the shape of the result of a broadcast, in which rows have been found to meet nothing else."""
    rank = max(map(len, shapes))
    made: list[Number] = []
    for at in range(rank):
        lengths = [shape[at - rank + len(shape)] for shape in shapes if at - rank + len(shape) >= 0]
        kept: list[Number] = []
        for each in lengths:
            if each != 1 and each not in kept:
                kept.append(each)
        whole = [each for each in kept if not isinstance(each, Size)]
        if len(kept) <= 1:
            made.append(kept[0] if kept else 1)
        elif whole:
            made.append(whole[0])
        elif any(map(call.symbols.mentions_rows, kept)):
            raise NotKnown("the number of rows meets another length")
        else:
            made.append(call.dimension("broadcast", *kept))
    return made


def keep_shape(call: Call) -> Value:
    """One input, changed element by element: also rows that are numbers of rows stay so."""
    value = call.input(0)
    if value.items is not None or value.kind in {Kind.INDEX, Kind.TUPLES}:
        raise NotKnown("it computes with the positions of rows in the batch")
    return elementwise(call)


def identity(call: Call) -> Value:
    return call.input(0)


def cast(call: Call) -> Value:
    """Cast: contents stay, as lengths do when exporters scale them as floats."""
    value, to = call.input(0), call.attribute("to", 0)
    if isinstance(to, bytes):  # version 1 names the type
        raise NotKnown("an old form of this operator")
    if value.data is not None:
        if to in {INT32, INT64}:
            bits = 32 if to == INT32 else 64
            data = _map(lambda each: _to_whole(call.symbols, each, bits), value.data)
            return from_data(call.symbols, data)
        if to == FLOAT:
            floats = _map(lambda each: _to_float(call.symbols, each), value.data)
            return from_data(call.symbols, floats, is_real=True)
        if to == BOOL and not any(isinstance(each, Size) for each in value.data.flat):
            return from_data(call.symbols, _map(bool, value.data))
    if value.kind is Kind.INDEX:
        return value if to in {INT32, INT64} else Value(Kind.COUNT, value.shape)
    if value.kind is Kind.TUPLES and to in {INT32, INT64}:
        return value
    if value.kind in {Kind.SAME, Kind.COUNT}:
        return Value(value.kind, value.shape)
    return keep_shape(call.with_inputs(0))


def cast_like(call: Call) -> Value:
    """Cast to the type of another input, of which nothing else counts."""
    return keep_shape(call.with_inputs(0))


def _to_float(symbols: Symbols, number: Number) -> Number:
    if isinstance(number, Size):
        return number if is_exact(symbols, [number], is_real=True) else symbols.result("Single", number)
    if abs(number) > MAX_DOUBLE:  # it would be rounded twice
        return symbols.result("Single", number)
    return _single(float(number))


def _to_whole(symbols: Symbols, number: Number, bits: int) -> Number:
    if isinstance(number, Size):
        is_kept = symbols.is_whole(number) and is_exact(symbols, [number], is_real=False)
        return number if is_kept else symbols.result("Cast", number, bits)
    if not math.isfinite(number) or abs(number) >= MAX_EXACT:
        return symbols.result("Overflow", number, bits)
    return int(number)


def prelu(call: Call) -> Value:
    return broadcast(call, call.present_inputs())


def dropout(call: Call) -> list[Value]:
    """Dropout draws random numbers in training mode only."""
    training = call.optional(2)
    if call.since < 7:  # it had the attribute is_test
        raise NotKnown("an old form of this operator")
    is_known = training is None or (
        training.data is not None and training.data.size == 1 and not isinstance(training.data.flat[0], Size)
    )
    if not is_known:  # also of a constant it would make random numbers
        return [unknown("whether it draws random numbers is computed by the model")] * 2
    if training is not None and bool(training.data.flat[0]):
        raise Coupling("draws random numbers")
    value = call.plain(0)
    return [value, value if value.data is None else Value(value.kind, value.shape)]


def einsum(call: Call) -> Value:
    """Einsum: the letter of the rows has to stand for rows in each input that has it, and in the output.

    1. Each input has a letter for each dimension; those of an ellipsis are aligned at its end.
    2. The rows of all inputs have the same letter, and the same layout.
    3. An input without rows does not have that letter, or a dimension of 1 there.
    4. The output has the letter once.
    """
    equation = call.text("equation", "").replace(" ", "")
    values = [call.rows_of(value) for value in call.present_inputs()]
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(values):
        raise NotKnown("an equation that does not fit its inputs")
    if not arrow:
        letters = sorted(set(left) - {",", "."})
        right = "..." * ("..." in left) + "".join(each for each in letters if left.count(each) == 1)
    ranks = [
        len(shape_of(value)) - len(term) + 3
        for value, term in zip(values, terms, strict=True)
        if "..." in term
    ]
    spread = "".join(map(chr, range(0x100, 0x100 + max([0, *ranks]))))
    terms = [_spell(term, spread, len(shape_of(value))) for value, term in zip(values, terms, strict=True)]
    right = right.replace("...", spread)
    rows: Value | None = None
    letter, lengths = "", dict[str, Number]()
    for value, term in zip(values, terms, strict=True):
        shape = shape_of(value)
        if len(shape) != len(term) or value.kind not in {Kind.SAME, Kind.ROWS}:
            raise NotKnown("an equation that does not fit its inputs")
        for each, length in zip(term, shape, strict=True):
            if lengths.get(each, 1) == 1:
                lengths[each] = length
        if value.kind is Kind.ROWS:
            if rows is not None and letter != term[value.axis]:
                raise Coupling(f"pairs rows of one input with rows of another ({equation})")
            if rows is not None and not call.has_layout(rows, value):
                raise NotKnown("rows lie in different order in its inputs")
            rows, letter = value, term[value.axis]
    if rows is None:
        return same([lengths[each] for each in right])
    for value, term in zip(values, terms, strict=True):
        if term.count(letter) > (value.kind is Kind.ROWS):
            at = term.index(letter)
            if value.kind is Kind.ROWS or shape_of(value)[at] != 1:
                raise NotKnown(f"an equation that repeats the letter of the rows ({equation})")
    if right.count(letter) != 1:
        raise Coupling(f"sums over the rows ({equation})")
    return laid_out([lengths[each] for each in right], right.index(letter), rows.outer, rows.inner)


def _spell(term: str, spread: str, rank: int) -> str:
    """Return the term of an input with letters in place of its ellipsis."""
    count = rank - len(term) + 3
    return term.replace("...", spread[len(spread) - count :]) if "..." in term else term


# Small known contents


def _compute(call: Call, values: Sequence[Value]) -> Value | None:
    """Return the result if all operands are known element by element; None otherwise."""
    compute = COMPUTE.get(call.node.operator)
    arrays = [value.data for value in values]
    if compute is None or not values or any(array is None for array in arrays):
        return None
    try:
        spread = np.broadcast_arrays(*arrays)
    except ValueError:
        raise NotKnown("shapes that do not fit each other") from None
    if spread[0].size > MAX_DATA:
        return None
    is_real = any(value.is_real for value in values)
    made = np.empty(spread[0].shape, dtype=object)
    flat = made.reshape(-1)
    for at, each in enumerate(zip(*(array.flat for array in spread), strict=True)):
        result = (
            compute(call.symbols, is_real, *each) if is_exact(call.symbols, each, is_real=is_real) else None
        )
        if result is None or not is_exact(call.symbols, (result,), is_real=is_real):
            result = call.symbols.result(call.node.operator, *each, is_real, is_whole=not is_real)
        flat[at] = result
    return from_data(call.symbols, made, is_real=is_real and call.node.operator not in COMPARISONS)


def _map(function: Callable[[Any], Any], array: Any) -> Any:
    made = np.empty(array.shape, dtype=object)
    made.reshape(-1)[:] = [function(each) for each in array.flat]
    return made


def is_exact(symbols: Symbols, numbers: Iterable[Number], *, is_real: bool) -> bool:
    """Whether these numbers are as ONNX Runtime has them: no 32 bits overflow, and no length is rounded.

    Lengths are taken to be below 2**16. In single precision, which has 24 bits, only a small multiple of a
    length is certain to be whole; numbers without lengths are rounded here, too.
    """
    parts = list(numbers)
    sizes = [each for each in parts if isinstance(each, Size)]
    if not sizes:
        return is_real or all(abs(each) < MAX_EXACT for each in parts)
    if not all(map(symbols.has_lengths_only, sizes)):
        return False
    most, degree = (MAX_MULTIPLE, 1) if is_real else (MAX_FACTOR, MAX_FACTORS)
    terms = [term for each in sizes for term in each.terms.items()]
    if any(abs(factor) > (most if term else MAX_FACTOR) or len(term) > degree for term, factor in terms):
        return False
    return all(abs(each) <= MAX_FACTOR for each in parts if not isinstance(each, Size))


MAX_DOUBLE = 2**53
"""The largest whole numbers that a double has all of."""
MAX_EXACT, MAX_FACTOR, MAX_MULTIPLE, MAX_FACTORS = 2**31, 2**16, 2**8, 4
"""Bounds of whole numbers, of factors and numbers beside lengths, of factors in single precision, and of the
lengths in a product: exporters multiply all lengths of a tensor, which has fewer than 2**31 elements."""
Compute = Callable[..., Number | None]


def _single(number: float) -> float:
    """Round as ONNX Runtime does, which computes in single precision."""
    with np.errstate(all="ignore"):
        return float(np.float32(number))


def _known(*numbers: Number) -> bool:
    return not any(isinstance(each, Size) for each in numbers)


def _sum(symbols: Symbols, is_real: bool, *numbers: Number) -> Number:  # noqa: FBT001
    total: Number = 0
    for each in numbers:
        total = symbols.add(total, each)
        total = _single(total) if is_real and _known(total) else total
    return total


def _difference(symbols: Symbols, is_real: bool, first: Number, second: Number) -> Number:  # noqa: FBT001
    made = symbols.add(first, second, -1)
    return _single(made) if is_real and _known(made) else made


def _product(symbols: Symbols, is_real: bool, first: Number, second: Number) -> Number:  # noqa: FBT001
    made = symbols.multiply(first, second)
    return _single(made) if is_real and _known(made) else made


def _quotient(symbols: Symbols, is_real: bool, first: Number, second: Number) -> Number | None:  # noqa: FBT001
    """Divide; whole numbers are cut, as ONNX does it."""
    if second == 0 or (is_real and not _known(second)):  # a length of 0 would make NaN
        return None
    exact = symbols.divide(first, second)
    if exact is not None:
        return float(exact) if is_real and _known(exact) else exact
    if not _known(first, second):
        return symbols.result(
            "quotient" if not is_real else "Div",
            first,
            second,
            is_length=_are_lengths(symbols, first, second),
        )
    if is_real:
        return _single(first / second)
    return abs(first) // abs(second) * (1 if (first < 0) == (second < 0) else -1)


def _are_lengths(symbols: Symbols, *numbers: Number) -> bool:
    return all(map(symbols.is_length, numbers))


def _compare(holds: Callable[[Any, Any], bool]) -> Compute:
    def compute(symbols: Symbols, _: bool, first: Number, second: Number) -> Number | None:  # noqa: FBT001
        if _known(first, second):
            return bool(holds(first, second))
        if not symbols.is_whole(first) or not symbols.is_whole(second):  # it may be NaN
            return None
        equal = symbols.is_equal(first, second)
        if equal is True:
            return bool(holds(0, 0))
        if holds is operator.eq and equal is False:
            return False
        difference = symbols.add(first, second, -1)
        if holds is not operator.eq and isinstance(difference, Size):
            constant = difference.terms.get((), 0)
            if symbols.is_length(difference) and constant > 0:
                return bool(holds(1, 0))
            reverse = symbols.multiply(difference, -1)
            if symbols.is_length(reverse) and constant < 0:
                return bool(holds(0, 1))
        return None

    return compute


def _where(symbols: Symbols, _: bool, condition: Number, first: Number, second: Number) -> Number | None:  # noqa: FBT001
    if _known(condition):
        return first if condition else second
    if first == second:
        return first
    return symbols.result("Where", condition, first, second, is_length=_are_lengths(symbols, first, second))


def _numeric(function: Callable[..., Any]) -> Compute:
    def compute(_: Symbols, is_real: bool, *numbers: Number) -> Number | None:  # noqa: FBT001
        if not _known(*numbers) or any(each != each for each in numbers):  # noqa: PLR0124 - NaN
            return None
        try:
            made = function(*numbers)
        except (ArithmeticError, ValueError):
            return None
        return _single(made) if is_real and isinstance(made, float) else made

    return compute


def _rounded(function: Callable[[float], int]) -> Compute:
    def compute(symbols: Symbols, _: bool, number: Number) -> Number | None:  # noqa: FBT001
        if isinstance(number, Size):
            return number if symbols.is_whole(number) else None
        return float(function(number)) if math.isfinite(number) else None

    return compute


COMPARISONS = {
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Not",
    "And",
    "Or",
    "Xor",
    "IsNaN",
    "IsInf",
}
"""Operators whose results are truth values."""
COMPUTE: Mapping[str, Compute] = {
    "Add": _sum,
    "Sum": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Div": _quotient,
    "Neg": lambda symbols, _, number: symbols.multiply(number, -1),
    "Abs": lambda symbols, _, number: (
        (number if symbols.is_length(number) else None) if isinstance(number, Size) else abs(number)
    ),
    "Floor": _rounded(math.floor),
    "Ceil": _rounded(math.ceil),
    "Round": _rounded(round),
    "Sqrt": _numeric(math.sqrt),
    "Max": _numeric(max),
    "Min": _numeric(min),
    "Pow": lambda symbols, is_real, first, second: None if is_real else _power(symbols, first, second),
    "Equal": _compare(operator.eq),
    "Less": _compare(operator.lt),
    "LessOrEqual": _compare(operator.le),
    "Greater": _compare(operator.gt),
    "GreaterOrEqual": _compare(operator.ge),
    "Not": _numeric(lambda one: not one),
    "And": _numeric(lambda one, other: bool(one and other)),
    "Or": _numeric(lambda one, other: bool(one or other)),
    "Xor": _numeric(lambda one, other: bool(one) != bool(other)),
    "Where": _where,
}
"""How results of known operands are computed, of operators without attributes; None leaves a symbol."""


def _power(symbols: Symbols, number: Number, exponent: Number) -> Number | None:
    if not _known(exponent) or exponent not in {1, 2, 3, 4}:
        return None
    return symbols.product([number] * int(exponent))
