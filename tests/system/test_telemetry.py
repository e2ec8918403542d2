"""Traces of a real server, exported to a collector: request, job and stages are one trace."""

import asyncio
import gzip
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from support import models
from support.http import LIMIT_S, ONE, Json
from support.models import save
from support.servers import Server, serving

from server.config import Config
from server.serve import INSTALL_OTEL

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
UNSAMPLED = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "a=1,b=2"}
FORWARDED = {"X-Forwarded-For": "203.0.113.9, 192.0.2.1"}
SERVER_KIND = 2
LOAD, INFER = "POST /api/v1/models/{id}/load", "POST /v2/models/{id}/infer"
LOUD = {"LOADLEDGER_LOG_LEVEL": "info", "LOADLEDGER_LOG_FORMAT": "json"}


class Exported:
    """A span as the collector received it."""

    def __init__(self, span: Span, resource: Iterable[KeyValue]) -> None:
        self.name, self.kind, self.state = span.name, span.kind, span.trace_state
        self.trace_id, self.span_id = span.trace_id.hex(), span.span_id.hex()
        self.parent_id = span.parent_span_id.hex()
        self.failed = span.status.code == Status.STATUS_CODE_ERROR
        self.began_ns, self.ended_ns = span.start_time_unix_nano, span.end_time_unix_nano
        self.attributes, self.resource = as_dict(span.attributes), as_dict(resource)


def as_dict(pairs: Iterable[KeyValue]) -> dict[str, str | int]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in pairs}


@dataclass(slots=True)
class Collector:
    """What came so far."""

    endpoint: str
    spans: list[Exported] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def environment(self) -> dict[str, str]:
        """What the exporter is told to send here, and soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def named(self, name: str) -> list[Exported]:
        """Return the spans of a name."""
        return [span for span in self.spans if span.name == name]

    def children(self, parent: Exported) -> list[Exported]:
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
        for each in told.resource_spans:
            for scope in each.scope_spans:
                self.spans += [Exported(span, each.resource.attributes) for span in scope.spans]
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


async def load(server: Server, model: str = "m", **headers: str) -> Json:
    answer = await server.api.post(f"/api/v1/models/{model}/load", wait=60, headers=headers)
    return answer.json


async def infer(server: Server, **headers: str) -> int:
    answer = await server.api.post(
        "/v2/models/m/infer", roles=("infer",), json={"inputs": [ONE]}, headers=headers
    )
    return answer.status


def inside(collector: Collector, outer: Exported) -> list[str]:
    return [span.name for span in collector.children(outer)]


async def test_request_job_and_stages_join_the_callers_trace(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    async with collecting() as collector:
        environment = {**collector.environment, **LOUD, "OTEL_SERVICE_NAME": "shop-models"}
        async with serving(config, "--trusted-proxies=127.0.0.1", environment=environment) as server:
            job = await load(server, **SAMPLED, **FORWARDED)
            assert await infer(server, **SAMPLED, **FORWARDED) == 200
            await collector.until(lambda: bool(collector.named("load") and collector.named(INFER)))
            await server.api.unload("m")
            assert await server.stop() == 0  # what was not sent yet is sent now
            told = [json.loads(line) for line in server.output.read_text().splitlines()]
        (request,), (load_job,) = collector.named(LOAD), collector.named("load")
        (inference,), (unload_job,) = collector.named(INFER), collector.named("unload")
    for span in (request, load_job, inference):
        assert (span.trace_id, span.state, span.failed) == (TRACE_ID, "a=1,b=2", False)
        assert span.resource["service.name"] == "shop-models"
    assert (request.parent_id, request.kind) == (SPAN_ID, SERVER_KIND)
    assert (inference.parent_id, inference.kind) == (SPAN_ID, SERVER_KIND)
    assert load_job.parent_id == request.span_id
    assert request.began_ns <= load_job.began_ns <= load_job.ended_ns <= request.ended_ns
    for span in (request, inference):
        assert span.attributes["client.address"] == "192.0.2.1"  # whom the proxy names, and not the proxy
        assert "loadledger.subject" in span.attributes
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["http.route"] == "/api/v1/models/{id}/load"
    assert request.attributes["loadledger.job"] == load_job.attributes["loadledger.job"] == job["id"]
    assert (load_job.attributes["loadledger.model"], load_job.attributes["loadledger.version"]) == ("m", 1)
    stages = ["waiting", "copying", "starting", "loading", "warming_up", "measuring"]
    assert inside(collector, load_job) == stages
    for stage in collector.children(load_job):
        assert load_job.began_ns <= stage.began_ns <= stage.ended_ns <= load_job.ended_ns
    assert [line["trace_id"] for line in told if line.get("job") == job["id"]] == [TRACE_ID] * 4
    assert unload_job.trace_id != TRACE_ID  # its request named none
    assert inside(collector, unload_job) == ["waiting", "draining"]


async def test_unsampled_requests_are_not_exported(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    async with (
        collecting() as collector,
        serving(config, "--trace-inferences=0", environment=collector.environment | LOUD) as server,
    ):
        await load(server, **UNSAMPLED)
        assert [await infer(server), await infer(server, **UNSAMPLED)] == [200, 200]
        malformed = SAMPLED | {"traceparent": "00-zz-00-01"}  # as if it had not come
        assert await infer(server, **malformed) == 200
        (config.repository / "m" / "2").mkdir()
        (config.repository / "m" / "2" / "model.onnx").write_bytes(b"no model")
        assert (await load(server, **malformed))["status"] == "failed"
        assert await infer(server, **UNSAMPLED, tracestate="A=1,=") == 200
        await server.stop()
        told = [json.loads(line) for line in server.output.read_text().splitlines()]
    assert not [line for line in told if line["logger"].startswith("opentelemetry")]  # anybody could fill it
    assert not collector.named(INFER)
    (request,), (job,) = (collector.named(name) for name in (LOAD, "load"))
    assert request.state == ""
    assert request.trace_id != TRACE_ID
    assert (job.failed, job.attributes["error.type"]) == (True, "invalid_model")
    assert (request.failed, request.parent_id, job.parent_id) == (False, "", request.span_id)
    assert request.resource["service.name"] == "loadledger"


NOWHERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
"""The port is `discard`: nobody listens."""


async def test_unreachable_collector_costs_only_spans(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    async with serving(config, environment=NOWHERE) as server:
        assert (await load(server, **SAMPLED))["status"] == "completed"
        assert await infer(server, **SAMPLED) == 200
        assert await server.stop() == 0


WITHOUT_EXTRA = """
import sys
import server.serve
assert not [name for name in sys.modules if name.startswith(("opentelemetry", "google"))]
sys.modules["opentelemetry"] = None
from loadledger.__main__ import main
main()
"""
"""The command where OpenTelemetry is not installed, and what it imports without being told to export."""


async def test_otel_is_imported_if_asked_for_and_its_lack_named(config: Config) -> None:
    command = (sys.executable, "-P", "-c", WITHOUT_EXTRA)
    async with serving(config, command=command, environment=NOWHERE) as server:
        await server.logged(INSTALL_OTEL)
