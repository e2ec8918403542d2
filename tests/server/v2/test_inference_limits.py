"""Inference under pressure: body budget, long bodies, swaps during a body, workers that do not read."""

import asyncio
import io
import json
import math
import os
import signal
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
from onnx import helper, numpy_helper
from support import models
from support.http import ONE, Answer, Json, LocalApi, local_server, when
from support.models import save
from support.workers import until

from server.appkeys import BODIES
from server.config import parse_size
from server.http.bodies import LARGEST_BODIES, MAX_BODIES_BYTES, Bodies

LARGEST = "95MiB"
LENGTH = "Inference-Header-Content-Length"
TIMEOUT, QUEUE_FULL = (504, "inference_timeout"), (503, "inference_queue_full")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application that takes larger requests than by default."""
    async with local_server(tmp_path_factory.mktemp("shared"), max_request_size=LARGEST) as api:
        yield api


def binary_head(*shape: int, **members: Json) -> bytes:
    """Return the JSON of a request with one binary tensor."""
    size = {"binary_data_size": 4 * math.prod(shape)}
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "parameters": size}
    return json.dumps({"inputs": [tensor], **members}).encode()


async def load_adder(api: LocalApi, model_id: str, version: int) -> None:
    save(models.add(version), api.config.repository, model_id, version)
    await api.load(model_id, version=version)


@pytest.mark.parametrize("count", [1, 150_000], ids=["short", "in a worker's memory"])
async def test_swap_while_a_body_arrives_is_not_noticed(shared: LocalApi, count: int) -> None:
    model_id = f"slow-{count}"
    await load_adder(shared, model_id, 1)
    old, swapped = shared.worker(model_id), asyncio.Event()
    head, data = binary_head(count), np.ones(count, "<f4").tobytes()

    async def body() -> AsyncIterator[bytes]:
        yield head + data[:2]
        await swapped.wait()
        yield data[2:]

    fields = {LENGTH: str(len(head)), "Content-Length": str(len(head + data))}
    running = asyncio.create_task(shared.post(f"/v2/models/{model_id}/infer", data=body(), headers=fields))
    await until(lambda: count == 1 or old.tensor_memory.requests.regions == 1)
    await load_adder(shared, model_id, 2)
    await asyncio.wait({old.ended})
    swapped.set()
    assert (await running).json["outputs"][0]["data"] == [3] * count


async def test_bodies_beyond_the_budget_are_refused(
    shared: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = shared.app[BODIES]
    monkeypatch.setattr(bodies, "_max_bytes", 2**20)
    await load_adder(shared, "budget", 1)
    more, body = asyncio.Event(), json.dumps({"inputs": [ONE]}).encode()

    async def infer(data: object, subject: str = "alice") -> Answer:
        return await shared.post("/v2/models/budget/infer", data=data, subject=subject)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield b" " * 2**16

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 2**19
        await more.wait()
        yield body

    for _ in range(2):
        assert (await infer(endless())).refusal == (503, "bodies_full")
        await until(lambda: bodies.taken_bytes == 0)
    half = asyncio.create_task(infer(slow()))  # of the budget, which one subject may have
    await until(lambda: bodies.taken_bytes == 2**19)
    large = body.replace(b'"data": [', b'"data": [' + b" " * 2**18)
    assert [(await infer(large, subject)).status for subject in ("alice", "bob")] == [503, 200]
    more.set()
    assert (await half).refusal == (503, "bodies_full")
    await until(lambda: bodies.taken_bytes == 0)
    assert (await infer(body)).status == 200


async def test_json_part_has_the_limit_of_a_body(shared: LocalApi) -> None:
    await load_adder(shared, "headed", 1)
    answered = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b" " * 2**16
        await answered.wait()

    length = parse_size(LARGEST) + 1
    fields = {LENGTH: str(length), "Content-Length": str(length + 2**20)}
    answer = await shared.post("/v2/models/headed/infer", data=body(), headers=fields)
    answered.set()
    assert answer.refusal == (413, "body_too_large")
    assert f"not be larger than {length - 1} bytes; the server's --max-request-size" in answer.json["error"]


async def test_request_above_the_default_limit_is_taken_where_allowed(shared: LocalApi) -> None:
    """A picture of 4K in FP32 has 99.5 MB."""
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    shape = [1, 3, 2160, 3840]
    x, y = models.value("x", models.FLOAT, shape), models.value("y", models.FLOAT, [1, 3])
    save(models.model([node], [x], [y], [axes]), shared.config.repository, "picture")
    await shared.load("picture")
    data = np.full(shape, 2, "<f4").tobytes()
    head = binary_head(*shape)
    answer = await shared.post(
        "/v2/models/picture/infer", data=io.BytesIO(head + data), headers={LENGTH: str(len(head))}
    )
    assert answer.json["outputs"][0]["data"] == [2, 2, 2]


def test_subject_has_half_of_the_budget() -> None:
    large = 2 * MAX_BODIES_BYTES // LARGEST_BODIES
    for largest, budget in ((2**20, MAX_BODIES_BYTES), (large, 2 * MAX_BODIES_BYTES)):
        rooms = [Bodies(largest).has_room("alice", budget // 2 + more) for more in (0, 1)]
        assert rooms == [True, False]


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
    head = binary_head(2**20, parameters={"timeout": 20_000})
    headers = {LENGTH: str(len(head))}
    for expected in (TIMEOUT, QUEUE_FULL):
        body = io.BytesIO(head + bytes(2**22))
        assert (await shared.post("/v2/models/unread/infer", data=body, headers=headers)).refusal == expected
    os.kill(pid, signal.SIGCONT)
    await when(lambda: shared.infer("unread", ONE), lambda seen: seen.status == 200)
