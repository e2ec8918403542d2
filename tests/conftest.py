"""The real application over a new repository and a new ledger."""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.http import LocalApi, local_server

Start = Callable[..., Awaitable[LocalApi]]


def pytest_configure() -> None:
    """Have an interrupt be one in all that tests start, though who runs in the background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model repository, still empty."""
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application for those tests of a module that do not disturb each other."""
    async with local_server(tmp_path_factory.mktemp("shared")) as api:
        yield api


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that share an application on the loop on which it runs."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)
