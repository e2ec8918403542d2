"""A running load: its workers, progress and memory, why it failed, and the tasks that load and unload it.

The executor starts the tasks. They store their outcome in the `RunningLoad` and wake the consumer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from msgspec.structs import replace

from events.clock import add_seconds, uuid7
from events.jobs import FORK_SERVER_DIED, Failure, Job
from events.types import LoadedFile, LoadParameters
from runtime.cache.manifest import CachedForm
from runtime.cache.preparer import FormFailure
from runtime.cache.trial import CHANGED, has_outside_cause
from runtime.cgroups import count_usable_cpus
from runtime.consumer.loadfiles import LoadFiles
from runtime.errors import ForkServerUnavailable, LoadRefused, NoProgress, RuntimeProblem, WorkerDied
from runtime.estimates import file_sizes
from runtime.filesystem import LOAD_LIMIT_S, RepositoryBusy
from runtime.memory import thread_bytes
from runtime.modeldefaults import NO_WARM_UP, WarmUp, read_reload_warm_up, read_warm_up
from runtime.process.pool import WorkerPool, start_task
from runtime.process.sampling import WorkerMemory
from runtime.process.worker import Worker
from runtime.repository import Repository, SizedFile
from runtime.scheduler.admission import format_megabytes
from runtime.scheduler.view import LoadView, MemoryEstimate, Phase
from runtime.statistics import Statistics
from runtime.timeouts import MEASURE_LIMIT_S, PROGRESS_TIMEOUT_S, STOP_GRACE_S, TimeoutExpired, timeout
from runtime.wire import Load, Loaded, Tensor

_log = logging.getLogger(__name__)


class FormUnusable(RuntimeProblem):
    """The prepared form of a load is gone."""

    code = "prepared_unusable"


OUT_OF_MEMORY: Final = "out_of_memory"
FindForm = Callable[[Sequence[LoadedFile]], CachedForm | None]
"""Finds the prepared form of these files, if there is one; may read files."""

START_ATTEMPTS = 3
"""A load survives the replacement of the fork server, but not one that cannot fork."""
START_PAUSE_S = 0.1
"""Between attempts: by then the pool knows that the fork server has ended, and waits for the next one."""


class LoadRun(NamedTuple):
    """A snapshot of a load's workers and tasks, and its phase and memory, which follow from that.

    Attributes:
        started: ids of the workers that were started, exited or not.
        exited: those of them that have exited.
        expected_exits: ids of workers that the server stopped, or that refused to load.
        loaded: ids of the workers that have loaded.
        is_loaded: whether all have.
        has_tasks: whether a task loads or unloads it.
        is_form_failed: whether this attempt ends because of its prepared form.
        is_outdated: whether it ends because the files have changed.
        measured_bytes: private bytes of the workers that have not exited.
    """

    started: Sequence[str]
    exited: Collection[str]
    expected_exits: Collection[str] = ()
    loaded: Collection[str] = ()
    is_loaded: bool = False
    has_tasks: bool = False
    has_failed: bool = False
    is_form_failed: bool = False
    is_outdated: bool = False
    unloading: bool = False
    killed: bool = False
    reserved_bytes: int = 0
    measured_bytes: int = 0

    @property
    def alive(self) -> list[str]:
        return [worker_id for worker_id in self.started if worker_id not in self.exited]

    @property
    def has_exited(self) -> bool:
        return bool(self.started) and not self.alive

    @property
    def unexpected_exits(self) -> tuple[str, ...]:
        exited = (worker_id for worker_id in self.started if worker_id in self.exited)
        return tuple(worker_id for worker_id in exited if worker_id not in self.expected_exits)

    @property
    def is_finished(self) -> bool:
        """Whether neither a worker nor a task is left."""
        return not self.has_tasks and not self.alive

    @property
    def memory_bytes(self) -> int:
        """Bytes that count against the budget, until the workers have exited."""
        if self.is_loaded:
            return self.measured_bytes
        is_over = self.has_exited or (self.has_failed and not self.alive)
        return 0 if is_over else max(self.reserved_bytes, self.measured_bytes)

    def find_phase(self, *, is_job_unended: bool) -> Phase:
        """Return how far the load is, whose job has ended or not."""
        if is_job_unended:
            if self.is_form_failed and not self.has_failed:
                return Phase.FORM_FAILED if self.is_finished else Phase.LOADING
            if self.is_outdated and self.is_finished:
                return Phase.OUTDATED
            if self.has_failed or self._lost_a_worker:
                return Phase.FAILED
            return Phase.LOADED if self.is_loaded else Phase.LOADING
        if self.has_exited:
            return Phase.GONE
        return Phase.DRAINING if self.unloading or self.killed else Phase.SERVING

    @property
    def _lost_a_worker(self) -> bool:
        """Whether a worker has exited that had loaded, or whose task has ended; until then it stores why."""
        exited = (worker_id for worker_id in self.started if worker_id in self.exited)
        return any(worker_id in self.loaded or not self.has_tasks for worker_id in exited)


@dataclass(slots=True)
class RunningLoad:
    """The live side of one load job. Only the consumer and its tasks change it, on the event loop.

    Attributes:
        worker_id: the first worker's id; that worker may not have started yet.
        progress_timeout_s: how long its loading may make no progress.
        files: the files that its workers load.
        workers: all workers that were started, exited or not.
        report: the first worker's, once all have loaded; inputs and outputs are the same in all workers.
        reports: those of the workers that have loaded, by worker id.
        stage: the latest stage that it has reached.
        steps: the stages that it and each of its workers have reached.
        is_reload: whether the system brings back what was loaded.
        prepared: the prepared form that its workers load.
        form_failure: why this attempt ends, and the job starts again without a form.
        warm_up_inputs: inputs of the warm-up run; none are zeros.
        draining: whether routing to it has stopped.
        unloading: whether `run_unload` has begun.
        expected_exits: ids of workers that the server stopped, or that refused to load.
        killed: whether its workers were killed.
        recorded_exits: ids of workers whose unexpected exit was recorded.
        estimate: what it reserves until `report` is set; None without a budget.
        file_bytes: the size of the files that it loads, with those of its form.
        allowance: tells how many bytes its workers may take until they have loaded; None is no limit.
        budget_bytes: the memory budget; None is no limit.
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
    progress_timeout_s: float = PROGRESS_TIMEOUT_S
    report: Loaded | None = None
    reports: dict[str, Loaded] = field(default_factory=dict)
    is_reload: bool = False
    failure: Failure | None = None
    stage: str | None = None
    steps: set[tuple[str, str]] = field(default_factory=set)
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
    estimate: MemoryEstimate | None = None
    file_bytes: int = 0
    allowance: Callable[[], int | None] = lambda: None
    budget_bytes: int | None = None
    is_outdated: bool = False
    last_used_ns: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def only_worker_id(self) -> str | None:
        """The worker id for facts about the whole load, if it has one instance."""
        return self.worker_id if self.parameters.instances == 1 else None

    @property
    def reserved_bytes(self) -> int:
        return 0 if self.estimate is None else self.estimate.bytes

    @property
    def needs_form(self) -> bool:
        """Whether its reservation is for a prepared form."""
        return self.estimate is not None and self.estimate.form is not None

    @property
    def alive_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.ended.done()]

    @property
    def run(self) -> LoadRun:
        return LoadRun(
            started=[worker.worker_id for worker in self.workers],
            exited={worker.worker_id for worker in self.workers if worker.ended.done()},
            expected_exits=self.expected_exits,
            loaded=self.reports.keys(),
            is_loaded=self.report is not None,
            has_tasks=bool(self.tasks),
            has_failed=self.failure is not None,
            is_form_failed=self.form_failure is not None,
            is_outdated=self.is_outdated,
            unloading=self.unloading,
            killed=self.killed,
            reserved_bytes=self.reserved_bytes,
            measured_bytes=self.measured_bytes,
        )

    @property
    def serving(self) -> tuple[Worker, ...]:
        """The workers that take inferences: loaded, alive, and not being ended."""
        if self.report is None or self.draining:
            return ()
        return tuple([worker for worker in self.workers if not worker.dying])

    @property
    def memory_bytes(self) -> int:
        """As `LoadRun.memory_bytes`; quickly once it is loaded, since samples of loading workers sum all."""
        return self.run.memory_bytes if self.report is None else self.measured_bytes

    @property
    def unexpected_exits(self) -> list[Worker]:
        if len(self.alive_workers) == len(self.workers):
            return []
        exited = self.run.unexpected_exits
        return [worker for worker in self.workers if worker.worker_id in exited]

    @property
    def drained_requests(self) -> int:
        """Requests that were running when the drain began, and were answered."""
        return max(0, self.requests_at_drain - self.aborted_requests)

    @property
    def progress(self) -> tuple[int, int, int]:
        """Counters that grow with progress; the time and memory that a worker takes are none."""
        return len(self.workers), len(self.steps), self.files.pieces

    @property
    def failure_reason(self) -> Failure:
        if self.failure is not None:
            return self.failure
        code = FORK_SERVER_DIED if any(worker.orphaned for worker in self.unexpected_exits) else "worker_died"
        return Failure(code, "the worker died right after it had loaded the model")

    @property
    def measured_bytes(self) -> int:
        """Private bytes of its workers at the last measurement, or sample of those that load."""
        return sum(worker.memory_bytes for worker in self.alive_workers)

    @property
    def loaded_memory(self) -> list[WorkerMemory]:
        """The memory of its workers right after each had loaded."""
        return [worker.loaded_memory for worker in self.workers if worker.loaded_memory is not None]

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self.alive_workers)

    @property
    def is_computing(self) -> bool:
        """Whether it is being loaded or unloaded, or an inference is queued or running."""
        return bool(self.tasks) or self.in_flight > 0

    def last_used_at(self, now: str) -> str | None:
        """Return the timestamp at which the last inference ended; None without one."""
        if not self.last_used_ns:
            return None
        return add_seconds(now, (self.last_used_ns - time.monotonic_ns()) / 1e9)

    def to_view(self, job: Job | None, now: str = "", *, is_demanded: bool = False) -> LoadView:
        """Return what the scheduler sees; `job` is the load's job until it has ended."""
        run = self.run
        return LoadView(
            self.job_id,
            self.model_id,
            run.find_phase(is_job_unended=job is not None),
            self.killed,
            run.unexpected_exits,
            run.memory_bytes,
            busy=is_demanded or self.in_flight > 0,
            last_used_at=self.last_used_at(now),
        )

    def reach_stage(self, stage: str, worker_id: str = "") -> None:
        """Note a stage of the load, or of one of its workers; it is progress once for each."""
        self.stage = stage
        self.steps.add((worker_id, stage))

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

    def store_failure(self, problem: RuntimeProblem, worker: Worker | None = None) -> None:
        """Store why this attempt ends, and with which worker; the first reason counts."""
        if self.failure is not None or self.form_failure is not None:
            return
        is_orphaned = worker is not None and worker.orphaned
        if not (is_orphaned or self.killed):
            self.form_failure = _blame_form(self.prepared, problem)
        if self.form_failure is not None:
            return
        if worker is not None and isinstance(problem, WorkerDied):
            self.failure = _describe_death(worker, problem, self.stage)
        else:
            self.failure = Failure(problem.code, str(problem))

    def kill(self) -> None:
        """Kill all workers now, however stuck they are, and count what that aborts."""
        self.killed = True
        if self.report is None:  # more would be started; and who waits for one may meet a stuck fork server
            self.files.cancel()
            for effect in self.tasks:
                effect.cancel()
        self.kill_workers()

    def kill_workers(self) -> None:
        for worker in self.alive_workers:
            self.expect_exit(worker)
            worker.kill()

    def check_estimate(self, files: Sequence[SizedFile]) -> None:
        """Note the files to load, and check, before a worker is started, that the reservation is for them.

        Raises:
            LoadRefused: `model_changed`, they are others, and this attempt is outdated.
        """
        self.file_bytes = sum(file.bytes for file in files)
        if self.estimate is not None and self.estimate.files != file_sizes(files):
            self.is_outdated = True
            reason = "the model's files are no longer those that its memory was estimated for; load it again"
            raise LoadRefused("model_changed", reason)

    def limit_memory(self, order: Load) -> Load:
        """Return an order with memory limits; RLIMIT_DATA also counts mappings of files, and stacks."""
        allowance, instances = self.allowance(), self.parameters.instances
        if allowance is None or self.budget_bytes is None:
            return order
        form_bytes = self.prepared.copy.bytes if self.prepared is not None else 0
        mapped = self.file_bytes + form_bytes + (order.threads + 1) * thread_bytes()
        others = (instances - 1) * (self.reserved_bytes // instances)
        limit = allowance - others + mapped
        return replace(order, load_limit_bytes=limit, ceiling_bytes=self.budget_bytes + mapped)

    def check_allowance(self, worker: Worker) -> None:
        """End this attempt if its loading workers have taken more memory than they may."""
        allowance, taken = self.allowance(), self.measured_bytes
        if self.report is None and allowance is not None and taken > allowance:
            took = f"the load took {format_megabytes(taken)} of memory"
            self.store_failure(LoadRefused(OUT_OF_MEMORY, f"{took}; {self.describe_allowance()}"), worker)
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


def _blame_form(prepared: CachedForm | None, problem: RuntimeProblem) -> FormFailure | None:
    """Return what a problem says about the form; None if a load without it would not help.

    Whether it is a problem of the model, a bare load shows.
    """
    match problem:
        case FormUnusable():
            return FormFailure(str(problem), has_outside_cause=True)
        case NoProgress() if prepared is not None:
            return FormFailure(str(problem), has_outside_cause=True)
        case WorkerDied() if prepared is not None:
            return FormFailure(f"{problem} while it loaded that", has_outside_cause(problem))
        case LoadRefused(code=code) if prepared is not None and code not in CHANGED:
            # A form's session can take more memory than a bare one.
            return FormFailure(str(problem), code == OUT_OF_MEMORY)
    return None


def _describe_death(worker: Worker, death: WorkerDied, stage: str | None) -> Failure:
    """Return the failure of a load whose worker died, with the worker's last lines if they are recorded."""
    lines = "\n".join(worker.recorded_tail())
    said = f"; it said:\n{lines}" if lines else ""
    code = FORK_SERVER_DIED if worker.orphaned else death.code
    at = "warmed the model up" if stage == "warming_up" else "loaded the model"
    return Failure(code, f"{death} while it {at}{said}")


async def run_load(load: RunningLoad, pool: WorkerPool, ordered: Awaitable[Load]) -> None:
    """Load the model in each instance's worker; the outcome is `report`, `form_failure` or `failure`.

    A failure of one worker ends this attempt, and so does the `progress_timeout_s`. `ordered` is the result
    of `build_order`.
    """
    try:
        load.report = await _load_in_time(load, pool, ordered)
    except RuntimeProblem as problem:
        load.store_failure(problem)
        load.files.cancel()
        load.kill_workers()


async def _load_in_time(load: RunningLoad, pool: WorkerPool, ordered: Awaitable[Load]) -> Loaded:
    """Return the first worker's report when all have loaded.

    Raises:
        NoProgress: `no_progress`.
        RuntimeProblem: one of them failed; the code says why.
    """
    try:
        async with timeout(load.progress_timeout_s, lambda: load.progress):
            return await _load_instances(load, pool, await ordered)
    except TimeoutExpired:
        raise NoProgress(
            f"the load made no progress for {load.progress_timeout_s:g} s: all that time its stage was"
            f" {load.stage!r}. If the model needs longer, as a very large one may, load it with a greater"
            " progress_timeout_s"
        ) from None


async def _load_instances(load: RunningLoad, pool: WorkerPool, order: Load) -> Loaded:
    """Load in the first worker while its files are hashed; the others load what was settled then."""
    load.reach_stage("starting")
    hashing = start_task(load.files.hash(), "hashing a model")
    first = await _load_instance(load, pool, order, load.worker_id, time.monotonic_ns())
    await hashing
    settled = await load.files.settle()
    await _load_rest(load, pool, replace(order, root=str(settled.root), folder=str(settled.folder)))
    return first


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
    load.reach_stage("copying")
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
        warm_up, load.prepared = await repository.file_system.run(load.model_id, look_up, LOAD_LIMIT_S)
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
    """Load the other instances, some at once; the first failure cancels the rest.

    Each takes a CPU and its peak of memory while it loads.
    """
    places = asyncio.Semaphore(count_usable_cpus())

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
    worker = await _start_worker(pool, worker_id)
    load.workers.append(worker)
    load.starting_us = max(load.starting_us, (time.monotonic_ns() - began_ns) // 1000)
    worker.ended.add_done_callback(lambda _: load.wake())
    try:
        report = await worker.load(
            load.limit_memory(order),
            lambda stage: load.reach_stage(stage, worker_id),
            load.warm_up_inputs,
            on_sample=lambda: load.check_allowance(worker),
        )
    except RuntimeProblem as problem:
        if not isinstance(problem, WorkerDied):
            load.expected_exits.add(worker_id)
        if problem.code == OUT_OF_MEMORY and load.allowance() is not None:
            problem = LoadRefused(OUT_OF_MEMORY, f"{problem}; {load.describe_allowance()}")
        load.store_failure(problem, worker)
        raise
    load.reports[worker_id] = report
    return report


async def _start_worker(pool: WorkerPool, worker_id: str) -> Worker:
    for _ in range(START_ATTEMPTS - 1):
        with suppress(ForkServerUnavailable):
            return await pool.start(worker_id)
        await asyncio.sleep(START_PAUSE_S)
    return await pool.start(worker_id)


async def run_unload(load: RunningLoad, drain_timeout_s: float) -> None:
    """Drain running inferences up to the drain timeout, then stop the workers."""
    workers = load.alive_workers
    load.requests_at_drain = sum(worker.in_flight for worker in workers)
    with suppress(TimeoutError):
        async with timeout(drain_timeout_s):
            await asyncio.gather(*(worker.wait_until_drained() for worker in workers))
    if load.alive_workers:
        load.stage = "stopping"
        await asyncio.gather(*(_stop(load, worker) for worker in load.alive_workers))


async def _stop(load: RunningLoad, worker: Worker) -> None:
    """Measure how many bytes a worker releases, and stop it."""
    try:
        async with timeout(MEASURE_LIMIT_S):
            await worker.measure()
    except WorkerDied:
        return
    except OSError:  # no time left, or no descriptor to read with: as much as at its last measurement
        pass
    load.expect_exit(worker)
    await worker.stop(STOP_GRACE_S)
