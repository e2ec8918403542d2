"""Timeouts of waiting for an answer of a process, a file system or a client, and their durations.

An unload without force takes at most the drain timeout, a measurement, the stop grace, a kill and the wait
for its exit; with force, only a kill and the wait for its exit. Where a load takes memory beside the
machine's, another measurement comes before these without force, and the wait for that memory after them.

No timeout counts the time in which the event loop was stalled (`Timeout`, `timeout`): a server that was
itself stopped blames no other process. Leases, deadlines of jobs and the expiry of tokens have no `Timeout`:
they run whether the server does or not.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

PROGRESS_TIMEOUT_S = 120
"""Default of `progress_timeout_s`: a load that makes no progress for so long fails. A session of 105 MB is
created in 0.16 s (measured), so one of 50 GB in 80 s, if its files are in the page cache."""
DRAIN_TIMEOUT_S = 30.0
"""Default of `drain_timeout_s`: an unload's running inferences end within it, or their worker is stopped."""
STOP_GRACE_S = 1.0
"""Time for a drained worker to exit by itself before it is killed."""
INFERENCE_GRACE_S = 5.0
"""Default of `inference_grace_s`: a cancelled inference stops within it, or its worker is killed."""
MEASURE_LIMIT_S = 1.0
"""Time for a measurement of a worker, or by a driver. The kernel waits for the process's mappings, which a
worker can hold; the measurement is then given up, so that an unload does not wait for it."""
FORK_SERVER_LIMIT_S = 10.0
"""Time for a new fork server to import everything, usually 0.2 s, before it is killed and launched again."""
FORK_LIMIT_S = 5.0
"""Time for a fork, usually 4 ms, before the fork server is replaced. `FORK_WAITS` times as long if there are
workers, since they end with the fork server."""
FORK_WAITS = 12
EXIT_WAIT_S = 1.0
"""Time for the exit status and the last output of a worker that has exited; then they are unknown."""

BEAT_S = 0.25
"""How often the event loop shows that it has its turns."""
STALL_S = 1.0
"""Without a beat for so long, the loop was stalled. The server's longest computation takes 0.1 s."""
PROGRESS_CHECKS = 16
"""Checks for progress within a timeout, which so passes late by a sixteenth, or `LAST_READ_S`."""
LAST_READ_S = 0.1
"""Time after a stall for sending queued data and reading received data: uvloop runs due timers before it
reads sockets."""
LATE_S = 0.05
"""A timer that is later than this was delayed by a stall, perhaps by one too short to be counted."""
RESOLUTION_S = 0.002
"""uvloop's timers count whole milliseconds, and so may end one too early."""


class StallDetector:
    """Notices that the event loop was stalled: a frozen machine, a swap storm, SIGSTOP."""

    def __init__(self) -> None:
        self._last_beat_s = time.monotonic()
        self._stalled_s = 0.0
        self._resumed_s = float("-inf")
        self._beat()

    def active_s(self) -> float:
        """Return CLOCK_MONOTONIC in seconds, less the time in which the loop was stalled."""
        now_s = time.monotonic()
        since_beat_s = now_s - self._last_beat_s
        if since_beat_s > STALL_S:
            self._stalled_s += since_beat_s
            self._last_beat_s = self._resumed_s = now_s
        return now_s - self._stalled_s

    def has_just_resumed(self) -> bool:
        """Whether a stall has only just ended, so that received data may be unread."""
        self.active_s()
        return time.monotonic() - self._resumed_s < LAST_READ_S

    def _beat(self) -> None:
        self.active_s()
        self._last_beat_s = time.monotonic()
        asyncio.get_running_loop().call_later(BEAT_S, self._beat)


_detectors = WeakKeyDictionary[asyncio.AbstractEventLoop, StallDetector]()


def stall_detector() -> StallDetector:
    """Return the detector of the running event loop."""
    loop = asyncio.get_running_loop()
    detector = _detectors.get(loop)
    if detector is None:
        detector = _detectors[loop] = StallDetector()
    return detector


class Timeout:
    """Calls back once the given time has passed without stalls.

    Args:
        timeout_s: in seconds.
        on_passed: called with `args`, unless the timeout is cancelled before.
        progress: returns a value that changes with progress; each change restarts the timeout.
    """

    def __init__(
        self,
        timeout_s: float,
        on_passed: Callable[..., None],
        *args: Any,
        progress: Callable[[], Hashable] | None = None,
    ) -> None:
        self._timeout_s, self._on_passed, self._args, self._progress = timeout_s, on_passed, args, progress
        self._check_s = timeout_s if progress is None else timeout_s / PROGRESS_CHECKS
        self._seen = None if progress is None else progress()
        self._stalls = stall_detector()
        self._due_s = self._stalls.active_s() + timeout_s
        self._is_due = False
        self._wait(self._check_s)

    def cancel(self) -> None:
        """Do not call back; works after the timeout, too."""
        self._timer.cancel()

    def _wait(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds + RESOLUTION_S, self._check)

    def _check(self) -> None:
        active_s = self._stalls.active_s()
        if self._progress is not None and (seen := self._progress()) != self._seen:
            self._seen, self._due_s, self._is_due = seen, active_s + self._timeout_s, False
        left_s = self._due_s - active_s
        if left_s > 0:
            self._wait(max(min(left_s, self._check_s), LAST_READ_S))
        elif not self._is_due:  # the loop reads once more, since a short stall may have delayed the timer
            self._is_due = True
            self._wait(LAST_READ_S if left_s < -LATE_S else 0)
        else:
            self._on_passed(*self._args)


class TimeoutExpired(TimeoutError):
    """A `timeout` has passed."""


@asynccontextmanager
async def timeout(timeout_s: float, progress: Callable[[], Hashable] | None = None) -> AsyncIterator[None]:
    """Limit the time of a block, as `asyncio.timeout` does, by a `Timeout`.

    Raises:
        TimeoutExpired: the timeout has passed. A TimeoutError of the block itself is raised unchanged.
    """
    loop, scope = asyncio.get_running_loop(), asyncio.timeout(None)
    expiring = Timeout(timeout_s, lambda: scope.reschedule(loop.time()), progress=progress)
    try:
        async with scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise TimeoutExpired from None
        raise
    finally:
        expiring.cancel()
