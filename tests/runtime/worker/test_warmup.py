"""Warm-up before a model serves: on an example of its inputs that is found, on those of its file, or none."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from support import models
from support.models import FLOAT, INT64, model, parse_model, save, value
from support.running import Engine
from support.workers import answer, floats, load, loaded_memory, order_of, refusal, tensor

from events.jobs import JobStatus
from events.types import LoadParameters, ModelLoaded
from runtime.errors import InvalidInput
from runtime.process.pool import WorkerPool
from runtime.process.worker import WorkerMemory
from runtime.statistics import Statistics
from runtime.wire import Example, Tensor, TensorSpec
from runtime.worker.examples import MAX_EXAMPLE_BYTES, MAX_INPUTS, find_example

ALL_STAGES = ["loading", "warming_up", "measuring"]
NO_WARM_UP = ["loading", "measuring"]
TOO_MANY = MAX_EXAMPLE_BYTES // 4 + 1


# The search for an example, of which the runs are given


def spec(*shape: int | str, name: str = "x", datatype: str = "FP32") -> TensorSpec:
    """An input whose open lengths have names, or none where they are `?`."""
    lengths = tuple(-1 if isinstance(length, str) else length for length in shape)
    names = tuple(length if isinstance(length, str) and length != "?" else "" for length in shape)
    return TensorSpec(name, datatype, lengths, dimensions=names)


def search(
    inputs: Sequence[TensorSpec],
    answers: Callable[..., float],
    refusal: str = "",
    weights: Iterable[int] = (),
    *,
    is_batched: bool = False,
) -> list[Example] | None:
    """Search an example for a model with these weights' lengths, which refuses where it answers 0."""

    def run(feed: dict[str, Any]) -> list[Any]:
        if not (found := answers(*feed.values())):
            raise InvalidInput(refusal)
        return [np.array([found], np.float32)]

    found = find_example(inputs, run, lambda: None, lambda: weights, lambda: False, is_batched=is_batched)
    return None if found is None else list(found.examples.values())


def zeros(*shape: int) -> Example:
    return Example(shape, "zeros")


def takes_all(*_: Any) -> bool:
    return True


