"""The targets of loads, with their rooms beside the machine's, and members of answers about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from events.types import LoadParameters
from features.devices import room as devices
from runtime.process.pool import WorkerPool
from runtime.rooms import CPU_TARGET, Allocation, RoomLimits, Target

FindTargets = Callable[[LoadParameters, WorkerPool, Mapping[str, RoomLimits]], Sequence[Target]]
"""Returns the targets that a load asks for, the preferred one first; none if it asks for nothing.

Raises:
    RuntimeProblem: it asks for targets of which there is none.
"""

TARGETS: tuple[FindTargets, ...] = (devices.find_targets,)

ListMembers = Callable[[Allocation, Mapping[str, int]], Mapping[str, Any]]
"""Returns members of `LoadUsage` of a load with this allocation, which takes these bytes of each room."""

MEMBERS_OF_USE: tuple[ListMembers, ...] = (devices.list_members,)


def find_targets(
    parameters: LoadParameters, pool: WorkerPool, limits: Mapping[str, RoomLimits]
) -> Sequence[Target]:
    """Return the targets on which a load may run, the preferred one first; for errors see `FindTargets`."""
    found = (find(parameters, pool, limits) for find in TARGETS)
    return list(chain.from_iterable(found)) or [CPU_TARGET]
