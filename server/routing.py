"""Declare routes: one decorator states a route's path, role, schemas, answers and documentation.

`Routes` collects the handlers of a module, as aiohttp's `RouteTableDef` does. aiohttp-apispec's decorators
keep the declaration on the handler: `server.openapi` reads it there for the document, and
`validation_middleware` for the schemas that a request is checked with.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Required, TypedDict, TypeVar, Unpack

import aiohttp_apispec as apispec
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from marshmallow import Schema

from answers.answer import AnswerBody
from server.auth.access import Access
from server.errors import ERRORS

AT = "at"
"""The query parameter of a moment of the past."""

RequestHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
"""Handles each request of a server, before the application matches a route and runs its middlewares."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    handler: Handler
    access: Access
    is_forwarded: bool = False
    shows_past: bool = False
    """Whether its query has `at`, which is for `Access.AUDIT`."""

    @property
    def name(self) -> str:
        """Method and path, as denials in the ledger name the route."""
        return f"{self.method} {self.path}"


AnswerType = type[AnswerBody] | type[list[Any]]
"""A struct, or a list of structs."""

DocumentedAnswer = tuple[AnswerType, str] | Mapping[str, Any]
"""An answer and its description; or OpenAPI's own response object, which may have a member `answer`."""


class Operation(TypedDict, total=False):
    """Declaration of a handler beside its method and paths."""

    access: Required[Access]
    is_forwarded: bool
    tag: str
    summary: Required[str]
    description: str
    path: Schema
    query: Schema
    headers: Schema
    body: Schema
    answers: Required[Mapping[int, DocumentedAnswer]]
    errors: Sequence[str]
    """Codes of the handler; those of its schemas and its access are implied."""
    produces: Sequence[str]
    parameters: Sequence[Mapping[str, Any]]
    """OpenAPI's own, of fields that the handler reads itself."""
    request_body: Mapping[str, Any]
    """OpenAPI's own, of a body that the handler reads itself."""


AnyHandler = TypeVar("AnyHandler", bound=Callable[..., Any])


class Routes(list[Route]):
    """The routes of a module, in the order of their declaration.

    Args:
        tag: groups the routes in the documentation; a route may have another.
    """

    def __init__(self, tag: str) -> None:
        super().__init__()
        self._tag = tag

    def get(self, *paths: str, **operation: Unpack[Operation]) -> Callable[[AnyHandler], AnyHandler]:
        """Declare a handler of GET and HEAD."""
        return self._declare(hdrs.METH_GET, paths, operation)

    def post(self, *paths: str, **operation: Unpack[Operation]) -> Callable[[AnyHandler], AnyHandler]:
        return self._declare(hdrs.METH_POST, paths, operation)

    def put(self, *paths: str, **operation: Unpack[Operation]) -> Callable[[AnyHandler], AnyHandler]:
        return self._declare(hdrs.METH_PUT, paths, operation)

    def delete(self, *paths: str, **operation: Unpack[Operation]) -> Callable[[AnyHandler], AnyHandler]:
        return self._declare(hdrs.METH_DELETE, paths, operation)

    def _declare(
        self, method: str, paths: Sequence[str], operation: Operation
    ) -> Callable[[AnyHandler], AnyHandler]:
        def decorate(handler: AnyHandler) -> AnyHandler:
            _describe(handler, {"tag": self._tag, **operation})
            access, is_forwarded = operation["access"], operation.get("is_forwarded", False)
            shows_past = "query" in operation and AT in operation["query"].fields
            self.extend(Route(method, path, handler, access, is_forwarded, shows_past) for path in paths)
            return handler

        return decorate


def _describe(handler: Callable[..., Any], operation: Operation) -> None:
    """Keep schemas and documentation on the handler.

    Raises:
        KeyError: an error code is not in `ERRORS`.
    """
    for code in operation.get("errors", ()):
        ERRORS[code]
    answers: dict[str, Mapping[str, Any]] = {}  # aiohttp-apispec's own are texts, too
    for status, answer in operation["answers"].items():
        if isinstance(answer, tuple):
            answers[str(status)] = {"answer": answer[0], "description": answer[1]}
        else:
            answers[str(status)] = answer
    declared: Mapping[str, Any] = operation
    for part, declare in _REQUEST_PARTS.items():
        if part in declared:
            declare(declared[part])(handler)
    documented = {name: declared[name] for name in _DOCUMENTED if name in declared}
    if "request_body" in operation:
        documented["requestBody"] = operation["request_body"]
    errors = {"x-error-codes": operation.get("errors", ())}
    apispec.docs(tags=[operation["tag"]], responses=answers, **documented, **errors)(handler)


_DOCUMENTED = ("summary", "description", "parameters", "produces")
_REQUEST_PARTS: Mapping[str, Callable[..., Any]] = {  # in the order in which a request is checked
    "body": apispec.json_schema,
    "headers": apispec.headers_schema,
    "query": apispec.querystring_schema,
    "path": apispec.match_info_schema,
}


RouteTable = Mapping[web.AbstractRoute, Route]

ROUTES: web.AppKey[RouteTable] = web.AppKey("routes", Mapping)
"""From the framework's matched route to ours."""


def add_routes(app: web.Application, routes: Iterable[Route]) -> None:
    """Register routes and remember them under `ROUTES`; HEAD comes with each GET. Call it once per app."""
    table: dict[web.AbstractRoute, Route] = {}
    for route in routes:
        resource = app.router.add_resource(route.path.replace("{path}", "{path:(?s:.+)}"))  # with slashes
        methods = (hdrs.METH_GET, hdrs.METH_HEAD) if route.method == hdrs.METH_GET else (route.method,)
        for method in methods:
            added = resource.add_route(method, route.handler, expect_handler=_ask_for_body)
            table[added] = route
    app[ROUTES] = MappingProxyType(table)


def matched_route(request: web.Request) -> Route | None:
    return request.app[ROUTES].get(request.match_info.route)


def wrap_handler(server: web.Server, wrap: Callable[[RequestHandler], RequestHandler]) -> None:
    """Put a wrapper around the handler of a server: each request passes the one that was added last first."""
    server.request_handler = wrap(server.request_handler)


async def _ask_for_body(request: web.Request) -> None:
    # RFC 9110 section 10.1.1 allows to ignore other expectations; the framework would answer 417 as text.
    if request.headers[hdrs.EXPECT].lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # nothing of the answer has been sent yet
