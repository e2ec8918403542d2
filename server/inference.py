"""Predictions by the Open Inference Protocol v2, with JSON tensors: infer, model metadata, ready."""

from __future__ import annotations

from aiohttp import web
from aiohttp_apispec import docs, match_info_schema, response_schema

from runtime.router import Route as ModelRoute
from runtime.router import infer
from server.appkeys import CONFIG, ROUTER
from server.errors import ServerProblem, errors
from server.protocol import (
    INFER_BODY,
    MAX_BODY_BYTES,
    InferResponseSchema,
    MetadataSchema,
    ReadySchema,
    decode_request,
    encode_response,
    metadata,
)
from server.routes import Access, LimitClass, Route
from server.schemas import ModelPathSchema, ModelVersionPathSchema
from server.tensors import decode_tensor
from server.validation import path_parameters, read_body


class NotReady(ServerProblem):
    """The model is not ready."""

    code = "not_ready"


_INFER_ERRORS = (
    "invalid_input",
    "inference_failed",
    "not_representable",
    "unknown_model",
    "body_too_large",
    "body_timeout",
    "model_not_loaded",
    "model_unloading",
    "worker_died",
    "inference_timeout",
)


@docs(tags=["inference"], summary="Ask a loaded model", requestBody=INFER_BODY)
@match_info_schema(ModelPathSchema())
@response_schema(InferResponseSchema(), 200, description="`Loadledger-Model` names the load that answered.")
@errors(*_INFER_ERRORS)
async def infer_model(request: web.Request) -> web.Response:
    """Run one inference on the version that serves."""
    return await _infer(request)


@docs(tags=["inference"], summary="Ask a loaded version", requestBody=INFER_BODY)
@match_info_schema(ModelVersionPathSchema())
@response_schema(InferResponseSchema(), 200, description="`Loadledger-Model` names the load that answered.")
@errors(*_INFER_ERRORS)
async def infer_version(request: web.Request) -> web.Response:
    """Run one inference, if this version is the one that serves."""
    return await _infer(request)


@docs(tags=["inference"], summary="What a loaded model takes and gives")
@match_info_schema(ModelPathSchema())
@response_schema(MetadataSchema(), 200, description="The metadata.")
@errors("unknown_model", "model_not_loaded", "model_unloading")
async def show_metadata(request: web.Request) -> web.Response:
    """Answer with inputs and outputs of the version that serves."""
    return web.json_response(metadata(await _route(request)))


@docs(tags=["inference"], summary="What a loaded version takes and gives")
@match_info_schema(ModelVersionPathSchema())
@response_schema(MetadataSchema(), 200, description="The metadata.")
@errors("unknown_model", "model_not_loaded", "model_unloading")
async def show_version_metadata(request: web.Request) -> web.Response:
    """Answer with inputs and outputs, if this version is the one that serves."""
    return web.json_response(metadata(await _route(request)))


@docs(tags=["inference"], summary="Whether a model can be asked")
@match_info_schema(ModelPathSchema())
@response_schema(ReadySchema(), 200, description="It can.")
@errors("not_ready")
async def show_ready(request: web.Request) -> web.Response:
    """Answer 200 where an inference would be tried, else 400, as Triton's clients expect."""
    return _ready(request)


@docs(tags=["inference"], summary="Whether a version can be asked")
@match_info_schema(ModelVersionPathSchema())
@response_schema(ReadySchema(), 200, description="It can.")
@errors("not_ready")
async def show_version_ready(request: web.Request) -> web.Response:
    """Answer 200 where an inference would be tried, else 400, as Triton's clients expect."""
    return _ready(request)


def inference_routes() -> list[Route]:
    """Return the routes of this module."""
    model, version = "/v2/models/{id}", "/v2/models/{id}/versions/{version}"
    predict = (Access.PREDICT, LimitClass.INFERENCE)
    read = (Access.ANY, LimitClass.READS)
    return [
        Route("POST", f"{model}/infer", infer_model, *predict),
        Route("POST", f"{version}/infer", infer_version, *predict),
        Route("GET", model, show_metadata, *read),
        Route("GET", version, show_version_metadata, *read),
        Route("GET", f"{model}/ready", show_ready, *read),
        Route("GET", f"{version}/ready", show_version_ready, *read),
    ]


async def _infer(request: web.Request) -> web.Response:
    """Decode, run, encode; the header leads from the answer to the bytes and the person behind it."""
    asked = decode_request(await read_body(request, MAX_BODY_BYTES))
    inputs = [decode_tensor(item.name, item.datatype, item.shape, item.data) for item in asked.inputs]
    names = [output.name for output in asked.outputs]
    route = await _route(request)  # last: while a body arrives, a swap may end the worker that served before
    outputs = await infer(route, inputs, names, request.app[CONFIG].inference_timeout_s)
    source = f"{route.model_id}/{route.version};position={route.position}"
    return web.Response(
        body=encode_response(route, asked.id, outputs),
        content_type="application/json",
        headers={"Loadledger-Model": source},
    )


async def _route(request: web.Request) -> ModelRoute:
    path = path_parameters(request)
    return await request.app[ROUTER].route_or_why(path["id"], path.get("version"))


def _ready(request: web.Request) -> web.Response:
    path = path_parameters(request)
    if not request.app[ROUTER].is_ready(path["id"], path.get("version")):
        raise NotReady(f"model '{path['id']}' is not ready")
    return web.json_response({"name": path["id"], "ready": True})
