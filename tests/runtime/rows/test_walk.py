"""Verdicts on small models, as exporters write them and as people build them by mistake, held to runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from support import models
from support.coupledmodels import COUPLED, INDEPENDENT
from support.models import FLOAT, INT64, parse_model, value
from support.rowruns import NOT_COMPARED, find_dependence

from runtime.rows import walk
from runtime.rows.judgement import MAX_REASON_CHARACTERS, Judgement
from runtime.rows.walk import judge_rows

SHAPE = ("N", 4)
NOT_FOLLOWED = {"constant_row_before_and_removed"}
"""Independent, but no exporter writes it: a row that is added to the batch, and taken away."""
NOT_DRAWN = {"random_numbers"}


def judge(root: Path, model: ModelProto) -> Judgement:
    path = root / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return judge_rows(path)


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_coupled_model_is_not_independent(tmp_path: Path, name: str) -> None:
    judgement = judge(tmp_path, COUPLED[name].build())
    assert judgement.verdict != "independent"
    assert judgement.reason


@pytest.mark.parametrize("name", sorted(INDEPENDENT))
def test_independent_model_is_judged_so_and_runs_agree(tmp_path: Path, name: str) -> None:
    case = INDEPENDENT[name]
    model = case.build()
    judgement = judge(tmp_path, model)
    expected = "unknown" if name in NOT_FOLLOWED else "independent"
    assert (judgement.verdict, judgement.reason == "") == (expected, expected == "independent"), (
        judgement.reason
    )
    assert find_dependence(model.SerializeToString(), case.make_rows, rounds=2, min_compared=1) is None


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_runs_see_each_coupling(name: str) -> None:
    """Else runs that agree with the walk would say nothing."""
    case = COUPLED[name]
    found = find_dependence(case.build().SerializeToString(), case.make_rows)
    assert found not in {None, NOT_COMPARED}


# Reasons


def of(
    *nodes: NodeProto, opset: int = 18, functions: list[FunctionProto] | None = None, **constants: Any
) -> ModelProto:
    """Return a model of `x` and `y`, rows of four floats."""
    tensors = [numpy_helper.from_array(np.array(each), name) for name, each in constants.items()]
    shapes = [value(name, FLOAT, SHAPE) for name in ("x", "y")]
    graph = helper.make_graph(list(nodes), "graph", shapes[:1], shapes[1:], tensors)
    opsets = [
        helper.make_opsetid(domain, number) for domain, number in (("", opset), ("local", 1), ("other", 1))
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions or [])


node = helper.make_node
AXIS = np.array([0], np.int64)
RANDOM = helper.make_function(
    "local", "Draw", ["a"], ["b"], [node("RandomUniformLike", ["a"], ["b"])], [helper.make_opsetid("", 18)]
)


def softmax_of_attribute() -> ModelProto:
    """A function with the axis of a Softmax as its attribute."""
    inner = node("Softmax", ["a"], ["b"], name="inner")
    inner.attribute.append(AttributeProto(name="axis", ref_attr_name="axis", type=AttributeProto.INT))
    function = helper.make_function(
        "local", "Part", ["a"], ["b"], [inner], [helper.make_opsetid("", 18)], ["axis"]
    )
    return of(node("Part", ["x"], ["y"], "outer", domain="local", axis=0), functions=[function])


REASONS: list[tuple[ModelProto, str, str]] = [
    (
        of(node("ReduceMean", ["x", "a"], ["m"], "mean"), node("Sub", ["x", "m"], ["y"]), a=AXIS),
        "dependent",
        "ReduceMean ('mean') computes across axis 0, along which the rows lie, and output 'y' depends on it",
    ),
    (of(node("Softmax", ["x"], ["y"], axis=0)), "dependent", "Softmax ('y') computes across axis 0"),
    (
        of(
            node("Flatten", ["x"], ["f"], axis=0),
            node("Softmax", ["f"], ["s"], axis=1),
            node("Reshape", ["s", "t"], ["y"]),
            t=np.array([-1, 4]),
        ),
        "dependent",
        "Softmax ('s') computes across axis 1",
    ),
    (of(node("Transpose", ["x"], ["y"], perm=[1, 0])), "dependent", "'y' has the rows along axis 1, and not"),
    (of(node("Gather", ["x", "i"], ["y"]), i=np.array([0])), "dependent", "takes certain rows from axis 0"),
    (of(node("MatMul", ["x", "t"], ["y"])), "unknown", "nothing computes 't'"),
    (
        of(node("Transpose", ["x"], ["t"]), node("MatMul", ["x", "t"], ["y"])),
        "dependent",
        "multiplies each row by",
    ),
    (
        of(
            node("Shape", ["x"], ["s"]),
            node("Cast", ["s"], ["c"], to=FLOAT),
            node("ReduceMax", ["c"], ["m"]),
            node("Div", ["x", "m"], ["y"]),
        ),
        "unknown",
        "Div ('y')",
    ),
    (
        of(
            node("Shape", ["x"], ["s"], end=1),
            node("Cast", ["s"], ["c"], to=FLOAT),
            node("Div", ["x", "c"], ["y"]),
        ),
        "dependent",
        "Div ('y') uses the number of rows as a number",
    ),
    (
        of(node("Draw", ["x"], ["y"], domain="local"), functions=[RANDOM]),
        "dependent",
        "RandomUniformLike ('b') draws random numbers",
    ),
    (softmax_of_attribute(), "dependent", "Softmax ('inner') computes across axis 0"),
    (
        of(node("Strange", ["x"], ["y"], "odd", domain="other")),
        "unknown",
        "other.Strange ('odd') keeps the rows apart: its definition",
    ),
    (of(node("Relu", ["x"], ["y"]), opset=99), "unknown", "operator set 99 is newer"),
    (
        of(node("Identity", ["c"], ["y"]), c=np.zeros((2, 4), np.float32)),
        "dependent",
        "output 'y' does not have a row for each",
    ),
    (of(node("Relu", ["x"], ["y"], name="n" * 5000 + "\n")), "independent", ""),
    (of(node("Strange", ["x"], ["y"], "n" * 5000, domain="other" * 500)), "unknown", "…"),
    (of(node("Softmax", ["x"], ["y"], axis=7)), "unknown", "an axis that is not there"),
    (of(node("Softmax", ["x"], ["y"], axis="0")), "unknown", "an axis that is not there"),
    (of(node("Transpose", ["x"], ["y"], perm=["a"])), "unknown", "an axis that is not there"),
    (
        of(node("Conv", ["x", "w"], ["y"], strides=[0]), w=np.zeros((1, 4, 1), np.float32)),
        "unknown",
        "do not fit each other",
    ),
    (of(node("Slice", ["x"], ["y"])), "unknown", "an input is missing"),
]


@pytest.mark.parametrize(("model", "verdict", "words"), REASONS)
def test_reason_names_operator_output_and_axis(
    tmp_path: Path, model: ModelProto, verdict: str, words: str
) -> None:
    judgement = judge(tmp_path, model)
    assert (judgement.verdict, words in judgement.reason) == (verdict, True), judgement.reason
    assert len(judgement.reason) <= MAX_REASON_CHARACTERS


def test_function_with_name_of_known_operator_is_not_trusted(tmp_path: Path) -> None:
    """ONNX Runtime may have the operator, and not the function, in mind."""
    identity = [node("Identity", ["a"], ["b"])]
    function = helper.make_function("", "Softmax", ["a"], ["b"], identity, [helper.make_opsetid("", 18)])
    judgement = judge(tmp_path, of(node("Softmax", ["x"], ["y"], axis=0), functions=[function]))
    assert (judgement.verdict, "in a domain of ONNX Runtime's own operators" in judgement.reason) == (
        "unknown",
        True,
    )


def test_input_with_default_counts_as_constant(tmp_path: Path) -> None:
    """A request that gives it runs alone."""
    model = of(node("Add", ["x", "c"], ["y"]), c=np.zeros((1, 4), np.float32))
    model.graph.input.append(value("c", FLOAT, (1, 4)))
    assert judge(tmp_path, model).verdict == "independent"


def test_input_with_fixed_first_dimension_is_unknown(tmp_path: Path) -> None:
    model = parse_model("(float[3, 4] x) => (float[3, 4] y) { y = Relu(x) }")
    assert "input 'x' has no first dimension of any length" in judge(tmp_path, model).reason


# Bounds


def nested(depth: int) -> ModelProto:
    """`y = Relu(x)` in If bodies, one in the other."""
    nodes, condition = [node("Relu", ["x"], ["y0"])], numpy_helper.from_array(np.array(True), "c")
    other = helper.make_graph([node("Identity", ["x"], ["z"])], "other", [], [value("z", FLOAT, SHAPE)])
    for at in range(depth):
        body = helper.make_graph(nodes, "body", [], [value(f"y{at}", FLOAT, SHAPE)])
        nodes = [node("If", ["c"], [f"y{at + 1}"], then_branch=body, else_branch=other)]
    nodes.append(node("Identity", [f"y{depth}"], ["y"]))
    graph = helper.make_graph(nodes, "g", [value("x", FLOAT, SHAPE)], [value("y", FLOAT, SHAPE)], [condition])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def calling_each_other(depth: int) -> ModelProto:
    """Functions of which each calls the next one twice: 2**depth operators."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    functions = [helper.make_function("local", "F0", ["a"], ["b"], [node("Relu", ["a"], ["b"])], opsets)]
    for at in range(1, depth + 1):
        calls = [node(f"F{at - 1}", [a], [b], domain="local") for a, b in (("a", "m"), ("m", "b"))]
        functions.append(helper.make_function("local", f"F{at}", ["a"], ["b"], calls, opsets))
    return of(node(f"F{depth}", ["x"], ["y"], domain="local"), functions=functions)


