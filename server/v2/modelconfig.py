"""A loaded model's configuration, as Triton's clients read it (`ModelConfig` in its JSON form)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from marshmallow import fields

from events.jobs import LoadParameters
from runtime.repository import MODEL_FILE
from runtime.wire import DATATYPES, TensorSpec
from server.api.schemas import AnswerSchema
from server.v2.protocol import PLATFORM

BACKEND = "onnxruntime"
"""What Triton calls what runs ONNX models."""


class ConfiguredTensorSchema(AnswerSchema):
    """An input or output; `dims` are without the batch dimension where `max_batch_size` is not 0."""

    name = fields.String(required=True)
    data_type = fields.String(required=True)
    dims = fields.List(fields.Integer(), required=True)
    reshape = fields.Dict(metadata={"description": "What the model takes, where that is no dimension."})
    optional = fields.Boolean(metadata={"description": "Of an input: it may be left out."})


class ModelConfigSchema(AnswerSchema):
    """The configuration."""

    name = fields.String(required=True)
    platform = fields.String(required=True)
    backend = fields.String(required=True)
    version_policy = fields.Dict(required=True, metadata={"description": "The one version that is loaded."})
    max_batch_size = fields.Integer(required=True)
    input = fields.List(fields.Nested(ConfiguredTensorSchema), required=True)
    output = fields.List(fields.Nested(ConfiguredTensorSchema), required=True)
    instance_group = fields.List(fields.Dict(), required=True)
    dynamic_batching = fields.Dict(metadata={"description": "Only there where requests run together."})
    default_model_filename = fields.String(required=True)
    model_transaction_policy = fields.Dict(required=True)


def model_config(
    model_id: str,
    version: int,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    parameters: LoadParameters,
) -> dict[str, Any]:
    """Return the configuration of a loaded version, from what its load was asked for with."""
    batched = parameters.max_batch_size > 0
    config = {
        "name": model_id,
        "platform": PLATFORM,
        "backend": BACKEND,
        "version_policy": {"specific": {"versions": [version]}},
        "max_batch_size": parameters.max_batch_size,
        "input": [{**_tensor(spec, batched=batched), "optional": spec.optional} for spec in inputs],
        "output": [_tensor(spec, batched=batched) for spec in outputs],
        "instance_group": [{"name": f"{model_id}_0", "kind": "KIND_CPU", "count": parameters.instances}],
        "default_model_filename": MODEL_FILE,
        "model_transaction_policy": {"decoupled": False},
    }
    if batched:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": parameters.max_queue_delay_us}
    return config


def data_type(datatype: str) -> str:
    """Return what the configuration calls a datatype; of what the protocol has no name for, TYPE_INVALID."""
    if datatype not in DATATYPES:
        return "TYPE_INVALID"
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    return {"name": spec.name, "data_type": data_type(spec.datatype), **_dims(spec.shape, batched=batched)}


def _dims(shape: Sequence[int], *, batched: bool) -> dict[str, Any]:
    """`dims` must not be empty in Triton's format, so a scalar is a vector of one that is reshaped."""
    dims = list(shape[1:] if batched else shape)
    return {"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}}
