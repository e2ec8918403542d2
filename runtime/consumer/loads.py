"""The life of one load, from its estimate to `ModelLoaded`, and of an unload: a coroutine each.

`Loader.run_load` reads from top to bottom; whatever ends it, its workers are killed unless the model is
loaded. The consumer starts, grants and cancels these coroutines, and they wake it. It records every other end
of a job.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace as change
from functools import partial
from pathlib import Path

from msgspec import UNSET
from msgspec.structs import asdict, replace

from events.clock import seconds_between, uuid7
from events.commands import OUTDATED, Condition, Record
from events.errors import LogUnavailable, NotEncodable, RequestRefused
from events.jobcommands import RULES, RequestLoad, RequestUnload
from events.jobs import Failure, Job
from events.log import Log
from events.models import RELOADS, Model, ModelState
from events.serving import Serving
from events.state import State
from events.types import (
    SYSTEM,
    Cause,
    Draft,
    Durations,
    LoadedFile,
    LoadFailed,
    LoadParameters,
    ModelLoaded,
    UnloadRequested,
    WorkerExited,
    contents_of,
)
from features.beforeload import CheckInput, NotLoadable
from features.checks import CheckedVersion, check_load, survey_version
from features.rooms import TARGETS
from features.rules import ModelRules
from runtime.cgroups import count_usable_cpus
from runtime.consumer.running import LoadEnded, RunningLoad
from runtime.elsewhere import Elsewhere
from runtime.errors import (
    OUT_OF_MEMORY,
    Exit,
    ForkServerUnavailable,
    LoadRefused,
    NoProgress,
    RepositoryUnreadable,
    RuntimeProblem,
    WorkerDied,
    hide_folders,
)
from runtime.memory import total_bytes
from runtime.process.pool import WorkerPool, kill_and_wait, start_task
from runtime.process.worker import Worker
from runtime.repository import (
    LOAD_LIMIT_S,
    NO_WARM_UP,
    REQUEST_LIMIT_S,
    RepositoryBusy,
    SizedFile,
    read_reload_warm_up,
    read_warm_up,
)
from runtime.rooms import CPU_TARGET, RoomLimits, Target
from runtime.scheduler.actions import (
    Action,
    ChangeSettings,
    StartLoad,
    UnloadAutomatically,
    UnloadForReplacement,
    draft_fact,
    draft_outcome,
    unchanged,
)
from runtime.scheduler.admission import find_same_workers
from runtime.scheduler.estimates import estimate_memory
from runtime.scheduler.view import MemoryEstimate, Policy, find_started_job, may_end
from runtime.store.versions import HeldVersion, Versions
from runtime.timeouts import MEASURE_LIMIT_S, STOP_GRACE_S, TimeoutExpired, timeout
from runtime.wire import Load, Loaded, Tensor, plain_text

_log = logging.getLogger(__name__)

LOG_RETRY_S = 0.5
"""Pause before something is tried again after the ledger could not be written."""
START_ATTEMPTS = 3
"""A load survives the replacement of the fork server, but not one that cannot fork."""
START_PAUSE_S = 0.1
"""Between attempts: by then the pool knows that the fork server has ended, and waits for the next one."""
MAX_OUTDATED = 3
"""A load that found other files than its estimate was for is estimated anew so many times; then it fails."""
CHANGING = f"the model's files changed before its load {MAX_OUTDATED + 1} times; load it again"
DEFECT = "the load failed within the server; see its log"
ESTIMATE_WAIT_S = 0.5
"""How long later loads wait for an estimate. It takes a millisecond, unless a disk hangs."""


class Loader:
    """Runs the coroutines of loads.

    Args:
        log: holds the live state.
        recorder: appends facts.
        pool: starts workers.
        versions: has the files of versions.
        running: the loads that were granted, by job id, until their workers have exited.
        wake: called when the consumer has something new to decide.
        elsewhere: says which of the work is this server's.
        policy: the operator's settings.
        progress_timeout_s: how long a load may make no progress, unless its request says otherwise.

    Attributes:
        active: the loads whose coroutine runs, or has raised by a defect, by job id.
        syncs: versions that were loaded and are being synced to the disk.
    """

    def __init__(
        self,
        log: Log,
        recorder: Recorder,
        pool: WorkerPool,
        versions: Versions,
        *,
        running: dict[str, RunningLoad],
        wake: Callable[[], None],
        elsewhere: Elsewhere,
        policy: Policy,
        progress_timeout_s: int,
    ) -> None:
        self._log = log
        self._progress_timeout_s = progress_timeout_s
        self._recorder = recorder
        self._pool = pool
        self._versions = versions
        self._wake = wake
        self._elsewhere = elsewhere
        self._policy = policy
        self._checking = asyncio.Semaphore(policy.loads_at_once)
        self.active: dict[str, RunningLoad] = {}
        self.running = running
        self.syncs: set[asyncio.Task[None]] = set()

    def begin(self, job: Job) -> None:
        """Start the coroutine of a load, which estimates its memory and then waits for the grant."""
        version, parameters = job.load_order
        load = RunningLoad(
            job.id,
            job.model_id,
            version,
            parameters,
            self._wake,
            is_reload=job.cause in RELOADS or find_expected(job, self._log.state) is not None,
            progress_timeout_s=parameters.progress_timeout_s or self._progress_timeout_s,
        )
        load.task = asyncio.create_task(self.run_load(job, load), name=f"loading {job.model_id}")
        load.task.add_done_callback(partial(self._end, load))
        load.track(load.task)
        self.active[job.id] = load

    def confirm(self, action: Action) -> tuple[Condition, ...] | None:
        """Return what the checks of a load rest on that goes on with an action, or gets room by it.

        If that does not hold any more, the load begins anew, with its checks, and there is None.
        """
        match action:
            case StartLoad(job) | ChangeSettings(job) | UnloadForReplacement(job):
                job_id: str | None = job.id
            case UnloadAutomatically(cause_event_id=job_id):
                pass
            case _:
                return ()
        load, waiting = self.active.get(job_id or ""), self._log.state.unended_job(job_id)
        conditions = () if load is None or load.checked is None else load.checked.conditions
        if load is None or waiting is None or all(each.holds(self._log.state) for each in conditions):
            return conditions
        load.task.cancel()
        self.begin(waiting)
        return None

    def _end(self, load: RunningLoad, task: asyncio.Task[None]) -> None:
        """Forget a load whose coroutine has ended; of a defect the consumer then lets the load fail."""
        if self.active.get(load.job_id) is not load:  # the load began anew, or the consumer has dropped it
            return
        if task.cancelled() or task.exception() is None:
            del self.active[load.job_id]
        else:
            load.estimate = Failure("internal", DEFECT)

    async def run_load(self, job: Job, load: RunningLoad) -> None:
        """Load a model, from the estimate of its memory to `ModelLoaded` or `LoadFailed`.

        If its files are not those that were estimated, it gives its grant back and waits for another one.
        """
        while True:
            await self._estimate(job, load)
            await load.granted.wait()
            await self._attempt(job, load)
            if not load.has_other_files:
                break
            del self.running[job.id]  # no worker was started
            load.begin_again()
        if load.failure is not None:
            await self._record_failure(load, load.failure)

    async def _estimate(self, job: Job, load: RunningLoad) -> None:
        """Estimate the memory of a load; if the model serves from the same bytes, that is found, too."""
        patience = asyncio.get_running_loop().call_later(ESTIMATE_WAIT_S, self._stop_waiting, load)
        try:
            load.estimate = await self._look_at_files(job, load)
        except Exception as error:  # noqa: BLE001 - whatever it is, this load alone has no estimate
            load.estimate = describe_failure(error)
        finally:
            patience.cancel()
            self._stop_waiting(load)
        if load.outdated > MAX_OUTDATED:
            load.estimate = Failure("model_changed", CHANGING)

    async def _look_at_files(self, job: Job, load: RunningLoad) -> MemoryEstimate:
        """Check the files against the rules, and estimate the memory."""
        state, (version, parameters) = self._log.state, job.load_order
        model, serving = state.models.get(job.model_id), find_same_workers(state, job)
        rules, expected = self._policy.loads.of(job.model_id), find_expected(job, state)
        if load.checked is None and (rules is not None or job.policy_digest is not None):
            await self._check(job, load, expected)
        footprints = model.footprints if model is not None else ()
        known: Sequence[SizedFile] | None = load.files or expected
        files = known or await self._versions.stat(job.model_id, version)
        targets = find_targets(parameters, self._pool, self._policy.rooms)
        threads = self._pool.threads_of(parameters)
        found = estimate_memory(files, version, parameters, footprints, threads=threads, targets=targets)
        if serving is None or not await self._is_same(job, serving, load.files):
            return found
        return change(found, same_as=serving.load_job_id)

    async def _is_same(self, job: Job, serving: Serving, checked: Sequence[LoadedFile] | None) -> bool:
        """Whether a load has the bytes that its model serves from: those that were checked, if rules ask."""
        if checked is not None:
            return contents_of(checked) == contents_of(serving.files)
        version, _ = job.load_order
        return await self._versions.has_bytes_of(job.model_id, version, serving.files)

    async def _check(self, job: Job, load: RunningLoad, expected: Sequence[LoadedFile] | None) -> None:
        """Copy and hash the files of a load, and check them; the load then takes exactly these.

        `expected` are the files that the load must have; None takes the present files. The rules are those of
        a reload only if the system brings the model back: an inference's load is asked for.

        Raises:
            NotLoadable: as `features.checks.check_load`.
            RuntimeProblem: as `Versions.version`.
            RuntimeError: there is no store, so files might change after the check; the server refuses to
                start.
        """
        if self._versions.store is None:
            raise RuntimeError("rules need a store")
        async with self._checking, self._versions.version(job.model_id, load.version, expected) as held:
            is_reload = job.cause in RELOADS and expected is not None
            given = await self._read_check_input(held, is_reload=is_reload)
            load.files, load.checked = held.loaded_files, await asyncio.to_thread(check_load, given, job)

    async def check_version(self, model_id: str, version: int | None) -> CheckedVersion:
        """Check a version, by default the highest, that is not to be loaded.

        As many at a time as loads, since each may take a copy of the files.

        Raises:
            RuntimeProblem: as `Versions.version`.
        """
        repository = self._versions.repository
        async with self._checking:
            find = partial(repository.find_version, model_id, version)
            chosen = await repository.file_system.run(model_id, find, REQUEST_LIMIT_S)
            async with self._versions.version(model_id, chosen) as held:
                given = await self._read_check_input(held, is_reload=False)
                return await asyncio.to_thread(survey_version, given, chosen)

    async def _read_check_input(self, held: HeldVersion, *, is_reload: bool) -> CheckInput:
        state, now, model_id = self._log.state, self._log.now(), held.model_id
        rules = self._policy.loads.of(model_id) or ModelRules()
        contents = await held.hash()
        await held.settle()  # for those who name its digest, and for a load
        known = state.models.get(model_id) or Model(model_id), state.registers.find_versions(model_id)
        is_signed = partial(self._elsewhere.is_signed, state=state)
        return CheckInput(
            rules, *known, contents, partial(_read_file, held.folder), now, is_reload, is_signed
        )

    def _stop_waiting(self, load: RunningLoad) -> None:
        load.is_new = False
        self._wake()

    async def _attempt(self, job: Job, load: RunningLoad) -> None:
        """Load a model with one grant; its workers are killed unless `ModelLoaded` is recorded."""
        is_recorded = False
        try:
            is_recorded = await self._load(job, load)
        except LoadEnded:
            pass
        except RuntimeProblem as problem:
            load.store_failure(problem)
        except NotEncodable as error:
            load.failure = Failure(error.code, f"what was loaded cannot be recorded: {error}")
        except Exception:  # noqa: BLE001 - whatever it is, this load alone fails
            _log.exception("the load of %s failed", load.model_id)
            load.failure = load.failure or Failure("internal", DEFECT)
        finally:
            if not is_recorded:
                load.kill_workers()

    async def _load(self, job: Job, load: RunningLoad) -> bool:
        """Load a model; returns whether the ledger says that it is loaded."""
        expected = load.files or find_expected(job, self._log.state)
        async with AsyncExitStack() as stack:
            async with _in_time(load):
                load.reach_stage("copying")
                files = await stack.enter_async_context(
                    self._versions.version(load.model_id, load.version, expected, load.count_piece)
                )
                order, inputs = await self._build_order(load, files)
                load.reach_stage("starting")
                async with load.measure_rooms():
                    worker = await self._start_instance(load, load.worker_id)
                    hashing = start_task(files.hash(), "hashing a model")  # it slows forks down
                    first = await self._load_instance(load, worker, order, inputs)
                    await hashing
                    await files.settle()
                    settled = replace(order, root=str(files.root), folder=str(files.folder))
                    await self._load_others(load, settled, inputs)
            load.report, load.load_s = first, (time.monotonic_ns() - load.granted_ns) / 1e9
            load.on_change(load)
            await self._record_outcome(load, partial(self._draft_loaded, load, files))
            is_recorded = self._is_serving(load)
            if is_recorded:
                sync = start_task(self._keep(files, stack.pop_all(), load), "syncing a model")
                self.syncs.add(sync)
                sync.add_done_callback(self.syncs.discard)
            return is_recorded

    async def _keep(self, files: HeldVersion, held: AsyncExitStack, load: RunningLoad) -> None:
        """Sync the files of a load beside all else, and give them back.

        If they are those from before, the repository may have others, of which the operator is told.
        """
        async with held:
            try:
                await files.make_durable()
            except RuntimeProblem as problem:  # the next start stores it again
                _log.warning("version %d of %s is not kept: %s", files.version, files.model_id, problem)
        if load.is_reload:
            compare = partial(self._versions.has_changed, files.model_id, files.version, files.loaded_files)
            with suppress(RuntimeProblem, OSError):  # of what cannot be read, nothing is said
                await self._versions.repository.file_system.run(files.model_id, compare, REQUEST_LIMIT_S)

    async def _build_order(self, load: RunningLoad, files: HeldVersion) -> tuple[Load, tuple[Tensor, ...]]:
        """Build the message that loads a version, and the inputs of its warm-up run; none are zeros.

        Raises:
            LoadEnded: the load was granted for other files.
            RuntimeProblem: the model's loadledger.toml cannot be read; the code says why.
        """
        load.check_estimate(files.files)
        repository = self._versions.repository
        read = partial(read_reload_warm_up if load.is_reload else read_warm_up, repository, load.model_id)
        try:
            warm_up = await repository.file_system.run(load.model_id, read, LOAD_LIMIT_S)
        except RepositoryBusy:
            if not load.is_reload:
                raise
            warm_up = NO_WARM_UP  # the store has all that a reload needs
        model = self._log.state.models.get(load.model_id)
        is_excused = load.is_reload or (model is not None and model.may_lose_batches(load.version))
        target = load.allocation.order()
        order = self._pool.build_load(files, load.parameters, warm_up, target, rows_required=not is_excused)
        return order, warm_up.inputs

    async def _load_others(self, load: RunningLoad, order: Load, inputs: Sequence[Tensor]) -> None:
        """Load the other instances, some at once; the first failure cancels the rest.

        Each takes a CPU and its peak of memory while it loads.
        """
        if load.parameters.instances == 1:
            return
        places = asyncio.Semaphore(count_usable_cpus())

        async def load_one() -> None:
            async with places:
                worker = await self._start_instance(load, uuid7())
                await self._load_instance(load, worker, order, inputs)

        others = [asyncio.create_task(load_one()) for _ in range(load.parameters.instances - 1)]
        try:
            await asyncio.gather(*others)
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _start_instance(self, load: RunningLoad, worker_id: str) -> Worker:
        """Start the worker of an instance, which belongs to the load from then on."""
        load.check()
        began_ns = time.monotonic_ns()
        worker = await self._start_worker(worker_id)
        if load.killed:  # since another worker died, say, whose memory is waited for
            await kill_and_wait(worker)
            raise LoadEnded
        load.workers.append(worker)
        load.starting_us = max(load.starting_us, (time.monotonic_ns() - began_ns) // 1000)
        worker.ended.add_done_callback(lambda _: load.on_exit(worker))
        return worker

    async def _load_instance(
        self, load: RunningLoad, worker: Worker, order: Load, inputs: Sequence[Tensor]
    ) -> Loaded:
        """Load the model in a started worker; return the worker's report."""
        worker_id, limited = worker.worker_id, load.limit_memory(order)
        try:
            report = await worker.load(
                limited,
                lambda stage: load.reach_stage(stage, worker_id),
                inputs,
                on_sample=lambda: load.check_allowance(worker),
            )
        except RuntimeProblem as problem:
            if not isinstance(problem, WorkerDied):
                load.expected_exits.add(worker_id)
            is_of_budget = load.allowance() is not None and not limited.is_limited_by_itself
            if problem.code == OUT_OF_MEMORY and is_of_budget:
                problem = LoadRefused(OUT_OF_MEMORY, f"{problem}; {load.describe_allowance()}")
            load.store_failure(problem, worker)
            raise LoadEnded from problem
        load.reports[worker_id] = report
        return report

    async def _start_worker(self, worker_id: str) -> Worker:
        for _ in range(START_ATTEMPTS - 1):
            with suppress(ForkServerUnavailable):
                return await self._pool.start(worker_id)
            await asyncio.sleep(START_PAUSE_S)
        return await self._pool.start(worker_id)

    def _is_serving(self, load: RunningLoad) -> bool:
        """Whether the ledger says that its model serves from this load."""
        model = self._elsewhere.share(self._log.state).models.get(load.model_id)
        return model is not None and model.serving is not None and model.serving.load_job_id == load.job_id

    async def _record_outcome(self, load: RunningLoad, describe: Callable[[Job], Sequence[Draft]]) -> None:
        """Record how a load ended, when the ledger can be written; the consumer may end its job otherwise.

        Raises:
            LoadEnded: a worker died before that.
        """
        tried = None
        while True:
            job = find_started_job(self._elsewhere.share(self._log.state), load.job_id)
            if job is None or not may_end(self._log.state, job):
                return
            if job is tried:
                await asyncio.sleep(LOG_RETRY_S)
            tried = job
            try:
                await self._recorder.record(*describe(job), conditions=(unchanged(job),))
            except LogUnavailable:  # the log's writer says so
                pass
            except RequestRefused as refusal:
                if refusal.code != OUTDATED:  # an outdated outcome is decided again, on the newer state
                    raise
            else:
                return

    async def _record_failure(self, load: RunningLoad, failure: Failure) -> None:
        failed = LoadFailed(failure.code, plain_text(failure.message))
        log_stderr(load, load.unexpected_exits)

        def describe(job: Job) -> list[Draft]:
            exits = [draft_exit(load, worker) for worker in load.unexpected_exits]
            return [*exits, draft_fact(job, failed, load.only_worker_id)]

        await self._record_outcome(load, describe)

    def _draft_loaded(self, load: RunningLoad, files: HeldVersion, job: Job) -> list[Draft]:
        """Return `ModelLoaded`, the version's name, and the unload request of the load before."""
        load.check()
        data = describe_loaded(job, load, files, self._log.now(), self._pool)
        if load.checked is not None:
            data = replace(data, **asdict(load.checked.evidence))
        loaded = draft_fact(job, data, load.only_worker_id)
        model = self._log.state.models.get(job.model_id)
        before = model.servings if model is not None and model.phase is ModelState.LOADED else ()
        old = next(filter(None, (self.running.get(each.load_job_id) for each in before)), None)
        return [
            *draft_outcome(job, loaded),
            *([] if old is None else [draft_replacement_unload(old, loaded.id)]),
        ]


