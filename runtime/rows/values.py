"""Knowledge of a tensor: its dependence on the rows of a batch, its shape, and small contents.

Rows lie along one axis of a tensor, whose length is `outer * N * inner`: element `(o * N + n) * inner + i`
belongs to row n. So a batch of sequences stays visible when a graph joins and separates its axes.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum, auto
from typing import Any, NoReturn

import msgspec
import numpy as np
from msgspec.structs import replace

from runtime.onnxgraph import BOOL, FLOAT, INT32, INT64, LONG, ConstantTensor, OperatorNode
from runtime.rows.sizes import ROWS, Number, Size, Symbols

MAX_DATA = 512
"""Elements of a tensor that are followed one by one: shapes, scales, axes and index lists are shorter."""


class Kind(IntEnum):
    """How a tensor depends on the rows.

    - SAME: not at all; its shape does not mention N either.
    - FILL: all its elements are one number, which does not depend on the rows; its shape may mention N.
    - ROWS: the part of row n depends on row n of the inputs alone.
    - INDEX: as ROWS, and every element of the part of row n is the number n.
    - TUPLES: indices along the last axis, of which the first is n and the others are as ROWS.
    - COUNT: it depends on the number of rows, and on nothing else of them.
    - SEQUENCE: a sequence of tensors, `items`.
    - UNKNOWN: that cannot be said.
    - COUPLED: a row's part depends on other rows.
    """

    SAME = auto()
    FILL = auto()
    ROWS = auto()
    INDEX = auto()
    TUPLES = auto()
    COUNT = auto()
    SEQUENCE = auto()
    UNKNOWN = auto()
    COUPLED = auto()


LAID_OUT = {Kind.ROWS, Kind.INDEX, Kind.TUPLES}
"""Kinds whose rows lie along an axis."""
SPOILT = {Kind.UNKNOWN, Kind.COUPLED}


class Value(msgspec.Struct, frozen=True, eq=False):
    """A tensor of a run.

    Attributes:
        kind: how it depends on the rows.
        shape: its dimensions; None if even their number is not known, which only SAME and COUNT may have.
        axis: the axis of the rows, with `outer` and `inner`, for the kinds that are laid out.
        data: its elements, an array of objects of that shape, for SAME and COUNT; None if not known.
        is_real: whether the elements of `data` are floats.
        reason: for UNKNOWN and COUPLED: the operator and what it does.
        items: the elements of a sequence of tensors, as one tensor; `shape` is then None.
    """

    kind: Kind
    shape: tuple[Number, ...] | None = None
    axis: int = 0
    outer: Number = 1
    inner: Number = 1
    data: Any = None
    is_real: bool = False
    reason: str = ""
    items: "Value | None" = None


class Coupling(Exception):
    """An operator computes across rows, so that a row's answer depends on other rows."""


class NotKnown(Exception):
    """Nothing can be said about what an operator does to rows."""


def same(shape: Iterable[Number] | None = None) -> Value:
    return Value(Kind.SAME, None if shape is None else tuple(shape))


def from_data(symbols: Symbols, data: Any, *, is_real: bool = False) -> Value:
    """Return a tensor of known elements."""
    array = np.asarray(data, dtype=object)
    kind = Kind.COUNT if any(map(symbols.mentions_rows, array.flat)) else Kind.SAME
    return Value(kind, array.shape, data=array if array.size <= MAX_DATA else None, is_real=is_real)


def from_tensor(symbols: Symbols, tensor: ConstantTensor) -> Value:
    """Return a constant of the file.

    Its elements are followed in the types in which exporters compute shapes; others overflow or round.
    """
    values = tensor.values
    if values is None or values.size > MAX_DATA or tensor.element not in {FLOAT, INT32, INT64, BOOL}:
        return same(tensor.shape)
    data = np.empty(values.shape, dtype=object)
    data[...] = np.array(values.tolist(), dtype=object).reshape(values.shape)
    return from_data(symbols, data, is_real=values.dtype.kind == "f")


def laid_out(
    shape: Iterable[Number], axis: int, outer: Number = 1, inner: Number = 1, kind: Kind = Kind.ROWS
) -> Value:
    return Value(kind, tuple(shape), axis, outer, inner)


def moved(value: Value, shape: Iterable[Number], axis: int) -> Value:
    """Return a tensor with the rows of another one along this axis."""
    return Value(value.kind, tuple(shape), axis, value.outer, value.inner)


def changed(value: Value) -> Value:
    """Return a tensor whose elements are others, each made of those of the same row."""
    return replace(value, data=None, is_real=False)


def unknown(words: str) -> Value:
    """Return an output of which nothing is known, beside others of the same operator."""
    return Value(Kind.UNKNOWN, reason=f"it is not known whether rows are kept apart: {words}")


