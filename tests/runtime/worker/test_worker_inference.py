"""Inference in a worker: datatypes, text and binary tensors, optional inputs and outputs, refused inputs."""

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import ModelProto
from support import models
from support.models import ENDLESS, save
from support.workers import (
    LIMIT_S,
    Serve,
    answer,
    array,
    ask,
    ask_all,
    asked_at_once,
    floats,
    load,
    order_of,
    tensor,
    trips,
)

from runtime import wire
from runtime.errors import InferenceFailed, InvalidInput, NotRepresentable
from runtime.process.pool import WorkerPool
from runtime.process.worker import SURPLUS_NAMES, Worker
from runtime.wire import DATATYPES, MAX_PAYLOAD_BYTES, Tensor, TensorSpec, WantedOutput


def element_of(datatype: str) -> int:
    """Return ONNX's element type of a datatype."""
    name = DATATYPES[datatype].onnx[len("tensor(") : -1].upper()
    return int(getattr(onnx.TensorProto, name))


def json(name: str, data: bytes, datatype: str = "FP32", length: int = 1) -> Tensor:
    return Tensor(name, datatype, (length,), data, text=True)


async def digests(worker: Worker, inputs: list[Tensor]) -> list[bytes]:
    _, tensors = await worker.infer(inputs, digest=True, timeout_s=LIMIT_S)
    assert all((each.datatype, each.shape, each.text) == ("UINT8", (32,), False) for each in tensors)
    return [bytes(each.data) for each in tensors]


@pytest.mark.parametrize("name", DATATYPES)
async def test_every_datatype_round_trips(serve: Serve, name: str) -> None:
    worker = await serve(models.identity(element_of(name), (None, 2)))
    size = DATATYPES[name].size or 6
    data = b"\2\0\0\0\xc3\xa4" * 4 if name == "BYTES" else bytes([0, 1] * (2 * size))
    sent = Tensor("x", name, (2, 2), data)
    (back,) = await ask(worker, [sent])
    assert (back.name, back.datatype, back.shape, bytes(back.data)) == ("y", name, (2, 2), data)
    (empty,) = await ask(worker, [Tensor("x", name, (0, 2), b"")])
    assert (empty.shape, bytes(empty.data)) == ((0, 2), b"")
    assert await digests(worker, [sent]) == [hashlib.sha256(f"{name} [2, 2]\n".encode() + data).digest()]


