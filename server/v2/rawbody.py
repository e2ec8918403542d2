"""Inference requests whose body is nothing but the data of the model's one input.

Source: "Raw Binary Request" of Triton's binary tensor data extension (`Inference-Header-Content-Length: 0`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.errors import InvalidInput
from runtime.wire import DATATYPES, LENGTH, Buffer, Tensor, TensorSpec
from server.v2.decoding import MAX_DIMENSION, InferenceRequest
from server.v2.parameters import shown

_MAX_ELEMENT_BYTES = 2**32 - 1  # what LENGTH can say


def decode_raw(body: Buffer, inputs: Sequence[TensorSpec], *, max_batch_size: int = 0) -> InferenceRequest:
    """Return the request whose body is nothing but the data of the model's input; outputs come back binary.

    The one variable dimension follows from the body's size; where the model batches, this is a batch of 1.
    Of BYTES, the whole body is one element, as Triton has it ("Raw Binary Request").

    Raises:
        InvalidInput: `invalid_input`, the model has not one input to fill, or the body does not fit it.
    """
    spec = _only_input(inputs)
    datatype = DATATYPES.get(spec.datatype)
    if datatype is None:
        raise InvalidInput(f"input '{shown(spec.name)}' is {shown(spec.datatype)}, which has no binary form")
    shape = (1, *spec.shape[1:]) if max_batch_size and spec.shape else spec.shape
    data: Buffer = memoryview(body)
    if datatype.size:
        shape = _filled(spec.name, shape, len(body), datatype.size)
    else:
        shape, data = _one_element(spec.name, shape, body)
    return InferenceRequest(None, None, (Tensor(spec.name, spec.datatype, shape, data),), (), text=False)


def _only_input(inputs: Sequence[TensorSpec]) -> TensorSpec:
    needed = [spec for spec in inputs if not spec.optional] if len(inputs) > 1 else inputs
    if len(needed) != 1:
        told = f"this one needs {len(needed)}"
        raise InvalidInput(f"a body without JSON is for a model that needs one input; {told}")
    return needed[0]


def _filled(name: str, shape: tuple[int, ...], size: int, element: int) -> tuple[int, ...]:
    """Return the shape with its variable dimension as the data's size has it."""
    variable = shape.count(-1)
    if variable > 1:
        told = f"{list(shape)} has {variable} variable dimensions; send a request with its shape"
        raise InvalidInput(f"input '{shown(name)}': {told}")
    known = element * math.prod(length for length in shape if length != -1)
    length = size // known if known else 0
    if known * (length if variable else 1) != size or length > MAX_DIMENSION:
        told = f"the body's {size} bytes do not make elements of {element} bytes in shape {list(shape)}"
        raise InvalidInput(f"input '{shown(name)}': {told}")
    return tuple(length if each == -1 else each for each in shape)


def _one_element(name: str, shape: tuple[int, ...], body: Buffer) -> tuple[tuple[int, ...], bytes]:
    if any(length not in (-1, 1) for length in shape) or len(body) > _MAX_ELEMENT_BYTES:
        told = f"the body would be its one element, which shape {list(shape)} has not"
        raise InvalidInput(f"input '{shown(name)}': {told}")
    return (1,) * len(shape), LENGTH.pack(len(body)) + body
