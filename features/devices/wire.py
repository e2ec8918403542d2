"""Messages about devices between the server and its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from features.devices.names import CPU, CUDA

ACTS_IN_WORDS: Mapping[str, str] = {"call_drivers": "call drivers of devices"}
"""A forbidden act that workers of some providers can do, as sentences call it."""
Name = Annotated[str, msgspec.Meta(max_length=4096)]
MAPPED_BYTES = 64 * 2**20
"""Memory that a provider maps and does not touch: OpenVINO's libraries and threads 50 MB (measured)."""
ADDRESS_BYTES = 2**29
"""Addresses of a provider beside its data: the libraries of OpenVINO have 100 MB (measured)."""


class ProviderLibrary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The library of an execution provider that is installed.

    Attributes:
        provider: its name in names of devices.
        path: the library's absolute path.
        ep_name: ONNX Runtime's name of the provider.
    """

    provider: Name
    path: str
    ep_name: Name

    @property
    def has_driver(self) -> bool:
        """Whether the provider calls a driver, which reserves more addresses than there is memory."""
        return self.provider == CUDA


class FoundDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device that a provider has found on this machine.

    Attributes:
        name: its name in loads (`features.devices.names`).
        version: the provider's version.
        hardware: the provider's name of it, for people.
        pci_bus_id: its driver's name of it; "" without such a bus.
    """

    name: Name
    version: Name
    hardware: Name = ""
    pci_bus_id: Name = ""


class TargetDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device of a load.

    Attributes:
        name: its name in loads (`features.devices.names`).
        library: its provider's library.
        options: options of the provider.
        falls_back: whether operators that it does not support run on the CPU; else the load is refused.
    """

    name: Name
    library: ProviderLibrary
    options: Mapping[str, str] = {}
    falls_back: bool = False

    @property
    def mapped_bytes(self) -> int:
        """Memory that each worker maps beside its model."""
        return MAPPED_BYTES

    @property
    def address_bytes(self) -> int | None:
        """Addresses that each worker needs beside its model; None needs them all."""
        return None if self.library.has_driver else ADDRESS_BYTES

    def may_run_on(self, providers: Sequence[str]) -> bool:
        """Whether operators may run on these: its own provider, then the CPU's if it falls back."""
        return [*providers] in ([self.library.provider], [self.library.provider, *[CPU][: self.falls_back]])
