"""Rooms: the parts that a load takes of the machine's memory, and of rooms of features.

A feature with rooms gives the targets on which a load may run (`features.rooms`). For each target the
scheduler gets an `Alternative`: the bytes that the load needs there, by room. It starts the load on the first
alternative that has room everywhere, and asks its target for an `Allocation`, which the load keeps until its
workers have exited. `Target` and `Allocation` themselves are those of the CPU: a load that takes memory of
the machine only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from events.jobs import Footprint
from events.types import LoadParameters, ModelLoaded, ModelUnloaded
from runtime.errors import LoadRefused
from runtime.process.pool import WorkerPool
from runtime.repository import SizedFile
from runtime.wire import Loaded

MACHINE = "machine"
"""The name of the room that each load takes a part of: the machine's memory, with the model slots."""


@dataclass(frozen=True, slots=True)
class RoomLimits:
    """The limits of a room.

    Attributes:
        title: its name in sentences.
        budget_bytes: limit of all workers together; None is no limit.
        is_measured: whether what a load takes there is measured as what is free before and after the load.
            So one load takes of it at a time, and no memory limit of the load bounds that.
    """

    title: str
    budget_bytes: int | None = None
    is_measured: bool = False


class Allocation:
    """The parts of rooms that one load takes, until its workers have exited; here only the machine's.

    Attributes:
        returning: the wait for what the workers took, since they have exited.
    """

    returning: asyncio.Task[None] | None = None

    @property
    def is_held(self) -> bool:
        """Whether its workers may have taken something that is not known to be back."""
        return False

    def order(self) -> Any:
        """Return the target for a worker, which alone reads it; None is the CPU."""
        return None

    def list_taken(self, memory_bytes: int) -> Mapping[str, int]:
        """Return the bytes that count in each room; `memory_bytes` in that of the machine."""
        return {MACHINE: memory_bytes}

    def measure(self, on_excess: Callable[[LoadRefused], None]) -> AbstractAsyncContextManager[None]:
        """Measure what the workers take during the load.

        Args:
            on_excess: called once they have taken more than they may, with `out_of_memory`.

        Raises:
            LoadRefused: `out_of_memory`, they have done so in the end.
        """
        del on_excess
        return nullcontext()

    async def expect_return(self) -> None:
        """Prepare for the end of all workers, right before it."""

    def on_exit(self, others: int, *, is_expected: bool, wake: Callable[[], None]) -> None:
        """Count what a worker took no longer, which has exited; so many others are left.

        Args:
            others: the workers that have not exited.
            is_expected: whether the server ended it.
            wake: called when what the workers took is back.
        """

    def complete_loaded(self, fact: ModelLoaded, report: Loaded) -> ModelLoaded:
        """Return the outcome of the load with the record of its target; `report` is a worker's."""
        del report
        return fact

    def complete_unloaded(self, fact: ModelUnloaded) -> ModelUnloaded:
        """Return the end of the load with the record of its target."""
        return fact


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load may run; here the CPU.

    Attributes:
        name: its name in footprints.
        group: equal targets have the same one: of these, the load takes the first on which it need not wait
            for the measurement of another.
        worker_bytes: additional memory of the machine that each worker takes there, as for libraries.
    """

    name: str = ""
    group: str = ""
    worker_bytes: int = 0

    def list_needs(
        self, memory_bytes: int, instances: int, files: Sequence[SizedFile], footprints: Sequence[Footprint]
    ) -> tuple[Mapping[str, int], bool]:
        """Return the bytes that a load needs of each room, and whether one of them rests on file sizes only.

        Messages name the first room that is too small.

        Args:
            memory_bytes: the load's need of the machine's memory.
            instances: the load's number of workers.
            files: the version's files.
            footprints: those of earlier loads of the same files here.
        """
        del instances, files, footprints
        return {MACHINE: memory_bytes}, False

    def allocate(
        self,
        needs: Mapping[str, int],
        parameters: LoadParameters,
        limits: RoomLimits | None,
        pool: WorkerPool,
        running: Callable[[], Iterable[Allocation]],
    ) -> Allocation:
        """Return the allocation of a load that starts here.

        Args:
            needs: the load's need of each room.
            parameters: the load's parameters.
            limits: the limits of this target's room, if it has one.
            pool: has its workers.
            running: returns the allocations of all running loads.
        """
        del needs, parameters, limits, pool, running
        return Allocation()


CPU_TARGET = Target()


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to run a load.

    Attributes:
        needs: the bytes that all its workers take at most, of each room.
        target: where they run.
        is_guess: whether the needs rest on file sizes, not on an earlier load there.
    """

    needs: Mapping[str, int]
    target: Target = CPU_TARGET
    is_guess: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the machine's memory."""
        return self.needs[MACHINE]
