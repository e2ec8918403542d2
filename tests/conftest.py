"""The real application over a new repository and a new ledger, behind pytest-aiohttp's client."""

import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp.test_utils import TestServer
from pytest_aiohttp import AiohttpClient
from support.http import Client, LocalApi

from server.app import create_app
from server.auth.keys import ensure_data_dir
from server.config import Config
from server.v2.shortcut import shorten

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
def start(aiohttp_client: AiohttpClient, repository: Path, tmp_path: Path) -> Start:
    """Start the application with these settings; it is stopped after the test.

    Nothing is prepared in the background, unless a test asks for it.
    """

    async def started(**settings: Any) -> LocalApi:
        config = Config(repository=repository, data=tmp_path / "data", **{"prepare": "off", **settings})
        ensure_data_dir(config.data)
        app = create_app(config)
        server = TestServer(app)
        await server.start_server(auto_decompress=False)  # as `serve` has it
        assert server.runner is not None
        shorten(server.runner, app)
        return LocalApi(cast("Client", await aiohttp_client(server)), config)

    return started


@pytest.fixture
async def api(start: Start) -> LocalApi:
    """The application with default settings."""
    return await start()
