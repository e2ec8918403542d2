"""The application: its routes and middlewares, and its resources, each opened and closed in one place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from aiohttp import hdrs, web

from events.errors import LogUnavailable
from events.lock import hold
from events.log import Log
from events.reader import open_reader
from runtime.consumer import Consumer
from runtime.pool import WorkerPool
from runtime.repository import Repository
from runtime.router import Router
from runtime.scheduler import Policy
from server.appkeys import (
    BODIES,
    CONFIG,
    CONSUMER,
    CONSUMER_TASK,
    GATE,
    LOG,
    OPENAPI,
    POOL,
    READER,
    REPOSITORY,
    ROUTER,
    STOPPING,
)
from server.auth import Gate, auth_middleware, create_verifier
from server.bodies import MAX_BODIES_BYTES, Bodies
from server.config import Config
from server.direct import SERVER
from server.docspage import docs_routes
from server.errors import errors_middleware
from server.health import dead, health_routes
from server.inference import inference_routes
from server.jobs import job_routes
from server.keys import ensure_data_dir
from server.management import management_routes
from server.openapi import openapi_yaml
from server.protocol import MAX_BODY_BYTES
from server.ratelimit import RateLimits, add_quota_headers
from server.routes import Route, add_routes
from server.v2repository import repository_routes
from server.v2server import server_routes
from server.validation import validation_middleware

LEDGER = "ledger.db"
"""The log's file in the data directory."""


def all_routes() -> list[Route]:
    """Return every route of the server."""
    return [
        *management_routes(),
        *job_routes(),
        *inference_routes(),
        *server_routes(),
        *repository_routes(),
        *health_routes(),
        *docs_routes(),
    ]


def create_app(config: Config) -> web.Application:
    """Return the application; nothing is opened before it starts."""
    gate = Gate(create_verifier(config), RateLimits(config))
    app = web.Application(
        middlewares=[
            errors_middleware,
            auth_middleware(gate),
            validation_middleware,
        ],
        client_max_size=MAX_BODY_BYTES,
    )
    routes = all_routes()
    add_routes(app, routes)
    app[CONFIG] = config
    app[GATE] = gate
    app[BODIES] = Bodies(MAX_BODIES_BYTES)
    app[OPENAPI] = openapi_yaml(routes)
    app[STOPPING] = asyncio.Event()
    app.on_response_prepare.extend([add_quota_headers, _name_no_versions])
    app.on_shutdown.append(_begin_stop)
    app.cleanup_ctx.extend([_data_directory, _workers, _ledger, _reading, _applying])
    return app


async def _name_no_versions(_request: web.Request, response: web.StreamResponse) -> None:
    """Keep to ourselves what runs here, in which version."""
    response.headers[hdrs.SERVER] = SERVER


async def _begin_stop(app: web.Application) -> None:
    """Let long waits answer with what they have: clean-up waits for their handlers."""
    app[STOPPING].set()
    app[LOG].notify()


async def _data_directory(app: web.Application) -> AsyncIterator[None]:
    data = app[CONFIG].data
    await asyncio.to_thread(ensure_data_dir, data)
    with hold(data):
        yield


async def _workers(app: web.Application) -> AsyncIterator[None]:
    app[REPOSITORY] = Repository(app[CONFIG].repository)
    app[POOL] = pool = WorkerPool(threads=app[CONFIG].threads, patience_s=app[CONFIG].inference_grace_s)
    await pool.open()
    try:
        yield
    finally:
        await pool.close()


async def _ledger(app: web.Application) -> AsyncIterator[None]:
    app[LOG] = log = Log(app[CONFIG].data / LEDGER)
    await log.open()
    try:
        await log.server_started()
        yield
        if not dead(app):  # else the next start has to know that this was no orderly stop
            with suppress(LogUnavailable):  # it will be known as unclean, then
                await log.server_stopped()
    finally:
        await log.close()


async def _reading(app: web.Application) -> AsyncIterator[None]:
    async with open_reader(app[LOG].path) as reader:
        app[READER] = reader
        yield


async def _applying(app: web.Application) -> AsyncIterator[None]:
    config = app[CONFIG]
    app[CONSUMER] = consumer = Consumer(
        app[LOG],
        app[POOL],
        app[REPOSITORY],
        policy=Policy(config.max_loads()),
        drain_timeout_s=config.drain_timeout_s,
    )
    app[ROUTER] = Router(app[LOG], consumer.live, app[REPOSITORY], max_queue=config.inference_queue)
    app[CONSUMER_TASK] = task = asyncio.create_task(consumer.run(), name="consumer")
    try:
        yield
    finally:
        await consumer.stop()
        await asyncio.wait([task])
