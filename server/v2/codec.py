"""Inference requests and answers of the Open Inference Protocol v2, JSON and binary.

Decoding runs on the event loop for each request, so it reads only what says where the tensors are: JSON
elements go on as text, binary ones as views of the body. What the elements are is the worker's to check.
Sources of the rules: the protocol, and Triton's binary tensor data and parameters extensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from runtime.errors import InvalidInput
from runtime.wire import (
    DATATYPES,
    LENGTH,
    MAX_DIMENSIONS,
    Buffer,
    Name,
    Tensor,
    TensorSpec,
    WantedOutput,
    plain_text,
)

Parameters = dict[str, bool | int | float | str]
"""Each value a string, a number or a boolean: the protocol allows no other."""

MAX_TIMEOUT_US = 2**63 - 1

_NEUTRAL: dict[str, tuple[int | str, ...]] = {
    "sequence_id": (0, ""),
    "sequence_start": (False,),
    "sequence_end": (False,),
    "priority": (0,),
    "classification": (0,),
}
"""Values that ask for nothing: clients send them for what was not set."""

_SHOWN_BYTES = 64


def check_parameters(where: str, parameters: Parameters) -> None:
    """Refuse by name what has a meaning that is not supported; of all else nothing is checked here.

    All names that begin with `triton_` are Triton's own, and its HTTP server takes none of them either.

    Args:
        where: whose parameters these are, as a message begins: "input 'x': ", or "" for the request's.
        parameters: what was given.

    Raises:
        InvalidInput: `invalid_input`.
    """
    for name, value in parameters.items():
        neutral = _NEUTRAL.get(name)
        if neutral is not None:
            if not any(type(value) is type(each) and value == each for each in neutral):
                raise InvalidInput(f"{where}the parameter '{name}' is not supported; leave it out")
        elif name.startswith("shared_memory_"):
            raise InvalidInput(f"{where}'{shown(name)}': shared memory is not supported; send the data")
        elif name.startswith("triton_"):
            raise InvalidInput(f"{where}the parameter '{shown(name)}' is not supported; leave it out")


def timeout_us(parameters: Parameters) -> int | None:
    """Return the request's deadline in microseconds, None if it has none or 0.

    Raises:
        InvalidInput: `invalid_input`, it is not a number of microseconds.
    """
    value = parameters.get("timeout")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_TIMEOUT_US:
        raise InvalidInput("the parameter 'timeout' must be an integer of microseconds, 0 for none")
    return value or None


def binary_output(where: str, parameters: Parameters, name: str, *, default: bool = False) -> bool:
    """Return what the parameter `name` says about the form of outputs.

    Raises:
        InvalidInput: `invalid_input`, it is neither true nor false.
    """
    value = parameters.get(name, default)
    if value is True or value is False:
        return value
    raise InvalidInput(f"{where}the parameter '{name}' must be true or false")


def shown(name: str) -> str:
    """Return what a message says of a name that a client chose."""
    return plain_text(name, _SHOWN_BYTES)


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
_DATA = msgspec.json.Decoder(_DataRequest)


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
        raise InvalidInput(f"the body is not an inference request: {error}") from None
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


def _wrong(item: _Input, told: str) -> InvalidInput:
    return InvalidInput(f"input '{shown(item.name)}': {told}")


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


class _BinarySize(msgspec.Struct, gc=False):
    binary_data_size: int


class _TextOutput(msgspec.Struct, gc=False):
    """No `parameters`: Triton's C++ client refuses them where they say no binary_data_size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: msgspec.Raw


class _BinaryOutput(msgspec.Struct, gc=False):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: _BinarySize


class _Answer(msgspec.Struct, omit_defaults=True, gc=False):
    model_name: str
    model_version: str
    outputs: list[_TextOutput | _BinaryOutput]
    id: str | None = None


_ENCODER = msgspec.json.Encoder()


def encode_response(
    model_id: str, version: int, request_id: str | None, tensors: Sequence[Tensor]
) -> tuple[list[Buffer], int | None]:
    """Return the answer as buffers to be written one after the other, and how many bytes of it are JSON.

    That is None if all are, and the answer `application/json`; else it is `application/octet-stream` with
    `Inference-Header-Content-Length`. Binary outputs without any bytes make no binary answer, as Triton has
    it. The data of binary outputs is not copied.
    """
    outputs: list[_TextOutput | _BinaryOutput] = []
    payload: list[Buffer] = []
    for tensor in tensors:
        if tensor.text:
            text = msgspec.Raw(tensor.data)
            outputs.append(_TextOutput(tensor.name, tensor.datatype, tensor.shape, text))
            continue
        size = _BinarySize(len(tensor.data))
        outputs.append(_BinaryOutput(tensor.name, tensor.datatype, tensor.shape, size))
        if size.binary_data_size:
            payload.append(tensor.data)
    head = _ENCODER.encode(_Answer(model_id, str(version), outputs, request_id))
    return [head, *payload], len(head) if payload else None
