"""Execution in a worker: the queue, dynamic batching, and cancellation of requests that run together."""

import asyncio
import socket
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto
from support import models
from support.history import PLAIN
from support.models import ENDLESS, STRING
from support.workers import (
    LIMIT_S,
    Serve,
    answer,
    array,
    ask_all,
    asked_at_once,
    computing,
    floats,
    freeze,
    resume,
    tensor,
    until,
)

from runtime.errors import InferenceTimeout, InvalidInput, LoadRefused, WorkerDied
from runtime.process.sharedmemory import TensorMemory
from runtime.process.worker import Worker
from runtime.wire import (
    CHUNK_BYTES,
    FROM_SERVING,
    FrameReader,
    FrameRules,
    Infer,
    InferenceFailure,
    Tensor,
    TensorSpec,
    WantedOutput,
    pack_texts,
)
from runtime.worker.batching import (
    MAX_WAITING,
    BatchDimension,
    BatchRequest,
    OutputsNotBatched,
    Queue,
    join_inputs,
    split_outputs,
)
from runtime.worker.execution import (
    KEPT_RUNS,
    KNOWN_NS,
    MAX_TRIAL_PRICE,
    TRIAL_SHARE,
    Cancellation,
    InferenceExecutor,
    LatestRuns,
    Outbox,
)
from runtime.worker.inference import Runner, SelectedOutputs
from runtime.worker.sharedtensors import SharedTensors

Channel = tuple[socket.socket, socket.socket]
"""Two ends."""
ASKED = SelectedOutputs(["y"], [("y", "FP32", False)])
HOUR_US = 3600 * 10**6
ALLOW: dict[str, Any] = {"dependent_rows": True}
LONG = 120_000
"""For `counting_rows`: counting so far takes some tenths of a second."""
NO_NUMBERS = Tensor("x", "FP32", (1,), b'["none"]', text=True)


def request(
    number: int, size: int = 1, width: int = 1, *, alone: bool = False, came_ns: int = 0, level: int = 0
) -> BatchRequest:
    feed = {"x": np.full((size, width), number)}
    return BatchRequest(number, ASKED, feed, size, alone, 0, came_ns or number + 1, 0, level=level)


def shared() -> SharedTensors:
    return SharedTensors(*TensorMemory.create()[1])


def row(*values: float) -> Tensor:
    return tensor("x", "FP32", [values])


def rows(count: int) -> Tensor:
    return tensor("x", "FP32", np.arange(2 * count).reshape(count, 2))


async def sizes(tasks: Sequence[asyncio.Task[Any]]) -> list[tuple[int, int]]:
    """Wait for the answers; returns the size of each request, and of the batch it ran in (0 but for one)."""
    async with asyncio.timeout(LIMIT_S):
        return [(outcome.batch_size, outcome.execution_size) for outcome, _ in await asyncio.gather(*tasks)]


# The queue, without a worker


@PLAIN
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.booleans()), max_size=20), st.integers(4, 9)
)
def test_queue_batches_like_requests_oldest_first(drawn: list[tuple[int, int, bool]], limit: int) -> None:
    queue = Queue(limit, 0)
    waiting = [request(n, size, width, alone=alone) for n, (size, width, alone) in enumerate(drawn)]
    for each in waiting:
        queue.add(each)
    while waiting:
        assert len(queue) == len(waiting)
        batch = queue.take()
        assert batch[0] is waiting[0]
        assert len({each.batch_key() for each in batch}) == 1
        assert sum(each.size for each in batch) <= limit
        assert len(batch) == 1 or not any(each.alone for each in batch)
        waiting = [each for each in waiting if each not in batch]
    assert not queue


@PLAIN
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), max_size=20), st.integers(1, 4))
def test_queue_serves_higher_priorities_first(drawn: list[tuple[int, int]], limit: int) -> None:
    queue = Queue(limit, 0, has_priorities=True)
    for n, (level, width) in enumerate(drawn):
        queue.add(request(n, 1, width, level=level))
    waiting = sorted((level, n) for n, (level, _) in enumerate(drawn))
    while waiting:
        batch = [(each.level, each.number) for each in queue.take()]
        assert batch == sorted(batch)
        assert batch[0] == waiting[0]
        waiting = [each for each in waiting if each not in batch]
    assert not queue


