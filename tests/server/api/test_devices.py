"""Loads on devices over HTTP, with OpenVINO on the CPU: what they show, and which are refused."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec.structs import replace
from support import models
from support.http import ONE, LocalApi, local_server, when
from support.nvml import PCI_BUS_IDS, count_calls, hanging
from support.openvino import DEVICE, visible_devices
from support.shims import Shim

from features.devices.found import DeviceMemory
from features.devices.setup import list_devices, list_gauges
from runtime.worker.landlock import find_abi
from server.api import resources
from server.api.jobs import make_job_info
from server.appkeys import POLICY, POOL, READER
from server.observability.metrics import ServerCollector

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """An application whose models load on OpenVINO, which it allows explicitly, unless they say otherwise."""
    folder = tmp_path_factory.mktemp("devices")
    settings = {
        "on_demand": "on", "devices": "openvino:*", "device_memory": f"{DEVICE}=2GB",
        "confine": "require-cpu" if find_abi() else "auto",
    }  # fmt: skip
    with visible_devices([DEVICE], folder) as visible:
        async with local_server(folder, **settings, **visible) as api:
            yield api


async def test_load_on_device_says_so_everywhere(served: LocalApi) -> None:
    served.save(models.add(), "m")
    job = await served.load("m", devices=["rocm:*", DEVICE], fallback="cpu")
    assert (job["parameters"]["devices"], job["parameters"]["fallback"]) == (["rocm:*", DEVICE], "cpu")
    assert (await served.infer("m", ONE)).status == 200
    shown = await served.model("m")
    release = shown["devices"][0]["version"]
    assert release.startswith(version("onnxruntime-ep-openvino"))
    use = {"provider": "openvino", "version": release, "device": DEVICE, "nodes": 1, "memory_bytes": None}
    assert shown["devices"] == [use]
    assert (await served.get(f"/api/v1/models/m?at={job['position']}")).json["devices"] == [use]
    seen = (await served.get("/api/v1/resources")).json
    cpu, device = seen["devices"]
    assert (cpu["device"], cpu["version"], cpu["models"]) == ("cpu", version("onnxruntime"), 0)
    assert cpu["used_bytes"] == seen["used_bytes"]
    assert device.pop("hardware")
    assert device == {
        "device": DEVICE, "provider": "openvino", "version": release, "total_bytes": None,
        "free_bytes": None, "budget_bytes": 2 * 10**9, "reserved_bytes": 0,
        "used_bytes": seen["used_bytes"], "models": 1,
    }  # fmt: skip
    assert seen["device_problems"] == []
    assert "run_code" in seen["confinement_of_devices"]["not_prevented"]
    assert [(each["device"], each["device_bytes"]) for each in seen["models"]] == [(DEVICE, 0)]
    scraped = (await served.get("/metrics")).body.decode()
    assert f'loadledger_device_models{{device="{DEVICE}"}} 1.0' in scraped
    assert f'loadledger_device_memory_bytes{{device="{DEVICE}",kind="budget"}} 2e+09' in scraped
    config = (await served.get("/v2/models/m/config")).json
    assert config["instance_group"][0]["kind"] == "KIND_MODEL"
    unload = await served.unload("m")
    assert "unreturned_bytes" not in unload


async def test_memory_of_a_device_is_what_its_driver_says(served: LocalApi) -> None:
    cpu, device = list_devices(served.app, {DEVICE: DeviceMemory(8, 5)})
    assert (device.device, device.total_bytes, device.free_bytes) == (DEVICE, 8, 5)
    assert cpu.free_bytes is None
    collected = {each.name: each for each in ServerCollector(served.app, list_gauges([device])).collect()}
    samples = collected["loadledger_device_memory_bytes"].samples
    assert {each.labels["kind"]: each.value for each in samples} == {
        "total": 8,
        "free": 5,
        "budget": 2 * 10**9,
        "reserved": 0,
        "used": 0,
    }


async def test_driver_that_hangs_holds_up_no_answer(
    served: LocalApi, driver: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, limits = served.app[POOL], served.app[POLICY].rooms
    found = {DEVICE: replace(pool.targets.found[DEVICE], pci_bus_id=PCI_BUS_IDS[0])}
    monkeypatch.setattr(pool, "targets", dataclasses.replace(pool.targets, found=found))
    monkeypatch.setitem(limits, DEVICE, dataclasses.replace(limits[DEVICE], is_measured=True))
    monkeypatch.setattr(resources, "CACHED_S", -1.0)
    async with hanging(driver):
        calls = count_calls(driver)
        asked = await asyncio.gather(*(served.get("/api/v1/resources") for _ in range(40)))
        assert {(each.status, each.json["devices"][1]["total_bytes"]) for each in asked} == {(200, None)}
        assert (await served.get("/metrics")).status == 200
        assert count_calls(driver) == calls + 1
        assert await asyncio.to_thread(lambda: 1) == 1  # the executor is free
    driver.set(8_000, 5_000)
    shown = await served.get("/api/v1/resources")
    assert shown.json["devices"][1]["total_bytes"] == 8_000


async def test_job_says_what_its_device_has_not_returned(served: LocalApi) -> None:
    served.save(models.add(), "late")
    await served.load("late", devices=[DEVICE])
    job = await served.unload("late")
    ended = await served.app[READER].job(job["id"])
    assert ended is not None
    assert make_job_info(replace(ended, unreturned_bytes=7)).unreturned_bytes == 7


async def test_load_on_missing_device_is_refused(served: LocalApi) -> None:
    served.save(models.add(), "gone")
    (served.config.repository / "gone" / "loadledger.toml").write_text('devices = ["rocm:0"]\n')
    answers = [
        await served.post("/api/v1/models/gone/load"),
        await served.post("/api/v1/models/gone/load", json={"devices": ["cuda:7", "openvino:npu"]}),
        await served.post("/v2/repository/models/gone/load"),
    ]
    for answer, asked in zip(answers, ("rocm:0", "cuda:7", "rocm:0"), strict=True):
        assert answer.refusal == (409, "device_unavailable")
        assert asked in answer.json["detail"]
        assert DEVICE in answer.json["detail"]
    answer = await served.infer("gone", ONE)
    assert answer.refusal == (503, "load_failed")
    assert "rocm:0" in answer.json["error"]
    assert (await served.load("gone", devices=["rocm:0", "cpu"]))["status"] == "completed"
    await served.unload("gone")


async def test_default_device_is_taken_unless_a_load_names_the_cpu(served: LocalApi) -> None:
    served.save(models.add(), "usual")
    assert (await served.load("usual"))["parameters"]["devices"] == ["openvino:*"]
    assert (await served.model("usual"))["devices"][0]["device"] == DEVICE
    job = await served.load("usual", devices=["cpu"])
    assert job["parameters"].keys().isdisjoint({"devices", "fallback"})
    shown = await when(lambda: served.model("usual"), lambda model: model["state"] == "loaded")
    assert "devices" not in shown

    async def on_devices() -> list[int]:
        return [each["models"] for each in (await served.get("/api/v1/resources")).json["devices"]]

    await when(on_devices, lambda models: models == [1, 0])
    await served.unload("usual")


async def test_require_refuses_devices(tmp_path: Path) -> None:
    if not find_abi():
        pytest.skip("this kernel has no Landlock")
    with visible_devices([DEVICE], tmp_path):
        async with local_server(tmp_path, confine="require", visible_devices="openvino:*") as api:
            api.save(models.add(), "m")
            answer = await api.post("/api/v1/models/m/load", json={"devices": ["openvino:*"]})
            assert answer.refusal == (409, "device_unavailable")
            assert "--confine=require-cpu" in answer.json["detail"]
            seen = (await api.get("/api/v1/resources")).json
            assert [each["device"] for each in seen["devices"]] == ["cpu"]
            assert "--confine=require" in seen["device_problems"][0]
            assert (await api.load("m", devices=["openvino:*", "cpu"]))["status"] == "completed"
            assert "devices" not in await api.model("m")
