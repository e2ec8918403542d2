"""Decoding of inference requests, encoding of responses: Open Inference Protocol v2, JSON and binary.

Decoding runs on the event loop for each request, so it only locates the tensors: JSON elements stay text,
binary tensors are views of the body. The worker checks the elements. Sources of the rules: the protocol, and
Triton's binary tensor data and parameters extensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from runtime.errors import InvalidInput
from runtime.process.sharedmemory import Region
from runtime.process.worker import Worker
from runtime.requestjson import (
    MAX_DIMENSION,
    NO_DATA,
    JsonInput,
    JsonOutput,
    JsonRequest,
    Parameters,
    decode_json,
)
from runtime.router import InferenceRequest
from runtime.wire import DATATYPES, LENGTH, Buffer, Tensor, TensorSpec, WantedOutput, plain_text

HEADER_LENGTH = "Inference-Header-Content-Length"

MAX_TIMEOUT_US = 2**63 - 1

MAX_PRIORITY = 2**64 - 1
"""Triton reads an unsigned integer of 64 bits."""

_MAX_ELEMENT_BYTES = 2**32 - 1
"""The largest length that a BYTES element can declare."""

_LENGTH_DIGITS = 12
"""Digits of the header's length: more than any accepted body has, and few enough for int()."""

_SHOWN_BYTES = 64
"""Part of a client's name in a refusal."""

_BINARY_ONLY = frozenset({"FP16", "BF16"})
_NOTHING = memoryview(b"")

_NEUTRAL: dict[str, tuple[int | str, ...]] = {
    "sequence_id": (0, ""),
    "sequence_start": (False,),
    "sequence_end": (False,),
    "classification": (0,),
}
"""Values without effect, which clients send for parameters that were not set."""


def check_parameters(where: str, parameters: Parameters) -> None:
    """Refuse unsupported parameters by name; ignore unknown ones.

    Names that begin with `triton_` are Triton's own, and its HTTP server accepts none of them either. A
    message begins with `where`: "input 'x': ", or "" for the request.

    Raises:
        InvalidInput: `invalid_input`.
    """
    for name, value in parameters.items():
        neutral = _NEUTRAL.get(name)
        if neutral is not None:
            if not any(type(value) is type(each) and value == each for each in neutral):
                raise InvalidInput(f"{where}the parameter '{name}' is not supported; leave it out")
        elif name.startswith("shared_memory_"):
            raise InvalidInput(f"{where}'{shorten(name)}': shared memory is not supported; send the data")
        elif name.startswith("triton_"):
            raise InvalidInput(f"{where}the parameter '{shorten(name)}' is not supported; leave it out")


def timeout_us(parameters: Parameters) -> int | None:
    """Return the request's timeout in microseconds, or None without a timeout or with 0.

    Raises:
        InvalidInput: `invalid_input`, the timeout is no number of microseconds.
    """
    value = parameters.get("timeout")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_TIMEOUT_US:
        raise InvalidInput("the parameter 'timeout' must be an integer of microseconds, 0 for none")
    return value or None


def read_priority(parameters: Parameters) -> int:
    """Return the request's priority: 1 is the highest, and 0 leaves it to the model.

    Raises:
        InvalidInput: `invalid_input`, the priority is no such number.
    """
    value = parameters.get("priority", 0)
    if type(value) is not int or not 0 <= value <= MAX_PRIORITY:
        raise InvalidInput("the parameter 'priority' must be an integer, 1 for the highest, 0 for none")
    return value


def binary_output(where: str, parameters: Parameters, name: str, *, default: bool = False) -> bool:
    """Return whether the parameter `name` requests binary outputs.

    Raises:
        InvalidInput: `invalid_input`, the parameter is neither true nor false.
    """
    value = parameters.get(name, default)
    if value is True or value is False:
        return value
    raise InvalidInput(f"{where}the parameter '{name}' must be true or false")


def shorten(name: str) -> str:
    return plain_text(name, _SHOWN_BYTES)


class ReceivedBody(msgspec.Struct, frozen=True, gc=False):
    """The body of an inference request, decompressed.

    Attributes:
        content: the whole body, or with a region only the JSON.
        header_bytes: the length of its JSON, as the request's header gives it.
        region: the place of its tensors in a worker's memory; the JSON, which is checked, does not lie there.
        worker: the region's worker, chosen when the body began to arrive.
    """

    content: Buffer
    header_bytes: int | None
    region: Region | None = None
    worker: Worker | None = None

    @property
    def json_bytes(self) -> int:
        return len(self.content) if self.header_bytes is None else min(self.header_bytes, len(self.content))

    @property
    def json(self) -> memoryview:
        return memoryview(self.content)[: self.json_bytes]

    def join(self) -> bytes:
        """Return all of it, as another server gets it."""
        return bytes(self.content) if self.region is None else b"".join((self.content, self.region.buffer))


