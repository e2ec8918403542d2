"""The real application over a new repository and a new ledger."""

import ctypes
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import chain, groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace
from onnx import ModelProto
from support import leaks, models
from support.http import LocalApi, local_server
from support.nvml import build_nvml
from support.postgres import Database, PostgresServer, end_shared_server, join_shared_server
from support.replicas import make_ledger
from support.running import end_workers
from support.servers import NO_AUTHORITIES
from support.shims import Shim
from support.workers import Serve, order_of, running_pool, until

from features.devices import found as devices
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker
from server.config import Config

LONG = ("tests/system/", "tests/conformance/", "tests/clients/", "tests/hostile/")
MAX_ID = 100
Start = Callable[..., Awaitable[LocalApi]]


def pytest_configure() -> None:
    """Restore SIGINT for the processes that tests start: a shell ignores it for background jobs.

    They have none of this machine's authorities.
    """
    os.environ.update(NO_AUTHORITIES)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the run's PostgreSQL server, and fail the run for what it leaves, once its other processes end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    end_shared_server()
    for left in leaks.find_leaks():
        report = pytest.TestReport("the whole run", ("", None, ""), {}, "failed", f"left {left}", "teardown")
        session.config.hook.pytest_runtest_logreport(report=report)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    """End the run's PostgreSQL server, in the process that controls the others, also after an interrupt."""
    end_shared_server()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a case with a long value after its argument: new keys, say, have other values in each process."""
    return argname if isinstance(val, str | bytes) and len(val) > MAX_ID else None


def pytest_xdist_auto_num_workers() -> int:
    """Run four processes on two cores: half of the time, a test waits for a server, worker or browser."""
    return len(os.sched_getaffinity(0)) * 2


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model repository, still empty."""
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    """The stand-in for the driver's library, in this process, which loads it once."""
    shim = build_nvml(tmp_path_factory.mktemp("nvml"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shim.variables.items():
            patch.setenv(name, value)
        ctypes.CDLL(str(shim.library), ctypes.RTLD_GLOBAL)
    devices._open_nvml.cache_clear()  # other tests may have looked for it
    return shim


@pytest.fixture
def config(repository: Path, tmp_path: Path) -> Config:
    """A configuration over the repository and a data directory that is not there yet."""
    return Config(repository=repository, data=tmp_path / "data", visible_devices="none")


@pytest.fixture
async def start(repository: Path, tmp_path: Path) -> AsyncIterator[Start]:  # noqa: ARG001 - it exists
    """Start the application with these settings; it is stopped after the test."""
    async with AsyncExitStack() as servers:

        async def started(**settings: Any) -> LocalApi:
            return await servers.enter_async_context(local_server(tmp_path, **settings))

        yield started


@pytest.fixture
async def api(start: Start) -> LocalApi:
    """The application with default settings."""
    return await start()


@pytest.fixture
async def postgres() -> PostgresServer:
    """The PostgreSQL server of this test run, for all its processes; no test stops it."""
    return await join_shared_server()


@pytest.fixture
async def database(postgres: PostgresServer) -> AsyncIterator[Database]:
    """An empty database in PostgreSQL, of the role `ledger_owner`."""
    async with postgres.database() as made:
        yield made


@pytest.fixture
async def ledger(postgres: PostgresServer) -> AsyncIterator[Database]:
    """An empty ledger in PostgreSQL."""
    async with postgres.database(make_ledger) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application for those tests of a module that do not disturb each other."""
    async with local_server(tmp_path_factory.mktemp("shared")) as api:
        yield api


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_pool() -> AsyncIterator[WorkerPool]:
    """One pool of workers for a module's tests."""
    async with running_pool() as pool:
        yield pool


@pytest_asyncio.fixture(loop_scope="module")
async def pool(shared_pool: WorkerPool) -> AsyncIterator[WorkerPool]:
    """The module's pool; the workers that a test leaves are killed after it."""
    yield shared_pool
    await end_workers(shared_pool)
    await until(lambda: not shared_pool._workers)


@pytest_asyncio.fixture(loop_scope="module")
async def serve(pool: WorkerPool, tmp_path: Path) -> Serve:
    """A function that starts a worker and loads a model into it."""

    async def started(model: ModelProto | bytes, model_id: str = "m", **changes: Any) -> Worker:
        data = model if isinstance(model, bytes) else model.SerializeToString()
        models.save_bytes(data, tmp_path, model_id)
        worker = await pool.start(model_id)
        await worker.load(replace(order_of(tmp_path, model_id), **changes), lambda _: None)
        return worker

    return started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long tests first in each process, and run tests that share an application on its loop."""
    items[:] = order_tests(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    for item in items:
        if {"shared", "shared_pool"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


def order_tests(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Return the tests in the order in which pytest-xdist cuts them into one queue for each process.

    A test of the folders in `LONG` takes 2 s in the mean, another one 0.1 s. Each queue begins with whole
    modules of long tests, which so share their browsers and servers, and idle processes steal from its end:
    a long test that starts late would keep one process busy while the others are done.
    """
    queues: list[list[pytest.Item]] = [[] for _ in range(processes)]
    modules = groupby((item for item in items if item.nodeid.startswith(LONG)), attrgetter("path"))
    for number, (_, tests) in enumerate(modules):
        queues[number % processes] += tests
    short = (item for item in items if not item.nodeid.startswith(LONG))
    for number, queue in enumerate(queues):
        size = (len(items) + number) // processes  # as pytest-xdist has it
        queue.extend(islice(short, max(0, size - len(queue))))
    return [*chain.from_iterable(queues), *short]
