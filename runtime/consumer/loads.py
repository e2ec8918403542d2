"""A running load, and its two tasks: load the model in workers, and unload it.

The executor starts the tasks. They store their outcome in the `RunningLoad` and wake the consumer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from events.clock import add_seconds, uuid7
from events.jobs import FORK_SERVER_DIED, Failure, Job
from events.types import LoadedFile, LoadParameters
from runtime.cache.manifest import CachedForm
from runtime.cache.preparer import FormFailure
from runtime.cache.trial import CHANGED, has_outside_cause
from runtime.consumer.loadfiles import LoadFiles
from runtime.errors import ForkServerUnavailable, LoadRefused, RuntimeProblem, WorkerDied
from runtime.estimates import FileSizes, file_sizes
from runtime.limits import MEASURE_LIMIT_S, STOP_GRACE_S, time_limit
from runtime.lookups import LOAD_LIMIT_S, RepositoryBusy
from runtime.modeldefaults import NO_WARM_UP, WarmUp, read_reload_warm_up, read_warm_up
from runtime.process.pool import WorkerPool, start_task
from runtime.process.sampling import WorkerMemory
from runtime.process.worker import Worker
from runtime.repository import FileStat, Repository
from runtime.scheduler.admission import format_megabytes
from runtime.scheduler.view import LoadView, Phase
from runtime.statistics import Statistics
from runtime.wire import Load, Loaded, Tensor

_log = logging.getLogger(__name__)


class FormUnusable(RuntimeProblem):
    """The prepared form of a load is gone."""

    code = "prepared_unusable"


FindForm = Callable[[Sequence[LoadedFile]], CachedForm | None]
"""Finds the prepared form of these files, if there is one; may read files."""

OUT_OF_MEMORY: Final = "out_of_memory"
STACK_BYTES = 8 * 2**20
"""Of a thread of ONNX Runtime, as RLIMIT_DATA counts it."""
START_ATTEMPTS = 3
"""A load survives the replacement of the fork server, but not one that cannot fork."""
START_PAUSE_S = 0.1
"""Between attempts: by then the pool knows that the fork server has ended, and waits for the next one."""
INSTANCES_AT_ONCE = len(os.sched_getaffinity(0))
"""Workers of one load that load at once after the first: each takes a core and its peak of memory."""


@dataclass(slots=True)
class RunningLoad:
    """The live side of one load job. Only the consumer and its tasks change it, on the event loop.

    Attributes:
        worker_id: the first worker's id; that worker may not have started yet.
        files: the files that its workers load.
        workers: all workers that were started, exited or not.
        report: the first worker's, once all have loaded; inputs and outputs are the same in all workers.
        reports: those of the workers that have loaded, by worker id.
        is_reload: whether the system brings back what was loaded.
        needs_form: whether its reservation is for a prepared form.
        prepared: the prepared form that its workers load.
        form_failure: why this attempt ends, and the job starts again without a form.
        warm_up_inputs: inputs of the warm-up run; none are zeros.
        draining: whether routing to it has stopped.
        unloading: whether `run_unload` has begun.
        expected_exits: ids of workers that the server stopped, or that refused to load.
        killed: whether its workers were killed.
        recorded_exits: ids of workers whose unexpected exit was recorded.
        reserved_bytes: reservation until `report` is set.
        estimated_sizes: the files that the reservation is for; None if nothing was estimated.
        file_bytes: the size of the files that it loads, with those of its form.
        allowance: tells how many bytes its workers may take until they have loaded; None is no limit.
        is_outdated: whether this attempt found other files than those, and so ends.
        last_used_ns: when the last request ended (CLOCK_MONOTONIC); 0 is never.
    """

    job_id: str
    model_id: str
    version: int
    parameters: LoadParameters
    worker_id: str
    files: LoadFiles
    wake: Callable[[], None]
    workers: list[Worker] = field(default_factory=list)
    report: Loaded | None = None
    reports: dict[str, Loaded] = field(default_factory=dict)
    is_reload: bool = False
    failure: Failure | None = None
    stage: str | None = None
    needs_form: bool = False
    prepared: CachedForm | None = None
    form_failure: FormFailure | None = None
    warm_up_inputs: tuple[Tensor, ...] = ()
    starting_us: int = 0
    draining: bool = False
    unloading: bool = False
    expected_exits: set[str] = field(default_factory=set)
    killed: bool = False
    recorded_exits: set[str] = field(default_factory=set)
    requests_at_drain: int = 0
    aborted_requests: int = 0
    freed_bytes: int = 0
    reserved_bytes: int = 0
    estimated_sizes: FileSizes | None = None
    file_bytes: int = 0
    allowance: Callable[[], int | None] = lambda: None
    is_outdated: bool = False
    last_used_ns: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def only_worker_id(self) -> str | None:
        """The worker id for facts about the whole load, if it has one instance."""
        return self.worker_id if self.parameters.instances == 1 else None

    @property
    def alive_workers(self) -> list[Worker]:
        """The workers that have not exited."""
        return [worker for worker in self.workers if not worker.ended.done()]

    @property
    def has_exited(self) -> bool:
        """Whether there were workers and all have exited."""
        return bool(self.workers) and not self.alive_workers

    @property
    def serving(self) -> tuple[Worker, ...]:
        """The workers that take inferences: loaded, alive, and not being ended."""
        if self.report is None or self.draining:
            return ()
        return tuple(worker for worker in self.workers if not worker.dying)

    @property
    def unexpected_exits(self) -> list[Worker]:
        """The workers that have exited unexpectedly."""
        ended = (worker for worker in self.workers if worker.ended.done())
        return [worker for worker in ended if worker.worker_id not in self.expected_exits]

    @property
    def is_finished(self) -> bool:
        """Whether neither a worker nor a task is left."""
        return not self.tasks and not self.alive_workers

    @property
    def drained_requests(self) -> int:
        """Requests that were running when the drain began, and were answered."""
        return max(0, self.requests_at_drain - self.aborted_requests)

    @property
    def finished_report(self) -> Loaded:
        """The first worker's report, of a load whose workers have all loaded.

        Raises:
            RuntimeError: they have not.
        """
        if self.report is None:
            raise RuntimeError(f"load {self.job_id} has no report yet")
        return self.report

    @property
    def failure_reason(self) -> Failure:
        """Why the load failed."""
        if self.failure is not None:
            return self.failure
        code = FORK_SERVER_DIED if any(worker.orphaned for worker in self.unexpected_exits) else "worker_died"
        return Failure(code, "the worker died right after it had loaded the model")

    @property
    def measured_bytes(self) -> int:
        """Private bytes of its workers at the last measurement, or sample of those that load."""
        return sum(worker.memory_bytes for worker in self.alive_workers)

    @property
    def memory_bytes(self) -> int:
        """Bytes that count against the budget, until the workers have exited."""
        if self.report is None:
            is_over = self.has_exited or (self.failure is not None and not self.alive_workers)
            return 0 if is_over else max(self.reserved_bytes, self.measured_bytes)
        return self.measured_bytes

    @property
    def loaded_memory(self) -> list[WorkerMemory]:
        """The memory of its workers right after each had loaded."""
        return [worker.loaded_memory for worker in self.workers if worker.loaded_memory is not None]

    @property
    def in_flight(self) -> int:
        """How many inferences are queued or running."""
        return sum(worker.in_flight for worker in self.alive_workers)

    def last_used_at(self, now: str) -> str | None:
        """Return the timestamp at which the last inference ended; None without one."""
        if not self.last_used_ns:
            return None
        return add_seconds(now, (self.last_used_ns - time.monotonic_ns()) / 1e9)

    def to_view(self, job: Job | None, now: str = "", *, is_demanded: bool = False) -> LoadView:
        """Return what the scheduler sees; `job` is the load's job until it has ended."""
        return LoadView(
            self.job_id,
            self.model_id,
            self._phase(job),
            self.killed,
            tuple(worker.worker_id for worker in self.unexpected_exits),
            self.memory_bytes,
            busy=is_demanded or self.in_flight > 0,
            last_used_at=self.last_used_at(now),
        )

    def _phase(self, job: Job | None) -> Phase:
        if job is not None:
            if self.form_failure is not None and self.failure is None:
                return Phase.FORM_FAILED if self.is_finished else Phase.LOADING
            if self.is_outdated and self.is_finished:
                return Phase.OUTDATED
            if self.failure is not None or self._lost_a_worker:
                return Phase.FAILED
            return Phase.LOADING if self.report is None else Phase.LOADED
        if self.has_exited:
            return Phase.GONE
        return Phase.DRAINING if self.unloading or self.killed else Phase.SERVING

    @property
    def _lost_a_worker(self) -> bool:
        """Whether a worker has exited that had loaded, or whose task has ended; until then it stores why."""
        ended = (worker.worker_id for worker in self.workers if worker.ended.done())
        return any(worker_id in self.reports or not self.tasks for worker_id in ended)

    def track(self, effect: asyncio.Task[None]) -> None:
        """Keep a task until it ends, then wake the consumer."""
        self.tasks.add(effect)
        effect.add_done_callback(self._on_task_end)

    def _on_task_end(self, effect: asyncio.Task[None]) -> None:
        self.tasks.discard(effect)
        if not effect.cancelled() and effect.exception() is not None:
            _log.error("an effect on %s failed", self.model_id, exc_info=effect.exception())
            reason = "the load failed within the server; see its log"
            self.failure = self.failure or Failure("internal", reason)
            self.kill()
        self.wake()

    def fail(self, code: str, message: str) -> None:
        """End the workers of a load that has not been recorded as loaded; the first reason counts."""
        self.failure = self.failure or Failure(code, message)
        self.kill_workers()
        self.wake()

    def kill(self) -> None:
        """Kill all workers now, however stuck they are, and count what that aborts."""
        self.killed = True
        if self.report is None:  # more would be started; and who waits for one may meet a stuck fork server
            self.files.cancel()
            for effect in self.tasks:
                effect.cancel()
        self.kill_workers()

    def kill_workers(self) -> None:
        """Kill the workers that have not exited."""
        for worker in self.alive_workers:
            self.expect_exit(worker)
            worker.kill()

    def check_estimate(self, files: Sequence[FileStat]) -> None:
        """Note the files to load, and check, before a worker is started, that the reservation is for them.

        Raises:
            LoadRefused: `model_changed`, they are others, and this attempt is outdated.
        """
        self.file_bytes = sum(file.bytes for file in files)
        if self.estimated_sizes not in (None, file_sizes(files)):
            self.is_outdated = True
            reason = "the model's files are no longer those that its memory was estimated for; load it again"
            raise LoadRefused("model_changed", reason)

    def worker_limit_bytes(self, threads: int) -> int | None:
        """Return the limit of the next worker until it has loaded; None without a budget.

        RLIMIT_DATA also counts ONNX Runtime's private mappings of files, and the stacks of threads.
        """
        allowance = self.allowance()
        if allowance is None:
            return None
        instances = self.parameters.instances
        others = (instances - 1) * (self.reserved_bytes // instances)
        form_bytes = self.prepared.copy.bytes if self.prepared is not None else 0
        return allowance - others + self.file_bytes + form_bytes + (threads + 1) * STACK_BYTES

    def check_allowance(self, worker: Worker) -> None:
        """End this attempt if its loading workers have taken more memory than they may."""
        allowance, taken = self.allowance(), self.measured_bytes
        if self.report is None and allowance is not None and taken > allowance:
            took = f"the load took {format_megabytes(taken)} of memory"
            _store_failure(self, LoadRefused(OUT_OF_MEMORY, f"{took}; {self.describe_allowance()}"), worker)
            self.kill_workers()

    def describe_allowance(self) -> str:
        """Return how much memory the load may take, for the message of one that took more."""
        may_take = format_megabytes(self.allowance() or 0)
        reserved = format_megabytes(self.reserved_bytes)
        return f"it may take {may_take}: what it reserved, {reserved}, and what is free of the memory budget"

    def expect_exit(self, worker: Worker) -> None:
        """Note, right before a worker's end, what it aborts and how many bytes it releases."""
        if worker.worker_id not in self.expected_exits:
            self.expected_exits.add(worker.worker_id)
            self.aborted_requests += worker.in_flight
            self.freed_bytes += worker.memory_bytes if worker.loaded_memory is not None else 0


async def run_load(load: RunningLoad, pool: WorkerPool, ordered: Awaitable[Load]) -> None:
    """Load the model in each instance's worker; the outcome is `report`, `form_failure` or `failure`.

    The first worker loads while its files are hashed; the others load what was settled then. A failure of one
    worker ends this attempt. `ordered` is the result of `build_order`.
    """
    try:
        order = await ordered
        load.stage = "starting"
        hashing = start_task(load.files.hash(), "hashing a model")
        first = await _load_instance(load, pool, order, load.worker_id, time.monotonic_ns())
        await hashing
        settled = await load.files.settle()
        await _load_rest(load, pool, replace(order, root=str(settled.root), folder=str(settled.folder)))
        load.report = first
    except RuntimeProblem as problem:
        _store_failure(load, problem)
        load.files.cancel()
        load.kill_workers()


def _store_failure(load: RunningLoad, problem: RuntimeProblem, worker: Worker | None = None) -> None:
    """Store why this attempt ends, and with which worker; the first reason counts."""
    if load.failure is not None or load.form_failure is not None:
        return
    is_orphaned = worker is not None and worker.orphaned
    if not (is_orphaned or load.killed):
        load.form_failure = _blame_form(load.prepared, problem)
    if load.form_failure is not None:
        return
    if worker is not None and isinstance(problem, WorkerDied):
        load.failure = _describe_death(worker, problem, load.stage)
    else:
        load.failure = Failure(problem.code, str(problem))


def _blame_form(prepared: CachedForm | None, problem: RuntimeProblem) -> FormFailure | None:
    """Return what a problem says about the form; None if a load without it would not help.

    Whether it is a problem of the model, a bare load shows.
    """
    match problem:
        case FormUnusable():
            return FormFailure(str(problem), has_outside_cause=True)
        case WorkerDied() if prepared is not None:
            return FormFailure(f"{problem} while it loaded that", has_outside_cause(problem))
        case LoadRefused(code=code) if prepared is not None and code not in CHANGED:
            # A form's session can take more memory than a bare one.
            return FormFailure(str(problem), code == OUT_OF_MEMORY)
    return None


async def build_order(
    load: RunningLoad,
    pool: WorkerPool,
    repository: Repository,
    find_form: FindForm | None,
    expected: Sequence[LoadedFile] | None,
) -> Load:
    """Obtain the version's files and build the message that loads them; for `expected` see `LoadFiles`.

    Raises:
        FormUnusable: there is no form, and the load's reservation is for one.
        RuntimeProblem: the version is missing, invalid, or cannot be copied; the code says which.
    """
    load.stage = "copying"
    files = await load.files.obtain(expected)
    if load.needs_form:  # which is found by the hashes
        await load.files.hash()

    def look_up() -> tuple[WarmUp, CachedForm | None]:
        form = None
        if find_form is not None and files.sha256s is not None:
            form = find_form(files.loaded_files)
        read = read_reload_warm_up if load.is_reload else read_warm_up
        return read(repository, load.model_id), form

    try:
        warm_up, load.prepared = await repository.lookups.run(load.model_id, look_up, LOAD_LIMIT_S)
    except RepositoryBusy:
        if not load.is_reload:
            raise
        warm_up = NO_WARM_UP  # the store has all that a reload needs
    load.check_estimate(files.files)
    if load.needs_form and load.prepared is None:
        raise FormUnusable("it is gone")
    load.warm_up_inputs = warm_up.inputs
    form = load.prepared.copy if load.prepared is not None else None
    return replace(pool.build_load(files, load.parameters, warm_up), prepared=form)


async def _load_rest(load: RunningLoad, pool: WorkerPool, order: Load) -> None:
    """Load the other instances, some at once; the first failure cancels the rest."""
    places = asyncio.Semaphore(INSTANCES_AT_ONCE)

    async def load_one() -> None:
        async with places:
            await _load_instance(load, pool, order, uuid7(), time.monotonic_ns())

    others = [asyncio.create_task(load_one()) for _ in range(load.parameters.instances - 1)]
    try:
        await asyncio.gather(*others)
    finally:
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _load_instance(
    load: RunningLoad, pool: WorkerPool, order: Load, worker_id: str, began_ns: int
) -> Loaded:
    """Start a worker and load the model in it."""
    worker = await _start_worker(pool, worker_id)
    load.workers.append(worker)
    load.starting_us = max(load.starting_us, (time.monotonic_ns() - began_ns) // 1000)
    worker.ended.add_done_callback(lambda _: load.wake())
    try:
        limited = replace(order, load_limit_bytes=load.worker_limit_bytes(order.threads))
        report = await worker.load(
            limited,
            lambda stage: setattr(load, "stage", stage),
            load.warm_up_inputs,
            on_sample=lambda: load.check_allowance(worker),
        )
    except RuntimeProblem as problem:
        if not isinstance(problem, WorkerDied):
            load.expected_exits.add(worker_id)
        if problem.code == OUT_OF_MEMORY and load.allowance() is not None:
            problem = LoadRefused(OUT_OF_MEMORY, f"{problem}; {load.describe_allowance()}")
        _store_failure(load, problem, worker)
        raise
    load.reports[worker_id] = report
    return report


async def _start_worker(pool: WorkerPool, worker_id: str) -> Worker:
    for _ in range(START_ATTEMPTS - 1):
        with suppress(ForkServerUnavailable):
            return await pool.start(worker_id)
        await asyncio.sleep(START_PAUSE_S)
    return await pool.start(worker_id)


def _describe_death(worker: Worker, death: WorkerDied, stage: str | None) -> Failure:
    """Return the failure of a load whose worker died, with the worker's last lines."""
    lines = "\n".join(worker.stderr_tail())
    said = f"; it said:\n{lines}" if lines else ""
    code = FORK_SERVER_DIED if worker.orphaned else death.code
    at = "warmed the model up" if stage == "warming_up" else "loaded the model"
    return Failure(code, f"{death} while it {at}{said}")


async def run_unload(load: RunningLoad, drain_timeout_s: float) -> None:
    """Drain running inferences up to the drain timeout, then stop the workers."""
    workers = load.alive_workers
    load.requests_at_drain = sum(worker.in_flight for worker in workers)
    with suppress(TimeoutError):
        async with time_limit(drain_timeout_s):
            await asyncio.gather(*(worker.wait_until_drained() for worker in workers))
    if load.alive_workers:
        load.stage = "stopping"
        await asyncio.gather(*(_stop(load, worker) for worker in load.alive_workers))


async def _stop(load: RunningLoad, worker: Worker) -> None:
    """Measure how many bytes a worker releases, and stop it."""
    try:
        async with time_limit(MEASURE_LIMIT_S):
            await worker.measure()
    except WorkerDied:
        return
    except OSError:  # no time left, or no descriptor to read with: as much as at its last measurement
        pass
    load.expect_exit(worker)
    await worker.stop(STOP_GRACE_S)
