"""Blocking calls of the file system, in a bounded pool of threads: one that hangs delays its model only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from runtime.errors import RuntimeProblem
from runtime.timeouts import TimeoutExpired, timeout

T = TypeVar("T")

MAX_THREADS = 32
"""Calls at once. One takes a millisecond, so only calls that hang fill this."""
REQUEST_LIMIT_S = 3.0
"""How long a request waits for a call: many files on a slow network mount take a second."""
LOAD_LIMIT_S = 30.0
"""How long a load waits for a call; then it fails, since it may hold a load slot meanwhile."""


class RepositoryBusy(RuntimeProblem):
    """The repository does not answer at the moment."""

    code = "repository_busy"


def start_call(key: str, work: Callable[[], T], *, name: str = "file system") -> asyncio.Future[T]:
    """Call a function in a daemon thread, so that no stop of the process waits for it.

    Await the future through `asyncio.shield`: then its callbacks are called when the call has ended.

    Raises:
        RepositoryBusy: `repository_busy` of the model `key`, there is no new thread.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    answer.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody may await it

    def call() -> None:
        try:
            end = partial(answer.set_result, work())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            end = partial(answer.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(end)

    try:
        threading.Thread(target=call, name=name, daemon=True).start()
    except RuntimeError as error:
        raise busy(key, f"cannot be read: {error}") from None
    return answer


class FileSystemPool:
    """Calls blocking functions in threads: one at a time for each model, and at most `max_threads`.

    A call on a dead network mount never returns, and its thread cannot be stopped. So it keeps one thread
    and the turn of its model; a caller gets `repository_busy` after its limit, and those after it at once,
    until the call returns. The threads are daemons, so that no stop of the process waits for them.

    Args:
        max_threads: calls at once; those that hang count until they return.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._free = asyncio.Semaphore(max_threads)
        self._turns = WeakValueDictionary[str, asyncio.Lock]()
        self._late = set[str]()

    async def run(self, key: str, work: Callable[[], T], limit_s: float) -> T:
        """Return what a function returns; if this is cancelled or late, its thread goes on without effect.

        Args:
            key: the model; calls of the same key run one after the other.
            work: called in a thread.
            limit_s: how long to wait for the turn and the end of the call.

        Raises:
            RepositoryBusy: `repository_busy`, it did not begin or end in time.
        """
        if key in self._late:
            raise busy(key, "has not answered an earlier call yet")
        turn = self._turns.setdefault(key, asyncio.Lock())
        try:
            async with timeout(limit_s):
                await turn.acquire()
                try:
                    await self._free.acquire()
                except BaseException:
                    turn.release()
                    self._late.discard(key)
                    raise
                return await asyncio.shield(self._start(key, turn, work))
        except TimeoutExpired:
            if turn.locked():
                self._late.add(key)
            raise busy(key, f"did not answer within {limit_s:g} s") from None

    def _start(self, key: str, turn: asyncio.Lock, work: Callable[[], T]) -> asyncio.Future[T]:
        def release() -> None:
            turn.release()
            self._free.release()
            self._late.discard(key)

        try:
            call = start_call(key, work)
        except RepositoryBusy:
            release()
            raise
        call.add_done_callback(lambda _: release())
        return call


def busy(key: str, reason: str) -> RepositoryBusy:
    """Return the error of a model's folder, for a reason that goes on after its name."""
    return RepositoryBusy(f"the repository's folder of {key!r} {reason}; is its file system reachable?")
