"""Makes workers, and keeps a fork server running to make them from.

Waiting for what has to come to its end, whatever becomes of the task that waits for it.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from runtime.errors import ForkServerUnavailable
from runtime.process.forkclient import Child, ForkServer, close_watched
from runtime.process.worker import Worker

T = TypeVar("T")


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Wait until this has ended, also if the waiting task is cancelled; only then is it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # seen: who cancels does not ask
        raise cancelled
    return task.result()


def begun(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Begin what somebody will probably wait for; if nobody does, its problem is nobody's."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def ended(worker: Worker) -> None:
    """End a worker, and wait until it is gone."""
    worker.kill()
    await whole(asyncio.wait({worker.ended}))


LAUNCH_LIMIT_S = 10.0
"""For a new fork server to import everything; it takes 0.2 s."""
FORK_LIMIT_S = 5.0
"""For a fork, which takes 4 ms. A fork server that does not answer is killed, and its workers with it."""
RETRY_S = (0.1, 5.0)
"""Between launches when the fork server does not come up: the first pause, doubling to the last."""
BUFFER_BYTES = 2**20
"""Of a channel's socket, as far as the kernel allows: fewer turns for a tensor of some 100 KB."""
KEPT_S = 1.0
"""How long a worker waits to be taken. From a look at a load's files to its start it is some milliseconds;
a load that has to wait for longer has its worker forked when it starts."""
_UNTAKEN = "spare"


class WorkerPool:
    """The workers of one server, all forked from one fork server, which is replaced when it ends.

    Args:
        threads: how many threads each worker computes with.
        patience_s: how long an inference that was told to stop may go on, before its worker is killed.
        warm_up: whether models run once before they are loaded, where their loadledger.toml does not say.
        huge_pages: whether workers have huge pages where they were measured to be better.
    """

    def __init__(
        self, *, threads: int = 1, patience_s: float = 5.0, warm_up: bool = True, huge_pages: bool = True
    ) -> None:
        self.threads = threads
        self.warm_up = warm_up
        self.huge_pages = huge_pages
        self._patience_s = patience_s
        self._fork_server: ForkServer | None = None
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._workers: set[Worker] = set()
        self._spare = Spare(self._fork_one)
        self._closed = False

    @property
    def healthy(self) -> bool:
        """Whether the fork server is up."""
        return self._up.is_set()

    @property
    def keeper(self) -> asyncio.Task[None]:
        """What replaces the fork server, once the pool is open; that it ends before `close` is a defect."""
        assert self._keeper is not None, "the pool is not open"
        return self._keeper

    async def open(self) -> None:
        """Start the fork server and wait until it has imported everything.

        The thread that runs this must live as long as the pool: the kernel ends the fork server with it.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`.
        """
        fork_server = await self._launch()
        self._keeper = asyncio.create_task(self._keep(fork_server), name="fork server")

    def expect(self) -> None:
        """Have a worker forked ahead, since somebody will probably `start` one in a moment."""
        if self.healthy and not self._closed:
            self._spare.expect()

    async def start(self, worker_id: str) -> Worker:
        """Give a worker: one that was forked ahead, else a new one.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`, with the reason; a new one is being started.
        """
        return await self._spare.take(worker_id) or await self._fork_one(worker_id)

    async def _fork_one(self, worker_id: str) -> Worker:
        fork_server = await self._available()
        try:
            worker, data, control = await self._fork(fork_server, worker_id)
            self._workers.add(worker)
            worker.ended.add_done_callback(lambda _: self._workers.discard(worker))
            try:
                await worker.connect(data, control)
            except BaseException:
                await ended(worker)  # whoever gives up gives back what it reserved for it
                raise
        except OSError as error:
            raise ForkServerUnavailable(f"cannot start a worker: {error.strerror}") from None
        return worker

    async def close(self) -> None:
        """Kill what is left and wait until it is gone; the pool cannot be opened again."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        await self._spare.close()
        workers = list(self._workers)
        for worker in workers:
            worker.kill()
        if workers:
            await asyncio.wait({worker.ended for worker in workers})
        if self._fork_server is not None:  # last, for it is who reaps them
            self._fork_server.kill()
            await asyncio.shield(self._fork_server.ended)

    async def _fork(
        self, fork_server: ForkServer, worker_id: str
    ) -> tuple[Worker, socket.socket, socket.socket]:
        """Make a worker: gives it with this side's ends of its data and control channels."""
        with contextlib.ExitStack() as ours:
            with contextlib.ExitStack() as theirs:
                data, data_end = _socketpair(ours, theirs)
                control, control_end = _socketpair(ours, theirs)
                read, write = os.pipe2(os.O_CLOEXEC)
                ours.callback(close_watched, read)
                theirs.callback(os.close, write)
                asked = fork_server.fork((data_end.fileno(), control_end.fileno(), write))
            child = await self._answer(fork_server, asked)
            ours.callback(close_watched, child.pidfd)
            worker = Worker(worker_id, child, read, self._patience_s)
            ours.pop_all()
        return worker, data, control

    async def _launch(self) -> ForkServer:
        fork_server = self._fork_server = ForkServer.launch(os.environ)
        fork_server.ended.add_done_callback(lambda _: self._up.clear())
        try:
            async with asyncio.timeout(LAUNCH_LIMIT_S):
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
                pause_s = min(max(RETRY_S[0], 2 * pause_s), RETRY_S[1])

    async def _available(self) -> ForkServer:
        if self._fork_server is None or self._closed:
            raise ForkServerUnavailable("the pool is closed")
        try:
            async with asyncio.timeout(LAUNCH_LIMIT_S):
                await self._up.wait()
        except TimeoutError:
            raise ForkServerUnavailable from None
        return self._fork_server

    async def _answer(self, fork_server: ForkServer, asked: asyncio.Future[Child]) -> Child:
        """Wait for the fork server's answer; whoever is not there to take a child leaves it to be killed."""
        try:
            async with asyncio.timeout(FORK_LIMIT_S):
                child = await asyncio.shield(asked)
        except TimeoutError:
            fork_server.kill()
            asked.add_done_callback(_discard)
            raise ForkServerUnavailable("the fork server did not answer and is replaced") from None
        except asyncio.CancelledError:
            asked.add_done_callback(_discard)
            raise
        if self._closed:
            _discard(asked)
            raise ForkServerUnavailable("the pool is closed")
        return child


