"""The walk's claims about each tensor of a graph, held to runs of the graph."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, ValueInfoProto
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from runtime.rows.sizes import ROWS, Size, Symbols
from runtime.rows.values import Kind, Value
from runtime.rows.walk import walk_tensors
from support.rowgraphs import differs

INFERENCE = "[ShapeInferenceError]"
"""Error of some models with an Attention: onnx 1.23 infers a width of 0 for values of a computed width."""
COUNT = 3
"""Rows that run together."""


class Runs(NamedTuple):
    """A tensor in runs.

    Attributes:
        together: with three rows.
        again: with three other rows.
        alone: with each of the first rows alone.
        copies: with three copies of each.
    """

    together: Any
    again: Any
    alone: list[Any]
    copies: list[Any]


def find_false_claims(
    path: Path, model: ModelProto, rows: Mapping[str, Any], others: Mapping[str, Any]
) -> list[str]:
    """Return what the walk says of tensors of the main graph, and runs disprove.

    Args:
        path: the model's file.
        model: the model.
        rows: three rows for each input.
        others: three other rows.
    """
    symbols, tensors = walk_tensors(path)
    names = [name for node in model.graph.node for name in node.output if name in tensors]
    kept = [name for name in names if tensors[name].kind not in {Kind.UNKNOWN, Kind.COUPLED, Kind.SEQUENCE}]
    if not kept:
        return []
    try:
        run = _make_runner(model, kept)
    except Fail as problem:
        if INFERENCE in str(problem) and any(node.op_type == "Attention" for node in model.graph.node):
            return []
        raise
    together, again = run(rows), run(others)
    alone = [run({name: array[at : at + 1] for name, array in rows.items()}) for at in range(COUNT)]
    copies = [run({name: array[[at] * COUNT] for name, array in rows.items()}) for at in range(COUNT)]
    return [
        f"{name}: {problem}"
        for at, name in enumerate(kept)
        for problem in _check(
            symbols,
            tensors[name],
            Runs(together[at], again[at], [each[at] for each in alone], [each[at] for each in copies]),
        )
    ]


def _make_runner(model: ModelProto, names: list[str]) -> Any:
    observed = ModelProto()
    observed.CopyFrom(model)
    present = {each.name for each in observed.graph.output}
    observed.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in present)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(observed.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda feed: session.run(names, dict(feed))


def _check(symbols: Symbols, value: Value, runs: Runs) -> Iterator[str]:
    together, again = runs.together, runs.again
    if not isinstance(together, np.ndarray):
        return
    if value.shape is not None:
        yield from _check_shape(symbols, value, together.shape)
    match value.kind:
        case Kind.SAME:
            if any(differs(together, each) for each in (again, *runs.alone)):
                yield "SAME differs from run to run"
        case Kind.FILL:
            if len(np.unique(together)) > 1 or differs(together, again):
                yield "FILL has several numbers"
        case Kind.COUNT:
            if differs(together, again):
                yield "COUNT differs with other rows"
        case Kind.ROWS | Kind.INDEX | Kind.TUPLES:
            yield from _check_rows(value, runs)
        case _:
            raise AssertionError(value.kind)
    if value.data is not None:
        numbers = [each for each in value.data.flat if not isinstance(each, Size)]
        if len(numbers) == value.data.size and not np.allclose(
            together.astype(float), value.data.astype(float), equal_nan=True, rtol=1e-5
        ):
            yield f"data are {together}, and not {value.data}"


def _check_shape(symbols: Symbols, value: Value, found: tuple[int, ...]) -> Iterator[str]:
    assert value.shape is not None
    if len(found) != len(value.shape):
        yield f"has {len(found)} dimensions, and not {len(value.shape)}"
        return
    for at, (length, real) in enumerate(zip(value.shape, found, strict=True)):
        quotient = symbols.divide(length, ROWS)
        expected = (
            length if isinstance(length, int) else quotient * COUNT if isinstance(quotient, int) else real
        )
        if expected != real:
            yield f"dimension {at} is {real}, and not {expected}"


def _check_rows(value: Value, runs: Runs) -> Iterator[str]:
    """Compare the part of each row with that of the row beside copies of itself, and alone.

    With fewer rows ONNX Runtime may round differently, so that whole numbers differ that are made of floats.
    """
    together, alone = runs.together, runs.alone
    whole = alone[0].shape[value.axis]
    outer, inner = value.outer, value.inner
    if isinstance(outer, int):
        inner = whole // outer if outer else 0
    elif isinstance(inner, int):
        outer = whole // inner if inner else 0
    else:
        return
    before, after = together.shape[: value.axis], together.shape[value.axis + 1 :]
    if together.shape[value.axis] != outer * COUNT * inner:
        yield f"axis {value.axis} has {together.shape[value.axis]} elements"
        return
    parts = together.reshape(*before, outer, COUNT, inner, *after)
    for row, each in enumerate(alone):
        part = parts.take(row, len(before) + 1)
        beside = runs.copies[row].reshape(parts.shape).take(row, len(before) + 1)
        if value.kind is Kind.ROWS and differs(part, beside):
            yield f"row {row} has another answer beside other rows than beside copies of itself"
        if value.kind is Kind.ROWS and part.dtype.kind == "f" and differs(part, each.reshape(part.shape)):
            yield f"row {row} has another answer alone"
        if value.kind is Kind.INDEX and (part != row).any():
            yield f"row {row} does not have its index"
