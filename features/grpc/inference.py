"""The method ModelInfer: its request as an HTTP request with binary tensors, its answer as a message.

Raw tensors are never decoded: they are views of the message, and of the HTTP answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from features.grpc.contents import FIELDS, InvalidContents, from_raw, raw_bytes, to_raw, typed_bytes
from features.grpc.errors import InvalidCall
from features.grpc.messages import MALFORMED, message_class
from features.grpc.wireformat import field_head
from runtime.onnxfields import FieldReader, TooManyFields, Unparsable
from runtime.wire import Buffer

HEADER_LENGTH = "Inference-Header-Content-Length"

INPUTS, RAW_INPUTS, CONTENTS = 5, 7, 5
OUTPUTS, RAW_OUTPUTS = 5, 6
"""The numbers of fields with tensors: of the request, of an input or output, of the answer."""
MAX_HEAD_BYTES = 2**20
"""All but the tensors of a request, of which the library makes objects: up to 45 times as much memory."""
MAX_FIELDS = 10_000
"""Fields of a request, or of one of its inputs: more than any model has inputs or dimensions."""
OF_STREAMS = "triton_enable_empty_final_response"
"""A parameter that perf_analyzer always sends; it changes nothing where each request has one answer."""
SHORT_BYTES = 4096
"""Typed contents that are converted on the event loop, in less time than a thread takes to begin."""

_Request = message_class("inference.ModelInferRequest")
_Input = message_class("inference.ModelInferRequest.InferInputTensor")
_Response = message_class("inference.ModelInferResponse")
_Output = message_class("inference.ModelInferResponse.InferOutputTensor")


@dataclass(frozen=True, slots=True)
class InferenceCall:
    """A request of ModelInfer, as HTTP.

    Attributes:
        model_name: as in the message.
        model_version: a number, a label, or empty.
        head: the JSON of the body.
        tensors: the tensors after it.
        typed: whether the answer has typed contents.
    """

    model_name: str
    model_version: str
    head: bytes
    tensors: list[Buffer]
    typed: bool


async def read_call(message: bytes, take: Callable[[int], None]) -> InferenceCall:
    """Decode a request.

    Args:
        message: the ModelInferRequest.
        take: counts bytes of memory that typed contents take beside the message; it may refuse them.

    Raises:
        InvalidCall: INVALID_ARGUMENT, with what is wrong and what to do.
    """
    try:
        return await _read_call(message, take)
    except (*MALFORMED, Unparsable, TooManyFields) as error:
        raise InvalidCall(f"the message is no ModelInferRequest: {error}") from None


async def _read_call(message: bytes, take: Callable[[int], None]) -> InferenceCall:
    head, (encoded_inputs, raw) = _split(memoryview(message), (INPUTS, RAW_INPUTS))
    request, head_bytes = _Request.FromString(head), len(head)
    inputs, contents = [], []
    for encoded in encoded_inputs:
        head, (found,) = _split(encoded, (CONTENTS,))
        head_bytes += len(head)
        _check_head(head_bytes)
        inputs.append(_Input.FromString(head))
        contents.append(found)
    typed = any(contents)
    if raw:
        _check_raw(inputs, contents, raw)
        tensors: list[Buffer] = [*raw]
    else:
        pairs = zip(inputs, contents, strict=True)
        tensors = [await _convert(given, found, take) for given, found in pairs]
    described = [
        {
            "name": given.name,
            "datatype": given.datatype,
            "shape": [*given.shape],
            "parameters": {**_parameters(given.parameters), "binary_data_size": len(tensor)},
        }
        for given, tensor in zip(inputs, tensors, strict=True)
    ]
    asked = {
        "parameters": {**_parameters(request.parameters), "binary_data_output": True},
        "inputs": described,
        "outputs": [
            {"name": each.name, "parameters": {**_parameters(each.parameters), "binary_data": True}}
            for each in request.outputs
        ],
    }
    if request.id:
        asked["id"] = request.id
    return InferenceCall(
        request.model_name, request.model_version, msgspec.json.encode(asked), tensors, typed
    )


def _split(message: memoryview, numbers: tuple[int, ...]) -> tuple[bytes, tuple[list[memoryview], ...]]:
    """Return a message without the fields of these numbers, and their values.

    Raises:
        Unparsable: the message is malformed.
        TooManyFields: it has more than `MAX_FIELDS`.
        InvalidCall: the rest is too long.
    """
    rest, taken, at = list[memoryview](), tuple(list[memoryview]() for _ in numbers), 0
    reader = FieldReader(message, MAX_FIELDS, "names, shapes and parameters")
    for field in reader.read_all(0, len(message)):
        if field.number in numbers and field.start >= 0:
            taken[numbers.index(field.number)].append(message[field.start : field.next])
        else:
            rest.append(message[at : field.next])
        at = field.next
    _check_head(sum(map(len, rest)))
    return b"".join(rest), taken


def _check_head(count: int) -> None:
    if count > MAX_HEAD_BYTES:
        raise InvalidCall(
            f"names, shapes and parameters are longer than {MAX_HEAD_BYTES} bytes;"
            " send tensors in raw_input_contents"
        )


def _check_raw(inputs: list[Any], contents: list[list[memoryview]], raw: list[memoryview]) -> None:
    for given, found in zip(inputs, contents, strict=True):
        if found:
            raise InvalidCall(
                f"input '{given.name:.64}' has contents beside raw_input_contents: send either for all inputs"
            )
    if len(raw) != len(inputs):
        raise InvalidCall(
            f"raw_input_contents has {len(raw)} tensors for {len(inputs)} inputs:"
            " send one for each, in their order"
        )


async def _convert(given: Any, contents: list[memoryview], take: Callable[[int], None]) -> Buffer:
    """Return a typed tensor in raw form; a long one is converted in a thread."""
    take(raw_bytes(given.datatype, contents))
    try:
        if sum(map(len, contents)) <= SHORT_BYTES:
            return to_raw(given.datatype, contents)
        return await asyncio.to_thread(to_raw, given.datatype, contents)
    except InvalidContents as error:
        raise InvalidCall(f"input '{given.name:.64}': {error}") from None


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: parameter_value(each) for name, each in given.items() if name != OF_STREAMS}


def parameter_value(parameter: Any) -> Any:
    """Return the value of an InferParameter or a ModelRepositoryParameter, None if it has none."""
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


class _Size(msgspec.Struct):
    binary_data_size: int


class _Tensor(msgspec.Struct):
    """An output, as the server describes it."""

    name: str
    datatype: str
    shape: list[int]
    parameters: _Size


class _Answer(msgspec.Struct):
    model_name: str
    model_version: str
    outputs: list[_Tensor]
    id: str = ""


_DECODER = msgspec.json.Decoder(_Answer)


async def write_answer(
    body: bytes, header_bytes: int | None, take: Callable[[int], None] | None = None
) -> bytes:
    """Return the ModelInferResponse of an HTTP answer with binary tensors.

    Args:
        body: the JSON, and the tensors after it.
        header_bytes: the length of the JSON; None if there is nothing else, as if all outputs are empty.
        take: for an answer with typed contents, if all datatypes have these: as in `read_call`.
    """
    whole = memoryview(body)
    answer, at = _DECODER.decode(whole[:header_bytes]), header_bytes or len(whole)
    heads = [_Output(name=each.name, datatype=each.datatype, shape=each.shape) for each in answer.outputs]
    tensors = []
    for each in answer.outputs:
        tensors.append(whole[at : at + each.parameters.binary_data_size])
        at += each.parameters.binary_data_size
    head = _Response(model_name=answer.model_name, model_version=answer.model_version, id=answer.id)
    parts = [head.SerializeToString()]
    if take is not None and all(each.datatype in FIELDS for each in answer.outputs):
        for output, each, raw in zip(heads, answer.outputs, tensors, strict=True):
            take(typed_bytes(each.datatype, len(raw)))
            parts += _field(OUTPUTS, [output.SerializeToString(), *await _contents(each.datatype, raw)])
    else:
        for output in heads:
            parts += _field(OUTPUTS, [output.SerializeToString()])
        for raw in tensors:
            parts += _field(RAW_OUTPUTS, [raw])
    return b"".join(parts)


async def _contents(datatype: str, raw: memoryview) -> Iterable[Buffer]:
    if len(raw) <= SHORT_BYTES:
        return _field(CONTENTS, [from_raw(datatype, raw)])
    return _field(CONTENTS, [await asyncio.to_thread(from_raw, datatype, raw)])


def _field(number: int, parts: list[Buffer]) -> list[Buffer]:
    return [field_head(number, sum(map(len, parts))), *parts]
