"""What the Open Inference Protocol tells of the server and of loaded models: metadata, statistics, config."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib import metadata
from typing import Any

import msgspec
from aiohttp import web
from aiohttp_apispec import docs, match_info_schema, response_schema
from marshmallow import fields

from events.models import ModelState
from runtime.live import LiveLoad
from runtime.router import Route as ModelRoute
from server.api.schemas import AnswerSchema, ModelPathSchema, ModelVersionPathSchema
from server.appkeys import CONSUMER, LOG, ROUTER
from server.errors import errors
from server.routes import Access, LimitClass, Route
from server.v2.modelconfig import ModelConfigSchema, model_config
from server.validation import path_parameters

NAME = "loadledger"
EXTENSIONS = (
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""By the names that Triton gives them; only those that are there, since clients act on it."""

AT_ONCE = 100
"""Loads whose statistics are put together before others have their turn: about a millisecond."""

_ASKED_ERRORS = ("unknown_model", "model_not_loaded", "model_unloading")


class ServerMetadataSchema(AnswerSchema):
    """Who answers here."""

    name = fields.String(required=True)
    version = fields.String(required=True)
    extensions = fields.List(fields.String(), required=True)


class DurationSchema(AnswerSchema):
    """How often something was done, and how long that took in all."""

    count = fields.Integer(required=True)
    ns = fields.Integer(required=True)


class BatchStatisticsSchema(AnswerSchema):
    """The executions of one size."""

    batch_size = fields.Integer(required=True)
    compute_input = fields.Nested(DurationSchema, required=True)
    compute_infer = fields.Nested(DurationSchema, required=True)
    compute_output = fields.Nested(DurationSchema, required=True)


class MemoryUsageSchema(AnswerSchema):
    """What a load takes, as it was measured after it."""

    type = fields.String(required=True)
    id = fields.Integer(required=True)
    byte_size = fields.Integer(required=True)


class ModelStatisticsSchema(AnswerSchema):
    """What became of the inferences of a loaded version, since it was loaded."""

    name = fields.String(required=True)
    version = fields.String(required=True)
    last_inference = fields.Integer(required=True, metadata={"description": "Milliseconds since 1970."})
    inference_count = fields.Integer(required=True, metadata={"description": "Batch sizes added up."})
    execution_count = fields.Integer(required=True)
    inference_stats = fields.Dict(
        required=True,
        keys=fields.String(),
        values=fields.Nested(DurationSchema),
        metadata={
            "description": "Of success, fail, queue, compute_input, compute_infer, compute_output, "
            "cache_hit and cache_miss."
        },
    )
    response_stats = fields.Dict(required=True)
    batch_stats = fields.List(fields.Nested(BatchStatisticsSchema), required=True)
    memory_usage = fields.List(fields.Nested(MemoryUsageSchema), required=True)


class StatisticsSchema(AnswerSchema):
    """The statistics of loaded models."""

    model_stats = fields.List(fields.Nested(ModelStatisticsSchema), required=True)


@docs(tags=["server"], summary="Who answers here, and what beyond the protocol is there")
@response_schema(ServerMetadataSchema(), 200, description="The metadata.")
async def server_metadata(request: web.Request) -> web.Response:  # noqa: ARG001 -- a handler
    """Answer with name, version and extensions."""
    return web.json_response({"name": NAME, "version": _version(), "extensions": EXTENSIONS})


@docs(tags=["server"], summary="The statistics of all models that can be asked")
@response_schema(StatisticsSchema(), 200, description="By name.")
async def all_statistics(request: web.Request) -> web.Response:
    """Answer with the statistics of what is loaded; goes before the metadata of a model called `stats`."""
    loads = list(request.app[CONSUMER].live.values())  # these have processes, so they bound the work
    stats: list[dict[str, Any]] = []
    for start in range(0, len(loads), AT_ONCE):
        entries = [_statistics(request.app, load) for load in loads[start : start + AT_ONCE]]
        stats += [entry for entry in entries if entry is not None]
        await asyncio.sleep(0)
    return _json({"model_stats": sorted(stats, key=lambda entry: str(entry["name"]))})


@docs(tags=["inference"], summary="The statistics of a loaded model")
@match_info_schema(ModelPathSchema())
@response_schema(StatisticsSchema(), 200, description="Of the version that serves.")
@errors(*_ASKED_ERRORS)
async def model_statistics(request: web.Request) -> web.Response:
    """Answer with the statistics of the version that serves."""
    return await _model_statistics(request)


@docs(tags=["inference"], summary="The statistics of a loaded version")
@match_info_schema(ModelVersionPathSchema())
@response_schema(StatisticsSchema(), 200, description="Of this version.")
@errors(*_ASKED_ERRORS)
async def version_statistics(request: web.Request) -> web.Response:
    """Answer with the statistics, if this version is the one that serves."""
    return await _model_statistics(request)


@docs(tags=["inference"], summary="How a loaded model is configured")
@match_info_schema(ModelPathSchema())
@response_schema(ModelConfigSchema(), 200, description="As Triton has it.")
@errors(*_ASKED_ERRORS)
async def show_config(request: web.Request) -> web.Response:
    """Answer with the configuration of the version that serves."""
    return await _config(request)


@docs(tags=["inference"], summary="How a loaded version is configured")
@match_info_schema(ModelVersionPathSchema())
@response_schema(ModelConfigSchema(), 200, description="As Triton has it.")
@errors(*_ASKED_ERRORS)
async def show_version_config(request: web.Request) -> web.Response:
    """Answer with the configuration, if this version is the one that serves."""
    return await _config(request)


def server_routes() -> list[Route]:
    """Return the routes of this module."""
    read = (Access.ANY, LimitClass.READS)
    model, version = "/v2/models/{id}", "/v2/models/{id}/versions/{version}"
    return [
        Route("GET", "/v2", server_metadata, *read),
        Route("GET", "/v2/", server_metadata, *read),  # as the protocol's own document spells it
        Route("GET", "/v2/models/stats", all_statistics, *read),
        Route("GET", f"{model}/stats", model_statistics, *read),
        Route("GET", f"{version}/stats", version_statistics, *read),
        Route("GET", f"{model}/config", show_config, *read),
        Route("GET", f"{version}/config", show_version_config, *read),
    ]


async def _model_statistics(request: web.Request) -> web.Response:
    route = await _route(request)
    entry = _statistics(request.app, route.load)
    return _json({"model_stats": [] if entry is None else [entry]})


async def _config(request: web.Request) -> web.Response:
    route = await _route(request)
    inputs, outputs, parameters = route.inputs, route.outputs, route.load.parameters
    return _json(model_config(route.model_id, route.version, inputs, outputs, parameters))


async def _route(request: web.Request) -> ModelRoute:
    """Return who would answer an inference now."""
    asked = path_parameters(request)
    return await request.app[ROUTER].route_or_why(asked["id"], asked.get("version"))


def _statistics(app: web.Application, load: LiveLoad) -> dict[str, Any] | None:
    """Return a load's statistics if it is what answers for its model."""
    model = app[LOG].state.models.get(load.model_id)
    serving = model.serving if model is not None and model.phase is ModelState.LOADED else None
    if serving is None or serving.load_job_id != load.job_id or not app[ROUTER].is_ready(load.model_id):
        return None
    return load.statistics.as_protocol(load.model_id, load.version, serving.memory_bytes)


def _json(value: object) -> web.Response:
    """Encode with what is ten times faster than the standard library: there may be thousands of entries."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


@cache
def _version() -> str:
    return metadata.version(NAME)
