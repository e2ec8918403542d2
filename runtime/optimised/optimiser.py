"""Makes optimised models in the background, one after the other, and finds them for loads.

A version that was loaded without one is a candidate. When the consumer allows it, the next candidate's
optimised model is made by a worker, tried once beside the original, and kept, or found useless, which its key
remembers for a day. An attempt may end at any moment: its draft is never used, and its candidate is tried
again. An optimised model does not depend on the number of threads (`runtime.optimised.key`), so
these workers compute with one: in the background they take no more than a core each.

A version on a device has an optimised model for that one, made and tried there. Devices with memory of their
own have none, since an attempt reserves only the machine's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from msgspec import UNSET, structs

from events.counters import Histogram
from events.jobs import Footprint
from events.types import LoadedFile, LoadParameters, contents_of, digest_of
from runtime.errors import ForkServerUnavailable, RuntimeProblem, StoreUnavailable
from runtime.optimised.key import describe_target, make_key, runtime_was_replaced
from runtime.optimised.pacing import Pacer
from runtime.optimised.store import STORE_PROBLEMS, Manifest, OptimisedStore, Useless
from runtime.optimised.trial import MAX_SAMPLE_BYTES, problems_of, try_optimised
from runtime.process.pool import WorkerPool, complete, start_task
from runtime.repository import LOAD_LIMIT_S, SizedFile, read_warm_up
from runtime.scheduler.estimates import WORKER_BYTES, is_same_files
from runtime.store.versions import HeldVersion, Versions
from runtime.wire import Load, Optimise, OptimisedModel, TargetDevice, Tensor

KEPT = "kept"
LEFT_OUT = "left_out"
STOPPED = "stopped"
"""Outcomes of an attempt; a stopped one is repeated, or the disk or the version's files were in the way."""
OUTCOMES = (KEPT, LEFT_OUT, STOPPED)
KNOWN = "known"
"""Of an attempt that found its key known meanwhile, which is not counted."""
TOOK_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
"""Buckets in seconds: from a model of some kilobytes to `LIMIT_S`."""
LIMIT_S = 900.0
"""Limit of a candidate's attempts together: some hundred inferences of a second each, and three loads."""
SIZE_TIMES = 2
"""Size of an optimised model ÷ its sources, at most: the weights as they are, and packed."""
TRIED_IN_TIMES = 1.75
"""Memory limit of a trial's worker ÷ the peak of a bare load. With five networks of 2 to 105 MB a bare load
and an inference of one row map 1.1 times the peak, an optimised one of an MLP 1.6 times. Making it takes 1.7,
alone. With 8 rows some map 2.3 times: these are tried on fewer."""
TRIED_IN_BYTES = 2 * MAX_SAMPLE_BYTES
"""Added to that: a small model's inputs take most, once as received and once as run."""
PAUSE_S = 600.0
"""Pause of all attempts after a full or failing disk, or when no worker could be started."""
MAX_CANDIDATES = 1000
"""Limit of the queue."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that was loaded without an optimised model, with the peak memory of one worker.

    The memory limit of that load does not apply here: an attempt has a reservation of its own.

    Attributes:
        spent_s: duration of its interrupted attempts.
        is_suspect: whether the fork server failed in one of them.
        device: where it was loaded; None is the CPU.
    """

    model_id: str
    version: int
    files: tuple[LoadedFile, ...]
    peak_bytes: int
    spent_s: float = 0.0
    is_suspect: bool = False
    device: TargetDevice | None = None

    @property
    def need_bytes(self) -> int:
        """Memory to reserve for an attempt: two workers at once, each within its limit."""
        return 2 * (self.worker_bytes + WORKER_BYTES)

    @property
    def worker_bytes(self) -> int:
        """Memory limit of one worker of a trial, beside an empty worker's memory."""
        return math.ceil(self.peak_bytes * TRIED_IN_TIMES) + TRIED_IN_BYTES


class OptimiserCounts:
    """Counters since the start of the server.

    Attributes:
        attempts: by outcome.
        took_s: durations of attempts.
        rejected: optimised models that failed in a load or in service.
    """

    def __init__(self) -> None:
        self.attempts = Counter[str]()
        self.took_s = Histogram(TOOK_S)
        self.rejected = 0


