"""Predictions by the Open Inference Protocol v2, with JSON tensors: infer, model metadata, ready."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from aiohttp_apispec import docs, match_info_schema, response_schema
from marshmallow import fields

from runtime.errors import InvalidInput
from runtime.router import Route as ModelRoute
from runtime.router import infer
from runtime.wire import Tensor, TensorSpec
from server.appkeys import CONFIG, ROUTER
from server.errors import ServerProblem, errors
from server.routes import Access, LimitClass, Route
from server.schemas import AnswerSchema, ModelPathSchema, ModelVersionPathSchema
from server.tensors import decode_tensor, encode_data
from server.validation import path_parameters, read_body

MAX_BODY_BYTES = 64 * 2**20
"""Triton's default (`--http-max-input-size`)."""

PLATFORM = "onnxruntime_onnx"
"""What Triton calls ONNX models."""


class NotReady(ServerProblem):
    """The model is not ready."""

    code = "not_ready"


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: dict[str, bool | int | float | str] = {}


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, bool | int | float | str] = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    outputs: list[_Output] = []
    id: str | None = None
    parameters: dict[str, bool | int | float | str] = {}


_REQUEST = msgspec.json.Decoder(_Request)


class TensorSchema(AnswerSchema):
    """A tensor, or what one has to be like."""

    name = fields.String(required=True)
    datatype = fields.String(required=True)
    shape = fields.List(fields.Integer(), required=True)
    data = fields.List(fields.Raw(), metadata={"description": "Flat, row-major; not in metadata."})


class InferResponseSchema(AnswerSchema):
    """What the model answered."""

    model_name = fields.String(required=True)
    model_version = fields.String(required=True)
    id = fields.String(metadata={"description": "As in the request, if it had one."})
    outputs = fields.List(fields.Nested(TensorSchema), required=True)


class MetadataSchema(AnswerSchema):
    """What a loaded model takes and gives; -1 in a shape is any length."""

    name = fields.String(required=True)
    versions = fields.List(fields.String(), required=True)
    platform = fields.String(required=True)
    inputs = fields.List(fields.Nested(TensorSchema), required=True)
    outputs = fields.List(fields.Nested(TensorSchema), required=True)


class ReadySchema(AnswerSchema):
    """That a model can be asked."""

    name = fields.String(required=True)
    ready = fields.Boolean(required=True)


_INFER_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "parameters": {"type": "object"},
                    "inputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name", "shape", "datatype", "data"],
                            "properties": {
                                "name": {"type": "string"},
                                "shape": {"type": "array", "items": {"type": "integer"}},
                                "datatype": {"type": "string"},
                                "data": {"type": "array", "items": {}},
                                "parameters": {"type": "object"},
                            },
                        },
                    },
                    "outputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
                        },
                    },
                },
            },
        },
    },
}
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
    "inference_cancelled",
    "inference_timeout",
)


@docs(tags=["inference"], summary="Ask a loaded model", requestBody=_INFER_BODY)
@match_info_schema(ModelPathSchema())
@response_schema(InferResponseSchema(), 200, description="`Loadledger-Model` names the load that answered.")
@errors(*_INFER_ERRORS)
async def infer_model(request: web.Request) -> web.Response:
    """Run one inference on the version that serves."""
    return await _infer(request)


@docs(tags=["inference"], summary="Ask a loaded version", requestBody=_INFER_BODY)
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
    return web.json_response(_metadata(await _route(request)))


@docs(tags=["inference"], summary="What a loaded version takes and gives")
@match_info_schema(ModelVersionPathSchema())
@response_schema(MetadataSchema(), 200, description="The metadata.")
@errors("unknown_model", "model_not_loaded", "model_unloading")
async def show_version_metadata(request: web.Request) -> web.Response:
    """Answer with inputs and outputs, if this version is the one that serves."""
    return web.json_response(_metadata(await _route(request)))


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


def decode_request(body: bytes) -> _Request:
    """Return the request that `body` is.

    Raises:
        InvalidInput: `invalid_input`, it is not one, or asks for what is not supported.
    """
    try:
        request = _REQUEST.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the body is not an inference request: {error}") from None
    for item in request.inputs:
        if not bytes(item.data):
            raise InvalidInput(f"input '{item.name}': data is missing; binary tensors are not supported yet")
    for parameters in (request.parameters, *(output.parameters for output in request.outputs)):
        wanted = parameters.get("binary_data_output") or parameters.get("binary_data")
        if wanted:
            raise InvalidInput("binary outputs are not supported yet; leave the parameter out for JSON")
    return request


def encode_response(route: ModelRoute, request_id: str | None, outputs: list[Tensor]) -> bytes:
    """Return the answer's JSON; no `parameters` on JSON outputs, which Triton's C++ client would refuse."""
    answer: dict[str, Any] = {"model_name": route.model_id, "model_version": str(route.version)}
    if request_id is not None:
        answer["id"] = request_id
    answer["outputs"] = [
        {"name": item.name, "datatype": item.datatype, "shape": item.shape, "data": encode_data(item)}
        for item in outputs
    ]
    return msgspec.json.encode(answer)


def _metadata(route: ModelRoute) -> dict[str, Any]:
    return {
        "name": route.model_id,
        "versions": [str(route.version)],
        "platform": PLATFORM,
        "inputs": [_spec(spec) for spec in route.inputs],
        "outputs": [_spec(spec) for spec in route.outputs],
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
