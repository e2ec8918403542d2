"""The typed keys of the application's resources."""

import asyncio

from aiohttp import web

from events.log import Log
from events.sqlite.listing import Reader
from runtime.consumer.consumer import Consumer
from runtime.memory import MemoryLimit
from runtime.memoryplan import MemoryPlan
from runtime.process.pool import WorkerPool
from runtime.router import Router
from runtime.scheduler.view import Policy
from runtime.store.versions import Versions
from runtime.uploads.uploads import Uploads
from server.api.stream import Streams
from server.auth.gate import Gate
from server.config import Config
from server.http.bodies import Bodies
from server.observability.timeseries import TimeSeries

BODIES = web.AppKey("bodies", Bodies)
GATE = web.AppKey("gate", Gate)
CONFIG = web.AppKey("config", Config)
LOG = web.AppKey("log", Log)
READER = web.AppKey("reader", Reader)
UPLOADS = web.AppKey("uploads", Uploads)
VERSIONS = web.AppKey("versions", Versions)
POOL = web.AppKey("pool", WorkerPool)
CONSUMER = web.AppKey("consumer", Consumer)
CONSUMER_TASK: web.AppKey[asyncio.Task[None]] = web.AppKey("consumer_task", asyncio.Task)
ROUTER = web.AppKey("router", Router)
LIMIT = web.AppKey("limit", MemoryLimit)
"""Memory of the container or machine."""
MEMORY_PLAN = web.AppKey("memory_plan", MemoryPlan)
POLICY = web.AppKey("policy", Policy)
"""The operator's settings of what may be loaded, once workers are confined."""
TIME_SERIES = web.AppKey("time_series", TimeSeries)
"""Samples for charts."""
STREAMS = web.AppKey("streams", Streams)
STOPPING = web.AppKey("stopping", asyncio.Event)
"""Set when the server begins to stop; ends long waits."""