class Optimiser:
    """The background task that makes optimised models, its queue, and the optimised models of loads.

    Args:
        store: keeps them; None makes and finds none.
        pool: starts workers.
        versions: has the files of versions.
        wake: called when the consumer has something new to decide.
        is_busy: whether loads or inferences compute now; an attempt is suspended meanwhile.

    Attributes:
        running: the candidate of the running attempt.
    """

    def __init__(
        self,
        store: OptimisedStore | None,
        pool: WorkerPool,
        versions: Versions,
        wake: Callable[[], None],
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.store = store
        self._pool = pool
        self._pacer = Pacer(pool, is_busy)
        self._versions = versions
        self._wake = wake
        self._queue: dict[str, Candidate] = {}
        self._attempt: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._paused_until = 0.0
        self.running: Candidate | None = None
        self.counts = OptimiserCounts()

    @property
    def need_bytes(self) -> int | None:
        """Memory that the next candidate takes; None without one, or while the disk is in the way."""
        if not self._queue or time.monotonic() < self._paused_until:
            return None
        return self._queue[self._next_key()].need_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory that the running attempt holds until its processes have exited; 0 without one."""
        return self.running.need_bytes if self.running is not None else 0

    @property
    def is_stopping(self) -> bool:
        """Whether the running attempt is being interrupted."""
        return self._attempt is not None and self._attempt.cancelling() > 0

    def allow(self, *, allowed: bool) -> None:
        """Begin an attempt with the next candidate if none runs; or interrupt the running one.

        `wake` is called when an attempt has ended, whatever the outcome.
        """
        if not allowed:
            if self._attempt is not None and not self.is_stopping:
                self._attempt.cancel()
        elif self.store is not None and self._attempt is None and self.need_bytes is not None:
            key = self._next_key()
            self.running = candidate = self._queue.pop(key)
            self._attempt = start_task(self._run(self.store, key, candidate), "optimising")
            self._attempt.add_done_callback(lambda _: self._on_ended())

    def offer(self, candidate: Candidate) -> None:
        """Offer a version that was loaded without an optimised model; ignored if its key is known."""
        if self.store is not None and len(self._queue) < MAX_CANDIDATES:
            self._spawn(self._consider(self.store, candidate))

    def reject(self, optimised: OptimisedModel, reason: str) -> None:
        """Drop an optimised model that failed in a load or in service, and remember that for a day."""
        _log.warning("the prepared model %s is dropped: %s", optimised.sha256[:12], reason)
        self.counts.rejected += 1
        if self.store is not None:
            self._spawn(self._drop(self.store, optimised, reason))

    async def close(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        tasks = [*self._tasks, *filter(None, [self._attempt])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def find(self, files: Sequence[LoadedFile], device: TargetDevice | None = None) -> OptimisedModel | None:
        """Return the optimised model to load for these files on a device, if there is one; blocks."""
        if self.store is None or (key := self._key_of(files, device)) is None:
            return None
        try:
            return self.store.use(key)
        except STORE_PROBLEMS as error:
            _log.warning("a prepared model cannot be used, and the load goes on without it: %s", error)
            return None

    def expected_for(
        self, files: Sequence[SizedFile], footprints: Iterable[Footprint], device: TargetDevice | None = None
    ) -> str | None:
        """Return the SHA-256 of the optimised model that a load most likely gets; blocks.

        Args:
            files: sizes and times of those to load.
            footprints: of earlier loads of the model, whose files have hashes.
            device: of the load; None is the CPU.
        """
        known = next((seen.files for seen in footprints if is_same_files(seen.files, files)), None)
        if self.store is None or known is None or (key := self._key_of(known, device)) is None:
            return None
        entry = self.store.find(key)
        return None if entry is None else entry.sha256

    def _key_of(self, files: Sequence[LoadedFile], device: TargetDevice | None) -> str | None:
        """Return the key of an optimised model; None for a device with memory of its own, or that is gone."""
        digest = digest_of(contents_of(files))
        if device is None:
            return make_key(digest)
        found = self._pool.devices.found.get(device.name)
        return None if found is None or found.pci_bus_id else make_key(digest, describe_target(device, found))

    def _next_key(self) -> str:
        """Return the key of the candidate that needs the least memory: one that waits delays no other."""
        return min(self._queue, key=lambda key: self._queue[key].need_bytes)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _consider(self, store: OptimisedStore, candidate: Candidate) -> None:
        key = await asyncio.to_thread(self._key_of, candidate.files, candidate.device)
        if key is not None and await asyncio.to_thread(store.find, key) is None:
            self._queue.setdefault(key, candidate)  # other models may have the same files
            self._wake()

    async def _drop(self, store: OptimisedStore, optimised: OptimisedModel, reason: str) -> None:
        try:
            await asyncio.to_thread(store.drop, optimised, reason)
        except STORE_PROBLEMS as error:
            self._pause(error)

    def _on_ended(self) -> None:
        self._attempt = self.running = None
        self._wake()

    def _pause(self, error: Exception) -> None:
        _log.warning("nothing is prepared for %d minutes: %s", PAUSE_S // 60, error)
        self._paused_until = time.monotonic() + PAUSE_S

    async def _run(self, store: OptimisedStore, key: str, candidate: Candidate) -> None:
        """Make one attempt, paced."""
        began_s, outcome = time.monotonic(), STOPPED
        device = UNSET if candidate.device is None else candidate.device.name
        manifest = Manifest(key=key, model_id=candidate.model_id, version=candidate.version, device=device)
        pacing = start_task(self._pacer.run(), "pacing")
        try:
            outcome = await self._attempt_once(store, manifest, candidate)
        except asyncio.CancelledError:
            spent_s = candidate.spent_s + time.monotonic() - began_s
            self._queue[key] = replace(candidate, spent_s=spent_s)
            raise
        except ForkServerUnavailable as problem:  # a second time it is left until a later load offers it
            if not candidate.is_suspect:
                self._queue[key] = replace(candidate, is_suspect=True)
            self._pause(problem)
        except STORE_PROBLEMS as error:
            self._pause(error)
        except RuntimeProblem as problem:
            if problem.code == "disk_full":
                self._pause(problem)
            else:  # its files have changed: the next load offers the new ones
                _log.info("%s is not prepared: %s", candidate.model_id, problem)
        except Exception:  # noqa: BLE001 - a defect here must not reach a load
            _log.exception("%s could not be prepared", candidate.model_id)
        finally:
            pacing.cancel()
            if outcome != KNOWN:
                self.counts.attempts[outcome] += 1
                self.counts.took_s.observe(time.monotonic() - began_s)

    async def _attempt_once(self, store: OptimisedStore, manifest: Manifest, candidate: Candidate) -> str:
        """Keep what an attempt makes, or record why it is of no use; returns the outcome."""
        began_s, limit = time.monotonic(), asyncio.timeout(LIMIT_S - candidate.spent_s)
        try:
            async with limit:
                if await asyncio.to_thread(store.find, manifest.key) is not None:
                    return KNOWN
                await self._make_and_try(store, manifest, candidate)
                return KEPT
        except (Useless, TimeoutError) as problem:
            if isinstance(problem, TimeoutError) and not limit.expired():  # a file system's
                raise
            useless = structs.replace(manifest, took_ms=_ms_since(began_s))
            reason = str(problem) or f"it takes more than {LIMIT_S:g} s"
            await complete(asyncio.to_thread(store.record_useless, useless, reason))
            return LEFT_OUT

    async def _make_and_try(self, store: OptimisedStore, manifest: Manifest, candidate: Candidate) -> None:
        """Keep the optimised model of a candidate if it passes its trial.

        Raises:
            Useless: it does not, or cannot be made.
            RuntimeProblem: anything else that does not speak against it.
        """
        began_s = time.monotonic()
        model_id, number = candidate.model_id, candidate.version
        version = self._versions.version(model_id, number, candidate.files, may_copy=False)
        async with version as files, _draft(store, SIZE_TIMES * files.bytes) as draft:
            bare, given = await self._build_load(candidate, files)
            await self._make(store, bare, candidate, draft)
            sealed, optimised = await complete(asyncio.to_thread(store.seal, manifest, draft))
            figures, placed = await try_optimised(self._pacer, bare, optimised, given)
            passed = structs.replace(sealed, figures=asdict(figures), took_ms=_ms_since(began_s))
            passed = structs.replace(passed, placed=placed or UNSET)
            # To its end: the draft must not be removed while it becomes an entry.
            await complete(asyncio.to_thread(store.keep, passed, draft))

    async def _build_load(self, candidate: Candidate, files: HeldVersion) -> tuple[Load, tuple[Tensor, ...]]:
        """Return the order to load the original, and the inputs of its `loadledger.toml`."""
        repository = self._versions.repository
        read = partial(read_warm_up, repository, candidate.model_id)
        warm_up = await repository.file_system.run(candidate.model_id, read, LOAD_LIMIT_S)
        parameters = LoadParameters(memory_limit_bytes=candidate.worker_bytes, threads=1)
        return self._pool.build_load(files, parameters, warm_up, candidate.device), warm_up.inputs

    async def _make(self, store: OptimisedStore, bare: Load, candidate: Candidate, draft: Path) -> None:
        order = Optimise(
            root=bare.root,
            folder=bare.folder,
            bytes=bare.bytes,
            threads=bare.threads,
            memory_limit_bytes=candidate.need_bytes - WORKER_BYTES,  # it is alone
            target=str(draft),
            most_bytes=store.limit_bytes,
            layers=bare.layers,
            name=f"{bare.name} (preparing)",
            device=bare.device,
        )
        async with self._pacer.worker() as worker:
            if await asyncio.to_thread(runtime_was_replaced, worker.pid):
                raise StoreUnavailable("ONNX Runtime was replaced while this server uses it: restart it")
            with problems_of(worker, "it cannot be made"):
                await worker.execute(order)


def _ms_since(began_s: float) -> int:
    return round((time.monotonic() - began_s) * 1000)


@asynccontextmanager
async def _draft(store: OptimisedStore, expected_bytes: int) -> AsyncIterator[Path]:
    """Yield a draft, and remove what is left of it, even if this is cancelled while it is created."""
    made: list[Path] = []
    try:
        await complete(asyncio.to_thread(lambda: made.append(store.draft(expected_bytes))))
        yield made[0]
    finally:
        for draft in made:
            await complete(asyncio.to_thread(store.discard, draft))
