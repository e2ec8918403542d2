"""Making cached models in the background: candidates, one preparation at a time, and its outcomes.

The scheduler decides when (`PrepareModel`, `StopPreparation`). A worker makes a form, and fresh workers try
it beside the bare model. A form that crashes its worker, answers differently or is not faster is left out,
and the next simpler form is tried. A preparation may end at any moment; its draft is never used. A form does
not depend on the number of threads (`runtime.cache.key`), so all these workers compute with one: in the
background they take no more than a core each.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from msgspec import structs

from events.counters import Histogram
from events.jobs import Footprint
from events.types import LoadedFile, LoadParameters, contents_of
from runtime.cache.key import make_key, runtime_was_replaced
from runtime.cache.manifest import CachedForm, Manifest
from runtime.cache.store import CACHE_PROBLEMS, ModelCache
from runtime.cache.trial import (
    CHANGED,
    MAX_SAMPLE_BYTES,
    Pacer,
    Trial,
    TrialImpossible,
    TrialInterrupted,
    has_outside_cause,
)
from runtime.errors import RuntimeProblem, StoreUnavailable, WorkerDied
from runtime.estimates import WORKER_BYTES, is_same_files
from runtime.filesystem import LOAD_LIMIT_S
from runtime.modeldefaults import read_warm_up
from runtime.process.pool import WorkerPool, complete
from runtime.repository import SizedFile
from runtime.scheduler.view import PreparationView
from runtime.store.contents import ModelContents, VersionFiles
from runtime.store.manifest import digest_of
from runtime.wire import CachedCopy, Form, Load, Prepare, Tensor

KEPT = "kept"
LEFT_OUT = "left_out"
STOPPED = "stopped"
"""Interrupted, and may be repeated: a load needed the memory, or the server or the machine failed."""
TOOK_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
"""Buckets in seconds: from a model of some kilobytes to `LIMIT_S`."""


_log = logging.getLogger(__name__)
FORMS: tuple[Form, ...] = ("prepacked", "optimised")
"""In the order of trial: from the fastest to load to the simplest."""
WEIGHTS_IN: dict[Form, int] = {"prepacked": 2, "optimised": 1}
"""Largest size of a form ÷ its sources: the weights as they are, and packed."""
LIMIT_S = 900.0
"""Limit of one preparation: some hundred inferences of a second each, and six loads."""
TRIED_IN_TIMES = 1.75
"""Memory limit of a trial's worker ÷ the peak of a bare load. With five networks of 2 to 105 MB a bare load
and an inference of one row map 1.1 times the peak, a prepacked form of an MLP 1.6 times. Making a form takes
1.7, alone. With 8 rows some map 2.3 times: these are tried on fewer."""
TRIED_IN_BYTES = 2 * MAX_SAMPLE_BYTES
"""Added to that: a small model's inputs take most, once as received and once as run."""
MAX_ATTEMPTS = 3
"""Limit for a preparation that is interrupted each time. After that, no form is of use for now; a later load
offers the version again if loads were in the way."""
PAUSE_S = 600.0
"""Pause of all preparations after a full or failing disk."""
MAX_CANDIDATES = 1000
"""Limit of versions that wait to be prepared."""


class PreparingCounts:
    """Counters of preparations since the start of the server.

    Attributes:
        tried: tried forms, by form and outcome.
        took_s: durations of preparations, with all forms tried.
        dropped: forms that failed in a load or in service.
    """

    def __init__(self) -> None:
        self.tried = Counter[tuple[str, str]]()
        self.took_s = Histogram(TOOK_S)
        self.dropped = 0

    def count(self, tried: Mapping[Form, str], took_s: float) -> None:
        """Count a preparation that has ended; one that tried no form is not counted."""
        if tried:
            self.tried.update(tried.items())
            self.took_s.observe(took_s)


@dataclass(frozen=True, slots=True)
class FormFailure:
    """Why a form failed in a load or in service; an outside cause does not speak against the form."""

    reason: str
    has_outside_cause: bool


