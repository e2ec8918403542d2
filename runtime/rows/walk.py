"""Whether the rows of a batch are independent, by a walk over the graph of a model.

Theory of operation. The first axis of each input has the rows of a batch, N of them. The walk goes through
the operators in their order and keeps, for each tensor, a `Value`: whether it depends on the rows, and along
which axis they lie. A rule of the table (`operators`) says what an operator makes of its inputs. What may
never happen is that a tensor counts as ROWS although a row's part depends on anything but that row of the
inputs: so a rule that is not sure raises `NotKnown`, and one that is sure of the opposite `Coupling`; either
spoils every tensor that follows from it. In the end each output must be ROWS along axis 0, one for each row.

Exporters compute shapes in the graph (`Shape`, `Gather`, `Concat`, `Reshape`), so N travels as data, too.
Small tensors therefore keep their elements as symbolic numbers (`sizes`), and a `Reshape` to `[N, T, 12, 64]`
is known to keep the rows where they are. A tensor that has N as a number, and no row, is COUNT: what uses it
as anything but a length depends on the size of the batch.

Lengths of the inputs other than N are the same for all rows, since only requests of equal lengths run
together (`runtime.worker.batching`). Those of one name are equal, as ONNX Runtime takes them; a request that
breaks this never runs beside one that keeps it. An input with a default value counts as a constant, since a
request that gives it runs alone. Dimensions and tensors without rows rely on this.

Loops are walked until their states stay the same; both branches of an `If` are joined unless its condition is
known; functions of the model are walked at each call. A file may declare shapes of tensors within the graph,
and they may be those of another batch, since editors change those of inputs only. ONNX Runtime computes
`Shape` from them before a run, so a tensor is UNKNOWN whose declared shape is not the one that follows.

A file may be hostile: the number of operators, of nested bodies, and the seconds are bounded, and beyond a
bound nothing is known.
"""

import time
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxgraph import Function, Graph, GraphFile, OnnxModel, OperatorNode, Reference
from runtime.rows import elements, joining, layers, selection, shapes
from runtime.rows.judgement import MAX_REASON_CHARACTERS, Judgement, Verdict
from runtime.rows.operators import NEWEST, TABLE
from runtime.rows.sequences import EMPTY, join, one_of
from runtime.rows.sizes import ROWS, Number, Size, Symbols
from runtime.rows.values import (
    LAID_OUT,
    SPOILT,
    Call,
    Coupling,
    Kind,
    NotKnown,
    Rule,
    Value,
    from_tensor,
    laid_out,
    same,
    shape_of,
)

MAX_OPERATORS = 100_000
"""Operators that are walked, each time that a loop or a function walks them: in some 4 s. The largest graphs
of exported models have 10,000."""
MAX_DEPTH = 24
"""Nesting of bodies of If, Loop and Scan, and of functions; exporters nest four."""
MAX_SECONDS = 10.0
"""Limit of a walk. A load waits for it, and a graph that takes longer was made for that."""
MAX_ROUNDS = 8
"""Walks of a loop's body until its states stay the same: each round changes at least one of them."""
MAX_NAME, MAX_SHOWN = 60, 8
"""Characters of a name, and dimensions of a shape, in a reason."""
INLINED = "_inlfunc_"
"""Beginning of the names of tensors that ONNX Runtime copies from functions into graphs."""
Declared = Mapping[str, Sequence[Sequence[int]]]
"""Shapes that the file declares for tensors, by name."""

OF_RUNTIME = ("ai.onnx", "com.microsoft", "com.ms.", "org.pytorch")
"""Beginnings of domains whose operators ONNX Runtime has itself, and prefers to a function of the model."""
WITH_POSITIONS: Collection[Rule] = {
    *(elements.cast, elements.elementwise, elements.identity, elements.keep_shape),
    *(joining.concat, joining.expand, selection.gather, selection.gather_nd, selection.scatter_nd),
    *(shapes.flatten, shapes.reshape, shapes.shape, shapes.size, shapes.squeeze, shapes.transpose),
    *(shapes.unsqueeze, layers.cut_regions),
}
"""Rules that know what becomes of positions of rows; for all others nothing is known."""