@PLAIN
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2))
def test_joined_inputs_split_into_what_they_were(drawn: list[int], width: int) -> None:
    batch = [request(n, size, width) for n, size in enumerate(drawn)]
    parts = split_outputs(batch, [join_inputs(batch)["x"], None])
    assert [second for _, second in parts] == [None] * len(batch)
    for each, (first, _) in zip(batch, parts, strict=True):
        assert np.array_equal(first, each.feed["x"])


@pytest.mark.parametrize("output", [np.zeros(()), np.zeros((3, 2)), np.zeros((1, 2))])
def test_outputs_of_another_length_are_not_split(output: Any) -> None:
    with pytest.raises(OutputsNotBatched):
        split_outputs([request(0), request(1)], [np.zeros(2), output])


def test_queue_waits_until_oldest_is_due_or_a_batch_is_full() -> None:
    queue, alone, crowd = Queue(3, 100), Queue(2, 100), Queue(2, 100)
    queue.add(request(0, came_ns=1000))
    assert queue.wait_ns(1010) == 90
    queue.add(request(1, width=2, came_ns=1050))
    assert [queue.wait_ns(now) for now in (1060, 2000)] == [40, 0]
    queue.add(request(2, size=2, width=2, came_ns=1070))
    assert queue.wait_ns(1080) is None
    alone.add(request(0, alone=True))
    for number in range(MAX_WAITING):
        assert number == 0 or crowd.wait_ns(0) is not None
        crowd.add(request(number, width=number))
    assert [alone.wait_ns(0), crowd.wait_ns(0)] == [None, None]


def test_queue_drops_requests_of_the_next_batch_that_are_over() -> None:
    queue, judged = Queue(2, 0), list[tuple[int, int]]()
    for number in range(5):
        queue.add(request(number))
    queue.add(request(5, width=2))

    def is_over(each: BatchRequest, batch_size: int) -> bool:
        judged.append((each.number, batch_size))
        return each.number in (0, 2)

    assert [queue.drop(is_over), queue.drop(is_over)] == [True, False]
    assert judged == [(0, 2), (1, 2), (2, 2), (3, 2), (1, 2), (3, 2)]
    assert [[each.number for each in queue.take()] for _ in range(2)] == [[1, 3], [4]]
    assert queue.drop(lambda *_: True)
    assert len(queue) == 0


def test_queue_without_joining_runs_a_request_with_all_its_rows() -> None:
    queue, judged = Queue(1, 100), list[tuple[int, int]]()
    for number, size in enumerate((5, 1, 0, 2)):
        queue.add(request(number, size, alone=size == 0, came_ns=1000 + number))
        assert queue.wait_ns(1000) is None

    def is_over(each: BatchRequest, batch_size: int) -> bool:
        judged.append((each.number, batch_size))
        return False

    while queue:
        assert not queue.drop(is_over)
        assert len(queue.take()) == 1
    assert judged == [(0, 5), (1, 1), (2, 0), (3, 2)]


def test_queue_time_counts_from_sending() -> None:
    sent = BatchRequest(0, ASKED, {}, 1, alone=False, sent_ns=900, came_ns=1000, input_ns=0)
    assert [each.waiting_since_ns() for each in (request(0, came_ns=1000), sent)] == [1000, 900]


@pytest.mark.parametrize(
    ("shapes", "measured"),
    [
        ({"x": (4, 2)}, (4, False)),
        ({"x": (2, 2), "z": (2,)}, (2, False)),
        ({"x": (0, 2)}, (0, True)),
        ({"x": (2, 2), "default": (3,)}, (2, True)),
        ({}, (1, False)),
        ({"x": (9, 2)}, "the batch size is 9, and of this model at most 4"),
        ({"x": (1,), "z": (2,)}, "same first dimension"),
        ({"x": (), "z": ()}, "same first dimension"),
    ],
)
def test_request_size_is_its_first_dimension(
    shapes: dict[str, tuple[int, ...]], measured: tuple[int, bool] | str
) -> None:
    dimension, feed = BatchDimension(4, ["x", "z"]), {name: np.zeros(shape) for name, shape in shapes.items()}
    if isinstance(measured, str):
        with pytest.raises(InvalidInput, match=measured):
            dimension.measure(feed)
    else:
        assert dimension.measure(feed) == measured


