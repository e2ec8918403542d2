"""A collector of traces as OpenTelemetry has it: an HTTP server that takes spans, and keeps them.

The metrics that docs/metrics.md lists.
"""

import asyncio
import gzip
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Taken:
    """A span as it came."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    state: str
    failed: bool
    began_ns: int
    ended_ns: int
    attributes: Mapping[str, str | int]
    resource: Mapping[str, str | int]


@dataclass(slots=True)
class Collector:
    """What came so far."""

    endpoint: str
    spans: list[Taken] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def environment(self) -> dict[str, str]:
        """What the exporter is told to send here, and soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def named(self, name: str) -> list[Taken]:
        """Return the spans of a name."""
        return [span for span in self.spans if span.name == name]

    def children(self, parent: Taken) -> list[Taken]:
        """Return the spans in one, by the time they began."""
        inside = [span for span in self.spans if span.parent_id == parent.span_id]
        return sorted(inside, key=lambda span: span.began_ns)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until enough has come."""
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                self.came.clear()
                await self.came.wait()

    async def take(self, request: web.Request) -> web.Response:
        """Take what an exporter sends."""
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip" and body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        told = ExportTraceServiceRequest()
        told.ParseFromString(body)
        for resource in told.resource_spans:
            of = _attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_taken(span, of) for span in scope.spans]
        self.came.set()
        return web.Response(content_type="application/x-protobuf")


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """Run a collector on a free port."""
    app = web.Application()
    runner = web.AppRunner(app)
    collector = Collector("")
    app.router.add_post("/v1/traces", collector.take)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    collector.endpoint = f"http://127.0.0.1:{site.port}"
    try:
        yield collector
    finally:
        await runner.cleanup()


def _attributes(pairs: object) -> dict[str, str | int]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}  # type: ignore[attr-defined]


def _taken(span: object, resource: Mapping[str, str | int]) -> Taken:
    return Taken(
        name=span.name,  # type: ignore[attr-defined]
        trace_id=span.trace_id.hex(),  # type: ignore[attr-defined]
        span_id=span.span_id.hex(),  # type: ignore[attr-defined]
        parent_id=span.parent_span_id.hex(),  # type: ignore[attr-defined]
        kind=span.kind,  # type: ignore[attr-defined]
        state=span.trace_state,  # type: ignore[attr-defined]
        failed=span.status.code == 2,  # type: ignore[attr-defined]
        began_ns=span.start_time_unix_nano,  # type: ignore[attr-defined]
        ended_ns=span.end_time_unix_nano,  # type: ignore[attr-defined]
        attributes=_attributes(span.attributes),  # type: ignore[attr-defined]
        resource=resource,
    )


_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(loadledger_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", re.MULTILINE)


class Family(NamedTuple):
    """One row of the table."""

    name: str
    kind: str
    labels: frozenset[str]
    text: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which a query finds it."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))


FAMILIES = [
    Family(name, kind, frozenset(re.findall(r"\w+", labels)), text)
    for name, kind, labels, text in _ROW.findall(_PAGE.read_text(encoding="utf-8"))
]
