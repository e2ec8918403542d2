"""Devices of a server: the installed providers, the devices that a load may run on, and their memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.nvml import PCI_BUS_IDS, build_nvml, count_calls, hanging
from support.shims import Shim, environment_of

from features.devices import found as devices
from features.devices.found import (
    CUDA_LIBRARY,
    DeviceMemory,
    Devices,
    DeviceUnavailable,
    find_providers,
    measure_memory,
)
from features.devices.wire import FoundDevice, ProviderLibrary

PACKAGE = """
def get_library_path():
    return __file__.replace("__init__.py", "plugin.so")

def get_ep_name():
    return "TpuExecutionProvider"
"""
READ = """
import asyncio, sys
from features.devices.found import measure_memory
from features.devices.wire import FoundDevice
async def read():
    found = [FoundDevice("cuda:0", "1", pci_bus_id=address) for address in sys.argv[1:]]
    for seen in await asyncio.gather(*map(measure_memory, found)):
        print(seen and (seen.total_bytes, seen.free_bytes))
asyncio.run(read())
"""
LIBRARIES = {
    provider: ProviderLibrary(provider, f"/{provider}.so", f"{provider}EP") for provider in ("cuda", "tpu")
}
DEVICES = Devices(
    {name: FoundDevice(name, "1") for name in ("cuda:0", "cuda:1")},
    LIBRARIES,
    ["tpu: its library cannot be registered: no driver", "fpga: the package cannot be used: broken"],
)


def add_package(folder: Path, name: str, code: str = "") -> Path:
    made = folder / name
    made.mkdir()
    (made / "__init__.py").write_text(code)
    return made


async def test_installed_providers_are_found_with_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tpu = add_package(tmp_path, "onnxruntime_ep_tpu", PACKAGE)
    add_package(tmp_path, "onnxruntime_ep_broken", "raise OSError('no license')")
    add_package(tmp_path, "onnxruntime_extras", "raise OSError")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = await find_providers(["tpu:*", "broken:*"])
    library = ProviderLibrary("tpu", str(tpu / "plugin.so"), "TpuExecutionProvider")
    assert found.libraries == {"tpu": library}
    assert found.problems == ["broken: the package onnxruntime_ep_broken cannot be used: no license"]
    assert not found.found


async def test_cuda_of_the_wheel_for_gpus_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = add_package(tmp_path, "onnxruntime", "raise AssertionError('imported')") / CUDA_LIBRARY
    library.parent.mkdir()
    library.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    expected = ProviderLibrary("cuda", str(library), "CUDAExecutionProvider")
    assert (await find_providers(["cuda:*"])).libraries["cuda"] == expected
    own = add_package(tmp_path, "onnxruntime_ep_cuda", PACKAGE)
    assert (await find_providers(["cuda:*"])).libraries["cuda"].path == str(own / "plugin.so")


@pytest.mark.parametrize(
    ("visible", "providers"), [((), set()), (("tpu:1", "cpu"), {"tpu"}), (("tpu:*", "broken:0"), {"tpu"})]
)
async def test_packages_of_invisible_devices_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: tuple[str, ...], providers: set[str]
) -> None:
    add_package(tmp_path, "onnxruntime_ep_tpu", PACKAGE)
    ran = tmp_path / "ran"
    add_package(tmp_path, "onnxruntime_ep_broken", f"open({str(ran)!r}, 'w').close(); raise OSError")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = await find_providers(visible)
    assert found.libraries.keys() == providers
    assert ran.exists() == ("broken:0" in visible)
    with pytest.raises(DeviceUnavailable, match=re.escape(f"it uses {','.join(visible) or 'none'} of")):
        found.find_candidates(["cuda:0"])


async def test_package_that_hangs_takes_no_other_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_package(tmp_path, "onnxruntime_ep_tpu", PACKAGE)
    add_package(tmp_path, "onnxruntime_ep_asleep", "import threading\nthreading.Event().wait()")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(devices, "DEVICES_LIMIT_S", 1.0)
    found = await find_providers(["tpu:*", "asleep:*"])
    assert found.problems == ["asleep: the package onnxruntime_ep_asleep does not answer"]
    assert "tpu" in found.libraries


@pytest.mark.parametrize(
    ("wanted", "candidates"),
    [
        (("cpu",), ("cpu",)),
        (("cuda:*",), ("cuda:0", "cuda:1")),
        (("tpu:0", "cuda:1", "cuda:*", "cpu"), ("cuda:1", "cuda:0", "cpu")),
    ],
)
def test_candidates_are_in_the_order_of_the_load(
    wanted: tuple[str, ...], candidates: tuple[str, ...]
) -> None:
    assert DEVICES.find_candidates(wanted) == candidates


@pytest.mark.parametrize(
    ("wanted", "advice"),
    [
        (("cuda:2",), r"no cuda:2; its devices are cpu, cuda:0, cuda:1$"),
        (("tpu:0",), r"tpu: its library cannot be registered: no driver$"),
        (("fpga:0",), r"fpga: the package cannot be used: broken$"),
        (
            ("openvino:cpu", "npu_x:*"),
            r"no openvino:cpu or npu_x:\*; .*pip install 'loadledger\[openvino\]',",
        ),
        (("npu_x:*",), r"npu_x is not installed: the documentation says"),
    ],
)
def test_error_without_a_candidate_says_what_to_do(wanted: tuple[str, ...], advice: str) -> None:
    with pytest.raises(DeviceUnavailable, match=advice):
        DEVICES.find_candidates(wanted)


def test_target_bounds_the_arena_of_cuda() -> None:
    bounded = DEVICES.target("cuda:1", falls_back=True, memory_bytes=5)
    assert (bounded.name, bounded.library, bounded.falls_back) == ("cuda:1", LIBRARIES["cuda"], True)
    assert bounded.options == {"arena.extend_strategy": "1", "arena.max_mem": "5"}
    unbounded = DEVICES.target("cuda:0", falls_back=False, memory_bytes=None)
    assert unbounded.options == {"arena.extend_strategy": "1"}
    assert DEVICES.target("tpu:0", falls_back=False, memory_bytes=5).options == {}


def test_memory_is_what_the_driver_says(tmp_path: Path) -> None:
    shim = build_nvml(tmp_path)
    shim.set(24 * 10**9, 20 * 10**9, 8 * 10**9, 8 * 10**9)
    environment = {**os.environ, **environment_of([shim])}
    command = [sys.executable, "-c", READ, *PCI_BUS_IDS, "0000:03:00.0", ""]
    printed = subprocess.check_output(command, env=environment, text=True, timeout=120)
    assert printed.splitlines() == ["(24000000000, 20000000000)", "(8000000000, 8000000000)", "None", "None"]


def test_driver_that_hangs_holds_up_no_exit(tmp_path: Path) -> None:
    shim = build_nvml(tmp_path)
    shim.set(0, 0, 0, 0, 1)
    environment = {**os.environ, **environment_of([shim])}
    command = [sys.executable, "-c", READ, *PCI_BUS_IDS * 20]
    printed = subprocess.check_output(command, env=environment, text=True, timeout=120)
    assert printed.split() == 40 * ["None"]
    assert count_calls(shim) == 1


async def test_driver_that_hung_is_asked_again(driver: Shim) -> None:
    device = FoundDevice("cuda:0", "1", pci_bus_id=PCI_BUS_IDS[0])
    driver.set(8, 5)
    async with hanging(driver):
        assert await measure_memory(device) is None
        calls = count_calls(driver)
        assert [await measure_memory(device) for _ in range(3)] == 3 * [None]  # at once
        assert count_calls(driver) == calls
    assert await measure_memory(device) == DeviceMemory(8, 5)


async def test_memory_of_a_device_that_no_driver_knows_is_unknown() -> None:
    assert await measure_memory(FoundDevice("cuda:0", "1", pci_bus_id="ffff:ff:1f.7")) is None
