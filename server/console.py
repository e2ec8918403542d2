"""`/`: the console, a page for operators, from files of ours under a policy that lets nothing else in.

The page is public, since it has no data: what it shows it asks for as any client does, with the token of who
signs in. Its files are plain ES modules, served as they are written.
"""

import asyncio
from functools import cache
from hashlib import sha256
from importlib import resources

from aiohttp import ETag, hdrs, web
from aiohttp_apispec import docs, match_info_schema
from marshmallow import Schema, fields, validate

from server.errors import ServerProblem, errors
from server.routes import Access, LimitClass, Route
from server.validation import path_parameters

# `require-trusted-types-for` has browsers refuse text where markup is expected, such as innerHTML: what the
# ledger says was written by others. No form is ever sent by the browser itself, least of all with a token.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The page's Content-Security-Policy."""

_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    hdrs.CACHE_CONTROL: "no-cache",  # a page and its modules have to be of one version: each is asked for
}

PAGE = "console.html"
_OURS = resources.files("server") / "static"
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
_OF_DOCS = {"docs.html", "init.js"}
"""What lies there too, and has routes of its own."""


class NoSuchFile(ServerProblem):
    """The console has no such file."""

    code = "not_found"


class FilePathSchema(Schema):
    """The file named by the path."""

    file = fields.String(
        required=True,
        validate=validate.Length(1, 64),
        metadata={"description": "A script, style sheet or picture of the page."},
    )


_UNCHANGED = {"304": {"description": "It is still what `If-None-Match` names."}}


@docs(
    tags=["console"],
    summary="The console: a page to see and manage models",
    produces=["text/html"],
    responses={"200": {"description": "The page."}, **_UNCHANGED},
)
async def show_console(request: web.Request) -> web.StreamResponse:
    """Answer with the page."""
    return await _answer(request, PAGE)


@docs(
    tags=["console"],
    summary="A file of the console",
    responses={"200": {"description": "The file."}, **_UNCHANGED},
)
@match_info_schema(FilePathSchema())
@errors("not_found")
async def show_console_file(request: web.Request) -> web.StreamResponse:
    """Answer with a file of the page."""
    return await _answer(request, path_parameters(request)["file"])


def console_routes() -> list[Route]:
    """Return the routes of the page and of its files."""
    public = (Access.PUBLIC, LimitClass.NONE)
    return [
        Route("GET", "/", show_console, *public),
        Route("GET", "/console/{file}", show_console_file, *public),
    ]


async def _answer(request: web.Request, name: str) -> web.StreamResponse:
    files = await asyncio.to_thread(_files)
    if name not in files:
        raise NoSuchFile(f"the console has no file {name!r}")
    body, tag = files[name]
    if any(known.value in {tag, "*"} for known in request.if_none_match or ()):
        response = web.Response(status=304, headers=_HEADERS)
    else:
        media_type = _TYPES[name[name.rindex(".") :]]
        response = web.Response(body=body, content_type=media_type, charset="utf-8", headers=_HEADERS)
    response.etag = ETag(tag)
    return response


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Read all files once, so that what is served is of one version, and no path is made from a request."""
    found = {file.name: file.read_bytes() for file in _OURS.iterdir() if file.name not in _OF_DOCS}
    return {
        name: (body, sha256(body).hexdigest()[:32])
        for name, body in sorted(found.items())
        if name[name.rindex(".") :] in _TYPES
    }
