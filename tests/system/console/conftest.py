"""A browser for the tests of a module, and a page of its console for each."""

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
    """An admin's console of the module's server, in a page of its own for each test."""
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin"))
        yield console
