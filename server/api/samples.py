"""Charts: memory, requests and latencies of the last hour or day, of the server and of a model.

`server.observability.timeseries` has the samples and their bounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import msgspec
from aiohttp import web
from marshmallow import Schema, fields, validate
from msgspec.structs import asdict

from server.api.models import look_at_model
from server.api.schemas import AnswerSchema, ModelPathSchema, about
from server.appkeys import TIME_SERIES
from server.auth.access import Access
from server.http.validation import path_parameters, query_parameters
from server.observability.timeseries import (
    NO_REQUESTS,
    RANGES,
    Counts,
    Latencies,
    ModelSample,
    Sample,
    merge_counts,
)
from server.routing import Routes

routes = Routes(tag="resources")

_QUANTILE = "of the answered requests, in seconds, estimated from a histogram; null without any."


class RangeQuerySchema(Schema):
    """How far back."""

    range = fields.String(
        load_default="1h",
        validate=validate.OneOf(list(RANGES)),
        **about("`1h`: the last hour in steps of 10 s. `24h`: the last 24 hours in steps of 5 min."),
    )


class LatencySchema(AnswerSchema):
    """Requests of an interval and their latencies."""

    requests = fields.Integer(**about("Answered requests."))
    failures = fields.Integer(**about("Requests that failed in the worker."))
    p50_s = fields.Float(allow_none=True, **about(f"Median {_QUANTILE}"))
    p95_s = fields.Float(allow_none=True, **about(f"95 % quantile {_QUANTILE}"))
    p99_s = fields.Float(allow_none=True, **about(f"99 % quantile {_QUANTILE}"))


class PointSchema(LatencySchema):
    """An interval; the last one of the long range has not ended."""

    at = fields.String(**about("The end of the interval."))


class ModelPointSchema(PointSchema):
    """An interval of a model."""

    memory_bytes = fields.Integer(
        allow_none=True, **about("The most that its workers took; null without one.")
    )


class ServerPointSchema(PointSchema):
    """An interval of the server."""

    server_bytes = fields.Integer(**about("Memory of the server's own process, without pages of files."))
    used_bytes = fields.Integer(**about("Memory of the workers of loaded models."))
    reserved_bytes = fields.Integer(**about("Reserved for loads."))
    budget_bytes = fields.Integer()


class HistorySchema(AnswerSchema):
    """The samples since the server started, at most of a range. They end with the server."""

    range = fields.String()
    interval_s = fields.Integer()
    whole = fields.Nested(LatencySchema, **about("Of all points together."))


class ServerHistorySchema(HistorySchema):
    """Samples of the server."""

    points = fields.List(fields.Nested(ServerPointSchema), **about("Oldest first."))


class ModelHistorySchema(HistorySchema):
    """Samples of a model; without any, it had no worker in that time."""

    points = fields.List(fields.Nested(ModelPointSchema), **about("Oldest first."))


@routes.get(
    "/api/v1/resources/history",
    access=Access.ANY,
    summary="Memory, requests and latencies of the last hour or day",
    query=RangeQuerySchema(),
    answers={200: (ServerHistorySchema(), "The samples of the server.")},
)
async def show_server_history(request: web.Request) -> web.Response:
    name = query_parameters(request)["range"]
    samples = request.app[TIME_SERIES].of_server(RANGES[name])
    return _answer(name, map(_server_point, samples), (sample.counts for sample in samples))


@routes.get(
    "/api/v1/models/{id}/history",
    access=Access.ANY,
    summary="Memory, requests and latencies of a model in the last hour or day",
    path=ModelPathSchema(),
    query=RangeQuerySchema(),
    answers={200: (ModelHistorySchema(), "The samples of the model.")},
    errors=("unknown_model", "repository_busy", "repository_unreadable"),
)
async def show_model_history(request: web.Request) -> web.Response:
    """Answer with the samples of a model that is in the repository, or was loaded within the range."""
    model_id, name = path_parameters(request)["id"], query_parameters(request)["range"]
    samples = request.app[TIME_SERIES].of_model(model_id, RANGES[name])
    if not samples:
        await look_at_model(request, model_id)
    counts = (sample.counts for _, sample in samples if sample is not None)
    return _answer(name, (_model_point(at, sample) for at, sample in samples), counts)


def _answer(name: str, points: Iterable[dict[str, Any]], counts: Iterable[Counts]) -> web.Response:
    whole = asdict(Latencies.of(reduce(merge_counts, counts, NO_REQUESTS)))
    answer = {"range": name, "interval_s": RANGES[name].interval_s, "whole": whole, "points": list(points)}
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def _server_point(sample: Sample) -> dict[str, Any]:
    return {"at": sample.at, **asdict(sample.memory), **asdict(Latencies.of(sample.counts))}


def _model_point(at: str, sample: ModelSample | None) -> dict[str, Any]:
    counts = NO_REQUESTS if sample is None else sample.counts
    memory_bytes = None if sample is None else sample.memory_bytes
    return {"at": at, "memory_bytes": memory_bytes, **asdict(Latencies.of(counts))}
