"""The runtime as the server runs it, without HTTP: a log in a file, real workers, and the consumer between.

Nothing here sleeps: what is recorded is waited for at the log, and time passes when a test says so.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from msgspec import UNSET

from events.clock import boottime, utc_now
from events.commands import Command, Receipt
from events.jobcommands import RequestLoad, RequestUnload
from events.jobs import Failure, Job
from events.log import Log
from events.models import Model, ModelState
from events.sqlite.listing import Reader, open_reader
from events.types import Data, Event, LoadParameters
from events.values import Credential
from features.approvals.commands import ApproveVersion, WithdrawApproval
from features.devices.found import Devices
from runtime import memory
from runtime.consumer.consumer import Consumer
from runtime.consumer.running import RunningLoad
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker
from runtime.repository import Repository
from runtime.router import Absent, Answered, InferenceRequest, Router
from runtime.scheduler.view import Policy
from runtime.statistics import InferenceTimes
from runtime.store.versions import Versions
from runtime.wire import Tensor, WantedOutput
from support import models
from support.store import opened_store
from support.workers import LIMIT_S, array, floats, trips, unhurried, until

D = TypeVar("D", bound=Data)

Run = Callable[..., AbstractAsyncContextManager["Engine"]]
"""Start the runtime over the test's folder, with its module's pool and these settings: the fixture `run`."""


@dataclass
class Clock:
    """The clock of log and consumer: the real one or one that stands still, and what a test adds to it.

    Attributes:
        ahead: time that passed, for the wall clock and CLOCK_BOOTTIME.
        wrong: by how much the wall clock was set.
    """

    ahead: timedelta = timedelta()
    wrong: timedelta = timedelta()
    stands_at: datetime | None = None

    def now(self) -> datetime:
        return (self.stands_at or utc_now()) + self.ahead + self.wrong

    def boottime(self) -> float:
        return (0.0 if self.stands_at else boottime()) + self.ahead.total_seconds()


def stopped_clock() -> Clock:
    """Make a clock by which nothing is due until a test lets time pass, however slow the machine is."""
    return Clock(stands_at=utc_now())


@dataclass
class Engine:
    """Everything that runs, and words for what tests do with it."""

    log: Log
    reader: Reader
    pool: WorkerPool
    repository: Repository
    versions: Versions
    consumer: Consumer
    router: Router
    clock: Clock
    applying: asyncio.Task[None] = field(repr=False)

    @property
    def root(self) -> Path:
        """Where the models are."""
        return self.repository.root

    async def submit_load(
        self,
        model_id: str,
        version: int | None = None,
        parameters: LoadParameters | None = None,
        asked: Iterable[str] = (),
        actor: str = "alice",
        **more: Any,
    ) -> Receipt:
        """Ask for a load, as the HTTP handler does; `asked` are the parameters that the request names."""
        chosen = self.repository.find_version(model_id, version)
        contents = self.versions.known_contents(model_id, chosen)
        given = parameters or LoadParameters()
        rules = self.consumer.policy.loads.of(model_id)
        is_checked = self.consumer.policy.loads.count_persons(model_id) > 0
        more = {"policy": UNSET if rules is None else rules.digest, "is_checked": is_checked, **more}
        command = RequestLoad(model_id, chosen, contents, actor, given, asked=frozenset(asked), **more)
        return await self.log.submit(command)

    async def approve(self, model_id: str, version: int = 1, by: str = "carol") -> Receipt:
        """Approve the present files of a version, as the HTTP handler does."""
        checked = await self.consumer.check_version(model_id, version)
        contents = tuple((file.path, file.sha256) for file in checked.files)
        said = by, "reviewed", Credential()
        return await self.log.submit(ApproveVersion(model_id, version, checked.digest, contents, *said))

    async def withdraw(self, model_id: str, version: int = 1, by: str = "carol") -> Receipt:
        return await self.log.submit(WithdrawApproval(model_id, version, by, "it drifts", Credential()))

    async def ask_load(
        self,
        model_id: str,
        version: int | None = None,
        parameters: LoadParameters | None = None,
    ) -> str:
        """Ask for a load; returns its job's id."""
        return job_of(await self.submit_load(model_id, version, parameters))

    async def ask_unload(self, model_id: str | None, *, force: bool = False) -> str:
        """Ask for an unload; returns its job's id."""
        command: Command = RequestUnload(model_id, "alice", force)
        return job_of(await self.log.submit(command))

    async def load(
        self,
        model_id: str,
        version: int | None = None,
        parameters: LoadParameters | None = None,
    ) -> Job:
        """Load a model and wait until the job has ended, well or not."""
        return await self.ended(await self.ask_load(model_id, version, parameters))

    async def unload(self, model_id: str, *, force: bool = False) -> Job:
        """Unload a model and wait until the job has ended."""
        return await self.ended(await self.ask_unload(model_id, force=force))

    async def ended(self, job_id: str) -> Job:
        """Wait for the end of a job."""
        await self.recorded(lambda: self.log.state.unended_job(job_id) is None)
        job = await self.reader.job(job_id)
        assert job is not None
        return job

    async def recorded(self, condition: Callable[[], bool]) -> None:
        """Wait until the recorded state is so; a consumer that died meanwhile is the failure."""
        with self.log.subscribed() as wakeup:
            self.applying.add_done_callback(lambda _: wakeup.set())
            async with asyncio.timeout(LIMIT_S):
                while not condition():
                    if self.applying.done():
                        self.applying.result()
                    wakeup.clear()
                    await wakeup.wait()

    async def becomes(self, model_id: str, state: ModelState) -> Model:
        """Wait until a model is in this state."""
        models = self.log.state.models
        await self.recorded(lambda: model_id in models and self.model(model_id).state is state)
        return self.model(model_id)

    def model(self, model_id: str) -> Model:
        """Return a model as it is recorded."""
        return self.log.state.models[model_id]

    def job(self, job_id: str) -> Job:
        """Return an unended job as it is recorded."""
        return self.log.state.jobs[job_id]

    def live(self, model_id: str) -> RunningLoad:
        """Return the newest load of a model that runs."""
        return [load for load in self.consumer.loads.values() if load.model_id == model_id][-1]

    def worker(self, model_id: str) -> Worker:
        """Return the first worker of a model's newest load that has not exited, else the first."""
        load = self.live(model_id)
        return [*load.alive_workers, *load.workers][0]

    def workers(self, model_id: str) -> list[Worker]:
        """Return the workers that are left of a model's newest load."""
        return self.live(model_id).alive_workers

    async def events(self, *, of: str | None = None) -> list[Event]:
        """Return what is recorded, of one model or all."""
        return [event for event in await self.reader.events(0) if of in (None, event.model_id)]

    async def story(self, *, of: str | None = None) -> list[str]:
        """Return the types of what is recorded, in order."""
        return [event.type for event in await self.events(of=of)]

    async def facts(self, kind: type[D], *, of: str | None = None) -> list[D]:
        """Return the recorded facts of this kind, about one model or all."""
        return [event.data for event in await self.events(of=of) if isinstance(event.data, kind)]

    def pass_time(self, seconds: float) -> None:
        """Let time pass for log and consumer, and wake both."""
        self.clock.ahead += timedelta(seconds=seconds)
        self.log.notify()

    async def ask(self, model_id: str, value: float) -> float:
        """Run an inference on a model that takes x and answers with one number."""
        (answer,) = await self.infer(model_id, floats("x", value))
        return float(array(answer)[0])

    async def infer(
        self, model_id: str, *tensors: Tensor, outputs: Sequence[str] = (), timeout_s: float = LIMIT_S
    ) -> Sequence[Tensor]:
        """Run an inference; returns the outputs, as raw bytes."""
        question = InferenceRequest(None, None, tuple(tensors), tuple(map(WantedOutput, outputs)))
        times = InferenceTimes(time.monotonic_ns())
        here = await self.router.find(model_id)
        result = await self.router.infer(here, question, timeout_s, times)
        if isinstance(result, Absent):
            raise result.problem
        assert isinstance(result, Answered)
        result.here.count_answer(result.outcome, times)
        return result.outputs

    def kill(self, model_id: str) -> None:
        """Kill a model's worker, as the kernel does when memory runs out."""
        os.kill(self.worker(model_id).pid, signal.SIGKILL)

    async def die(self, model_id: str) -> None:
        """Kill a model's worker and wait until its loss is recorded."""
        self.kill(model_id)
        await self.becomes(model_id, ModelState.LOST)

    async def start_endless(self, model_id: str = "loop") -> list[asyncio.Task[object]]:
        """Start an inference that never ends by itself in each worker of a `counting_loop`."""
        asked: list[asyncio.Task[object]] = [
            asyncio.create_task(self.infer(model_id, trips(models.ENDLESS))) for _ in self.workers(model_id)
        ]
        await until(lambda: all(worker.in_flight == 1 for worker in self.workers(model_id)))
        return asked

    async def nothing_left(self) -> None:
        """Wait until no load and no worker is left."""
        await until(lambda: self.consumer.loads == {} and self.worker_pids() == [])

    @property
    def fork_server_pid(self) -> int:
        """The process that the workers are children of."""
        assert self.pool._fork_server is not None
        return self.pool._fork_server.pid

    def worker_pids(self) -> list[int]:
        return memory.list_descendants(self.fork_server_pid)

    async def loading(self, model_id: str) -> RunningLoad:
        """Wait until a model's worker is amid its load."""

        def found() -> list[RunningLoad]:
            loads = self.consumer.loads.values()
            return [load for load in loads if (load.model_id, load.stage) == (model_id, "loading")]

        await until(lambda: bool(found()))
        return found()[-1]

    async def stopped_ahead(self) -> int:
        """Start the worker that the next load takes; it stops before its order, and loads when continued.

        Returns:
            Its process id.
        """
        start = self.pool.start
        worker = await start("ahead")
        load = worker.load

        async def stop_and_load(*arguments: Any, **options: Any) -> Any:
            os.kill(worker.pid, signal.SIGSTOP)
            return await load(*arguments, **options)

        async def hand_over(worker_id: str) -> Worker:
            self.pool.start = start  # type: ignore[method-assign]
            worker.worker_id = worker_id
            return worker

        worker.load = stop_and_load  # type: ignore[method-assign]
        self.pool.start = hand_over  # type: ignore[method-assign]
        return worker.pid


