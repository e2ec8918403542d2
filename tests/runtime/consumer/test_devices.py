"""Loads on devices: real workers with OpenVINO's provider, and a stand-in for the driver's library."""

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec import UNSET, structs
from support.nvml import PCI_BUS_IDS, hanging
from support.openvino import DEVICE, openvino_path
from support.running import Engine, code_of, error_of, running, save_models
from support.shims import Shim
from support.workers import LIMIT_S, running_pool, until

from events.jobs import Job, JobStatus
from events.models import ModelState
from events.types import LoadParameters, LoadStarted, ModelLoaded, ModelUnloaded
from features.devices import allocation
from features.devices import found as devices
from features.devices.allocation import MeasuredAllocation
from features.devices.facts import DeviceUse
from features.devices.room import DeviceUsage, limit_device, list_device_usage
from features.devices.wire import FoundDevice
from runtime.consumer.running import RunningLoad
from runtime.process.pool import WorkerPool
from runtime.scheduler.view import Policy

ON_DEVICE = LoadParameters(devices=(DEVICE,))
MB = 1_000_000
TOTAL_BYTES = 8000 * MB


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_pool(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerPool]:
    """A pool that has found OpenVINO's device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(openvino_path(tmp_path_factory.mktemp("openvino")))
        async with running_pool(visible_devices=[DEVICE]) as pool:
            assert DEVICE in pool.targets.found
            yield pool


def on_device(budget_bytes: int | None = None, *, has_memory: bool = False) -> Policy:
    limits = limit_device(DEVICE, budget_bytes, has_memory=has_memory)
    return Policy(2, evicts=True, min_residency_s=0, rooms={DEVICE: limits})


def usage_of(engine: Engine) -> DeviceUsage:
    [usage] = list_device_usage(engine.consumer.loads.values(), engine.consumer.policy.rooms)
    return usage


async def loaded(engine: Engine, model_id: str = "adder") -> ModelLoaded:
    return (await engine.facts(ModelLoaded, of=model_id))[-1]


# A device without memory of its own.


async def test_load_on_device_records_what_runs_there(engine: Engine) -> None:
    engine.consumer.policy = on_device()
    assert (await engine.load("adder", 1, ON_DEVICE)).status is JobStatus.COMPLETED
    assert await engine.ask("adder", 1) == 2
    fact, found = await loaded(engine), engine.pool.targets.found[DEVICE]
    assert fact.targets == (DeviceUse("openvino", found.version, DEVICE, 1),)
    assert fact.confinement == engine.pool.targets.applied.confinement
    [footprint] = engine.model("adder").footprints
    assert (footprint.target_name, footprint.target_bytes) == (DEVICE, UNSET)
    [use] = engine.consumer.uses()
    assert (use.device, use.device_bytes) == (DEVICE, 0)
    usage = usage_of(engine)
    assert (usage.device, usage.reserved_bytes, usage.models) == (DEVICE, 0, 1)
    assert usage.used_bytes == use.memory_bytes > 0
    await engine.unload("adder")
    assert (await engine.facts(ModelUnloaded))[-1].unreturned_bytes is UNSET
    await engine.load("adder", 1)  # the footprint there is none of the CPU
    assert (await loaded(engine)).targets is UNSET
    assert len(engine.model("adder").footprints) == 2


async def test_load_without_any_of_its_devices_does_not_start(engine: Engine) -> None:
    job = await engine.load("adder", 1, LoadParameters(devices=("cuda:0", "openvino:gpu")))
    assert code_of(job) == "device_unavailable"
    assert await engine.facts(LoadStarted) == []
    await engine.load("adder", 1, LoadParameters(devices=("cuda:*", "cpu")))
    assert (await loaded(engine)).targets is UNSET
    assert await engine.ask("adder", 1) == 2


# A device with memory of its own: what is free there is what the test says.


@pytest_asyncio.fixture(loop_scope="module")
async def device(
    tmp_path: Path, shared_pool: WorkerPool, driver: Shim, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engine]:
    """The runtime with a device of which 1 GB of memory may be taken."""
    known = shared_pool.targets.found[DEVICE]
    found = {DEVICE: structs.replace(known, pci_bus_id=PCI_BUS_IDS[0])}
    monkeypatch.setattr(shared_pool, "targets", replace(shared_pool.targets, found=found))
    driver.set(TOTAL_BYTES, TOTAL_BYTES)
    policy = on_device(1000 * MB, has_memory=True)
    async with running(save_models(tmp_path), policy=policy, pool=shared_pool) as engine:
        yield engine


async def starting(engine: Engine, model_id: str, parameters: LoadParameters = ON_DEVICE) -> tuple[str, int]:
    """Ask for a load whose worker stops before it takes anything; returns its job, and its process."""
    pid = await engine.stopped_ahead()
    job_id = await engine.ask_load(model_id, 1, parameters)
    await until(lambda: job_id in engine.consumer.loads and bool(engine.consumer.loads[job_id].workers))
    return job_id, pid


async def load_taking(
    engine: Engine, driver: Shim, model_id: str, bytes_: int, parameters: LoadParameters = ON_DEVICE
) -> Job:
    """Load a model, which takes so many bytes of the device."""
    job_id, pid = await starting(engine, model_id, parameters)
    take(driver, bytes_)
    os.kill(pid, signal.SIGCONT)
    return await engine.ended(job_id)


def take(driver: Shim, bytes_: int) -> None:
    total, free, *_ = driver.numbers
    driver.set(total, free - bytes_)


def allocation_of(load: RunningLoad) -> MeasuredAllocation:
    assert isinstance(load.allocation, MeasuredAllocation)
    return load.allocation


async def exited(load: RunningLoad) -> None:
    """Wait until the memory of exited workers is waited for."""
    await until(lambda: allocation_of(load).returning is not None)


async def test_memory_of_device_is_what_a_load_leaves_less(device: Engine, driver: Shim) -> None:
    assert (await load_taking(device, driver, "adder", 600 * MB)).status is JobStatus.COMPLETED
    [use] = (await loaded(device)).targets or ()
    assert use.memory_bytes == 600 * MB
    [footprint] = device.model("adder").footprints
    assert footprint.target_bytes == 600 * MB
    usage = usage_of(device)
    assert (usage.reserved_bytes, usage.used_bytes) == (0, 600 * MB)
    [use_of_model] = device.consumer.uses()
    assert use_of_model.device_bytes == 600 * MB


@pytest.mark.parametrize(
    ("force", "grown_bytes"),
    [(False, 50 * MB), (True, 0)],  # a kill waits for no reading: what was free before the load counts
)
async def test_unload_ends_when_the_device_has_its_memory_back(
    device: Engine, driver: Shim, *, force: bool, grown_bytes: int
) -> None:
    await load_taking(device, driver, "adder", 600 * MB)
    load = device.live("adder")
    take(driver, grown_bytes)  # other models have grown, and other processes
    job_id = await device.ask_unload("adder", force=force)
    await exited(load)
    assert device.worker_pids() == []
    assert device.log.state.unended_job(job_id) is not None
    assert usage_of(device).used_bytes == 600 * MB
    take(driver, -595 * MB)
    assert (await device.ended(job_id)).status is JobStatus.COMPLETED
    assert (await device.facts(ModelUnloaded))[-1].unreturned_bytes is UNSET
    assert usage_of(device).used_bytes == 0


@pytest.mark.parametrize("force", [False, True])
async def test_unload_says_what_the_device_does_not_return(
    device: Engine, driver: Shim, monkeypatch: pytest.MonkeyPatch, *, force: bool
) -> None:
    monkeypatch.setattr(allocation, "DEVICE_RETURN_S", 0.2)
    await load_taking(device, driver, "adder", 600 * MB)
    await device.unload("adder", force=force)
    assert (await device.facts(ModelUnloaded))[-1].unreturned_bytes == 600 * MB
    await device.nothing_left()


async def test_lost_instance_is_not_waited_for_again(device: Engine, driver: Shim) -> None:
    both = structs.replace(ON_DEVICE, instances=2)
    device.consumer.policy = on_device(2000 * MB, has_memory=True)
    await load_taking(device, driver, "adder", 600 * MB, both)
    load = device.live("adder")
    device.kill("adder")
    await device.recorded(lambda: device.model("adder").degraded)
    take(driver, -300 * MB)
    assert load.list_taken()[DEVICE] == 300 * MB
    job_id = await device.ask_unload("adder")
    await exited(load)
    take(driver, -300 * MB)
    await device.ended(job_id)
    assert (await device.facts(ModelUnloaded))[-1].unreturned_bytes is UNSET


async def test_load_that_takes_more_than_the_budget_fails(device: Engine, driver: Shim) -> None:
    error = error_of(await load_taking(device, driver, "adder", 1100 * MB))
    assert error.code == "out_of_memory"
    assert f"the load took 1,100 MB of the memory of {DEVICE}; it may take 1,000 MB" in error.message
    take(driver, -1100 * MB)
    await device.nothing_left()


async def test_models_beyond_the_budget_evict_each_other(device: Engine, driver: Shim) -> None:
    await load_taking(device, driver, "adder", 600 * MB)
    evicted, job_id = device.live("adder"), await device.ask_load("other", parameters=ON_DEVICE)
    await exited(evicted)
    assert job_id not in device.consumer.loads  # there is no room before the memory is back
    take(driver, -600 * MB)
    assert (await device.ended(job_id)).status is JobStatus.COMPLETED
    assert device.model("adder").state is ModelState.UNLOADED
    assert (await device.load("adder", 1, ON_DEVICE)).status is JobStatus.COMPLETED


async def test_unload_meanwhile_does_not_count_for_a_load(device: Engine, driver: Shim) -> None:
    await load_taking(device, driver, "adder", 400 * MB)
    before, (job_id, pid) = device.live("adder"), await starting(device, "other")
    unload_id = await device.ask_unload("adder")
    await exited(before)
    take(driver, 300 * MB - 400 * MB)
    await device.ended(unload_id)
    assert (await device.facts(ModelUnloaded))[-1].unreturned_bytes is UNSET
    os.kill(pid, signal.SIGCONT)
    await device.ended(job_id)
    [use] = (await loaded(device, "other")).targets or ()
    assert use.memory_bytes == 300 * MB


async def test_reload_waits_for_the_memory_of_a_killed_worker(device: Engine, driver: Shim) -> None:
    await load_taking(device, driver, "adder", 600 * MB)
    lost = device.live("adder")
    await device.die("adder")
    assert allocation_of(lost).is_held
    take(driver, -600 * MB)
    await device.becomes("adder", ModelState.LOADED)
    [use] = (await loaded(device)).targets or ()
    assert (use.device, use.memory_bytes) == (DEVICE, 0)
    assert await device.ask("adder", 1) == 2


async def test_device_whose_driver_says_nothing_is_not_waited_for(
    device: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = structs.replace(device.pool.targets.found[DEVICE], pci_bus_id="0000:09:00.0")
    monkeypatch.setattr(device.pool, "targets", replace(device.pool.targets, found={DEVICE: gone}))
    await device.load("adder", 1, ON_DEVICE)
    [use] = (await loaded(device)).targets or ()
    assert use.memory_bytes is None
    await device.unload("adder")
    assert (await device.facts(ModelUnloaded))[-1].unreturned_bytes is UNSET


async def test_kill_does_not_wait_for_the_driver(
    device: Engine, driver: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load_taking(device, driver, "adder", 600 * MB)
    take(driver, -600 * MB)
    load = device.live("adder")
    for module in (devices, allocation):
        monkeypatch.setattr(module, "MEASURE_LIMIT_S", LIMIT_S, raising=False)
    async with hanging(driver):
        job_id = await device.ask_unload("adder", force=True)
        await exited(load)
        assert device.worker_pids() == []
    assert (await device.ended(job_id)).status is JobStatus.COMPLETED


async def test_load_while_the_driver_hangs_has_no_measurement(device: Engine, driver: Shim) -> None:
    job_id, pid = await starting(device, "adder")
    async with hanging(driver):
        os.kill(pid, signal.SIGCONT)
        assert (await device.ended(job_id)).status is JobStatus.COMPLETED
    [use] = (await loaded(device)).targets or ()
    assert use.memory_bytes is None
    assert device.live("adder").list_taken()[DEVICE] == allocation_of(device.live("adder")).reserved_bytes


def test_devices_on_one_hardware_share_its_memory() -> None:
    every, pool = list[MeasuredAllocation](), WorkerPool()
    for name, bus in (("cuda:0", 0), ("nv_tensorrt:0", 0), ("cuda:1", 1)):
        found = FoundDevice(name, "1", pci_bus_id=PCI_BUS_IDS[bus])
        about = found, LoadParameters(), pool
        every.append(MeasuredAllocation(*about, 300 * MB, 1000 * MB, lambda: every))
    assert [each.allowance_bytes for each in every] == [700 * MB, 700 * MB, 1000 * MB]
