"""A browser for the tests of a module, and the console of an admin for each."""

from collections.abc import AsyncIterator

import pytest_asyncio
from playwright.async_api import BrowserContext
from support.browser import Console, chromium
from support.servers import Server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[BrowserContext]:
    """A browser."""
    async with chromium() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def admin(server: Server, browser: BrowserContext) -> AsyncIterator[Console]:
    """An admin's console of the module's server, as good as new for each test."""
    async with Console.kept(browser, server.api, "admin") as console:
        yield console
