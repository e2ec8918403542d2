"""What features set up in a server, once its workers are confined."""

from __future__ import annotations

from features.devices import setup as devices

choose_targets = devices.choose_targets
"""Returns the targets that a server may use, for its pool of workers to find."""
find_rooms = devices.limit_devices
"""Returns the rooms beside the machine's memory, by name."""
describe_setup = devices.describe_setup
"""Yields sentences about what was found."""
