"""The fast path of inferences: it skips aiohttp's router and middlewares.

Gate, limits, handler and errors are those of all requests. An unusual request takes the router.
"""

from __future__ import annotations

import asyncio
import re

from aiohttp import hdrs, web

from server.appkeys import GATE
from server.errors import error_response
from server.http.responses import DirectResponse, response_completer
from server.observability.output import begin_context
from server.observability.requestlog import HTTP_COUNTS
from server.routing import Access, RequestHandler, wrap_handler
from server.v2.inference import infer

_INFER = re.compile(r"/v2/models/([A-Za-z0-9][A-Za-z0-9._-]{0,127})(?:/versions/([1-9][0-9]{0,8}))?/infer")
"""The version has as many digits as fit into any integer; the router's path refuses others with a reason."""

_PATH, _PATH_OF_VERSION = "/v2/models/{id}/infer", "/v2/models/{id}/versions/{version}/infer"
"""The paths of the routes, for counts and for denials in the ledger."""


def add_fast_path(server: web.Server, app: web.Application) -> None:
    gate, counts = app[GATE], app[HTTP_COUNTS]
    complete = response_completer(gate.proxies)

    def wrap(router_path: RequestHandler) -> RequestHandler:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            found = _INFER.fullmatch(request.raw_path) if request.method == hdrs.METH_POST else None
            if found is None or hdrs.EXPECT in request.headers:
                return await router_path(request)
            model_id, version = found.groups()
            path = _PATH_OF_VERSION if version else _PATH
            response: web.StreamResponse
            try:
                await gate.admit(request, Access.PREDICT, f"POST {path}", model_id)
                response = await infer(request, app, model_id, int(version) if version else None)
            except asyncio.CancelledError:
                counts.count("POST", path, None)
                raise
            except Exception as error:  # noqa: BLE001 - every error becomes a response, as in the middlewares
                response = error_response(request, error)
            if isinstance(response, DirectResponse):
                counts.requests["POST", path, "2xx"] += 1
                return response
            begin_context(request)
            await complete(request, response)
            counts.count("POST", path, response)
            return response

        return handle

    wrap_handler(server, wrap)
