"""A small application with the real middlewares, in their real order, and a token for whoever asks."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from server.auth.gate import PRINCIPAL, Gate, auth_middleware, create_verifier
from server.auth.keys import ensure_data_dir, issue_token
from server.auth.ratelimit import RateLimits, add_quota_headers
from server.config import Config
from server.errors import errors_middleware
from server.routes import Access, LimitClass, Route, add_routes
from server.validation import validation_middleware


def small_config(folder: Path, **changes: object) -> Config:
    """Return a configuration over a new data directory with keys."""
    ensure_data_dir(folder)
    return replace(Config(repository=folder, data=folder), **changes)  # type: ignore[arg-type]


def small_app(
    routes: Iterable[Route], config: Config, clock: Callable[[], float] = time.time
) -> web.Application:
    """Assemble what stands between the network and a handler."""
    limits = RateLimits(config, clock)
    app = web.Application(
        middlewares=[
            errors_middleware,
            auth_middleware(Gate(create_verifier(config), limits, clock)),
            validation_middleware,
        ]
    )
    app.on_response_prepare.append(add_quota_headers)
    add_routes(app, routes)
    return app


def bearer(config: Config, *roles: str, subject: str = "alice", expires_s: float = 3600) -> dict[str, str]:
    """Return the header of a valid token."""
    token = issue_token(config.data, subject, roles or ["admin"], expires_s=expires_s, audience="loadledger")
    return {"Authorization": f"Bearer {token}"}


async def whoami(request: web.Request) -> web.Response:
    """Answer with the subject, if there is one."""
    principal = request.get(PRINCIPAL)
    return web.json_response({"subject": principal.subject if principal is not None else None})


def route(
    path: str = "/x",
    handler: Handler = whoami,
    *,
    method: str = "GET",
    access: Access = Access.ANY,
    limit: LimitClass = LimitClass.READS,
) -> Route:
    """Return a route with the usual answers to what a test does not care about."""
    return Route(method, path, handler, access, limit)