def test_cancellation_affects_its_request_only() -> None:
    cancellation = Cancellation()
    for number in (1, 2, 3):
        cancellation.wait(number)
    assert cancellation.begin([3]) is not None
    cancellation.end()
    for number in (2, 3, 7):  # waits though a later one has run; is over; is to come
        cancellation.cancel(number)
    assert [cancellation.drop(number) for number in (1, 2, 3)] == [None, True, None]
    assert cancellation.begin([7]) is None
    assert not cancellation.skip(7)
    cancellation.cancel(7)
    assert cancellation.begin([7]) is not None


def test_cancelled_member_of_a_batch_is_not_run_again() -> None:
    cancellation = Cancellation()
    options = cancellation.begin([1, 2])
    assert options is not None
    cancellation.cancel(2)
    assert options.terminate
    cancellation.end_for_rerun()
    first = cancellation.begin([1])
    assert first is not None
    assert not first.terminate
    cancellation.end()
    assert cancellation.begin([2]) is None
    assert cancellation.drop(2) is False


@pytest.mark.parametrize(("usual_ns", "leaves"), [(HOUR_US * 1000, True), (0, False)])
def test_member_leaves_a_batch_that_takes_as_long_as_usual(usual_ns: int, *, leaves: bool) -> None:
    cancellation = Cancellation()
    options = cancellation.begin([1, 2, 3], usual_ns)
    assert options is not None
    assert [cancellation.cancel(number) for number in (2, 2, 1)] == [leaves, False, leaves]
    assert options.terminate is not leaves
    assert not cancellation.cancel(3)  # the last one
    assert options.terminate
    assert cancellation.end() == [1, 2][: 2 * leaves]
    assert not cancellation._cancelled


@pytest.mark.parametrize(
    ("input_bytes", "waited_ns", "now_ns", "needed_ns"),
    [
        (1000, 0, 50, 10),
        (1000, 11, 50, 30),
        (600, 10, KNOWN_NS + 40, 10),
        (600, 99, KNOWN_NS + 41, 0),
        (1024, 99, 50, 0),
    ],
    ids=["alone", "behind others", "alike", "long ago", "of another size"],
)
def test_needed_time_is_that_of_the_latest_runs(
    input_bytes: int, waited_ns: int, now_ns: int, needed_ns: int
) -> None:
    runs = LatestRuns()
    for duration_ns in (9, *([30] * (KEPT_RUNS - 6)), *([10] * 5), 90):  # of which the first is forgotten
        runs.add(1000, duration_ns, 40)
    assert runs.needed_ns(input_bytes, waited_ns, now_ns) == needed_ns
    assert (runs.longest_ns(600), runs.longest_ns(1024)) == (90, 0)


@PLAIN
@given(st.lists(st.integers(10, 1000), min_size=1, max_size=400), st.integers(1, 1000))
def test_late_trials_take_a_share_of_the_time_of_runs(durations_ns: list[int], left_ns: int) -> None:
    runs, wasted_ns = LatestRuns(), 0
    for duration_ns in durations_ns:
        runs.add(8, duration_ns, 0)
        if left_ns <= runs.spare_ns:
            runs.waste(left_ns)
            wasted_ns += left_ns
    assert wasted_ns <= sum(durations_ns) / TRIAL_SHARE + max(durations_ns)  # the first trial is free


@PLAIN
@given(st.lists(st.integers(10, 1000), max_size=100), st.integers(1, 1000))
def test_trial_follows_whatever_came_before(before_ns: list[int], left_ns: int) -> None:
    runs = LatestRuns()
    for duration_ns in before_ns:
        runs.add(8, duration_ns, 0)
    long_ns = max(left_ns, *before_ns, 100)
    for _ in range(9):  # late trials, each as soon as it may be
        waited = 0
        while runs.spare_ns < left_ns:  # a prediction by these runs refuses each request
            runs.add(8, long_ns, 0)
            waited += 1
        runs.waste(left_ns)
        assert waited <= TRIAL_SHARE * (MAX_TRIAL_PRICE + 1)


# The executor, without a worker


