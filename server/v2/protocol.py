"""The Open Inference Protocol v2 as it is documented, and the metadata of models."""

from __future__ import annotations

from typing import Any

from marshmallow import fields

from runtime.router import Route
from runtime.wire import DATATYPES, TensorSpec
from server.api.schemas import AnswerSchema
from server.v2.codec import HEADER_LENGTH

MAX_BODY_BYTES = 64 * 2**20
"""Triton's default (`--http-max-input-size`)."""

PLATFORM = "onnxruntime_onnx"
"""What Triton calls ONNX models."""


class TensorSchema(AnswerSchema):
    """A tensor, or what one has to be like."""

    name = fields.String(required=True)
    datatype = fields.String(required=True)
    shape = fields.List(fields.Integer(), required=True)


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


class BinarySizeSchema(AnswerSchema):
    """The parameters of a binary tensor."""

    binary_data_size = fields.Integer(required=True, metadata={"description": "In bytes."})


class OutputSchema(TensorSchema):
    """An output of the model."""

    data = fields.List(fields.Raw(), metadata={"description": "Flat, row-major; of a JSON output."})
    parameters = fields.Nested(BinarySizeSchema, metadata={"description": "Of a binary output."})


class InferenceAnswerSchema(AnswerSchema):
    """What the model answered."""

    model_name = fields.String(required=True)
    model_version = fields.String(required=True)
    id = fields.String(metadata={"description": "As in the request, if it had one."})
    outputs = fields.List(fields.Nested(OutputSchema), required=True)


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_VALUE = {"oneOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]}
_CUSTOM = "What the protocol has no name for is ignored; what is not supported is refused by name."


def _parameters(**known: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": _CUSTOM,
        "properties": known,
        "additionalProperties": _VALUE,
    }


def _tensor_list(required: list[str], **members: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": {"type": "string"}, **members}
    return {"type": "array", "items": {"type": "object", "required": required, "properties": properties}}


INFERENCE_BODY: dict[str, Any] = {
    "required": True,
    "description": "JSON, and after it the data of binary tensors in the order of the inputs. "
    "May be compressed: Content-Encoding gzip or deflate.",
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
            },
        },
        "application/octet-stream": _BINARY,
    },
}
"""What infer takes."""

INFERENCE_PARAMETERS: list[dict[str, Any]] = [
    {
        "in": "header",
        "name": HEADER_LENGTH,
        "schema": {"type": "integer", "minimum": 0},
        "description": "How many bytes of the body, after decompression, are JSON; all, if left out. "
        "0: the body is the data of the model's one input, and nothing else.",
    },
]
"""The header fields that infer reads."""

INFERENCE_RESPONSE: dict[str, Any] = {
    "description": "JSON, or with a binary output JSON and after it the data of the binary outputs.",
    "headers": {
        "Loadledger-Model": {"schema": {"type": "string"}, "description": "Names the load that answered."},
        HEADER_LENGTH: {
            "schema": {"type": "integer"},
            "description": "How many bytes of the body, after decompression, are JSON; not there if all are.",
        },
    },
    "content": {
        "application/json": {"schema": InferenceAnswerSchema},
        "application/octet-stream": _BINARY,
    },
}
"""What infer answers."""


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
