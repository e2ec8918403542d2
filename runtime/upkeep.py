"""What is done every few seconds beside the decisions: workers are measured, and last uses noted."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

from events.errors import LedgerProblem
from events.log import Log
from runtime.errors import WorkerDied
from runtime.live import MEASURE_LIMIT_S, LiveLoad
from runtime.processes.workers import Worker

_log = logging.getLogger(__name__)

MEASURE_S = 5.0
"""How often workers are measured. One costs about a millisecond, of a thread."""
NOTE_EVERY = 2
"""Measurements after which last uses are noted: every 10 s (a commit takes a fraction of a millisecond)."""


class Upkeep:
    """Keeps what is known of the workers that serve up to date.

    Args:
        log: where last uses are noted.
        live: what runs.
        wake: is called when measurements are there.
    """

    def __init__(self, log: Log, live: Mapping[str, LiveLoad], wake: Callable[[], None]) -> None:
        self._log = log
        self._live = live
        self._wake = wake
        self._noted: dict[str, int] = {}
        self._measuring: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Go on until this is cancelled, whatever fails meanwhile: decisions go on without."""
        try:
            for turn in itertools.count(1):
                await asyncio.sleep(MEASURE_S)
                await self._turn(turn)
        finally:
            for measuring in self._measuring.values():
                measuring.cancel()

    async def _turn(self, turn: int) -> None:
        try:
            await self.measure()
            if turn % NOTE_EVERY == 0:
                await self.note_uses()
        except Exception:  # noqa: BLE001 - see `run`
            _log.exception("what is known of the workers could not be brought up to date")

    async def measure(self) -> None:
        """Measure the workers that there are, one after the other; those that load may do so for long.

        One that cannot be measured for now holds up none of the others, and is not asked about again before
        it has been: each question takes a thread.
        """
        workers = {worker: load for load in self._live.values() for worker in load.left}
        for worker, load in workers.items():
            if worker.worker_id not in self._measuring:
                measuring = asyncio.create_task(self._measure(load, worker))
                self._measuring[worker.worker_id] = measuring
                await asyncio.wait({measuring}, timeout=MEASURE_LIMIT_S)
        if workers:
            self._wake()

    async def note_uses(self) -> None:
        """Have the ledger's file remember when models were last used."""
        now = self._log.now()
        seen = {load.job_id: load.last_used_ns for load in self._live.values()}
        used: dict[str, str] = {}
        for load in self._live.values():
            used_at = load.last_used_at(now)
            if used_at is not None and load.last_used_ns > self._noted.get(load.job_id, 0):
                used[load.model_id] = max(used_at, used.get(load.model_id, ""))
        if used:
            try:
                await self._log.note_last_used(used)
            except LedgerProblem:  # next time, then; the writer has said what is wrong
                return
        self._noted = seen

    async def _measure(self, load: LiveLoad, worker: Worker) -> None:
        try:
            with suppress(WorkerDied, OSError):
                load.measured_bytes[worker.worker_id] = await worker.measure()
        finally:
            del self._measuring[worker.worker_id]
