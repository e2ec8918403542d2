"""JSON tensors of the Open Inference Protocol v2, to and from numpy's arrays.

Source of the rules: the protocol's "Tensor Data": flat or nested, row-major, elements as many as the shape
has; FP16 and BF16 have no JSON form.
"""

import math
from functools import cache
from typing import Any

import msgspec
import numpy as np

from runtime.errors import InvalidInput, NotRepresentable
from runtime.wire import DATATYPES, MAX_PAYLOAD_BYTES, Buffer, Tensor

MAX_JSON_BYTES = 64 * 2**20
"""Of an output's tensor, before it is text: what a request may have. JSON takes several times as much."""

_BINARY_ONLY = ("FP16", "BF16")
_ELEMENT: dict[str, type] = {"BOOL": bool, "BYTES": str, "FP32": float, "FP64": float}
_TYPES = {datatype.name: np.dtype(datatype.numpy) for datatype in DATATYPES.values()}
_FP32_BOUND = 2.0**128 - 2.0**103
"""The first number that is rounded to infinity (IEEE 754)."""
_SHORT = 256
"""Of so many elements Python finds the largest sooner than numpy (measured)."""
_BRACKET = ord("[")
_FIRST_OF_AN_ELEMENT = frozenset(b'-0123456789tf"')
_ENCODER = msgspec.json.Encoder()


def check_json(name: str, datatype: str) -> None:
    """Refuse to answer with an output that JSON has no form for.

    Raises:
        NotRepresentable: `not_representable`, naming the output.
    """
    if datatype in _BINARY_ONLY:
        reason = f"output '{name}': {datatype} cannot be sent as JSON; ask for the binary data form"
        raise NotRepresentable(reason)


def decode_text(tensor: Tensor) -> Any:
    """Return the array that a tensor's data, JSON text, stands for: of its datatype and shape.

    Raises:
        InvalidInput: `invalid_input`, naming the input and what is wrong with it.
    """
    name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
    if datatype in _BINARY_ONLY:
        raise InvalidInput(f"input '{name}': {datatype} cannot be sent as JSON; use the binary data form")
    depth = _depth(tensor.data)
    if depth not in (1, _nesting(shape)):
        raise InvalidInput(f"input '{name}': data must be a flat list, or nested as its shape {list(shape)}")
    try:
        values = _decoder(_ELEMENT.get(datatype, int), depth).decode(tensor.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"input '{name}': data is not {datatype}: {error}") from None
    array = _array(name, datatype, values)
    found = array.shape
    if found == shape:
        return array
    if found == (shape[:depth] if depth > 1 else (math.prod(shape),)):
        return _reshaped(name, array, shape)
    raise InvalidInput(f"input '{name}': data has shape {list(found)}, declared is {list(shape)}")


def encode_text(name: str, datatype: str, array: Any) -> bytes:
    """Return an array's elements, flat and row-major, as JSON text.

    Raises:
        NotRepresentable: `not_representable`, JSON has no form for them, or they are too many.
    """
    check_json(name, datatype)
    elements = array.ravel().tolist()
    size = sum(4 + len(each.encode()) for each in elements) if datatype == "BYTES" else array.nbytes
    if size > MAX_JSON_BYTES:
        raise NotRepresentable(
            f"output '{name}' is {size} bytes; as JSON at most {MAX_JSON_BYTES} are sent: "
            "ask for the binary data form"
        )
    text = _ENCODER.encode(elements)
    if datatype in ("FP32", "FP64") and b"null" in text:  # what the encoder makes of what is no number
        raise NotRepresentable(f"output '{name}' holds NaN or infinity, which JSON cannot carry")
    if len(text) > MAX_PAYLOAD_BYTES:
        raise NotRepresentable(f"output '{name}' is too long as JSON: ask for the binary data form")
    return text


@cache
def _decoder(element: type, depth: int) -> msgspec.json.Decoder[list[Any]]:
    nested: Any = element
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested)


def _depth(data: Buffer) -> int:
    """Count the brackets that the text opens with."""
    if len(data) > 1 and data[0] == _BRACKET and data[1] in _FIRST_OF_AN_ELEMENT:
        return 1
    text = bytes(data)
    return text[: len(text) - len(text.lstrip(b"[ \t\r\n"))].count(b"[")


def _nesting(shape: tuple[int, ...]) -> int:
    """Return how deeply nested data is: nothing can be nested in a dimension of length 0."""
    return shape.index(0) + 1 if 0 in shape else max(1, len(shape))


def _array(name: str, datatype: str, values: list[Any]) -> Any:
    if datatype == "FP32" and not _fits(values):
        raise InvalidInput(f"input '{name}': a number is out of the range of {datatype}")
    try:
        return np.array(values, _TYPES[datatype])
    except (OverflowError, ValueError) as error:
        raise InvalidInput(f"input '{name}': data is not {datatype} of one shape: {error}") from None


def _fits(values: list[Any]) -> bool:
    """Tell whether these lists of numbers can be FP32. FP64 is what the decoder itself reads."""
    if not values:
        return True
    if isinstance(values[0], list):
        return all(map(_fits, values))
    if len(values) <= _SHORT:
        return bool(max(values) < _FP32_BOUND and min(values) > -_FP32_BOUND)
    numbers = np.array(values)
    return bool(numbers.max() < _FP32_BOUND and numbers.min() > -_FP32_BOUND)


def _reshaped(name: str, array: Any, shape: tuple[int, ...]) -> Any:
    try:
        return array.reshape(shape)
    except ValueError:
        raise InvalidInput(f"input '{name}': {list(shape)[:8]} is not a shape") from None
