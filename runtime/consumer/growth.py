"""Shares the memory that is left among loaded workers, so that none can end the container.

A worker that has loaded may grow: longer inputs take more memory than the warm-up did. The kernel refuses
what it would map beyond its part (RLIMIT_DATA), and the inference that needs it fails alone. Each worker may
take half of what is left, so one that grows alone never passes the sum, nor two at once, nor one beside a
load. If more of them do between two measurements, the measurement ends the worker that has grown most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from itertools import islice

from runtime.consumer.running import RunningLoad
from runtime.errors import OUT_OF_MEMORY
from runtime.memory import format_megabytes
from runtime.process.worker import Worker
from runtime.scheduler.view import PEAK_VARIATION

SHARE_AFTER_S = 0.05
"""Delay after a load's end or an exit, so that many of them are one."""
WORKERS_PER_TURN = 20
"""Workers that are limited in one turn of the event loop: some 2 ms."""
PARTS = 2
"""Each worker may take so much of what is left: all of it would let two pass the sum, less would keep a large
inference from its memory although the others do not grow."""


def share_growth(workers_bytes: int, budget_bytes: int, taken_bytes: int, *, is_loading: bool) -> int:
    """Return how many bytes each loaded worker may take beside its present ones.

    Args:
        workers_bytes: the limit of all workers together.
        budget_bytes: the memory budget, of which loads may take all that is free.
        taken_bytes: what all loads take or reserve.
        is_loading: whether one is loading.
    """
    expected_bytes = max(taken_bytes, budget_bytes) if is_loading else taken_bytes
    return max(0, workers_bytes - expected_bytes) // PARTS


class GrowthLimits:
    """The limits of loaded workers, which follow each measurement, and each load that begins or ends.

    Args:
        loads: the running loads.
        workers_bytes: the limit of all workers together; None is no limit.
        budget_bytes: the memory budget.
    """

    def __init__(
        self, loads: Mapping[str, RunningLoad], workers_bytes: int | None, budget_bytes: int
    ) -> None:
        self._loads = loads
        self._workers_bytes = workers_bytes
        self._budget_bytes = budget_bytes
        self._part: int | None = None
        self._sharing: asyncio.TimerHandle | None = None

    def share(self) -> None:
        """Limit each loaded worker to its present memory and its part of what is left, a few in each turn."""
        self._sharing = None
        self._part = self._find_part()
        self._limit(iter([*self._loaded_workers()]))

    def on_load_start(self) -> None:
        """Limit all workers, before a load takes what is free of the budget, if they may take more now."""
        part = self._find_part()
        if part is not None and (self._part is None or part < self._part):
            self._part = part
            for worker in self._loaded_workers():
                worker.limit_growth(part)

    def on_loaded(self, load: RunningLoad) -> None:
        """Limit the workers of a load that has ended, and soon all others: they may take more again."""
        if self._workers_bytes is None:
            return
        if alive := load.alive_workers:
            part = self._find_part() or 0
            self._part = max(part, self._part or 0)
            for worker in alive:
                worker.limit_growth(part)
        if self._sharing is None:
            self._sharing = asyncio.get_running_loop().call_later(SHARE_AFTER_S, self.share)

    def close(self) -> None:
        if self._sharing is not None:
            self._sharing.cancel()

    def _limit(self, left: Iterator[Worker]) -> None:
        """Limit the next workers by the latest part, which a load that starts meanwhile makes smaller."""
        some = [*islice(left, WORKERS_PER_TURN)]
        if self._part is not None and some:
            for worker in some:
                worker.limit_growth(self._part)
            asyncio.get_running_loop().call_soon(self._limit, left)

    def _find_part(self) -> int | None:
        if self._workers_bytes is None:
            return None
        loads = self._loads.values()
        loading = [load for load in loads if load.report is None and not load.has_exited]
        taken = sum(load.memory_bytes for load in loads)
        taken += sum(load.reserved_bytes // PEAK_VARIATION for load in loading)
        return share_growth(self._workers_bytes, self._budget_bytes, taken, is_loading=bool(loading))

    def end_excess(self) -> None:
        """End the worker that has grown most, if all together have more than they may, as just measured."""
        taken = sum(load.measured_bytes for load in self._loads.values())
        workers = {worker: worker.grown_bytes for worker in self._loaded_workers()}
        if self._workers_bytes is None or taken <= self._workers_bytes or not workers:
            return
        worker = max(workers, key=workers.__getitem__)
        mb = format_megabytes
        worker.kill_for(
            f"it took {mb(worker.memory_bytes)} of memory, {mb(workers[worker])} more than after its load,"
            f" and all models together {mb(taken)}, of at most {mb(self._workers_bytes)}: it had grown most",
            OUT_OF_MEMORY,
        )

    def _loaded_workers(self) -> Iterator[Worker]:
        for load in self._loads.values():
            yield from (worker for worker in load.alive_workers if worker.loaded_memory is not None)
