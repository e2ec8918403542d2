"""The memory that a load will need: the last peak of the same files, else an estimate from their sizes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from events.jobs import Failure, Footprint, Job
from events.models import RELOADS, Model
from events.state import State
from events.types import LoadedFile, LoadParameters
from runtime.errors import RepositoryUnreadable, RuntimeProblem
from runtime.filesystem import LOAD_LIMIT_S
from runtime.onnxfile import find_model_file
from runtime.repository import Repository, SizedFile
from runtime.scheduler.view import FileSizes, MemoryEstimate

_log = logging.getLogger(__name__)

WORKER_BYTES = 8 * 2**20
"""Memory of a worker beside its model, at most."""
BYTES_PER_MODEL_BYTE = 2.5
"""ONNX Runtime parses, copies and packs weights while it loads them (measured: 2.1)."""
BYTES_PER_DATA_BYTE = 1
"""External data is mapped, which takes no memory, but copied where it is packed."""
MAX_OUTDATED = 3
"""A load that found other files than its estimate was for is estimated anew so many times; then it fails."""
CHANGING = f"the model's files changed before its load {MAX_OUTDATED + 1} times; load it again"
ESTIMATE_WAIT_S = 0.5
"""How long later loads wait for an estimate. It takes a millisecond, unless a disk hangs."""

FormOf = Callable[[Sequence[SizedFile], Iterable[Footprint]], str | None]
"""Finds the prepared form of these files, if there is one; may read files."""


def estimate_memory(
    files: Sequence[SizedFile],
    version: int,
    parameters: LoadParameters,
    footprints: Iterable[Footprint],
    form: str | None = None,
    *,
    threads: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of a load before it starts.

    The first load of a prepared `form` may take as much as one without. With 1 to 16 threads, peaks of four
    networks were from a fifth lower to a twentieth higher than with one. So a peak with other threads proves
    nothing, but it is nearer than file sizes: the highest one counts.

    Args:
        files: those to load.
        version: of the model.
        parameters: of the load.
        footprints: of earlier loads of the model.
        form: the prepared form that it will use, if any.
        threads: how many each of its workers computes with.
    """
    same = [seen for seen in footprints if seen.version == version and is_same_files(seen.files, files)]
    of_form = [seen for seen in same if seen.form == form] or [seen for seen in same if seen.form is None]
    known = [seen for seen in of_form if seen.threads == threads] or of_form
    one = max((seen.peak_memory_bytes for seen in known), default=_estimate_from_sizes(files))
    limit = parameters.memory_limit_bytes
    is_limited = limit is not None and limit + WORKER_BYTES <= one
    if limit is not None and is_limited:
        one = limit + WORKER_BYTES
    is_guess = not known and not is_limited
    return MemoryEstimate(one * parameters.instances, is_guess, bool(same), form, file_sizes(files))


def _estimate_from_sizes(files: Iterable[SizedFile]) -> int:
    sizes = {file.path: file.bytes for file in files}
    model, weights = find_model_file(sizes), {True: BYTES_PER_MODEL_BYTE, False: BYTES_PER_DATA_BYTE}
    return WORKER_BYTES + math.ceil(sum(size * weights[path == model] for path, size in sizes.items()))


def is_same_files(seen: Iterable[LoadedFile], files: Iterable[SizedFile]) -> bool:
    """Whether files are still those of an earlier load, by path, size and time."""
    return sorted((file.path, file.bytes, file.mtime_ns) for file in seen) == sorted(
        (file.path, file.bytes, file.mtime_ns) for file in files
    )


def file_sizes(files: Iterable[SizedFile]) -> FileSizes:
    return frozenset((file.path, file.bytes) for file in files)