@asynccontextmanager
async def _in_time(load: RunningLoad) -> AsyncIterator[None]:
    """Limit the time in which a load makes no progress.

    Raises:
        NoProgress: `no_progress`.
    """
    try:
        async with timeout(load.progress_timeout_s, lambda: load.progress):
            yield
    except TimeoutExpired:
        raise NoProgress(
            f"the load made no progress for {load.progress_timeout_s:g} s: all that time its stage was"
            f" {load.stage!r}. If the model needs longer, as a very large one may, load it with a greater"
            " progress_timeout_s; if its warm-up does not end, turn that off in its loadledger.toml"
        ) from None


def describe_loaded(
    job: Job, load: RunningLoad, files: HeldVersion, now: str, pool: WorkerPool
) -> ModelLoaded:
    if job.started_at is None:
        raise RuntimeError(f"job {job.id} has not started")
    reports = [load.reports[worker.worker_id] for worker in load.workers]
    rows = reports[0].rows
    loaded = ModelLoaded(
        files=files.loaded_files,
        worker_ids=tuple(worker.worker_id for worker in load.workers),
        memory_bytes=total_bytes(each.memory_bytes for each in load.loaded_memory),
        peak_memory_bytes=total_bytes(each.peak_memory_bytes for each in load.loaded_memory),
        durations=Durations(
            waiting_us=_microseconds(seconds_between(job.created_at, job.started_at)),
            starting_us=load.starting_us,
            loading_us=max(report.loading_us for report in reports),
            hashing_us=files.hashing_us,
            warming_up_us=max((us for r in reports if (us := r.warming_up_us) is not None), default=None),
            measuring_us=max(each.measuring_us for each in load.loaded_memory),
            total_us=_microseconds(seconds_between(job.created_at, now)),
            copying_us=files.copying_us,
        ),
        verified=files.is_stored,
        confinement=pool.applied.confinement,
        threads=pool.threads_of(load.parameters),
        rows_depend=UNSET if rows is None else rows.reason or UNSET,
        rows=UNSET if rows is None else rows.verdict,
    )
    return load.allocation.complete_loaded(loaded, reports[0])


