"""Additions of features to a server: its setup, parameters of loads, members of answers, metrics, notices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from events.history import ShownModel
from events.jobs import Job
from events.presence import Liveness
from features.devices import loads, setup
from features.nodes import loads as nodes
from features.nodes import members
from features.notify import app as notify
from features.records import app as records
from server.config import Config

T = TypeVar("T")
Members = Mapping[str, Any]

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


GAUGES = (setup.read_gauges, records.read_gauges, notify.read_gauges)
"""Return metrics: name, text, values, and labels. One whose name ends in `_total` is a counter."""
RESOURCES = (setup.read_resources,)
"""Return members of `Resources`."""
NOTICES = (records.read_notices, notify.read_notices)
"""Return what needs an operator."""
show_load = setup.show_load
"""Returns members of `ModelInfo` about what a model serves from."""

OF_JOBS: tuple[Callable[[Job], Members], ...] = (members.show_place,)
OF_MODELS: tuple[Callable[[ShownModel], Members], ...] = (members.show_copies,)
OF_MOMENTS: tuple[Callable[[Liveness | None], Members], ...] = (members.show_presences,)
"""Of answers with `?at=`."""


def collect(functions: Iterable[Callable[[T], Members]], shown: T) -> dict[str, Any]:
    """Return the members that these functions add for an object."""
    return {name: value for function in functions for name, value in function(shown).items()}
