"""The limits after which a process or an unload counts as stuck, what happens then, and how they are timed.

An unload without force takes at most the drain timeout, a measurement, the stop grace, a kill and the wait
for its exit; with force, only a kill and the wait for its exit.

Only time in which the event loop had its turns counts towards a limit (`Limit`, `time_limit`): a server that
was stopped itself accuses no process of being late.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Any

PROGRESS_TIMEOUT_S = 120
"""Default of `progress_timeout_s`: a load that makes no progress for so long fails. A session of 105 MB is
created in 0.16 s (measured), so one of 50 GB in 80 s, if its files are in the page cache."""
DRAIN_TIMEOUT_S = 30.0
"""Default of `drain_timeout_s`: running inferences of an unload end within it, or their worker is stopped."""
STOP_GRACE_S = 1.0
"""For a drained worker to exit by itself; then it is killed."""
INFERENCE_GRACE_S = 5.0
"""Default of `inference_grace_s`: a cancelled inference stops within it, or its worker is killed."""
MEASURE_LIMIT_S = 1.0
"""For a measurement of a worker. The kernel waits for the process's mappings, which a worker can hold; the
measurement is then given up, so that an unload does not wait for it."""
FORK_SERVER_LIMIT_S = 10.0
"""For a new fork server to import everything, which takes 0.2 s; then it is killed and launched again."""
FORK_LIMIT_S = 5.0
"""For a fork, which takes 4 ms. After it, the answer is awaited once more: as long, or `FORK_WAITS` times as
long if there are workers, since they end with the fork server, which is then replaced."""
FORK_WAITS = 12
PING_LIMIT_S = 2.0
"""For the answer of the pre-forked worker, which takes 0.1 ms; then it is killed, and another is forked."""
EXIT_WAIT_S = 1.0
"""For the exit status and the last output of a worker that has exited; then they are unknown."""

TICKS = 4
"""Parts of a limit, each timed by itself: a stop of the server takes at most one of them from a process."""
PROGRESS_TICKS = 16
"""As `TICKS`, of a limit on progress: that passes late by one of them at most."""
LATE_S = 0.25
"""A tick that ends later than this after its time shows that the event loop had no turn."""


class Limit:
    """Calls back once, when a limit has passed, and its last tick was not late.

    After a stop (a frozen machine, a swap storm, SIGSTOP) uvloop runs due timers before it reads sockets, so
    an answer may be there unread. After a late tick the limit is therefore extended by as much as that was
    late, but by no more than a tick, and at most `TICKS` times.

    Args:
        limit_s: the limit in seconds.
        on_passed: called with `args`, unless the limit is cancelled before.
    """

    __slots__ = ("_args", "_due_s", "_extensions", "_left", "_loop", "_on_passed", "_tick_s", "_timer")
    ticks = TICKS

    def __init__(self, limit_s: float, on_passed: Callable[..., None], *args: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_passed, self._args = on_passed, args
        self._tick_s = limit_s / self.ticks
        self._left = self._extensions = self.ticks
        self._due_s = self._loop.time() + self._tick_s
        self._timer = self._loop.call_at(self._due_s, self._end_tick)

    def cancel(self) -> None:
        """Do not call back; a limit that has passed may be cancelled, too."""
        self._timer.cancel()

    def _end_tick(self) -> None:
        late_s = self._loop.time() - self._due_s
        next_s = self._tick_s
        if late_s > LATE_S and self._extensions:
            self._extensions -= 1
            next_s = min(next_s, late_s)
        else:
            self._left -= 1
        if not self._left:
            self._on_passed(*self._args)
            return
        self._due_s = self._loop.time() + next_s
        self._timer = self._loop.call_at(self._due_s, self._end_tick)


class ProgressLimit(Limit):
    """Calls back once, when `progress` has stayed the same for a limit; it begins anew with each progress."""

    __slots__ = ("_progress", "_seen")
    ticks = PROGRESS_TICKS

    def __init__(
        self, limit_s: float, progress: Callable[[], Hashable], on_passed: Callable[..., None]
    ) -> None:
        super().__init__(limit_s, on_passed)
        self._progress, self._seen = progress, progress()

    def _end_tick(self) -> None:
        progress = self._progress()
        if progress != self._seen:
            self._seen = progress
            self._left = self._extensions = self.ticks + 1  # one for the tick that ends
        super()._end_tick()


class LimitPassed(TimeoutError):
    """A `time_limit` has passed."""


@asynccontextmanager
async def time_limit(limit_s: float, progress: Callable[[], Hashable] | None = None) -> AsyncIterator[None]:
    """Limit what runs within it, as `asyncio.timeout` does, by a `Limit`.

    Args:
        limit_s: the limit in seconds.
        progress: what changes while there is progress; with it, only time without progress counts.

    Raises:
        LimitPassed: the limit has passed. A TimeoutError of what runs within it is raised as it is.
    """
    loop, scope = asyncio.get_running_loop(), asyncio.timeout(None)

    def expire() -> None:
        scope.reschedule(loop.time())

    limit = Limit(limit_s, expire) if progress is None else ProgressLimit(limit_s, progress, expire)
    try:
        async with scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise LimitPassed from None
        raise
    finally:
        limit.cancel()
