"""One log line for each request: what was asked, by whom, what came of it, and when.

Inferences have theirs from `log_inferences`, as far as they are asked for: else nothing is in their way.

What became of requests, counted: by our own routes and classes of status, never by what clients sent.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections import Counter

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from events.counters import Histogram
from server.appkeys import CONFIG, PROXIES
from server.auth.gate import PRINCIPAL
from server.auth.ratelimit import Windows
from server.config import RateLimit
from server.errors import CODE
from server.observability.output import CONTEXT, REQUEST_ID, RequestContext, begin_context, fields
from server.routing import LimitClass, RequestHandler, Route, matched_route, wrap_handler

_log = logging.getLogger(__name__)

MAX_PATH_CHARACTERS = 512
MAX_STRANGERS = 60
"""Lines in a minute about requests of nobody: anybody may send those, and must not fill the log."""

REFUSED, FAULT = 400, 500

_INFER = re.compile(r"/v2/models/(?P<model>[^/]{1,128})(?:/versions/(?P<version>[0-9]{1,9}))?/infer")


def log_middleware() -> Middleware:
    """Return the middleware that logs requests; it stands before all others, and changes nothing."""
    strangers, left_out = Windows(RateLimit(MAX_STRANGERS, window_s=60), time.monotonic, capacity=1), 0

    @web.middleware
    async def log_request(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal left_out
        context, route, began_s = begin_context(request), matched_route(request), time.perf_counter()
        if route is not None and route.limit is LimitClass.INFERENCE and request.method == hdrs.METH_POST:
            return await handler(request)
        response: web.StreamResponse | None = None
        try:
            response = await handler(request)
        finally:
            told, level = _told(request, route), _level(request, route, response)
            if PRINCIPAL in request or response is None or response.status < REFUSED:
                _write(level, context, began_s, response, **told)
            elif strangers.count("")[0] <= MAX_STRANGERS:
                _write(level, context, began_s, response, **told, left_out=left_out or None)
                left_out = 0
            else:
                left_out += 1
        return response

    return log_request


def log_inferences(server: web.Server, app: web.Application) -> None:
    """Have a runner that is set up log inferences, the share that is configured."""
    share, proxies = app[CONFIG].log_inferences, app[PROXIES]

    def logged(inner: RequestHandler) -> RequestHandler:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            found = inference_of(request) if random.random() < share else None  # noqa: S311 - a sample
            if found is None:
                return await inner(request)
            context, began_s = begin_context(request), time.perf_counter()
            response: web.StreamResponse | None = None
            try:
                response = await inner(request)
            finally:
                told = {"method": request.method, "path": path_of(request), "peer": proxies.peer(request)}
                _write(logging.INFO, context, began_s, response, **found.groupdict(), **told)
            return response

        return handle

    if share:
        wrap_handler(server, logged)


def inference_of(request: web.BaseRequest) -> re.Match[str] | None:
    """Return the model and version of an inference; None for other requests."""
    return _INFER.fullmatch(request.raw_path) if request.method == hdrs.METH_POST else None


async def add_request_id(_request: web.Request, response: web.StreamResponse) -> None:
    """Tell a client the name of its request; for `app.on_response_prepare`."""
    context = CONTEXT.get()
    if context is not None:
        response.headers[REQUEST_ID] = context.request_id


def _write(
    level: int, context: RequestContext, began_s: float, response: web.StreamResponse | None, **told: object
) -> None:
    if not _log.isEnabledFor(level):
        return
    status, code = (None, None) if response is None else (response.status, response.get(CODE))
    named = fields(
        status=status,
        code=code,
        duration_s=round(time.perf_counter() - began_s, 6),
        job=context.job_id,
        position=context.position,
        **told,
    )
    words = f"{told['method']} {told['path']} {status if status is not None else 'aborted'}"
    _log.log(level, "%s", words, extra=named)


def _level(request: web.Request, route: Route | None, response: web.StreamResponse | None) -> int:
    """Return how much a line matters: what changes something or is refused does, what only looks less."""
    status = response.status if response is not None else 0
    if status >= FAULT:
        return logging.WARNING
    manages = route is not None and route.limit is LimitClass.MANAGEMENT and PRINCIPAL in request
    return logging.INFO if manages or status >= REFUSED else logging.DEBUG


def _told(request: web.Request, route: Route | None) -> dict[str, object]:
    principal = request.get(PRINCIPAL)
    return {
        "method": request.method,
        "path": path_of(request),
        "route": route.path if route is not None else None,
        "subject": principal.subject if principal is not None else None,
        "peer": request.app[PROXIES].peer(request),
    }


def path_of(request: web.BaseRequest) -> str:
    """Return the path as it was sent, without what is asked there: who errs puts a token into it."""
    return request.raw_path.partition("?")[0][:MAX_PATH_CHARACTERS]


TOOK_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""From a look at the state to a load that is waited for as long as a client may ask."""
ABORTED = "aborted"
"""The class of requests that had no answer: their client has gone, or the server stopped."""
NO_ROUTE = "none"
"""The route of paths and methods that no route has."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "other"
_STREAM = "/api/v1/events/stream"


class HttpCounts:
    """The requests since the server started; of each, method and route are ours.

    Attributes:
        requests: by method, route and class of status.
        durations: by method and route.
        errors: by code.
    """

    def __init__(self) -> None:
        self.requests = Counter[tuple[str, str, str]]()
        self.durations: dict[tuple[str, str], Histogram] = {}
        self.errors = Counter[str]()

    def answered(self, method: str, path: str, response: web.StreamResponse) -> None:
        """Count a request that has an answer, and the error that it tells, if it does."""
        self.requests[method, path, f"{response.status // 100}xx"] += 1
        code = response.get(CODE)
        if code is not None:
            self.errors[code] += 1

    def aborted(self, method: str, path: str) -> None:
        """Count a request that has none."""
        self.requests[method, path, ABORTED] += 1

    def took(self, method: str, path: str, seconds: float) -> None:
        """Count how long a request took."""
        durations = self.durations.get((method, path))
        if durations is None:
            durations = self.durations[method, path] = Histogram(TOOK_S)
        durations.observe(seconds)


HTTP_COUNTS = web.AppKey("http_counts", HttpCounts)


def counting_middleware(counts: HttpCounts) -> Middleware:
    """Return the middleware that counts; it must be the outermost."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.monotonic()
        route = matched_route(request)
        method = request.method if request.method in METHODS else OTHER_METHOD
        path = route.path if route is not None else NO_ROUTE
        try:
            response = await handler(request)
        except web.HTTPException as redirect:
            counts.answered(method, path, redirect)
            raise
        except BaseException:
            counts.aborted(method, path)
            raise
        counts.answered(method, path, response)
        if route is not None and route.limit is not LimitClass.INFERENCE and path != _STREAM:
            counts.took(method, path, time.monotonic() - began)
        return response

    return count