@pytest.fixture
def channel() -> Iterator[Channel]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def runner() -> Runner:
    session = ort.InferenceSession(models.add().SerializeToString(), providers=["CPUExecutionProvider"])
    return Runner(session, [TensorSpec("x", "FP32", (-1,))], [TensorSpec("y", "FP32", (-1,))])


def answers_in(channel: socket.socket, outbox: Outbox) -> list[tuple[int, str]]:
    """Read the answers, which are all failures; returns their ids and codes."""
    outbox.flush()
    reader = FrameReader(FrameRules(FROM_SERVING))
    reader.feed(channel.recv_into(reader.buffer()))
    answers = [message for message, _ in iter(reader.next_frame, None)]
    failures = [(each.id, each.code) for each in answers if isinstance(each, InferenceFailure)]
    assert len(failures) == len(answers)
    return failures


def test_cancelled_requests_are_neither_decoded_nor_run(channel: Channel, runner: Runner) -> None:
    outbox, cancellation = Outbox(channel[1]), Cancellation()
    executor = InferenceExecutor(runner, outbox, cancellation, BatchDimension(4, ["x"]), shared())
    cancellation.cancel(1)
    for number in range(3):
        assert executor.prepare(Infer(number), [NO_NUMBERS]) is None
    codes = answers_in(channel[0], outbox)
    assert codes == [(0, "invalid_input"), (1, "inference_cancelled"), (2, "invalid_input")]
    batch = [executor.prepare(Infer(number), [floats("x", 1)]) for number in (3, 4)]
    for number in (3, 4):
        cancellation.cancel(number)
    executor.run([each for each in batch if each is not None])
    assert answers_in(channel[0], outbox) == [(3, "inference_cancelled"), (4, "inference_cancelled")]


def test_only_a_busy_worker_makes_requests_queue(channel: Channel, runner: Runner) -> None:
    """Copying and waking pass between sending and receiving while the worker has nothing to do."""
    executor = InferenceExecutor(runner, Outbox(channel[1]), Cancellation(), None, shared())
    sent_ns = time.monotonic_ns()
    on_its_way = executor.prepare(Infer(0, sent_ns=sent_ns), [floats("x", 1)])
    assert on_its_way is not None
    assert on_its_way.queue_ns == 0
    executor.run([on_its_way])
    ran_ns = time.monotonic_ns()
    behind = executor.prepare(Infer(1, sent_ns=sent_ns), [floats("x", 1)])
    later = executor.prepare(Infer(2, sent_ns=ran_ns), [floats("x", 1)])
    unknown = executor.prepare(Infer(3), [floats("x", 1)])
    assert behind is not None
    assert later is not None
    assert unknown is not None
    assert 0 < on_its_way.input_ns <= behind.queue_ns <= ran_ns - sent_ns
    assert 0 < behind.input_ns <= later.queue_ns <= later.came_ns - ran_ns
    assert unknown.queue_ns == 0


@pytest.mark.parametrize("refused", [Infer(0), None], ids=["undecodable", "too large"])
def test_requests_queue_behind_a_refused_one(channel: Channel, runner: Runner, refused: Infer | None) -> None:
    executor = InferenceExecutor(runner, Outbox(channel[1]), Cancellation(), None, shared())
    sent_ns = time.monotonic_ns()
    if refused is None:
        executor.refuse(0)
    else:
        assert executor.prepare(refused, [NO_NUMBERS]) is None
    behind = executor.prepare(Infer(1, sent_ns=sent_ns), [floats("x", 1)])
    assert behind is not None
    assert 0 < behind.queue_ns <= behind.came_ns - sent_ns


def test_long_lists_of_wanted_outputs_are_not_cached(runner: Runner) -> None:
    once = (WantedOutput("y"),)
    assert runner.select_outputs(once, False) is runner.select_outputs(once, False)
    tracemalloc.start()
    try:
        for count in range(50, 100):
            many = tuple(WantedOutput("y") for _ in range(count * 20))
            assert runner.select_outputs(many, False).names == ["y"]
        assert tracemalloc.get_traced_memory()[0] < 2**18
    finally:
        tracemalloc.stop()


# Batches in a worker