ANY_FORM = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Exceptions of rules for attributes of a form that ONNX Runtime refuses: `check` reads files without it."""


def judge_rows(path: Path) -> Judgement:
    """Return whether the rows of a batch are independent in the model of this file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with GraphFile(path) as model:
            return _judge(_Walk(model), model)
    except (Unparsable, TooManyFields, _TooLong) as problem:
        return Judgement("unknown", f"its graph cannot be followed: {problem}")
    except (OSError, MemoryError):
        raise
    except Exception as problem:  # noqa: BLE001 - a file that `check` reads may have any form
        return Judgement("unknown", f"its graph has a form that is not understood ({type(problem).__name__})")


def walk_tensors(path: Path) -> tuple[Symbols, Mapping[str, Value]]:
    """Return what is known of each tensor of the main graph, by name, and the symbols of their lengths.

    Raises:
        OSError: the file cannot be read.
        Unparsable, TooManyFields: it is no ONNX file, or has more fields than are read.
    """
    with GraphFile(path) as model:
        walk = _Walk(model)
        return walk.symbols, walk.walk_model().values


def _no_attribute(name: str) -> Any:
    """Refuse a reference to an attribute outside of a function: ONNX Runtime reads the value beside it."""
    raise NotKnown(f"it refers to an attribute of a function ({_show(name)})")


class _TooLong(Exception):
    """A bound of the walk is reached."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where operators stand: in the graph, or in a function.

    Attributes:
        opsets: versions of operator sets by domain.
        attributes: returns the function's attribute of a name, None if it was not given.
        is_function: whether they stand in a function.
    """

    opsets: Mapping[str, int]
    attributes: Callable[[str], Any]
    is_function: bool = False


@dataclass(frozen=True, slots=True)
class _Scope:
    """The tensors of a graph, and of those around it, by name.

    Attributes:
        around: the scope of the graph around this one.
        values: the tensors of this graph.
        absent: inputs of a function that a call leaves out.
        misdeclared: tensors that are UNKNOWN in `values` for their declared shape, as they follow.
    """

    around: "_Scope | None" = None
    values: dict[str, Value] = field(default_factory=dict)
    absent: Collection[str] = ()
    misdeclared: dict[str, Value] = field(default_factory=dict)

    def find(self, name: str) -> Value:
        scope: _Scope | None = self
        while scope is not None:
            # In a body, ONNX Runtime may find a function's tensor of this name before the graph's around it.
            if name in scope.values and (scope is self or not name.startswith(INLINED)):
                return scope.values[name]
            scope = scope.around
        return Value(Kind.UNKNOWN, reason=f"nothing computes {_show(name)}")


def _judge(walk: "_Walk", model: OnnxModel) -> Judgement:
    scope = walk.walk_model()
    outputs = {name: scope.misdeclared.get(name) or scope.find(name) for name in model.graph.outputs}
    found = [_judge_output(name, value, walk.symbols) for name, value in outputs.items()]
    for verdict in ("dependent", "unknown"):
        for each in found:
            if each.verdict == verdict:
                return each
    return Judgement("independent")


def _judge_output(name: str, value: Value, symbols: Symbols) -> Judgement:
    """Return whether an output has one row for each row of the inputs, which depends on that row alone."""
    output = f"output {_show(name)}"
    if value.kind in SPOILT:
        verdict: Verdict = "dependent" if value.kind is Kind.COUPLED else "unknown"
        return Judgement(verdict, f"{value.reason}, and {output} depends on it"[:MAX_REASON_CHARACTERS])
    if value.kind is Kind.FILL:
        value = _rows_of_fill(value, symbols)
    if value.kind is Kind.ROWS:
        if value.axis:
            return Judgement(
                "dependent", f"{output} has the rows along axis {value.axis}, and not along axis 0"
            )
        if value.outer == 1 and value.inner == 1:
            return Judgement("independent")
        certain = isinstance(value.outer, int) and isinstance(value.inner, int)
        words = f"{output} has along axis 0 several elements for each row"
        return Judgement("dependent" if certain else "unknown", words)
    if value.kind in {Kind.INDEX, Kind.TUPLES}:
        return Judgement("dependent", f"{output} has the position of a row along axis {value.axis}")
    if value.kind is Kind.COUNT:
        return Judgement("dependent", f"{output} depends on the number of rows, and has none along axis 0")
    if value.kind is not Kind.SAME or value.shape is None or isinstance([*value.shape, 1][0], Size):
        return Judgement("unknown", f"it is not known whether {output} has the rows along axis 0")
    return Judgement("dependent", f"{output} does not have a row for each row of the inputs along axis 0")


