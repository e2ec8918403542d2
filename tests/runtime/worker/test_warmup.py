"""The inference before a model is loaded: on zeros, on given inputs, or none; real workers, real models."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import ModelProto, TensorProto
from support import models
from support.models import save
from support.running import Engine, running
from support.workers import (
    array,
    ask,
    computing,
    floats,
    order_of,
    running_pool,
    tensor,
    until,
)

from events.jobs import Job, JobStatus, LoadParameters
from events.types import LoadFailed, ModelLoaded, WorkerExited
from runtime.defaults import DEFAULTS_FILE
from runtime.errors import Exit, LoadRefused, WorkerDied
from runtime.processes.pool import WorkerPool
from runtime.processes.workers import LoadReport, Worker
from runtime.statistics import Statistics
from runtime.wire import DATATYPES, Tensor
from runtime.worker.warmup import MAX_ZEROS_BYTES

OFF = "warm_up.enabled = false\n"
GIVEN = """
[[warm_up.inputs]]
name = "{}"
datatype = "{}"
shape = {}
data = {}
"""


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with running_pool() as running_one:
        yield running_one


async def loaded(
    pool: WorkerPool, root: Path, *given: Tensor, **ordered: Any
) -> tuple[LoadReport, list[str], Worker]:
    """Load the model `m` into a worker; returns what it reports, and the stages."""
    stages: list[str] = []
    worker = await pool.start("w")
    order = replace(order_of(root, "m"), **ordered)
    return await worker.load(order, stages.append, given), stages, worker


async def refused(pool: WorkerPool, root: Path, *given: Tensor, **ordered: Any) -> LoadRefused:
    """Load the model `m`, which is to be refused, and see its worker end by itself."""
    worker = await pool.start("w")
    with pytest.raises(LoadRefused) as refusal:
        await worker.load(replace(order_of(root, "m"), **ordered), lambda _: None, given)
    assert await asyncio.shield(worker.ended) == Exit(0, None)
    return refusal.value


def text(name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    """Make a tensor of JSON text, as a model's loadledger.toml gives it."""
    return Tensor(name, datatype, shape, data, text=True)


# On zeros.