STRINGS = [Tensor("x", "BYTES", (1, 2), pack_texts(["ä" * n, "b"])) for n in range(4)]
X, C = floats("x", 1), floats("c", 100)
BATCHES: dict[str, tuple[ModelProto, int, list[list[Tensor]], list[tuple[int, int]]]] = {
    "waiting requests": (
        models.rows(), 4, [[row(n, -n)] for n in range(6)], [(1, 4), (1, 0), (1, 0), (1, 0), (1, 2), (1, 0)],
    ),
    "no batching": (models.rows(), 0, [[rows(5)]] * 3, [(1, 1)] * 3),
    "limit": (
        models.rows(), 4, [[rows(n)] for n in (3, 2, 2, 4, 0)], [(3, 3), (2, 4), (2, 0), (4, 4), (0, 0)],
    ),
    "strings": (models.rows(STRING), 8, [[x] for x in STRINGS], [(1, 4), (1, 0), (1, 0), (1, 0)]),
    "outputs unbatched": (models.distinct_rows(), 8, [[row(n)] for n in (1, 1, 2)], [(1, 1)] * 3),
    "input unbatched": (
        models.with_default(), 8, [[X], [X, C], [X, C], [X]], [(1, 2), (1, 1), (1, 1), (1, 0)],
    ),
}  # fmt: skip


async def run_at_once(
    serve: Serve, model: ModelProto, limit: int, requests: list[list[Tensor]]
) -> tuple[list[tuple[int, int]], list[tuple[Tensor, ...]]]:
    """Have requests wait for a worker; returns the sizes, and the outputs of each."""
    worker = await serve(model, max_batch_size=limit, **ALLOW)
    tasks = await asked_at_once(worker, *(ask_all(worker, tensors) for tensors in requests))
    return await sizes(tasks), [task.result()[1] for task in tasks]


@pytest.mark.parametrize("case", BATCHES)
async def test_waiting_requests_run_in_batches(serve: Serve, case: str) -> None:
    model, limit, requests, expected = BATCHES[case]
    _, unbatched = await run_at_once(serve, model, 0, requests)
    assert await run_at_once(serve, model, limit, requests) == (expected, unbatched)


async def test_json_and_binary_requests_are_batched_apart(serve: Serve) -> None:
    worker = await serve(models.rows(), max_batch_size=4)
    text = Tensor("x", "FP32", (1, 2), b"[1,2.5]", text=True)
    tasks = await asked_at_once(
        worker,
        *(ask_all(worker, [x], text=as_text) for as_text in (True, False) for x in (text, row(1, 2.5))),
    )
    assert await sizes(tasks) == [(1, 2), (1, 0)] * 2
    data = [bytes(task.result()[1][0].data) for task in tasks]
    assert data == [b"[1.0,2.5]"] * 2 + [bytes(row(1, 2.5).data)] * 2


async def test_batch_runs_when_full_or_when_its_delay_ends(serve: Serve) -> None:
    worker = await serve(models.rows(), max_batch_size=3, max_queue_delay_us=HOUR_US)
    tasks = []
    for n in range(3):
        tasks += await asked_at_once(worker, ask_all(worker, [row(n)]))
    assert await sizes(tasks) == [(1, 3), (1, 0), (1, 0)]
    (task,) = await asked_at_once(worker, ask_all(worker, [row(1)]))
    assert (await worker.stop(LIMIT_S)).exit_code == 0
    await asyncio.wait([task])
    assert task.exception() is not None
    worker = await serve(models.rows(), max_batch_size=3, max_queue_delay_us=2000)
    assert await sizes([asyncio.ensure_future(ask_all(worker, [row(1)]))]) == [(1, 1)]


async def test_invalid_request_fails_alone(serve: Serve) -> None:
    worker = await serve(models.look_up(), max_batch_size=8)
    tasks = await asked_at_once(worker, *(ask_all(worker, [tensor("x", "INT64", [[n]])]) for n in (1, 9, 3)))
    assert await sizes([tasks[0], tasks[2]]) == [(1, 1)] * 2
    assert [array(tasks[n].result()[1][0]).tolist() for n in (0, 2)] == [[[10]], [[30]]]
    with pytest.raises(InvalidInput, match="out of data bounds"):
        await tasks[1]


