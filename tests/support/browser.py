"""The console in a real browser: sign in, find rows, press buttons, collect errors."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import (
    Browser,
    BrowserContext,
    Dialog,
    Locator,
    Page,
    Request,
    ViewportSize,
    async_playwright,
    expect,
)

from support.http import Api

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""The browser of the system; none is downloaded."""
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")

DESKTOP = ViewportSize(width=1280, height=1000)
TABLET = ViewportSize(width=820, height=1100)
PHONE = ViewportSize(width=375, height=812)
BLANK = "about:blank"
TOO_WIDE = """() => {
  const parts = [...document.querySelectorAll("dialog[open] *")];
  const isOut = (each) => each.getBoundingClientRect().right > innerWidth;
  return parts.some(isOut) || document.documentElement.scrollWidth > innerWidth;
}"""
"""Whether a part of the page, or of a dialog, is out of the window."""
FORGET = """async () => {
  (await import("/console/ui.js")).notices.value = [];
  dispatchEvent(new Event("online")); // a lost connection is tried again at once
}"""
"""Has a page show no results of requests any more, and wait for nothing."""

GO = """(address) => new Promise((done) => {
  if (location.hash === address) return done();
  addEventListener("hashchange", () => done(), { once: true });
  location.hash = address;
})"""
"""Changes the address, and waits until its page is there: until then, the heading of the page before may have
the focus."""

LIMIT_MS = 30_000
"""Nothing takes this long; a bug fails a test instead of hanging it."""

expect.set_options(timeout=LIMIT_MS)


@asynccontextmanager
async def launched() -> AsyncIterator[Browser]:
    """Start the browser, without a sandbox, which root in a container cannot have."""
    async with async_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"]
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def new_profile(browser: Browser) -> AsyncIterator[BrowserContext]:
    """Return a profile of the browser, without pages."""
    async with await browser.new_context(timezone_id="UTC") as context:
        context.set_default_timeout(LIMIT_MS)
        yield context


@asynccontextmanager
async def chromium() -> AsyncIterator[BrowserContext]:
    """Start the browser; return a profile of it."""
    async with launched() as browser, new_profile(browser) as context:
        yield context


