"""What features add to a server: its setup, parameters of loads, members of answers, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from features.devices import loads, setup
from features.nodes import loads as nodes
from server.config import Config

choose_targets = setup.choose_targets
"""Returns the targets that a server may use, for its pool of workers to find."""
find_rooms = setup.limit_devices
"""Returns the rooms beside the machine's memory, by name."""
describe_setup = setup.describe_setup
"""Yields sentences about what was found."""


class LoadFieldsSchema(loads.DeviceFieldsSchema, nodes.NodeFieldsSchema):
    """Parameters of a load in a request, or in a model's file."""


def settle_parameters(merged: Mapping[str, Any], config: Config) -> Mapping[str, Any]:
    """Return parameters of a load with the server's defaults.

    Raises:
        ValidationError: one is not possible; it has the name.
    """
    return {**nodes.settle_parameters(merged, config), **loads.settle_parameters(merged, config)}


find_triton_kind, read_triton_kind = loads.find_triton_kind, loads.read_triton_kind

Gauge: TypeAlias = setup.Gauge
read_gauges = setup.read_gauges
"""Returns metrics: name, text, values, and labels."""
read_resources = setup.read_resources
"""Returns members of `Resources`."""
show_load = setup.show_load
"""Returns members of `ModelInfo` about what a model serves from."""
