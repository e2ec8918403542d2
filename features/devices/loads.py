"""Devices in requests of loads: fields of the body, the server's defaults, and Triton's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marshmallow import Schema, fields, validate
from msgspec import UNSET

from events.types import LoadParameters
from features.devices.names import CPU, DEVICE, DEVICE_RULE, FALLBACKS, MAX_DEVICES
from server.api.schemas import about
from server.config import Config


class DeviceFieldsSchema(Schema):
    """Parameters of a load on devices."""

    devices = fields.List(
        fields.String(validate=validate.Regexp(rf"(?:{DEVICE.pattern})\Z", error=DEVICE_RULE)),
        validate=validate.Length(1, MAX_DEVICES),
        allow_none=True,
        **about(
            "Devices, like `cuda:0`, `cuda:*` (any) or `cpu`: the load runs on the first that has room. "
            "Default, also for null: the server's --devices."
        ),
    )
    fallback = fields.String(
        validate=validate.OneOf(FALLBACKS),
        **about(
            "What becomes of nodes of the graph that the device does not support: `refuse` the load, or run "
            "them on the `cpu`. Default: `refuse`."
        ),
    )


def settle_parameters(merged: Mapping[str, Any], config: Config) -> Mapping[str, Any]:
    """Return the parameters as a load has them, of what a request and the model's file say."""
    devices = tuple(dict.fromkeys(merged.get("devices") or config.devices.split(",")))
    return {
        "devices": UNSET if devices == (CPU,) else devices,
        "fallback": CPU if merged.get("fallback") == CPU else UNSET,
    }


def read_triton_kind(kind: str, gpus: Sequence[int]) -> Mapping[str, Any]:
    """Return the parameters of Triton's kind of instances: for KIND_GPU those of CUDA, as numbered."""
    on_gpus = [f"cuda:{number}" for number in gpus] or ["cuda:*"]
    return {"devices": {"KIND_CPU": [CPU], "KIND_GPU": on_gpus}.get(kind)}


def find_triton_kind(parameters: LoadParameters) -> str:
    """Return the kind of instances by which Triton describes a load."""
    return "KIND_CPU" if parameters.devices is UNSET else "KIND_MODEL"
