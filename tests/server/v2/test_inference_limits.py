"""Inference under pressure: deadlines, queues, body budget, dying workers, swaps, clients that leave."""

import asyncio
import io
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from support import models
from support.http import ENDLESS, ONE, Answer, Json, LocalApi, local_server, when
from support.models import save
from support.workers import computing, until

from events.types import WorkerExited
from server.appkeys import BODIES
from server.http.bodies import Bodies

Start = Callable[..., Awaitable[LocalApi]]

SHORT = {**ENDLESS, "data": [5]}
STOPPED = {"timeout": 50_000}
TIMEOUT, QUEUE_FULL = (504, "inference_timeout"), (503, "inference_queue_full")


def quotient(a: int, b: int) -> list[Json]:
    """Return the inputs of `crash_on_run`."""
    numbers = (("a", a), ("b", b))
    return [{"name": name, "shape": [1], "datatype": "INT64", "data": [number]} for name, number in numbers]


async def load_loop(api: LocalApi, model_id: str) -> None:
    save(models.counting_loop(), api.config.repository, model_id)
    await api.load(model_id)


async def begin(api: LocalApi, model_id: str, *, count: int = 1) -> list[asyncio.Task[Answer]]:
    """Send so many endless inferences and wait until the worker has them."""
    worker = api.worker(model_id)
    running = [asyncio.create_task(api.infer(model_id, ENDLESS)) for _ in range(count)]
    await until(lambda: worker.in_flight == count)
    return running


async def test_run_without_time_or_client_is_stopped(shared: LocalApi) -> None:
    await load_loop(shared, "stopped")
    worker = shared.worker("stopped")
    answer = await shared.infer("stopped", ENDLESS, parameters=STOPPED)
    assert answer.refusal == TIMEOUT
    assert "0.05 s" in answer.json["error"]
    assert (await shared.infer("stopped", SHORT)).json["outputs"][0]["data"] == [5]
    [running] = await begin(shared, "stopped")
    running.cancel()
    await until(lambda: worker.in_flight == 0)
    assert (await shared.infer("stopped", SHORT)).status == 200
    assert shared.worker("stopped") is worker


async def test_long_inference_holds_up_nothing_else(shared: LocalApi) -> None:
    await load_loop(shared, "long")
    await load_loop(shared, "quick")
    is_computing = computing(shared.worker("long").pid)
    [running] = await begin(shared, "long")
    await until(is_computing)
    assert (await shared.infer("quick", SHORT)).json["outputs"][0]["data"] == [5]
    assert (await shared.get("/health/ready")).status == 200
    assert not running.done()
    await shared.unload("long", force=True)
    assert (await running).refusal == (503, "worker_died")


async def test_dead_worker_fails_its_requests_and_is_replaced(shared: LocalApi) -> None:
    await load_loop(shared, "other")
    save(models.crash_on_run(), shared.config.repository, "crashing")
    await shared.load("crashing")
    answer = await shared.infer("crashing", *quotient(models.LOWEST, -1))
    assert answer.refusal == (503, "worker_died")
    assert f"signal {signal.SIGFPE}" in answer.json["error"]
    assert (await shared.infer("other", SHORT)).status == 200
    answer = await when(lambda: shared.infer("crashing", *quotient(-5, -1)), lambda seen: seen.status == 200)
    assert answer.json["outputs"][0]["data"] == [5]
    [exited] = await shared.data_of(WorkerExited)
    assert exited.signal == signal.SIGFPE
    assert (await shared.jobs("?model=crashing"))[0]["cause"] == "recovery"


async def load_adder(api: LocalApi, model_id: str, version: int) -> None:
    save(models.add(version), api.config.repository, model_id, version)
    await api.load(model_id, version=version)


async def test_no_inference_fails_during_swaps(shared: LocalApi) -> None:
    await load_adder(shared, "swapped", 1)
    is_swapping, seen = True, set[int]()

    async def infer() -> None:
        while is_swapping:
            answer = await shared.infer("swapped", ONE)
            assert answer.status == 200, answer.body
            version = int(answer.json["model_version"])
            assert answer.json["outputs"][0]["data"] == [1 + version]
            seen.add(version)

    clients = [asyncio.create_task(infer()) for _ in range(4)]
    for turn in range(8):
        await load_adder(shared, "swapped", 1 + (turn + 1) % 2)
    is_swapping = False
    await asyncio.gather(*clients)
    assert seen == {1, 2}


@pytest.mark.parametrize("count", [1, 150_000], ids=["short", "in a worker's memory"])
async def test_swap_while_a_body_arrives_is_not_noticed(shared: LocalApi, count: int) -> None:
    model_id = f"slow-{count}"
    await load_adder(shared, model_id, 1)
    old, swapped = shared.worker(model_id), asyncio.Event()
    tensor = {
        "name": "x",
        "shape": [count],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 4 * count},
    }
    head, data = json.dumps({"inputs": [tensor]}).encode(), np.ones(count, "<f4").tobytes()

    async def body() -> AsyncIterator[bytes]:
        yield head + data[:2]
        await swapped.wait()
        yield data[2:]

    fields = {"Inference-Header-Content-Length": str(len(head)), "Content-Length": str(len(head + data))}
    running = asyncio.create_task(shared.post(f"/v2/models/{model_id}/infer", data=body(), headers=fields))
    await until(lambda: count == 1 or old.tensor_memory.requests.regions == 1)
    await load_adder(shared, model_id, 2)
    await asyncio.wait({old.ended})
    swapped.set()
    assert (await running).json["outputs"][0]["data"] == [3] * count


