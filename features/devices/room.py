"""Devices as rooms of a load: which a load may run on, what it needs there, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from events.jobs import Footprint
from events.types import LoadParameters
from features.devices.allocation import DeviceAllocation, MeasuredAllocation
from features.devices.names import CPU, provider_of
from runtime.consumer.running import RunningLoad
from runtime.process.pool import WorkerPool
from runtime.repository import SizedFile
from runtime.rooms import CPU_TARGET, MACHINE, Allocation, RoomLimits, Target

PROVIDER_BYTES = 64 * 2**20
"""Memory of the machine that a provider's libraries take in a worker, and the code that they make for a model
(measured: 23 MB when OpenVINO is registered)."""
CONTEXT_BYTES = 500_000_000
"""Memory of a device that its driver keeps for each process (NVIDIA says 300 to 500 MB; not measured)."""
DEVICE_BYTES_PER_FILE_BYTE = 2
"""Weights are on the device once, and its allocator doubles what it asks the driver for (not measured)."""


def limit_device(name: str, budget_bytes: int | None = None, *, has_memory: bool = False) -> RoomLimits:
    """Return the limits of loads on a device, beside those of the machine.

    Args:
        name: of the device.
        budget_bytes: its memory for all workers; None is no limit.
        has_memory: whether it has memory of its own. Else the machine's memory of its workers counts.
    """
    return RoomLimits(f"the device {name}", budget_bytes, is_measured=has_memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTarget(Target):
    """A device on which a load may run; devices of one provider are equal, since `cuda:*` names them all.

    Attributes:
        has_memory: whether it has memory of its own.
    """

    has_memory: bool

    def list_needs(
        self, memory_bytes: int, instances: int, files: Sequence[SizedFile], footprints: Sequence[Footprint]
    ) -> tuple[Mapping[str, int], bool]:
        if not self.has_memory:
            return {self.name: memory_bytes, MACHINE: memory_bytes}, False
        measured = [seen.target_bytes for seen in footprints if seen.target_bytes is not UNSET]
        guess = CONTEXT_BYTES + DEVICE_BYTES_PER_FILE_BYTE * sum(file.bytes for file in files)
        one = max(CONTEXT_BYTES, *measured) if measured else guess
        return {self.name: one * instances, MACHINE: memory_bytes}, not measured

    def allocate(
        self,
        needs: Mapping[str, int],
        parameters: LoadParameters,
        limits: RoomLimits | None,
        pool: WorkerPool,
        running: Callable[[], Iterable[Allocation]],
    ) -> Allocation:
        device = pool.targets.found[self.name]
        if limits is None or not limits.is_measured:
            return DeviceAllocation(device, parameters, pool)
        need_bytes = needs[self.name]
        return MeasuredAllocation(device, parameters, pool, need_bytes, limits.budget_bytes, running)


def target_device(name: str, *, has_memory: bool) -> Target:
    """Return the target of this name, which may be the CPU's."""
    if name == CPU:
        return CPU_TARGET
    return DeviceTarget(
        name=name, group=provider_of(name), worker_bytes=PROVIDER_BYTES, has_memory=has_memory
    )


def find_targets(
    parameters: LoadParameters, pool: WorkerPool, limits: Mapping[str, RoomLimits]
) -> list[Target]:
    """Return the devices that a load may run on.

    Raises:
        DeviceUnavailable: `device_unavailable`, there is none of them.
    """
    names = pool.targets.find_candidates(parameters.devices or (CPU,))
    return [target_device(name, has_memory=name in limits and limits[name].is_measured) for name in names]


def list_members(allocation: Allocation, taken: Mapping[str, int]) -> Mapping[str, Any]:
    """Return the members of `LoadUsage` about a load's device."""
    if not isinstance(allocation, DeviceAllocation):
        return {"device": None, "device_bytes": 0}
    name, is_own = allocation.device.name, isinstance(allocation, MeasuredAllocation)
    return {"device": name, "device_bytes": taken[name] if is_own else 0}


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """Memory of the loads on one device: of its own memory, or of the machine's if it has none.

    `reserved_bytes` is of those that load, and `used_bytes` of the others; `models` is how many models there
    are.
    """

    device: str
    reserved_bytes: int
    used_bytes: int
    models: int


def list_device_usage(running: Iterable[RunningLoad], devices: Iterable[str]) -> list[DeviceUsage]:
    """Return the use of each of these devices."""
    there = [(load, load.list_taken()) for load in running if not load.is_gone]
    return [
        _describe_usage(device, [(load, taken[device]) for load, taken in there if device in taken])
        for device in devices
    ]


def _describe_usage(device: str, loads: Sequence[tuple[RunningLoad, int]]) -> DeviceUsage:
    taken = {True: 0, False: 0}
    for load, taken_bytes in loads:
        taken[load.report is None] += taken_bytes
    return DeviceUsage(device, taken[True], taken[False], len({load.model_id for load, _ in loads}))