def _microseconds(seconds: float) -> int:
    return max(0, round(seconds * 1_000_000))


def draft_replacement_unload(old: RunningLoad, cause_event_id: str) -> Draft:
    """Return the unload request of a load of this server that another load of its model replaces."""
    request = UnloadRequested(
        force=False, load_job_id=old.job_id, cause=Cause.SWAP, cause_event_id=cause_event_id
    )
    swap_id = uuid7()
    return Draft(swap_id, request, SYSTEM, swap_id, old.model_id, old.version, old.only_worker_id)


def draft_exit(load: RunningLoad, worker: Worker) -> Draft:
    # Ended with the fork server, by no doing of its own: the signal says nothing of the model.
    end = Exit(None, None) if worker.orphaned else worker.ended.result()
    data = WorkerExited(end.exit_code, end.signal, tuple(worker.recorded_tail()))
    return Draft(uuid7(), data, SYSTEM, load.job_id, load.model_id, load.version, worker.worker_id)


def log_stderr(load: RunningLoad, dead: Iterable[Worker]) -> None:
    """Log the last lines of workers, each in a line, for the operator, unless the ledger has them."""
    for worker in dead:
        for line in () if worker.records_stderr else worker.stderr_tail():
            _log.warning("worker %s of %s printed: %s", worker.worker_id, load.model_id, line)