async def test_bodies_beyond_the_budget_are_refused(
    start: Start, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http.bodies.MAX_BODIES_BYTES", 2**20)
    monkeypatch.setattr("server.http.bodies.LARGEST_BODIES", 0)
    save(models.add(), repository, "m")
    api, more, body = await start(), asyncio.Event(), json.dumps({"inputs": [ONE]}).encode()
    await api.load("m")

    async def infer(data: object, subject: str = "alice") -> Answer:
        return await api.post("/v2/models/m/infer", data=data, subject=subject)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield b" " * 2**16

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 2**19
        await more.wait()
        yield body

    for _ in range(2):
        assert (await infer(endless())).refusal == (503, "bodies_full")
        await until(lambda: api.app[BODIES].taken_bytes == 0)
    half = asyncio.create_task(infer(slow()))  # of the budget, which one subject may have
    await until(lambda: api.app[BODIES].taken_bytes == 2**19)
    large = body.replace(b'"data": [', b'"data": [' + b" " * 2**18)
    assert [(await infer(large, subject)).status for subject in ("alice", "bob")] == [503, 200]
    more.set()
    assert (await half).refusal == (503, "bodies_full")
    await until(lambda: api.app[BODIES].taken_bytes == 0)
    assert (await infer(body)).status == 200


async def test_json_part_has_the_limit_of_a_body(shared: LocalApi) -> None:
    await load_adder(shared, "headed", 1)
    answered = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b" " * 2**16
        await answered.wait()

    length = 64 * 2**20 + 1
    fields = {"Inference-Header-Content-Length": str(length), "Content-Length": str(length + 2**20)}
    answer = await shared.post("/v2/models/headed/infer", data=body(), headers=fields)
    answered.set()
    assert answer.refusal == (413, "body_too_large")
    assert "not be larger than 67108864 bytes; the server's --max-request-size" in answer.json["error"]


async def test_request_above_the_default_limit_is_taken_where_allowed(start: Start, repository: Path) -> None:
    """A picture of 4K in FP32 has 99.5 MB."""
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    shape = [1, 3, 2160, 3840]
    x, y = models.value("x", models.FLOAT, shape), models.value("y", models.FLOAT, [1, 3])
    save(models.model([node], [x], [y], [axes]), repository, "picture")
    async with local_server(repository.parent) as small:
        job = await small.failed_load("picture")
        assert job["error"]["code"] == "invalid_model"
        assert job["error"]["message"].endswith("start the server with --max-request-size=95MiB")
    api = await start(max_request_size="95MiB")
    await api.load("picture")
    data = np.full(shape, 2, "<f4").tobytes()
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    fields = {"Inference-Header-Content-Length": str(len(head))}
    answer = await api.post("/v2/models/picture/infer", data=io.BytesIO(head + data), headers=fields)
    assert answer.json["outputs"][0]["data"] == [2, 2, 2]


async def test_turns_of_a_subject_leave_time_to_others() -> None:
    bodies, seen = Bodies(2**20), list[str]()

    async def decode(subject: str) -> None:
        async with bodies.turn(subject):
            seen.append(subject)
            time.sleep(0.05)  # noqa: ASYNC251 -- it blocks the event loop, as decoding does

    decoding = asyncio.gather(*map(decode, ("alice", "alice", "bob", "alice")))
    while not decoding.done():
        seen.append("-")
        await asyncio.sleep(0.01)
    turns = "".join(each[0] for each in seen).split("a")
    assert len(turns) == 4
    assert all("-" in between for between in turns[1:3])
    assert turns[1].startswith("b")


async def test_data_that_a_worker_does_not_read_is_bounded(
    shared: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.process.worker.UNSENT_REQUESTS", 0)
    monkeypatch.setattr("runtime.process.sharedmemory.SHARED_BYTES", 2**20)  # the socket takes it
    save(models.identity(), shared.config.repository, "unread")
    await shared.load("unread")
    pid = shared.worker("unread").pid
    os.kill(pid, signal.SIGSTOP)
    tensor = {"name": "x", "shape": [2**20], "datatype": "FP32", "parameters": {"binary_data_size": 2**22}}
    head = json.dumps({"inputs": [tensor], "parameters": {"timeout": 20_000}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    for expected in (TIMEOUT, QUEUE_FULL):
        body = io.BytesIO(head + bytes(2**22))
        assert (await shared.post("/v2/models/unread/infer", data=body, headers=headers)).refusal == expected
    os.kill(pid, signal.SIGCONT)
    await when(lambda: shared.infer("unread", ONE), lambda seen: seen.status == 200)
