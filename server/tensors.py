"""JSON tensors of the Open Inference Protocol v2, to and from raw little-endian bytes.

Source of the rules: the protocol's "Tensor Data": flat or nested, row-major, elements as many as the shape
has; FP16 and BF16 have no JSON form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np

from runtime.errors import InvalidInput
from runtime.wire import DATATYPES, MAX_DIMENSIONS, MalformedTexts, Tensor, pack_texts, unpack_texts

MAX_JSON_BYTES = 64 * 2**20
"""Of an output's tensor, before it is text: what a request may have. JSON takes several times as much."""

_BINARY_ONLY = ("FP16", "BF16")
_ELEMENT: dict[str, type] = {"BOOL": bool, "BYTES": str, "FP32": float, "FP64": float}


def decode_tensor(name: str, datatype: str, shape: Sequence[int], data: msgspec.Raw) -> Tensor:
    """Return the tensor that `data`, JSON text, stands for.

    Raises:
        InvalidInput: `invalid_input`, naming the input and what is wrong with it.
    """
    _check_head(name, datatype, shape)
    text = bytes(data)
    depth = text[: len(text) - len(text.lstrip(b"[ \t\r\n"))].count(b"[")
    if depth not in (1, _nesting(shape)):
        raise InvalidInput(f"input '{name}': data must be a flat list, or nested as its shape {list(shape)}")
    try:
        values = _decoder(_ELEMENT.get(datatype, int), depth).decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidInput(f"input '{name}': data is not {datatype}: {error}") from None
    array = _array(name, datatype, values)
    _check_shape(name, shape, array.shape, depth)
    packed = pack_texts(array.ravel()) if datatype == "BYTES" else array.tobytes()
    return Tensor(name, datatype, tuple(shape), packed)


def encode_data(tensor: Tensor) -> list[Any]:
    """Return the tensor's elements, flat and row-major, as JSON can carry them.

    Raises:
        NotRepresentable: `not_representable`, JSON has no form for them, or they are too many.
    """
    if tensor.datatype in _BINARY_ONLY:
        raise NotRepresentable(f"output '{tensor.name}': {tensor.datatype} cannot be sent as JSON")
    if len(tensor.data) > MAX_JSON_BYTES:
        size = f"{len(tensor.data)} bytes; as JSON at most {MAX_JSON_BYTES} are sent"
        raise NotRepresentable(f"output '{tensor.name}' is {size}")
    if tensor.datatype == "BYTES":
        return _texts(tensor)
    values = np.frombuffer(tensor.data, DATATYPES[tensor.datatype].numpy)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise NotRepresentable(f"output '{tensor.name}' holds NaN or infinity, which JSON cannot carry")
    elements: list[Any] = values.tolist()
    return elements


class NotRepresentable(InvalidInput):
    """JSON cannot carry what the model answered."""

    code = "not_representable"


def _check_head(name: str, datatype: str, shape: Sequence[int]) -> None:
    if datatype not in DATATYPES:
        raise InvalidInput(f"input '{name}': '{datatype[:64]}' is no datatype; known: {', '.join(DATATYPES)}")
    if datatype in _BINARY_ONLY:
        raise InvalidInput(f"input '{name}': {datatype} cannot be sent as JSON")
    if len(shape) > MAX_DIMENSIONS or any(not 0 <= length < 2**31 for length in shape):
        raise InvalidInput(f"input '{name}': {list(shape)[:8]} is not a shape")


@cache
def _decoder(element: type, depth: int) -> msgspec.json.Decoder[list[Any]]:
    nested: Any = element
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested)


def _nesting(shape: Sequence[int]) -> int:
    """Return how deeply nested data is: nothing can be nested in a dimension of length 0."""
    return list(shape).index(0) + 1 if 0 in shape else max(1, len(shape))


def _array(name: str, datatype: str, values: list[Any]) -> Any:
    try:
        with np.errstate(over="ignore"):  # checked below
            array = np.array(values, DATATYPES[datatype].numpy)
    except (OverflowError, ValueError) as error:
        raise InvalidInput(f"input '{name}': data is not {datatype} of one shape: {error}") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(f"input '{name}': a number is out of the range of {datatype}")
    return array


def _check_shape(name: str, shape: Sequence[int], found: tuple[int, ...], depth: int) -> None:
    """Refuse data of another shape; numpy makes of ragged lists an array of fewer dimensions."""
    declared = tuple(shape)[:depth] if depth > 1 else (math.prod(shape),)
    if found != declared:
        raise InvalidInput(f"input '{name}': data has shape {list(found)}, declared is {list(shape)}")


def _texts(tensor: Tensor) -> list[str]:
    try:
        return unpack_texts(tensor.data)
    except MalformedTexts as error:
        raise NotRepresentable(f"output '{tensor.name}': {error}") from None
