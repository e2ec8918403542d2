"""A load's allocation on a device: of the device's own memory, reserved, then measured, until it is back.

One load at a time runs on such a device, so what is free there before and after says what the load took. What
the server's other loads return meanwhile is taken into account. What other processes of the machine take or
return is noise, as is growth of other models: no figure of the driver would say it of each worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from msgspec import UNSET
from msgspec.structs import replace

from events.types import LoadParameters, ModelLoaded, ModelUnloaded
from features.devices.facts import DeviceUse
from features.devices.found import measure_memory
from features.devices.names import CPU
from features.devices.wire import FoundDevice, TargetDevice
from runtime.errors import LoadRefused
from runtime.memory import format_megabytes
from runtime.process.pool import WorkerPool, start_task
from runtime.rooms import MACHINE, Allocation
from runtime.scheduler.view import load_allowance
from runtime.timeouts import timeout
from runtime.wire import Loaded

SAMPLE_S = 0.5
"""How often to check that a load takes no more than it may. A reading takes a millisecond."""
POLL_S = 0.05
"""How often to check whether the memory is back."""
DEVICE_RETURN_S = 5.0
"""Time for a device to return the memory of workers that have exited: a driver may free it after the exit.
Memory that is missing then is recorded, and no longer waited for."""
UNRETURNED_SHARE = 50
"""A fiftieth of it may be missing when it counts as returned: drivers round, and others use the device."""


@dataclass(slots=True, eq=False)
class DeviceAllocation(Allocation):
    """What a load takes on a device without memory of its own: as much as of the machine's.

    Attributes:
        device: where it loads.
        parameters: of the load.
        pool: has its workers.
    """

    device: FoundDevice
    parameters: LoadParameters
    pool: WorkerPool

    def order(self) -> TargetDevice:
        """Return the device, with a bound of what one worker may take there."""
        falls_back, bound = self.parameters.fallback == CPU, self._bound_bytes()
        return self.pool.targets.target(self.device.name, falls_back=falls_back, memory_bytes=bound)

    def list_taken(self, memory_bytes: int) -> Mapping[str, int]:
        return {self.device.name: memory_bytes, MACHINE: memory_bytes}

    def complete_loaded(self, fact: ModelLoaded, report: Loaded) -> ModelLoaded:
        """Add what runs on the device, then what falls back to the CPU, as a worker reports it."""
        first, *others = (
            DeviceUse(each.provider, each.version, CPU, each.operators) for each in report.placed
        )
        use = replace(first, device=self.device.name, memory_bytes=self._measured_bytes())
        confinement = self.pool.targets.applied.confinement
        return replace(fact, confinement=confinement, targets=(use, *others))

    def _bound_bytes(self) -> int | None:
        return None

    def _measured_bytes(self) -> int | None:
        return None


@dataclass(slots=True, eq=False)
class MeasuredAllocation(DeviceAllocation):
    """What a load takes of a device's own memory.

    Attributes:
        reserved_bytes: what it is expected to take at most.
        budget_bytes: of the device; None is no limit.
        all: returns the allocations of all running loads.
        taken_bytes: what its workers had taken at the last reading.
        available_bytes: what was free, or taken by the others, before its workers started; None until then.
        is_measured: whether all its workers have loaded.
        returning: waits until the memory is back, since the workers have exited.
        is_returned: whether that wait has ended.
        unreturned_bytes: what was not back then.
    """

    reserved_bytes: int
    budget_bytes: int | None
    all: Callable[[], Iterable[Allocation]]
    taken_bytes: int = 0
    available_bytes: int | None = None
    is_measured: bool = False
    returning: asyncio.Task[None] | None = None
    is_returned: bool = False
    unreturned_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that count against the device's budget."""
        if self.is_returned:
            return 0
        return self.taken_bytes if self.is_measured else max(self.reserved_bytes, self.taken_bytes)

    @property
    def allowance_bytes(self) -> int | None:
        """The most that its workers may take until they have loaded; None without a budget."""
        if self.budget_bytes is None:
            return None
        return load_allowance(
            self.budget_bytes, sum(each.bytes for each in self._others()), self.reserved_bytes
        )

    @property
    def is_held(self) -> bool:
        return self.available_bytes is not None and not self.is_returned

    def list_taken(self, memory_bytes: int) -> Mapping[str, int]:
        return {self.device.name: self.bytes, MACHINE: memory_bytes}

    @asynccontextmanager
    async def measure(self, on_excess: Callable[[LoadRefused], None]) -> AsyncIterator[None]:
        """Measure what all its workers take, which load meanwhile; memory that others return comes first."""
        await self._settle_others()
        self.available_bytes = await self._read_available()
        watching = start_task(self._watch(on_excess), f"watching {self.device.name}")
        try:
            yield
        finally:
            watching.cancel()
        await self._settle_others()
        self.is_measured = await self._sample()

    async def expect_return(self) -> None:
        """Read what is to be available after the end of its workers: others may have grown."""
        available = await self._read_available() if self.is_measured else None
        if available is not None:
            self.available_bytes = available + self.taken_bytes

    def on_exit(self, others: int, *, is_expected: bool, wake: Callable[[], None]) -> None:
        """Count the share of a worker no longer; begin to wait for the memory once all have exited."""
        if others:
            self.taken_bytes -= 0 if is_expected else self.taken_bytes // (others + 1)
        elif self.is_held and self.returning is None:
            self.returning = start_task(self._await_return(), f"memory of {self.device.name}")
            self.returning.add_done_callback(lambda _: wake())

    def complete_unloaded(self, fact: ModelUnloaded) -> ModelUnloaded:
        return replace(fact, unreturned_bytes=self.unreturned_bytes or UNSET)

    async def wait_returned(self) -> None:
        """Wait until its memory is back, or late, if its workers have exited."""
        if self.returning is not None:
            await asyncio.wait({self.returning})

    def _bound_bytes(self) -> int | None:
        allowance, instances = self.allowance_bytes, self.parameters.instances
        return None if allowance is None else allowance - (instances - 1) * (self.reserved_bytes // instances)

    def _measured_bytes(self) -> int | None:
        return self.taken_bytes if self.is_measured else None

    async def _watch(self, on_excess: Callable[[LoadRefused], None]) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            try:
                await self._sample()
            except LoadRefused as problem:
                return on_excess(problem)

    async def _sample(self) -> bool:
        """Read what it has taken; returns whether the driver says it, else it is what it was."""
        missing, allowance = await self._read_missing(), self.allowance_bytes
        if missing is None:
            return False
        self.taken_bytes = max(0, missing)
        if allowance is not None and self.taken_bytes > allowance:
            took, may_take = format_megabytes(self.taken_bytes), format_megabytes(allowance)
            raise LoadRefused(
                "out_of_memory",
                f"the load took {took} of the memory of {self.device.name}; it may take {may_take}: what it"
                f" reserved there, {format_megabytes(self.reserved_bytes)}, and what is free of its budget",
            )
        return True

    async def _await_return(self) -> None:
        missing = self.taken_bytes
        try:
            async with timeout(DEVICE_RETURN_S):
                while True:
                    # A load that runs there meanwhile may have taken what it has reserved.
                    loading = sum(max(0, each.bytes - each.taken_bytes) for each in self._others())
                    missing = (await self._read_missing() or 0) - loading
                    if missing <= self.bytes // UNRETURNED_SHARE:
                        missing = 0
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            pass
        finally:
            self.is_returned, self.unreturned_bytes = True, missing

    async def _read_missing(self) -> int | None:
        available = await self._read_available()
        if available is None or self.available_bytes is None:
            return None
        return self.available_bytes - available

    async def _read_available(self) -> int | None:
        """Return what is free, and what the other loads have taken; None if the driver does not say it."""
        memory = await measure_memory(self.device)
        taken = (each.taken_bytes for each in self._others() if not each.is_returned)
        return None if memory is None else memory.free_bytes + sum(taken)

    async def _settle_others(self) -> None:
        for each in self._others():
            await each.wait_returned()

    def _others(self) -> list[MeasuredAllocation]:
        """Return those of the same memory; several providers may have devices on one hardware."""
        others = (each for each in self.all() if isinstance(each, MeasuredAllocation) and each is not self)
        return [each for each in others if each.device.pci_bus_id == self.device.pci_bus_id]
