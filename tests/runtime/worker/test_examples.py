"""Examples of inputs: which lengths the warm-up finds where a model leaves them open."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from support import models
from support.models import FLOAT, INT64, model, save, value
from support.workers import load, loaded_memory, order_of, tensor

from runtime.process.pool import WorkerPool
from runtime.wire import Example

Sizes = tuple[int | str | None, ...]


def weights(name: str, *shape: int) -> Any:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def multiplied(shape: Sizes, rows: int) -> ModelProto:
    """`y = x · w`, where `w` has these rows: the last length of `x` has to be theirs."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return model([node], [value("x", FLOAT, shape)], [value("y", FLOAT, None)], [weights("w", rows, 2)])


def divided_in_blocks(shape: Sizes, block: int) -> ModelProto:
    """Cuts a picture into blocks: its sides have to be multiples of one."""
    node = helper.make_node("SpaceToDepth", ["x"], ["y"], blocksize=block)
    return model([node], [value("x", FLOAT, shape)], [value("y", FLOAT, None)])


def of_height(shape: Sizes, height: int) -> ModelProto:
    """Needs a height, and takes any width, as models that read a line of text do."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["t", "w"], ["y"]),
    ]
    return model(nodes, [value("x", FLOAT, shape)], [value("y", FLOAT, None)], [weights("w", height, 2)])


def with_state(length: int) -> ModelProto:
    """A step of a recurrent network: the state has its batch dimension in the middle, nothing has a name."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Squeeze", ["state", "first"], ["b"]),
        helper.make_node("Concat", ["a", "b"], ["y"], axis=1),
    ]
    inputs = [value("x", FLOAT, [None, None]), value("state", FLOAT, [1, None, 4])]
    first = helper.make_tensor("first", INT64, [1], [0])
    return model(nodes, inputs, [value("y", FLOAT, None)], [weights("w", length, 4), first])


def decoder() -> ModelProto:
    """Appends to keys of earlier tokens; `total` is the length of both."""
    nodes = [
        helper.make_node("Concat", ["past_key", "key"], ["all"], axis=1),
        helper.make_node("Mul", ["all", "mask"], ["y"]),
    ]
    inputs = [
        value("key", FLOAT, ["batch", "sequence", 3]),
        value("past_key", FLOAT, ["batch", "past_sequence", 3]),
        value("mask", FLOAT, ["batch", "total_sequence", 1]),
    ]
    return model(nodes, inputs, [value("y", FLOAT, None)])


def averaged() -> ModelProto:
    """A mean over the tokens that the mask has: NaN if it has none."""
    nodes = [
        helper.make_node("Cast", ["mask"], ["m"], to=FLOAT),
        helper.make_node("ReduceSum", ["m"], ["n"], keepdims=0),
        helper.make_node("Div", ["n", "n"], ["y"]),
    ]
    return model(nodes, [value("mask", INT64, ["batch", "sequence"])], [value("y", FLOAT, [])])


def volume(channels: int = 8) -> ModelProto:
    """Two convolutions over a volume, and the mean of what they find: 100 times the memory of its input."""
    weights = [
        numpy_helper.from_array(np.ones((channels, before, 3, 3, 3), np.float32), name)
        for name, before in (("v", 1), ("w", channels))
    ]
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], pads=[1] * 6),
        helper.make_node("Conv", ["a", "w"], ["b"], pads=[1] * 6),
        helper.make_node("GlobalAveragePool", ["b"], ["y"]),
    ]
    inputs = [value("x", FLOAT, ["batch", 1, "depth", "height", "width"])]
    return model(nodes, inputs, [value("y", FLOAT, None)], weights)


def coloured() -> ModelProto:
    """A picture of three colours and 224 by 224, of which the file says nothing."""
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["grey"]),
        helper.make_node("Reshape", ["grey", "sides"], ["row"]),
        helper.make_node("MatMul", ["row", "w"], ["y"]),
    ]
    sides = numpy_helper.from_array(np.array([-1, 224 * 224], np.int64), "sides")
    inputs = [value("x", FLOAT, ["n", "c", "h", "w"])]
    kept = [weights("v", 1, 3, 1, 1), weights("w", 224 * 224, 1), sides]
    return model(nodes, inputs, [value("y", FLOAT, None)], kept)


def endless(shape: Sizes) -> ModelProto:
    """Counts for ever, whatever it gets."""
    loop = models.counting_loop().graph
    far = helper.make_tensor("far", INT64, [], [models.ENDLESS])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Add", ["largest", "far"], ["trips"]),
        *loop.node,
    ]
    return model(nodes, [value("x", INT64, shape)], [value("count", INT64, [])], [*loop.initializer, far])


