"""Devices of servers that share a ledger: the attributes that say them, and the demand of a load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from events.types import LoadParameters
from features.devices.names import CPU, find_matching, provider_of
from runtime.process.pool import WorkerPool


@dataclass(frozen=True, slots=True)
class DeviceDemand:
    """A demand of one of these devices, the preferred one first."""

    devices: tuple[str, ...]

    def is_met(self, attributes: Iterable[str]) -> bool:
        return bool(find_matching(self.devices, _read_devices(attributes)))

    def rank(self, attributes: Iterable[str]) -> int:
        """Return how many devices are named before the first that is there."""
        there = _read_devices(attributes)
        return len(list(takewhile(lambda name: not find_matching((name,), there), self.devices)))

    def describe(self) -> str:
        return "" if CPU in self.devices else f" and has one of the devices {', '.join(self.devices)}"


def list_demands(parameters: LoadParameters) -> Sequence[DeviceDemand]:
    return [DeviceDemand(parameters.devices)] if parameters.devices else []


def list_attributes(pool: WorkerPool) -> Iterable[str]:
    """Return the attributes of a server with these devices: `device=cuda`, `device.cuda=0`."""
    providers = {f"device={provider_of(name)}" for name in pool.targets.found}
    return providers | {f"device.{name.replace(':', '=')}" for name in pool.targets.found}


def _read_devices(attributes: Iterable[str]) -> tuple[str, ...]:
    """Return the devices that attributes say, and the CPU."""
    names = (each.removeprefix("device.") for each in attributes if each.startswith("device."))
    return (*(name.replace("=", ":") for name in names), CPU)
