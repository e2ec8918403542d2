"""The console at `/` and the OpenAPI document at `/docs`, served from files of this package.

The pages are public and hold no data: the console sends requests like any client, with the token of
its user. Its files are plain ES modules; its libraries are in `vendor`, as `tools.vendored` has written them.
"""

import asyncio
from functools import cache
from hashlib import sha256
from importlib import resources

from aiohttp import ETag, hdrs, web
from marshmallow import Schema, fields, validate

from server.auth.access import Access
from server.errors import ServerProblem
from server.http.validation import path_parameters
from server.routing import Routes

routes = Routes(tag="documentation")

_NOTHING_ELSE = "default-src 'none'; script-src 'self'; connect-src 'self'; "
_NO_FRAMES = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {"Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}

# `require-trusted-types-for` has browsers refuse text where markup is expected, such as innerHTML: texts of
# the ledger are written by others. The browser itself never sends a form, least of all with a token.
_CONSOLE_HEADERS = {
    **_HEADERS,
    "Content-Security-Policy": f"{_NOTHING_ELSE}style-src 'self'; img-src 'self'; {_NO_FRAMES}; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    hdrs.CACHE_CONTROL: "no-cache",  # a page and its modules must be of one version: each is revalidated
}

# It is weaker than the console's where Swagger UI needs that: it sets style attributes, which are harmless
# alone, has its icons as data: URLs in its style sheet, and passes text to the browser as markup, after a
# sanitiser of its own.
_DOCS_HEADERS = {
    **_HEADERS,
    "Content-Security-Policy": f"{_NOTHING_ELSE}style-src-elem 'self'; style-src-attr 'unsafe-inline'; "
    f"img-src 'self' data:; {_NO_FRAMES}",
    hdrs.CACHE_CONTROL: "max-age=3600",  # a megabyte, the same for everybody
}

_OURS = resources.files("server") / "static"
_BUNDLED = resources.files("aiohttp_apispec") / "static"
_TYPES = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "png": "image/png",
    "svg": "image/svg+xml",
}
CONSOLE_PAGE, DOCS_PAGE = "console.html", "docs.html"
_DOCS_FILES = {
    DOCS_PAGE: _OURS,
    "init.js": _OURS,
    "swagger-ui-bundle.js": _BUNDLED,
    "swagger-ui.css": _BUNDLED,
    "favicon-32x32.png": _BUNDLED,
}


class FilePathSchema(Schema):
    """The file named by the path."""

    file = fields.String(
        required=True,
        validate=validate.Length(1, 64),
        metadata={"description": "A script, style sheet or picture of the page."},
    )


_UNCHANGED = {304: {"description": "Not changed: it still has the tag of `If-None-Match`."}}


@routes.get(
    "/docs",
    access=Access.PUBLIC,
    summary="This document as a page",
    produces=["text/html"],
    answers={200: {"description": "The page."}},
)
async def show_docs(request: web.Request) -> web.Response:  # noqa: ARG001 -- a handler's signature
    return await _docs_file(DOCS_PAGE)


@routes.get(
    *(f"/docs/static/{name}" for name in _DOCS_FILES if name != DOCS_PAGE),
    access=Access.PUBLIC,
    summary="A file of the page",
    answers={200: {"description": "The file."}},
)
async def show_file(request: web.Request) -> web.Response:
    """Answer with the file at the end of the path; each file has its route."""
    return await _docs_file(request.path.rpartition("/")[2])


@routes.get(
    "/",
    access=Access.PUBLIC,
    tag="console",
    summary="The console, a page to see and manage models",
    produces=["text/html"],
    answers={200: {"description": "The page."}, **_UNCHANGED},
)
async def show_console(request: web.Request) -> web.StreamResponse:
    return await _console_file(request, CONSOLE_PAGE)


@routes.get(
    "/console/{file}",
    "/console/vendor/{file}",
    access=Access.PUBLIC,
    tag="console",
    summary="A file of the console",
    path=FilePathSchema(),
    answers={200: {"description": "The file."}, **_UNCHANGED},
    errors=("not_found",),
)
async def show_console_file(request: web.Request) -> web.StreamResponse:
    folder = "vendor/" if request.path.startswith("/console/vendor/") else ""
    return await _console_file(request, folder + path_parameters(request)["file"])


async def _console_file(request: web.Request, name: str) -> web.Response:
    files = await asyncio.to_thread(_files)
    if name not in files or name in _DOCS_FILES:
        raise ServerProblem(f"the console has no file {name!r}", code="not_found")
    body, tag = files[name]
    if any(known.value in {tag, "*"} for known in request.if_none_match or ()):
        response = web.Response(status=304, headers=_CONSOLE_HEADERS)
    else:
        response = _response(name, body, _CONSOLE_HEADERS)
    response.etag = ETag(tag)
    return response


async def _docs_file(name: str) -> web.Response:
    files = await asyncio.to_thread(_files)
    return _response(name, files[name][0], _DOCS_HEADERS)


def _response(name: str, body: bytes, headers: dict[str, str]) -> web.Response:
    media_type = _TYPES[name.rpartition(".")[2]]
    charset = None if media_type == "image/png" else "utf-8"
    return web.Response(body=body, content_type=media_type, charset=charset, headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Read all files once: they belong together, and no path comes from a request."""
    vendored = {f"vendor/{file.name}": _OURS for file in (_OURS / "vendor").iterdir()}
    ours = {**{file.name: _OURS for file in _OURS.iterdir()}, **vendored}
    ours = {name: folder for name, folder in ours.items() if name.rpartition(".")[2] in _TYPES}
    found = {name: (folder / name).read_bytes() for name, folder in {**ours, **_DOCS_FILES}.items()}
    return {name: (body, sha256(body).hexdigest()[:32]) for name, body in found.items()}