def save_models(folder: Path) -> Path:
    """Save `adder` (versions 1 and 2, which add as much), `other`, `loop` and `slow`; return the folder."""
    root = folder / "models"
    models.save(models.add(1), root, "adder", 1)
    models.save(models.add(2), root, "adder", 2)
    models.save(models.add(100), root, "other")
    models.save(models.counting_loop(), root, "loop")
    models.save_bytes(models.endless_load(), root, "slow")
    return folder


def gone(pid: int) -> bool:
    """Whether a process has exited and was reaped."""
    return not Path(f"/proc/{pid}").exists()


def code_of(job: Job) -> str | None:
    """Return the code of the error with which a job ended."""
    return job.error.code if job.error is not None else None


def error_of(job: Job) -> Failure:
    """Return the error with which a job ended."""
    assert job.error is not None
    return job.error


def job_of(receipt: Receipt) -> str:
    """Return the job that stands behind a receipt."""
    assert receipt.job_id is not None
    return receipt.job_id


async def end_workers(pool: WorkerPool) -> None:
    """Kill all workers of a pool and wait until they have exited."""
    workers = list(pool._workers)
    for worker in workers:
        worker.kill()
    await asyncio.gather(*(asyncio.shield(worker.ended) for worker in workers))


@asynccontextmanager
async def running(
    folder: Path,
    *,
    loads_at_once: int = 2,
    drain_timeout_s: float = LIMIT_S,
    turn_drain_s: float = LIMIT_S,
    stops_cleanly: bool = False,
    clock: Clock | None = None,
    max_queue: int = 1024,
    policy: Policy | None = None,
    pool: WorkerPool | None = None,
    has_store: bool = True,
    store_bytes: int | None = None,
    workers_bytes: int | None = None,
) -> AsyncIterator[Engine]:
    """Start the runtime on `<folder>/ledger.db` and `<folder>/models`; nothing of it is left after.

    Args:
        folder: where a runtime may have been before, whose ledger this goes on with.
        loads_at_once: the policy, unless there is one.
        drain_timeout_s: how long an unload waits for what runs.
        turn_drain_s: how long an eviction does.
        stops_cleanly: whether the end appends `ServerStopped`, as a server does that was not killed.
        clock: what it is now.
        max_queue: inferences of one model that may be in flight.
        policy: such as one with a budget.
        pool: one that tests share; its workers end with this, its fork server does not.
        has_store: whether versions are taken into a store, or loaded from the repository.
        store_bytes: the limit of that store.
        workers_bytes: what all workers may take together.
    """
    with unhurried():
        clock = clock or Clock()
        log, shared = Log(folder / "ledger.db", now=clock.now, boottime=clock.boottime), pool
        pool = shared or WorkerPool(patience_s=LIMIT_S, targets=Devices(visible=()))
        repository = Repository(folder / "models")
        kept = opened_store(folder, store_bytes) if has_store else None
        versions = Versions(repository, kept)
        if shared is None:
            await pool.open()
            await pool.confine("auto", folder)
        await log.open()
        await log.server_started()
        policy = policy or Policy(loads_at_once)
        consumer = Consumer(
            log,
            pool,
            versions,
            policy=policy,
            drain_timeout_s=drain_timeout_s,
            turn_drain_s=turn_drain_s,
            workers_bytes=workers_bytes,
        )
        applying = asyncio.create_task(consumer.run())
        try:
            async with open_reader(log.path) as reader:
                router = Router(log, consumer.loads, repository, max_queue=max_queue)
                yield Engine(log, reader, pool, repository, versions, consumer, router, clock, applying)
        finally:
            await consumer.stop()
            await asyncio.wait([applying])
            if shared is None:
                await pool.close()
            else:
                await end_workers(shared)
            if stops_cleanly:
                await log.server_stopped()
            await log.close()
            assert not [task for load in consumer.loads.values() for task in load.tasks]
        applying.result()
