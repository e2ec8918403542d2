"""A worker that is forked ahead: while a load is decided on and recorded, what it will run in comes up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from runtime.errors import ForkServerUnavailable
from runtime.processes.shielding import begun
from runtime.processes.workers import Worker

KEPT_S = 1.0
"""How long a worker waits to be taken. From a look at a load's files to its start it is some milliseconds;
a load that has to wait for longer has its worker forked when it starts."""
_UNTAKEN = "spare"


class Spare:
    """At most one worker that nobody has asked for yet, by whom it may be taken.

    Args:
        fork: makes a worker of this name.
    """

    def __init__(self, fork: Callable[[str], Coroutine[Any, Any, Worker]]) -> None:
        self._fork = fork
        self._coming: asyncio.Task[Worker] | None = None
        self._tasks: set[asyncio.Task[Worker]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def expect(self) -> None:
        """Begin to fork one, if there is none; nobody is told if that fails."""
        if self._coming is None:
            self._coming = task = begun(self._fork(_UNTAKEN), "forking ahead")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._timer = asyncio.get_running_loop().call_later(KEPT_S, self.drop)

    async def take(self, worker_id: str) -> Worker | None:
        """Give it this name, and hand it over; None if there is none, or it is of no use any more."""
        task = self._let_go()
        if task is None:
            return None
        try:
            worker = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_kill)
            raise
        except (ForkServerUnavailable, OSError):
            return None
        if worker.dying or worker.ended.done():
            return None
        worker.worker_id = worker_id
        return worker

    def drop(self) -> None:
        """End it: nobody has come for it."""
        task = self._let_go()
        if task is not None:
            task.add_done_callback(_kill)

    async def close(self) -> None:
        """End what is being forked, and wait until it has ended."""
        self.drop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _let_go(self) -> asyncio.Task[Worker] | None:
        task, self._coming = self._coming, None
        if self._timer is not None:
            self._timer.cancel()
        return task


def _kill(task: asyncio.Task[Worker]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().kill()
