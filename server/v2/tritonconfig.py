"""Triton's model configuration: that of a loaded model, and what a load may be asked for with it.

The repository extension's requests are read strictly: what is not done is refused by its name. Triton's
clients declare no Content-Type, so none is asked for. A load may bring a model configuration, as JSON in a
string. It may say what is so anyway, and choose what `HONOURED` has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web
from marshmallow import fields

from events.types import LoadParameters
from runtime.repository import MODEL_FILE
from runtime.wire import DATATYPES, TensorSpec
from server.api.schemas import AnswerSchema
from server.errors import ServerProblem
from server.http import validation
from server.http.validation import MAX_JSON_BYTES, InvalidBody, read_body

PLATFORM = "onnxruntime_onnx"
"""What Triton calls ONNX models."""

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


HONOURED = ("max_batch_size", "dynamic_batching", "instance_group", "version_policy")
"""What a load's configuration may choose. Whatever else there is belongs to the model, or is not ours."""


class NotSupported(ServerProblem):
    """This is part of the protocol, but nothing here does it."""

    code = "not_supported"


class InstanceGroup(msgspec.Struct):
    """How many workers, on what; 0 is Triton's default, one."""

    count: int = 0
    kind: str = "KIND_AUTO"
    name: str = ""


class DynamicBatching(msgspec.Struct):
    """That requests run together."""

    max_queue_delay_microseconds: int = 0


class Specific(msgspec.Struct):
    """These versions."""

    versions: list[int]


class Latest(msgspec.Struct):
    """So many of the highest."""

    num_versions: int = 1


class VersionPolicy(msgspec.Struct):
    """Which versions to load."""

    specific: Specific | None = None
    latest: Latest | None = None


class AskedConfig(msgspec.Struct):
    """A load's configuration, without what is only compared with what is so."""

    max_batch_size: int | None = None
    dynamic_batching: DynamicBatching | None = None
    instance_group: list[InstanceGroup] = []
    version_policy: VersionPolicy | None = None


