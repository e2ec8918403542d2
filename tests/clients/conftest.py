"""One server process for the clients of other projects and ours, and Triton's clients on it."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import tritonclient.http as triton
from support.clientmodels import serving_client_models
from support.clients import Blocked
from support.process import Server
from support.standing import address
from tritonclient.http import aio as triton_aio


@pytest.fixture(scope="session")
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, resources: ExitStack) -> Server:
    return resources.enter_context(serving_client_models(tmp_path_factory.mktemp("clients")))


@pytest.fixture(scope="session")
def runner(resources: ExitStack) -> asyncio.Runner:
    return resources.enter_context(asyncio.Runner())


@pytest.fixture(scope="session")
def triton_clients(server: Server, runner: asyncio.Runner, resources: ExitStack) -> dict[str, Any]:
    async def open_aio() -> Any:
        return triton_aio.InferenceServerClient(address(server))

    sync = resources.enter_context(triton.InferenceServerClient(address(server), concurrency=4))
    for_loops = runner.run(open_aio())
    resources.callback(lambda: runner.run(for_loops.close()))
    return {"sync": sync, "aio": Blocked(for_loops, runner)}