@dataclass(slots=True)
class Console:
    """One page of the console.

    Attributes:
        page: Playwright's.
        url: the server's.
        mistakes: errors of the page's scripts and its policy.
        urls: of all requests.
    """

    page: Page
    url: str
    mistakes: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def opened(cls, browser: BrowserContext, url: str) -> AsyncIterator["Console"]:
        """Open the console in a page with a session of its own; in the end, there are no errors.

        It is a page that an earlier console has left, if there is one: a new one costs a second of computing.
        """
        left = [page for page in browser.pages if page.url == BLANK]
        console = cls(left[0] if left else await browser.new_page(), url)
        async with console._used(BLANK, "sessionStorage.clear()"):
            await console.page.set_viewport_size(DESKTOP)
            await console.page.goto(url)
            yield console

    @classmethod
    @asynccontextmanager
    async def kept(
        cls, browser: BrowserContext, api: Api, *roles: str, subject: str = "alice"
    ) -> AsyncIterator["Console"]:
        """Lend the console of somebody who stays signed in; in the end, there are no errors.

        Its page is kept for the next test, as good as new: one more costs a second of computing.
        """
        away = f"{api.url}/#/jobs?left={'.'.join((subject, *roles))}"
        left = [page for page in browser.pages if page.url == away]
        console = cls(left[0] if left else await browser.new_page(), api.url)
        async with console._used(away, FORGET):
            await console.page.set_viewport_size(DESKTOP)
            if left:
                await console.go("#/")
                await expect(console.connection).to_have_text("Live")
            else:
                await console.page.goto(api.url)
                await console.sign_in(api.token(*roles, subject=subject))
            yield console

    @asynccontextmanager
    async def _used(self, away: str, forget: str) -> AsyncIterator[None]:
        """Listen to the page; leave it as it was, at another address, or closed where something failed."""
        listeners = self._listen()
        try:
            yield
            await self.page.unroute_all(behavior="ignoreErrors")
            await self.page.evaluate(forget)
            await self.page.emulate_media(color_scheme="null", reduced_motion="null")
            await self.page.goto(away)
        except BaseException:
            await self.page.close()
            raise
        for event, listener in listeners.items():
            self.page.remove_listener(event, listener)
        assert not self.mistakes, self.mistakes

    def _listen(self) -> dict[Any, Callable[..., Any]]:
        """Listen to the page; return the listener of each event."""

        def said(text: str, kind: str) -> None:
            # A browser reports each answer that is an error, and each that did not come.
            if kind in {"error", "warning"} and not text.startswith("Failed to load resource"):
                self.mistakes.append(text)

        def asked(request: Request) -> None:
            self.urls.append(request.url)

        async def opened(dialog: Dialog) -> None:
            self.mistakes.append(f"a dialog of the browser: {dialog.message}")
            await dialog.dismiss()

        listeners: dict[Any, Callable[..., Any]] = {
            "console": lambda message: said(message.text, message.type),
            "pageerror": lambda error: self.mistakes.append(str(error)),
            "dialog": opened,
            "request": asked,
        }
        for event, listener in listeners.items():
            self.page.on(event, listener)
        return listeners

    async def sign_in(self, token: str, *, says: str = "Live") -> None:
        """Sign in, and wait until everything is shown."""
        await self.page.get_by_label("Token").fill(token)
        await self.page.get_by_role("button", name="Sign in").click()
        await expect(self.connection).to_have_text(says)
        await expect(self.page.locator(".page")).to_be_visible()

    async def go(self, address: str) -> None:
        """Change the address, such as `#/jobs`, and wait until its page has the focus."""
        await self.page.evaluate(GO, address)
        await expect(self.page.locator("main h2").first).to_be_focused()

    @property
    def connection(self) -> Locator:
        """The state of the connection."""
        return self.page.locator("#connection")

    @property
    def attention(self) -> Locator:
        """The list of what needs attention."""
        return self.page.locator("#attention-list > li")

    def row(self, model_id: str) -> Locator:
        """A model's row."""
        return self.page.locator("#models-rows > tr", has=self.page.get_by_text(model_id, exact=True))

    async def see(self, model_id: str, state: str) -> None:
        """Wait until a model is shown in a state."""
        await expect(self.row(model_id).locator(".pill")).to_have_text(state)

    async def press(self, model_id: str, name: str) -> None:
        """Press a button of a model's row."""
        await self.row(model_id).get_by_role("button", name=re.compile(rf"^{name}\b")).click()

    async def choose(self, button: str) -> None:
        """Press a button of the open dialog."""
        await self.page.locator("dialog[open]").get_by_role("button", name=button, exact=True).click()

    async def fits(self) -> None:
        """Wait until the page and a dialog are no wider than the window: charts follow it a moment later."""
        async with asyncio.timeout(LIMIT_MS / 1000):
            while await self.page.evaluate(TOO_WIDE):
                await self.page.wait_for_timeout(50)

    async def check_accessibility(self, part: str | None = None) -> None:
        """Check that there are no serious findings in the page or a part of it, in each colour scheme."""
        await self.page.emulate_media(color_scheme="light", reduced_motion="reduce")
        assert await self.serious(part) == []
        await self.page.emulate_media(color_scheme="dark")
        assert await self.serious(part, "color-contrast") == []  # the rest is the same

    async def serious(self, part: str | None = None, *rules: str) -> list[str]:
        """Return the serious and critical findings of axe-core in the page or a part of it.

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
    """Return the requested URLs that contain the token, or something like one."""
    signature = api.token(*roles).rpartition(".")[2]
    return [url for url in console.urls if signature in url or "eyJ" in url]
