"""What features add to a server: its setup, parameters of loads, members of answers, metrics."""

from __future__ import annotations

from typing import TypeAlias

from features.devices import loads, setup

choose_targets = setup.choose_targets
"""Returns the targets that a server may use, for its pool of workers to find."""
find_rooms = setup.limit_devices
"""Returns the rooms beside the machine's memory, by name."""
describe_setup = setup.describe_setup
"""Yields sentences about what was found."""

LoadFieldsSchema = loads.DeviceFieldsSchema
"""Parameters of a load in a request, or in a model's file."""
settle_parameters = loads.settle_parameters
"""Returns parameters of a load with the server's defaults."""
find_triton_kind, read_triton_kind = loads.find_triton_kind, loads.read_triton_kind

Gauge: TypeAlias = setup.Gauge
read_gauges = setup.read_gauges
"""Returns metrics: name, text, values, and labels."""
read_resources = setup.read_resources
"""Returns members of `Resources`."""
show_load = setup.show_load
"""Returns members of `ModelInfo` about what a model serves from."""