def header_length(fields: Sequence[str] | str | None) -> int | None:
    """Return the length of the body's JSON, None if the whole body is JSON, 0 if it is a raw tensor.

    `fields` are the values of the request's `Inference-Header-Content-Length` fields, or a single value.

    Raises:
        InvalidInput: `invalid_input`, the value is no length, or there are two values.
    """
    if not fields:
        if fields == "":
            raise InvalidInput(f"{HEADER_LENGTH} must be a number of bytes; it is empty")
        return None
    value = fields if isinstance(fields, str) else fields[0]
    if value is not fields and len(fields) > 1:
        raise InvalidInput(f"{HEADER_LENGTH} must be given once")
    if not (value.isascii() and value.isdigit() and len(value) <= _LENGTH_DIGITS):
        raise InvalidInput(f"{HEADER_LENGTH} must be a number of bytes, not '{shorten(value)}'")
    return int(value)


def decode_request(
    body: Buffer,
    header_bytes: int | None = None,
    region: Region | None = None,
    request: JsonRequest | None = None,
) -> InferenceRequest:
    """Decode a request; its tensors are views of the body.

    Binary tensors follow `header_bytes` of JSON, see `header_length`; None if the whole body is JSON. With a
    region, the tensors are there, and `body` is only the JSON. `request` is the decoded JSON, if any.

    Raises:
        InvalidInput: `invalid_input`, the request is malformed or unsupported.
    """
    start = header_bytes or 0
    if region is not None:
        text, payload, start = body, region.buffer, 0
    elif header_bytes is None:
        text, payload = body, _NOTHING
    elif 0 <= header_bytes <= len(body):
        payload = memoryview(body)
        text = payload[:header_bytes]
    else:
        raise InvalidInput(f"{HEADER_LENGTH} is {header_bytes}, but the body has {len(body)} bytes")
    request = request or decode_json(text)
    tensors = _tensors(request.inputs, payload, start)
    parameters, limit_us, default, priority = request.parameters, None, True, 0
    if parameters:
        limit_us, default = timeout_us(parameters), not binary_output("", parameters, "binary_data_output")
        check_parameters("", parameters)
        priority = read_priority(parameters)
    outputs = _outputs(request.outputs, default) if request.outputs else ()
    request_id = None if request.id is msgspec.UNSET else request.id
    return InferenceRequest(request_id, limit_us, tensors, outputs, default, region, priority)


def _tensors(inputs: list[JsonInput], body: memoryview, start: int) -> tuple[Tensor, ...]:
    """Return the inputs; the binary ones are in `body`, from `start` to its end."""
    tensors = []
    for item in inputs:
        parameters, size = item.parameters, None
        if parameters:
            size = parameters.get("binary_data_size")
            if size is None or len(parameters) > 1:
                check_parameters(f"input '{shorten(item.name)}': ", parameters)
        if item.datatype not in DATATYPES:
            known = ", ".join(DATATYPES)
            raise _invalid_input(item, f"'{shorten(item.datatype)}' is no datatype; known: {known}")
        if size is None:
            tensors.append(Tensor(item.name, item.datatype, item.shape, _text(item), text=True))
        else:
            data = _binary(item, size, body, start)
            tensors.append(Tensor(item.name, item.datatype, item.shape, data))
            start += len(data)
    if start != len(body):
        raise InvalidInput(f"{len(body) - start} bytes are left over after the last binary tensor")
    return tuple(tensors)


def _text(item: JsonInput) -> memoryview:
    if item.data is NO_DATA:
        raise _invalid_input(item, "data is missing: give either data or the parameter binary_data_size")
    if item.datatype in _BINARY_ONLY:
        raise _invalid_input(item, f"{item.datatype} cannot be sent as JSON; use the binary data form")
    return memoryview(item.data)


def _binary(item: JsonInput, size: float | str, body: memoryview, start: int) -> memoryview:
    if item.data is not NO_DATA:
        raise _invalid_input(item, "give either data or the parameter binary_data_size, not both")
    if type(size) is not int or size < 0:
        raise _invalid_input(item, "the parameter binary_data_size must be a number of bytes")
    data, element = body[start : start + size], DATATYPES[item.datatype].size
    if element and math.prod(item.shape) * element != size:
        expected = f"{item.datatype} of shape {list(item.shape)}"
        raise _invalid_input(item, f"binary_data_size is {size}, which is not the size of {expected}")
    if len(data) != size:
        text = f"binary_data_size is {size}, but only {len(data)} bytes of the body are left for it"
        raise _invalid_input(item, f"{text}; {HEADER_LENGTH} must say where the JSON ends")
    return data