class MemoryEstimates:
    """Estimates of pending loads, each made once from the load's files, for the form that it will use.

    Args:
        repository: has the files.
        wake: called when an estimate has ended.
        form_of: finds the prepared form that a load will use.
        threads: how many threads a worker computes with, unless its load says otherwise.

    Attributes:
        known: by job id; None while the files are being read, and why they cannot be.
        in_progress: jobs whose files have been read for less than `ESTIMATE_WAIT_S`.
        bare: jobs whose form failed, so that they load without one.
        outdated: how often jobs were estimated for other files than they then found.
        tasks: the estimates under way.
    """

    def __init__(
        self,
        repository: Repository,
        wake: Callable[[], None],
        form_of: FormOf = lambda _files, _footprints: None,
        *,
        threads: int = 1,
    ) -> None:
        self._repository = repository
        self._form_of = form_of
        self._wake = wake
        self._threads = threads
        self.known: dict[str, MemoryEstimate | Failure | None] = {}
        self.in_progress: set[str] = set()
        self.bare: set[str] = set()
        self.outdated = Counter[str]()
        self.tasks: set[asyncio.Task[None]] = set()

    def start_estimate(self, job: Job, model: Model | None) -> None:
        """Begin to estimate a load; `known` has the result when this wakes the consumer."""
        self.known[job.id] = None
        self.in_progress.add(job.id)
        patience = asyncio.get_running_loop().call_later(ESTIMATE_WAIT_S, self._stop_waiting, job.id)
        task = asyncio.create_task(self._estimate_job(job, model))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda _: patience.cancel())

    def find(self, job_id: str) -> MemoryEstimate | None:
        """Return the estimate of a job; None while it is not known."""
        estimate = self.known.get(job_id)
        return estimate if isinstance(estimate, MemoryEstimate) else None

    def forget_ended(self, state: State) -> None:
        kept = self.known.keys() | self.bare | self.outdated.keys()
        for job_id in [job_id for job_id in kept if state.unended_job(job_id) is None]:
            self.known.pop(job_id, None)
            self.bare.discard(job_id)
            self.outdated.pop(job_id, None)

    def restart_bare(self, job_id: str) -> None:
        self.known.pop(job_id, None)
        self.bare.add(job_id)

    def restart_outdated(self, job_id: str) -> None:
        """Have a load estimated anew that found other files; the last time it fails."""
        self.known.pop(job_id, None)
        self.outdated[job_id] += 1
        if self.outdated[job_id] > MAX_OUTDATED:
            self.known[job_id] = Failure("model_changed", CHANGING)

    def may_use_form(self, job_id: str) -> bool:
        """Whether a load may use a form: its reservation is for one, or without a budget there is none."""
        estimate = self.find(job_id)
        return job_id not in self.bare and (estimate is None or estimate.form is not None)

    def is_restarted(self, job_id: str) -> bool:
        """Whether a load was estimated anew, so that its next start is in the same attempt."""
        return job_id in self.bare or job_id in self.outdated

    async def _estimate_job(self, job: Job, model: Model | None) -> None:
        version, parameters = job.load_order
        footprints = model.footprints if model is not None else ()
        expected = find_expected(job, model)
        try:
            find_files = partial(self._find_files, job, expected, footprints)
            files, form = await self._repository.file_system.run(job.model_id, find_files, LOAD_LIMIT_S)
            threads = parameters.threads or self._threads
            found: MemoryEstimate | Failure = estimate_memory(
                files, version, parameters, footprints, form, threads=threads
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, this load alone has no estimate
            found = describe_failure(error)
        if job.id in self.known:
            self.known[job.id] = found
        self._stop_waiting(job.id)

    def _find_files(
        self, job: Job, expected: Sequence[LoadedFile] | None, footprints: Iterable[Footprint]
    ) -> tuple[Sequence[SizedFile], str | None]:
        files: Sequence[SizedFile] = expected or ()
        if not files:
            version, _ = job.load_order
            with self._repository.open_version(job.model_id, version) as (_, files):
                pass
        return files, None if job.id in self.bare else self._form_of(files, footprints)

    def _stop_waiting(self, job_id: str) -> None:
        self.in_progress.discard(job_id)
        self._wake()


def find_expected(job: Job, model: Model | None) -> tuple[LoadedFile, ...] | None:
    """Return the files that a reload by the system takes again; None for any other load."""
    serving = model.serving if model is not None else None
    if job.cause not in RELOADS or serving is None or serving.version != job.version:
        return None
    return serving.files


def describe_failure(error: Exception) -> Failure:
    if isinstance(error, RuntimeProblem):
        return Failure(error.code, str(error))
    if isinstance(error, OSError | MemoryError):
        reason = getattr(error, "strerror", None) or "there is too little memory"
        return Failure(
            RepositoryUnreadable.code, f"the model's files cannot be looked at: {reason}; load it again"
        )
    _log.error("the files of a model cannot be looked at", exc_info=error)
    return Failure("internal", "the model's files cannot be looked at; the server's log says why")