async def test_digest_covers_shape_and_replaces_output_of_any_length(serve: Serve) -> None:
    worker = await serve(models.identity(onnx.TensorProto.FLOAT, (None, None)))
    data = np.arange(6, dtype=np.float32)
    given = [[tensor("x", "FP32", data.reshape(shape))] for shape in ((2, 3), (3, 2), (2, 3))]
    first, other, again = [await digests(worker, inputs) for inputs in given]
    assert first == again != other
    long, count = (
        await serve(models.filled(), "long"),
        tensor("count", "INT64", [wire.MAX_PAYLOAD_BYTES // 4 + 1]),
    )
    with pytest.raises(InferenceFailed, match="are larger"):
        await ask(long, [count])
    assert len(await digests(long, [count])) == 1


ADD, STRINGS = models.add(), models.strings()
REFUSED: list[tuple[ModelProto, list[Tensor], str]] = [
    (ADD, [], "no value for input 'x'"),
    (ADD, [floats("z", 1)], "no input 'z'"),
    (ADD, [floats("x", 1), floats("x", 1)], "twice"),
    (ADD, [tensor("x", "FP64", [0])], "is FP32, not FP64"),
    (ADD, [tensor("x", "FP32", [[0]])], "rank"),
    (ADD, [Tensor("x", "FP32", (0, 2**62, 2**62), b"")], "elements"),
    (ADD, [Tensor("x", "FP32", (2,), b"1234")], "not of its shape"),
    (ADD, [Tensor("x", "FP31", (1,), b"1234")], "no such datatype"),
    (ADD, [Tensor("\ud800", "FP32", (1,), b"1234")], "not Unicode"),
    (ADD, [Tensor("x" * 5000, "FP32", (1,), b"1234")], "4096 characters"),
    (ADD, [Tensor("x", "FP32", (0, 2**63), b"")], "shape or size"),
    *((ADD, [json("x", text)], "input 'x'") for text in (b"[1, 2]", b"[nan]", b"[" * 10_000)),
    (STRINGS, [Tensor("x", "BYTES", (1,), b"\1\0\0")], "longer than the data"),
    (STRINGS, [Tensor("x", "BYTES", (1,), b"\2\0\0\0a")], "longer than the data"),
    (STRINGS, [Tensor("x", "BYTES", (2,), b"\1\0\0\0a")], "has 1 elements"),
    (STRINGS, [Tensor("x", "BYTES", (2,), b"\1\0\0\0\xff\2\0\0\0a\0")], "'x': elements that are not UTF-8"),
    (STRINGS, [json("x", b'["\\ud800"]', "BYTES")], "'x'"),
    (models.with_default(), [floats("c", 1)], "no value for input 'x'"),
    (models.identity(shape=(2,)), [floats("x", 1, 2, 3)], "has the length 3 in dimension 0, and .* takes 2"),
    (models.identity(shape=(2, 2)), [floats("x", 1, 2)], "'x' has 1 dimensions, and the model takes 2"),
]


async def test_invalid_input_is_refused_and_worker_lives(serve: Serve, subtests: pytest.Subtests) -> None:
    workers = {id(model): model for model, _, _ in REFUSED}
    started = {key: await serve(model, f"m{key}") for key, model in workers.items()}
    for model, tensors, words in REFUSED:
        with subtests.test(words), pytest.raises(InvalidInput, match=words):
            await ask(started[id(model)], tensors)
    assert not any(worker.ended.done() for worker in started.values())


async def test_refused_input_takes_no_memory_and_no_time_of_the_worker(serve: Serve) -> None:
    worker = await serve(models.add())
    empty = await worker.measure()
    too_long = wire.MAX_REQUEST_BYTES + 1
    with pytest.raises(InvalidInput, match="allowed length"):
        await ask(worker, [Tensor("x", "UINT8", (too_long,), bytes(too_long))])
    for count in (SURPLUS_NAMES + 2, 100_000):
        with pytest.raises(InvalidInput, match="more inputs and outputs than the model has"):
            await worker.infer([floats("x", 1)], (WantedOutput("y"),) * count, timeout_s=60)
    refused = tensor("other", "FP32", np.zeros(2**20))
    for _ in range(20):
        with pytest.raises(InvalidInput, match="no input 'other'"):
            await ask(worker, [refused])
    assert await worker.measure() - empty < 2**25
    assert await answer(worker, floats("x", 1)) == [2]


async def test_failed_inference_has_the_runtimes_words(serve: Serve) -> None:
    worker = await serve(models.subtract())
    with pytest.raises(InferenceFailed, match="Sub"):
        await ask(worker, [floats("a", 1, 2, 3), floats("b", 1, 2)])
    assert await answer(worker, floats("b", 1), floats("a", 5)) == [4]


async def loaded(pool: WorkerPool, root: Path, model: ModelProto) -> tuple[Worker, wire.Loaded]:
    save(model, root, "m")
    return await load(pool, order_of(root))


async def test_output_that_is_no_tensor_is_omitted_or_refused(pool: WorkerPool, tmp_path: Path) -> None:
    model, x = models.zip_map(), tensor("x", "FP32", [[1, 1]])
    worker, report = await loaded(pool, tmp_path, model)
    assert report.outputs[1] == TensorSpec("named", "seq(map(int64,tensor(float)))", ())
    assert [y.name for y in await ask(worker, [x])] == ["scores"]
    assert [y.name for y in await ask(worker, [x], "scores", "scores")] == ["scores"]
    for name, words in (("named", "which is no tensor"), ("q", "no output 'q'")):
        with pytest.raises(InvalidInput, match=words):
            await ask(worker, [x], name)


async def test_outputs_have_the_form_asked_for(serve: Serve) -> None:
    worker = await serve(models.running_total())
    inputs = [json("state", b" [ 1, 2.0e0 ]", length=2), tensor("x", "FP32", np.ones((2, 2)))]
    new_state, totals = floats("new_state", 3, 4), tensor("totals", "FP32", [[2, 3], [3, 4]])
    assert await ask(worker, inputs) == (new_state, totals)
    in_text = Tensor("totals", "FP32", (2, 2), b"[2.0,3.0,3.0,4.0]", text=True)
    assert (await ask(worker, inputs, text=True))[1] == in_text
    wanted = (WantedOutput("totals", text=True), WantedOutput("new_state"))
    assert (await worker.infer(inputs, wanted, timeout_s=LIMIT_S))[1] == (in_text, new_state)


@pytest.mark.parametrize(
    ("model", "optional", "without", "given", "with_it"),
    [
        (models.with_default(), TensorSpec("c", "FP32", (1,), optional=True), [[6]], [2], [[3]]),
        (
            models.optional_input(), TensorSpec("o", "FP32", (-1,), optional=True),
            [[1], False], [2, 3], [[2, 3], True],
        ),
    ],
    ids=["default", "optional"],
)  # fmt: skip
async def test_optional_input_may_be_omitted(
    pool: WorkerPool, tmp_path: Path, model: ModelProto, optional: TensorSpec, *,
    without: list[Any], given: list[float], with_it: list[Any],
) -> None:  # fmt: skip
    worker, report = await loaded(pool, tmp_path, model)
    declared = [replace(spec, dimensions=(), example=None) for spec in report.inputs]
    assert declared == [TensorSpec("x", "FP32", (-1,)), optional]
    for more, expected in (([], without), ([floats(optional.name, *given)], with_it), ([], without)):
        outputs = await ask(worker, [floats("x", 1), *more])
        assert [array(each).tolist() for each in outputs] == expected


async def test_optional_output_without_value_is_omitted(pool: WorkerPool, tmp_path: Path) -> None:
    worker, report = await loaded(pool, tmp_path, models.optional_output())
    maybe = TensorSpec("maybe", "FP32", (-1,), optional=True)
    assert report.outputs == (maybe, TensorSpec("z", "FP32", (-1,)))
    for wanted in (True, False):
        inputs = [floats("x", 1), tensor("wanted", "BOOL", wanted)]
        assert [y.name for y in await ask(worker, inputs)] == ["maybe", "z"][not wanted :]
        assert len(await ask(worker, inputs, "maybe")) == wanted


async def test_answers_of_all_lengths_may_be_mixed(serve: Serve) -> None:
    """More than the socket holds while the worker is stopped."""
    worker = await serve(models.identity())
    lengths = (1, 10_000, 2, 70_000, 3, *[1_000_000] * 5, 4, *[1000] * 100, 9000)
    blocks = [np.full(n, n, np.float32) for n in lengths]
    tasks = await asked_at_once(worker, *(ask(worker, [tensor("x", "FP32", block)]) for block in blocks))
    for block, (y,) in zip(blocks, await asyncio.gather(*tasks), strict=True):
        assert np.array_equal(array(y), block)


async def test_answer_is_sent_before_an_endless_run(serve: Serve) -> None:
    worker = await serve(models.counting_loop())
    for _ in range(2):
        *quick, endless = await asked_at_once(worker, *(answer(worker, trips(n)) for n in (1, 2, ENDLESS)))
        async with asyncio.timeout(LIMIT_S):
            assert await asyncio.gather(*quick) == [1, 2]
        endless.cancel()
        await worker.wait_until_drained()


async def test_outcome_has_the_durations_of_each_step(serve: Serve) -> None:
    worker = await serve(models.counting_loop())
    before = time.monotonic_ns()
    tasks = await asked_at_once(worker, *(ask_all(worker, [trips(20_000)]) for _ in range(2)))
    (first, _), (second, _) = await asyncio.gather(*tasks)
    elapsed = time.monotonic_ns() - before
    for outcome in (first, second):
        times = outcome.queue_ns, outcome.input_ns, outcome.infer_ns, outcome.output_ns
        assert min(times) > 0
        assert sum(times) <= elapsed
        assert (outcome.batch_size, outcome.execution_size) == (1, 1)
    assert second.queue_ns >= first.infer_ns


# What fits nowhere fails alone, and the worker goes on


NO_MEMORY = r"(?i)not enough memory|alloc"


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
        (models.identity(), json("x", b"[1]"), json("x", b"[" + b"1," * 1_000_000 + b"1]", length=1_000_001)),
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
            await ask(worker, [json("x", b"[" + b'"a",' * (count - 1) + b'"a"]', "BYTES", length=count)])
    await ask(worker, [json("x", b'["a"]', "BYTES")])


def two_copies(count: int) -> ModelProto:
    """`x` so many times, in each of two outputs."""
    return models.parse_model(f"""(float[1] x) => (float[{count}] y, float[{count}] z)
    <int64[1] shape = {{{count}}}> {{
        y = Expand(x, shape)
        z = Expand(x, shape)
    }}""")


async def test_answer_too_long_by_its_shapes_is_not_computed(serve: Serve) -> None:
    large = await serve(two_copies(34_000_000), memory_limit_bytes=100_000_000, warm_up=False)
    with pytest.raises(InferenceFailed, match="the outputs are larger than 268435456 bytes"):
        await ask(large, [floats("x", 1)])
    with pytest.raises(NotRepresentable, match="as JSON at most"):
        await large.infer([floats("x", 1)], (WantedOutput("y", text=True),), timeout_s=60)
    with pytest.raises(InferenceFailed, match=NO_MEMORY):  # 136 MB are computed
        await large.infer([floats("x", 1)], (WantedOutput("y"),), timeout_s=60)
    warm = await serve(two_copies(34_000_000))
    assert len(await warm.infer([floats("x", 1)], (WantedOutput("y"),), timeout_s=60)) == 2