@pytest.mark.parametrize("name", DATATYPES)
async def test_a_model_is_run_on_zeros_of_any_datatype(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    element = getattr(onnx.TensorProto, DATATYPES[name].onnx[len("tensor(") : -1].upper())
    save(models.identity(element, ("batch", 2)), tmp_path, "m")
    report, stages, worker = await loaded(pool, tmp_path)
    assert report.warming_up_us is not None
    assert report.warming_up_us > 0
    assert stages == ["loading", "warming_up", "measuring"]
    data = bytes(2 * (DATATYPES[name].size or 4))
    assert bytes((await ask(worker, [Tensor("x", name, (1, 2), data)]))[0].data) == data


@pytest.mark.parametrize(
    "model",
    [
        models.identity(shape=(2, 3)),
        models.identity(shape=()),
        models.identity(shape=(0, 2)),
        models.subtract(),
        models.with_default(),
        models.optional_input(),
        models.optional_output(),
        models.running_total(),
        models.zip_map(),
        models.counting_loop(),
        models.identity_of_any_shape(models.FLOAT),
    ],
    ids=[
        "whole shape", "scalar", "nothing", "two inputs", "a default", "optional input", "optional output",
        "state", "an output that is no tensor", "a loop", "no shape",
    ],
)  # fmt: skip
async def test_a_model_is_run_on_zeros_where_its_shapes_allow_it(
    pool: WorkerPool, tmp_path: Path, model: ModelProto
) -> None:
    save(model, tmp_path, "m")
    report, stages, _ = await loaded(pool, tmp_path)
    assert report.warming_up_us is not None
    assert "warming_up" in stages


TOO_MANY = MAX_ZEROS_BYTES // 4 + 1


@pytest.mark.parametrize(
    "model",
    [
        models.identity(shape=("batch", "length")),
        models.identity(shape=(2, None)),
        models.identity(shape=(TOO_MANY,)),
        models.identity(shape=(None, TOO_MANY // 2, 2**40)),
        models.identity(models.STRING, (TOO_MANY // 8,)),
        models.identity(shape=(0, 2**62, 2**62)),
        models.identity(shape=(1,) * 65),
        models.sequence_input(),
    ],
    ids=[
        "length",
        "second",
        "too many",
        "far too many",
        "too many texts",
        "nothing of many",
        "dimensions",
        "a sequence",
    ],
)
async def test_a_model_whose_shapes_do_not_allow_zeros_is_loaded_without_a_run(
    pool: WorkerPool, tmp_path: Path, model: ModelProto
) -> None:
    save(model, tmp_path, "m")
    report, stages, _ = await loaded(pool, tmp_path)
    assert report.warming_up_us is None
    assert stages == ["loading", "measuring"]


async def test_a_model_without_an_output_to_send_is_loaded_without_a_run(
    pool: WorkerPool, tmp_path: Path
) -> None:
    model = models.zip_map()
    del model.graph.output[0]
    save(model, tmp_path, "m")
    report, stages, _ = await loaded(pool, tmp_path)
    assert (report.warming_up_us, stages) == (None, ["loading", "measuring"])


@pytest.mark.parametrize(
    ("model", "said"),
    [(models.reshape(), "cannot be reshaped"), (models.divide(), "Integer division by zero")],
    ids=["reshape", "divide"],
)
async def test_a_model_that_cannot_compute_with_zeros_is_refused_with_its_words_and_what_to_do(
    pool: WorkerPool, tmp_path: Path, model: ModelProto, said: str
) -> None:
    save(model, tmp_path, "m")
    refusal = await refused(pool, tmp_path)
    assert refusal.code == "warm_up_failed"
    for words in ("zeros", "[[warm_up.inputs]]", "loadledger.toml", "enabled = false", said):
        assert words in str(refusal)


async def test_where_no_shape_is_declared_a_failure_on_zeros_proves_nothing(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.second_column(), tmp_path, "m")
    report, stages, worker = await loaded(pool, tmp_path)
    assert report.warming_up_us is None
    assert stages == ["loading", "warming_up", "measuring"]
    x = tensor("x", "FP32", np.array([[1, 2], [3, 4]], np.float32))
    assert array((await ask(worker, [x]))[0]).tolist() == [2, 4]


async def test_a_warm_up_that_crashes_is_a_death(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.crash_on_zeros(), tmp_path, "m")
    worker = await pool.start("w")
    with pytest.raises(WorkerDied) as death:
        await worker.load(order_of(tmp_path, "m"), lambda _: None)
    assert death.value.end == Exit(None, signal.SIGFPE)


async def test_a_warm_up_that_takes_more_memory_than_it_may_is_out_of_memory(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.memory_bomb_on_zeros(), tmp_path, "m")
    refusal = await refused(pool, tmp_path, memory_limit_bytes=200_000_000)
    assert refusal.code == "out_of_memory"
    assert "200000000 bytes" in str(refusal)


async def test_what_the_warm_up_takes_is_measured(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.widened(), tmp_path, "m")
    with_it, _, _ = await loaded(pool, tmp_path)
    without, _, _ = await loaded(pool, tmp_path, warm_up=False)
    assert with_it.peak_memory_bytes - without.peak_memory_bytes > 50_000_000
    assert with_it.peak_memory_bytes >= with_it.memory_bytes


async def test_a_model_with_a_batch_dimension_is_run_on_one_element(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    report, _, worker = await loaded(pool, tmp_path, max_batch_size=1)
    assert report.warming_up_us is not None
    assert array((await ask(worker, [floats("x", 1)]))[0]).tolist() == [2]


# On what is given.


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (models.rows(), [text("x", "FP32", (2, 2), b"[[1,2],[3,4]]")]),
        (models.rows(), [text("x", "FP32", (2, 2), b"[1,2.5,3,4]")]),
        (models.rows(TensorProto.BOOL), [text("x", "BOOL", (1, 2), b"[true,false]")]),
        (models.rows(models.STRING), [text("x", "BYTES", (1, 2), '["ä",""]'.encode())]),
        (models.reshape(), [text("sides", "INT64", (2,), b"[2,3]"), floats("x", *range(6))]),
        (models.divide(), [text(name, "INT64", (1,), b"[1]") for name in "ab"]),
        (models.optional_input(), [text(name, "FP32", (1,), b"[1]") for name in "xo"]),
    ],
    ids=["nested", "flat", "booleans", "texts", "reshape", "divide", "optional"],
)
async def test_a_model_is_run_on_what_is_given(
    pool: WorkerPool, tmp_path: Path, model: ModelProto, given: list[Tensor]
) -> None:
    save(model, tmp_path, "m")
    report, stages, _ = await loaded(pool, tmp_path, *given)
    assert report.warming_up_us is not None
    assert stages == ["loading", "warming_up", "measuring"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([floats("z", 1)], "the model has no input 'z'"),
        ([floats("a", 1)], "no value for input 'b'"),
        ([floats("a", 1), floats("a", 1)], "input 'a' is given twice"),
        ([text("a", "INT64", (1,), b"[1]")], "input 'a' is FP32, not INT64"),
        ([text("a", "FP32", (2,), b"[1]")], "data has shape [1], declared is [2]"),
        ([text("a", "FP32", (1,), b'["1"]')], "input 'a': data is not FP32"),
        ([text("a", "FP32", (1,), b"[true]")], "input 'a': data is not FP32"),
        ([text(name, "FP32", (1, 1), b"[1]") for name in "ab"], "rank"),
        ([floats("a", 1, 2, 3), floats("b", 1, 2)], "Sub"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
async def test_inputs_that_the_model_does_not_take_are_told_of(
    pool: WorkerPool, tmp_path: Path, given: list[Tensor], words: str
) -> None:
    save(models.subtract(), tmp_path, "m")
    refusal = await refused(pool, tmp_path, *given)
    assert refusal.code == "warm_up_failed"
    assert words in str(refusal)
    assert "correct them" in str(refusal)


async def test_inputs_of_more_elements_than_a_batch_has_are_refused(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    refusal = await refused(pool, tmp_path, floats("x", 1, 2, 3), max_batch_size=2)
    assert "the batch size is 3, and of this model at most 2" in str(refusal)


async def test_a_model_is_not_run_where_it_is_not_to_be(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.divide(), tmp_path, "m")
    for given in ([], [floats("z", 1)]):
        report, stages, _ = await loaded(pool, tmp_path, *given, warm_up=False)
        assert (report.warming_up_us, stages) == (None, ["loading", "measuring"])


# From the model's loadledger.toml to the ledger.


def placed(folder: Path, model: ModelProto, defaults: str = "") -> None:
    """Put the model `m` into the repository, with what its loadledger.toml says."""
    save(model, folder / "models", "m")
    (folder / "models" / "m" / DEFAULTS_FILE).write_text(defaults)


async def warmed(engine: Engine, **parameters: Any) -> int | None:
    """Load `m`, and return for how long it was recorded to warm up."""
    job = await engine.load("m", None, LoadParameters(**parameters))
    assert job.status is JobStatus.COMPLETED, job.error
    [fact] = [event.data for event in await engine.events(of="m") if isinstance(event.data, ModelLoaded)]
    return fact.durations.warming_up_us


async def failed(engine: Engine, **parameters: Any) -> Job:
    """Load `m`, which is to fail."""
    job = await engine.load("m", None, LoadParameters(**parameters))
    assert job.status is JobStatus.FAILED
    return job


async def test_how_long_the_warm_up_took_is_recorded_and_no_request_is_counted(tmp_path: Path) -> None:
    placed(tmp_path, models.add())
    async with running(tmp_path) as engine:
        assert await warmed(engine, instances=2) in range(1, 10**8)
        assert engine.live("m").statistics == Statistics()
        assert await engine.ask("m", 1) == 2


async def test_a_model_whose_shapes_do_not_allow_it_has_no_duration_recorded(tmp_path: Path) -> None:
    placed(tmp_path, models.rows())
    async with running(tmp_path) as engine:
        assert await warmed(engine) is None


async def test_a_model_is_run_on_the_inputs_of_its_file(tmp_path: Path) -> None:
    inputs = [("x", "FP32", "[6]", "[1, 2, 3, 4, 5, 6]"), ("sides", "INT64", "[2]", "[2, 3]")]
    placed(tmp_path, models.reshape(), "".join(GIVEN.format(*each) for each in inputs))
    async with running(tmp_path) as engine:
        assert await warmed(engine) is not None


async def test_the_file_is_read_again_for_each_load(tmp_path: Path) -> None:
    placed(tmp_path, models.reshape())
    async with running(tmp_path) as engine:
        job = await failed(engine)
        assert job.error is not None
        assert job.error.code == "warm_up_failed"
        [fact] = [event.data for event in await engine.events() if isinstance(event.data, LoadFailed)]
        assert (fact.code, fact.message) == (job.error.code, job.error.message)
        (tmp_path / "models" / "m" / DEFAULTS_FILE).write_text(OFF)
        assert await warmed(engine) is None


async def test_a_file_that_became_invalid_fails_the_load(tmp_path: Path) -> None:
    placed(tmp_path, models.add(), "warm_up.enabled = 1")
    async with running(tmp_path) as engine:
        job = await failed(engine)
        assert job.error is not None
        assert job.error.code == "invalid_defaults"
        assert "warm_up.enabled" in job.error.message


@pytest.mark.parametrize(("file", "is_run"), [("", False), ("warm_up.enabled = true", True), (OFF, False)])
async def test_the_file_overrules_a_server_that_warms_nothing_up(
    tmp_path: Path, file: str, *, is_run: bool
) -> None:
    placed(tmp_path, models.add(), file)
    async with running(tmp_path) as engine:
        engine.pool.warm_up = False
        assert (await warmed(engine) is not None) is is_run


async def warming_up(engine: Engine) -> Worker:
    """Wait until the worker of `m` is amid its warm-up."""
    await until(lambda: any(load.stage == "warming_up" for load in engine.consumer.live.values()))
    worker = engine.worker("m")
    await until(computing(worker.pid))
    return worker


async def test_a_warm_up_that_does_not_end_is_ended_by_the_load_s_timeout(tmp_path: Path) -> None:
    placed(tmp_path, models.endless())
    async with running(tmp_path) as engine:
        job_id = await engine.ask_load("m", None, LoadParameters(timeout_s=60))
        worker = await warming_up(engine)
        engine.pass_time(61)
        job = await engine.ended(job_id)
        assert job.error is not None
        assert job.error.code == "timeout"
        await asyncio.shield(worker.ended)


async def test_a_warm_up_that_does_not_end_is_ended_by_force(tmp_path: Path) -> None:
    placed(tmp_path, models.endless())
    async with running(tmp_path) as engine:
        job_id = await engine.ask_load("m")
        worker = await warming_up(engine)
        await engine.unload("m", force=True)
        assert (await engine.ended(job_id)).status is JobStatus.CANCELLED
        await asyncio.shield(worker.ended)


async def test_a_warm_up_that_crashes_fails_the_load_and_is_recorded(tmp_path: Path) -> None:
    placed(tmp_path, models.crash_on_zeros())
    async with running(tmp_path) as engine:
        job = await failed(engine)
        assert job.error is not None
        assert job.error.code == "worker_died"
        [exited] = [event.data for event in await engine.events() if isinstance(event.data, WorkerExited)]
        assert exited.signal == signal.SIGFPE