@pytest.mark.parametrize(
    ("cancelled", "answers", "executions"),
    [((3, 1), {0: 5, 2: 7, 4: 9}, [2, 0, 1]), ((0, 2, 1, 3), {4: 9}, [1])],
    ids=["the endless ones", "all but the last"],
)
async def test_batch_runs_again_without_cancelled_requests(
    serve: Serve, cancelled: tuple[int, ...], answers: dict[int, int], executions: list[int]
) -> None:
    worker = await serve(
        models.counting_rows(), max_batch_size=3, dependent_rows=True
    )  # 0 to 2 run together, 3 and 4 wait
    counts = (5, ENDLESS, 7, ENDLESS, 9)
    tasks = await asked_at_once(worker, *(ask_all(worker, [tensor("x", "INT64", [n])]) for n in counts))
    await until(computing(worker.pid))
    for n in cancelled:
        tasks[n].cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(LIMIT_S):
        answered = {n: await tasks[n] for n in answers}
        assert {n: array(tensors[0])[0] for n, (_, tensors) in answered.items()} == answers
        await worker.wait_until_drained()
    assert [outcome.execution_size for outcome, _ in answered.values()] == executions


async def counting(worker: Worker, batch: int = 1) -> tuple[Callable[..., Awaitable[list[Any]]], float]:
    """Have a worker count far with as many rows as a batch has, then with one.

    Returns:
        A function that has it asked to count to each of these numbers at once, and the seconds of a run.
    """

    async def count(*counts: int) -> list[asyncio.Task[Any]]:
        return await asked_at_once(worker, *(ask_all(worker, [tensor("x", "INT64", [n])]) for n in counts))

    outcomes = [(await asyncio.gather(*await count(*[LONG] * rows)))[0][0] for rows in (batch, 1)]
    return count, min(outcome.infer_ns for outcome in outcomes) / 1e9


async def test_cancelled_request_leaves_a_batch_that_goes_on(serve: Serve) -> None:
    worker = await serve(models.counting_rows(), max_batch_size=3, **ALLOW)
    count, _ = await counting(worker, 3)
    tasks = await count(LONG, LONG, LONG)
    await until(computing(worker.pid))
    tasks[0].cancel()
    await until(lambda: worker.in_flight < 3)
    assert worker.in_flight == 2  # the cancelled one is over before the others are
    assert await sizes(tasks[1:]) == [(1, 3), (1, 0)]


async def test_waiting_request_is_over_once_it_is_cancelled(serve: Serve) -> None:
    worker = await serve(models.counting_rows(), max_batch_size=1, **ALLOW)
    endless, waiting = await asked_at_once(
        worker, *(answer(worker, tensor("x", "INT64", [n])) for n in (ENDLESS, 5))
    )
    await until(computing(worker.pid))
    waiting.cancel()
    await until(lambda: worker.in_flight == 1)
    assert not endless.done()
    endless.cancel()
    await worker.wait_until_drained()


@pytest.mark.parametrize("batch", [0, 2])
async def test_request_that_cannot_be_in_time_is_not_begun(serve: Serve, batch: int) -> None:
    worker = await serve(models.counting_rows(), max_batch_size=batch, **ALLOW)
    count, took_s = await counting(worker)
    said = list[str]()
    while not said or "not begun" not in said[-1]:
        with pytest.raises(InferenceTimeout) as late:
            await worker.infer([tensor("x", "INT64", [LONG])], timeout_s=took_s / 2)
        said.append(str(late.value))
    assert 2 <= len(said) <= 6  # some are tried, for as long as the longest run
    assert await sizes(await count(5)) == [(1, 1)]


@pytest.mark.parametrize("batch", [0, 4])
async def test_short_request_is_tried_though_the_latest_were_long(serve: Serve, batch: int) -> None:
    worker = await serve(models.counting_rows(), max_batch_size=batch, **ALLOW)
    count, took_s = await counting(worker)
    for _ in range(KEPT_RUNS):
        await asyncio.gather(*await count(LONG))
    refused = 0
    for _ in range(4):
        await asyncio.gather(*await count(LONG))
        try:
            await worker.infer([tensor("x", "INT64", [1])], timeout_s=took_s * 0.7)
        except InferenceTimeout:
            refused += 1
    assert refused <= 1


