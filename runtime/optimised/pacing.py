"""Suspends the workers that make and try optimised models (SIGSTOP) while others compute.

At low priority alone a worker still costs others: it shares caches and memory with them, on many machines a
core's hardware, and it has to leave a core before they can take it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from events.clock import uuid7
from runtime.errors import ForkServerUnavailable, WorkerDied
from runtime.process.pool import WorkerPool, kill_and_wait
from runtime.process.worker import Worker
from runtime.wire import Ping

TICK_S = 0.005
"""Between two checks for work of others: their work is noticed after at most so long."""
QUIET_S = 0.05
"""Others have a gap if they did nothing for so long: the next request of a busy client comes sooner."""
TURN_S, STOPPED_S = 0.05, 1.0
"""Without any gap, the workers compute for `TURN_S` after each `STOPPED_S`: they must not hold their memory
for ever, and a model that takes 5 s of computing time is made and tried within two minutes."""


class Pacer:
    """Starts workers in the background, and suspends and resumes their processes.

    Args:
        pool: starts the workers.
        is_busy: whether others compute now; called at each tick of `run`.
    """

    def __init__(self, pool: WorkerPool, is_busy: Callable[[], bool]) -> None:
        self._pool = pool
        self._is_busy = is_busy
        self._workers: set[Worker] = set()
        self._is_stopped = False

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        """Start a worker, and kill it at the end, suspended or not.

        A worker that has answered has asked the kernel to kill it with the fork server. One that is suspended
        before that outlives a killed server for ever.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`.
            WorkerDied: `worker_died`.
        """
        worker = await self._pool.fork(uuid7())
        try:
            await self._greet(worker)
            self._workers.add(worker)
            if self._is_stopped:
                worker.suspend()
            yield worker
        finally:
            self._workers.discard(worker)
            await kill_and_wait(worker)

    @staticmethod
    async def _greet(worker: Worker) -> None:
        try:
            await worker.execute(Ping())
        except WorkerDied as problem:
            if worker.orphaned:
                raise ForkServerUnavailable from problem
            raise

    async def run(self) -> None:
        """Pace the workers until cancelled; those that are suspended are resumed then."""
        while True:
            await asyncio.sleep(TICK_S)
            if self._is_busy():
                self._is_stopped = True
                for worker in self._workers:
                    worker.suspend()
                try:
                    has_gap = await self._wait_for_gap()
                finally:
                    self._is_stopped = False
                    for worker in self._workers:
                        worker.resume()
                if not has_gap:
                    await asyncio.sleep(TURN_S)

    async def _wait_for_gap(self) -> bool:
        """Wait until others have a gap, for `STOPPED_S` at most; returns whether they have."""
        until_s = time.monotonic() + STOPPED_S
        busy_s = time.monotonic()
        while (now_s := time.monotonic()) < until_s:
            if now_s - busy_s >= QUIET_S:
                return True
            await asyncio.sleep(TICK_S)
            if self._is_busy():
                busy_s = time.monotonic()
        return False
