"""`/docs` as a browser shows it, under the page's own policy and without a network."""

import asyncio
import shutil
from pathlib import Path

import pytest
from pytest_aiohttp import AiohttpServer
from support.smallapp import small_app, small_config

from server.app import all_routes
from server.appkeys import OPENAPI
from server.health import show_openapi
from server.openapi import openapi_yaml
from server.pages import docs_routes
from server.routes import Access, LimitClass, Route

LIMIT_S = 60
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")
async def test_the_page_shows_every_route(aiohttp_server: AiohttpServer, tmp_path: Path) -> None:
    assert BROWSER is not None
    document = Route("GET", "/openapi.yaml", show_openapi, Access.PUBLIC, LimitClass.NONE)
    app = small_app([*docs_routes(), document], small_config(tmp_path / "data"))
    app[OPENAPI] = openapi_yaml(all_routes())
    server = await aiohttp_server(app)
    page = await dom(BROWSER, str(server.make_url("/docs")), tmp_path / "profile")
    for route in all_routes():
        assert f'data-path="{route.path}"' in page


async def dom(browser: str, url: str, profile: Path) -> str:
    """Return the page's document after its scripts have run."""
    process = await asyncio.create_subprocess_exec(
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(LIMIT_S):
        page, _ = await process.communicate()
    return page.decode()