def filled(count: int) -> ModelProto:
    """The sum of so many zeros, and of `x`."""
    nodes = [
        helper.make_node("Shape", ["x"], ["length"]),
        helper.make_node("Add", ["length", "count"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["y"], keepdims=0),
    ]
    counts = [helper.make_tensor("count", INT64, [1], [count])]
    return model(nodes, [value("x", FLOAT, ["length"])], [value("y", FLOAT, [])], counts)


def zeros(*shape: int) -> Example:
    return Example(shape, "zeros")


FOUND: dict[str, tuple[ModelProto, list[Example]]] = {
    "declared": (models.identity(shape=(2, 3)), [zeros(2, 3)]),
    "batch": (models.identity(shape=("batch", 3)), [zeros(1, 3)]),
    "picture": (divided_in_blocks((None, 3, "height", "width"), 32), [zeros(1, 3, 32, 32)]),
    "picture without batch name": (
        divided_in_blocks((1, 3, None, None), 128),
        [zeros(1, 3, 128, 128)],
    ),
    "height": (of_height((None, 3, None, None), 48), [zeros(1, 3, 48, 48)]),
    "colours": (coloured(), [zeros(1, 3, 224, 224)]),
    "volume": (volume(), [zeros(1, 1, 32, 32, 32)]),
    "sequence": (multiplied((None, None), 512), [zeros(1, 512)]),
    "named by the weights": (multiplied((None, None), 13), [zeros(1, 13)]),
    "height named by the weights": (of_height((1, 1, None, 150), 37), [zeros(1, 1, 37, 150)]),
    "state": (with_state(256), [zeros(1, 256), zeros(1, 1, 4)]),
    "decoder": (
        decoder(),
        [zeros(1, 16, 3), zeros(1, 0, 3), zeros(1, 16, 1)],
    ),
    "mask": (averaged(), [Example((1, 16), "ones")]),
    "divisor": (models.divide(), [Example((1,), "ones")] * 2),
    "texts": (models.strings(), [zeros(16)]),
}


@pytest.mark.parametrize(("onnx_model", "expected"), FOUND.values(), ids=list(FOUND))
async def test_warm_up_finds_lengths_that_the_model_takes(
    pool: WorkerPool, tmp_path: Path, onnx_model: ModelProto, expected: list[Example]
) -> None:
    save(onnx_model, tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path))
    assert [spec.example for spec in report.inputs] == expected
    assert report.warming_up_us is not None


async def test_refused_lengths_are_reported_as_a_guess(pool: WorkerPool, tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "sides"], ["y"])]
    sides = helper.make_tensor("sides", INT64, [2], [7, 99_991])
    save(model(nodes, [value("x", FLOAT, ["rows"])], [value("y", FLOAT, None)], [sides]), tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path))
    [guess] = [spec.example for spec in report.inputs]
    assert guess is not None
    assert (guess.shape, report.warming_up_us, report.inputs[0].dimensions) == ((16,), None, ("rows",))
    assert "cannot be reshaped" in (guess.refusal or "")


@pytest.mark.parametrize(
    ("onnx_model", "words"),
    [(endless(("batch", "words")), "it was stopped"), (filled(2**28), "Failed to allocate memory")],
    ids=["time", "memory"],
)
async def test_a_search_is_bounded_and_the_load_goes_on(
    pool: WorkerPool, tmp_path: Path, onnx_model: ModelProto, words: str
) -> None:
    save(onnx_model, tmp_path, "m")
    worker, report = await load(pool, order_of(tmp_path))
    [guess] = [spec.example for spec in report.inputs]
    assert guess is not None
    assert words in (guess.refusal or "")
    assert report.warming_up_us is None
    assert loaded_memory(worker).memory_bytes < 50_000_000


async def test_a_volume_keeps_little_of_its_warm_up(pool: WorkerPool, tmp_path: Path) -> None:
    save(volume(channels=32), tmp_path, "m")
    with_it, without = [
        loaded_memory((await load(pool, order_of(tmp_path, warm_up=warms_up)))[0]).memory_bytes
        for warms_up in (True, False)
    ]
    assert with_it - without < 20_000_000


async def test_answer_of_nan_is_an_answer(pool: WorkerPool, tmp_path: Path) -> None:
    node = helper.make_node("Div", ["x", "x"], ["y"])
    save(model([node], [value("x", FLOAT, [None, 2])], [value("y", FLOAT, [None, 2])]), tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path))
    assert [spec.example for spec in report.inputs] == [zeros(1, 2)]
    assert report.warming_up_us is not None


async def test_inputs_of_the_file_are_an_example_that_was_not_tried(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.identity(shape=(None, None)), tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path), tensor("x", "FP32", [[0] * 5] * 2))
    [found] = [spec.example for spec in report.inputs]
    assert found is not None
    assert (found.shape, found.values) == ((2, 5), "zeros")
    assert "loadledger.toml" in (found.refusal or "")
