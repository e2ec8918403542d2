"""Inference under pressure: body budget, long bodies, swaps during a body, workers that do not read.

Long JSON is read in a process of its own, however hostile it is, and within the body budget.
"""

import asyncio
import io
import json
import math
import os
import re
import signal
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from support import models
from support.history import PLAIN
from support.http import ONE, Answer, Json, LocalApi, local_server, when
from support.models import save
from support.workers import fork_server_of, until

from runtime.errors import InvalidInput
from runtime.memory import MemoryLimit
from runtime.memoryplan import plan_memory
from runtime.requestjson import LONG_JSON_BYTES, assemble, decode_json, describe
from runtime.wire import JsonRead, MalformedFrame
from runtime.worker.main import find_address
from server.appkeys import BODIES, POOL
from server.config import parse_size
from server.http.bodies import Bodies

Start = Callable[..., Awaitable[LocalApi]]

LONG = LONG_JSON_BYTES + 1
HEAD = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["'
LARGEST = "95MiB"
LENGTH = "Inference-Header-Content-Length"
TIMEOUT, QUEUE_FULL = (504, "inference_timeout"), (503, "inference_queue_full")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application that takes larger requests than by default, with `y = x` of numbers and of strings."""
    async with local_server(tmp_path_factory.mktemp("shared"), max_request_size=LARGEST) as api:
        for model_id, model in (("numbers", models.identity()), ("strings", models.strings())):
            api.save(model, model_id)
            await api.load(model_id)
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
    more, body = asyncio.Event(), json.dumps({"inputs": [ONE]}).encode()

    async def infer(data: object, subject: str = "alice") -> Answer:
        return await shared.post("/v2/models/numbers/infer", data=data, subject=subject)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield b" " * 2**16

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 2**19
        await more.wait()
        yield body

    for _ in range(2):
        too_large = await infer(endless())
        assert too_large.refusal == (413, "body_too_large")
        assert "one subject may have 524288 for requests" in too_large.json["error"]
        await until(lambda: bodies.taken_bytes == 0)
    half = asyncio.create_task(infer(slow()))  # of the budget, which one subject may have
    await until(lambda: bodies.taken_bytes == 2**19)

    async def large() -> AsyncIterator[bytes]:
        yield b" " * 2**17
        await until(lambda: bodies.taken_bytes > 2**19)  # a body that comes with its head is not counted
        yield body

    assert [(await infer(large(), subject)).status for subject in ("alice", "bob")] == [503, 200]
    more.set()
    assert (await half).refusal == (413, "body_too_large")
    await until(lambda: bodies.taken_bytes == 0)
    assert (await infer(body)).status == 200


async def test_answers_beyond_the_budget_are_refused(
    shared: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = shared.app[BODIES]
    monkeypatch.setattr(bodies, "_max_bytes", 2**22)
    monkeypatch.setattr(bodies.answer_room, "max_bytes", 2**22)
    save(models.filled(), shared.config.repository, "filled")
    await shared.load("filled")

    async def fill(count: int) -> Answer:
        tensor = {"name": "count", "datatype": "INT64", "shape": [1], "data": [count]}
        binary = {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
        return await shared.post("/v2/models/filled/infer", json={"inputs": [tensor], **binary})

    too_long = await fill(2**20 + 1)
    assert too_long.refusal == (400, "inference_failed")
    assert "the outputs have 4194308 bytes, and one answer may take 4194304" in too_long.json["error"]
    bodies.add("bob", 2**21)
    assert (await fill(2**20)).refusal == (503, "bodies_full")
    bodies.add("bob", -(2**21))
    assert (await fill(2**20)).status == 200
    await until(lambda: bodies.taken_bytes == bodies.answer_room.taken_bytes == 0)


async def test_json_part_has_the_limit_of_a_body(shared: LocalApi) -> None:
    answered = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b" " * 2**16
        await answered.wait()

    length = parse_size(LARGEST) + 1
    fields = {LENGTH: str(length), "Content-Length": str(length + 2**20)}
    answer = await shared.post("/v2/models/numbers/infer", data=body(), headers=fields)
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


def bodies_of(limit_bytes: int, max_request_bytes: int) -> Bodies:
    return Bodies(plan_memory(MemoryLimit(limit_bytes, "cgroup v2"), None, max_request_bytes))


@pytest.mark.parametrize(
    ("limit_bytes", "largest", "budget"),
    [
        pytest.param(64 * 2**30, 2**20, 2**30, id="usual"),
        pytest.param(64 * 2**30, 2**27, 2**31, id="sixteen of the largest"),
        pytest.param(4 * 2**30, 2**26, 2**29, id="an eighth of a small container"),
        pytest.param(2**30, 2**26, 2**27, id="two of the largest"),
    ],
)
def test_subject_has_half_of_the_budget(limit_bytes: int, largest: int, budget: int) -> None:
    rooms = [bodies_of(limit_bytes, largest).has_room("alice", budget // 2 + more) for more in (0, 1)]
    assert rooms == [True, False]


async def test_turns_of_a_subject_leave_time_to_others() -> None:
    bodies, seen = bodies_of(2**30, 2**20), list[str]()

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
    seen = list[object]()
    async with asyncio.timeout(60):
        while QUEUE_FULL not in seen:  # on a busy machine the time may be over before the data are sent
            body = io.BytesIO(head + bytes(2**22))
            seen.append((await shared.post("/v2/models/unread/infer", data=body, headers=headers)).refusal)
    assert set(seen[:-1]) == {TIMEOUT}
    assert 0 < shared.worker("unread")._data.unsent_bytes < 2**23  # one request and no second one
    os.kill(pid, signal.SIGCONT)
    await when(lambda: shared.infer("unread", ONE), lambda seen: seen.status == 200)


async def infer(api: LocalApi, model_id: str, body: bytes, **headers: str) -> Answer:
    return await api.post(f"/v2/models/{model_id}/infer", data=io.BytesIO(body), headers=headers)


async def test_long_json_is_answered_as_a_short_one(shared: LocalApi) -> None:
    one = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1 / 7, float("-inf")]}
    request = {"id": "é", "parameters": {"own": 1}, "inputs": [one], "outputs": [{"name": "y"}]}
    text = json.dumps(request).replace(", -Inf", f",{' ' * LONG}-Inf").encode()
    output = {**one, "name": "y", "data": [float(np.float32(1 / 7)), float("-inf")]}
    expected = {"model_name": "numbers", "model_version": "1", "id": "é", "outputs": [output]}
    for fields in ({}, {LENGTH: str(len(text))}):  # JSON alone, of a body that could have more
        assert (await infer(shared, "numbers", text, **fields)).json == expected
    assert shared.app[BODIES].taken_bytes == 0


async def test_reading_counts_in_the_body_budget(shared: LocalApi) -> None:
    spaced = json.dumps({"inputs": [ONE]}).replace("[1]}", f"[1{' ' * LONG}]}}").encode()
    bodies = shared.app[BODIES]
    bodies.add("alice", bodies._max_bytes // 2 - 3 * LONG)  # room for the body, and not for reading it
    assert (await infer(shared, "numbers", spaced)).refusal == (503, "bodies_full")
    bodies.add("alice", 3 * LONG - bodies._max_bytes // 2)
    assert (await infer(shared, "numbers", spaced)).status == 200


HOSTILE: Mapping[str, tuple[bytes, bytes, str]] = {
    "nothing": (b"", b" ", "the body is not an inference request"),
    "brackets": (HEAD[:-2], b"[", "the body is not an inference request"),
    "objects": (b'{"inputs": [', b"{},", "inputs; no more are allowed"),
    "members": (b"{", b'"x": 1,', "the body is not an inference request"),
    "names": (b'{"inputs": [{"name": "', b"n", "the body is not an inference request"),
    "escapes": (HEAD, rb"\u003a", "the body is not an inference request"),
}


async def test_hostile_text_is_refused_and_another_subject_is_answered(
    shared: LocalApi, subtests: pytest.Subtests
) -> None:
    fine = {"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    for name, (head, repeated, reason) in HOSTILE.items():
        with subtests.test(name):
            body = head + repeated * (LONG // len(repeated) + 1)
            refused = asyncio.ensure_future(infer(shared, "strings", body))
            other = await shared.post("/v2/models/strings/infer", json={"inputs": [fine]}, subject="bob")
            assert other.status == 200
            assert (await refused).refusal == (400, "invalid_input")
            assert reason in (await refused).json["detail"]
            assert shared.app[BODIES].taken_bytes == 0
            assert not [worker for worker in shared.app[POOL]._workers if worker.worker_id == "JSON"]


def read(text: bytes) -> JsonRead:
    return describe(text, find_address)


@PLAIN
@given(
    data=st.recursive(st.integers() | st.text(), st.lists, max_leaves=9).map(json.dumps),
    count=st.integers(0, 3),
    padding=st.text(" \n", max_size=3),
    ends=st.sampled_from(("", "}", "x")),
)
def test_text_read_elsewhere_is_the_one_read_here(data: str, count: int, padding: str, ends: str) -> None:
    one = f'{{"name":{padding}"é","shape":[2], "data":{padding}{data}{padding},"datatype":"FP32"}}'
    bare = '{"name": "b", "shape": [], "datatype": "FP32", "parameters": {"binary_data_size": 4}}'
    text = f'{{"id":"1","inputs":[{",".join([*[one] * count, bare])}]}}{ends}'.encode()
    if ends:
        with pytest.raises(InvalidInput) as here:
            decode_json(text)
        with pytest.raises(InvalidInput, match=re.escape(str(here.value))):
            assemble(text, read(text))
    else:
        expected, found = decode_json(text), assemble(text, read(text))
        assert [bytes(each.data) for each in found.inputs] == [bytes(each.data) for each in expected.inputs]
        assert (found.id, found.inputs[-1].parameters) == (expected.id, expected.inputs[-1].parameters)


@pytest.mark.parametrize("element", [b"NaN,", b"-Infinity,"])
def test_nan_is_read_within_two_copies_of_the_text(element: bytes) -> None:
    text = TEXT.replace(b"[1]}", b"[" + element * (LONG // len(element)) + b"1]}")
    tracemalloc.start()
    try:
        assert not read(text).problem
        assert tracemalloc.get_traced_memory()[1] < 2.1 * len(text)  # `reading_bytes` has room for no more
    finally:
        tracemalloc.stop()


TEXT = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}'


@pytest.mark.parametrize(
    "untrue",
    [
        JsonRead(b"{", ()),
        JsonRead(b"\xff", ()),
        JsonRead(b'{"inputs":[]}', ((0, 1),)),
        JsonRead(read(TEXT).head, ()),
        JsonRead(read(TEXT).head, ((0, len(TEXT) + 1),)),
        JsonRead(read(TEXT).head, ((2**62, 1),)),
    ],
)
def test_untrue_words_of_the_reading_process_are_refused(untrue: JsonRead) -> None:
    with pytest.raises(MalformedFrame):
        assemble(TEXT, untrue)


async def test_end_of_the_fork_server_is_no_mistake_of_the_client(start: Start) -> None:
    api = await start()
    api.save(models.strings(), "strings")
    await api.load("strings")
    pool = api.app[POOL]
    asked = asyncio.ensure_future(infer(api, "strings", HEAD + b":" * (16 * 2**20)))
    await until(lambda: any(worker.worker_id == "JSON" for worker in pool._workers))
    os.kill(fork_server_of(pool).pid, signal.SIGKILL)
    assert (await asked).refusal == (503, "fork_server_unavailable")
