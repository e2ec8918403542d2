"""The access log: a line per request, and the counts of requests behind `/metrics`.

Counts are by routes and by classes of status, never by values that clients choose. Inferences are not logged.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from events.counters import Histogram
from server.appkeys import GATE
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.auth.ratelimit import Windows
from server.config import RateLimit
from server.errors import CODE
from server.observability.output import RequestContext, begin_context, make_extra
from server.routing import Route, matched_route

_log = logging.getLogger(__name__)

MAX_PATH_CHARACTERS = 512
"""Characters of a path in a log line; every valid path is shorter."""

MAX_UNAUTHENTICATED = 60
"""Lines a minute about requests without valid credentials, which anybody can send."""

REFUSED, FAULT = 400, 500
"""The least statuses of refused requests and of the server's faults."""

DURATIONS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""Buckets from a read of the state to a load that a client waits for up to the limit."""

ABORTED = "aborted"
"""The class of status of requests without an answer: the client left, or the server stopped."""

NO_ROUTE = "none"
"""The route of unknown paths and methods."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "other"

_STREAM = "/api/v1/events/stream"


def request_middleware(counts: HttpCounts) -> Middleware:
    """Return the middleware that counts and logs requests; it must be the outermost."""
    unauthenticated = Windows(RateLimit(MAX_UNAUTHENTICATED, window_s=60), time.monotonic, capacity=1)
    left_out = 0

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal left_out
        context, route, began_s = begin_context(request), matched_route(request), time.perf_counter()
        is_inference = route is not None and route.access is Access.INFER
        response: web.StreamResponse | None = None
        try:
            response = await handler(request)
        finally:
            method = request.method if request.method in METHODS else OTHER_METHOD
            path = route.path if route is not None else NO_ROUTE
            counts.count(method, path, response)
            if response is not None and route is not None and not is_inference and path != _STREAM:
                counts.observe_duration(method, path, time.perf_counter() - began_s)
            fields, level = _request_fields(request, route), _level(request, route, response)
            if is_inference and request.method == hdrs.METH_POST:
                pass  # a line for each would cost too much
            elif PRINCIPAL in request or response is None or response.status < REFUSED:
                _write(level, context, began_s, response, **fields)
            elif unauthenticated.count("")[0] <= MAX_UNAUTHENTICATED:
                _write(level, context, began_s, response, **fields, left_out=left_out or None)
                left_out = 0
            else:
                left_out += 1
        return response

    return observe


def path_without_query(request: web.BaseRequest) -> str:
    """Return the path as sent, without the query, in which clients put tokens by mistake.

    A target that begins with a scheme or a host may have a user and a password, so only its path is returned.
    """
    is_path = request.raw_path.startswith(("/", "*"))
    path = request.raw_path.partition("?")[0] if is_path else request.rel_url.raw_path
    return path[:MAX_PATH_CHARACTERS]


def _write(
    level: int, context: RequestContext, began_s: float, response: web.StreamResponse | None, **fields: object
) -> None:
    if not _log.isEnabledFor(level):
        return
    status, code = (None, None) if response is None else (response.status, response.get(CODE))
    extra = make_extra(
        status=status,
        code=code,
        duration_s=round(time.perf_counter() - began_s, 6),
        job=context.job_id,
        position=context.position,
        **fields,
    )
    text = f"{fields['method']} {fields['path']} {status if status is not None else 'aborted'}"
    _log.log(level, "%s", text, extra=extra)


def _level(request: web.Request, route: Route | None, response: web.StreamResponse | None) -> int:
    """Return the level of a line: higher for changes and refusals than for reads."""
    status = response.status if response is not None else 0
    if status >= FAULT:
        return logging.WARNING
    manages = route is not None and route.access.records and PRINCIPAL in request
    return logging.INFO if manages or status >= REFUSED else logging.DEBUG


def _request_fields(request: web.Request, route: Route | None) -> dict[str, object]:
    principal = request.get(PRINCIPAL)
    return {
        "method": request.method,
        "path": path_without_query(request),
        "route": route.path if route is not None else None,
        "subject": principal.subject if principal is not None else None,
        "peer": request.app[GATE].proxies.peer(request),
    }


class HttpCounts:
    """Counts since the server started: requests by method, route and class of status, errors by code.

    Durations are by method and route. All methods and routes are the server's own.
    """

    def __init__(self) -> None:
        self.requests = Counter[tuple[str, str, str]]()
        self.durations: dict[tuple[str, str], Histogram] = {}
        self.errors = Counter[str]()

    def count(self, method: str, path: str, response: web.StreamResponse | None) -> None:
        """Count a request by its response and the response's error; a request without one was aborted."""
        status = ABORTED if response is None else f"{response.status // 100}xx"
        self.requests[method, path, status] += 1
        code = None if response is None else response.get(CODE)
        if code is not None:
            self.errors[code] += 1

    def observe_duration(self, method: str, path: str, duration_s: float) -> None:
        durations = self.durations.get((method, path))
        if durations is None:
            durations = self.durations[method, path] = Histogram(DURATIONS_S)
        durations.observe(duration_s)


HTTP_COUNTS = web.AppKey("http_counts", HttpCounts)
