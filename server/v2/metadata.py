"""Metadata of the server and of loaded models: statistics, configuration, schemas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler

from answers.inference import (
    InferenceAnswer,
    ModelConfig,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
    StatisticsList,
)
from answers.tensors import ModelTensor
from events.models import ModelState
from runtime.consumer.running import RunningLoad
from runtime.onnxfile import ModelTensors
from runtime.router import Here
from runtime.wire import DATATYPES
from server.api.schemas import ModelPathSchema, ModelServedPathSchema
from server.appkeys import CONSUMER, LOG, ROUTER
from server.auth.access import Access
from server.cluster import ANSWER_HEADERS, forwardable
from server.http.answers import respond, show
from server.http.validation import path_parameters
from server.routing import Routes
from server.v2.codec import HEADER_LENGTH
from server.v2.tritonconfig import PLATFORM, model_config

routes = Routes(tag="inference")


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_VALUE = {"oneOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]}
_CUSTOM = "Unknown parameters are ignored; unsupported ones are refused by name."


def _parameters(**known: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "description": _CUSTOM, "properties": known, "additionalProperties": _VALUE}


def _tensor_list(required: list[str], **members: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": {"type": "string"}, **members}
    return {"type": "array", "items": {"type": "object", "required": required, "properties": properties}}


INFERENCE_BODY: dict[str, Any] = {
    "required": True,
    "description": "JSON, and after it the data of binary tensors in the order of the inputs. "
    "May be compressed: Content-Encoding gzip or deflate. At most 64 MiB after decompression, or the server's"
    " --max-request-size.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "parameters": _parameters(
                        timeout={"type": "integer", "description": "Microseconds; 0 is none.", "minimum": 0},
                        binary_data_output={"type": "boolean", "description": "Outputs come back binary."},
                    ),
                    "inputs": _tensor_list(
                        ["name", "shape", "datatype"],
                        shape={"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 64},
                        datatype={"type": "string", "enum": list(DATATYPES)},
                        data={"type": "array", "items": {}, "description": "Flat, or nested as the shape."},
                        parameters=_parameters(
                            binary_data_size={
                                "type": "integer",
                                "minimum": 0,
                                "description": "Bytes of the tensor after the JSON, instead of data.",
                            }
                        ),
                    ),
                    "outputs": _tensor_list(
                        ["name"],
                        parameters=_parameters(
                            binary_data={"type": "boolean", "description": "Wins over binary_data_output."}
                        ),
                    ),
                },
            }
        },
        "application/octet-stream": _BINARY,
    },
}
"""The request body of infer."""

INFERENCE_PARAMETERS: list[dict[str, Any]] = [
    {
        "in": "header",
        "name": HEADER_LENGTH,
        "schema": {"type": "integer", "minimum": 0},
        "description": "How many bytes of the body, after decompression, are JSON; all, if left out. "
        "0: the body is the data of the model's one input, and nothing else.",
    }
]
"""The header fields of infer."""

INFERENCE_RESPONSE: dict[str, Any] = {
    "description": "JSON, or with a binary output JSON and after it the data of the binary outputs.",
    "headers": {
        "Loadledger-Model": {"schema": {"type": "string"}, "description": "Names the load that answered."},
        **ANSWER_HEADERS,
        HEADER_LENGTH: {
            "schema": {"type": "integer"},
            "description": "How many bytes of the body, after decompression, are JSON; missing if all are.",
        },
    },
    "answer": InferenceAnswer,
    "content": {"application/octet-stream": _BINARY},
}
"""The response of infer."""


def metadata(model_id: str, version: int, tensors: ModelTensors) -> ModelMetadata:
    return ModelMetadata(
        name=model_id,
        versions=[str(version)],
        platform=PLATFORM,
        inputs=show(tensors.inputs, list[ModelTensor]),
        outputs=show(tensors.outputs, list[ModelTensor]),
    )


NAME = "loadledger"
EXTENSIONS = (
    *("model_repository", "model_configuration", "binary_tensor_data", "parameters", "statistics"),
    "schedule_policy",
)
"""The supported extensions, by Triton's names, which clients rely on."""

AT_ONCE = 100
"""Loads whose statistics are read without a pause: about a millisecond."""

MODEL_ERRORS = (
    *("unknown_model", "model_not_loaded", "model_unloading", "node_unreachable", "inference_timeout"),
    *("unknown_label", "repository_unreadable"),
)
"""Errors of a read that needs a loaded model."""

