"""The console's page and files as they are served; `tests/system/test_console.py` uses them in a browser."""

import re
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp import AiohttpClient
from support.smallapp import small_app, small_config

from server.pages import console_routes, docs_routes
from server.routes import Access, LimitClass

Client = TestClient[web.Request, web.Application]

STATIC = Path(__file__).parents[2] / "server" / "static"
SCRIPTS = sorted(path for path in STATIC.glob("*.js") if path.name != "init.js")
IMPORT = re.compile(r'^import .* from "\./([a-z]+\.js)";$', re.MULTILINE)


@pytest.fixture
async def client(aiohttp_client: AiohttpClient, tmp_path: Path) -> Client:
    routes = [*console_routes(), *docs_routes()]
    return await aiohttp_client(small_app(routes, small_config(tmp_path / "data")))


async def test_the_page_has_nothing_inline_and_all_it_names_is_served(client: Client) -> None:
    answer = await client.get("/")
    page = await answer.text()
    assert (answer.status, answer.content_type, answer.charset) == (200, "text/html", "utf-8")
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|\sstyle=|javascript:|https?:", page)
    names = set(re.findall(r'(?:src|href)="(/console/[^"]+)"', page))
    assert names
    for name in names:
        file = await client.get(name)
        assert file.status == 200, name
        assert await file.read() == (STATIC / name.rpartition("/")[2]).read_bytes()


async def test_every_module_is_one_that_the_page_needs_and_is_served_as_a_script(client: Client) -> None:
    needed, found = {"main.js"}, set[str]()
    while todo := needed - found:
        name = todo.pop()
        found.add(name)
        file = await client.get(f"/console/{name}")
        assert (file.status, file.content_type) == (200, "text/javascript"), name
        needed |= set(IMPORT.findall(await file.text()))
    assert found == {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_every_page_is_under_a_policy_that_lets_only_this_server_in(client: Client, path: str) -> None:
    headers = (await client.get(path)).headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


async def test_the_console_s_policy_takes_no_style_attributes_and_no_text_as_markup(client: Client) -> None:
    headers = (await client.get("/")).headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["style-src"] == policy["img-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["trusted-types"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/", "/console/main.js", "/console/console.css", "/console/console.svg"])
async def test_a_file_is_asked_for_each_time_and_sent_again_when_it_has_changed(
    client: Client, path: str
) -> None:
    first = await client.get(path)
    assert first.headers["Cache-Control"] == "no-cache"
    tag = first.headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = await client.get(path, headers={"If-None-Match": known})
        assert (again.status, await again.read()) == (304, b"")
        assert again.headers["ETag"] == tag
    assert (await client.get(path, headers={"If-None-Match": '"other"'})).status == 200


@pytest.mark.parametrize(
    "name",
    [
        "docs.html",
        "init.js",
        "none.js",
        "..%2f__init__.py",
        "%2e%2e%2fconsole.py",
        "console.css%00",
        "x" * 99,
    ],
)
async def test_no_other_file_is_served(client: Client, name: str) -> None:
    answer = await client.get(f"/console/{name}")
    assert answer.status in {400, 404}
    assert answer.content_type == "application/problem+json"


def test_it_needs_no_token_and_is_not_counted() -> None:
    assert {(route.access, route.limit) for route in console_routes()} == {(Access.PUBLIC, LimitClass.NONE)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_module_is_short_keeps_to_text_and_asks_nobody_else(path: Path) -> None:
    script = path.read_text(encoding="utf-8")
    assert len(script.splitlines()) <= 250
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment"
    assert not re.search(markup, script)
    assert not re.search(
        r"\beval\(|localStorage|document\.cookie|new (Function|EventSource|WebSocket)", script
    )
    assert set(re.findall(r'https?://[^"`\s]+', script)) <= {"http://www.w3.org/2000/svg"}