def body_doc(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a body that may be left out is documented."""
    schema = {"type": "object", "properties": properties}
    return {"required": False, "content": {"application/json": {"schema": schema}}}


LOAD_BODY = body_doc(
    {
        "parameters": {
            "type": "object",
            "properties": {
                "config": {
                    "type": "string",
                    "description": f"Triton's model configuration as JSON. Honoured: {', '.join(HONOURED)}. "
                    "What else a load can be asked for with is what the model's loadledger.toml says, or "
                    "the server's settings; POST /api/v1/models/{id}/load takes it per request.",
                }
            },
        }
    }
)
UNLOAD_BODY = body_doc(
    {"parameters": {"type": "object", "properties": {"unload_dependents": {"type": "boolean"}}}}
)
INDEX_BODY = body_doc({"ready": {"type": "boolean", "description": "Only what can be asked."}})


async def read_object(request: web.Request) -> dict[str, Any]:
    """Return the body, a JSON object; an empty body is an empty object.

    Raises:
        InvalidBody: `invalid_body`; also `body_too_large`, `body_timeout`, `unsupported_media_type`.
    """
    body = await read_body(request, MAX_JSON_BYTES)
    return _object(body, "body") if body else {}


def asked_load(body: Mapping[str, Any], model_id: str) -> dict[str, Any]:
    """Return what a load's body asks for, as members of a load's body in the management API.

    Raises:
        InvalidBody: `invalid_body`.
        NotSupported: `not_supported`.
    """
    parameters = _parameters(body, {"config"})
    config = parameters.get("config")
    if config is None and "config" not in parameters:
        return {}
    if not isinstance(config, str):
        raise InvalidBody("body: parameters.config: Must be a string that holds JSON.")
    given = _object(config.encode("utf-8", "replace"), "parameters.config")
    _check_what_is_so(given, model_id)
    return _asked(_typed(given))


def check_unload(body: Mapping[str, Any]) -> None:
    """Check an unload's body, which changes nothing.

    Raises:
        InvalidBody: `invalid_body`.
        NotSupported: `not_supported`.
    """
    dependents = _parameters(body, {"unload_dependents"}).get("unload_dependents", False)
    if not isinstance(dependents, bool):
        raise InvalidBody("body: parameters.unload_dependents: Must be true or false.")
    if dependents:
        raise NotSupported("parameters.unload_dependents: true is not supported: no model depends on another")


def asked_ready(body: Mapping[str, Any]) -> bool:
    """Return whether an index is to have only what can be asked.

    Raises:
        InvalidBody: `invalid_body`.
    """
    _only(body, {"ready"}, "body", InvalidBody)
    ready = body.get("ready", False)
    if not isinstance(ready, bool):
        raise InvalidBody("body: ready: Must be true or false.")
    return ready


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = validation.loads(text)
    except validation.InvalidJson as error:
        raise InvalidBody(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise InvalidBody(f"{where}: Must be a JSON object.")
    return value


def _parameters(body: Mapping[str, Any], known: Collection[str]) -> Mapping[str, Any]:
    _only(body, {"parameters"}, "body", InvalidBody)
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidBody("body: parameters: Must be a JSON object.")
    _only(parameters, known, "parameters", NotSupported)
    return parameters


def _only(
    given: Mapping[str, Any],
    known: Collection[str],
    where: str,
    refusal: type[InvalidBody | NotSupported],
) -> None:
    for name in sorted(given.keys() - set(known)):
        shown = name if len(name) <= 64 else f"{name[:63]}…"  # noqa: PLR2004 -- a name, not a novel
        raise refusal(
            f"{where}: {shown} is not supported; leave it out. Known are {', '.join(sorted(known))}"
        )


def _check_what_is_so(config: Mapping[str, Any], model_id: str) -> None:
    """Refuse what the configuration says of the model that is not so, or not known before it is loaded."""
    so: dict[str, tuple[Any, ...]] = {
        "name": ("", model_id),
        "platform": ("", PLATFORM),
        "backend": ("", BACKEND),
        "default_model_filename": ("", MODEL_FILE),
        "model_transaction_policy": ({}, {"decoupled": False}),
        "input": ([],),
        "output": ([],),
    }
    _only(config, {*so, *HONOURED}, "parameters.config", NotSupported)
    for name, values in so.items():
        if name in config and config[name] not in values:
            said = f"it is {values[-1]!r}" if values[-1] else "the model itself says it"
            raise NotSupported(f"parameters.config: {name}: cannot be chosen, {said}; leave it out")


def _typed(config: Mapping[str, Any]) -> AskedConfig:
    """Return the configuration's members; numbers may be strings, as protobuf writes those of 64 bits."""
    _only_members(config.get("dynamic_batching"), DynamicBatching, "dynamic_batching")
    _only_members(config.get("version_policy"), VersionPolicy, "version_policy")
    groups = config.get("instance_group")
    for group in groups if isinstance(groups, list) else ():
        _only_members(group, InstanceGroup, "instance_group")
    honoured = {name: config[name] for name in HONOURED if name in config}
    try:
        return msgspec.convert(honoured, AskedConfig, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidBody(f"parameters.config: {error}") from None


def _only_members(given: object, kind: type[msgspec.Struct], where: str) -> None:
    if isinstance(given, dict):
        _only(given, kind.__struct_fields__, f"parameters.config: {where}", NotSupported)


def _asked(config: AskedConfig) -> dict[str, Any]:
    asked = {
        "version": _version(config.version_policy),
        "instances": _instances(config.instance_group),
        "max_batch_size": config.max_batch_size,
    }
    if config.dynamic_batching is not None:
        if not config.max_batch_size:
            raise InvalidBody("parameters.config: dynamic_batching takes a max_batch_size of at least 1")
        asked["max_queue_delay_us"] = config.dynamic_batching.max_queue_delay_microseconds
    return {name: value for name, value in asked.items() if value is not None}


def _version(policy: VersionPolicy | None) -> int | None:
    """Return the version that is chosen; one at a time can be, and the highest is what None means."""
    if policy is None or (policy.specific is None and policy.latest == Latest(1)):
        return None
    if policy.specific is not None and policy.latest is None and len(policy.specific.versions) == 1:
        return policy.specific.versions[0]
    raise NotSupported(
        "parameters.config: version_policy: a model has one version loaded at a time; take "
        '{"specific": {"versions": [N]}} or {"latest": {"num_versions": 1}}'
    )


def _instances(groups: list[InstanceGroup]) -> int | None:
    if not groups:
        return None
    if len(groups) > 1 or groups[0].kind not in ("KIND_CPU", "KIND_AUTO"):
        raise NotSupported("parameters.config: instance_group: takes one group, of KIND_CPU or KIND_AUTO")
    return groups[0].count or 1