class _Changed(Exception):
    """The files that were loaded are gone; the next load offers the new ones."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that may be prepared: as it was loaded bare, with the peak memory of one worker.

    The memory limit of that load does not apply here: preparing has a reservation of its own.
    """

    load_job_id: str
    model_id: str
    version: int
    sources: tuple[LoadedFile, ...]
    peak_bytes: int
    attempts: int = 0

    @property
    def need_bytes(self) -> int:
        """Memory to reserve for a preparation: two workers at once, each within its limit."""
        return 2 * (self.worker_bytes + WORKER_BYTES)

    @property
    def worker_bytes(self) -> int:
        """Memory limit of one worker of a trial, beside an empty worker's memory."""
        return math.ceil(self.peak_bytes * TRIED_IN_TIMES) + TRIED_IN_BYTES

    @property
    def digest(self) -> str:
        return digest_of(contents_of(self.sources))


class PreparationRun:
    """One preparation of one version; `outcomes` has that of each form tried so far."""

    def __init__(
        self,
        store: ModelCache,
        pool: WorkerPool,
        contents: ModelContents,
        candidate: Candidate,
        pacer: Pacer,
    ) -> None:
        self._store = store
        self._pool = pool
        self._pacer = pacer
        self._contents = contents
        self._candidate = candidate
        self._key = ""
        self._began = time.monotonic()
        self.outcomes: dict[Form, str] = {}

    async def run(self) -> None:
        """Keep the first form that passes its trial, or record the reasons against all forms.

        Raises:
            TrialInterrupted: the preparation may be repeated.
            StoreUnavailable: the form cannot be kept.
            DiskFull: the disk has no room for the form.
            OSError: the repository cannot be read.
        """
        self._key = await asyncio.to_thread(make_key, self._candidate.digest)
        try:
            async with asyncio.timeout(LIMIT_S), self._files() as files:
                bare, given = await self._bare_load(files)
                if await asyncio.to_thread(self._store.find, self._key) is not None:
                    return
                tried = await self._first_of_use(bare, Trial(self._pacer, bare, given))
        except TrialImpossible as why:
            tried = dict.fromkeys(FORMS, str(why))
        except TimeoutError:
            raise TrialInterrupted(f"it took more than {LIMIT_S:g} s") from None
        except _Changed:
            return
        if tried is not None:
            await self.record_useless(tried)

    async def record_useless(self, tried: Mapping[Form, str]) -> None:
        """Record for a while why no form is of use."""
        await asyncio.to_thread(self._store.record_useless, self._describe(), tried)

    async def _first_of_use(self, bare: Load, trial: Trial) -> dict[Form, str] | None:
        """Keep the first form that is of use and return None; else return the reason against each."""
        tried: dict[Form, str] = {}
        for form in FORMS:
            self.outcomes[form] = STOPPED  # until the form has an outcome
            why_not = await self._try_form(form, bare, trial, tried)
            self.outcomes[form] = KEPT if why_not is None else LEFT_OUT
            if why_not is None:
                return None
            tried[form] = why_not
        return tried

    @asynccontextmanager
    async def _files(self) -> AsyncIterator[VersionFiles]:
        """Hold the files that were loaded, wherever they lie."""
        candidate, contents = self._candidate, self._contents
        found = await complete(
            asyncio.to_thread(contents.find, candidate.model_id, candidate.version, candidate.sources)
        )
        if found is None:
            raise _Changed
        try:
            yield found
        finally:
            contents.release(found)

    async def _bare_load(self, files: VersionFiles) -> tuple[Load, tuple[Tensor, ...]]:
        """Return the order to load the version bare, and the inputs of its `loadledger.toml`."""
        candidate, repository = self._candidate, self._contents.repository
        try:
            warm_up = await repository.file_system.run(
                candidate.model_id, partial(read_warm_up, repository, candidate.model_id), LOAD_LIMIT_S
            )
        except RuntimeProblem as problem:
            raise _Changed from problem
        parameters = LoadParameters(memory_limit_bytes=candidate.worker_bytes, threads=1)
        return self._pool.build_load(files, parameters, warm_up), warm_up.inputs

    async def _try_form(self, form: Form, bare: Load, trial: Trial, tried: Mapping[Form, str]) -> str | None:
        """Make a form, try it, and keep it; returns the reason against it, or None."""
        try:
            async with self._draft(form) as draft:
                await self._make(form, bare, draft)
                size = sum(path.lstat().st_size for path in draft.iterdir())
                why_not, pair = await trial.run(CachedCopy(str(draft), form, size))
                if why_not is None:  # completely: the draft must not be removed while it becomes an entry
                    figures = asdict(pair) if pair is not None else {}
                    manifest = structs.replace(self._describe(), form=form, figures=figures, tried={**tried})
                    why_not = await complete(asyncio.to_thread(self._store.keep, manifest, draft))
                return why_not
        except CACHE_PROBLEMS:
            raise
        except RuntimeProblem as problem:
            if problem.code in CHANGED:
                raise _Changed from problem
            if problem.code == "disk_full":
                raise StoreUnavailable(str(problem)) from problem
            if has_outside_cause(problem):
                raise TrialInterrupted(f"{form}: {problem}") from problem
            return f"its worker died: {problem}" if isinstance(problem, WorkerDied) else str(problem)

    @asynccontextmanager
    async def _draft(self, form: Form) -> AsyncIterator[Path]:
        """Yield a draft, and remove what is left of it, even if this is cancelled while it is created."""
        made: list[Path] = []
        expected_bytes = WEIGHTS_IN[form] * sum(file.bytes for file in self._candidate.sources)
        try:
            await complete(asyncio.to_thread(lambda: made.append(self._store.draft(expected_bytes))))
            yield made[0]
        finally:
            for draft in made:
                await complete(asyncio.to_thread(self._store.discard, draft))

    async def _make(self, form: Form, bare: Load, draft: Path) -> None:
        alone_bytes = self._candidate.need_bytes - WORKER_BYTES
        order = Prepare(
            root=bare.root,
            folder=bare.folder,
            bytes=bare.bytes,
            threads=bare.threads,
            memory_limit_bytes=alone_bytes,
            form=form,
            target=str(draft),
            most_bytes=self._store.limit_bytes,
            layers=bare.layers,
            name=f"{bare.name} (preparing)",
        )
        async with self._pacer.worker() as worker:
            if await asyncio.to_thread(runtime_was_replaced, worker.pid):
                raise StoreUnavailable("ONNX Runtime was replaced while this server uses it: restart it")
            await worker.execute(order)

    @property
    def _took_ms(self) -> int:
        return round((time.monotonic() - self._began) * 1000)

    def _describe(self) -> Manifest:
        """Return what is recorded of this preparation, whatever comes of it."""
        model_id, version = self._candidate.model_id, self._candidate.version
        return Manifest(key=self._key, model_id=model_id, version=version, took_ms=self._took_ms)


