"""Dynamic batching: what runs at once is answered as if it had run alone, whatever becomes of the others."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto
from support import models
from support.events import PLAIN
from support.models import ENDLESS, INT64, STRING, save
from support.workers import (
    LIMIT_S,
    array,
    ask,
    ask_all,
    asked_at_once,
    batching,
    computing,
    floats,
    order_of,
    running_pool,
    tensor,
    until,
)

from runtime.errors import InvalidInput, LoadRefused
from runtime.processes.pool import WorkerPool
from runtime.processes.workers import Worker
from runtime.wire import Tensor, pack_texts
from runtime.worker.batching import MAX_WAITING, BatchDimension, NotApart, Queue, Request, apart, together
from runtime.worker.cancellation import Cancellation
from runtime.worker.inference import Asked

ASKED = Asked(["y"], [("y", "FP32", False)])
HOUR_US = 3600 * 10**6


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with running_pool() as running:
        yield running


def request(number: int, size: int = 1, width: int = 1, *, alone: bool = False, came_ns: int = 0) -> Request:
    feed = {"x": np.full((size, width), number)}
    return Request(number, ASKED, feed, size, alone, 0, came_ns or number + 1, 0)


def row(*values: float) -> Tensor:
    return tensor("x", "FP32", np.array([values], np.float32))


def ints(*values: Sequence[int]) -> Tensor:
    return tensor("x", "INT64", np.array(values, np.int64))


async def sizes(tasks: Sequence[asyncio.Task[Any]]) -> list[tuple[int, int]]:
    """Wait for the answers, and say how large each was, alone and with those it ran with."""
    async with asyncio.timeout(LIMIT_S):
        return [(outcome.batch_size, outcome.execution_size) for outcome, _ in await asyncio.gather(*tasks)]


@PLAIN
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.booleans()), max_size=20), st.integers(4, 9)
)
def test_each_request_is_run_once_with_its_like_and_the_oldest_is_next(
    drawn: list[tuple[int, int, bool]], limit: int
) -> None:
    queue = Queue(limit, 0)
    waiting = [request(n, size, width, alone=alone) for n, (size, width, alone) in enumerate(drawn)]
    for each in waiting:
        queue.add(each)
    while waiting:
        assert len(queue) == len(waiting)
        batch = queue.take()
        assert batch[0] is waiting[0]
        assert len({each.kind() for each in batch}) == 1
        assert sum(each.size for each in batch) <= limit
        assert len(batch) == 1 or not any(each.alone for each in batch)
        waiting = [each for each in waiting if each not in batch]
    assert not queue


@PLAIN
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2))
def test_what_is_put_together_and_apart_again_is_the_same(drawn: list[int], width: int) -> None:
    batch = [request(n, size, width) for n, size in enumerate(drawn)]
    parts = apart(batch, [together(batch)["x"], None])
    assert [second for _, second in parts] == [None] * len(batch)
    for each, (first, _) in zip(batch, parts, strict=True):
        assert np.array_equal(first, each.feed["x"])


@pytest.mark.parametrize("output", [np.zeros(()), np.zeros((3, 2)), np.zeros((1, 2))])
def test_outputs_of_another_length_are_not_put_apart(output: Any) -> None:
    with pytest.raises(NotApart):
        apart([request(0), request(1)], [np.zeros(2), output])


def test_it_is_waited_for_more_until_the_oldest_is_due_or_anything_is_full() -> None:
    queue = Queue(3, 100)
    queue.add(request(0, came_ns=1000))
    assert queue.wait_ns(1010) == 90
    queue.add(request(1, width=2, came_ns=1050))
    assert queue.wait_ns(1060) == 40
    assert queue.wait_ns(2000) == 0
    queue.add(request(2, size=2, width=2, came_ns=1070))
    assert queue.wait_ns(1080) is None


def test_it_is_not_waited_for_more_of_what_runs_alone_or_when_there_is_too_much() -> None:
    alone, crowd = Queue(2, 100), Queue(2, 100)
    alone.add(request(0, alone=True))
    for number in range(MAX_WAITING):
        assert number == 0 or crowd.wait_ns(0) is not None
        crowd.add(request(number, width=number))
    assert [alone.wait_ns(0), crowd.wait_ns(0)] == [None, None]


def test_a_request_waits_since_it_was_sent() -> None:
    came = request(0, came_ns=1000)
    assert came.waits_since_ns() == 1000
    sent = Request(0, ASKED, {}, 1, alone=False, sent_ns=900, came_ns=1000, input_ns=0)
    assert sent.waits_since_ns() == 900


@pytest.mark.parametrize(
    ("feed", "measured"),
    [
        ({"x": np.zeros((4, 2))}, (4, False)),
        ({"x": np.zeros((2, 2)), "z": np.zeros(2)}, (2, False)),
        ({"x": np.zeros((0, 2))}, (0, True)),
        ({"x": np.zeros((2, 2)), "default": np.zeros(3)}, (2, True)),
        ({}, (1, False)),
    ],
)
def test_the_size_of_a_request_is_its_first_dimension(
    feed: dict[str, Any], measured: tuple[int, bool]
) -> None:
    assert BatchDimension(4, ["x", "z"]).measure(feed) == measured


def test_a_cancellation_is_for_what_waits_runs_or_is_to_come_and_nothing_else() -> None:
    cancellation = Cancellation()
    for number in (1, 2, 3):
        cancellation.wait(number)
    assert cancellation.begin([3]) is not None
    cancellation.end()
    for number in (2, 3, 7):  # waits though a later one has run; is over; is to come
        cancellation.cancel(number)
    assert [cancellation.drop(number) for number in (1, 2, 3)] == [False, True, False]
    assert cancellation.begin([7]) is None
    cancellation.skip(7)
    cancellation.cancel(7)
    assert cancellation.begin([7]) is not None


def test_a_cancelled_member_of_a_batch_is_not_begun_again_and_the_others_are() -> None:
    cancellation = Cancellation()
    options = cancellation.begin([1, 2])
    assert options is not None
    cancellation.cancel(2)
    assert options.terminate
    cancellation.end_to_begin_again()
    first = cancellation.begin([1])
    assert first is not None
    assert not first.terminate
    cancellation.end()
    assert cancellation.begin([2]) is None
    assert cancellation.drop(2)


def test_a_cancellation_that_came_too_late_is_forgotten() -> None:
    cancellation = Cancellation()
    assert cancellation.begin([1]) is not None
    cancellation.cancel(1)
    cancellation.end()
    assert not cancellation._cancelled


async def test_requests_that_wait_are_run_at_once_and_answered_each_on_its_own(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.rows(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 4)
    tasks = await asked_at_once(worker, *(ask_all(worker, [row(n, -n)]) for n in range(6)))
    assert await sizes(tasks) == [(1, 4), (1, 0), (1, 0), (1, 0), (1, 2), (1, 0)]
    assert [array(task.result()[1][0]).tolist() for task in tasks] == [[[n, -n]] for n in range(6)]


async def test_without_batching_each_request_runs_alone(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.rows(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 0)
    tasks = await asked_at_once(worker, *(ask_all(worker, [ints_as_floats(5)]) for _ in range(3)))
    assert await sizes(tasks) == [(1, 1)] * 3


def ints_as_floats(count: int) -> Tensor:
    return tensor("x", "FP32", np.arange(2 * count, dtype=np.float32).reshape(count, 2))


async def test_no_batch_is_larger_than_the_limit(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.rows(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 4)
    tasks = await asked_at_once(worker, *(ask_all(worker, [ints_as_floats(n)]) for n in (3, 2, 2, 4, 0)))
    assert await sizes(tasks) == [(3, 3), (2, 4), (2, 0), (4, 4), (0, 0)]


@pytest.mark.parametrize(
    ("model", "datatype"),
    [(models.rows(), "FP32"), (models.rows(INT64), "INT64"), (models.look_up(), "INT64")],
)
async def test_answers_are_the_same_as_without_batching_whatever_is_mixed(
    pool: WorkerPool, tmp_path: Path, model: ModelProto, datatype: str
) -> None:
    save(model, tmp_path, "m")
    random = np.random.default_rng(7)
    type_of = {"FP32": np.float32, "INT64": np.int64}[datatype]
    shapes = [(int(random.integers(0, 4)), int(random.integers(0, 3))) for _ in range(60)]
    inputs = [tensor("x", datatype, random.integers(0, 4, shape).astype(type_of)) for shape in shapes]
    answers = []
    for limit in (0, 4):
        worker = await batching(pool, tmp_path, "m", limit)
        answers.append(
            await asyncio.gather(*await asked_at_once(worker, *(ask(worker, [x]) for x in inputs)))
        )
    for (plain,), (batched,) in zip(*answers, strict=True):
        assert (batched.shape, bytes(batched.data)) == (plain.shape, bytes(plain.data))


async def test_json_and_binary_do_not_mix_and_are_both_batched(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.rows(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 4)
    text = Tensor("x", "FP32", (1, 2), b"[1,2.5]", text=True)
    tasks = await asked_at_once(
        worker,
        *(ask_all(worker, [x], text=as_text) for as_text in (True, False) for x in (text, row(1, 2.5))),
    )
    assert await sizes(tasks) == [(1, 2), (1, 0)] * 2
    data = [bytes(task.result()[1][0].data) for task in tasks]
    assert data == [b"[1.0,2.5]"] * 2 + [bytes(row(1, 2.5).data)] * 2


async def test_strings_are_batched(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.rows(STRING), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 8)
    inputs = [Tensor("x", "BYTES", (1, 2), pack_texts(["ä" * n, "b"])) for n in range(4)]
    tasks = await asked_at_once(worker, *(ask_all(worker, [x]) for x in inputs))
    assert (await sizes(tasks))[0] == (1, 4)
    assert [bytes(task.result()[1][0].data) for task in tasks] == [x.data for x in inputs]


async def test_it_is_waited_for_as_many_as_go_together(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.rows(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 3, HOUR_US)
    tasks = []
    for n in range(3):
        tasks += await asked_at_once(worker, ask_all(worker, [row(n)]))
    assert await sizes(tasks) == [(1, 3), (1, 0), (1, 0)]


async def test_nobody_comes_and_a_request_is_run_when_its_delay_is_over(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.rows(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 3, 2000)
    assert await sizes([asyncio.ensure_future(ask_all(worker, [row(1)]))]) == [(1, 1)]


async def test_a_worker_that_waits_for_more_can_be_stopped(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.rows(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 3, HOUR_US)
    (task,) = await asked_at_once(worker, ask_all(worker, [row(1)]))
    assert (await worker.stop(LIMIT_S)).exit_code == 0
    await asyncio.wait([task])
    assert task.exception() is not None


async def test_a_bad_request_harms_no_other(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.look_up(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 8)
    tasks = await asked_at_once(worker, *(ask_all(worker, [ints([n])]) for n in (1, 9, 3)))
    assert await sizes([tasks[0], tasks[2]]) == [(1, 1)] * 2
    assert [array(tasks[n].result()[1][0]).tolist() for n in (0, 2)] == [[[10]], [[30]]]
    with pytest.raises(InvalidInput, match="out of data bounds"):
        await tasks[1]


async def test_a_model_whose_outputs_have_no_batch_dimension_is_run_one_by_one(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.distinct_rows(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 8)
    tasks = await asked_at_once(worker, *(ask_all(worker, [row(n)]) for n in (1, 1, 2)))
    assert await sizes(tasks) == [(1, 1)] * 3
    assert [array(task.result()[1][0]).tolist() for task in tasks] == [[[1]], [[1]], [[2]]]


async def endless_batch(pool: WorkerPool, root: Path) -> tuple[Worker, list[asyncio.Task[Any]]]:
    """Start three that run at once, of which the second keeps them from ending, and two that wait."""
    save(models.counting_rows(), root, "m")
    worker = await batching(pool, root, "m", 3)
    counts = (5, ENDLESS, 7, ENDLESS, 9)
    tasks = await asked_at_once(worker, *(ask(worker, [tensor("x", "INT64", np.array([n]))]) for n in counts))
    await until(computing(worker.pid))
    return worker, tasks


async def test_the_end_of_one_of_a_running_batch_is_not_that_of_the_others(
    pool: WorkerPool, tmp_path: Path
) -> None:
    worker, tasks = await endless_batch(pool, tmp_path)
    tasks[3].cancel()  # it waits
    await asyncio.sleep(0)
    tasks[1].cancel()  # it runs
    async with asyncio.timeout(LIMIT_S):
        answers = await asyncio.gather(tasks[0], tasks[2], tasks[4])
        await worker.drained()
    assert [int(array(y)[0]) for (y,) in answers] == [5, 7, 9]


async def test_cancelling_those_that_suffer_leaves_the_rest(pool: WorkerPool, tmp_path: Path) -> None:
    worker, tasks = await endless_batch(pool, tmp_path)
    for n in (0, 2, 1, 3):
        tasks[n].cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(LIMIT_S):
        (y,) = await tasks[4]
        await worker.drained()
    assert int(array(y)[0]) == 9


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([floats("a", *range(9)), floats("b", *range(9))], "batch size is 9, and of this model at most 8"),
        ([floats("a", 1), floats("b", 1, 2)], "same first dimension"),
        ([tensor("a", "FP32", np.array(1, np.float32)), floats("b", 1)], "same first dimension"),
    ],
)
async def test_a_request_that_fits_into_no_batch_is_refused(
    pool: WorkerPool, tmp_path: Path, inputs: list[Tensor], words: str
) -> None:
    save(models.subtract(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 8)
    with pytest.raises(InvalidInput, match=words):
        await ask(worker, inputs)
    (y,) = await ask(worker, [floats("a", *range(8)), floats("b", *[1] * 8)])
    assert array(y).tolist() == list(range(-1, 7))


async def test_a_request_with_a_value_for_the_whole_run_runs_alone(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.with_default(), tmp_path, "m")
    worker = await batching(pool, tmp_path, "m", 8)
    x, c = floats("x", 1), floats("c", 100)
    tasks = await asked_at_once(worker, *(ask_all(worker, asked) for asked in ([x], [x, c], [x, c], [x])))
    assert await sizes(tasks) == [(1, 2), (1, 1), (1, 1), (1, 0)]
    assert [float(array(task.result()[1][0])[0]) for task in tasks] == [6, 101, 101, 6]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.identity(shape=()), r"'x' has shape \[\].*first dimension"),
        (models.identity(shape=(4, None)), r"'x' has shape \[4, -1\]"),
        (models.memory_bomb_on_run(), r"'sum' has shape \[\]"),
    ],
)
async def test_a_model_without_a_batch_dimension_is_refused(
    pool: WorkerPool, tmp_path: Path, model: ModelProto, words: str
) -> None:
    save(model, tmp_path, "m")
    worker = await pool.start("w")
    with pytest.raises(LoadRefused, match=words) as refused:
        await worker.load(order_of(tmp_path, "m", max_batch_size=8), lambda _: None)
    assert refused.value.code == "invalid_model"
