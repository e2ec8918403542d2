"""The pool of workers: one fork server, replaced when it ends."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from events.types import ALLOW, LoadParameters
from features.targets import Targets
from features.wire import Library, Target
from runtime.errors import ForkServerUnavailable, InferenceTimeout, InvalidInput, WorkerDied
from runtime.process.confinement import UNCONFINED, AppliedLayers, probe
from runtime.process.forkclient import ForkServer, Process, close_watched
from runtime.process.sharedmemory import SharedRoom, TensorMemory
from runtime.process.worker import MemorySampler, Worker
from runtime.repository import WarmUp
from runtime.requestjson import JsonRequest, assemble
from runtime.store.versions import HeldVersion
from runtime.timeouts import FORK_LIMIT_S, FORK_SERVER_LIMIT_S, FORK_WAITS, INFERENCE_GRACE_S, timeout
from runtime.wire import (
    MAX_REQUEST_BYTES,
    Buffer,
    JsonRead,
    Load,
    MalformedFrame,
    PayloadRoom,
    ReadJson,
    Tensor,
)

T = TypeVar("T")


NO_TARGETS = Targets()
LAUNCH_BACK_OFF_S = (0.1, 5.0)
"""Back-off between failed launches of a fork server: the first pause, doubling to the last."""
BUFFER_BYTES = 2**20
"""Socket buffer of a channel, as far as the kernel allows: fewer turns for a tensor of some 100 KB."""
READING_BYTES = 32 * 2**20
"""Memory for names, shapes and parameters of a request's JSON, beside the text and its duplicates."""


