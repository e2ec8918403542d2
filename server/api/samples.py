"""Charts: memory, requests and latencies of the last hour or day, of the server and of a model.

`server.observability.timeseries` has the samples and their bounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

from aiohttp import web
from marshmallow import Schema, fields, validate
from msgspec.structs import asdict

from answers.samples import Latencies, ModelInterval, ModelSamples, ServerInterval, ServerSamples
from server.api.models import look_at_model
from server.api.schemas import ModelPathSchema, about
from server.appkeys import TIME_SERIES
from server.auth.access import Access
from server.http.answers import respond
from server.http.validation import path_parameters, query_parameters
from server.observability.timeseries import (
    NO_REQUESTS,
    RANGES,
    Counts,
    ModelSample,
    Sample,
    estimate_latencies,
    merge_counts,
)
from server.routing import Routes

routes = Routes(tag="resources")


class RangeQuerySchema(Schema):
    """How far back."""

    range = fields.String(
        load_default="1h",
        validate=validate.OneOf(list(RANGES)),
        **about("`1h`: the last hour in steps of 10 s. `24h`: the last 24 hours in steps of 5 min."),
    )


@routes.get(
    "/api/v1/resources/samples",
    access=Access.ANY,
    summary="Memory, requests and latencies of the last hour or day",
    query=RangeQuerySchema(),
    answers={200: (ServerSamples, "The samples of the server.")},
)
async def show_server_samples(request: web.Request) -> web.Response:
    name = query_parameters(request)["range"]
    samples = request.app[TIME_SERIES].of_server(RANGES[name])
    return respond(
        ServerSamples(
            range=name,
            interval_s=RANGES[name].interval_s,
            whole=_sum_up(sample.counts for sample in samples),
            points=[_server_interval(sample) for sample in samples],
        )
    )


@routes.get(
    "/api/v1/models/{id}/samples",
    access=Access.ANY,
    summary="Memory, requests and latencies of a model in the last hour or day",
    path=ModelPathSchema(),
    query=RangeQuerySchema(),
    answers={200: (ModelSamples, "The samples of the model.")},
    errors=("unknown_model", "repository_busy", "repository_unreadable"),
)
async def show_model_samples(request: web.Request) -> web.Response:
    """Answer with the samples of a model that is in the repository, or was loaded within the range."""
    model_id, name = path_parameters(request)["id"], query_parameters(request)["range"]
    samples = request.app[TIME_SERIES].of_model(model_id, RANGES[name])
    if not samples:
        await look_at_model(request, model_id)
    return respond(
        ModelSamples(
            range=name,
            interval_s=RANGES[name].interval_s,
            whole=_sum_up(sample.counts for _, sample in samples if sample is not None),
            points=[_model_interval(at, sample) for at, sample in samples],
        )
    )


def _sum_up(counts: Iterable[Counts]) -> Latencies:
    return estimate_latencies(reduce(merge_counts, counts, NO_REQUESTS))


def _server_interval(sample: Sample) -> ServerInterval:
    latencies = asdict(estimate_latencies(sample.counts))
    return ServerInterval(at=sample.at, **asdict(sample.memory), **latencies)


def _model_interval(at: str, sample: ModelSample | None) -> ModelInterval:
    counts = NO_REQUESTS if sample is None else sample.counts
    memory_bytes = None if sample is None else sample.memory_bytes
    return ModelInterval(at=at, memory_bytes=memory_bytes, **asdict(estimate_latencies(counts)))
