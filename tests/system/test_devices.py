"""The contract of a device, from the first load to a replay, for real providers.

`DEVICE=cuda:0 pytest tests/system/test_devices.py` holds another device to it; by default it is OpenVINO's
on the processor. `SOAK=all` repeats loads and unloads 200 times.
"""

import asyncio
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.http as triton
from onnx import ModelProto, helper
from support import models
from support.fleet import of_both
from support.http import Api, Json, when
from support.models import save
from support.openvino import openvino_environment
from support.servers import APART, Server, address, bearer, events, serving, verified
from support.workers import computing, until

from events.types import ModelLoaded, ModelUnloaded
from features.devices.names import CPU, provider_of
from runtime.memory import tree_bytes
from server.config import Config

pytestmark = pytest.mark.asyncio(loop_scope="module")
DEVICE = os.environ.get("DEVICE", "openvino:cpu")
ON_DEVICE: Json = {"devices": [DEVICE]}
CYCLES = of_both(short=3, long=200)
MEMORY_GOAL = 1.02
"""Memory of the device, or of the processes where it has none of its own, after the cycles ÷ before."""
TOLERANCE = 1e-3
"""Of outputs, as a share of the largest: providers order sums differently, and CUDA may compute in TF32."""
MEGABYTES = 20
COLUMNS = 790
"""Inputs of `models.weights(MEGABYTES)`."""
MANY_TRIPS: Json = {"name": "trips", "shape": [], "datatype": "INT64", "data": [2**31 - 1]}
"""Minutes of computing: OpenVINO has no more trips, and does not stop when it is told to."""
ROW: Json = {"name": "x", "shape": [1, COLUMNS], "datatype": "FP32", "data": [0.5] * COLUMNS}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a server that has `DEVICE`."""
    if provider_of(DEVICE) != "openvino":
        return {"LOADLEDGER_VISIBLE_DEVICES": DEVICE}
    return openvino_environment(tmp_path_factory.mktemp("openvino"))


class Running(NamedTuple):
    """A server with `DEVICE`, which tests share, and its directories."""

    server: Server
    config: Config

    async def taken_bytes(self) -> int:
        """Return the memory in use of the device, or of the processes where it has none of its own."""
        device = await device_of(self.server.api)
        if device["total_bytes"] is None:
            return tree_bytes(self.server.pid)
        used: int = device["total_bytes"] - device["free_bytes"]
        return used


def with_models(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a repository with the versions 1 and 2 of `a`, and `b`: each has 20 MB of weights of its own."""
    folder = tmp_path_factory.mktemp("device")
    config = Config(repository=folder / "repository", data=folder / "data")
    for seed, (model_id, version) in enumerate((("a", 1), ("a", 2), ("b", 1))):
        save(models.weights(MEGABYTES, seed=seed), config.repository, model_id, version)
    return config


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Running]:
    """A server with `DEVICE`; each test leaves no model on it, and it stops with a sound ledger."""
    config = with_models(tmp_path_factory)
    save(half_on_device(), config.repository, "half")
    save(models.counting_loop(), config.repository, "loop")
    async with serving(config, "--limit-management=off", environment=environment) as server:
        yield Running(server, config)
        assert await server.stop() == 0
    verified(config)


def half_on_device() -> ModelProto:
    """Return a model whose second node has an operator that no provider but the CPU's has."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Normalizer", ["r"], ["y"], domain="ai.onnx.ml", norm="L1"),
    ]
    x, y = (models.value(name, models.FLOAT, [None, 4]) for name in "xy")
    return models.model(nodes, [x], [y])


async def answer(api: Api, model_id: str) -> list[float]:
    """Return the answer of a model with weights to one row."""
    found = await api.infer(model_id, ROW)
    assert found.status == 200, found.body
    data: list[float] = found.json["outputs"][0]["data"]
    return data


async def device_of(api: Api) -> Json:
    """Return the device, as the server shows it."""
    found = (await api.get("/api/v1/resources")).json["devices"]
    return next(each for each in found if each["device"] == DEVICE)


def assert_close(found: Sequence[float], expected: Sequence[float]) -> None:
    largest = np.max(np.abs(expected))
    assert largest > 0
    assert np.max(np.abs(np.subtract(found, expected))) <= TOLERANCE * largest


async def test_load_infer_swap_and_unload_on_device(running: Running) -> None:
    server, config = running
    await server.api.load("a", version=1)
    on_cpu = await answer(server.api, "a")
    await server.api.load("a", version=1, **ON_DEVICE)
    assert_close(await answer(server.api, "a"), on_cpu)
    model = await server.api.model("a")
    assert [(use["device"], use["provider"]) for use in model["devices"]] == [(DEVICE, provider_of(DEVICE))]
    assert (await device_of(server.api))["models"] == 1

    is_swapped = threading.Event()
    asked = asyncio.create_task(asyncio.to_thread(ask_triton, server, is_swapped))
    await server.api.load("a", version=2, **ON_DEVICE)
    is_swapped.set()
    await asked
    model = await server.api.model("a")
    assert (model["version"], model["devices"][0]["device"]) == (2, DEVICE)
    await server.api.unload("a")
    await when(lambda: device_of(server.api), lambda device: device["models"] == 0)
    facts = [event.data for event in await events(config) if event.model_id == "a"]
    assert not any(fact.unreturned_bytes for fact in facts if isinstance(fact, ModelUnloaded))
    uses = [fact.targets[0] for fact in facts if isinstance(fact, ModelLoaded) and fact.targets]
    assert all(use.nodes > 0 and use.version for use in uses)


def ask_triton(server: Server, is_swapped: threading.Event) -> None:
    """Infer with Triton's client, again and again until the version is swapped, and once more."""
    with triton.InferenceServerClient(address(server)) as client:
        row = triton.InferInput("x", [1, COLUMNS], "FP32")
        row.set_data_from_numpy(np.full((1, COLUMNS), 0.5, np.float32))
        while not is_swapped.is_set():
            client.infer("a", [row], headers=bearer(server, "infer"))
        client.infer("a", [row], headers=bearer(server, "infer"))


