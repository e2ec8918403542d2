"""Targets of loads beside the CPU, as messages to and from workers have them."""

from __future__ import annotations

from features.devices.wire import ACTS_IN_WORDS, FoundDevice, ProviderLibrary, TargetDevice

Library = ProviderLibrary
"""An execution provider that is installed."""
FoundTarget = FoundDevice
Target = TargetDevice

__all__ = ["ACTS_IN_WORDS"]
