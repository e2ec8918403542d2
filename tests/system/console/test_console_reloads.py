"""The console in a real browser: what it says when more models are in use than fit."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import expect
from support import models
from support.browser import Console, needs_browser
from support.http import ONE
from support.servers import Server, serving

from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="session")]

NAMES = [f"m{number:02}" for number in range(12)]
ROOM = ("--max-loaded=8", "--evict=idle", "--on-demand=on", "--min-residency-s=0")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server with room for eight of its twelve models."""
    root: Path = tmp_path_factory.mktemp("reloads")
    for name in NAMES:
        models.save(models.add(), root / "repository", name)
    async with serving(Config(repository=root / "repository", data=root / "data"), *ROOM) as running:
        yield running


async def test_models_that_do_not_fit_need_attention(server: Server, admin: Console) -> None:
    entry = admin.attention.filter(has_text="The models in use do not fit")
    for name in NAMES:
        assert (await server.api.infer(name, ONE)).status == 200
    await admin.see(NAMES[-1], "loaded")
    await expect(entry).to_have_count(0)  # nothing was loaded again
    for name in 2 * NAMES:
        assert (await server.api.infer(name, ONE)).status == 200
    counted = r"\d+ reloads in the last hour after evictions: inferences spent \d+ % of their time waiting"
    await expect(entry).to_contain_text(re.compile(counted))
    await expect(entry).to_contain_text(
        "Raise --max-loaded (8), pin the models that must answer fast, or add a node."
    )
    await entry.get_by_role("button", name="Acknowledge").click()
    await expect(entry).to_have_count(0)
