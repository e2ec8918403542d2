"""The targets of loads, with their rooms beside the machine's, and members of answers about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from events.types import LoadParameters
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
