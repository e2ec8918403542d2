"""Limits of devices at the start, devices whose workers are confined too little, and sentences about them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as replace_struct
from support.nvml import PCI_BUS_IDS, hanging
from support.shims import Shim

from events.values import Confinement
from features.devices import setup as devices_module
from features.devices.found import Devices, DeviceUnavailable
from features.devices.room import limit_device
from features.devices.setup import describe_setup, limit_devices, withhold_devices
from features.devices.wire import FoundDevice
from runtime.process.confinement import UNCONFINED
from runtime.process.pool import WorkerPool
from server.config import Config, ConfigError

DEVICES = Devices(
    {
        "npu:0": FoundDevice("npu:0", "2.1", "Some NPU"),
        "npu:1": FoundDevice("npu:1", "2.1"),
    },
    problems=("rocm: its library cannot be loaded",),
)
"""Two devices without memory of their own, and a provider that cannot be used."""
GPUS = {
    f"cuda:{number}": FoundDevice(f"cuda:{number}", "1", pci_bus_id=bus)
    for number, bus in enumerate(PCI_BUS_IDS)
}
MACHINE_BYTES = 1000


def confined_as(confinement: Confinement) -> Devices:
    return replace(DEVICES, applied=replace(UNCONFINED, confinement=confinement))


def pool_of(devices: Devices) -> WorkerPool:
    pool = WorkerPool()
    pool.targets = devices
    return pool


def config(**settings: Any) -> Config:
    return Config(repository=Path("/r"), data=Path("/d"), **settings)


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({}, None, None),
        ({"device_memory": "npu:1=25%"}, None, 250),
        ({"device_memory": "npu:0=2GB,npu:1=7"}, 2 * 10**9, 7),
        ({"devices": "npu:*,cpu"}, None, None),
    ],
)
async def test_settings_limit_devices(
    settings: dict[str, str], first: int | None, second: int | None
) -> None:
    found = await limit_devices(config(**settings), pool_of(DEVICES), MACHINE_BYTES)
    assert found == {name: limit_device(name, limit) for name, limit in (("npu:0", first), ("npu:1", second))}


async def test_device_with_own_memory_has_most_of_it_as_budget(driver: Shim) -> None:
    driver.set(24 * 10**9, 20 * 10**9, 8 * 10**9, 8 * 10**9)
    limits = await limit_devices(config(device_memory="cuda:1=50%"), pool_of(Devices(GPUS)), MACHINE_BYTES)
    assert [(limits[name].budget_bytes, limits[name].is_measured) for name in GPUS] == [
        (21_600_000_000, True),
        (4_000_000_000, True),
    ]


async def test_limit_of_missing_device_is_refused() -> None:
    setting = config(device_memory="npu:1=4,rocm:0=4")
    with pytest.raises(ConfigError) as refused:
        await limit_devices(setting, pool_of(DEVICES), MACHINE_BYTES)
    assert str(refused.value) == (
        "--device-memory: rocm:0 is not a device of this server, which has npu:0, npu:1;"
        " rocm: its library cannot be loaded"
    )
    with pytest.raises(ConfigError, match=r"which has only the CPU$"):
        await limit_devices(setting, pool_of(Devices()), MACHINE_BYTES)


async def test_missing_default_device_is_refused_unless_nodes_may_have_it() -> None:
    with pytest.raises(ConfigError, match=r"^--devices: "):
        await limit_devices(config(devices="rocm:*"), pool_of(DEVICES), MACHINE_BYTES)
    for devices, others in (
        ("rocm:*", {"ledger": "postgresql://u@h/l", "node_address": "http://a"}),
        ("rocm:*,cpu", {}),
    ):
        setting = config(devices=devices, **others)
        limits = await limit_devices(setting, pool_of(DEVICES), MACHINE_BYTES)
        assert limits.keys() == DEVICES.found.keys()


@pytest.mark.parametrize(
    ("mode", "could", "is_withheld"),
    [
        ("require", ("run_code",), True),
        ("require-cpu", ("run_code",), False),
        ("require", (), False),
        ("auto", ("run_code",), False),
    ],
)
def test_require_withholds_devices(mode: str, could: Any, is_withheld: bool) -> None:  # noqa: FBT001
    found = confined_as(Confinement(mode, 6, True, could))
    pool = pool_of(found)
    withhold_devices(pool)
    assert (pool.targets == found) is not is_withheld
    if is_withheld:
        assert not pool.targets.found
        assert pool.targets.problems[0] == DEVICES.problems[0]
        for words in ("npu", "--confine=require", "run code", "--confine=require-cpu"):
            assert words in pool.targets.problems[1]


def test_each_device_is_described_in_a_sentence() -> None:
    limits = {"npu:0": limit_device("npu:0", 250), "npu:1": limit_device("npu:1")}
    pool = pool_of(confined_as(Confinement("auto", 6, True, ())))
    assert list(describe_setup(pool, limits)) == [
        "no device of rocm: its library cannot be loaded",
        "workers of loads on devices are confined by Landlock 6 and seccomp",
        "device npu:0: Some NPU, provider npu 2.1, budget 250 bytes",
        "device npu:1: no name, provider npu 2.1, no memory budget",
    ]


async def test_driver_that_does_not_answer_is_a_problem(
    driver: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices_module, "DEVICES_LIMIT_S", 0.1)
    pool = pool_of(Devices(GPUS))
    async with hanging(driver):
        limits = await limit_devices(config(), pool, MACHINE_BYTES)
    assert limits == {name: limit_device(name) for name in GPUS}
    assert pool.targets.found == GPUS
    said = [f"{name}: its driver does not answer" for name in GPUS]
    assert list(pool.targets.problems) == said
    assert next(describe_setup(pool, limits)) == f"device {said[0]}"


def test_second_device_on_the_same_hardware_is_left_out() -> None:
    second = replace_struct(GPUS["cuda:1"], name="nv:1")
    pool = pool_of(Devices({**GPUS, "nv:1": second, **DEVICES.found}))
    withhold_devices(pool)
    assert [*pool.targets.found] == ["cuda:0", "cuda:1", "npu:0", "npu:1"]
    problem = "nv:1: is the same hardware as cuda:1, which is used"
    assert list(pool.targets.problems) == [problem]
    with pytest.raises(DeviceUnavailable, match=problem):
        pool.targets.find_candidates(["nv:*"])
