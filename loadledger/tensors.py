"""Inputs of an inference: nested lists or arrays to tensors of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""By name: a nested list, an array (anything with `tolist`) or a tensor; or a list of named tensors."""


def are_tensors(inputs: Inputs) -> bool:
    """Whether all inputs are tensors, so that the model's metadata is not needed."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return all(isinstance(value, Mapping) for value in values)


def to_tensors(inputs: Inputs, metadata: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the inputs as tensors.

    Args:
        inputs: of the caller.
        metadata: of the model; without it, datatypes are guessed from the values.

    Raises:
        ValueError: the model has no such input, or its lists are ragged.
    """
    if not isinstance(inputs, Mapping):
        return [dict(tensor) for tensor in inputs]
    known = None if metadata is None else _datatypes(metadata)
    return [_tensor(name, value, known) for name, value in inputs.items()]


def _flatten(name: str, value: Any) -> tuple[list[int], list[Any]]:
    """Return the shape of nested lists and their values, in row-major order; a single value has the shape [].

    Raises:
        ValueError: they are ragged.
    """
    shape: list[int] = []
    level = [value]
    while any(isinstance(item, list | tuple) for item in level):
        lengths = {len(item) if isinstance(item, list | tuple) else -1 for item in level}
        if len(lengths) > 1:
            raise ValueError(f"input {name!r}: lists beside each other must have the same length")
        shape += lengths
        level = [part for item in level for part in item]
    return shape, level


def _tensor(name: str, value: Any, known: Mapping[str, str] | None) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {"name": name, **value}
    if known is not None and name not in known:
        raise ValueError(f"the model has no input {name!r}; it has {', '.join(known) or 'none'}")
    plain = value.tolist() if hasattr(value, "tolist") else value
    shape, data = _flatten(name, plain)
    if hasattr(value, "shape"):  # an empty array's lists do not give its shape
        shape = [int(length) for length in value.shape]
    datatype = _looks_like(data) if known is None else known[name]
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def _looks_like(data: list[Any]) -> str:
    kinds = {type(each) for each in data}
    if kinds == {bool}:
        return "BOOL"
    if kinds == {int}:
        return "INT64"
    return "BYTES" if kinds == {str} else "FP32"


def _datatypes(metadata: Mapping[str, Any]) -> dict[str, str]:
    tensors_of = metadata.get("inputs")
    named = tensors_of if isinstance(tensors_of, list) else []
    return {
        str(tensor["name"]): str(tensor["datatype"])
        for tensor in named
        if isinstance(tensor, dict) and {"name", "datatype"} <= tensor.keys()
    }
