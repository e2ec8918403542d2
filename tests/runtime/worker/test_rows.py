"""Whether rows of a batch depend on each other: loads with batching refuse models whose rows may."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from support import models
from support.models import BOOL, FLOAT, INT64, STRING, model, save, value
from support.workers import Serve, ask_all, asked_at_once, load, order_of, refusal, tensor

from runtime.onnxfile import find_operator
from runtime.process.pool import WorkerPool
from runtime.wire import TensorSpec
from runtime.worker.rows import find_dependence

HALF, DOUBLE, BFLOAT16 = TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16
SHAPE = ("batch", 4)


def of_nodes(*nodes: NodeProto, weights: Sequence[TensorProto] = ()) -> ModelProto:
    """A model of rows of 4 elements, from `x` to `y`."""
    return model(nodes, [value("x", FLOAT, SHAPE)], [value("y", FLOAT, ["rows", None])], weights)


def one(operator: str, *inputs: str, **attributes: Any) -> ModelProto:
    """A model of one operator, on `x` and constants: `0` is a number, `i0` a vector of one."""
    numbers = [helper.make_tensor(name, INT64, [1] * name.startswith("i"), [0]) for name in ("0", "i0")]
    return of_nodes(
        helper.make_node(operator, ["x", *inputs], ["y"], **attributes),
        weights=[each for each in numbers if each.name in inputs],
    )


def less_its_mean(axis: int) -> ModelProto:
    """`y = x` less its mean, over the batch or in each row."""
    return of_nodes(
        helper.make_node("ReduceMean", ["x", "axis"], ["mean"]),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
        weights=[helper.make_tensor("axis", INT64, [1], [axis])],
    )


def normalised(*, training: bool) -> ModelProto:
    """A normalisation with fixed numbers, or with those of the batch."""
    names = ["scale", "bias", "mean", "variance"]
    weights = [numpy_helper.from_array(np.full(4, 1 + at, np.float32), name) for at, name in enumerate(names)]
    outputs = ["y", "m", "v"] if training else ["y"]
    node = helper.make_node("BatchNormalization", ["x", *names], outputs, training_mode=int(training))
    return of_nodes(node, weights=weights)


def in_a_function() -> ModelProto:
    """Draws random numbers in a function of the model."""
    node = helper.make_node("RandomUniformLike", ["a"], ["b"])
    opset = [helper.make_opsetid("", 15)]
    function = helper.make_function("local", "Draw", ["a"], ["b"], [node], opset)
    call = helper.make_node("Draw", ["x"], ["y"], domain="local")
    return model([call], [value("x", FLOAT, SHAPE)], [value("y", FLOAT, SHAPE)], functions=[function])


def classes() -> ModelProto:
    """The index of the largest number of each row."""
    node = helper.make_node("ArgMax", ["x"], ["y"], axis=1)
    return model([node], [value("x", FLOAT, SHAPE)], [value("y", INT64, ["batch", 1])])


def statically_quantised() -> ModelProto:
    """`y = x`, in steps of a tenth from -12.8 on."""
    weights = [
        helper.make_tensor("s", FLOAT, [], [0.1]),
        helper.make_tensor("z", TensorProto.INT8, [], [0]),
    ]
    return of_nodes(
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        weights=weights,
    )


def sum_of_batch() -> ModelProto:
    """To each row of whole numbers the largest of all is added."""
    largest = helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0)
    add = helper.make_node("Add", ["x", "largest"], ["y"])
    return model([largest, add], [value("x", INT64, SHAPE)], [value("y", INT64, SHAPE)])


def first_row_only() -> ModelProto:
    """`y` is the first row of `x`."""
    yes = helper.make_tensor("yes", BOOL, [1], [1])
    return of_nodes(helper.make_node("Compress", ["x", "yes"], ["y"], axis=0), weights=[yes])


def one_row_only() -> ModelProto:
    """`y = x`: fails for more rows, where it looks for their number less 1 in a table of one number."""
    return of_nodes(
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
        helper.make_node("Sub", ["rows", "one"], ["place"]),
        helper.make_node("Gather", ["table", "place"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
        weights=[helper.make_tensor("one", INT64, [1], [1]), helper.make_tensor("table", FLOAT, [1], [0])],
    )


DEPENDENT = {
    "one scale": (models.quantised(), "DynamicQuantizeLinear"),
    "random": (one("RandomNormalLike", seed=1.0), "RandomNormalLike"),
    "random in a function": (in_a_function(), "RandomUniformLike"),
    "mean of the batch": (less_its_mean(0), "another one beside"),
    "trained": (normalised(training=True), "another one beside"),
    "softmax": (one("Softmax", axis=0), "another one beside"),
    "sum of rows before": (one("CumSum", "0"), "another one beside"),
    "sum of rows after": (one("CumSum", "0", reverse=1), "another one beside"),
    "sorted": (one("Unique", axis=0), "another one beside"),
    "largest": (sum_of_batch(), "another one beside"),
    "first row only": (first_row_only(), "a row for each row"),
    "one row only": (one_row_only(), "two rows at once"),
    "constant": (one("Sub", "x"), "are the same"),
}


def independent() -> dict[str, ModelProto]:
    elements = {
        "floats": FLOAT,
        "halves": HALF,
        "doubles": DOUBLE,
        "brains": BFLOAT16,
        "whole numbers": INT64,
    }
    return {
        **{name: models.identity(element, SHAPE) for name, element in elements.items()},
        "texts": models.identity(STRING, ("batch", "length")),
        "yes and no": models.identity(BOOL, SHAPE),
        "mean of a row": less_its_mean(1),
        "normalised": normalised(training=False),
        "softmax": one("Softmax", axis=1),
        "classes": classes(),
        "looked up": models.look_up(),
        "quantised statically": statically_quantised(),
        "infinite": one("Exp"),
    }


async def dependence(pool: WorkerPool, root: Path, onnx_model: ModelProto, **changes: Any) -> str | None:
    """Return what a load that allows dependent rows reports."""
    save(onnx_model, root, "m")
    order = order_of(root, max_batch_size=8, dependent_rows=True, **changes)
    _, report = await load(pool, order)
    return report.dependence


@pytest.mark.parametrize(("onnx_model", "words"), DEPENDENT.values(), ids=list(DEPENDENT))
async def test_dependent_rows_are_refused_unless_allowed(
    pool: WorkerPool, tmp_path: Path, onnx_model: ModelProto, words: str
) -> None:
    found = await dependence(pool, tmp_path, onnx_model)
    assert words in (found or "")
    refused = await refusal(pool, order_of(tmp_path, max_batch_size=8))
    assert refused.code == "rows_depend"
    assert all(each in str(refused) for each in (words, "max_batch_size 0", 'dependent_rows "allow"'))
    for size in (0, 1):
        _, report = await load(pool, order_of(tmp_path, max_batch_size=size))
        assert report.dependence is None


@pytest.mark.parametrize("onnx_model", independent().values(), ids=list(independent()))
async def test_independent_rows_are_shown(pool: WorkerPool, tmp_path: Path, onnx_model: ModelProto) -> None:
    assert await dependence(pool, tmp_path, onnx_model) is None


async def test_inputs_of_the_file_show_it_where_others_are_refused(pool: WorkerPool, tmp_path: Path) -> None:
    """A model that takes no other numbers than whole ones below 4, as floats."""
    cast = helper.make_node("Cast", ["x"], ["i"], to=INT64)
    table = numpy_helper.from_array(np.arange(4000, dtype=np.float32), "table")
    look_up = helper.make_node("Gather", ["table", "i"], ["y"])
    save(of_nodes(cast, look_up, weights=[table]), tmp_path, "m")
    order = order_of(tmp_path, max_batch_size=2)
    _, report = await load(pool, order, tensor("x", "FP32", [[3, 2, 1, 0]]))
    assert report.dependence is None


async def test_nothing_is_shown_without_a_warm_up(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.rows(), tmp_path, "m")
    refused = await refusal(pool, order_of(tmp_path, max_batch_size=2, warm_up=False))
    assert "cannot be shown, without inputs" in str(refused)


async def test_reload_reports_and_refuses_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.quantised(), tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path, max_batch_size=2, warm_up_required=False))
    assert "one scale" in (report.dependence or "")


async def test_wrong_inputs_of_the_file_show_nothing_and_fail_no_reload(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.rows(), tmp_path, "m")
    order = order_of(tmp_path, max_batch_size=2, warm_up_required=False)
    _, report = await load(pool, order, tensor("nothing", "FP32", [[1]]))
    assert "cannot be shown: the model has no input 'nothing'" in (report.dependence or "")


async def test_one_scale_changes_an_answer(serve: Serve) -> None:
    """The reason for all this: large numbers of another client turn an answer into zeros."""
    worker = await serve(models.quantised(), max_batch_size=2, max_queue_delay_us=10**6, dependent_rows=True)
    small, large = (tensor("x", "FP32", [[size, 2, 3, 4]]) for size in (1, 10**6))
    _, [alone] = await ask_all(worker, [small])
    first, _ = await asked_at_once(worker, ask_all(worker, [small]), ask_all(worker, [large]))
    [beside] = (await first)[1]
    assert np.frombuffer(alone.data, np.float32).any()
    assert not np.frombuffer(beside.data, np.float32).any()


@given(st.lists(st.sampled_from(["MatMul", "DynamicQuantizeLinear", "RandomNormal", "Add"]), max_size=5))
def test_operators_are_found_by_name(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    path = tmp_path_factory.mktemp("m") / "model.onnx"
    nodes = [
        helper.make_node(name, ["x"], [f"y{at}"], "DynamicQuantizeLinear") for at, name in enumerate(names)
    ]
    path.write_bytes(model(nodes, [], []).SerializeToString())
    wanted = ("DynamicQuantizeLinear", "RandomNormal")
    assert find_operator(path, wanted) == next((name for name in names if name in wanted), None)


def test_a_row_that_depends_on_nothing_is_run_as_often_as_needed() -> None:
    runs = []

    def run(feed: dict[str, Any]) -> list[Any]:
        runs.append(len(feed["x"]))
        return [feed["x"] * 2]

    specs = [TensorSpec("x", "FP32", (-1, 3))]
    assert find_dependence(specs, specs, {"x": np.zeros((1, 3), np.float32)}, run, None) is None
    assert runs == [1, 1, 2, 2]
