"""Real worker processes for the tests, and how to wait for what becomes of them."""

import asyncio
import contextlib
import os
import resource
import select
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from msgspec.structs import replace

from features.devices.found import Devices
from runtime import memory
from runtime.errors import Exit, LoadRefused
from runtime.process import pool as pool_module
from runtime.process import worker as workers_module
from runtime.process.forkclient import ForkServer
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker, WorkerMemory
from runtime.repository import Repository
from runtime.wire import DATATYPES, Layer, Load, Loaded, Outcome, Tensor, WantedOutput
from runtime.worker.landlock import find_abi

T = TypeVar("T")

Serve = Callable[..., Awaitable[Worker]]
"""Start a worker and load a model, with changes of the order to load: the fixture `serve`."""

LIMIT_S = 120.0
"""Nothing here takes this long, on a busy machine either; so a bug fails a test and does not hang it."""
TAKE_ALL_MEMORY = """
import resource
resource.setrlimit(resource.RLIMIT_DATA, (0, 0))
taken = []
try:
    while True:
        taken.append(bytearray(8192))
except MemoryError:
    pass
"""
"""Part of a program: whatever takes memory next lacks it."""
LAYERS: tuple[Layer, ...] = ("landlock", "seccomp") if find_abi() else ("seccomp",)
"""What confines the workers of the tests, as on a server: what this kernel has."""
WORKER_DESCRIPTORS = ["/dev/null", "pipe", "pipe", "socket", "socket"]
FOR_EVER_S = 1000.0
"""The time that an inference gets where none is to run out."""


@asynccontextmanager
async def running_pool(*, threads: int = 1, visible_devices: Sequence[str] = ()) -> AsyncIterator[WorkerPool]:
    """Open a pool, and close it after; an inference that was told to stop has all the time it needs."""
    pool = WorkerPool(threads=threads, patience_s=LIMIT_S, targets=Devices(visible=visible_devices))
    with unhurried():
        await pool.open()
        try:
            await pool.confine("auto", Path(tempfile.gettempdir()))
            yield pool
        finally:
            await pool.close()


def fork_server_of(pool: WorkerPool) -> ForkServer:
    """Return the fork server that a pool has now."""
    assert pool._fork_server is not None
    return pool._fork_server