async def run_unload(load: RunningLoad, drain_timeout_s: float) -> None:
    """Drain running inferences up to the drain timeout, then stop the workers."""
    workers = load.alive_workers
    load.requests_at_drain = sum(worker.in_flight for worker in workers)
    with suppress(TimeoutError):
        async with timeout(drain_timeout_s):
            await asyncio.gather(*(worker.wait_until_drained() for worker in workers))
    if load.alive_workers:
        load.stage = "stopping"
        await load.expect_return()
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


def find_targets(
    parameters: LoadParameters, pool: WorkerPool, limits: Mapping[str, RoomLimits]
) -> Sequence[Target]:
    """Return the targets on which a load may run: the CPU, unless it asks for others.

    Raises:
        RuntimeProblem: the load asks for targets that do not exist.
    """
    asked = (find for name, find in TARGETS.items() if getattr(parameters, name))
    return [target for find in asked for target in find(parameters, pool, limits)] or [CPU_TARGET]


def find_expected(job: Job, state: State) -> tuple[LoadedFile, ...] | None:
    """Return the files that a load has to take, or None for those that the repository has now.

    A reload by the system takes those from before, and an inference's load those that a person chose; only a
    person's load takes new ones.
    """
    model = state.models.get(job.model_id)
    if model is None or job.version is None:
        return None
    if job.cause in RELOADS:
        before = model.find_reloadable(job.version)
        return None if before is None else before.files
    if not RULES[job.cause].is_for_inferences:
        return None
    added = state.registers.find_versions(job.model_id).find_added(job.version)
    return model.find_kept_files(job.version, 0 if added is None else added.position)


