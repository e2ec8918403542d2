"""Devices of this machine: the installed execution providers, their devices, and the devices' memory.

A provider is a plugin of ONNX Runtime in a package of its own, `onnxruntime_ep_NAME`, whose functions
`get_library_path` and `get_ep_name` are those of ONNX Runtime's guidance for such packages. A worker
registers the library, after its fork: the children of a process that has initialised CUDA cannot use it.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import ModuleType
from typing import Any, TypeVar

from features.devices.names import ALL_DEVICES, ANY, CPU, CUDA, OPENVINO, find_matching, provider_of
from features.devices.wire import FoundDevice, ProviderLibrary, TargetDevice
from runtime.errors import RuntimeProblem
from runtime.process.confinement import UNCONFINED, AppliedLayers, weakest
from runtime.timeouts import MEASURE_LIMIT_S, timeout

T = TypeVar("T")

DEVICES_LIMIT_S = 10.0
"""Time at the start for a provider's package to name its library, for a throw-away worker to register it, and
for the first answer of a driver: OpenVINO takes 0.05 s, a driver that starts its devices seconds. A hanging
provider takes this long, beside the others; the server then starts without it."""
PACKAGE_PREFIX = "onnxruntime_ep_"
INSTALL = "the documentation says on its page of devices how providers are installed"
"""No name of a package comes from a caller's text: anybody may have published such a package."""
CUDA_LIBRARY = "capi/libonnxruntime_providers_cuda.so"
"""Of the package `onnxruntime-gpu`, in the folder of `onnxruntime`, in whose place it is installed."""
CUDA_EP_NAME = "CUDAExecutionProvider"
SAME_AS_REQUESTED = "1"
"""The arena's strategy: it takes a tensor's need from the driver. The other strategy doubles its memory."""


class DeviceUnavailable(RuntimeProblem):
    """This server has none of the devices that a load names, or may not use them."""

    code = "device_unavailable"


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device's own."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of this server beside the CPU, as a throw-away worker found them.

    Attributes:
        found: each device by its name.
        libraries: the installed providers by their name, including those without a device.
        problems: the defects of providers and devices, in sentences that begin with the name.
        visible: the names of devices that the server uses if it has them, like `cuda:1` or `cuda:*`.
        applied: the confinement of workers of loads there, which `require` does not demand.
    """

    found: Mapping[str, FoundDevice] = field(default_factory=dict)
    libraries: Mapping[str, ProviderLibrary] = field(default_factory=dict)
    problems: Sequence[str] = ()
    visible: Sequence[str] = ALL_DEVICES
    applied: AppliedLayers = UNCONFINED

    async def find(
        self, probe: Callable[[ProviderLibrary, float], Awaitable[AppliedLayers]], known: Collection[str]
    ) -> Devices:
        """Return the visible devices of installed providers, with the confinement of their workers.

        Each provider is tried in a worker of its own, so that a crash or hang affects no other provider.

        Args:
            probe: tries a provider, for at most so many seconds.
            known: problems that are not those of a provider.
        """
        installed = await find_providers(self.visible)
        probed = await asyncio.gather(
            *(probe(library, DEVICES_LIMIT_S) for library in installed.libraries.values())
        )
        present = {device.name: device for each in probed for device in each.targets}
        found = {name: present[name] for name in present if find_matching(self.visible, [name])}
        useful = [each for each in probed if any(device.name in found for device in each.targets)]
        of_probes = [problem for each in probed for problem in each.problems if problem not in known]
        problems = tuple(dict.fromkeys([*installed.problems, *of_probes]))
        applied = weakest(useful) if useful else UNCONFINED
        return replace(installed, found=found, problems=problems, applied=applied)

    def find_candidates(self, devices: Sequence[str]) -> tuple[str, ...]:
        """Return the devices that a load may run on, the preferred one first; the CPU among them is `cpu`.

        Raises:
            DeviceUnavailable: `device_unavailable`, there is none of them.
        """
        present = (CPU, *self.found)
        candidates = find_matching(devices, present)
        if not candidates:
            reasons = [
                each
                for provider in dict.fromkeys(map(provider_of, devices))
                for each in self._explain(provider)
            ]
            there = f"this server has no {' or '.join(devices)}; its devices are {', '.join(present)}"
            raise DeviceUnavailable(". ".join([there, *reasons]))
        return candidates

    def target(self, device: str, *, falls_back: bool, memory_bytes: int | None) -> TargetDevice:
        """Return the data about a load's device for its workers.

        The options of CUDA are those of the arena in ONNX Runtime's design document of its plugin ("CUDA
        Plugin EP: Arena Allocator Integration"); they are not tried.

        Args:
            device: its name.
            falls_back: whether operators that it does not support run on the CPU.
            memory_bytes: limit of the provider's part of the device's own memory.
        """
        library = self.libraries[provider_of(device)]
        options = {"arena.extend_strategy": SAME_AS_REQUESTED} if library.provider == CUDA else {}
        if options and memory_bytes is not None:
            options["arena.max_mem"] = str(memory_bytes)
        return TargetDevice(device, library, options, falls_back)

    def _explain(self, provider: str) -> Iterator[str]:
        """Yield why a provider has no device, and what to do."""
        problems = [each for each in self.problems if provider_of(each.partition(": ")[0]) == provider]
        yield from problems
        if provider == CPU:
            return
        if ANY not in self.visible:
            yield f"it uses {','.join(self.visible) or 'none'} of the machine's (--visible-devices)"
        if provider in self.libraries or problems or not _is_visible(provider, self.visible):
            return
        how = "pip install 'loadledger[openvino]', and restart" if provider == OPENVINO else INSTALL
        yield f"{provider} is not installed: {how}"


class CallingThread:
    """A thread for others' code, which may hang: one call at a time, and none while one is late.

    It is a daemon: neither the event loop's executor nor the end of the process waits for it.
    """

    def __init__(self) -> None:
        self._calls = SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[object, ...]] | None]()
        self._thread: Thread | None = None
        self._running: Future[Any] | None = None
        self._late: Future[Any] | None = None

    async def call(self, limit_s: float, function: Callable[..., T], *args: object) -> T:
        """Return a function's result, or raise its exception.

        Raises:
            TimeoutError: it has not returned in time, or a call before is late, and still runs.
        """
        if self._late is not None and not self._late.done():
            raise TimeoutError
        if self._thread is None:
            self._thread = Thread(target=self._run, daemon=True, name="others' code")
            self._thread.start()
        call = Future[T]()
        self._calls.put((call, function, args))
        try:
            async with timeout(limit_s):
                return await asyncio.wrap_future(call)
        except TimeoutError:
            self._late = self._running
            raise

    def close(self) -> None:
        """Have the thread end when it has nothing more to do."""
        self._calls.put(None)

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            call, function, args = work
            if call.set_running_or_notify_cancel():
                self._running = call
                try:
                    call.set_result(function(*args))
                except Exception as error:  # noqa: BLE001 - the caller's matter
                    call.set_exception(error)


async def find_providers(visible: Sequence[str] = ALL_DEVICES) -> Devices:
    """Return the installed providers and their problems, and no devices yet; it imports no ONNX Runtime.

    Args:
        visible: names of devices; the packages of other providers are left alone.
    """
    libraries, problems = dict[str, ProviderLibrary](), list[str]()
    if not visible:  # to look through all installed packages takes tens of milliseconds
        return Devices(visible=visible)
    names, included = await asyncio.to_thread(_look_for_packages)
    names = [name for name in names if _is_visible(name.removeprefix(PACKAGE_PREFIX), visible)]
    for read in await asyncio.gather(*map(_try_package, names)):
        if isinstance(read, ProviderLibrary):
            libraries[read.provider] = read
        else:
            problems.append(read)
    if included is not None and _is_visible(CUDA, visible):
        libraries.setdefault(CUDA, included)
    return Devices(libraries=libraries, problems=problems, visible=visible)


def _is_visible(provider: str, visible: Sequence[str]) -> bool:
    """Whether a list names a device of a provider."""
    return any(provider_of(each) in {provider, ANY} for each in visible)


def _look_for_packages() -> tuple[list[str], ProviderLibrary | None]:
    """Return the names of providers' packages, and the provider in ONNX Runtime's own."""
    names = (module.name for module in pkgutil.iter_modules())
    return [name for name in names if name.startswith(PACKAGE_PREFIX)], _find_included_cuda()


async def _try_package(name: str) -> ProviderLibrary | str:
    """Ask a provider's package where its library is; returns its problem if it does not say it."""
    provider, thread = name.removeprefix(PACKAGE_PREFIX), CallingThread()
    try:
        return await thread.call(DEVICES_LIMIT_S, _read_package, provider, name)
    except TimeoutError:
        return f"{provider}: the package {name} does not answer"
    except Exception as error:  # noqa: BLE001 - whatever the code of the package raises
        return f"{provider}: the package {name} cannot be used: {error}"
    finally:
        thread.close()


