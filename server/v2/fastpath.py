"""The way of inferences past what other requests need: path patterns, schemas and layers of middlewares.

The same gate, limits, roles, handler and errors as on the long way; a request that looks unusual takes that.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from server.appkeys import GATE, PROXIES
from server.auth.ratelimit import Quota
from server.errors import error_response
from server.http.responses import SERVER
from server.observability.output import REQUEST_ID, begin_context
from server.observability.requestlog import HTTP_COUNTS
from server.routing import Access, LimitClass
from server.v2.inference import infer

RequestHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_INFER = re.compile(r"/v2/models/([A-Za-z0-9][A-Za-z0-9._-]{0,127})(?:/versions/([1-9][0-9]{0,8}))?/infer")
"""With a version of as many digits as fit into any integer; the long way says what is wrong with others."""

_ACTION, _ACTION_OF_VERSION = "POST /v2/models/{id}/infer", "POST /v2/models/{id}/versions/{version}/infer"
"""The names of the routes, for the ledger."""
_PATH, _PATH_OF_VERSION = (action.removeprefix("POST ") for action in (_ACTION, _ACTION_OF_VERSION))
_ANSWERED, _ANSWERED_OF_VERSION = (("POST", path, "2xx") for path in (_PATH, _PATH_OF_VERSION))
"""What is counted for an answer: method, path and class of status."""


def shorten(runner: web.BaseRunner, app: web.Application) -> None:
    """Have a runner that is set up send the app's inferences the short way."""
    server = runner.server
    assert server is not None, "the runner is not set up"
    server.request_handler = _shortcut(app, server.request_handler)


def _shortcut(app: web.Application, long_way: RequestHandler) -> RequestHandler:
    gate, proxies, counts = app[GATE], app[PROXIES], app[HTTP_COUNTS]

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        found = _INFER.fullmatch(request.raw_path) if request.method == hdrs.METH_POST else None
        if found is None or hdrs.EXPECT in request.headers:
            return await long_way(request)
        quota: Quota | None = None
        try:
            principal = gate.authenticate(request)
            quota = gate.count(principal, LimitClass.INFERENCE)
            model_id, version = found.groups()
            gate.admit(principal, Access.PREDICT, _ACTION_OF_VERSION if version else _ACTION)
            number = int(version) if version else None
            answer = await infer(request, app, model_id, number, subject=principal.subject, quota=quota)
        except asyncio.CancelledError:
            counts.aborted("POST", _PATH_OF_VERSION if found[2] else _PATH)
            raise
        except Exception as error:  # noqa: BLE001 - every error becomes an answer, as on the long way
            named = begin_context(request).request_id
            response = error_response(request, error)
            response.headers[REQUEST_ID] = named
            response.headers.update(quota.headers() if quota is not None else {})
            response.headers[hdrs.SERVER] = SERVER
            proxies.relocate(request, response)
            counts.answered("POST", _PATH_OF_VERSION if found[2] else _PATH, response)
            return response
        counts.requests[_ANSWERED_OF_VERSION if version else _ANSWERED] += 1
        return answer

    return handle