async def test_batch_runs_again_without_a_late_trial(serve: Serve) -> None:
    worker = await serve(models.counting_rows(), max_batch_size=2, **ALLOW)
    count, took_s = await counting(worker, 2)
    for _ in range(KEPT_RUNS):
        await asyncio.gather(*await count(LONG, LONG))
    trial, other = await asked_at_once(
        worker,
        worker.infer([tensor("x", "INT64", [ENDLESS])], timeout_s=took_s / 2),
        worker.infer([tensor("x", "INT64", [5])], timeout_s=LIMIT_S),
    )
    with pytest.raises(InferenceTimeout, match="was stopped"):
        await trial
    assert await sizes([other]) == [(1, 1)]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.identity(shape=()), r"'x' has shape \[\].*first dimension"),
        (models.identity(shape=(4, None)), r"'x' has shape \[4, -1\]"),
        (models.memory_bomb_on_run(), r"'sum' has shape \[\]"),
    ],
)
async def test_model_without_batch_dimension_is_refused(serve: Serve, model: ModelProto, words: str) -> None:
    with pytest.raises(LoadRefused, match=words) as refused:
        await serve(model, max_batch_size=8)
    assert refused.value.code == "invalid_model"


# Priorities


async def answered_in_order(worker: Worker, asked: Sequence[tuple[int, Tensor]]) -> list[int]:
    """Ask a worker at once, with these priorities; returns the requests in the order of their answers."""
    order = list[int]()

    async def ask_one(n: int) -> None:
        level, inputs = asked[n]
        await ask_all(worker, [inputs], level=level)
        order.append(n)

    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*await asked_at_once(worker, *map(ask_one, range(len(asked)))))
    return order


@pytest.mark.parametrize("batch", [0, 2])
async def test_higher_priority_is_answered_first(serve: Serve, batch: int) -> None:
    worker = await serve(models.counting_rows(), max_batch_size=batch, has_priorities=True, **ALLOW)
    asked = [(level, tensor("x", "INT64", [level])) for level in (3, 2, 3, 1, 2, 1)]
    assert await answered_in_order(worker, asked) == [3, 5, 1, 4, 0, 2]


async def test_priorities_are_those_of_all_that_is_unread(serve: Serve) -> None:
    """Together the requests are longer than what a worker reads at once, and fit into the socket."""
    worker = await serve(models.identity(), has_priorities=True)
    asked = [(9 - n, tensor("x", "FP32", np.ones(CHUNK_BYTES // 16))) for n in range(8)]
    assert await answered_in_order(worker, asked) == [*range(7, -1, -1)]


async def running_second(serve: Serve, batch: int) -> tuple[Worker, list[asyncio.Task[Any]]]:
    """Have a worker run endlessly what was asked second, and stop it."""
    worker = await serve(models.counting_rows(), max_batch_size=batch, has_priorities=True, **ALLOW)
    endless = [tensor("x", "INT64", [ENDLESS])]
    tasks = await asked_at_once(worker, *(ask_all(worker, endless, level=level) for level in (2, 1)))
    await until(lambda: next(iter(worker._in_flight._pending.values()))[0].level == 1)
    await freeze(worker.pid)
    return worker, tasks


@pytest.mark.parametrize("batch", [0, 1])
async def test_run_that_does_not_stop_is_found_by_what_was_begun(serve: Serve, batch: int) -> None:
    worker, (waiting, running) = await running_second(serve, batch)
    worker._in_flight.patience_s = 0.05
    running.cancel()
    await asyncio.wait({worker.ended, waiting})
    assert "an inference did not stop" in worker.stderr_tail()[-1]


async def test_cancelled_wait_behind_a_run_kills_no_worker(serve: Serve) -> None:
    worker, (waiting, running) = await running_second(serve, 0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert worker._in_flight._find_cancelled_run() != worker._in_flight._find_cancelled_run()  # it progresses
    resume(worker.pid)
    await until(lambda: worker.in_flight == 1)
    running.cancel()
    await worker.wait_until_drained()


async def test_dead_worker_tells_the_run_from_what_waited(serve: Serve) -> None:
    worker, tasks = await running_second(serve, 0)
    worker.kill()
    begun = list[bool]()
    for task in tasks:
        with pytest.raises(WorkerDied) as died:
            await task
        begun.append(died.value.begun)
    assert begun == [False, True]
