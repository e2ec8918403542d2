"""Triton's model configuration: of a loaded model, and of a load; bodies of the repository extension.

Bodies are read strictly: unsupported members are refused by name. Triton's clients declare no Content-Type,
so none is required. A load may have a model configuration, as JSON in a string: it may repeat fixed members,
such as the model's inputs and outputs, and choose the members in `HONOURED`. So clients can change the
configuration that the server reports, and send it back. Names may be those of protobuf's JSON
(`maxBatchSize`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from aiohttp import web

from answers.inference import ConfiguredTensorInfo, ModelConfig
from events.types import LoadParameters
from features.server import find_triton_kind, read_triton_kind
from runtime import strictjson
from runtime.onnxfile import MODEL_FILE, ModelTensors
from runtime.wire import DATATYPES, TensorSpec
from server.api.loads import LoadBodySchema
from server.errors import ServerProblem
from server.http.validation import MAX_JSON_BYTES, InvalidBody, load_with, read_plain_body

PLATFORM = "onnxruntime_onnx"
"""Triton's name for ONNX models."""

MAX_NAME_CHARACTERS = 64
"""Characters of an unknown name that a refusal repeats."""

BACKEND = "onnxruntime"
"""Triton's name for the runtime of ONNX models."""


def model_config(
    model_id: str,
    version: int,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    parameters: LoadParameters,
    *,
    joins_requests: bool,
) -> ModelConfig:
    """Return the configuration of a loaded model; `dynamic_batching` has the delay if requests are joined."""
    batched = parameters.max_batch_size > 0
    batching = {"max_queue_delay_microseconds": parameters.max_queue_delay_us} if joins_requests else {}
    kind = find_triton_kind(parameters)
    return ModelConfig(
        name=model_id,
        platform=PLATFORM,
        backend=BACKEND,
        version_policy={"specific": {"versions": [version]}},
        max_batch_size=parameters.max_batch_size,
        input=[_describe_tensor(spec, batched=batched, optional=spec.optional) for spec in inputs],
        output=[_describe_tensor(spec, batched=batched) for spec in outputs],
        instance_group=[{"name": f"{model_id}_0", "kind": kind, "count": parameters.instances}],
        dynamic_batching=batching | _describe_queue(parameters),
        default_model_filename=MODEL_FILE,
        model_transaction_policy={"decoupled": False},
    )


def _describe_queue(parameters: LoadParameters) -> dict[str, Any]:
    levels, max_queue = parameters.priority_levels, parameters.max_queue
    default = parameters.default_priority_level or levels
    described = {"priority_levels": levels, "default_priority_level": default} if levels else {}
    return described | ({"default_queue_policy": {"max_queue_size": max_queue}} if max_queue else {})


def data_type(datatype: str) -> str:
    """Return Triton's name of a datatype, or TYPE_INVALID for a datatype outside of the protocol."""
    if datatype not in DATATYPES:
        return "TYPE_INVALID"
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _describe_tensor(
    spec: TensorSpec, *, batched: bool, optional: bool | None = None
) -> ConfiguredTensorInfo:
    dims = list(spec.shape[1:] if batched else spec.shape)
    return ConfiguredTensorInfo(
        name=spec.name,
        data_type=data_type(spec.datatype),
        dims=dims or [1],  # never empty in Triton's format: a scalar is a vector of one that is reshaped
        reshape={} if dims else {"shape": []},
        optional=optional,
    )


HONOURED = ("max_batch_size", "dynamic_batching", "instance_group", "version_policy")
"""The members of a load's configuration with an effect. Others may repeat the model's values."""

_LOAD_BODY = LoadBodySchema()


class NotSupported(ServerProblem):
    """This is part of the protocol, but the server does not support it."""

    code = "not_supported"


KINDS = ("KIND_CPU", "KIND_GPU", "KIND_AUTO", "KIND_MODEL")
"""Where instances run; the last two leave the choice to the server, which reports KIND_MODEL."""


class InstanceGroup(msgspec.Struct):
    """The number of workers, and where they run; 0 is Triton's default, one."""

    count: int = 0
    kind: str = "KIND_AUTO"
    name: str = ""
    gpus: list[Annotated[int, msgspec.Meta(ge=0)]] = []