def _rows_of_fill(value: Value, symbols: Symbols) -> Value:
    """Return a FILL as rows if it has one for each row of the inputs."""
    shape = shape_of(value)
    if shape[0] == ROWS and not any(map(symbols.mentions_rows, shape[1:])):
        return laid_out(shape, 0)
    return value


class _Walk:
    def __init__(self, model: OnnxModel) -> None:
        self.symbols = Symbols()
        self._model = model
        self._left = MAX_OPERATORS
        self._constants: dict[Graph, dict[str, Value]] = {}
        self._depth = 0
        self._open = {0}  # symbols of N, and of the lengths that inputs leave open
        self._named: dict[str, Size] = {}
        self._until = time.monotonic() + MAX_SECONDS

    def walk_model(self) -> _Scope:
        scope, graph = _Scope(), self._model.graph
        batches = {each.names[0] for each in graph.inputs if each.names}
        for each in graph.inputs:
            if each.name in graph.constants:
                continue  # a default, and a request that gives another value runs alone
            if not each.element or not each.shape or each.shape[0] != -1:
                words = f"input {_show(each.name)} has no first dimension of any length"
                scope.values[each.name] = Value(Kind.UNKNOWN, reason=words)
                continue
            # Requests are joined along the first axis only: another length with the name of N is not N then.
            names = ["" if name in batches else name for name in each.names[1:]]
            rest = [
                length if length >= 0 else self._open_length(name)
                for length, name in zip(each.shape[1:], names, strict=True)
            ]
            self._set(scope, each.name, laid_out((ROWS, *rest), 0), graph.declared.get(each.name, ()))
        self._walk_graph(graph, scope, _Frame(self._model.opsets, _no_attribute))
        return scope

    def _walk_graph(self, graph: Graph, scope: _Scope, frame: _Frame) -> None:
        if graph not in self._constants:  # a function that is called often has them once
            found = {name: from_tensor(self.symbols, each) for name, each in graph.constants.items()}
            self._constants[graph] = found
        scope.values.update(self._constants[graph])
        if scope.around is not None:
            self._compare_outer(graph, scope, frame)
        self._walk_nodes(graph.nodes, scope, frame, graph.declared)

    def _compare_outer(self, graph: Graph, scope: _Scope, frame: _Frame) -> None:
        """Compare shapes that a body declares for tensors of the graphs around it.

        ONNX Runtime copies functions into the graph, where their bodies then declare shapes of other tensors.
        """
        own = {name for node in graph.nodes for name in node.outputs}.union(scope.values)
        outer = [name for name in graph.declared if name not in own]
        if any(name.startswith(INLINED) for name in outer) or (
            frame.is_function and graph.declared.keys() - set(graph.outputs)
        ):
            raise NotKnown("its body declares shapes of tensors elsewhere")
        for name in outer:
            self._set(scope, name, scope.find(name), graph.declared[name])

    def _open_length(self, name: str) -> Size:
        """Return a length that inputs leave open, the same for each dimension of a name."""
        made = self._named.get(name) or self.symbols.unknown()
        self._open.update(*made.terms)
        if name:
            self._named[name] = made
        return made

    def _set(self, scope: _Scope, name: str, value: Value, declared: Iterable[Sequence[int]]) -> None:
        """Set a tensor, which is UNKNOWN if the file declares another shape for it."""
        scope.values[name] = value
        found = value.shape if value.items is None else value.items.shape
        if value.kind in SPOILT or found is None:
            return
        for shape in declared:
            if not self._may_be(found, shape):
                words = f"the file declares another shape for {_show(name)} than follows from the inputs"
                scope.values[name] = Value(Kind.UNKNOWN, reason=f"{words}: {[*shape][:MAX_SHOWN]}")
                scope.misdeclared[name] = value

    def _may_be(self, shape: Sequence[Number], declared: Sequence[int]) -> bool:
        """Whether a tensor may have its declared shape, in which -1 is any length.

        1. A known length is as declared.
        2. N, lengths that inputs leave open, and what is computed of them, are as declared for some requests
           only; but a ratio of such lengths may be one number, as that of `T * 384` and `T * 32`.
        3. A length that no rule knows may be as declared.
        """
        if len(shape) != len(declared):
            return False
        for said, length in zip(declared, shape, strict=True):
            if said in {-1, length}:
                continue
            if not isinstance(length, Size):  # 1
                return False
            given = self.symbols.mentioned(length) & self._open
            if 0 in given or (given and not self.symbols.has_ratios_only(length)):  # 2
                return False
        return True  # 3

    def _walk_nodes(
        self, nodes: Sequence[OperatorNode], scope: _Scope, frame: _Frame, declared: Declared
    ) -> None:
        left_out = {"", *scope.absent}
        for node in nodes:
            self._left -= 1
            if self._left < 0:
                raise _TooLong(f"it has more than {MAX_OPERATORS:,} operators, with all rounds of its loops")
            if time.monotonic() > self._until:
                raise _TooLong(f"that takes longer than {MAX_SECONDS:.0f} s")
            inputs = [None if name in left_out else scope.find(name) for name in node.inputs]
            outputs = self._apply(node, inputs, scope, frame)
            for name, value in zip(node.outputs, outputs, strict=False):
                self._set(scope, name, value, declared.get(name, ()))

    def _apply(
        self, node: OperatorNode, inputs: Sequence[Value | None], scope: _Scope, frame: _Frame
    ) -> Sequence[Value]:
        """Return an operator's outputs, by the first of these that applies.

        1. An input is coupled, or else unknown: so are all outputs.
        2. The operator's rule finds a coupling, or is not sure.
        3. The rule is not sure, but nothing comes from the rows: the outputs have nothing of them, either.
        """
        count = len(node.outputs)
        spoilt = [value for value in inputs if value is not None and value.kind in SPOILT]
        if spoilt:  # 1
            coupled = [value for value in spoilt if value.kind is Kind.COUPLED]
            return [(coupled or spoilt)[0]] * count
        try:
            made = self._evaluate(node, inputs, scope, frame)
        except Coupling as coupling:  # 2
            return [Value(Kind.COUPLED, reason=f"{_describe(node)} {coupling}")] * count
        except NotKnown as problem:
            words = str(problem)
        except (TooManyFields, Unparsable):
            raise
        except ANY_FORM:
            words = "it has a form that is not understood"
        else:
            words = self._find_defect(made, count)
            if not words:
                return made
        kinds = {value.kind for value in inputs if value is not None}
        is_known = node.domain in {"", "ai.onnx.ml"} and node.operator not in BODIES
        if kinds <= {Kind.SAME} and is_known and inputs:  # 3
            return [same()] * count
        if kinds <= {Kind.SAME, Kind.COUNT} and is_known and inputs:
            return [Value(Kind.COUNT)] * count
        reason = f"it is not known whether {_describe(node)} keeps the rows apart: {words}"
        return [Value(Kind.UNKNOWN, reason=reason)] * count

    def _find_defect(self, made: Sequence[Value], count: int) -> str:
        """Return why the outputs of a rule cannot be used; empty if they can.

        Of ROWS only the axis of the rows, and of SAME no dimension, may mention N.
        """
        for value in made:
            axis = value.axis if value.kind in LAID_OUT else None
            if axis is not None:
                length = self.symbols.product((value.outer, ROWS, value.inner))
                if value.shape is None or not 0 <= axis < len(value.shape) or value.shape[axis] != length:
                    return "the rows lie along no axis"
            if value.shape is None or not (axis is not None or value.kind is Kind.SAME):
                continue
            for at, each in enumerate(value.shape):
                if isinstance(each, Size) and at != axis and self.symbols.mentions_rows(each):
                    return "a length depends on the number of rows"
        return "" if len(made) >= count else "one of its outputs is not followed"

    def _evaluate(
        self, node: OperatorNode, inputs: Sequence[Value | None], scope: _Scope, frame: _Frame
    ) -> Sequence[Value]:
        def attribute(name: str) -> Any:
            found = node.attribute(name)
            return frame.attributes(found.name) if isinstance(found, Reference) else found

        line = TABLE.get(node.domain, {}).get(node.operator)
        function = self._model.functions.get((node.domain, node.operator, node.overload))
        if function is not None:
            if not node.domain or node.domain.startswith(OF_RUNTIME):
                raise NotKnown("a function of the model is in a domain of ONNX Runtime's own operators")
            return self._nested(lambda: self._call_function(function, inputs, attribute, frame))
        version = frame.opsets.get(node.domain)
        if version is None:
            raise NotKnown("the model does not say which operator set it is of")
        if version > NEWEST.get(node.domain, version):
            raise NotKnown(f"operator set {version} is newer than those that are known")
        body = BODIES.get(node.operator) if not node.domain else None
        if body is not None:
            call = Call(node, version, inputs, self.symbols, attribute)
            return self._nested(lambda: body(self, call, scope, frame))
        if line is None:
            raise NotKnown("its definition is not among those that are known")
        kinds = {value.kind for value in inputs if value is not None}
        if kinds & {Kind.INDEX, Kind.TUPLES} and line.rule not in WITH_POSITIONS:
            raise NotKnown("it computes with the positions of rows in the batch")
        if version < line.versions[0]:
            raise NotKnown("an old form of this operator")
        since = line.versions[bisect(line.versions, version) - 1]
        made = line.rule(Call(node, since, inputs, self.symbols, attribute))
        return [made] if isinstance(made, Value) else made

    def _nested(self, walk: Callable[[], Sequence[Value]]) -> Sequence[Value]:
        if self._depth >= MAX_DEPTH:
            raise _TooLong("its bodies and functions are nested too deeply")
        self._depth += 1
        try:
            return walk()
        finally:
            self._depth -= 1

    def _call_function(
        self,
        function: Function,
        inputs: Sequence[Value | None],
        attribute: Callable[[str], Any],
        frame: _Frame,
    ) -> Sequence[Value]:
        def inner(name: str) -> Any:
            found = attribute(name)
            return function.defaults.attribute(name) if found is None else found

        # ONNX Runtime takes the model's operator sets, whatever the function says.
        if any(frame.opsets.get(domain, version) != version for domain, version in function.opsets.items()):
            raise NotKnown("its operator sets are others than those of the model")
        given = dict(zip(function.inputs, inputs, strict=False))
        absent = {name for name in function.inputs if given.get(name) is None}
        scope = _Scope(None, {name: value for name, value in given.items() if value is not None}, absent)
        self._walk_nodes(function.nodes, scope, _Frame(frame.opsets, inner, is_function=True), {})
        return [scope.find(name) for name in function.outputs]

    # Operators with bodies

    def _body(self, call: Call, name: str) -> Graph:
        graph = call.attribute(name)
        if not isinstance(graph, Graph):
            raise NotKnown("its body is missing")
        return graph

    def _walk_body(self, graph: Graph, given: Sequence[Value], scope: _Scope, frame: _Frame) -> list[Value]:
        if len(graph.inputs) != len(given):
            raise NotKnown("its body takes other inputs")
        inner = _Scope(scope)
        for each, value in zip(graph.inputs, given, strict=True):
            self._set(inner, each.name, value, [] if each.shape is None else [each.shape])
        self._walk_graph(graph, inner, frame)
        return [inner.find(name) for name in graph.outputs]

    def _if(self, call: Call, scope: _Scope, frame: _Frame) -> Sequence[Value]:
        condition = call.input(0)
        branches = [self._body(call, name) for name in ("then_branch", "else_branch")]
        if condition.data is not None and not isinstance(condition.data.flat[0], Size):
            return self._walk_body(branches[not condition.data.flat[0]], (), scope, frame)
        if condition.kind is not Kind.SAME:
            raise NotKnown("its condition is computed from the batch, or from the number of rows")
        first, second = (self._walk_body(each, (), scope, frame) for each in branches)
        return [self._either(call, *pair) for pair in zip(first, second, strict=True)]

    def _either(self, call: Call, first: Value, second: Value) -> Value:
        """Return a value that may be one or the other; a spoilt one spoils it."""
        for kind in (Kind.COUPLED, Kind.UNKNOWN):
            for value in (first, second):
                if value.kind is kind:
                    return value
        return join(call, first, second)

    def _loop(self, call: Call, scope: _Scope, frame: _Frame) -> Sequence[Value]:
        """Walk a loop's body until its states stay the same.

        1. The number of rounds, and the first condition, must not depend on the rows.
        2. A state is what it is before the first round, or after any: the join of them.
        3. The condition of further rounds must not depend on the rows, either.
        4. Lengths that a round may change are not known after the loop.
        """
        graph = self._body(call, "body")
        for at in (0, 1):  # 1
            value = call.optional(at)
            if value is not None and value.kind is not Kind.SAME:
                raise NotKnown("the number of its rounds is computed from the batch")
        states = [call.input(at) for at in range(2, len(call.inputs))]
        counters = [same((1,) * len(each.shape or ())) for each in graph.inputs[:2]]  # of the declared rank
        count = len(states)
        widened = set[Number]()
        for _ in range(MAX_ROUNDS):
            results = self._walk_body(graph, [*counters, *states], scope, frame)
            if len(results) < count + 1:
                raise NotKnown("its body returns too little")
            joined = [
                self._widen(call, *pair, widened) for pair in zip(states, results[1:], strict=False)
            ]  # 2
            if all(map(_is_equal, states, joined)):
                break
            states = joined
        else:
            raise NotKnown("its states change in each round")
        condition = results[0]
        if condition.kind in SPOILT:  # 3
            return [condition] * len(call.node.outputs)
        if condition.kind is not Kind.SAME:
            raise NotKnown("whether it goes on is computed from the batch")
        rounds = self.symbols.unknown()
        stacked = [_stack(self._forget(each, widened), 0, rounds) for each in results[count + 1 :]]  # 4
        return [*(self._forget(each, widened) for each in states), *stacked]

    def _widen(self, call: Call, old: Value, new: Value, widened: set[Number]) -> Value:
        """Join a state with that of the next round; lengths that differ become one symbol each."""
        if old.kind is Kind.SEQUENCE and new.kind is Kind.SEQUENCE:
            if old.items is None or new.items is None:
                return new if old.items is None else old
            return replace(old, items=self._widen(call, old.items, new.items, widened))
        made = self._either(call, old, new)
        if made.shape is None or old.shape is None or made.kind in SPOILT:
            return made
        lengths = list(made.shape)
        for at, (before, after) in enumerate(zip(old.shape, made.shape, strict=True)):
            if before in widened:
                lengths[at] = before
            elif before != after:
                widened.add(after)
        return replace(made, shape=tuple(lengths))

    def _forget(self, value: Value, widened: set[Number]) -> Value:
        """Return a value after a loop: lengths that mention those of one round are not known."""
        if value.items is not None:
            return replace(value, items=self._forget(value.items, widened))
        if value.shape is None or value.kind in SPOILT:
            return value
        changing = {symbol for each in widened for term in each.terms for symbol in term}
        mentions = [
            isinstance(each, Size) and bool(self.symbols.mentioned(each) & changing) for each in value.shape
        ]
        if value.kind is not Kind.SAME and mentions[value.axis]:
            raise NotKnown("the rows lie in another order in each round")
        lengths = [
            self.symbols.unknown() if each else old for each, old in zip(mentions, value.shape, strict=True)
        ]
        return replace(value, shape=tuple(lengths), data=None if any(mentions) else value.data)

    def _scan(self, call: Call, scope: _Scope, frame: _Frame) -> Sequence[Value]:
        """Walk a scan's body: as a loop, which takes parts of some inputs along an axis."""
        if frame.opsets.get("", 0) < 9:  # it had another meaning
            raise NotKnown("an old form of this operator")
        graph = self._body(call, "body")
        scanned = call.attribute("num_scan_inputs", 0)
        count = len(call.inputs) - scanned
        states = [call.input(at) for at in range(count)]
        axes = call.attribute("scan_input_axes", (0,) * scanned)
        parts = [
            self._part(call, call.rows_of(call.input(count + at)), axes[at], bool(states))
            for at in range(scanned)
        ]
        widened = set[Number]()
        for _ in range(MAX_ROUNDS):
            results = self._walk_body(graph, [*states, *parts], scope, frame)
            joined = [self._widen(call, *pair, widened) for pair in zip(states, results, strict=False)]
            if all(map(_is_equal, states, joined)):
                break
            states = joined
        else:
            raise NotKnown("its states change in each round")
        outputs = results[count:]
        places = call.attribute("scan_output_axes", (0,) * len(outputs))
        rounds = self.symbols.unknown()
        pairs = zip(outputs, places, strict=True)
        stacked = [_stack(self._forget(each, widened), at, rounds) for each, at in pairs]
        return [*(self._forget(each, widened) for each in states), *stacked]

    def _map(self, call: Call, scope: _Scope, frame: _Frame) -> Sequence[Value]:
        """Walk the body of a SequenceMap: on each element of its sequences."""
        given = [call.input(at) for at in range(len(call.inputs))]
        if any(value.kind is Kind.SEQUENCE and value.items is None for value in given):
            raise NotKnown("a sequence without elements")
        elements = [value if value.items is None else one_of(call, value) for value in given]
        results = self._walk_body(self._body(call, "body"), elements, scope, frame)
        return [value if value.kind in SPOILT else replace(EMPTY, items=value) for value in results]

    def _part(self, call: Call, value: Value, axis: int, has_states: bool) -> Value:  # noqa: FBT001
        """Return what one round takes of an input."""
        old = shape_of(value)
        at = call.axis(axis, len(old))
        rest = (*old[:at], *old[at + 1 :])
        if value.kind is Kind.SAME:
            return same(rest)
        if value.axis == at and has_states:
            raise Coupling(f"carries a state along axis {at}, along which the rows lie")
        if value.kind is not Kind.ROWS or value.axis == at:
            raise NotKnown(f"its rounds go along axis {at}, along which the rows lie")
        return laid_out(rest, value.axis - (at < value.axis), value.outer, value.inner)


