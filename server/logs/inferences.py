"""Log lines and spans of single inferences, as far as they are asked for: else nothing is in their way."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from server.appkeys import CONFIG, PROXIES
from server.logs.requests import Watched, path_of
from server.logs.telemetry import TELEMETRY, Telemetry
from server.logs.tracing import TRACEPARENT, given_trace

RequestHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_INFER = re.compile(r"/v2/models/([^/]{1,128})(?:/versions/([0-9]{1,9}))?/infer")


def watch_inferences(runner: web.BaseRunner, app: web.Application) -> None:
    """Have inferences logged and traced as configured; where they are not, nothing stands in their way."""
    server, config, telemetry = runner.server, app[CONFIG], app.get(TELEMETRY)
    assert server is not None, "the runner is not set up"
    if config.log_inferences or telemetry is not None:
        server.request_handler = _watching(app, server.request_handler, telemetry)


def _watching(app: web.Application, inner: RequestHandler, telemetry: Telemetry | None) -> RequestHandler:
    logged, traced, proxies = app[CONFIG].log_inferences, app[CONFIG].trace_inferences, app[PROXIES]

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        level = logging.INFO if logged and random.random() < logged else None  # noqa: S311 - a sample
        wanted = telemetry if _is_traced(request) or random.random() < traced else None  # noqa: S311
        found = None if level is None and wanted is None else _INFER.fullmatch(request.raw_path)
        if found is None or request.method != hdrs.METH_POST:
            return await inner(request)
        route = f"/v2/models/{{id}}{'/versions/{version}' if found[2] else ''}/infer"
        watched = Watched.begin(request, proxies, wanted, route)
        response: web.StreamResponse | None = None
        try:
            response = await inner(request)
        finally:
            told = {"method": request.method, "path": path_of(request), "peer": proxies.peer(request)}
            watched.end(level, response, model=found[1], version=found[2], **told)
        return response

    return handle


def _is_traced(request: web.BaseRequest) -> bool:
    """Whether its caller names a trace, by a field that is well formed."""
    headers = request.headers
    return TRACEPARENT in headers and given_trace(headers.getall(TRACEPARENT), ()) is not None
