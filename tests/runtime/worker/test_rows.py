"""Whether rows of a batch depend on each other: loads with batching refuse models whose rows may."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper
from support import models
from support.models import FLOAT, INT64, model, parse_model, save, value
from support.workers import load, order_of, refusal, tensor

from runtime.errors import InvalidInput
from runtime.onnxfile import find_operator
from runtime.process.pool import WorkerPool
from runtime.wire import DATATYPES, Tensor, TensorSpec
from runtime.worker.rows import find_dependence

SHAPE = ("batch", 4)


# What two rows tell, of which the runs are given


def find(answer: Callable[[Any], Any], datatype: str = "FP32") -> str | None:
    """Find the dependence of rows of four elements in a model of one input."""
    specs = [TensorSpec("x", datatype, (-1, 4))]
    row = {"x": np.zeros((1, 4), DATATYPES[datatype].numpy)}
    return find_dependence(specs, specs, row, lambda feed: [answer(feed["x"])], None)


def softmax(x: Any, axis: int) -> Any:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def take_one_row(x: Any) -> Any:
    if len(x) > 1:
        raise InvalidInput("one row alone")
    return x


def look_up(x: Any) -> Any:
    if x.min() < 0 or x.max() > 3:
        raise InvalidInput("out of the table")
    return 10 * x


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (find(lambda x: x - x.mean(0)), "another one beside"),
        (find(lambda x: softmax(x, 0)), "another one beside"),
        (find(lambda x: np.cumsum(x, 0)), "another one beside"),
        (find(lambda x: np.cumsum(x[::-1], 0)[::-1]), "another one beside"),
        (find(lambda x: np.sort(x, 0)), "another one beside"),
        (find(lambda x: x + x.max(), "INT64"), "another one beside"),
        (find(lambda x: x[:1]), "a row for each row"),
        (find(take_one_row), "two rows at once: one row alone"),
        (find(lambda x: x - x), "are the same"),
        *((find(lambda x: x, datatype), None) for datatype in ("FP16", "BF16", "FP32", "FP64")),
        *((find(lambda x: x, datatype), None) for datatype in ("INT64", "BOOL", "BYTES")),
        (find(lambda x: x - x.mean(1, keepdims=True)), None),
        (find(lambda x: softmax(x, 1)), None),
        (find(lambda x: x.argmax(1)), None),
        (find(look_up, "INT64"), None),
        (find(lambda x: np.clip(np.round(x, 1), -12.8, 12.7)), None),
        (find(lambda x: np.where(x > 80, np.inf, x)), None),
        # Last bits that are rounded differently with more rows.
        (find(lambda x: x * (1 + 0.001 * len(x))), None),
    ],
)
def test_dependence_is_what_another_row_changes(found: str | None, words: str | None) -> None:
    assert (found is None) if words is None else (words in (found or ""))


def test_a_row_that_depends_on_nothing_is_run_as_often_as_needed() -> None:
    runs = []

    def run(feed: dict[str, Any]) -> list[Any]:
        runs.append(len(feed["x"]))
        return [feed["x"] * 2]

    specs = [TensorSpec("x", "FP32", (-1, 3))]
    assert find_dependence(specs, specs, {"x": np.zeros((1, 3), np.float32)}, run, None) is None
    assert runs == [1, 1, 2, 2]


@given(st.lists(st.sampled_from(["MatMul", "DynamicQuantizeLinear", "RandomNormal", "Add"]), max_size=5))
def test_operators_are_found_by_name(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    path = tmp_path_factory.mktemp("m") / "model.onnx"
    nodes = [
        helper.make_node(name, ["x"], [f"y{at}"], "DynamicQuantizeLinear") for at, name in enumerate(names)
    ]
    path.write_bytes(model(nodes, [], []).SerializeToString())
    wanted = ("DynamicQuantizeLinear", "RandomNormal")
    assert find_operator(path, wanted) == next((name for name in names if name in wanted), None)


# In a worker


LESS_ITS_MEAN = parse_model("""(float[batch, 4] x) => (float[batch, 4] y) <int64[1] axis = {0}> {
    mean = ReduceMean(x, axis)
    y = Sub(x, mean)
}""")


def in_a_function() -> ModelProto:
    """Draws random numbers in a function of the model."""
    node = helper.make_node("RandomUniformLike", ["a"], ["b"])
    opset = [helper.make_opsetid("", 15)]
    function = helper.make_function("local", "Draw", ["a"], ["b"], [node], opset)
    call = helper.make_node("Draw", ["x"], ["y"], domain="local")
    return model([call], [value("x", FLOAT, SHAPE)], [value("y", FLOAT, SHAPE)], functions=[function])


DEPENDENT = {
    "one scale": (models.quantised(), "DynamicQuantizeLinear"),
    "random in a function": (in_a_function(), "RandomUniformLike"),
    "mean of the batch": (LESS_ITS_MEAN, "another one beside"),
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


async def test_independent_rows_are_shown(pool: WorkerPool, tmp_path: Path) -> None:
    """Of sums that ONNX Runtime rounds differently with more rows."""
    assert await dependence(pool, tmp_path, models.misaligned()) is None


async def test_inputs_of_the_file_show_it_where_others_are_refused(pool: WorkerPool, tmp_path: Path) -> None:
    """A model that takes no other numbers than whole ones below 4, as floats."""
    cast = helper.make_node("Cast", ["x"], ["i"], to=INT64)
    table = numpy_helper.from_array(np.arange(4000, dtype=np.float32), "table")
    look_up = helper.make_node("Gather", ["table", "i"], ["y"])
    x, y = value("x", FLOAT, SHAPE), value("y", FLOAT, SHAPE)
    save(model([cast, look_up], [x], [y], [table]), tmp_path, "m")
    order = order_of(tmp_path, max_batch_size=2)
    _, report = await load(pool, order, tensor("x", "FP32", [[3, 2, 1, 0]]))
    assert report.dependence is None


async def test_nothing_is_shown_without_a_warm_up(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.rows(), tmp_path, "m")
    refused = await refusal(pool, order_of(tmp_path, max_batch_size=2, warm_up=False))
    assert "cannot be shown, without inputs" in str(refused)


@pytest.mark.parametrize(
    ("onnx_model", "given", "words"),
    [
        (models.quantised(), [], "one scale"),
        (
            models.rows(),
            [tensor("nothing", "FP32", [[1]])],
            "cannot be shown: the model has no input 'nothing'",
        ),
    ],
    ids=["dependent rows", "wrong inputs of the file"],
)
async def test_reload_reports_and_refuses_nothing(
    pool: WorkerPool, tmp_path: Path, onnx_model: ModelProto, given: list[Tensor], words: str
) -> None:
    save(onnx_model, tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path, max_batch_size=2, warm_up_required=False), *given)
    assert words in (report.dependence or "")
