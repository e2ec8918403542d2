"""Random ONNX graphs in which the rows of a batch stay independent, one operator at a time.

A `Draft` is a graph under construction. It knows where the batch stands in every live value: a `LiveValue`
has one axis that holds the batch, `shape[axis] == ROWS`, whose extent at run time is
`before * N * after` for N rows. `before` and `after` are 1 until a Reshape merges the batch with its
neighbours: [N, T, C] -> [N*T, C] has `after == T`, and [T, N, C] -> [T*N, C] has `before == T`.

A *step* takes live values, appends nodes, and returns new live values whose rows depend only on the same
rows of its inputs. That holds by construction, not by analysis: each step keeps away from the batch axis,
and only `reshape` and `transpose` move it. A step asks the draft for the values it needs (`floats(4, 5)`,
`integers(7, 3)`): the draft returns a live value that fits, or brings another one into that form.

Floats stay tame: a step returns values of a few units, so that no chain of steps overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import (
    FunctionProto,
    GraphProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    ValueInfoProto,
    defs,
    helper,
    numpy_helper,
)

ROWS = -1
"""The extent of the batch axis in `LiveValue.shape`."""
WORDS = ("cat", "dog", "owl", "bee", "a cat", "big dog", "", "Ünïcode")
"""Strings that inputs hold and that string operators know."""
FUNCTION_DOMAIN = "tests.rows"
"""Domain of the model-local functions."""
KINDS: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "uint32": TensorProto.UINT32,
    "bool": TensorProto.BOOL,
    "string": TensorProto.STRING,
}
"""Element types of live values, by the name that NumPy has for them."""
SCALE = np.float32(0.05)
"""Scale of quantised values: eight bits then cover the floats of a draft."""

T = TypeVar("T")
Array = NDArray[Any]


@dataclass(frozen=True)
class LiveValue:
    """A value of the graph that later steps may use.

    Attributes:
        name: Name in the graph.
        kind: Element type, a key of `KINDS`.
        shape: Extents; ROWS at the batch axis.
        before: Factor of the batch axis that varies slower than the row.
        after: Factor of the batch axis that varies faster than the row.
        limit: Integers lie in [0, limit); 0 if they may lie elsewhere.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    before: int = 1
    after: int = 1
    limit: int = 0

    @property
    def axis(self) -> int:
        return self.shape.index(ROWS)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_merged(self) -> bool:
        return self.before * self.after != 1

    @property
    def is_plain(self) -> bool:
        """Whether rows are the first axis, as a served input has them."""
        return self.axis == 0 and not self.is_merged

    @property
    def inner(self) -> tuple[int, ...]:
        """Axes that do not hold the batch."""
        return tuple(axis for axis in range(self.rank) if axis != self.axis)


@dataclass
class Scope:
    """A graph, the body of a control-flow operator, or the body of a function."""

    live: list[LiveValue]
    is_function: bool = False
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)