def _discard(asked: asyncio.Future[Child]) -> None:
    if asked.exception() is None:  # its channels are closed at this end, so it ends by itself
        os.close(asked.result().pidfd)


def _socketpair(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    """Make a channel; its ends are closed with the two stacks."""
    our_end, their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.callback(our_end.close)
    theirs.callback(their_end.close)
    for end in (our_end, their_end):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    our_end.setblocking(False)
    return our_end, their_end


class Spare:
    """At most one pre-forked worker: while a load is decided on and recorded, what it will run in comes up.

    Args:
        fork: makes a worker of this name.
    """

    def __init__(self, fork: Callable[[str], Coroutine[Any, Any, Worker]]) -> None:
        self._fork = fork
        self._coming: asyncio.Task[Worker] | None = None
        self._tasks: set[asyncio.Task[Worker]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def expect(self) -> None:
        """Begin to fork one, if there is none; nobody is told if that fails."""
        if self._coming is None:
            self._coming = task = begun(self._fork(_UNTAKEN), "forking ahead")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._timer = asyncio.get_running_loop().call_later(KEPT_S, self.drop)

    async def take(self, worker_id: str) -> Worker | None:
        """Give it this name, and hand it over; None if there is none, or it is of no use any more."""
        task = self._let_go()
        if task is None:
            return None
        try:
            worker = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_kill)
            raise
        except (ForkServerUnavailable, OSError):
            return None
        if worker.dying or worker.ended.done():
            return None
        worker.worker_id = worker_id
        return worker

    def drop(self) -> None:
        """End it: nobody has come for it."""
        task = self._let_go()
        if task is not None:
            task.add_done_callback(_kill)

    async def close(self) -> None:
        """End what is being forked, and wait until it has ended."""
        self.drop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _let_go(self) -> asyncio.Task[Worker] | None:
        task, self._coming = self._coming, None
        if self._timer is not None:
            self._timer.cancel()
        return task


def _kill(task: asyncio.Task[Worker]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().kill()
