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
from contextlib import asynccontextmanager

import numpy as np
import pytest
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
from features.devices.facts import DeviceUse
from features.devices.names import CPU, provider_of
from runtime.memory import tree_bytes
from server.config import Config

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


@pytest.fixture
def weights(config: Config) -> Config:
    """A repository with the versions 1 and 2 of `a`, and with `b`: each with 20 MB of weights of its own."""
    for seed, (model_id, version) in enumerate((("a", 1), ("a", 2), ("b", 1))):
        save(models.weights(MEGABYTES, seed=seed), config.repository, model_id, version)
    return config


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


async def loaded_uses(config: Config) -> list[Sequence[DeviceUse]]:
    """Return the devices of each load on one, from the ledger."""
    log = await events(config)
    return [event.data.targets for event in log if isinstance(event.data, ModelLoaded) and event.data.targets]


def assert_close(found: Sequence[float], expected: Sequence[float]) -> None:
    largest = np.max(np.abs(expected))
    assert largest > 0
    assert np.max(np.abs(np.subtract(found, expected))) <= TOLERANCE * largest


async def test_load_infer_swap_and_unload_on_device(weights: Config, environment: dict[str, str]) -> None:
    async with serving(weights, environment=environment) as server:
        await server.api.load("a", version=1)
        on_cpu = await answer(server.api, "a")
        await server.api.load("a", version=1, **ON_DEVICE)
        assert_close(await answer(server.api, "a"), on_cpu)
        model = await server.api.model("a")
        assert [(use["device"], use["provider"]) for use in model["devices"]] == [
            (DEVICE, provider_of(DEVICE))
        ]
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
        assert await server.stop() == 0
    verified(weights)
    unloads = [event.data for event in await events(weights) if isinstance(event.data, ModelUnloaded)]
    assert not any(data.unreturned_bytes for data in unloads)
    assert all(uses[0].nodes > 0 and uses[0].version for uses in await loaded_uses(weights))


def ask_triton(server: Server, is_swapped: threading.Event) -> None:
    """Infer with Triton's client, again and again until the version is swapped, and once more."""
    with triton.InferenceServerClient(address(server)) as client:
        row = triton.InferInput("x", [1, COLUMNS], "FP32")
        row.set_data_from_numpy(np.full((1, COLUMNS), 0.5, np.float32))
        while not is_swapped.is_set():
            client.infer("a", [row], headers=bearer(server, "infer"))
        client.infer("a", [row], headers=bearer(server, "infer"))


async def test_nodes_the_device_lacks_are_refused_or_recorded(
    config: Config, environment: dict[str, str]
) -> None:
    save(half_on_device(), config.repository, "half")
    async with serving(config, environment=environment) as server:
        refused = await server.api.failed_load("half", **ON_DEVICE)
        assert refused["error"]["code"] == "fallback_refused"
        assert "Normalizer" in refused["error"]["message"]
        await server.api.load("half", **ON_DEVICE, fallback=CPU)
        uses = (await server.api.model("half"))["devices"]
        assert [use["device"] for use in uses] == [DEVICE, CPU]
        missing = await server.api.post("/api/v1/models/half/load", json={"devices": ["abacus:0"]})
        assert missing.refusal == (409, "device_unavailable")
        assert DEVICE in missing.json["detail"]
        assert await server.stop() == 0
    verified(config)


@asynccontextmanager
async def with_room_for_one(weights: Config, environment: dict[str, str]) -> AsyncIterator[Server]:
    """Run a server on whose device one and a half of `a` have room, as an earlier server has measured it."""
    async with serving(weights, environment=environment) as server:
        await server.api.load("a", version=1, **ON_DEVICE)
        await server.api.unload("a")
        await server.api.load("b", **ON_DEVICE)
        await server.api.unload("b")
        assert await server.stop() == 0
    loads = [event.data for event in await events(weights) if isinstance(event.data, ModelLoaded)]
    needs = [data.targets[0].memory_bytes or data.peak_memory_bytes for data in loads if data.targets]
    options = (f"--device-memory={DEVICE}={max(needs) * 3 // 2}", "--evict=idle", "--min-residency-s=0")
    async with serving(weights, *options, environment=environment) as server:
        yield server


async def test_models_beyond_device_memory_evict_each_other(
    weights: Config, environment: dict[str, str]
) -> None:
    async with with_room_for_one(weights, environment) as server:
        for model_id, other in (("a", "b"), ("b", "a"), ("a", "b")):
            await server.api.load(model_id, version=1, **ON_DEVICE)
            await server.api.model_when(other, state="unloaded")
            assert (await device_of(server.api))["models"] == 1
        await server.api.load("b")  # the CPU has room beside it
        assert (await server.api.model("a"))["state"] == "loaded"
        assert await server.stop() == 0
    verified(weights)


async def test_model_that_exhausts_device_fails_with_the_numbers(
    config: Config, environment: dict[str, str]
) -> None:
    save(models.weights(MEGABYTES), config.repository, "a")
    async with serving(config, f"--device-memory={DEVICE}=5MB", environment=environment) as server:
        failed = await server.api.failed_load("a", **ON_DEVICE)
        assert failed["error"]["code"] == "insufficient_memory"
        needed = rf"it needs [\d,]+ MB \(estimated from its files\) of memory .*{DEVICE}.* 5.0 MB in all"
        assert re.search(needed, failed["error"]["message"]), failed["error"]
        await server.api.load("a", devices=[DEVICE, CPU])  # the second has room
        assert (await server.api.model("a")).get("devices") is None
        assert await server.stop() == 0
    verified(config)


async def test_killed_worker_and_stuck_worker_leave_the_device(
    config: Config, environment: dict[str, str]
) -> None:
    save(models.counting_loop(), config.repository, "loop")
    async with serving(config, environment=environment) as server:
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
        assert await server.stop() == 0
    verified(config)


async def test_killed_server_restores_model_on_device(weights: Config, environment: dict[str, str]) -> None:
    async with serving(weights, APART, environment=environment) as server:
        await server.api.load("a", version=1, **ON_DEVICE)
        expected = await answer(server.api, "a")
        await server.kill()
    async with serving(weights, APART, environment=environment) as server:
        await server.api.model_when("a", state="loaded")
        assert_close(await answer(server.api, "a"), expected)
        assert (await server.api.model("a"))["devices"][0]["device"] == DEVICE
        assert await server.stop() == 0
    verified(weights)
    assert len(await loaded_uses(weights)) == 2


async def test_loads_and_unloads_on_device_leave_its_memory_flat(
    weights: Config, environment: dict[str, str]
) -> None:
    async with serving(weights, "--limit-management=off", environment=environment) as server:

        async def cycle() -> None:
            await server.api.load("a", version=1, **ON_DEVICE)
            await answer(server.api, "a")
            await server.api.unload("a")

        async def taken() -> int:
            device = await device_of(server.api)
            if device["total_bytes"] is None:
                return tree_bytes(server.pid)
            used: int = device["total_bytes"] - device["free_bytes"]
            return used

        await cycle()
        before = await taken()
        for _ in range(CYCLES):
            await cycle()
        lost_each_time = CYCLES * MEGABYTES * 1_000_000
        assert await taken() <= of_both(short=before + lost_each_time // 2, long=before * MEMORY_GOAL)
        assert await server.stop() == 0
    verified(weights)
