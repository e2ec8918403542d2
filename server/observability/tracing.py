"""Traces of requests and jobs by OpenTelemetry; imported only if traces are exported.

The library's own variables configure it (`OTEL_EXPORTER_OTLP_…`, `OTEL_SERVICE_NAME`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_…`). Its global provider stays unused.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator, Mapping

from aiohttp import hdrs, web
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from events.clock import parse_timestamp
from events.jobs import Job, JobStatus
from events.types import Event, ModelLoaded
from server.appkeys import CONFIG, GATE
from server.auth.gate import PRINCIPAL
from server.errors import CODE
from server.observability.output import RequestContext, begin_context
from server.observability.requestlog import FAULT, path_without_query
from server.routing import RequestHandler, matched_route, wrap_handler

PROPAGATOR = TraceContextTextMapPropagator()

TRACED_STAGES = ("copying", "starting", "loading", "warming_up", "measuring")
"""The stages of a load that have spans; files are hashed during them."""

CLOSE_S = 3.0
"""How long the end of the server waits for the collector."""


_INFER = re.compile(
    r"/v2/models/(?P<model>[^/]{1,128})(?:/versions/(?P<version>[A-Za-z0-9_.-]{1,63}))?/infer"
)


class Tracing:
    """Creates spans; the library's thread sends them in batches, and drops spans that it cannot send."""

    def __init__(self) -> None:
        resource = Resource.create(
            {"service.name": "loadledger", **OTELResourceDetector().detect().attributes}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("loadledger")

    def trace_requests(self, server: web.Server, app: web.Application) -> None:
        """Trace the requests of a server; for inferences without a trace, the configured share."""
        proxies, share = app[GATE].proxies, app[CONFIG].trace_inferences

        def wrap(inner: RequestHandler) -> RequestHandler:
            async def handle(request: web.BaseRequest) -> web.StreamResponse:
                parent = PROPAGATOR.extract(request.headers)
                is_part = trace.get_current_span(parent).get_span_context().is_valid
                if not is_part and _match_inference(request) and random.random() >= share:  # noqa: S311 - a sample
                    return await inner(request)
                attributes = _drop_none(
                    {
                        "http.request.method": request.method,
                        "url.path": path_without_query(request),
                        "url.scheme": request.scheme,
                        "client.address": proxies.peer(request),
                    }
                )
                with self._tracer.start_span(
                    request.method, parent, trace.SpanKind.SERVER, attributes
                ) as span:
                    context = begin_context(request)
                    context.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
                    PROPAGATOR.inject(context.carrier, trace.set_span_in_context(span))
                    response: web.StreamResponse | None = None
                    try:
                        response = await inner(request)
                    finally:
                        _set_response(span, request, response, context)
                    return response

            return handle

        wrap_handler(server, wrap)

    def record_job(self, job: Job, end: Event, carrier: Mapping[str, str]) -> None:
        parent, ended_ns = PROPAGATOR.extract(carrier), _nanoseconds(job.finished_at or end.recorded_at)
        named = {
            "loadledger.job": job.id,
            "loadledger.model": job.model_id,
            "loadledger.version": job.version,
            "loadledger.cause": job.cause.value,
            "loadledger.subject": job.requested_by,
            "loadledger.status": job.status.value,
            "loadledger.position": end.position,
            "error.type": job.error.code if job.error is not None else None,
        }
        began_ns = _nanoseconds(job.created_at)
        span = self._tracer.start_span(job.kind, parent, attributes=_drop_none(named), start_time=began_ns)
        inside = trace.set_span_in_context(span)
        for name, first_ns, last_ns in _stages(job, end, ended_ns):
            self._tracer.start_span(name, inside, start_time=first_ns).end(last_ns)
        if job.status is JobStatus.FAILED:
            span.set_status(trace.StatusCode.ERROR, job.error.message if job.error is not None else None)
        span.end(ended_ns)

    def close(self) -> None:
        """Export the remaining spans, for at most `CLOSE_S`."""
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _match_inference(request: web.BaseRequest) -> re.Match[str] | None:
    return _INFER.fullmatch(request.raw_path) if request.method == hdrs.METH_POST else None


def _drop_none(attributes: Mapping[str, str | int | None]) -> dict[str, str | int]:
    return {name: value for name, value in attributes.items() if value is not None}


def _set_response(
    span: trace.Span, request: web.BaseRequest, response: web.StreamResponse | None, context: RequestContext
) -> None:
    """Set the attributes of a response; for a cancelled request, the library sets its own."""
    route, principal = _route(request), request.get(PRINCIPAL)
    status, code = (None, None) if response is None else (response.status, response.get(CODE))
    is_fault = status is not None and status >= FAULT  # a refused request is no error of the server
    if route is not None:
        span.update_name(f"{request.method} {route}")
    named = {
        "http.route": route,
        "http.response.status_code": status,
        "loadledger.job": context.job_id,
        "loadledger.code": code,
        "loadledger.subject": principal.subject if principal is not None else None,
        "error.type": code or str(status) if is_fault else None,
    }
    span.set_attributes(_drop_none(named))
    if is_fault:
        span.set_status(trace.StatusCode.ERROR)


def _route(request: web.BaseRequest) -> str | None:
    if found := _match_inference(request):
        return f"/v2/models/{{id}}{'/versions/{version}' if found['version'] else ''}/infer"
    route = matched_route(request) if isinstance(request, web.Request) else None
    return route.path if route is not None else None


def _stages(job: Job, end: Event, ended_ns: int) -> Iterator[tuple[str, int, int]]:
    """Yield the stages of a job with their begin and end in nanoseconds, first its waiting."""
    started_ns = ended_ns if job.started_at is None else _nanoseconds(job.started_at)
    yield "waiting", _nanoseconds(job.created_at), started_ns
    if job.started_at is None:
        return
    if not isinstance(end.data, ModelLoaded):
        yield ("draining" if job.unload is not None else "loading"), started_ns, ended_ns
        return
    for name in TRACED_STAGES:
        duration_us: int | None = getattr(end.data.durations, f"{name}_us")
        if duration_us is not None:
            first_ns, started_ns = started_ns, min(started_ns + duration_us * 1000, ended_ns)
            yield name, first_ns, started_ns


def _nanoseconds(timestamp: str) -> int:
    return round(parse_timestamp(timestamp).timestamp() * 10**6) * 1000
