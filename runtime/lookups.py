"""Looks at the repository, in threads of their own: a file system that hangs holds up its models only.

A look at a dead network mount never returns, and a thread in it cannot be stopped. So there are few, one for
each model, and neither requests nor the server's stop wait for them.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from runtime.errors import RuntimeProblem
from runtime.limits import time_limit

T = TypeVar("T")

MAX_THREADS = 32
"""Looks at once. One takes a millisecond, so only looks that hang fill this."""
TURN_LIMIT_S = 2.0
"""How long a look waits for an earlier one of its model, and for a thread. A model whose look has taken
longer is known to hang: its next look is refused at once."""
REQUEST_LIMIT_S = 3.0
"""How long a request waits for a look: many files on a slow network mount take a second."""
LOAD_LIMIT_S = 30.0
"""How long a load waits for a look; then it fails, since it may hold a load slot meanwhile."""


class RepositoryBusy(RuntimeProblem):
    """The repository does not answer at the moment."""

    code = "repository_busy"


class Lookups:
    """Runs looks in threads: one at a time for each key, and at most `max_threads`.

    Args:
        max_threads: looks at once; those that hang count until they return.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._free = asyncio.Semaphore(max_threads)
        self._lanes: dict[str, _Lane] = {}
        self._idle: list[_Thread] = []
        weakref.finalize(self, _end_threads, self._idle)

    async def run(self, key: str, look: Callable[[], T], limit_s: float) -> T:
        """Return what a look returns; if this is cancelled or late, its thread goes on without effect.

        Args:
            key: the model; looks of the same key run one after the other.
            look: called in a thread.
            limit_s: how long to wait for its end once it has begun.

        Raises:
            RepositoryBusy: `repository_busy`, it did not begin or end in time.
        """
        lane = self._lanes.setdefault(key, _Lane())
        lane.users += 1
        try:
            await self._wait_for_turn(key, lane)
        except BaseException:
            self._leave(key, lane)
            raise
        try:
            answer = self._start(key, lane, look)
        except RuntimeError as error:  # no new thread
            self._release(key, lane)
            raise _busy(key, f"cannot be looked at: {error}") from None
        try:
            async with time_limit(limit_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            raise _busy(key, f"did not answer within {limit_s:g} s") from None

    async def _wait_for_turn(self, key: str, lane: _Lane) -> None:
        if lane.hangs:
            raise _busy(key, f"has not answered for more than {TURN_LIMIT_S:g} s")
        try:
            async with time_limit(TURN_LIMIT_S):
                await lane.lock.acquire()
                try:
                    await self._free.acquire()
                except BaseException:
                    lane.lock.release()
                    raise
        except TimeoutError:
            raise _busy(key, f"was looked at by others for {TURN_LIMIT_S:g} s") from None

    def _start(self, key: str, lane: _Lane, look: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        answer.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody may await it
        thread = self._idle.pop() if self._idle else _Thread()
        lane.began_s = time.monotonic()

        def end(set_answer: Callable[[Any], None], value: Any) -> None:
            self._idle.append(thread)
            self._release(key, lane)
            if not answer.done():
                set_answer(value)

        def job() -> None:
            try:
                result: tuple[Callable[[Any], None], Any] = (answer.set_result, look())
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                result = (answer.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(end, *result)

        thread.jobs.put(job)
        return answer

    def _release(self, key: str, lane: _Lane) -> None:
        lane.began_s = None
        lane.lock.release()
        self._free.release()
        self._leave(key, lane)

    def _leave(self, key: str, lane: _Lane) -> None:
        lane.users -= 1
        if not lane.users:
            del self._lanes[key]


class _Lane:
    """The looks of one key.

    Attributes:
        users: looks that run or wait.
        lock: held while one runs, until its thread has returned.
        began_s: when the running one began (CLOCK_MONOTONIC).
    """

    def __init__(self) -> None:
        self.users = 0
        self.lock = asyncio.Lock()
        self.began_s: float | None = None

    @property
    def hangs(self) -> bool:
        """Whether the running look has taken too long."""
        return self.began_s is not None and time.monotonic() - self.began_s > TURN_LIMIT_S


class _Thread:
    """A thread that runs jobs one after the other; a daemon, so that no stop of the process waits for it."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(self.jobs,), name="lookup", daemon=True).start()


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it refers to what it looked at


def _end_threads(idle: list[_Thread]) -> None:
    for thread in idle:
        thread.jobs.put(None)


def _busy(key: str, reason: str) -> RepositoryBusy:
    return RepositoryBusy(f"the repository's folder of {key!r} {reason}; is its file system reachable?")
