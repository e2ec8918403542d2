"""One log line, and one span, for each request: what was asked, by whom, what came of it, and when.

Inferences pass by here: those that are to have a line, or a span, have it from `server.logs.inferences`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from server.appkeys import PRINCIPAL, PROXIES
from server.auth.proxies import Proxies
from server.errors import CODE
from server.logs.context import CONTEXT, REQUEST_ID, RequestContext, context_of, name_request
from server.logs.forms import fields
from server.logs.telemetry import TELEMETRY, Span, Telemetry
from server.routes import LimitClass, Route, matched_route

_log = logging.getLogger(__name__)

MAX_PATH_CHARACTERS = 512
MAX_STRANGERS = 60
"""Lines in a minute about requests of nobody: anybody may send those, and must not fill the log."""
MINUTE_S = 60.0

REFUSED, FAULT = 400, 500


class Strangers:
    """Bounds the lines about requests without valid credentials.

    Args:
        clock: seconds that go on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s = 0.0
        self._lines = 0
        self._left_out = 0

    def admit(self) -> int | None:
        """Return how many lines were left out before this one; None where this one is, too."""
        now_s = self._clock()
        if now_s >= self._until_s:
            self._until_s, self._lines = now_s + MINUTE_S, 0
        if self._lines >= MAX_STRANGERS:
            self._left_out += 1
            return None
        self._lines += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


@dataclass(slots=True)
class Watched:
    """A request while it is served: what is told of it in the end."""

    context: RequestContext
    span: Span | None
    began_s: float

    @classmethod
    def begin(
        cls, request: web.BaseRequest, proxies: Proxies, telemetry: Telemetry | None, route: str | None
    ) -> Watched:
        """Begin to watch; what is logged from here on, in this task, names the request."""
        context = CONTEXT.get() or context_of(request)
        span = None
        if telemetry is not None:
            name = f"{request.method} {route}" if route is not None else request.method
            span = telemetry.request(context.trace, name, _asked(request, proxies.peer(request), route))
            context.trace = span.trace
        CONTEXT.set(context)
        return cls(context, span, time.perf_counter())

    def end(self, level: int | None, response: web.StreamResponse | None, **told: object) -> None:
        """Write the line, unless `level` is None, and end the span."""
        status, code = (None, None) if response is None else (response.status, response.get(CODE))
        context = self.context
        if self.span is not None:
            known = {
                "loadledger.job": context.job_id,
                "loadledger.code": code,
                "loadledger.subject": told.get("subject"),
            }
            self.span.end(status, {name: str(value) for name, value in known.items() if value is not None})
        if level is not None and _log.isEnabledFor(level):
            named = fields(
                status=status,
                code=code,
                duration_s=round(time.perf_counter() - self.began_s, 6),
                job=context.job_id,
                position=context.position,
                **told,
            )
            words = f"{told['method']} {told['path']} {status if status is not None else 'aborted'}"
            _log.log(level, "%s", words, extra=named)


def log_middleware() -> Middleware:
    """Return the middleware that watches requests; it stands before all others, and changes nothing."""
    strangers = Strangers()

    @web.middleware
    async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = matched_route(request)
        if route is not None and route.limit is LimitClass.INFERENCE and request.method == hdrs.METH_POST:
            name_request(request)
            return await handler(request)
        app, path = request.app, route.path if route is not None else None
        watched = Watched.begin(request, app[PROXIES], app.get(TELEMETRY), path)
        response: web.StreamResponse | None = None
        try:
            response = await handler(request)
        finally:
            told = _told(request, route)
            level: int | None = _level(request, route, response)
            if level is not None and _is_stranger(request, response):
                left_out = strangers.admit()
                level, told["left_out"] = (None if left_out is None else level), left_out or None
            watched.end(level, response, **told)
        return response

    return watch


async def add_request_id(_request: web.Request, response: web.StreamResponse) -> None:
    """Tell a client the name of its request; for `app.on_response_prepare`."""
    context = CONTEXT.get()
    if context is not None:
        response.headers[REQUEST_ID] = context.request_id


def _level(request: web.Request, route: Route | None, response: web.StreamResponse | None) -> int:
    """Return how much a line matters: what changes something or is refused does, what only looks less."""
    status = response.status if response is not None else 0
    if status >= FAULT:
        return logging.WARNING
    manages = route is not None and route.limit is LimitClass.MANAGEMENT and PRINCIPAL in request
    return logging.INFO if manages or status >= REFUSED else logging.DEBUG


def _is_stranger(request: web.Request, response: web.StreamResponse | None) -> bool:
    """Whether this is the line of a refusal that anybody can have."""
    return PRINCIPAL not in request and response is not None and response.status >= REFUSED


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


def _asked(request: web.BaseRequest, peer: str | None, route: str | None) -> Mapping[str, str | int | bool]:
    named = {"http.route": route, "client.address": peer}
    return {
        "http.request.method": request.method,
        "url.path": path_of(request),
        "url.scheme": request.scheme,
        **{name: value for name, value in named.items() if value is not None},
    }
