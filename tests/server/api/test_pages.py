"""The console and `/docs` as served; `tests/system/console/test_console.py` uses the console in a browser."""

import json
import re
from hashlib import sha256
from importlib import resources
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from playwright.async_api import expect
from pytest_aiohttp import AiohttpClient, AiohttpServer
from support.browser import chromium, needs_browser
from support.http import small_app, small_config

from server.api import pages
from server.app import all_routes
from tools.vendored import PACKAGES, RECORD, UnknownSpecifier, rewrite

Client = TestClient[web.Request, web.Application]

STATIC = Path(__file__).parents[3] / "server" / "static"
OWN = set(STATIC.iterdir())
SCRIPTS = sorted(path for path in STATIC.glob("*.js") if path.name != "init.js")
VENDOR = STATIC / "vendor"
IMPORT = re.compile(r'\bfrom ?"\./((?:vendor/)?[a-z-]+\.js)";?')


@pytest.fixture
async def client(aiohttp_client: AiohttpClient, tmp_path: Path) -> Client:
    return await aiohttp_client(small_app(pages.routes, small_config(tmp_path / "data")))


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_page_has_nothing_inline_and_its_files_are_served(client: Client, path: str) -> None:
    answer = await client.get(path)
    page = await answer.text()
    assert (answer.status, answer.content_type, answer.charset) == (200, "text/html", "utf-8")
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|\sstyle=|javascript:|https?:", page)
    names = set(re.findall(r'(?:src|href)="([^"#]+)"', page)) - {"/openapi.yaml", "/docs", "/"}
    assert names
    for name in names:
        file = await client.get(name)
        assert file.status == 200, name
        content, own = await file.read(), STATIC / name.removeprefix("/console/").rpartition("static/")[2]
        assert content == own.read_bytes() if own in OWN else content


async def test_every_script_is_imported_and_served(client: Client) -> None:
    needed, found = {"main.js"}, set[str]()
    while todo := needed - found:
        name = todo.pop()
        found.add(name)
        file = await client.get(f"/console/{name}")
        assert (file.status, file.content_type) == (200, "text/javascript"), name
        folder = "vendor/" if name.startswith("vendor/") else ""
        needed |= {folder + imported for imported in IMPORT.findall(await file.text())}
    assert found == {path.relative_to(STATIC).as_posix() for path in (*SCRIPTS, *VENDOR.glob("*.js"))}


def test_vendored_files_are_those_that_the_tool_wrote() -> None:
    record = json.loads((VENDOR / RECORD).read_text(encoding="utf-8"))
    assert [(each["package"], each["version"]) for each in record] == [
        (package.name, package.version) for package in PACKAGES
    ]
    hashes = {file["file"]: file["written"] for package in record for file in package["files"]}
    assert {RECORD, *hashes} == {path.name for path in VENDOR.iterdir()}
    for name, written in hashes.items():
        assert sha256((VENDOR / name).read_bytes()).hexdigest() == written, name
    assert sum(name.startswith("LICENSE-") for name in hashes) == len(PACKAGES)


def test_bare_specifier_is_rewritten_and_unknown_one_refused() -> None:
    published = 'import{options as n}from"preact";export{signal}from"@preact/signals-core";\n'
    assert rewrite(f"{published}//# sourceMappingURL=hooks.mjs.map") == (
        'import{options as n}from"./preact.js";export{signal}from"./signals-core.js";\n\n'
    )
    with pytest.raises(UnknownSpecifier, match="preact/compat"):
        rewrite('import x from "preact/compat";')


SELF, NONE = "'self'", "'none'"
POLICY = {
    "default-src": NONE, "script-src": SELF, "connect-src": SELF, "base-uri": NONE, "form-action": NONE,
    "frame-ancestors": NONE,
}  # fmt: skip
CONSOLE = {"style-src": SELF, "img-src": SELF, "require-trusted-types-for": "'script'", "trusted-types": NONE}
DOCS = {"style-src-elem": SELF, "style-src-attr": "'unsafe-inline'", "img-src": f"{SELF} data:"}


async def test_policy_lets_only_this_server_in(client: Client) -> None:
    for path, policy, kept in (
        ("/", CONSOLE, "no-cache"),
        ("/console/main.js", CONSOLE, "no-cache"),
        ("/docs", DOCS, "max-age=3600"),
        ("/docs/static/init.js", DOCS, "max-age=3600"),
    ):
        headers = (await client.get(path)).headers
        parts = headers["Content-Security-Policy"].split("; ")
        assert dict(part.split(" ", 1) for part in parts) == POLICY | policy, path
        assert (headers["Server"], headers["X-Content-Type-Options"]) == ("loadledger", "nosniff")
        assert headers["Cache-Control"] == kept
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


async def test_unchanged_console_file_is_304(client: Client) -> None:
    for path in ("/", "/console/main.js", "/console/vendor/preact.js", "/console/console.svg"):
        first = await client.get(path)
        assert first.headers["Cache-Control"] == "no-cache"
        tag = first.headers["ETag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}'):
            again = await client.get(path, headers={"If-None-Match": known})
            assert (again.status, await again.read(), again.headers["ETag"]) == (304, b"", tag)
        assert (await client.get(path, headers={"If-None-Match": '"other"'})).status == 200


async def test_no_other_file_is_served(client: Client) -> None:
    for path in (
        "/console/docs.html", "/console/init.js", "/console/none.js", "/console/..%2f__init__.py",
        "/console/preact.js", "/console/vendor/none.js", "/console/vendor/vendored.json",
        "/console/vendor%2fpreact.js",
        "/console/%2e%2e%2fconsole.py", "/console/console.css%00", f"/console/{'x' * 99}",
        "/docs/static/index.html", "/docs/static/swagger-ui.js.map", "/docs/static/..%2f__init__.py",
        "/docs/static/%2e%2e/docs.html", "/docs/static/",
    ):  # fmt: skip
        answer = await client.get(path)
        assert answer.status in ({400, 404} if path.startswith("/console") else {401, 404}), path
        assert answer.content_type == "application/problem+json"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_writes_text_only(path: Path) -> None:
    script = path.read_text(encoding="utf-8")
    for forbidden in (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment",
        r"\beval\(|document\.cookie|new (Function|EventSource|WebSocket)",
    ):
        assert not re.search(forbidden, script)
    keeps = {"problems.js"}  # which problems were acknowledged: nothing secret, and for this browser only
    assert ("localStorage" in script) == (path.name in keeps)
    assert set(re.findall(r'https?://[^"`\s]+', script)) <= {"http://www.w3.org/2000/svg"}


async def test_docs_script_shows_our_document_only(client: Client) -> None:
    answer = await client.get("/docs/static/init.js")
    script = await answer.text()
    assert answer.content_type == "text/javascript"
    for text, is_there in (('url: "/openapi.yaml"', True), ("validatorUrl: null", True), ("http", False)):
        assert (text in script) is is_there
    bundled = resources.files("aiohttp_apispec") / "static" / "swagger-ui-bundle.js"
    assert await (await client.get("/docs/static/swagger-ui-bundle.js")).read() == bundled.read_bytes()


@needs_browser
async def test_docs_show_every_route_in_a_browser(aiohttp_server: AiohttpServer, tmp_path: Path) -> None:
    server = await aiohttp_server(small_app(all_routes(), small_config(tmp_path / "data")))
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(str(server.make_url("/docs")))
        shown = page.locator("[data-path]")
        await expect(shown).to_have_count(len(all_routes()))
        paths = await shown.evaluate_all("all => all.map(each => each.getAttribute('data-path'))")
    assert set(paths) == {route.path for route in all_routes()}
