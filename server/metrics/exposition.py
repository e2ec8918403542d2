"""`/metrics`: what Prometheus scrapes, in its own text format or in OpenMetrics', as the scraper asks for.

Nothing is counted here, and nothing is kept in a registry: each scrape is a look at what the server knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from aiohttp import hdrs, web
from aiohttp_apispec import docs
from prometheus_client import ProcessCollector
from prometheus_client.exposition import choose_encoder

from server.appkeys import LOG
from server.compression import chosen_encoding, compress
from server.metrics.look import look
from server.metrics.samples import Collected
from server.routes import Access, LimitClass, Route

T = TypeVar("T")

PATH = "/metrics"
OPEN = "open"
"""The value of --metrics with which nobody needs a token."""

KEPT_S = 0.1
"""How long an answer stands at least."""
KEPT_TIMES = 10
"""How long it stands, in times of what it took: whoever scrapes all the time costs a tenth of a core."""

_PLAIN, _OPEN_METRICS = "text/plain", "application/openmetrics-text"
_ASKED = ("", f"{_PLAIN};version=1.0.0", f"{_OPEN_METRICS};version=1.0.0", _OPEN_METRICS)
_ESCAPINGS = ("", "allow-utf-8", "underscores", "dots", "values")
_FORMS = {
    choose_encoder(f"{asked};escaping={escaping}" if escaping else asked)[1]
    for asked in _ASKED
    for escaping in _ESCAPINGS
}
"""The content types that there are; the chooser would make more, of whatever version a client makes up."""

COMPRESSED_FROM_BYTES = 1024


class Scrapes:
    """The last look, in the forms that were asked for; it stands for a moment, and one is made at a time."""

    def __init__(self) -> None:
        self._making = asyncio.Lock()
        self._made: set[asyncio.Task[bytes]] = set()
        self._process = ProcessCollector(registry=None)
        self._took_s = 0.0
        self._until_s = 0.0
        self._bodies: dict[str, bytes] = {}
        self._collected: Collected | None = None

    async def body(self, app: web.Application, accept: str) -> tuple[bytes, str]:
        """Return the metrics and their content type.

        Args:
            app: the application.
            accept: the request's Accept.
        """
        form = _form(accept)
        making = asyncio.create_task(self._body(app, form))
        self._made.add(making)
        making.add_done_callback(self._made.discard)
        return await asyncio.shield(making), form  # a thread goes on though nobody waits: better one of them

    async def _body(self, app: web.Application, form: str) -> bytes:
        async with self._making:
            if self._collected is None or time.monotonic() >= self._until_s:
                await self._look(app)
            assert self._collected is not None
            if form not in self._bodies:
                self._bodies[form] = await self._timed(partial(_encoded, form, self._collected))
            return self._bodies[form]

    async def _look(self, app: web.Application) -> None:
        self._bodies.clear()
        self._took_s = 0.0
        seen, path = await look(app), app[LOG].path
        self._collected = await self._timed(lambda: Collected(seen, _size(path), [self._process]))

    async def _timed(self, work: Callable[[], T]) -> T:
        """Do some work in a thread, and have what is there stand the longer for what it took."""

        def timed() -> tuple[T, float]:
            began = time.thread_time()
            return work(), time.thread_time() - began

        done, took_s = await asyncio.to_thread(timed)
        self._took_s += took_s
        self._until_s = time.monotonic() + max(KEPT_S, KEPT_TIMES * self._took_s)
        return done


@docs(
    tags=["health"],
    summary="Metrics for Prometheus",
    description=(
        "Prometheus' text format, or OpenMetrics' if `Accept` asks for it. docs/metrics.md lists them."
        " With `--metrics=open` no token is needed."
    ),
    responses={
        "200": {
            "description": "As it is now, or was a moment ago.",
            "content": {
                media_type: {"schema": {"type": "string"}, "example": "loadledger_ledger_position 17\n"}
                for media_type in (_PLAIN, _OPEN_METRICS)
            },
        }
    },
)
async def show_metrics(request: web.Request) -> web.Response:
    """Answer with all metrics."""
    accept = ",".join(request.headers.getall(hdrs.ACCEPT, ()))
    body, content_type = await request.app[SCRAPES].body(request.app, accept)
    headers = {hdrs.CONTENT_TYPE: content_type, hdrs.VARY: f"{hdrs.ACCEPT}, {hdrs.ACCEPT_ENCODING}"}
    encoding = chosen_encoding(request.headers.get(hdrs.ACCEPT_ENCODING))
    if encoding is not None and len(body) >= COMPRESSED_FROM_BYTES:
        headers[hdrs.CONTENT_ENCODING] = encoding
        body = await compress([body], encoding)
    return web.Response(body=body, headers=headers)


SCRAPES = web.AppKey("scrapes", Scrapes)


def metrics_routes() -> list[Route]:
    """Return the routes of this module."""
    return [Route("GET", PATH, show_metrics, Access.ANY, LimitClass.READS)]


def with_metrics_access(routes: Iterable[Route], metrics: str) -> Sequence[Route]:
    """Return the routes with that of the metrics as --metrics has it."""
    if metrics != OPEN:
        return list(routes)
    public = (
        replace(route, access=Access.PUBLIC, limit=LimitClass.NONE) if route.path == PATH else route
        for route in routes
    )
    return list(public)


def _form(accept: str) -> str:
    """Return the content type to answer with; a version that nobody has is as if nothing was asked for."""
    try:
        _, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # of a version that is none
        content_type = ""
    return content_type if content_type in _FORMS else choose_encoder("")[1]


def _encoded(form: str, collected: Collected) -> bytes:
    # All our names are plain, so that they are written alike whatever the escaping: this is the quickest one.
    encoder, _ = choose_encoder(f"{form.partition('; escaping')[0]}; escaping=allow-utf-8")
    return encoder(collected)


def _size(ledger: Path) -> int:
    """Return what the ledger's files take; its write-ahead log may not be there."""
    size = 0
    for path in (ledger, ledger.with_name(f"{ledger.name}-wal")):
        try:
            size += path.stat().st_size
        except OSError:
            continue
    return size
