"""Inference requests of the Open Inference Protocol v2, JSON and binary, as tensors ready for a worker.

Runs on the event loop for each request, so it reads only what says where the tensors are: JSON elements go
on as text, binary ones as views of the body. What the elements are is the worker's to check. Sources of the
rules: the protocol, and Triton's binary tensor data and parameters extensions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from runtime.errors import InvalidInput
from runtime.wire import (
    DATATYPES,
    MAX_DIMENSIONS,
    Buffer,
    Name,
    Tensor,
    WantedOutput,
)
from server.v2.parameters import Parameters, binary_output, check_parameters, shown, timeout_us

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_HEAD_BYTES = 2**20
"""Of a request without its tensors' data: a thousand inputs take a quarter of it. Reading 64 MiB of names,
shapes and parameters would hold up everybody for seconds (measured), and not fit into a worker's frame."""

MAX_INPUTS = MAX_HEAD_BYTES // 32
"""An input has more bytes than that beside its data, so a request with more is refused for those anyway."""

MAX_DIMENSION = 2**31 - 1
"""What numpy takes everywhere, and more than any body has elements."""

_LENGTH_DIGITS = 12  # more than any body that is taken, and int() never refuses so few
_BINARY_ONLY = frozenset({"FP16", "BF16"})
_NO_PARAMETER = (b"[", b"{", b"n")  # how a list, an object and null begin
_NO_DATA = msgspec.Raw()
_NOTHING = memoryview(b"")

Dimension = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIMENSION)]
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]


class InferenceRequest(msgspec.Struct, frozen=True, gc=False):
    """What is asked: the inputs, and how the outputs shall come back.

    No `outputs` means all; `text` is the form of those that are not listed: JSON, or else binary.
    `timeout_us` is the client's deadline in microseconds, None if it set none.
    """

    id: str | None
    timeout_us: int | None
    tensors: tuple[Tensor, ...]
    outputs: tuple[WantedOutput, ...]
    text: bool


class _Input(msgspec.Struct, gc=False):
    name: Name
    shape: Shape
    datatype: str
    data: msgspec.Raw = _NO_DATA
    parameters: Parameters | None = None


class _Output(msgspec.Struct, gc=False):
    name: Name
    parameters: Parameters | None = None


class _Request(msgspec.Struct, gc=False):
    inputs: list[_Input]
    outputs: list[_Output] | None = None
    id: str | None = None
    parameters: Parameters | None = None


class _Loose(msgspec.Struct, gc=False):
    """As much of a tensor as it takes to name it in a refusal."""

    name: str
    parameters: dict[str, msgspec.Raw] = {}


class _LooseRequest(msgspec.Struct, gc=False):
    inputs: list[_Loose] = []
    outputs: list[_Loose] = []
    parameters: dict[str, msgspec.Raw] = {}


class _Data(msgspec.Struct, gc=False):
    """Counted as they are read, for each is an object: of `{},{},…` 64 MiB would make 2 GB in 4 s."""

    data: msgspec.Raw = _NO_DATA
    count: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _Data.count += 1
        if _Data.count > MAX_INPUTS:
            raise InvalidInput(f"the request has more than {MAX_INPUTS} inputs; no more are taken")


class _DataRequest(msgspec.Struct, gc=False):
    inputs: list[_Data] = []


_REQUEST = msgspec.json.Decoder(_Request)
_LOOSE = msgspec.json.Decoder(_LooseRequest)
_DATA = msgspec.json.Decoder(_DataRequest)
_PLACE = re.compile(r"`\$(?:\.(inputs|outputs)\[([0-9]+)\])?\.(\w+)")


def header_length(fields: Sequence[str] | str | None, body_length: int) -> int | None:
    """Return how many bytes of the body are JSON, None if all are; 0 says that all are the one input's.

    Args:
        fields: the value of each `Inference-Header-Content-Length` field of the request, or the only one.
        body_length: in bytes, of the body as it is after decompression.

    Raises:
        InvalidInput: `invalid_input`, the field is no length, not within the body, or given twice.
    """
    if not fields:
        if fields == "":
            raise InvalidInput(f"{HEADER_LENGTH} must be a number of bytes; it is empty")
        return None
    value = fields if isinstance(fields, str) else fields[0]
    if value is not fields and len(fields) > 1:
        raise InvalidInput(f"{HEADER_LENGTH} must be given once")
    if not (value.isascii() and value.isdigit()):
        raise InvalidInput(f"{HEADER_LENGTH} must be a number of bytes, not '{shown(value)}'")
    if len(value) > _LENGTH_DIGITS or int(value) > body_length:
        raise InvalidInput(f"{HEADER_LENGTH} is {shown(value)}, but the body has {body_length} bytes")
    return int(value)