def test_nested_bodies_are_walked_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(tmp_path, nested(8)).verdict == "independent"
    monkeypatch.setattr(walk, "MAX_DEPTH", 7)
    judgement = judge(tmp_path, nested(8))
    assert "nested too deeply" in judgement.reason


def test_operators_are_walked_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "MAX_OPERATORS", 1000)
    assert judge(tmp_path, calling_each_other(8)).verdict == "independent"
    judgement = judge(tmp_path, calling_each_other(14))
    assert (judgement.verdict, "more than 1,000 operators" in judgement.reason) == ("unknown", True)


def test_walk_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "MAX_SECONDS", -1.0)
    judgement = judge(tmp_path, calling_each_other(10))
    assert (judgement.verdict, "takes longer than" in judgement.reason) == ("unknown", True)


def test_function_that_calls_itself_ends(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    call = node("Endless", ["a"], ["b"], domain="local")
    function = helper.make_function("local", "Endless", ["a"], ["b"], [call], opsets)
    judgement = judge(tmp_path, of(node("Endless", ["x"], ["y"], domain="local"), functions=[function]))
    assert "nested too deeply" in judgement.reason


def test_numbers_do_not_grow_without_bound(tmp_path: Path) -> None:
    """A number that is squared 64 times has as many digits as there is memory for."""
    squares = [node("Mul", [f"n{at}", f"n{at}"], [f"n{at + 1}"]) for at in range(64)]
    model = of(*squares, node("Cast", ["n64"], ["c"], to=1), node("Add", ["x", "c"], ["y"]), n0=np.array([3]))
    assert judge(tmp_path, model).verdict == "independent"


@pytest.mark.parametrize("data", [b"", models.CORRUPT, models.TEXT, b"\x3a\x00" * 2])
def test_file_that_is_no_model_is_unknown(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    judgement = judge_rows(tmp_path / "model.onnx")
    assert (judgement.verdict, "cannot be followed" in judgement.reason) == ("unknown", True)


def test_table_of_a_tree_ensemble_is_not_read(tmp_path: Path) -> None:
    """Its lists have as many fields as all branches together, more than are read one by one."""
    attributes: dict[str, Any] = {
        name: list(range(700_000))
        for name in ("nodes_treeids", "nodes_nodeids", "nodes_featureids", "nodes_truenodeids")
    }
    trees = node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=4, **attributes)
    model = models.model([trees], [value("x", FLOAT, SHAPE)], [value("y", FLOAT, SHAPE)])
    assert judge(tmp_path, model).verdict == "independent"


def test_shape_of_external_data_is_followed(tmp_path: Path) -> None:
    """Small constants may be kept in another file, as a shape is here."""
    shape = TensorProto(name="s", data_type=INT64, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "weights.bin"), ("offset", "8"), ("length", "16")):
        shape.external_data.add(key=key, value=text)
    model = of(node("Reshape", ["x", "s"], ["y"]))
    model.graph.initializer.append(shape)
    (tmp_path / "weights.bin").write_bytes(np.array([7, -1, 4], "<i8").tobytes())
    assert judge(tmp_path, model).verdict == "independent"
    (tmp_path / "weights.bin").write_bytes(np.array([7, 4, -1], "<i8").tobytes())
    assert judge(tmp_path, model).verdict == "dependent"
    (tmp_path / "weights.bin").unlink()
    assert judge(tmp_path, model).verdict == "unknown"