BODIES: Mapping[str, Callable[[_Walk, Call, _Scope, _Frame], Sequence[Value]]] = {
    "SequenceMap": _Walk._map,  # noqa: SLF001
    "If": _Walk._if,  # noqa: SLF001
    "Loop": _Walk._loop,  # noqa: SLF001
    "Scan": _Walk._scan,  # noqa: SLF001
}
"""Operators of ONNX that have bodies."""


def _stack(value: Value, axis: int, rounds: Number) -> Value:
    """Return what the rounds of a loop return, along a new axis."""
    if value.kind in SPOILT:
        return value
    if value.shape is None:
        return Value(value.kind)
    at = axis % (len(value.shape) + 1)
    made = (*value.shape[:at], rounds, *value.shape[at:])
    if value.kind is Kind.SAME:
        return same(made)
    if value.kind is not Kind.ROWS:
        raise NotKnown("it returns numbers that depend on the number of rows")
    return laid_out(made, value.axis + (at <= value.axis), value.outer, value.inner)


def _is_equal(first: Value, second: Value) -> bool:
    if first.items is not None or second.items is not None:
        return first.items is not None and second.items is not None and _is_equal(first.items, second.items)
    parts = [(each.kind, each.shape, each.axis, each.outer, each.inner) for each in (first, second)]
    if parts[0] != parts[1] or (first.data is None) != (second.data is None):
        return False
    return first.data is None or list(first.data.flat) == list(second.data.flat)


def _describe(node: OperatorNode) -> str:
    operator = f"{node.domain}.{node.operator}" if node.domain else node.operator
    return f"{_clip(operator)} ({_show(node.name or next(iter(node.outputs), ''))})"


def _show(name: str) -> str:
    return repr(_clip(name))


def _clip(name: str) -> str:
    text = name.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…"
