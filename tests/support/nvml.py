"""A stand-in for NVIDIA's management library (NVML), which `nvidia-ml-py` loads: no test has a GPU."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from features.devices.found import measure_memory
from features.devices.wire import FoundDevice
from support.shims import Shim, build_shim

PCI_BUS_IDS = ("0000:01:00.0", "0000:02:00.0")
"""Of its devices."""


def build_nvml(folder: Path) -> Shim:
    """Build the library, for processes that are started with `environment_of`.

    Its numbers are, of each device, all its memory and what is free of it, in bytes; whether calls hang; and
    how many calls there were.
    """
    here = Path(__file__).parent
    return build_shim(here / "nvml.c", folder, "6Q", "NVML_NUMBERS", name="libnvidia-ml.so.1")


@asynccontextmanager
async def hanging(driver: Shim) -> AsyncIterator[None]:
    """Have the calls of this process's driver hang; afterwards it answers again."""
    driver.set(*driver.numbers[:4], 1)
    try:
        yield
    finally:
        driver.set(*driver.numbers[:4], 0)
        device = FoundDevice("cuda:0", "1", pci_bus_id=PCI_BUS_IDS[0])
        while await measure_memory(device) is None:  # noqa: ASYNC110 - until the late call has ended
            await asyncio.sleep(0)


def count_calls(driver: Shim) -> int:
    return driver.numbers[5]
