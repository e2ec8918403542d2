import re
from importlib import resources

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp import AiohttpClient

from server.pages import docs_routes
from server.routes import Access, LimitClass, add_routes

Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def client(aiohttp_client: AiohttpClient) -> Client:
    app = web.Application()
    add_routes(app, docs_routes())
    return await aiohttp_client(app)


async def test_the_page_has_nothing_inline_and_all_it_names_is_served(client: Client) -> None:
    answer = await client.get("/docs")
    page = await answer.text()
    assert (answer.status, answer.content_type, answer.charset) == (200, "text/html", "utf-8")
    assert "<style" not in page
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|javascript:", page)
    names = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(name.startswith("/") for name in names)
    for name in set(names) - {"/openapi.yaml"}:
        file = await client.get(name)
        assert file.status == 200, name
        assert await file.read()


async def test_the_policy_lets_only_this_server_in(client: Client) -> None:
    for path in ("/docs", "/docs/static/init.js", "/docs/static/swagger-ui-bundle.js"):
        answer = await client.get(path)
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src-elem"] == policy["connect-src"] == "'self'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_the_script_shows_our_document_and_asks_nobody_else(client: Client) -> None:
    answer = await client.get("/docs/static/init.js")
    script = await answer.text()
    assert answer.content_type == "text/javascript"
    assert 'url: "/openapi.yaml"' in script
    assert "validatorUrl: null" in script
    assert "http" not in script


async def test_the_bundle_is_the_one_of_the_library(client: Client) -> None:
    bundled = resources.files("aiohttp_apispec") / "static" / "swagger-ui-bundle.js"
    assert await (await client.get("/docs/static/swagger-ui-bundle.js")).read() == bundled.read_bytes()


@pytest.mark.parametrize(
    "name", ["index.html", "swagger-ui.js.map", "..%2f__init__.py", "%2e%2e/docs.html", ""]
)
async def test_no_other_file_is_served(client: Client, name: str) -> None:
    assert (await client.get(f"/docs/static/{name}")).status == 404


def test_it_needs_no_token_and_is_not_counted() -> None:
    assert {(route.access, route.limit) for route in docs_routes()} == {(Access.PUBLIC, LimitClass.NONE)}
