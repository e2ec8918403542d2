"""Queues of inferences: a model's own limit, priorities, and the time and the bodies of what waits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from support import models
from support.http import ENDLESS, ONE, Answer, Json, LocalApi, local_server
from support.models import save, save_bytes
from support.workers import until

from features.ondemand.app import DEMAND
from runtime.process.worker import Worker
from runtime.repository import DEFAULTS_FILE
from server.appkeys import BODIES, CONSUMER
from server.config import Config

QUEUE_FULL, TIMEOUT = (503, "inference_queue_full"), (504, "inference_timeout")
FAST, SLOW = "/v2/models/{}/infer", "/v2/models/%6C{}/infer"
"""The fast path, and the router's, of a model whose name begins with `l`."""
LONG = 2**17
"""Bytes of a body that do not come with its head."""

Send = Callable[..., asyncio.Task[Answer]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application that loads models on demand, with `numbers` loaded, which is `y = x`."""
    async with local_server(tmp_path_factory.mktemp("shared"), on_demand="on") as api:
        api.save(models.identity(), "numbers")
        await api.load("numbers")
        yield api


@pytest_asyncio.fixture(loop_scope="module")
async def send(shared: LocalApi) -> AsyncIterator[Send]:
    """A function that begins an inference; the test's end ends it, so that no later test counts it."""
    tasks = list[asyncio.Task[Answer]]()

    def begin(model_id: str, inputs: Json = ENDLESS, path: str = FAST, **more: Any) -> asyncio.Task[Answer]:
        request = {"inputs": [inputs], **more}
        tasks.append(asyncio.create_task(shared.post(path_of(model_id, path), json=request)))
        return tasks[-1]

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await until(lambda: not any(worker.in_flight for worker in workers_of(shared)))


def workers_of(api: LocalApi) -> list[Worker]:
    return [worker for load in api.app[CONSUMER].loads.values() for worker in load.alive_workers]


def path_of(model_id: str, path: str) -> str:
    return path.format(model_id if path is FAST else model_id[1:])


def trips(count: int) -> Json:
    return {**ENDLESS, "data": [count]}


async def load_loop(api: LocalApi, model_id: str, **parameters: Any) -> None:
    save(models.counting_loop(), api.config.repository, model_id)
    await api.load(model_id, **parameters)


def in_flight(api: LocalApi, model_id: str) -> int:
    return api.worker(model_id).in_flight


async def until_running(api: LocalApi, model_id: str) -> None:
    """Wait until a worker computes, for longer than for reading a request."""
    worker = api.worker(model_id)
    before_s = worker.cpu_s
    await until(lambda: worker.cpu_s > before_s + 0.05)


async def refuse_head(api: LocalApi, path: str) -> bytes:
    """Send the head of an inference whose body never comes; returns the answer's first line."""
    reader, writer = await asyncio.open_connection(api.client.server.host, api.client.server.port)
    token = f"Authorization: Bearer {api.token('infer')}"
    head = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Length: {LONG}", token, "", ""]
    writer.write("\r\n".join(head).encode())
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return line


@pytest.mark.parametrize("path", [FAST, SLOW])
async def test_inference_beyond_the_queue_is_refused_before_its_body(
    shared: LocalApi, send: Send, path: str
) -> None:
    await load_loop(shared, "loop", max_queue=2)
    position = shared.position
    for _ in range(2):
        send("loop", path=path)
    await until(lambda: in_flight(shared, "loop") == 2)
    refused = await send("loop", path=path)
    assert refused.refusal == QUEUE_FULL
    assert "2 inferences of model 'loop' are queued or running" in refused.json["detail"]
    assert "max_queue" in refused.json["detail"]
    assert (await refuse_head(shared, path_of("loop", path))).split()[1] == b"503"
    assert shared.position == position


async def test_queue_changes_without_new_workers(shared: LocalApi, send: Send) -> None:
    await load_loop(shared, "changed", max_queue=1)
    worker, running = shared.worker("changed"), send("changed")
    await until(lambda: in_flight(shared, "changed") == 1)
    job = await shared.load("changed", max_queue=2)
    assert job["parameters"]["max_queue"] == 2
    assert (await shared.types("changed"))[-2:] == ["LoadRequested", "ModelSettingsChanged"]
    send("changed")
    await until(lambda: in_flight(shared, "changed") == 2)
    await shared.load("changed", max_queue=None)
    send("changed")
    await until(lambda: in_flight(shared, "changed") == 3)
    assert shared.worker("changed") is worker
    assert not running.done()
    assert Config(repository=shared.config.repository, data=shared.config.data).inference_queue == 1024


async def test_queue_of_a_model_is_that_of_its_load_on_demand(shared: LocalApi, send: Send) -> None:
    folder = save_bytes(models.endless_load(), shared.config.repository, "later").parent
    (folder / DEFAULTS_FILE).write_text("max_queue = 2\n")
    demand = shared.app[DEMAND]
    first = send("later", ONE)
    await shared.model_when("later", state="loading")
    send("later", ONE)
    await until(lambda: demand.count_waiting("later") == 2)
    refused = await send("later", ONE)
    assert refused.refusal == QUEUE_FULL
    assert "2 inferences of model 'later' wait until it is loaded" in refused.json["detail"]
    assert (await refuse_head(shared, FAST.format("later"))).split()[1] == b"503"
    assert not first.done()
    await shared.unload("later", force=True)


@pytest.mark.parametrize("path", [FAST, SLOW])
async def test_higher_priority_runs_before_what_was_queued(shared: LocalApi, send: Send, path: str) -> None:
    model_id = f"levels-{'fast' if path is FAST else 'slow'}"
    await load_loop(shared, model_id, priority_levels=3, default_priority_level=2)
    running = send(model_id, path=path, parameters={"priority": 3})
    await until_running(shared, model_id)
    # In this order: the lowest, without a level, a level that the model does not have, and the highest.
    last = send(model_id, path=path, parameters={"priority": 3})
    await until(lambda: in_flight(shared, model_id) == 2)
    second = send(model_id, path=path)
    await until(lambda: in_flight(shared, model_id) == 3)
    unknown = send(model_id, trips(5), path, parameters={"priority": 9})
    await until(lambda: in_flight(shared, model_id) == 4)
    first = send(model_id, trips(7), path, parameters={"priority": 1})
    await until(lambda: in_flight(shared, model_id) == 5)
    running.cancel()
    assert (await first).json["outputs"][0]["data"] == [7]
    assert not any(task.done() for task in (second, unknown, last))
    second.cancel()
    assert (await unknown).json["outputs"][0]["data"] == [5]
    assert not last.done()


async def test_priority_is_ignored_without_levels(shared: LocalApi) -> None:
    answer = await shared.infer("numbers", ONE, parameters={"priority": 3})
    assert answer.json["outputs"][0]["data"] == [1]


async def test_timeout_counts_while_the_body_arrives(shared: LocalApi) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b" "
        await asyncio.sleep(0.05)
        yield json.dumps({"inputs": [ONE], "parameters": {"timeout": 40_000}}).encode()

    answer = await shared.post(FAST.format("numbers"), data=body())
    assert answer.refusal == TIMEOUT
    assert "before it could go to the model" in answer.json["detail"]


async def test_timeout_counts_in_the_queue(shared: LocalApi, send: Send) -> None:
    await load_loop(shared, "waits", priority_levels=2)
    send("waits", parameters={"priority": 2})
    await until_running(shared, "waits")
    for priority in (1, 2):
        late = await send("waits", trips(1), parameters={"timeout": 20_000, "priority": priority})
        assert late.refusal == TIMEOUT


@pytest.mark.parametrize("length", [5_000, LONG])
@pytest.mark.parametrize("is_loaded", [True, False])
async def test_bodies_of_what_waits_stay_in_their_budget(
    shared: LocalApi, monkeypatch: pytest.MonkeyPatch, length: int, *, is_loaded: bool
) -> None:
    """The short ones come with their heads."""
    bodies, model_id = shared.app[BODIES], "busy" if is_loaded else f"absent-{length}"
    monkeypatch.setattr(bodies, "_max_bytes", 2 * (4 * length - 1))  # a subject has half of it
    if is_loaded:
        await load_loop(shared, model_id)
    else:
        save_bytes(models.endless_load(), shared.config.repository, model_id)
    body = json.dumps({"inputs": [ENDLESS if is_loaded else ONE]}).encode().ljust(length)
    waiting = list[asyncio.Task[Answer]]()
    for count in range(1, 4):
        waiting.append(asyncio.create_task(shared.post(FAST.format(model_id), data=body)))
        await until(lambda count=count: count_waiting(shared, model_id) == count)  # type: ignore[misc]
        assert bodies.taken_bytes == count * length
    answer = await shared.post(FAST.format(model_id), data=body)
    assert answer.refusal == (503, "bodies_full")
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    await until(lambda: bodies.taken_bytes == 0)
    if not is_loaded:
        await shared.unload(model_id, force=True)


def count_waiting(api: LocalApi, model_id: str) -> int:
    """Return how many inferences of a model wait, for its worker or for its load."""
    waiting = api.app[DEMAND].count_waiting(model_id)
    return waiting or (in_flight(api, model_id) if model_id == "busy" else 0)
