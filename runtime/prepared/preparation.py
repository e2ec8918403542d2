"""Preparing one version: a worker makes a form, and others, fresh ones, try it beside the bare model.

A form that a worker dies of, that answers otherwise or that is no quicker is not kept, and the next simpler
one is tried. All of it may end at any moment: what is not finished is a draft, which nobody uses.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from events.clock import uuid7
from runtime.defaults import read_warm_up
from runtime.errors import RuntimeProblem, WorkerDied
from runtime.needs import WORKER_BYTES
from runtime.prepared.blame import CHANGED, NotTried, Stopped, is_circumstance
from runtime.prepared.counts import KEPT, LEFT_OUT, STOPPED
from runtime.prepared.entries import hash_of, is_open
from runtime.prepared.files import hashes_of, prepared_in
from runtime.prepared.folder import PreparedUnavailable
from runtime.prepared.key import key_of, runtime_was_replaced
from runtime.prepared.samples import MAX_SAMPLE_BYTES
from runtime.prepared.store import Made, PreparedStore
from runtime.prepared.trial import Pair, Trial, told
from runtime.processes.pool import WorkerPool
from runtime.processes.shielding import ended, whole
from runtime.repository import Repository
from runtime.wire import Form, Load, LoadedFile, Prepare, SourceHash, Tensor

_log = logging.getLogger(__name__)

FORMS: tuple[Form, ...] = ("prepacked", "optimised")
"""From the one that loads in the least time to the simplest."""
WEIGHTS_IN: dict[Form, int] = {"prepacked": 2, "optimised": 1}
"""How often a form has all that its sources have, at most: as it is, and packed."""
LIMIT_S = 900.0
"""For all of one preparation: some hundred inferences of a second each, and 18 loads."""
TRIED_IN_TIMES = 1.75
"""What a worker of a trial may map, in times of what a bare load took at most. With five networks of 2 to
105 MB a bare load and an inference of one row map 1.1 times as much, a prepacked form of an MLP 1.6 times; to
make a form takes 1.7, and whoever does is alone. With 8 rows some map 2.3 times: these are tried on fewer."""
TRIED_IN_BYTES = 2 * MAX_SAMPLE_BYTES
"""Beside that: of a small model the inputs take most, as they come and as they are run."""


class _Changed(Exception):
    """The repository no longer has the files that were loaded: its next load offers what it then has."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may be prepared: a version as it was loaded bare, and what one worker took for it at most.

    What that load was limited to says nothing of what may be taken here: that is reserved.
    """

    load_job_id: str
    model_id: str
    version: int
    sources: tuple[LoadedFile, ...]
    peak_bytes: int
    attempts: int = 0

    @property
    def need_bytes(self) -> int:
        """What preparing and trying takes at most: two workers at once, each within its limit."""
        return 2 * (self.worker_bytes + WORKER_BYTES)

    @property
    def worker_bytes(self) -> int:
        """What one worker of a trial may take, beside what an empty one has."""
        return math.ceil(self.peak_bytes * TRIED_IN_TIMES) + TRIED_IN_BYTES

    @property
    def hashes(self) -> tuple[SourceHash, ...]:
        """The files by content."""
        return hashes_of(self.sources)


class Preparing:
    """One version being prepared.

    Attributes:
        outcomes: what became of each form that was tried until now.
    """

    def __init__(
        self, store: PreparedStore, pool: WorkerPool, repository: Repository, candidate: Candidate
    ) -> None:
        self._store = store
        self._pool = pool
        self._repository = repository
        self._candidate = candidate
        self._key = ""
        self._began = time.monotonic()
        self.outcomes: dict[Form, str] = {}

    async def run(self) -> None:
        """Keep the first form that is of use, or that none is, if neither is known by now.

        Raises:
            Stopped: it may be tried again.
            PreparedUnavailable: it cannot be kept.
            OSError: the repository cannot be read.
        """
        self._key = await asyncio.to_thread(key_of, self._candidate.hashes, self._pool.threads)
        given: tuple[Tensor, ...] = ()
        try:
            async with asyncio.timeout(LIMIT_S):
                bare, given = await self._bare()
                if not is_open(await asyncio.to_thread(self._store.find, self._key), given):
                    return
                tried = await self._first_of_use(bare, Trial(self._pool, bare, given))
        except NotTried as why:
            await self.settle_none(dict.fromkeys(FORMS, str(why)), untried_on=hash_of(given))
        except TimeoutError:
            raise Stopped(f"it took more than {LIMIT_S:g} s") from None
        except _Changed:
            return
        else:
            if tried is not None:
                await self.settle_none(tried)

    async def settle_none(self, tried: Mapping[Form, str], *, untried_on: str | None = None) -> None:
        """Have it remembered for a while that no form is of use, and why each is not."""
        candidate = self._candidate
        await asyncio.to_thread(
            self._store.settle_none,
            self._key,
            tried,
            model_id=candidate.model_id,
            version=candidate.version,
            took_ms=self._took_ms,
            untried_on=untried_on,
        )

    async def _first_of_use(self, bare: Load, trial: Trial) -> dict[Form, str] | None:
        """Keep the first form that is of use; if there is none, return why each is not."""
        tried: dict[Form, str] = {}
        for form in FORMS:
            self.outcomes[form] = STOPPED  # as long as nothing else is known
            why_not = await self._why_not(form, bare, trial, tried)
            self.outcomes[form] = KEPT if why_not is None else LEFT_OUT
            if why_not is None:
                return None
            tried[form] = why_not
        return tried

    async def _bare(self) -> tuple[Load, tuple[Tensor, ...]]:
        """Return how the version is loaded bare, and the inputs that its `loadledger.toml` gives."""
        candidate, repository = self._candidate, self._repository
        try:
            found = await asyncio.to_thread(repository.resolve, candidate.model_id, candidate.version)
            given = (await asyncio.to_thread(read_warm_up, repository, candidate.model_id)).inputs
        except RuntimeProblem as problem:
            raise _Changed from problem
        if tuple(file.path for file in found.files) != tuple(file.path for file in candidate.sources):
            raise _Changed
        order = Load(
            root=str(repository.root),
            folder=str(found.folder),
            files=tuple(file.path for file in found.files),
            threads=self._pool.threads,
            known=candidate.sources,
            memory_limit_bytes=candidate.worker_bytes,
            huge_pages=self._pool.huge_pages,
        )
        return order, given

    async def _why_not(self, form: Form, bare: Load, trial: Trial, tried: Mapping[Form, str]) -> str | None:
        """Make a form, try it, and keep it; returns why not, or None."""
        try:
            async with self._draft(form) as draft:
                files = await self._make(form, bare, draft)
                why_not, pairs = await trial.of(prepared_in(draft, form, files, self._candidate.hashes))
                if why_not is None:  # whole: the draft must not be removed while it becomes an entry
                    await whole(asyncio.to_thread(self._keep, draft, form, files, pairs, tried))
                return why_not
        except PreparedUnavailable:
            raise
        except RuntimeProblem as problem:
            if problem.code in CHANGED:
                raise _Changed from problem
            if problem.code == "disk_full":
                raise PreparedUnavailable(str(problem)) from problem
            if is_circumstance(problem):
                raise Stopped(f"{form}: {problem}") from problem
            return f"its worker died: {problem}" if isinstance(problem, WorkerDied) else str(problem)

    @asynccontextmanager
    async def _draft(self, form: Form) -> AsyncIterator[Path]:
        """Give a draft, and remove what is left of it, also if this is cancelled while it is made."""
        made: list[Path] = []
        expected_bytes = WEIGHTS_IN[form] * sum(file.bytes for file in self._candidate.sources)
        try:
            await whole(asyncio.to_thread(lambda: made.append(self._store.draft(self._key, expected_bytes))))
            yield made[0]
        finally:
            for draft in made:
                await whole(asyncio.to_thread(self._store.discard, draft))

    async def _make(self, form: Form, bare: Load, draft: Path) -> tuple[LoadedFile, ...]:
        worker = await self._pool.start(uuid7())
        alone_bytes = self._candidate.need_bytes - WORKER_BYTES
        order = Prepare(
            root=bare.root,
            folder=bare.folder,
            files=bare.files,
            threads=bare.threads,
            memory_limit_bytes=alone_bytes,
            known=bare.known,
            form=form,
            target=str(draft),
            most_bytes=self._store.limit_bytes,
        )
        try:
            if await asyncio.to_thread(runtime_was_replaced, worker.pid):
                raise PreparedUnavailable("ONNX Runtime was replaced while this server uses it: restart it")
            made = await worker.prepare(order)
        finally:
            await ended(worker)
        if hashes_of(made.sources) != self._candidate.hashes:
            raise _Changed
        return made.files

    @property
    def _took_ms(self) -> int:
        return round((time.monotonic() - self._began) * 1000)

    def _keep(
        self,
        draft: Path,
        form: Form,
        files: tuple[LoadedFile, ...],
        pairs: Sequence[Pair],
        tried: Mapping[Form, str],
    ) -> None:
        candidate = self._candidate
        made = Made(
            form=form,
            files=files,
            sources=candidate.hashes,
            model_id=candidate.model_id,
            version=candidate.version,
            took_ms=self._took_ms,
            figures=told(pairs),
            tried=dict(tried),
        )
        if self._store.keep(self._key, draft, made) is not None:
            _log.info("%s version %d is prepared: %s", candidate.model_id, candidate.version, form)