def _outputs(outputs: list[JsonOutput], default: bool) -> tuple[WantedOutput, ...]:  # noqa: FBT001 -- what text is
    wanted = []
    for item in outputs:
        text, parameters = default, item.parameters
        if parameters:
            where = f"output '{shorten(item.name)}': "
            text = not binary_output(where, parameters, "binary_data", default=not default)
            if len(parameters) > 1 or "binary_data" not in parameters:
                check_parameters(where, parameters)
        wanted.append(WantedOutput(item.name, text))
    return tuple(wanted)


def _invalid_input(item: JsonInput, text: str) -> InvalidInput:
    return InvalidInput(f"input '{shorten(item.name)}': {text}")


def decode_raw(
    body: Buffer, inputs: Sequence[TensorSpec], *, max_batch_size: int = 0, region: Region | None = None
) -> InferenceRequest:
    """Decode a raw body: the data of the model's only input. Its outputs are binary.

    With a region, `body` is its buffer.

    The variable dimension follows from the body's size; for a batching model, the body is a batch of 1. A
    body of BYTES is one element, as in Triton ("Raw Binary Request").

    Raises:
        InvalidInput: `invalid_input`, the model needs several inputs, or the body does not fit its input.
    """
    spec = _required_input(inputs)
    datatype = DATATYPES.get(spec.datatype)
    if datatype is None:
        raise InvalidInput(
            f"input '{shorten(spec.name)}' is {shorten(spec.datatype)}, which has no binary form"
        )
    shape = (1, *spec.shape[1:]) if max_batch_size and spec.shape else spec.shape
    data: Buffer = memoryview(body)
    if datatype.size:
        shape = _fill_dimension(spec.name, shape, len(body), datatype.size)
    else:
        shape, data = _one_element(spec.name, shape, body)
    tensors = (Tensor(spec.name, spec.datatype, shape, data),)
    return InferenceRequest(None, None, tensors, (), text=False, region=region)


def _required_input(inputs: Sequence[TensorSpec]) -> TensorSpec:
    needed = [spec for spec in inputs if not spec.optional] if len(inputs) > 1 else inputs
    if len(needed) != 1:
        text = f"this one needs {len(needed)}"
        raise InvalidInput(f"a body without JSON is for a model that needs one input; {text}")
    return needed[0]


def _fill_dimension(name: str, shape: tuple[int, ...], size: int, element: int) -> tuple[int, ...]:
    variable = shape.count(-1)
    if variable > 1:
        text = f"{list(shape)} has {variable} variable dimensions; send a request with its shape"
        raise InvalidInput(f"input '{shorten(name)}': {text}")
    known = element * math.prod(length for length in shape if length != -1)
    length = size // known if known else 0
    if known * (length if variable else 1) != size or length > MAX_DIMENSION:
        text = f"the body's {size} bytes do not make elements of {element} bytes in shape {list(shape)}"
        raise InvalidInput(f"input '{shorten(name)}': {text}")
    return tuple(length if each == -1 else each for each in shape)


def _one_element(name: str, shape: tuple[int, ...], body: Buffer) -> tuple[tuple[int, ...], bytes]:
    if any(length not in (-1, 1) for length in shape) or len(body) > _MAX_ELEMENT_BYTES:
        text = f"the body would be its one element, which shape {list(shape)} has not"
        raise InvalidInput(f"input '{shorten(name)}': {text}")
    return (1,) * len(shape), LENGTH.pack(len(body)) + body


class _BinarySize(msgspec.Struct, gc=False):
    binary_data_size: int


class _TextOutput(msgspec.Struct, gc=False):
    """Without `parameters`: Triton's C++ client refuses them if they lack binary_data_size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: msgspec.Raw


class _BinaryOutput(msgspec.Struct, gc=False):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: _BinarySize


class _Response(msgspec.Struct, omit_defaults=True, gc=False):
    model_name: str
    model_version: str
    outputs: list[_TextOutput | _BinaryOutput]
    id: str | None = None


_ENCODER = msgspec.json.Encoder()


def encode_response(
    model_id: str, version: int, request_id: str | None, tensors: Sequence[Tensor]
) -> tuple[list[Buffer], int | None]:
    """Return the buffers of a response, and the length of its JSON.

    The length is None if the whole response is JSON, `application/json`; otherwise the type is
    `application/octet-stream` with `Inference-Header-Content-Length`. Binary outputs without bytes make no
    binary response, as in Triton. The data of binary outputs is not copied.
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
    head = _ENCODER.encode(_Response(model_id, str(version), outputs, request_id))
    return [head, *payload], len(head) if payload else None
