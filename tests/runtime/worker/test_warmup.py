"""Warm-up before a model serves: on zeros, on inputs of its loadledger.toml, or none."""

import asyncio
from pathlib import Path

import pytest
from onnx import ModelProto, TensorProto
from support import models
from support.models import save
from support.running import Engine, code_of
from support.workers import (
    Serve,
    answer,
    computing,
    floats,
    load,
    loaded_memory,
    order_of,
    refusal,
    tensor,
    until,
)

from events.jobs import JobStatus
from events.types import LoadParameters, ModelLoaded
from runtime.process.pool import WorkerPool
from runtime.repository import DEFAULTS_FILE
from runtime.statistics import Statistics
from runtime.wire import Tensor
from runtime.worker.examples import MAX_EXAMPLE_BYTES

GIVEN = """
[[warm_up.inputs]]
name = "{}"
datatype = "{}"
shape = {}
data = {}
"""
ALL_STAGES = ["loading", "warming_up", "measuring"]
NO_WARM_UP = ["loading", "measuring"]


def text(name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    """Make a tensor of JSON text, as a model's loadledger.toml gives it."""
    return Tensor(name, datatype, shape, data, text=True)


# In a worker


TOO_MANY = MAX_EXAMPLE_BYTES // 4 + 1
RUN = {
    "shape": models.identity(shape=(2, 3)),
    "scalar": models.identity(shape=()),
    "no elements": models.identity(shape=(0, 2)),
    "two inputs": models.subtract(),
    "default": models.with_default(),
    "optional input": models.optional_input(),
    "optional output": models.optional_output(),
    "state": models.running_total(),
    "output that is no tensor": models.zip_map(),
    "loop": models.counting_loop(),
    "length": models.identity(shape=("batch", "length")),
    "second": models.identity(shape=(2, None)),
    "ones": models.divide(),
    "no shape": models.identity_of_any_shape(models.FLOAT),
}
NOT_RUN = {
    "too many": models.identity(shape=(TOO_MANY,)),
    "far too many": models.identity(shape=(None, TOO_MANY // 2, 2**5)),
    "too many texts": models.identity(models.STRING, (TOO_MANY // 8,)),
    "none of many": models.identity(shape=(0, 2**62, 2**62)),
}
GIVEN_INPUTS: dict[str, tuple[ModelProto, list[Tensor]]] = {
    "nested": (models.rows(), [text("x", "FP32", (2, 2), b"[[1,2],[3,4]]")]),
    "flat": (models.rows(), [text("x", "FP32", (2, 2), b"[1,2.5,3,4]")]),
    "booleans": (models.rows(TensorProto.BOOL), [text("x", "BOOL", (1, 2), b"[true,false]")]),
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


async def test_batched_model_is_run_on_one_element(serve: Serve) -> None:
    assert await answer(await serve(models.add(), max_batch_size=1), floats("x", 1)) == [2]


async def test_peak_memory_includes_the_warm_up(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.widened(), tmp_path, "m")
    orders = [order_of(tmp_path, warm_up=warms_up) for warms_up in (True, False)]
    with_it, without = [loaded_memory((await load(pool, order))[0]) for order in orders]
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


# From the model's loadledger.toml to the ledger


async def warmed_up(engine: Engine, model: ModelProto, defaults: str = "", instances: int = 1) -> int | None:
    """Load a model with this loadledger.toml; returns the recorded duration of its warm-up."""
    folder = save(model, engine.root, "m").parent
    await asyncio.to_thread((folder / DEFAULTS_FILE).write_text, defaults)
    job = await engine.load("m", None, LoadParameters(instances=instances))
    assert job.status is JobStatus.COMPLETED, job.error
    return (await engine.facts(ModelLoaded, of="m"))[-1].durations.warming_up_us


async def test_warm_up_is_recorded_and_not_counted_as_a_request(engine: Engine) -> None:
    assert await warmed_up(engine, models.add(), instances=2) in range(1, 10**8)
    assert engine.live("m").statistics == Statistics()


async def test_endless_warm_up_ends_at_the_timeout(engine: Engine) -> None:
    save(models.endless(), engine.root, "m")
    job_id = await engine.ask_load("m", None, LoadParameters(timeout_s=60))
    await until(lambda: any(load.stage == "warming_up" for load in engine.consumer.loads.values()))
    worker = engine.worker("m")
    await until(computing(worker.pid))
    engine.pass_time(61)
    assert code_of(await engine.ended(job_id)) == "timeout"
    await asyncio.shield(worker.ended)


async def test_file_gives_inputs_or_turns_the_warm_up_off(engine: Engine) -> None:
    inputs = [("x", "FP32", "[6]", "[1, 2, 3, 4, 5, 6]"), ("sides", "INT64", "[2]", "[2, 3]")]
    given = "".join(GIVEN.format(*each) for each in inputs)
    for defaults, is_run in ((given, True), ("warm_up.enabled = false", False)):
        assert (await warmed_up(engine, models.reshape(), defaults) is not None) is is_run
        await engine.unload("m")
