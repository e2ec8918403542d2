"""All open streams of events: how many one subject may have, their heartbeats, and their orderly end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from events.log import Log
from events.tail import PACE_S, Tails
from server.errors import ServerProblem
from server.ledger.stages import Stages

BEAT_S = 1.0
"""How often it is looked whose heartbeat is due."""


class TooManyStreams(ServerProblem):
    """The subject has as many streams open as it may."""

    code = "too_many_streams"
    retry_after_s = 5.0


class Stream(Protocol):
    """What is known of an open stream."""

    due: float
    """When it wants to be woken, on the loop's clock, though nothing has happened."""

    def wake(self) -> None:
        """Have it look at what there is to do."""

    def hurry(self) -> None:
        """Have it give up soon what its client does not take."""


class Streams:
    """The open streams of a server; `run` has to run for them to have heartbeats and stages.

    Attributes:
        tasks: what has to run for there to be streams, by name.
    """

    def __init__(self, log: Log, tails: Tails, stages: Stages, *, per_subject: int) -> None:
        self._log = log
        self._per_subject = per_subject
        self._by_subject = Counter[str]()
        self._open = set[Stream]()
        self._wakeup = asyncio.Event()
        self.tails = tails
        self.stages = stages
        self.tasks = dict[str, asyncio.Task[None]]()

    def __len__(self) -> int:
        return len(self._open)

    async def run(self) -> None:
        """Wake streams that have something to say of their own; a defect ends all of them."""
        self._wakeup = self._log.subscribe()
        try:
            while True:
                await self._pause()
                if self.tails.closed:
                    self._hurry()
                if self._open and self.stages.look():
                    self.tails.wake()
                now = asyncio.get_running_loop().time()
                for stream in self._open:
                    if stream.due <= now:
                        stream.wake()
        finally:
            self._log.unsubscribe(self._wakeup)
            self.tails.close()
            self._hurry()

    @contextmanager
    def admit(self, subject: str) -> Iterator[None]:
        """Count a stream of a subject for as long as it is open.

        Raises:
            TooManyStreams: `too_many_streams`.
        """
        if self._by_subject[subject] >= self._per_subject:
            raise TooManyStreams(
                f"{subject} has {self._per_subject} streams open, as many as --streams-per-subject allows;"
                " close one first"
            )
        self._by_subject[subject] += 1
        try:
            yield
        finally:
            self._by_subject[subject] -= 1
            if not self._by_subject[subject]:
                del self._by_subject[subject]

    @contextmanager
    def beating(self, stream: Stream) -> Iterator[None]:
        """Wake a stream when it is due, for as long as it is open."""
        self._open.add(stream)
        self._wakeup.set()
        try:
            yield
        finally:
            self._open.discard(stream)

    def _hurry(self) -> None:
        """Let none of them hold up the end of the server."""
        for stream in self._open:
            stream.hurry()

    async def _pause(self) -> None:
        """Wait for the next look: soon while stages may change, long when nobody listens."""
        self._wakeup.clear()
        if self._open and self.stages.any_to_come:
            await asyncio.sleep(PACE_S)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S if self._open else None):
                await self._wakeup.wait()
