"""The console in a real browser: a page that is signed in, what stands in it, and what went wrong in it."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import Browser, Dialog, Locator, Page, Request, async_playwright, expect

from support.http import Api

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""The browser of the system: none is fetched."""
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")

DESKTOP = {"width": 1280, "height": 1000}
PHONE = {"width": 375, "height": 812}

LIMIT_MS = 30_000
"""Nothing here takes this long; it is there so that a bug fails a test and does not hang it."""

expect.set_options(timeout=LIMIT_MS)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start the browser, without a sandbox: who runs tests in a container is often root."""
    async with async_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"]
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


@dataclass(slots=True)
class Console:
    """One page of the console.

    Attributes:
        page: Playwright's.
        url: the server's.
        mistakes: what the page's scripts and its policy complained about.
        urls: of all that it asked for.
    """

    page: Page
    url: str
    mistakes: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, browser: Browser, url: str, size: dict[str, int] = DESKTOP
    ) -> AsyncIterator["Console"]:
        """Open it in a profile of its own; in the end, nothing must have gone wrong in it."""
        context = await browser.new_context(viewport={"width": size["width"], "height": size["height"]})
        context.set_default_timeout(LIMIT_MS)
        console = cls(await context.new_page(), url)
        console._listen()
        await console.page.goto(url)
        try:
            yield console
        finally:
            await context.close()
        assert not console.mistakes

    def _listen(self) -> None:
        def said(text: str, kind: str) -> None:
            # A browser reports each answer that is an error, and each that did not come.
            if kind in {"error", "warning"} and not text.startswith("Failed to load resource"):
                self.mistakes.append(text)

        def asked(request: Request) -> None:
            self.urls.append(request.url)

        async def opened(dialog: Dialog) -> None:
            self.mistakes.append(f"a dialog of the browser: {dialog.message}")
            await dialog.dismiss()

        self.page.on("console", lambda message: said(message.text, message.type))
        self.page.on("pageerror", lambda error: self.mistakes.append(str(error)))
        self.page.on("dialog", opened)
        self.page.on("request", asked)

    async def sign_in(self, token: str, *, says: str = "Live") -> None:
        """Sign in as a person does, and wait until all is there."""
        await self.page.get_by_label("Token").fill(token)
        await self.page.get_by_role("button", name="Sign in").click()
        await expect(self.connection).to_have_text(says)
        await expect(self.page.locator("#memory-text")).not_to_be_empty()

    @property
    def connection(self) -> Locator:
        """What the page says of its connection."""
        return self.page.locator("#connection")

    @property
    def attention(self) -> Locator:
        """What the page says needs somebody."""
        return self.page.locator("#attention-list > li")

    def row(self, model_id: str) -> Locator:
        """A model's row."""
        return self.page.locator("#models-rows > tr", has=self.page.get_by_text(model_id, exact=True))

    async def see(self, model_id: str, state: str) -> None:
        """Wait until a model is seen in a state."""
        await expect(self.row(model_id).locator(".pill")).to_have_text(state)

    async def press(self, model_id: str, name: str) -> None:
        """Press a button of a model's row."""
        await self.row(model_id).get_by_role("button", name=re.compile(rf"^{name}\b")).click()

    async def choose(self, button: str) -> None:
        """Press a button of the dialog that is open."""
        await self.page.locator("dialog[open]").get_by_role("button", name=button, exact=True).click()

    async def serious(self, part: str | None = None, *rules: str) -> list[str]:
        """Return what axe-core holds to be wrong and serious, or worse, in the page or a part of it.

        Args:
            part: of the page, by its selector.
            rules: axe's; all, if left out.
        """
        options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
        results = await Axe().run(self.page, part, options)
        return [
            f"{found['id']}: {[node['target'] for node in found['nodes']]}"
            for found in results.response["violations"]
            if found["impact"] in {"serious", "critical"}
        ]


def tokens_in(console: Console, api: Api, *roles: str) -> list[str]:
    """Return the URLs that a page asked for that have the token in them, or a part that could be one."""
    signature = api.token(*roles).rpartition(".")[2]
    return [url for url in console.urls if signature in url or "eyJ" in url]
