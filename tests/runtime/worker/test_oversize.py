"""Inferences whose inputs or outputs fit nowhere: each fails alone, and the worker goes on."""

import asyncio

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from support import models
from support.workers import Serve, answer, ask, asked_at_once, floats, tensor

from runtime.errors import InferenceFailed, InvalidInput, NotRepresentable
from runtime.process.worker import SURPLUS_NAMES, Worker
from runtime.wire import MAX_PAYLOAD_BYTES, Tensor, WantedOutput

pytestmark = pytest.mark.asyncio(loop_scope="module")

NO_MEMORY = r"(?i)not enough memory|alloc"


def json(data: bytes, datatype: str = "FP32", length: int = 1) -> Tensor:
    return Tensor("x", datatype, (length,), data, text=True)


async def fill(worker: Worker, count: int, *, text: bool = False) -> int:
    """Ask for so many numbers; return the length of the answer."""
    (output,) = await ask(worker, [tensor("count", "INT64", [count])], "y", text=text)
    return len(output.data)


async def test_output_beyond_the_payload_limit_fails_alone(serve: Serve) -> None:
    worker, too_many = await serve(models.filled()), MAX_PAYLOAD_BYTES // 4 + 1
    with pytest.raises(InferenceFailed, match="larger than"):
        await fill(worker, too_many)
    with pytest.raises(NotRepresentable, match="as JSON at most"):
        await fill(worker, too_many, text=True)
    with pytest.raises(InferenceFailed, match=NO_MEMORY):
        await fill(worker, 2**60)
    assert await fill(worker, 3) == 12


async def test_output_too_large_fails_alone_in_a_batch(serve: Serve) -> None:
    worker = await serve(
        models.filled_rows(), max_batch_size=4, memory_limit_bytes=150_000_000, dependent_rows=True
    )
    rows = [[tensor("x", "INT64", [[length]])] for length in (1, 2, 10**12, 3)]
    asked = await asked_at_once(worker, *(ask(worker, row) for row in rows))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(answers.pop(2), InferenceFailed)
    assert [answer[0].shape for answer in answers if isinstance(answer, tuple)] == [(1, 1), (1, 2), (1, 3)]


async def test_memory_of_a_large_output_is_free_for_later_ones(serve: Serve) -> None:
    worker = await serve(models.filled(), memory_limit_bytes=60_000_000)
    for count in (3, 6_000_000):
        await fill(worker, count)
    with pytest.raises(InferenceFailed, match=NO_MEMORY):
        await fill(worker, 8_000_000, text=True)
    await fill(worker, 3)
    assert await fill(worker, 3_000_000, text=True) == 12_000_001


@pytest.mark.parametrize(
    ("model", "small", "large"),
    [
        (models.identity(), floats("x", 1), Tensor("x", "FP32", (10_000_000,), bytes(40_000_000))),
        (models.identity(), json(b"[1]"), json(b"[" + b"1," * 1_000_000 + b"1]", length=1_000_001)),
    ],
    ids=["bytes", "JSON"],
)
async def test_input_without_memory_for_it_fails_alone(
    serve: Serve, model: ModelProto, small: Tensor, large: Tensor
) -> None:
    worker = await serve(model, memory_limit_bytes=30_000_000)
    for _ in range(2):
        with pytest.raises(InferenceFailed, match=NO_MEMORY):
            await ask(worker, [large])
        await ask(worker, [small])


async def test_json_strings_without_memory_for_them_fail_alone(serve: Serve) -> None:
    worker = await serve(models.strings(), memory_limit_bytes=8_000_000)
    # The steps are shorter than a heap's free end, so one text fits the heap, though there is no room for a
    # new mapping; the heap then keeps its memory.
    for count in range(800_000, 2_100_000, 25_000):
        with pytest.raises(InferenceFailed, match=NO_MEMORY):
            await ask(worker, [json(b"[" + b'"a",' * (count - 1) + b'"a"]', "BYTES", length=count)])
    await ask(worker, [json(b'["a"]', "BYTES")])


async def test_request_with_too_many_names_is_refused(serve: Serve) -> None:
    worker = await serve(models.add())
    for count in (SURPLUS_NAMES + 2, 100_000):
        with pytest.raises(InvalidInput, match="more inputs and outputs than the model has"):
            await worker.infer([floats("x", 1)], (WantedOutput("y"),) * count, timeout_s=60)
    assert await answer(worker, floats("x", 1)) == [2]


def two_copies(count: int) -> ModelProto:
    """`x` so many times, in each of two outputs."""
    nodes = [helper.make_node("Expand", ["x", "shape"], [name]) for name in ("y", "z")]
    shape = numpy_helper.from_array(np.array([count], np.int64), "shape")
    outputs = [models.value(name, models.FLOAT, [count]) for name in ("y", "z")]
    return models.model(nodes, [models.value("x", models.FLOAT, [1])], outputs, [shape])


async def test_answer_too_long_by_its_shapes_is_not_computed(serve: Serve) -> None:
    large = await serve(two_copies(40_000_000), memory_limit_bytes=100_000_000, warm_up=False)
    with pytest.raises(InferenceFailed, match="the outputs are larger than 268435456 bytes"):
        await ask(large, [floats("x", 1)])
    with pytest.raises(NotRepresentable, match="as JSON at most"):
        await large.infer([floats("x", 1)], (WantedOutput("y", text=True),), timeout_s=60)
    with pytest.raises(InferenceFailed, match=NO_MEMORY):  # 160 MB are computed
        await large.infer([floats("x", 1)], (WantedOutput("y"),), timeout_s=60)
    warm = await serve(two_copies(40_000_000))
    assert len(await warm.infer([floats("x", 1)], (WantedOutput("y"),), timeout_s=60)) == 2
