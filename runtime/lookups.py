"""Looks at the repository, in threads of their own: a file system that hangs delays its models only.

A look at a dead network mount never returns, and a thread in it cannot be stopped. So there are few, one for
each model, and neither requests nor the server's stop wait for them.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from runtime.errors import RuntimeProblem
from runtime.limits import Limit, LimitPassed, time_limit

T = TypeVar("T")

MAX_THREADS = 32
"""Looks at once. One takes a millisecond, so only looks that hang fill this."""
HANG_S = 2.0
"""A look that takes longer counts as hanging until it returns: other looks do not wait for it."""
CHECK_S = 0.5
"""How often a waiting look checks whether those before it hang."""
REQUEST_LIMIT_S = 3.0
"""How long a request waits for a look: many files on a slow network mount take a second."""
LOAD_LIMIT_S = 30.0
"""How long a load waits for a look; then it fails, since it may hold a load slot meanwhile."""


class RepositoryBusy(RuntimeProblem):
    """The repository does not answer at the moment."""

    code = "repository_busy"


def make_call(
    work: Callable[[], T], on_end: Callable[[], None]
) -> tuple[asyncio.Future[T], Callable[[], None]]:
    """Return the future of a call, and the function that makes the call in a thread.

    Args:
        work: what to call.
        on_end: called in the event loop when the call has ended, also if the future was cancelled.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    answer.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody may await it

    def end(set_answer: Callable[[Any], None], value: Any) -> None:
        on_end()
        if not answer.done():
            set_answer(value)

    def call() -> None:
        try:
            result: tuple[Callable[[Any], None], Any] = (answer.set_result, work())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            result = (answer.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(end, *result)

    return answer, call


class Lookups:
    """Runs looks in threads: one at a time for each key, and at most `max_threads`.

    Args:
        max_threads: looks at once; those that hang count until they return.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
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
            raise busy(key, f"cannot be looked at: {error}") from None
        try:
            async with time_limit(limit_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            raise busy(key, f"did not answer within {limit_s:g} s") from None

    async def _wait_for_turn(self, key: str, lane: _Lane) -> None:
        """Wait for the looks before it, however many, unless they hang."""
        if not (lane.lock.locked() or self._free.locked()):
            await self._take_turn(lane)  # at once
            return
        turn = asyncio.ensure_future(self._take_turn(lane))
        try:
            while not turn.done():
                self._refuse_hopeless(key, lane)
                await asyncio.wait({turn}, timeout=CHECK_S)
        except BaseException:
            turn.add_done_callback(lambda _: self._give_turn_back(turn, lane))
            turn.cancel()
            raise

    async def _take_turn(self, lane: _Lane) -> None:
        await lane.lock.acquire()
        try:
            await self._free.acquire()
        except BaseException:
            lane.lock.release()
            raise

    def _give_turn_back(self, turn: asyncio.Future[None], lane: _Lane) -> None:
        if not turn.cancelled():
            lane.lock.release()
            self._free.release()

    def _refuse_hopeless(self, key: str, lane: _Lane) -> None:
        if lane.hangs:
            raise busy(key, f"has not answered for {HANG_S:g} s")
        hanging = sum(each.hangs for each in self._lanes.values())
        if hanging >= self._max_threads:
            raise busy(key, f"has to wait: {hanging} other folders have not answered for {HANG_S:g} s")

    def _start(self, key: str, lane: _Lane, look: Callable[[], T]) -> asyncio.Future[T]:
        thread = self._idle.pop() if self._idle else _Thread()
        lane.limit = Limit(HANG_S, lane.note_hang)

        def end() -> None:
            self._idle.append(thread)
            self._release(key, lane)

        answer, call = make_call(look, end)
        thread.calls.put(call)
        return answer

    def _release(self, key: str, lane: _Lane) -> None:
        if lane.limit is not None:
            lane.limit.cancel()
        lane.hangs = False
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
        limit: after which the running one counts as hanging.
        hangs: whether it does.
    """

    def __init__(self) -> None:
        self.users = 0
        self.lock = asyncio.Lock()
        self.limit: Limit | None = None
        self.hangs = False

    def note_hang(self) -> None:
        self.hangs = True


class _Thread:
    """A thread that runs calls one after the other; a daemon, so that no stop of the process waits for it."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(self.calls,), name="lookup", daemon=True).start()


def _serve(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # it refers to what it looked at


def _end_threads(idle: list[_Thread]) -> None:
    for thread in idle:
        thread.calls.put(None)


async def wait_with_progress(
    key: str, answer: asyncio.Future[T], progress: Callable[[], int], limit_s: float
) -> T:
    """Return what a thread returns, however long it takes, as long as it goes on.

    Args:
        key: the model.
        answer: of the thread, which goes on without effect if this is cancelled or raises.
        progress: returns a number that changes with each piece of the work.
        limit_s: how long it may stay the same.

    Raises:
        RepositoryBusy: `repository_busy`, it stayed the same for longer.
    """
    try:
        async with time_limit(limit_s, progress):
            return await asyncio.shield(answer)
    except LimitPassed:
        if answer.done():  # in time after all
            return answer.result()
        raise busy(key, f"has given nothing to copy for {limit_s:g} s") from None


def busy(key: str, reason: str) -> RepositoryBusy:
    """Return the error of a model's folder, for a reason that goes on after its name."""
    return RepositoryBusy(f"the repository's folder of {key!r} {reason}; is its file system reachable?")
