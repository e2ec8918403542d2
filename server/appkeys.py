"""The typed keys under which an application and its requests carry things, in one place."""

import asyncio

from aiohttp import web

from events.log import Log
from events.reader import Reader
from runtime.consumer import Consumer
from runtime.pool import WorkerPool
from runtime.repository import Repository
from runtime.router import Router
from server.auth import PRINCIPAL, Gate
from server.bodies import Bodies
from server.config import Config
from server.ratelimit import QUOTA
from server.routes import ROUTES

BODIES = web.AppKey("bodies", Bodies)
GATE = web.AppKey("gate", Gate)
CONFIG = web.AppKey("config", Config)
LOG = web.AppKey("log", Log)
READER = web.AppKey("reader", Reader)
REPOSITORY = web.AppKey("repository", Repository)
POOL = web.AppKey("pool", WorkerPool)
CONSUMER = web.AppKey("consumer", Consumer)
CONSUMER_TASK: web.AppKey[asyncio.Task[None]] = web.AppKey("consumer_task", asyncio.Task)
ROUTER = web.AppKey("router", Router)
STOPPING = web.AppKey("stopping", asyncio.Event)
"""Set when the server begins to stop: long waits answer with what they have."""
OPENAPI = web.AppKey("openapi", str)

__all__ = [
    "BODIES",
    "CONFIG",
    "CONSUMER",
    "CONSUMER_TASK",
    "GATE",
    "LOG",
    "OPENAPI",
    "POOL",
    "PRINCIPAL",
    "QUOTA",
    "READER",
    "REPOSITORY",
    "ROUTER",
    "ROUTES",
    "STOPPING",
]