@contextmanager
def unhurried() -> Iterator[None]:
    """Have a process that gets no turn for some seconds be waited for.

    A fork server that is late would else be replaced, or could not say how a worker ended.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers_module, "EXIT_WAIT_S", LIMIT_S)
        patch.setattr(pool_module, "FORK_SERVER_LIMIT_S", LIMIT_S)
        patch.setattr(pool_module, "FORK_LIMIT_S", LIMIT_S)
        yield


def order_of(root: Path, model_id: str = "m", version: int | None = None, **changes: Any) -> Load:
    """Make the order to load a version of a model, the highest when none is named, with these changes."""
    repository = Repository(root)
    chosen = repository.find_version(model_id, version)
    folder = repository.folder_of(model_id, chosen)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    order = Load(str(root), str(folder), size, threads=1, layers=LAYERS, name=f"{model_id}/{chosen}")
    return replace(order, **changes)


async def load(
    pool: WorkerPool, order: Load, *given: Tensor, on_stage: Callable[[str], None] = lambda _: None
) -> tuple[Worker, Loaded]:
    """Load the model of an order into a new worker."""
    worker = await pool.start("w")
    return worker, await worker.load(order, on_stage, given)


def loaded_memory(worker: Worker) -> WorkerMemory:
    """Return what the server measured of a worker that has loaded."""
    assert worker.loaded_memory is not None
    return worker.loaded_memory


async def refusal(
    pool: WorkerPool,
    order: Load,
    *given: Tensor,
    on_stage: Callable[[str], None] = lambda _: None,
) -> LoadRefused:
    """Give an order that a worker refuses; the worker then ends by itself."""
    worker = await pool.start("w")
    with pytest.raises(LoadRefused) as refused:
        await worker.load(order, on_stage, given)
    assert await asyncio.shield(worker.ended) == Exit(0, None)
    return refused.value


async def asked_at_once(worker: Worker, *asked: Coroutine[Any, Any, T]) -> list[asyncio.Task[T]]:
    """Ask a worker all of this while it is stopped, so that it finds it waiting; in this order."""
    await freeze(worker.pid)
    tasks = [asyncio.ensure_future(each) for each in asked]
    await asyncio.sleep(0)
    resume(worker.pid)
    return tasks


async def ask_all(
    worker: Worker, inputs: Sequence[Tensor], *outputs: str, text: bool = False, level: int = 0
) -> tuple[Outcome, tuple[Tensor, ...]]:
    """Run the model of a worker, with all the time it needs; no outputs means all."""
    wanted = tuple(WantedOutput(name, text) for name in outputs)
    return await worker.infer(inputs, wanted, text=text, timeout_s=FOR_EVER_S, level=level)


async def ask(
    worker: Worker, inputs: Sequence[Tensor], *outputs: str, text: bool = False
) -> tuple[Tensor, ...]:
    """Run the model of a worker; returns the outputs."""
    return (await ask_all(worker, inputs, *outputs, text=text))[1]


async def answer(worker: Worker, *inputs: Tensor) -> Any:
    """Run the model of a worker; returns its first output as lists and numbers."""
    return array((await ask(worker, inputs))[0]).tolist()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a state of the world that nobody announces."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - there is no event for what happens in /proc
            await asyncio.sleep(0.002)


async def freeze(pid: int) -> None:
    """Stop a process, and wait until it has stopped: the signal alone only begins it."""
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: is_stopped(pid))


def is_stopped(pid: int) -> bool:
    """Tell whether all threads of a process are stopped; one that has ended is not."""
    try:
        return all(_fields(task)[0] == "T" for task in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False


def resume(pid: int) -> None:
    """Let a stopped process go on."""
    os.kill(pid, signal.SIGCONT)


def computing(pid: int) -> Callable[[], bool]:
    """Tell later whether a process has used more processor time than now."""
    before = _ticks(pid)
    return lambda: _ticks(pid) > before


def hang_measurement(folder: Path, patch: pytest.MonkeyPatch, pid: int, *others: int) -> Path:
    """Have the kernel not say what a process takes, but others; return the FIFO that stands for it."""
    process = folder / "proc" / str(pid)
    process.mkdir(parents=True)
    (process / "status").symlink_to(f"/proc/{pid}/status")
    for other in others:
        process.with_name(str(other)).symlink_to(f"/proc/{other}")
    os.mkfifo(process / "smaps_rollup")
    patch.setattr(memory, "PROC", process.parent)
    return process / "smaps_rollup"


def threads(pid: int) -> int:
    """Count a process's threads."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def descriptors(pid: int) -> list[str]:
    """Give what a process's open descriptors are: paths, or "pipe", "socket", "anon_inode"."""
    kinds = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            kinds.append(str(entry.readlink()).partition(":")[0])
    return sorted(kinds)


async def waits_for_its_order(pid: int) -> None:
    """Wait until a new worker waits for its first message; then it also ends with the fork server."""
    await until(lambda: descriptors(pid) == WORKER_DESCRIPTORS)


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open so many descriptors more, and no others, meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(held.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)


def hold(pids: Iterable[int]) -> list[int]:
    """Return pidfds of those of the processes that have not ended yet."""
    held = []
    for pid in pids:
        with suppress(ProcessLookupError):
            held.append(os.pidfd_open(pid))
    return held


def wait_gone(pidfds: list[int]) -> bool:
    """Wait until all these processes are gone, and close their pidfds; False if one is not in time."""
    try:
        return all(select.select([pidfd], [], [], LIMIT_S)[0] for pidfd in pidfds)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def floats(name: str, *values: float) -> Tensor:
    """Make a vector of FP32."""
    return tensor(name, "FP32", np.array(values, np.float32))


def tensor(name: str, datatype: str, values: Any) -> Tensor:
    """Make a tensor of an array, nested lists, or one number."""
    array = np.asarray(values, DATATYPES[datatype].numpy)
    return Tensor(name, datatype, array.shape, array.tobytes())


def array(value: Tensor) -> np.ndarray:
    """Read a tensor."""
    return np.frombuffer(value.data, DATATYPES[value.datatype].numpy).reshape(value.shape)


def trips(count: int) -> Tensor:
    """Make the input of `models.counting_loop`."""
    return tensor("trips", "INT64", np.array(count, np.int64))


def _ticks(pid: int) -> int:
    fields = _fields(Path(f"/proc/{pid}"))
    return int(fields[11]) + int(fields[12])  # utime and stime, proc_pid_stat(5)


def _fields(process: Path) -> list[str]:
    """Read the fields of a process or thread from the third, its state, on."""
    return (process / "stat").read_text().rpartition(")")[2].split()
