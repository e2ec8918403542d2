"""The Open Inference Protocol v2 on the wire: what comes in, what goes out, and how both are documented."""

from __future__ import annotations

from typing import Any

import msgspec
from marshmallow import fields

from runtime.errors import InvalidInput
from runtime.router import Route
from runtime.wire import Tensor, TensorSpec
from server.schemas import AnswerSchema
from server.tensors import encode_data

MAX_BODY_BYTES = 64 * 2**20
"""Triton's default (`--http-max-input-size`)."""

PLATFORM = "onnxruntime_onnx"
"""What Triton calls ONNX models."""


class RequestedInput(msgspec.Struct):
    """An input tensor; `data` stays text until its datatype is known."""

    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: dict[str, bool | int | float | str] = {}


class RequestedOutput(msgspec.Struct):
    """An output that is wanted."""

    name: str
    parameters: dict[str, bool | int | float | str] = {}


class InferenceRequest(msgspec.Struct):
    """What is asked; no `outputs` means all."""

    inputs: list[RequestedInput]
    outputs: list[RequestedOutput] = []
    id: str | None = None
    parameters: dict[str, bool | int | float | str] = {}


_REQUEST = msgspec.json.Decoder(InferenceRequest)


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


INFER_BODY: dict[str, Any] = {
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


def decode_request(body: bytes) -> InferenceRequest:
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


def encode_response(route: Route, request_id: str | None, outputs: list[Tensor]) -> bytes:
    """Return the answer's JSON; no `parameters` on JSON outputs, which Triton's C++ client would refuse."""
    answer: dict[str, Any] = {"model_name": route.model_id, "model_version": str(route.version)}
    if request_id is not None:
        answer["id"] = request_id
    answer["outputs"] = [
        {"name": item.name, "datatype": item.datatype, "shape": item.shape, "data": encode_data(item)}
        for item in outputs
    ]
    return msgspec.json.encode(answer)


def metadata(route: Route) -> dict[str, Any]:
    """Return what a loaded version takes and gives, as the protocol has it."""
    return {
        "name": route.model_id,
        "versions": [str(route.version)],
        "platform": PLATFORM,
        "inputs": [_spec(spec) for spec in route.inputs],
        "outputs": [_spec(spec) for spec in route.outputs],
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