def decode_request(body: Buffer, header_bytes: int | None = None) -> InferenceRequest:
    """Return the request that `body` is; its tensors refer to the body, they are no copies.

    Args:
        body: JSON, and after it the binary tensors, one after the other.
        header_bytes: how much of it is JSON, as `header_length` says; None is all of it.

    Raises:
        InvalidInput: `invalid_input`, it is not one, or asks for what is not supported.
    """
    if header_bytes is None:
        text, payload = body, _NOTHING
    elif 0 <= header_bytes <= len(body):
        payload = memoryview(body)
        text = payload[:header_bytes]
    else:
        raise InvalidInput(f"{HEADER_LENGTH} is {header_bytes}, but the body has {len(body)} bytes")
    try:
        if len(text) > MAX_HEAD_BYTES:
            _check_head(text)
        asked = _REQUEST.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(text, error) from None
    tensors = _tensors(asked.inputs, payload, header_bytes or 0)
    parameters, limit_us, default = asked.parameters, None, True
    if parameters:
        limit_us, default = timeout_us(parameters), not binary_output("", parameters, "binary_data_output")
        check_parameters("", parameters)
    outputs = _outputs(asked.outputs, default) if asked.outputs else ()
    return InferenceRequest(asked.id, limit_us, tensors, outputs, default)


def _tensors(inputs: list[_Input], body: memoryview, start: int) -> tuple[Tensor, ...]:
    """Return the inputs; the binary ones are in `body`, one after the other from `start` to its end."""
    tensors = []
    for item in inputs:
        parameters, size = item.parameters, None
        if parameters:
            size = parameters.get("binary_data_size")
            if size is None or len(parameters) > 1:
                check_parameters(f"input '{shown(item.name)}': ", parameters)
        if item.datatype not in DATATYPES:
            known = ", ".join(DATATYPES)
            raise _wrong(item, f"'{shown(item.datatype)}' is no datatype; known: {known}")
        if size is None:
            tensors.append(Tensor(item.name, item.datatype, item.shape, _text(item), text=True))
        else:
            data = _binary(item, size, body, start)
            tensors.append(Tensor(item.name, item.datatype, item.shape, data))
            start += len(data)
    if start != len(body):
        raise InvalidInput(f"{len(body) - start} bytes are left over after the last binary tensor")
    return tuple(tensors)


def _text(item: _Input) -> memoryview:
    if item.data is _NO_DATA:
        raise _wrong(item, "data is missing: give either data or the parameter binary_data_size")
    if item.datatype in _BINARY_ONLY:
        raise _wrong(item, f"{item.datatype} cannot be sent as JSON; use the binary data form")
    return memoryview(item.data)


def _binary(item: _Input, size: float | str, body: memoryview, start: int) -> memoryview:
    if item.data is not _NO_DATA:
        raise _wrong(item, "give either data or the parameter binary_data_size, not both")
    if type(size) is not int or size < 0:
        raise _wrong(item, "the parameter binary_data_size must be a number of bytes")
    data, element = body[start : start + size], DATATYPES[item.datatype].size
    if element and math.prod(item.shape) * element != size:
        expected = f"{item.datatype} of shape {list(item.shape)}"
        raise _wrong(item, f"binary_data_size is {size}, which is not the size of {expected}")
    if len(data) != size:
        told = f"binary_data_size is {size}, but only {len(data)} bytes of the body are left for it"
        raise _wrong(item, f"{told}; {HEADER_LENGTH} must say where the JSON ends")
    return data


def _outputs(outputs: list[_Output], default: bool) -> tuple[WantedOutput, ...]:  # noqa: FBT001 -- what text is
    wanted = []
    for item in outputs:
        text, parameters = default, item.parameters
        if parameters:
            where = f"output '{shown(item.name)}': "
            text = not binary_output(where, parameters, "binary_data", default=not default)
            if len(parameters) > 1 or "binary_data" not in parameters:
                check_parameters(where, parameters)
        wanted.append(WantedOutput(item.name, text))
    return tuple(wanted)


def _check_head(text: Buffer) -> None:
    _Data.count = 0
    data_bytes = sum(len(memoryview(item.data)) for item in _DATA.decode(text).inputs)
    if len(text) - data_bytes > MAX_HEAD_BYTES:
        told = f"has {len(text) - data_bytes} bytes; at most {MAX_HEAD_BYTES} are taken"
        raise InvalidInput(f"the request without its tensors' data {told}")


def _refusal(text: Buffer, error: Exception) -> InvalidInput:
    """Say what is wrong, with the names of the tensor and the parameter where they can be read."""
    told = f"the body is not an inference request: {error}"
    place = _PLACE.search(str(error)) if isinstance(error, msgspec.ValidationError) else None
    if place is None:
        return InvalidInput(told)
    try:
        loose = _LOOSE.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return InvalidInput(told)
    kind, number, member = place.groups()
    found: list[_Loose] = getattr(loose, kind)[int(number) :][:1] if kind else []
    where = f"{kind[:-1]} '{shown(found[0].name)}': " if found else ""
    if member == "shape":
        rule = f"at most {MAX_DIMENSIONS} integers from 0 to {MAX_DIMENSION}"
        return InvalidInput(f"{where}shape is not a shape, which is {rule}: {error}")
    holder = found[0] if found else loose
    for name, value in holder.parameters.items() if member == "parameters" else ():
        if bytes(memoryview(value)[:1]) in _NO_PARAMETER:
            rule = "must be a string, a number or a boolean"
            return InvalidInput(f"{where}the parameter '{shown(name)}' {rule}")
    return InvalidInput(f"{where}{told}")


def _wrong(item: _Input, told: str) -> InvalidInput:
    return InvalidInput(f"input '{shown(item.name)}': {told}")
