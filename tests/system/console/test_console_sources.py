"""The console in a real browser: a version from a source, from its name to its files."""

import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import expect
from support.browser import PHONE, Console, needs_browser
from support.origins import Site, serving_site
from support.servers import Server, serving
from support.sources import NAMED, RESOLVED, SHA256, SLOW, SLOW_SHA256, environment_of, reply

from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[Site]:
    """A site with models."""
    async with serving_site(reply) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(site: Site, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server that may fetch from the site."""
    root = tmp_path_factory.mktemp("sources")
    (root / "repository").mkdir()
    config = Config(repository=root / "repository", data=root / "data")
    async with serving(config, environment=environment_of(site, root)) as running:
        yield running


async def ask_for(console: Console, source: str, digest: str) -> None:
    """Fill in the dialog for a source, and send it."""
    await console.page.get_by_role("button", name="Add a version…").click()
    await console.page.get_by_role("button", name="Source", exact=True).click()
    await console.page.get_by_label("Source", exact=True).fill(source)
    await console.page.get_by_label("SHA-256, if you know it").fill(digest)
    await console.choose("Add")


async def test_fetch_shows_its_bytes_and_is_cancelled(admin: Console) -> None:
    page, dialog = admin.page, admin.page.locator("dialog[open]")
    await ask_for(admin, SLOW, "abc")
    await expect(dialog.locator(".refusal")).to_have_text("A SHA-256 has 64 hexadecimal digits.")
    await expect(page.locator("#upload-model")).to_have_value("repo")
    assert await admin.serious("dialog[open]") == []
    await page.get_by_label("SHA-256, if you know it").fill(f"sha256:{SLOW_SHA256.upper()}")
    await page.locator("#upload-model").fill("slow")
    await admin.choose("Add")
    await expect(page.locator("#notices")).to_contain_text("Add of slow 1 is accepted")
    await admin.go("#/jobs")
    job = page.locator(".jobs .job")
    await expect(job.locator(".name")).to_have_text("Add slow 1")
    await expect(job.locator(".steps [aria-current]")).to_have_text("fetching")
    await expect(job.locator(".figures")).to_have_text("2.0 MB of 4.0 MB")
    await expect(job.get_by_role("progressbar")).to_have_attribute("value", re.compile("^0.(5|49)"))
    await expect(job).to_contain_text(f"from {SLOW}")
    assert await admin.serious() == []
    await page.set_viewport_size(PHONE)
    await admin.fits()
    await job.get_by_role("button", name="Cancel").click()
    ended = page.locator(".ended-jobs .job", has_text="Add slow 1")
    await expect(ended.locator(".pill")).to_have_text("cancelled")
    await expect(ended.get_by_role("progressbar")).to_have_count(0)


async def test_fetched_version_shows_where_it_came_from(admin: Console) -> None:
    await ask_for(admin, NAMED, "")
    await expect(admin.page.locator("#notices")).to_contain_text("Add of repo 1 completed")
    await expect(admin.row("repo")).to_be_visible()
    await admin.go("#/models/repo")
    version = admin.page.locator(".its-versions tbody > tr")
    await expect(version).to_contain_text(SHA256)
    await expect(version).to_contain_text(f"From {RESOLVED} (asked as {NAMED}), added by alice at ")
    await expect(version.get_by_role("link")).to_have_count(0)
    await expect(admin.page.locator(".its-jobs .name")).to_have_text("Add repo 1")
    assert await admin.serious() == []
    await admin.page.set_viewport_size(PHONE)
    await admin.fits()


@pytest.mark.parametrize(
    ("source", "model_id", "reason"),
    [
        (
            "hf://other/net@v1/onnx/a.onnx",
            "net",
            "its operator allows sources with --sources, here hf://other",
        ),
        ("oci://ghcr.io/org/net:v1", "net", "here oci://ghcr.io"),
        ("https://host/nets/net.onnx", "net", "here https://host"),
    ],
)
async def test_refused_source_is_said_in_the_dialog(
    admin: Console, source: str, model_id: str, reason: str
) -> None:
    await ask_for(admin, source, "")
    await expect(admin.page.locator("dialog[open] .refusal")).to_contain_text(reason)
    await expect(admin.page.locator("#upload-model")).to_have_value(model_id)