class Preparer:
    """Candidates and the preparation under way, and the cached models of loads.

    Args:
        store: the model cache; None disables it.
        wake: called when the scheduler has something new to decide.
        is_busy: whether loads or inferences compute now; a preparation is stopped meanwhile.

    Attributes:
        preparation: the preparation under way, for the scheduler.
        candidate: its version.
    """

    def __init__(
        self,
        store: ModelCache | None,
        pool: WorkerPool,
        contents: ModelContents,
        wake: Callable[[], None],
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.store = store
        self._pool = pool
        self._pacer = Pacer(pool, is_busy)
        self._contents = contents
        self._wake = wake
        self._candidates: dict[str, Candidate] = {}
        self._running: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = Counter[str]()
        self._paused_until = 0.0
        self.preparation: PreparationView | None = None
        self.candidate: Candidate | None = None
        self.counts = PreparingCounts()

    @property
    def preparable(self) -> dict[str, int]:
        """Memory that preparing a candidate takes, in bytes by load job id, oldest first."""
        if time.monotonic() < self._paused_until:
            return {}
        return {each.load_job_id: each.need_bytes for each in self._candidates.values()}

    def offer(self, candidate: Candidate) -> None:
        """Offer a version that was loaded bare; it becomes a candidate unless it was tried before."""
        if self.store is not None and len(self._candidates) < MAX_CANDIDATES:
            self._spawn(self._consider(self.store, candidate))

    def begin(self, load_job_id: str) -> None:
        """Prepare the candidate of a load; `wake` is called at the end, whatever the outcome."""
        if self.store is None or self._running is not None:
            raise RuntimeError("nothing can be prepared now")
        key = next(key for key, each in self._candidates.items() if each.load_job_id == load_job_id)
        self.candidate = candidate = self._candidates.pop(key)
        self.preparation = PreparationView(load_job_id, candidate.need_bytes)
        self._running = asyncio.create_task(self._prepare(self.store, key, candidate), name="preparing")
        self._running.add_done_callback(lambda _: self._on_ended())

    def stop(self) -> None:
        """Stop the preparation; its memory is free when its processes have exited."""
        if self._running is not None and self.preparation is not None:
            self.preparation = replace(self.preparation, stopping=True)
            self._running.cancel()

    async def close(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        tasks = [*self._tasks, *filter(None, [self._running])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def find_form(self, files: Sequence[LoadedFile]) -> CachedForm | None:
        """Return the cached model of these files, if there is one; reads files, so call it in a thread."""
        if self.store is None:
            return None
        digest = digest_of(contents_of(files))
        try:
            return self.store.use(make_key(digest))
        except CACHE_PROBLEMS as error:
            _log.warning("a prepared form cannot be used, and the load goes on without it: %s", error)
            return None

    def form_of(self, files: Sequence[SizedFile], footprints: Iterable[Footprint]) -> str | None:
        """Return which form a load of files of these sizes and times gets, most likely; reads files, too."""
        known = next((seen.files for seen in footprints if is_same_files(seen.files, files)), None)
        if self.store is None or known is None:
            return None
        entry = self.store.find(make_key(digest_of(contents_of(known))))
        return None if entry is None else entry.form

    def fail_form(self, prepared: CachedForm, failure: FormFailure) -> None:
        """Drop a form that failed in a load or in service; one with an outside cause may fail repeatedly."""
        name, reason = prepared.sha256[:12], failure.reason
        if failure.has_outside_cause:
            self._failures[prepared.sha256] += 1
            if self._failures[prepared.sha256] < MAX_ATTEMPTS:
                _log.warning("the prepared form %s was not used: %s", name, reason)
                return
            reason = f"{reason}, {MAX_ATTEMPTS} times"
        del self._failures[prepared.sha256]
        _log.warning("the prepared form %s is dropped: %s", name, reason)
        self.counts.dropped += 1
        if self.store is not None:
            self._spawn(self._drop(self.store, prepared, reason))

    def _spawn(self, look: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(look)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _consider(self, store: ModelCache, candidate: Candidate) -> None:
        key = await asyncio.to_thread(make_key, candidate.digest)
        if await asyncio.to_thread(store.find, key) is None:
            self._candidates.setdefault(key, candidate)  # other models may have the same files
            self._wake()

    async def _drop(self, store: ModelCache, prepared: CachedForm, reason: str) -> None:
        try:
            await asyncio.to_thread(store.drop, prepared, reason)
        except CACHE_PROBLEMS as error:
            self._pause(error)

    def _on_ended(self) -> None:
        self._running = self.preparation = self.candidate = None
        self._wake()

    def _pause(self, error: Exception) -> None:
        _log.warning("nothing is prepared for %d minutes: %s", PAUSE_S // 60, error)
        self._paused_until = time.monotonic() + PAUSE_S

    async def _prepare(self, store: ModelCache, key: str, candidate: Candidate) -> None:
        preparing = PreparationRun(store, self._pool, self._contents, candidate, self._pacer)
        began = time.monotonic()
        pacing = asyncio.create_task(self._pacer.run(), name="pacing")
        try:
            await self._attempt(preparing, key, candidate)
        except CACHE_PROBLEMS as error:
            self._pause(error)
        except Exception:  # noqa: BLE001 - a defect here must not reach a load
            _log.exception("%s could not be prepared", candidate.model_id)
        finally:
            pacing.cancel()
            self.counts.count(preparing.outcomes, time.monotonic() - began)

    async def _attempt(self, preparing: PreparationRun, key: str, candidate: Candidate) -> None:
        again = replace(candidate, attempts=candidate.attempts + 1)
        try:
            await preparing.run()
        except asyncio.CancelledError:
            if again.attempts < MAX_ATTEMPTS:
                self._candidates[key] = again
            raise
        except TrialInterrupted as why:
            if again.attempts < MAX_ATTEMPTS:
                self._candidates[key] = again
            else:
                await preparing.record_useless(dict.fromkeys(FORMS, f"{why}, {MAX_ATTEMPTS} times"))
