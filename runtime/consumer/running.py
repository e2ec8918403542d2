"""A load as it waits and runs: its estimate, workers, progress and memory, and why its attempt ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field

from msgspec.structs import replace

from events.clock import add_seconds
from events.jobs import FORK_SERVER_DIED, Failure, Job
from events.types import LoadedFile, LoadParameters
from features.beforeload import CheckedLoad
from runtime.errors import OUT_OF_MEMORY, LoadRefused, RuntimeProblem, WorkerDied
from runtime.memory import format_megabytes, thread_bytes
from runtime.process.worker import Worker, WorkerMemory
from runtime.repository import SizedFile
from runtime.rooms import Allocation
from runtime.scheduler.estimates import file_sizes
from runtime.scheduler.view import LoadView, MemoryEstimate, Phase
from runtime.statistics import Statistics
from runtime.timeouts import PROGRESS_TIMEOUT_S
from runtime.wire import Load, Loaded

_log = logging.getLogger(__name__)


class LoadEnded(Exception):
    """This attempt of a load has ended: the load failed, or was granted for other files."""


@dataclass(slots=True, eq=False)
class RunningLoad:
    """The live side of a load, until its workers have exited; `LoadView` is what the scheduler sees of it.

    Only the consumer and the load's tasks change it, on the event loop.

    Attributes:
        is_reload: whether it brings back bytes that were loaded before.
        progress_timeout_s: how long its loading may make no progress.
        task: its coroutine.
        estimate: None while its files are being read; a `Failure` if they cannot be.
        is_new: whether they have been read for less than `loads.ESTIMATE_WAIT_S`.
        outdated: how often it was estimated for other files than it then found.
        files: its required files, once they were checked; None without rules.
        checked: the result of the checks.
        granted: set by the consumer when `LoadStarted` is recorded.
        granted_ns: when that was (CLOCK_MONOTONIC).
        load_s: the seconds from then until all workers had loaded.
        worker_id: the first worker's id, since it was granted; that worker may not have started yet.
        reserved_bytes: its reservation of the machine's memory, until `report` is set.
        budget_bytes: the memory budget; None is no limit.
        allowance: returns how many bytes its workers may take until they have loaded; None is no limit.
        on_change: called when its loading or one of its workers has ended, and others may take more.
        allocation: its parts of rooms.
        workers: all workers that were started, exited or not.
        report: the first worker's, once all have loaded; inputs and outputs are the same in all workers.
        reports: those of the workers that have loaded, by worker id.
        stage: the latest stage that it has reached.
        steps: the stages that it and each of its workers have reached.
        pieces: how many pieces of files were copied or hashed.
        failure: why the load fails.
        has_other_files: than it was granted for, so that this attempt ends, and it is estimated anew.
        draining: whether routing to it has stopped.
        unload: the job that ends it, or the last of several.
        unloading: whether `run_unload` has begun.
        expected_exits: ids of workers that the server stopped, or that refused to load.
        killed: whether its workers were killed.
        recorded_exits: ids of workers whose unexpected exit was recorded.
        last_used_ns: when the last request ended (CLOCK_MONOTONIC); 0 is never.
        rated_requests: answered requests that the model's rate has.
    """

    job_id: str
    model_id: str
    version: int
    parameters: LoadParameters
    wake: Callable[[], None]
    is_reload: bool = False
    progress_timeout_s: float = PROGRESS_TIMEOUT_S
    task: asyncio.Task[None] = field(init=False)
    estimate: MemoryEstimate | Failure | None = None
    is_new: bool = True
    outdated: int = 0
    files: tuple[LoadedFile, ...] | None = None
    checked: CheckedLoad | None = None
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    granted_ns: int = 0
    load_s: float = 0.0
    worker_id: str = ""
    reserved_bytes: int = 0
    budget_bytes: int | None = None
    allowance: Callable[[], int | None] = lambda: None
    on_change: Callable[[RunningLoad], None] = lambda _: None
    allocation: Allocation = field(default_factory=Allocation)
    workers: list[Worker] = field(default_factory=list)
    report: Loaded | None = None
    reports: dict[str, Loaded] = field(default_factory=dict)
    failure: Failure | None = None
    has_other_files: bool = False
    stage: str | None = None
    steps: set[tuple[str, str]] = field(default_factory=set)
    pieces: int = 0
    starting_us: int = 0
    draining: bool = False
    unload: Job | None = None
    unloading: bool = False
    expected_exits: set[str] = field(default_factory=set)
    killed: bool = False
    recorded_exits: set[str] = field(default_factory=set)
    requests_at_drain: int = 0
    aborted_requests: int = 0
    freed_bytes: int = 0
    last_used_ns: int = 0
    rated_requests: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def known_bytes(self) -> int | None:
        return self.estimate.bytes if isinstance(self.estimate, MemoryEstimate) else None

    @property
    def only_worker_id(self) -> str | None:
        """The worker id for facts about the whole load, if it has one instance."""
        return self.worker_id if self.parameters.instances == 1 else None

    @property
    def alive_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.ended.done()]

    @property
    def has_exited(self) -> bool:
        return bool(self.workers) and not self.alive_workers

    @property
    def is_gone(self) -> bool:
        """Whether its workers have exited, and their memory is back."""
        return self.has_exited and not self.allocation.is_held

    @property
    def is_finished(self) -> bool:
        """Whether neither a worker nor a task is left, nor anything that workers took."""
        return not self.tasks and (self.is_gone or not self.workers)

    @property
    def serving(self) -> tuple[Worker, ...]:
        """The workers that take inferences: loaded, alive, and not being ended."""
        if self.report is None or self.draining:
            return ()
        return tuple([worker for worker in self.workers if not worker.dying])

    @property
    def memory_bytes(self) -> int:
        """Bytes that count against the budget, until its workers have exited."""
        if self.report is not None:
            return self.measured_bytes
        is_over = self.has_exited or (self.killed and self.is_finished)
        return 0 if is_over else max(self.reserved_bytes, self.measured_bytes)

    @property
    def unexpected_exits(self) -> list[Worker]:
        exited = (worker for worker in self.workers if worker.ended.done())
        return [worker for worker in exited if worker.worker_id not in self.expected_exits]

    @property
    def drained_requests(self) -> int:
        """Requests that were running when the drain began, and were answered."""
        return max(0, self.requests_at_drain - self.aborted_requests)

    @property
    def progress(self) -> tuple[int, int, int]:
        """Counters that grow with progress; the time and memory that a worker takes are none."""
        return len(self.workers), len(self.steps), self.pieces

    @property
    def measured_bytes(self) -> int:
        """Private bytes of its workers at the last measurement, or the last sample of loading ones."""
        return sum(worker.memory_bytes for worker in self.alive_workers)

    @property
    def loaded_memory(self) -> list[WorkerMemory]:
        """The memory of its workers right after each had loaded."""
        return [worker.loaded_memory for worker in self.workers if worker.loaded_memory is not None]

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self.alive_workers)

    @property
    def oldest_request_s(self) -> float | None:
        """The age of the oldest inference in flight, or None without one."""
        sent = [each for worker in self.alive_workers if (each := worker.oldest_sent_ns) is not None]
        return (time.monotonic_ns() - min(sent)) / 1e9 if sent else None

    def take_new_requests(self) -> int:
        """Return how many requests were answered since the last call."""
        before, self.rated_requests = self.rated_requests, self.statistics.requests
        return self.rated_requests - before

    def last_used_at(self, now: str) -> str | None:
        """Return the timestamp of the end of the last inference, or None without one."""
        if not self.last_used_ns:
            return None
        return add_seconds(now, (self.last_used_ns - time.monotonic_ns()) / 1e9)

    def to_view(self, job: Job | None, now: str = "", *, is_demanded: bool = False) -> LoadView:
        """Return the scheduler's view of the load; `job` is its job until it has ended."""
        has_outcome = self.report is not None or self.failure is not None
        return LoadView(
            self.job_id,
            self.model_id,
            Phase.LOADING if job is not None else self._find_ended_phase(),
            self.killed,
            tuple(worker.worker_id for worker in self.unexpected_exits),
            self.list_taken(),
            has_outcome=has_outcome and bool(self.tasks),
            busy=is_demanded or self.in_flight > 0,
            last_used_at=self.last_used_at(now),
            load_s=self.load_s,
            requests=self.statistics.requests,
        )

    def list_taken(self) -> Mapping[str, int]:
        """Return the bytes that count against the budget of each room."""
        taken = self.allocation.list_taken(self.memory_bytes)
        is_over = self.is_gone or (self.killed and self.is_finished)
        return dict.fromkeys(taken, 0) if is_over else taken

    def _find_ended_phase(self) -> Phase:
        """Return how far it is since its job has ended."""
        if self.is_gone:
            return Phase.GONE
        is_ending = self.unloading or self.killed or self.has_exited
        return Phase.DRAINING if is_ending else Phase.SERVING

    def begin_again(self) -> None:
        """Begin again, with an estimate for other files."""
        self.outdated += 1
        self.estimate, self.is_new = None, True
        self.has_other_files = self.killed = False
        self.granted.clear()

    def reach_stage(self, stage: str, worker_id: str = "") -> None:
        """Note a stage of the load, or of one of its workers; it is progress once for each."""
        self.stage = stage
        self.steps.add((worker_id, stage))

    def count_piece(self) -> None:
        self.pieces += 1

    def track(self, effect: asyncio.Task[None]) -> None:
        """Keep a task until it ends, then wake the consumer."""
        self.tasks.add(effect)
        effect.add_done_callback(self._on_task_end)

    def _on_task_end(self, effect: asyncio.Task[None]) -> None:
        self.tasks.discard(effect)
        if not effect.cancelled() and effect.exception() is not None:
            _log.error("an effect on %s failed", self.model_id, exc_info=effect.exception())
            self.kill()
        self.wake()

    def check(self) -> None:
        """Check that this attempt goes on, and that no worker has died.

        Raises:
            LoadEnded: it does not, or one has.
        """
        if self.failure is None and (dead := self.unexpected_exits):
            code = FORK_SERVER_DIED if any(worker.orphaned for worker in dead) else WorkerDied.code
            self.failure = Failure(code, "the worker died right after it had loaded the model")
        if self.failure is not None:
            raise LoadEnded

    def store_failure(self, problem: RuntimeProblem, worker: Worker | None = None) -> None:
        """Store why this attempt ends, and with which worker; the first reason counts."""
        if self.failure is not None:
            return
        if worker is not None and isinstance(problem, WorkerDied):
            self.failure = _describe_death(worker, problem, self.stage)
        else:
            self.failure = Failure(problem.code, str(problem))

    def kill(self) -> None:
        """Kill all workers now, however stuck they are, and count the aborted requests."""
        if self.report is None:  # more would be started; and who waits for one may meet a stuck fork server
            for effect in self.tasks:
                effect.cancel()
        self.kill_workers()

    def kill_workers(self) -> None:
        self.killed = True
        for worker in self.alive_workers:
            self.expect_exit(worker)
            worker.kill()

    def on_exit(self, worker: Worker) -> None:
        """End this attempt if a worker that had loaded has died before all have."""
        if self.report is None and worker.worker_id in self.reports and not self.killed:
            with suppress(LoadEnded):
                self.check()
            self.kill_workers()
        is_expected = worker.worker_id in self.expected_exits
        self.on_change(self)
        self.allocation.on_exit(len(self.alive_workers), is_expected=is_expected, wake=self.wake)
        self.wake()

    def check_estimate(self, files: Sequence[SizedFile]) -> None:
        """Check, before a worker is started, that the reservation is for these files.

        Raises:
            LoadEnded: they are others.
        """
        if not isinstance(self.estimate, MemoryEstimate) or self.estimate.files != file_sizes(files):
            self.has_other_files = True
            raise LoadEnded

    def limit_memory(self, order: Load) -> Load:
        """Return an order with memory limits; RLIMIT_DATA also counts mappings of files, and stacks."""
        allowance, instances = self.allowance(), self.parameters.instances
        if allowance is None or self.budget_bytes is None:
            return order
        mapped = order.bytes + (order.threads + 1) * thread_bytes()
        others = (instances - 1) * (self.reserved_bytes // instances)
        limit = allowance - others + mapped
        return replace(order, load_limit_bytes=limit, ceiling_bytes=self.budget_bytes + mapped)

    def check_allowance(self, worker: Worker) -> None:
        """End this attempt if its loading workers have taken more memory than they may."""
        allowance, taken = self.allowance(), self.measured_bytes
        if self.report is None and allowance is not None and taken > allowance:
            took = f"the load took {format_megabytes(taken)} of memory"
            self._end_attempt(LoadRefused(OUT_OF_MEMORY, f"{took}; {self.describe_allowance()}"), worker)

    def measure_rooms(self) -> AbstractAsyncContextManager[None]:
        """Measure its workers' memory beside the machine's; for errors see `Allocation`."""
        return self.allocation.measure(self._end_attempt)

    async def expect_return(self) -> None:
        """Measure, right before its workers' end, the expected free memory after it."""
        if not self.expected_exits:  # otherwise some memory may be back already
            await self.allocation.expect_return()

    def _end_attempt(self, problem: LoadRefused, worker: Worker | None = None) -> None:
        self.store_failure(problem, worker)
        self.kill_workers()

    def describe_allowance(self) -> str:
        """Return the memory that the load may take, for the message about one that exceeded it."""
        may_take = format_megabytes(self.allowance() or 0)
        reserved = format_megabytes(self.reserved_bytes)
        return f"it may take {may_take}: what it reserved, {reserved}, and what is free of the memory budget"

    def expect_exit(self, worker: Worker) -> None:
        """Note, right before a worker's end, its aborted requests and released bytes."""
        if worker.worker_id not in self.expected_exits:
            self.expected_exits.add(worker.worker_id)
            self.aborted_requests += worker.in_flight
            self.freed_bytes += worker.memory_bytes if worker.loaded_memory is not None else 0


def _describe_death(worker: Worker, death: WorkerDied, stage: str | None) -> Failure:
    """Return the failure of a load whose worker died, with the worker's last lines if they are recorded."""
    lines = "\n".join(worker.recorded_tail())
    said = f"; it said:\n{lines}" if lines else ""
    code = FORK_SERVER_DIED if worker.orphaned else death.code
    at = "warmed the model up" if stage == "warming_up" else "loaded the model"
    return Failure(code, f"{death} while it {at}{said}")
