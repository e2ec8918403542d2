"""The way of inferences past what other requests need: path patterns, schemas and layers of middlewares.

The same gate, limits, roles, handler and errors as on the long way; a request that looks unusual takes that.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from server.appkeys import GATE
from server.auth import check_role
from server.direct import SERVER
from server.errors import error_response
from server.inference import infer
from server.ratelimit import Quota
from server.routes import Access, LimitClass

RequestHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_INFER = re.compile(r"/v2/models/([A-Za-z0-9][A-Za-z0-9._-]{0,127})(?:/versions/([1-9][0-9]{0,8}))?/infer")
"""With a version of as many digits as fit into any integer; the long way says what is wrong with others."""


def shorten(runner: web.BaseRunner, app: web.Application) -> None:
    """Have a runner that is set up send the app's inferences the short way."""
    server = runner.server
    assert server is not None, "the runner is not set up"
    server.request_handler = _shortcut(app, server.request_handler)


def _shortcut(app: web.Application, long_way: RequestHandler) -> RequestHandler:
    gate = app[GATE]

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        found = _INFER.fullmatch(request.raw_path) if request.method == hdrs.METH_POST else None
        if found is None or hdrs.EXPECT in request.headers:
            return await long_way(request)
        quota: Quota | None = None
        try:
            principal = gate.authenticate(request)
            quota = gate.count(principal, LimitClass.INFERENCE)
            check_role(principal, Access.PREDICT)
            model_id, version = found.groups()
            number = int(version) if version else None
            return await infer(request, app, model_id, number, subject=principal.subject, quota=quota)
        except Exception as error:  # noqa: BLE001 - every error becomes an answer, as on the long way
            response = error_response(request, error)
            response.headers.update(quota.headers() if quota is not None else {})
            response.headers[hdrs.SERVER] = SERVER
            return response

    return handle