async def test_nodes_the_device_lacks_are_refused_or_recorded(running: Running) -> None:
    api = running.server.api
    refused = await api.failed_load("half", **ON_DEVICE)
    assert refused["error"]["code"] == "fallback_refused"
    assert "Normalizer" in refused["error"]["message"]
    await api.load("half", **ON_DEVICE, fallback=CPU)
    uses = (await api.model("half"))["devices"]
    assert [use["device"] for use in uses] == [DEVICE, CPU]
    missing = await api.post("/api/v1/models/half/load", json={"devices": ["abacus:0"]})
    assert missing.refusal == (409, "device_unavailable")
    assert DEVICE in missing.json["detail"]
    await api.unload("half")


async def test_killed_worker_and_stuck_worker_leave_the_device(running: Running) -> None:
    server = running.server
    await server.api.load("loop", **ON_DEVICE, fallback=CPU)
    before = await server.api.model("loop")
    os.kill(server.worker(), signal.SIGKILL)
    after = await when(
        lambda: server.api.model("loop"),
        lambda model: model["state"] == "loaded" and model["job_id"] != before["job_id"],
    )
    assert after["devices"][0]["device"] == DEVICE
    is_computing = computing(server.worker())
    endless = asyncio.create_task(server.api.infer("loop", MANY_TRIPS))
    await until(is_computing)
    await server.api.unload("loop", force=True)
    assert (await endless).status >= 500
    await when(lambda: device_of(server.api), lambda device: device["models"] == 0)


async def test_loads_and_unloads_on_device_leave_its_memory_flat(running: Running) -> None:
    api = running.server.api

    async def cycle() -> None:
        await api.load("a", version=1, **ON_DEVICE)
        await answer(api, "a")
        await api.unload("a")

    await cycle()
    before = await running.taken_bytes()
    for _ in range(CYCLES):
        await cycle()
    lost_each_time = CYCLES * MEGABYTES * 1_000_000
    most = of_both(short=before + lost_each_time // 2, long=before * MEMORY_GOAL)
    assert await running.taken_bytes() <= most


class Restarted(NamedTuple):
    """A server on whose device one and a half of `a` have room, after one that was killed.

    Attributes:
        server: the second one.
        answered: by `a` on the device, before the first was killed.
    """

    server: Server
    answered: list[float]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def restarted(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Restarted]:
    """A server after one that measured `a` and `b`, and was killed when `a` was loaded."""
    config = with_models(tmp_path_factory)
    async with serving(config, APART, environment=environment) as server:
        await server.api.load("b", **ON_DEVICE)
        await server.api.unload("b")
        await server.api.load("a", version=1, **ON_DEVICE)
        answered = await answer(server.api, "a")
        await server.kill()
    loads = [event.data for event in await events(config) if isinstance(event.data, ModelLoaded)]
    needs = [data.targets[0].memory_bytes or data.peak_memory_bytes for data in loads if data.targets]
    room_bytes = max(needs) * 3 // 2
    save(models.weights(room_bytes // 1_000_000 + MEGABYTES), config.repository, "large")
    options = (f"--device-memory={DEVICE}={room_bytes}", "--evict=idle", "--min-residency-s=0")
    async with serving(config, APART, *options, environment=environment) as server:
        yield Restarted(server, answered)
        assert await server.stop() == 0
    verified(config)


async def test_killed_server_restores_model_on_device(restarted: Restarted) -> None:
    api = restarted.server.api
    model = await api.model_when("a", state="loaded")
    assert_close(await answer(api, "a"), restarted.answered)
    assert model["devices"][0]["device"] == DEVICE


async def test_models_beyond_device_memory_evict_each_other(restarted: Restarted) -> None:
    api = restarted.server.api
    for model_id, other in (("a", "b"), ("b", "a"), ("a", "b")):
        await api.load(model_id, version=1, **ON_DEVICE)
        await api.model_when(other, state="unloaded")
        assert (await device_of(api))["models"] == 1
    await api.load("b")  # the CPU has room beside it
    assert (await api.model("a"))["state"] == "loaded"


async def test_model_that_exhausts_device_fails_with_the_numbers(restarted: Restarted) -> None:
    api = restarted.server.api
    failed = await api.failed_load("large", **ON_DEVICE)
    assert failed["error"]["code"] == "insufficient_memory"
    needed = rf"it needs [\d,]+ MB \(estimated from its files\) of memory .*{DEVICE}.* [\d,.]+ MB in all"
    assert re.search(needed, failed["error"]["message"]), failed["error"]
    await api.load("large", devices=[DEVICE, CPU])  # the second has room
    assert (await api.model("large")).get("devices") is None