class Call:
    """One application of an operator.

    Attributes:
        node: the operator.
        since: the version of the operator's definition, by the model's operator set.
        inputs: its inputs; None for one that is left out.
        symbols: the symbols of the walk.
    """

    def __init__(
        self,
        node: OperatorNode,
        since: int,
        inputs: Sequence[Value | None],
        symbols: Symbols,
        attributes: Any,
    ) -> None:
        self.node = node
        self.since = since
        self.inputs = inputs
        self.symbols = symbols
        self._attributes = attributes

    def with_inputs(self, *positions: int) -> "Call":
        """Return the call of a related operator, with these of the inputs."""
        inputs = [self.optional(at) for at in positions]
        return Call(self.node, self.since, inputs, self.symbols, self._attributes)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or its default if the operator does not have it."""
        found = self._attributes(name)
        if found is LONG:
            raise NotKnown("an attribute is too long to be read")
        return default if found is None else found

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return an attribute that is 0 or 1: of others ONNX Runtime takes some for 0."""
        found = self.attribute(name, int(default))
        if found not in {0, 1}:
            raise NotKnown(f"{name} is neither 0 nor 1")
        return bool(found)

    def text(self, name: str, default: str) -> str:
        found = self.attribute(name)
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else default

    def optional(self, at: int) -> Value | None:
        return self.inputs[at] if at < len(self.inputs) else None

    def input(self, at: int) -> Value:
        """Return a required input."""
        found = self.optional(at)
        if found is None:
            raise NotKnown("an input is missing")
        return found

    def present_inputs(self) -> list[Value]:
        return [each for each in self.inputs if each is not None]

    def shape(self, at: int) -> tuple[Number, ...]:
        """Return an input's shape, whose number of dimensions has to be known."""
        return shape_of(self.input(at))

    def integers(self, at: int) -> list[int] | None:
        """Return the whole numbers of an input; None if it is left out.

        Raises:
            NotKnown: they are not known before a run.
        """
        value = self.optional(at)
        if value is None:
            return None
        if value.data is None or not all(isinstance(each, int) for each in value.data.flat):
            raise NotKnown("numbers that say along which axis, or how far, are computed by the model")
        return [int(each) for each in value.data.flat]

    def numbers(self, at: int) -> list[Number] | None:
        """Return the elements of an input, which may be symbolic; None if it is left out."""
        value = self.optional(at)
        if value is None:
            return None
        if value.data is None:
            raise NotKnown("a shape is computed by the model in a way that is not followed")
        return list(value.data.flat)

    def needed_numbers(self, at: int) -> list[Number]:
        """Return the elements of a required input."""
        self.input(at)
        return self.numbers(at) or []

    def number_or_unknown(self, at: int) -> Number:
        """Return the only element of an input, as a symbol if it is not known."""
        value = self.input(at)
        if value.data is not None and value.data.size == 1:
            found = value.data.flat[0]
            if not self.symbols.is_whole(found):
                raise NotKnown("a length that is no whole number")
            return found if isinstance(found, Size) else int(found)
        if value.kind is not Kind.SAME:
            raise NotKnown("a number is computed from the batch")
        return self.symbols.unknown()

    def axis(self, axis: Any, rank: int) -> int:
        """Return a non-negative axis."""
        if not isinstance(axis, int) or not -rank <= axis < rank:
            raise NotKnown("an axis that is not there")
        return axis % rank

    def axes(self, at: int, rank: int, name: str = "axes") -> list[int] | None:
        """Return axes: newer versions of an operator have them as an input, older ones as an attribute."""
        given = self.integers(at)
        if given is None:
            given = self.attribute(name)
        return None if given is None else [self.axis(each, rank) for each in given]

    def need_same(self, *positions: int) -> None:
        """Refuse inputs that depend on the rows."""
        for at in positions:
            value = self.optional(at)
            if value is not None and value.kind is not Kind.SAME:
                raise NotKnown(f"its input {at} depends on the rows of the batch")

    def need_rows(self, at: int, like: Value, axis: int = 0) -> None:
        """Refuse an input without rows along this axis, in the same order as those of another tensor."""
        value = self.plain(at)
        if value.kind is not Kind.ROWS or value.axis != axis:
            raise NotKnown(f"its input {at} has no rows along axis {axis}")
        if not self.has_layout(value, like):
            raise NotKnown("rows lie in different order in its inputs")

    def plain(self, at: int) -> Value:
        """Return an input that is ROWS or SAME; a FILL has rows along the axis of N."""
        value = self.rows_of(self.input(at))
        if value.kind not in {Kind.SAME, Kind.ROWS}:
            raise NotKnown("it computes with the number of rows, or with their positions")
        return value

    def refuse_axis(self, axis: int) -> NoReturn:
        raise Coupling(f"computes across axis {axis}, along which the rows lie")

    # Values made of others

    def dimension(self, operation: str, *operands: Number) -> Number:
        """Return a length that follows from these operands, and that nothing else is known of."""
        if any(map(self.symbols.mentions_rows, operands)):
            raise NotKnown("a length depends on the number of rows")
        return self.symbols.result(operation, *operands, is_length=True, is_whole=True)

    def rows_of(self, value: Value) -> Value:
        """Return a FILL as rows along the only axis that mentions N."""
        if value.kind is not Kind.FILL:
            return value
        shape = shape_of(value)
        axes = [at for at, each in enumerate(shape) if self.symbols.mentions_rows(each)]
        inner = self.symbols.divide(shape[axes[0]], ROWS) if len(axes) == 1 else None
        if inner is None or self.symbols.mentions_rows(inner):
            raise NotKnown("its input has the number of rows in several dimensions")
        return laid_out(shape, axes[0], 1, inner)

    def filled(self, shape: Iterable[Number]) -> Value:
        """Return a tensor whose elements are all one number."""
        made = tuple(shape)
        mentions = any(map(self.symbols.mentions_rows, made))
        return Value(Kind.FILL if mentions else Kind.SAME, made)

    def has_layout(self, value: Value, other: Value) -> bool:
        """Whether rows lie in the same way along the axes of two tensors."""
        return bool(value.outer == other.outer and value.inner == other.inner)


def shape_of(value: Value) -> tuple[Number, ...]:
    if value.shape is None:
        raise NotKnown("the number of dimensions of its input is not known")
    return value.shape


Rule = Callable[[Call], Value | Sequence[Value]]
"""Says how an operator's outputs depend on the rows; raises Coupling or NotKnown."""
RuleOfSeveral = Callable[[Call], Sequence[Value]]
"""The same, of an operator that may have several outputs."""
