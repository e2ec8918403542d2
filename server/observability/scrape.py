"""The route `/metrics`: Prometheus' text format or OpenMetrics, kept for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from server.http.compression import COMPRESSED_FROM_BYTES, chosen_encoding, compress
from server.observability.collector import ServerCollector
from server.routing import Access, LimitClass, Route, Routes

routes = Routes(tag="health")

OPEN = "open"
"""The value of --metrics that requires no token."""

KEPT_S = 0.1
"""How long a response is kept at least, so that simultaneous scrapes share it."""

KEPT_TIMES = 10
"""How long it is kept, in multiples of the time it took: scraping uses a tenth of a core at most."""


_PLAIN, _OPENMETRICS = "text/plain", "application/openmetrics-text"
_FORMATS: dict[str, tuple[str, Callable[[Collector], bytes]]] = {
    _PLAIN: (CONTENT_TYPE_PLAIN_0_0_4, generate_latest),
    _OPENMETRICS: (openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest),
}


class Scrapes:
    """The last response in each format, kept for a moment and shared by the scrapes of that time."""

    def __init__(self) -> None:
        self._answers: dict[str, asyncio.Task[bytes]] = {}
        self._kept_until_s: dict[str, float] = {}

    async def body(self, app: web.Application, media_type: str) -> bytes:
        """Return the metrics in a format."""
        answer = self._answers.get(media_type)
        if answer is None or (answer.done() and time.monotonic() >= self._kept_until_s.get(media_type, 0)):
            answer = self._answers[media_type] = asyncio.create_task(self._generate(app, media_type))
        return await asyncio.shield(answer)  # a scraper that leaves does not cancel it for others

    async def _generate(self, app: web.Application, media_type: str) -> bytes:
        began_s = time.monotonic()
        body = await asyncio.to_thread(_FORMATS[media_type][1], ServerCollector(app))
        now_s = time.monotonic()
        self._kept_until_s[media_type] = now_s + max(KEPT_S, KEPT_TIMES * (now_s - began_s))
        return body


SCRAPES = web.AppKey("scrapes", Scrapes)


@routes.get(
    "/metrics",
    access=Access.ANY,
    summary="Metrics for Prometheus",
    description="Prometheus' text format, or OpenMetrics' if `Accept` asks for it. docs/metrics.md lists "
    "them. With `--metrics=open` no token is needed.",
    answers={
        200: {
            "description": "As it is now, or was a moment ago.",
            "content": {
                media_type: {"schema": {"type": "string"}, "example": "loadledger_ledger_position 17\n"}
                for media_type in _FORMATS
            },
        }
    },
)
async def show_metrics(request: web.Request) -> web.Response:
    """Return all metrics."""
    media_type = negotiate(",".join(request.headers.getall(hdrs.ACCEPT, ())))
    body = await request.app[SCRAPES].body(request.app, media_type)
    headers = {
        hdrs.CONTENT_TYPE: _FORMATS[media_type][0],
        hdrs.VARY: f"{hdrs.ACCEPT}, {hdrs.ACCEPT_ENCODING}",
    }
    encoding = chosen_encoding(request.headers.get(hdrs.ACCEPT_ENCODING))
    if encoding is not None and len(body) >= COMPRESSED_FROM_BYTES:
        headers[hdrs.CONTENT_ENCODING] = encoding
        body = await compress([body], encoding)
    return web.Response(body=body, headers=headers)


def metrics_routes(metrics: str) -> list[Route]:
    """Return the routes of this module; `metrics` is the setting of who may read them."""
    if metrics != OPEN:
        return routes
    return [replace(route, access=Access.PUBLIC, limit=LimitClass.NONE) for route in routes]


def negotiate(accept: str) -> str:
    """Return the media type of the response: OpenMetrics if `accept` names it, in version 1.0.0 or none."""
    for accepted in accept.split(","):
        media_type, *parameters = (part.strip() for part in accepted.split(";"))
        versions = [value for value in parameters if value.startswith("version=")]
        if media_type == _OPENMETRICS and versions in ([], ["version=1.0.0"]):
            return _OPENMETRICS
    return _PLAIN
