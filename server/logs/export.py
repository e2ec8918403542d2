"""Spans exported with OpenTelemetry, by OTLP over HTTP, in the library's thread.

The library is configured by its own variables (`OTEL_EXPORTER_OTLP_…`, `OTEL_SERVICE_NAME`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_…`). Its global provider is left alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.span import TraceState

from events.clock import moment
from events.jobs import Job, JobStatus
from events.types import Durations, Event, ModelLoaded
from server.logs.tracing import Trace

CLOSE_S = 3.0
"""How long the end of the server waits for who takes the spans."""

SERVER_FAULT = 500

Attributes = Mapping[str, str | int | bool]


class RequestSpan:
    """The span of a request that is being served."""

    def __init__(self, span: api.Span, asked: Trace) -> None:
        self._span = span
        context = span.get_span_context()
        self.trace = Trace(
            api.format_trace_id(context.trace_id),
            api.format_span_id(context.span_id),
            context.trace_flags.sampled,
            asked.state,
            remote=True,
        )

    def end(self, status: int | None, attributes: Attributes) -> None:
        """End the span."""
        span = self._span
        if span.is_recording():
            span.set_attributes(attributes)
            if status is not None:
                span.set_attribute("http.response.status_code", status)
            if status is None or status >= SERVER_FAULT:  # a client's mistake is none of the server's
                span.set_attribute(
                    "error.type", str(attributes.get("loadledger.code") or status or "aborted")
                )
                span.set_status(api.StatusCode.ERROR)
        span.end()


class Exporting:
    """Makes spans, which the library's thread sends in batches; what it cannot send it drops."""

    def __init__(self) -> None:
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("loadledger")

    def request(self, trace: Trace, name: str, attributes: Attributes) -> RequestSpan:
        """Begin the span of a request, in the trace that it names or a new one."""
        parent = _within(trace) if trace.remote else api.set_span_in_context(api.INVALID_SPAN)
        span = self._tracer.start_span(name, parent, api.SpanKind.SERVER, dict(attributes))
        return RequestSpan(span, trace)

    def job(self, job: Job, end: Event, trace: Trace | None) -> None:
        """Record the spans of a job that has ended: the job, and in it its stages."""
        parent = _within(trace) if trace is not None else api.set_span_in_context(api.INVALID_SPAN)
        began, ended = _ns(job.created_at), _ns(job.finished_at or end.recorded_at)
        span = self._tracer.start_span(
            str(job.kind), parent, attributes=dict(_attributes(job, end)), start_time=began
        )
        if span.is_recording():
            inside = api.set_span_in_context(span)
            for name, first, last in _stages(job, end, ended):
                self._tracer.start_span(name, inside, start_time=first).end(last)
            if job.status is JobStatus.FAILED:
                span.set_status(api.StatusCode.ERROR, job.error.message if job.error is not None else None)
        span.end(ended)

    async def close(self) -> None:
        """Export what is waiting, in a thread that nobody waits for longer than `CLOSE_S`."""
        closed, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_S):
                await closed.wait()
        except TimeoutError:
            return


def _resource() -> Resource:
    """Return who we are: what the library's variables say, else our name."""
    told = Resource.create()
    if str(told.attributes["service.name"]).startswith("unknown_service"):
        return told.merge(Resource({"service.name": "loadledger"}))
    return told


def _within(trace: Trace) -> Context:
    """Return a context in which new spans are parts of a span that is known by its ids alone."""
    flags = api.TraceFlags(api.TraceFlags.SAMPLED if trace.sampled else api.TraceFlags.DEFAULT)
    state = TraceState.from_header([trace.state]) if trace.state else None
    known = api.SpanContext(
        int(trace.trace_id, 16), int(trace.span_id, 16), is_remote=True, trace_flags=flags, trace_state=state
    )
    return api.set_span_in_context(api.NonRecordingSpan(known))


def _attributes(job: Job, end: Event) -> Iterator[tuple[str, str | int]]:
    yield "loadledger.job", job.id
    yield "loadledger.model", job.model_id
    if job.version is not None:
        yield "loadledger.version", job.version
    yield "loadledger.cause", str(job.cause)
    yield "loadledger.subject", job.requested_by
    yield "loadledger.status", str(job.status)
    yield "loadledger.position", end.position
    if job.error is not None:
        yield "error.type", job.error.code


def _stages(job: Job, end: Event, ended_ns: int) -> Iterator[tuple[str, int, int]]:
    """Return the parts of a job, one after the other, in nanoseconds: its waiting, then what it did."""
    began = _ns(job.created_at)
    started = ended_ns if job.started_at is None else _ns(job.started_at)
    yield "waiting", began, started
    if job.started_at is None:
        return
    if not isinstance(end.data, ModelLoaded):
        yield ("draining" if job.unload is not None else "loading"), started, ended_ns
        return
    for name, duration_us in _parts(end.data.durations):
        first, started = started, min(started + duration_us * 1000, ended_ns)
        yield name, first, started


def _parts(durations: Durations) -> Iterator[tuple[str, int]]:
    """Return what a load did; the files are hashed beside it, which is no part of its own."""
    yield "starting", durations.starting_us
    yield "loading", durations.loading_us
    if durations.warming_up_us is not None:
        yield "warming_up", durations.warming_up_us
    yield "measuring", durations.measuring_us


def _ns(text: str) -> int:
    return _whole_ns(moment(text))


def _whole_ns(when: datetime) -> int:
    return int(when.timestamp()) * 10**9 + when.microsecond * 1000