ModelHandler = TypeVar("ModelHandler", bound=Handler)


def model_routes(
    declare: Callable[..., Callable[[Handler], Handler]],
    suffix: str,
    summaries: tuple[str, str],
    *,
    of_version: str,
    **operation: Any,
) -> Callable[[ModelHandler], ModelHandler]:
    """Declare a handler's route for a model, and its twin for a version of the model.

    Args:
        declare: such as `routes.get`.
        suffix: the end of both paths.
        summaries: of both routes.
        of_version: the operation id of the twin; the other one's is the handler's name.
        operation: the declaration of both, see `server.routing.Operation`.
    """

    def decorate(handler: ModelHandler) -> ModelHandler:
        async def twin(request: web.Request) -> web.StreamResponse:
            return await handler(request)

        twin.__name__ = of_version
        for path, schema, summary, each in (
            ("/v2/models/{id}", ModelPathSchema(), summaries[0], handler),
            ("/v2/models/{id}/versions/{version}", ModelServedPathSchema(), summaries[1], twin),
        ):
            declare(f"{path}{suffix}", path=schema, summary=summary, is_forwarded=True, **operation)(each)
        return handler

    return decorate


@routes.get(
    "/v2",
    "/v2/",
    access=Access.ANY,
    tag="server",
    summary="Name, version and extensions of the server",
    answers={200: (ServerMetadata, "The metadata.")},
)
async def server_metadata(request: web.Request) -> web.Response:  # noqa: ARG001 -- a handler
    return respond(ServerMetadata(name=NAME, version=_version(), extensions=list(EXTENSIONS)))


@routes.get(
    "/v2/models/stats",
    access=Access.ANY,
    tag="server",
    summary="Statistics of all serving models",
    answers={200: (StatisticsList, "By name.")},
)
async def all_statistics(request: web.Request) -> web.Response:
    """Return the statistics of loaded models; this route hides the metadata of a model called `stats`."""
    loads = list(request.app[CONSUMER].loads.values())  # bounded in number by their processes
    stats = list[ModelStatistics]()
    for start in range(0, len(loads), AT_ONCE):
        entries = [_statistics(request.app, load) for load in loads[start : start + AT_ONCE]]
        stats += [entry for entry in entries if entry is not None]
        await asyncio.sleep(0)
    return respond(StatisticsList(model_stats=sorted(stats, key=lambda entry: entry.name)))


@model_routes(
    routes.get,
    "/stats",
    ("Statistics of a loaded model", "Statistics of a loaded version"),
    of_version="version_statistics",
    access=Access.ANY,
    answers={200: (StatisticsList, "Of the version that serves.")},
    errors=MODEL_ERRORS,
)
@forwardable
async def model_statistics(request: web.Request) -> web.Response:
    here = await find_here(request)
    entry = _statistics(request.app, here.load)
    return respond(StatisticsList(model_stats=[] if entry is None else [entry]))


@model_routes(
    routes.get,
    "/config",
    ("Configuration of a loaded model", "Configuration of a loaded version"),
    of_version="show_version_config",
    access=Access.ANY,
    answers={200: (ModelConfig, "In Triton's form.")},
    errors=MODEL_ERRORS,
)
@forwardable
async def show_config(request: web.Request) -> web.Response:
    here = await find_here(request)
    model = request.app[LOG].state.models.get(here.model_id)
    serving = None if model is None else model.find_serving(here.load.job_id)
    config = model_config(
        here.model_id,
        here.version,
        here.inputs,
        here.outputs,
        here.load.parameters,
        joins_requests=serving is not None and serving.joins_requests,
    )
    return respond(config)


async def find_here(request: web.Request) -> Here:
    path = path_parameters(request)
    return await request.app[ROUTER].find(path["id"], path.get("version"))


def _statistics(app: web.Application, load: RunningLoad) -> ModelStatistics | None:
    model = app[LOG].state.models.get(load.model_id)
    is_loaded = model is not None and model.phase is ModelState.LOADED
    serving = model.find_serving(load.job_id) if model is not None and is_loaded else None
    if serving is None or not app[ROUTER].is_ready(load.model_id):
        return None
    return load.statistics.as_protocol(load.model_id, load.version, serving.memory_bytes)


@cache
def _version() -> str:
    return version(NAME)
