"""When the workers of a preparation compute: in gaps between the work of others, and seldom at their cost.

A worker at low priority still costs others: it shares caches and memory with them, on many machines a core's
hardware, and it has to leave a core before they can take it. So its process is stopped while they compute.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from events.clock import uuid7
from runtime.process.pool import WorkerPool, kill_and_wait
from runtime.process.worker import Worker

TICK_S = 0.005
"""Between two looks at others: a preparation notices their work after at most so long."""
QUIET_S = 0.05
"""Others have a gap if they did nothing for so long: the next request of a busy client comes sooner."""
TURN_S, STOPPED_S = 0.05, 1.0
"""Without any gap, a preparation computes for `TURN_S` after each `STOPPED_S`: it must not hold its memory
for ever, and a model that takes 5 s of computing time to prepare is prepared within two minutes."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Whether the workers of a preparation are stopped.

    Attributes:
        is_stopped: whether they are.
        until_s: when they compute again at the latest, if they are; else when they may be stopped again.
        busy_s: when others last computed.
    """

    is_stopped: bool = False
    until_s: float = 0.0
    busy_s: float = float("-inf")


def next_pace(pace: Pace, now_s: float, *, is_busy: bool) -> Pace:
    """Return the pace from now on.

    Args:
        pace: the one until now.
        now_s: on any steady clock, in seconds.
        is_busy: whether others compute now.
    """
    if is_busy:
        pace = replace(pace, busy_s=now_s)
    is_gap = now_s - pace.busy_s >= QUIET_S
    if pace.is_stopped and (is_gap or now_s >= pace.until_s):
        return Pace(is_stopped=False, until_s=now_s if is_gap else now_s + TURN_S, busy_s=pace.busy_s)
    if not pace.is_stopped and is_busy and now_s >= pace.until_s:
        return Pace(is_stopped=True, until_s=now_s + STOPPED_S, busy_s=pace.busy_s)
    return pace


class Pacer:
    """Starts the workers of preparations, and stops and continues their processes.

    Args:
        pool: starts the workers.
        is_busy: whether others compute now; called at each tick of a preparation.
    """

    def __init__(self, pool: WorkerPool, is_busy: Callable[[], bool]) -> None:
        self._pool = pool
        self._is_busy = is_busy
        self._workers: set[Worker] = set()

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        """Start a worker, and kill it at the end, stopped or not.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`.
        """
        worker = await self._pool.fork(uuid7())
        self._workers.add(worker)
        try:
            yield worker
        finally:
            self._workers.discard(worker)
            await kill_and_wait(worker)

    async def run(self) -> None:
        """Pace the workers until cancelled; those that are left are continued then."""
        pace, stopped = Pace(), set[Worker]()
        try:
            while True:
                pace = next_pace(pace, time.monotonic(), is_busy=self._is_busy())
                if pace.is_stopped:
                    for worker in self._workers - stopped:
                        worker.suspend()
                else:
                    for worker in stopped:
                        worker.resume()
                stopped = set(self._workers) if pace.is_stopped else set()
                await asyncio.sleep(TICK_S)
        finally:
            for worker in stopped:
                worker.resume()
