"""Models that a walk with a hole would prove: runs show that their rows are coupled."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper, parser

from runtime.rows.walk import judge_rows

Feed = dict[str, Any]
POSITIONS = """
    s = Shape(x)
    zero = Constant<value = int64 {0}>()
    one = Constant<value = int64 {1}>()
    n = Gather(s, zero)
    index = Range(zero, n, one)
    last = Constant<value = int64[1] {1}>()
"""
"""The positions of the rows."""
WIDTH = """
    start = Constant<value = int64[1] {0}>()
    rest = Constant<value = int64[1] {-1}>()
    second = Constant<value = int64[1] {1}>()
    s = Shape(x)
    rows = Gather(s, start)
    width = Gather(s, second)
"""
CUT = """
    flat = Reshape(x, rest)
    end = Mul(rows, length)
    cut = Slice(flat, start, end)
    shape = Concat<axis = 0>(rows, rest)
    y = Reshape(cut, shape)
"""
"""Takes N times a length that is not that of the rows, so that a row gets elements of another one."""


def text(
    body: str, opset: int = 17, inputs: str = "float[N, T] x", more: str = "", sets: str = ""
) -> ModelProto:
    sets = sets or f'"": {opset}'
    graph = f"g ({inputs}) => (float[N, U] y) {{ {body} }}"
    return parser.parse_model(f"<ir_version: 8, opset_import: [{sets}]> {graph} {more}")


def over(numbers: str, opset: int = 18) -> ModelProto:
    """Return a model with a maximum over an axis that is computed: 0 for ONNX Runtime."""
    return text(f"{numbers} m = ReduceMax<keepdims = 1>(x, axis) y = Add(x, m)", opset)


def number(name: str, kind: str, value: str) -> str:
    return f"{name} = Constant<value = {kind}[1] {{{value}}}>()\n"


def resize(mode: str, shape: list[int]) -> ModelProto:
    scales = numpy_helper.from_array(np.array([1] * (len(shape) - 1) + [2], np.float32), "scales")
    dims: list[int | str] = ["N", *shape[1:]]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [*dims[:-1], size])
        for name, size in (("x", dims[-1]), ("y", "U"))
    ]
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode=mode)
    graph = helper.make_graph([node], "g", values[:1], values[1:], [scales])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def referring() -> ModelProto:
    """Refers to an attribute of a function, where there is none: ONNX Runtime takes 0."""
    model = text("y = Softmax<axis = 1>(x)")
    attribute = AttributeProto(name="axis", type=AttributeProto.INT, ref_attr_name="axis")
    model.graph.node[0].attribute[0].CopyFrom(attribute)
    return model


def twice() -> ModelProto:
    """Has a constant twice, as a sparse tensor, which counts, and as another one."""
    model = text("m = ReduceMax<keepdims = 1>(x, axis) y = Add(x, m)", 18)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    values = numpy_helper.from_array(np.zeros(1, np.int64), "axis")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [1])
    model.graph.sparse_initializer.append(sparse)
    return model


ONE, TWO = np.array([[1, -2, 3, 0, 5, 1]], np.float32), np.array([[9, 8, -7, 30, 4, 2]], np.float32)
NAN = np.full((1, 6), np.nan, np.float32)
CASES: dict[str, tuple[ModelProto, Any, Any]] = {
    "a position of a sequence": (
        text(POSITIONS + "q = SplitToSequence<axis = 0>(index) v = SequenceAt(q, zero) i ="
        " Unsqueeze(v, last)"
             " g = GatherND(x, i) y = Add(x, g)"), ONE, TWO),
    "a position that OneHot forgets": (
        text(POSITIONS + "d = Constant<value = int64 {1}>() v = Constant<value = int64[2] {0, 0}>()"
             " i = OneHot<axis = -1>(index, d, v) y = GatherND(x, i)"), ONE, TWO),
    "a position twice": (
        text(POSITIONS + "i = Unsqueeze(index, last) t = Concat<axis = 1>(i) two = Constant<value"
        " = int64[2] {1, 2}>()"
             " tt = Expand(t, two) g = GatherND(x, tt) y = Unsqueeze(g, last)"), ONE, TWO),
    "lengths of elements of a sequence": (
        text(WIDTH + "two = Constant<value = int64[1] {2}>() short = Slice(x, start, two, second)"
             " q = SequenceConstruct(short, x) zero = Constant<value = int64 {0}>() one ="
             " Constant<value = int64 {1}>()"
             " a = SequenceAt(q, zero) b = SequenceAt(q, one) as = Shape(a) length = Gather(as, second)"
             + CUT.replace("Reshape(x, rest)", "Reshape(b, rest)")), ONE, TWO),
    "a length that is rounded": (
        text(WIDTH + number("big", "float", "16777216.0") + "f = Cast<to = 1>(width) up = Add(f, big)"
             " down = Sub(up, big) length = Cast<to = 7>(down)" + CUT), ONE[:, :5], TWO[:, :5]),
    "a number that is rounded": (
        over(number("a", "int64", "16777217") + number("b", "float", "16777216.0")
             + "f = Cast<to = 1>(a) d = Sub(f, b) axis = Cast<to = 7>(d)"), ONE, TWO),
    "32 bits that overflow": (
        over(number("a", "int64", "65536") + number("q", "int64", "4294967296")
             + "u = Cast<to = 6>(a) p = Mul(u, u) w = Cast<to = 7>(p) axis = Div(w, q)"), ONE, TWO),
    "64 bits that overflow": (
        over(number("a", "int64", "4611686018427387904") + number("b", "int64", "4611686018427387905")
             + number("one", "int64", "1") + "p = Add(a, a) r = Add(a, b) d = Sub(p, r) axis ="
             " Add(one, d)"), ONE, TWO),
    "a power of a whole number": (
        over(number("a", "int64", "3") + number("e", "float", "2.0") + number("two", "int64", "2")
             + number("eight", "int64", "8") + "p = Pow(a, e) h = Div(p, two) d = Mul(h, two) c ="
             " Cast<to = 7>(d)"
             " axis = Sub(c, eight)"), ONE, TWO),
    "a cast of a number that is too large": (
        over(number("a", "float", "1e20") + number("zero", "int64", "0")
             + "i = Cast<to = 7>(a) c = Greater(i, zero) axis = Cast<to = 7>(c)"), ONE, TWO),
    "a maximum with NaN": (
        over(number("big", "float", "1e38") + number("one", "float", "1.0") + number("zero", "float", "0.0")
             + "inf = Mul(big, big) nan = Sub(inf, inf) m1 = Max(one, nan) c = Greater(m1, zero)"
             " axis = Cast<to = 7>(c)"),
        ONE, TWO),
    "a slice from before the beginning": (
        over(number("v", "int64", "0") + number("from", "int64", "-10") + number("to", "int64", "-100")
             + number("zero", "int64", "0") + number("step", "int64", "-1") + number("one", "int64", "1")
             + "q = Slice(v, from, to, zero, step) axis = Concat<axis = 0>(q, one)"), ONE, TWO),
    "a function of another operator set": (
        text("y = local.Normal(x)", sets='"": 11, "local": 1', inputs="float[N, T, 2] x",
             more='<domain: "local", opset_import: ["": 13]> Normal (a) => (b) { t ='
             ' Transpose<perm = [1, 0, 2]>(a)'
             " s = Softmax(t) b = Transpose<perm = [1, 0, 2]>(s) }"),
        ONE.reshape(1, 3, 2), TWO.reshape(1, 3, 2)),
    "statistics that are computed": (
        text("c = Constant<value = float[6] {1, 2, 1, 1, 1, 1}>() y, a, b, e, g ="
             " BatchNormalization(x, c, c, c, c)",
             12, inputs="float[N, 6] x"), ONE, TWO),
    "linear interpolation of rows beside NaN": (
        text("t = Transpose<perm = [1, 2, 0, 3]>(x) e = Constant<value = float[4] {1.0, 1.0, 1.0, 2.0}>()"
             ' r = Resize<mode = "linear">(t, , e) y = Transpose<perm = [2, 0, 1, 3]>(r)',
             inputs="float[N, 1, 2, 3] x"), ONE.reshape(1, 1, 2, 3), NAN.reshape(1, 1, 2, 3)),
    "32 bits of a length that overflow": (
        text(WIDTH + "i = Cast<to = 6>(width) big = Constant<value = int32[1] {1073741824}>() p = Mul(i, big)"
             " q = Div(p, big) length = Cast<to = 7>(q)" + CUT), ONE[:, :5], TWO[:, :5]),
    "a large multiple of a length as a float": (
        text(WIDTH + "big = Constant<value = int64[1] {16777217}>() p = Mul(width, big) f = Cast<to = 1>(p)"
             " g = Cast<to = 7>(f) length = Div(g, big)" + CUT), ONE[:, :4], TWO[:, :4]),
    "a reference outside of a function": (referring(), ONE, TWO),
    "a constant twice": (twice(), ONE, TWO),
    "linear interpolation beside NaN": (resize("linear", [1, 6]), ONE, NAN),
    "cubic interpolation beside NaN": (resize("cubic", [1, 6]), ONE, NAN),
    "linear interpolation of channels beside NaN": (
        resize("linear", [1, 2, 3]), ONE.reshape(1, 2, 3), NAN.reshape(1, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize(("model", "mine", "other"), CASES.values(), ids=list(CASES))
def test_rows_that_runs_show_to_be_coupled_are_not_proven(
    tmp_path: Path, model: ModelProto, mine: Any, other: Any
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    (alone,) = session.run(None, {"x": mine})
    joined = [session.run(None, {"x": np.concatenate(pair)})[0] for pair in ((mine, other), (other, mine))]
    parts = joined[0][:1], joined[1][1:]
    assert not all(np.allclose(alone, part, equal_nan=True) for part in parts if part.shape == alone.shape)
    assert judge_rows(path).verdict != "independent"
