"""The models of `support.running` for tests that start the runtime themselves."""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from support.running import Engine, Run, running, save_models

from runtime.process.pool import WorkerPool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the models of `save_models`, for `running`."""
    return save_models(tmp_path)


@pytest.fixture
def run(folder: Path, shared_pool: WorkerPool) -> Run:
    """A function that starts the runtime over `folder` with these settings."""
    return partial(running, folder, pool=shared_pool)


@pytest_asyncio.fixture(loop_scope="module")
async def engine(run: Run) -> AsyncIterator[Engine]:
    """The runtime without HTTP, over a new ledger and the models of `folder`."""
    async with run() as engine:
        yield engine
