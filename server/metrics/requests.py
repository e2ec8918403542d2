"""What became of requests, counted: by our own routes and classes of status, never by what clients sent."""

from __future__ import annotations

import time
from collections import Counter

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from events.series import Histogram
from server.errors import CODE
from server.routes import LimitClass, matched_route

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