class QueuePolicy(msgspec.Struct, frozen=True):
    """How many requests may wait; 0 is Triton's for any number, and the server's own limit here."""

    max_queue_size: int = 0


class DynamicBatching(msgspec.Struct):
    """Requests run in batches, after this delay at the latest; their priorities, and how many may wait."""

    max_queue_delay_microseconds: int = 0
    priority_levels: int | None = None
    default_priority_level: int | None = None
    default_queue_policy: QueuePolicy = QueuePolicy()


class Specific(msgspec.Struct):
    """These versions."""

    versions: list[int]


class Latest(msgspec.Struct):
    """The highest versions."""

    num_versions: int = 1


class VersionPolicy(msgspec.Struct):
    """Which versions to load."""

    specific: Specific | None = None
    latest: Latest | None = None


class Reshape(msgspec.Struct):
    """The model's own shape; it is only read for a scalar."""

    shape: list[int] = []


class ConfiguredTensor(msgspec.Struct):
    """An input or output, which must equal the model's; missing members are not compared."""

    name: str
    data_type: str = ""
    dims: list[Annotated[int, msgspec.Meta(ge=-1)]] = []
    reshape: Reshape | None = None
    optional: bool = False


class LoadConfig(msgspec.Struct):
    """The members of a load's configuration that are `HONOURED`, or compared with the model's file."""

    input: list[ConfiguredTensor] = []
    output: list[ConfiguredTensor] = []
    max_batch_size: int | None = None
    dynamic_batching: DynamicBatching | None = None
    instance_group: list[InstanceGroup] = []
    version_policy: VersionPolicy | None = None


def _optional_body(properties: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"required": False, "content": {"application/json": {"schema": schema}}}


LOAD_BODY = _optional_body(
    {
        "parameters": {
            "type": "object",
            "properties": {
                "config": {
                    "type": "string",
                    "description": f"Triton's model configuration as JSON. Honoured: {', '.join(HONOURED)}. "
                    "Inputs, outputs and fixed members have to be the model's. "
                    "All others come from the model's loadledger.toml, or the server's settings; "
                    "POST /api/v1/models/{id}/load accepts them per request.",
                }
            },
        }
    }
)
UNLOAD_BODY = _optional_body(
    {"parameters": {"type": "object", "properties": {"unload_dependents": {"type": "boolean"}}}}
)
INDEX_BODY = _optional_body({"ready": {"type": "boolean", "description": "Only versions that are ready."}})


