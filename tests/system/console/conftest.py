"""A browser for the tests of this folder, and the console of an admin for each."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext
from support.browser import Console, launched, new_profile
from support.servers import Server

RUNNING = pytest.StashKey[tuple[Browser, AsyncExitStack]]()
"""The browser, and what ends it."""
GOES_ON = pytest.StashKey[bool]()
"""Whether the next test is one of this folder."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Say whether the browser is still needed: it ends before tests of other folders count processes."""
    item.config.stash[GOES_ON] = nextitem is not None and nextitem.path.parent == item.path.parent
    try:
        yield
    finally:
        item.config.stash[GOES_ON] = False


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser(pytestconfig: pytest.Config) -> AsyncIterator[BrowserContext]:
    """A profile for the tests of a module: to start a browser for each costs five seconds of computing."""
    stash = pytestconfig.stash
    if RUNNING not in stash:
        ending = AsyncExitStack()
        stash[RUNNING] = await ending.enter_async_context(launched()), ending
    running, ending = stash[RUNNING]
    try:
        async with new_profile(running) as profile:
            yield profile
    finally:
        if not stash.get(GOES_ON, False):
            del stash[RUNNING]
            await ending.aclose()


@pytest_asyncio.fixture(loop_scope="session")
async def admin(server: Server, browser: BrowserContext) -> AsyncIterator[Console]:
    """An admin's console of the module's server, as good as new for each test."""
    async with Console.kept(browser, server.api, "admin") as console:
        yield console