class Draft:
    """A graph under construction; see the module's docstring.

    Attributes:
        rng: Source of all random choices.
        opset: Version of the standard operators.
        ml_opset: Version of the operators of `ai.onnx.ml`.
        is_free: Whether an input has a further dynamic axis. No Reshape may then infer the batch's extent.
        marks: For each name, which marked values it depends on: the coupling, a forced operator.
    """

    def __init__(self, rng: np.random.Generator, *, opset: int, ml_opset: int, is_free: bool) -> None:
        self.rng = rng
        self.opset = opset
        self.ml_opset = ml_opset
        self.is_free = is_free
        self.scopes = [Scope([])]
        self.functions: list[FunctionProto] = []
        self.marks: dict[str, frozenset[str]] = {}
        self._count = 0

    # Random choices

    def chance(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def integer(self, low: int, high: int) -> int:
        """Draw from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def choose(self, among: Sequence[T]) -> T:
        return among[int(self.rng.integers(len(among)))]

    def extents(self, rank: int, high: int = 5) -> tuple[int, ...]:
        return tuple(self.integer(1 if self.chance(0.1) else 2, high) for _ in range(rank))

    # Nodes and constants

    @property
    def scope(self) -> Scope:
        return self.scopes[-1]

    def new_name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def supports(self, operator: str, since: int = 1, until: int = 99) -> bool:
        """Return whether the model's opset has the operator."""
        domain, _, op = operator.rpartition(".")
        if not since <= self.opset <= until:
            return False
        if domain == "com.microsoft":
            return True
        return has_operator(domain, op, self.ml_opset if domain else self.opset)

    def nodes(self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs; return their names."""
        names = [self.new_name() for _ in range(outputs)]
        self.append(operator, inputs, names, **attributes)
        return names

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; return the output's name."""
        return self.nodes(operator, inputs, 1, **attributes)[0]

    def append(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        domain, _, op = operator.rpartition(".")
        used = {name: value for name, value in attributes.items() if value is not None}
        made = helper.make_node(op, list(inputs), list(outputs), domain=domain, **used)
        self.scope.nodes.append(made)
        self.mark(outputs, frozenset().union(*(self.marks.get(name, frozenset()) for name in inputs)))

    def mark(self, names: Sequence[str], marks: frozenset[str]) -> None:
        if marks:
            self.scope.marks |= marks
            for name in names:
                self.marks[name] = self.marks.get(name, frozenset()) | marks

    def constant(self, array: Any, kind: str = "") -> str:
        """Add a constant as an initializer or as a Constant node."""
        data = np.asarray(array, dtype=kind or None)
        if data.dtype.kind == "U":
            data = data.astype(object)
        name = self.new_name()
        is_typed = data.dtype in (np.int64, np.float32) and data.ndim < 2 and data.size > 0
        # before opset 9 a Constant node holds floats only
        if self.scope.is_function or (self.chance(0.3) and (self.opset >= 9 or data.dtype == np.float32)):
            value: dict[str, Any] = {"value": numpy_helper.from_array(data, name)}
            if self.opset >= 12 and is_typed and self.chance():
                kind = "int" if data.dtype == np.int64 else "float"
                value = {f"value_{kind}s": data.tolist()} if data.ndim else {f"value_{kind}": data.item()}
            self.scope.nodes.append(helper.make_node("Constant", [], [name], **value))
        elif is_typed and self.chance(0.3):
            element = helper.np_dtype_to_tensor_dtype(data.dtype)
            self.scope.initializers.append(helper.make_tensor(name, element, data.shape, data.ravel()))
        else:
            self.scope.initializers.append(numpy_helper.from_array(data, name))
        return name

    def whole(self, *numbers: int) -> str:
        """Add a constant vector of 64-bit integers."""
        return self.constant(np.array(numbers, np.int64))

    def weights(self, *shape: int, fan_in: int = 1) -> str:
        """Add constant weights whose sums over `fan_in` of them stay small."""
        return self.constant((self.rng.normal(size=shape) / math.sqrt(max(fan_in, 1))).astype(np.float32))

    def positive(self, *shape: int) -> str:
        """Add constant weights from 0.5 to 1.5."""
        return self.constant(self.rng.uniform(0.5, 1.5, shape).astype(np.float32))

    # Operators whose form depends on the opset

    def reduce(self, operator: str, name: str, axes: Sequence[int] | None, *, keepdims: bool) -> str:
        listed = None if axes is None else list(axes)
        if self.opset >= (13 if operator == "ReduceSum" else 18):
            inputs = [name] if listed is None else [name, self.whole(*listed)]
            return self.node(operator, *inputs, keepdims=int(keepdims))
        return self.node(operator, name, axes=listed, keepdims=int(keepdims))

    def unsqueeze(self, name: str, *axes: int) -> str:
        if self.opset >= 13:
            return self.node("Unsqueeze", name, self.whole(*axes))
        return self.node("Unsqueeze", name, axes=list(axes))

    def squeeze(self, name: str, *axes: int) -> str:
        if self.opset >= 13:
            return self.node("Squeeze", name, self.whole(*axes))
        return self.node("Squeeze", name, axes=list(axes))

    def clip(self, name: str, low: float, high: float) -> str:
        if self.opset >= 11:
            return self.node("Clip", name, self.constant(np.float32(low)), self.constant(np.float32(high)))
        return self.node("Clip", name, min=float(low), max=float(high))

    def slice(self, name: str, axis: int, start: int, end: int, stride: int = 1) -> str:
        if self.opset >= 10:
            inputs = [self.whole(start), self.whole(end), self.whole(axis)]
            return self.node("Slice", name, *inputs, *([self.whole(stride)] if stride != 1 else []))
        assert stride == 1
        return self.node("Slice", name, axes=[axis], starts=[start], ends=[end])

    def cast(self, name: str, kind: str) -> str:
        return self.node("Cast", name, to=KINDS[kind])

    def split(self, name: str, axis: int, sizes: Sequence[int]) -> list[str]:
        if self.opset >= 13:
            return self.nodes("Split", [name, self.whole(*sizes)], len(sizes), axis=axis)
        return self.nodes("Split", [name], len(sizes), axis=axis, split=list(sizes))

    def pad(self, name: str, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> str:
        if self.opset >= 11:
            filler = [self.constant(np.float32(value))] if mode == "constant" and self.chance() else []
            return self.node("Pad", name, self.whole(*pads), *filler, mode=mode)
        return self.node("Pad", name, mode=mode, pads=list(pads), value=value)

    def top_k(self, name: str, count: int | str, axis: int, **attributes: int) -> list[str]:
        if self.opset >= 10:
            return self.nodes(
                "TopK",
                [name, count if isinstance(count, str) else self.whole(count)],
                2,
                axis=axis,
                **attributes,
            )
        return self.nodes("TopK", [name], 2, axis=axis, k=count)

    def signed(self, axis: int, rank: int) -> int:
        """Write an axis from the end, where the opset allows it, half of the time."""
        return axis - rank if self.opset >= 13 and self.chance() else axis

    def bound(self, name: str) -> str:
        """Bring floats back to a few units."""
        match self.integer(0, 4):
            case 0:
                return self.node("Tanh", name)
            case 1:
                return self.clip(name, -3, 3)
            case 2:
                return self.node("Softsign", name)
            case 3:
                return self.node("Sigmoid", name)
            case _:
                return self.node("HardSigmoid", name, alpha=0.1)

    # Forms of a value

    def like(self, x: LiveValue, name: str, **changes: Any) -> LiveValue:
        """Return a value with the form of another one."""
        return replace(x, name=name, **{"limit": 0, **changes})

    def plain(self, name: str, *shape: int, kind: str = "float32", limit: int = 0) -> LiveValue:
        """Return a value with rows on its first axis."""
        return LiveValue(name, kind, (ROWS, *shape), limit=limit)

    def transpose(self, x: LiveValue, perm: Sequence[int]) -> LiveValue:
        return replace(
            x,
            name=self.node("Transpose", x.name, perm=list(perm)),
            shape=tuple(x.shape[axis] for axis in perm),
        )

    def move(self, x: LiveValue, axis: int) -> LiveValue:
        """Move the batch axis."""
        if x.axis == axis:
            return x
        perm = list(x.inner)
        perm.insert(axis, x.axis)
        return self.transpose(x, perm)

    def rows(self, x: LiveValue | None = None, factor: int = 1) -> str:
        """Compute `factor` times the number of rows, int64 [1], from a shape as exporters do."""
        anchors = [live for live in self.scope.live if not live.is_merged]
        if x is None or (x.is_merged and self.is_free) or (anchors and self.chance(0.2)):
            x = self.choose(anchors) if anchors else x
        assert x is not None
        scale = x.before * x.after
        match self.integer(0, 3):
            case 0 if self.opset >= 15:
                got = self.node("Shape", x.name, start=x.axis, end=x.axis + 1)
            case 1:
                got = self.slice(self.node("Shape", x.name), 0, x.axis, x.axis + 1)
            case 2:
                got = self.node("Gather", self.node("Shape", x.name), self.whole(x.axis))
            case _:
                got = self.node("Gather", self.node("Shape", x.name), self.constant(np.int64(x.axis)))
                got = self.unsqueeze(self._scaled(got, scale, factor), 0)
                scale = factor
        return self._scaled(got, scale, factor)

    def _scaled(self, name: str, scale: int, factor: int) -> str:
        if factor % scale:
            name, scale = self.node("Div", name, self.constant(np.int64(scale))), 1
        if factor != scale:
            name = self.node("Mul", name, self.constant(np.int64(factor // scale)))
        return name

    def shape_of(self, shape: Sequence[int], factor: int = 1, x: LiveValue | None = None) -> str:
        """Compute a shape, with the number of rows times `factor` in the place of ROWS."""
        parts = [self.rows(x, factor) if extent == ROWS else self.whole(extent) for extent in shape]
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=0)

    def reshape(self, x: LiveValue, shape: Sequence[int], before: int = 1, after: int = 1) -> LiveValue:
        """Append a Reshape in one of the forms that exporters write.

        The caller sees to it that the elements before and after each row stay there.
        """
        target = tuple(shape)
        axis = target.index(ROWS)
        rank = min(x.rank, len(target))
        is_kept = axis == x.axis and (before, after) == (x.before, x.after)
        same = [i for i in range(rank) if target[i] == x.shape[i] and (i != axis or is_kept)]
        others = [i for i in range(len(target)) if i != axis]
        made = replace(x, shape=target, before=before, after=after)
        form = self.integer(0, 3)
        if form == 0 and axis in same:  # zeros copy extents, the batch's among them
            numbers = [0 if i == axis or (i in same and self.chance()) else n for i, n in enumerate(target)]
            if others and self.chance():
                numbers[self.choose(others)] = -1
            return replace(made, name=self.node("Reshape", x.name, self.whole(*numbers)))
        if form <= 1 and not self.is_free:  # the batch's extent is inferred
            numbers = [0 if i != axis and i in same and self.chance(0.3) else n for i, n in enumerate(target)]
            return replace(made, name=self.node("Reshape", x.name, self.whole(*numbers)))
        inferred = self.choose(others) if others and self.chance() else -1
        numbers = [-1 if i == inferred else n for i, n in enumerate(target)]
        parts = [
            self.rows(x, before * after) if i == axis else self.whole(numbers[i]) for i in range(len(target))
        ]
        joined = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=0)
        return replace(made, name=self.node("Reshape", x.name, joined))

    def flatten(self, x: LiveValue) -> LiveValue:
        """Bring a plain value to [N, F]."""
        width = math.prod(x.shape[1:])
        if x.rank == 2 and self.chance(0.9):
            return x
        if self.chance(0.3):
            return replace(x, name=self.node("Flatten", x.name, axis=1), shape=(ROWS, width))
        return self.reshape(x, (ROWS, width))

    def restore(self, x: LiveValue) -> LiveValue:
        """Bring rows to the first axis."""
        if x.is_merged:
            axis = x.axis
            parts = ([x.before] if x.before > 1 else []) + [ROWS] + ([x.after] if x.after > 1 else [])
            x = self.reshape(x, (*x.shape[:axis], *parts, *x.shape[axis + 1 :]))
        return self.move(x, 0)

    def pack(self, x: LiveValue, shape: tuple[int, ...], before: int, after: int) -> LiveValue:
        """Bring a plain value [N, before, after, *others] to a form with the batch axis elsewhere."""
        axis = shape.index(ROWS)
        others = [3 + i for i in range(len(shape) - 1)]
        x = self.reshape(x, (ROWS, before, after, *shape[:axis], *shape[axis + 1 :]))
        x = self.transpose(x, [*others[:axis], 1, 0, 2, *others[axis:]])
        return self.reshape(x, shape, before, after)

    # Values that a step asks for

    def recent(self, values: Sequence[LiveValue]) -> LiveValue:
        """Choose a value, a recent one more likely, so that graphs get deep."""
        if self.chance(0.6):
            return values[max(len(values) - 1 - int(self.rng.geometric(0.5)), 0)]
        return self.choose(values)

    def pick(self, kind: str, fits: Callable[[LiveValue], bool] = lambda _: True) -> LiveValue | None:
        found = [x for x in self.scope.live if x.kind == kind and fits(x)]
        return self.recent(found) if found else None

    def as_floats(self, x: LiveValue) -> LiveValue:
        """Convert to floats of a few units."""
        if x.kind == "float32":
            return x
        if x.kind == "string":
            values = [round(float(number), 3) for number in self.rng.normal(size=len(WORDS))]
            return self.like(
                x,
                self.node(
                    "ai.onnx.ml.LabelEncoder",
                    x.name,
                    keys_strings=list(WORDS),
                    values_floats=values,
                    default_float=0.5,
                ),
                kind="float32",
            )
        name = self.cast(x.name, "float32")
        if x.kind == "uint8":
            name = self.node("Div", name, self.constant(np.float32(255)))
        elif x.kind in {"int64", "int32", "int8", "uint32"}:
            name = self.clip(self.node("Mul", name, self.constant(np.float32(0.2))), -3, 3)
        return self.like(x, name, kind="float32")

    def any_floats(self, min_rank: int = 1, max_rank: int = 6) -> LiveValue:
        """Return floats of any form: the batch may be merged, or not on the first axis."""
        found = self.pick("float32", lambda x: min_rank <= x.rank <= max_rank)
        if found and self.chance(0.9):
            return found
        high = min(max(min_rank, 4), max_rank)
        return self.floats(*self.extents(self.integer(min_rank, high) - 1))

    def floats(self, *shape: int) -> LiveValue:
        """Return floats [N, *shape]."""
        wanted = (ROWS, *shape)
        found = self.pick("float32", lambda x: x.shape == wanted and not x.is_merged)
        if found and self.chance(0.9):
            return found
        return self.converted(self.recent(self.scope.live), wanted)

    def converted(self, x: LiveValue, wanted: tuple[int, ...]) -> LiveValue:
        """Bring any value to floats of a plain shape."""
        x = self.flatten(self.restore(self.as_floats(x)))
        width, count = x.shape[1], math.prod(wanted[1:])
        if width != count:
            x = self._resized(x, width, count)
        return x if x.shape == wanted else self.reshape(x, wanted)

    def _resized(self, x: LiveValue, width: int, count: int) -> LiveValue:
        """Bring [N, width] to [N, count]."""
        if self.chance(0.4):
            name = self.node("MatMul", x.name, self.weights(width, count, fan_in=width))
        elif self.chance(0.3) and width > count:
            name = self.slice(x.name, 1, 0, count)
        elif self.chance(0.3) and width < count:
            name = self.pad(x.name, [0, 0, 0, count - width])
        else:
            columns = self.rng.permutation(np.arange(count, dtype=np.int64) % width)
            name = self.node("Gather", x.name, self.constant(columns), axis=1)
        return self.like(x, name, shape=(ROWS, count))

    def integers(self, limit: int, *shape: int, kind: str = "int64") -> LiveValue:
        """Return integers [N, *shape] from 0 to limit - 1."""
        wanted = (ROWS, *shape)
        found = self.pick(kind, lambda x: x.shape == wanted and not x.is_merged and 0 < x.limit <= limit)
        if found and self.chance(0.7):
            return found
        if kind in {"int64", "int32"} and self.chance(0.3):
            x = self.floats(*shape, limit)
            # different steps, so that rounding does not decide between equal numbers
            steps = self.constant((0.0137 * np.arange(limit)).astype(np.float32))
            name = self.node("ArgMax", self.node("Add", x.name, steps), axis=len(shape) + 1, keepdims=0)
            name = name if kind == "int64" else self.cast(name, kind)
        else:
            x = self.floats(*shape)
            name = self.node("Mul", self.node("Sigmoid", x.name), self.constant(np.float32(limit - 0.01)))
            name = self.cast(name, kind)
        return LiveValue(name, kind, wanted, limit=limit)

    def lengths(self, longest: int, kind: str = "int32") -> LiveValue:
        """Return lengths [N] from 1 to `longest`."""
        x = self.integers(longest, kind="int64")
        name = self.node("Add", x.name, self.constant(np.int64(1)))
        return self.like(x, name if kind == "int64" else self.cast(name, kind), kind=kind, limit=longest + 1)

    def booleans(self, *shape: int) -> LiveValue:
        """Return flags [N, *shape]."""
        wanted = (ROWS, *shape)
        found = self.pick("bool", lambda x: x.shape == wanted and not x.is_merged)
        if found and self.chance(0.7):
            return found
        x = self.floats(*shape)
        operator = self.choose(("Greater", "Less"))
        return self.like(x, self.node(operator, x.name, self.constant(np.float32(0.2))), kind="bool")

    def any_booleans(self) -> LiveValue:
        return self.pick("bool") or self.booleans(*self.extents(self.integer(0, 2)))

    def strings(self, *shape: int) -> LiveValue:
        """Return words [N, *shape]."""
        wanted = (ROWS, *shape)
        found = self.pick("string", lambda x: x.shape == wanted and not x.is_merged)
        if found and self.chance(0.8):
            return found
        x = self.integers(len(WORDS), *shape)
        name = self.node(
            "ai.onnx.ml.LabelEncoder",
            x.name,
            keys_int64s=list(range(len(WORDS))),
            values_strings=list(WORDS),
            default_string="bee",
        )
        return self.like(x, name, kind="string")

    def quantized(self, *shape: int, kind: str = "uint8") -> LiveValue:
        """Return floats [N, *shape], quantised per tensor with a constant scale."""
        x = self.floats(*shape)
        return self.like(x, self.node("QuantizeLinear", x.name, *self.scale(kind)), kind=kind)

    def dequantized(self, x: LiveValue) -> LiveValue:
        name = self.node("DequantizeLinear", x.name, *self.scale(x.kind))
        return self.like(x, name, kind="float32")

    def scale(self, kind: str = "uint8") -> tuple[str, str]:
        """Return the names of a scale and a zero point."""
        return self.constant(SCALE), self.constant(np.array(128 if kind == "uint8" else 0, kind))

    # Bodies and functions

    def imports(self) -> list[OperatorSetIdProto]:
        """Return the versions of all operator sets that a draft uses."""
        versions = {"": self.opset, "ai.onnx.ml": self.ml_opset, "com.microsoft": 1, FUNCTION_DOMAIN: 1}
        return [helper.make_opsetid(domain, version) for domain, version in versions.items()]

    @contextmanager
    def body(self, live: Sequence[LiveValue], *, is_function: bool = False) -> Iterator[Scope]:
        """Append to a body until the context ends; in it only `live` can be used."""
        scope = Scope(list(live), is_function or self.scope.is_function)
        self.scopes.append(scope)
        try:
            yield scope
        finally:
            self.scopes.pop()

    @property
    def depth(self) -> int:
        return len(self.scopes)

    def info(self, x: LiveValue, *, is_shaped: bool = False) -> ValueInfoProto:
        """Describe a value as an input or output of a body."""
        shape = (
            [None if extent == ROWS else extent for extent in x.shape] if is_shaped or self.chance() else None
        )
        return helper.make_tensor_value_info(x.name, KINDS[x.kind], shape)

    def graph(
        self, scope: Scope, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
    ) -> GraphProto:
        self.mark([], frozenset(scope.marks))
        return helper.make_graph(
            scope.nodes, self.new_name(), list(inputs), list(outputs), initializer=scope.initializers
        )

    def run_steps(self, count: int) -> None:
        """Append random steps to the current scope."""
        for _ in range(count):
            self.run_step(self.choose(offered_steps(self.opset, self.ml_opset, with_bodies=self.depth < 3)))

    def run_step(self, taken: Step) -> list[LiveValue]:
        made = taken.build(self, taken.operator)
        values = [made] if isinstance(made, LiveValue) else list(made)
        self.scope.live += values
        return values


Build = Callable[[Draft, str], LiveValue | Sequence[LiveValue]]
B = TypeVar("B", bound=Build)


@dataclass(frozen=True)
class Step:
    """One way to use an operator.

    Attributes:
        operator: What is drawn, qualified by the domain unless it is a standard operator.
        build: Appends the nodes and returns the new values.
        since: First opset in which ONNX Runtime runs the step.
        until: Last opset with the operator.
        has_body: Whether the step nests others.
    """

    operator: str
    build: Build
    since: int
    until: int
    has_body: bool


STEPS: list[Step] = []


def step(*operators: str, since: int = 7, until: int = 99, has_body: bool = False) -> Callable[[B], B]:
    """Register a way to use each of these operators."""

    def register(build: B) -> B:
        STEPS.extend(Step(operator, build, since, until, has_body) for operator in operators)
        return build

    return register


@cache
def has_operator(domain: str, operator: str, version: int) -> bool:
    """Return whether an opset of ONNX has an operator that is not deprecated in it."""
    try:
        return not defs.get_schema(operator, version, domain).deprecated
    except defs.SchemaError:
        return False


@cache
def offered_steps(opset: int, ml_opset: int, *, with_bodies: bool) -> tuple[Step, ...]:
    """Return the steps that a model of these opsets can have."""
    draft = Draft(np.random.default_rng(0), opset=opset, ml_opset=ml_opset, is_free=False)
    return tuple(
        taken
        for taken in STEPS
        if draft.supports(taken.operator, taken.since, taken.until) and (with_bodies or not taken.has_body)
    )
