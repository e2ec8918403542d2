"""Denied attempts, counted and put into the ledger: one event a subject, action and minute, within a bound.

Only who was verified is counted: what anybody may send without a valid token must not fill the ledger. An
attempt costs a look into a table that cannot grow, and each minute at most `MAX_EVENTS` events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from events.clock import uuid7
from events.commands import Command, Record
from events.types import SYSTEM, AccessDenied, Draft

MINUTE_S = 60.0

MAX_EVENTS = 60
"""In a minute, whoever tries whatever."""

OTHER = "other"
"""The action of the event, by `system`, that counts what had no room for an event of its own."""

NO_ROUTE = "no route"
"""The action of who asked, without any role, for a path or with a method that no route has."""

_log = logging.getLogger(__name__)


class Denials:
    """Counts who was refused what; `run` appends the counts whenever a minute has passed."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._some = asyncio.Event()
        self._closing = asyncio.Event()

    def count(self, subject: str, action: str) -> None:
        """Count one attempt of a verified subject."""
        self._add((subject, action), 1)

    async def run(self, submit: Callable[[Command], Awaitable[object]], minute_s: float = MINUTE_S) -> None:
        """Append each minute's counts at its end; it begins with its first attempt. Until `close`."""
        while not self._closing.is_set():
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(minute_s):
                    await self._closing.wait()
            await self._flush(submit)
        await self._flush(submit)  # of what was counted before this began, or since

    def close(self) -> None:
        """Have `run` append what was counted, and return."""
        self._closing.set()
        self._some.set()

    async def _flush(self, submit: Callable[[Command], Awaitable[object]]) -> None:
        """Append what was counted; where that fails, it is kept, and appended with the next minute's."""
        counts, self._counts = self._counts, {}
        self._some.clear()
        if not counts:
            return
        drafts = tuple(
            Draft(uuid7(), AccessDenied(action, count), subject)
            for (subject, action), count in counts.items()
        )
        try:
            await submit(Record(drafts))
        except Exception as error:  # noqa: BLE001 - whatever it is, attempts are counted on
            _log.warning("denied attempts could not be recorded yet: %s", error)
            self._keep(counts)

    def _keep(self, counts: dict[tuple[str, str], int]) -> None:
        """Put counts back, the earlier ones first, so that the bound holds for them together."""
        later, self._counts = self._counts, counts
        self._some.set()
        for key, count in later.items():
            self._add(key, count)

    def _add(self, key: tuple[str, str], count: int) -> None:
        if key not in self._counts and len(self._counts) >= MAX_EVENTS - 1:
            key = (SYSTEM, OTHER)
        self._counts[key] = self._counts.get(key, 0) + count
        self._some.set()
