"""Where an inference's time goes, as statistics and `/metrics` show it: queue, compute and transport."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families as read_metrics
from support import models
from support.http import ENDLESS, ONE, LocalApi, local_server
from support.models import save
from support.workers import computing, until

from events.types import ModelLoaded
from server.appkeys import BODIES
from server.observability.metrics import SCRAPES

PARTS = ("queue", "compute_input", "compute_infer", "compute_output", "transport")
STAGES = ("queue", "input", "infer", "output", "transport")
FLOATS = 1_000_000
ROUNDS = 5
"""Requests of others between two moments, to tell their distance from noise."""


@dataclass(frozen=True)
class Spent:
    """Nanoseconds of a model's answered inferences."""

    success: int
    queue: int
    compute_infer: int
    transport: int


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application with on-demand loads."""
    async with local_server(tmp_path_factory.mktemp("shared"), on_demand="on") as api:
        yield api


async def spent(api: LocalApi, model_id: str) -> Spent:
    """Return where the time of a model went, which its statistics divide without a rest; so does /metrics."""
    answer = await api.get(f"/v2/models/{model_id}/stats", roles=("audit",))
    stats = answer.json["model_stats"][0]["inference_stats"]
    assert {stats[name]["count"] for name in PARTS} == {stats["success"]["count"]}
    assert sum(stats[name]["ns"] for name in PARTS) == stats["success"]["ns"]
    api.app[SCRAPES]._kept_until_s.clear()
    text = (await api.get("/metrics")).body.decode()
    seconds = {
        sample.labels["stage"]: sample.value
        for family in read_metrics(text)
        for sample in family.samples
        if sample.name == "loadledger_inference_stage_seconds_total" and sample.labels["model"] == model_id
    }
    assert seconds == {stage: stats[name]["ns"] / 1e9 for stage, name in zip(STAGES, PARTS, strict=True)}
    return Spent(*(stats[name]["ns"] for name in ("success", "queue", "compute_infer", "transport")))


async def pass_some_time(api: LocalApi) -> None:
    """Have the server work for others meanwhile."""
    for _ in range(ROUNDS):
        await api.get("/v2")


async def test_wait_for_another_request_is_queue_time(shared: LocalApi) -> None:
    save(models.counting_loop(), shared.config.repository, "busy")
    await shared.load("busy")
    worker = shared.worker("busy")
    is_busy = computing(worker.pid)
    first = asyncio.create_task(shared.infer("busy", ENDLESS))
    await until(lambda: worker.in_flight == 1 and is_busy())
    second = asyncio.create_task(shared.infer("busy", {**ENDLESS, "data": [1]}))
    await until(lambda: worker.in_flight == 2)
    queued_ns = time.monotonic_ns()
    await pass_some_time(shared)
    waited_ns = time.monotonic_ns() - queued_ns
    first.cancel()
    assert (await second).status == 200
    seen = await spent(shared, "busy")
    assert waited_ns <= seen.queue <= seen.success
    assert seen.compute_infer > 0


async def test_reading_of_a_large_body_is_transport_time(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "large")
    await shared.load("large")
    data, bodies = bytes(4 * FLOATS), shared.app[BODIES]
    receiving_ns = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal receiving_ns
        yield data[: len(data) // 2]
        await until(lambda: bodies.taken_bytes > 0)
        begun_ns = time.monotonic_ns()
        await pass_some_time(shared)
        receiving_ns = time.monotonic_ns() - begun_ns
        yield data[len(data) // 2 :]

    raw = {"Inference-Header-Content-Length": "0"}
    answer = await shared.post("/v2/models/large/infer", data=pieces(), headers=raw, roles=("infer",))
    assert answer.status == 200
    seen = await spent(shared, "large")
    assert receiving_ns < seen.transport < seen.success
    assert seen.queue < seen.transport


async def test_wait_for_a_load_on_demand_is_queue_time(shared: LocalApi) -> None:
    save(models.add(), shared.config.repository, "cold")
    assert (await shared.infer("cold", ONE)).status == 200
    [loaded] = [event.data for event in await shared.events("cold") if isinstance(event.data, ModelLoaded)]
    seen = await spent(shared, "cold")
    assert loaded.durations.loading_us * 1000 <= seen.queue <= seen.success


async def test_answer_counts_before_its_client_has_received_it(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "unread")
    await shared.load("unread")
    host, port = shared.client.server.host, shared.client.server.port
    reader, writer = await asyncio.open_connection(host, port, limit=1024)
    body = bytes(4 * FLOATS)
    head = (
        "POST /v2/models/unread/infer HTTP/1.1", "Host: a", "Connection: close",
        f"Content-Length: {len(body)}", "Inference-Header-Content-Length: 0",
        f"Authorization: Bearer {shared.token('infer')}", "", "",
    )  # fmt: skip
    writer.write("\r\n".join(head).encode() + body)
    await reader.readexactly(1)
    assert (await spent(shared, "unread")).success > 0
    assert len(await reader.read()) > len(body)
    writer.close()
    await writer.wait_closed()
