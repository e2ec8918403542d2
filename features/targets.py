"""Targets of loads beside the CPU, as the pool of workers finds them."""

from __future__ import annotations

from features.devices.found import Devices

Targets = Devices
