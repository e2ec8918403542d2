"""What facts say about devices: parameters of a load, and what runs where; these are for ever, too."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

STORED_NAMES = {"target_name": "device", "target_bytes": "device_bytes", "targets": "devices"}
"""What JSON calls the target of a load, its own memory, and what runs where."""


class DeviceUse(Struct, frozen=True, gc=False):
    """The part of a loaded model that runs on one device.

    A load has first its device, then the CPU if nodes fall back to it; none is there for a load on the CPU.

    Attributes:
        provider: the execution provider; `cpu` is ONNX Runtime's own.
        version: of the provider.
        device: its name (`features.devices.names`), like `cuda:0`.
        nodes: how many nodes of the model's graph run there, as the providers were offered it.
        memory_bytes: that the workers take there, with what the driver keeps for each process; None if the
            device has only the machine's memory, which the load's own figures count.
    """

    provider: str
    version: str
    device: str
    nodes: int
    memory_bytes: int | None = None

    @property
    def target(self) -> str:
        return self.device


class DeviceParameters(Struct, frozen=True, gc=False, kw_only=True):
    """Parameters of a load on devices.

    Attributes:
        devices: names of devices (`features.devices.names`); the load runs on the first that has room. Not
            stored for the CPU.
        fallback: `cpu` if nodes that the device does not support may run on the CPU; not stored for `refuse`.
    """

    devices: tuple[str, ...] | UnsetType = UNSET
    fallback: str | UnsetType = UNSET