async def complete(work: Coroutine[Any, Any, T]) -> T:
    """Await the work to its end even if the task is cancelled; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # retrieved: a canceller does not ask for it
        raise cancelled
    return task.result()


def start_task(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Start a task whose exception nobody needs to retrieve."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def reading_bytes(json_bytes: int) -> int:
    """Return the memory limit for reading a JSON of this length: the text, and two more of it."""
    return 3 * json_bytes + READING_BYTES


async def kill_and_wait(worker: Worker) -> None:
    """Kill a worker, and wait until it is gone, even if the task is cancelled."""
    worker.kill()
    await complete(asyncio.wait({worker.ended}))


class WorkerPool:
    """The workers of one server, all forked from one fork server, which is replaced when it ends.

    Args:
        threads: compute threads of each worker, unless its load says otherwise.
        patience_s: how long a cancelled inference may go on before its worker is killed.
        targets: the targets of loads beside the CPU, which `confine` finds.
        max_request_bytes: limit of an inference request; a model must be able to take shorter ones.
        answer_room: the memory for long answers of all workers.
        shared_room: the memory that all workers together may share with the server.

    Attributes:
        applied: the confinement of workers; nothing before `confine`.
        targets: the targets of loads beside the CPU, with their workers' confinement; none before `confine`.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        patience_s: float = INFERENCE_GRACE_S,
        records_stderr: bool = True,
        targets: Targets = NO_TARGETS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        answer_room: PayloadRoom | None = None,
        shared_room: SharedRoom | None = None,
    ) -> None:
        self.threads = threads
        self.records_stderr = records_stderr
        self.applied = UNCONFINED
        self.targets = targets
        self._max_request_bytes = max_request_bytes
        self._answer_room = answer_room or PayloadRoom()
        self._shared_room = shared_room or SharedRoom()
        self._patience_s = patience_s
        self._fork_server: ForkServer | None = None
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._workers: set[Worker] = set()
        self._sampler = MemorySampler()
        self._closed = False

    @property
    def healthy(self) -> bool:
        return self._up.is_set()

    @property
    def keeper(self) -> asyncio.Task[None]:
        """The task that replaces the fork server of an open pool; its end before `close` is a defect."""
        if self._keeper is None:
            raise RuntimeError("the pool is not open")
        return self._keeper

    async def open(self) -> None:
        """Start the fork server and wait until it has imported everything.

        The calling thread must live as long as the pool: the kernel kills the fork server with it.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`.
        """
        fork_server = await self._launch()
        self._keeper = asyncio.create_task(self._keep(fork_server), name="fork server")

    async def confine(self, mode: str, outside: Path) -> None:
        """Confine the workers of later loads; for the arguments see `runtime.process.confinement.probe`.

        Find the targets beside the CPU, whose workers are confined as far as their providers allow.

        Raises:
            NotConfined: `not_confined`, `require` is not possible here; workers are confined as far as it is.
            ForkServerUnavailable: `fork_server_unavailable`.
        """
        self.applied = await self._probe(mode, outside)
        self.targets = await self.targets.find(partial(self._probe, mode, outside), self.applied.problems)
        self.applied.check()

    def threads_of(self, parameters: LoadParameters) -> int:
        """Return the number of compute threads of each worker of a load."""
        return parameters.threads or self.threads

    def build_load(
        self,
        files: HeldVersion,
        parameters: LoadParameters,
        warm_up: WarmUp,
        target: Target | None = None,
        *,
        rows_required: bool = True,
    ) -> Load:
        """Return the message by which a worker of this pool loads a version, on a target or the CPU.

        On a target the model is warmed up, whatever its loadledger.toml says. `rows_required` says whether
        the load fails if its rows depend on each other.
        """
        applied = self.applied if target is None else self.targets.applied
        return Load(
            root=str(files.root),
            folder=str(files.folder),
            bytes=files.bytes,
            threads=self.threads_of(parameters),
            memory_limit_bytes=parameters.memory_limit_bytes,
            max_batch_size=parameters.max_batch_size,
            max_queue_delay_us=parameters.max_queue_delay_us,
            warm_up=target is not None or warm_up.enabled is not False,
            warm_up_required=warm_up.required,
            layers=applied.layers,
            name=f"{files.model_id}/{files.version}",
            target=target,
            max_request_bytes=self._max_request_bytes,
            dependent_rows=parameters.dependent_rows == ALLOW,
            rows_required=rows_required,
            has_priorities=bool(parameters.priority_levels),
        )

    async def start(self, worker_id: str) -> Worker:
        """Return a new worker with this id.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`, with the reason; a new fork server is starting.
        """
        fork_server = await self._available()
        try:
            worker, data, control = await self._fork(fork_server, worker_id)
            self._workers.add(worker)
            worker.ended.add_done_callback(lambda _: self._workers.discard(worker))
            try:
                await worker.connect(data, control)
            except BaseException:
                await kill_and_wait(worker)  # before the caller releases its reservation
                raise
        except OSError as error:
            raise ForkServerUnavailable(f"cannot start a worker: {error.strerror}") from None
        return worker

    async def read_json(self, text: Buffer, limit_s: float) -> JsonRequest:
        """Read the JSON of an inference request in a confined process of its own.

        Raises:
            InvalidInput: `invalid_input`, the JSON is malformed, or takes more than `reading_bytes` to read.
            InferenceTimeout: `inference_timeout`.
            ForkServerUnavailable: as `start`, or the fork server ended meanwhile.
        """
        worker = await self.start("JSON")
        order = ReadJson(reading_bytes(len(text)), self.applied.layers)
        try:
            async with timeout(limit_s):
                read: JsonRead = await worker.execute(order, (Tensor("json", "UINT8", (len(text),), text),))
            return assemble(text, read)
        except TimeoutError:
            raise InferenceTimeout("the JSON of the request could not be read in time") from None
        except (WorkerDied, MalformedFrame):
            if worker.orphaned:
                raise ForkServerUnavailable from None
            most = f"more than {order.memory_limit_bytes} bytes of memory"
            raise InvalidInput(f"the JSON of the request cannot be read: it takes {most}") from None
        finally:
            await kill_and_wait(worker)

    async def close(self) -> None:
        """Kill all workers and the fork server, and wait for their ends; the pool cannot be reopened."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        workers = list(self._workers)
        for worker in workers:
            worker.kill()
        if workers:
            await asyncio.wait({worker.ended for worker in workers})
        if self._fork_server is not None:  # last: it reaps the workers
            self._fork_server.kill()
            await asyncio.shield(self._fork_server.ended)

    async def _probe(
        self, mode: str, outside: Path, provider: Library | None = None, limit_s: float = FORK_LIMIT_S
    ) -> AppliedLayers:
        worker = await self.start("probe")
        try:
            return await probe(worker, mode, outside, provider, limit_s)
        finally:
            await kill_and_wait(worker)

    async def _fork(
        self, fork_server: ForkServer, worker_id: str
    ) -> tuple[Worker, socket.socket, socket.socket]:
        """Fork a worker; returns it with the server's ends of its data and control channels."""
        with contextlib.ExitStack() as ours:
            with contextlib.ExitStack() as theirs:
                data, data_end = _socketpair(ours, theirs)
                control, control_end = _socketpair(ours, theirs)
                read, write = os.pipe2(os.O_CLOEXEC)
                ours.callback(close_watched, read)
                theirs.callback(os.close, write)
                tensors, shared = TensorMemory.create(self._shared_room)
                ours.callback(tensors.close)
                for descriptor in shared:
                    theirs.callback(os.close, descriptor)
                forked = fork_server.fork((data_end.fileno(), control_end.fileno(), write, *shared))
            process = await self._answer(fork_server, forked)
            ours.callback(process.close)
            worker = Worker(
                worker_id,
                process,
                read,
                self._patience_s,
                self._sampler,
                tensor_memory=tensors,
                answer_room=self._answer_room,
            )
            worker.records_stderr = self.records_stderr
            ours.pop_all()
        return worker, data, control

    async def _launch(self) -> ForkServer:
        fork_server = self._fork_server = ForkServer.launch(os.environ)
        fork_server.ended.add_done_callback(lambda _: self._up.clear())
        try:
            async with timeout(FORK_SERVER_LIMIT_S):
                await asyncio.shield(fork_server.ready)
        except BaseException as error:
            fork_server.kill()
            await asyncio.shield(fork_server.ended)
            if isinstance(error, TimeoutError):
                raise ForkServerUnavailable("the fork server does not come up") from None
            raise
        self._up.set()
        return fork_server

    async def _keep(self, fork_server: ForkServer) -> None:
        """Replace the fork server whenever it ends."""
        pause_s = 0.0
        while True:
            await asyncio.shield(fork_server.ended)
            await asyncio.sleep(pause_s)
            try:
                fork_server = await self._launch()
                pause_s = 0.0
            except ForkServerUnavailable:
                pause_s = min(max(LAUNCH_BACK_OFF_S[0], 2 * pause_s), LAUNCH_BACK_OFF_S[1])

    async def _available(self) -> ForkServer:
        if self._fork_server is None or self._closed:
            raise ForkServerUnavailable("the pool is closed")
        try:
            async with timeout(FORK_SERVER_LIMIT_S):
                await self._up.wait()
        except TimeoutError:
            raise ForkServerUnavailable from None
        return self._fork_server

    async def _answer(self, fork_server: ForkServer, forked: asyncio.Future[Process]) -> Process:
        """Wait for the fork server's answer; a process without an owner ends with its channels."""
        try:
            async with timeout(FORK_LIMIT_S * (FORK_WAITS if self._workers else 1)):
                process = await asyncio.shield(forked)
        except BaseException as error:
            forked.add_done_callback(_discard)
            if not isinstance(error, TimeoutError):
                raise
            fork_server.kill()
            raise ForkServerUnavailable("the fork server did not answer and is replaced") from None
        if self._closed:
            _discard(forked)
            raise ForkServerUnavailable("the pool is closed")
        return process


def _discard(forked: asyncio.Future[Process]) -> None:
    if forked.exception() is None:  # the server's ends are closed, so the process ends by itself
        forked.result().close()


def _socketpair(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    our_end, their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.callback(our_end.close)
    theirs.callback(their_end.close)
    for end in (our_end, their_end):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    our_end.setblocking(False)
    return our_end, their_end