def _read_package(provider: str, name: str) -> ProviderLibrary:
    """Run a provider's package, which only says where its library is, and ask it."""
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module named {name}")
    package = module_from_spec(spec)
    spec.loader.exec_module(package)
    return ProviderLibrary(provider, str(Path(package.get_library_path()).absolute()), package.get_ep_name())


def _find_included_cuda() -> ProviderLibrary | None:
    found = find_spec("onnxruntime")
    folders = [] if found is None else found.submodule_search_locations or []
    paths = (Path(folder, CUDA_LIBRARY).absolute() for folder in folders)
    path = next((path for path in paths if path.exists()), None)
    return None if path is None else ProviderLibrary(CUDA, str(path), CUDA_EP_NAME)


async def measure_memory(device: FoundDevice) -> DeviceMemory | None:
    """Return the device's own memory, or None, also if the driver is late."""
    try:
        return await query_memory(device, MEASURE_LIMIT_S)
    except TimeoutError:
        return None


async def query_memory(device: FoundDevice, limit_s: float) -> DeviceMemory | None:
    """Return the device's own memory, as its driver reports it, or None without memory or report.

    It asks the driver (NVIDIA's NVML), which creates no context there.

    Raises:
        TimeoutError: the driver does not answer.
    """
    return await _driver.call(limit_s, _read_memory, device.pci_bus_id) if device.pci_bus_id else None


_driver = CallingThread()


def _read_memory(pci_bus_id: str) -> DeviceMemory | None:
    nvml = _open_nvml()
    if nvml is None:
        return None
    try:
        seen = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id))
    except nvml.NVMLError:
        return None
    return DeviceMemory(seen.total, seen.free)


@cache
def _open_nvml() -> ModuleType | None:
    """Return NVML, initialised, or None without the package `nvidia-ml-py` or the driver's library."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