DECODER = [
    spec("batch", "sequence", 3, name="key"),
    spec("batch", "past_sequence", 3, name="past_key"),
    spec("batch", "total_sequence", 1, name="mask"),
]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (search([spec(2, 3)], takes_all), [zeros(2, 3)]),
        (search([spec("batch", 3)], takes_all), [zeros(1, 3)]),
        (search([spec("length", datatype="BYTES")], takes_all), [zeros(16)]),
        (search([spec("length")], takes_all), [zeros(16)]),
        (search([spec("length")], takes_all, is_batched=True), [zeros(1)]),
        # Sides of pictures and volumes, and lengths of sequences.
        (search([spec("?", 3, "height", "width")], takes_all), [zeros(1, 3, 32, 32)]),
        (search([spec(1, 3, "?", "?")], lambda x: x.shape[2] % 128 == 0), [zeros(1, 3, 128, 128)]),
        (search([spec("?", 3, "?", "?")], lambda x: x.shape[2] == 48), [zeros(1, 3, 48, 48)]),
        (search([spec("batch", 1, "d", "h", "w")], takes_all), [zeros(1, 1, 32, 32, 32)]),
        (search([spec("?", "?")], lambda x: x.shape[1] == 512), [zeros(1, 512)]),
        # Lengths of the weights, and those that a refusal names.
        (search([spec("?", "?")], lambda x: x.shape[1] == 13, weights=[13, 2]), [zeros(1, 13)]),
        (search([spec("?", "?")], lambda x: x.shape[1] == 13, "it takes 13"), [zeros(1, 13)]),
        (search([spec(1, 1, "?", 150)], lambda x: x.shape[2] == 37, weights=[37]), [zeros(1, 1, 37, 150)]),
        (
            search([spec("n", "c", "h", "w")], lambda x: x.shape[1:] == (3, 224, 224), weights=[3]),
            [zeros(1, 3, 224, 224)],
        ),
        # A state has its batch dimension in the middle; keys of earlier tokens there are none.
        (
            search(
                [spec("?", "?"), spec(1, "?", 4, name="state")],
                lambda x, state: x.shape[1] == 256 and state.shape[1] == 1,
            ),
            [zeros(1, 256), zeros(1, 1, 4)],
        ),
        (
            search(DECODER, lambda key, past, mask: key.shape[1] + past.shape[1] == mask.shape[1]),
            [zeros(1, 16, 3), zeros(1, 0, 3), zeros(1, 16, 1)],
        ),
        # Ones where zeros are refused or give no finite number.
        (
            search([spec("batch", "sequence", datatype="INT64")], lambda x: 1 if x.any() else math.nan),
            [Example((1, 16), "ones")],
        ),
        (
            search([spec("?", name=name, datatype="INT64") for name in "ab"], lambda _, b: b.all()),
            2 * [Example((1,), "ones")],
        ),
        (search([spec("?", 2)], lambda _: math.nan), [zeros(1, 2)]),
        # No example is made or sent.
        (search([spec(TOO_MANY)], takes_all), None),
        (search([spec(TOO_MANY - 1)], takes_all), [zeros(TOO_MANY - 1)]),
        (search([spec("?", TOO_MANY // 2, 2**5)], takes_all), None),
        (search([spec(TOO_MANY // 8, datatype="BYTES")], takes_all), None),
        (search([spec(0, 2**62, 2**62)], takes_all), None),
        (search([spec(1, name=f"{number}") for number in range(MAX_INPUTS + 1)], takes_all), None),
    ],
)
def test_example_has_lengths_that_the_model_takes(found: object, expected: object) -> None:
    assert found == expected


# In a worker


def text(name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    """Make a tensor of JSON text, as a model's loadledger.toml gives it."""
    return Tensor(name, datatype, shape, data, text=True)


RUN = {
    "scalar": models.identity(shape=()),
    "no elements": models.identity(shape=(0, 2)),
    "two inputs": models.subtract(),
    "default": models.with_default(),
    "optional input": models.optional_input(),
    "optional output": models.optional_output(),
    "state": models.running_total(),
    "output that is no tensor": models.zip_map(),
    "loop": models.counting_loop(),
    "ones": models.divide(),
    "no shape": models.identity_of_any_shape(models.FLOAT),
}
NOT_RUN = {"too many": models.identity(shape=(TOO_MANY,))}
GIVEN_INPUTS: dict[str, tuple[ModelProto, list[Tensor]]] = {
    "nested": (models.rows(), [text("x", "FP32", (2, 2), b"[[1,2],[3,4]]")]),
    "texts": (models.rows(models.STRING), [text("x", "BYTES", (1, 2), '["ä",""]'.encode())]),
    "reshape": (models.reshape(), [text("sides", "INT64", (2,), b"[2,3]"), floats("x", *range(6))]),
    "divide": (models.divide(), [text(name, "INT64", (1,), b"[1]") for name in "ab"]),
    "optional": (models.optional_input(), [text(name, "FP32", (1,), b"[1]") for name in "xo"]),
}
WARM_UPS = [
    *((model, [], True) for model in RUN.values()),
    *((model, [], False) for model in NOT_RUN.values()),
    *((model, given, True) for model, given in GIVEN_INPUTS.values()),
]


@pytest.mark.parametrize(("model", "given", "is_run"), WARM_UPS, ids=[*RUN, *NOT_RUN, *GIVEN_INPUTS])
async def test_warm_up_runs_where_shapes_or_inputs_allow(
    pool: WorkerPool, tmp_path: Path, model: ModelProto, given: list[Tensor], *, is_run: bool
) -> None:
    save(model, tmp_path, "m")
    stages: list[str] = []
    _, report = await load(pool, order_of(tmp_path), *given, on_stage=stages.append)
    assert (report.warming_up_us or 0) > 0 if is_run else report.warming_up_us is None
    assert stages == (ALL_STAGES if is_run else NO_WARM_UP)


async def test_failure_on_zeros_and_ones_refuses_and_says_what_to_do(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.reshape(), tmp_path, "m")
    refused = await refusal(pool, order_of(tmp_path))
    assert refused.code == "warm_up_failed"
    for words in ("zeros", "[[warm_up.inputs]]", "loadledger.toml", "enabled = false", "cannot be reshaped"):
        assert words in str(refused)


async def test_failure_on_zeros_of_unknown_shape_is_ignored(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.second_column(), tmp_path, "m")
    stages: list[str] = []
    worker, report = await load(pool, order_of(tmp_path), on_stage=stages.append)
    assert (report.warming_up_us, stages) == (None, ALL_STAGES)
    assert await answer(worker, tensor("x", "FP32", [[1, 2], [3, 4]])) == [2, 4]


async def test_warm_up_beyond_the_memory_limit_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.memory_bomb_on_zeros(), tmp_path, "m")
    refused = await refusal(pool, order_of(tmp_path, memory_limit_bytes=200_000_000))
    assert (refused.code, "memory_limit_bytes are 200000000" in str(refused)) == ("out_of_memory", True)


async def loaded_with_and_without(pool: WorkerPool, root: Path, onnx_model: ModelProto) -> list[WorkerMemory]:
    """Return what a model takes with a warm-up, and without."""
    save(onnx_model, root, "m")
    orders = [order_of(root, warm_up=warms_up) for warms_up in (True, False)]
    return [loaded_memory((await load(pool, order))[0]) for order in orders]


async def test_peak_memory_includes_the_warm_up(pool: WorkerPool, tmp_path: Path) -> None:
    with_it, without = await loaded_with_and_without(pool, tmp_path, models.widened())
    assert with_it.peak_memory_bytes - without.peak_memory_bytes > 50_000_000
    assert with_it.peak_memory_bytes >= with_it.memory_bytes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([floats("z", 1)], "the model has no input 'z'"),
        ([floats("a", 1)], "no value for input 'b'"),
        ([floats("a", 1), floats("a", 1)], "input 'a' is given twice"),
        ([text("a", "INT64", (1,), b"[1]")], "input 'a' is FP32, not INT64"),
        ([text("a", "FP32", (2,), b"[1]")], "data has 1 elements, declared is [2]"),
        ([text("a", "FP32", (1,), b"[true]")], "input 'a': data is not FP32"),
        ([text(name, "FP32", (1, 1), b"[1]") for name in "ab"], "rank"),
        ([floats("a", 1, 2, 3), floats("b", 1, 2)], "Sub"),
        ([floats(name, *range(9)) for name in "ab"], "the batch size is 9, and of this model at most 8"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
async def test_invalid_inputs_refuse_the_load(
    pool: WorkerPool, tmp_path: Path, given: list[Tensor], words: str
) -> None:
    save(models.subtract(), tmp_path, "m")
    order = order_of(tmp_path, max_batch_size=8 if "batch" in words else 0)
    refused = await refusal(pool, order, *given)
    assert refused.code == "warm_up_failed"
    assert [said in str(refused) for said in (words, "correct them")] == [True, True]


def multiplied(rows: int) -> ModelProto:
    """`y = x · w`, where `w` has these rows: the last length of `x` has to be theirs."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    w = numpy_helper.from_array(np.ones((rows, 2), np.float32), "w")
    return model([node], [value("x", FLOAT, [None, None])], [value("y", FLOAT, None)], [w])


def volume(channels: int) -> ModelProto:
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


def endless() -> ModelProto:
    """Counts for ever, whatever it gets."""
    loop = models.endless().graph
    largest = helper.make_node("ReduceMax", ["words"], ["x"], keepdims=0)
    inputs = [value("words", INT64, ["batch", "length"])]
    return model([largest, *loop.node], inputs, loop.output, loop.initializer)


def filled(count: int) -> ModelProto:
    """The sum of so many zeros, and of `x`."""
    return parse_model(f"""(float[length] x) => (float y) <int64[1] count = {{{count}}}> {{
        length = Shape(x)
        shape = Add(length, count)
        zeros = ConstantOfShape(shape)
        y = ReduceSum <keepdims = 0> (zeros)
    }}""")


async def test_lengths_of_weights_are_read_from_the_file(pool: WorkerPool, tmp_path: Path) -> None:
    save(multiplied(13), tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path))
    assert [spec.example for spec in report.inputs] == [zeros(1, 13)]


async def test_refused_lengths_are_reported_as_a_guess(pool: WorkerPool, tmp_path: Path) -> None:
    reshaped = "(float[rows] x) => (float[?, ?] y) <int64[2] sides = {7, 99991}> { y = Reshape(x, sides) }"
    save(parse_model(reshaped), tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path))
    [guess] = [spec.example for spec in report.inputs]
    assert guess is not None
    assert (guess.shape, report.warming_up_us, report.inputs[0].dimensions) == ((16,), None, ("rows",))
    assert "cannot be reshaped" in (guess.refusal or "")


@pytest.mark.parametrize(
    ("onnx_model", "words"),
    [(endless(), "it was stopped"), (filled(2**28), "Failed to allocate memory")],
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
    with_it, without = await loaded_with_and_without(pool, tmp_path, volume(channels=32))
    assert with_it.memory_bytes - without.memory_bytes < 20_000_000


async def test_inputs_of_the_file_are_an_example_that_was_not_tried(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.identity(shape=(None, None)), tmp_path, "m")
    _, report = await load(pool, order_of(tmp_path), tensor("x", "FP32", [[0] * 5] * 2))
    [found] = [spec.example for spec in report.inputs]
    assert found is not None
    assert (found.shape, found.values) == ((2, 5), "zeros")
    assert "loadledger.toml" in (found.refusal or "")


# Recorded


async def test_warm_up_is_recorded_and_not_counted_as_a_request(engine: Engine) -> None:
    save(models.add(), engine.root, "m")
    job = await engine.load("m", None, LoadParameters(instances=2))
    assert job.status is JobStatus.COMPLETED, job.error
    [loaded] = await engine.facts(ModelLoaded, of="m")
    assert loaded.durations.warming_up_us in range(1, 10**8)
    assert engine.live("m").statistics == Statistics()
