"""What is prepared, what may be, and the forms that loads use.

The scheduler says when to prepare (`Prepare`, `StopPreparing`); `preparation` does it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace

from events.models import Footprint
from runtime.defaults import read_warm_up
from runtime.errors import RuntimeProblem
from runtime.needs import same_files
from runtime.prepared.blame import Stopped
from runtime.prepared.counts import PreparingCounts
from runtime.prepared.entries import is_open
from runtime.prepared.files import hashes_of
from runtime.prepared.folder import PreparedUnavailable
from runtime.prepared.key import key_of
from runtime.prepared.preparation import FORMS, Candidate, Preparing
from runtime.prepared.store import PreparedStore
from runtime.processes.pool import WorkerPool
from runtime.repository import FileStat, Repository
from runtime.scheduling.sight import Preparation
from runtime.wire import Prepared

_log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Of one that is stopped each time. If a load was in the way, a later one offers it again; if it took too
long or too much memory, or its workers were killed, no form is of use for now."""
PAUSE_S = 600.0
"""After the disk was full, or failed: until then nothing is prepared."""
MAX_CANDIDATES = 1000
"""Versions that wait to be prepared."""


class Preparer:
    """What is prepared, and what may be.

    Args:
        store: where forms are kept; None prepares nothing, and uses nothing.
        pool: where workers come from.
        repository: where the versions are.
        wake: is called when there is something new to decide on.

    Attributes:
        preparation: what is being prepared now.
        candidate: the version that this is.
        counts: what became of it until now.
    """

    def __init__(
        self, store: PreparedStore | None, pool: WorkerPool, repository: Repository, wake: Callable[[], None]
    ) -> None:
        self._store = store
        self._pool = pool
        self._repository = repository
        self._wake = wake
        self._candidates: dict[str, Candidate] = {}
        self._running: asyncio.Task[None] | None = None
        self._looks: set[asyncio.Task[None]] = set()
        self._paused_until = 0.0
        self.preparation: Preparation | None = None
        self.candidate: Candidate | None = None
        self.counts = PreparingCounts()

    @property
    def store(self) -> PreparedStore | None:
        """Where forms are kept, if they are."""
        return self._store

    @property
    def preparable(self) -> dict[str, int]:
        """What preparing the files of a load would take, in bytes by load job id, oldest first."""
        if time.monotonic() < self._paused_until:
            return {}
        return {each.load_job_id: each.need_bytes for each in self._candidates.values()}

    def offer(self, candidate: Candidate) -> None:
        """Have a version prepared that was loaded bare, if it was not tried before."""
        if self._store is not None and len(self._candidates) < MAX_CANDIDATES:
            self._spawn(self._look(self._store, candidate))

    def begin(self, load_job_id: str) -> None:
        """Prepare what was offered for a load; `wake` is called when that has ended, well or not."""
        assert self._store is not None
        assert self._running is None
        key = next(key for key, each in self._candidates.items() if each.load_job_id == load_job_id)
        self.candidate = candidate = self._candidates.pop(key)
        self.preparation = Preparation(load_job_id, candidate.need_bytes)
        self._running = asyncio.create_task(self._prepare(self._store, key, candidate), name="preparing")
        self._running.add_done_callback(lambda _: self._over())

    def stop(self) -> None:
        """End what is being prepared; what it takes is given back when its processes have exited."""
        if self._running is not None and self.preparation is not None:
            self.preparation = replace(self.preparation, stopping=True)
            self._running.cancel()

    async def close(self) -> None:
        """End everything, and wait until it has ended."""
        tasks = [*self._looks, *filter(None, [self._running])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def form_for(self, files: Sequence[FileStat], footprints: Iterable[Footprint]) -> Prepared | None:
        """Return the prepared form of these files, if there is one; reads files, so call it in a thread.

        What they hold is what the ledger knows of files with these sizes and times; the load finds out
        whether they do.
        """
        key = self._key(files, footprints)
        if self._store is None or key is None:
            return None
        try:
            return self._store.use(key)
        except (PreparedUnavailable, OSError) as error:
            _log.warning("a prepared form cannot be used, and the load goes on without: %s", error)
            return None

    def form_of(self, files: Sequence[FileStat], footprints: Iterable[Footprint]) -> str | None:
        """Return which form `form_for` would give, most likely; call it in a thread, too."""
        key = self._key(files, footprints)
        entry = self._store.find(key) if self._store is not None and key is not None else None
        return None if entry is None else entry.form

    def _key(self, files: Sequence[FileStat], footprints: Iterable[Footprint]) -> str | None:
        known = next((seen.files for seen in footprints if same_files(seen.files, files)), None)
        if self._store is None or known is None:
            return None
        return key_of(hashes_of(known), self._pool.threads)

    def failed(self, prepared: Prepared, reason: str) -> None:
        """Drop a form that a load could do nothing with."""
        _log.warning("the prepared form %s is dropped: %s", prepared.sha256[:12], reason)
        self.counts.dropped += 1
        if self._store is not None:
            self._spawn(self._drop(self._store, prepared, reason))

    def _spawn(self, look: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(look)
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)

    async def _look(self, store: PreparedStore, candidate: Candidate) -> None:
        key = await asyncio.to_thread(self._key_to_prepare, store, candidate)
        if key is not None:
            self._candidates.setdefault(key, candidate)  # other models may have the same files
            self._wake()

    def _key_to_prepare(self, store: PreparedStore, candidate: Candidate) -> str | None:
        """Return the key, if it is not known what is of use for it, or there are other inputs to try."""
        key = key_of(candidate.hashes, self._pool.threads)
        entry = store.find(key)
        if entry is None:
            return key
        if entry.untried_on is None:
            return None
        try:
            given = read_warm_up(self._repository, candidate.model_id).inputs
        except (RuntimeProblem, OSError):  # the next load says what is wrong with them
            return None
        return key if is_open(entry, given) else None

    async def _drop(self, store: PreparedStore, prepared: Prepared, reason: str) -> None:
        try:
            key = await asyncio.to_thread(key_of, prepared.sources, self._pool.threads)
            await asyncio.to_thread(store.drop, key, reason, prepared)
        except (PreparedUnavailable, OSError) as error:
            self._pause(error)

    def _over(self) -> None:
        self._running = self.preparation = self.candidate = None
        self._wake()

    def _pause(self, error: Exception) -> None:
        _log.warning("nothing is prepared for %d minutes: %s", PAUSE_S // 60, error)
        self._paused_until = time.monotonic() + PAUSE_S

    async def _prepare(self, store: PreparedStore, key: str, candidate: Candidate) -> None:
        preparing = Preparing(store, self._pool, self._repository, candidate)
        began = time.monotonic()
        try:
            await self._attempt(preparing, key, candidate)
        except (PreparedUnavailable, OSError) as error:
            self._pause(error)
        except Exception:  # noqa: BLE001 - whatever it is, nobody but the log is to notice
            _log.exception("%s could not be prepared", candidate.model_id)
        finally:
            self.counts.count(preparing.outcomes, time.monotonic() - began)

    async def _attempt(self, preparing: Preparing, key: str, candidate: Candidate) -> None:
        again = replace(candidate, attempts=candidate.attempts + 1)
        try:
            await preparing.run()
        except asyncio.CancelledError:
            if again.attempts < MAX_ATTEMPTS:
                self._candidates[key] = again
            raise
        except Stopped as why:
            if again.attempts < MAX_ATTEMPTS:
                self._candidates[key] = again
            else:
                await preparing.settle_none(dict.fromkeys(FORMS, f"{why}, {MAX_ATTEMPTS} times"))