async def read_object(request: web.Request, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the body, a JSON object; an empty body is an empty object.

    Raises:
        InvalidBody: `invalid_body`; also `body_too_large`, `body_timeout`, `unsupported_media_type`.
    """
    body = await read_plain_body(request, max_bytes)
    return _parse_object(body, "body") if body else {}


def read_load(body: Mapping[str, Any], model_id: str) -> tuple[dict[str, Any], LoadConfig]:
    """Return the parameters of a load's body, as `LoadBodySchema` loads them, and its configuration.

    Raises:
        InvalidBody: `invalid_body`.
        NotSupported: `not_supported`.
    """
    parameters = _read_parameters(body, {"config"})
    if "config" not in parameters:
        return {}, LoadConfig()
    text = parameters["config"]
    if not isinstance(text, str):
        raise InvalidBody("body: parameters.config: Must be a string that holds JSON.")
    given = _with_field_names(_parse_object(text.encode("utf-8", "replace"), "parameters.config"))
    _check_fixed_members(given, model_id)
    config = _convert(given)
    loaded: dict[str, Any] = load_with(_LOAD_BODY, _load_parameters(config), "body", InvalidBody)
    return loaded, config


def check_tensors(config: LoadConfig, version: int, tensors: ModelTensors) -> None:
    """Refuse a configuration whose inputs or outputs differ from those declared by a version's file.

    Raises:
        NotSupported: `not_supported`.
    """
    for kind, given, specs in (
        ("input", config.input, tensors.inputs),
        ("output", config.output, tensors.outputs),
    ):
        for where, asked, found in _find_contradictions(kind, given, {spec.name: spec for spec in specs}):
            text = f"{where}: {asked!r:.{MAX_NAME_CHARACTERS}} contradicts version {version} of the model"
            raise NotSupported(f"parameters.config: {text}, which has {found}; leave it out")


def _find_contradictions(
    kind: str, given: Sequence[ConfiguredTensor], specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, object, object]]:
    """Yield a member, its value, and the model's. Any output may be missing, or all inputs."""
    names = [tensor.name for tensor in given]
    required = [spec.name for spec in specs.values() if not spec.optional]
    if kind == "input" and given and not set(required) <= set(names):
        yield kind, names, required
    for tensor in given:
        spec, where = specs.get(tensor.name), f"{kind} {tensor.name!r:.{MAX_NAME_CHARACTERS}}"
        if spec is None:
            yield kind, tensor.name, [*specs]
            continue
        if tensor.data_type not in ("", data_type(spec.datatype)):
            yield f"{where}: data_type", tensor.data_type, data_type(spec.datatype)
        if tensor.optional and not spec.optional:
            yield f"{where}: optional", tensor.optional, spec.optional
        if tensor.reshape is not None and (tensor.reshape.shape or tensor.dims != [1]):
            yield f"{where}: reshape", tensor.reshape.shape, "none but that of a scalar"
        elif tensor.dims and not _has_shape(tensor, spec.shape, is_output=kind == "output"):
            yield f"{where}: dims", tensor.dims, [*spec.shape]


def _has_shape(tensor: ConfiguredTensor, shape: tuple[int, ...], *, is_output: bool) -> bool:
    """Whether dimensions equal a file's, with the batch dimension or without.

    Both occur after a change of `max_batch_size`. A file leaves lengths open, and of an output even the rank.
    """
    dims = [] if tensor.reshape is not None else tensor.dims
    shapes = [shape, shape[1:]] if shape[:1] == (-1,) else [shape]
    fits = [
        len(dims) == len(each) and all(length in (-1, dim) for dim, length in zip(dims, each, strict=True))
        for each in shapes
    ]
    return any(fits) or (is_output and not shape)


def check_unload(body: Mapping[str, Any]) -> None:
    """Check an unload's body, whose members have no effect.

    Raises:
        InvalidBody: `invalid_body`.
        NotSupported: `not_supported`.
    """
    dependents = _read_parameters(body, {"unload_dependents"}).get("unload_dependents", False)
    if not isinstance(dependents, bool):
        raise InvalidBody("body: parameters.unload_dependents: Must be true or false.")
    if dependents:
        raise NotSupported("parameters.unload_dependents: true is not supported: no model depends on another")


def read_only_ready(body: Mapping[str, Any]) -> bool:
    """Whether an index is limited to versions that are ready.

    Raises:
        InvalidBody: `invalid_body`.
    """
    _check_names(body, {"ready"}, "body", InvalidBody)
    ready = body.get("ready", False)
    if not isinstance(ready, bool):
        raise InvalidBody("body: ready: Must be true or false.")
    return ready


def _parse_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = strictjson.loads(text)
    except strictjson.InvalidJson as error:
        raise InvalidBody(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise InvalidBody(f"{where}: Must be a JSON object.")
    return value


def _read_parameters(body: Mapping[str, Any], known: Collection[str]) -> Mapping[str, Any]:
    _check_names(body, {"parameters"}, "body", InvalidBody)
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidBody("body: parameters: Must be a JSON object.")
    _check_names(parameters, known, "parameters", NotSupported)
    return parameters


def _check_names(
    given: Mapping[str, Any], known: Collection[str], where: str, refusal: type[InvalidBody | NotSupported]
) -> None:
    for name in sorted(given.keys() - set(known)):
        shown = name if len(name) <= MAX_NAME_CHARACTERS else f"{name[: MAX_NAME_CHARACTERS - 1]}…"
        known_names = ", ".join(sorted(known))
        raise refusal(f"{where}: {shown} is not supported; leave it out. Known are {known_names}")


def _check_fixed_members(config: Mapping[str, Any], model_id: str) -> None:
    """Refuse members that contradict the model, or that are unknown before it is loaded."""
    fixed: dict[str, tuple[Any, ...]] = {
        "name": ("", model_id),
        "platform": ("", PLATFORM),
        "backend": ("", BACKEND),
        "default_model_filename": ("", MODEL_FILE),
        "model_transaction_policy": ({}, {"decoupled": False}),
    }
    _check_names(config, {*fixed, *LoadConfig.__struct_fields__}, "parameters.config", NotSupported)
    for name, values in fixed.items():
        if name in config and config[name] not in values:
            asked = f"{config[name]!r:.{MAX_NAME_CHARACTERS}} cannot be chosen"
            raise NotSupported(f"parameters.config: {name}: {asked}, it is {values[-1]!r}; leave it out")


def _with_field_names(given: Any) -> Any:
    """Return a configuration with the names of protobuf's fields instead of their JSON names."""
    if isinstance(given, list):
        return [_with_field_names(each) for each in given]
    if not isinstance(given, dict):
        return given
    named = {_CAPITAL.sub(r"_\g<0>", name).lower(): value for name, value in given.items()}
    if len(named) < len(given):
        raise InvalidBody("parameters.config: a member is there twice, by its two names")
    return {name: _with_field_names(value) for name, value in named.items()}


_CAPITAL = re.compile("[A-Z]")


def _convert(config: Mapping[str, Any]) -> LoadConfig:
    """Return the members that are not fixed; numbers may be strings, as protobuf writes 64-bit integers."""
    batching = config.get("dynamic_batching")
    _check_members(batching, DynamicBatching, "dynamic_batching")
    if isinstance(batching, dict):
        _check_members(batching.get("default_queue_policy"), QueuePolicy, "default_queue_policy")
    _check_members(config.get("version_policy"), VersionPolicy, "version_policy")
    members = (("instance_group", InstanceGroup), ("input", ConfiguredTensor), ("output", ConfiguredTensor))
    for name, kind in members:
        given = config.get(name)
        for each in given if isinstance(given, list) else ():
            _check_members(each, kind, name)
    try:
        return msgspec.convert(
            {name: config[name] for name in LoadConfig.__struct_fields__ if name in config},
            LoadConfig,
            strict=False,
        )
    except msgspec.ValidationError as error:
        raise InvalidBody(f"parameters.config: {error}") from None


def _check_members(given: object, kind: type[msgspec.Struct], where: str) -> None:
    if isinstance(given, dict):
        _check_names(given, kind.__struct_fields__, f"parameters.config: {where}", NotSupported)


def _load_parameters(config: LoadConfig) -> dict[str, Any]:
    parameters = {
        "version": _version(config.version_policy),
        **_parse_groups(config.instance_group),
        "max_batch_size": config.max_batch_size,
    }
    batching = config.dynamic_batching
    if batching is not None:
        parameters |= {
            name: getattr(batching, name) for name in ("priority_levels", "default_priority_level")
        }
        parameters["max_queue"] = batching.default_queue_policy.max_queue_size or None
    if batching is not None and config.max_batch_size != 0:  # as in Triton, 0 ends batching
        if config.max_batch_size is None:
            raise InvalidBody("parameters.config: dynamic_batching needs a max_batch_size of at least 1")
        parameters["max_queue_delay_us"] = batching.max_queue_delay_microseconds
    return {name: value for name, value in parameters.items() if value is not None}


def _version(policy: VersionPolicy | None) -> int | None:
    if policy is None or (policy.specific is None and policy.latest == Latest(1)):
        return None
    if policy.specific is not None and policy.latest is None and len(policy.specific.versions) == 1:
        return policy.specific.versions[0]
    raise NotSupported(
        "parameters.config: version_policy: a model has one version loaded at a time; use "
        '{"specific": {"versions": [N]}} or {"latest": {"num_versions": 1}}'
    )


def _parse_groups(groups: list[InstanceGroup]) -> dict[str, Any]:
    """Return the workers, and where they run."""
    if not groups:
        return {}
    group = groups[0]
    if len(groups) > 1 or group.kind not in KINDS:
        raise NotSupported(
            f"parameters.config: instance_group: must be one group, of {', '.join(KINDS[:-1])} or {KINDS[-1]}"
        )
    return {"instances": group.count or 1, **read_triton_kind(group.kind, group.gpus)}
