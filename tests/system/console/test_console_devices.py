"""Devices in the console: what there is, a load on one, and where a model runs."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import expect
from support import models
from support.browser import Console, needs_browser
from support.openvino import DEVICE, openvino_environment
from support.servers import Server, serving

from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server with OpenVINO's plugin, and a budget for its device."""
    root = tmp_path_factory.mktemp("devices")
    models.save(models.weights(4), root / "repository", "ranker")
    config = Config(repository=root / "repository", data=root / "data")
    environment = openvino_environment(root)
    async with serving(config, f"--device-memory={DEVICE}=2GB", environment=environment) as running:
        yield running


async def test_model_loads_on_the_chosen_device(admin: Console) -> None:
    page = admin.page
    await expect(page.locator("#devices")).to_contain_text(f"{DEVICE} (")
    await expect(page.locator("#devices")).to_contain_text("budget 2.0 GB; 0 models")
    await admin.press("ranker", "Load")
    await page.locator("#load-device").select_option(DEVICE)
    await page.locator("#load-fallback").select_option("refuse")
    assert await admin.serious("dialog[open]") == []
    await admin.choose("Load")
    await admin.see("ranker", "loaded")
    await expect(page.locator("#devices")).to_contain_text("; 1 model")
    await admin.go("#/models/ranker")
    await expect(page.locator(".page")).to_contain_text(f"8 nodes of its graph on {DEVICE} (openvino ")
    assert await admin.serious(".facts") == []
