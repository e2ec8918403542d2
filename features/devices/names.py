"""Names of devices, on which loads run: `cpu`, or an execution provider and one of its devices.

`cuda:0` is one device, `cuda:*` any of that provider. `cpu` is ONNX Runtime's own provider, and the default.
Names are case-sensitive, since they are compared in many places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

CPU = "cpu"
CUDA, OPENVINO = "cuda", "openvino"
ANY = "*"
ALL_DEVICES = (ANY,)
"""A list that matches each device."""
DEVICE = re.compile(r"cpu|[a-z][a-z0-9_]{0,31}:(?:\*|[a-z0-9.]{1,31})", re.ASCII)
DEVICE_RULE = "Must be cpu, or a provider and its device, like cuda:0, cuda:* (any) or openvino:cpu."
MAX_DEVICES = 16
"""That a load may name: its event has them."""
FALLBACKS = ("refuse", CPU)
"""Treatments of operators that a device does not support: the load is refused, or they run on the CPU."""


def provider_of(device: str) -> str:
    """Return the execution provider of a device."""
    return device.partition(":")[0]


def find_matching(devices: Iterable[str], present: Iterable[str]) -> tuple[str, ...]:
    """Return which of the devices that are present match a list like that of a load, in the list's order."""
    there = tuple(present)
    found = dict.fromkeys(each for wanted in devices for each in there if _matches(wanted, each))
    return tuple(found)


def _matches(wanted: str, device: str) -> bool:
    return wanted in {device, f"{provider_of(device)}:{ANY}", ANY}
