"""`/docs` as a browser shows it, under the page's own policy and without a network."""

from functools import partial
from pathlib import Path

from playwright.async_api import expect
from pytest_aiohttp import AiohttpServer
from support.browser import chromium, needs_browser
from support.smallapp import small_app, small_config

from server.app import all_routes
from server.appkeys import OPENAPI
from server.health import show_openapi
from server.openapi import openapi_yaml
from server.pages import docs_routes
from server.routes import Access, LimitClass, Route


@needs_browser
async def test_the_page_shows_every_route(aiohttp_server: AiohttpServer, tmp_path: Path) -> None:
    document = Route("GET", "/openapi.yaml", show_openapi, Access.PUBLIC, LimitClass.NONE)
    app = small_app([*docs_routes(), document], small_config(tmp_path / "data"))
    app[OPENAPI] = partial(openapi_yaml, all_routes())
    server = await aiohttp_server(app)
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(str(server.make_url("/docs")))
        for path in {route.path for route in all_routes()}:
            await expect(page.locator(f'[data-path="{path}"]').first).to_be_visible()