def _read_file(folder: Path, path: str, most_bytes: int) -> bytes:
    with (folder / path).open("rb") as file:  # in the store, where nobody else writes
        return file.read(most_bytes)


def describe_failure(error: Exception) -> Failure:
    if isinstance(error, RuntimeProblem):
        return Failure(error.code, str(error))
    if isinstance(error, NotLoadable):
        return error.failure
    if isinstance(error, OSError | MemoryError):
        reason = getattr(error, "strerror", None) or "there is too little memory"
        return Failure(
            RepositoryUnreadable.code, f"the model's files cannot be looked at: {reason}; load it again"
        )
    _log.error("the files of a model cannot be looked at", exc_info=error)
    return Failure("internal", "the model's files cannot be looked at; the server's log says why")


def hide_paths(draft: Draft, folders: Collection[str]) -> Draft:
    """Return a draft whose texts of others, such as ONNX Runtime, do not name these folders of the server."""
    match draft.data:
        case LoadFailed(message=message):
            return replace(draft, data=replace(draft.data, message=hide_folders(message, folders)))
        case WorkerExited(stderr=lines):
            hidden = tuple(hide_folders(line, folders) for line in lines)
            return replace(draft, data=replace(draft.data, stderr=hidden))
    return draft


class Recorder:
    """Appends facts to the log, without folders of the server, and completed for the other servers.

    Args:
        log: the log.
        folders: the server's folders, which texts of others, such as ONNX Runtime, must not name.
        elsewhere: says which of the work is this server's.
    """

    def __init__(self, log: Log, folders: Collection[str], elsewhere: Elsewhere) -> None:
        self._log = log
        self._folders = folders
        self._elsewhere = elsewhere

    async def record(self, *drafts: Draft, conditions: tuple[Condition, ...]) -> None:
        """Append facts if the conditions hold.

        Raises:
            RequestRefused: `outdated`, they do not.
            LogUnavailable: it is not known whether they were appended.
            NotEncodable: a fact cannot be recorded.
        """
        shown = tuple(hide_paths(draft, self._folders) for draft in drafts)
        await self._log.submit(self._elsewhere.complete(Record(shown, conditions), self._log.state))

    async def request(self, command: RequestLoad | RequestUnload) -> None:
        """Append a request of the system if its conditions hold; for errors see `record`."""
        await self._log.submit(self._elsewhere.complete(command, self._log.state))
