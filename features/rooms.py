"""The targets of loads, with their rooms beside the machine's, and demands on the server that runs a load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from events.types import LoadParameters
from features.devices import placement
from features.devices import room as devices
from runtime.process.pool import WorkerPool
from runtime.rooms import Allocation, RoomLimits, Target

FindTargets = Callable[[LoadParameters, WorkerPool, Mapping[str, RoomLimits]], Sequence[Target]]
"""Returns the targets that a load asks for, the preferred one first.

Raises:
    RuntimeProblem: there is none of them.
"""

TARGETS: Mapping[str, FindTargets] = {"devices": devices.find_targets}
"""By the parameter with which a load asks for targets."""

ListMembers = Callable[[Allocation, Mapping[str, int]], Mapping[str, Any]]
"""Returns members of `LoadUsage` of a load with this allocation, which takes these bytes of each room."""

MEMBERS_OF_USE: tuple[ListMembers, ...] = (devices.list_members,)


class Demand(Protocol):
    """A demand of a load on the attributes of its server."""

    def is_met(self, attributes: Iterable[str]) -> bool:
        """Whether a server with these attributes may run the load."""

    def rank(self, attributes: Iterable[str]) -> int:
        """Return a lower number for the better of two servers."""

    def describe(self) -> str:
        """Return the demand in words, for a sentence about servers; empty if each meets it."""


DEMANDS: tuple[Callable[[LoadParameters], Sequence[Demand]], ...] = (placement.list_demands,)

ATTRIBUTES: tuple[Callable[[WorkerPool], Iterable[str]], ...] = (placement.list_attributes,)
"""Functions that return attributes of this server, by what its pool of workers has found."""


def list_demands(parameters: LoadParameters) -> tuple[Demand, ...]:
    return tuple(demand for each in DEMANDS for demand in each(parameters))
