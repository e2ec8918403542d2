"""How much memory a load will need: what its files took the last time, else an estimate from their sizes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from events.jobs import Job
from events.models import Footprint, Model
from events.state import State
from events.types import LoadedFile, LoadParameters
from runtime.errors import RuntimeProblem
from runtime.repository import MODEL_FILE, FileStat, Repository

WORKER_BYTES = 8 * 2**20
"""What a worker has beside its model at most."""
BYTES_PER_MODEL_BYTE = 2.5
"""What ONNX Runtime takes while it loads weights: parsed, copied, packed for this CPU (measured: 2.1)."""
BYTES_PER_DATA_BYTE = 1
"""Of external data: it is mapped, which costs nothing, but copied where it is packed."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What all workers of a load take at most, in bytes; whether nothing is known but the files' sizes."""

    bytes: int
    is_estimate: bool


def estimate_memory(
    files: Sequence[FileStat],
    version: int,
    parameters: LoadParameters,
    footprints: Iterable[Footprint],
    form: str | None = None,
) -> MemoryEstimate:
    """Return what a load will need, as far as that can be known before.

    Args:
        files: what the version consists of now.
        version: which it is.
        parameters: what it is loaded with.
        footprints: what the model's versions took.
        form: the prepared form that there is of these files; its first load may take what a bare one does.
    """
    same = [seen for seen in footprints if seen.version == version and is_same_files(seen.files, files)]
    bare = next((seen for seen in same if seen.form is None), None)
    known = next((seen for seen in same if seen.form == form), bare)
    one = known.peak_memory_bytes if known is not None else _estimate(files)
    limit = parameters.memory_limit_bytes
    is_limited = limit is not None and limit + WORKER_BYTES <= one
    if limit is not None and is_limited:
        one = limit + WORKER_BYTES
    return MemoryEstimate(one * parameters.instances, known is None and not is_limited)


def estimate_unprepared(version: int, parameters: LoadParameters, footprints: Iterable[Footprint]) -> int:
    """Return what a load takes without a prepared form, as far as that is known of the version; else 0."""
    peaks = (seen.peak_memory_bytes for seen in footprints if seen.version == version and seen.form is None)
    one = max(peaks, default=0)
    if parameters.memory_limit_bytes is not None:
        one = min(one, parameters.memory_limit_bytes + WORKER_BYTES)
    return one * parameters.instances


def _estimate(files: Iterable[FileStat]) -> int:
    weights = {True: BYTES_PER_MODEL_BYTE, False: BYTES_PER_DATA_BYTE}
    return WORKER_BYTES + math.ceil(sum(file.bytes * weights[file.path == MODEL_FILE] for file in files))


def is_same_files(seen: Iterable[LoadedFile], files: Iterable[FileStat]) -> bool:
    """Tell whether files are still those that were seen, by path, size and time."""
    return sorted((file.path, file.bytes, file.mtime_ns) for file in seen) == sorted(
        (file.path, file.bytes, file.mtime_ns) for file in files
    )


FormOf = Callable[[Sequence[FileStat], Iterable[Footprint]], str | None]
"""Tells which prepared form there is of these files; it may read files."""

LOOK_S = 2.0
"""How long loads keep their order for a look at one's files: it takes a millisecond, unless a disk hangs."""


class MemoryEstimates:
    """What pending loads need, found out once each by a look at their files.

    Attributes:
        known: bytes by job id; None while the files are being looked at.
        looked_at: the jobs whose files have been looked at for no longer than `LOOK_S`.
        estimated: the jobs of which nothing is known but their files' sizes.
        tasks: the looks under way.
    """

    def __init__(
        self,
        repository: Repository,
        wake: Callable[[], None],
        form_of: FormOf = lambda _files, _footprints: None,
    ) -> None:
        self._repository = repository
        self._form_of = form_of
        self._wake = wake
        self.known: dict[str, int | None] = {}
        self.looked_at: set[str] = set()
        self.estimated: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    def find(self, job: Job, model: Model | None) -> None:
        """Begin to find out; `known` has it when this wakes."""
        self.known[job.id] = None
        self.looked_at.add(job.id)
        patience = asyncio.get_running_loop().call_later(LOOK_S, self._look_no_longer, job.id)
        task = asyncio.create_task(self._look(job, model))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda _: patience.cancel())

    def forget_ended(self, state: State) -> None:
        """Drop what is known of jobs that have ended."""
        for job_id in [job_id for job_id in self.known if state.unended_job(job_id) is None]:
            del self.known[job_id]
            self.estimated.discard(job_id)

    async def _look(self, job: Job, model: Model | None) -> None:
        assert job.version is not None
        assert job.load is not None
        need = MemoryEstimate(0, is_estimate=False)
        try:
            footprints = model.footprints if model is not None else ()
            files, form = await asyncio.to_thread(self._seen, job.model_id, job.version, footprints)
            need = estimate_memory(files, job.version, job.load, footprints, form)
        except RuntimeProblem:
            pass  # the load itself says what is wrong with the files
        finally:
            if job.id in self.known:
                self.known[job.id] = need.bytes
                if need.is_estimate:
                    self.estimated.add(job.id)
            self._look_no_longer(job.id)

    def _seen(
        self, model_id: str, version: int, footprints: Iterable[Footprint]
    ) -> tuple[Sequence[FileStat], str | None]:
        files = self._repository.resolve(model_id, version).files
        return files, self._form_of(files, footprints)

    def _look_no_longer(self, job_id: str) -> None:
        self.looked_at.discard(job_id)
        self._wake()
