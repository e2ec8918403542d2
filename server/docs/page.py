"""`/docs`: the OpenAPI document as a page, from files that are on this machine, under a strict policy."""

import asyncio
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from aiohttp import hdrs, web
from aiohttp_apispec import docs

from server.routes import Access, LimitClass, Route

# Scripts and styles come from files here and nowhere else. It is weaker than the console's in what Swagger UI
# needs: it sets style attributes, which can do no harm alone, has its icons as data: URLs in its style sheet,
# and hands text to the browser as markup, after a sanitiser of its own.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src-elem 'self'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's Content-Security-Policy."""

_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    hdrs.CACHE_CONTROL: "max-age=3600",
}

_BUNDLED = resources.files("aiohttp_apispec") / "static"
_OURS = resources.files("server") / "static"

PAGE = "docs.html"
_FILES: dict[str, tuple[Traversable, str]] = {
    PAGE: (_OURS / PAGE, "text/html"),
    "init.js": (_OURS / "init.js", "text/javascript"),
    "swagger-ui-bundle.js": (_BUNDLED / "swagger-ui-bundle.js", "text/javascript"),
    "swagger-ui.css": (_BUNDLED / "swagger-ui.css", "text/css"),
    "favicon-32x32.png": (_BUNDLED / "favicon-32x32.png", "image/png"),
}


def docs_routes() -> list[Route]:
    """Return the page's routes: itself and each of the files it needs."""
    public = (Access.PUBLIC, LimitClass.NONE)
    files = [name for name in _FILES if name != PAGE]
    return [
        Route("GET", "/docs", show_docs, *public),
        *(Route("GET", f"/docs/static/{name}", show_file, *public) for name in files),
    ]


@docs(
    tags=["documentation"],
    summary="This document as a page",
    produces=["text/html"],
    responses={"200": {"description": "The page."}},
)
async def show_docs(request: web.Request) -> web.Response:  # noqa: ARG001 -- a handler's signature
    """Answer with the page."""
    return await _file(PAGE)


@docs(
    tags=["documentation"],
    summary="A file of the page",
    responses={"200": {"description": "The file."}},
)
async def show_file(request: web.Request) -> web.Response:
    """Answer with the file that the path ends in; only paths of files have this handler."""
    return await _file(request.path.rpartition("/")[2])


async def _file(name: str) -> web.Response:
    content = await asyncio.to_thread(_content, name)
    media_type = _FILES[name][1]
    charset = "utf-8" if media_type.startswith("text/") else None
    return web.Response(body=content, content_type=media_type, charset=charset, headers=_HEADERS)


@cache
def _content(name: str) -> bytes:
    """Read a file once: a thousand slow readers share it."""
    return _FILES[name][0].read_bytes()
